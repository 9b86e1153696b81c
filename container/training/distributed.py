"""Process groups, values shared by all ranks, and stop signals: the same code for one process or many."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.utils.distributed import world_info_from_env

__all__ = [
    "SIGNALS",
    "Agreement",
    "Place",
    "StopSignal",
    "Waiting",
    "any_of",
    "find_place",
    "join_group",
    "on_first_rank",
]

SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # Windows has only two of these
    if hasattr(signal, name)
]


def join_group(device: str) -> torch.device:
    """Joins the process group of torchrun, srun or mpirun.

    A process that was started alone forms a group of one. Samplers, including repeated augmentation, thus need no
    special case for a single process. On GPUs, cuDNN searches for its fastest kernels, and float32 matrix products are
    computed in TF32.

    Args:
        device: 'cpu', 'cuda' or 'cuda:N'. In a group, each process uses the GPU of its local rank.

    Returns:
        This process's device.

    Raises:
        KeyError, RuntimeError, ValueError: The launcher's environment variables do not describe a group.
    """
    target = torch.device(device)  # first, so that an invalid name fails before the group is joined
    rank, world, local, local_world = find_place()
    if world > 1 and "RANK" not in os.environ and "MASTER_ADDR" not in os.environ:
        if local_world < world:
            raise ValueError(f"{world} processes on several machines: set MASTER_ADDR and MASTER_PORT, or use torchrun")
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000))
    if target.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        if world > 1:
            target = torch.device("cuda", local)
            torch.cuda.set_device(target)
    if world == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=rank, world_size=1)
    elif target.type == "cuda":
        dist.init_process_group("nccl", rank=rank, world_size=world, device_id=target)
    else:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    return target


class Place(NamedTuple):
    """Position of this process among those that a launcher started."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1  # processes on this machine


def find_place() -> Place:
    """Finds this process's place in the environment variables of torchrun, srun or mpirun.

    Raises:
        KeyError, ValueError: The variables do not describe a place.
    """
    environment = os.environ
    if "RANK" in environment:  # without local variables, as under Kubernetes, each process has one machine
        local = (int(environment.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        return Place(int(environment["RANK"]), int(environment.get("WORLD_SIZE", 1)), *local)
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment:
        return Place()  # the batch script itself, or an salloc shell: only srun would start more processes
    local_rank, rank, world = world_info_from_env()
    beside: Any = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", environment.get("MPI_LOCALNRANKS"))
    if beside is None and "SLURM_STEP_TASKS_PER_NODE" in environment:  # such as 2(x3),1
        parts = [part.rstrip(")").split("(x") for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(",")]
        counts = [part[0] for part in parts for _ in range(int(part[1]) if len(part) > 1 else 1)]
        beside = counts[int(environment.get("SLURM_NODEID", 0))]
    if beside is None:
        beside = world if int(environment.get("SLURM_NNODES", 1)) == 1 else 1
    return Place(rank, world, local_rank, int(beside))


class Agreement:
    """Values summed over all processes after a step, so that all make the same decisions.

    The copy from the device is asynchronous, so reading it one step later does not wait.

    Args:
        loss: Loss of this process, a scalar.
        norm: Gradient norm, a scalar.
        scale: Loss scale, a scalar.
        stop: Whether this process was told to stop.
    """

    def __init__(self, loss: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor, stop: bool) -> None:
        values = torch.stack([v.detach().float() for v in (loss, norm, scale, torch.full_like(loss, stop))])
        if dist.get_world_size() > 1:
            dist.all_reduce(values)
        self._values = torch.empty(values.shape, pin_memory=values.is_cuda).copy_(values, non_blocking=True)
        self._ready = torch.cuda.current_stream().record_event() if values.is_cuda else None

    def read(self) -> tuple[float, float, float, bool]:
        """Returns the mean loss, gradient norm and loss scale, and whether any process was told to stop.

        A value that is not finite on one process is not finite in the mean.
        """
        if self._ready is not None:
            self._ready.synchronize()
        loss, norm, scale, stops = self._values.tolist()
        world = dist.get_world_size()
        return loss / world, norm / world, scale / world, stops > 0


def any_of(flags: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns which flags are set on any process. All processes must call it.

    Args:
        flags: Flags of this process.
        device: Device of the process group.

    Returns:
        Flags of the same shape, on the CPU.
    """
    if dist.get_world_size() == 1:
        return flags
    found = flags.to(device, torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool().cpu()


def on_first_rank(make: Callable[[], Any]) -> Any:
    """Returns what a function returns on rank 0, on all ranks. All processes must call it, in or without a group.

    Args:
        make: The function. Its result must be picklable.

    Raises:
        Exception: The function raised it on rank 0.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            made = [make()]
        except Exception as error:  # the other processes wait for an answer
            made = [error]
    dist.broadcast_object_list(made)
    if isinstance(made[0], Exception):
        raise made[0]
    return made[0]


TICK = 0.5  # seconds between two looks at a wait
TICKS, TICKS_TOLD = 600, 40  # looks until a wait ends, in all and after a signal to stop


class Waiting:
    """Context manager that ends a wait of this process's main thread after five minutes.

    A signal to stop leaves it another 20 s. Time in which the process itself was suspended does not count. Nothing
    happens in other threads, or on systems without interval timers.

    Args:
        check: Function that is called twice a second; it may raise an error.

    Raises:
        TimeoutError: The wait was too long.
    """

    told = False  # whether this process was told to stop

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.check, self.ticks, self.ticks_told = check, 0, 0
        self._before: Any = None

    def _tick(self, *_: object) -> None:
        self.ticks, self.ticks_told = self.ticks + 1, self.ticks_told + self.told
        if self.ticks >= TICKS or self.ticks_told >= TICKS_TOLD:
            raise TimeoutError(f"no batch came for {self.ticks * TICK:.0f} s: the data does not answer")
        self.check()

    def __enter__(self) -> "Waiting":
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGALRM, self._tick)
            signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)


class StopSignal:
    """Context manager that catches the signals that end jobs.

    The training loop can then save and stop after its current step. The signals are SIGTERM (Slurm, torchrun), SIGHUP
    (a closed terminal), SIGUSR1 and SIGUSR2 (schedulers), and SIGINT (Ctrl-C). They may arrive many times and from
    several senders; only the first counts. A second Ctrl-C, more than a second after the first, ends the process at
    once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since, Waiting.told = number, time.monotonic(), True
        elif number == self.received == signal.SIGINT and time.monotonic() - self._since > 1:
            self.__exit__()
            signal.raise_signal(number)

    def __enter__(self) -> "StopSignal":
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        Waiting.told = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
