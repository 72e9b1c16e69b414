"""What train.py does: options -> a run's folder -> finetuning -> evaluation before and after."""

import shlex
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fairref import __version__, cli
from fairref.bundle import load_bundle
from fairref.errors import UserError
from fairref.evaluate import How, before_after
from fairref.fairness.attributes import JointTarget, wanted_target
from fairref.finetune import checkpoints, distributed
from fairref.finetune.mixture import OCCUPATIONS, is_file, read_lines, read_prompts, validation_prompts
from fairref.finetune.recipes import Recipe, resolve
from fairref.finetune.setup import Setup
from fairref.finetune.signals import interrupting
from fairref.finetune.trainer import check, train
from fairref.weights_io import expanded, write_json


@dataclass(frozen=True)
class Options:
    """The options of train.py; None: not given."""

    attr: str | None = None  # "gender", "gender,race" or "gender=0.5,0.5"
    target: list[str] | None = None  # ["gender=0.5,0.5", "age=0.75,0.25"] or ["joint.json"]
    out: str | None = None  # folder of the run
    prompts: str | None = None  # "occupations,sports", or a text file
    prompt_template: str | None = None  # "a photo of a {occupation}"
    resume: str | None = None  # folder of a run that goes on
    weights: str | None = None
    dtype: str | None = None
    device: str = "auto"
    recipe: dict = field(default_factory=dict)  # the fields of Recipe that were given


def run(options: Options) -> Path:
    """The whole run -> its folder. Raises UserError."""
    resumed = _resumed(options) if options.resume and options.device == "auto" else {}
    processes, device = distributed.start(cli.device(resumed.get("device", options.device)))
    try:
        with ExitStack() as held:
            return _run(options, processes, device, held)
    finally:
        processes.stop()


def _run(options, processes, device, held):
    settings = _resumed(options) if options.resume else None
    weights = settings["weights"] if settings else options.weights or cli.WEIGHTS
    dtype = settings["dtype"] if settings else options.dtype or "float32"
    bundle = load_bundle(weights, device, cli.DTYPES[dtype])
    if settings:
        target, recipe = of_settings(settings)
    else:
        target = wanted_target(options.attr, options.target, bundle.attributes, str(bundle.path))
        recipe = resolve(tuple(target.classes), bundle.recipe, options.recipe, bundle.path, bundle.attributes)
    wanted, template = _prompts(settings or vars(options))
    concepts = read_prompts(wanted, template, bundle, list(target.classes))
    named = tuple(asked for prompts in concepts for asked in prompts.named("train", target.classes))
    train_prompts = tuple(prompts.train for prompts in concepts)
    looks = recipe.validate_every or recipe.grid_every
    validation = validation_prompts(concepts, recipe.validate_prompts) if looks else ()
    setup = Setup(bundle, recipe, target, train_prompts, processes, named, validation)
    check(setup)
    if options.recipe.get("lambda_face") and bundle.embedder is None:
        raise UserError(
            f"--lambda-face needs a face embedder, which {bundle.path} has not; leave it out, or 0."
        )
    if recipe.evaluate != "none" or looks:  # what it lacks is better said before the run
        How(bundle, target, recipe.eval_steps, recipe.eval_guidance)

    if settings and processes.first:
        _say_what_differs(settings, processes, device)
    settings = settings or {
        "weights": weights,
        "dtype": dtype,
        "target": {"classes": target.classes, "table": target.table.tolist()},
        "prompts": wanted,
        "prompt_template": template,
        "recipe": recipe.to_dict(),
        "processes": processes.world,
        "device": device.type,
        "versions": {"fairref": __version__, "torch": torch.__version__},
    }
    folder = _folder(options, target, processes, held)
    if processes.first:
        print(f"the run is in {folder}")
        _say_what_lacks(bundle, recipe, concepts)
        _say_of_prompts(setup, concepts)
        if not options.resume:
            write_json(folder / checkpoints.SETTINGS, settings)
    info = {
        "weights": bundle.manifest.get("name", str(weights)),
        "component": recipe.component,
        "classes": target.classes,
        "target": target.table.tolist(),
    }
    with _resumable(folder):
        files = train(setup, folder, info)
        if recipe.evaluate != "none":
            _evaluate(setup, files, concepts, folder)
    if processes.first:
        prompt = (concepts[0].test or concepts[0].train)[0]
        print(f"draw with it: {_sample_command(prompt, folder, weights)}")
    return folder


@contextmanager
def _resumable(folder):
    """Says how a run goes on that a full disk has ended."""
    try:
        yield
    except OSError as error:
        if error.errno not in cli.FULL:
            raise
        raise UserError(f"{cli.of_files(error)[:-1]}, then go on with --resume {folder}.") from None


