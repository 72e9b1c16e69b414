"""The page's parts: it draws what sample.py draws, a link holds a view, and the guard opens nothing else."""

import asyncio
import base64
import io
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import make_setup, moved

from fairref.bundle.loading import load_bundle
from fairref.commands import serve
from fairref.errors import UserError
from fairref.evaluation.certainty import share
from fairref.files.images import to_image
from fairref.generation.adapters import AdapterFile, load_adapter, read_adapter, save_adapter
from fairref.generation.sampling import SampleSettings, sample_tensor
from fairref.web import shown
from fairref.web.page import MAX_HISTORY, what_can_be, with_view
from fairref.web.server import Guard
from fairref.web.studio import AFTER, BEFORE, KEPT, Seen, Studio
from fairref.web.view import Limits, View, read_view

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;{{7*7}} Ünï ✓"


@pytest.fixture(scope="module")
def adapter(loaded_tiny_faces, tmp_path_factory):
    """The file of an adapter that changes pictures."""
    file = tmp_path_factory.mktemp("fair") / "gender.safetensors"
    _, state = moved(make_setup(loaded_tiny_faces))
    info = {
        "base": loaded_tiny_faces.fingerprints,
        "component": "text_encoder",
        "classes": {"gender": ["woman", "man"]},
    }
    save_adapter(file, state.parameters(), info)
    return file


@pytest.fixture(scope="module")
def studio(loaded_tiny_faces, adapter):
    return Studio(loaded_tiny_faces, {"fair": read_adapter(adapter)}, Limits(seconds=1e6))


def drawn_by(studio, view):
    """What it draws, and how often it said how far it is."""
    *told, drawn = studio.draw(view)
    return drawn, told


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_it_draws_what_sample_draws(studio, loaded_tiny_faces, adapter):
    view = replace(
        studio.default, prompt="a photo of a pilot", negative="blue", seed=3, n=3, steps=2, guidance=2.0
    )
    drawn, told = drawn_by(studio, view)
    assert told[0] == (0, 4) and told[-1] == (4, 4)
    settings = SampleSettings(view.prompt, 3, 3, 2, 2.0, "blue")
    models = {BEFORE: loaded_tiny_faces, AFTER: load_adapter(loaded_tiny_faces, adapter)}
    for label, model in models.items():
        for data, x in zip(drawn.sides[label].files, sample_tensor(model, settings), strict=True):
            np.testing.assert_array_equal(pixels(data), np.asarray(to_image(x)))
    assert pixels(drawn.sides[BEFORE].files[0]).tolist() != pixels(drawn.sides[AFTER].files[0]).tolist()
    with Image.open(io.BytesIO(drawn.sides[AFTER].files[1])) as image:
        assert image.text["prompt"] == view.prompt and image.text["image"] == "1"
        assert (
            '"negative_prompt": "blue"' in image.text["settings"]
            and "gender.safetensors" in image.text["settings"]
        )
    again, _ = drawn_by(studio, view)
    assert again == drawn


def test_counts_are_of_faces_with_wilsons_intervals(studio):
    drawn, _ = drawn_by(studio, replace(studio.default, prompt="a photo", n=8, steps=2))
    for side in drawn.sides.values():
        for name, seen in side.seen.items():
            known = [k for k in seen.classes if k >= 0]
            assert seen.counts == [known.count(k) for k in range(len(drawn.classes[name]))]
            assert [p is None for p in seen.probabilities] == [k < 0 for k in seen.classes]
            assert seen.shares == [share(count, len(known)) for count in seen.counts]
            assert [box is None for box in side.boxes] == [k < 0 for k in seen.classes]


def test_without_an_adapter_it_shows_the_original(loaded_tiny):
    studio = Studio(loaded_tiny, {}, Limits())
    drawn, _ = drawn_by(studio, replace(studio.default, prompt="a photo", n=1, steps=1))
    assert list(drawn.sides) == [BEFORE] and "fair model" not in shown.shown(drawn)


