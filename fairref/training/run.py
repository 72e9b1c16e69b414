"""A whole run: options -> its folder -> finetuning -> evaluation before and after."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fairref.bundle.loading import DEFAULT, Bundle, load_bundle
from fairref.bundle.own_judges import parse_judges
from fairref.bundle.recipe import resolve
from fairref.errors import FULL, UserError, of_files, typed
from fairref.evaluation.before_after import ImageCounts, before_after
from fairref.evaluation.judging import EvaluationSettings
from fairref.evaluation.kept import KEPT
from fairref.fairness.attributes import wanted_target
from fairref.files.paths import expanded, write_json
from fairref.generation.lora import COMPONENTS
from fairref.processes import DTYPES, Processes, choose_device, start
from fairref.prompts.sets import (
    OCCUPATIONS,
    Prompts,
    is_file,
    read_lines,
    read_prompts,
    validation_prompts,
    warn_of_cut,
)
from fairref.settings import SOFT, RunOptions, command_line, refuse_unused
from fairref.training import checkpoints
from fairref.training.checks import check, lacking, quiet_batches
from fairref.training.loop import finetune
from fairref.training.own_losses import parse_losses
from fairref.training.setup import Setup
from fairref.training.signals import interrupting
from fairref.training.stored import (
    Settings,
    differences,
    judge_places,
    loss_texts,
    of_settings,
    read_stored,
    refuse_another,
    settings_of,
)
from fairref.training.term_report import term_report
from fairref.training.terms import STATISTICS, TERMS, terms_of
from fairref.training.validation import drawing_of


@dataclass(frozen=True)
class Plan:
    """What a run does, put together from its options or its settings.json."""

    setup: Setup
    concepts: list[Prompts]
    settings: Settings  # what settings.json says of it


def run(options: RunOptions, recipe: Mapping[str, object]) -> Path:
    """What train.py does -> the run's folder. `recipe`: the fields of Recipe that were given. Raises UserError."""
    stored = read_stored(options, recipe) if options.resume else None
    device = options.device or (stored["device"] if stored else None)
    processes, device = start(choose_device(device))
    try:
        judges = parse_judges(options.judge or ()) if stored is None else judge_places(stored)
        weights = options.weights or (stored["weights"] if stored else DEFAULT)
        dtype = DTYPES[stored["dtype"] if stored else options.dtype or "float32"]
        bundle = load_bundle(weights, device, dtype, judges)
        return _run(bundle, options, recipe, stored, weights, processes)
    finally:
        processes.stop()


@typed
def train(
    bundle: Bundle,
    attr: str | None = "gender",
    out: str | Path | None = None,
    *,
    target: str | Sequence[str] | None = None,
    prompts: str | Sequence[str] | None = None,
    loss: str | Sequence[str] | None = None,
    **recipe: object,
) -> Path:
    """Finetunes the bundle -> the run's folder, as train.py does. `recipe`: fields of Recipe. Raises UserError."""
    target, loss = ([text] if isinstance(text, str) else text for text in (target, loss))
    out = None if out is None else str(out)
    options = RunOptions(attr=attr, target=target, out=out, prompts=prompts, loss=loss)
    return _run(bundle, options, recipe, None, str(bundle.path), Processes())


def setup_of_run(folder: str | Path, weights: str | None = None, device: str | None = None) -> Setup:
    """The setup of a run that is there. `weights` and `device` take the place of those in its settings.json.

    Raises UserError.
    """
    options = RunOptions(resume=str(folder), weights=weights, device=device)
    settings = read_stored(options, {})
    place, dtype = choose_device(device or settings["device"]), DTYPES[settings["dtype"]]
    bundle = load_bundle(weights or settings["weights"], place, dtype, judge_places(settings))
    refuse_another(settings, bundle)
    return _plan(bundle, options, {}, settings, Processes(device=place)).setup


def _run(bundle, options, recipe, stored, weights, processes):
    if stored:
        refuse_another(stored, bundle)
    plan = _plan(bundle, options, recipe, stored, processes)
    setup = plan.setup
    if stored and processes.first:
        for line in differences(stored, processes, bundle.device):
            print(line)
    with ExitStack() as held:
        folder = _folder(options, setup, held)
        if processes.first:
            print(f"the run is in {folder}")
            _say_what_lacks(setup, plan.concepts)
            _say_of_prompts(setup, plan.concepts)
            for line in quiet_batches(setup):
                print(line)
            if plan.settings != stored:
                write_json(folder / checkpoints.SETTINGS, plan.settings)
        component, empty_prompt = setup.recipe.component, setup.recipe.empty_prompt
        info = {
            "weights": bundle.path.name,
            "base": bundle.fingerprints,
            "component": component,
            "empty_prompt": empty_prompt if "text_encoder" in COMPONENTS[component] else "trained",
            "classes": setup.target.classes if setup.target else {},
            "target": setup.target.table.tolist() if setup.target else None,
        }
        with _resumable(folder):
            files = finetune(setup, folder, info)
            if setup.recipe.evaluate != "none":
                _evaluate(setup, files, plan.concepts, folder)
    if processes.first:
        prompt = (plan.concepts[0].test or plan.concepts[0].train)[0]
        print(f"draw with it: {_sample_command(prompt, folder, weights)}")
    return folder


