"""fairref emoji: the small world's bundle, made again and measured."""

from collections.abc import Sequence
from pathlib import Path

from fairref.commands import cli
from fairref.emoji import build, check, labelled, sheet
from fairref.errors import UserError
from fairref.files.paths import check_new_folder, check_writable
from fairref.settings import MAX_COUNT

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
        choices=("build", "check", "labelled", "sheet"),
        help="build: train and write the bundle; check: measure its gates; labelled: write pictures with labels, for"
        " fairref evaluate --labelled; sheet: cut the sprites from the font",
    )
    parser.add_argument(
        "--work", type=cli.path, default=ROOT / "build" / "emoji", help="folder of the build's stage files"
    )
    parser.add_argument(
        "--out", type=cli.path, help="folder of the bundle (None: weights/emoji), or of labelled pictures"
    )
    parser.add_argument("--count", type=cli.whole(1, MAX_COUNT), default=1000, help="labelled pictures")
    parser.add_argument(
        "--font", type=cli.path, help="NotoColorEmoji.ttf (Debian package fonts-noto-color-emoji), for sheet"
    )
    options = parser.parse_args(argv)
    if options.command == "labelled":
        if options.out is None or options.out.exists():
            raise UserError(f"--out is {options.out}; expected a new folder for the labelled pictures.")
        check_new_folder(options.out)
        labelled.write_labelled(options.out, options.count)
        print(options.out)
        return 0
    out = options.out or ROOT / "weights" / "emoji"
    if options.command == "check":
        return check.check(out)
    if options.command == "sheet":
        if options.font is None or not options.font.is_file():
            raise UserError(f"--font is {options.font}, which is no file; give NotoColorEmoji.ttf.")
        print(*sheet.write_sheets(options.font), sep="\n")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "bundle.json")  # hours before it is written
    build.export(build.train(options.work), options.work, out)
    print(out)
    return 0
