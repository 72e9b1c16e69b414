"""fairref plan: what it says, and what it refuses."""

import re

import pytest

from fairref.__main__ import main
from fairref.evaluation import fair
from fairref.evaluation.certainty import share
from fairref.fairness.metrics import noise_floor


def planned(capsys, text=""):
    assert main(["plan", *text.split()]) in (0, None)
    return capsys.readouterr().out


def test_how_many_images_and_what_they_show(capsys):
    said = planned(capsys, "--classes 8 --prompts 50 --half-width .03")
    assert "of one prompt: 1,067 images a prompt, 53,350 in all" in said
    assert "over all prompts: 22 a prompt, 1,100 in all" in said
    assert "8 classes, 50 prompts x 160 images, 8,000 in all" in said
    mean, std = noise_floor(8, 160)
    assert f"a bias of {mean:.3f} ± {std:.3f} (the floor), over all {mean:.3f} ± {std / 50**0.5:.3f}" in said
    _, low, high = share(80, 160)
    assert f"a share of one prompt to ± {(high - low) / 2:.3f}" in said


@pytest.mark.parametrize(
    ("options", "seen", "by_formula"),
    [("", ".101", ".091"), ("--images 160", ".062", ".056"), ("--prompts 10", ".165", ".136")],
)
def test_the_smallest_gap(capsys, options, seen, by_formula):
    said = planned(capsys, options)
    assert f"an rms gap of 0{seen}," in said and f"says 0{by_formula}," in said
    (power,) = re.findall(r"which it rejects with (\d+)%", said)
    assert 55 < int(power) < 75


def test_images_follow_the_classes(capsys):
    for options, images in (
        ("--classes 2", 60),
        ("--classes 4", 80),
        ("--classes 5", 160),
        ("--images 7", 7),
    ):
        assert f"x {images} images" in planned(capsys, options)
    assert "these are too few images" in planned(capsys, "--classes 3 --prompts 1 --images 1")
    assert fair.images_for(0.5) == 3


@pytest.mark.parametrize(
    "options",
    ["--classes 1", "--classes 17", "--half-width 0", "--half-width .6", "--half-width 1e-9", "--images 0"],
)
def test_what_is_refused(capsys, options):
    assert main(["plan", *options.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and options.split()[0] in said and "expected" in said
