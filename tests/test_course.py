"""The course: its solutions are right, its links lead somewhere, and its notebooks run."""

import json
import re
from pathlib import Path

import pytest
from documents import headings, text_of

from fairref.verification.mine import check_answers
from fairref.verification.quantities import QUANTITIES

COURSE = Path(__file__).resolve().parents[1] / "docs" / "course"
CHAPTERS = sorted(COURSE.glob("*.ipynb"))
LARGEST = 600_000  # bytes of a notebook
DIGITS = re.compile(r"\d[\d.e+-]*")


def cells(path, kind):
    return [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind
    ]


def test_each_exercise_has_one_right_solution(tmp_path):
    text = "\n".join(map(text_of, CHAPTERS))
    solutions = re.findall(
        r"<details><summary>Solution</summary>.*?```python\n(.*?)```\s*</details>", text, re.DOTALL
    )
    assert (
        len(solutions) == len(re.findall(r"^\*\*Exercise \d+\.\*\*", text, re.MULTILINE)) == len(QUANTITIES)
    )
    file = tmp_path / "my_answers.py"
    file.write_text("import numpy as np\n\n" + "\n".join(solutions))
    verdicts = check_answers(file)
    assert [verdict.name for verdict in verdicts if verdict.is_right] == list(QUANTITIES), verdicts


def test_the_first_chapter_has_every_signature():
    rows = re.findall(r"^\| (\d) \| `(\w+)\((.*?)\)` \|", text_of(CHAPTERS[0]), re.MULTILINE)
    assert [name for _, name, _ in rows] == list(QUANTITIES)
    for chapter, name, arguments in rows:
        (stub,) = [
            source
            for cell in cells(CHAPTERS[int(chapter) - 1], "code")
            if (source := "".join(cell["source"])).startswith(f"# def {name}(")
        ]
        assert stub == f"# def {name}({arguments}): ..."


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_notebook_is_small_whole_and_tells_nothing_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < LARGEST
    assert not re.search(r"/home/|/work/|/tmp/|/root/|site-packages", text)
    for cell in cells(path, "code"):
        has_code = not "".join(cell["source"]).startswith("# def ")
        assert cell["execution_count"] if has_code else not cell["outputs"]
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    for target, heading in re.findall(r"\]\(([\w/.-]+)(#[\w-]+)?\)", text_of(path)):
        assert (COURSE / target).exists(), target
        assert not heading or heading[1:] in headings(COURSE / target)


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_says(path, monkeypatch):
    """All but its numbers, which another processor may round otherwise; where they matter a cell asserts them."""
    pytest.importorskip("nbclient", reason='the extra "course" brings it')
    nbformat = pytest.importorskip("nbformat")
    import course

    committed = nbformat.read(path, as_version=4)
    for old, new in zip(committed.cells, course.execute(committed).cells, strict=True):
        assert DIGITS.sub("#", course.printed(new)).split() == DIGITS.sub("#", course.printed(old)).split()
        images = [
            sum("image/png" in o.get("data", {}) for o in cell.get("outputs", [])) for cell in (old, new)
        ]
        assert images[0] == images[1]
