"""Faults on a cluster of real processes: stories (`stories.txt`) and seeded chaos (`chaos.py`)."""
