"""An evaluation at several guidance scales, or at several strengths of an adapter: `fairref evaluate --sweep`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from fairref.errors import UserError
from fairref.evaluation.comparison import AFTER, Evaluation, adapted_models
from fairref.evaluation.parts import Report
from fairref.evaluation.sentences import lines
from fairref.files.paths import check_writable, write_json
from fairref.generation.adapters import STRONGEST, check_strength
from fairref.settings import MAX_NUMBER

MOST = {"guidance": MAX_NUMBER, "strength": STRONGEST}  # what is swept -> its largest value


@dataclass(frozen=True)
class Sweep:
    """What changes, and its values."""

    name: str  # of MOST
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """--sweep's "guidance=1,3,5". Raises UserError."""
        name, equals, listed = text.partition("=")
        if not equals or name not in MOST:
            raise UserError(
                f"--sweep is {text!r}; expected guidance=1,3,5,7.5,12 or strength=0,0.5,1, with your own numbers."
            )
        values = []
        for number in listed.split(","):
            try:
                values.append(float(number))
            except ValueError:
                values.append(math.nan)
            if not 0 <= values[-1] <= MOST[name]:
                raise UserError(
                    f"--sweep {name}: found {number!r}; expected numbers from 0 to {MOST[name]:g}, with commas"
                    " between them."
                )
        if len(set(values)) < len(values):
            raise UserError(f"--sweep {name} names {max(values, key=values.count):g} twice; leave one out.")
        return cls(name, tuple(values))

    def of(self, evaluation: Evaluation) -> Iterator[Evaluation]:
        """The evaluation at each value."""
        for value in self.values:
            if self.name == "guidance":
                drawing = evaluation.settings.drawing._replace(guidance=value)
                yield replace(evaluation, settings=replace(evaluation.settings, drawing=drawing))
            else:
                adapted = {AFTER: [(adapter, value) for adapter, _ in evaluation.adapters]}
                models = adapted_models(evaluation.settings.bundle, adapted, evaluation.any_base)
                yield replace(evaluation, adapted=adapted, models=models)


def sweep_file(evaluation: Evaluation, sweep: Sweep) -> Path:
    """Where a sweep is written. Raises UserError where that can't be, or the sweep makes no sense."""
    if len(evaluation.parts) > 1:
        names = ", ".join(part.concept.name for part in evaluation.parts)
        raise UserError(f"--sweep is of one concept, but --prompts names {names}; give one.")
    if sweep.name == "strength" and len(evaluation.adapters) != 1:
        found = len(evaluation.adapters) or "none"
        raise UserError(f"--sweep strength is of one --adapter, found {found}; give one.")
    if evaluation.home is None:
        raise UserError(
            "--sweep is written into a run's folder; give one as --adapter, or a folder as --cache."
        )
    path = evaluation.home / f"sweep-{sweep.name}.json"
    evaluation.settings.processes.first_does(lambda: check_writable(path))
    for (adapter, _), value in product(evaluation.adapters if sweep.name == "strength" else (), sweep.values):
        check_strength(adapter, value)
    return path


def run_sweep(evaluation: Evaluation, sweep: Sweep, path: Path) -> dict[str, list[Report]]:
    """Label of a model -> its report at each value; printed and written. What was judged before is not drawn again."""
    (part,), is_first = evaluation.parts, evaluation.settings.processes.first
    evaluation = evaluation.measured()
    reports: dict[str, list[Report]] = {}
    for value, at in zip(sweep.values, sweep.of(evaluation), strict=True):
        for label, evaluated in at.of_part(part):
            reports.setdefault(label, []).append(evaluated.report)
            if is_first:
                print("\n  ".join([f"{sweep.name} {value:g}, {label}:", *lines(evaluated.report)]))
    if is_first:
        write_json(path, {"sweep": sweep.name, "values": list(sweep.values), "reports": reports})
    return reports
