"""What is exported, and to where."""

from dataclasses import dataclass
from pathlib import Path

from fairref.bundle.loading import Bundle
from fairref.generation.adapters import AdapterFile

WHOLE = ("merged", "single-file")  # formats of whole networks
SPACE = "space"  # the page of `fairref serve` with the adapter


@dataclass(frozen=True)
class Export:
    """An adapter on its way out."""

    bundle: Bundle  # the base
    adapter: AdapterFile
    to: str  # the format
    folder: Path  # where the files go
    name: str  # of the file that users choose by its name
    half: bool  # whether whole networks are written in float16

    @property
    def is_whole(self) -> bool:
        """Whether whole networks are written, not what an adapter adds to them."""
        return self.to in WHOLE

    @property
    def token(self) -> str:
        """What stands for a prefix in a prompt for diffusers."""
        return f"<{self.name}>"

    @property
    def tokens(self) -> int:
        """How many tokens a prefix has."""
        return 0 if self.adapter.prefix is None else len(self.adapter.prefix)
