"""The small world: its pictures, and the training of its weights."""
