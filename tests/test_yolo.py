"""The context layer by its formula, and under Ultralytics."""

import os
import subprocess
import sys

import onnxruntime
import pytest
import timm
import torch
import yaml
from conftest import ROOT, randomize
from PIL import Image

from container import yolo
from container.yolo import ContextAggregation


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


def test_layer_is_the_affinity_of_rank_one():
    """m may act on every token or on their sum: matrices do not care."""
    layer = randomize(ContextAggregation(4).double())
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    bias, layer.m.bias.data = layer.m.bias.data[:, None, None].clone(), torch.zeros(4, dtype=torch.float64)
    matrix = layer.affinity.matrix(x)[0, 0]
    expected = x.flatten(2) + layer.m(layer.v(x)).flatten(2) @ matrix.T
    torch.testing.assert_close(layer(x).flatten(2), expected)
    layer.m.bias.data = bias.flatten()
    torch.testing.assert_close(layer(x), expected.view_as(x) + bias * layer.affinity.query(x).sigmoid())


def test_layer_trains_with_a_batch_of_one_position():
    layer = ContextAggregation(4).train()
    layer(torch.randn(1, 4, 1, 1)).sum().backward()
    assert layer.m.weight.grad.abs().sum() > 0
    for reduction in (0, 5):
        with pytest.raises(ValueError, match=f"reduction {reduction} is not in 1 to 4"):
            ContextAggregation(4, reduction)


def test_without_ultralytics(monkeypatch):
    for name in ("ultralytics", "ultralytics.nn"):  # the second would be found if another test has imported it
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install ultralytics"):
        yolo.register()
    result = subprocess.run(
        [sys.executable, "-c", "import container.yolo, container.detection, sys; print('ultralytics' in sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "False\n"


def test_config():
    assert yolo.config("yolov8s-context.yaml").endswith("yolov8s-context.yaml")
    with pytest.raises(
        FileNotFoundError, match=r"no yolov9-context.yaml: choose from yolov8-container_light.yaml, yolov8"
    ):
        yolo.config("yolov9-context.yaml")


@pytest.fixture
def ultralytics():
    module = pytest.importorskip("ultralytics", reason="Ultralytics is not installed", exc_type=ImportError)
    yolo.register()
    yolo.register()
    return module


@pytest.mark.parametrize("scale, channels", [("n", [64, 128, 256]), ("s", [128, 256, 512]), ("m", [192, 384, 576])])
def test_yaml_with_the_layer(ultralytics, scale, channels):
    """Channels are inferred and follow the width; at the start the detections are those without the layer."""
    model = ultralytics.YOLO(yolo.config(f"yolov8{scale}-context.yaml")).model
    layers = [m for m in model.modules() if isinstance(m, ContextAggregation)]
    assert [layer.affinity.query.in_channels for layer in layers] == channels
    assert all(layer.v.out_channels == c // 2 for layer, c in zip(layers, channels))
    x = torch.rand(1, 3, 64, 96)
    before = model.train()(x)["boxes"]
    for layer in layers:
        layer.forward = lambda x: x
    torch.testing.assert_close(model(x)["boxes"], before)


@pytest.mark.parametrize("name", ["container_light_nano", "container_light", "container", "resnet18"])
def test_yaml_with_a_backbone(ultralytics, tmp_path, name):
    with open(yolo.config("yolov8-container_light.yaml")) as file:
        d = yaml.safe_load(file)
    d["backbone"][0][3][0] = name
    if name == "resnet18":  # whose first level has stride 2
        for row in d["backbone"][1:4]:
            row[3][0] += 1
    (tmp_path / "yolov8n-other.yaml").write_text(yaml.safe_dump(d))
    model = ultralytics.YOLO(tmp_path / "yolov8n-other.yaml").model
    assert model.stride.tolist() == [8, 16, 32] and model.yaml["backbone"][1] == d["backbone"][1]
    outputs = model.train()(torch.rand(2, 3, 64, 96))
    outputs["boxes"].mean().backward()
    assert all(p.grad is not None for p in model.model[0].parameters())


def test_yaml_with_a_pretrained_backbone(ultralytics, tmp_path):
    name = "container_light_nano_32.cifar10"
    with open(yolo.config("yolov8-container_light.yaml")) as file:
        d = yaml.safe_load(file)
    d["backbone"][0][3] = [name, True]
    (tmp_path / "yolov8n-other.yaml").write_text(yaml.safe_dump(d))
    model = ultralytics.YOLO(tmp_path / "yolov8n-other.yaml").model
    expected = timm.create_model(name, pretrained=True, features_only=True)
    weight = model.model[0].body.state_dict()["stages_3.blocks.1.mlp.fc2.weight"]
    assert torch.equal(weight, expected.state_dict()["stages_3.blocks.1.mlp.fc2.weight"])
    assert model.stride.tolist() == [2, 4, 8]


def test_rows_that_cannot_be(ultralytics, tmp_path):
    row = [-1, 1, "Conv", [8, 3, 2]]
    for backbone, message in (
        ([row, [0, 1, "ContainerLevel", [1]]], "reads row 0, but only a ContainerBackbone in row 0 has levels"),
        ([[-1, 1, "ContainerBackbone", ["container_light_nano"]], [0, 1, "ContainerLevel", [4]]], "4 is not in 0 to 3"),
    ):
        (tmp_path / "yolov8n-x.yaml").write_text(
            yaml.safe_dump(dict(nc=2, backbone=backbone, head=[[[1], 1, "Detect", ["nc"]]]))
        )
        with pytest.raises(ValueError, match=message):
            ultralytics.YOLO(tmp_path / "yolov8n-x.yaml")


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


@pytest.mark.parametrize(
    "name", ["yolov8n-context.yaml", pytest.param("yolov8n-container_light.yaml", marks=pytest.mark.slow)]
)
def test_trained_saved_and_loaded(ultralytics, tmp_path, name):
    """A run of Ultralytics' own trainer; what it saves is loaded by a process that registers nothing."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        for i in range(2):
            Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "data" / "images" / split / f"{i}.jpg")
            (tmp_path / "data" / "labels" / split / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    data = dict(path=str(tmp_path / "data"), train="images/train", val="images/val", names=["thing"])
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    code = f"""
import container.yolo
from ultralytics import YOLO

container.yolo.register()
model = YOLO(container.yolo.config({name!r}))
model.train(
    data="data.yaml", epochs=1, imgsz=64, batch=2, device="cpu", workers=0, plots=False, val=False,
    project="{tmp_path}/run", name="r",
)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c"]
    result = subprocess.run([*run, code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    code = (
        f"from ultralytics import YOLO; print(type(YOLO('{tmp_path}/run/r/weights/last.pt').model.model[22]).__name__)"
    )
    if "container_light" in name:
        code = code.replace("model[22]", "model[0]")
    result = subprocess.run([*run, code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    expected = "ContainerBackbone" if "container_light" in name else "ContextAggregation"
    assert result.stdout.splitlines()[-1:] == [expected], result.stderr[-2000:]
