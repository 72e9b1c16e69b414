"""What a report reads of a run's folder. Each file is checked once, so what follows may trust its shape."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fairref.errors import UserError
from fairref.files.paths import expanded, once, read_json, read_text

LARGEST_FILE = 64 * 2**20  # bytes
LARGEST_NUMBER = 1e12  # beyond which a number of a run is a slip, and charts lose their digits
FILES = {  # what a Run holds -> its file
    "settings": "settings.json",
    "evaluation": "evaluation.json",  # of the run's end
    "judged": "judged.json",  # of fairref evaluate
    "guidance": "sweep-guidance.json",
    "strength": "sweep-strength.json",
    "baselines": "baselines.json",
    "metrics": "metrics.jsonl",
    "pictures": "pictures.png",
    "sheet": "before_after.png",
    "adapter": "adapter.safetensors",  # of a run that has ended
}

# Shapes of JSON: a type; a tuple of alternatives, None being null; [kind]: a list; [a, b]: a list of that length;
# {str: kind}: an object with any keys; {"key": kind, "key?": kind}: one that has at least these, "?" if it may lack it.
Kind = object
N = (float, None)
SPREAD = {"mean": N, "std": N}
INTERVAL = {"value": N, "low": N, "high": N, "method?": str}
SHARES = {str: [N, N, N]}
SURE = {  # null: there is no image to say it of
    **dict.fromkeys(("rms_gap?", "mean_gap?"), (INTERVAL, None)),
    "fair?": ({"p": N, "upper": N, "said": str}, None),
    "prompts?": {str: {"share": SHARES, "p?": N, "unfair?": bool}},
    "unfair_prompts?": int,
    "smallest_gap_seen?": N,
    "bounds?": ({"low": N, "high": N}, None),
    "worst_prompt?": ({"prompt": str, "bias": N, "fair?": N}, None),
    "worst_group?": ({"class": str, "share": N, "low": N, "high": N}, None),
}
CORRECTED = {
    **dict.fromkeys(("rms_gap?", "mean_gap?"), (INTERVAL, None)),
    **dict.fromkeys(("source?", "method?"), str),
    "labelled?": [N],
    "upper?": N,
    "share?": SHARES,
}
JUDGE = {
    **SPREAD,
    "from_target?": SPREAD,
    "share": {str: N},
    "counts": {str: [int]},
    "sure?": (SURE, None),
    "corrected?": (CORRECTED, None),
}
VIEW = {  # of classes by each judge
    "noise_floor": SPREAD,
    "target_floor?": SPREAD,
    "judges": {str: JUDGE},
    "paired?": {str: ({"p": N, "difference": N, "low": N, "high": N, "method?": str}, None)},
    "leans?": {str: {"slope": [N], "intercept": [N]}},
    "flips?": {str: ({"changed": N, "least": N, "needless": N}, None)},
}
ABOUT = {
    "concept": str,
    "part": str,
    "prompts": int,
    "images": (int, {str: int}),
}  # images of each prompt, or of all
MADE = {  # how images were made; null: not known
    **dict.fromkeys(("seed?", "steps?", "guidance?"), N),
    **dict.fromkeys(("end?", "padding?", "weights?", "prompts?"), (str, None)),
    "strength?": (float, [float], None),
}
REPORT = {
    **ABOUT,
    **VIEW,
    "attribute": str,
    "attributes?": {str: VIEW},
    **{key: MADE[key] for key in ("seed?", "steps?", "guidance?", "padding?")},
    "made?": (MADE, None),
    "adapters?": [{"file": str, "strength": float}],
    "fingerprint?": str,
    "judged_by?": {str: {str: str}},
    **dict.fromkeys(("faceless?", "blended?", "none?"), N),
    "clip_t?": ({"matched": N, "shuffled": N}, None),
    "explicit?": {str: N},
    **dict.fromkeys(("clip_i?", "dino?", "background?", "clothes?"), N),
    "diversity?": {str: N},
    "confusion?": {str: {str: [{"counts": [[int]], "untold": [int], "source": str, "p_as_before?": N}]}},
}
TERMS = {**ABOUT, "terms": {str: N}}  # of a run without a target
SHAPES = {
    "settings": {
        "weights": str,
        "target": ({"classes": {str: [str]}, "table": list}, None),
        "recipe": dict,
        "prompts": (str, [str]),
        "command?": str,
        "dtype?": str,
        "device?": str,
        "processes?": int,
        "versions?": {str: str},
        "fingerprints?": {str: str},
        "loss?": [dict],
        "judge?": [dict],
    },
    "evaluation": {str: {str: (REPORT, TERMS)}},
    "judged": {str: {str: REPORT}},
    "guidance": {"values": [float], "reports": {str: [REPORT]}},
    "strength": {"values": [float], "reports": {str: [REPORT]}},
    "baselines": {str: {str: REPORT}},
}
LINE = {"iteration": int, "loss?": N, "cost?": N, "validation?": (dict, None)}  # of metrics.jsonl


NO_RUN = {"weights": "", "target": None, "recipe": {}, "prompts": ""}  # settings of what no run made
OWN, ASKED = "evaluation", "judged"  # evaluations: of the run's end, and the last one of `fairref evaluate`
Evaluation = Mapping[str, Mapping[str, Mapping[str, object]]]  # label of a model -> part -> report


@dataclass(frozen=True)
class Run:
    """A run's folder as far as it is there: what is missing is None. Or evaluations that no run made."""

    path: Path
    settings: Mapping[str, object]
    evaluations: Mapping[str, Evaluation] = field(
        default_factory=dict
    )  # file -> evaluation; the run's own first
    guidance: Mapping[str, object] | None = None
    strength: Mapping[str, object] | None = None
    baselines: Evaluation | None = None
    metrics: Sequence[Mapping[str, object]] = ()
    name: str = ""  # the folder's own, or more of its path where others have the same
    is_run: bool = True  # train.py made it

    def file(self, what: str) -> Path:
        """The path of one of FILES."""
        return self.path / FILES[what]

    @property
    def is_finished(self) -> bool:
        """Whether there is an adapter, as at a run's end."""
        return self.file("adapter").is_file()


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Each as `read_run`, under names that tell them apart. Raises UserError, also for one that is named twice."""
    runs = [read_run(folder) for folder in folders]
    places = [run.path.resolve() for run in runs]
    for path in places:
        if places.count(path) > 1:
            raise UserError(f"{path}: is named twice; leave one out.")
    lasts = [path.name for path in places]
    names = [path.name if lasts.count(path.name) == 1 else "/".join(path.parts[-2:]) for path in places]
    return [
        replace(run, name=name if names.count(name) == 1 else f"{name} ({i})")
        for i, (run, name) in enumerate(zip(runs, names, strict=True), 1)
    ]


def read_run(folder: str | Path) -> Run:
    """The files of a run that a report reads, or what `fairref evaluate` wrote. Raises UserError: which file it is."""
    path = expanded(folder)
    if path.is_file():
        return Run(path, NO_RUN, {path.name: _read_report(path)}, name=path.name, is_run=False)
    if not path.is_dir():
        raise UserError(
            f"{path}: is no folder; give a run's, --cache's, or a file of `fairref evaluate --out`."
        )
    held = {
        what: _read(path / FILES[what], kind)
        for what, kind in SHAPES.items()
        if (path / FILES[what]).exists()
    }
    if not held:
        raise UserError(
            f"{path}: has no {FILES['settings']}, so it is no run's folder, and no {FILES[ASKED]} of"
            " `fairref evaluate`; give a folder with one of them."
        )
    for what in ("guidance", "strength"):
        for label, reports in held[what]["reports"].items() if what in held else ():
            if len(reports) != len(held[what]["values"]):
                raise UserError(
                    f"{path / FILES[what]}: {label!r} has {len(reports)} reports of {len(held[what]['values'])} values;"
                    " make the sweep again."
                )
    is_run, settings = "settings" in held, held.pop("settings", NO_RUN)
    evaluations = {FILES[what]: held.pop(what) for what in (OWN, ASKED) if what in held}
    metrics, name = _read_metrics(path / FILES["metrics"]), path.resolve().name
    return Run(path, settings, evaluations, **held, metrics=metrics, name=name, is_run=is_run)


def _read_report(path):
    """What `fairref evaluate --out` wrote, a report or one of each concept, as an evaluation."""
    _check_size(path)
    content = read_json(path)
    reports = {name: of for name, of in content.items() if isinstance(of, dict)}
    reports = {str(content.get("part")): content} if "judges" in content else reports
    if not reports:
        raise UserError(f"{path}: has no report; give a file that `fairref evaluate --out` wrote.")
    for name, report in reports.items():
        check(report, REPORT, path, "" if report is content else name)
        _check_views(report, path)
    return {"the images": reports}


def _read(path: Path, kind: Kind) -> dict[str, object]:
    _check_size(path)
    content = read_json(path)
    check(content, kind, path)
    _check_views(content, path)
    return content


def _check_size(path):
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        megabytes = [size / 2**20 for size in (path.stat().st_size, LARGEST_FILE)]
        raise UserError(
            "{}: has {:.0f} MB, expected at most {:.0f}; make it again or move it.".format(path, *megabytes)
        )


def check(value: object, kind: Kind, path: Path, place: str = "") -> None:
    """Whether a JSON value has a shape. Raises UserError, which names the file, the place and what was expected."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fitting = [one for one in kinds if _fits(value, one)]
    if not fitting:
        expected = " or ".join(_name(one) for one in kinds)
        at = place or "all of it"
        raise UserError(
            f"{path}: {at} is {_shown(value)}, expected {expected}; make the file again or move it."
        )
    kind = fitting[-1] if len(fitting) > 1 and "terms" in value else fitting[0]
    if isinstance(kind, list):
        for i, item in enumerate(value):
            check(item, kind[i] if len(kind) > 1 else kind[0], path, f"{place}[{i}]")
    elif isinstance(kind, dict) and str in kind:
        for key, item in value.items():
            check(item, kind[str], path, f"{place}.{key}"[:200].lstrip("."))
    elif isinstance(kind, dict):
        for key, of_key in kind.items():
            name = key.rstrip("?")
            if name in value or not key.endswith("?"):
                if name not in value:
                    raise UserError(
                        f"{path}: {place or 'all of it'} has no {name!r}; make the file again or move it."
                    )
                check(value[name], of_key, path, f"{place}.{name}".lstrip("."))


