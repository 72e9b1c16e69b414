"""Targets, losses and measures of fairness. They know no sampler."""
