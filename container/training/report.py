"""Reports of a run: tables, plots, TensorBoard and Weights & Biases logs, and the best weights."""

import csv
import hashlib
import importlib.util
import io
import json
import math
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
from safetensors.torch import save
from timm.utils import get_state_dict

import container
from container.files import write_atomically

from .curves import plot_curves
from .distributed import find_place

__all__ = ["Report", "StepLog", "describe_environment", "write_best"]


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Returns the command, code revision, versions and hardware of this process.

    Args:
        device: Device that the process computes on.

    Returns:
        Plain values: `command`, `git` (revision, followed by `-dirty` if files were changed; None outside a checkout),
        `versions`, `hardware`.
    """
    versions = dict(python=platform.python_version(), container=container.__version__)
    versions |= {module.__name__: module.__version__ for module in (torch, torchvision, timm, PIL)}
    hardware: dict[str, Any] = dict(
        processes=find_place().world,
        cpu=_cpu(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
    )
    if device.type == "cuda":
        hardware |= dict(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
    return dict(command=_command(), git=_git(), versions=versions, hardware=hardware)


class Report:
    """Writer of a run's `summary.csv`, `summary.json`, `curves.png`, and TensorBoard and W&B events.

    Args:
        folder: The run's folder.
        first: First epoch to write. TensorBoard drops events of an interrupted run from this epoch on.
        wandb: Weights & Biases project, or None. A resumed run is resumed there as well.
        settings: The run's settings, for W&B.

    Raises:
        ImportError: Matplotlib, TensorBoard or wandb is not installed.
        ValueError: W&B does not start a run.
    """

    def __init__(
        self, folder: Path, first: int, wandb: str | None = None, settings: dict[str, Any] | None = None
    ) -> None:
        if importlib.util.find_spec("matplotlib") is None:  # needed after the first epoch, which may take hours
            raise ImportError("the curves of a run need Matplotlib: pip install matplotlib")
        self.folder = folder
        self.wandb: Any = None
        if wandb is not None:
            try:
                import wandb as client
            except ImportError as error:
                raise ImportError("--wandb needs the client: pip install wandb") from error
            name = f"{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"
            try:
                self.wandb = client.init(
                    project=wandb, dir=folder, id=name, name=folder.name, resume="allow", config=settings
                )
            except client.Error as error:  # no account, no network
                raise ValueError(f"--wandb {wandb}: {error}") from error
        self.events = _events(folder / "tensorboard", first)

    def write(self, history: list[dict[str, float]], summary: dict[str, Any]) -> None:
        """Updates all files and logs. The CSV and JSON files are replaced atomically.

        Args:
            history: One dictionary per epoch so far, with `epoch`, `train_loss`, `eval_loss`, `eval_top1`.
            summary: Content of `summary.json`.

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
        if self.wandb is not None:
            self.wandb.log({name.replace("_", "/", 1): value for name, value in history[-1].items()})

    def close(self) -> None:
        """Closes the TensorBoard and W&B logs."""
        self.events.close()
        if self.wandb is not None:
            self.wandb.finish()


def write_best(folder: Path, model: torch.nn.Module, class_names: list[str] | None) -> None:
    """Writes `model_best.safetensors`, which holds only the best weights.

    If it also held averaged weights, timm would load those instead.

    Args:
        folder: The run's folder.
        model: The model with the best weights.
        class_names: Class names in the order of the logits, for the file's metadata.

    Raises:
        OSError: The file cannot be written.
    """
    names = dict(classes=json.dumps(class_names))  # one entry, since the order of two would be random
    weights = {key: tensor.contiguous() for key, tensor in get_state_dict(model).items()}
    write_atomically(folder / "model_best.safetensors", save(weights, metadata=names))


class StepLog:
    """Writer of `steps.csv` and TensorBoard's `steps`, with one line every few steps.

    Each line has the means of the finite values of `loss` and `grad_norm` over these steps; `images_per_second`;
    `data_wait`, the share of time spent waiting for data; `lr` and `loss_scale` of the last step; `skipped`, the number
    of steps skipped since the start of the run; and `memory_gib`, the peak memory of the GPU, or of this process on a
    CPU.

    Args:
        folder: The run's folder.
        first: Number of steps done. Later lines, left by an interrupted run, are removed.
        images: Images per step.
        every: Steps per line.
        wandb: Weights & Biases run that receives the same values, or None.
    """

    COLUMNS = ["step", "epoch", "loss", "lr", "grad_norm", "loss_scale", "skipped"]
    COLUMNS += ["images_per_second", "data_wait", "memory_gib"]

    def __init__(self, folder: Path, first: int, images: int, every: int, wandb: Any = None) -> None:
        self.wandb, self.images, self.every, self.steps = wandb, images, every, list[dict[str, float]]()
        self.file, lines = folder / "steps.csv", [",".join(self.COLUMNS)]
        if self.file.exists():
            whole = [line.split(",") for line in self.file.read_text().splitlines()[1:]]
            lines += [",".join(w) for w in whole if len(w) == len(self.COLUMNS) and w[-1] and int(w[0]) <= first]
        write_atomically(self.file, "".join(f"{line}\n" for line in lines).encode())
        self.events = _events(folder / "tensorboard" / "steps", first + 1)

    def add(self, **numbers: float) -> None:
        """Adds a step, and writes a line if one is due.

        Args:
            numbers: `step`, `epoch`, `loss`, `lr`, `grad_norm`, `loss_scale`, `skipped`, and for this step alone its
                duration in `seconds`, and `wait`, the seconds spent waiting for data.

        Raises:
            OSError: The line cannot be written.
        """
        self.steps.append(numbers)
        if numbers["step"] % self.every:
            return
        seconds = sum(one["seconds"] for one in self.steps)
        row = {key: numbers[key] for key in self.COLUMNS if key in numbers}
        for key in ("loss", "grad_norm"):
            finite = [one[key] for one in self.steps if math.isfinite(one[key])]
            row[key] = sum(finite) / max(1, len(finite))
        row["images_per_second"] = self.images * len(self.steps) / seconds
        row["data_wait"] = sum(one["wait"] for one in self.steps) / seconds
        row["memory_gib"] = _peak_memory() / 2**30
        with self.file.open("a") as file:
            file.write(
                ",".join(f"{row[key]:.6g}" if isinstance(row[key], float) else str(row[key]) for key in row) + "\n"
            )
        for key in self.COLUMNS[2:]:
            self.events.add_scalar(key, row[key], row["step"])
        self.events.flush()
        if self.wandb is not None:
            self.wandb.log({f"steps/{key}": value for key, value in row.items()})
        self.steps.clear()


def _events(folder: Path, first: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first)


def _peak_memory() -> float:
    """Returns the peak memory in bytes, of the GPU or else of this process; NaN where the system does not tell."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # a module of Unix
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
        git("ls-files", "--error-unmatch", "__init__.py")  # fails in another project's repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _command() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
