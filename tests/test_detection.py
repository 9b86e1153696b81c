"""Backbones under torchvision's detectors."""

import os
import subprocess
import sys
from collections import OrderedDict

import onnxruntime
import pytest
import timm
import torch
from conftest import ROOT, randomize
from timm.models import FeatureInfo, save_for_hf
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from container.detection import FeaturePyramid, feature_pyramid, mask_rcnn, retinanet

OURS = "container_light_nano_32.cifar10"


def targets(images, masks=False):
    boxes = dict(boxes=torch.tensor([[5.0, 5.0, 40.0, 50.0]]), labels=torch.tensor([1]))
    return [dict(boxes, masks=torch.ones(1, *i.shape[1:], dtype=torch.uint8)) if masks else boxes for i in images]


@pytest.mark.parametrize("name", ["container_light_nano", "container_nano", "resnet18"])
@pytest.mark.parametrize("levels, coarser, strides", [(4, 1, [4, 8, 16, 32, 64]), (3, 2, [8, 16, 32, 64, 128])])
@torch.no_grad()
def test_maps_of_a_pyramid(name, levels, coarser, strides):
    pyramid = feature_pyramid(name, levels=levels, coarser=coarser, out_channels=24).eval()
    assert pyramid.reduction == strides and pyramid.out_channels == 24
    maps = pyramid(torch.rand(2, 3, 97, 130))
    assert list(maps) == [str(i) for i in range(levels)] + (["pool"] if coarser == 1 else ["p6", "p7"])
    for level, r in zip(maps.values(), strides):
        assert level.shape == (2, 24, -(-97 // r), -(-130 // r))


@torch.no_grad()
def test_a_pyramid_is_the_fpn_of_the_backbones_maps():
    pyramid = feature_pyramid(OURS, pretrained=True, coarser=0, out_channels=8).eval()
    x = torch.rand(1, 3, 40, 56)
    maps = timm.create_model(OURS, pretrained=True, features_only=True).eval()(x)
    laterals = [conv(m) for conv, m in zip(pyramid.fpn.inner_blocks, maps)]
    up = torch.nn.functional.interpolate(laterals[3], laterals[2].shape[-2:], mode="nearest") + laterals[2]
    torch.testing.assert_close(pyramid(x)["2"], pyramid.fpn.layer_blocks[2](up), rtol=1e-4, atol=1e-4)


def test_norms():
    """Pretrained: fixed statistics and scales. Not pretrained: the model's own, or the one asked for."""

    def norms(**kwargs):
        body = feature_pyramid(OURS, **kwargs).body
        return {type(m).__name__ for m in body.modules() if "Norm" in type(m).__name__} - {"LayerNorm2d"}

    assert norms(pretrained=True) == {"FrozenBatchNorm2d"} == norms(norm="frozen")
    assert norms(pretrained=True, norm="batchnorm2d") == {"BatchNorm2d"} == norms()
    assert norms(norm="groupnorm1") == {"GroupNorm1"}
    x, pyramid = torch.rand(1, 3, 32, 32), feature_pyramid(OURS, pretrained=True)
    before = {key: value.clone() for key, value in pyramid.state_dict().items()}
    sum(level.mean() for level in pyramid(x).values()).backward()
    torch.optim.SGD([p for p in pyramid.parameters() if p.grad is not None], lr=1.0).step()
    changed = {key for key, value in pyramid.state_dict().items() if not torch.equal(value, before[key])}
    assert "body.stages_0.blocks.0.mlp.fc1.weight" in changed and not any(".norm1." in key for key in changed)


@torch.no_grad()
def test_a_layout_with_channels_last_is_turned():
    pyramid = feature_pyramid("test_mambaout", coarser=0, out_channels=8).eval()
    x = torch.rand(1, 3, 96, 64)
    maps = pyramid.body(x)
    assert maps[3].shape == (1, 3, 2, 64) and pyramid(x)["3"].shape == (1, 8, 3, 2)
    maps = OrderedDict((str(i), m.permute(0, 3, 1, 2)) for i, m in enumerate(maps))
    for key, value in pyramid.fpn(maps).items():
        torch.testing.assert_close(pyramid(x)[key], value)


# With stochastic depth if they have it. All wrappers of timm's: lists, getters, hooks, and those of two families.
PLAIN = ["test_byobnet", "ese_vovnet19b_slim_dw", "ghostnet_050", "efficientvit_b0", "densenet121", "vgg11"]
QUICK = ["container_light_nano", "container_nano", "resnet18", "test_efficientnet", "test_mambaout", "cspnext_tiny"]
OTHERS = [
    "container_conv", "container_light", "efficientnet_b0", "mobilenetv3_large_100", "convnext_tiny", "resnet50",
    "pvt_v2_b0", "mambaout_femto", "regnety_002", "xception41p", "mobilenetv4_conv_small_035", "sam2_hiera_tiny",
    "davit_tiny", "edgenext_xx_small", "fastvit_t8", "hgnetv2_b0", "mobilevit_xxs", "rexnet_100", "nextvit_small",
    "tiny_vit_5m_224", "test_nfnet", *PLAIN,
]  # fmt: skip


@pytest.mark.parametrize(
    "frozen", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_frozen_stages_stay_as_they_are(name, frozen):
    """Parameters, statistics and answers, whatever becomes of the rest; and the rest is trained.

    What a level depends on: the gradients of a second model, which returns this level only.
    """
    pyramid = feature_pyramid(
        name, levels=3, out_channels=8, frozen_stages=frozen, drop_path_rate=0.0 if name in PLAIN else 0.5
    )
    body = randomize(pyramid).body
    alone = timm.create_model(name, features_only=True, out_indices=(frozen - 1,)).eval()

    def level(x):
        alone.load_state_dict({key: body.state_dict()[key] for key in alone.state_dict()})
        return alone(x)[0]

    x = torch.rand(2, 3, 96, 96)
    before = level(x)
    before.square().sum().backward()
    expected = {key for key, p in alone.named_parameters() if p.grad is not None}
    assert {key for key, p in body.named_parameters() if not p.requires_grad} == expected
    pyramid.eval().train()
    sum(m.square().mean() for m in pyramid(x).values()).backward()
    assert all((p.grad is None) == (key in expected) for key, p in body.named_parameters())
    torch.optim.SGD(pyramid.parameters(), lr=0.1, weight_decay=0.1).step()
    with torch.no_grad():
        for p in pyramid.parameters():
            p.add_(torch.randn_like(p) * p.requires_grad)
        assert torch.equal(level(x), before)
        torch.testing.assert_close(body(x)[body.feature_info.out_indices.index(frozen - 1)], before)


def test_nothing_is_frozen_unless_asked_for():
    """And the trial pass leaves no trace: parameters, statistics and random numbers after it are as without it."""
    for name in ("container_light_nano", "container_nano", "resnet18"):
        torch.manual_seed(1)
        pyramid = feature_pyramid(name, coarser=2, out_channels=8, drop_path_rate=0.1)
        torch.manual_seed(1)
        body = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1), drop_path_rate=0.1)
        fpn = FeaturePyramidNetwork(body.feature_info.channels(), 8, LastLevelP6P7(8, 8))
        assert all(p.requires_grad for p in pyramid.parameters()) and all(m.training for m in pyramid.modules())
        for ours, theirs in ((pyramid.body, body), (pyramid.fpn, fpn)):
            for (key, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
                assert torch.equal(a, b), key


def test_a_frozen_level_of_a_body_of_ones_own():
    """What has no parameters is frozen too: statistics and noise between the levels, wherever they are."""

    class Body(torch.nn.Module):
        def __init__(self, out_indices):
            super().__init__()
            self.last = torch.nn.Conv2d(8, 8, 3, 2, 1)  # the order here is not the order of the calls
            self.noise, self.more_noise = torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)
            self.norm, self.first = torch.nn.BatchNorm2d(8, affine=False), torch.nn.Conv2d(1, 8, 3, 2, 1)
            self.shift = torch.nn.Parameter(torch.zeros(8, 1, 1))
            self.in_chans = 1
            levels = [dict(num_chs=8, reduction=2, module="first"), dict(num_chs=8, reduction=4, module="last")]
            self.feature_info = FeatureInfo(levels, out_indices)

        def forward(self, x):
            first = self.noise(self.norm(self.first(x) + self.shift))
            maps = [first, self.last(self.more_noise(first))]
            return [maps[i] for i in self.feature_info.out_indices]

    pyramid = FeaturePyramid(Body((0, 1)), 8, frozen_stages=1)
    x = torch.rand(2, 1, 32, 32)
    first, last = pyramid.body(x)
    assert {key for key, p in pyramid.body.named_parameters() if p.requires_grad} == {"last.weight", "last.bias"}
    assert torch.equal(pyramid.body(x)[0], first) and not torch.equal(pyramid.body(x)[1], last)
    assert pyramid.body.norm.num_batches_tracked == 0
    assert FeaturePyramid(Body((0, 1)), 8, levels=1).reduction == [4]
    with pytest.raises(ValueError, match=r"frozen_stages 1 is not in \[0, 2\], the levels of the backbone"):
        FeaturePyramid(Body((1,)), 8, frozen_stages=1)


@pytest.mark.parametrize(
    "name",
    ["container_light_nano", *(pytest.param(n, marks=pytest.mark.slow) for n in ("container_light", "container"))],
)
@pytest.mark.parametrize("build", [retinanet, mask_rcnn])
def test_detectors_train_and_detect(name, build):
    """Images of different, odd sizes in one batch; every trained parameter gets a gradient."""
    model = build(name, 3, min_size=64, max_size=96, out_channels=16, frozen_stages=1, norm="frozen")
    images = [torch.rand(3, 61, 85), torch.rand(3, 90, 47)]
    sum(model(images, targets(images, build is mask_rcnn)).values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.backbone.body.parameters())
    found = model.eval()(images)
    assert len(found) == 2 and all(f["boxes"].shape[1] == 4 for f in found)
    assert model.transform.image_mean == timm.get_pretrained_cfg(name).mean


@pytest.mark.parametrize("build", [retinanet, mask_rcnn])
def test_a_detector_on_a_folder_has_the_folder_s_statistics(tmp_path, build):
    """timm knows no cfg for the name of a folder; the backbone has it."""
    model = timm.create_model("container_light_nano", num_classes=3)
    model.pretrained_cfg.update(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    save_for_hf(model, tmp_path / "light", safe_serialization=True)
    for pretrained in (False, True):
        detector = build(f"local-dir:{tmp_path / 'light'}", 3, pretrained=pretrained, min_size=64, out_channels=16)
        assert [*detector.transform.image_mean, *detector.transform.image_std] == [0.5, 0.4, 0.3, 0.1, 0.2, 0.3]
    save_for_hf(timm.create_model("container_mixer", img_size=64), tmp_path / "mixer", safe_serialization=True)
    with pytest.raises(ValueError, match=r"mixer is tied to one image size"):
        build(f"local-dir:{tmp_path / 'mixer'}", 3)


def test_detectors_fit_their_strides():
    """Anchors follow the strides, also of a backbone that begins at stride 1."""
    model = retinanet("container_light_nano", 3)
    assert model.anchor_generator.sizes[0] == (32, 40, 50) and model.anchor_generator.sizes[4] == (512, 645, 812)
    assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)
    model = mask_rcnn("container_light_nano_32", 3)
    assert model.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))


