"""What a run leaves for people and programs to read."""

import csv
import json
import os
import shutil
import subprocess
import sys

import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import container
from container.training import Report, describe_environment

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
