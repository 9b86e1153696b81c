"""Backbones under torchvision's detectors."""

import os
import subprocess
import sys

import onnxruntime
import pytest
import timm
import torch
from conftest import ROOT, randomize

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


@pytest.mark.parametrize("name", ["container_light_nano", "resnet18"])
@pytest.mark.parametrize("frozen", [0, 1, 3, 4])
def test_frozen_stages_stay_as_they_are(name, frozen):
    """Parameters, statistics and answers, over a training step; everything behind them moves."""
    pyramid = feature_pyramid(name, out_channels=16, frozen_stages=frozen, drop_path_rate=0.5)
    randomize(pyramid)
    before = {key: value.clone() for key, value in pyramid.state_dict().items()}
    pyramid.eval().train()
    optimizer = torch.optim.SGD(pyramid.parameters(), lr=0.1)
    loss = sum(level.square().mean() for level in pyramid(torch.rand(2, 3, 64, 96)).values())
    loss.backward()
    optimizer.step()
    moved = {key for key, value in pyramid.state_dict().items() if not torch.equal(value, before[key])}
    still = {name for name, _ in pyramid.body.named_children()} - {key.split(".")[1] for key in moved if "body" in key}
    has_weights = {name for name, m in pyramid.body.named_children() if list(m.parameters())}
    assert still & has_weights == set(pyramid.frozen) & has_weights
    levels = [info["module"].replace(".", "_") for info in pyramid.body.feature_info.info]
    assert pyramid.frozen[-1:] == levels[:frozen][-1:]


@pytest.mark.parametrize("name", ["container_light_nano", "container_light", "container"])
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


def test_detectors_fit_their_strides():
    """Anchors follow the strides, also of a backbone that begins at stride 1."""
    model = retinanet("container_light_nano", 3)
    assert model.anchor_generator.sizes[0] == (32, 40, 50) and model.anchor_generator.sizes[4] == (512, 645, 812)
    assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)
    model = mask_rcnn("container_light_nano_32", 3)
    assert model.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))


def test_a_detector_with_pretrained_weights_learns_a_box():
    model = retinanet(OURS, 2, min_size=64, max_size=64, out_channels=16, levels=2, pretrained=True)
    images = [torch.rand(3, 64, 64)]
    images[0][:, 5:50, 5:40] *= 0.2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
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


@pytest.mark.filterwarnings("ignore")  # of the old exporter, the one that takes torchvision's detectors
@pytest.mark.parametrize("build", [retinanet, mask_rcnn])
def test_onnx(build, tmp_path):
    model = build("container_light_nano", 3, min_size=64, max_size=96, out_channels=16, norm="frozen").eval()
    randomize(model.head if build is retinanet else model.roi_heads)  # or scores are all alike
    model.score_thresh = 0.0
    images = [torch.rand(3, 64, 96)]
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=False, opset_version=18)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    boxes = session.run(None, {session.get_inputs()[0].name: images[0].numpy()})[0]
    expected = model(images)[0]["boxes"]
    torch.testing.assert_close(torch.from_numpy(boxes[:10]), expected[:10], atol=1e-2, rtol=1e-3)


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
        (dict(name="container_light_nano", levels=5), "container_light_nano has fewer than 5 levels"),
        (dict(name="container_light_nano", frozen_stages=5), "frozen_stages 5 is not in 0 to 4"),
        (dict(name="container_light_nano", coarser=3), "coarser 3 is not 0, 1 or 2"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        feature_pyramid(**arguments)
    with pytest.raises(TypeError, match="unexpected keyword"):
        retinanet("container_light_nano", 3, frozen=1)
    assert issubclass(FeaturePyramid, torch.nn.Module)


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
