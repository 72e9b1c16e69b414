"""fairref report: what runs measured, as one page."""

from collections.abc import Sequence

from fairref.commands import cli
from fairref.files.paths import check_writable
from fairref.reporting.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = cli.Parser(
        prog="fairref report",
        description="Write what runs measured on one page that stands alone. It reads files and draws nothing.",
        example="fairref report runs/gender --out report.html",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="run",
        help="folder of a run, or of --cache, or a file of `fairref evaluate --out`; several are compared",
    )
    parser.add_argument("--out", type=cli.path, default="report.html", help="HTML file")
    options = parser.parse_args(argv)
    check_writable(options.out)
    print(write_report(options.runs, options.out))
