"""The family under the libraries that people use."""

import onnxruntime
import pytest
import timm
import torch

import container
from container import zoo
from container.fuse import fuse

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


@torch.no_grad()
def test_a_backbone_keeps_its_batch_norms(transformers):
    """Which transformers resets in any network that does not say it has been initialized."""
    found = transformers.TimmBackbone.from_pretrained(OURS, out_indices=[0, 1, 2, 3]).eval()
    expected, x = timm.create_model(OURS, pretrained=True, features_only=True).eval(), torch.rand(1, 3, 32, 32)
    for a, b in zip(found(x).feature_maps, expected(x)):
        assert torch.equal(a, b)


HEADS = dict(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2)
REAL_TIME = dict(
    d_model=32, encoder_hidden_dim=32, encoder_in_channels=[32, 80, 128], decoder_in_channels=[32, 32, 32],
    encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_layers=1, decoder_layers=2, num_queries=10, num_denoising=0,
    encoder_attention_heads=2, decoder_attention_heads=2,
)  # fmt: skip
MASKED = dict(mask_feature_size=32, fpn_feature_size=32)
# The library's name, the levels it reads, and a small configuration; docs/downstream.md has the same rows.
CLIENTS = {
    "Detr": ([3], dict(num_queries=5, encoder_layers=1, decoder_layers=1, **HEADS)),
    "ConditionalDetr": ([3], dict(num_queries=5, encoder_layers=1, decoder_layers=2, **HEADS)),
    "TableTransformer": ([3], dict(num_queries=5, encoder_layers=1, decoder_layers=1, **HEADS)),
    "DeformableDetr": ([1, 2, 3], dict(num_queries=5, encoder_layers=1, decoder_layers=2, **HEADS)),
    "RTDetr": ([1, 2, 3], REAL_TIME),
    "RTDetrV2": ([1, 2, 3], REAL_TIME),
    "DFine": ([1, 2, 3], REAL_TIME),
    "MaskFormer": ([0, 1, 2, 3], MASKED),
    "Mask2Former": ([0, 1, 2, 3], dict(hidden_dim=32, feature_size=32, mask_feature_size=32, num_attention_heads=2)),
    "UperNet": ([0, 1, 2, 3], dict(hidden_size=32, use_auxiliary_head=False)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library, about itself
@pytest.mark.parametrize("name", CLIENTS)
def test_detectors_and_segmenters(transformers, name, tmp_path):
    """A loss, gradients in the whole backbone, weights by the line of docs/downstream.md, and a reload bit for bit."""
    levels, options = CLIENTS[name]
    backbone = transformers.TimmBackboneConfig(backbone="container_light_nano", out_indices=levels)
    kind = "ForObjectDetection"
    if "Former" in name:
        kind = "ForInstanceSegmentation" if name == "MaskFormer" else "ForUniversalSegmentation"
        kind = "ForObjectDetection" if name == "TableTransformer" else kind
    elif name == "UperNet":
        kind = "ForSemanticSegmentation"
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, num_labels=3, **options)
    model = getattr(transformers, f"{name}{kind}")(config)
    weights = timm.create_model("container_light_nano", pretrained=True, features_only=True, out_indices=levels)
    network = next(m for m in model.modules() if isinstance(m, timm.models.FeatureListNet))
    network.load_state_dict(weights.state_dict())
    x = torch.rand(2, 3, 128, 160)
    for a, b in zip(network.eval()(x), weights.eval()(x)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    if kind == "ForObjectDetection":
        targets = dict(labels=[dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))] * 2)
    elif kind == "ForSemanticSegmentation":
        targets = dict(labels=torch.randint(0, 3, (2, 128, 160)))
    else:
        masks = torch.zeros(1, 128, 160)
        masks[:, 32:64, 32:64] = 1
        targets = dict(mask_labels=[masks] * 2, class_labels=[torch.tensor([1])] * 2)
    model.train()(pixel_values=x, **targets).loss.sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in network.parameters()) > 100
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    found, expected = (m(pixel_values=x) for m in (again, model))
    key = next(k for k in ("logits", "class_queries_logits") if k in expected)
    assert torch.equal(found[key], expected[key])


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library, about itself
def test_low_rank_adapters(tmp_path):
    """An adapter holds no running statistics: with the norms among the modules saved, a reload is the same."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        target_modules=["value", "proj", "qk", "fc1", "fc2"],
        modules_to_save=["head.fc", "norm", "norm1", "norm2"],
    )
    model = peft.get_peft_model(timm.create_model("container_light_nano", pretrained=True), config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, y = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    for _ in range(2):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    base = timm.create_model("container_light_nano", pretrained=True)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    logits = model.eval()(x)
    torch.testing.assert_close(again(x), logits, rtol=0, atol=0)
    torch.testing.assert_close(again.merge_and_unload()(x), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library, about itself
def test_pruning():
    """Half of the channels; attention is left, as `qk` is one convolution for two maps."""
    pruning = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    model = timm.create_model("container_light_nano", pretrained=True).eval()
    x = torch.rand(2, 3, 64, 64)
    ignored = [m for m in model.modules() if isinstance(m, container.SelfAttention)] + [model.head.fc]
    importance = pruning.importance.MagnitudeImportance()
    before = sum(p.numel() for p in model.parameters())
    pruning.pruner.MagnitudePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=ignored).step()
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    logits = model.train()(x)
    logits.mean().backward()
    assert logits.shape == (2, 1000) and all(p.grad is not None for p in model.parameters())
    unfused = model.eval()(x)
    torch.testing.assert_close(fuse(model)(x), unfused, rtol=1e-4, atol=1e-4)
