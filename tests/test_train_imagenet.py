"""The training script as its users run it: a process with arguments, files in, files out."""

import csv
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import reference
import timm
import torch
import yaml
from conftest import ROOT, shared
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from timm.task import ClassificationTask

import container
from container.training import Checkpoints, Digits, Run
from container.training.run import growing
from train_imagenet import build_model, main, parse_args

# A run of seconds in which nothing is random but the order; the paper's recipe but for what is named here.
SMALL = ["--epochs", "1", "--batch-size", "16", "--workers", "0", "--img-size", "32", "--model", "container_light_nano"]
PLAIN = ["--mixup", "0", "--cutmix", "0", "--reprob", "0", "--drop-path", "0", "--aug-repeats", "0"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(*arguments, cwd, launcher=(), **options):
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train_imagenet.py"), *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        **options,
    )


def run(*arguments, cwd, launcher=(), **options):
    with start(*arguments, cwd=cwd, launcher=launcher, **options) as process:
        out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """Runs the script in this process, in an empty folder, on the bright and dark images.

    What each run would do alike for a second, and other tests look at, it does not: counting cost, drawing curves.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("container.training.run.estimate", lambda *_: dict(params=1, gmacs=1.0, gib=1.0))
    monkeypatch.setattr("container.training.report.plot_curves", lambda *_: None)

    def call(*arguments, output="output"):
        main(["--data-dir", str(folder), *SMALL, *arguments, "--output", output])
        return Checkpoints(tmp_path / output).load()

    return call


def rows(output, name="summary.csv"):
    with (output / name).open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def assert_same(first, second, exactly=True):
    assert first.keys() == second.keys()
    for key, value in first.items():
        if exactly:
            assert torch.equal(value, second[key]), key
        else:
            torch.testing.assert_close(value, second[key], rtol=2e-4, atol=2e-6)


def assert_not_blank(picture):
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape[0] > 300 and 0.005 < (pixels < 200).mean() < 0.5


@pytest.mark.slow
def test_main_job(tmp_path):
    """No argument: digits, a progress bar, 97 % or more, weights that load and evaluate the same, and a picture."""
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "%|" in result.stderr and "img/s" in result.stderr and "data_wait=" in result.stderr
    top1 = float(result.stdout.split("% top-1 on 360 validation images")[0].split()[-1])
    assert top1 >= 97

    best = tmp_path / "output" / "model_best.safetensors"
    model = timm.create_model("container_light_nano_32", num_classes=10, checkpoint_path=str(best)).eval()
    digits = Digits(train=False)
    digits.transform = create_transform(32, crop_pct=1.0, interpolation="bicubic")
    images, targets = (torch.stack([digits[i][0] for i in range(360)]), torch.tensor(digits.targets))
    with torch.no_grad():
        right = (model(images).argmax(1) == targets).float().mean().item()
    assert right >= 0.97
    result = run("--eval", "--checkpoint", str(best), cwd=tmp_path)
    assert f"{100 * right:.2f} % top-1" in result.stdout
    assert len(rows(tmp_path / "output")) == 12
    assert_not_blank(tmp_path / "output" / "curves.png")


def test_folder(folder, tmp_path):
    result = run("--data-dir", str(folder), *SMALL, *PLAIN, "--epochs", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 classes" in result.stdout and "48 images to train on, 12 to validate on" in result.stdout
    assert [row["epoch"] for row in rows(tmp_path / "output")] == [0, 1]
    assert_not_blank(tmp_path / "output" / "curves.png")
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert summary["command"].startswith("train_imagenet.py --data-dir ") and summary["epochs"] == 2
    assert summary["data"] == dict(train_images=48, val_images=12, classes=2)
    assert summary["best"]["top1"] == max(row["eval_top1"] for row in rows(tmp_path / "output"))
    assert summary["versions"]["torch"] == torch.__version__ and summary["seconds"] > 0
    assert len(list((tmp_path / "output" / "tensorboard").iterdir())) == 2  # by epoch, by step


def test_released_recipe_and_a_second_run_beside_the_first(here, tmp_path):
    """Every augmentation runs, also on a size-bound model; an earlier run's folder is not touched."""
    for model in ("container_light_nano", "container_mixer"):
        here("--model", model, "--drop-path", "0.2")
    for name, model in (("output", "container_light_nano"), ("output-1", "container_mixer")):
        assert yaml.safe_load((tmp_path / name / "args.yaml").read_text())["model"] == model
        assert (tmp_path / name / "model_best.safetensors").exists()


def test_one_seed_gives_one_result_with_any_number_of_workers(here):
    a, b, c = (here("--workers", w, "--seed", s, output=w + s)["state_dict"] for w, s in ("01", "21", "02"))
    assert_same(a, b)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_best_weights_are_the_raw_ones_unless_told_otherwise(here, tmp_path):
    last = here()  # one epoch of the paper's recipe: averaged weights have not moved in so few steps
    alone = timm.models.load_state_dict(str(tmp_path / "output" / "model_best.safetensors"))
    assert_same(alone, last["state_dict"])
    assert not torch.equal(alone["stem.proj.weight"], last["state_dict_ema"]["stem.proj.weight"])


def test_averaged_weights_are_evaluated_and_saved(here, tmp_path):
    """They follow the model where the decay is nearly 0, never where it is 1; they choose the best weights."""
    fast = here("--epochs", "3", "--ema-decay", "1e-9", "--best", "ema", output="fast")
    for key, value in fast["state_dict"].items():
        torch.testing.assert_close(fast["state_dict_ema"][key], value)
    assert all(row["eval_top1"] == row["eval_ema_top1"] for row in rows(tmp_path / "fast"))
    never = here("--epochs", "3", "--ema-decay", "1", "--best", "ema", output="never")
    assert not torch.equal(never["state_dict"]["stem.proj.weight"], never["state_dict_ema"]["stem.proj.weight"])
    assert len({row["eval_ema_top1"] for row in rows(tmp_path / "never")}) == 1
    alone = timm.models.load_state_dict(str(tmp_path / "never" / "model_best.safetensors"))
    counters = {key for key in alone if key.endswith("num_batches_tracked")}
    assert_same(*({key: state[key] for key in state.keys() - counters} for state in (alone, never["state_dict_ema"])))
    assert never["progress"]["best"] == rows(tmp_path / "never")[0]["eval_ema_top1"]


def test_averages_warm_up(here):
    """They follow the first weights, and do not remember the random ones."""
    rate = ["--lr-base", "0.03", "--warmup-epochs", "0", "--no-sched-late"]
    cold, warm = (
        here(*PLAIN, "--ema-decay", "0.9999", "--epochs", "2", *rate, f"--{no}ema-warmup", output=f"{no}x")
        for no in ("no-", "")
    )
    key = "head.fc.weight"
    assert torch.equal(cold["state_dict"][key], warm["state_dict"][key])
    distances = [(state["state_dict_ema"][key] - state["state_dict"][key]).norm() for state in (cold, warm)]
    assert distances[1] < 0.5 * distances[0]


