"""The context layer by its formula, and under Ultralytics."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
import yaml
from conftest import ROOT, randomize
from PIL import Image

import container
from container import yolo
from container.yolo import ContainerBackbone, ContextAggregation


@pytest.mark.parametrize("reduction", [1, 3])
def test_layer_is_its_formula(reduction):
    layer = ContextAggregation(6, reduction).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    assert torch.equal(layer(x), x)
    randomize(layer)
    a, k = (c(x).flatten(2)[:, 0] for c in (layer.affinity.query, layer.affinity.key))  # (B, N)
    v = layer.v(x).flatten(2)
    assert v.shape[1] == 6 // reduction
    summary = torch.stack([sum(w * v[b, :, j] for j, w in enumerate(k[b].softmax(0))) for b in range(2)])
    expected = x.flatten(2) + layer.m(summary[:, :, None, None])[..., 0] * a.sigmoid()[:, None]
    torch.testing.assert_close(layer(x).flatten(2), expected)


@pytest.mark.parametrize("rank", [1, 3])
def test_layer_is_an_affinity_of_that_rank(rank):
    """m may act on every token or on their sums: matrices do not care."""
    layer = randomize(ContextAggregation(4, rank=rank).double())
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    bias, layer.m.bias.data = layer.m.bias.data[:, None, None].clone(), torch.zeros(4, dtype=torch.float64)
    matrix = layer.affinity.matrix(x)[0, 0]
    expected = x.flatten(2) + layer.m(layer.v(x)).flatten(2) @ matrix.T
    torch.testing.assert_close(layer(x).flatten(2), expected)
    layer.m.bias.data = bias.flatten()
    wanted = layer.affinity.query(x).sigmoid() if rank == 1 else 1  # of several, weights that sum to one
    torch.testing.assert_close(layer(x), expected.view_as(x) + bias * wanted)


def test_layer_trains_with_a_batch_of_one_position():
    layer = ContextAggregation(4).train()
    layer(torch.randn(1, 4, 1, 1)).sum().backward()
    assert layer.m.weight.grad.abs().sum() > 0
    for reduction in (0, 5):
        with pytest.raises(ValueError, match=f"reduction {reduction} is not in 1 to 4"):
            ContextAggregation(4, reduction)
    with pytest.raises(ValueError, match="rank 0 is not at least 1"):
        ContextAggregation(4, rank=0)


def test_copies_of_layers_register_nothing(monkeypatch):
    """A layer that is loaded from a file does, as Ultralytics cannot read its name otherwise."""
    called = []
    monkeypatch.setitem(sys.modules, "ultralytics.nn.tasks", object())
    monkeypatch.setattr(yolo, "register", lambda: called.append(1))
    layer = ContextAggregation(4)
    twin = copy.deepcopy(torch.nn.Sequential(layer, layer))
    assert not called and twin[0] is twin[1] is not layer
    torch.testing.assert_close(twin[0].state_dict(), layer.state_dict())
    assert twin[0].v.weight.data_ptr() != layer.v.weight.data_ptr()
    pickle.loads(pickle.dumps(layer))
    assert called


@pytest.mark.slow
def test_without_ultralytics(monkeypatch):
    for name in ("ultralytics", "ultralytics.nn"):  # the second would be found if another test has imported it
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ultralytics.nn.tasks", raising=False)
    for call in (yolo.register, lambda: yolo.config("yolov8n-context.yaml")):
        with pytest.raises(ImportError, match="pip install ultralytics"):
            call()
    copy.deepcopy(ContextAggregation(4))  # as loading it, registers nothing
    result = subprocess.run(
        [sys.executable, "-c", "import container.yolo, container.detection, sys; print('ultralytics' in sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "False\n"


@pytest.fixture
def ultralytics():
    module = pytest.importorskip("ultralytics", reason="Ultralytics is not installed", exc_type=ImportError)
    yolo.register()
    yolo.register()
    return module


def test_no_file_of_ultralytics_is_in_the_package():
    """But for our recipes no YAML file is there."""
    files = [p for p in Path(container.__file__).parent.rglob("*") if p.suffix in (".yaml", ".yml")]
    assert {p.parent.name for p in files} == {"recipes"}


def test_files_are_made_elsewhere(ultralytics, tmp_path, monkeypatch):
    """Nothing is left where the user works, and one file does not overwrite another."""
    monkeypatch.chdir(tmp_path)
    paths = [Path(yolo.config("yolo11s-resnet18.yaml", pretrained=pretrained)) for pretrained in (True, False)]
    assert not list(tmp_path.iterdir()) and {p.name for p in paths} == {"yolo11s-resnet18.yaml"}
    rows = [yaml.safe_load(p.read_text())["backbone"][0] for p in paths]
    assert rows == [[-1, 1, "ContainerBackbone", ["resnet18", pretrained]] for pretrained in (True, False)]


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("yolov7n-context.yaml", FileNotFoundError, r"no yolov7n-context.yaml: .* one of .*yolo11, .*yolov8, yolov9c"),
        ("yolov8q-context.yaml", FileNotFoundError, "no yolov8q-context.yaml"),
        ("yolo11n.yaml", FileNotFoundError, "it is FAMILY-context.yaml or FAMILY-MODEL.yaml"),
        ("", FileNotFoundError, "it is FAMILY-context.yaml or FAMILY-MODEL.yaml"),
        ("yolo11n-cls-context.yaml", ValueError, "yolo11-cls.yaml ends in Classify, which reads no list of maps"),
        ("yolov9e-resnet18.yaml", ValueError, "yolov9e.yaml has a backbone that is not a plain chain of layers"),
        ("yolov8n-p6-resnet18.yaml", ValueError, r"resnet18 has .* yolov8-p6.yaml reads \[8, 16, 32, 64\]"),
        ("yolov8n-container_light_nano_32.yaml", ValueError, r"at strides \[1, 2, 4, 8\], .* \[8, 16, 32\]"),
        ("yolov8n-container_pam.yaml", ValueError, "container_pam is tied to one image size"),
        ("yolov8n-contekst.yaml", RuntimeError, "Unknown model"),
    ],
)  # fmt: skip
def test_files_that_cannot_be(ultralytics, name, error, message):
    with pytest.raises(error, match=message) as caught:
        yolo.config(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale, channels", [("n", [64, 128, 256]), ("s", [128, 256, 512]), ("m", [192, 384, 576])])
def test_channels_follow_the_scale(ultralytics, scale, channels):
    model = ultralytics.YOLO(yolo.config(f"yolov8{scale}-context.yaml")).model
    layers = [m for m in model.modules() if isinstance(m, ContextAggregation)]
    assert [layer.affinity.query.in_channels for layer in layers] == channels
    assert all(layer.v.out_channels == c // 2 for layer, c in zip(layers, channels))


def test_rank_by_name(ultralytics):
    """`context8` is of rank 8, and changes nothing at the start either."""
    model = ultralytics.YOLO(yolo.config("yolov8n-context8.yaml"), verbose=False).model
    layers = [m for m in model.modules() if isinstance(m, ContextAggregation)]
    assert len(layers) == 3 and all(layer.affinity.query.out_channels == 8 for layer in layers)
    x = torch.randn(1, layers[0].affinity.query.in_channels, 5, 4)
    assert torch.equal(layers[0](x), x)


def tensors(x):
    if isinstance(x, (list, tuple, dict)):
        return [t for y in (x.values() if isinstance(x, dict) else x) for t in tensors(y)]
    return [x] if isinstance(x, torch.Tensor) else []


@pytest.mark.parametrize("family", ["yolov8n", "yolov8n-p2", "yolo11n", "yolo11n-seg", "yolo12n", "yolo26n", "yolov9t"])
def test_the_layers_change_nothing_at_the_start(ultralytics, family):
    """The answers, in evaluation and in training, are those of Ultralytics' own model with the same weights."""
    plain = ultralytics.YOLO(f"{family}.yaml").model
    model = ultralytics.YOLO(yolo.config(f"{family}-context.yaml")).model
    layers = [m for m in model.model if isinstance(m, ContextAggregation)]
    assert len(layers) == len(model.model[-1].f) == len(model.model) - len(plain.model)
    assert model.yaml["scale"] == plain.yaml["scale"] and model.stride.equal(plain.stride)
    for ours, theirs in zip([m for m in model.model if m not in layers], plain.model, strict=True):
        ours.load_state_dict(theirs.state_dict())
    for mode in (False, True):
        expected, found = (tensors(m.train(mode)(torch.rand(2, 3, 64, 96).fill_(0.5))) for m in (plain, model))
        assert expected and len(found) == len(expected)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, equal_nan=True)
    randomize(layers[0])
    assert not torch.equal(tensors(model(torch.rand(2, 3, 64, 96).fill_(0.5)))[0], found[0])


