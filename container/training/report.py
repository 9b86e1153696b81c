"""What a run leaves for people and programs to read."""

import csv
import io
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
import torchvision

import container
from container.files import write_atomically

from .curves import plot_curves

__all__ = ["Report", "describe_environment"]


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Command, code, versions and hardware of this process.

    Args:
        device: What it computes on.

    Returns:
        Plain values: `command`, `git` (revision, with `-dirty` behind it if files were changed; None outside a
        checkout), `versions`, `hardware`.
    """
    versions = dict(python=platform.python_version(), container=container.__version__)
    versions |= {module.__name__: module.__version__ for module in (torch, torchvision, timm, PIL)}
    hardware: dict[str, Any] = dict(
        processes=int(os.environ.get("WORLD_SIZE", 1)),
        cpu=_cpu(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
    )
    if device.type == "cuda":
        hardware |= dict(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
    return dict(command=_command(), git=_git(), versions=versions, hardware=hardware)


class Report:
    """Keeps `summary.csv`, `curves.png`, `summary.json` and TensorBoard's events of a run up to date.

    Args:
        folder: The run's.
        first: The epoch from which on TensorBoard shows what is written now; an interrupted run may have shown more.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def write(self, history: list[dict[str, float]], summary: dict[str, Any]) -> None:
        """Writes everything, each file whole or not at all.

        Args:
            history: Numbers of each epoch so far, with `epoch`, `train_loss`, `eval_loss`, `eval_top1`.
            summary: The content of `summary.json`.

        Raises:
            OSError: A file cannot be written.
        """
        table = io.StringIO()
        writer = csv.DictWriter(table, history[-1].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_atomically(self.folder / "summary.csv", table.getvalue().encode())
        write_atomically(self.folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        plot_curves(self.folder / "summary.csv", self.folder / "curves.png")
        for name, value in history[-1].items():
            if name != "epoch":
                self.events.add_scalar(name.replace("_", "/", 1), value, int(history[-1]["epoch"]))
        self.events.flush()

    def close(self) -> None:
        """Ends the events."""
        self.events.close()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _git() -> str | None:
    def git(*command: str) -> str:
        folder = Path(container.__file__).parent
        return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else it is another project's repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _command() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
