"""fairref verify: every equation of the method, checked."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict

from fairref.commands import cli
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
    options = parser.parse_args(argv)
    if options.json:
        check_writable(options.json)
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
    return 1 if failed else 0
