"""Learning from a teacher alone."""

import json
import shutil

import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from safetensors.torch import save_file
from timm.task import ClassificationTask
from torch.nn.functional import interpolate
from torch.utils.data.distributed import DistributedSampler

from container.training import (
    Checkpoints,
    Compute,
    Divergence,
    Images,
    Photos,
    Run,
    Teacher,
    TeacherOutputs,
    open_photos,
)
from container.training.distill import Distillation
from container.training.loader import create_val_loader
from container.training.seeding import SeededSampler
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
    teacher = Teacher("tf_efficientnet_lite0", file, 1000, None, MEAN, STD, CPU)
    teacher.label(val, config, 5, 0)
    images, targets = (torch.cat(part) for part in zip(*create_val_loader(val, config, 5, 0, CPU.device), strict=True))
    assert torch.equal(teacher(images).argmax(1), targets)


def test_outputs_come_back_as_they_were(tmp_path):
    """In any order and number; and only from the same settings."""
    logits = torch.randn(5, 7).half()
    outputs = TeacherOutputs(tmp_path, dict(seed=1), 7)
    assert not outputs.read(4, [0, 3])[1].any()
    outputs.write(4, [3, 0, 9], logits[:3])
    outputs.write(4, [1], logits[3:4].float())
    found, known = TeacherOutputs(tmp_path, dict(seed=1), 7).read(4, [0, 1, 2, 3, 9, 10])
    assert known.tolist() == [True, True, False, True, True, False]
    assert torch.equal(found[known], logits[[1, 3, 0, 2]]) and not found[~known].any()
    for epoch, made_from in ((5, dict(seed=1)), (4, dict(seed=2))):
        assert not TeacherOutputs(tmp_path, made_from, 7).read(epoch, [0, 3])[1].any()


@pytest.mark.parametrize("values", [0.0, 1.0])
def test_damaged_outputs_are_unknown(tmp_path, values):
    outputs = TeacherOutputs(tmp_path, {}, 7)
    outputs.write(0, [0, 1, 2], torch.full((3, 7), values))
    assert outputs.read(0, [0, 1, 2])[1].all()
    (path,) = outputs.folder.glob("*.outputs")
    content = bytearray(path.read_bytes())
    content[outputs.record + 5] ^= 1
    path.write_bytes(content[:-1])
    assert outputs.read(0, [0, 1, 2])[1].tolist() == [True, False, False]
    outputs.write(0, [1], torch.full((1, 7), 2.0))
    assert outputs.read(0, [1])[0].unique().tolist() == [2.0]


def test_a_position_is_that_of_the_sampler(tmp_path, monkeypatch):
    """Whatever the number of processes and the batch, a kept output belongs to the view that it was made of."""
    views = {}  # by (epoch, position), as the sampler has them
    for world, batch_size in ((1, 4), (2, 3)):
        monkeypatch.setattr(dist, "get_world_size", lambda world=world: world)
        for rank in range(world):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            sampler = SeededSampler(DistributedSampler(range(24), world, rank), seed=5)
            sampler.start(7)
            items = [*sampler]
            batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
            distillation = Distillation(lambda images: images[:, :1].half(), lambda *batch: batch, batch_size)
            outputs = TeacherOutputs(tmp_path / f"{world}", {}, 1)
            drawn = ((torch.tensor([[float(index)] for index, _ in batch]), None) for batch in batches)
            for i, (images, _) in enumerate(distillation.batches(7, 0, lambda *_, drawn=drawn: drawn)):
                found = distillation.look_up(images, outputs)
                assert torch.equal(found, images)
                for (index, place), value in zip(batches[i], found):
                    assert outputs.read(7, [place[2]])[0].item() == value == index
                    assert views.setdefault(place, index) == index
    assert len(views) == 24


@pytest.fixture
def distil(folder, tmp_path, lite, monkeypatch):
    """Runs the script on bright and dark images, four epochs of three steps, and returns the last checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("container.training.run.estimate", lambda *_: dict(params=1, gmacs=1.0, gib=1.0))
    monkeypatch.setattr("container.training.report.plot_curves", lambda *_: None)
    settings = "--recipe distill --epochs 4 --batch-size 16 --img-size 32 --workers 0 --view-epochs 2 --mixup 0"
    settings += " --teacher tf_efficientnet_lite0 --teacher-size 40 --teacher-checkpoint"

    def call(*arguments, output="output", folders=(folder,)):
        main([*settings.split(), lite[1], "--data-dir", *map(str, folders), "--output", output, *arguments])
        return Checkpoints(tmp_path / output).load()

    return call


def assert_same(first, second):
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())


@pytest.fixture
def asked(monkeypatch):
    """Numbers of images that teachers are asked about, besides the twelve held out."""
    counts, call = [], Teacher.__call__
    monkeypatch.setattr(
        Teacher, "__call__", lambda teacher, images: counts.append(len(images)) or call(teacher, images)
    )
    return counts


def test_views_repeat_and_the_teacher_sees_each_once(distil, asked, monkeypatch):
    """Kept on the disk, or asked about again, its outputs make the same weights to the bit."""
    kept = distil()
    assert asked == [12] + 6 * [16]
    monkeypatch.setattr(TeacherOutputs, "write", lambda *_: None)
    assert_same(distil(output="again"), kept)
    assert asked[7:] == [12] + 12 * [16]


@pytest.mark.slow
def test_runs_share_outputs(distil, asked, tmp_path):
    """With another student, another batch and smaller images, which the teacher sees in full."""
    whole = distil("--view-dir", str(tmp_path / "views"), "--epochs", "2")
    assert not (tmp_path / "output" / "views").exists() and asked == [12] + 6 * [16]
    words = ["--view-dir", str(tmp_path / "views"), "--epochs", "2"]
    assert_same(distil(*words, output="again"), whole)
    assert asked[7:] == [12]
    words += ["--model", "container_nano", "--batch-size", "8", "--start-size", "16"]
    distil(*words, "--model-args", "patch_sizes=(2,2,2,2)", output="other")
    assert asked[8:] == [8, 4]  # the photos held out


def test_outputs_of_other_photos_are_not_taken(distil, asked, folder, tmp_path):
    """Of the same names and sizes."""
    words = ["--view-dir", str(tmp_path / "views"), "--epochs", "1"]
    distil(*words)
    for path in (folder / "train").rglob("*.jpg"):
        with Image.open(path) as image:
            ImageOps.invert(image.convert("RGB")).save(path)
    distil(*words, output="other")
    assert asked == 2 * ([12] + 3 * [16])
    assert len([*(tmp_path / "views").iterdir()]) == 2


def test_the_student_sees_small_images_and_the_teacher_large_ones(distil, monkeypatch):
    sides, forward = [], ClassificationTask.forward
    monkeypatch.setattr(
        ClassificationTask, "forward", lambda task, x, target: sides.append(x.shape[-1]) or forward(task, x, target)
    )
    seen, call = [], Teacher.__call__
    monkeypatch.setattr(
        Teacher, "__call__", lambda teacher, images: seen.append(images.shape[-1]) or call(teacher, images)
    )
    distil("--start-size", "16", "--epochs", "2", "--model-args", "patch_sizes=(2,2,2,2)")
    assert sides == 3 * [16] + 3 * [32] and set(seen) == {32}


@pytest.mark.slow
@pytest.mark.parametrize("repeat", ["0", "2"])
def test_a_run_goes_on_to_the_bit(distil, monkeypatch, repeat):
    """Cut off at each of its steps, in an epoch about which the teacher is asked, and in one that repeats."""
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