@pytest.mark.parametrize(
    "values, said",
    [
        ({}, "no prompt"),
        ({"prompt": "  "}, "no prompt"),
        ({"prompt": "x" * 1001}, "1001 letters; expected at most 1000"),
        ({"prompt": "a\x07b"}, "control characters"),
        ({"prompt": "a", "seed": "-1"}, "seed is -1; expected 0 to 4294967295"),
        ({"prompt": "a", "seed": "1.5"}, "seed is '1.5'; expected a whole number"),
        ({"prompt": "a", "seed": "nan"}, "expected a whole number"),
        ({"prompt": "a", "n": 9}, "number of images is 9; expected 1 to 8"),
        ({"prompt": "a", "n": 0}, "number of images is 0"),
        ({"prompt": "a", "steps": 1e9}, "number of steps is 1000000000; expected 1 to 100"),
        ({"prompt": "a", "guidance": "inf"}, "guidance scale is inf"),
        ({"prompt": "a", "guidance": {"a": 1}}, "guidance is .*; expected a number"),
        ({"prompt": "a", "seed": True}, "seed is 'True'; expected a whole number"),
        ({"prompt": "a", "seed": "1_0"}, "seed is '1_0'; expected a whole number"),
        ({"prompt": ["a", "b"]}, "prompt is .*; expected text"),
        ({"prompt": "a", "negative": True}, "negative is 'True'; expected text"),
        ({"prompt": "a", "adapter": {"a": 1}}, "adapter is .*; expected text"),
        ({"prompt": "a", "strength": 1.6}, "strength is 1.6"),
        ({"prompt": "a", "negative": "x" * 2000}, "negative prompt has 2000 letters"),
    ],
)
def test_what_a_request_may_ask_for(values, said):
    with pytest.raises(UserError, match=said):
        read_view(values, View(""), Limits())


def test_a_limit_of_one_is_no_range():
    with pytest.raises(UserError, match=r"number of images is 2; expected 1\.$"):
        read_view({"prompt": "a", "n": 2}, View(""), Limits(images=1))


@pytest.mark.parametrize(
    "prompt", ["a photo of a pilot", HOSTILE, "100 % = 1 + 1 & more?", "日本語", "a 👩\u200d✈️"]
)
def test_a_link_holds_a_view(prompt):
    view = View(prompt, "not blue", 2**32 - 1, 8, 1 / 3, 33, "fair & more", 0.123456789012)
    assert read_view(dict(parse_qsl(view.query())), View(""), Limits()) == view


def test_an_adapter_that_is_not_there_is_said(studio):
    for name in ("../../etc/passwd", "other"):
        with pytest.raises(UserError, match=f"no adapter '{name}' here; expected one of fair"):
            drawn_by(studio, replace(studio.default, prompt="a", adapter=name))


def test_few_adapted_models_are_kept(studio):
    for strength in torch.linspace(0, 1, KEPT + 3).tolist():
        studio.model("fair", strength)
    assert len(studio.models) == KEPT


def test_a_request_has_an_end(loaded_tiny):
    studio = Studio(loaded_tiny, {}, Limits(seconds=0))
    with pytest.raises(UserError, match="longer than 0 s and was stopped"):
        drawn_by(studio, replace(studio.default, prompt="a", n=1))


def test_what_is_cut_and_what_is_named_is_said(studio):
    notes = studio.notes(replace(studio.default, prompt="a photo of a woman " + "very " * 90 + "tall"))
    assert re.search(r"The prompt is too long for the model: its end is not used, “.*tall”", notes[0])
    assert notes[1].startswith("This prompt names gender (“woman”): that is to be kept")
    assert studio.notes(replace(studio.default, prompt="a photo of a pilot")) == []


@pytest.mark.parametrize(
    "end, is_named", [("woman far away", True), ("far away woman", False), ("womanizers", False)]
)
def test_only_what_the_encoder_reads_is_named(studio, end, is_named):
    """70 of its tokens are the first words, 5 are letters of the end: the other words, or letters, are cut."""
    first, *named = studio.notes(replace(studio.default, prompt="a " * 70 + end))
    assert "too long" in first
    assert [note.split(":")[0] for note in named] == ["This prompt names gender (“woman”)"] * is_named


