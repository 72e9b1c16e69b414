"""fairref COMMAND ...: what the console script and `python -m fairref` start."""

import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword

COMMANDS = {
    "train": "finetune a bundle for fairness (train.py is the same)",
    "sample": "draw images of a prompt (sample.py is the same)",
    "evaluate": "measure how fair, and how faithful, a model's images are",
    "report": "show what runs measured on one page",
    "plan": "say how many images an evaluation needs, and what it can see",
    "verify": "check every equation of the method",
    "figures": "draw the paper's figures: gradients, images and shares before and after",
    "serve": "a page: a prompt's images by the original and the fair model, side by side",
    "bundle": "say what a folder of weights has and lacks",
    "export": "write an adapter for diffusers, ComfyUI and web UIs",
    "classifier": "train an attribute classifier on CelebA or FairFace",
    "balance": "say which terms of the loss hold a run where it has ended",
    "faces": "turn photographs into the external faces of L_face",
    "import": "take an adapter from the released code, PEFT, diffusers, kohya or UCE",
    "emoji": "make the small world's bundle again, or measure it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of a command."""
    from fairref.commands import cli

    return cli.run(_command, list(sys.argv[1:] if argv is None else argv))


def _command(argv: Sequence[str]) -> int | None:
    """The exit code of a command, which is imported only when it is asked for. Raises UserError."""
    name, *rest = argv or ["--help"]
    if name in ("--help", "-h"):
        rows = [f"  {name:12}{what}" for name, what in COMMANDS.items()]
        print("example: fairref train --attr gender", "", "usage: fairref COMMAND ...", "", *rows, sep="\n")
        print(
            "", "fairref COMMAND --help says more. FAIRREF_DEBUG=1 shows the traceback of an error.", sep="\n"
        )
        return 0
    if name == "--version":
        from fairref import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        from fairref.errors import UserError

        raise UserError(f"fairref has no command {name!r}; expected one of {', '.join(COMMANDS)}.")
    module = f"fairref.commands.{name}{'_' if iskeyword(name) else ''}"
    return import_module(module).main(rest)


def console() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    console()