@pytest.mark.slow
def test_a_detector_with_pretrained_weights_learns_a_box():
    model = retinanet(OURS, 2, min_size=64, max_size=64, out_channels=16, levels=2, pretrained=True)
    images = [0.7 + 0.05 * torch.randn(3, 64, 64)]  # not pure noise, which frozen norms of photos make slow to learn
    images[0][:, 5:50, 5:40] *= 0.2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = sum(model(images, targets(images)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    pyramid = feature_pyramid("container_nano", out_channels=16).to(dtype)
    maps = pyramid(torch.rand(2, 3, 64, 96, dtype=dtype))
    assert all(level.dtype == dtype and level.isfinite().all() for level in maps.values())
    sum(level.float().mean() for level in maps.values()).backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the old exporter, the one that takes torchvision's detectors
@pytest.mark.parametrize("build", [retinanet, mask_rcnn])
def test_onnx(build, tmp_path):
    model = build("container_light_nano", 3, min_size=64, max_size=96, out_channels=16, norm="frozen").eval()
    randomize(model.head if build is retinanet else model.roi_heads)  # or scores are all alike
    model.score_thresh = 0.0
    images = [torch.rand(3, 64, 96)]
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=False, opset_version=18)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    outputs = session.run(None, {session.get_inputs()[0].name: images[0].numpy()})
    boxes, scores = (torch.from_numpy(a) for a in outputs[:3] if a.dtype.kind == "f")  # labels are between, or behind
    expected = model(images)[0]
    torch.testing.assert_close(scores[:10], expected["scores"][:10], atol=1e-4, rtol=1e-3)
    # Boxes of one score may come in another order.
    assert torch.cdist(expected["boxes"][:10], boxes).min(dim=1).values.max() < 0.05


def test_recomputed_blocks_give_the_same_gradients():
    x, gradients = torch.rand(2, 3, 64, 64), []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        pyramid = feature_pyramid("container_light_nano", out_channels=8, grad_checkpointing=grad_checkpointing)
        sum(level.square().mean() for level in pyramid(x).values()).backward()
        gradients.append([p.grad for p in pyramid.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(name="container_pam"), "container_pam is tied to one image size"),
        (dict(name="test_vit"), "test_vit is tied to one image size"),
        (dict(levels=5), "levels 5 is not in 1 to 4, the levels of container_light_nano"),
        (dict(levels=0), "levels 0 is not in 1 to 4"),
        (dict(frozen_stages=5), r"frozen_stages 5 is not in \[0, 1, 2, 3, 4\], the levels"),
        (dict(frozen_stages=-1), "frozen_stages -1 is not in"),
        (dict(coarser=3), "coarser 3 is not 0, 1 or 2"),
        (dict(norm="nonsense"), "norm 'nonsense' is not 'frozen' or one of batchnorm, .*, layernorm2d"),
        (dict(name="dla46x_c", norm="groupnorm1"), "dla46x_c, .*norm='groupnorm1'.* unexpected .* 'norm_layer'"),
        (dict(name="vgg11", drop_path_rate=0.1), "vgg11, .*drop_path_rate=0.1: .* unexpected .* 'drop_path_rate'"),
        (dict(name="resnet18", norm="rmsnorm"), "the backbone fails at a trial of 96 x 160 pixels: .*normalized_shape"),
        (dict(name="convmixer_768_32", levels=3), r"strides \[7, 7, 7\] do not make a pyramid"),
        (dict(name="eca_halonext26ts"), "the backbone fails at a trial of 96 x 160 pixels"),
        (dict(name="tresnet_m", frozen_stages=1), "tresnet_m, .*frozen_stages=1, .* are not present in model"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        feature_pyramid(**{"name": "container_light_nano", **arguments})
    assert "\n" not in str(caught.value)


def test_other_mistakes(monkeypatch):
    with pytest.raises(TypeError, match="unexpected keyword"):
        retinanet("container_light_nano", 3, frozen=1)
    with pytest.raises(RuntimeError, match="Unknown model"):
        feature_pyramid("container_light_nono")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for container_light_base"):
        feature_pyramid("container_light_base", pretrained=True)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("of its own"))
    with pytest.raises(pytest.fail.Exception, match="of its own"):  # not about levels
        feature_pyramid("container_light_nano")


def test_memory_is_linear_in_the_number_of_tokens():
    """No N x N: what the backward pass keeps of `container_nano` quadruples with four times the tokens."""

    def kept(size):
        sizes = {}
        own = {p.untyped_storage()._cdata for p in body.parameters()}

        def keep(tensor):
            if tensor.untyped_storage()._cdata not in own:
                sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.rand(1, 3, *size)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            maps = body(x)
        assert maps[0].shape[-2:] == (size[0] // 4, size[1] // 4)
        return sum(sizes.values())

    body = timm.create_model("container_nano", features_only=True)
    assert kept((256, 352)) / kept((128, 176)) == pytest.approx(4, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["container_light", "container_nano"])
def test_detection_size_fits(name):
    """800 x 1333, forward and backward, in 8 GB; one affinity of stage 1 (66,800 tokens) alone would take 18."""
    code = (
        "import container, resource, timm, torch\n"
        f"body = timm.create_model('{name}', features_only=True)\n"
        "body.set_grad_checkpointing()\n"
        "maps = body(torch.rand(1, 3, 800, 1333))\n"
        "print([tuple(m.shape[-2:]) for m in maps])\n"
        "sum(m.mean() for m in maps).backward()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    sizes, gib = result.stdout.splitlines()
    assert sizes == "[(200, 334), (100, 167), (50, 84), (25, 42)]" and int(gib) < 8
