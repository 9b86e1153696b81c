"""The family under the libraries that people use."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD

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


def aligned(model):
    """The model with copies of its weights. From transformers they lie at the addresses that they have in the file, on
    which the rounding of a CPU's matrix products depends."""
    for value in (*model.parameters(), *model.buffers()):
        value.data = value.data.clone()
    return model


@torch.no_grad()
def test_a_backbone_keeps_its_batch_norms(transformers):
    """Which transformers resets in any network that does not say it has been initialized."""
    found = transformers.TimmBackbone.from_pretrained(OURS, out_indices=[0, 1, 2, 3]).eval()
    expected, x = timm.create_model(OURS, pretrained=True, features_only=True).eval(), torch.rand(1, 3, 32, 32)
    for a, b in zip(aligned(found)(x).feature_maps, expected(x)):
        assert torch.equal(a, b)


HEADS = dict(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2)
REAL_TIME = dict(
    d_model=32, encoder_hidden_dim=32, encoder_in_channels=[32, 80, 128], decoder_in_channels=[32, 32, 32],
    encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_layers=1, decoder_layers=2, num_queries=10, num_denoising=0,
    encoder_attention_heads=2, decoder_attention_heads=2,
)  # fmt: skip
MASKED = dict(mask_feature_size=32, fpn_feature_size=32)
ONE = dict(
    num_classes=3, is_training=True, hidden_dim=64, mask_dim=64, conv_dim=64, encoder_feedforward_dim=32,
    dim_feedforward=32, encoder_layers=1, decoder_layers=2, query_dec_layers=1, num_attention_heads=2, num_queries=10,
    task_seq_len=7, text_encoder_width=64, text_encoder_num_layers=1, text_encoder_vocab_size=30,
    text_encoder_context_length=7, text_encoder_n_ctx=4,
)  # fmt: skip
READER = dict(vocab_size=1100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
WORDS = dict(
    text_config=dict(READER, model_type="bert"),
    num_queries=5,
    encoder_layers=1,
    decoder_layers=2,
    max_text_len=8,
    **HEADS,
)
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
    "OneFormer": ([0, 1, 2, 3], ONE),
    "GroundingDino": ([1, 2, 3], WORDS),
    "MMGroundingDino": ([1, 2, 3], WORDS),
}
# What those that read words want besides: a task and its texts; two classes, each with a full stop behind it.
TEXTS = {
    "OneFormer": dict(task_inputs=torch.ones(2, 7).long(), text_inputs=torch.ones(2, 6, 7).long()),
    "GroundingDino": dict(input_ids=torch.tensor([[101, 5, 1012, 7, 1012, 102]] * 2)),
}
TEXTS["MMGroundingDino"] = TEXTS["GroundingDino"]


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
    words = TEXTS.get(name, {})
    model.train()(pixel_values=x, **words, **targets).loss.sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in network.parameters()) > 100
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    if name == "OneFormer":
        return  # whose answers to the same images differ from call to call, on a ResNet, too
    found, expected = (m(pixel_values=x, **words) for m in (aligned(again), model))
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