@pytest.mark.parametrize(
    "family, tail, reads",
    [
        ("yolov8n", ["SPPF"], [[-1, 2], [-1, 1], [-1, 7], [-1, 4], [10, 13, 16]]),
        ("yolo11s", ["SPPF", "C2PSA"], [[-1, 2], [-1, 1], [-1, 8], [-1, 5], [11, 14, 17]]),
        ("yolo12n", [], [[-1, 2], [-1, 1], [-1, 6], [-1, 3], [9, 12, 15]]),
    ],
)
def test_rows_of_a_backbone(ultralytics, family, tail, reads):
    """Counted by hand. Ultralytics itself checks that maps which are joined have one size."""
    d = yaml.safe_load(Path(yolo.config(f"{family}-container_light_nano.yaml")).read_text())
    assert d["backbone"][0] == [-1, 1, "ContainerBackbone", ["container_light_nano", False]]
    assert d["backbone"][1:4] == [[0, 1, "ContainerLevel", [i]] for i in (1, 2, 3)]
    assert [row[2] for row in d["backbone"][4:]] == tail
    assert [row[0] for row in d["head"] if row[0] != -1] == reads


@pytest.mark.parametrize(
    "name",
    ["yolov8n-container_light_nano", "yolo11n-container_nano", "yolo26n-container_light", "yolov8n-container",
     "yolo11n-seg-resnet18", "yolov8n-p2-test_mambaout", "yolov10n-test_efficientnet"],
)  # fmt: skip
def test_yaml_with_a_backbone(ultralytics, name):
    """Of this family and of others, whatever their first stride and their layout."""
    model = ultralytics.YOLO(yolo.config(f"{name}.yaml")).model
    assert model.stride.tolist() == [*([4] if "p2" in name else []), 8, 16, 32]
    assert model.yaml["scale"] == "n" and model.yaml["backbone"][1][2] == "ContainerLevel"
    sum(t.square().mean() for t in tensors(model.train()(torch.rand(2, 3, 64, 96)))).backward()
    assert all(p.grad is not None for p in model.model[0].parameters())


