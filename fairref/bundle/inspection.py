"""What a bundle has and lacks: `fairref bundle check weights/sd15`.

For each part: is it named and there, how large, does it load; and where one gets it for Stable Diffusion 1.5.
"""

from dataclasses import dataclass
from pathlib import Path

from fairref.bundle.manifest import MANIFEST, places_of, read_manifest
from fairref.bundle.registry import OPTIONAL, PARTS, USES, Part
from fairref.errors import UserError

MEGABYTE = 1_000_000
SIGNS = (
    MANIFEST,
    "model_index.json",
    "unet",
    "vae",
    "text_encoder",
)  # one is in every bundle that is a folder
STATES = ("ok", "missing", "not named")


@dataclass(frozen=True)
class PartStatus:
    """What became of one part."""

    part: Part
    path: Path | None  # None: not named and not at its place
    state: str  # one of STATES, or the sentence that loading ended with
    size: int = 0  # bytes of its files


def inspect_bundle(path: Path) -> list[PartStatus]:
    """Each part of the bundle, loaded on the CPU one after the other.

    A part of several places has one entry for each; of what no use asks for only what is named is told.
    Raises UserError for a broken manifest, or a folder of other things.
    """
    if path.is_dir() and any(path.iterdir()) and not any((path / name).exists() for name in SIGNS):
        raise UserError(
            f"{path}: is no bundle; expected a folder with {MANIFEST}, or one in diffusers' layout."
        )
    manifest = read_manifest(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    statuses = []
    for part in PARTS:
        named = places_of(manifest, part.key)
        if part.key == "stable_diffusion":
            named = named or ["."]
        if named is not None or part.needed != OPTIONAL:
            statuses += [_status(part, path, name) for name in named or [None]]
    return statuses


def _status(part, path, named):
    place = path if path.is_file() else path / (part.place if named is None else named)
    if not place.exists() or (path.is_file() and part.key != "stable_diffusion"):
        return PartStatus(part, None if named is None else place, "missing")
    if named is None:
        return PartStatus(part, place, "not named", _size(place))
    return PartStatus(part, place, _loads(part, place), _size(place))


def _loads(part, place):
    try:
        part.load(place)
    except UserError as error:
        return str(error)
    return "ok"


def _size(place):
    files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def lines(path: str | Path, statuses: list[PartStatus]) -> list[str]:
    """The inspection as text."""
    text = [f"{path}: {sum(s.state == 'ok' for s in statuses)} of {len(statuses)} parts are there and load"]
    for s in statuses:
        size = f"{s.size / MEGABYTE:,.0f} MB" if s.size else ""
        state = s.state if s.state in STATES else "broken"
        text.append(f"  {state:10}{s.part.key:22}{s.path or s.part.place!s:40}{size}".rstrip())
        if state == "broken":
            text.append(f"      {s.state}")
        if state == "not named":
            value = f'{{"{s.part.role}": "{s.part.place}"}}' if s.part.group else f'"{s.part.place}"'
            text.append(f'      add "{s.part.group or s.part.key}": {value} to {MANIFEST}')
        if state in ("missing", "broken"):
            text.append(f"      {s.part.needed}; about {s.part.megabytes:,} MB; {s.part.source}")
            text.append(f"      licence: {s.part.licence}")
    return text


def uses(statuses: list[PartStatus]) -> list[str]:
    """What the bundle is good for."""
    lacking = {s.part.needed for s in statuses if s.state != "ok"}
    return [use for use, kinds in USES.items() if not kinds & lacking]


def table() -> str:
    """The rows of PARTS as the table of docs/sd15.md."""
    rows = ["| key in bundle.json | place | needed | MB | source | licence |", "|---|---|---|---|---|---|"]
    for part in PARTS:
        if part.needed != OPTIONAL:
            size = f"{part.megabytes:,}"
            rows.append(
                f"| `{part.key}` | `{part.place}` | {part.needed} | {size} | {part.source} | {part.licence} |"
            )
    return "\n".join(rows)
