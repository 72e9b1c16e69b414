"""Images that any tool made, in a folder with one subfolder a prompt.

A subfolder's name is its prompt, unless FOLDER/prompts.json says another: {"pilot": "a photo of a pilot"}. Its images
are its PNG, JPEG and WebP files, in the order of their names; there may be more of one prompt than of another.
"""

from dataclasses import dataclass
from pathlib import Path

from fairref.errors import UserError
from fairref.files.paths import expanded, read_json

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PROMPTS = "prompts.json"


@dataclass(frozen=True)
class ImageFolder:
    """The images of P prompts."""

    path: Path
    files: dict[str, tuple[Path, ...]]  # prompt -> its images
    names: dict[str, str]  # prompt -> its subfolder's name


def read_folder(path: str | Path) -> ImageFolder:
    """The prompts and image files of a folder. Raises UserError where a subfolder has none, or two have one prompt."""
    path = expanded(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give one with a subfolder of images for each prompt.")
    folders = {p.name: p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    if not folders:
        raise UserError(f"{path}: has no subfolder; put the images of each prompt into one of its own.")
    said = read_json(path / PROMPTS) if (path / PROMPTS).is_file() else {}
    for name, prompt in said.items():
        if name not in folders or not isinstance(prompt, str) or not prompt.strip():
            raise UserError(
                f"{path / PROMPTS}: found {name!r}: {prompt!r}; expected the name of a subfolder and its prompt."
            )
    prompts = {name: said.get(name, name) for name in folders}
    files, names = {}, {}
    for name, prompt in prompts.items():
        if prompt in files:
            raise UserError(
                f"{path}: {names[prompt]} and {name} have one prompt, {prompt!r}; put their images together."
            )
        names[prompt] = name
        shown = (p for p in sorted(folders[name].iterdir()) if not p.name.startswith("."))
        files[prompt] = tuple(p for p in shown if p.suffix.lower() in SUFFIXES)
        if not files[prompt]:
            raise UserError(f"{folders[name]}: has no image; expected {', '.join(SUFFIXES)} files.")
    return ImageFolder(path, files, names)