def test_yaml_with_a_pretrained_backbone(ultralytics, tmp_path):
    name = "container_light_nano_32.cifar10"
    d = yaml.safe_load(Path(yolo.config("yolov8n-container_light.yaml")).read_text())
    d["backbone"][0][3] = [name, True]
    (tmp_path / "yolov8n-other.yaml").write_text(yaml.safe_dump(d))
    model = ultralytics.YOLO(tmp_path / "yolov8n-other.yaml").model
    expected = timm.create_model(name, pretrained=True, features_only=True).state_dict()
    weights = model.model[0].body.state_dict()
    assert torch.equal(weights["stages_3.blocks.1.mlp.fc2.weight"], expected["stages_3.blocks.1.mlp.fc2.weight"])
    assert model.stride.tolist() == [2, 4, 8]
    gray = ultralytics.nn.tasks.DetectionModel(str(tmp_path / "yolov8n-other.yaml"), ch=1).model[0].body.state_dict()
    (stem,) = (key for key, value in weights.items() if value.shape[1:2] == (3,))
    torch.testing.assert_close(gray[stem], expected[stem].sum(1, keepdim=True))  # as timm has it


@pytest.mark.parametrize("name", ["yolov8n-container_light_nano.yaml", "yolo11n-context.yaml"])
@pytest.mark.parametrize("channels", [1, 4])
def test_channels_of_the_data(ultralytics, name, channels):
    model = ultralytics.nn.tasks.DetectionModel(yolo.config(name), ch=channels, nc=2)
    assert next(model.parameters()).shape[1] == channels
    assert model.train()(torch.rand(2, channels, 64, 64))["boxes"].isfinite().all()


def test_rows_that_cannot_be(ultralytics, tmp_path):
    row = [-1, 1, "Conv", [8, 3, 2]]
    backbone = [-1, 1, "ContainerBackbone", ["container_light_nano"]]
    for rows, message in (
        ([row, [0, 1, "ContainerLevel", [1]]], "row 0 has no ContainerLevel 1: row 0 has 0"),
        ([backbone, [0, 1, "ContainerLevel", [4]]], "row 0 has no ContainerLevel 4: row 0 has 4"),
        ([backbone, [0, 1, "ContainerLevel", [1]], [1, 1, "ContainerLevel", [1]]], "row 1 has no ContainerLevel 1"),
        ([[-1, 1, "ContainerBackbone", ["test_vit"]]], "test_vit is tied to one image size"),
    ):
        (tmp_path / "yolov8n-x.yaml").write_text(
            yaml.safe_dump(dict(nc=2, backbone=rows, head=[[[1], 1, "Detect", ["nc"]]]))
        )
        with pytest.raises(ValueError, match=message):
            ultralytics.YOLO(tmp_path / "yolov8n-x.yaml")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter and its parts
@pytest.mark.parametrize("name", ["yolov8n-context.yaml", "yolov8n-container_light.yaml"])
def test_onnx(ultralytics, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model = ultralytics.YOLO(yolo.config(name), verbose=False)
    randomize(model.model)
    x = torch.rand(1, 3, 64, 64)
    expected = model.model.eval()(x)[0]
    session = onnxruntime.InferenceSession(model.export(format="onnx", imgsz=64, simplify=False, device="cpu"))
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-3, rtol=1e-3)


