"""The nearest-template judge: its people are composed from the sheet alone, and its file is read strictly."""

import json

import pytest
import torch

from fairref.bundle.judges import load_sprites, load_templates
from fairref.errors import UserError
from fairref.judges.sprites import (
    GENDERS,
    HAIR,
    LOOKS,
    TONES,
    WHITE,
    Person,
    cut_sprites,
    draw_people,
)
from fairref.judges.templates import Templates


def people(place: float = 0.0) -> Person:
    """Every look, gender and tone once, half of them old."""
    counts = (len(LOOKS), len(GENDERS), len(TONES))
    look, gender, tone = (i.flatten() for i in torch.meshgrid(*map(torch.arange, counts), indexing="ij"))
    n = len(look)
    old = torch.arange(n) // 3 % 2
    hair = torch.tensor((HAIR[1], WHITE))[old] / 255
    places, scale = torch.full((n, 2), place), torch.full((n,), 0.93)
    return Person(look, gender, tone, old, hair, torch.zeros(n), torch.ones(n), places, scale)


def test_the_judge_knows_everybody_on_any_plain_background():
    judge = Templates(load_sprites(), 1.0)  # better than nobody
    for place, level in ((0.0, 0.5), (0.0625, 0.2)):  # a shift of one pixel of 32
        who = people(place)
        layers = draw_people(load_sprites(), who)
        image = (layers[:, :3] + (1 - layers[:, 3:]) * level) * 2 - 1
        verdict = judge(image)
        assert not verdict["none"].any() and torch.equal(verdict["age_known"], load_sprites().aged[who.look])
        if not place:
            assert verdict["error"].max() < 0.02  # what it is shown is a template of its own
        for name, truth in (("look", who.look), ("gender", who.gender), ("skin_tone", who.tone)):
            assert torch.equal(verdict[name], truth), name
        assert torch.equal(verdict["age"][verdict["age_known"]], who.old[verdict["age_known"]])
        assert (verdict["place"] - place).abs().max() < 1e-6 and (verdict["scale"] - 0.93).abs().max() < 1e-6


def test_people_are_indexed_as_one():
    who, rows = people(), torch.tensor([5, 0])
    assert len(who[rows]) == 2 and len(who) == len(LOOKS) * len(GENDERS) * len(TONES)
    torch.testing.assert_close(draw_people(load_sprites(), who[rows]), draw_people(load_sprites(), who)[rows])


def test_a_sheet_is_cut_into_people():
    """In a sheet of flat cells, what changes with the tone is skin; what does not is clothes."""
    P, rows = 80, len(LOOKS) * len(GENDERS)
    sheet = torch.ones(rows, P, len(TONES), P, 4)
    sheet[:, : P // 2, :, :, :3] = torch.tensor([0.9, 0.8, 0.7, 0.5]).view(1, 1, -1, 1, 1)  # the upper half
    sheet[:, :, :, : P // 4] = 0  # the left quarter is empty
    s = cut_sprites(sheet.view(rows * P, len(TONES) * P, 4))
    assert s.rgb.shape == (len(LOOKS), len(GENDERS), len(TONES), 3, P, P)
    inside = torch.arange(P) >= P // 4
    upper = (torch.arange(P) < P // 2)[:, None]
    assert (s.skin == (upper & inside)).all() and (s.clothes == (~upper & inside)).all()
    assert (s.alpha == inside).all() and not s.hair.any() and not s.aged.any()


def test_the_judges_file(tmp_path):
    path = tmp_path / "templates.json"
    shares = dict.fromkeys(LOOKS, 1.0) | {"pilot": 0.75}
    path.write_text(json.dumps({"threshold": 0.25, "shares": shares}))
    judge = load_templates(path)
    assert judge.threshold == 0.25 and judge.stretch.tolist() == [2.0 if k == "pilot" else 1.0 for k in LOOKS]
    bad = [{"threshold": None, "shares": shares}, {"threshold": 0.25, "shares": shares | {"pilot": 0.5}}]
    for content in ("{}", "[]", "no json", '{"threshold": 0.25}', *map(json.dumps, bad)):
        path.write_text(content)
        with pytest.raises(UserError, match=r"templates\.json"):
            load_templates(path)
    with pytest.raises(UserError, match="absent"):
        load_templates(tmp_path / "absent.json")
