"""settings.json of a run: what is written, and what --resume reads."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from fairref import __version__
from fairref.bundle.loading import Bundle
from fairref.bundle.zero_shot import PREFIX
from fairref.errors import UserError
from fairref.fairness.attributes import JointTarget
from fairref.files.own_code import sha256_of
from fairref.processes import Processes
from fairref.settings import Recipe, RunOptions, check_settings
from fairref.training import checkpoints
from fairref.training.setup import Setup

Settings = dict[str, object]


def settings_of(setup: Setup, wanted: str | Sequence[str], template: str | None) -> Settings:
    """What settings.json says of a new run; `wanted` and `template` are its --prompts and --prompt-template."""
    target, bundle = setup.target, setup.bundle
    return {
        "weights": str(bundle.path),
        "fingerprints": bundle.all_fingerprints,
        "dtype": bundle.dtype,
        "target": {"classes": target.classes, "table": target.table.tolist()} if target else None,
        "loss": [own.to_dict() for own in setup.own_losses],
        "judge": [
            {"role": role, **source.to_dict()}
            for role, sources in bundle.own_judges.items()
            for source in sources
        ],
        "prompts": wanted if isinstance(wanted, str) else list(wanted),
        "prompt_template": template,
        "recipe": setup.recipe.to_dict(),
        "processes": setup.processes.world,
        "device": bundle.device.type,
        "versions": {"fairref": __version__, "torch": torch.__version__},
    }


def of_settings(settings: Settings) -> tuple[JointTarget | None, Recipe]:
    """What a run's settings.json says that it aims at, and how."""
    recipe = Recipe(**settings["recipe"])
    if settings["target"] is None:
        return None, recipe
    classes = {name: tuple(names) for name, names in settings["target"]["classes"].items()}
    return JointTarget(classes, np.array(settings["target"]["table"])), recipe


def read_stored(options: RunOptions, recipe: Mapping[str, object]) -> Settings:
    """The settings.json of the run that --resume goes on with. Raises UserError."""
    given = [
        f.name
        for f in fields(RunOptions)
        if not f.metadata["with_resume"] and getattr(options, f.name) is not None
    ]
    given += list(recipe)
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} can't be changed in a run that --resume goes on with;"
            " leave it out."
        )
    settings = checkpoints.read_settings(options.resume)
    file = f"{options.resume}/{checkpoints.SETTINGS}"
    try:
        whole = check_settings(settings) and of_settings(settings)
        # a row of a user's own that lacks a key shows here
        own, *_ = (_own_files(settings), loss_texts(settings), judge_places(settings)) if whole else ([],)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        whole = False
    if not whole:
        raise UserError(f"{file}: not the settings of a run of this version; start a new one.")
    _refuse_changed(own)
    return settings


def loss_texts(settings: Settings) -> list[str]:
    """Its own losses, as --loss has them."""
    return [f"{own['path']}:{own['name']}={own['weight']}" for own in settings["loss"]]


def judge_places(settings: Settings) -> dict[str, list[str]]:
    """Its own judges, as `load_bundle` has them."""
    places = {}
    for own in settings["judge"]:
        place = PREFIX + own["clip"] if "clip" in own else f"{own['path']}:{own['name']}"
        places.setdefault(own["role"], []).append(place)
    return places


def _own_files(settings):
    """The files of a user's own losses and judges, with the hashes that they had."""
    own = [row for row in (*settings["loss"], *settings["judge"]) if "clip" not in row]
    return [(Path(row["path"]), str(row["sha256"])) for row in own]


def _refuse_changed(own):
    """Refuses a user's own code that is not what the run began with. Raises UserError."""
    for path, sha256 in own:
        if not path.is_file() or sha256_of(path) != sha256:
            what = "has changed" if path.is_file() else "is no longer there"
            raise UserError(f"{path}: {what} since the run began; put the old file back, or start a new run.")


def refuse_another(settings: Settings, bundle: Bundle) -> None:
    """Refuses weights that are not those that a run was made from, where it knows them. Raises UserError."""
    found = bundle.all_fingerprints
    known = settings.get("fingerprints", found)
    if parts := sorted(key for key in known | found if known.get(key) != found.get(key)):
        copy = (
            "" if all("tokenizer" in part for part in parts) else " (a bfloat16 copy counts as another one)"
        )
        raise UserError(
            f"{bundle.path}: {', '.join(parts)} {'is' if len(parts) == 1 else 'are'} not what the run was made from"
            f"{copy}; give the same weights with --weights, or start a new run."
        )


def differences(settings: Settings, processes: Processes, device: torch.device) -> list[str]:
    """What a resumed run's last digits depend on and is no longer as it was, or is unknown."""
    here = {"processes": processes.world, "device": device.type, "torch": torch.__version__}
    before = {key: settings.get(key, settings.get("versions", {}).get(key)) for key in here}
    older = ["an older version began the run: whether the weights are the same is unknown"]
    return ([] if "fingerprints" in settings else older) + [
        f"{key} was {before[key]} and is {here[key]}: the run goes on, but not to the same last digits"
        for key in here
        if here[key] != before[key]
    ]
