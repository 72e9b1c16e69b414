"""The course: its solutions are right, its links lead somewhere, and its notebooks run."""

import ast
import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from documents import MACHINE_PATH, headings, text_of

from fairref.diffusion.gradient import MODES
from fairref.verification.mine import check_answers
from fairref.verification.quantities import QUANTITIES

COURSE = Path(__file__).resolve().parents[1] / "docs" / "course"
CHAPTERS = sorted(COURSE.glob("*.ipynb"))
LARGEST = 600_000  # bytes of a notebook
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
FINETUNED = {"cell-26": 12, "cell-28": 48}  # cells of chapter 5 that finetune: how many pictures they count


def cells(path, kind):
    return [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind
    ]


def differing_numbers(old, new, of_pictures=None):
    """Pairs of printed numbers that are further apart than another processor explains.

    Further than 5 units of the last digit shown, and than 5 %. After finetuning, counts of n pictures may
    differ by 4, and means by 4 / n.
    """
    pairs = []
    for pair in zip(NUMBER.findall(old), NUMBER.findall(new), strict=True):
        a, b = map(Decimal, pair)
        exponent = a.as_tuple().exponent
        if of_pictures:
            allowed = 4 if exponent == 0 else 4 / of_pictures
        else:
            allowed = max(5 * 10**exponent, 0.05 * abs(float(a)))
        if abs(float(a - b)) > allowed * (1 + 1e-9):
            pairs.append(pair)
    return pairs


@pytest.mark.parametrize(
    "old, new, of_pictures, is_close",
    [
        ("share .94, s = 7.5", "share .90, s = 7.5", None, True),
        ("0.94", "0.88", None, False),
        ("-0.03", "+0.02", None, True),
        ("about 135", "about 142", None, False),
        ("8e+05", "1.2e+06", None, True),
        ("8e+05", "2e+06", None, False),
        ("28 of 48, 0.58", "32 of 48, 0.66", 48, True),
        ("28 of 48", "33 of 48", 48, False),
        ("0.58", "0.67", 48, False),
    ],
)
def test_printed_numbers_may_differ_a_little(old, new, of_pictures, is_close):
    assert (not differing_numbers(old, new, of_pictures)) == is_close


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
        assert stub == f'# def {name}({arguments}): ...\n# check_answer("{name}", {name})'


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_an_answer_in_a_cell_can_be_checked_and_breaks_no_later_cell(path):
    """The chapter imports check_answer, and no other cell has an answer's name for a thing of its own."""
    sources = ["".join(cell["source"]) for cell in cells(path, "code")]
    answers = {name for source in sources for name in re.findall(r"^# def (\w+)", source)}
    assert answers
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    imported = {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert "check_answer" in imported
    assert not answers & (imported | {node.id for node in nodes if isinstance(node, ast.Name)})


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_notebook_is_small_whole_and_tells_nothing_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < LARGEST
    assert not MACHINE_PATH.search(text) and "site-packages" not in text
    for cell in cells(path, "code"):
        has_code = not "".join(cell["source"]).startswith("# def ")
        assert cell["execution_count"] if has_code else not cell["outputs"]
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    for target, heading in re.findall(r"\]\(([\w/.-]+)(#[\w-]+)?\)", text_of(path)):
        assert (COURSE / target).exists(), target
        assert not heading or heading[1:] in headings(COURSE / target)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_decimal_of_the_text_is_printed_by_a_cell_or_stands_in_it(path):
    shown = [text for cell in cells(path, "code") for text in cell["source"]]
    shown += [text for cell in cells(path, "code") for o in cell["outputs"] for text in o.get("text", ())]
    numbers = {abs(float(number)) for number in re.findall(r"\d*\.?\d+", "\n".join(shown))}
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", text_of(path), flags=re.DOTALL)
    said = re.findall(r"(?<![\w/.])\d*\.\d+", text)
    assert not [number for number in said if float(number) not in numbers]


def test_the_chapter_on_gradients_says_of_every_mode_what_it_keeps():
    rows = re.findall(r"^\| `([\w:]+)` \|(.+)\|(.+)\|(.+)\|.+\|$", text_of(CHAPTERS[3]), re.MULTILINE)
    assert {name for name, *kept in rows if all(map(str.strip, kept))} == set(MODES)


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_says(path, monkeypatch):
    """Its words are the committed ones, its numbers nearly so."""
    pytest.importorskip("nbclient", reason='the extra "course" brings it')
    nbformat = pytest.importorskip("nbformat")
    import course

    committed = nbformat.read(path, as_version=4)
    for old, new in zip(committed.cells, course.execute(committed).cells, strict=True):
        texts = course.printed(old), course.printed(new)
        words = [NUMBER.sub("#", text).split() for text in texts]
        assert words[0] == words[1], old.id
        of_pictures = FINETUNED.get(old.id) if path.stem.startswith("5") else None
        assert not differing_numbers(*texts, of_pictures), old.id
        images = [
            sum("image/png" in o.get("data", {}) for o in cell.get("outputs", [])) for cell in (old, new)
        ]
        assert images[0] == images[1]
