"""Data of a training run."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch.distributed as dist
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from timm.data.auto_augment import AugmentOp, RandAugment, rand_augment_transform
from torchvision.datasets import CIFAR10

from container import weights
from container.training import Digits, Images, check_classes, create_datasets, open_photos, open_validation
from container.training.data import ClassFolders, Photos, mend_posterize

# timm's tar reader and Hugging Face's cache leave closing their files to the garbage collector.
LEFT_OPEN = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def test_digits_are_split_once_and_for_all():
    train, val = Digits(train=True), Digits(train=False)
    assert (len(train), len(val)) == (1437, 360)
    assert np.bincount(val.targets).min() >= 34 and set(train.targets) == set(range(10))
    seen = {image.tobytes() for image in train.images}
    # Scikit-learn's digits hold a few images twice; the parts must not share more than these.
    assert sum(image.tobytes() in seen for image in val.images) <= 2
    assert np.array_equal(val.images, Digits(train=False).images)


def test_a_digit_is_an_image_that_looks_like_its_pixels():
    digits = Digits(train=True)
    image, target = digits[5]
    assert image.size == (32, 32) and image.mode == "RGB" and target == digits.targets[5]
    small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(small.ravel(), digits.images[5])[0, 1] > 0.97
    digits.transform = lambda image: "transformed"
    assert digits[5][0] == "transformed"


@pytest.mark.parametrize("validation", ["val", "validation", "test"])
def test_folder(tmp_path, validation):
    for split in ("train", validation):
        for i, name in enumerate(("a", "b")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (200 * i, 0, 0)).save(tmp_path / split / name / "image.png")
    train, val, num_classes = create_datasets(tmp_path)
    assert (len(train), len(val), num_classes) == (2, 2, 2)
    assert [train[i][1] for i in range(2)] == [val[i][1] for i in range(2)] == [0, 1]
    assert train.reader.root != val.reader.root


@pytest.mark.parametrize("operation", ["Posterize", "PosterizeIncreasing", "PosterizeOriginal"])
@pytest.mark.parametrize("magnitude", [0, 2, 9, 10])
def test_posterize_takes_every_magnitude(operation, magnitude):
    pixels = np.random.randint(0, 256, (8, 8, 3), dtype=np.uint8)
    policy = mend_posterize(RandAugment([AugmentOp(operation, prob=1, magnitude=magnitude)], num_layers=1))
    result = np.asarray(policy(Image.fromarray(pixels)))
    kept = {"Posterize": magnitude * 4 // 10, "PosterizeIncreasing": 4 - magnitude * 4 // 10}
    bits = kept.get(operation, 4 + magnitude * 4 // 10)
    assert np.array_equal(result, pixels >> (8 - bits) << (8 - bits))


def test_released_augmentation_takes_thousands_of_images():
    augment = mend_posterize(rand_augment_transform("rand-m9-mstd0.5-inc1", {}))
    image = Image.fromarray(np.random.randint(0, 256, (8, 8, 3), dtype=np.uint8))
    for _ in range(5000):
        assert augment(image).size == (8, 8)


@LEFT_OPEN
@pytest.mark.parametrize("nested", [False, True], ids=["folders in a tar", "tars in a tar"])
def test_tar_files(folder, tmp_path, nested):
    """The two layouts of ImageNet's own archives; in the second a class is a tar file. Same images, same classes."""
    (tmp_path / "tars").mkdir()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / "tars" / f"{split}.tar", "w") as archive:
            for name in ("bright", "dark"):
                if not nested:
                    archive.add(folder / split / name, name)
                    continue
                with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                    for image in sorted((folder / split / name).iterdir()):
                        inner.add(image, image.name)
                archive.add(tmp_path / f"{name}.tar", f"{name}.tar")
    expected = create_datasets(folder)
    for part, from_tar in zip(expected[:2], create_datasets(tmp_path / "tars")[:2]):
        assert len(part) == len(from_tar)
        assert part.classes == from_tar.classes == ["bright", "dark"]
        images = [sorted((np.asarray(d[i][0]).tobytes(), d[i][1]) for i in range(len(d))) for d in (part, from_tar)]
        assert images[0] == images[1]
    (tmp_path / "tars" / "val.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"no images in class folders of .*val\.tar"):
        create_datasets(tmp_path / "tars")


@LEFT_OPEN
def test_hugging_face_dataset(folder, tmp_path):
    """One on this disk: an image folder; its splits have the Hub's names."""
    (folder / "val").rename(folder / "validation")
    (tmp_path / "cache").mkdir()
    train, val, classes = create_datasets(tmp_path / "cache", f"hfds/{folder}")
    assert (len(train), len(val), classes) == (48, 12, 2)
    image, target = train[0]
    assert image.mode == "RGB" and (np.asarray(image).mean() > 100) == (target == train.classes.index("bright"))


def test_torchvision_cifar10(tmp_path, monkeypatch):
    """A file in CIFAR-10's format, with its own checksum in torchvision's list."""
    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    pixels = np.random.randint(0, 256, (20, 3072), dtype=np.uint8)
    names = [f"class {i}" for i in range(10)]
    contents = dict(
        data_batch_1=dict(data=pixels, labels=list(range(10)) * 2),
        test_batch=dict(data=pixels[:10], labels=list(range(10))),
        meta=dict(label_names=names),
    )
    sums = {}
    for name, content in contents.items():
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", dict(filename="meta", key="label_names", md5=sums["meta"]))
    train, val, classes = create_datasets(tmp_path, "torch/cifar10")
    assert (len(train), len(val), classes) == (20, 10, 10)
    assert np.array_equal(np.asarray(train[3][0]), pixels[3].reshape(3, 32, 32).transpose(1, 2, 0)) and train[3][1] == 3
    (base / "test_batch").unlink()
    with pytest.raises(ValueError, match=r"torchvision\.datasets\.CIFAR10.*download=True"):
        create_datasets(tmp_path, "torch/cifar10")


def test_unreadable_images_are_noted_and_replaced(folder):
    for name in ("bright/0.jpg", "bright/5.jpg"):
        (folder / "val" / name).write_bytes(b"no image")
    val, train = Images(str(folder / "val")), Images(str(folder / "val"), train=True)
    names = val.filenames()
    bad = [names.index("bright/0.jpg"), names.index("bright/5.jpg")]
    assert [val[i][1] for i in range(12)] == [-1 if i in bad else i // 6 for i in range(12)]
    assert (
        sorted(val.new_unreadable()) == [f"bright/{i}.jpg (not an image file)" for i in (0, 5)]
        and val.new_unreadable() == []
    )
    image, target = train[bad[0]]
    assert target == 0 and np.array_equal(np.asarray(image), np.asarray(train[bad[0] + 1][0]))
    for name in names:
        (folder / "val" / name).write_bytes(b"no image")
    with pytest.raises(
        OSError, match=r"10 images in a row cannot be read, the first is bright/[0-9]+.jpg: not an image file"
    ):
        val[0]
    for i in range(2):
        with pytest.raises(OSError, match="10 images in a row"):
            val[i]
    with pytest.raises(ValueError, match=r"1[0-2] of 12 images cannot be read"):
        val.new_unreadable()


def test_folders_of_numbers_are_sorted_as_numbers(tmp_path):
    """ImageNet-V2: class folders 0 to 999, and no splits."""
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / str(i) / "image.png")
    images, classes = open_validation(tmp_path)
    assert classes == 12 and [(images.filename(i), images[i][1]) for i in (2, 10)] == [
        ("2/image.png", 2),
        ("10/image.png", 10),
    ]
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        open_validation("nowhere")


@pytest.mark.slow
def test_a_folder_without_permission():
    """As another user, since root may read everything."""
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o755)
        for split in ("train", "val"):
            for name in ("a", "b"):
                (root / split / name).mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(root / split / name / "image.png")
        (root / "train" / "b").chmod(0)
        code = f"""
import os
from container.training import create_datasets
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    create_datasets({str(root)!r})
except OSError as error:
    print(error)
"""
        command = [sys.executable, "-W", "ignore", "-c", code]
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert result.stdout == f"folder {root / 'train' / 'b'} cannot be read\n", result.stderr
    finally:
        (root / "train" / "b").chmod(0o755)
        shutil.rmtree(root)


