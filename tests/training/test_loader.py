"""Batches, from anywhere in a run."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_loader, create_transform, resolve_model_data_config
from timm.data.auto_augment import NAME_TO_OP
from torch.utils.data import Dataset

import container.training.loader
from container.images import open_photo
from container.training import (
    Digits,
    Images,
    StopSignal,
    advice,
    ask_ahead,
    cores,
    create_datasets,
    create_train_loader,
    create_val_loader,
    default_workers,
    distributed,
    epoch_batches,
    join_group,
)
from container.training.data import LeftOut, list_images

CONFIG = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)
CONFIG |= dict(crop_pct=0.9, crop_mode="center")
AUGMENTATION = dict(scale=(0.5, 1.0), hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def group():
    join_group("cpu")
    yield
    dist.destroy_process_group()
    for child in multiprocessing.active_children():  # of a loader that an exception holds, which torch would wait for
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child.kill()
        child.join()
        signal.signal(signal.SIGCHLD, before)


def small(dataset):
    dataset.images, dataset.targets = dataset.images[:50], dataset.targets[:50]
    return dataset


def loader(workers, dataset=None, repeats=0):
    dataset = dataset or small(Digits(train=True))
    return create_train_loader(dataset, CONFIG, AUGMENTATION, repeats, 8, workers, seed=1, device=CPU)


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for (images, targets), (others, other_targets) in zip(first, second):
        assert torch.equal(images, others) and torch.equal(targets, other_targets)


def test_batches_do_not_depend_on_workers_and_can_begin_anywhere():
    alone = loader(0)
    whole = list(epoch_batches(alone, seed=1, epoch=3))
    assert len(whole) == len(alone) == 50 // 8
    with_workers = loader(2)
    assert_equal(whole, list(epoch_batches(with_workers, seed=1, epoch=3)))
    assert_equal(whole[4:], list(epoch_batches(with_workers, seed=1, epoch=3, first=4)))
    other = list(epoch_batches(alone, seed=1, epoch=4))
    assert not torch.equal(whole[0][0], other[0][0])


class Counting(Images):
    """Images that count the reads of all workers."""

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_the_next_epoch_is_prepared_while_this_one_is_evaluated(folder, monkeypatch):
    """The batches are the same, whatever is drawn or loaded meanwhile; where /dev/shm is too small, they come later."""
    images = Counting(str(folder / "train"), train=True)
    images.reads = torch.zeros(1, dtype=torch.int64).share_memory_()
    whole = [list(epoch_batches(loader(0, images), seed=1, epoch=epoch)) for epoch in (0, 1)]
    val = create_val_loader(Images(str(folder / "val")), CONFIG, 4, 1, CPU, persistent=True)
    train = loader(2, images)
    assert_equal(whole[0], list(epoch_batches(train, seed=1, epoch=0)))
    for tight in (False, True):
        images.reads.zero_()
        if tight:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
        ask_ahead(train, CONFIG["input_size"][1], seed=1, epoch=1)
        list(val)
        end = time.monotonic() + (1 if tight else 60)
        while time.monotonic() < end and not images.reads:
            time.sleep(0.01)
        assert bool(images.reads) is not tight
        torch.rand(3)
        assert_equal(whole[1], list(epoch_batches(train, seed=1, epoch=1)))
    assert_equal(whole[0], list(epoch_batches(train, seed=1, epoch=0)))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "augmix-m5-w4-d2"])
def test_every_policy_may_keep_no_bit(policy):
    """Pillow 13 refuses that, and timm's policies ask for it; timm's own operations stay as they are."""
    dataset = small(Digits(train=True))
    create_train_loader(dataset, CONFIG, AUGMENTATION | dict(auto_augment=policy), 0, 8, 0, seed=1, device=CPU)
    parts = [part for part in dataset.transform.transforms if hasattr(part, "ops") or hasattr(part, "policy")]
    operations = [*getattr(parts[0], "ops", [])] + [op for some in getattr(parts[0], "policy", []) for op in some]
    found = [operation.aug_fn for operation in operations if operation.name.startswith("Posterize")]
    picture = Image.new("RGB", (4, 4), (255, 255, 255))
    assert found and all(np.asarray(function(picture, 0)).max() == 0 for function in found)
    assert not set(found) & set(NAME_TO_OP.values())


@pytest.mark.parametrize(
    "allowed, limit, processes, expected",
    [
        (64, "max 100000", 8, 8),  # a node with 8 GPUs
        (64, "200000 100000", 1, 2),  # a container
        (64, "250000 100000", 1, 3),
        (4, "max 100000", 8, 1),
        (200, None, 1, 200),  # no cgroups
        (1, "50000 100000", 1, 1),
    ],
)
def test_cores_are_those_of_this_process(monkeypatch, tmp_path, allowed, limit, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    monkeypatch.setattr(container.training.loader, "_CPU_MAX", tmp_path / "cpu.max")
    if limit:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert cores() == expected
    assert default_workers() == min(max(expected - 1, 1), 16)
    if processes == 1:
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
        assert cores() == expected
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    monkeypatch.setattr(os, "cpu_count", lambda: allowed)
    assert cores() == expected


def test_advice_says_what_is_left_to_do(monkeypatch):
    monkeypatch.setattr(container.training.loader, "cores", lambda: 12)
    assert advice(0.2, workers=8) == ""
    assert advice(0.45, workers=8) == "data_wait 45 %: more --workers (8 of 12 cores used), or images pre-resized"
    assert advice(1.0, workers=12) == "data_wait 100 %: images pre-resized"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_a_loader_that_just_began(monkeypatch, number):
    """Of its first moment: torch's own handlers are there then, and ours are not yet."""
    shield = container.training.loader._shield

    def at_once(worker):
        os.kill(os.getpid(), number)
        shield(worker)

    monkeypatch.setattr(container.training.loader, "_shield", at_once)
    assert len(list(epoch_batches(loader(2), seed=1, epoch=0))) == 50 // 8


