"""Learning from a teacher alone."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import interpolate

from container.training import Checkpoints, Compute, Divergence, Images, Photos, Run, Teacher, Views, open_photos
from container.training.loader import create_val_loader
from train_imagenet import main

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = Compute(torch.device("cpu"))


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def lite(tmp_path):
    """The file of a model that normalizes by 0.5, as EfficientNet-Lite does."""
    model = timm.create_model("tf_efficientnet_lite0")
    save_file(model.state_dict(), tmp_path / "lite.safetensors")
    return model.eval(), str(tmp_path / "lite.safetensors")


def test_the_divergence_is_that_of_the_softened_probabilities():
    ours, theirs = torch.randn(5, 7), torch.randn(5, 7)
    for t in (1.0, 3.0):
        p, q = ((logits / t).softmax(-1) for logits in (theirs, ours))
        expected = t**2 * (p * (p / q).log()).sum(-1).mean()
        torch.testing.assert_close(Divergence(t)(ours, theirs), expected)
    assert Divergence(2.0)(ours, ours.half()) < 1e-6


def test_the_temperature_keeps_the_size_of_gradients():
    """For large T the gradient is that of half the mean squared difference of logits without their mean."""
    ours, theirs = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    Divergence(1e3)(ours, theirs).backward()
    difference = (ours - ours.mean(-1, keepdim=True) - theirs + theirs.mean(-1, keepdim=True)).detach()
    torch.testing.assert_close(ours.grad, difference / (9 * 4), rtol=1e-2, atol=1e-4)


def test_a_teacher_sees_its_own_normalization_and_size(lite):
    model, file = lite
    pixels = torch.rand(2, 3, 32, 32)
    images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for size in (None, 48):
        own = pixels * 2 - 1
        if size:
            own = interpolate(own, size=(size, size), mode="bicubic", antialias=True)
        logits = Teacher("tf_efficientnet_lite0", file, 1000, size, MEAN, STD, CPU)(images)
        assert logits.dtype == torch.float16
        with torch.no_grad():
            torch.testing.assert_close(logits.float(), model(own), rtol=1e-2, atol=1e-3)


def test_photos_are_all_images_below_the_folders_in_one_order(tmp_path):
    for name in ("b/2.jpg", "b/1.png", "a/deep/x.jpeg", "a/out_7.jpg", "top.jpg", "a/notes.txt"):
        (tmp_path / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "one" / name, format="PNG")
    (tmp_path / "two").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "two" / "y.jpg")
    photos = Photos([tmp_path / "two", tmp_path / "one"], "out_*")
    assert photos.filenames() == ["y.jpg", "a/deep/x.jpeg", "b/1.png", "b/2.jpg", "top.jpg"]
    assert Images(None, photos).left_out == f"1 files with other suffixes (.txt) in {tmp_path / 'two'}, " + (
        f"{tmp_path / 'one'} are not used"
    )
    with pytest.raises(ValueError, match=r"no images in .*two but \*"):
        Photos([tmp_path / "two"], "*")


def test_parts_of_folders(folder, tmp_path):
    """What has a held-out part gives it; what has none is trained on."""
    (tmp_path / "plain").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "plain" / "1.jpg")
    train, val = open_photos([str(folder), str(tmp_path / "plain")])
    assert (len(train), len(val)) == (49, 12)
    with pytest.raises(ValueError, match=r"none of .*plain has a folder val or validation or test"):
        open_photos([str(tmp_path / "plain")])
    shutil.rmtree(folder / "train")
    with pytest.raises(FileNotFoundError, match="has a folder val, but no folder train"):
        open_photos([str(folder)])
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone"):
        open_photos([str(tmp_path / "gone")])


def test_photos_are_labelled_by_what_the_teacher_sees(folder, tmp_path, lite, group):
    file = lite[1]
    config = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=1.0, crop_mode="center")
    _, val = open_photos([str(folder)])
    teacher, kept = Teacher("tf_efficientnet_lite0", file, 1000, None, MEAN, STD, CPU), tmp_path / "kept.npy"
    teacher.label(val, config, 5, 0, kept)
    images, targets = (torch.cat(part) for part in zip(*create_val_loader(val, config, 5, 0, CPU.device), strict=True))
    assert torch.equal(teacher(images).argmax(1), targets)
    _, again = open_photos([str(folder)])
    teacher.model = None
    teacher.label(again, config, 5, 0, kept)
    assert np.array_equal(again.reader.targets, val.reader.targets)


def test_views_come_back_as_they_were(tmp_path):
    shape, made_from = (2, 3, 5, 5), dict(seed=1)  # an odd number of pixels
    batches = [(torch.randint(256, shape, dtype=torch.uint8), torch.randn(2, 7).half()) for _ in range(3)]
    views = Views(tmp_path, made_from, shape, 7, 3, rank=0)
    assert not views.whole(4)
    for i in (2, 0):
        views.write(4, i, *batches[i])
    assert not views.whole(4) and views.whole(4, first=2)
    views.write(4, 1, *batches[1])
    later = Views(tmp_path, made_from, shape, 7, 3, rank=0)
    assert later.whole(4) and not later.whole(0)
    for first in (0, 1):
        for found, wanted in zip(later.read(4, first), batches[first:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not Views(tmp_path, dict(seed=2), shape, 7, 3, rank=0).whole(4)
    assert not Views(tmp_path, made_from, shape, 7, 3, rank=1).whole(4)


def test_views_with_damage_are_not_whole(tmp_path):
    views = Views(tmp_path, {}, (2, 3, 4, 4), 7, 3, rank=0)
    for i in range(3):
        views.write(0, i, torch.full(views.shape, i, dtype=torch.uint8), torch.zeros(2, 7).half())
    content = bytearray(views.path(0).read_bytes())
    content[views.record + 5] ^= 1
    views.path(0).write_bytes(content)
    damaged = Views(tmp_path, {}, (2, 3, 4, 4), 7, 3, rank=0)
    assert not damaged.whole(0) and not damaged.whole(0, 1) and damaged.whole(0, 2)
    views.path(0).write_bytes(content[:-1])
    assert not Views(tmp_path, {}, (2, 3, 4, 4), 7, 3, rank=0).whole(0, 2)


@pytest.fixture
def distil(folder, tmp_path, lite, monkeypatch):
    """Runs the script on bright and dark images, four epochs of three steps, and returns the last checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("container.training.run.estimate", lambda *_: dict(params=1, gmacs=1.0, gib=1.0))
    monkeypatch.setattr("container.training.report.plot_curves", lambda *_: None)
    settings = "--recipe distill --epochs 4 --batch-size 16 --img-size 32 --workers 0 --view-epochs 2"
    settings += " --teacher tf_efficientnet_lite0 --teacher-size 40 --teacher-checkpoint"

    def call(*arguments, output="output", folders=(folder,)):
        main([*settings.split(), lite[1], "--data-dir", *map(str, folders), "--output", output, *arguments])
        return Checkpoints(tmp_path / output).load()

    return call


