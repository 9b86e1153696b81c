"""Fixtures shared by the tests, and the data that some of them need and the project does not ship."""

import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from server import Server, running

import container  # registers the models
import container.files
from container.__main__ import main

ROOT = Path(__file__).parent.parent
# Data that cannot be committed for its licence or size; beside the checkout unless this variable names another place.
SHARED = Path(os.environ.get("CONTAINER_TEST_DATA", ROOT.parent / "shared"))

# Ultralytics writes settings when it is imported.
os.environ.setdefault("YOLO_CONFIG_DIR", os.path.join(tempfile.gettempdir(), "container-tests"))
os.makedirs(os.environ["YOLO_CONFIG_DIR"], exist_ok=True)

_OPEN = Image.open

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one worker per core; more threads than cores make each other wait


def pytest_addoption(parser):
    parser.addoption("--results", metavar="FILE", help="JSON of what ran and what the tests recorded, after each test")


def pytest_configure(config):
    if (file := config.getoption("--results")) and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Results(Path(file)))


class Results:
    """Keeps outcome, duration and recorded properties of every test, so that a run that is killed leaves them."""

    def __init__(self, file: Path) -> None:
        self.file, self.tests = file, {}

    def pytest_runtest_logreport(self, report) -> None:
        test = self.tests.setdefault(report.nodeid, dict(outcome="not finished", seconds=0.0))
        test["seconds"] += report.duration
        test.update(report.user_properties)
        if report.outcome != "passed":
            test.update(outcome=report.outcome, message=str(report.longrepr).splitlines()[-1])
        elif report.when == "call":
            test["outcome"] = "passed"
        container.files.write_atomically(self.file, json.dumps(self.tests, indent=1).encode())


def shared(name: str) -> Path:
    """The path of a shared file, or a skip that says what is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not in the test data folder (CONTAINER_TEST_DATA)")
    return path


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _own_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own: Ultralytics, once a test has imported it, asks for another package where a file is no picture."""
    monkeypatch.setattr(Image, "open", _OPEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ImageNet-layout folder of two classes that a network tells apart: 48 + 12 images, bright and dark."""
    for split, count in (("train", 24), ("val", 6)):
        for name, level in (("bright", 200), ("dark", 30)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.randint(level - 25, level + 25, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.jpg")
    return tmp_path / "data"


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    """A server of one file on loopback, whose certificate is trusted here and in processes that are started."""
    with running(Server(tmp_path_factory.mktemp("server"))) as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        yield server


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Moves every parameter and norm statistic away from its initial value, so that none can hide at 0 or 1."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * (0.3 / max(p[0].numel(), 1) ** 0.5))
        for name, b in module.named_buffers():
            if name.endswith("running_var"):
                b.mul_(1 + torch.rand_like(b))
            elif name.endswith("running_mean"):
                b.add_(0.3 * torch.randn_like(b))
    return module


@pytest.fixture
def answer(capsys):
    """Function that runs the `container` command on a mistake, and returns the line that it answers."""

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        output = capsys.readouterr()
        line = stop.value.code if isinstance(stop.value.code, str) else output.err.rstrip("\n")
        assert line.startswith("container") and "\n" not in line and "Errno" not in line and not output.out
        return line

    return run
