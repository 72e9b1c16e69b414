"""pictures.png: tiles of the same noise before and after, and what the classifier sees, as a report reads them."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_bundle import OCCUPATIONS, RESOLUTION

from fairref.evaluation import tiles
from fairref.evaluation.judging import EvaluationSettings, draw_images, judge
from fairref.evaluation.parts import PromptPart
from fairref.evaluation.tiles import GRID, TILES, draw_tiles, save_tiles
from fairref.fairness.attributes import parse_targets
from fairref.fairness.faces import Faces
from fairref.files.images import to_image
from fairref.generation.drawing import Drawing
from fairref.prompts.sets import read_prompts


@pytest.fixture
def settings(loaded_tiny):
    return EvaluationSettings(
        loaded_tiny, parse_targets(["gender", "skin_tone"], loaded_tiny.attributes), Drawing(2, 2.0)
    )


def test_tiles_are_the_images_and_say_what_the_judge_says(settings, tmp_path):
    bundle = settings.bundle
    (concept,) = read_prompts("occupations", None, bundle.path, ["gender"])
    models, path, made = {"before": bundle, "after": bundle}, tmp_path / TILES, {"seed": 7}
    draw_tiles(settings, models, [PromptPart(concept, "test", 3)], made, path)
    prompts, n, side = concept.test, GRID[1], RESOLUTION
    with Image.open(tmp_path / TILES) as file:
        assert file.size == (n * side, 2 * len(prompts) * side)
        facts = json.loads(file.text["judged"])
        assert (facts["side"], facts["labels"]) == (side, ["before", "after"])
        assert [of["prompt"] for of in facts["prompts"]] == OCCUPATIONS["test"]
        x = draw_images(settings, bundle, prompts[1], n)
        judged = judge(settings, x)
        for i in (0, n - 1):
            tile = file.crop((i * side, 3 * side, (i + 1) * side, 4 * side))
            assert tile.tobytes() == to_image(x[i]).tobytes()
            for name, names in settings.target.classes.items():
                seen, p = facts["prompts"][1]["rows"][1][i]["classes"][name]
                k = int(judged.classes["classifier"][name][i])
                assert seen == names[k]
                assert p == pytest.approx(float(judged.probabilities["classifier"][name][i, k]), abs=1e-4)
    # what the file shows is not drawn again; anything else is
    gender = replace(settings, target=parse_targets(["gender"], bundle.attributes))
    for changed, is_drawn in (
        ((settings, "test", made), False),
        ((settings, "test", {"seed": 8}), True),
        ((gender, "test", {"seed": 8}), True),
        ((gender, "validation", {"seed": 8}), True),
    ):
        was, (how, part, made) = path.read_bytes(), changed
        draw_tiles(how, models, [PromptPart(concept, part, 3)], made, path)
        assert (path.read_bytes() != was) == is_drawn


def test_faces_are_shares_of_the_image_and_large_images_are_reduced(settings, tmp_path, monkeypatch):
    has_face = torch.tensor([False, True, False])
    faces = Faces(has_face, torch.tensor([[4.0, 8.0, 16.0, 20.0]]), torch.zeros(1, 5, 2))
    monkeypatch.setattr(tiles, "faces_of", lambda bundle, x: faces)
    monkeypatch.setattr(tiles, "SIDE", 8)
    save_tiles(settings, ("before",), {"a pilot": [torch.zeros(3, 3, 32, 32)]}, None, tmp_path / TILES)
    with Image.open(tmp_path / TILES) as file:
        assert file.size == (24, 8)
        (row,) = json.loads(file.text["judged"])["prompts"][0]["rows"]
    assert [one["box"] for one in row] == [None, [0.125, 0.25, 0.5, 0.625], None]
    assert [set(one["classes"]) for one in row] == [set(), {"gender", "skin_tone"}, set()]
