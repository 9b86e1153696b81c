"""Batches of augmented training images, from anywhere in a run."""

from typing import Any, Dict, Iterator

import torch
from timm.data import create_transform
from timm.data.dataset import IterableImageDataset
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from .seeding import SeededDataset, SeededSampler, seed_everything

__all__ = ["create_train_loader", "epoch_batches"]


def create_train_loader(
    dataset: Any,
    config: Dict[str, Any],
    augmentation: Dict[str, Any],
    repeats: int,
    batch_size: int,
    workers: int,
    seed: int,
    device: torch.device,
) -> PrefetchLoader:
    """A loader as `timm.data.create_loader` makes it, but for seeds of samples instead of workers.

    Args:
        dataset: timm's, or any with a `transform`.
        config: `input_size`, `interpolation`, `mean`, `std`.
        augmentation: More arguments of `timm.data.create_transform`.
        repeats: Augmented copies of an image in an epoch (of a part of the images), 0 for one of each.
        batch_size: Images of this process.
        workers: Processes that load; what comes out does not depend on it, but for streams.
        seed: The run's.
        device: Where images are moved to and normalized.

    Raises:
        ValueError: Repeats of a stream.
    """
    dataset.transform = create_transform(
        config["input_size"],
        is_training=True,
        use_prefetcher=True,
        interpolation=config["interpolation"],
        **augmentation,
    )
    options: Dict[str, Any]
    if isinstance(dataset, IterableImageDataset):
        if repeats:
            raise ValueError("a stream cannot give an image twice: --aug-repeats 0")
        # New workers in each epoch, and never this process: they shuffle, by a seed that they have from the start.
        workers = max(1, workers)
        dataset.set_loader_cfg(num_workers=workers)
        options = dict(dataset=dataset)
    else:
        sampler = RepeatAugSampler(dataset, num_repeats=repeats) if repeats else DistributedSampler(dataset)
        options = dict(
            dataset=SeededDataset(dataset), sampler=SeededSampler(sampler, seed), persistent_workers=workers > 0
        )
    loader = DataLoader(
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=fast_collate,
        pin_memory=device.type == "cuda",
        drop_last=True,
        **options,
    )
    return PrefetchLoader(loader, mean=config["mean"], std=config["std"], device=device)


def epoch_batches(loader: PrefetchLoader, seed: int, epoch: int, first: int = 0) -> Iterator[Any]:
    """The batches of an epoch, or those from the middle of it on.

    Args:
        loader: As `create_train_loader` makes it.
        seed: The run's.
        epoch: Counts from 0.
        first: The first batch. To get there, streams are read from the start, with the same number of workers.
    """
    seed_everything(seed, epoch)  # torch draws the seeds of its workers from here
    if isinstance(loader.dataset, IterableImageDataset):
        loader.dataset.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(first):
            next(batches)
        return batches
    loader.sampler.start(epoch, first * (loader.loader.batch_size or 1))
    return iter(loader)
