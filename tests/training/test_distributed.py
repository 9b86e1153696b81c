"""One process is a group of one, so every sampler of timm works in it."""

import pytest
import torch
import torch.distributed as dist
from timm.data import create_loader

from container.training import Digits, join_group


@pytest.fixture
def group():
    assert join_group("cpu") == torch.device("cpu")
    yield
    dist.destroy_process_group()


def test_group_of_one(group):
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)


def test_repeated_augmentation_covers_the_data_in_one_process(group):
    """An epoch is as many samples as there are images, of a third of them; epochs differ, and reach all."""
    digits = Digits(train=True)
    loader = create_loader(
        digits, 32, 32, is_training=True, num_aug_repeats=3, num_workers=0, distributed=True, device=torch.device("cpu")
    )
    seen = set()
    for epoch in range(60):
        loader.sampler.set_epoch(epoch)
        indices = list(loader.sampler)
        assert len(indices) == 1437 // 256 * 256 and len(set(indices)) == -(-len(indices) // 3)
        seen.update(indices)
    assert len(seen) == len(digits)
