"""The figures of the paper, and their numbers."""
