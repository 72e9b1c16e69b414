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
    any_base: bool = False  # whether the adapter may be of another base
    hub_id: str = ""  # of a Space's base

    @property
    def is_whole(self) -> bool:
        """Whether whole networks are written, not what an adapter adds to them."""
        return self.to in WHOLE

    @property
    def token(self) -> str:
        """What stands for the soft tokens in a prompt for diffusers."""
        return f"<{self.name}>"

    @property
    def tokens(self) -> int:
        """How many soft tokens it has."""
        return self.adapter.soft_tokens

    @property
    def is_last(self) -> bool:
        """Whether that stands behind the prompt, and not before it."""
        return self.adapter.component == "suffix"

    def put(self, prompt: str) -> str:
        """A prompt for diffusers with the soft tokens of an embedding."""
        return f"{prompt} {self.token}" if self.is_last else f"{self.token} {prompt}"
