"""Other ways to a fairer model, one short file each, on the noise of evaluation (docs/baselines.md)."""