@pytest.fixture
def photos(tmp_path):
    """Eight pictures each of two colours, in folders."""
    for split in ("train", "valid"):
        for kind, color in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (40, 36), color).save(tmp_path / split / kind / f"{i}.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library, about itself
def test_fastai(photos, monkeypatch):
    """Fine-tuned by name from weights, exported, and read again with the same answers."""
    monkeypatch.chdir(photos)
    fastai = pytest.importorskip("fastai.vision.all", reason="fastai is not installed")
    loaders = fastai.ImageDataLoaders.from_folder(photos, item_tfms=fastai.Resize(32), bs=8, num_workers=0)
    learner = fastai.vision_learner(loaders, OURS, pretrained=True, metrics=fastai.accuracy)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(10, base_lr=1e-2)
        _, accuracy = learner.validate()
    assert accuracy == 1
    learner.export("model.pkl")
    again = fastai.load_learner("model.pkl")
    with learner.no_bar(), again.no_bar():
        found, expected = (m.predict("valid/red/0.png") for m in (again, learner))
    assert found[0] == "red" and torch.equal(found[2], expected[2])


@pytest.mark.slow
def test_lightning(tmp_path):
    """Two processes that Lightning starts itself, of a script that does not import the package."""
    pytest.importorskip("lightning", reason="Lightning is not installed")
    script = tmp_path / "fit.py"
    script.write_text("""
import lightning, timm, torch

class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("container_light_nano_32", num_classes=2)

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def on_train_end(self):
        print(f"end of {self.global_rank} of {self.trainer.world_size}", flush=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)

data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2)
lightning.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False,
).fit(Classifier(), torch.utils.data.DataLoader(data, 2))
""")
    command = [sys.executable, "-m", "container", "run", str(script)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "end of 0 of 2" in result.stdout and "end of 1 of 2" in result.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library, about itself
@pytest.mark.parametrize("rewritten", [False, True])
def test_grad_cam(rewritten):
    """The map by its formula: channels of the last stage, weighed by their mean gradients."""
    library = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = timm.create_model("container_light_nano", num_classes=5).eval()
    model = fuse(model) if rewritten else model
    x = torch.randn(1, 3, 128, 96)
    with library.GradCAM(model=model, target_layers=[model.stages[3]]) as cam:
        found = torch.from_numpy(cam(input_tensor=x, targets=[ClassifierOutputTarget(2)]))[0]
    seen = []
    handle = model.stages[3].register_forward_hook(lambda _, __, y: seen.append(y))
    score = model(x)[0, 2]
    handle.remove()
    gradient = torch.autograd.grad(score, seen[0])[0]
    expected = (gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1).relu().detach()
    expected = torch.nn.functional.interpolate(expected[None], (128, 96), mode="bilinear")[0, 0]
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert found.shape == (128, 96) and (found - expected).abs().max() < 1e-2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library, about itself
def test_captum():
    """Integrated gradients add up to the change of the score."""
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    model = timm.create_model("container_light_nano_32").eval()
    x = torch.randn(1, 3, 32, 32)
    attribution, rest = captum.IntegratedGradients(model).attribute(x, target=1, return_convergence_delta=True)
    change = (model(x) - model(torch.zeros_like(x)))[0, 1].item()
    assert attribution.sum().item() == pytest.approx(change, abs=0.05 * abs(change) + 1e-4)
    assert abs(rest.item()) < 0.05 * abs(change) + 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library, about itself
def test_kornia():
    """A mirror image is augmented as it should be, and gradients pass through model and augmentation."""
    augmentation = pytest.importorskip("kornia.augmentation", reason="kornia is not installed")
    mirror = augmentation.RandomHorizontalFlip(p=1.0)
    model = timm.create_model("container_light_nano", num_classes=5).eval()
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    found = augmentation.AugmentationSequential(mirror, data_keys=["input"])(x)
    logits = model(found)
    torch.testing.assert_close(logits, model(x.flip(3)))
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library, about itself
def test_anomalib(tmp_path):
    """PatchCore tells grey images with a red square from those without, by the weights of photos."""
    pytest.importorskip("anomalib", reason="anomalib is not installed")
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Patchcore

    random = np.random.default_rng(0)
    for kind, count in (("good", 12), ("bad", 4)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(100, 160, (64, 64, 3), dtype=np.uint8)
            if kind == "bad":
                pixels[20:40, 20:40] = [250, 0, 0]
            Image.fromarray(pixels).save(tmp_path / "data" / kind / f"{i}.png")
    data = Folder(
        "squares", root=tmp_path / "data", normal_dir="good", abnormal_dir="bad", train_batch_size=4, num_workers=0
    )
    model = Patchcore(backbone="container_light_nano", layers=["stages.1", "stages.2"], pre_trained=True)
    engine = Engine(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    engine.fit(model, datamodule=data)
    (result,) = engine.test(model, datamodule=data, verbose=False)
    assert result["image_AUROC"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library, about itself
def test_torchgeo():
    """A task on images of 13 bands learns which of two bands is bright."""
    trainers = pytest.importorskip("torchgeo.trainers", reason="torchgeo is not installed")
    torch.manual_seed(0)
    task = trainers.ClassificationTask(model="container_light_nano", weights=None, in_channels=13, num_classes=2)
    labels = torch.arange(8) % 2
    images = torch.rand(8, 13, 32, 32)
    images[labels == 1, 4] += 2
    optimizer = torch.optim.AdamW(task.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        loss = task.criterion(task(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library, about itself
def test_effdet():
    """EfficientDet on the pre-trained maps of strides 8, 16 and 32."""
    effdet = pytest.importorskip("effdet", reason="effdet is not installed")
    config = effdet.get_efficientdet_config("efficientdet_d0")
    config.update(backbone_name="container_light_nano", backbone_args={}, backbone_indices=(1, 2, 3))
    config.update(image_size=[128, 128], num_classes=2)
    model = effdet.EfficientDet(config, pretrained_backbone=True)
    x = torch.rand(2, 3, 128, 128)
    expected = timm.create_model("container_light_nano", pretrained=True, features_only=True, out_indices=(1, 2, 3))
    for a, b in zip(model.eval().backbone(x), expected.eval()(x), strict=True):
        assert torch.equal(a, b)
    boxes = dict(bbox=[torch.tensor([[8.0, 8, 64, 64]])] * 2, cls=[torch.tensor([1.0])] * 2)
    sizes = dict(img_scale=torch.ones(2), img_size=torch.full((2, 2), 128.0))
    effdet.DetBenchTrain(model.train())(x, boxes | sizes)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert effdet.DetBenchPredict(model).eval()(x).shape == (2, 100, 6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library, about itself
def test_open_clip(tmp_path):
    """CLIP with the pre-trained network as its image tower, from a configuration file as the library has them."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    vision = dict(timm_model_name="container_light_nano", timm_model_pretrained=True, timm_pool="", image_size=128)
    text = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    config = dict(embed_dim=16, vision_cfg=vision | dict(timm_proj="linear"), text_cfg=text)
    (tmp_path / "CONTAINER.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model, *_ = open_clip.create_model_and_transforms(
        "CONTAINER", pretrained_image=True, image_mean=MEAN, image_std=STD
    )
    x = torch.rand(2, 3, 128, 128)
    expected = timm.create_model("container_light_nano", pretrained=True, num_classes=0).eval()
    assert torch.equal(model.eval().visual.trunk(x), expected(x))
    model.train().set_grad_checkpointing()
    image, words, scale = model(x, torch.randint(0, 50, (2, 8)))
    open_clip.ClipLoss()(image, words, scale).backward()
    assert image.shape == (2, 16) and all(p.grad is not None for p in model.visual.parameters())
    model.lock_image_tower()
    assert not any(p.requires_grad for p in model.visual.trunk.parameters())
