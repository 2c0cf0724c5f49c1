"""GPU worker: runs the model with a small resident KV window. Only this package imports torch."""
