"""Frozen features, classified: against scikit-learn, and against a plain loop over the images."""

import json
import os
import subprocess
import sys
from functools import partial

import huggingface_hub
import numpy as np
import pytest
import sklearn.linear_model
import timm
import torch
from conftest import ROOT
from PIL import Image
from scipy.stats import binomtest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from timm.data import create_transform, resolve_model_data_config
from torch.nn.functional import normalize

from container import probe, weights
from container.__main__ import main
from container.training.data import create_datasets

TRAINED = "container_light_nano_32.cifar10"  # in the package


def noise(root, counts, side=24):
    """A folder of images that have nothing to do with their classes; `counts` are by class and by part."""
    for name, parts in counts.items():
        for part, count in parts.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.randint(0, 256, (side, side + i % 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def clouds(count, classes=4, spread=2.0):
    """Features of very different scales, whose classes overlap."""
    targets = torch.arange(count) % classes
    centers = torch.randn(classes, 12, generator=torch.Generator().manual_seed(0))
    x = (centers[targets] + spread * torch.randn(count, 12)) * 10 ** torch.linspace(-2, 3, 12) + 5
    return x.double(), targets


# ------------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("workers", [0, 1])
def test_features_are_those_of_a_plain_loop(workers, tmp_path):
    """Class 9 comes before class 10; more images than a batch has, so that their order matters."""
    noise(tmp_path, {"10": dict(train=40, val=3), "9": dict(train=30, val=2)}, side=40)
    model = timm.create_model("test_resnet").eval()
    config = resolve_model_data_config(model, args=dict(img_size=32))
    transform = create_transform(**config)
    for images, part in zip(create_datasets(tmp_path), ("train", "val")):
        x, y = probe.features(model, images, config, workers)
        with torch.no_grad():
            for i, path in enumerate(images.filenames(absolute=True)):
                image = transform(Image.open(path).convert("RGB"))[None]
                expected = model.forward_head(model.forward_features(image), pre_logits=True)[0]
                torch.testing.assert_close(x[i], expected, rtol=1e-4, atol=1e-5)
                assert f"{part}/{[9, 10][y[i]]}/" in path
        assert len(x) == len(y) == i + 1 and x.shape[1] == model.num_features
    assert y.tolist() == [0] * 2 + [1] * 3


def test_models_in_training_mode_or_broken_are_not_probed(folder, monkeypatch):
    """Features of evaluation, which are finite."""
    seen = []
    plain = timm.create_model("test_resnet")
    plain.forward_head = lambda x, pre_logits: seen.append(plain.training) or torch.full((len(x), 3), torch.nan)
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: plain)
    with pytest.raises(ValueError, match="features of ResNet are not finite"):
        probe.probe(folder, "test_resnet", img_size=32, workers=0)
    assert seen and not any(seen)


def test_unreadable_images_are_told_and_do_not_count(folder, capsys):
    (folder / "train" / "bright" / "3.jpg").write_bytes(b"no image")
    (folder / "val" / "dark" / "1.jpg").write_bytes(b"no image")
    found = probe.probe(folder, "test_resnet", img_size=32, workers=0, pretrained=False)
    assert (found["train_images"], found["val_images"]) == (47, 11)
    told = capsys.readouterr().err
    for name in ("bright/3.jpg", "dark/1.jpg"):
        assert f"cannot be read, and does not count: {name} (not an image file)\n" in told


# --------------------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("count", [300, 7])
def test_knn_is_scikit_learns(count):
    (x, y), (x_val, _) = clouds(count), clouds(600)
    for table in (x, x_val):  # directions tell the classes apart only where no feature outweighs the others
        table.sub_(5).div_(10 ** torch.linspace(-2, 3, 12))
    peer = KNeighborsClassifier(
        min(20, count), metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    expected = peer.fit(x.numpy(), y.numpy()).predict(x_val.numpy())
    assert probe.knn(x, y, x_val).tolist() == expected.tolist()
    assert len(set(expected)) == 4


def test_votes_are_weighted():
    """Two neighbours outvote a nearer one only as far as their similarities, over the temperature, allow."""
    angles = torch.tensor([0.1, 0.5, -0.5])
    x, y = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 1])
    here = torch.tensor([[5.0, 0.0]])
    assert probe.knn(x, y, here).item() == 0
    assert probe.knn(x, y, here, temperature=10).item() == 1
    assert probe.knn(x, y, here, k=1, temperature=10).item() == 0


