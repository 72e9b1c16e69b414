"""What `fairref evaluate` does: a bundle, with adapters or without, on the prompts of some concepts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from fairref.bundle.loading import Bundle
from fairref.bundle.recipe import resolve
from fairref.errors import UserError, typed
from fairref.evaluation.folders import judge_labelled
from fairref.evaluation.judging import SEED, EvaluationSettings, ImageSource
from fairref.evaluation.kept import KEPT
from fairref.evaluation.labels import Labels, read_labels
from fairref.evaluation.parts import EXPLICIT_IMAGES, Evaluated, PromptPart, Report, compare
from fairref.evaluation.rows import NAME, rows_of, write_rows
from fairref.evaluation.tiles import TILES, draw_tiles
from fairref.fairness.attributes import wanted_target
from fairref.files.paths import check_new_folder, check_writable, expanded, write_json
from fairref.generation.adapters import AdapterFile, load_adapters
from fairref.generation.drawing import Drawing
from fairref.generation.strengths import choose_adapters, describe_adapters
from fairref.processes import Processes
from fairref.prompts import PARTS
from fairref.prompts.sets import OCCUPATIONS, read_prompts, warn_of_cut

REPORTS = "judged.json"  # the reports on all models, beside judged.csv, which has a row an image
BEFORE, AFTER = "before", "after"  # labels: the bundle itself, and with its adapters


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, and how; None: what the bundle's recipe says."""

    adapter: str | Path | Sequence[str | Path] | None = None  # a run's folder or a file each
    strength: float | Sequence[float] | None = None  # of each adapter, or of all LoRAs
    any_base: bool = False
    attr: str | None = "gender"
    target: str | Sequence[str] | None = None
    prompts: str | Sequence[str] = OCCUPATIONS
    part: str = "test"
    images: int | None = None  # of each prompt
    explicit_images: int = EXPLICIT_IMAGES
    steps: int | None = None
    guidance: float | None = None
    padding: str = "full"
    seed: int = SEED
    cache: str | Path | None = (
        None  # folder of judgements that are kept; None: the run's, where one run is evaluated
    )
    labelled: str | Path | None = None  # folder of labelled pictures, on which judges are measured
    labels: str | Path | None = None  # table of labels of some of the images


@dataclass(frozen=True)
class Evaluation:
    """What `EvaluationOptions` come to with a bundle, before anything is drawn."""

    settings: EvaluationSettings
    adapters: tuple[tuple[AdapterFile, float], ...]
    any_base: bool
    parts: tuple[PromptPart, ...]  # one a concept
    home: Path | None  # folder of judged.csv and of sweeps; None: they are not written
    labels: Mapping[str, Labels] = field(default_factory=dict)  # of the last model's images, by concept
    others: tuple[ImageSource, ...] = ()  # what else makes images to compare, on the same noise

    @cached_property
    def models(self) -> dict[str, Bundle]:
        """The bundle, and the bundle with its adapters, by label. Raises UserError."""
        bundle, found = self.settings.bundle, {BEFORE: self.settings.bundle}
        if self.adapters:
            found[AFTER] = load_adapters(bundle, self.adapters, self.any_base)
        return found

    def of_part(self, part: PromptPart) -> Iterator[tuple[str, Evaluated]]:
        """Each model by its label on one part, the bundle itself first; then the others."""
        labels = self.labels.get(part.concept.name)
        for label, evaluated in compare(self.settings, self.models, part, self.others, labels):
            used = describe_adapters(self.settings.bundle, self.adapters if label == AFTER else ())
            yield label, replace(evaluated, report={"adapters": used, **evaluated.report})

    def run(self) -> dict[str, dict[str, Report]]:
        """Label -> concept -> report. In a run's folder, or that of --cache, judged.csv and judged.json are written."""
        found, rows = {label: {} for label in (*self.models, *(other.label for other in self.others))}, []
        for part in self.parts:
            for label, evaluated in self.of_part(part):
                found[label][part.concept.name] = evaluated.report
                rows += rows_of(self.settings, label, part, evaluated) if self.home else ()
        if self.home and self.settings.processes.first:
            write_rows(self.home / NAME, rows)
            write_json(self.home / REPORTS, found)
            if self.lacks_pictures:
                concepts = [part.concept for part in self.parts]
                draw_tiles(self.settings, self.models, concepts, self.parts[0].part, self.home / TILES)
        return found

    @property
    def lacks_pictures(self) -> bool:
        """Whether it is of one run's adapter as trained, and the run has no pictures for a report yet."""
        if len(self.adapters) != 1 or (self.home / TILES).exists():
            return False
        ((adapter, strength),) = self.adapters
        return strength == 1 and adapter.file.parent.resolve() == self.home.resolve()


