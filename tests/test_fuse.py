"""Fused models give the answers of the models that they come from."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import container.fuse
from container.aggregation import ConvexGate
from container.detection import feature_pyramid
from container.fuse import ConvGELU, FusedBlock, fuse

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
def test_maps_are_channels_last():
    fused = fuse(model("container_light_nano"))
    for x in (torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)):
        assert fused.forward_features(x).is_contiguous(memory_format=torch.channels_last)


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


def pair(dim=24, hidden=96):
    conv = nn.Conv2d(dim, hidden, 1)
    return conv, ConvGELU(conv).eval()


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 24, 1, 1), (2, 24, 7, 9), (3, 24, 56, 56)])
@torch.no_grad()
def test_gelu_in_the_convolution(shape, memory_format, scale):
    torch.manual_seed(0)
    conv, one = pair()
    x = (torch.randn(shape) * scale).to(memory_format=memory_format)
    expected = F.gelu(conv.double()(x.double()))
    conv.float()
    assert (one(x) - expected).abs().max() < 2e-6 * max(1.0, expected.abs().max())


def test_the_kernel_is_used_where_it_is_to_be_had(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    _, one = pair()
    x = torch.randn(1, 24, 8, 8)

    def kernels():
        with torch.profiler.profile() as profile:
            one(x)
        return {event.key for event in profile.key_averages()}

    with torch.no_grad():
        assert "mkldnn::_convolution_pointwise" in kernels() and "aten::gelu" not in kernels()
        with torch.autocast("cpu", torch.bfloat16):
            assert "aten::gelu" in kernels()
    assert "aten::gelu" in kernels()  # the weights want gradients
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert "aten::gelu" in kernels()
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(container.fuse, "_has_conv_gelu", lambda: False)
        assert "aten::gelu" in kernels()


def test_gradients_of_a_fused_model():
    torch.manual_seed(0)
    unfused = model("container_light_nano")
    found, expected = (torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    for network, x in ((fuse(unfused), found), (unfused, expected)):
        network(x.requires_grad_()).sum().backward()
    assert difference(found.grad, expected.grad) < 1e-4


@torch.no_grad()
def test_other_types():
    torch.manual_seed(0)
    unfused = model("container_light_nano")
    x = torch.randn(2, 3, 64, 64)
    expected = unfused(x)
    fused = fuse(unfused)
    assert difference(copy.deepcopy(fused).bfloat16()(x.bfloat16()).float(), expected) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(fused(x).float(), expected) < 0.1
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), fused(x))


# TracerWarning: of the checks of an image's size, as in timm's own models.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace", "fx", "export", "compile"])
@torch.no_grad()
def test_what_traces_records_portable_layers(how):
    """No graph has the CPU's own kernel in it; each gives the model's answers."""
    torch.manual_seed(0)
    unfused = model("container_light_nano")
    fused, x = fuse(unfused), torch.randn(2, 3, 64, 64)
    graph = ""
    if how == "script":
        traced = torch.jit.script(fused)
        graph = str(traced.inlined_graph)
    elif how == "trace":
        traced = torch.jit.trace(fused, x)
        graph = str(traced.inlined_graph)
    elif how == "fx":
        traced = torch.fx.symbolic_trace(fused.stages[0].blocks)
        x = torch.randn(2, 16, 8, 8)
        unfused, graph = unfused.stages[0].blocks, str(traced.graph)
    elif how == "export":
        program = torch.export.export(fused, (x,))
        traced, graph = program.module(), str(program.graph)
    else:
        seen = []

        def backend(module, inputs):
            seen.append(str(module.graph))
            return module

        torch._dynamo.reset()
        traced = torch.compile(fused, backend=backend, fullgraph=True)
        traced(x)
        graph = "".join(seen)
    assert "mkldnn" not in graph and "gelu" in graph
    assert difference(traced(x), unfused(x)) < 1e-5


@torch.no_grad()
def test_flops_are_counted_as_before():
    unfused = timm.create_model("container_light_nano").eval()
    counts = []
    for network in (unfused, fuse(unfused)):
        network(torch.randn(1, 3, 64, 64))  # whether a kernel is to be had is tried once, at the first call
        with FlopCounterMode(display=False) as counter:
            network(torch.randn(1, 3, 64, 64))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(("act", "fused"), [("gelu", True), (nn.GELU, True), ("gelu_tanh", False), ("relu", False)])
@torch.no_grad()
def test_activations(act, fused):
    torch.manual_seed(0)
    unfused = model("container_light_nano", act_layer=act)
    x = torch.randn(1, 3, 64, 64)
    assert any(isinstance(m, ConvGELU) for m in fuse(unfused).modules()) == fused
    assert difference(fuse(unfused)(x), unfused(x)) < 1e-5
