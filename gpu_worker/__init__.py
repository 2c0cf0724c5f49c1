"""GPU worker: runs the model with a small resident KV window. The only package that imports torch."""
