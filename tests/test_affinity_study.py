"""The study: fair, repeatable, resumable, and its report follows from its files."""

import csv
import itertools
import json
import signal
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from benchmarks import affinity_study as study


def command(*words, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.affinity_study", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def refused(*words):
    """The line with which the study, called in this process, ends at a mistake."""
    with pytest.raises(SystemExit) as stop:
        study.main([*map(str, words), "--device", "cpu"])
    assert "\n" not in str(stop.value)
    return str(stop.value)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes that differ in brightness, 32 x 32: 160 and 40 images."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 80), ("val", 20)):
        for name, level in (("bright", 170), ("dark", 90)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(level - 60, level + 60, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", [*study.MEMBERS, *study.PEERS])
def test_parameters_are_matched(name, size):
    model, container = study.create(name, 10, size), study.create("container", 10, size)
    tolerance = 0.15 if name in study.PEERS else 0.01
    assert abs(study.parameters(model) / study.parameters(container) - 1) < tolerance
    assert model.eval()(torch.randn(2, 3, size, size)).shape == (2, 10)


@pytest.mark.slow
def test_members_are_what_they_are_called():
    for name, options in study.MEMBERS.items():
        aggregations = [m for m in study.create(name, 10, 32).modules() if type(m).__name__ == "Aggregation"]
        assert len(aggregations) == 13
        assert (aggregations[-1].dynamic is None) == (options["dynamic"] == "none")
        assert (aggregations[0].static is None) == (options["static"] == "none")


def test_augmentation_crops_and_mirrors():
    """Every image is a window of the padded original or of its mirror image; all offsets occur."""
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(1, 3, 8, 8) + 1
    found = study.augment(image.expand(400, -1, -1, -1), 1, generator)
    padded = torch.nn.functional.pad(image[0], (1, 1, 1, 1))
    windows = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    windows += [window.flip(2) for window in windows]
    seen = {next(i for i, window in enumerate(windows) if torch.equal(window, one)) for one in found}
    assert len(seen) == 18


def test_interval():
    """Against the textbook: three values, t(0.975, 2) = 4.302653."""
    mean, half = study.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * statistics.stdev([1, 2, 4]) / 3**0.5, rel=1e-6)
    assert study.interval([5.0]) == (5.0, float("inf"))


def finished(member, seed, curve):
    history = [dict(epoch=i, train_loss=1.0, top1=top1, seconds=1.0) for i, top1 in enumerate(curve, 1)]
    return dict(member=member, seed=seed, parameters=1_000_000, history=history)


def test_table_follows_from_the_runs():
    runs = [finished("attention", seed, [20.0, 30.0, 40.0 + seed]) for seed in (0, 1, 2)]
    runs += [finished("container", seed, [10.0, 41.0 + seed, 50.0 + 2 * seed]) for seed in (0, 1, 2)]
    runs += [finished("mixer", seed, [1.0, 2.0, 39.0 + 2 * seed]) for seed in (0, 1)]
    runs += [finished("conv", seed, [1.0, 2.0, 60.0 - seed]) for seed in (1, 2)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in study.table(runs).splitlines()]
    half = 4.302653 / 3**0.5
    over_conv = f"-17.00 ± {12.706205:.2f}"  # 41 - 59 and 42 - 58
    assert lines[2] == ["attention", "1.000", "0 1 2", f"41.00 ± {half:.2f}", "", over_conv, "3.0 ± 0.0"]
    over_conv = f"-5.50 ± {12.706205 * 1.5:.2f}"  # 52 - 59 and 54 - 58
    assert lines[3][3:] == [f"52.00 ± {2 * half:.2f}", f"11.00 ± {half:.2f}", over_conv, "2.0 ± 0.0"]
    assert lines[4][2] == "0 1" and lines[4][5] == "-18.00"  # of the one seed that both have, without an interval
    assert lines[4][6] == "1 of 2 seeds"  # one seed never got there: said, not averaged
    assert lines[5][5] == ""


def test_published_tables_follow_from_the_published_numbers():
    """docs/results.md has what `table` makes of docs/affinity_study/runs.csv, where no run lacks an epoch."""
    text = (ROOT / "docs" / "results.md").read_text()
    runs = {}
    with open(ROOT / "docs" / "affinity_study" / "runs.csv", newline="") as file:
        for row in csv.DictReader(file):
            key = row["data"], row["member"], row["seed"]
            one = runs.setdefault(key, finished(row["member"], int(row["seed"]), []))
            one["parameters"] = int(row["parameters"])
            one["history"].append(dict(epoch=int(row["epoch"]), top1=float(row["top1"])))
    for data in {data for data, _, _ in runs}:
        own = [one for key, one in runs.items() if key[0] == data]
        pairs = {(one["member"], one["seed"]) for one in own}
        assert pairs == set(itertools.product([*study.MEMBERS, *study.PEERS], {seed for _, seed in pairs}))
        assert {tuple(entry["epoch"] for entry in one["history"]) for one in own} == {tuple(range(1, 13))}
        assert study.table(own) in text
    for data, better, other in (  # differences between mixtures, which the text has beside the tables
        ("cifar10", "light", "container"),
        ("tiny-imagenet-50", "light", "container"),
        ("cifar10", "container", "pam"),
        ("tiny-imagenet-50", "light", "pam"),
    ):
        last = [[runs[data, name, str(seed)]["history"][-1]["top1"] for seed in range(5)] for name in (better, other)]
        mean, half = study.interval([a - b for a, b in zip(*last, strict=True)])
        assert f"{mean:.2f} ± {half:.2f}" in " ".join(text.split())


@pytest.mark.slow
def test_the_study_from_the_command(images, tmp_path):
    words = ["--data-dir", images, "--epochs", 2, "--members", "attention", "container", "resnet", "--device", "cpu"]
    done = command(*words, "--seeds", 0, 1, "--out", tmp_path / "a")
    with open(tmp_path / "a" / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["member"], r["seed"], r["epoch"]) for r in rows} == {
        (m, s, e) for m in ("attention", "container", "resnet") for s in "01" for e in "12"
    }
    assert {r["device"] for r in rows} == {rows[0]["device"]} and torch.__version__ in rows[0]["device"]
    assert (tmp_path / "a" / "table.md").read_text().strip() in done.stdout
    with open(tmp_path / "a" / "gates.csv", newline="") as file:
        gates = [r for r in csv.DictReader(file) if r["member"] == "container"]
    assert len(gates) == 2 * 13 and any(float(r["alpha"]) != 0.5 for r in gates)  # it learns
    picture = np.asarray(Image.open(tmp_path / "a" / f"{images.name}.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100

    # One run is lost, another is repeated: only they are trained again, and give the same numbers.
    name = f"{images.name}/container-1.json"
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").glob("*/*.json")}
    old = json.loads((tmp_path / "a" / name).read_text())
    (tmp_path / "a" / name).unlink()
    command(*words, "--seeds", 0, 1, "--out", tmp_path / "a")
    new = json.loads((tmp_path / "a" / name).read_text())
    for key in ("train_loss", "top1"):
        assert [e[key] for e in old["history"]] == [e[key] for e in new["history"]]
    assert old["gates"] == new["gates"]
    changed = {file for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert changed == {tmp_path / "a" / name}
    again = refused("--data-dir", images, "--epochs", 3, "--out", tmp_path / "a")
    assert "is of another recipe" in again


@pytest.fixture
def interruptible():
    """Tests that a shell script runs in its background ignore Ctrl-C, and so would what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_stopped_by_ctrl_c_or_killed(images, tmp_path):
    """One line, no half a run, and nothing that goes on by itself; then the same command goes on."""
    words = ["--data-dir", images, "--members", "resnet", "--seeds", 0, "--epochs", 200, "--jobs", 1, "--device", "cpu"]
    for stop in (signal.SIGINT, signal.SIGKILL):
        out = tmp_path / stop.name
        started = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.affinity_study", *map(str, words), "--out", out],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "epoch 1" in started.stdout.readline()
        started.send_signal(stop)
        _, errors = started.communicate(timeout=60)  # the pipes end with the last process that holds them
        assert started.returncode == (1 if stop == signal.SIGINT else -signal.SIGKILL)
        if stop == signal.SIGINT:
            assert errors.splitlines()[-1] == "affinity_study: stopped; the same command goes on"
            assert "Traceback" not in errors
        assert not list(out.glob("*/*"))


def test_as_many_images_of_each_class(images):
    data = study.load(str(images), 7, 4)
    assert data.labels.tolist() == [0] * 3 + [1] * 3 and data.test_labels.tolist() == [0, 0, 1, 1]
    first = np.asarray(Image.open(images / "train" / "dark" / "0.png")).transpose(2, 0, 1)
    assert np.array_equal(data.images[3], first)
    assert len(study.load(str(images), 0, 0).images) == 160
    for wanted in (1, -5):
        with pytest.raises(SystemExit, match=f"{wanted} images are not one of each of 2 classes"):
            study.load(str(images), wanted, 0)


@pytest.mark.slow
def test_images_of_other_sizes(images, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split / "grey").mkdir(parents=True)
        Image.new("L", (28, 28)).save(tmp_path / "data" / split / "grey" / "0.png")
    said = refused("--data-dir", tmp_path / "data", "--out", tmp_path / "out", "--device", "cpu")
    assert "not all 32 x 32 or all 64 x 64: [(28, 28)]" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data-dir", "nowhere"], "nowhere has no train/ and val/"),
        (["--members", "swin"], "no member 'swin'"),
        (["--jobs", "0"], "0 runs at once are none"),
        (["--data-dir", "a/cifar10", "--data-dir", "b/cifar10"], "two data folders have one name"),
        ([], "no finished runs in"),
    ],
)
def test_mistakes(words, said, tmp_path):
    assert said in refused(*words, "--out", tmp_path)
