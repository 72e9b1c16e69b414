"""What a report says first of a run: what it was, and its first numbers."""

from pathlib import Path

import numpy as np

from fairref.reporting.evaluated import (
    Part,
    bias,
    floor,
    is_product,
    mean_gap,
    of_judge,
    rms_gap,
    sure,
    target_shares,
    view,
)
from fairref.reporting.run_files import Run
from fairref.reporting.tables import Table, attribute_words, likeness, number, percent, short, spread
from fairref.settings import SOFT

EMOJI = "emoji"  # the small world's bundle, which is the default
TRAINED = {
    "prefix": "a prefix of soft tokens",
    "suffix": "a suffix of soft tokens",
    "deep": "soft tokens in each layer of the text encoder",
    "generated": "soft tokens made from the prompt",
    "text_encoder": "the text encoder",
    "unet": "the U-Net",
    "both": "text encoder and U-Net",
}
MOST_CLASSES = 12  # joint ones whose shares are listed


def made(run: Run) -> list[tuple[str, str]]:
    """What the run was, in words: (question, answer)."""
    settings, recipe = run.settings, run.settings["recipe"]
    model = ("Model", short(Path(settings["weights"]).name) or "not known")
    if not run.is_run:
        return [model, ("Trained", "nothing that this page knows: it has an evaluation alone")]
    trained = TRAINED.get(str(recipe.get("component")), short(str(recipe.get("component", "unknown"))))
    if recipe.get("component") not in SOFT and "rank" in recipe:
        trained += f", LoRA of rank {short(str(recipe['rank']))}"
    prompts = settings["prompts"]
    versions = ", ".join(f"{name} {version}" for name, version in settings.get("versions", {}).items())
    place = f"{settings.get('device', 'unknown device')}, {settings.get('dtype', 'unknown format')}"
    processes = settings.get("processes", 1)
    wanted = short(str(recipe.get("iterations", "?")))
    iterations = f"{len(run.metrics)} of {wanted}" if run.metrics else wanted
    return [
        model,
        ("Trained", trained),
        ("Aim", _aim(run)),
        ("Prompts", short(prompts) if isinstance(prompts, str) else f"{len(prompts)} lines of a text file"),
        ("Iterations", f"{iterations}, {short(str(recipe.get('batch', '?')))} pictures each"),
        ("Gradient", short(str(recipe.get("gradient", "unknown")))),
        ("Made on", short(f"{place}, {processes} process{'es' * (processes != 1)}; {versions}")),
    ]


def _aim(run):
    """Such as: gender: equal shares of woman and man; age: 75.0% young, 25.0% old."""
    target = run.settings["target"]
    if not target:
        return "no target: the loss alone"
    if is_product(run):
        return "; ".join(_shares(run, name, short(name).replace("_", " ")) for name in target["classes"])
    names = [short(name).replace("_", " ") for name in target["classes"]]
    return _shares(run, ",".join(target["classes"]), f"{' × '.join(names)}, a joint target")


def _shares(run, name, words):
    shares = target_shares(run, name)
    if not shares:
        return f"{words}: shares unknown"
    if np.ptp(list(shares.values())) < 1e-9:
        return f"{words}: equal shares of {' and '.join(map(short, run.settings['target']['classes'][name]))}"
    said = [f"{percent(share)} {short(c)}" for c, share in shares.items()]
    more = f" and {len(said) - MOST_CLASSES} more" if len(said) > MOST_CLASSES else ""
    between = ", " if "," not in name else "; "
    return f"{words}: {between.join(said[:MOST_CLASSES])}{more}"


def tiles(part: Part) -> list[tuple[str, str, str]]:
    """The first numbers that a reader looks for: (what, value, by whom and against what)."""
    before, after = part.pair
    name = part.views[0]
    judge = part.judges[0] if part.judges else ""
    was, now = (of_judge(report, name, judge) for report in (before, after))
    level = number(floor(view(part.first, name))["mean"])
    what = "Distance from the target" if "target_floor" in view(part.first, name) else "Bias"
    values = [number(mean_gap(of)[0]) for of in (was, now) if of]
    by = f"{judge}, {part.name}, {part.size}"
    found = [(f"{what}: {attribute_words(name)}", " → ".join(values), f"a fair model measures {level}; {by}")]
    value, low, high = rms_gap(now)
    if value is not None:
        ends = f"95% interval {number(low)} to {number(high)}; " if low is not None else ""
        found.append(
            (
                "rms gap after" if was else "rms gap",
                number(value),
                f"{ends}{f'before {number(rms_gap(was)[0])}; ' if was else ''}0 is fair",
            )
        )
    if "unfair_prompts" in sure(now):
        found.append(
            (
                "Prompts that are unfair by a test of their own",
                f"{sure(now)['unfair_prompts']} of {after['prompts']}",
                f"{judge}; false discovery rate 5%; the others may be unfair, too",
            )
        )
    if after and after.get("clip_i") is not None:
        by = "CLIP-I on the same noise; 1 is the same picture"
        found.append(("Likeness to the original", likeness(after["clip_i"]), by))
    if after and judge in after.get("explicit", {}):
        first = (before or {}).get("explicit", {}).get(judge)
        by = f"before {percent(first)}; {judge}, n = {number(after['explicit'].get('images'), 0)}"
        found.append(("Prompts drawn as asked", percent(after["explicit"][judge]), by))
    return found


def lead(part: Part) -> str:
    """The result in a sentence or two."""
    before, after = part.pair
    judge = part.judges[0] if part.judges else ""
    said = []
    for name in part.views:
        was, now = (spread(bias(of_judge(report, name, judge))) for report in (before, after))
        level = spread(floor(view(part.first, name)))
        pair = f"{was} before and {now} after" if before and after else f"{was if before else now}"
        said.append(f"{attribute_words(name)} {pair} (a fair model: {level})")
    what = "a distance from the target" if "target_floor" in part.first else "a bias"
    return f"On {part.name}, {part.size}, the {judge} measures {what} in {'; in '.join(said)}."


def settings_tables(run: Run) -> list[Table]:
    """All settings, and the fingerprints of what the run was made from."""
    recipe = [
        (short(str(key)), short(_shown(value)))
        for key, value in sorted(run.settings["recipe"].items(), key=str)
    ]
    marks = [(short(part), of) for part, of in run.settings.get("fingerprints", {}).items()]
    own = [
        (short(str(of.get("role", of.get("name", "")))), short(str(of.get("sha256", ""))))
        for of in (*run.settings.get("loss", []), *run.settings.get("judge", []))
    ]
    tables = [Table("Settings of the recipe", ("setting", "value"), recipe)]
    if marks or own:
        tables.append(
            Table(
                "Fingerprints (SHA-256) of the parts that the run was made from",
                ("part", "fingerprint"),
                marks + own,
            )
        )
    return tables


def _shown(value):
    if isinstance(value, list):
        return " to ".join(map(str, value))
    return ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def is_small_world(run: Run) -> bool:
    """Whether the run is of weights/emoji."""
    return Path(run.settings["weights"]).name == EMOJI
