"""Reads and writes files: weights, images, data sets, the tokenizer's vocabulary, JSON."""