def _fits(value, kind):
    """Whether a value is of a kind, its content aside."""
    if kind is None:
        return value is None
    if isinstance(kind, list):
        return isinstance(value, list) and len(kind) in (1, len(value))
    if kind in (int, float):
        is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= LARGEST_NUMBER
    return isinstance(value, dict if isinstance(kind, dict) else kind)


def _name(kind):
    if isinstance(kind, list):
        return f"a list of {len(kind)}" if len(kind) > 1 else "a list"
    names = {
        None: "null",
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        list: "a list",
    }
    return "an object" if isinstance(kind, dict) or kind is dict else names[kind]


def _shown(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _check_views(content: object, path: Path) -> None:
    """In every view of classes, each row of counts has a count of each class, none below 0."""
    if not isinstance(content, Mapping):
        for item in content if isinstance(content, list) else ():
            _check_views(item, path)
        return
    for judge in content["judges"].values() if "noise_floor" in content else ():
        for prompt, row in judge["counts"].items():
            if len(row) != len(judge["share"]) or min(row, default=0) < 0:
                raise UserError(
                    f"{path}: the counts of {prompt[:80]!r} are {row[:20]}, expected {len(judge['share'])} from 0 up;"
                    " make the file again or move it."
                )
    for item in content.values():
        _check_views(item, path)


def _read_metrics(path: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl, by rising iteration. Half a line at its end is of a run that goes on or ended."""
    if not path.exists():
        return []
    _check_size(path)
    rows = {}
    *lines, _ = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError):
            raise UserError(
                f"{path}: line {number} is no JSON; `python train.py --resume` mends it."
            ) from None
        check(row, LINE, path, f"line {number}")
        rows[row["iteration"]] = row
    return [rows[i] for i in sorted(rows)]
