"""The network and the family: counts, sizes, timm's contract where timm's own suite does not look, released weights."""

import argparse
import copy
import importlib.util
import json

import numpy as np
import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, randomize
from timm.layers import make_divisible, set_fused_attn
from timm.models import save_for_hf
from timm.models._input import get_model_input_config, get_model_traits
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_weight_decay
from torch.utils.flop_counter import FlopCounterMode

from container import Aggregation, Block, Container, SelfAttention
from container.container import checkpoint_filter_fn, from_released
from container.predict import class_names

NAMES = timm.list_models("container*")
FIXED = [n for n in NAMES if timm.get_pretrained_cfg(n).fixed_input_size]
FREE = [n for n in NAMES if n not in FIXED]

# One block per stage and few channels, for what does not depend on size.
SMALL = dict(depths=(1, 2, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), num_classes=7)

DATA = ROOT / "tests" / "data"  # the authors' answers; synthetic_checkpoint.py says what they are

# Members that differ in depth, width and MLP ratio alone from another; SMALL makes them that other one.
TWINS = dict(
    container_nano="container",
    container_light_mlp4="container_light_nano",
    container_light_tiny="container_light_nano",
    container_light_base="container_light_nano",
)

every = pytest.mark.parametrize("name", NAMES)
every_small = pytest.mark.parametrize("name", [n for n in NAMES if n not in TWINS])
COMPILED = ("container_light", "container_mixer")  # by default; the others' kinds are parts of these, but for a gate
every_kind = pytest.mark.parametrize(
    "name", [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in TWINS]
)


def small(**kwargs):
    return randomize(Container(**{**SMALL, **kwargs})).eval()


def images(*shape):
    return torch.randn(*shape)


# The family


def test_names():
    assert set(NAMES) == {
        *("container", "container_nano", "container_pam"),
        *("container_light", "container_light_mlp4", "container_light_nano", "container_light_tiny"),
        *("container_light_base", "container_light_nano_32"),
        *("container_attention", "container_conv", "container_mixer", "container_mixer_mh"),
    }
    assert timm.list_models(module="container") == NAMES


@pytest.mark.parametrize(
    "name, params, gmacs",
    [
        ("container_light", 20_633_643, 3.848),
        ("container_light_mlp4", 20.008e6, 3.128),
        ("container", 21.81e6, 8.23),
        ("container_light_nano", 1.04e6, 0.154),
        ("container_nano", 1.12e6, 0.961),
        ("container_light_tiny", 6.65e6, 1.06),
        ("container_light_base", 48.56e6, 7.72),
        ("container_pam", 25.88e6, 8.33),
    ],
)
def test_size_and_cost(name, params, gmacs):
    model = timm.create_model(name, device="meta").eval()
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(params, rel=0 if isinstance(params, int) else 5e-3, abs=0)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=2e-4 if gmacs == 3.848 else 3e-3)


