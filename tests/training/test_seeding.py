"""Random numbers as a function of place."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data.distributed import DistributedSampler

from container.training import join_group, seed_everything
from container.training.seeding import SeededDataset, SeededSampler


def draw():
    return random.random(), np.random.random(), torch.rand(()).item()


class Draws:
    """A dataset whose samples are random numbers."""

    def __getitem__(self, index):
        return index, draw()


@pytest.fixture
def group():
    join_group("cpu")
    yield
    dist.destroy_process_group()


def test_one_place_gives_one_number_and_no_other_place_gives_it():
    drawn = {}
    for place in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0, 1), (0, 0, 0)]:
        seed_everything(*place)
        numbers = draw()
        assert drawn.setdefault(place, numbers) == numbers
    for generator in range(3):
        assert len({numbers[generator] for numbers in drawn.values()}) == 5


def test_a_sample_depends_on_its_place_alone(group):
    dataset, sampler = SeededDataset(Draws()), SeededSampler(DistributedSampler(range(20)), seed=3)
    sampler.start(epoch=2)
    whole = [dataset[item] for item in sampler]
    random.seed(99)
    sampler.start(epoch=2, first=7)
    assert [dataset[item] for item in sampler] == whole[7:] and len(sampler) == 20
    assert sorted(index for index, _ in whole) == list(range(20)) and len({drawn for _, drawn in whole}) == 20
    for other in (dict(epoch=3), dict(epoch=2)):
        changed = SeededSampler(DistributedSampler(range(20)), seed=3 if other["epoch"] == 3 else 4)
        changed.start(**other)
        assert [index for index, _ in changed] != [index for index, _ in whole]


def test_copies_of_an_image_are_augmented_differently(group):
    sampler = SeededSampler(RepeatAugSampler(range(300), num_repeats=3), seed=0)
    sampler.start(epoch=0)
    items = [SeededDataset(Draws())[item] for item in sampler]
    assert len({index for index, _ in items}) < 100 < len({drawn for _, drawn in items})


@pytest.mark.parametrize("kind", [DistributedSampler, RepeatAugSampler])
def test_two_ranks_share_the_samples_of_one(monkeypatch, kind):
    """Step for step: 4 + 4 samples of two ranks are the 8 of one."""
    epochs = {}
    for world in (1, 2):
        for rank in range(world):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(dist, "get_world_size", lambda world=world: world)
            sampler = SeededSampler(kind(range(256), num_replicas=world, rank=rank), seed=5)
            sampler.start(epoch=1)
            epochs[world, rank] = list(sampler)
    for step in range(256 // 8):
        one = epochs[1, 0][8 * step : 8 * step + 8]
        two = [item for rank in (0, 1) for item in epochs[2, rank][4 * step : 4 * step + 4]]
        assert sorted(one) == sorted(two)
