"""The training script as its users run it: a process with arguments, files in, files out."""

import csv
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, shared
from PIL import Image
from timm.data import create_transform

from container.training import Digits
from train_imagenet import main

# timm's image reader leaves closing a file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SMALL = ["--epochs", "1", "--batch-size", "16", "--workers", "0", "--img-size", "32", "--model", "container_light_nano"]


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "train_imagenet.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def folder(tmp_path):
    """An ImageNet-layout folder of two classes that a network tells apart: bright and dark."""
    for split, count in (("train", 24), ("val", 6)):
        for name, level in (("bright", 200), ("dark", 30)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.randint(level - 25, level + 25, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.jpg")
    return tmp_path / "data"


@pytest.mark.slow
def test_main_job(tmp_path):
    """No argument: digits, a progress bar, 97 % or more, a checkpoint that loads and a picture of the curves."""
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "%|" in result.stderr and "img/s" in result.stderr
    top1 = float(result.stdout.split("% of 360 validation images right")[0].split()[-1])
    assert top1 >= 97

    best = tmp_path / "output" / "model_best.safetensors"
    model = timm.create_model("container_light_nano_32", num_classes=10, checkpoint_path=str(best)).eval()
    digits = Digits(train=False)
    digits.transform = create_transform(32, crop_pct=1.0, interpolation="bicubic")
    images, targets = (torch.stack([digits[i][0] for i in range(360)]), torch.tensor(digits.targets))
    with torch.no_grad():
        assert (model(images).argmax(1) == targets).float().mean() >= 0.97
    assert len(list(csv.DictReader((tmp_path / "output" / "summary.csv").open()))) == 12
    assert_not_blank(tmp_path / "output" / "curves.png")


def assert_not_blank(picture):
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape[0] > 300 and 0.005 < (pixels < 200).mean() < 0.5


def test_folder(folder, tmp_path):
    result = run("--data-dir", str(folder), *SMALL, "--epochs", "2", "--mixup", "0", "--cutmix", "0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 classes" in result.stdout and "48 images to train on, 12 to validate on" in result.stdout
    with (tmp_path / "output" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    state = timm.models.load_state_dict(str(tmp_path / "output" / "last.pth.tar"))
    assert state["head.fc.weight"].shape == (2, 128)
    assert_not_blank(tmp_path / "output" / "curves.png")


def test_released_recipe_and_a_second_run_beside_the_first(folder, tmp_path, monkeypatch):
    """Every augmentation runs, also on a size-bound model; an earlier run's folder is not touched."""
    monkeypatch.chdir(tmp_path)
    for model in ("container_light_nano", "container_mixer"):
        main(["--data-dir", str(folder), *SMALL, "--model", model, "--drop-path", "0.2"])
    assert (tmp_path / "output" / "last.pth.tar").exists() and (tmp_path / "output-1" / "last.pth.tar").exists()
    assert "model: container_light_nano" in (tmp_path / "output" / "args.yaml").read_text()
    assert "model: container_mixer" in (tmp_path / "output-1" / "args.yaml").read_text()


def test_one_seed_gives_one_result(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main(["--data-dir", str(folder), *SMALL, "--seed", seed, "--output", name])
        states.append(timm.models.load_state_dict(str(tmp_path / name / "last.pth.tar")))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_best_weights_are_the_raw_ones_unless_told_otherwise(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--data-dir", str(folder), *SMALL])  # the paper's recipe: averaged weights have not moved in so few steps
    best = torch.load(tmp_path / "output" / "model_best.pth.tar", weights_only=False)
    alone = timm.models.load_state_dict(str(tmp_path / "output" / "model_best.safetensors"))
    assert all(torch.equal(value, best["state_dict"][key]) for key, value in alone.items())
    assert not torch.equal(alone["stem.proj.weight"], best["state_dict_ema"]["stem.proj.weight"])


def test_averaged_weights_are_evaluated_and_saved(folder, tmp_path, monkeypatch):
    """They follow the model where the decay is nearly 0, never where it is 1; they choose the best checkpoint."""
    monkeypatch.chdir(tmp_path)
    states, tops = [], []
    for name, decay in (("fast", "1e-9"), ("never", "1")):
        arguments = ("--ema-decay", decay, "--best", "ema", "--output", name)
        main(["--data-dir", str(folder), *SMALL, "--epochs", "3", *arguments])
        checkpoint = torch.load(tmp_path / name / "last.pth.tar", weights_only=False)
        states.append((checkpoint["state_dict"], checkpoint["state_dict_ema"]))
        with (tmp_path / name / "summary.csv").open() as file:
            tops.append([(float(row["eval_top1"]), float(row["eval_ema_top1"])) for row in csv.DictReader(file)])
        best = torch.load(tmp_path / name / "model_best.pth.tar", weights_only=False)
        assert best["metric"] == max(ema for _, ema in tops[-1])
        alone = timm.create_model(
            "container_light_nano", num_classes=2, checkpoint_path=str(tmp_path / name / "model_best.safetensors")
        )
        assert all(torch.equal(value, best["state_dict_ema"][key]) for key, value in alone.state_dict().items())
    for key, value in states[0][0].items():
        torch.testing.assert_close(states[0][1][key], value)
    assert all(model == ema for model, ema in tops[0])
    assert not torch.equal(states[1][0]["stem.proj.weight"], states[1][1]["stem.proj.weight"])
    assert len({ema for _, ema in tops[1]}) == 1


def test_two_processes(folder, tmp_path):
    """Under torchrun, on CPUs: one log, one output folder, every validation image counted once, one model's weights."""
    arguments = ["--data-dir", str(folder), *SMALL, "--batch-size", "8", "--ema-decay", "0.9", "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, str(ROOT / "train_imagenet.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 x 8 images a step") == 1 and [p.name for p in tmp_path.glob("output*")] == ["output"]
    with (tmp_path / "output" / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    right = float(row["eval_top1"]) * 12 / 100
    assert right == pytest.approx(round(right), abs=1e-6)
    state = timm.models.load_state_dict(str(tmp_path / "output" / "last.pth.tar"), use_ema=False)
    assert set(state) == set(timm.create_model("container_light_nano").state_dict())


def test_cifar10(tmp_path):
    """Real photos in the ImageNet layout, with `test` for a validation folder: 20 of each of CIFAR-10's classes."""
    count = Counter()
    with tarfile.open(shared("data/cifar10.tar.xz")) as archive:
        for member in archive:
            group = member.name.rsplit("/", 1)[0]
            if member.isfile() and count[group] < 20:
                count[group] += 1
                archive.extract(member, tmp_path, filter="data")
            if len([c for c in count.values() if c == 20]) == 20:
                break
    arguments = (
        "--model",
        "container_light",
        "--img-size",
        "32",
        "--epochs",
        "1",
        "--batch-size",
        "50",
        "--workers",
        "1",
    )
    result = run("--data-dir", "cifar10", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "10 classes" in result.stdout and "200 images to train on, 200 to validate on" in result.stdout


@pytest.mark.parametrize(
    "spoil, arguments, message",
    [
        (None, ["--data-dir", "nowhere"], "no folder nowhere"),
        ("train", [], "no folder train in "),
        ("val", [], "no folder val or validation or test in "),
        ("val/dark", [], "2 classes to train on, 1 to validate on"),
        ("images", [], "no images in class folders of "),
        (None, ["--model", "container_lite"], "unknown model container_lite; this package has container, "),
        (None, ["--batch-size", "500"], "a step of 1 x 500 for 48 training images"),
        (None, ["--batch-size", "15"], "--batch-size 15 is odd, but mixup and cutmix mix images in pairs"),
        (None, ["--epochs", "0"], "--epochs 0 is not positive"),
        (None, ["--img-size", "2"], "image height 2 is smaller than the stem's patch 4"),
        (None, ["--pretrained", "--model", "container_light"], "have to be downloaded by hand"),
        (
            None,
            ["--lr-base", "1e30", "--warmup-lr", "1e30", "--mixup", "0", "--cutmix", "0"],
            "loss is nan in epoch 1, step 2",
        ),
        (None, ["--nonsense"], "unrecognized arguments: --nonsense"),
        (None, ["--recipe", "none"], "no recipe none; there are digits, paper"),
        (None, ["--recipe", "digits", "--best", "ema"], "--best ema needs --ema-decay"),
    ],
)
def test_a_mistake_is_answered_in_one_line(folder, tmp_path, monkeypatch, capsys, spoil, arguments, message):
    monkeypatch.chdir(tmp_path)
    if spoil == "images":
        for image in (folder / "train").glob("*/*"):
            image.rename(image.with_suffix(".txt"))
    elif spoil:
        shutil.rmtree(folder / spoil)
    with pytest.raises(SystemExit) as exit:
        main(["--data-dir", str(folder), *SMALL, *arguments])
    # What the interpreter prints for the exit: its argument, unless argparse has printed a line already.
    line = capsys.readouterr().err.splitlines()[-1] if exit.value.code == 2 else exit.value.code
    assert message in line and "\n" not in line


def test_a_mistake_ends_the_process_without_a_traceback(tmp_path):
    result = run("--data-dir", "nowhere", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == "train_imagenet.py: no folder nowhere\n"
    assert not list(tmp_path.iterdir())