@pytest.mark.parametrize("backward", [False, True])
def test_attention_is_counted_on_a_cpu_too(backward):
    """Its two products, and the five of its gradients: PyTorch's counter leaves them out."""
    affinity = SelfAttention(32, 4)
    x, v = torch.randn(1, 32, 8, 8), torch.randn(1, 32, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = affinity(x, v)
        if backward:
            y.sum().backward()
    product, projection = 2 * 64 * 64 * 32, 2 * 64 * 32 * 64
    # The projection's gradient is that of its weight alone: x wants none.
    assert counter.get_total_flops() == (2 * product + projection) + backward * (5 * product + projection)


@pytest.mark.parametrize("name, width", [("nano", 1 / 4), ("tiny", 9 / 16), ("base", 25 / 16)])
def test_scaling_rule(name, width):
    model = timm.create_model(f"container_light_{name}", device="meta")
    assert [f["num_chs"] for f in model.feature_info] == [make_divisible(width * dim, 8) for dim in (64, 128, 320, 512)]


AFFINITIES = {
    "container_light": ([None] * 3 + ["SelfAttention"], ["DepthwiseConv"] * 4),
    "container": (["SelfAttention"] * 4, ["DepthwiseConv"] * 4),
    "container_pam": (["SelfAttention"] * 4, ["TokenMatrix"] * 4),
    "container_attention": (["SelfAttention"] * 4, [None] * 4),
    "container_conv": ([None] * 4, ["DepthwiseConv"] * 4),
    "container_mixer": ([None] * 4, ["TokenMatrix"] * 4),
    "container_mixer_mh": ([None] * 4, ["TokenMatrix"] * 4),
}


@pytest.mark.parametrize("name", AFFINITIES)
def test_affinities_per_stage(name):
    stages = timm.create_model(name, device="meta").stages
    blocks = [stage.blocks[0].aggregation for stage in stages]
    found = [[type(a).__name__ if a is not None else None for a in (b.dynamic, b.static)] for b in blocks]
    assert tuple(map(list, zip(*found))) == AFFINITIES[name]


def test_mixers_have_one_head_or_many_and_low_rank_where_tokens_are_many():
    for name, heads in (("container_mixer", [1] * 4), ("container_mixer_mh", [2, 4, 10, 16])):
        static = [s.blocks[0].aggregation.static for s in timm.create_model(name, device="meta").stages]
        assert [a.num_heads for a in static] == heads
        assert [a.grid for a in static] == [(56, 56), (28, 28), (14, 14), (7, 7)]
        assert [None if a.right is None else a.right.shape[1] for a in static] == [16, 16, None, None]


@every
def test_default_cfg(name):
    cfg = timm.get_pretrained_cfg(name)
    photos = name in ("container_light_nano", "container_light_tiny", "container_nano")  # of our weights
    crops = {"container_light_nano_32": 1.0, **({name: 0.95} if photos else {})}
    assert (cfg.crop_pct, cfg.interpolation) == (crops.get(name, 0.875), "bicubic")
    assert cfg.input_size[1] == (128 if photos else 32 if name == "container_light_nano_32" else 224)
    assert cfg.mean == timm.data.IMAGENET_DEFAULT_MEAN and cfg.std == timm.data.IMAGENET_DEFAULT_STD
    assert cfg.license == {"container_light": "unknown"}.get(name, "other" if photos else "apache-2.0")


# Image sizes


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (97, 130), (50, 224)])
@torch.no_grad()
def test_any_size(name, size):
    model = timm.create_model(name, features_only=True).eval()
    maps = model(images(1, 3, *size))
    for f, channels, r in zip(maps, model.feature_info.channels(), model.feature_info.reduction()):
        assert f.shape == (1, channels, -(-size[0] // r), -(-size[1] // r)) and f.isfinite().all()


@torch.no_grad()
def test_no_pixel_is_lost_at_the_border():
    """The last row and column of an odd image reach the first stage's map."""
    model = small().stem
    x = images(1, 3, 33, 45)
    for index in ((..., 32, 10), (..., 10, 44)):
        changed = x.clone()
        changed[index] += 1
        assert not torch.equal(model(changed), model(x))


@torch.no_grad()
def test_a_padded_size_equals_zeros_around_the_image():
    model = small(norm_layer="layernorm2d")
    x = images(2, 3, 61, 50)
    torch.testing.assert_close(model.stem(x), model.stem(F.pad(x, (0, 2, 0, 3))))


@pytest.mark.parametrize("name", FREE)
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(name):
    model = timm.create_model(name).eval()
    x = images(3, 3, 64, 64)
    torch.testing.assert_close(model(x), torch.cat([model(i[None]) for i in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output_stride, dilation", [(16, 2), (8, 4)])
@pytest.mark.parametrize("size", [(64, 96), (71, 53)])
@torch.no_grad()
def test_output_stride_computes_the_strided_network_at_more_places(output_stride, dilation, size):
    """Where convolutions alone mix, every dilation-th position of the dilated network is the strided network's map."""
    strided = small(dynamic="none")
    dilated = Container(**SMALL, dynamic="none", output_stride=output_stride).eval()
    dilated.load_state_dict(strided.state_dict())
    x = images(1, 3, *size)
    expected, actual = (m.forward_intermediates(x, intermediates_only=True) for m in (strided, dilated))
    assert [f["reduction"] for f in dilated.feature_info] == [min(4 * 2**i, output_stride) for i in range(4)]
    for strided_info, info, a, b in zip(strided.feature_info, dilated.feature_info, expected, actual):
        step = strided_info["reduction"] // info["reduction"]
        torch.testing.assert_close(b[..., ::step, ::step], a)
    assert step == dilation


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["container_light_nano", "container_nano"])
@torch.no_grad()
def test_output_stride_of_a_registered_model(name, output_stride):
    model = timm.create_model(name, features_only=True, output_stride=output_stride).eval()
    maps = model(images(1, 3, 64, 96))
    assert max(model.feature_info.reduction()) == output_stride
    assert [tuple(f.shape[-2:]) for f in maps] == [(64 // r, 96 // r) for r in model.feature_info.reduction()]


@pytest.mark.parametrize("size", [(1, 1), (3, 64), (64, 2)])
@torch.no_grad()
def test_an_image_smaller_than_the_stem_is_one_patch(size):
    """As if zeros had been around it."""
    model, x = small(), images(1, 3, *size)
    height, width = (-(-side // 4) * 4 for side in size)
    padded = F.pad(x, (0, width - size[1], 0, height - size[0]))
    assert torch.equal(model(x), model(padded)) and model.stem(x).shape[-2:] == (height // 4, width // 4)


@pytest.mark.parametrize("name", FIXED)
@torch.no_grad()
def test_token_matrices_are_tied_to_a_size_and_set_input_size_moves_them(name):
    model = timm.create_model(name, img_size=64, **SMALL).eval()
    model(images(1, 3, 64, 64))
    with pytest.raises(AssertionError, match="24 rows of tokens for a TokenMatrix of 16: use set_input_size"):
        model(images(1, 3, 96, 64))
    model.set_input_size((96, 67))
    assert model(images(1, 3, 96, 67)).shape == (1, 7)
    assert get_model_input_config(model)["input_size"] == (3, 96, 67)
    # A network built for the new size has the same keys and shapes.
    direct = timm.create_model(name, img_size=(96, 67), **SMALL)
    direct.load_state_dict(model.state_dict())
    x = images(1, 3, 96, 67)
    assert torch.equal(direct.eval()(x), model(x))


@torch.no_grad()
def test_token_matrices_of_a_checkpoint_are_resampled(tmp_path):
    source = timm.create_model("container_pam", img_size=64, **SMALL).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=7)
    target = timm.create_model("container_pam", pretrained=True, img_size=96, pretrained_cfg_overlay=overlay, **SMALL)
    source.set_input_size(96)
    x = images(1, 3, 96, 96)
    torch.testing.assert_close(target.eval()(x), source(x))


@torch.no_grad()
def test_token_matrices_know_the_grid_that_they_are_for(tmp_path):
    """As many tokens are no proof of it: 64 x 128 pixels have as many as 128 x 64, and 32 x 128 as many as 64 x 64."""
    for size, other in (((64, 128), (128, 64)), ((32, 128), (64, 64)), ((32, 128), (128, 128))):
        source = randomize(timm.create_model("container_pam", img_size=size, **SMALL)).eval()
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        target = timm.create_model("container_pam", img_size=other, **SMALL)
        with pytest.raises(RuntimeError, match=r"size mismatch for stages\.0\.blocks\.0\.aggregation\.static\.left"):
            target.load_state_dict(source.state_dict())
        overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=7)
        target = timm.create_model(
            "container_pam", pretrained=True, img_size=other, pretrained_cfg_overlay=overlay, **SMALL
        )
        source.set_input_size(other)
        x = images(1, 3, *other)
        torch.testing.assert_close(target.eval()(x), source(x))


# Features


@every
@torch.no_grad()
def test_every_way_to_features_gives_the_same_values(name):
    model = randomize(timm.create_model(name)).eval()
    state = model.state_dict()
    size = timm.get_pretrained_cfg(name).input_size[1:] if name in FIXED else (70, 99)
    x = images(1, 3, *size)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(model.forward_head(final), model(x))
    torch.testing.assert_close(model.forward_intermediates(x, norm=True, intermediates_only=True)[-1], final)

    listed = timm.create_model(name, features_only=True)
    listed.load_state_dict({k.replace("stages.", "stages_", 1): v for k, v in state.items()}, strict=False)
    getter = timm.create_model(name, features_only=True, feature_cls="getter")
    getter.load_state_dict({f"model.{k}": v for k, v in state.items()}, strict=False)
    for wrapper in (listed, getter):
        for a, b in zip(wrapper.eval()(x), maps, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_some_features():
    model = small()
    x = images(1, 3, 64, 64)
    maps = model.forward_intermediates(x, intermediates_only=True)
    for indices, expected in ((2, (2, 3)), ([0, 2], (0, 2)), ([-1], (3,))):
        for stop_early in (False, True):
            some = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
            for a, i in zip(some, expected, strict=True):
                assert torch.equal(a, maps[i])
    final, _ = model.forward_intermediates(x, [1], stop_early=True)
    assert torch.equal(final, maps[1])


def test_features_only_has_no_unused_parameter():
    model = timm.create_model("container_light_nano", features_only=True).train()
    sum(f.sum() for f in model(images(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in model.parameters())


# timm's contract


@pytest.mark.slow
@every
def test_init_after_to_empty(name):
    model = timm.create_model(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point():
                t.fill_(float("nan"))
    model.init_weights()
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.05) and not model.head.fc.bias.any()
    fresh = timm.create_model(name)
    for (key, a), b in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert a.isfinite().all(), key
        if a.is_floating_point() and a.numel() > 400:
            torch.testing.assert_close(a.std(), b.std(), rtol=0.2, atol=1e-3, msg=key)
        elif "gate" in key or "norm" in key:
            assert torch.equal(a, b), key


@pytest.mark.parametrize("coarse", [False, True])
def test_layers_for_layer_decay_are_in_order(coarse):
    model = timm.create_model("container_light", device="meta")
    layer = group_parameters(model, model.group_matcher(coarse))
    index = {name: i for i, names in layer.items() for name in names}
    blocks = [index[f"stages.{i}.blocks.{j}.norm1.weight"] for i, d in enumerate((3, 4, 8, 3)) for j in range(d)]
    order = [index["stem.proj.weight"], *sorted(set(blocks)), index["norm.weight"]]
    assert order == sorted(order) and blocks == sorted(blocks)
    assert len(set(blocks)) == (4 if coarse else 18)
    for i in (1, 2, 3):
        assert (
            index[f"stages.{i - 1}.blocks.0.norm1.weight"] < index[f"stages.{i}.downsample.proj.weight"] <= blocks[-1]
        )


def test_weight_decay_exempts_what_the_release_exempts():
    model = timm.create_model("container_light", device="meta")
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    exempt = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in exempt) == (p.ndim == 1), name


@pytest.mark.parametrize("features_only", [False, True])
def test_grad_checkpointing_computes_blocks_twice_and_gradients_once(features_only):
    """Blocks run again in the backward pass, and so do their batch norms, whose statistics move twice, as is said."""
    grads = []
    x = images(2, 3, 64, 64)
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("container_nano", features_only=features_only, drop_path_rate=0.0).train()
        model.set_grad_checkpointing(enable)
        runs, blocks = [], [module for module in model.modules() if isinstance(module, Block)]
        for block in blocks:
            block.register_forward_pre_hook(lambda block, inputs, runs=runs: runs.append(block))
        y = model(x)
        (sum(f.square().mean() for f in y) if features_only else y.square().mean()).backward()
        grads.append([p.grad for p in model.parameters()])
        counts = [runs.count(block) for block in blocks]
        twice = blocks if not features_only else blocks[:-2]  # timm's wrapper keeps what its last module computes
        assert counts == [1 + (enable and block in twice) for block in blocks] and len(blocks) == 13
        assert [int(block.norm1.num_batches_tracked) for block in blocks] == counts
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["container_nano", "container_light_nano"])
@torch.no_grad()
def test_scripted(name):
    model = randomize(timm.create_model(name)).eval()
    scripted = torch.jit.script(model)
    for size in ((64, 64), (33, 71)):
        x = images(2, 3, *size)
        torch.testing.assert_close(scripted(x), model(x))


@torch.no_grad()
def test_scripted_features():
    for feature_cls in ("list", "getter"):
        model = timm.create_model("container_nano", features_only=True, feature_cls=feature_cls).eval()
        x = images(1, 3, 45, 64)
        for a, b in zip(torch.jit.script(model)(x), model(x), strict=True):
            torch.testing.assert_close(a, b)


def exportable(name):
    """A small member, an image, the dimensions left open (a size-bound member's batch alone), and shapes to try."""
    model = randomize(timm.create_model(name, img_size=64, **SMALL)).eval()
    dim = torch.export.Dim
    if name in FIXED:
        return model, images(2, 3, 64, 64), {"x": {0: dim("batch", max=64)}}, [(1, 64, 64), (5, 64, 64)]
    open_dims = {0: dim("batch", max=64), 2: dim("height", min=33, max=4096), 3: dim("width", min=33, max=4096)}
    return model, images(2, 3, 70, 97), {"x": open_dims}, [(1, 64, 64), (3, 101, 67), (2, 70, 256)]


@pytest.mark.parametrize("name", TWINS)
def test_twins(name):
    """At one size the two are one network, so what is tested of one at small sizes holds for the other."""
    one = randomize(timm.create_model(name, **SMALL)).eval()
    other = timm.create_model(TWINS[name], **SMALL).eval()
    other.load_state_dict(one.state_dict())
    x = images(2, 3, 33, 64)
    assert torch.equal(one(x), other(x))
    assert [(key, type(module)) for key, module in one.named_modules()] == [
        (key, type(module)) for key, module in other.named_modules()
    ]


@every_kind
@torch.no_grad()
def test_exported(name):
    model, x, open_dims, shapes = exportable(name)
    exported = torch.export.export(model, (x,), dynamic_shapes=open_dims, strict=False).module()
    for batch, height, width in shapes:
        x = images(batch, 3, height, width)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # torch 2.11's exporter, of itself
@pytest.mark.slow
@pytest.mark.parametrize("name", ["container_light", "container", "container_pam"])
@torch.no_grad()
def test_onnx(name, tmp_path):
    import onnxruntime

    model, x, open_dims, shapes = exportable(name)
    torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=open_dims, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch, height, width in shapes:
        x = images(batch, 3, height, width)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-3, atol=1e-4)


@every_kind
def test_compiled_without_graph_breaks(name):
    model, x, _, _ = exportable(name)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()  # its cache is per line of code, so the members would fill each other's
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for m in (model, compiled):
        m(x).square().mean().backward()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_for_real():
    model = timm.create_model("container_light_nano").train()
    twin = copy.deepcopy(model)
    x = images(2, 3, 64, 64)
    compiled = torch.compile(twin, fullgraph=True)
    for m in (model, compiled):
        m(x).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["container_nano", "container_light_nano"])
@torch.no_grad()
def test_layouts_and_precisions(name):
    model = randomize(timm.create_model(name)).eval()
    x = images(2, 3, 64, 96)
    expected = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
    scale = expected.abs().max()
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - expected).abs().max() < 0.05 * scale
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - expected).abs().max() < 0.05 * scale
    torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_fused_and_plain_attention_agree():
    model = randomize(timm.create_model("container_nano")).eval()
    set_fused_attn(False)
    try:
        plain = timm.create_model("container_nano").eval()
    finally:
        set_fused_attn(True)
    plain.load_state_dict(model.state_dict())
    assert model.stages[0].blocks[0].aggregation.dynamic.fused_attn
    assert not plain.stages[0].blocks[0].aggregation.dynamic.fused_attn
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_attention_forms_no_n_by_n(monkeypatch):
    """No tensor of a forward and backward pass has N x N entries, for maps in either memory format."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    for memory_format in (torch.contiguous_format, torch.channels_last):
        attention = SelfAttention(16, 2)
        x = images(1, 16, 48, 48).to(memory_format=memory_format).requires_grad_()
        with Largest():
            attention(x, x).square().sum().backward()
    assert 0 < largest < (48 * 48) ** 2 / 10


@pytest.mark.parametrize("norm_layer", ["layernorm2d", torch.nn.InstanceNorm2d])
def test_norm_and_activation_of_choice(norm_layer):
    model = Container(**SMALL, norm_layer=norm_layer, act_layer="relu")
    assert not any(isinstance(m, (torch.nn.BatchNorm2d, torch.nn.GELU)) for m in model.modules())
    assert model(images(1, 3, 64, 64)).shape == (1, 7)


def test_frozen_batch_norm_keeps_the_answer():
    model = small()
    frozen = timm.layers.freeze_batch_norm_2d(copy.deepcopy(model)).train()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(frozen(x), model(x))


def test_drop_rates_reach_their_layers():
    rates = dict(drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.4)
    model = Container(**SMALL, dynamic="attention", **rates)
    block = model.stages[3].blocks[-1]
    assert model.head.drop.p == 0.1
    assert block.aggregation.proj_drop.p == block.mlp.drop1.p == block.mlp.drop2.p == 0.2
    assert block.aggregation.dynamic.attn_drop.p == 0.3
    drop_paths = [getattr(b.drop_path1, "drop_prob", 0.0) for s in model.stages for b in s.blocks]
    assert drop_paths == pytest.approx(np.linspace(0, 0.4, 5))


@pytest.mark.parametrize("dynamic", ["context", "double"])
def test_stages_of_another_number(dynamic):
    model = Container(
        depths=(1, 1),
        embed_dims=(8, 16),
        patch_sizes=(4, 4),
        num_heads=2,
        dynamic=(dynamic, "attention"),
        num_classes=3,
    )
    y = model(images(2, 3, 32, 48))
    y.sum().backward()
    assert y.shape == (2, 3) and [f["reduction"] for f in model.feature_info] == [4, 16]
    assert all(p.grad is not None for p in model.parameters())


def test_pooling_of_choice():
    model = small(global_pool="catavgmax")
    x = images(2, 3, 64, 64)
    assert (
        model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size) == (2, 64)
    )
    model.reset_classifier(3, "max")
    assert model.get_classifier().in_features == 32 and model(x).shape == (2, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(embed_dims=(64, 128, 320, 100)), "dim 100 is not divisible by num_heads 16"),
        (dict(embed_dims=(64, 128, 320)), r"embed_dims has 3 entries for 4 stages: \(64, 128, 320\)"),
        (dict(mlp_ratios=(4, 4)), "mlp_ratios has 2 entries for 4 stages"),
        (dict(dynamic=("attention", "none")), "dynamic has 2 entries for 4 stages"),
        (dict(dynamic="conv"), "unknown dynamic affinity 'conv': choose from none, attention, context, double"),
        (dict(static="attention"), "unknown static affinity 'attention': choose from none, conv, matrix"),
        (dict(static="none"), "needs a dynamic affinity, a static one, or both"),
        (dict(gate="sigmoid"), "unknown gate 'sigmoid': choose from convex, free, sum"),
        (dict(output_stride=4), "output_stride 4 is not 8, 16 or 32"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("container_light", device="meta", **arguments)


@every
def test_unknown_argument(name):
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, not_an_argument=1, device="meta")


# Released weights


def load(path, **kwargs):
    return timm.create_model("container_light", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint as the authors' script saves one, with averaged weights that differ and its arguments."""
    state = reference.random_state(1)
    path = tmp_path_factory.mktemp("released") / "container_light.pth"
    ema = {k: torch.zeros_like(v) for k, v in state.items()}
    torch.save(dict(model=state, model_ema=ema, epoch=299, args=argparse.Namespace(model="container_v1_light")), path)
    return state, path


def test_reference_has_the_released_layout():
    shapes = reference.layout()
    assert len(shapes) == 422
    assert {k: list(s) for k, s in shapes.items()} == json.loads((DATA / "layout.json").read_text())


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
@torch.no_grad()
def test_released_checkpoint_gives_the_reference_answers(released, size):
    state, path = released
    x = images(2, 3, *size)
    logits, maps = reference.forward(state, x)
    model = load(path).eval()
    final, intermediates = model.forward_intermediates(x)
    close = dict(rtol=0, atol=2e-4 * logits.abs().max().item())
    torch.testing.assert_close(model.forward_head(final), logits, **close)
    for a, b in zip(intermediates, maps, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 * b.abs().max().item())
    for a, b in zip(load(path, features_only=True).eval()(x), maps, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 * b.abs().max().item())


@torch.no_grad()
def test_reference_answers_to_the_last_digits(released):
    """In double, on an image nearly constant within patches, where every norm's epsilon counts."""
    state = {key: tensor.double() for key, tensor in released[0].items()}
    patches = torch.randn(1, 3, 16, 16, dtype=torch.double).repeat_interleave(4, 2).repeat_interleave(4, 3)
    x = 1e-3 * (patches + 0.01 * torch.randn(1, 3, 64, 64, dtype=torch.double))
    logits, _ = reference.forward(state, x)
    torch.testing.assert_close(load(released[1]).double().eval()(x), logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_released_checkpoint_with_other_channels_and_classes(released):
    state, path = released
    x = images(2, 3, 64, 64)
    headless = load(path, num_classes=5).eval()
    _, maps = reference.forward(state, x)
    torch.testing.assert_close(headless.forward_intermediates(x)[1][-1], maps[-1], rtol=1e-3, atol=1e-3)
    assert headless(x).shape == (2, 5)
    grey = load(path, in_chans=1, num_classes=0).eval()
    weight = state["patch_embed1.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(grey.stem.proj.weight, weight)
    assert load(path, in_chans=4, features_only=True)(images(1, 4, 64, 64))[0].shape == (1, 64, 16, 16)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: dict(model=s), lambda s: {f"module.{k}": v for k, v in s.items()}]
)
def test_released_layout_bare_wrapped_or_parallel(released, wrap, tmp_path):
    state, _ = released
    torch.save(wrap(state), tmp_path / "weights.pth")
    assert torch.equal(load(tmp_path / "weights.pth").head.fc.weight, state["head.weight"])
    # As timm hands over a download: nothing taken off.
    filtered = checkpoint_filter_fn(wrap(state), timm.create_model("container_light", device="meta"))
    assert torch.equal(filtered["head.fc.weight"], state["head.weight"])


def test_weights_are_held_once(released):
    model = load(released[1])
    assert "state_dict" not in model.pretrained_cfg and model.pretrained_cfg["file"] == str(released[1])


def test_authors_answers(tmp_path):
    """Logits, stage means, training loss and gradient norms of the authors' network on a synthetic checkpoint."""
    spec = importlib.util.spec_from_file_location("synthetic", DATA / "synthetic_checkpoint.py")
    synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    golden = np.load(DATA / "golden_light_seed0.npz")
    state = {k: torch.from_numpy(v) for k, v in synthetic.synthetic_state_dict(0).items()}
    torch.save(dict(model=state), tmp_path / "weights.pth")
    x = torch.from_numpy(synthetic.image_batch(0))

    model = load(tmp_path / "weights.pth").eval()
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        logits = torch.from_numpy(golden["logits"])
        torch.testing.assert_close(model.forward_head(final), logits, rtol=0, atol=2e-4 * logits.abs().max().item())
        for i, f in enumerate(maps, start=1):
            stage = torch.from_numpy(golden[f"stage{i}"])
            torch.testing.assert_close(f.mean((0, 2, 3)), stage, rtol=0, atol=2e-4 * stage.abs().max().item())

    loss = F.cross_entropy(model.train()(x), torch.tensor([3, 7]))
    loss.backward()
    assert loss.item() == pytest.approx(golden["train_loss"].item(), rel=1e-4)
    # Our gradients under the released names: the same remap, with Q, K and V put together again.
    grads = {k: p.grad for k, p in model.named_parameters()}
    for key, norm in zip(golden["grad_keys"], golden["grad_norms"], strict=True):
        ours = [grads.pop(k) for k in our_names(str(key), grads)]
        assert torch.cat([g.flatten() for g in ours]).norm().item() == pytest.approx(norm.item(), rel=0.01, abs=1e-6), (
            key
        )
    assert not grads


def our_names(key, grads):
    """Where a released parameter went, found by pushing a marker through the loader's own remap."""
    marked = dict.fromkeys(reference.layout(), torch.zeros(3))
    marked[key] = torch.ones(3)
    return [k for k, v in from_released(marked).items() if v.any() and k in grads]


# Checkpoints that do not fit


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.pop("blocks1.0.norm1.weight"), "1 missing .stages.0.blocks.0.norm1.weight."),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "1 unexpected .extra.weight."),
        (
            lambda s: s.update({"patch_embed2.proj.weight": torch.zeros(128, 32, 2, 2)}),
            r"1 of another shape .stages.1.downsample.proj.weight \(128, 32, 2, 2\) for \(128, 64, 2, 2\)",
        ),
        (lambda s: s.clear(), "missing .stem.proj.weight, stem.proj.bias, ...."),
    ],
)
@pytest.mark.parametrize("kwargs", [dict(), dict(num_classes=5), dict(features_only=True), dict(in_chans=1)])
def test_a_spoilt_checkpoint_is_refused(released, tmp_path, spoil, message, kwargs):
    state = dict(released[0])
    spoil(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"checkpoint does not fit container_light: .*{message}"):
        load(tmp_path / "weights.pth", **kwargs)


