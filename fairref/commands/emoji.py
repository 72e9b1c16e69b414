"""fairref emoji: the small world's bundle, made again and measured."""

from collections.abc import Sequence
from pathlib import Path

from fairref.commands import cli
from fairref.emoji import build, check, sheet
from fairref.errors import UserError
from fairref.files.paths import check_writable

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = cli.Parser(
        prog="fairref emoji",
        description="Make the bundle of weights/emoji again (about three hours on two cores), or measure its gates.",
        example="fairref emoji build --out weights/emoji-2",
    )
    parser.add_argument(
        "command",
        choices=("build", "check", "sheet"),
        help="build: train and write the bundle; check: measure its gates; sheet: cut the sprites from the font",
    )
    parser.add_argument(
        "--work", type=cli.path, default=ROOT / "build" / "emoji", help="folder of the build's stage files"
    )
    parser.add_argument(
        "--out", type=cli.path, default=ROOT / "weights" / "emoji", help="folder of the bundle"
    )
    parser.add_argument(
        "--font", type=cli.path, help="NotoColorEmoji.ttf (Debian package fonts-noto-color-emoji), for sheet"
    )
    options = parser.parse_args(argv)
    if options.command == "check":
        return check.check(options.out)
    if options.command == "sheet":
        if options.font is None or not options.font.is_file():
            raise UserError(f"--font is {options.font}, which is no file; give NotoColorEmoji.ttf.")
        print(*sheet.write_sheets(options.font), sep="\n")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    check_writable(options.out / "bundle.json")  # hours before it is written
    build.export(build.train(options.work), options.work, options.out)
    print(options.out)
    return 0
