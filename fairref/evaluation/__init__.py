"""Judged images -> shares, bias, likeness."""
