"""Charts as SVG, and the figures of the paper with their numbers."""
