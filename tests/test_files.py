"""Files written whole, and files fetched from servers that do everything wrong."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from server import CONTENT, PAGE

from container.files import download, sha256_of, web_page, write_atomically


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


def test_what_is_a_web_page(tmp_path):
    path = tmp_path / "file"
    for content, expected in (
        (PAGE, 'a web page, "Google Drive - Virus scan warning"'),
        (b"\n <html lang=de>", "a web page"),
        (b"<\x00\x00\x00\x00\x00\x00\x00{}", None),  # safetensors whose header has 60 bytes
        (CONTENT, None),
        (b"", None),
    ):
        path.write_bytes(content)
        assert web_page(path) == expected
        assert sha256_of(path) == hashlib.sha256(content).hexdigest()


@pytest.fixture
def fetch(server, tmp_path):
    """Downloads CONTENT."""

    def fetch(url=server.url):
        download(url, tmp_path / "folder" / "file", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
        assert (tmp_path / "folder" / "file").read_bytes() == CONTENT

    return fetch


def left(tmp_path):
    return sorted(path.name.split(".")[-1] for path in (tmp_path / "folder").iterdir())


def test_a_download(server, fetch, tmp_path):
    fetch()
    fetch()
    assert left(tmp_path) == ["file"] and len(server.asked) == 1


def test_redirected(server, fetch, tmp_path):
    fetch(server.url.replace("weights", "moved"))
    assert left(tmp_path) == ["file"]


def test_dropped_connections_are_taken_up_where_they_ended(server, fetch, tmp_path):
    server.limits = [100_000] * 9
    fetch()
    assert server.asked == [None] + [f"bytes={i}00000-" for i in range(1, 10)] and left(tmp_path) == ["file"]


def test_a_server_without_ranges_begins_anew(server, fetch, tmp_path):
    server.ranges, server.limits = False, [900_000, 1000]
    fetch()
    assert len(server.asked) == 3 and left(tmp_path) == ["file"]


def test_a_busy_server_is_asked_again(server, fetch, tmp_path):
    server.codes = [503, 429, 500]
    fetch()
    assert len(server.asked) == 4 and left(tmp_path) == ["file"]


def test_what_was_kept_of_another_file_is_thrown_away(server, fetch, tmp_path):
    for stale in (b"x" * 1000, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 1)):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / "file").unlink(missing_ok=True)
        part = tmp_path / "folder" / f"file.{hashlib.sha256(CONTENT).hexdigest()[:16]}.part"
        part.write_bytes(stale)
        fetch()
        assert left(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(content=PAGE), r'this is a web page, "Google Drive - Virus scan warning"$'),
        (dict(content=PAGE + bytes(len(CONTENT) - len(PAGE))), r'is a web page, "Google Drive - Virus scan warning"'),
        (dict(content=CONTENT[:-1] + b"x"), r"has sha256 [0-9a-f]{64}, not [0-9a-f]{64}$"),
        (dict(content=CONTENT[:-1]), r"another file, of 1048575, not 1048576 bytes"),
        (dict(content=CONTENT + b"x"), r"another file, of more than 1048576 bytes"),
        (dict(content=b""), r"another file, of 0, not 1048576 bytes"),
        (dict(codes=[404]), r"the server answers 404 Not Found"),
        (dict(codes=[503] * 99), r"the server answers 503"),
        (dict(limits=[1000] * 99, ranges=False), r"connection lost after 1000 bytes"),
        (dict(limits=[0] * 99), r"connection lost after 0 bytes"),
    ],
)
def test_what_cannot_be_had_leaves_nothing(server, fetch, tmp_path, wrong, message):
    vars(server).update(wrong)
    with pytest.raises(OSError, match=message) as error:
        fetch()
    assert left(tmp_path) == [] and "\n" not in str(error.value) and server.url in str(error.value)


def test_no_server(server, fetch, tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.invalid/x: no connection"):
        fetch("http://nowhere.invalid/x")
    assert left(tmp_path) == []


def test_a_network_that_fails_for_long_costs_nothing_that_came_before(server, fetch, tmp_path):
    server.limits = [300_000] + [0] * 5
    with pytest.raises(OSError, match=r"; 300000 of 1048576 bytes are kept in .*\.part to go on from"):
        fetch()
    assert left(tmp_path) == ["part"]
    server.asked.clear()
    fetch()
    assert server.asked == ["bytes=300000-"] and left(tmp_path) == ["file"]


SCRIPT = """
import hashlib, resource, sys
from container.files import download
url, path, size, digest, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    download(url, path, int(size), digest)
except OSError as error:
    sys.exit(str(error))
"""


def start(server, tmp_path, limit=0):
    arguments = (server.url, tmp_path / "folder" / "file", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), limit)
    # By its file: the package would import torch.
    script = SCRIPT.replace("from container.files", "sys.path.insert(0, 'container')\nfrom files")
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def test_eight_processes_make_one_download(server, tmp_path):
    server.pause = 0.05
    processes = [start(server, tmp_path) for _ in range(8)]
    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 8
    assert len(server.asked) == 1 and left(tmp_path) == ["file"]
    assert (tmp_path / "folder" / "file").read_bytes() == CONTENT


def test_killed_in_the_middle(server, fetch, tmp_path):
    server.pause = 0.05
    process = start(server, tmp_path)
    while not any(path.stat().st_size > 300_000 for path in tmp_path.glob("folder/*.part")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "file" not in left(tmp_path)
    server.pause = 0
    server.asked.clear()
    fetch()
    assert server.asked[0].startswith("bytes=") and left(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of file size are POSIX")
def test_a_full_disk(server, tmp_path):
    _, error = start(server, tmp_path, limit=500_000).communicate(timeout=60)
    assert "File too large" in error and "Traceback" not in error and left(tmp_path) == []