def test_validation_is_timm_s():
    dataset = small(Digits(train=False))
    ours = list(create_val_loader(dataset, CONFIG, 16, 1, CPU))
    theirs = create_loader(
        dataset,
        CONFIG["input_size"],
        16,
        num_workers=0,
        distributed=True,
        device=CPU,
        **{key: value for key, value in CONFIG.items() if key != "input_size"},
    )
    assert_equal(ours, list(theirs))
    assert sum(len(targets) for _, targets in ours) == 50


@pytest.fixture
def shards(tmp_path):
    """WebDataset: 4 training shards of 16 images and one of 10 for validation, whose image i has class i % 2."""
    lengths = {}
    for name in [f"train-{i}.tar" for i in range(4)] + ["val-0.tar"]:
        lengths[name] = 10 if name.startswith("val") else 16
        with tarfile.open(tmp_path / name, "w") as archive:
            for i in range(lengths[name]):
                image = io.BytesIO()
                Image.new("RGB", (40, 40), (15 * i, 255 * (i % 2), 0)).save(image, "PNG")
                for suffix, content in (("png", image.getvalue()), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{name[:-4]}-{i:03d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    splits = {}
    for split, start in (("train", "train"), ("validation", "val")):
        files = [name for name in lengths if name.startswith(start)]
        counts = [lengths[name] for name in files]
        splits[split] = dict(name=split, num_samples=sum(counts), filenames=files, shard_lengths=counts)
    (tmp_path / "_info.json").write_text(json.dumps(dict(splits=splits)))
    return tmp_path


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stream_is_the_same_stream_again(shards, monkeypatch):
    """WebDataset shards are read in order: the middle of an epoch is reached by reading up to it."""
    train, val, classes = create_datasets(shards, "wds/", num_classes=2, batch_size=8)
    assert classes == 2
    stream = loader(1, train)
    whole = list(epoch_batches(stream, seed=1, epoch=0))
    assert len(whole) == len(stream) == 8
    assert_equal(whole, list(epoch_batches(loader(1, train), seed=1, epoch=0)))
    assert_equal(whole[5:], list(epoch_batches(loader(1, train), seed=1, epoch=0, first=5)))
    assert not torch.equal(whole[0][0], next(iter(epoch_batches(stream, seed=1, epoch=1)))[0])
    targets = torch.cat([targets for _, targets in create_val_loader(val, CONFIG, 4, 1, CPU)])
    assert targets.tolist() == [0, 1] * 5
    patterns = create_datasets(
        shards, "wds/", ("train-{0..3}.tar|64", "val-{0..0}.tar|10"), num_classes=2, batch_size=8
    )
    by_pattern = list(epoch_batches(loader(1, patterns[0]), seed=1, epoch=0))
    assert_equal(whole, by_pattern)
    with pytest.raises(ValueError, match="wds/ needs the folder that it is in: --data-dir"):
        create_datasets(None, "wds/", num_classes=2)
    with pytest.raises(ValueError, match="a stream cannot give an image twice"):
        loader(1, train, repeats=3)
    with monkeypatch.context() as patch:  # another rank draws differently, be it for the same images
        patch.setattr("container.training.loader.dist.get_rank", lambda: 1)
        other = list(epoch_batches(loader(1, train), seed=1, epoch=0))
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(whole, other))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("world", [1, 3, 5])
def test_shards_are_validated_on_once_whatever_the_processes(shards, monkeypatch, world):
    """Four shards of 16; a fifth process has none of them."""
    seen = []
    for rank in range(world):
        _, val, _ = create_datasets(shards, "wds/", ("train", "train"), num_classes=2, batch_size=8)
        with monkeypatch.context() as patch:
            patch.setattr("container.training.loader.dist.get_rank", lambda rank=rank: rank)
            patch.setattr("container.training.loader.dist.get_world_size", lambda: world)
            seen += [len(targets) for _, targets in create_val_loader(val, CONFIG, 3, 8, CPU)]
    assert sum(seen) == 64


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_more_workers_than_shards(shards, monkeypatch):
    train, _, _ = create_datasets(shards, "wds/", num_classes=2, batch_size=8)
    stream = loader(8, train)
    assert stream.loader.num_workers == 4 and len(list(epoch_batches(stream, seed=1, epoch=0))) == 8
    monkeypatch.setattr("container.training.loader.dist.get_world_size", lambda: 5)
    with pytest.raises(ValueError, match="4 shards for 5 processes: each has to have one"):
        loader(1, train)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_class_out_of_range_is_named(shards):
    train, _, _ = create_datasets(shards, "wds/", num_classes=1, batch_size=8)
    with pytest.raises(ValueError, match="an image has class 1, which is not in 0 to 0"):
        list(epoch_batches(loader(1, train), seed=1, epoch=0))


@pytest.mark.parametrize("name", ["resnet50.a1_in1k", "convnext_base.fb_in22k_ft_in1k_384"])
def test_validation_images_are_what_timm_makes_of_them(name):
    """The second is squashed, and not cropped."""
    cfg = timm.get_pretrained_cfg(name)
    config = resolve_model_data_config(SimpleNamespace(pretrained_cfg=cfg.to_dict()))
    assert config["crop_mode"] == ("squash" if "384" in name else "center")
    picture = Image.fromarray(np.random.randint(0, 256, (100, 300, 3), dtype=np.uint8))

    class One(Dataset):
        transform = None

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return self.transform(picture), 0

    ours, _ = next(iter(create_val_loader(One(), config, 1, 0, torch.device("cpu"))))
    torch.testing.assert_close(ours[0], create_transform(**config)(picture), rtol=0, atol=1e-5)


def test_only_own_workers_are_ended():
    """Not other children of the process, such as those of a notebook or a sweep."""
    other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    other.start()
    ours, theirs = (
        create_train_loader(small(Digits(train=True)), CONFIG, AUGMENTATION, 0, 8, 1, seed=1, device=CPU)
        for _ in range(2)
    )
    batches = [iter(epoch_batches(loader, seed=1, epoch=0)) for loader in (ours, theirs)]
    assert len([next(b) for b in batches]) == 2
    (mine,), (worker,) = (loader.loader._current._workers for loader in (ours, theirs))
    container.training.loader.end_workers(ours)
    assert not mine.is_alive() and worker.is_alive() and other.is_alive()
    container.training.loader.end_workers(theirs)
    other.kill()
    other.join()
    assert not worker.is_alive() and len(multiprocessing.active_children()) == 0


class Hanging(Dataset):
    """Images of a folder that stops to answer."""

    transform = None

    def __len__(self):
        return 48

    def __getitem__(self, index):
        if multiprocessing.parent_process() is None and index % 2:  # in this process: as a slow disk does
            time.sleep(0.01)
        elif index > 8:
            time.sleep(600)
        return torch.zeros(3, 32, 32, dtype=torch.uint8).numpy(), 0


@pytest.mark.parametrize("told, seconds", [(False, 2.0), (True, 0.4)])
def test_a_wait_for_data_ends(monkeypatch, told, seconds):
    """After a signal to stop, sooner."""
    monkeypatch.setattr(distributed, "TICK", 0.1)
    monkeypatch.setattr(distributed, "TICKS", 20)
    monkeypatch.setattr(distributed, "TICKS_TOLD", 4)
    batches = create_val_loader(Hanging(), CONFIG, 4, 1, CPU)
    with StopSignal() as stop:
        began = iter(batches)
        next(began)
        if told:
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(TimeoutError, match=rf"no batch came for {seconds:.0f} s: the data does not answer"):
            list(began)
        assert stop.received == (signal.SIGTERM if told else None)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    container.training.loader.end_workers(batches)


def test_a_process_that_was_suspended_has_not_waited(monkeypatch):
    """As jobs are by schedulers, for hours; time is counted while the process runs."""
    monkeypatch.setattr(distributed, "TICK", 0.1)
    monkeypatch.setattr(distributed, "TICKS", 10)
    loader = create_val_loader(small(Digits(train=True)), CONFIG, 8, 1, CPU)
    container.training.loader.end_workers(loader)
    waking = subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
    with distributed.Waiting() as waiting:
        os.kill(os.getpid(), signal.SIGSTOP)
    assert waiting.ticks < 5 and waking.wait() == 0


@pytest.mark.parametrize("kind", ["pipe", "device", "broken link"])
def test_what_could_be_read_for_ever_is_no_image(folder, kind):
    """In class folders and in folders of photos; it is counted."""
    odd = folder / "train" / "bright" / "x.jpg"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    images = Images(str(folder / "train"))
    assert "1 pipes, devices or broken links" in images.left_out and odd.name not in images.filenames(basename=True)
    left_out = LeftOut()
    assert str(odd) not in list_images(str(folder), left_out) and left_out["special"] == 1
    if kind != "broken link":
        with pytest.raises(ValueError, match=r"x\.jpg cannot be read as a photo: it is no regular file"):
            open_photo(odd)
