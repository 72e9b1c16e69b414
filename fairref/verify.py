"""Every equation of the method, checked: one line each.

    python -m fairref.verify                  one line an equation; exit status 1 if one fails
    python -m fairref.verify --json FILE      the same as JSON
    python -m fairref.verify --figures DIR    also draws figures 6a, 6b and 7 (extra `figures`)

What is checked, and against what, stands in fairref/checks.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fairref import cli

# isort: off -- each adds its checks to CHECKS, in the order of the equations
from fairref.checks import (  # noqa: F401
    CHECKS,
    fairness,  # noqa: F401
    gradients,  # noqa: F401
    sampling,
)

# isort: on
from fairref.errors import UserError
from fairref.progress import Progress


@dataclass(frozen=True)
class Result:
    equation: str
    claim: str
    against: str
    tolerance: float
    error: float
    passed: bool

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        return (
            f"{verdict}  {self.equation:<14} {self.claim}\n"
            f"      {'':<14} against {self.against}: {self.error:.1e} (at most {self.tolerance:.2g})"
        )


def verify(shown: bool = False) -> list[Result]:
    """Runs every check; an error in one is its failure."""
    results = []
    with Progress(len(CHECKS), "verifying", shown) as progress:
        for c in CHECKS:
            try:
                found = c.run()
            except Exception:  # whatever it is, the claim is not shown
                found = math.inf
            passed = found <= c.tolerance
            results.append(Result(c.equation, c.claim, c.against, c.tolerance, float(found), passed))
            progress.step(c.equation)
    return results


def main(argv=None) -> int:
    """The command line."""
    parser = cli.Parser(prog="python -m fairref.verify", description="Check every equation of the method.")
    parser.add_argument("--json", type=cli.path, help="file for the results")
    parser.add_argument("--figures", type=cli.path, help="folder for figures 6a, 6b and 7 and their numbers")
    parser.add_argument("--weights", default=cli.WEIGHTS, help="bundle that the figures are about")
    options = parser.parse_args(argv)
    bundle = _ready_for_figures(options) if options.figures else None
    if options.json and not options.json.parent.is_dir():
        raise UserError(
            f"--json is {options.json}, but there is no folder {options.json.parent}; make it first."
        )
    began = time.monotonic()
    results = verify(shown=True)
    print("\n".join(map(str, results)))
    failed = sum(not r.passed for r in results)
    print(f"{len(results)} checks, {failed} failed, {time.monotonic() - began:.0f} s")
    if options.json:
        rows = [{**asdict(r), "error": r.error if math.isfinite(r.error) else None} for r in results]
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if bundle:
        draw_figures(bundle, options.figures)
    return 1 if failed else 0


def _ready_for_figures(options):
    """The bundle; what is missing is better said before the work."""
    from fairref import figures
    from fairref.bundle import load_bundle

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
    return bundle


def draw_figures(bundle, folder: Path) -> None:
    """Figures 6a, 6b and 7 as PNG, the numbers of 6a and 6b as CSV."""
    from fairref import figures, study

    figures.gradient_paths(folder / "fig7.png")
    rows = study.scales(bundle)
    study.write_csv(folder / "fig6b.csv", rows)
    labels = ("diffusion time t", "norm, mean and 90 % band of 20 runs")
    title = "Scale of the gradient by time"
    figures.curves(folder / "fig6b.png", study.by_curve(rows), "t", labels, title, log=True)
    rows = study.descent(bundle)
    study.write_csv(folder / "fig6a.csv", rows)
    labels = ("iteration", "1 - cos, mean and range of 3 seeds")
    title = "Distance in CLIP to one fixed image, by gradient"
    figures.curves(folder / "fig6a.png", study.by_curve(rows), "iteration", labels, title)
    print(f"figures and their numbers are in {folder}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
