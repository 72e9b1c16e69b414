"""`fairref verify --mine` says how an answer is wrong; `--explain` names places that exist."""

import re
from pathlib import Path

import numpy as np
import pytest
from documents import headings
from mistakes import MISTAKES
from slips import SLIPS

from fairref.commands import verify as command
from fairref.diffusion.gradient import MODES
from fairref.errors import UserError
from fairref.verification import diagnosis
from fairref.verification.changes import Apart
from fairref.verification.examples import EXAMPLES
from fairref.verification.explain import PLACES, explain
from fairref.verification.mine import check_answer
from fairref.verification.quantities import QUANTITIES
from fairref.verification.verify import all_checks

ROOT = Path(__file__).resolve().parents[2]
# What is said of each of the mistakes, in their order. They were written from the exercises alone, before the check.
SAID = (
    ("alpha_bar", "a root of the result is taken too often"),
    ("sigma_t", "the result is squared \\(a root is missing\\)"),
    ("sigma_t", "it is nan at index 0; expected 0"),
    ("epsilon", r"ε_P stands for the start \(ε_∅\)"),
    ("A_t", "the result has the wrong sign"),
    ("A_t", "√α_t stands for √ᾱ_t"),
    ("A_t", "the last of the result is left out \\(0\\)"),
    ("A_t", "√ᾱ_{t-1} stands for √ᾱ_t"),
    ("z_0", r"√ᾱ_t stands for √ᾱ_{t-1} and σ_t is squared \(a root is missing\)"),
    ("z_0", "no change that was tried explains it"),  # another thought, not a slip
    ("z_0", "the last of σ_t is left out"),
    ("B_t", "it does not hold that the factor of s = 1 is leftmost"),
    ("B_t", "the time of the first factor is one too large"),
    ("B_t", "it is I less the sum of all .*, without their products"),
    ("gradient", "the result has the wrong sign"),
    ("gradient", r"the shape \(7, 3, 4\); expected \(3, 4\) \(it was not summed over the first axis\)"),
    ("gradient", "it is what comes out if the steps are taken from the other end"),
    ("gradient", r"in B_t, 1 - ᾱ_t stands for √\(1 - ᾱ_s\) and B_t is transposed"),
    ("C_i", "the mean is geometric"),
    ("C_i", "it raises IndexError: .*; it is right but for this: A_t is that of the index after"),
    ("C_i", "it does not hold that the mean is over the sampler's times"),
    ("k_i", "s_i is 0"),
    ("k_i", "r_i is that of the index before"),
    ("k_i", "no change that was tried explains it"),
    ("adjusted", "k_i is left out"),
    ("adjusted", r"it is n\^-1 times what it should be"),
    ("q", "it is the softmax of the logits"),
    ("q", "the rank from the other end stands for the rank r"),
    ("q", "it is one fixed set of N times the target, rounded"),
    ("q", "the result has its columns swapped and the rank r is one too small"),
    ("L_align", "the number of images that are sure stands for N"),
    ("L_align", "the mask c > C stands for the mask c ≥ C"),
    ("L_align", "q stands for y, the class of the largest q"),
    ("L_align", "N is left out"),
    ("L_img", "the length of x and o in CLIP is left out and the length of x and o in DINO is left out"),
    ("L_img", "it changes its argument clip_x in place"),
    ("bias", r"K²/2 \(each class with itself, too\) stands for the number of pairs"),
)


