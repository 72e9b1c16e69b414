"""What a page lacks, and the command that makes it, as somebody types it who has the run's folder."""

import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import fairref
from fairref.reporting.evaluated import is_product, target_shares
from fairref.reporting.run_files import FILES, Run
from fairref.settings import SOFT

SWEEPS = {"guidance": "1,3,5,7.5,12", "strength": "0,0.25,0.5,0.75,1,1.25"}
WITHOUT_LORA = {"strength": "0,1"}  # a soft prompt is there or not
BASELINES = ("coin", "projection", "uce", "fair_pca")
OCCUPATIONS = (
    "occupations"  # the only prompts that coin knows where to put a word into, and that have explicit ones
)
NUMBERS = {"--num-images": "eval_images", "--steps": "eval_steps", "--guidance": "eval_guidance"}
OF_COMPONENT = (
    "--component",
    "--out",
    "--rank",
    "--tokens",
)  # options of train.py that another component changes
DEFAULT = "weights/emoji"
HOMES = [
    Path(fairref.__file__).resolve().parents[up] / "weights" for up in (1, 0)
]  # where bundles have a name
# the beginning of a word, or what follows = : , in it; folders from the root, from home or upwards; and further ones
FOLDERS = re.compile(r"(^|[=:,])(?:~[^/]*/|/|(?:[^=:,/]*/)*?\.\./)(?:.*/(?=.))?")

SAID = {  # of a run that has ended, and has a target
    "pictures": "There is no {pictures}. This makes it:",
    "intervals": "This evaluation has no intervals, no tests and no correction. One that has them:",
    "explicit": "No evaluation of this run drew prompts that name a class. This does:",
    **{name: f"There is no {{{name}}}. This makes it:" for name in (*SWEEPS, "baselines")},
}


@dataclass(frozen=True)
class Lack:
    """Why something is not on the page, and the command that makes it; "": there is none."""

    said: str
    command: str = ""


def lacks(run: Run) -> dict[str, Lack]:
    """Section -> what is said where it is empty."""
    words, names = _commands(run), _attributes(run)
    found = {key: (said.format(**FILES), words[key]) for key, said in SAID.items()}
    if not run.is_finished:
        why, again = (
            "The run has not ended. This goes on with it, and evaluates it at its end:",
            words["resume"],
        )
    elif run.settings["recipe"].get("evaluate") != "none":
        why, again = "The run has ended. This evaluates it:", words["resume"]
    else:
        why = f"The run was told to make none. This makes {FILES['judged']}, which is read, too:"
        again = words["evaluate"]
    if not names:
        found = dict.fromkeys(found, ("This run has no target, so nobody counted classes.", []))
        found["pictures"] = (f"There is no {FILES['pictures']}.", [])
        again = again if again == words["resume"] else []
    elif not run.evaluations:
        found["pictures"] = (found["pictures"][0], again)
    if not run.is_finished:
        found = {
            key: ("Once the run has ended, this".join(said.rsplit("This", 1)), of)
            if of[:1] == ["fairref"]
            else (said, of)
            for key, (said, of) in found.items()
        }
    found["evaluation"] = (f"There is no {FILES['evaluation']}. {why}", again)
    found["metrics"] = (
        (f"{FILES['metrics']} has gone, and nothing writes it again but a new run.", [])
        if run.is_finished
        else (f"There is no line in {FILES['metrics']} yet. This goes on with the run:", words["resume"])
    )
    said = (
        "This run recorded no scores, and can't do so afterwards. The same run with them, in another folder:"
    )
    found["pulled"] = (
        said,
        [*_without(_words(run.settings.get("command", "python train.py")), ("--out",)), "--scores"],
    )
    found["components"] = ("", _with_other_component(run))
    return {key: Lack(said, short_paths(shlex.join(of))) for key, (said, of) in found.items()}


def _commands(run):
    """What makes a section's file, and the two commands that evaluate a run. A sweep takes one concept, a baseline one
    attribute."""
    names, concepts = _attributes(run), _concepts(run)
    evaluate = _evaluate(run, names, concepts)
    ways = BASELINES if concepts[:1] == [OCCUPATIONS] else BASELINES[1:]
    return {
        "resume": ["python", "train.py", "--resume", place(run.path)],
        **dict.fromkeys(("evaluate", "pictures", "intervals"), evaluate),
        "explicit": evaluate if OCCUPATIONS in concepts else _evaluate(run, names, [OCCUPATIONS]),
        **{name: _swept(run, names, concepts[:1], name) for name in SWEEPS},
        "baselines": _evaluate(run, names[:1], concepts[:1])
        + [word for way in ways for word in ("--baseline", way)],
    }


def _attributes(run):
    """Those of the target, or what an evaluation of a run without one counted."""
    if run.settings["target"]:
        return list(run.settings["target"]["classes"])
    reports = (
        report for of in run.evaluations.values() for parts in of.values() for report in parts.values()
    )
    return next((report["attribute"].split(",") for report in reports if "attribute" in report), [])


