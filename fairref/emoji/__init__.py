"""The small world of the emoji bundle: its pictures and captions, and the training of its networks."""
