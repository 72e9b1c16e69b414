"""The networks Stable Diffusion is made of, and what they share: checks of settings, and attention."""

from dataclasses import fields

import torch.nn.functional as F
from torch import Tensor

from fairref.errors import UserError

REMEDY = "correct the config.json or use another checkpoint"


def require(condition: bool, found: str, expected: str, remedy: str = REMEDY) -> None:
    """Raise a UserError unless `condition` holds."""
    if not condition:
        raise UserError(f"found {found}, expected {expected}; {remedy}.")


def is_count(value: object) -> bool:
    """Whether `value` is a positive int (bool is not a count)."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_positive(value: object) -> bool:
    """Whether `value` is a positive number."""
    return is_count(value) or (isinstance(value, float) and value > 0)


def are_counts(values: object) -> bool:
    """Whether `values` is a non-empty tuple of positive ints."""
    return isinstance(values, tuple) and len(values) > 0 and all(is_count(value) for value in values)


NUMBERS = {  # type of a field -> the test that its value must pass, and that test in words
    int: (is_count, "a positive whole number"),
    float: (is_positive, "a positive number"),
    tuple[int, ...]: (are_counts, "a list of positive whole numbers"),
    int | tuple[int, ...]: (lambda value: is_count(value) or are_counts(value), "positive whole numbers"),
}


def require_numbers(config: object) -> None:
    """Raise a UserError unless each field of the dataclass `config` passes the test of its type in NUMBERS."""
    for field in fields(config):
        if field.type in NUMBERS:
            value = getattr(config, field.name)
            holds, expected = NUMBERS[field.type]
            require(holds(value), f"{field.name} = {value!r}", expected)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """q (B, n, C), k and v (B, m, C) -> (B, n, C): softmax(Q K^T / sqrt(C/heads)) V of each head's channels."""
    q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, n or m, C/heads)
    h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return h.transpose(1, 2).flatten(2)  # (B, heads, n, C/heads) -> (B, n, C)
