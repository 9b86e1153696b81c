"""Checkpoints and progress of a training run."""

import copy
import hashlib
import io
import os
import socket
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from container.files import remove_leftovers, write_atomically

__all__ = ["Checkpoints", "Progress", "lock"]


def lock(folder: Path) -> FileLock:
    """Locks a run's folder until the lock is released or this process ends.

    Args:
        folder: The run's folder.

    Raises:
        ValueError: Another process holds the lock.
    """
    held, owner = FileLock(folder / ".lock"), folder / ".owner"
    try:
        held.acquire(timeout=0)
    except Timeout:
        who = owner.read_text() if owner.exists() else "another process"
        raise ValueError(f"{folder} is the folder of a run in progress ({who})") from None
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return held


@dataclass
class Progress:
    """Progress of a training run.

    It holds no random state. On every rank, random numbers are a function of the run's seed and of the position in the
    run where they are used (`seed_everything`).
    """

    epoch: int = 0  # completed epochs
    step: int = 0  # optimizer steps done in the current epoch
    loss: float = 0.0  # sum over these steps
    wait: float = 0.0  # seconds of these steps spent waiting for data
    seconds: float = 0.0  # duration of these steps
    total_seconds: float = 0.0
    lr: float = 0.0  # learning rate of the last step
    bad: int = 0  # consecutive steps skipped because of a non-finite gradient
    skipped: int = 0  # all steps skipped so far
    best: float | None = None  # best validation top-1, in percent
    history: list[dict[str, float]] = field(default_factory=list)  # one row per completed epoch


class Checkpoints:
    """Manager of the newest checkpoints in a run's folder.

    Each file is named `checkpoint-STEP-HASH.pth`, with the optimizer step and the first 16 hexadecimal digits of the
    SHA-256 of its content. One atomic rename thus publishes both the file and its checksum. A checkpoint is a
    dictionary of tensors and plain values, so loading it executes no code. timm can load its weights, and prefers the
    averaged ones.

    Args:
        folder: The run's folder.
        keep: Number of checkpoints to keep.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[Path] | None = None

    def paths(self) -> list[Path]:
        """Returns the paths of the checkpoints, newest first."""
        return sorted(self.folder.glob("checkpoint-*-*.pth"), reverse=True)

    def damaged(self) -> list[Path]:
        """Returns the paths of damaged checkpoints that `load` has set aside."""
        return sorted(self.folder.glob("checkpoint-*-*.damaged"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes a checkpoint, then removes old ones and any other checkpoint of the same step.

        Args:
            step: Number of optimizer steps done.
            state: Tensors and plain values.

        Raises:
            OSError: The checkpoint cannot be written. Earlier ones are kept.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = self.folder / f"checkpoint-{step:08d}-{_digest(buffer.getbuffer())}.pth"
        write_atomically(path, buffer.getbuffer())
        same = [other for other in self.paths() if other != path and other.name[:20] == path.name[:20]]
        for old in same + [other for other in self.paths() if other not in same][self.keep :]:
            old.unlink()
        return path

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Saves a copy of the state in a background thread, one checkpoint at a time.

        Args:
            step: Number of optimizer steps done.
            state: Tensors and plain values.

        Raises:
            OSError: The previous checkpoint could not be written.
        """
        self.finish()
        self._writing = self._thread.submit(self.save, step, _copy(state))

    def finish(self) -> None:
        """Waits until the checkpoint started by `begin` has been written.

        Raises:
            OSError: The checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits as `finish` does, and ends the background thread.

        Raises:
            OSError: The checkpoint could not be written.
        """
        self._thread.shutdown()
        self.finish()

    def load(self) -> dict[str, Any] | None:
        """Loads the newest intact checkpoint to the CPU.

        Damaged checkpoints are reported on stderr and renamed to `*.damaged`. Temporary files left by an interrupted
        `write_atomically` are removed.

        Returns:
            The saved state, or None if there is no checkpoint.

        Raises:
            ValueError: A file has the right checksum, but other content than `save` writes.
        """
        remove_leftovers(self.folder)
        for path in self.paths():
            data = path.read_bytes()
            if path.stem.endswith(f"-{_digest(data)}"):
                try:
                    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                except Exception as error:  # with its checksum in its name, so it was written so
                    raise ValueError(f"{path} is no checkpoint of tensors and plain values") from error
            path.rename(path.with_suffix(".damaged"))  # otherwise it would outrank a new run's
            print(f"{path} is damaged ({len(data)} bytes, wrong sha256): trying the one before", file=sys.stderr)
        return None


def _copy(value: Any) -> Any:
    """Copies tensors to the CPU, including those in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: _copy(part) for key, part in value.items()})
        return copied
    return [_copy(part) for part in value] if isinstance(value, list) else value


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
