"""What a report says first of a run: what it was, its first numbers, and the commands that measure more."""

import shlex
from pathlib import Path

from fairref.reporting.evaluated import (
    Part,
    bias,
    floor,
    mean_gap,
    of_judge,
    rms_gap,
    sure,
    target_shares,
    view,
)
from fairref.reporting.run_files import Run
from fairref.reporting.tables import Table, attribute_words, number, percent, short, spread

EMOJI = "emoji"  # the small world's bundle, which is the default
TRAINED = {
    "prefix": "a prefix of soft tokens",
    "text_encoder": "the text encoder",
    "unet": "the U-Net",
    "both": "text encoder and U-Net",
}
SWEEPS = {"guidance": "1,3,5,7.5,12", "strength": "0,0.25,0.5,0.75,1,1.25"}
BASELINES = ("coin", "projection", "uce", "fair_pca")


def made(run: Run) -> list[tuple[str, str]]:
    """What the run was, in words: (question, answer)."""
    settings, recipe = run.settings, run.settings["recipe"]
    trained = TRAINED.get(str(recipe.get("component")), short(str(recipe.get("component", "unknown"))))
    if recipe.get("component") != "prefix" and "rank" in recipe:
        trained += f", LoRA of rank {short(str(recipe['rank']))}"
    prompts = settings["prompts"]
    target = settings["target"]
    aims = [_aim(run, name) for name in target["classes"]] if target else ["no target: the loss alone"]
    versions = ", ".join(f"{name} {version}" for name, version in settings.get("versions", {}).items())
    place = f"{settings.get('device', 'unknown device')}, {settings.get('dtype', 'unknown format')}"
    processes = settings.get("processes", 1)
    wanted = recipe.get("iterations", "?")
    return [
        ("Model", short(Path(settings["weights"]).name)),
        ("Trained", trained),
        ("Aim", "; ".join(aims)),
        ("Prompts", short(prompts) if isinstance(prompts, str) else f"{len(prompts)} lines of a text file"),
        (
            "Iterations",
            f"{len(run.metrics)} of {short(str(wanted))}, {short(str(recipe.get('batch', '?')))} pictures each",
        ),
        ("Gradient", short(str(recipe.get("gradient", "unknown")))),
        ("Made on", short(f"{place}, {processes} process{'es' * (processes != 1)}; {versions}")),
    ]


def _aim(run, name):
    """Such as: gender: equal shares of woman and man."""
    shares = target_shares(run, name)
    words = short(name).replace("_", " ")
    if not shares or max(shares.values()) - min(shares.values()) < 1e-9:
        return f"{words}: equal shares of {' and '.join(map(short, run.settings['target']['classes'][name]))}"
    return f"{words}: " + ", ".join(f"{percent(share)} {short(c)}" for c, share in shares.items())


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
    if rms_gap(now)[0] is not None:
        value, low, high = rms_gap(now)
        ends = f"95% interval {number(low)} to {number(high)}; " if low is not None else ""
        found.append(("rms gap after", number(value), f"{ends}before {number(rms_gap(was)[0])}; 0 is fair"))
    if "unfair_prompts" in sure(now):
        found.append(
            (
                "Prompts that still lean",
                f"{sure(now)['unfair_prompts']} of {after['prompts']}",
                f"{judge}; false discovery rate 5%",
            )
        )
    if after and after.get("clip_i") is not None:
        found.append(
            (
                "Likeness to the original",
                number(after["clip_i"]),
                "CLIP-I on the same noise; 1 is the same picture",
            )
        )
    if after and judge in after.get("explicit", {}):
        asked = [
            report["explicit"].get(judge) if report and "explicit" in report else None
            for report in (before, after)
        ]
        by = f"before {percent(asked[0])}; {judge}, n = {number(after['explicit'].get('images'), 0)}"
        found.append(("Prompts drawn as asked", percent(asked[1]), by))
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


def commands(run: Run) -> dict[str, str]:
    """What makes the files that a section is made of."""
    names = list((run.settings["target"] or {"classes": {}})["classes"])
    prompts = run.settings["prompts"]
    concepts = prompts.split(",") if isinstance(prompts, str) else []
    train = ["python", "train.py", "--attr", ",".join(names) or "gender"]
    words = {
        "evaluate": _evaluate(run, names, concepts),
        # a sweep takes one concept, a baseline one attribute
        **{
            name: [*_evaluate(run, names, concepts[:1]), "--sweep", f"{name}={values}"]
            for name, values in SWEEPS.items()
        },
        "baselines": [
            *_evaluate(run, names[:1], concepts[:1]),
            *(word for name in BASELINES for word in ("--baseline", name)),
        ],
        "resume": ["python", "train.py", "--resume", place(run.path)],
        "components": [*train, "--component", "unet"],
    }
    return {name: short_paths(shlex.join(of)) for name, of in words.items()}


def _evaluate(run, names, concepts):
    """fairref evaluate of the run's adapter, on attributes and concepts; without concepts its prompts were a file."""
    words = ["fairref", "evaluate", "--adapter", place(run.path)]
    if not is_small_world(run):
        words += ["--weights", place(Path(run.settings["weights"]))]
    if names and names != ["gender"]:
        words += ["--attr", ",".join(names)]
    for name in names:
        shares = target_shares(run, name)
        if shares and max(shares.values()) - min(shares.values()) > 1e-9:
            words += ["--target", f"{name}=" + ",".join(f"{share:.4g}" for share in shares.values())]
    if not concepts:
        words += ["--prompts", "FILE", "--part", "train"]
    elif concepts != ["occupations"]:
        words += ["--prompts", ",".join(concepts)]
    return words


def place(path: Path) -> str:
    """A path as a command on the page names it: no folder of one machine."""
    try:
        return str(path.relative_to(Path.cwd())) if path.is_absolute() else str(path)
    except ValueError:
        return path.name


def short_paths(command: str) -> str:
    """A command without the folders of one machine."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    return shlex.join(Path(word).name if word.startswith("/") else word for word in words)


def is_small_world(run: Run) -> bool:
    """Whether the run is of weights/emoji."""
    return Path(run.settings["weights"]).name == EMOJI
