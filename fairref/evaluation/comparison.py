"""Models side by side on the same prompts and noise: what `fairref evaluate` and a run's end have in common."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fairref.bundle.loading import Bundle
from fairref.evaluation.folders import LabelledPictures, judge_labelled
from fairref.evaluation.judging import EvaluationSettings, ImageSource
from fairref.evaluation.labels import Labels
from fairref.evaluation.parts import Evaluated, PromptPart, Report, compare
from fairref.evaluation.rows import Row, rows_of
from fairref.generation.adapters import AdapterFile, load_adapters
from fairref.generation.strengths import describe_adapters

BEFORE, AFTER = "before", "after"  # labels: the bundle itself, and with its adapters
Adapters = Sequence[tuple[AdapterFile, float]]  # with their strengths
Results = dict[str, dict[str, Report]]  # label of a model -> key of a part -> report


def adapted_models(
    bundle: Bundle, adapted: Mapping[str, Adapters], any_base: bool = False
) -> dict[str, Bundle]:
    """The bundle itself, and with the adapters of each label. Raises UserError."""
    return {BEFORE: bundle} | {
        label: load_adapters(bundle, adapters, any_base) for label, adapters in adapted.items()
    }


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, before anything is drawn."""

    settings: EvaluationSettings
    parts: tuple[PromptPart, ...]
    models: dict[str, Bundle]  # by label, the bundle itself first
    adapted: Mapping[str, Adapters] = field(default_factory=dict)  # label of a model -> its adapters
    any_base: bool = False
    labels: Mapping[str, Mapping[str, Labels]] = field(
        default_factory=dict
    )  # of a model's images, by concept
    labelled: LabelledPictures | None = None  # on which the judges are measured first
    others: tuple[ImageSource, ...] = ()  # what else makes images to compare, on the same noise
    home: Path | None = None  # folder of what it leaves; None: it leaves nothing

    @property
    def adapters(self) -> Adapters:
        """Those of the last model."""
        return list(self.adapted.values())[-1] if self.adapted else ()

    def key(self, part: PromptPart) -> str:
        """What a part is called in files: "test", or of several concepts "sports, test"."""
        several = len({one.concept.name for one in self.parts}) > 1
        return f"{part.concept.name}, {part.part}" if several else part.part

    def of_part(self, part: PromptPart) -> Iterator[tuple[str, Evaluated]]:
        """Each model by its label on one part, the bundle itself first; then the others."""
        labels = {label: of.get(part.concept.name) for label, of in self.labels.items()}
        for label, evaluated in compare(self.settings, self.models, part, self.others, labels):
            about = {"adapters": describe_adapters(self.settings.bundle, self.adapted.get(label, ()))}
            made_of = self.models[label].adapters if label in self.models else ()
            if len(made_of) == 1:
                about["fingerprint"] = made_of[0][0]
            yield label, replace(evaluated, report={**about, **evaluated.report})

    def measured(self) -> "Evaluation":
        """The same, with how often its judges err on labelled pictures, where it has some."""
        if self.labelled is None:
            return self
        confusions = judge_labelled(self.settings, self.labelled)
        return replace(self, settings=replace(self.settings, confusions=confusions), labelled=None)

    def run(self, say: Callable[[str, Report], None] = lambda *_: None) -> tuple[Results, list[Row]]:
        """The reports, each of which is said, and a row an image."""
        evaluation = self.measured()
        results, rows = {}, []
        for part in self.parts:
            for label, evaluated in evaluation.of_part(part):
                results.setdefault(label, {})[self.key(part)] = evaluated.report
                rows += rows_of(self.settings, label, part, evaluated)
                say(label, evaluated.report)
        return results, rows
