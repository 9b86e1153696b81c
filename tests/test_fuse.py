"""Fused models give the answers of the models that they come from."""

import copy
import pickle
import statistics

import pytest
import timm
import torch
from conftest import randomize
from sklearn.datasets import load_sample_image
from test_container import SMALL
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from container import Affinity, Aggregation, Block, ConvexGate, DepthwiseConv, FreeGate, SelfAttention
from container.detection import feature_pyramid
from container.fuse import as_linear, fuse

NAMES = timm.list_models("container*")


def model(name, **kwargs):
    """A member with nothing at its initial value: statistics, scales, gates."""
    return randomize(timm.create_model(name, **{"num_classes": 10, **kwargs})).eval()


def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def left(network):
    """What of norms and gates is left in the blocks of a network."""
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    assert blocks
    kinds = {type(module).__name__ for block in blocks for module in block.modules()}
    return kinds & {"BatchNorm2d", "FrozenBatchNorm2d", "GroupNorm1", "ConvexGate", "FreeGate"}


WHOLE = ("container_light", "container_nano", "container_pam")  # at their own width; all others small


@pytest.mark.parametrize("name, sizes", [(name, SMALL) for name in NAMES] + [(name, {}) for name in WHOLE])
@torch.no_grad()
def test_same_answers(name, sizes):
    tied = timm.get_pretrained_cfg(name).fixed_input_size
    unfused = model(name, **sizes, **(dict(img_size=(64, 96)) if tied else {}))
    x = torch.randn(2, 3, 64, 96) if tied else torch.randn(2, 3, *torch.randint(33, 120, (2,)).tolist())
    before = {key: value.clone() for key, value in unfused.state_dict().items()}
    fused = fuse(unfused)
    assert difference(fused(x), unfused(x)) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in unfused.state_dict().items())  # a copy
    assert not left(fused)
    assert torch.equal(fuse(fused)(x), fused(x))  # once is enough


@torch.no_grad()
def test_every_output_is_the_model_s():
    unfused = model("container_light_nano")
    fused, x = fuse(unfused), torch.randn(2, 3, 65, 97)
    assert difference(fused.forward_features(x), unfused.forward_features(x)) < 1e-5
    found, expected = (m.forward_head(m.forward_features(x), pre_logits=True) for m in (fused, unfused))
    assert difference(found, expected) < 1e-5
    for norm in (False, True):
        (last, maps), (expected_last, expected_maps) = (m.forward_intermediates(x, norm=norm) for m in (fused, unfused))
        for found, expected in zip([last, *maps], [expected_last, *expected_maps]):
            assert difference(found, expected) < 1e-5
    for network in (fused, unfused):
        network.reset_classifier(0)
    assert difference(fused(x), unfused(x)) < 1e-5
    for network in (fused, unfused):
        torch.manual_seed(0)
        network.reset_classifier(7)
    assert difference(fused(x), unfused(x)) < 1e-5


@pytest.mark.parametrize(
    "name, options, pointwise",
    [
        ("container_nano", dict(depths=(1, 1, 1, 1)), 4 * 5),
        pytest.param("container_nano", {}, 13 * 5, marks=pytest.mark.slow),
        ("resnet18", {}, 0),
    ],
)
def test_1x1_convolutions_as_linear_layers(name, options, pointwise):
    """The answers and gradients of the same parameters, by products; compilers and exporters see convolutions.

    The 1x1 convolutions of resnet18 have a stride, so they stay.
    """
    plain = timm.create_model(name, num_classes=10, **options).eval()
    other, x = copy.deepcopy(plain), torch.randn(2, 3, 64, 64)
    as_linear(other)
    for network in (plain, other):
        nn.functional.cross_entropy(network(x), torch.tensor([3, 5])).backward()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    for network in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        with torch.no_grad():
            graph = str(make_fx(network)(x).graph)
        assert graph.count("aten.addmm.default") == pointwise + 1  # the classifier
    exported = str(torch.export.export(other, (x,)).graph)
    assert exported.count("aten.conv2d.default") == sum(isinstance(m, nn.Conv2d) for m in plain.modules())


@torch.no_grad()
def test_a_linear_layer_takes_what_its_convolution_takes():
    conv = nn.Conv2d(4, 6, 1, bias=False)
    other = copy.deepcopy(conv)
    as_linear(other)
    for shape in ((2, 4, 5, 7), (4, 5, 7), (2, 4, 1, 1), (0, 4, 5, 7)):
        x = torch.randn(shape)
        torch.testing.assert_close(other(x), conv(x))


def test_weights_are_channels_last():
    fused = fuse(model("container_light_nano"))
    dense = [m for m in fused.modules() if isinstance(m, nn.Conv2d) and m.weight[0].numel() > m.weight.shape[1] > 1]
    assert len(dense) == 4  # the patch embeddings; elsewhere both formats are one
    assert all(m.weight.stride(1) == 1 for m in dense)


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
        assert not left(fused)
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
        dict(dynamic="double"),
    ]
    + [dict(global_pool=pool) for pool in ("max", "catavgmax")]
    + [dict(depths=(1, 1, 1, 1), static="matrix", dynamic="attention", gate="free", img_size=64)],
)
@torch.no_grad()
def test_other_settings(options):
    """Norms that are not affine stay."""
    unfused = model("container_light_nano", **options)
    x = torch.randn(2, 3, 64, 64)
    assert left(fuse(unfused)) == ({"GroupNorm1"} if "norm_layer" in options else set())
    assert difference(fuse(unfused)(x), unfused(x)) < 1e-5