def _concepts(run):
    """The concepts of the run's prompts; [] of a text file."""
    prompts = run.settings["prompts"]
    return prompts.split(",") if isinstance(prompts, str) else []


def _swept(run, names, concepts, name):
    values = (WITHOUT_LORA if run.settings["recipe"].get("component") in SOFT else {}).get(name, SWEEPS[name])
    return [*_evaluate(run, names, concepts, name), "--sweep", f"{name}={values}"]


def _evaluate(run, names, concepts, swept=""):
    """`fairref evaluate` of the run's adapter as the run itself evaluates it, on attributes and concepts."""
    settings, recipe = run.settings, run.settings["recipe"]
    words = ["fairref", "evaluate", "--adapter", place(run.path), *_weights(settings["weights"])]
    words += ["--attr", ",".join(names)] if names != ["gender"] else []
    words += _target(run, names) + _prompts(settings, concepts)
    numbers = {option: key for option, key in NUMBERS.items() if key in recipe and option != f"--{swept}"}
    words += [word for option, key in numbers.items() for word in (option, str(recipe[key]))]
    words += ["--dtype", settings["dtype"]] if settings.get("dtype", "float32") != "float32" else []
    for own in settings.get("judge", []):
        if own.get("role") != "finetune":
            what = (
                f"clip:{own['clip']}"
                if "clip" in own
                else f"{place(Path(str(own.get('path'))))}:{own.get('name')}"
            )
            words += ["--judge", f"{own.get('role')}={what}"]
    return words


def _weights(weights):
    named = place(Path(weights))
    return [] if named == DEFAULT else ["--weights", named]


def _target(run, names):
    """The shares of attributes, where they are unequal; of a joint target that is no product, a file has them."""
    if len(names) > 1 and not is_product(run):
        return ["--target", _given(run.settings, "--target", ".json") or "target.json"]
    words = []
    for name in names:
        shares = target_shares(run, name)
        if shares and max(shares.values()) - min(shares.values()) > 1e-9:
            words += ["--target", f"{name}=" + ",".join(f"{share:.9g}" for share in shares.values())]
    return words


def _prompts(settings, concepts):
    if concepts:
        return ["--prompts", ",".join(concepts)] if concepts != [OCCUPATIONS] else []
    return ["--prompts", _given(settings, "--prompts") or "prompts.txt", "--part", "train"]


def notes(run: Run) -> list[str]:
    """What a reader must know to use the commands."""
    settings, said = run.settings, []
    command = shlex.join(_words(settings.get("command", "")))
    if is_cut(run.path) or is_cut(Path(settings["weights"])) or short_paths(command) != command:
        said.append(
            "Commands on this page name files and folders by the last part of their paths, so that the page tells"
            " nothing of your machine. Start them where these lie, or write the paths out."
        )
    if not _concepts(run) and not _given(settings, "--prompts"):
        said.append("In prompts.txt is one of the run's prompts on each line; settings.json has them.")
    if not is_product(run) and not _given(settings, "--target", ".json"):
        said.append("In target.json is the joint target; settings.json has its table (docs/run.md says how).")
    if settings.get("prompt_template"):
        said.append(
            "The commands that begin with `fairref evaluate` ask with the method's own prompt of an occupation, not"
            " with the run's."
        )
    return said


def _words(command):
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def _given(settings, option, ending=""):
    """The last value of an option in the call that made the run; "" where it was not given."""
    words = _words(settings.get("command", ""))
    values = [value for name, value in pairwise(words) if name == option]
    return next((value for value in values[::-1] if value.endswith(ending)), "")


def _with_other_component(run):
    """The call of train.py that made the run, for another component."""
    kept = _without(_words(run.settings.get("command", "")) or ["python", "train.py"], OF_COMPONENT)
    other = "text_encoder" if run.settings["recipe"].get("component") == "unet" else "unet"
    return [*kept, "--component", other]


def _without(words, options):
    """A command without these options and their values."""
    pairs = zip(words, ["", *words], strict=False)
    return [word for word, before in pairs if word not in options and before not in options]


def place(path: Path) -> str:
    """A path as a command on the page names it: from where the report is made, or its last part alone."""
    if path.parent in HOMES:
        return f"weights/{path.name}"
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return _cut(str(path))


def is_cut(path: Path) -> bool:
    """Whether `place` leaves out folders that a command needs."""
    return path.parent not in HOMES and not path.is_relative_to(Path.cwd()) and _cut(str(path)) != str(path)


def short_paths(command: str) -> str:
    """A command without the folders of one machine."""
    return shlex.join(map(_cut, _words(command)))


def _cut(word):
    return FOLDERS.sub(r"\1", word)
