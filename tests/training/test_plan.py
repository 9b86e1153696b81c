"""What a run is going to cost."""

import pytest
import timm
import torch
from torch import nn

from container.training import estimate


def test_memory_of_a_network_that_can_be_counted_by_hand():
    """Autograd keeps the input of each of two layers, and the output of the ReLU, which is the second one's input."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    params = 3 * 8 + 8 + 8 * 5 + 5
    cost = estimate(model, size=16, batch_size=10)
    assert cost["params"] == params
    assert cost["gmacs"] * 1e9 == pytest.approx(16 * 16 * (3 * 8 + 8 * 5))
    kept = 4 * 10 * 16 * 16 * (3 + 8)
    assert cost["gib"] * 2**30 == pytest.approx(4 * 4 * params + kept)
    assert estimate(model, 16, 10, half=True, ema=True)["gib"] * 2**30 == pytest.approx(5 * 4 * params + kept / 2)


@pytest.mark.parametrize("name", ["container_light_nano", "container_nano"])
def test_the_model_is_left_as_it_was_and_memory_is_what_autograd_really_keeps(name):
    """The same count on real tensors, whose storages have addresses. Attention kernels differ in what they keep."""
    model = timm.create_model(name).eval()
    cost = estimate(model, size=64, batch_size=4)
    assert not model.training and next(model.parameters()).device.type == "cpu"
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model.train()(torch.randn(4, 3, 64, 64))
    real = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    del output
    assert cost["gib"] * 2**30 == pytest.approx(16 * cost["params"] + real, rel=0.15)
