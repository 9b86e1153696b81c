"""One process or many: the same way to train."""

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

__all__ = ["StopSignal", "agree", "join_group"]


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


def agree(loss: torch.Tensor, stop: bool) -> tuple[float, bool]:
    """What all processes go by after a step, so that none stops alone and leaves the others waiting.

    Args:
        loss: This process's, a scalar.
        stop: Whether this process was told to stop.

    Returns:
        The mean loss (not finite if one is not), and whether any process was told to stop.
    """
    both = torch.stack([loss.detach().float(), torch.full_like(loss, float(stop), dtype=torch.float32)])
    if dist.get_world_size() > 1:
        dist.all_reduce(both)
    total, stops = both.tolist()
    return total / dist.get_world_size(), stops > 0


class StopSignal:
    """Notes SIGTERM (preemption) and SIGINT (Ctrl-C), for the training loop to save and stop after its step.

    A second one acts as if nobody listened. To be used in a `with` statement.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()

    def __enter__(self) -> "StopSignal":
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
