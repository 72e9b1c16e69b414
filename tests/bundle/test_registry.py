"""PARTS is the one list of a bundle's parts: what bundle.json may name, what is loaded, what a check tells."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from fairref.bundle import inspection, loading, manifest, own_judges
from fairref.bundle.inspection import inspect_bundle, lines, table
from fairref.bundle.loading import load_bundle
from fairref.bundle.manifest import read_manifest
from fairref.bundle.registry import OPTIONAL, PARTS, USES, Part
from fairref.commands.bundle import main
from fairref.errors import UserError


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "bundle")


def write_manifest(folder, **changes):
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def with_parts(monkeypatch, *parts):
    for module in (inspection, loading, manifest, own_judges):
        monkeypatch.setattr(module, "PARTS", (*PARTS, *parts))


def named(part, place):
    return {part.group: {part.role: place}} if part.group else {part.key: place}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.key)
def test_each_row_is_a_key_of_bundle_json(folder, part):
    path = write_manifest(folder, **named(part, "there"))
    assert manifest.places_of(read_manifest(path), part.key) == ["there"]
    write_manifest(folder, **named(part, ["here", "there"]))
    if part.several:
        assert manifest.places_of(read_manifest(path), part.key) == ["here", "there"]
    else:
        with pytest.raises(UserError, match=rf"{part.key.partition('.')[0]} (is|has) "):
            read_manifest(path)
    for wrong in (3, [], [3], None, {"a": "b"}):
        write_manifest(folder, **named(part, wrong))
        with pytest.raises(UserError, match=r"bundle\.json: .*; expected"):
            read_manifest(path)


def test_each_row_is_told_by_the_check_and_stands_in_the_table(tmp_path):
    told = [status.part for status in inspect_bundle(tmp_path)]
    assert told == [part for part in PARTS if part.needed != OPTIONAL]
    rows = table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [part.key for part in told]
    kinds = set().union(*USES.values()) | {OPTIONAL}
    assert {part.needed for part in PARTS} <= kinds


@pytest.mark.parametrize("key", ["captioner", "ears.left"])
def test_a_row_more_is_a_part_more(folder, monkeypatch, capsys, key):
    """Named, loaded, told and documented, with no other line of code."""
    loaded = []

    def load(place, device="cpu", dtype=torch.float32):
        if not place.is_dir():
            raise UserError(f"{place}: no such folder.")
        loaded.append((place, device, dtype))

    facts = {"place": "new_part", "megabytes": 7, "source": "somewhere on a shelf", "licence": "a licence"}
    part = Part(key, load, "to evaluate", **facts, several="." in key)
    write_manifest(folder, **named(part, "shelf"))
    with pytest.raises(UserError, match=f"found key '{key.partition('.')[0]}'; expected some of"):
        load_bundle(folder)
    with_parts(monkeypatch, part)
    with pytest.raises(UserError, match="shelf: no such folder"):
        load_bundle(folder)
    (status,) = [status for status in inspect_bundle(folder) if status.part is part]
    text = "\n".join(lines(folder, [status]))
    assert status.state == "missing" and "about 7 MB; somewhere on a shelf" in text and "a licence" in text
    (folder / "shelf").mkdir()
    load_bundle(folder, "cpu", torch.bfloat16)
    assert loaded == [(folder / "shelf", "cpu", torch.bfloat16)]
    assert [status.state for status in inspect_bundle(folder) if status.part is part] == ["ok"]
    assert main(["check", str(folder)]) == 0
    assert f"ok        {key}" in capsys.readouterr().out
    assert f"| `{key}` | `new_part` | to evaluate | 7 | somewhere on a shelf | a licence |" in table()
    if not part.several:
        return
    # of several places each is loaded, and told
    (folder / "second").mkdir()
    write_manifest(folder, **named(part, ["shelf", "second"]))
    loaded.clear()
    load_bundle(folder)
    assert [place.name for place, *_ in loaded] == ["shelf", "second"]
    assert [s.path.name for s in inspect_bundle(folder) if s.part is part] == ["shelf", "second"]


def test_a_row_that_ones_own_code_may_take_is_a_role(folder, monkeypatch):
    part = Part("captioner", lambda *_: None, OPTIONAL, "captioner", 1, "a shelf", "a licence")
    for own in (False, True):
        with_parts(monkeypatch, replace(part, own=own))
        if own:
            assert own_judges.parse_judges(["captioner=a.py:f"]) == {"captioner": ["a.py:f"]}
        else:
            with pytest.raises(UserError, match="ROLE one of"):
                own_judges.parse_judges(["captioner=a.py:f"])