def prepare(bundle: Bundle, options: EvaluationOptions, processes: Processes = Processes()) -> Evaluation:
    """Checks everything that can be checked before the work. Raises UserError."""
    if options.part not in PARTS:
        raise UserError(f"The part is {options.part!r}; expected one of {', '.join(PARTS)}.")
    target = wanted_target(options.attr, options.target, bundle.attributes, str(bundle.path))
    given = {"eval_steps": options.steps, "eval_guidance": options.guidance, "eval_images": options.images}
    given = {key: value for key, value in given.items() if value is not None}
    recipe = resolve(tuple(target.classes), bundle.recipe, given, bundle.path, bundle.attributes)
    concepts = read_prompts(options.prompts, None, bundle.path, list(target.classes))
    for concept in concepts:
        if not getattr(concept, options.part):
            raise UserError(
                f"--part is {options.part}, of which {concept.name} has no prompt; give another part."
            )
    parts = [PromptPart(c, options.part, recipe.eval_images, options.explicit_images) for c in concepts]
    home, kept = _places(options, processes)
    drawing = Drawing(recipe.eval_steps, recipe.eval_guidance, recipe.end, options.padding)
    settings = EvaluationSettings(bundle, target, drawing, options.seed, processes, kept)
    adapters = choose_adapters(options.adapter, options.strength)
    labels = _labels(options.labels, target.classes, parts) if options.labels else {}
    evaluation = Evaluation(settings, tuple(adapters), options.any_base, tuple(parts), home, labels)
    prefix = list(evaluation.models.values())[-1].prefix
    if processes.first:
        texts = [prompt for part in parts for prompt in part.prompts]
        warn_of_cut(bundle.tokenizer, texts, 0 if prefix is None else len(prefix))
    if options.labelled is None:
        return evaluation
    measured = replace(settings, confusions=judge_labelled(settings, options.labelled))
    return replace(evaluation, settings=measured)


def _labels(path, classes, parts):
    """Concept -> the labels of its images."""
    prompts = [(prompt, part.concept.short(prompt)) for part in parts for prompt in part.prompts]
    images = [list(map(str, range(part.images))) for part in parts for _ in part.prompts]
    found, labels, first = read_labels(path, classes, prompts, images), {}, 0
    for part in parts:
        end = first + len(part.prompts)
        labels[part.concept.name] = {name: of_prompts[first:end] for name, of_prompts in found.items()}
        first = end
    return labels


def _places(options, processes):
    """The folder of judged.csv and that of judgements, both None where neither a run nor --cache says where."""
    adapters = [options.adapter] if isinstance(options.adapter, str | Path) else options.adapter or []
    if options.cache is not None:
        home = kept = expanded(options.cache)
    elif len(adapters) == 1 and expanded(adapters[0]).is_dir():
        home = expanded(adapters[0])
        kept = home / KEPT
    else:
        return None, None

    def make():
        check_new_folder(kept)
        kept.mkdir(parents=True, exist_ok=True)
        check_writable(home / NAME)

    processes.first_does(make)
    return home, kept


@typed
def evaluate(
    bundle: Bundle,
    adapter: str | Path | Sequence[str | Path] | None = None,
    attr: str | None = "gender",
    images: int | None = None,
    *,
    strength: float | Sequence[float] | None = None,
    any_base: bool = False,
    target: str | Sequence[str] | None = None,
    prompts: str | Sequence[str] = OCCUPATIONS,
    part: str = "test",
    steps: int | None = None,
    guidance: float | None = None,
    padding: str = "full",
    explicit_images: int = EXPLICIT_IMAGES,
    seed: int = SEED,
    cache: str | Path | None = None,
    labelled: str | Path | None = None,
    labels: str | Path | None = None,
) -> Report:
    """How fair the bundle is, with adapters (a run's folder or a file each) or without: the report, ready for JSON.

    `strength` of each adapter, or of all LoRAs (None: 1); `any_base` as in `load_adapter`, to learn how fair a
    derived model is. `attr`, `target` and `prompts` as in train.py; `images` of each prompt. None: what the
    bundle's recipe says. Of several concepts the reports stand under the concepts' names. Of adapters, the report also
    says how like the bundle's own images theirs are. Judgements are kept in `cache`, or in the run's folder where one
    run is evaluated. How often judges err is counted on the pictures of the folder `labelled`, and on the images that
    the table `labels` names. Raises UserError.
    """
    options = EvaluationOptions(
        adapter,
        strength,
        any_base,
        attr,
        target,
        prompts,
        part,
        images,
        explicit_images,
        steps,
        guidance,
        padding,
        seed,
        cache,
        labelled,
        labels,
    )
    evaluation = prepare(bundle, options)
    return report_of(evaluation, evaluation.run())


def report_of(evaluation: Evaluation, results: dict[str, dict[str, Report]]) -> Report:
    """The report on the last of an evaluation's models; of several concepts, under the concepts' names."""
    *_, label = evaluation.models
    reports = results[label]
    return reports if len(reports) > 1 else next(iter(reports.values()))