def test_what_fails_while_it_draws_is_said_but_not_shown(studio, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("out of memory in some layer")

    monkeypatch.setattr(studio, "_side", broken)
    with pytest.raises(UserError) as refused:
        drawn_by(studio, replace(studio.default, prompt="a", n=1, steps=1))
    assert str(refused.value) == "The drawing failed; the server's output says why."
    assert "out of memory" in capsys.readouterr().err


def test_a_link_keeps_what_of_it_can_be(studio):
    view = what_can_be(
        studio, replace(studio.default, prompt="a"), {"n": "99", "seed": "7", "adapter": "../x", "steps": "3"}
    )
    assert view == replace(studio.default, prompt="a", seed=7, steps=3)


def test_the_history_holds_each_view_once():
    first, second = ({"query": name, "says": name.upper()} for name in "ab")
    assert with_view([first, second], "b", "B") == [second, first]
    assert with_view([first, 5, None, {"query": 1}, "b"]) == [first]
    assert with_view({"a": 1}) == with_view(None) == []
    assert len(with_view([{"query": str(i), "says": ""} for i in range(99)], "new", "")) == MAX_HISTORY


def test_it_says_how_many_have_no_face(studio):
    drawn, _ = drawn_by(studio, replace(studio.default, prompt="a", n=2, steps=1))
    nobody = {name: Seen([-1, -1], [None, None], [(None,) * 3] * 9, [0, 0]) for name in drawn.classes}
    drawn = replace(drawn, sides={**drawn.sides, AFTER: replace(drawn.sides[AFTER], seen=nobody)})
    html = shown.shown(drawn)
    assert "2 of 2 pictures of the fair model have no face and are not counted." in html
    assert '<div class="told">no face</div>' in html and "95\u00a0% intervals" in html
    assert shown.summary(drawn)["says"].endswith("→ no face")


def test_each_adapter_has_its_own_name():
    files = [f"{folder}/{name}.safetensors" for folder, name in ("ag", "bh", "cg", "dg")]
    named = serve._named([AdapterFile(Path(file), {}, "unet", None, {}, {}) for file in files])
    assert list(named) == ["g", "h", "g (2)", "g (3)"]


def test_the_page_escapes_what_it_is_told(studio):
    drawn, _ = drawn_by(studio, replace(studio.default, prompt=HOSTILE, n=1, steps=1))
    for html in (
        shown.shown(drawn),
        shown.refused(HOSTILE),
        shown.history_of([shown.summary(drawn), {"query": '"><script>', "says": HOSTILE}]),
    ):
        assert "<script" not in html and "<img src=x" not in html


def test_downloads_are_the_files(studio):
    drawn, _ = drawn_by(studio, replace(studio.default, prompt="a", seed=7, n=2, steps=1))
    html = shown.shown(drawn)
    found = [base64.b64decode(data) for data in re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)]
    files = {label: side.files for label, side in drawn.sides.items()}
    assert found == [files[label][i] for i in range(2) for label in (BEFORE, AFTER)]
    (data,) = re.findall(r'href="data:application/zip;base64,([^"]+)"', html)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(data))) as file:
        held = {name: file.read(name) for name in file.namelist()}
    assert held == {
        f"seed7-{i:03d}-{label}.png": files[label][i] for i in range(2) for label in (BEFORE, AFTER)
    }


def test_blanks_of_all_kinds_are_blanks():
    assert (
        read_view({"prompt": " a\u00a0photo\n of\ta pilot\n"}, View(""), Limits()).prompt
        == "a photo of a pilot"
    )


def test_a_prefix_is_there_or_not_and_no_path_is_told(loaded_tiny, tmp_path):
    prefix = torch.randn(3, loaded_tiny.text_encoder.text_model.embeddings.token_embedding.weight.shape[1])
    save_adapter(tmp_path / "prefix.safetensors", {"prefix": prefix}, {"base": loaded_tiny.fingerprints})
    studio = Studio(loaded_tiny, {"soft": read_adapter(tmp_path / "prefix.safetensors")}, Limits(seconds=1e6))
    with pytest.raises(UserError) as refused:
        drawn_by(studio, replace(studio.default, prompt="a", strength=0.5))
    assert "The strength of soft is 0.5; it is a prefix" in str(refused.value) and str(tmp_path) not in str(
        refused.value
    )


def test_a_bare_model_without_judges_is_drawn(tiny_folder, tmp_path):
    for name in ("model_index.json", "scheduler", "tokenizer", "text_encoder", "unet", "vae"):
        (tmp_path / name).symlink_to(tiny_folder / name)
    studio = Studio(load_bundle(tmp_path), {}, Limits(images=2, seconds=1e6))
    assert studio.default.n == 2
    drawn, _ = drawn_by(studio, replace(studio.default, prompt="a", n=1, steps=1))
    assert drawn.classes == {} and "judge" not in shown.shown(drawn)


def test_an_adapter_where_there_is_none_is_said(loaded_tiny):
    studio = Studio(loaded_tiny, {}, Limits())
    with pytest.raises(UserError, match="no adapter 'fair' here; expected one of none"):
        drawn_by(studio, replace(studio.default, prompt="a", adapter="fair"))


