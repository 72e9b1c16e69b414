"""What `fairref evaluate` does: a bundle, with adapters or without, on the prompts of some concepts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairref.bundle.loading import Bundle
from fairref.bundle.recipe import resolve
from fairref.errors import UserError, typed
from fairref.evaluation.comparison import AFTER, Adapters, Evaluation, Results, adapted_models
from fairref.evaluation.folders import LabelledPictures
from fairref.evaluation.judging import SEED, EvaluationSettings
from fairref.evaluation.kept import KEPT
from fairref.evaluation.labels import read_labels
from fairref.evaluation.parts import PromptPart, Report
from fairref.evaluation.rows import NAME, write_rows
from fairref.evaluation.tiles import TILES, draw_tiles
from fairref.fairness.attributes import JointTarget, wanted_target
from fairref.files.paths import check_new_folder, check_writable, expanded, read_json, write_json
from fairref.generation.drawing import Drawing
from fairref.generation.strengths import choose_adapters
from fairref.processes import Processes
from fairref.prompts import PARTS
from fairref.prompts.sets import OCCUPATIONS, read_prompts, warn_of_cut

REPORTS = "judged.json"  # the reports on all models, beside judged.csv, which has a row an image
OF_RUN = "evaluation.json"  # of a run's own end, whose pictures stay
RUN = "settings.json"  # of the run that made an adapter, in its folder
DRAWING = {
    "eval_steps": "steps",
    "eval_guidance": "guidance",
    "end": "end",
}  # settings of a recipe -> options


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, and how; None: as the run that made the one adapter, else what the bundle's recipe says."""

    adapter: str | Path | Sequence[str | Path] | None = None  # a run's folder or a file each
    strength: float | Sequence[float] | None = None  # of each adapter, or of all LoRAs
    any_base: bool = False
    attr: str | None = None  # None without a target: what the one adapter was made for, else gender
    target: str | Sequence[str] | None = None
    prompts: str | Sequence[str] = OCCUPATIONS
    part: str = "test"
    images: int | None = None  # of each prompt
    explicit_images: int | None = None  # of each prompt that names a class; None: as `PromptPart` says
    steps: int | None = None
    guidance: float | None = None
    end: str | None = None
    padding: str = "full"
    seed: int = SEED
    # folder of judgements that are kept, and of results; None: the run's, where one run is evaluated
    cache: str | Path | None = None
    labelled: str | Path | None = None  # folder of labelled pictures, on which judges are measured
    labels: str | Path | None = None  # table of labels of some of the images


def prepare(bundle: Bundle, options: EvaluationOptions, processes: Processes = Processes()) -> Evaluation:
    """Checks everything that can be checked before the work. Raises UserError."""
    if options.part not in PARTS:
        raise UserError(f"The part is {options.part!r}; expected one of {', '.join(PARTS)}.")
    adapters = choose_adapters(options.adapter, options.strength)
    made_by = adapters[0][0] if len(adapters) == 1 else None
    target = _target(bundle, options, made_by)
    given = {"eval_images": options.images, **_drawing_of_run(made_by)}
    given |= {key: value for key, name in DRAWING.items() if (value := getattr(options, name)) is not None}
    given = {key: value for key, value in given.items() if value is not None}
    recipe = resolve(tuple(target.classes), bundle.recipe, given, bundle.path, bundle.attributes)
    concepts = read_prompts(options.prompts, None, bundle.path, list(target.classes))
    for concept in concepts:
        if not getattr(concept, options.part):
            raise UserError(
                f"--part is {options.part}, of which {concept.name} has no prompt; give another part."
            )
    parts = [PromptPart(c, options.part, recipe.eval_images, options.explicit_images) for c in concepts]
    adapted: dict[str, Adapters] = {AFTER: adapters} if adapters else {}
    models = adapted_models(bundle, adapted, options.any_base)
    labels = _labels(options.labels, target.classes, parts, list(models)) if options.labels else {}
    labelled = options.labelled and LabelledPictures.read(options.labelled, target.classes, processes.first)
    home, kept = _places(options, processes)
    drawing = Drawing(recipe.eval_steps, recipe.eval_guidance, recipe.end, options.padding)
    settings = EvaluationSettings(bundle, target, drawing, options.seed, processes, kept)
    *_, model = models.values()
    if processes.first:
        texts = [prompt for part in parts for prompt in part.prompts]
        warn_of_cut(bundle.tokenizer, texts, model.soft_tokens)
    return Evaluation(settings, tuple(parts), models, adapted, options.any_base, labels, labelled, home=home)


