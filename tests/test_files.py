"""Files written whole."""

import os
import threading

import pytest

from container.files import check_new, write_atomically


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    for name in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: '.*file'"):
            patch.setattr(name, fail)
            write_atomically(path, b"new")
        assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_two_writers_of_one_file_both_succeed(tmp_path, monkeypatch):
    """Each has a temporary file of its own, whose content is whole when it takes the name."""
    both, sync = threading.Barrier(2), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (both.wait(timeout=30), sync(file)))
    contents, errors = [b"a" * 100_000, b"b" * 70_000], []

    def write(content):
        try:
            write_atomically(tmp_path / "file", content)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and (tmp_path / "file").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_link_that_leads_nowhere_exists(tmp_path):
    """Writing through it would make a file elsewhere."""
    check_new(tmp_path / "new")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="link exists: delete it, or choose another name"):
        check_new(tmp_path / "link")
