"""Which adapters draw, and how strongly: what --adapter and --strength mean, and what reports say of it."""

from collections.abc import Sequence
from pathlib import Path

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.generation.adapters import AdapterFile, read_adapter


def pair_strengths(
    adapters: Sequence[AdapterFile], strengths: Sequence[float]
) -> list[tuple[AdapterFile, float]]:
    """Each adapter with its strength: one for each, in their order, or one for all LoRAs; none: 1. Raises UserError."""
    if len(strengths) == 1 and len(adapters) > 1:
        strengths = [1.0 if adapter.soft else strengths[0] for adapter in adapters]
    strengths = strengths or [1.0] * len(adapters)
    if strengths and not adapters:
        raise UserError("--strength is of an --adapter; give one, or leave it out.")
    if len(strengths) != len(adapters):
        raise UserError(
            f"{len(strengths)} strengths for {len(adapters)} adapters; give one --strength for each --adapter, in"
            " their order, or one for all LoRAs."
        )
    return list(zip(adapters, strengths, strict=True))


def choose_adapters(
    adapter: str | Path | Sequence[str | Path] | None, strength: float | Sequence[float] | None = None
) -> list[tuple[AdapterFile, float]]:
    """One adapter or several (a run's folder or a file each), read, with their strengths. Raises UserError."""
    paths = [adapter] if isinstance(adapter, str | Path) else adapter or []
    strengths = [strength] if isinstance(strength, int | float) else strength or []
    return pair_strengths([read_adapter(path) for path in paths], strengths)


def describe_adapters(
    bundle: Bundle, adapters: Sequence[tuple[AdapterFile, float]]
) -> list[dict[str, object]]:
    """What reports and images say of the adapters that a bundle drew with, ready for JSON."""
    described = []
    for adapter, strength in adapters:
        others = adapter.other_parts(bundle)
        base = "unknown" if others is None else f"another {' and '.join(others)}" if others else "this one"
        file = f"{adapter.file.absolute().parent.name}/{adapter.file.name}"
        described.append({"file": file, "strength": float(strength), "base": base})
    return described
