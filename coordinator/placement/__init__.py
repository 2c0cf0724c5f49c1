"""Where a context's KV lives: one policy per file, and the planner that chooses."""
