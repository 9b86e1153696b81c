"""What a run leaves for people and programs to read."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import container
from container.training import Report, describe_environment
from container.training.report import StepLog

ROW = dict(epoch=0, train_loss=2.0, eval_loss=1.9, eval_top1=30.0)


def test_report_and_its_continuation(tmp_path):
    """After an interruption in epoch 2 its row is written again; TensorBoard shows the later one."""
    history = [dict(ROW, epoch=epoch, train_loss=2.0 - epoch) for epoch in range(3)]
    report = Report(tmp_path, 0)
    for epochs in (1, 2, 3):
        report.write(history[:epochs], dict(epochs=epochs))
    report.close()
    history[2] = dict(history[2], train_loss=0.5)
    report = Report(tmp_path, 2)
    report.write(history, dict(epochs=3))
    report.close()
    with (tmp_path / "summary.csv").open() as file:
        assert [float(row["train_loss"]) for row in csv.DictReader(file)] == [2.0, 1.0, 0.5]
    assert json.loads((tmp_path / "summary.json").read_text()) == dict(epochs=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 2.0), (1, 1.0), (2, 0.5)]
    assert {"eval/top1", "eval/loss"} <= set(events.Tags()["scalars"])


def test_environment(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_imagenet.py", "--epochs", "1"])
    environment = describe_environment(torch.device("cpu"))
    assert environment["command"] == "train_imagenet.py --epochs 1"
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["hardware"]["cores"] == os.cpu_count() and environment["hardware"]["cpu"]
    assert json.loads(json.dumps(environment)) == environment


def step(number, **other):
    row = dict(step=number, epoch=0, loss=2.0 * number, lr=0.1, grad_norm=1.0, loss_scale=1.0, skipped=0)
    return row | dict(seconds=0.5, wait=0.1) | other


def test_steps_are_logged_and_those_that_are_done_again_are_not_there_twice(tmp_path):
    log = StepLog(tmp_path, 0, images=8, every=2)
    for number in range(1, 8):
        log.add(**step(number, **(dict(grad_norm=float("inf"), skipped=1) if number == 4 else {})))
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("8,0,1.5")  # cut, as by SIGKILL
    log = StepLog(tmp_path, 4, images=8, every=2)  # goes on from a checkpoint of step 4
    for number in (5, 6):
        log.add(**step(number, loss=1.0))
    with (tmp_path / "steps.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [2, 4, 6] and [row["loss"] for row in rows] == [3, 7, 1]
    assert rows[1]["grad_norm"] == 1 and rows[1]["skipped"] == 1
    assert rows[0]["images_per_second"] == 16 and rows[0]["data_wait"] == pytest.approx(0.2)
    assert 0.05 < rows[0]["memory_gib"] < 100
    events = EventAccumulator(str(tmp_path / "tensorboard" / "steps")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 3), (4, 7), (6, 1)]


def test_revision_is_this_project_s_or_none(tmp_path, monkeypatch):
    """A copy of the package in somebody else's repository does not take its revision for ours."""
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*git, "-C", str(tmp_path), "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    monkeypatch.setattr(container, "__file__", str(tmp_path / "container" / "__init__.py"))

    def revision():
        return describe_environment(torch.device("cpu"))["git"]

    (tmp_path / "container").mkdir()
    shutil.copy(ROOT / "container" / "__init__.py", tmp_path / "container")
    assert revision() is None
    subprocess.run([*git, "-C", str(tmp_path), "add", "container"], check=True)
    subprocess.run([*git, "-C", str(tmp_path), "commit", "-q", "-m", "taken in"], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert revision() == head.stdout.strip()
    (tmp_path / "container" / "__init__.py").write_text(
        "# changed\n" + (ROOT / "container" / "__init__.py").read_text()
    )
    assert revision() == head.stdout.strip() + "-dirty"


def test_without_matplotlib_a_run_ends_before_its_first_step(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ImportError, match="the curves of a run need Matplotlib: pip install matplotlib"):
        Report(tmp_path, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_package_needs_no_module_of_unix_alone(tmp_path):
    """As on Windows, by an import that fails; memory is then unknown."""
    (tmp_path / "resource.py").write_text("raise ImportError('no module named resource')")
    code = "import container.__main__; from container.training import report; print(report._peak_memory())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "nan\n", done.stderr
