"""Run all checks of the equations. The checks themselves are in the files of MODULES."""

import math
from dataclasses import dataclass

from fairref.progress import Progress
from fairref.verification import fairness, gradients, published, sampling
from fairref.verification.checks import CHECKS, Check

MODULES = (sampling, gradients, published, fairness)  # in the order of the equations


@dataclass(frozen=True)
class Result:
    """The outcome of one check."""

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


def all_checks() -> list[Check]:
    """Every check, in the order of the equations."""
    return [check for module in MODULES for check in CHECKS[module.__name__]]


def verify(shown: bool = False) -> list[Result]:
    """Run every check and return the results. A check that raises has failed. `shown`: with a progress bar."""
    results = []
    checks = all_checks()
    with Progress(len(checks), "verifying", shown) as progress:
        for c in checks:
            try:
                largest = c.run()
            except Exception:  # whatever it is, the claim is not shown
                largest = math.inf
            passed = largest <= c.tolerance
            results.append(Result(c.equation, c.claim, c.against, c.tolerance, float(largest), passed))
            progress.step(c.equation)
    return results
