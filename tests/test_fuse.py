"""Fused models give the answers of the models that they come from."""

import pytest
import timm
import torch
from conftest import randomize

from container.aggregation import ConvexGate
from container.detection import feature_pyramid
from container.fuse import FusedBlock, fuse

NAMES = timm.list_models("container*")


def model(name, **kwargs):
    """A member with nothing at its initial value: statistics, scales, gates."""
    return randomize(timm.create_model(name, num_classes=10, **kwargs)).eval()


def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_same_answers(name, seed):
    torch.manual_seed(seed)
    tied = timm.get_pretrained_cfg(name).fixed_input_size
    unfused = model(name, **(dict(img_size=(64, 96)) if tied else {}))
    x = torch.randn(2, 3, 64, 96) if tied else torch.randn(2, 3, *torch.randint(33, 120, (2,)).tolist())
    before = {key: value.clone() for key, value in unfused.state_dict().items()}
    fused = fuse(unfused)
    assert difference(fused(x), unfused(x)) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in unfused.state_dict().items())  # a copy
    kinds = {type(m).__name__ for m in fused.modules()}
    assert "FusedBlock" in kinds and not kinds & {"Block", "BatchNorm2d", "ConvexGate", "FreeGate"}


@torch.no_grad()
def test_in_double_the_difference_vanishes():
    unfused = model("container_nano").double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert difference(fuse(unfused)(x), unfused(x)) < 1e-13


@torch.no_grad()
def test_by_timm_and_for_features():
    unfused = model("container_light_nano")
    x = torch.randn(2, 3, 65, 97)
    assert difference(timm.models.reparameterize_model(unfused)(x), unfused(x)) < 1e-5
    features = randomize(timm.create_model("container_light_nano", features_only=True)).eval()
    for fused in (fuse(features), timm.models.reparameterize_model(features)):
        assert sum(isinstance(m, FusedBlock) for m in fused.modules()) == 13
        for found, expected in zip(fused(x), features(x)):
            assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("logit", [-40.0, -8.0, 0.0, 8.0, 40.0])
@torch.no_grad()
def test_gates_near_their_ends(logit):
    unfused = model("container_light_nano")
    for module in unfused.modules():
        if isinstance(module, ConvexGate):
            module.logit.fill_(logit)
    x = torch.randn(2, 3, 64, 64)
    assert difference(fuse(unfused)(x), unfused(x)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        dict(norm_layer="groupnorm1"),
        dict(output_stride=8),
        dict(dynamic="context"),
    ]
    + [dict(global_pool=pool) for pool in ("max", "catavgmax")]
    + [dict(depths=(1, 1, 1, 1), static="matrix", dynamic="attention", gate="free", img_size=64)],
)
@torch.no_grad()
def test_other_settings(options):
    """Norms that are not affine stay, and so does the last one in front of any other pooling than a mean."""
    unfused = model("container_light_nano", **options)
    x = torch.randn(2, 3, 64, 64)
    assert difference(fuse(unfused)(x), unfused(x)) < 1e-5


@torch.no_grad()
def test_under_a_detector():
    """Batch norms that are frozen already are folded like others."""
    pyramid = randomize(feature_pyramid("container_light_nano", out_channels=8, norm="frozen")).eval()
    fused, x = fuse(pyramid), torch.randn(1, 3, 65, 97)
    assert not any(type(m).__name__ == "FrozenBatchNorm2d" for m in fused.modules())
    for found, expected in zip(fused(x).values(), pyramid(x).values()):
        assert difference(found, expected) < 1e-5


def test_training_mode_is_refused():
    for unfused in (timm.create_model("container_light_nano"), timm.create_model("container_light_nano").stages[0]):
        with pytest.raises(ValueError, match="call eval"):
            fuse(unfused)
    with pytest.raises(ValueError, match="call eval"):
        timm.models.reparameterize_model(timm.create_model("container_light_nano"))
