"""Prompt and noise -> images, by a bundle with or without an adapter; what judges see of images."""
