"""The recipe of a run: docs/method.md's numbers, overridden by the bundle's, then by the user's."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from fairref.errors import UserError
from fairref.settings import Recipe, read_shares

# docs/method.md §6 and §8, beside the defaults of Recipe, which are the gender run's. Skin tone stands for the paper's
# race.
RACE = {"batch": 32, "lambda_img": 6.0, "lambda_face": 0.1, "iterations": 12_000, "eval_images": 80}
GENDER_RACE = {"batch": 32, "C": 0.6, "lambda_face": 0.1, "iterations": 14_000}
WITH_AGE = {"batch": 40, "lambda_face": 0.1, "iterations": 15_000}
RUNS = {
    frozenset({"gender"}): {},
    frozenset({"race"}): RACE,
    frozenset({"gender", "race"}): GENDER_RACE,
    frozenset({"gender", "race", "age"}): WITH_AGE,
}
SEVERAL = {"eval_images": 160}  # attributes of any names
LAMBDA_2 = {"gender": 0.2, "race": 0.6, "age": 0.6}
LAMBDA_3 = {"gender": 0.2, "race": 0.3, "age": 0.3}


def methods(attributes: tuple[str, ...]) -> dict[str, object]:
    """What docs/method.md §6 and §8 say of these attributes; the gender run's numbers where they say nothing."""
    known = {name: "race" if name == "skin_tone" else name for name in attributes}
    return {
        **RUNS.get(frozenset(known.values()), {}),
        **(SEVERAL if len(known) > 1 else {}),
        "lambda_2": {name: LAMBDA_2.get(of, LAMBDA_2["gender"]) for name, of in known.items()},
        "lambda_3": {name: LAMBDA_3.get(of, LAMBDA_3["gender"]) for name, of in known.items()},
    }


def resolve(
    attributes: tuple[str, ...],
    bundle_recipe: Mapping[str, object],
    overrides: Mapping[str, object],
    source: str | Path = "bundle.json",
    known_attributes: Iterable[str] | None = None,
) -> Recipe:
    """The recipe of a run: docs/method.md's, the bundle's, the bundle's for the attributes, the user's; later wins.

    In `bundle_recipe` a key that is no setting, with an object, is for the run of the attributes it names, as
    "gender" or "gender,race": of `known_attributes`, the bundle's. lambda_2 and lambda_3 become a number for each
    attribute. Raises UserError for unknown keys; `source` names the manifest.
    """
    known = {f.name for f in fields(Recipe)}
    runs = {
        key: value for key, value in bundle_recipe.items() if key not in known and isinstance(value, dict)
    }
    strangers = {name for key in runs for name in key.split(",")} - set(known_attributes or ())
    if known_attributes is not None and strangers:
        raise UserError(
            f"{source}: recipe has the unknown key {min(strangers)!r}; expected a setting, or attributes of the bundle,"
            f" {', '.join(known_attributes)}."
        )
    specific = [value for key, value in runs.items() if set(key.split(",")) == set(attributes)]
    layers = [
        (methods(attributes), "docs/method.md"),
        ({key: value for key, value in bundle_recipe.items() if key not in runs}, f"{source}: recipe"),
        *((value, f"{source}: recipe of {','.join(attributes)}") for value in specific),
        (overrides, "options"),
    ]
    settings = {}
    for layer, where in layers:
        unknown = sorted(set(layer) - known)
        if unknown:
            raise UserError(
                f"{where} has the unknown key {unknown[0]!r}; expected some of {', '.join(sorted(known))}."
            )
        shares = {name: _for_each(name, layer, settings, attributes) for name in ("lambda_2", "lambda_3")}
        settings |= {**layer, **{name: value for name, value in shares.items() if value}}
    try:
        return Recipe(**settings)
    except UserError as error:
        # of a value that the user didn't give, the file is said that has it
        where = next(
            (where for layer, where in layers[::-1] if any(f" {key} is " in str(error) for key in layer)), ""
        )
        raise UserError(str(error) if where in ("", "options") else f"{where}: {error}") from None


def _for_each(name, layer, settings, attributes):
    """lambda_2 or lambda_3 for each attribute, where the layer has it: over what was set before."""
    try:
        value = read_shares(layer[name]) if name in layer else {}
    except ValueError:
        raise UserError(
            f"recipe: {name} is {layer[name]!r}; expected a number or some as gender=0.2,race=0.6."
        ) from None
    value = value if isinstance(value, dict) else dict.fromkeys(attributes, value)
    strangers = sorted(set(value) - set(attributes)) if attributes else []
    if strangers:
        raise UserError(f"recipe: {name} names {strangers[0]}; the run is for {', '.join(attributes)}.")
    before = settings.get(name)
    return {**(before if isinstance(before, dict) else {}), **value}
