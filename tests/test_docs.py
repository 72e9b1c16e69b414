"""The documents name functions, tests and files that exist, and their figures' numbers."""

import ast
import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_is_named_exists(document):
    named = set(re.findall(r"`(test_\w+)`", document.read_text(encoding="utf-8")))
    assert named <= defined("tests")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document):
    named = re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|md|json))`", document.read_text(encoding="utf-8"))
    assert named
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "fairref" / name).exists(), name


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


def test_the_figures_numbers_in_the_readme_are_those_of_their_files():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    curves = means("fig6a")
    begun, early, late = (
        [
            f"{sum(curves[mode][i] for i in part) / len(part):.3f}"[1:]
            for mode in ("none", "solver", "paper", "exact")
        ]
        for part in ([0], range(20, 30), range(40, 50))
    )
    assert f"starts at {begun[0]}. Over" in readme and len(set(begun)) == 1
    assert (
        "its mean is {} with `none`, {} with `solver`, {} with `paper` and {} with the exact".format(*early)
        in readme
    )
    assert "over the last ten it is {}, {}, {} and {}.".format(*late) in readme
    coupled, alone = (means("fig6b")[name] for name in ("|R A_t B_t dε/dc|", "|R A_t dε/dc|"))
    first, last, other = (f"{value:.4f}"[1:] for value in (coupled[10], coupled[1000], alone[1000]))
    assert (
        f"is {first} at t = 10 and {last} at t = 1000, where |R A_t dε/dc|, without the coupling B_t, is {other}."
        in readme
    )