INPUTS = {"draw": 8, "about": 0, 3: 2}


def answers(path, chunks=(b"",), limit=100, root_path=""):
    """The guard's status for a request, and what the application behind it got; None: it got nothing."""
    got, sent = [], []
    messages = [
        {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)}
        for i, chunk in enumerate(chunks)
    ]

    async def app(scope, receive, send):
        assert not scope["path"].startswith("/fair")
        got.append((await receive())["body"])
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(app, limit, root_path, INPUTS)({"type": "http", "path": path}, receive, send))
    return sent[0]["status"], got[0] if got else None


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/",
            "/config",
            "/theme.css",
            "/gradio_api/info",
            "/gradio_api/queue/join",
            "/gradio_api/queue/data",
        ),
        *(
            "/gradio_api/call/draw",
            "/gradio_api/call/draw/0123abc",
            "/gradio_api/run/predict",
            "/login",
            "/logout",
        ),
        *(
            "/assets/index-x_1.js",
            "/static/fonts/a/b.woff2",
            "/gradio_api/heartbeat/abc",
            "/gradio_api/cancel",
        ),
    ],
)
def test_the_guard_opens_what_the_page_needs(path):
    assert answers(path, (b"ab", b"c")) == (200, b"abc")
    assert answers(f"/fair{path}", root_path="/fair") == (200, b"")


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/gradio_api/upload",
            "/gradio_api/file=/etc/passwd",
            "/file=/etc/passwd",
            "/gradio_api/file/etc/passwd",
        ),
        *("/gradio_api/proxy=http://example.org/", "/gradio_api/stream/a/b/c/playlist.m3u8", "/monitoring"),
        *("/gradio_api/process_recording", "/gradio_api/vibe-edit", "/gradio_api/upload_progress", "/docs"),
        *(
            "/assets/../../etc/passwd",
            "/static/..",
            "/gradio_api/dev/reload",
            "/gradio_api/run-history/records",
        ),
        *("/openapi.json", "/gradio_api/openapi.json"),
        *("//etc/passwd", "/\x00", "/gradio_api/call/draw/../../upload", "/custom_component/a/b/c/d.py"),
    ],
)
def test_the_guard_opens_nothing_else(path):
    assert answers(path) == (404, None)


def test_a_large_request_is_refused():
    assert answers("/config", (b"x" * 60, b"x" * 40)) == (200, b"x" * 100)
    assert answers("/config", (b"x" * 60, b"x" * 41)) == (413, None)


def test_the_name_of_a_session_is_short():
    for name, status in (("x" * 64, 200), ("x" * 65, 400)):
        body = json.dumps({"data": [1, 2], "session_hash": name, "fn_index": 3}).encode()
        assert answers("/gradio_api/queue/join", (body,), 1000)[0] == status


@pytest.mark.parametrize(
    "path, request_, status",
    [
        ("call/draw", {"data": [0] * 8}, 200),
        ("call/draw/", {"data": [0]}, 400),
        ("call/draw", {"data": [0] * 9}, 400),
        ("call/nothing", {"data": []}, 400),
        ("call/draw", {"data": [0] * 8, "fn_index": 3}, 400),
        ("run/predict", {"data": [0, 0], "fn_index": 3}, 200),
        ("run/predict", {"data": [0, 0], "fn_index": 999}, 400),
        ("api/predict/", {"data": [0], "fn_index": 3}, 400),
        ("run/predict", {"data": [0, 0]}, 400),
        ("queue/join", {"data": [0, 0], "fn_index": {}}, 400),
        ("queue/join", {"data": [0, 0], "fn_index": 3}, 200),
        ("cancel", {"fn_index": 999}, 200),
    ],
)
def test_the_guard_passes_on_calls_of_what_is_there(path, request_, status):
    assert answers(f"/gradio_api/{path}", (json.dumps(request_).encode(),))[0] == status


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--auth", "name"], "--auth is not NAME:PASSWORD"),
        (["--port", "0"], "--port"),
        (["--host", "192.0.2.1"], r"can't listen there \(Cannot assign requested address\)"),
        (["--root-path", "fair"], "expected a path as /fairref"),
        (["--adapter", "nowhere"], "nowhere: no such adapter"),
    ],
)
def test_mistakes_are_one_sentence(tiny_folder, argv, said):
    pytest.importorskip("gradio", reason='the extra "web" brings it')
    with pytest.raises(UserError, match=said):
        serve.main(["--weights", str(tiny_folder), *argv])
