"""One process or many: the same way to train."""

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

__all__ = ["SIGNALS", "StopSignal", "agree", "join_group"]

SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # Windows has two of them
    if hasattr(signal, name)
]


def join_group(device: str) -> torch.device:
    """Joins the group of processes that torchrun started; a process that was started alone is a group of one.

    So samplers, repeated augmentation among them, need no second way for a single process.

    Args:
        device: 'cpu', 'cuda' or 'cuda:N'; under torchrun each process takes the GPU of its local rank.

    Returns:
        This process's device.
    """
    target = torch.device(device)  # before anything is joined: it may be a name of none
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return target
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device)


def agree(loss: torch.Tensor, norm: torch.Tensor, stop: bool) -> tuple[float, float, bool]:
    """What all processes go by in a step, so that none does otherwise than the others, or leaves them waiting.

    Args:
        loss: This process's, a scalar.
        norm: Of this process's gradient, a scalar.
        stop: Whether this process was told to stop.

    Returns:
        The mean loss and the mean norm (not finite if one is not), and whether any process was told to stop.
    """
    values = torch.stack([v.detach().float() for v in (loss, norm, torch.full_like(loss, stop))])
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    mean_loss, mean_norm, stops = (values / dist.get_world_size()).tolist()
    return mean_loss, mean_norm, stops > 0


class StopSignal:
    """Notes the signals that end jobs, for the training loop to save and stop after its step.

    Slurm's and torchrun's SIGTERM, a closed terminal's SIGHUP, SIGUSR1 and SIGUSR2 of schedulers, and Ctrl-C. They may
    come many times, from several senders: the first counts. A second Ctrl-C, a second later, acts as if nobody
    listened. To be used in a `with` statement.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif number == self.received == signal.SIGINT and time.monotonic() - self._since > 1:
            self.__exit__()
            signal.raise_signal(number)

    def __enter__(self) -> "StopSignal":
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