def _target(bundle, options, made_by):
    """What is counted: as --attr and --target say, else what the adapter was made for, else gender."""
    aim = None if options.attr or options.target or made_by is None else _aim(made_by.info)
    attr = (
        ",".join(aim.classes)
        if aim
        else options.attr or (None if options.target else usual_attribute(bundle))
    )
    target = wanted_target(attr, options.target, bundle.attributes, str(bundle.path))
    return aim if aim and aim.classes == target.classes else target


def usual_attribute(bundle: Bundle) -> str:
    """What is judged where nothing else is said: gender, or with judges that don't know it the first that they know."""
    known = [name for judge in bundle.classifiers.get("evaluate", ()) for name in judge.classes]
    return known[0] if known and "gender" not in known else "gender"


def _aim(info):
    """What an adapter's file says that it was made for; None of another tool's."""
    try:
        classes = {name: tuple(names) for name, names in info["classes"].items()}
        return JointTarget(classes, np.array(info["target"], dtype=float)) if classes else None
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _drawing_of_run(made_by):
    """How the run evaluates that made the adapter; {} where none did."""
    path = made_by and made_by.file.parent / RUN
    recipe = read_json(path).get("recipe") if path and path.is_file() else None
    return {key: recipe.get(key) for key in DRAWING} if isinstance(recipe, dict) else {}


def _labels(path, classes, parts, models):
    """Label of a model -> concept -> the labels of its images."""
    prompts = [(prompt, part.concept.short(prompt)) for part in parts for prompt in part.prompts]
    images = [list(map(str, range(part.images))) for part in parts for _ in part.prompts]
    labels = {}
    for model, found in read_labels(path, classes, prompts, images, models).items():
        first = 0
        for part in parts:
            rows = slice(first, first := first + len(part.prompts))
            labels.setdefault(model, {})[part.concept.name] = {a: of[rows] for a, of in found.items()}
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


def run(evaluation: Evaluation, say: Callable[[str, Report], None] = lambda *_: None) -> Results:
    """The reports, each of which is said. In a run's folder, or that of --cache, judged.csv and judged.json are of the
    latest evaluation; so are the pictures of a run whose own end has left none."""
    results, rows = evaluation.run(say)
    if evaluation.home and evaluation.settings.processes.first:
        write_rows(evaluation.home / NAME, rows)
        write_json(evaluation.home / REPORTS, results)
        if _is_of_run(evaluation):
            made = next(iter(results[AFTER].values()))["made"]
            draw_tiles(
                evaluation.settings, evaluation.models, evaluation.parts, made, evaluation.home / TILES
            )
    return results


def _is_of_run(evaluation):
    """Whether it is of one run's adapter as trained, and the run has not been evaluated at its own end."""
    if len(evaluation.adapters) != 1 or (evaluation.home / OF_RUN).exists():
        return False
    ((adapter, strength),) = evaluation.adapters
    return strength == 1 and adapter.file.parent.resolve() == evaluation.home.resolve()


@typed
def evaluate(
    bundle: Bundle,
    adapter: str | Path | Sequence[str | Path] | None = None,
    attr: str | None = None,
    images: int | None = None,
    *,
    strength: float | Sequence[float] | None = None,
    any_base: bool = False,
    target: str | Sequence[str] | None = None,
    prompts: str | Sequence[str] = OCCUPATIONS,
    part: str = "test",
    steps: int | None = None,
    guidance: float | None = None,
    end: str | None = None,
    padding: str = "full",
    explicit_images: int | None = None,
    seed: int = SEED,
    cache: str | Path | None = None,
    labelled: str | Path | None = None,
    labels: str | Path | None = None,
) -> Report:
    """How fair the bundle is, with adapters (a run's folder or a file each) or without: the report, ready for JSON.

    `strength` of each adapter, or of all LoRAs (None: 1); `any_base` as in `load_adapter`, to learn how fair a
    derived model is. `attr`, `target` and `prompts` as in train.py; `images` of each prompt. None: as the run did that
    made the one adapter, else gender and what the bundle's recipe says. Of several concepts the reports stand under the
    concepts' names. Of adapters, the report also says how like the bundle's own images theirs are. Judgements are kept
    in `cache`, or in the run's folder where one run is evaluated. How often judges err is counted on the pictures of
    the folder `labelled`, and on the images that the table `labels` names. Raises UserError.
    """
    given = {name: value for name, value in locals().items() if name != "bundle"}
    evaluation = prepare(bundle, EvaluationOptions(**given))
    return report_of(evaluation, run(evaluation))


def report_of(evaluation: Evaluation, results: Results) -> Report:
    """The report on the last of an evaluation's models; of several concepts, under the concepts' names."""
    *_, label = evaluation.models
    reports = list(results[label].values())
    return {report["concept"]: report for report in reports} if len(reports) > 1 else reports[0]