def place(path, count=1):
    path.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (4, 4)).save(path / f"{i}.png")


@pytest.mark.slow
def test_classes_have_one_order_in_every_process(tmp_path):
    """Names that are equal but for case or zeros too; all others as timm orders them."""
    names = ["a", "A", "b", "B", "1", "01", "10", "2", "n02"]
    for name in names:
        place(tmp_path / "data" / name)
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        archive.add(tmp_path / "data", "data")
    code = (
        "import sys; from container.training import Images; print([Images(path).classes for path in sys.argv[1:]]); "
        "print([[images[i][1] for i in range(9)] for images in map(Images, sys.argv[1:])])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "2"}  # a set of the names has no order
    command = [sys.executable, "-W", "ignore", "-c", code, tmp_path / "data", tmp_path / "data.tar"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout == f"{[['01', '1', '2', '10', 'A', 'a', 'B', 'b', 'n02']] * 2}\n{[list(range(9))] * 2}\n"


def pixels_of(images):
    return [hashlib.sha256(np.asarray(images[i][0]).tobytes()).hexdigest() for i in range(len(images))]


@pytest.mark.parametrize("nested", [False, True])
def test_processes_do_not_share_their_place_in_a_tar(folder, tmp_path, nested):
    """A loader that began after the first image was read would read others under its label, and so would we."""
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name in ("bright", "dark"):
            if nested:
                with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                    for image in (folder / "train" / name).iterdir():
                        inner.add(image, image.name)
                archive.add(tmp_path / f"{name}.tar", f"{name}.tar")
            else:
                archive.add(folder / "train" / name, name)
    images = Images(str(tmp_path / "train.tar"))
    alone, queue = pixels_of(images), multiprocessing.get_context("fork").SimpleQueue()
    reading = [
        multiprocessing.get_context("fork").Process(target=lambda: queue.put(pixels_of(images))) for _ in range(2)
    ]
    for process in reading:
        process.start()
    assert pixels_of(images) == alone and [queue.get() for _ in reading] == [alone, alone]
    for process in reading:
        process.join()
    assert not images.unreadable.any()


def _listed(rank, meet, folder, queue):
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    if rank:  # would fail if it listed a folder by itself
        os.scandir = os.walk = None
    found = []
    for opened in (lambda: create_datasets(folder)[:2], lambda: open_photos([str(folder)])):
        found.append([(images.filenames(), [int(images[i][1]) for i in range(3)]) for images in opened()])
    try:
        Images(str(folder))
    except ValueError as error:
        found.append(str(error))
    queue.put(found)
    dist.destroy_process_group()


def test_one_process_lists_the_files_for_all(tmp_path):
    """A folder, photos without labels, and the refusal of a folder of folders."""
    folder = tmp_path / "data"
    for split, count in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (4, 4)).save(folder / split / name / f"{i}.png")
    Image.new("RGB", (4, 4)).save(folder / "x.png")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_listed, args=(rank, tmp_path / "meet", folder, queue)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    first, second = (queue.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert first == second
    train = ["a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"]
    assert first[0][0] == (train, [0, 0, 0]) and first[0][1] == (
        ["a/0.png", "a/1.png", "b/0.png", "b/1.png"],
        [0, 0, 1],
    )
    assert first[1][0] == (train, [0, 0, 0]) and first[2] == f"images in {folder} itself, and not in class folders"


def test_folders_in_class_folders_are_of_the_class(tmp_path):
    for name in ("cat/day", "cat/night", "dog/day", "dog"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name / "x.png")
    (tmp_path / "dog" / "loop").symlink_to(tmp_path / "dog")
    (tmp_path / "eel").symlink_to(tmp_path / "cat")
    images = Images(str(tmp_path))
    assert images.classes == ["cat", "dog", "eel"] and [images[i][1] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert images.filenames()[2] == "dog/day/x.png"


@LEFT_OPEN
@pytest.mark.parametrize("members", [["cat/day", "cat/night", "dog/day"], ["cat/day", "dog/night"], ["cat", "."]])
def test_folders_in_class_folders_of_a_tar_are_refused(tmp_path, members):
    """Nobody can tell there which are the classes; `train/cat` and `train/dog` are clear."""
    place(tmp_path / "x")
    for prefix in ("", "train/"):
        with tarfile.open(tmp_path / "train.tar", "w") as archive:
            for member in members:
                archive.add(tmp_path / "x", prefix + member)
        with pytest.raises(ValueError, match="has folders in class folders, or images outside of them: in "):
            Images(str(tmp_path / "train.tar"))
        with tarfile.open(tmp_path / "train.tar", "w") as archive:
            for member in ("cat", "dog"):
                archive.add(tmp_path / "x", prefix + member)
        assert Images(str(tmp_path / "train.tar")).classes == ["cat", "dog"]


@LEFT_OPEN
def test_no_index_of_a_large_archive_outlives_it(tmp_path):
    """One of more than 10 GB: a hole behind its end. timm would write an index beside it, and believe that."""
    for name in ("cat", "dog"):
        place(tmp_path / name, 2)
    for order in (("cat", "dog"), ("dog", "cat")):
        with tarfile.open(tmp_path / "train.tar", "w") as archive:
            for name in order:
                archive.add(tmp_path / name, name)
        os.truncate(tmp_path / "train.tar", 11 << 30)
        images = Images(str(tmp_path / "train.tar"))
        assert images.filenames() == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
        assert [images[i][1] for i in range(4)] == [0, 0, 1, 1] and not images.unreadable.any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat", "dog", "train.tar"]


@pytest.mark.parametrize("kind", ["classes", "photos"])
def test_paths_are_kept_as_bytes_whatever_their_letters(kind, tmp_path):
    """In one array, which workers share. Names need not be UTF-8, and their lengths differ."""
    names = ["a/1.png", "a/ünï.png", os.fsdecode(b"b/\xff.png"), f"b/{'long' * 20}.png"]
    for shade, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), shade).save(tmp_path / name)
    reader = ClassFolders(tmp_path) if kind == "classes" else Photos([tmp_path])
    assert reader.paths.dtype.kind == "S" and len(reader) == 4
    assert sorted(reader.filenames()) == sorted(names) and Images(None, reader).digest()
    for index, name in enumerate(reader.filenames()):
        assert reader.filenames(absolute=True)[index] == str(tmp_path / name)
        file, target = reader[index]
        with file:
            assert Image.open(file).getpixel((0, 0)) == names.index(name)
        assert target == (name.startswith("b") if kind == "classes" else 0)


def test_other_suffixes_are_counted(folder):
    assert Images(str(folder / "train")).left_out == ""
    for i in range(3):
        (folder / "train" / "dark" / f"{i}.jpg").rename(folder / "train" / "dark" / f"{i}.WEBP")
    (folder / "train" / "dark" / "README").touch()
    (folder / "train" / "dark" / ".DS_Store").touch()
    images = Images(str(folder / "train"))
    assert images.left_out == f"4 files with other suffixes (.webp, none) in {folder / 'train'} are not used"
    assert len(images) == 45


def test_classes_of_other_names_are_refused():
    check_classes("x", ["a", "b"], ["a", "b"])
    check_classes("x", None, ["a"])
    check_classes("x", ["a"], None)
    with pytest.raises(ValueError, match="x knows 2 classes, and the data has 2: number 1 is b there, and c here"):
        check_classes("x", ["a", "b"], ["a", "c"])
    with pytest.raises(ValueError, match="x knows 1 classes, and the data has 2: number 1 is none there, and c here"):
        check_classes("x", ["a"], ["a", "c"])


@LEFT_OPEN
def test_accents_of_a_mac_are_those_of_linux(tmp_path):
    """Composed or decomposed, in folders, tar files and records of weights: the same classes, in the same order."""
    names = ["cafz", "café", "thé"]  # decomposed, café would come before cafz
    for part, form in (("train", "NFC"), ("val", "NFD")):
        for name in names:
            place(tmp_path / "data" / part / unicodedata.normalize(form, name))
        with tarfile.open(tmp_path / f"{part}.tar", "w") as archive:
            for name in names:
                archive.add(
                    tmp_path / "data" / part / unicodedata.normalize(form, name), unicodedata.normalize(form, name)
                )
    for folder in (tmp_path / "data", tmp_path):
        train, val, count = create_datasets(folder)
        assert train.classes == val.classes == [unicodedata.normalize("NFC", name) for name in names] and count == 3
        for part in (train, val):
            for i in range(3):
                assert names[part[i][1]] == unicodedata.normalize("NFC", part.filename(i).split("/")[-2])
    both = tmp_path / "both"  # a folder that was copied twice is one class
    for form in ("NFC", "NFD"):
        place(both / unicodedata.normalize(form, "thé"))
    assert Images(str(both)).classes == ["thé"] and len(Images(str(both))) == 2
    check_classes("x", ["caf\u00e9"], ["cafe\u0301"])
    with pytest.raises(ValueError, match="number 0 is café there, and cafe here"):
        check_classes("x", ["cafe\u0301"], ["cafe"])
    metadata = dict(classes=json.dumps(["cafe\u0301"]))
    save_file({}, tmp_path / "own.safetensors", metadata)
    assert weights.class_names(tmp_path / "own.safetensors") == ["caf\u00e9"]


def pack(path, folder):
    """As GNU tar packs a folder, with its links."""
    subprocess.run(["tar", "cf", path, "-C", folder, *sorted(os.listdir(folder))], check=True)
    return Images(str(path))


@pytest.mark.parametrize("nested", [False, True])
def test_links_in_a_tar_are_images_as_in_a_folder(tmp_path, nested):
    """Hard and symbolic, also through another link; those that lead out of the archive are counted."""
    for shade, name in enumerate("ab"):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        Image.new("L", (4, 4), 100 + shade).save(folder / "0.png")
        os.link(folder / "0.png", folder / "1.png")
        (folder / "2.png").symlink_to("0.png")
        (folder / "3.png").symlink_to("2.png")
    images = Images(str(tmp_path / "train"))
    if not nested:
        (tmp_path / "train" / "a" / "4.png").symlink_to("../b/0.png")
        images = Images(str(tmp_path / "train"))
        (tmp_path / "train" / "a" / "out.png").symlink_to("../../elsewhere.png")
        (tmp_path / "train" / "a" / "circle.png").symlink_to("circle.png")
        packed = pack(tmp_path / "train.tar", tmp_path / "train")
    else:
        (tmp_path / "tars").mkdir()
        for name in "ab":
            subprocess.run(
                ["tar", "cf", tmp_path / "tars" / f"{name}.tar", "-C", tmp_path / "train" / name, *os.listdir(folder)]
            )
        (tmp_path / "tars" / "._a.tar").write_bytes(b"what a Mac keeps beside a file")
        packed = pack(tmp_path / "train.tar", tmp_path / "tars")
    assert packed.filenames() == images.filenames() and pixels_of(packed) == pixels_of(images)
    assert [packed[i][1] for i in range(len(packed))] == [images[i][1] for i in range(len(images))]
    reason = "1 hidden files or files in system folders" if nested else "2 files with other suffixes (link to nothing)"
    assert packed.left_out == f"{reason} in {tmp_path / 'train.tar'} are not used"


def test_the_last_copy_in_a_tar_counts(tmp_path):
    place(tmp_path / "train" / "a", 2)
    place(tmp_path / "train" / "b", 1)
    subprocess.run(["tar", "cf", tmp_path / "train.tar", "-C", tmp_path / "train", "a", "b"], check=True)
    Image.new("RGB", (4, 4), "white").save(tmp_path / "train" / "a" / "0.png")
    subprocess.run(["tar", "rf", tmp_path / "train.tar", "-C", tmp_path / "train", "a/0.png"], check=True)
    images = Images(str(tmp_path / "train.tar"))
    assert images.filenames() == ["a/0.png", "a/1.png", "b/0.png"]
    assert pixels_of(images) == pixels_of(Images(str(tmp_path / "train")))


@pytest.mark.parametrize("kind", ["folder", "tar", "photos"])
def test_what_programs_make_for_themselves_is_left_out_and_counted(tmp_path, kind):
    """Hidden and system folders, in a class and as a class; copies of a Mac; and other suffixes; everywhere alike."""
    for name in ("a", "b", "a/.ipynb_checkpoints", "b/@eaDir", "b/deep/.Trash-1000", "#recycle", ".thumbnails"):
        place(tmp_path / "train" / name)
    shutil.copy(tmp_path / "train/a/0.png", tmp_path / "train/a/._0.png")
    (tmp_path / "train/a/notes.txt").touch()
    (tmp_path / "train/a/.DS_Store").touch()
    shutil.rmtree(tmp_path / "train/b/deep") if kind == "tar" else None
    root = tmp_path / "train"
    if kind == "tar":
        images, root, hidden = pack(tmp_path / "train.tar", root), tmp_path / "train.tar", 6
    elif kind == "folder":
        images, hidden = Images(str(root)), 6
    else:
        images, hidden = Images(None, Photos([root])), 6
    assert images.filenames() == ["a/0.png", "b/0.png"]
    others = f"1 files with other suffixes (.txt) and {hidden} hidden files or files in system folders"
    assert images.left_out == f"{others} in {root} are not used"


def test_photos_follow_links_as_class_folders_do(tmp_path):
    place(tmp_path / "elsewhere" / "cat", 2)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "train" / "cat" / "loop").symlink_to(tmp_path / "train")
    assert Photos([tmp_path / "train"]).filenames() == Images(str(tmp_path / "train")).filenames()


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_errors_of_the_machine_are_no_unreadable_images(folder, monkeypatch, error):
    def fail(*_):
        raise error

    images = Images(str(folder / "train"))
    monkeypatch.setattr("container.training.data.open_rgb", fail)
    with pytest.raises(type(error)):
        images[0]
    assert not images.unreadable.any()