def by_hand(x, y, x_val, held):
    """Logistic regression, standardized in numpy, C by a loop."""

    def fit(c, rows, at):
        mean, std = x[rows].mean(0), x[rows].std(0)
        peer = LogisticRegression(C=c, max_iter=10000).fit((x[rows] - mean) / std, y[rows])
        return peer.predict((at - mean) / std)

    best, chosen = -1.0, None
    for power in range(-4, 3):
        right = (fit(10.0**power, ~held, x[held]) == y[held]).mean()
        if right > best:
            best, chosen = right, 10.0**power
    return fit(chosen, slice(None), x_val), chosen


@pytest.mark.parametrize("seed", [0, 3])
def test_linear_is_logistic_regression_by_hand(seed):
    (x, y), (x_val, y_val) = clouds(160), clouds(300)
    x_val[: len(x_val) // 4] += x.std(0)  # so that their mean is another
    held = probe.hold_out(y, seed)
    expected, c = by_hand(*(t.numpy() for t in (x, y, x_val, held)))
    found, chosen = probe.linear(x, y, x_val, seed)
    assert chosen == c and found.tolist() == expected.tolist()
    assert 1e-4 < c < 100 and (found == y_val).float().mean() > 0.4


def test_validation_images_choose_nothing():
    """Neither one another's classes nor C."""
    (x, y), (x_val, _) = clouds(160), clouds(50)
    found, c = probe.linear(x, y, x_val)
    for i in (0, 7):
        alone, c_alone = probe.linear(x, y, x_val[i : i + 1])
        assert (alone.item(), c_alone) == (found[i].item(), c)
        assert probe.knn(x, y, x_val[i : i + 1]).item() == probe.knn(x, y, x_val)[i].item()


def test_hold_out():
    counts = [1, 2, 3, 7, 50]
    y = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
    held = probe.hold_out(y, 0)
    assert [int(held[y == i].sum()) for i in range(5)] == [0, 1, 1, 1, 10]
    assert torch.equal(held, probe.hold_out(y, 0)) and not torch.equal(held, probe.hold_out(y, 1))
    assert not held[y == 4][:10].all()  # random ones


def test_classes_of_one_image():
    """They are learned, and hold nothing out; where all are so, nothing chooses C."""
    (x, y), alone = clouds(40), torch.full((1, 12), 1e4, dtype=torch.double)
    found, _ = probe.linear(torch.cat([x, alone]), torch.cat([y, torch.tensor([4])]), alone)
    assert found.item() == 4
    found, c = probe.linear(x[:4], y[:4], x[:4])
    assert found.tolist() == y[:4].tolist() and c == 1


def test_more_iterations_than_allowed_are_no_warning(monkeypatch):
    """As far as they come, they are a candidate."""
    x, y = clouds(80)
    short = partial(LogisticRegression, tol=1e-12)
    monkeypatch.setattr(sklearn.linear_model, "LogisticRegression", lambda C, max_iter: short(C=C, max_iter=2))  # noqa: N803
    with pytest.warns(ConvergenceWarning):
        short(max_iter=2).fit(x, y)
    probe.linear(x, y, x)


@pytest.mark.parametrize("right, count", [(0, 12), (12, 12), (7, 12), (341, 503)])
def test_wilson(right, count):
    interval = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert probe.wilson(right, count) == pytest.approx((interval.low, interval.high), abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- the whole


def test_bright_and_dark(folder, tmp_path, capsys):
    """From the command: all right, one line, the same as JSON; the same twice."""
    words = ["probe", str(folder), "--model", TRAINED, "--workers", "0"]
    main([*words, "--json", str(tmp_path / "found.json")])
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.startswith(
        f"{TRAINED} at 32 px on {folder}: 2 classes, 48 + 12 images, k-NN 100.00 %, linear 100.00 % (C 0.0001), "
        "128 features, "
    )
    assert output.out.endswith(" s\n") and output.out.count("\n") == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert probe.describe(found) == output.out[:-1]
    for kind in ("knn", "linear"):
        assert found[kind]["top1"] == 100 and found[kind]["interval"] == pytest.approx([75.75, 100], abs=0.01)
    again = probe.probe(folder, TRAINED, workers=1)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


def test_labels_without_meaning(tmp_path):
    """Chance; images that were in both parts would be recognized."""
    noise(tmp_path, {name: dict(train=30, val=30) for name in "abc"})
    found = probe.probe(tmp_path, TRAINED, workers=0)
    for kind in ("knn", "linear"):
        low, high = found[kind]["interval"]
        assert low - 5 < 100 / 3 < high + 5


def test_a_checkpoint_at_another_size(folder, tmp_path):
    """Of a model of timm's that is tied to a size; its features are those of the model that was saved."""
    model = timm.create_model("test_vit", img_size=64, num_classes=5).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    found = probe.probe(folder, "test_vit", tmp_path / "model.pth", 64, 0)
    assert found["input_size"] == [3, 64, 64] and found["features"] == 64
    assert probe.describe(found).startswith("test_vit (model.pth) at 64 px on ")
    config = resolve_model_data_config(model)
    _, val, _ = create_datasets(folder)
    x, _ = probe.features(model, val, config, 0)
    loaded = weights.create("test_vit", tmp_path / "model.pth", 64)
    torch.testing.assert_close(probe.features(loaded, val, config, 0)[0], x)


@pytest.mark.slow
def test_a_process(folder, tmp_path):
    """Random weights are called so."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "container",
            "probe",
            folder,
            "--model",
            "container_light_nano_32",
            "--workers",
            "0",
            "--random-weights",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.startswith(f"container_light_nano_32 (random weights) at 32 px on {folder}: 2 classes")
    assert result.returncode == 0 and result.stderr == ""


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere", "--model", TRAINED], "no folder nowhere"),
        (["DATA/train", "--model", TRAINED], "no folder train (or .tar) in "),
        (["DATA", "--model", "resnet1"], "no model 'resnet1'"),
        (
            ["DATA", "--model", "test_resnet.mine"],
            "test_resnet.mine has no pre-trained weights: there are test_resnet.r160_in1k",
        ),
        (["DATA", "--model", "test_resnet.r160_in1k"], "test_resnet.r160_in1k cannot be created: "),
        (["DATA", "--model", "test_resnet", "--checkpoint", "no.pth"], "argument --checkpoint: no file no.pth"),
        (["DATA", "--model", TRAINED, "--checkpoint", "other.pth"], "give one of them"),
        (["DATA", "--model", "test_resnet", "--checkpoint", "other.pth"], "other.pth does not fit test_resnet: "),
        (["DATA", "--model", "container_nano", "--checkpoint", "other.pth"], "does not fit container_nano: "),
        (
            ["DATA", "--model", "test_vit", "--img-size", "33", "--random-weights"],
            "VisionTransformer does not take these images: Input height (33)",
        ),
        (["DATA", "--model", TRAINED, "--img-size", "0"], "image size 0 is not from 1 to 4,096 pixels"),
        (["DATA", "--model", TRAINED, "--json", "nowhere/x.json"], "no folder for nowhere/x.json"),
    ],
)
def test_mistakes(words, said, folder, tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    torch.save(timm.create_model("test_efficientnet").state_dict(), "other.pth")
    assert said in answer("probe", *(word.replace("DATA", str(folder)) for word in words), "--workers", "0")


def test_data_that_cannot_be_probed(tmp_path, answer):
    def stopped(*words):
        return answer("probe", *words, "--model", TRAINED)

    noise(tmp_path / "one", dict(a=dict(train=2, val=2)))
    assert stopped(tmp_path / "one").endswith("one has one class: there is nothing to tell apart")
    noise(tmp_path / "other", dict(a=dict(train=2, val=2), b=dict(train=2), c=dict(val=2)))
    assert "2 are in one only: b, c" in stopped(tmp_path / "other")
    noise(tmp_path / "damaged", dict(a=dict(train=12, val=12), b=dict(train=2, val=2)))
    for path in (tmp_path / "damaged/train/a").iterdir():
        path.write_bytes(b"no image")
    assert "10 images in a row cannot be read" in stopped(tmp_path / "damaged", "--workers", 1)


def test_without_scikit_learn(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit) as stop:
        main(["probe", str(folder), "--model", TRAINED])
    assert str(stop.value) == "container: the probe needs scikit-learn: pip install scikit-learn"


def test_seeds(folder):
    """Random weights are those of the seed, and no generator of the caller's is moved."""
    before = torch.get_rng_state()
    first, again, other = (weights.create("test_resnet", pretrained=False, seed=seed).fc.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(3, 8)
    assert torch.equal(probe.knn(x, torch.arange(3), normalize(x)), torch.arange(3))
