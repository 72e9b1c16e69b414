"""report.html: what runs were, what they measured, and what that does not say. It reads files and draws no picture."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from fairref import __version__
from fairref.errors import UserError
from fairref.files.paths import write_file
from fairref.reporting import about, biases, course, kept, pictures, shares
from fairref.reporting.evaluated import Part, bias, floor, of_judge, parts, view
from fairref.reporting.run_files import FILES, Run, read_run
from fairref.reporting.svg import STYLE
from fairref.reporting.tables import SLASH, Table, attribute_words, number, sentence, short, spread

TEMPLATES = Path(__file__).with_name("templates")


def write_report(runs: Sequence[str | Path], out: Path) -> Path:
    """Writes one page on the runs' folders. Raises UserError, which names the file that is not as a run leaves it."""
    read = [read_run(folder) for folder in runs]
    facts = {
        "runs": [facts_of(run, i, pictures.BYTES // len(read)) for i, run in enumerate(read, 1)],
        "together": comparisons(read),
        "version": __version__,
        "style": STYLE,
        "files": FILES,
    }
    page = _template().render(facts)
    write_file(
        out, page.encode("utf-8", "replace")
    )  # half a surrogate pair is a letter in JSON, not in UTF-8
    return out


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
    evaluated = parts(run.evaluation)
    main = evaluated[0] if evaluated else None
    rows = pictures.prompts_of(run, budget)
    return {
        "id": f"run{number_of}",
        "name": short(run.name),
        "made": about.made(run),
        "lead": about.lead(main) if main else "",
        "tiles": about.tiles(main) if main else [],
        "commands": about.commands(run),
        "settings": about.settings_tables(run),
        "command": run.settings.get("command") and about.short_paths(run.settings["command"]),
        "pictures": rows,
        "judged": pictures.keys_of(run),
        "sheet": "" if rows else pictures.sheet_of(run, budget),
        "parts": [part_facts(run, part) for part in evaluated],
        "intervals": any(
            "sure" in j for part in evaluated for r in part.reports.values() for j in r["judges"].values()
        ),
        "evaluated_in": run.evaluated_in,
        "explicit": kept.explicit_table(evaluated),
        "terms": kept.terms_table(run.evaluation),
        "concepts": kept.concepts_table(evaluated),
        "curves": course.curves(run),
        "guidance": course.guidance_charts(run) if run.guidance else [],
        "pareto": course.pareto_chart(run) if run.strength else None,
        "baselines": course.baselines_table(run, main),
        "is_small_world": about.is_small_world(run),
        "floor": spread(floor(main.first)) if main else None,
        "n": main.first["images"] if main else None,
    }


def part_facts(run: Run, part: Part) -> dict[str, object]:
    """What stands about one part of the prompts."""
    return {
        "title": sentence(f"{part.name}, {part.size}"),
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
    for run in runs:
        for part in parts(run.evaluation)[:1]:
            component = about.TRAINED.get(str(run.settings["recipe"].get("component")), "unknown")
            trained.setdefault((part.views[0], part.key), set()).add(component)
            what = f"{attribute_words(part.views[0])}, {part.name}, {part.size}"
            rows.append((short(run.name), component, what, *_row(part)))
    judges = " / ".join(
        dict.fromkeys(j for run in runs for part in parts(run.evaluation)[:1] for j in part.judges)
    )
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


def _row(part):
    """Bias before and after, floor, and likeness after."""
    reports, name = part.pair, part.views[0]
    biases = (
        SLASH.join(spread(bias(of_judge(report, name, judge))) for judge in part.judges) for report in reports
    )
    last = reports[1] or reports[0]
    likeness = SLASH.join(number(last.get(key), 3) for key in ("clip_i", "dino"))
    fit = number((last.get("clip_t") or {}).get("matched"), 3)
    return *biases, spread(floor(view(part.first, name))), fit, likeness
