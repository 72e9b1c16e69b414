"""What train.py does: options -> a run's folder -> finetuning -> evaluation before and after."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fairref import __version__, cli
from fairref.bundle import load_bundle
from fairref.errors import UserError
from fairref.evaluate import How, before_after
from fairref.fairness.attributes import Attribute, parse_target, parse_targets
from fairref.finetune import checkpoints, distributed
from fairref.finetune.recipes import Recipe, resolve
from fairref.finetune.trainer import Setup, train
from fairref.prompts import occupation_prompt, read_occupations


@dataclass(frozen=True)
class Options:
    """The options of train.py; None: not given."""

    attr: str | None = None  # "gender" or "gender=0.5,0.5"
    target: list[str] | None = None  # ["gender=0.5,0.5"] or ["joint.json"]
    out: str | None = None  # folder of the run
    resume: str | None = None  # folder of a run that goes on
    weights: str | None = None
    dtype: str | None = None
    device: str = "auto"
    recipe: dict = field(default_factory=dict)  # the fields of Recipe that were given


def run(options: Options) -> Path:
    """The whole run -> its folder. Raises UserError."""
    processes, device = distributed.start(cli.device(options.device))
    try:
        return _run(options, processes, device)
    finally:
        processes.stop()


def _run(options, processes, device):
    settings = _resumed(options) if options.resume else None
    weights = settings["weights"] if settings else options.weights or cli.WEIGHTS
    dtype = settings["dtype"] if settings else options.dtype or "float32"
    bundle = load_bundle(weights, device, cli.DTYPES[dtype])
    if settings:
        attribute = Attribute(settings["attribute"], tuple(settings["classes"]), tuple(settings["target"]))
        recipe = Recipe(**settings["recipe"])
    else:
        attribute = _attribute(options, bundle)
        recipe = resolve(attribute.name, bundle.recipe, options.recipe, str(bundle.path))
    world = read_occupations(bundle.path)
    prompts = tuple(map(occupation_prompt, world.train))
    named = tuple(
        (world.named_prompt(attribute.name, name, occupation), k)
        for occupation in world.train
        for k, name in enumerate(attribute.classes)
    )
    setup = Setup(bundle, recipe, attribute, prompts, processes, named)
    if recipe.evaluate != "none":
        How(
            bundle, attribute, recipe.eval_steps, recipe.guidance
        )  # what it lacks is better said before the run

    settings = settings or {
        "weights": weights,
        "dtype": dtype,
        "attribute": attribute.name,
        "classes": attribute.classes,
        "target": attribute.target,
        "recipe": recipe.to_dict(),
        "processes": processes.world,
        "device": device.type,
        "versions": {"fairref": __version__, "torch": torch.__version__},
    }
    folder = Path(options.resume).expanduser() if options.resume else _folder(options, attribute, processes)
    if processes.first:
        print(f"the run is in {folder}")
        if not options.resume:
            checkpoints.write_json(folder / checkpoints.SETTINGS, settings)
    info = {
        "weights": bundle.manifest.get("name", str(weights)),
        "component": recipe.component,
        "attribute": attribute.name,
        "target": attribute.target,
    }
    files = train(setup, folder, info)
    if recipe.evaluate != "none":
        adapters = files if recipe.evaluate == "both" else {recipe.evaluate: files[recipe.evaluate]}
        before_after(setup, adapters, world, folder)
    if processes.first:
        print(f"draw with it: {_sample_command(occupation_prompt(world.test[0]), folder, weights)}")
    return folder


def _sample_command(prompt, folder, weights):
    command = ["python", "sample.py", prompt, "--adapter", str(folder)]
    return shlex.join(command + (["--weights", str(weights)] if weights != cli.WEIGHTS else []))


def _attribute(options, bundle):
    """What --attr and --target ask for."""
    if not options.attr and not options.target:
        known = ", ".join(bundle.attributes) or "none"
        raise UserError(f"--attr is missing: it says what to make fair; {bundle.path} knows: {known}.")
    if not options.target:
        return parse_target(options.attr, bundle.attributes)
    target = parse_targets(options.target, bundle.attributes)
    if len(target.classes) > 1:
        raise UserError(
            f"--target names {', '.join(target.classes)}; finetuning takes one attribute at a time."
        )
    (name,) = target.classes
    if options.attr and "=" in options.attr:
        raise UserError(f"--attr {options.attr} and --target both give shares; leave one out.")
    if options.attr and options.attr != name:
        raise UserError(
            f"--attr is {options.attr} and --target is for {name}; they must name the same attribute."
        )
    return target.marginal(name)


def _resumed(options):
    given = [
        key for key in ("attr", "target", "out", "weights", "dtype") if getattr(options, key) is not None
    ]
    given += list(options.recipe)
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} can't be changed in a run that --resume goes on with;"
            " leave it out."
        )
    settings = checkpoints.read_settings(options.resume)
    needed = {"weights", "dtype", "attribute", "classes", "target", "recipe"}
    missing = sorted(needed - set(settings))
    if missing or not set(settings["recipe"]) <= set(Recipe.__dataclass_fields__):
        raise UserError(
            f"{options.resume}/{checkpoints.SETTINGS}: not the settings of a run of this version;"
            " start a new one."
        )
    return settings


def _folder(options, attribute, processes):
    """The first process makes it; what it says, also if that is an error, holds for all."""
    answer = ""
    if processes.first:
        try:
            answer = f"ok {checkpoints.new_folder(options.out, f'runs/{attribute.name}')}"
        except UserError as error:
            answer = str(error)
    answer = processes.share(answer)
    if not answer.startswith("ok "):
        raise UserError(answer)
    return Path(answer.removeprefix("ok "))
