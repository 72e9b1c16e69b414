"""Whether an output can be written is known before the work, and asking changes nothing."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from fairref.errors import UserError
from fairref.files.paths import check_writable


def state(folder):
    """All that is below a folder: names, contents, times of change."""
    return {
        str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in folder.rglob("*")
    }


def test_what_can_be_written_is_left_as_it_is(tmp_path):
    (tmp_path / "there").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # to open it would be to wait for a reader
    before = state(tmp_path)
    for name in ("there", "folder", "pipe", "new", "new/and/below", "folder/new.txt"):
        check_writable(tmp_path / name)
    check_writable("/dev/null")
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "why"), [("file/x", "Not a directory"), ("file/x/y", "Not a directory"), ("n" * 300, "too long")]
)
def test_what_can_not_be_made_is_refused(tmp_path, name, why):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{name[:9]}.*: can't be written .*{why}.*choose another place"):
        check_writable(tmp_path / name)


def test_what_is_forbidden_is_refused(tmp_path, monkeypatch):
    """As the system says it, since root may write anywhere."""

    def forbidden(**_):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", forbidden)
    with pytest.raises(UserError, match=r"new/x: can't be written \(Read-only file system\)"):
        check_writable(tmp_path / "new" / "x")
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "file")
    with pytest.raises(UserError, match=r"file: can't be written \(Permission denied\)"):
        check_writable(tmp_path / "file")