def test_a_classifier_of_another_width_is_refused(released, tmp_path):
    """Unless timm is told of it, or leaves the classifier out."""
    state = dict(released[0])
    state["head.weight"], state["head.bias"] = torch.zeros(21, 512), torch.zeros(21)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"head.fc.weight \(21, 512\) for \(1000, 512\)"):
        load(tmp_path / "weights.pth")
    assert load(tmp_path / "weights.pth", num_classes=5).head.fc.out_features == 5
    overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=21)
    model = timm.create_model("container_light", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.head.fc.weight, state["head.weight"])


def test_a_classifier_that_fits_is_kept(released, tmp_path):
    """In either layout, by every route, though the architecture's cfg says 1000 classes."""
    state = dict(released[0])
    state["head.weight"], state["head.bias"] = torch.randn(5, 512), torch.randn(5)
    for kind in ("released", "ours"):
        path, folder = tmp_path / f"{kind}.pth", tmp_path / kind
        torch.save(state if kind == "released" else from_released(state), path)
        for overlay in (dict(file=str(path)), dict(state_dict=torch.load(path)), dict(url=path.as_uri())):
            model = timm.create_model(
                "container_light",
                pretrained=True,
                num_classes=5,
                pretrained_cfg_overlay=overlay,
                cache_dir=folder,
            )
            assert torch.equal(model.head.fc.weight, state["head.weight"]) and model.pretrained_cfg["num_classes"] == 5
            assert torch.equal(model.head.fc.bias, state["head.bias"])
            other = timm.create_model(
                "container_light", pretrained=True, num_classes=6, pretrained_cfg_overlay=overlay, cache_dir=folder
            )
            assert other.head.fc.out_features == 6 and torch.equal(other.norm.weight, model.norm.weight)
    assert torch.equal(load(path, features_only=True).stem.proj.weight, model.stem.proj.weight)
    direct = timm.create_model("container_light", num_classes=5, checkpoint_path=path)
    save_for_hf(direct, str(tmp_path / "folder"), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=5)
    assert torch.equal(direct.head.fc.weight, state["head.weight"]) and torch.equal(
        again.head.fc.bias, direct.head.fc.bias
    )


