"""fairref verify: every equation of the method, checked; or explained; or a reader's own answers."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict

from fairref.commands import cli
from fairref.files.paths import check_writable, write_json
from fairref.verification.explain import explain
from fairref.verification.mine import check_answers
from fairref.verification.quantities import QUANTITIES
from fairref.verification.verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 1 where a check fails."""
    parser = cli.Parser(
        prog="fairref verify",
        description="Check every equation of the method: one line each, in seconds.",
        example="fairref verify",
    )
    parser.add_argument("--json", type=cli.path, help="file for the results")
    parser.add_argument("--explain", metavar="EQUATION", help='where an equation is, for example "eq 9"')
    parser.add_argument("--mine", metavar="FILE", help="check answers to the exercises of docs/course")
    options = parser.parse_args(argv)
    if sum(value is not None for value in (options.json, options.explain, options.mine)) > 1:
        parser.error("--json, --explain and --mine are three different things; give one of them")
    if options.explain is not None:
        print(explain(options.explain))
        return 0
    if options.mine is not None:
        return _mine(options.mine)
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


def _mine(file):
    """Exit code 1 where an answer is wrong, or none is there."""
    verdicts = check_answers(file)
    for verdict in verdicts:
        print(verdict)
    right = sum(verdict.is_right for verdict in verdicts)
    missing = [name for name in QUANTITIES if name not in {verdict.name for verdict in verdicts}]
    print(
        f"{right} right, {len(verdicts) - right} wrong"
        + (f"; not defined: {', '.join(missing)}" if missing else "")
    )
    return 0 if verdicts and right == len(verdicts) else 1