@torch.no_grad()
def test_under_a_detector():
    """Batch norms that are frozen already are folded like others."""
    pyramid = randomize(feature_pyramid("container_light_nano", out_channels=8, norm="frozen")).eval()
    fused, x = fuse(pyramid), torch.randn(1, 3, 65, 97)
    assert not left(fused)
    for found, expected in zip(fused(x).values(), pyramid(x).values()):
        assert difference(found, expected) < 1e-5


def test_training_mode_is_refused():
    for unfused in (timm.create_model("container_light_nano"), timm.create_model("container_light_nano").stages[0]):
        with pytest.raises(ValueError, match="call eval"):
            fuse(unfused)


@torch.no_grad()
def test_timm_rewrites_a_model_that_is_not_yet_in_evaluation_mode():
    """As validate.py, benchmark.py and onnx_export.py do with --reparam; the model itself goes on training."""
    unfused = randomize(timm.create_model("container_light_nano"))
    fused = timm.models.reparameterize_model(unfused)
    assert all(module.training for module in unfused.modules()) and not left(fused)
    x = torch.randn(2, 3, 64, 64)
    assert difference(fused.eval()(x), unfused.eval()(x)) < 1e-5


def test_gradients_of_a_fused_model():
    torch.manual_seed(0)
    unfused = model("container_light_nano")
    found, expected = (torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    for network, x in ((fuse(unfused), found), (unfused, expected)):
        network(x.requires_grad_()).sum().backward()
    assert difference(found.grad, expected.grad) < 1e-4


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_derivatives(frozen, monkeypatch):
    """Also where no parameter wants a gradient; a finite difference says what is right."""
    unfused = model("container_conv", depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64)).double()
    fused = fuse(unfused).requires_grad_(not frozen)
    x, d = torch.randn(2, 1, 3, 64, 64, dtype=torch.float64)
    _, found = torch.func.jvp(fused, (x,), (d,))
    expected = (unfused(x + 1e-5 * d) - unfused(x - 1e-5 * d)) / 2e-5
    assert difference(found, expected) < 1e-6


def test_make_fx_records_portable_operators():
    fused, x = fuse(model("container_light_nano")), torch.randn(2, 3, 64, 64)
    graph = make_fx(fused)(x)
    assert "mkldnn" not in graph.code and difference(graph(x), fused(x)) < 1e-6


@pytest.mark.slow
@torch.no_grad()
def test_bfloat16_loses_nothing_to_fusing():
    """Packaged weights on pieces of photos: on average, the error in bfloat16 is that of the unfused model.

    One file has 0.9 of it, another 1.07: how weights round is chance.
    """
    photos = [torch.tensor(load_sample_image(name)).permute(2, 0, 1)[:, :384] for name in ("china.jpg", "flower.jpg")]
    ratios = []
    for name in ("nano_32.cifar10", "nano.trashnet", "nano.lite2_dist"):
        unfused = timm.create_model(f"container_light_{name}", pretrained=True).eval()
        mean, std = (torch.tensor(unfused.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        side = unfused.pretrained_cfg["input_size"][-1]
        pieces = [p.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1) for p in photos]
        x = (torch.cat(pieces) / 255 - mean) / std  # (N, 3, side, side)
        expected = unfused(x)
        own, fused = (
            (copy.deepcopy(network).bfloat16()(x.bfloat16()).float() - expected).square().mean().sqrt().item()
            for network in (unfused, fuse(unfused))
        )
        ratios.append(fused / own)
    assert statistics.geometric_mean(ratios) < 1.05, ratios


# --------------------------------------------------------------------------------------------- what is left as it is


class RowMean(Affinity):
    """A static affinity of one's own: every token reads the mean of its row."""

    num_heads = 1

    def forward(self, x, v):
        return v.mean(dim=-1, keepdim=True).expand_as(v)


class Wrapped(Affinity):
    """A dynamic affinity of one's own, around attention that it says nothing of."""

    num_heads = 2

    def __init__(self, dim):
        super().__init__()
        self.inner = SelfAttention(dim, 2)

    def forward(self, x, v):
        return self.inner(x.roll(1, -1), v)


class Shifted(SelfAttention):
    """A subclass with another `forward`, of which what its parent says of readers is not true."""

    def forward(self, x, v):
        return super().forward(x, v) + x


class Doubled(DepthwiseConv):
    """Likewise: scaling its kernel does not scale all of it."""

    def forward(self, x, v):
        return super().forward(x, v) + v


class Biased(SelfAttention):
    """A dynamic affinity with a bias, which alpha scales."""

    bias = property(lambda self: torch.ones(16))
    readers = SelfAttention.readers

    def forward(self, x, v):
        return super().forward(x, v) + 1


class Foreign(nn.Module):
    """Attention that derives from nothing of ours."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(16, 16, 1)

    def forward(self, x, v):
        return self.mix(x) + v


AGGREGATIONS = {
    "static of one's own": lambda: Aggregation(16, SelfAttention(16, 2), RowMean(), FreeGate()),
    "static of one's own alone": lambda: Aggregation(16, static=RowMean()),
    "dynamic of one's own": lambda: Aggregation(16, Wrapped(16), DepthwiseConv(16), FreeGate()),
    "dynamic of one's own, no gate": lambda: Aggregation(16, Wrapped(16)),
    "subclass, dynamic": lambda: Aggregation(16, Shifted(16, 2), DepthwiseConv(16), ConvexGate()),
    "subclass, static": lambda: Aggregation(16, SelfAttention(16, 2), Doubled(16), ConvexGate()),
    "dynamic with a bias": lambda: Aggregation(16, Biased(16, 2), DepthwiseConv(16), ConvexGate()),
    "no affinity": lambda: Aggregation(16, Foreign(), DepthwiseConv(16), ConvexGate()),
    "another module": lambda: nn.Conv2d(16, 16, 3, padding=1),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
@torch.no_grad()
def test_aggregations_of_one_s_own(name):
    block = randomize(Block(16, AGGREGATIONS[name]())).double().eval()
    x = torch.randn(2, 16, 6, 7, dtype=torch.float64)
    expected = block(x)
    fused = copy.deepcopy(block).fuse()
    assert difference(fused(x), expected) < 1e-13
    assert isinstance(fused.norm2, nn.Identity)  # the MLP's is folded all the same


class Adapter(nn.Module):
    """A frozen layer and a low-rank addition, as adapter libraries have it: weight and bias are the frozen one's."""

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 4, 1, bias=False)
        self.up = nn.Conv2d(4, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Loud(nn.Conv2d):
    """A subclass that does more than its weight says."""

    def forward(self, x):
        return super().forward(x).tanh()


def loud(layer):
    new = Loud(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding, groups=layer.groups)
    new.load_state_dict(layer.state_dict())
    return new


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: output.sigmoid())
    return layer


