"""A bundle's prompts.json: what is wrong in it is one sentence that names the file."""

import json
import time

import pytest
from tiny_bundle import OCCUPATIONS

from fairref.errors import UserError
from fairref.prompts import read_occupations

WHOLE = {
    "occupations": OCCUPATIONS,
    "explicit": {"gender": {"woman": "a woman {occupation}", "man": "a {name} {occupation}, {{so}}"}},
    "concepts": {"moods": {"train": ["a brave person"]}},
    "hiding": {"gender": ["pilot"]},
}


def write(folder, content):
    (folder / "prompts.json").write_text(json.dumps(content))
    return folder


def test_templates_are_filled_in(tmp_path):
    own = read_occupations(write(tmp_path, WHOLE))
    assert own.explicit_prompt("gender", "man", "pilot") == "a man pilot, {so}"
    assert own.explicit_prompt("gender", "woman", "pilot") == "a woman pilot"


@pytest.mark.parametrize(
    "template",
    [
        "{occupation:>200000000}",
        "{occupation!r}",
        "{occupation.__class__}",
        "{occupation[0]}",
        "{occupation:{name}}",
        "{occupation} {name:>9}",
        "{occupation} {0}",
        "{occupation} {}",
        "{occupation} {place}",
        "{occupation} {",
        "a woman",
        "",
        None,
        3,
        ["{occupation}"],
    ],
)
def test_templates_that_do_more_are_refused(tmp_path, template):
    write(tmp_path, {**WHOLE, "explicit": {"gender": {"woman": template}}})
    with pytest.raises(UserError, match=r'prompts.json: "explicit" is not names, each with a template'):
        read_occupations(tmp_path)


DEEP = eval("[" * 90 + "]" * 90)
WRONG = [None, 3, 1.5, True, "", "abc", [], {}, [None], [[]], DEEP, {"train": None}, 10**30, {"": ""}]


def places(content, before=()):
    """Each key of nested objects."""
    for key, value in content.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from places(value, (*before, key))


@pytest.mark.parametrize("place", list(places(WHOLE)), ids=".".join)
def test_whatever_stands_in_it_is_read_or_refused(tmp_path, place):
    for wrong in WRONG:
        content = json.loads(json.dumps(WHOLE))
        inside = content
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = wrong
        write(tmp_path, content)
        try:
            own = read_occupations(tmp_path)
            own.explicit_prompt("gender", "woman", "pilot")
        except UserError as error:
            assert "prompts.json: " in str(error) and "\n" not in str(error)


def test_a_hundred_thousand_occupations_are_read_at_once(tmp_path):
    names = [f"job {i}" for i in range(100_000)]
    write(tmp_path, {"occupations": {**OCCUPATIONS, "train": names}})
    began = time.monotonic()
    assert read_occupations(tmp_path).train == tuple(names)
    write(tmp_path, {"occupations": {**OCCUPATIONS, "train": [*names, "job 7"]}})
    with pytest.raises(UserError, match="'job 7' is in it twice"):
        read_occupations(tmp_path)
    assert time.monotonic() - began < 20
