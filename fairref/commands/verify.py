"""fairref verify: every equation of the method, checked."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict

from fairref.bundle.loading import DEFAULT, Bundle, load_bundle
from fairref.commands import cli
from fairref.errors import UserError
from fairref.files.paths import check_writable, write_json
from fairref.verification.verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 1 where a check fails."""
    parser = cli.Parser(
        prog="fairref verify",
        description="Check every equation of the method: one line each, in seconds.",
        example="fairref verify",
    )
    parser.add_argument("--json", type=cli.path, help="file for the results")
    parser.add_argument(
        "--figures", type=cli.path, help="folder for figures 6a, 6b and 7 and their numbers (extra figures)"
    )
    parser.add_argument("--weights", default=DEFAULT, help="bundle that the figures are about")
    options = parser.parse_args(argv)
    if options.json:
        check_writable(options.json)
    bundle = _ready_for_figures(options) if options.figures else None
    began = time.monotonic()
    results = verify(shown=True)
    if options.json:
        write_json(
            options.json,
            [{**asdict(r), "error": r.error if math.isfinite(r.error) else None} for r in results],
        )
    print("\n".join(map(str, results)))
    failed = sum(not r.passed for r in results)
    print(f"{len(results)} checks, {failed} failed, {time.monotonic() - began:.0f} s")
    if bundle:
        from fairref.reporting.gradient_study import draw_figures

        draw_figures(bundle, options.figures)
        print(f"figures and their numbers are in {options.figures}")
    return 1 if failed else 0


def _ready_for_figures(options) -> Bundle:
    """The bundle; what is missing is better said before the work."""
    from fairref.reporting import figures

    figures.pyplot()
    bundle = load_bundle(options.weights)
    if bundle.clip is None:
        raise UserError(f"{bundle.path}: has no CLIP, which figure 6a needs; use a bundle that names one.")
    try:
        options.figures.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise UserError(
            f"--figures is {options.figures}, which can't be made ({failure.strerror})."
        ) from None
    check_writable(options.figures / "fig7.png")
    return bundle
