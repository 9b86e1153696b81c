"""Random seeds derived from the position in a run, so that a run can be repeated, and resumed from any point."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Sampler

__all__ = ["SeededDataset", "SeededSampler", "seed_everything"]

Place = tuple[int, int, int]


def seed_everything(*place: int) -> None:
    """Seeds the generators of Python, NumPy and torch (all devices) with a hash of integers.

    Args:
        place: Position in a run: its seed, then an epoch and a position in it, or a step and a rank.
    """
    torch.manual_seed(_seed_cpu(place))


def _seed_cpu(place: tuple[int, ...]) -> int:
    seed = int(np.random.SeedSequence(place).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # seeding all devices takes 0.1 ms, as long as a small image
    return seed


class SeededSampler(Sampler):
    """Wrapper of a timm or torch sampler that gives each sample its own seed, and can start in the middle of an epoch.

    Sample i of rank r has position i * world + r in the epoch. Positions, not processes or workers, seed the
    augmentation, so the number of processes and workers does not change the samples.

    Args:
        sampler: Sampler of one rank of a process group, with `set_epoch`.
        seed: The run's seed.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch, self.first = sampler, seed, 0, 0

    def start(self, epoch: int, first: int = 0) -> None:
        """Sets the epoch, and the number of this rank's samples to skip in it."""
        self.epoch, self.first = epoch, first
        mixed = np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]
        self.sampler.set_epoch(int(mixed))  # timm's and torch's samplers shuffle by the epoch alone

    def __iter__(self) -> Iterator[tuple[int, Place]]:
        """Yields dataset indices, each with its place: the run's seed, the epoch, and the position in it."""
        rank, world = dist.get_rank(), dist.get_world_size()
        for i, index in enumerate(self.sampler):
            if i >= self.first:
                yield index, (self.seed, self.epoch, i * world + rank)

    def __len__(self) -> int:
        """Returns the number of this rank's samples in a whole epoch."""
        return len(self.sampler)


class SeededDataset(Dataset):
    """Dataset wrapper that reads and augments each sample with the seed of its place.

    Args:
        dataset: Dataset with integer indices.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, item: tuple[int, Place]) -> tuple[object, int]:
        """Returns the sample for an index and place from `SeededSampler`."""
        index, place = item
        _seed_cpu(place)
        return self.dataset[index]