def test_gradient_accumulation_is_the_large_batch(here):
    """Of a model without batch norm, which sees the images of one pass only."""
    model = (*PLAIN, "--model", "test_convnext", "--img-size", "64", "--clip-grad", "1")
    large = here(*model, "--batch-size", "16", output="large")
    for size, passes in (("8", "2"), ("2", "8")):
        small = here(*model, "--batch-size", size, "--grad-accum", passes, output=size)
        assert_same(large["state_dict"], small["state_dict"], exactly=False)
        assert small["progress"]["history"][0]["train_loss"] == pytest.approx(
            large["progress"]["history"][0]["train_loss"], rel=1e-5
        )


def test_clipping_bounds_the_step(here):
    """AdamW's first moment is an average of gradients, and so is no longer than they may be."""
    free, bound = (here(*PLAIN, *extra, output=str(len(extra))) for extra in ([], ["--clip-grad", "1e-4"]))
    norms = [
        sum(p["exp_avg"].square().sum() for p in c["optimizer"]["state"].values()).sqrt().item() for c in (free, bound)
    ]
    assert norms[1] <= 1e-4 < norms[0]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_mixed_precision_is_near_float32(here, dtype):
    """Weights stay 32-bit, and float16 has its scaler."""
    full, half = (here(*PLAIN, "--amp", amp, output=amp) for amp in ("none", dtype))
    assert all(v.dtype == torch.float32 for v in half["state_dict"].values() if v.is_floating_point())
    losses = [c["progress"]["history"][0]["train_loss"] for c in (full, half)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert (half["scaler"]["scale"] > 1) == (dtype == "float16")


def test_a_recipe_computes_in_16_bits_on_gpus_only():
    from train_imagenet import parse_args

    assert parse_args(["--recipe", "paper", "--device", "cpu"]).amp == "none"
    assert parse_args(["--recipe", "paper", "--device", "cpu", "--amp", "float16"]).amp == "float16"
    assert parse_args(["--recipe", "paper", "--device", "cuda"]).amp == "float16"


@pytest.mark.parametrize(
    "extra", [["--channels-last"], pytest.param(["--compile", "aot_eager"], marks=pytest.mark.slow)]
)
def test_layout_and_compilation_change_nothing(here, extra):
    plain, other = (here(*PLAIN, *more, output=f"output{len(more)}") for more in ([], extra))
    losses = [state["progress"]["history"][0]["train_loss"] for state in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore:No device id is provided")
def test_layers_near_the_image_learn_slower(here):
    """By stages: the stem, four of them, the classifier."""
    groups = here("--layer-decay", "0.5")["optimizer"]["param_groups"]
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales == [0.5**i for i in (5, 4, 3, 2, 1, 0)]


def test_images_grow(here, monkeypatch):
    """By 32 pixels and more, from the first epoch to the last; validation is at the full size."""
    sizes, original = [], ClassificationTask.forward

    def record(self, images, targets):
        sizes.append(images.shape[-1])
        return original(self, images, targets)

    monkeypatch.setattr(ClassificationTask, "forward", record)
    here(*PLAIN, "--epochs", "3", "--start-size", "32", "--img-size", "96")
    assert sizes == [*[32] * 3, *[64] * 3, *[96] * 3]


def test_distillation_learns_from_the_teacher(here, tmp_path):
    """With the whole loss on a teacher, the student's loss is the divergence from it, 0 where they are one network."""
    here(*PLAIN, "--lr-base", "1e-9", output="teacher")
    weights = str(tmp_path / "teacher" / "model_best.safetensors")
    arguments = (*PLAIN, "--teacher", "container_light_nano", "--teacher-checkpoint", weights, "--distill", "1")
    same = here(*arguments, "--checkpoint", weights, "--lr-base", "1e-9", output="same")
    other = here(*arguments, "--seed", "1", output="other")
    # Not quite 0: the student norms by its batch, the teacher by running statistics.
    assert same["progress"]["history"][0]["train_loss"] < other["progress"]["history"][0]["train_loss"]


def test_a_teacher_of_other_classes_is_refused(here, folder, tmp_path):
    """Of another order, number or names, from a file or from the package, as --eval refuses them."""
    teacher = ("--teacher", "container_light_nano", "--teacher-checkpoint", str(tmp_path / "teacher.safetensors"))
    for names, message in (
        (["dark", "bright"], "knows 2 classes, and the data has 2: number 0 is dark there, and bright here"),
        (["fork", "knife", "spoon"], "knows 3 classes, and the data has 2"),
    ):
        state = timm.create_model("container_light_nano", num_classes=len(names)).state_dict()
        save_file(state, tmp_path / "teacher.safetensors", dict(classes=json.dumps(names)))
        with pytest.raises(SystemExit, match=message):
            here(*teacher, "--distill", "0.5")
    for part in ("train", "val"):
        for name in ("c", "d", "e", "f"):
            shutil.copytree(folder / part / "dark", folder / part / name)
    with pytest.raises(SystemExit, match=r"trashnet knows 6 classes, .*: number 0 is cardboard there, and bright here"):
        here("--teacher", "container_light_nano.trashnet", "--distill", "0.5")


@pytest.mark.slow
def test_both_classifiers_of_a_distilled_model_are_kept(here, tmp_path):
    """Where the classes are the file's; with others, both are drawn anew."""
    name, frozen = "deit_tiny_distilled_patch16_224", ("--lr-base", "0", "--warmup-lr", "0", "--min-lr", "0")
    small = ("--model", name, "--img-size", "32", "--epochs", "1", "--drop-path", "0")
    for count in (2, 3):
        state = timm.create_model(name, num_classes=count, img_size=32).state_dict()
        save_file(state, tmp_path / "own.safetensors")
        file = str(tmp_path / "own.safetensors")
        tuned = here(*small, *frozen, "--checkpoint", file, output=f"{count}")["state_dict"]
        for key in ("head.weight", "head_dist.weight"):
            assert torch.equal(tuned[key], state[key]) if count == 2 else tuned[key].shape[0] == 2
        assert torch.equal(tuned["patch_embed.proj.weight"], state["patch_embed.proj.weight"])


def test_fine_tuning_keeps_all_but_the_classifier(here, tmp_path):
    state = timm.create_model("container_light_nano", num_classes=7).state_dict()
    save_file(state, tmp_path / "seven.safetensors")
    frozen = (
        "--checkpoint",
        str(tmp_path / "seven.safetensors"),
        "--lr-base",
        "0",
        "--warmup-lr",
        "0",
        "--min-lr",
        "0",
    )
    tuned = here(*frozen)["state_dict"]
    assert tuned["head.fc.weight"].shape[0] == 2
    names = [
        key for key in state if not key.startswith("head.fc") and "running" not in key and "num_batches" not in key
    ]
    assert len(names) > 100 and all(torch.equal(state[key], tuned[key]) for key in names)


@pytest.mark.slow
def test_the_released_layout_is_a_starting_point_too(here, tmp_path):
    torch.save(dict(model=reference.random_state(0)), tmp_path / "released.pth")
    frozen = ("--lr-base", "0", "--warmup-lr", "0", "--min-lr", "0", "--model", "container_light")
    tuned = here("--checkpoint", str(tmp_path / "released.pth"), *frozen)["state_dict"]
    assert torch.equal(tuned["stem.proj.weight"], reference.random_state(0)["patch_embed1.proj.weight"])
    assert tuned["head.fc.weight"].shape == (2, 512)


def test_evaluation_of_any_weights(folder, here, tmp_path, capsys):
    here(*PLAIN, "--epochs", "2")
    trained = rows(tmp_path / "output")
    for name, file in (("best", "model_best.safetensors"), ("last", Checkpoints(tmp_path / "output").paths()[0].name)):
        capsys.readouterr()
        main(["--data-dir", str(folder), *SMALL, "--eval", "--checkpoint", str(tmp_path / "output" / file)])
        out = capsys.readouterr().out
        top1 = max(row["eval_top1"] for row in trained) if name == "best" else trained[-1]["eval_top1"]
        assert f"{top1:.2f} % top-1, 100.00 % top-5" in out and "12 images of 2 classes at 32 x 32" in out
    with pytest.raises(SystemExit, match="knows 2 classes, and the data has 10"):
        main(["--recipe", "digits", *SMALL, "--eval", "--checkpoint", str(tmp_path / "output" / file)])
    # Class folders without a split, as ImageNet-V2 comes.
    main(["--data-dir", str(folder / "val"), *SMALL, "--eval", "--checkpoint", str(tmp_path / "output" / file)])
    assert capsys.readouterr().out == out


def test_evaluation_by_real_labels(tmp_path, monkeypatch, capsys):
    """ImageNet-ReaL: an image is right if its prediction is any of its labels, and does not count if it has none."""
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        for c in range(6):
            (tmp_path / "data" / str(c)).mkdir(parents=True, exist_ok=True)
        name = f"ILSVRC2012_val_{i + 1:08d}.JPEG"
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(tmp_path / "data" / str(i) / name)
    model = timm.create_model("container_light_nano", num_classes=6)
    save_file(model.state_dict(), tmp_path / "random.safetensors")
    arguments = [
        "--data-dir",
        "data",
        *SMALL,
        "--eval",
        "--checkpoint",
        "random.safetensors",
        "--real-labels",
        "real.json",
    ]
    for labels, expected in (([[0, 1, 2, 3, 4, 5]] * 6, "100.00 %"), ([[], [], [], [], [], [-1]], "0.00 %")):
        (tmp_path / "real.json").write_text(json.dumps(labels))
        main(arguments)
        assert f"{expected} top-1, {expected} top-5 by real.json" in capsys.readouterr().out
    (tmp_path / "real.json").write_text(json.dumps([[0]] * 5))
    with pytest.raises(SystemExit, match=r"the images are not those of real\.json \(5 labels\)"):
        main(arguments)


def test_plan(folder, tmp_path, monkeypatch, capsys):
    """--dry-run tells parameters, GMACs, steps, rate and memory, and leaves nothing."""
    monkeypatch.chdir(tmp_path)
    main(["--data-dir", str(folder), "--batch-size", "4", "--grad-accum", "3", "--dry-run", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "container_light at 224 px: 20.12 M parameters, 3.847 GMACs" in out
    assert "300 epochs of 4 steps of 12 images (1 x 4 x 3)" in out
    assert "learning rate: 1.0e-06 to 1.2e-05 in the first 5 epochs, then down to 1.0e-05" in out
    assert "checkpoints: 307 MiB each" in out and "48 images are few for training from scratch" in out
    # On a login node, for eight GPUs: in the recipe's 16 bits, with an eighth of the steps.
    main(["--data-dir", str(folder), "--batch-size", "2", "--dry-run", "8", "--device", "cuda"])
    planned = capsys.readouterr().out
    assert "300 epochs of 3 steps of 16 images (8 x 2 x 1)" in planned and "on cuda: about " in planned
    half, full = (float(re.search(r"about ([\d.]+) GiB of memory", text)[1]) for text in (planned, out))
    assert half < full
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_classifier_alone(here, tmp_path):
    """`linear`: all else stays as it was, norms' statistics too; what it leaves loads."""
    torch.manual_seed(0)
    start = timm.create_model("container_light_nano", num_classes=2).state_dict()
    torch.save(start, tmp_path / "start.pth")
    flags = ["--recipe", "linear", "--checkpoint", "start.pth", "--epochs", "1", "--batch-size", "16"]
    state = here(*flags)["state_dict"]
    changed = {key for key, tensor in state.items() if not torch.equal(tensor, start[key])}
    assert changed == {"head.fc.weight", "head.fc.bias"}
    model = timm.create_model("container_light_nano", checkpoint_path="output/model_best.safetensors", num_classes=2)
    assert torch.equal(model.head.fc.weight, state["head.fc.weight"])


def test_arguments_of_optimizer_and_model(here):
    state = here("--opt", "nadamw", "--opt-args", "betas=(0.5,0.9)", "--model-args", "depths=(1,1,1,1)")
    assert all(group["betas"] == [0.5, 0.9] for group in state["optimizer"]["param_groups"])
    assert len({key.split(".blocks.")[1][0] for key in state["state_dict"] if ".blocks." in key}) == 1
    assert yaml.safe_load(Path("output/args.yaml").read_text())["opt"] == "nadamw"
    again = parse_args(["--recipe", "output/args.yaml"])
    assert (again.opt_args, again.model_args) == (dict(betas=[0.5, 0.9]), dict(depths=[1, 1, 1, 1]))
    model = timm.create_model("local-dir:output", pretrained=True)
    assert model.state_dict().keys() == state["state_dict"].keys()


def test_what_timm_s_script_has_too(here, monkeypatch):
    """Each does what it says, in the run's own loop."""
    seen, forward = [], ClassificationTask.forward

    def watch(task, images, targets):
        if task.training:
            kind = type(task.criterion).__name__
            seen.append(
                (kind, task.trainable_module.stages[0].grad_checkpointing, ((targets > 0).sum(1) > 1).any().item())
            )
        return forward(task, images, targets)

    monkeypatch.setattr(ClassificationTask, "forward", watch)
    flags = ["--smoothing", "0", "--mixup", "0.8", "--mixup-off-epoch", "1", "--loss", "bce", "--grad-checkpointing"]
    here("--epochs", "2", *flags, "--train-interpolation", "bilinear")
    assert {one[:2] for one in seen} == {("BinaryCrossEntropy", True)}
    assert any(mixed for *_, mixed in seen[:3]) and not any(mixed for *_, mixed in seen[3:]) and len(seen) == 6
    train = Run.train_loader
    monkeypatch.setattr(Run, "train_loader", lambda run, size: transforms.append(train(run, size)) or transforms[-1])
    transforms = []
    here("--train-interpolation", "bilinear", "--ratio", "0.9", "1.1", output="other")
    transform = str(transforms[0].loader.dataset.dataset.transform)
    assert "interpolation=bilinear" in transform and "ratio=(0.9, 1.1)" in transform


def test_a_model_without_stochastic_depth(capsys):
    """The recipe's is told and dropped; a flag's is for the model to refuse."""
    assert parse_args(["--recipe", "paper", "--model", "ghostnet_050"]).drop_path == 0
    assert "ghostnet_050 has no stochastic depth: the recipe's drop_path 0.1 is not used" in capsys.readouterr().out
    assert parse_args(["--recipe", "paper", "--model", "ghostnet_050", "--drop-path", "0.2"]).drop_path == 0.2
    assert parse_args(["--recipe", "paper", "--model", "resnet10t"]).drop_path == 0.1
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_wandb(here, tmp_path, monkeypatch):
    """Its own client, which writes a file where there is no network; a run that goes on is the same run there."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    here("--wandb", "project", "--log-steps", "1", "--resume", "auto", *PLAIN)
    here("--wandb", "project", "--epochs", "1", "--resume", "auto", *PLAIN)
    files = list((tmp_path / "output" / "wandb").glob("offline-run-*/run-output-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1
    told = b"".join(path.read_bytes() for path in files)
    for name in (b"steps/grad_norm", b"eval/top1", b"container_light_nano"):
        assert name in told
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="--wandb needs the client: pip install wandb"):
        here("--wandb", "project")


@pytest.mark.slow
def test_wandb_without_an_account(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    result = run("--recipe", "smoke", "--wandb", "project", "--output", "online", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("train_imagenet.py: --wandb project: No API key configured")


def test_a_run_s_folder_is_a_model_of_timm_s(here, folder, tmp_path, capsys):
    """With its classes, its image size, and what evaluation sees of an image."""
    here("--img-size", "64", "--crop-pct", "0.7", *PLAIN)
    model = timm.create_model("local-dir:output", pretrained=True).eval()
    best = timm.create_model(
        "container_light_nano", checkpoint_path="output/model_best.safetensors", num_classes=2
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), best(images))
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 64, 64) and config["crop_pct"] == 0.7
    assert model.pretrained_cfg["label_names"] == ["bright", "dark"]
    capsys.readouterr()
    main(["--eval", "--checkpoint", "output/model_best.safetensors", "--device", "cpu", "--workers", "0"])
    assert "12 images of 2 classes at 64 x 64" in capsys.readouterr().out


def test_damaged_images_are_named_and_skipped(folder, here, capsys):
    (folder / "train" / "dark" / "0.jpg").write_bytes(b"no image")
    (folder / "train" / "dark" / "1.jpg").write_bytes((folder / "train" / "dark" / "1.jpg").read_bytes()[:300])
    (folder / "val" / "bright" / "0.jpg").write_bytes(b"")
    (folder / "val" / "notes.txt").write_text("not an image, and nobody's class")
    state = here(*PLAIN, "--epochs", "2", "--workers", "2")
    err = capsys.readouterr().err
    assert err.count("cannot be read, and another takes its place: dark/0.jpg") == 1
    assert err.count("cannot be read, and another takes its place: dark/1.jpg") == 1
    assert err.count("cannot be read, and does not count: bright/0.jpg") == 1
    right = state["progress"]["history"][-1]["eval_top1"] * 11 / 100
    assert right == pytest.approx(round(right), abs=1e-6)


def test_two_processes(folder, tmp_path):
    """Under torchrun, on CPUs: one log, one output folder, every validation image counted once, one model's weights."""
    arguments = ["--data-dir", str(folder), *SMALL, "--batch-size", "8", "--ema-decay", "0.9", "--device", "cpu"]
    result = run(*arguments, cwd=tmp_path, launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("steps of 16 images (2 x 8 x 1)") == 1
    assert [p.name for p in tmp_path.glob("output*")] == ["output"]
    (row,) = rows(tmp_path / "output")
    right = row["eval_top1"] * 12 / 100
    assert right == pytest.approx(round(right), abs=1e-6)
    state = Checkpoints(tmp_path / "output").load()["state_dict"]
    assert set(state) == set(timm.create_model("container_light_nano").state_dict())


@pytest.mark.slow
def test_two_processes_train_like_one(folder, here, tmp_path):
    """The same global batch gives the same curve, with augmentation: samples are seeded by their place in the epoch.

    Without batch norm, whose statistics are those of a process's own images, and without what is drawn for a batch.
    """
    arguments = [*PLAIN, "--model", "test_convnext", "--img-size", "64", "--epochs", "3", "--seed", "3"]
    one = here(*arguments, "--batch-size", "16", output="one")
    command = ["--data-dir", str(folder), *SMALL, *arguments, "--batch-size", "8", "--output", "two"]
    result = run(*command, cwd=tmp_path, launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert_same(one["state_dict"], Checkpoints(tmp_path / "two").load()["state_dict"], exactly=False)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two")):
        assert [a[key] for key in ("train_loss", "eval_loss")] == pytest.approx(
            [b[key] for key in ("train_loss", "eval_loss")], rel=1e-5
        )


@pytest.mark.slow
def test_the_limit_of_unreadable_images_is_for_all_processes(folder, tmp_path):
    """Twelve of 48: fewer than ten for each of the two, and more than ten in all."""
    for name in ("bright", "dark"):
        for i in range(0, 24, 4):  # not in a row: a reader would try the next ones
            (folder / "train" / name / f"{i}.jpg").write_bytes(b"no image")
    arguments = ["--data-dir", str(folder), *SMALL, *PLAIN, "--batch-size", "8", "--device", "cpu"]
    result = run(*arguments, cwd=tmp_path, launcher=TORCHRUN)
    assert result.returncode == 1 and "12 of 48 images cannot be read" in result.stderr, result.stderr


@pytest.mark.slow
def test_two_nodes_meet_by_rendezvous(folder, tmp_path):
    """Two launchers of one process each, as on two machines."""
    arguments = ["--data-dir", str(folder), *SMALL, "--batch-size", "8", "--device", "cpu"]
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--local-addr=127.0.0.1"),
    ]
    nodes = [start(*arguments, cwd=tmp_path, launcher=launcher) for _ in range(2)]
    outs = [node.communicate(timeout=600) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert sorted("steps of 16 images (2 x 8 x 1)" in out for out, _ in outs) == [False, True]


def everyone(pid):
    """A process and all that it has started, whatever session they are in."""
    found = [psutil.Process(pid)]
    return found + found[0].children(recursive=True)


def begin(folder, tmp_path, *arguments, launcher=()):
    """A run that would go on for long, after its first new checkpoint."""
    arguments = ["--data-dir", str(folder), *SMALL, "--batch-size", "4", "--epochs", "500", *arguments]
    before = set((tmp_path / "output").glob("checkpoint-*"))
    process = start(*arguments, "--resume", "auto", "--device", "cpu", cwd=tmp_path, launcher=launcher)
    while set((tmp_path / "output").glob("checkpoint-*")) <= before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(
    "launcher, number",
    [
        ([], "SIGTERM"),
        pytest.param([], "SIGINT", marks=pytest.mark.slow),
        pytest.param([], "SIGHUP", marks=pytest.mark.slow),
        pytest.param([], "SIGUSR1", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_stops(folder, tmp_path, launcher, number):
    """To every process twice, loaders of data among them, as Slurm and torchrun together send it."""
    number = getattr(signal, number)
    for again in range(3 if launcher else 1):
        process = begin(folder, tmp_path, "--workers", "1", launcher=launcher)
        before = Checkpoints(tmp_path / "output").paths()
        time.sleep(0.5 * again)
        for _ in range(2):
            for one in everyone(process.pid):
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(number)
        out, err = process.communicate(timeout=60)
        if not launcher:
            assert process.returncode == 128 + number and "Traceback" not in err, err
        assert Checkpoints(tmp_path / "output").paths() != before, err
        assert (out + err).count("told to stop after ") == 1 and "--resume auto --output output" in out + err
        assert (tmp_path / "output" / "stopped").exists()
        where = Checkpoints(tmp_path / "output").load()["progress"]
        assert where["epoch"] < 500
        assert f"after {where['epoch']} epochs and {where['step']} steps" in out + err


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.slow
def test_a_dead_process_ends_the_job_in_seconds(folder, tmp_path, dead):
    """Killed, as by the kernel where memory is short; the loaders of neither outlive it."""
    process = begin(folder, tmp_path, "--workers", "1", launcher=TORCHRUN)
    everybody = everyone(process.pid)
    trainers = {
        int(one.environ()["RANK"]): one for one in everybody if one.ppid() == process.pid and "RANK" in one.environ()
    }
    trainers[dead].kill()
    began = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - began < 20 and process.returncode
    assert not [one for one in everybody if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_killed_worker_is_one_line(folder, tmp_path):
    """As by the kernel where memory is short."""
    process = begin(folder, tmp_path, "--workers", "1")
    before = Checkpoints(tmp_path / "output").paths()
    everyone(process.pid)[1].kill()
    _, err = process.communicate(timeout=60)
    line = err.replace("\r", "\n").splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in err, err
    assert re.fullmatch(
        r"train_imagenet.py: DataLoader worker \(pid \d+\) is killed by signal: Killed.*Fewer --workers .*", line
    )
    assert Checkpoints(tmp_path / "output").load() and set(before) <= set(Checkpoints(tmp_path / "output").paths())


@pytest.mark.slow
def test_a_full_shared_memory_ends_a_run(folder, tmp_path):
    """Filled in the middle of the run, by another program: the batch that found no room never comes."""
    mounts = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if shutil.which("unshare") is None or subprocess.run(mounts, capture_output=True).returncode:
        pytest.skip("this user may not mount a /dev/shm of its own")
    launch = [sys.executable, str(ROOT / "train_imagenet.py"), "--data-dir", str(folder), *SMALL, "--epochs", "900"]
    launch += ["--workers", "1", "--save-steps", "1", "--device", "cpu"]
    fill = "until ls output/checkpoint-*; do sleep 0.1; done; dd if=/dev/zero of=/dev/shm/full bs=1M count=40"
    mount = f'mount -t tmpfs -o size=20m tmpfs /dev/shm || exit 1; ({fill}) >/dev/null 2>&1 & exec "$@"'
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", mount, "sh", *launch],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        _, err = process.communicate(timeout=120)
    ended = r"\ntrain_imagenet.py: /dev/shm is full: (no loader can|[\d,]+ bytes are free, and a batch has)"
    assert re.search(ended, err), err
    assert Checkpoints(tmp_path / "output").load()


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(folder, tmp_path):
    process = begin(folder, tmp_path, "--workers", "0")
    second = run("--data-dir", str(folder), *SMALL, "--resume", "auto", cwd=tmp_path)
    assert second.returncode == 1
    who = f"(process {process.pid} on {socket.gethostname()})"
    assert second.stderr == f"train_imagenet.py: output is the folder of a run in progress {who}\n"
    process.kill()
    process.communicate()
    third = run("--data-dir", str(folder), *SMALL, "--batch-size", "4", "--resume", "force", cwd=tmp_path)
    assert third.returncode == 0 and "going on after" in third.stdout, third.stderr  # the first one's hold went with it


def test_an_epoch_is_saved_before_it_is_evaluated(here, folder, tmp_path):
    """What fails in the evaluation, here the data, costs the evaluation alone."""
    for path in sorted((folder / "val").glob("*/*.jpg")):
        path.write_bytes(b"no image")
    with pytest.raises(SystemExit, match="cannot be read"):
        here("--resume", "auto")
    saved = Checkpoints(tmp_path / "output").load()
    assert saved["progress"]["epoch"] == 0 and saved["progress"]["step"] == 3
    for path in sorted((folder / "val").glob("*/*.jpg")):
        shutil.copy(folder / "train" / path.parent.name / path.name, path)
    finished = here("--resume", "auto")
    assert finished["progress"]["epoch"] == 1 and len(finished["progress"]["history"]) == 1
    assert_same(saved["state_dict"], finished["state_dict"])


class Overflow:
    """Makes the gradients of chosen steps infinite under finite losses."""

    def __init__(self, monkeypatch, *steps):
        forward, self.step = ClassificationTask.forward, 0

        def overflow(task, images, targets):
            result = forward(task, images, targets)
            if task.training:
                self.step += 1
                if self.step in steps:
                    result["loss"].register_hook(lambda gradient: gradient * float("inf"))
            return result

        monkeypatch.setattr(ClassificationTask, "forward", overflow)


def test_a_bad_gradient_costs_its_step(here, tmp_path, monkeypatch):
    """The weights stay those before it; it is counted, and nothing that is not finite is saved."""
    clean = here("--epochs", "2", *PLAIN, "--clip-grad", "5")
    Overflow(monkeypatch, 6)  # the last step of the second epoch
    state = here("--epochs", "2", *PLAIN, "--clip-grad", "5", output="bad")
    assert state["progress"]["skipped"] == 1
    assert json.loads((tmp_path / "bad" / "summary.json").read_text())["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    changed = [not torch.equal(tensor, clean["state_dict"][key]) for key, tensor in state["state_dict"].items()]
    assert any(changed)
    Overflow(monkeypatch, *range(1, 100))
    with pytest.raises(SystemExit, match="20 steps in a row had a gradient that is not finite"):
        here("--epochs", "10", *PLAIN, output="worse")


def test_weights_that_are_not_finite_are_not_saved(here, tmp_path, monkeypatch):
    def spoil(run):
        with torch.no_grad():
            run.model.norm.running_var[3] = float("nan")
        return save(run)

    save = Run.save
    monkeypatch.setattr(Run, "save", spoil)
    with pytest.raises(SystemExit, match=r"norm.running_var is not finite: not saved"):
        here()
    assert not Checkpoints(tmp_path / "output").paths()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(here, tmp_path, capsys):
    here("--resume", "auto")
    for path in Checkpoints(tmp_path / "output").paths():
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"all \d checkpoints in output are damaged"):
        here("--resume", "auto")
    assert not list((tmp_path / "output").glob("*.pth")) and list((tmp_path / "output").glob("*.damaged"))


@pytest.mark.parametrize("late", [False, True])
def test_the_rate_in_the_tables_is_the_one_used(here, tmp_path, late):
    """Of the epoch, and not of the one after it. `paper` lags: DeiT's loop asks for epoch e after epoch e."""
    flags = ["--warmup-epochs", "1", "--warmup-lr", "1e-6", "--min-lr", "1e-5", "--lr-base", "0.32", "--log-steps", "2"]
    here("--epochs", "4", *flags, *PLAIN, *([] if late else ["--no-sched-late"]))
    cosine = [1e-5 + (0.01 - 1e-5) * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in range(4)]
    expected = [1e-6, 1e-6, *cosine[1:3]] if late else [1e-6, *cosine[1:]]
    assert [row["lr"] for row in rows(tmp_path / "output")] == pytest.approx(expected)
    steps = rows(tmp_path / "output", "steps.csv")
    assert [row["step"] for row in steps] == [2, 4, 6, 8, 10, 12]
    assert [row["lr"] for row in steps] == pytest.approx([expected[i] for i in (0, 1, 1, 2, 3, 3)], rel=1e-5)


def test_only_whole_epochs_are_late():
    """What the released schedule does belongs to `paper`, and has no effect beside another schedule."""
    assert parse_args(["--data-dir", "d"]).sched_late and not parse_args(["--recipe", "fast"]).sched_late
    assert not parse_args(["--data-dir", "d", "--sched-on-updates"]).sched_late


def test_the_bar_has_the_mean_loss_of_the_steps_before(here, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("tqdm.tqdm.set_postfix", lambda self, loss, **_: shown.append(loss))
    here(*PLAIN, "--epochs", "2", "--log-steps", "1")
    expected = []
    for epoch in (0, 1):
        losses = [row["loss"] for row in rows(tmp_path / "output", "steps.csv") if row["epoch"] == epoch]
        expected += ["-"] + [f"{np.mean(losses[:step]):.3f}" for step in range(1, len(losses))]
    assert len(shown) > 4 and shown == expected


def test_little_shared_memory_is_said_before_the_run(here, monkeypatch):
    """torch's loaders would wait for ever."""
    usage = SimpleNamespace(free=64 * 2**20)
    monkeypatch.setattr("container.training.loader.shutil.disk_usage", lambda _: usage)
    flags = ["--img-size", "1024", "--workers", "2", "--batch-size", "16"]
    with pytest.raises(SystemExit, match="/dev/shm has 64 MiB free, and 2 loaders want 192: fewer"):
        here(*flags)


def test_resuming_one_of_several_runs_takes_its_name(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("output", "output-old"):
        Path(name).mkdir()
        assert parse_args(["--resume", "auto"]).output == "output"
    Path("output-1").mkdir()
    assert parse_args(["--resume", "auto", "--output", "output"]).output == "output"
    with pytest.raises(SystemExit):
        parse_args(["--resume", "auto"])
    assert "--resume auto needs --output, as there are several runs: output, output-1\n" in capsys.readouterr().err
    assert parse_args([]).output == "output"  # a new run finds a free name


def test_a_continued_run_is_checked(here, capsys):
    here("--resume", "auto")
    with pytest.raises(SystemExit, match=r"output was begun with lr_base 0\.0005, not 0\.001"):
        here("--resume", "auto", "--lr-base", "0.001")
    with pytest.raises(SystemExit, match="output was begun with images 16, not 8"):
        here("--resume", "auto", "--batch-size", "8")
    capsys.readouterr()
    here("--resume", "auto", "--batch-size", "8", "--grad-accum", "2")  # the same step, divided anew
    assert "going on after 1 epochs and 0 steps" in capsys.readouterr().out
    here("--resume", "auto", "--checkpoint", "gone.pth", "--compile", "none", "--channels-last")  # all that is saved
    here("--resume", "force", "--lr-base", "0.001")
    forced = json.loads((Path("output") / "summary.json").read_text())["forced"]
    assert forced == {"lr_base": [0.0005, 0.001]}


def test_a_continued_run_remembers_how_it_began(here, tmp_path):
    """Whatever it is continued with, and though the file may be gone."""
    state = timm.create_model("container_light_nano", num_classes=2).state_dict()
    save_file(state, tmp_path / "start.safetensors")
    settings = ("--resume", "auto", "--save-steps", "1")
    here(*settings, "--epochs", "1", "--checkpoint", str(tmp_path / "start.safetensors"))
    (tmp_path / "start.safetensors").unlink()
    for words in (["--checkpoint", str(tmp_path / "start.safetensors")], []):
        here(*settings, "--epochs", "1", *words)
        for written in (
            yaml.safe_load((tmp_path / "output" / "args.yaml").read_text()),
            json.loads((tmp_path / "output" / "summary.json").read_text())["args"],
        ):
            assert written["checkpoint"] == str(tmp_path / "start.safetensors") and written["pretrained"] is False
            assert written["output"] == "output"


@pytest.mark.slow
def test_forced_settings_are_those_that_count(here, tmp_path):
    """A longer schedule, another rate and another decay from here on, not those in the checkpoint."""
    settings = ("--epochs", "5", "--lr-base", "1e-2", "--weight-decay", "0.2")
    whole = here(*PLAIN, *settings, output="whole")
    here(*PLAIN, "--epochs", "2")
    forced = here(*PLAIN, *settings, "--resume", "force")
    rates = [row["lr"] for row in rows(tmp_path / "output")]
    assert rates[2:] == [row["lr"] for row in rows(tmp_path / "whole")][2:] and rates[1] != rates[2]
    found, wanted = ([g["weight_decay"] for g in saved["optimizer"]["param_groups"]] for saved in (forced, whole))
    assert found == wanted and 0.2 in found


def test_a_damaged_checkpoint_is_passed_over(here, tmp_path, capsys):
    whole = here("--epochs", "3", "--resume", "auto", output="whole")
    here("--epochs", "3", "--resume", "auto")
    newest, _ = Checkpoints(tmp_path / "output").paths()
    newest.write_bytes(newest.read_bytes()[:-1000])
    capsys.readouterr()
    again = here("--epochs", "3", "--resume", "auto")
    captured = capsys.readouterr()
    assert f"{newest.name} is damaged" in captured.err and "going on after 1 epochs and 3 steps" in captured.out
    assert_same(whole["state_dict"], again["state_dict"])


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(folder, tmp_path):
    """A limit on the size of files stands for the disk: the weights alone (3.7 MB) still fit, a checkpoint does not."""
    arguments = ["--data-dir", str(folder), *SMALL, "--epochs", "3", "--resume", "auto", "--device", "cpu"]
    whole = run(*arguments, "--output", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    stopped = start(*arguments, "--epochs", "3", cwd=tmp_path, start_new_session=True)
    while not list((tmp_path / "output").glob("checkpoint-*")):
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.02)
    os.killpg(stopped.pid, signal.SIGTERM)
    stopped.communicate(timeout=60)
    good = {path: path.read_bytes() for path in Checkpoints(tmp_path / "output").paths()}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))

    full = run(*arguments, cwd=tmp_path, preexec_fn=limit)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "train_imagenet.py: File too large: 'output/checkpoint-" in full.stderr.splitlines()[-1]
    assert not list((tmp_path / "output").glob("*.tmp"))
    assert {path: path.read_bytes() for path in Checkpoints(tmp_path / "output").paths()} == good
    again = run(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert_same(*(Checkpoints(tmp_path / name).load()["state_dict"] for name in ("whole", "output")))


@pytest.mark.slow
def test_cifar10(tmp_path):
    """Real photos in the ImageNet layout, with `test` for a validation folder: 20 of each of CIFAR-10's classes."""
    count = Counter()
    with tarfile.open(shared("data/cifar10.tar.xz")) as archive:
        for member in archive:
            group = member.name.rsplit("/", 1)[0]
            if member.isfile() and count[group] < 20:
                count[group] += 1
                (tmp_path / group).mkdir(parents=True, exist_ok=True)
                (tmp_path / member.name).write_bytes(archive.extractfile(member).read())
            if len([c for c in count.values() if c == 20]) == 20:
                break
    result = run("--data-dir", "cifar10", *SMALL, "--workers", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "10 classes" in result.stdout and "200 images to train on, 200 to validate on" in result.stdout


@pytest.mark.parametrize(
    "spoil, arguments, message",
    [
        (None, ["--data-dir", "nowhere"], "no folder nowhere"),
        ("train", [], "no folder train (or .tar) in "),
        ("val", [], "no folder val or validation or test (or .tar) in "),
        ("val/dark", [], "2 classes to train on, 1 to validate on"),
        ("images", [], "no images in class folders of "),
        ("empty", [], "1 class folders without images (.png, .jpg, .jpeg), among them "),
        ("loose", [], "images in "),
        ("damaged", PLAIN, " of 48 images cannot be read"),
        (None, ["--num-classes", "3"], "the data has 2 classes, not 3"),
        (None, ["--dataset", "torch/cifar10"], "no torch/cifar10 in "),
        (None, ["--dataset", "parquet/x"], "no dataset parquet/x; there are digits, torch/NAME, "),
        (None, ["--dataset", "wds/"], "WebDataset shards do not tell their classes: --num-classes is needed"),
        (None, ["--model", "container_lite"], "unknown model container_lite: did you mean container_light?"),
        (None, ["--model", "container_light.x"], "Invalid pretrained tag (x) for container_light."),
        (None, ["--model-args", "pretrained=True"], "--model-args pretrained is set by --pretrained"),
        (None, ["--opt-args", "eps=1e-6", "lr=1"], "--opt-args lr is set by --lr-base"),
        (None, ["--batch-size", "500"], "a step takes 500 images, and there are 48 to train on"),
        (None, ["--batch-size", "15"], "--batch-size 15 is odd, but mixup and cutmix mix images in pairs"),
        (None, ["--epochs", "0"], "--epochs: 0 is not in [1, inf)"),
        (
            None,
            ["--pretrained", "--model", "container_light"],
            "`container weights fetch container_light.ai2_in1k` puts them there",
        ),
        (None, ["--checkpoint", "none.pth"], "no checkpoint at none.pth"),
        (None, ["--eval"], "--eval needs --checkpoint FILE or --pretrained"),
        (None, ["--teacher", "test_convnext"], "test_convnext knows 1000 classes, and the data has 2"),
        (None, ["--view-epochs", "2"], "--view-epochs is for --teacher NAME --distill 1"),
        (None, ["--teacher-checkpoint", "x"], "--teacher-checkpoint is for --teacher NAME"),
        (None, ["--val-split", "train"], "--val-split is for --dataset hfds/NAME and wds/"),
        (None, ["--dataset", "digits"], "--data-dir is for other data than digits"),
        (None, ["--real-labels", "real.json"], "--real-labels is for --eval"),
        (None, ["--train-interpolation", "x"], "argument --train-interpolation: invalid choice: 'x'"),
        (None, ["--distill", "1.5"], "--distill: 1.5 is not in [0, 1]"),
        (None, ["--smoothing", "1"], "--smoothing: 1 is not in [0, 1)"),
        (None, ["--drop-path", "1.5"], "--drop-path: 1.5 is not in [0, 1)"),
        (None, ["--reprob", "nan"], "--reprob: nan is not in [0, 1]"),
        (None, ["--lr-base", "inf"], "--lr-base: inf is not in [0, inf)"),
        (None, ["--workers", "-1"], "--workers: -1 is not in [0, inf)"),
        (None, ["--scale", "0.9", "0.1"], "--scale 0.9 0.1 has the largest first"),
        (None, ["--ratio", "2", "0.5"], "--ratio 2.0 0.5 has the largest first"),
        (None, ["--ratio", "0", "1"], "0 is not in (0, inf)"),
        (None, ["--temperature", "0"], "--temperature: 0 is not in (0, inf)"),
        (None, ["--data-dir", "a", "b"], "2 folders, but only a teacher's logits (--distill 1) are learned from many"),
        (
            None,
            ["--teacher", "test_convnext", "--distill", "1", "--view-epochs", "2"],
            "--mixup, --cutmix and --reprob change the views that --view-epochs repeats",
        ),
        (None, ["--teacher", "test_convnext", "--distill", "1", "--exclude", "*"], "but *"),
        (None, ["--aa", "nonsense"], "Unknown AA policy nonsense"),
        (None, ["--lr-base", "1e30", "--warmup-lr", "1e30", *PLAIN], "loss is nan in epoch 1, step 2, at lr "),
        (None, ["--device", "gpu"], "device type at start of device string: gpu"),
        (None, ["--nonsense"], "unrecognized arguments: --nonsense"),
        (
            None,
            ["--recipe", "none"],
            "no recipe none; there are 100, cifar10, digits, distill, fast, finetune, linear, modern, paper, smoke, "
            "transfer",
        ),
        (None, ["--recipe", "digits", "--best", "ema"], "--best ema needs --ema-decay"),
    ],
)
def test_a_mistake_is_answered_in_one_line(folder, tmp_path, monkeypatch, capsys, spoil, arguments, message):
    monkeypatch.chdir(tmp_path)
    if spoil == "images":
        for image in (folder / "train").glob("*/*"):
            image.rename(image.with_suffix(".txt"))
    elif spoil == "empty":
        (folder / "train" / "grey").mkdir()
    elif spoil == "loose":
        shutil.copy(folder / "train" / "dark" / "0.jpg", folder / "train" / "0.jpg")
    elif spoil == "damaged":
        for image in (folder / "train").glob("*/*[02468].jpg"):
            image.write_bytes(b"no image")
    elif spoil:
        shutil.rmtree(folder / spoil)
    with pytest.raises(SystemExit) as exit:
        main(["--data-dir", str(folder), *SMALL, *arguments])
    # What the interpreter prints for the exit: its argument, unless argparse has printed a line already.
    line = exit.value.code
    if line == 2:
        usage, line = capsys.readouterr().err.splitlines()
        assert usage.startswith("usage: ")
    assert message in line and "\n" not in line


def test_classes_are_known_by_their_names(folder, tmp_path, monkeypatch, capsys):
    """A run's files say them, and neither --eval nor --resume takes data of other ones; fine-tuning begins anew."""
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, *PLAIN, "--output", "run"]
    main(["--data-dir", str(folder), *flags])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["class_names"] == ["bright", "dark"]
    checkpoints = ["run/model_best.safetensors", str(next((tmp_path / "run").glob("checkpoint-*.pth")))]
    for file in checkpoints:
        assert container.weights.class_names(file) == ["bright", "dark"]
        main(["--data-dir", str(folder), *SMALL, "--eval", "--checkpoint", file])
    for split in ("train", "val"):
        (folder / split / "bright").rename(folder / split / "white")
    refused = "knows 2 classes, and the data has 2: number 0 is bright there, and dark here"
    for file in checkpoints:
        with pytest.raises(SystemExit, match=refused):
            main(["--data-dir", str(folder), *SMALL, "--eval", "--checkpoint", file])
    with pytest.raises(SystemExit, match=f"the run in run {refused}"):
        main(["--data-dir", str(folder), *flags, "--resume", "auto", "--epochs", "2"])
    args = parse_args(["--data-dir", str(folder), *SMALL, "--checkpoint", checkpoints[0]])
    best = container.weights.read(checkpoints[0])
    for names, kept in ((["bright", "dark"], True), (["dark", "white"], False), (None, True)):
        model = build_model(args, 2, torch.device("cpu"), names)
        assert torch.equal(model.head.fc.weight, best["head.fc.weight"]) == kept
        assert torch.equal(model.norm.weight, best["norm.weight"])


def test_a_checkpoint_of_a_run_is_evaluated_by_its_name_alone(here, capsys):
    here("--img-size", "48")
    capsys.readouterr()
    top1 = main(["--eval", "--checkpoint", "output/model_best.safetensors"])
    out = capsys.readouterr().out
    assert f"{top1:.2f} % top-1" in out and "12 images of 2 classes at 48 x 48" in out


def test_a_run_on_shards_is_evaluated_on_a_folder(tmp_path, capsys):
    """Names of the run's splits do not matter there; those that one gives oneself would."""
    settings = vars(
        parse_args(["--data-dir", "d", "--dataset", "wds/", "--num-classes", "2", "--val-split", "x-0.tar|9"])
    )
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(settings))
    words = ["--eval", "--checkpoint", str(tmp_path / "best.safetensors"), "--data-dir", "f", "--dataset", ""]
    assert parse_args(words).model == settings["model"]
    with pytest.raises(SystemExit):
        parse_args([*words, "--val-split", "train"])
    assert capsys.readouterr().err.endswith("--val-split is for --dataset hfds/NAME and wds/\n")


# WebDataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "name, bad, message",
    [
        ("{:03d}.jpeg", None, None),
        ("{:03d}.JPG", None, None),
        (
            "photo.{:03d}.jpg",
            "train",
            r"the training data ended after 0 of 3 batches of 2: the stream has fewer images",
        ),
        ("photo.{:03d}.jpg", "val", "none of the validation images can be counted"),
    ],
)
def test_a_stream_gives_what_it_should_or_is_one_line(here, tmp_path, name, bad, message):
    """Six images in a shard; a name with two dots is another key for WebDataset, and timm leaves its sample out."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (90, 9, 9)).save(file, "JPEG")
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}-000.tar", "w") as archive:
            for i in range(6):
                path = (name if bad in (None, part) else "{:03d}.jpg").format(i)
                for member, content in ((path, file.getvalue()), (f"{os.path.splitext(path)[0]}.cls", b"%d" % (i % 2))):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    words = ["--data-dir", str(tmp_path), "--dataset", "wds/", "--num-classes", "2", "--batch-size", "2"]
    words += ["--train-split", "train-000.tar|6", "--val-split", "val-000.tar|6", *PLAIN]
    if message is None:
        assert here(*words)["progress"]["history"][-1]["eval_images"] == 6
    else:
        with pytest.raises(SystemExit, match=message):
            here(*words)


@pytest.mark.parametrize("name", ["resnet18", "container_light_nano"])
def test_a_checkpoint_of_which_little_fits_is_refused(folder, tmp_path, name):
    """timm itself begins such a run with random weights; half of a checkpoint is as wrong as nothing of it."""
    state = timm.create_model(name, num_classes=10).state_dict()
    parts = {key: tensor for i, (key, tensor) in enumerate(state.items()) if i % 2}
    for wrong in ({f"model.{key}": tensor for key, tensor in state.items()}, parts):
        torch.save(dict(state_dict=wrong), tmp_path / "wrong.pth")
        with pytest.raises(SystemExit, match=r"wrong.pth is not for resnet18: \d+ of|does not fit container_light"):
            main(["--data-dir", str(folder), *SMALL, "--model", name, "--checkpoint", str(tmp_path / "wrong.pth")])
    torch.save(dict(state_dict=state), tmp_path / "right.pth")
    args = parse_args(["--data-dir", str(folder), *SMALL, "--model", name, "--checkpoint", str(tmp_path / "right.pth")])
    model = build_model(args, 2, torch.device("cpu"))
    key = next(iter(state))
    assert torch.equal(model.state_dict()[key], state[key])


def test_images_grow_to_the_model_s_size(folder):
    assert growing(64, 80, 4) == [64, 64, 64, 80] and growing(32, 48, 3) == [32, 32, 48]
    assert growing(160, 224, 5) == [160, 192, 192, 192, 224] and growing(160, 224, 1) == growing(224, 224, 1) == [224]
    assert growing(10, 32, 3, step=8) == [10, 24, 32] and growing(24, 32, 5, step=8) == [24, 24, 32, 32, 32]
    for model, start, message in (
        ("container_light_nano", "64", "--start-size 64 is larger than the model's images, 32: images cannot shrink"),
        ("container_light_nano_32", "7", "--start-size 7 is less than 8 pixels, one token of the model's last stage"),
        ("container_mixer", "32", "container_mixer is tied to one image size: images cannot grow from --start-size"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["--data-dir", str(folder), *SMALL, "--model", model, "--start-size", start, "--dry-run"])


def test_a_classifier_in_the_released_layout_is_evaluated(folder, tmp_path, capsys):
    """One of its own, with as many classes as the data: it says class 0 to everything, at odds of e^100."""
    state = reference.random_state(0)
    state["head.weight"], state["head.bias"] = torch.zeros(2, 512), torch.tensor([100.0, 0.0])
    torch.save(dict(model=state, model_ema=reference.random_state(1)), tmp_path / "released.pth")
    arguments = ["--model", "container_light", "--checkpoint", str(tmp_path / "released.pth"), "--img-size", "32"]
    top1 = main(["--data-dir", str(folder), *SMALL, "--eval", *arguments])
    assert top1 == 50 and "loss 50.0000" in capsys.readouterr().out


def test_where_a_mistake_was_made(here, monkeypatch):
    monkeypatch.setenv("CONTAINER_TRACEBACK", "1")
    with pytest.raises(AssertionError, match="Unknown AA policy nonsense"):
        here("--aa", "nonsense")


def test_a_mistake_ends_the_process_without_a_traceback(tmp_path):
    result = run("--data-dir", "nowhere", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == "train_imagenet.py: no folder nowhere\n"
    assert not list(tmp_path.iterdir())
