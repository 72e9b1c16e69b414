"""report.html: what runs were, what they measured, and what that does not say. It reads files and draws no picture."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from fairref import __version__
from fairref.errors import UserError
from fairref.files.paths import write_file
from fairref.reporting import (
    about,
    baselines,
    biases,
    commands,
    course,
    kept,
    pictures,
    pulled,
    shares,
    sweeps,
)
from fairref.reporting.evaluated import (
    BEFORE,
    Part,
    bias,
    floor,
    grouped,
    has_intervals,
    judges_words,
    made_alike,
    made_words,
    of_another_adapter,
    of_judge,
    parts,
    same_noise,
    size,
    view,
)
from fairref.reporting.run_files import FILES, OWN, Run, read_runs
from fairref.reporting.svg import STYLE
from fairref.reporting.tables import SLASH, Table, attribute_words, likeness, number, sentence, short, spread

LARGEST = 5_000_000  # bytes of a page
TEMPLATES = Path(__file__).with_name("templates")


def write_report(runs: Sequence[str | Path], out: Path) -> Path:
    """Writes one page on the runs' folders. Raises UserError, which names the file that is not as a run leaves it."""
    read = read_runs(runs)
    for run in read:
        _refuse_to_overwrite(run, Path(out))
    page = _page(read, pictures.BYTES)
    if len(page) > LARGEST:  # smaller pictures, for charts don't get smaller
        page = _page(read, max(pictures.BYTES - (len(page) - LARGEST), 0))
    write_file(out, page)
    return out


def _page(runs, budget):
    """The page, with so many bytes of pictures at most."""
    facts = {
        "runs": [facts_of(run, i, budget // len(runs)) for i, run in enumerate(runs, 1)],
        "together": comparisons(runs),
        "version": __version__,
        "style": STYLE,
        "files": FILES,
    }
    # half a surrogate pair is a letter in JSON, not in UTF-8
    return _template().render(facts).encode("utf-8", "replace")


def _refuse_to_overwrite(run, out):
    """A page in a run's folder takes the place of another page alone. Raises UserError."""
    place = out.resolve()
    is_inside = run.path.resolve() in (place, place.parent)
    if is_inside and place.exists() and place.suffix.lower() not in (".html", ".htm"):
        raise UserError(
            f"{out}: is a file of {run.path}, which a report would overwrite; give another name as --out."
        )


@cache
def _template():
    """The page's template, in which whatever a file says is escaped. Raises UserError."""
    try:
        import jinja2
    except ImportError:
        raise UserError(
            "A report needs jinja2, which torch brings; install it with pip install jinja2."
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def facts_of(run: Run, number_of: int, budget: int) -> dict[str, object]:
    """All that the page says of one run."""
    evaluated = parts(run)
    main = evaluated[0] if evaluated else None
    rows = pictures.prompts_of(run, budget)
    command = run.settings.get("command")
    return {
        "id": f"run{number_of}",
        "name": short(run.name),
        "is_run": run.is_run,
        "is_small_world": about.is_small_world(run),
        "made": about.made(run),
        "lead": about.lead(main) if main else "",
        "tiles": about.tiles(main) if main else [],
        "lacks": commands.lacks(run),
        "notes": commands.notes(run) if run.is_run else [],
        "settings": about.settings_tables(run),
        "command": command and commands.short_paths(command),
        "pictures": rows,
        "judged": pictures.keys_of(run),
        "sheet": "" if rows else pictures.sheet_of(run, budget),
        "parts": [part_facts(run, part) for part in evaluated],
        "intervals": any(has_intervals(part) for part in evaluated),
        "explicit": kept.explicit_table(evaluated),
        "terms": kept.terms_table(run.evaluations.get(FILES[OWN])),
        "concepts": kept.concepts_table([part for part in evaluated if not part.is_second]),
        "curves": course.curves(run),
        "pulled": pulled.pulled(run, budget // 4),
        "guidance": sweeps.guidance_charts(run) if run.guidance else [],
        "strength": sweeps.pareto_chart(run) if run.strength else None,
        "baselines": baselines.tables(run, evaluated),
        "floor": f"With {size(main.first)}, a perfectly fair model measures {spread(floor(main.first))}"
        if main
        else "",
    }


def part_facts(run: Run, part: Part) -> dict[str, object]:
    """What stands about one part of the prompts."""
    other = "Another evaluation, by fairref evaluate: " if part.is_second else ""
    how = made_words(part.reports)
    changed = of_another_adapter(run, part)
    return {
        "title": sentence(f"{other}{part.name}, {part.size}{f'; {how}' if other else ''}"),
        "how": f"From {part.file}: {how}. Judged by {judges_words(part.first)}.",
        "changed": changed and short(changed),
        "tables": biases.bias_tables(part),
        "said": biases.said(part),
        "charts": [biases.bias_chart(part, name) for name in part.views],
        "shares": shares.share_charts(run, part),
        "joint": shares.joint_tables(run, part),
        "more": biases.more_of_each_judge(part),
        "errors": [biases.errors_table(part), biases.corrections_table(part)],
        "paired": biases.paired_table(part),
        "kept": kept.kept_table(part),
    }


def comparisons(runs: Sequence[Run]) -> dict[str, Table | None]:
    """Several runs side by side; where they differ in what is trained, that is the paper's table 1."""
    rows, trained = [], {}
    firsts = {run.name: part for run in runs for part in parts(run)[:1]}
    groups = grouped(firsts.values(), _is_comparable)
    differ = len(grouped((part.first for part in firsts.values()), made_alike)) > 1
    for run in runs:
        part = firsts.get(run.name)
        if part is None:
            continue
        component = about.TRAINED.get(str(run.settings["recipe"].get("component")), "unknown")
        what = f"{attribute_words(part.views[0])}, {part.name}, {part.size}"
        what += f"; {made_words({BEFORE: part.first})}" if differ else ""
        group = next(i for i, of in enumerate(groups) if part in of)
        trained.setdefault(group, set()).add(component)
        rows.append((short(run.name), component, what, *_row(part)))
    judges = " / ".join(dict.fromkeys(judge for part in firsts.values() for judge in part.judges))
    is_table_1 = any(len(components) > 1 for components in trained.values())
    caption = "Table 1. What is trained" if is_table_1 else "The runs side by side"
    head = (
        "run",
        "trained",
        "of what",
        "bias before",
        "bias after",
        "a fair model",
        "CLIP-T",
        "CLIP-I / DINO",
    )
    table = Table(f"{caption}: bias by {judges}, mean ± standard deviation over prompts", head, rows)
    return {"table": table if len(runs) > 1 and rows else None, "is_table_1": is_table_1}


def _is_comparable(one, other):
    """Whether two runs were evaluated on the same prompts, noise and number of images."""
    return one.views[0] == other.views[0] and one.size == other.size and same_noise(one.first, other.first)


def _row(part):
    """Bias before and after, floor, and likeness after."""
    reports, name = part.pair, part.views[0]
    biases = (
        SLASH.join(spread(bias(of_judge(report, name, judge))) for judge in part.judges) for report in reports
    )
    last = reports[1] or reports[0]
    alike = SLASH.join(likeness(last.get(key)) for key in ("clip_i", "dino"))
    fit = number((last.get("clip_t") or {}).get("matched"), 3)
    return *biases, spread(floor(view(part.first, name))), fit, alike
