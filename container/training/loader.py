"""Data loaders for training and validation. Training can start from any batch of a run."""

import ctypes
import errno
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data import create_transform
from timm.data.dataset import IterableImageDataset
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from .data import mend_posterize
from .distributed import SIGNALS, Waiting, find_place
from .seeding import SeededDataset, SeededSampler, seed_everything

__all__ = [
    "advice",
    "ask_ahead",
    "cores",
    "create_train_loader",
    "create_val_loader",
    "default_workers",
    "end_workers",
    "epoch_batches",
    "growing",
    "name_killed_workers",
]

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_WAIT = 0.2  # share of an epoch spent waiting for data, above which `advice` says so
_MOST = 16  # workers; each keeps batches in /dev/shm, and a copy of the list of a tar file


def cores() -> int:
    """Returns the number of CPU cores for this process.

    These are the cores it may use, divided by the number of processes on this machine. `os.cpu_count()` would also
    count cores that a scheduler or a container has given to others.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        quota, period = map(int, _CPU_MAX.read_text().split())
        count = min(count, math.ceil(quota / period))
    return max(1, count // find_place().local_world)


def default_workers() -> int:
    """Returns the default number of data loader workers: one fewer than `cores()`, from 1 to 16."""
    return min(max(1, cores() - 1), _MOST)


def advice(share: float, workers: int) -> str:
    """Returns advice for an epoch that waited for data more than 20 % of its time, or else ''.

    Args:
        share: Share of the epoch's time spent waiting.
        workers: Number of data loader workers of this process.
    """
    if share <= _WAIT:
        return ""
    here = cores()
    ways = [f"more --workers ({workers} of {here} cores used)"] if workers < here else []
    ways += [f"{'or ' if ways else ''}images pre-resized"]
    return f"data_wait {100 * share:.0f} %: {', '.join(ways)}"


def _shield(worker: int) -> None:
    """Keeps a worker alive through signals to the whole process group, such as Ctrl-C.

    The training process still needs its batches to finish a step, and ends its workers itself.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the training process may have a handler of its own
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # SIGALRM ends it after 30 s if nothing else does
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if sys.platform == "linux":  # it dies with the training process: torch's own watchdog waits for full queues
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _check_shared_memory(workers: int, batch_size: int, size: tuple[int, ...]) -> None:
    """Checks that the workers' batches fit in /dev/shm. If not, torch would wait for ever."""
    if workers and os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        wanted = 2 * workers * batch_size * math.prod(size) * find_place().local_world
        if wanted > free:
            raise ValueError(
                f"/dev/shm has {free / 2**20:.0f} MiB free, and {workers} loaders want {wanted / 2**20:.0f}: "
                "fewer --workers, or docker run --shm-size"
            )


def _check_room(size: int) -> None:
    """Checks that /dev/shm has room for a batch. A worker that found none has lost its batch: it never comes."""
    if os.path.isdir("/dev/shm") and (free := shutil.disk_usage("/dev/shm").free) < size:
        raise OSError(f"/dev/shm is full: {free:,} bytes are free, and a batch has {size:,}")