def assert_same(first, second):
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())


def test_views_repeat_and_the_teacher_sees_each_once(distil, monkeypatch):
    """Read from the disk, or drawn and asked about again, they make the same weights to the bit."""
    drawn, write = [], Views.write
    monkeypatch.setattr(
        Views, "write", lambda views, epoch, i, *batch: drawn.append((epoch, i)) or write(views, epoch, i, *batch)
    )
    kept = distil()
    assert drawn == [(epoch, i) for epoch in (0, 1) for i in range(3)]
    monkeypatch.setattr(Views, "whole", lambda *_: False)
    assert_same(distil(output="drawn"), kept)
    assert len(drawn) == 6 + 12
    monkeypatch.undo()


@pytest.mark.slow
def test_runs_share_views(distil, tmp_path, monkeypatch):
    whole = distil("--view-dir", str(tmp_path / "views"))
    assert not (tmp_path / "output" / "views").exists()
    monkeypatch.setattr(Teacher, "__call__", lambda *_: pytest.fail("asked"))
    assert_same(distil("--view-dir", str(tmp_path / "views"), output="again"), whole)
    other = distil("--view-dir", str(tmp_path / "views"), "--model", "container_nano", output="other")
    assert other["progress"]["epoch"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("repeat", ["0", "2"])
def test_a_run_goes_on_to_the_bit(distil, monkeypatch, repeat):
    """Cut off at each of its steps, in an epoch that is drawn, and in one that is read."""
    whole, after = distil("--view-epochs", repeat, output="whole"), Run.after_step
    for step in (2, 4, 8, 11):

        def cut(run, *values, step=step):
            after(run, *values)
            if run.done == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "after_step", cut)
            distil("--view-epochs", repeat, "--resume", "auto", "--save-steps", "1")
    assert_same(distil("--view-epochs", repeat, "--resume", "auto", "--save-steps", "1"), whole)