def _plan(bundle, options, given, stored, processes):
    if stored:
        target, recipe = of_settings(stored)
    else:
        target = _target(options, given, bundle)
        attributes = tuple(target.classes) if target else ()
        recipe = resolve(attributes, bundle.recipe, given, bundle.path, bundle.attributes)
        if target is None and given.get("until_bias"):
            raise UserError("--until-bias is for a run with --attr; leave it out.")
        refuse_unused(recipe, given, target is not None)
    wanted, template = _prompts(stored or vars(options))
    attributes = list(target.classes) if target else []
    concepts = read_prompts(wanted, template, bundle.path, attributes)
    explicit = [
        asked for prompts in concepts if target for asked in prompts.explicit("train", target.classes)
    ]
    validates_or_draws = recipe.validate_every or recipe.grid_every
    setup = Setup(
        bundle,
        recipe,
        target,
        tuple(prompts.train for prompts in concepts),
        processes,
        tuple(explicit),
        validation_prompts(concepts, recipe.validate_prompts) if validates_or_draws else (),
        parse_losses(loss_texts(stored) if stored else options.loss or (), _taken_names()),
    )
    check(setup)
    if given.get("lambda_face") and bundle.embedder is None:
        raise UserError(
            f"--lambda-face needs a face embedder, which {bundle.path} has not; leave it out, or 0."
        )
    if target and (
        recipe.evaluate != "none" or validates_or_draws
    ):  # what it lacks is better said before the run
        EvaluationSettings(bundle, target, drawing_of(recipe))
    moved = {"weights": str(bundle.path)} if options.weights else {}
    if stored:
        settings = {**stored, **moved}
    else:
        settings = {"command": command_line(options, given), **settings_of(setup, wanted, template)}
    return Plan(setup, concepts, settings)


def _target(options, given, bundle):
    """What is made fair; None where the user's own losses, or L_text, alone are minimised. Raises UserError."""
    if not options.attr and (options.loss or given.get("lambda_text")):
        if options.target:
            raise UserError("--target is for a run with --attr; leave it out.")
        return None
    return wanted_target(options.attr, options.target, bundle.attributes, str(bundle.path))


def _taken_names():
    """Names of metrics that an own loss may not have."""
    of_iteration = ("prompt", "S", "guidance", "loss", "cost", "counts", "blended", "bias")
    return (*TERMS, *STATISTICS, *of_iteration, "iteration", "lr", "norm", "skipped", "seconds", "validation")


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Says how a run goes on that a full disk has ended, and that it can't without its folder."""
    try:
        yield
    except (OSError, UserError) as error:
        if not folder.is_dir():
            raise UserError(f"{folder}: the run's folder has gone while it ran; start a new run.") from error
        if isinstance(error, UserError) or error.errno not in FULL:
            raise
        raise UserError(f"{of_files(error)[:-1]}, then go on with --resume {folder}.") from None


def _say_what_lacks(setup, concepts):
    """The terms that the loss does not have, and validation prompts that are not unseen."""
    for what in lacking(setup):
        print(f"{setup.bundle.path} has {what}")
    seen = [prompts.name for prompts in concepts if not prompts.validation]
    if seen and (setup.recipe.validate_every or setup.recipe.grid_every):
        print(f"no prompts for validation in {', '.join(seen)}: some of finetuning's stand in for them")


def _say_of_prompts(setup, concepts):
    """Which are cut, and whose own words are at odds with the target."""
    prompts = [prompt for concept in concepts for prompt in concept.train]
    soft = setup.recipe.tokens if setup.recipe.component in SOFT else 0
    warn_of_cut(setup.bundle.tokenizer, prompts, soft)
    for attribute in setup.target.classes if setup.target else ():
        explicit = [item for concept in concepts for item in concept.naming(attribute).items()]
        if explicit:
            (prompt, words), *_ = explicit
            print(
                f"{len(explicit)} of {len(prompts)} prompts name {attribute} themselves, as {words!r} in {prompt!r}: "
                "their images are made fair, too; leave them out if that isn't meant"
            )


def _to_evaluate(setup, files):
    """The adapters that the recipe wants evaluated: name -> file."""
    wanted = setup.recipe.evaluate
    if wanted == "best" and "best" not in files:
        if setup.processes.first:
            print("no validation chose a best adapter: the moving average at the end is evaluated instead")
        wanted = "ema"
    return {name: files[name] for name in (("ema", "raw") if wanted == "both" else (wanted,))}


def _evaluate(setup, files, concepts, folder):
    recipe, adapters = setup.recipe, _to_evaluate(setup, files)
    images = ImageCounts(recipe.eval_images, recipe.eval_images_train)
    try:
        with interrupting():
            if setup.target is None:
                term_report(setup, adapters, concepts, images, folder)
            else:
                how = EvaluationSettings(
                    setup.bundle,
                    setup.target,
                    drawing_of(recipe),
                    processes=setup.processes,
                    kept=folder / KEPT,
                )
                before_after(how, adapters, concepts, images, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"\nstopped in the evaluation; the adapters are in {folder}, --resume {folder} goes on with it"
        ) from None


def _sample_command(prompt, folder, weights):
    command = ["python", "sample.py", prompt, "--adapter", str(folder)]
    return shlex.join(command + (["--weights", str(weights)] if weights != DEFAULT else []))


def _prompts(settings):
    """--prompts, a text file as its lines, which a resumed run finds in its settings; and --prompt-template."""
    wanted = settings["prompts"] or OCCUPATIONS
    if isinstance(wanted, str) and is_file(wanted):
        wanted = read_lines(expanded(wanted))
    return wanted, settings["prompt_template"]


def _folder(options, setup, held):
    """The first process makes or finds it, and keeps others out while `held`."""

    def find():
        if options.resume:
            folder = expanded(options.resume)
        else:
            names = setup.target.classes if setup.target else terms_of(setup)
            folder = checkpoints.new_folder(options.out, "runs/" + "-".join(names))
        held.enter_context(checkpoints.held(folder))
        return folder

    return Path(setup.processes.first_does(find))