@contextmanager
def name_killed_workers() -> Iterator[None]:
    """Says of a worker that was killed what to do; torch raises that in whatever the process does.

    Raises:
        ChildProcessError: A worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ChildProcessError(f"{str(error).strip()} Is memory short? Fewer --workers need less") from None


class _Loader(DataLoader[Any]):
    """DataLoader whose workers start with signals blocked, until `_shield` has run.

    With `begin`, they prepare the first batches of the next iteration ahead of it.
    """

    bytes = 0  # of a batch
    _begun: Any = None
    _current: Any = None  # the last iterator, which has the workers

    def begin(self) -> None:
        self._begun = self._start()

    def __iter__(self) -> Any:
        begun, self._begun = self._start() if self._begun is None else self._begun, None
        check = partial(_check_room, self.bytes) if self.num_workers else lambda: None
        while True:
            try:
                with Waiting(check):
                    batch = next(begun)
            except StopIteration:
                return
            yield batch

    def _start(self) -> Any:
        before = None
        if hasattr(signal, "pthread_sigmask"):
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # new processes inherit the mask
        try:
            self._current = super().__iter__()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError("/dev/shm is full: no loader can be started") from None
            raise
        finally:
            if before is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._current

    def end_workers(self) -> None:
        for worker in getattr(self._current, "_workers", ()):
            worker.kill()
            worker.join()


def _prefetch(
    dataset: Any, config: dict[str, Any], batch_size: int, workers: int, device: torch.device, **options: Any
) -> PrefetchLoader:
    _check_shared_memory(workers, batch_size, config["input_size"])
    loader = _Loader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=fast_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_shield,
        **options,
    )
    loader.bytes = batch_size * math.prod(config["input_size"])
    return PrefetchLoader(loader, mean=config["mean"], std=config["std"], device=device)


def create_train_loader(
    dataset: Any,
    config: dict[str, Any],
    augmentation: dict[str, Any],
    repeats: int,
    batch_size: int,
    workers: int,
    seed: int,
    device: torch.device,
) -> PrefetchLoader:
    """Creates a training loader like `timm.data.create_loader`, but seeded by sample instead of by worker.

    Args:
        dataset: timm dataset, or any dataset with a `transform`.
        config: Preprocessing: `input_size`, `interpolation`, `mean`, `std`.
        augmentation: Further arguments of `timm.data.create_transform`.
        repeats: Number of augmented copies per image in an epoch, which then covers only a part of the images. 0 uses
            each image once.
        batch_size: Images per batch of this process.
        workers: Number of data loader workers. It does not affect the batches, except those of streamed data.
        seed: The run's seed.
        device: Device that images are moved to and normalised on.

    Raises:
        ValueError: Repeats are set for streamed data, or there are fewer shards than processes.
    """
    dataset.transform = create_transform(
        config["input_size"],
        is_training=True,
        use_prefetcher=True,
        interpolation=config["interpolation"],
        **augmentation,
    )
    for part in dataset.transform.transforms:
        mend_posterize(part)
    if isinstance(dataset, IterableImageDataset):
        if repeats:
            raise ValueError("a stream cannot give an image twice: --aug-repeats 0")
        # Each epoch starts new workers, at least one: they shuffle with a seed that they receive at their start.
        shards, world = len(dataset.reader.split_info.filenames), dist.get_world_size()
        if shards < world:
            raise ValueError(f"{shards} shards for {world} processes: each has to have one")
        workers = min(max(1, workers), shards // world)  # a worker without a shard would end the run
        dataset.set_loader_cfg(num_workers=workers)
        return _prefetch(dataset, config, batch_size, workers, device, drop_last=True)
    sampler = RepeatAugSampler(dataset, num_repeats=repeats) if repeats else DistributedSampler(dataset)
    return _prefetch(
        SeededDataset(dataset),
        config,
        batch_size,
        workers,
        device,
        drop_last=True,
        sampler=SeededSampler(sampler, seed),
        persistent_workers=workers > 0,
    )


def create_val_loader(
    dataset: Any,
    config: dict[str, Any],
    batch_size: int,
    workers: int,
    device: torch.device,
    persistent: bool = False,
) -> PrefetchLoader:
    """Creates a validation loader like `timm.data.create_loader`, in order. Each process gets its share of the images.

    Args:
        dataset: timm dataset, or any dataset with a `transform`.
        config: Preprocessing: `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
        batch_size: Images per batch of this process.
        workers: Number of data loader workers.
        device: Device that images are moved to and normalised on.
        persistent: Whether to keep the workers for the next pass.
    """
    dataset.transform = create_transform(
        config["input_size"],
        use_prefetcher=True,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )
    if isinstance(dataset, IterableImageDataset):
        # timm gives all processes the same number of images, some twice. Here each reads its shards to the end.
        reader, rank, world = dataset.reader, dist.get_rank(), dist.get_world_size()
        shards = reader.split_info.filenames[rank::world]
        if not shards:
            return _prefetch([], config, batch_size, 0, device)
        reader.split_info = replace(reader.split_info, filenames=shards)
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        workers = min(workers, len(shards))
        dataset.set_loader_cfg(num_workers=workers)
        return _prefetch(dataset, config, batch_size, workers, device)
    sampler = OrderedDistributedSampler(dataset) if dist.is_initialized() else None
    return _prefetch(
        dataset, config, batch_size, workers, device, sampler=sampler, persistent_workers=persistent and workers > 0
    )


def end_workers(*loaders: PrefetchLoader) -> None:
    """Kills the workers of loaders, since they ignore the signals that end jobs."""
    if hasattr(signal, "SIGCHLD"):
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch treats a dead worker as a failure
    for loader in loaders:
        inner: Any = loader.loader
        inner.end_workers()
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, before)


def growing(start: int, end: int, epochs: int, step: int = 32) -> list[int]:
    """Returns the image size of each epoch, growing from `start` to `end`.

    Both ends are exact. Sizes in between are rounded to multiples of `step`.

    Args:
        start: Image size in the first epoch, in pixels.
        end: Image size in the last epoch.
        epochs: Number of epochs.
        step: Pixels per token in the last stage.

    Raises:
        ValueError: `start` is larger than `end`, or smaller than a token.
    """
    if start > end:
        raise ValueError(f"--start-size {start} is larger than the model's images, {end}: images cannot shrink")
    if start < min(step, end):
        raise ValueError(f"--start-size {start} is less than {step} pixels, one token of the model's last stage")
    even = [start + (end - start) * epoch / max(epochs - 1, 1) for epoch in range(epochs)]
    sizes = [min(max(round(size / step) * step, start), end) for size in even]
    sizes[0] = start
    sizes[-1] = end
    return sizes


def ask_ahead(loader: PrefetchLoader, size: int, seed: int, epoch: int) -> None:
    """Has the workers prepare the first batches of an epoch, while this process evaluates.

    The next call of `epoch_batches` must be for the start of this epoch. Nothing happens for streamed data, whose
    workers start anew in each epoch, or if the batches of both loaders do not fit in /dev/shm.

    Args:
        loader: Loader from `create_train_loader`.
        size: Its image size.
        seed: The run's seed.
        epoch: Index of the epoch, from 0.
    """
    inner: Any = loader.loader
    try:
        _check_shared_memory(2 * inner.num_workers, inner.batch_size or 1, (3, size, size))
    except ValueError:
        return
    if not isinstance(loader.dataset, IterableImageDataset):
        seed_everything(seed, epoch)  # torch draws the seeds of its workers from here
        loader.sampler.start(epoch)
        inner.begin()


def epoch_batches(loader: PrefetchLoader, seed: int, epoch: int, first: int = 0) -> Iterator[Any]:
    """Returns an iterator over the batches of an epoch, from its start or from the middle.

    Args:
        loader: Loader from `create_train_loader`.
        seed: The run's seed.
        epoch: Index of the epoch, from 0.
        first: Index of the first batch. Streamed data is read from the start to get there, which needs the same number
            of workers.
    """
    seed_everything(seed, epoch)  # torch draws the seeds of its workers from here
    if isinstance(loader.dataset, IterableImageDataset):
        # For streamed data, these seeds cover all samples of a worker, so they must differ between ranks.
        seed_everything(seed, epoch, dist.get_rank(), 2)
        loader.dataset.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(first):
            next(batches)
        return batches
    loader.sampler.start(epoch, first * (loader.loader.batch_size or 1))
    return iter(loader)
