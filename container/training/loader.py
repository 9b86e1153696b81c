"""Batches of augmented training images, from anywhere in a run."""

import ctypes
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
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

from container.images import open_rgb

from .data import Images, mend_posterize
from .distributed import SIGNALS
from .seeding import SeededDataset, SeededSampler, seed_everything
from .tensor import decode, tensor_transform

__all__ = [
    "advice",
    "cores",
    "create_train_loader",
    "create_val_loader",
    "default_workers",
    "end_workers",
    "epoch_batches",
    "growing",
]

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_WAIT = 0.2  # share of the time above which waiting for data is worth a word
_MOST = 16  # workers; each has its own copy of the list of files, and batches in /dev/shm


def cores() -> int:
    """Processor cores for this process: those it may use, divided by the number of processes on this machine.

    `os.cpu_count()` would also count cores that a scheduler or a container gave to others.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup of version 2, or no limit ("max")
        quota, period = map(int, _CPU_MAX.read_text().split())
        count = min(count, math.ceil(quota / period))
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def default_workers() -> int:
    """Loader workers of a process: one for each of its cores but one, from 1 to 16."""
    return min(max(1, cores() - 1), _MOST)


def advice(share: float, workers: int, loader: str = "pil") -> str:
    """Advice about an epoch that waited for data, or '' if it hardly did.

    Args:
        share: Share of the epoch's time spent waiting.
        workers: Number of this process's loader processes.
        loader: Value of `--loader`.
    """
    if share <= _WAIT:
        return ""
    here = cores()
    ways = [f"more --workers ({workers} of {here} cores used)"] if workers < here else []
    ways += ["--loader tensor"] if loader == "pil" else []
    ways += [f"{'or ' if ways else ''}images pre-resized"]
    return f"data_wait {100 * share:.0f} %: {', '.join(ways)}"


def _shield(worker: int) -> None:
    """Keeps a worker alive through signals to the whole process group, such as Ctrl-C.

    The training process still needs its batches to finish a step, and ends its workers itself.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # SIGALRM ends it, should nothing else
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if sys.platform == "linux":  # it dies with the process that trains: torch's own watch waits for full queues
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _check_shared_memory(workers: int, batch_size: int, size: tuple[int, ...]) -> None:
    """Refuses workers whose batches do not fit in /dev/shm, where torch would wait for ever."""
    if workers and os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        wanted = 2 * workers * batch_size * math.prod(size) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if wanted > free:
            raise ValueError(
                f"/dev/shm has {free / 2**20:.0f} MiB free, and {workers} loaders want {wanted / 2**20:.0f}: "
                "fewer --workers, or docker run --shm-size"
            )


class _Loader(DataLoader[Any]):
    """A DataLoader whose workers begin with signals blocked, until `_shield` is up."""

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a new process inherits it
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    loader: str = "pil",
) -> PrefetchLoader:
    """A training loader like that of `timm.data.create_loader`, but seeded by sample instead of by worker.

    Args:
        dataset: A timm dataset, or any with a `transform`.
        config: `input_size`, `interpolation`, `mean`, `std`.
        augmentation: Further arguments of `timm.data.create_transform`.
        repeats: Augmented copies per image and epoch, of a part of the images; 0 for one of each image.
        batch_size: Images per batch of this process.
        workers: Number of loader processes. It does not change the batches, except those of streams.
        seed: The run's seed.
        device: Where images are moved to and normalized.
        loader: 'pil' for Pillow, or 'tensor' for torchvision, which is faster. Both draw the same augmentation; their
            pixels differ by rounding.

    Raises:
        ValueError: Repeats of a stream, fewer shards than processes, or the tensor loader for data that something else
            decodes.
    """
    if isinstance(dataset, Images):
        dataset.decode = decode if loader == "tensor" else open_rgb
    elif loader == "tensor":
        raise ValueError("--loader tensor reads folders, tar files and Hugging Face data: --loader pil")
    if loader == "tensor":
        dataset.transform = tensor_transform(config, augmentation)
    else:
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
        # New workers in each epoch, and never this process: they shuffle, by a seed that they have from the start.
        shards, world = len(dataset.reader.split_info.filenames), dist.get_world_size()
        if shards < world:
            raise ValueError(f"{shards} shards for {world} processes: each has to have one")
        workers = min(max(1, workers), shards // world)  # a worker without a shard ends the run
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
    """A validation loader like that of `timm.data.create_loader`, in order; each process gets its share.

    It always uses Pillow, so that accuracies are comparable with timm's.

    Args:
        dataset: A timm dataset, or any with a `transform`.
        config: `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
        batch_size: Images per batch of this process.
        workers: Number of loader processes.
        device: Where images are moved to and normalized.
        persistent: Whether the workers are kept for the next pass.
    """
    dataset.transform = create_transform(
        config["input_size"],
        use_prefetcher=True,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )
    if isinstance(dataset, IterableImageDataset):
        # timm gives all processes as many images, some of them twice; here each reads its shards to their ends.
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


def end_workers() -> None:
    """Ends all loaders of this process at once; they shield themselves from the signals that end jobs."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a dead one for a failure
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    signal.signal(signal.SIGCHLD, before)


def growing(start: int, end: int, epochs: int, step: int = 32) -> list[int]:
    """Side of the images in each epoch, growing from `start` to `end` in multiples of `step`; both ends are exact.

    Args:
        start: Side in the first epoch, in pixels.
        end: Side in the last epoch, or in the only one.
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


def epoch_batches(loader: PrefetchLoader, seed: int, epoch: int, first: int = 0) -> Iterator[Any]:
    """The batches of an epoch, from its start or from the middle.

    Args:
        loader: From `create_train_loader`.
        seed: The run's seed.
        epoch: Index of the epoch, from 0.
        first: Index of the first batch. Streams are read from the start to get there, with the same number of workers.
    """
    seed_everything(seed, epoch)  # torch draws the seeds of its workers from here
    if isinstance(loader.dataset, IterableImageDataset):
        seed_everything(
            seed, epoch, dist.get_rank(), 2
        )  # which draw for all samples of a stream: not alike on all ranks
        loader.dataset.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(first):
            next(batches)
        return batches
    loader.sampler.start(epoch, first * (loader.loader.batch_size or 1))
    return iter(loader)
