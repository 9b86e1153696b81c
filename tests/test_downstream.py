"""The family under the libraries that people use."""

import onnxruntime
import pytest
import timm
import torch

from container import zoo

OURS = "container_light_nano_32.cifar10"
SMALL = dict(
    num_labels=3, num_queries=5, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
    encoder_attention_heads=2, decoder_attention_heads=2,
)  # fmt: skip
NAMES = ["container_light_nano", "container_light", "container"]


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)  # of other libraries among themselves
@pytest.mark.parametrize("name", NAMES)
def test_auto_backbone(transformers, name):
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=[0, 1, 2, 3])
    backbone = transformers.AutoBackbone.from_config(config).train()
    maps = backbone(torch.rand(2, 3, 65, 98)).feature_maps
    assert [tuple(m.shape[-2:]) for m in maps] == [(17, 25), (9, 13), (5, 7), (3, 4)]
    assert backbone.channels == [m.shape[1] for m in maps]
    sum(m.mean() for m in maps).backward()


def test_detr_with_weights(transformers):
    """The way of docs/downstream.md; what transformers does by itself resets the batch norms."""
    backbone = transformers.TimmBackboneConfig(backbone=OURS, out_indices=[3])
    detr = transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=backbone, **SMALL))
    expected = timm.create_model(OURS, pretrained=True, features_only=True).eval()
    detr.model.backbone.model.load_state_dict(expected.state_dict())
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(detr.eval().model.backbone.model(x)[-1], expected(x)[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_detr(transformers, name, tmp_path):
    """Loss, gradients in the backbone, and the same answers after save and load."""
    config = transformers.DetrConfig(
        backbone_config=transformers.TimmBackboneConfig(backbone=name, out_indices=[3]),
        **SMALL,
    )
    model = transformers.DetrForObjectDetection(config)
    x = torch.rand(2, 3, 65, 98)
    labels = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))] * 2
    model(pixel_values=x, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.model.backbone.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(pixel_values=x).logits, model(pixel_values=x).logits)


def test_timm_wrapper(transformers, tmp_path):
    """An exported folder in transformers, saved by it, and loaded again."""
    zoo.export(OURS, tmp_path / "a")
    load = transformers.AutoModelForImageClassification.from_pretrained
    model = load(tmp_path / "a").eval()
    x = torch.rand(2, 3, 32, 32)
    logits = model(x).logits
    assert logits.shape == (2, 10) and model.config.id2label[0] == "airplane"
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(load(tmp_path / "b").eval()(x).logits, logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ["Unet", "FPN", "UPerNet", "DeepLabV3Plus"])
def test_segmentation_models(name, architecture):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    options = dict(encoder_output_stride=8) if architecture == "DeepLabV3Plus" else {}
    model = getattr(smp, architecture)(f"tu-{name}", encoder_weights=None, classes=3, **options)
    masks = model(torch.rand(2, 3, 64, 96))
    assert masks.shape == (2, 3, 64, 96)
    masks.mean().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the exporter and its parts
@pytest.mark.filterwarnings("ignore:Constant folding:UserWarning")  # torch 2.7's old exporter, of what it leaves
def test_segmentation_by_onnx(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    model = smp.Unet("tu-container_light_nano", encoder_weights=None, classes=3).eval()
    x = torch.rand(1, 3, 64, 96)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    masks = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(masks), model(x), atol=1e-4, rtol=1e-4)