@pytest.fixture
def data(tmp_path):
    """A data set of two images, as a file of Ultralytics'."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        for i in range(2):
            Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "data" / "images" / split / f"{i}.jpg")
            (tmp_path / "data" / "labels" / split / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    data = dict(path=str(tmp_path / "data"), train="images/train", val="images/val", names=["thing"])
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    return str(tmp_path / "data.yaml")


def run(*command, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n-context.yaml", "yolo11n-container_light.yaml"])
def test_trained_saved_and_trained_on(ultralytics, tmp_path, data, name):
    """By Ultralytics' own trainer; what it saves goes on in a process that does not name this package."""
    train = f"""train(
    data={data!r}, epochs=1, imgsz=64, batch=2, device="cpu", workers=0, plots=False, val=False,
    project={str(tmp_path / "run")!r}, exist_ok=True, name="""
    new = f"""import container.yolo
from ultralytics import YOLO
path = container.yolo.config({name!r})
YOLO(path).{train}'a')
print(path)
"""
    on = f"""from ultralytics import YOLO
model = YOLO({str(tmp_path / "run" / "a" / "weights" / "last.pt")!r})
model.{train}'b')
print(*{{type(m).__name__ for m in model.model.model if "container" in type(m).__module__}})
"""
    path = Path(run("-c", new, folder=tmp_path).splitlines()[-1])
    assert path.name == name and not path.parent.exists()
    expected = "ContextAggregation" if "context" in name else "ContainerBackbone"
    assert run("-c", on, folder=tmp_path).splitlines()[-1] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n-cls-container_light_nano_32.yaml", "yolo11n-cls-resnet18.yaml"])
def test_a_classifier(ultralytics, tmp_path, name):
    """Trained, evaluated, exported and read again; it learns which of two colours a picture has."""
    for split, count in (("train", 16), ("val", 6)):
        for kind, color in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), color).save(tmp_path / "data" / split / kind / f"{i}.png")
    code = f"""import container.yolo
from ultralytics import YOLO
model = YOLO(container.yolo.config({name!r}, pretrained={"container" in name}), task="classify")
model.train(data={str(tmp_path / "data")!r}, epochs=6, imgsz=32, batch=8, device="cpu", workers=0, plots=False,
    project={str(tmp_path / "run")!r}, exist_ok=True, name="a", hsv_h=0.0,
    optimizer="AdamW", lr0=1e-3, warmup_epochs=0)
(found,) = model.predict({str(tmp_path / "data/val/red/0.png")!r}, imgsz=32, verbose=False)
print("is", found.names[found.probs.top1])
print("top-1", model.val(imgsz=32, plots=False).top1)
"""
    printed = run("-c", code, folder=tmp_path)
    if "container" in name:  # ResNet begins with random weights, and statistics that four steps have hardly moved
        assert "is red" in printed and "top-1 1.0" in printed
    assert (tmp_path / "run/a/weights/last.pt").exists() and "top-1" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["yolov8n-context.yaml", pytest.param("yolo11n-container_light_nano.yaml", marks=pytest.mark.slow)]
)
def test_a_process_of_several(ultralytics, tmp_path, data, name):
    """What Ultralytics starts for each GPU, on a CPU: it gets the path of the YAML file, and registers nothing."""
    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file

    options = dict(epochs=1, imgsz=64, batch=2, device="cpu", workers=0, plots=False, val=False, project=str(tmp_path))
    trainer = DetectionTrainer(overrides=dict(options, model=yolo.config(name), data=data, exist_ok=True, name="a"))
    file = generate_ddp_file(trainer)
    try:
        run(file, folder=tmp_path)
    finally:
        ddp_cleanup(trainer, file)
    assert (tmp_path / "a" / "weights" / "last.pt").exists()


def test_loading_a_layer_registers_it(ultralytics, monkeypatch):
    """Also where the package was imported, to no effect, before Ultralytics was."""
    tasks = ultralytics.nn.tasks
    for layer in (ContextAggregation(4), ContainerBackbone("container_light_nano")):
        with monkeypatch.context() as patch:
            patch.delattr(tasks, "ContainerBackbone")
            patch.setattr(tasks, "parse_model", before := lambda d, ch, verbose=True: None)
            loaded = pickle.loads(pickle.dumps(layer))
            assert tasks.ContainerBackbone is ContainerBackbone and tasks.parse_model is not before
            assert [*loaded.state_dict()] == [*layer.state_dict()]