@pytest.mark.parametrize("name", QUANTITIES)
def test_a_quantity_that_is_put_together_again_is_that_of_fairref(name):
    for seed in range(20):
        arguments, expected = EXAMPLES[name](np.random.default_rng(seed))
        value = Apart(QUANTITIES[name], arguments).value()
        np.testing.assert_allclose(value, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("i", range(len(MISTAKES)))
def test_each_mistake_is_named(i):
    (quantity, what, answer), (name, said) = MISTAKES[i], SAID[i]
    verdict = check_answer(quantity, answer)
    assert quantity == name and re.search(said, verdict.how), what
    assert verdict.is_right == ("in place" in what)


def test_all_mistakes_have_a_row():
    assert len(SAID) == len(MISTAKES) >= 12


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("i", range(len(SLIPS)))
def test_a_slip_is_called_wrong_and_the_reason_does_not_mislead(i):
    name, said, answer = SLIPS[i]
    verdict = check_answer(name, answer)
    assert not verdict.is_right and re.search(said, f"{verdict.how}")


ANSWERS = """
import numpy as np

def A_t(beta, alpha_bar):
    return beta / np.sqrt(alpha_bar * (1 - alpha_bar))
"""
LEFT_OUT = """
def sigma_t(beta, alpha_bar):
    return np.sqrt(beta)
"""


def test_the_command_checks_what_a_file_defines(tmp_path, capsys):
    file = tmp_path / "my_answers.py"
    file.write_text(ANSWERS)
    assert command.main(["--mine", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("right  A_t\n1 right, 0 wrong; not defined: alpha_bar, sigma_t,")
    file.write_text(ANSWERS + LEFT_OUT)
    assert command.main(["--mine", str(file)]) == 1
    assert "WRONG  sigma_t: it is √β_t." in capsys.readouterr().out
    file.write_text("x = 1")
    assert command.main(["--mine", str(file)]) == 1
    assert capsys.readouterr().out.startswith("0 right, 0 wrong; not defined: ")
    file.write_text(ANSWERS + "\ndef sigma_t(*_):\n    exit()\n\nB_t = 3\n")
    assert command.main(["--mine", str(file)]) == 1
    assert re.search(
        r"WRONG  sigma_t: it raises SystemExit.*\nright  A_t\nWRONG  B_t: .* a func", capsys.readouterr().out
    )
    file.write_text("def alphabar(): pass\n\ndef A_T(): pass\n\nQ = 3\n")
    assert command.main(["--mine", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "WRONG  alpha_bar: the file has 'alphabar'; expected the name alpha_bar.\nWRONG  A_t: " in printed
    assert printed.endswith(" q, L_align, L_img, bias\n")
    with pytest.raises(UserError, match="'alphabar' is no quantity; expected one of alpha_bar, sigma_t"):
        check_answer("alphabar", abs)
    with pytest.raises(UserError, match=r"give one of them; see"):
        command.main(["--mine", str(file), "--explain", "eq 9"])
    with pytest.raises(UserError, match=r"expected a \.py file"):
        command.main(["--mine", "answers.ipynb"])
    file.write_text("1 / 0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        command.main(["--mine", str(file)])


def test_a_diagnosis_that_fails_costs_no_other_answer(monkeypatch):
    monkeypatch.setattr(diagnosis, "_factor", lambda _: 1 / 0)
    how = check_answer("A_t", lambda beta, alpha_bar: 3 * beta).how
    assert how == "it is wrong, and looking for the reason ended in ZeroDivisionError: division by zero."


@pytest.mark.parametrize(
    "value, said",
    [
        (None, "it gives None"),
        ("text", "it gives a str"),
        ([[1, 2], [3]], "it gives a list"),
        (1j, "it gives a complex"),
        (..., "it gives an ellipsis"),
    ],
)
def test_what_is_no_array_of_numbers_is_said(value, said):
    assert said in check_answer("bias", lambda shares: value).how


def test_every_equation_of_verify_is_explained():
    assert set(PLACES) == {check.equation for check in all_checks()}
    assert explain("9") == explain("eq 9") == explain("Eq  9") and explain("C_i") == explain("A_t, C_i")
    assert "coupling" in explain("eq 9") and "eqs 4, 5" in explain("5")
    with pytest.raises(UserError, match=r"expected one of 'eq 1', 'eq 2', .*'A_t, C_i', 'A_t = 1'"):
        explain("eq 12")
    with pytest.raises(UserError, match=r"near are .*'eq 10'.*; expected one of .*'alpha_bar'"):
        explain("eq 1O")


def test_every_name_of_the_course_and_of_a_gradient_is_explained():
    for name in [*QUANTITIES, *(mode.split(":")[0] for mode in MODES)]:
        assert explain(name)


@pytest.mark.parametrize(
    "name, equations",
    [
        ("B_t", ["eq 9"]),
        ("k_i", ["z_0"]),
        ("z_0", ["eq 10", "z_0"]),
        ("Algorithm A1", ["Algorithm A.1"]),
        ("w_i", ["A_t, C_i"]),
        ("L_align", ["eq 6"]),
        ("L_img", ["eq 7"]),
        ("bias", ["bias(P)"]),
        ("A.1", ["Algorithm A.1"]),
        ("last:5", ["last:K"]),
        ("couple:0.5", ["couple:ALPHA"]),
        ("DRTune", ["drtune:M"]),
        ("equation 9", ["eq 9"]),
        ("eq. (10)", ["eq 10"]),
        ("eqs 2, 3", ["eq 2", "eq 3"]),
        ("eqs 4 and 6", ["eqs 4, 5", "eq 6", "eq 6, C"]),
    ],
)
def test_the_names_that_a_reader_types_are_known(name, equations):
    assert re.findall(r"^\S.*$", explain(name), re.MULTILINE) == equations


@pytest.mark.parametrize(
    "equation, code",
    [
        (
            "drtune:M",
            {"adjusted_gradient", "spread_steps", "late_steps", "solver_table", 'MODES["drtune:M"]'},
        ),
        ("last:K", {"exact_gradient", 'MODES["last:K"]'}),
        ("A_t = 1", {"A_t", "C_i", "geometric_mean", 'MODES["solver"]', 'MODES["paper"]'}),
    ],
)
def test_the_lines_of_a_gradient_are_those_that_run(equation, code):
    found = re.findall(r"code +(\S+):(\d+)-(\d+) (\S+)", explain(equation))
    assert {name for *_, name in found} == code
    for file, first, last, name in found:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(first) - 1 : int(last)]
        if key := re.match(r"MODES\[(.*)\]", name):
            assert f"{key[1]}: lambda" in lines[0] and lines[-1].endswith("),")


@pytest.mark.parametrize("equation", PLACES)
def test_the_places_of_an_equation_exist(equation):
    place = PLACES[equation]
    for test in place.tests:
        file, function = test.split("::")
        assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8")
    file, heading = place.page.split("#")
    assert heading in headings(ROOT / file)
    for file, first, last, name in re.findall(r"(?:code|check) +(\S+):(\d+)-(\d+) (\S+)", explain(equation)):
        if name.startswith("MODES"):
            continue
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(first) - 1 : int(last)]
        assert any(re.search(rf"(def|class) {name.split('.')[-1]}\b", line) for line in lines)