def test_random_weights_have_no_names_of_classes():
    """Though they are as many as those of the model's weights."""
    drawn = timm.create_model("container_light_nano_32", num_classes=10).eval()
    assert not drawn.pretrained_cfg["label_names"] and class_names(drawn) == [str(i) for i in range(10)]
    assert class_names(timm.create_model("container_light_nano_32", pretrained=True).eval())[0] == "airplane"


def test_labels_of_the_registry_are_not_those_of_another_file(tmp_path):
    model = timm.create_model("container_light_nano_32", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    other = timm.create_model("container_light_nano_32", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(other.head.fc.weight, model.head.fc.weight) and not other.pretrained_cfg.get("label_names")


def test_norms_without_a_count_of_batches_are_whole(released, tmp_path):
    """As frozen ones are saved; torch fills the counts in."""
    state = {key: tensor for key, tensor in released[0].items() if not key.endswith("num_batches_tracked")}
    assert len(state) < len(released[0])
    torch.save(state, tmp_path / "weights.pth")
    assert torch.equal(load(tmp_path / "weights.pth").head.fc.weight, state["head.weight"])


def test_another_architecture_is_refused_and_nothing_is_half_loaded(tmp_path):
    model = timm.create_model("container_light_nano")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for other in (timm.create_model("resnet18").state_dict(), timm.create_model("container_nano").state_dict()):
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="checkpoint does not fit container_light_nano"):
            timm.models.load_checkpoint(
                model,
                str(tmp_path / "other.pth"),
                filter_fn=checkpoint_filter_fn,
            )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_saved_folder_loads_again(tmp_path):
    model = timm.create_model("container_light_nano_32", num_classes=3, in_chans=1).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(2, 1, 32, 32)
    assert torch.equal(again(x), model(x))


@every
@torch.no_grad()
def test_every_member_writes_its_affinities_out(name):
    model = timm.create_model(name, img_size=32, **SMALL).eval()
    x = model.stem(images(1, 3, 32, 32))
    for stage in model.stages:
        x = stage.downsample(x)
        a = stage.blocks[0].aggregation.matrix(x)
        assert isinstance(stage.blocks[0].aggregation, Aggregation)
        assert a.shape[-2:] == (x[0, 0].numel(),) * 2 and a.shape[1] in (1, x.shape[1], x.shape[1] // 8)
        x = stage.blocks(x)


def test_a_new_size_is_recorded_as_timm_records_it(tmp_path):
    """In the traits, in the arguments to create it again, and so in an exported folder; beside timm's own ViT."""
    ours = timm.create_model("container_mixer", img_size=64, **SMALL)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7)
    for model in (ours, theirs):
        model.set_input_size((96, 64))
    traits = [get_model_traits(model) | dict(first_conv=None) for model in (ours, theirs)]
    assert traits[0] == traits[1] and ours.pretrained_cfg["input_size"] == (3, 224, 224)
    assert get_model_input_config(ours)["input_size"] == get_model_input_config(theirs)["input_size"] == (3, 96, 64)
    save_for_hf(ours, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 96, 64)
    assert torch.equal(again(x), ours.eval()(x))


def test_an_exported_folder_comes_back_with_another_head_and_pool(tmp_path):
    model = timm.create_model("container_light_nano", num_classes=3).eval()
    model.reset_classifier(7, "max")
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.num_classes == 7 and again.head.global_pool.pool_type == "max"
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", ["container_light_nano", "container_nano"])
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_pruning_leaves_no_parameter_without_a_gradient(name, index):
    model = timm.create_model(name, num_classes=3)
    model.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
    (feature,) = model.forward_intermediates(torch.randn(2, 3, 64, 64), indices=[index], intermediates_only=True)
    feature.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
