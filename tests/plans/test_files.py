"""Writing a file: whole or not at all, and nothing else is touched."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from plans.files import OutputError, check_target, free_name, write_atomically


def test_a_new_file_has_the_usual_mode_and_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "plan.json"
    check_target(path)
    assert not (tmp_path / "a").exists(), "a test leaves no trace"
    old = os.umask(0o027)
    try:
        write_atomically(path, "é\n")
    finally:
        os.umask(old)
    assert path.read_bytes() == "é\n".encode() and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(path.parent) == ["plan.json"]


def test_a_link_is_written_through_and_the_mode_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "folder" / "link"
    real.write_text("old")
    real.chmod(0o604)
    link.parent.mkdir()
    link.symlink_to("../real")
    write_atomically(link, "new")
    assert link.is_symlink() and real.read_text() == "new" and stat.S_IMODE(real.stat().st_mode) == 0o604
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "later")
    write_atomically(dangling, "x")
    assert dangling.is_symlink() and (tmp_path / "later").read_text() == "x"


def test_a_pipe_and_a_device_are_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_target(pipe)
    write_atomically(pipe, "words")
    assert os.read(reader, 99) == b"words" and stat.S_ISFIFO(pipe.stat().st_mode)
    write_atomically(Path(os.devnull), "words")
    with pytest.raises(OutputError, match=r"`/dev/full`: No space left on device\nhint: free some space"):
        write_atomically(Path("/dev/full"), "words")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode) and stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder", "it is a folder\nhint: a file in it"),
        ("file/x", "Not a directory\nhint: a file stands"),
        ("file/x/y/z", "Not a directory\nhint: a file stands"),
        ("n" * 300, "File name too long\nhint: a shorter name"),
        (f"new/{'n' * 300}/x", "File name too long\nhint: a shorter name"),
        ("loop", "Too many levels of symbolic links\nhint: links"),
    ],
)
def test_what_cannot_be_written_is_said_before_and_after(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    for write in (check_target, lambda path: write_atomically(path, "text")):
        with pytest.raises(OutputError, match=words):
            write(tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "loop"]


def test_the_longest_legal_name(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    check_target(path)
    write_atomically(path, "text")
    assert path.read_text() == "text"


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["plan.json"]


def test_the_next_free_name(tmp_path: Path) -> None:
    (tmp_path / "out.1").mkdir()
    (tmp_path / "out.2").symlink_to("nowhere")
    assert free_name(tmp_path / "out") == tmp_path / "out.3"
