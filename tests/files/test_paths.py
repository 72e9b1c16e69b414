"""Files are read and written in one way: whole or not at all, through links, into devices; refusals name the file."""

import errno
import json
import math
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from fairref.errors import UserError
from fairref.files import paths
from fairref.files.images import save_png
from fairref.files.paths import (
    check_new_folder,
    check_writable,
    only_numbers,
    read_json,
    read_text,
    write_file,
    write_json,
)
from fairref.files.weights import read, write
from fairref.reporting.figures import write_csv

WRITERS = {  # name -> how a file is written
    "json": lambda path: write_json(path, {"a": 1}),
    "weights": lambda path: write(path, {"a": torch.ones(2)}, {}),
    "image": lambda path: save_png(Image.new("RGB", (2, 2)), path, {"a": "b"}),
    "table": lambda path: write_csv(path, [{"a": 1}]),
    "bytes": lambda path: write_file(path, b"text"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_stays_and_its_file_is_written(tmp_path, name):
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "link", tmp_path / "there" / "file"
    link.symlink_to("there/file")
    for _ in range(2):  # a link to nothing yet, and to a file
        WRITERS[name](link)
        assert link.is_symlink() and file.stat().st_size > 0 and not file.is_symlink()
    WRITERS[name](tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes() == file.read_bytes()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_pipe_is_written_to_and_stays(tmp_path, name):
    pipe, taken = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: taken.append(pipe.read_bytes()))
    reader.start()
    WRITERS[name](pipe)
    reader.join(10)
    WRITERS[name](tmp_path / "plain")
    assert stat.S_ISFIFO(pipe.lstat().st_mode) and taken == [(tmp_path / "plain").read_bytes()]


def test_a_device_stays(tmp_path):
    """As root, a renamed file would take the device's place."""
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_bytes(b"")
    except OSError:
        null = Path("/dev/null")
    for writes in WRITERS.values():
        writes(null)
        check_writable(null)
    assert stat.S_ISCHR(null.stat().st_mode) and not list(tmp_path.glob("*.part"))
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_file(Path("/dev/full"), b"x")


@pytest.mark.parametrize("sink", ["pipe", "file"])
def test_what_is_written_to_stdout_stands_where_it_was_written(tmp_path, sink):
    code = """
from pathlib import Path
from fairref.files.paths import write_file
print("before")
write_file(Path("/dev/stdout"), b"between\\n")
print("after")
"""
    log = tmp_path / "log"
    with log.open("wb") if sink == "file" else open(os.devnull, "wb") as file:
        out = file if sink == "file" else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    text = log.read_bytes() if sink == "file" else done.stdout
    assert text == b"before\nbetween\nafter\n"


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=re.escape(str(path))):  # not the temporary name
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "place, words",
    [
        (".", "is a folder; give a file"),
        ("no/file", "its folder doesn't exist; make it first"),
        ("x" * 300, "can't be written (File name too long)"),
        ("loop", "can't be written (Too many levels of symbolic links)"),
        ("dangling", "its folder doesn't exist"),
        ("/proc/file", "can't be written"),
        ("file/below", "its folder doesn't exist"),
    ],
)
def test_what_can_not_be_written_is_refused_before(tmp_path, place, words):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/file")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as refused:
        check_writable(tmp_path / place)
    assert words in str(refused.value) and str(place) in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before
    check_writable(tmp_path / "new")
    check_writable(tmp_path / "file")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_can_not_be_made_is_refused_before(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    for place, why in (("file", "Not a directory"), ("file/x", "Not a directory"), ("n" * 300, "too long")):
        with pytest.raises(UserError, match=f"{place[:9]}.*: can't be made .*{why}.*give another folder"):
            check_new_folder(tmp_path / place)
    check_new_folder(tmp_path / "new" / "below")
    check_new_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == before

    def forbidden(**_):  # as the system says it, since root may write anywhere
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", forbidden)
    with pytest.raises(UserError, match=r"new/x: can't be made \(Read-only file system\)"):
        check_new_folder(tmp_path / "new" / "x")


DEEP = "[" * 200 + "]" * 200


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not JSON"),
        ('{"a": NaN}', "not JSON (NaN is no finite number)"),
        ('{"a": -Infinity}', "not JSON (-Infinity is no finite number)"),
        ('{"a": 1e999}', "not JSON (1e999 is no finite number)"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON (Exceeds the limit"),
        ("[" * 100_000, "not JSON (it is nested too deep)"),
        ('{"a":' * 100_000, "not JSON (it is nested too deep)"),
        ("null", "found a NoneType, expected a JSON object"),
        (b"\xff\xfe{}", "is no UTF-8 text"),
    ],
)
def test_json_that_is_none_is_refused(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        read_json(path)
    assert str(refused.value).startswith(f"{path}: {words}") and len(str(refused.value)) < 500
    path.write_text('\ufeff{"a": 1.5}', encoding="utf-8")
    assert read_json(path) == {"a": 1.5}


def test_why_a_file_can_not_be_read_is_said_rightly(tmp_path, monkeypatch):
    for place, words in (
        ("none", "no such file); put the file there or correct the path"),
        (".", "it is a folder); give a file"),
        ("/dev/zero", "is a device"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            read_text(tmp_path / place)
    (tmp_path / "a").touch()

    def forbidden(path, encoding):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(paths.Path, "read_text", forbidden)
    with pytest.raises(UserError, match=r"a: can't be read \(Permission denied\); change its permissions\.$"):
        read_json(tmp_path / "a")


def test_a_written_file_is_read_back(tmp_path):
    WRITERS["weights"](tmp_path / "a.safetensors")
    assert torch.equal(read(tmp_path / "a.safetensors")["a"], torch.ones(2))


def test_processes_may_write_one_file_at_once(tmp_path):
    """As two evaluations with one --cache do."""
    lines = "import sys; from fairref.files.paths import write_file; from pathlib import Path"
    lines += "; [write_file(Path(sys.argv[1]), sys.argv[2].encode() * 1000) for _ in range(300)]"
    command = [sys.executable, "-c", lines, str(tmp_path / "kept")]
    writers = [subprocess.Popen([*command, letter]) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert (tmp_path / "kept").read_bytes() in (b"a" * 1000, b"b" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_is_written_as_json_is_json(tmp_path):
    """json.dumps writes NaN, which no reader of JSON takes, its own strict one included."""
    path, content = tmp_path / "report.json", {"a": [1.0, math.nan], "b": ({"c": -math.inf},)}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, content)
    assert not path.exists()
    write_json(path, only_numbers(content))
    assert read_json(path) == {"a": [1.0, None], "b": [{"c": None}]}