def _say_what_lacks(bundle, recipe, concepts):
    """The terms that the loss does not have, and validation prompts that are not unseen."""
    lacking = {
        "no face detector: its classifiers look at whole pictures": bundle.detector,
        "no face embedder: the loss has no L_face": bundle.embedder or not recipe.lambda_face,
        "no DINO: L_img compares pictures by CLIP alone": bundle.dino or not recipe.lambda_img,
    }
    for what, there in lacking.items():
        if not there:
            print(f"{bundle.path} has {what}")
    seen = [prompts.name for prompts in concepts if not prompts.validation]
    if seen and (recipe.validate_every or recipe.grid_every):
        print(f"no prompts for validation in {', '.join(seen)}: some of finetuning's stand in for them")


def _say_of_prompts(setup, concepts):
    """Which are cut, and whose own words are at odds with the target."""
    prompts = [prompt for of_one in concepts for prompt in of_one.train]
    soft = setup.recipe.tokens if setup.recipe.component == "prefix" else 0
    cli.warn_of_cut(setup.bundle.tokenizer, prompts, soft)
    for attribute in setup.target.classes:
        named = [found for of_one in concepts for found in of_one.naming(attribute).items()]
        if named:
            (prompt, words), *_ = named
            print(
                f"{len(named)} of {len(prompts)} prompts name {attribute} themselves, as {words!r} in {prompt!r}: "
                "their pictures are made fair, too; leave them out if that isn't meant"
            )


def of_settings(settings: dict) -> tuple[JointTarget, Recipe]:
    """What a run's settings.json says that it aims at, and how."""
    classes = {name: tuple(of_one) for name, of_one in settings["target"]["classes"].items()}
    return JointTarget(classes, np.array(settings["target"]["table"])), Recipe(**settings["recipe"])


def _to_evaluate(setup, files):
    """The adapters that the recipe wants evaluated: name -> file."""
    wanted = setup.recipe.evaluate
    if wanted == "best" and "best" not in files:
        if setup.processes.first:
            print("no validation chose a best adapter: the moving average at the end is evaluated instead")
        wanted = "ema"
    return {name: files[name] for name in (("ema", "raw") if wanted == "both" else (wanted,))}


def _evaluate(setup, files, concepts, folder):
    try:
        with interrupting():
            before_after(setup, _to_evaluate(setup, files), concepts, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"\nstopped in the evaluation; the adapters are in {folder}, --resume {folder} evaluates them anew"
        ) from None


def _say_what_differs(settings, processes, device):
    """Of what a resumed run's last digits depend on."""
    here = {"processes": processes.world, "device": device.type, "torch": torch.__version__}
    before = {key: settings.get(key, settings.get("versions", {}).get(key)) for key in here}
    for key in (key for key in here if here[key] != before[key]):
        print(f"{key} was {before[key]} and is {here[key]}: the run goes on, but not to the same last digits")


def _sample_command(prompt, folder, weights):
    command = ["python", "sample.py", prompt, "--adapter", str(folder)]
    return shlex.join(command + (["--weights", str(weights)] if weights != cli.WEIGHTS else []))


def _prompts(settings):
    """--prompts, a text file as its lines, which a resumed run finds in its settings; and --prompt-template."""
    wanted = settings["prompts"] or OCCUPATIONS
    if isinstance(wanted, str) and is_file(wanted):
        wanted = read_lines(expanded(wanted))
    return wanted, settings["prompt_template"]


def _resumed(options):
    fixed = ("attr", "target", "out", "prompts", "prompt_template", "weights", "dtype")
    given = [key for key in fixed if getattr(options, key) is not None]
    given += list(options.recipe)
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} can't be changed in a run that --resume goes on with;"
            " leave it out."
        )
    settings = checkpoints.read_settings(options.resume)
    file = f"{options.resume}/{checkpoints.SETTINGS}"
    try:
        whole = _is_whole(settings) and of_settings(settings)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        whole = False
    if not whole:
        raise UserError(f"{file}: not the settings of a run of this version; start a new one.")
    return settings


def _is_whole(settings):
    """Whether a settings.json has all that a run goes on with, each in its type."""
    kinds = {
        "weights": str,
        "dtype": str,
        "device": str,
        "target": dict,
        "prompts": str | list,
        "prompt_template": str | None,
        "recipe": dict,
        "versions": dict,
    }
    if not all(key in settings and isinstance(settings[key], kind) for key, kind in kinds.items()):
        return False
    lines = settings["prompts"] if isinstance(settings["prompts"], list) else []
    known = settings["dtype"] in cli.DTYPES and set(settings["recipe"]) == set(Recipe.__dataclass_fields__)
    return known and all(isinstance(line, str) for line in lines)


def _folder(options, target, processes, held):
    """The first process makes or finds it, and keeps others out while `held`; what it says, also if that is an error,
    holds for all."""
    answer = ""
    if processes.first:
        try:
            if options.resume:
                folder = expanded(options.resume)
            else:
                folder = checkpoints.new_folder(options.out, "runs/" + "-".join(target.classes))
            held.enter_context(checkpoints.held(folder))
            answer = f"ok {folder}"
        except UserError as error:
            answer = str(error)
    answer = processes.share(answer)
    if not answer.startswith("ok "):
        raise UserError(answer)
    return Path(answer.removeprefix("ok "))
