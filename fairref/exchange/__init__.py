"""Adapters from other tools, and for them."""
