"""The documents name functions, tests and files that exist, and their figures' numbers; the README stays short."""

import ast
import csv
import re
from functools import cache
from pathlib import Path

import pytest
from documents import headings

from fairref.bundle import inspection

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = [ROOT / "weights" / part / "README.md" for part in ("", "emoji", "mtcnn")]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *WEIGHTS]
MOST_LINES, MOST_CHARACTERS = 130, 10_000  # of the README: what is read in three minutes


def name_of(document):
    return str(document.relative_to(ROOT))


@cache
def defined(folder):
    """Every function and class name, and every attribute that is assigned, under a folder."""
    names = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_test_that_is_named_exists(document):
    named = set(re.findall(r"`(test_\w+)`", document.read_text(encoding="utf-8")))
    assert named <= defined("tests")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_file_that_is_named_exists(document):
    for name in files_named(document.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or (ROOT / "fairref" / name).exists(), name


def files_named(text):
    return re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|md|json))`", text)


def test_which_files_a_text_names():
    assert files_named("`a/b.py`, `c.py`, `python d/e.py` and `docs/f-g.md`") == ["a/b.py", "docs/f-g.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(document):
    """To a file, and to a heading of it where one is named."""
    for target, heading in re.findall(r"\]\(([\w/.-]+)(#[\w-]+)?\)", document.read_text(encoding="utf-8")):
        file = document.parent / target
        assert file.exists(), target
        assert not heading or heading[1:] in headings(file), f"{target}{heading}"


def test_the_readme_is_read_in_three_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES and len(text) <= MOST_CHARACTERS


def test_the_readme_and_the_citation_file_name_the_same_paper():
    yaml = pytest.importorskip("yaml", reason="the extra `test` brings it with diffusers")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format requires
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    authors = ", ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    assert f"{authors}: *{paper['title']}*. ICLR {paper['year']}." in readme
    assert f"]({paper['url']})" in readme and f"[{paper['identifiers'][0]['value']}]" in readme


@pytest.mark.parametrize("document, least", [("derivation", 8), ("method", 7)])
def test_the_equations_name_functions_that_exist(document, least):
    text = (ROOT / "docs" / f"{document}.md").read_text(encoding="utf-8")
    known = defined("fairref") | defined("tests")
    code = re.findall(r"\*Code:\*(.*?)(?:\*Checked|\n\n)", text, re.DOTALL)
    assert len(code) >= least
    for name in re.findall(r"`(\w+)`", " ".join(code)):
        assert name in known, name


def test_the_sections_that_docstrings_refer_to_exist():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## (\d)\.", text, re.MULTILINE))
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "fairref").rglob("*.py"))
    named = re.findall(r"§(\d)", " ".join(re.findall(r"method\.md ([§\d, ]+)", sources)))
    assert named and set(named) <= sections


def means(figure):
    """Curve -> {iteration or time: mean} of a figure's numbers."""
    found = {}
    with (ROOT / "docs" / "figures" / f"{figure}.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["curve"], {})[int(row.get("iteration") or row["t"])] = float(row["mean"])
    return found


def test_the_figures_numbers_in_the_results_are_those_of_their_files():
    page = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    curves = means("fig6a")
    begun, early, late = (
        [
            f"{sum(curves[mode][i] for i in part) / len(part):.3f}"[1:]
            for mode in ("none", "solver", "paper", "exact")
        ]
        for part in ([0], range(20, 30), range(40, 50))
    )
    assert f"starts at {begun[0]}. Over" in page and len(set(begun)) == 1
    assert (
        "its mean is {} with `none`, {} with `solver`, {} with `paper` and {} with the exact".format(*early)
        in page
    )
    assert "over the last ten it is {}, {}, {} and {}.".format(*late) in page


def short(value, digits):
    return f"{value:.{digits}f}".removeprefix("0") if value < 1 else f"{value:.2f}"


def scale_rows():
    """The table of figure 6b: of each file in docs/figures the means with and without the coupling."""
    names = {"": "text embeddings", "-text_encoder": "LoRA of the text encoder", "-unet": "LoRA of the U-Net"}
    for place, more in (("", ""), ("finetuned/", ", finetuned")):
        for over, name in names.items():
            for guidance, end in (("3", ""), ("7.5", "-7.5")):
                if not (ROOT / "docs" / "figures" / f"{place}fig6b{over}{end}.csv").exists():
                    continue
                coupled, alone = (
                    means(f"{place}fig6b{over}{end}")[curve]
                    for curve in ("|R A_t B_t dε/dθ|", "|R A_t dε/dθ|")
                )
                values = (coupled[10], coupled[500], coupled[1000], alone[1000])
                yield f"| {name}{more} | {guidance} | {' | '.join(short(v, 4) for v in values)} |"


def jacobian_rows():
    """The table of the sizes of J_t and B_t, with 20 steps all and with 100 the gain alone; and the gains with more."""
    rows, deepest = {}, []
    with (ROOT / "docs" / "figures" / "jacobians.csv").open(newline="", encoding="utf-8") as file:
        for guidance, depth, t, *sizes, gain in list(csv.reader(file))[1:]:
            if int(depth) > 100:
                deepest.append(short(float(gain), 3))
                continue
            cells = rows.setdefault((guidance, t), [])
            cells += [*(short(float(size), 2) for size in sizes if size), short(float(gain), 3)]
    return [f"| {guidance} | {t} | {' | '.join(cells)} |" for (guidance, t), cells in rows.items()], deepest


def test_the_tables_of_the_gradients_size_are_those_of_their_files():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows, deepest = jacobian_rows()
    rows = [*scale_rows(), *rows]
    assert len(rows) > 15 and not set(rows) - set(page.splitlines())
    assert f"1,000 factors it is {', '.join(deepest[:-1])} and {deepest[-1]}" in " ".join(page.split())


def test_the_table_of_parts_is_the_registrys():
    assert inspection.table() in (ROOT / "docs" / "sd15.md").read_text(encoding="utf-8")
