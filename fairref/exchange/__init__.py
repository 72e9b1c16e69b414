"""Adapters for other tools and from them, with a card for each that leaves."""