def write_rows(folder, columns, labels):
    """Training and validation parts as the Hub has them, in parquet, with these columns of images."""
    features = {name: datasets.Image() for name in columns} | dict(label=datasets.ClassLabel(names=["a", "b"]))
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_dict(columns | dict(label=labels), features=datasets.Features(features))
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))


@LEFT_OPEN
@pytest.mark.parametrize(
    "column, absent, labels, message",
    [
        ("image", (), (0, 1, 0, 1), None),
        ("image", (2,), (0, 1, 0, 1), "1 of 4 rows of hfds/.*, split train have no image, the first is row 2"),
        ("img", (), (0, 1, 0, 1), "has no column 'image': there are img, label"),
        ("image", (), (0, -1, -1, 1), "2 of 4 rows of hfds/.* have no label, the first is row 1"),
        ("image", (), (-1, -1, -1, -1), "4 of 4 rows of hfds/.* have no label, the first is row 0"),
    ],
)
def test_rows_without_an_image_or_a_label_are_one_line(tmp_path, monkeypatch, column, absent, labels, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    images = [None if i in absent else dict(bytes=file.getvalue(), path=None) for i in range(4)]
    write_rows(tmp_path / "set", {column: images}, list(labels))
    (tmp_path / "cache").mkdir()
    if message is None:
        train, _, count = create_datasets(tmp_path / "cache", f"hfds/{tmp_path / 'set'}")
        assert count == 2 and [train[i][1] for i in range(4)] == list(labels) and train.name(3) == "row 3"
        return
    with pytest.raises(ValueError, match=message):
        create_datasets(tmp_path / "cache", f"hfds/{tmp_path / 'set'}")
