"""The small world: its pictures and captions, and the training of its weights."""
