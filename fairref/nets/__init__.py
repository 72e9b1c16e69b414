"""The networks Stable Diffusion is made of, and how their config.json files are read."""

from dataclasses import MISSING, fields

from fairref.errors import UserError


def read_config(cls, d, source, only):
    """Build the settings dataclass `cls` from a config.json dict `d` of diffusers or transformers.

    Keys of `d` that are fields of `cls` are taken: lists become tuples, a field without default is required.
    `only` maps keys to the values that are implemented (each item of a list counts by itself); another value
    is a UserError. All other keys are ignored. `source` names the file in messages.
    """
    if not isinstance(d, dict):
        raise UserError(f"{source}: found {type(d).__name__}, expected the object of a config.json; "
                        "use an intact file.")
    for key, allowed in only.items():
        found = d.get(key, allowed[0])
        items = found if isinstance(found, (list, tuple)) else [found]
        if any(item not in allowed for item in items):
            expected = " or ".join(repr(value) for value in allowed)
            raise UserError(f"{source}: found {key} = {found!r}, expected {expected}; nothing else is "
                            "implemented, use a checkpoint of Stable Diffusion 1.5's kind.")
    values = {}
    for field in fields(cls):
        if field.name in d:
            value = d[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.default is MISSING:
            raise UserError(f"{source}: found no key {field.name!r}, expected it to be set; "
                            "use the config.json that belongs to the weights.")
    return cls(**values)


def require(condition, source, found, expected):
    """Raise a UserError about the settings in `source` unless `condition` holds."""
    if not condition:
        raise UserError(f"{source}: found {found}, expected {expected}; "
                        "correct the config.json or use another checkpoint.")


def require_counts(config, source, names):
    """Raise a UserError unless each field of `config` in `names` is a positive int."""
    for name in names:
        value = getattr(config, name)
        require(is_count(value), source, f"{name} = {value!r}", "a positive whole number")


def is_count(value):
    """Whether `value` is a positive int (bool is not a count)."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_positive(value):
    """Whether `value` is a positive number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def are_counts(values):
    """Whether `values` is a non-empty tuple of positive ints."""
    return isinstance(values, tuple) and len(values) > 0 and all(is_count(value) for value in values)