def test_labels_are_not_read(distil, folder):
    """The same photos in the same order, but in one class, and a part of them in a folder of its own."""
    before = distil()
    (folder / "train" / "dark").rename(folder / "train" / "bright" / "z")
    shutil.move(folder / "val" / "dark", folder / "val" / "bright" / "z")
    after = distil(output="one")
    assert_same(before, after)
    assert before["progress"]["history"][-1]["eval_top1"] == after["progress"]["history"][-1]["eval_top1"]
    assert after["fixed"]["class_names"][:2] == ["n01440764", "n01443537"]  # the teacher's
    shutil.move(folder / "train" / "bright" / "z", folder.parent / "more")
    assert_same(before, distil(folders=(folder, folder.parent / "more"), output="two"))


@pytest.mark.slow
def test_a_student_comes_to_agree_with_its_teacher(distil, folder, tmp_path):
    """The teacher tells bright images from dark ones, which it calls classes 7 and 3."""
    model = timm.create_model("test_convnext", num_classes=10)
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data[[3, 7]] = 5.0
    with torch.no_grad():
        pixels = torch.stack([torch.full((3, 32, 32), x / 255) for x in (30, 200)])
        cfg = model.pretrained_cfg
        mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        dark, bright = model.eval().forward_head(model.forward_features((pixels - mean) / std), pre_logits=True)
        model.head.fc.weight[7] = 20 * (bright - dark) / (bright - dark).square().sum()
        model.head.fc.bias[7] -= model.head.fc.weight[7] @ (bright + dark) / 2
    save_file(model.state_dict(), tmp_path / "ten.safetensors")
    teacher = ["--teacher", "test_convnext", "--teacher-checkpoint", str(tmp_path / "ten.safetensors")]
    assert distil(*teacher, "--epochs", "20", "--lr-base", "1e-2")["progress"]["history"][-1]["eval_top1"] == 100
    _, val = open_photos([str(folder)])
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert summary["data"]["classes"] == 10 and len(val) == summary["last"]["eval_images"]


def test_images_of_a_part_of_the_classes(folder, tmp_path, capsys, monkeypatch):
    """Counted among all classes of the weights, and among those that the images have."""
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("container_light_nano", num_classes=4)
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data = torch.tensor([1.0, 2.0, 5.0, 4.0])
    names = ["bright", "dark", "other", "more"]  # of all, 'other' wins; of the two, 'dark'
    save_file(model.state_dict(), "four.safetensors", dict(classes=json.dumps(names)))
    arguments = (
        "--eval --model container_light_nano --checkpoint four.safetensors --img-size 32 --workers 0 --batch-size 4"
    )
    main([*arguments.split(), "--data-dir", str(folder)])
    said = capsys.readouterr().out
    assert "12 images of 4 classes" in said and "\n0.00 % top-1, 100.00 % top-5\n" in said
    assert "50.00 % top-1, 100.00 % top-5 among the 2 classes of these images" in said
    (folder / "val" / "dark").rename(folder / "val" / "unknown")
    with pytest.raises(SystemExit, match="number 1 is dark there, and unknown here"):
        main([*arguments.split(), "--data-dir", str(folder)])
