"""bundle.json: what it may say. Its parts' keys are those of the registry's rows."""

from pathlib import Path
from typing import TypedDict

from fairref.bundle.registry import PARTS
from fairref.bundle.typed import shown
from fairref.errors import UserError
from fairref.files.paths import read_json

MANIFEST = "bundle.json"
MAX_RESOLUTION = 8192  # pixels of a side
FACTS = {
    "name": str,
    "resolution": int,
    "attributes": dict,
    "recipe": dict,
}  # key -> type, of what is no part


class Manifest(TypedDict, total=False):
    """The content of bundle.json: FACTS, and where the parts are."""

    name: str
    resolution: int
    attributes: dict[str, list[str]]
    recipe: dict[str, object]


def read_manifest(path: Path) -> Manifest:
    """bundle.json, checked: keys and types of values. Raises UserError."""
    manifest = read_json(path)
    groups = {part.group for part in PARTS if part.group}
    known = {**FACTS, **{part.key: str for part in PARTS if not part.group}, **dict.fromkeys(groups, dict)}
    for key, value in manifest.items():
        if key not in known:
            raise UserError(f"{path}: found key {key!r}; expected some of {', '.join(sorted(known))}.")
        if type(value) is not known[key]:
            kind = known[key].__name__
            raise UserError(f"{path}: {key} is {shown(value)}; expected a value of type {kind}.")
    if manifest.get("resolution", 0) > MAX_RESOLUTION:
        found = shown(manifest["resolution"])
        raise UserError(f"{path}: resolution is {found} pixels; expected at most {MAX_RESOLUTION}.")
    for name, classes in manifest.get("attributes", {}).items():
        if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(c, str) for c in classes):
            raise UserError(
                f"{path}: attribute {name!r} is {shown(classes)}; expected two or more class names."
            )
    for group in groups & set(manifest):
        _check_group(path, group, manifest[group])
    return manifest


def places_of(manifest: Manifest, key: str) -> list[str] | None:
    """Where a manifest says that the part with this key is: one place, or several; None where it is not named."""
    group, _, role = key.rpartition(".")
    place = manifest.get(group, {}).get(role) if group else manifest.get(role)
    return [place] if isinstance(place, str) else place


def _check_group(path, group, places):
    roles = {part.role: part for part in PARTS if part.group == group}
    for role, place in places.items():
        one = isinstance(place, str)
        several = isinstance(place, list) and bool(place) and all(isinstance(p, str) for p in place)
        if role not in roles or not (one or (several and roles[role].several)):
            kind = "a folder, or a list of some" if role in roles and roles[role].several else "the folder"
            raise UserError(
                f"{path}: {group} has {role!r}: {shown(place)}; expected {kind} for {' or '.join(roles)}."
            )
