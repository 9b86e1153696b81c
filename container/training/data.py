"""Datasets of a training run: folders, tar files, WebDataset, Hugging Face and torchvision datasets, or digits."""

import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import ImageDataset, create_dataset
from timm.data.auto_augment import NAME_TO_OP
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import Dataset

__all__ = ["Digits", "Images", "create_datasets", "open_validation"]


def _posterize(image: Image.Image, bits_to_keep: int, **hparams: object) -> Image.Image:
    """Keeps the highest bits of every pixel; none of them is black."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


# RandAugment m9-mstd0.5-inc1, the released recipe, keeps no bit of one image in some hundreds. Pillow made it black
# until version 13, which refuses: with timm's own operation a run then dies in its first epoch.
NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize))

_TRAIN_NAMES = ("train",)
_VAL_NAMES = ("val", "validation", "test")
_TRIES = 10


class Digits(Dataset):
    """The 1,797 handwritten digits of scikit-learn as images: 8 x 8, enlarged to 32 x 32, ten classes.

    1,437 train, 360 are held out, the same ones in every run, with equal shares of each digit.

    Args:
        train: The training part, else the held-out part.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    num_classes = 10

    def __init__(self, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("the digits need scikit-learn: pip install scikit-learn") from error
        images, targets = load_digits(return_X_y=True)
        parts = train_test_split(images, targets, test_size=360, stratify=targets, random_state=0)
        self.images, self.targets = (parts[0], parts[2]) if train else (parts[1], parts[3])
        self.transform: Callable | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[object, int]:
        """The image, RGB and transformed, and its class."""
        pixels = (self.images[index].reshape(8, 8) * (255 / 16)).astype("uint8")  # they come as 0 to 16
        image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        return image if self.transform is None else self.transform(image), int(self.targets[index])


class Images(ImageDataset):
    """timm's dataset over a folder, tar or Hugging Face reader, which notes the images that it cannot read.

    In training the next readable image takes the place of one; in validation its class becomes -1, not to be counted.
    The notes are in shared memory, so that the workers that read write them for the process that trains. `classes` are
    the names of the classes in order.

    Args:
        root: As timm's.
        reader: As timm's.
        train: Whether for training.
        split: As timm's.
    """

    def __init__(self, root: str | None, reader: str = "", train: bool = False, split: str = "train") -> None:
        super().__init__(root, reader=reader, split=split)
        self.train = train
        self.unreadable = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        self._told = torch.zeros_like(self.unreadable)
        by_index = getattr(self.reader, "class_to_idx", None) or getattr(self.reader, "class_name_to_idx", {})
        self.classes = sorted(by_index, key=by_index.__getitem__)

    def __getitem__(self, index: int) -> tuple[object, int]:
        """The image, RGB and transformed, and its class."""
        for candidate in (i % len(self) for i in range(index, index + _TRIES)):
            try:
                file, target = self.reader[candidate]
                with file:
                    image = Image.open(file).convert("RGB")
                break
            except Exception:  # a damaged file makes Pillow's decoders raise nearly anything
                self.unreadable[candidate] = True
        else:
            raise OSError(f"{_TRIES} images in a row cannot be read, the last is {self.filename(candidate)}")
        if candidate != index and not self.train:
            target = -1
        return image if self.transform is None else self.transform(image), target

    def new_unreadable(self) -> list[str]:
        """Names of the images that were noted as unreadable since the last call.

        Raises:
            ValueError: All noted are more than 1 % of the images, and more than 10.
        """
        new = self.unreadable & ~self._told
        self._told |= new
        names = [self.filename(int(i)) for i in new.nonzero()]
        if names and (count := int(self._told.sum())) > max(10, len(self) // 100):
            raise ValueError(f"{count} of {len(self)} images cannot be read, the last is {names[-1]}")
        return names


def _split(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return path
    # Without this check timm would take `root` itself for the split, and the splits for classes.
    raise FileNotFoundError(f"no folder {' or '.join(names)} (or .tar) in {root}")


def _open(path: Path, train: bool) -> Images:
    """A folder or a tar file with a folder for each class."""
    folders = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    for folder in folders:
        if not os.access(folder, os.R_OK | os.X_OK):
            raise PermissionError(f"folder {folder} cannot be read")
    try:
        images = Images(str(path), train=train)
    except (AssertionError, RuntimeError, tarfile.TarError) as error:
        raise ValueError(f"no images in class folders of {path}") from error
    classes = set(images.classes)
    if "" in classes and path.is_dir():
        raise ValueError(f"images in {path} itself, and not in class folders")
    empty = [f for f in folders if f.name not in classes and not any(p.name in classes for p in f.rglob("*/"))]
    if empty:
        extensions = ", ".join(get_img_extensions())
        raise ValueError(f"{len(empty)} class folders without images ({extensions}), among them {empty[0]}")
    if not len(images):
        raise ValueError(f"no images in class folders of {path}")
    return images


def open_validation(data_dir: str | Path) -> tuple[Images, int]:
    """Opens images to evaluate on: the validation part of a folder, or one that holds the class folders itself.

    ImageNet-V2 is of the second kind; its folders are numbers, and are sorted as numbers.

    Args:
        data_dir: The folder.

    Returns:
        The images, and the number of classes.

    Raises:
        OSError: The folder is missing, or cannot be read.
        ValueError: It has no images.
    """
    root = Path(data_dir)
    if not root.exists():
        raise FileNotFoundError(f"no folder {root}")
    with suppress(FileNotFoundError):
        root = _split(root, _VAL_NAMES)
    images = _open(root, train=False)
    return images, len(images.classes)


def create_datasets(
    data_dir: str | Path | None = None,
    dataset: str = "",
    splits: tuple[str, str] = ("train", "validation"),
    num_classes: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> tuple[Any, Any, int]:
    """Opens the data to train and to validate on.

    Args:
        data_dir: The folder.
        dataset: '' for a folder with `train` and `val` (or `validation`, `test`), each a folder or a tar file with a
            folder of images for each class; 'torch/cifar10', 'torch/cifar100', 'hfds/NAME', 'wds/' as in timm;
            'digits', or '' without a folder, for scikit-learn's digits.
        splits: Names of the parts to train and to validate on, where the data has names; for WebDataset also patterns
            with a number of images, as `train-{000..099}.tar|100000`.
        num_classes: As many as the data must have; what has no class names, as WebDataset, needs it.
        batch_size: A hint that WebDataset needs.
        seed: Of the order of what is read as a stream.

    Returns:
        Training data, validation data, number of classes.

    Raises:
        ImportError: A package that the format needs is not installed.
        OSError: The folder or one of its parts is missing, or cannot be read.
        ValueError: A part or a class has no images, the parts have different classes, or not `num_classes`.
    """
    kind = "digits" if not dataset and data_dir is None else dataset.split("/")[0].lower()
    train: Any
    val: Any
    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"no folder {data_dir}")
    if data_dir is None and kind in ("torch", "wds"):
        raise ValueError(f"{dataset} needs the folder that it is in: --data-dir")
    if kind == "digits":
        train, val = Digits(train=True), Digits(train=False)
        names, val_names = [list(map(str, range(Digits.num_classes)))] * 2
    elif kind == "":
        assert data_dir is not None
        train = _open(_split(Path(data_dir), _TRAIN_NAMES), train=True)
        val = _open(_split(Path(data_dir), _VAL_NAMES), train=False)
        names, val_names = train.classes, val.classes
    elif kind == "torch":
        try:
            train, val = (create_dataset(dataset, str(data_dir), split=split) for split in ("train", "validation"))
        except (AssertionError, RuntimeError) as error:
            name = dataset.split("/")[-1].upper()
            raise ValueError(
                f"no {dataset} in {data_dir}: if torchvision has it, get it by "
                f"python -c \"import torchvision; torchvision.datasets.{name}('{data_dir}', download=True)\""
            ) from error
        names, val_names = train.classes, val.classes
    elif kind == "hfds":
        cache = None if data_dir is None else str(data_dir)
        train, val = (Images(cache, dataset, train=i == 0, split=split) for i, split in enumerate(splits))
        names, val_names = train.classes, val.classes
        if not names:
            raise ValueError(f"{dataset} has no class names for its column 'label'")
    elif kind == "wds":
        if num_classes is None:
            raise ValueError("WebDataset shards do not tell their classes: --num-classes is needed")
        train, val = (
            create_dataset(dataset, str(data_dir), split=split, is_training=i == 0, batch_size=batch_size, seed=seed)
            for i, split in enumerate(splits)
        )
        names = val_names = list(map(str, range(num_classes)))
        for part in (train, val):
            part.target_transform = _Bounded(num_classes)
    else:
        raise ValueError(f"no dataset {dataset}; there are digits, torch/NAME, hfds/NAME, wds/, and folders")
    if names != val_names:
        odd = sorted(set(names) ^ set(val_names))
        raise ValueError(
            f"{len(names)} classes to train on, {len(val_names)} to validate on in {data_dir}; "
            f"{len(odd)} are in one only: {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}"
        )
    if num_classes is not None and num_classes != len(names):
        raise ValueError(f"the data has {len(names)} classes, not {num_classes}")
    return train, val, len(names)


class _Bounded:
    """Lets through the classes that there are; any other would end a run on a GPU in a failed assertion."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, target: int) -> int:
        if not 0 <= target < self.num_classes:
            raise ValueError(f"an image of class {target}, but there are {self.num_classes} classes, 0 the first")
        return target