def rerouted(layer):
    """As libraries do that move weights to the device when they are needed."""
    forward = layer.forward
    layer.forward = lambda x: forward(x).cos()
    return layer


WRAPPERS = dict(
    adapter=Adapter,
    subclass=loud,
    weight_norm=parametrizations.weight_norm,
    spectral_norm=parametrizations.spectral_norm,
    old_spectral_norm=nn.utils.spectral_norm,
    hook=hooked,
    forward=rerouted,
)
DENSE = ["mlp.fc1", "mlp.fc2", "aggregation.value", "aggregation.proj", "aggregation.dynamic.qk"]
DEPTHWISE = ["aggregation.static.conv", "pos_conv"]
LAYERS = [
    ("norm1", ("hook", "forward")),
    *((name, [wrapper for wrapper in WRAPPERS if wrapper != "adapter"]) for name in DEPTHWISE),
    *((name, WRAPPERS) for name in DENSE),
]


@pytest.mark.parametrize(("layer", "wrapper"), [(layer, one) for layer, wrappers in LAYERS for one in wrappers])
@torch.no_grad()
def test_layers_that_are_more_than_their_weight(layer, wrapper):
    unfused = model("container_nano", depths=(1, 1, 1, 1))
    for stage in unfused.stages:
        parent, _, name = f"blocks.0.{layer}".rpartition(".")
        owner = stage.get_submodule(parent)
        setattr(owner, name, WRAPPERS[wrapper](getattr(owner, name)))
    unfused = randomize(unfused).eval()
    x = torch.randn(2, 3, 64, 64)
    assert difference(fuse(unfused)(x), unfused(x)) < 1e-5


def test_hooks_see_what_they_saw():
    """An activation that is looked at inside a block is that of the model: the block is left alone."""
    unfused = model("container_light_nano")
    seen = []
    unfused.stages[0].blocks[0].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(1, 3, 64, 64)
    for network in (unfused, fuse(unfused)):
        network(x)
    assert len(seen) == 2 and difference(seen[1], seen[0]) < 1e-6


def test_norms_in_training_mode_are_left():
    unfused = model("container_light_nano")
    for block in unfused.stages[0].blocks:
        block.norm1.train()
    fused, x = fuse(unfused), torch.randn(4, 3, 64, 64)
    assert difference(fused(x), unfused(x)) < 1e-5


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
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace", "fx", "export", "compile"])
@torch.no_grad()
def test_what_traces_records_portable_layers(how):
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
    assert "gelu" in graph
    assert difference(traced(x), unfused(x)) < 1e-5


@torch.no_grad()
def test_flops_are_counted_as_before():
    unfused = timm.create_model("container_light_nano").eval()
    counts = []
    for network in (unfused, fuse(unfused)):
        with FlopCounterMode(display=False) as counter:
            network(torch.randn(1, 3, 64, 64))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
