"""Datasets for a training run: folders, tar files, WebDataset, Hugging Face and torchvision datasets, or digits."""

import errno
import hashlib
import io
import os
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from fnmatch import fnmatch
from itertools import chain, takewhile, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from container.images import open_rgb

from .distributed import on_first_rank

__all__ = [
    "Digits",
    "Images",
    "Photos",
    "check_classes",
    "compose_accents",
    "create_datasets",
    "mend_posterize",
    "open_photos",
    "open_validation",
]


def _posterize(image: Image.Image, bits_to_keep: int, **hparams: object) -> Image.Image:
    """Keeps the highest bits of every pixel. With 0 bits, the image is black."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


def mend_posterize(policy: Any) -> Any:
    """Makes timm's auto-augment policy accept posterizing to 0 bits, and returns the policy.

    RandAugment m9-mstd0.5-inc1, used by the released recipe, posterizes one image in a few hundred to 0 bits. Pillow
    made such an image black until version 13, which raises an error instead. With timm's own operation, a run would
    then fail in its first epoch.
    """
    for operation in (*getattr(policy, "ops", ()), *chain.from_iterable(getattr(policy, "policy", ()))):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return policy


_TRAIN_NAMES = ("train",)
_VAL_NAMES = ("val", "validation", "test")
_TRIES = 10
_OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # errors that say nothing about an image


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits in ten classes, as 32 x 32 images upscaled from 8 x 8.

    1,437 images are for training and 360 are held out. The split is stratified by digit, and the same in every run.

    Args:
        train: Whether to use the training images instead of the held-out ones.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    num_classes = 10
    classes = [str(digit) for digit in range(num_classes)]

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
        """Returns the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[object, int]:
        """Returns the RGB image, after `transform` if it is set, and its class index."""
        pixels = (self.images[index].reshape(8, 8) * (255 / 16)).astype("uint8")  # scikit-learn's range is 0 to 16
        image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        return image if self.transform is None else self.transform(image), int(self.targets[index])


def compose_accents(name: str) -> str:
    """Returns a class name with composed accents (NFC). Those from a Mac are decomposed, and look the same."""
    return unicodedata.normalize("NFC", name)


def _in_order(names: Iterable[str]) -> list[str]:
    """Returns the unique class names in timm's natural order.

    Names that are equal in that order (A and a, 1 and 01) are sorted as plain strings.
    """
    return sorted(set(names), key=lambda name: (natural_key(name), name))


def _packed(paths: Iterable[str]) -> np.ndarray:
    """Packs paths into one array of bytes, which forked workers share.

    A list takes three times the memory, and again in every worker: reading an element writes its reference count.
    """
    return np.array([os.fsencode(path) for path in paths])


_SYSTEM = {"#recycle", "$recycle.bin", "@eadir", "__macosx", "lost+found", "system volume information"}


def _is_hidden(name: str) -> bool:
    """Whether a name is of a file or folder that a system or a program made for itself."""
    return name.startswith(".") or name.lower() in _SYSTEM


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


class LeftOut(Counter[str]):
    """Numbers of files that are not used, by suffix.

    Under `hidden` are those in hidden and system folders, and under `special` pipes, devices and broken links.
    """

    def describe(self, where: str) -> str:
        """Returns one line about these files, or '' if there are none."""
        others = {suffix: count for suffix, count in self.items() if count and suffix not in ("hidden", "special")}
        parts = [f"{sum(others.values())} files with other suffixes ({', '.join(sorted(others))})"] if others else []
        parts += [f"{self['hidden']} hidden files or files in system folders"] if self["hidden"] else []
        parts += [f"{self['special']} pipes, devices or broken links"] if self["special"] else []
        return f"{' and '.join(parts)} in {where} are not used" if parts else ""


def list_images(folder: str, left_out: LeftOut, exclude: str | None = None) -> list[str]:
    """Lists the images below a folder, at any depth. Links are followed, hidden and system folders are not entered.

    Args:
        folder: The folder.
        left_out: What is left out is counted here.
        exclude: `fnmatch` pattern of file names to leave out, which are not counted.

    Raises:
        PermissionError: A folder cannot be read.
    """
    images, seen, suffixes, places = [], set(), get_img_extensions(as_set=True), [folder]
    while places:
        place = places.pop()
        if (real := os.path.realpath(place)) in seen:  # a link to a folder that was visited before
            continue
        seen.add(real)
        try:
            found = os.scandir(place)
        except OSError:
            raise PermissionError(f"folder {place} cannot be read") from None
        with found as entries:
            for entry in entries:
                suffix = _suffix(entry.name)
                if entry.is_dir():
                    if _is_hidden(entry.name):
                        left_out["hidden"] += sum(len(files) for _, _, files in os.walk(entry.path))
                    else:
                        places.append(entry.path)
                elif _is_hidden(entry.name):
                    left_out["hidden"] += suffix in suffixes
                elif suffix not in suffixes:
                    left_out[suffix or "none"] += 1
                elif not entry.is_file():  # a pipe or a device could be read for ever
                    left_out["special"] += 1
                elif not (exclude and fnmatch(entry.name, exclude)):
                    images.append(entry.path)
    return images


class ClassFolders(Reader):
    """Reader for images in class folders, at any depth, as in torchvision's ImageFolder.

    Note: for timm's reader the class is the innermost folder; here it is the folder directly below `root`.

    Args:
        root: Folder that contains the class folders.

    Raises:
        PermissionError: A folder cannot be read.
        ValueError: `root` itself contains images, or a class folder has none.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, suffixes = root, get_img_extensions(as_set=True)
        self.left_out = LeftOut()
        found: dict[str, list[str]] = {}
        for folder in (entry for entry in os.scandir(root) if entry.is_dir()):
            if _is_hidden(folder.name):
                self.left_out["hidden"] += len(list_images(folder.path, LeftOut()))
            else:
                found.setdefault(compose_accents(folder.name), []).extend(list_images(folder.path, self.left_out))
        named = f"({', '.join(get_img_extensions())})"
        if any(
            _suffix(path.name) in suffixes and not _is_hidden(path.name) for path in root.iterdir() if path.is_file()
        ):
            raise ValueError(f"images in {root} itself, and not in class folders")
        if not any(found.values()):
            raise ValueError(f"no images in class folders of {root} {named}")
        if empty := [name for name, images in found.items() if not images]:
            raise ValueError(f"{len(empty)} class folders without images {named}, among them {root / empty[0]}")
        self.class_to_idx = {name: i for i, name in enumerate(_in_order(found))}
        pairs = [(path, self.class_to_idx[name]) for name, images in found.items() for path in images]
        pairs.sort(key=lambda pair: (natural_key(pair[0]), pair[0]))
        self.paths = _packed(path for path, _ in pairs)
        self.targets = np.array([target for _, target in pairs])

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open(self._filename(index, absolute=True), "rb"), int(self.targets[index])

    def __len__(self) -> int:
        return len(self.paths)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = os.fsdecode(self.paths[index])
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


class Photos(Reader):
    """Reader for all images below several folders, without labels.

    The order is the same in every process. All `targets` are 0 until a teacher replaces them.

    Args:
        roots: The folders.
        exclude: `fnmatch` pattern of file names to leave out.

    Raises:
        PermissionError: A folder cannot be read.
        ValueError: A folder has no images.
    """

    def __init__(self, roots: list[Path], exclude: str | None = None) -> None:
        super().__init__()
        self.roots, self.left_out = roots, LeftOut()
        paths: list[str] = []  # relative to their roots
        counts = []
        for root in roots:
            found = [os.path.relpath(path, root) for path in list_images(str(root), self.left_out, exclude)]
            if not found:
                raise ValueError(f"no images in {root}{f' but {exclude}' if exclude else ''}")
            paths += sorted(found)
            counts.append(len(found))
        self.paths, self.root_of = _packed(paths), np.repeat(range(len(roots)), counts)
        self.targets = np.zeros(len(self), dtype=np.int64)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open(self._filename(index, absolute=True), "rb"), int(self.targets[index])

    def __len__(self) -> int:
        return len(self.paths)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = os.fsdecode(self.paths[index])
        return os.path.basename(path) if basename else str(self.roots[self.root_of[index]] / path) if absolute else path


class ClassTar(Reader):
    """Reader for a tar file of class folders, or of one tar file per class.

    Of several members with one name, the last counts, as when the archive is unpacked. Links are followed within the
    archive. Images are read from their place in the file, so any number of processes may read it.

    Note: for timm's reader, links are left out, and all members with one name count. It keeps an index beside a large
    archive, and trusts it even if the archive has changed. No index is kept here.

    Args:
        path: The archive, not compressed.

    Raises:
        ValueError: The file is no archive, has no images, or has nested folders so that the class level is ambiguous.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.left_out = path, LeftOut()
        try:
            with tarfile.open(path, "r:") as archive:
                members = self._scan(archive)
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"no images in class folders of {path}: {error}") from error
        if not members:
            raise ValueError(f"no images in class folders of {path}")
        folders = {name: tuple(name.split("/")[:-1]) for name in members}
        kinds = set(folders.values())
        common = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*kinds, strict=False))))
        depth = max(0, min(common, min(map(len, kinds)) - 1))  # of the parent of the class folders
        if deeper := [folder for folder in kinds if len(folder) != depth + 1]:
            which = "/".join(deeper[0]) or "its top"
            raise ValueError(f"{path} has folders in class folders, or images outside of them: in {which}")
        classes = {name: compose_accents(folder[-1]) for name, folder in folders.items()}
        self.class_to_idx = {name: i for i, name in enumerate(_in_order(classes.values()))}
        names = sorted(members, key=lambda name: (natural_key(name), name))
        self.names = _packed(names)
        self.places = np.array([members[name] for name in names])  # first byte, and number of bytes
        self.targets = np.array([self.class_to_idx[classes[name]] for name in names])

    def _scan(self, archive: tarfile.TarFile, folder: str = "", first: int = 0) -> dict[str, tuple[int, int]]:
        """Returns the places of the images in an archive, whose first byte is that of the file or of an outer one."""
        found: dict[str, tuple[int, int]] = {}
        links: dict[str, str] = {}
        for member in archive:
            name = os.path.normpath(os.path.join(folder, member.name.lstrip("/")))
            suffix = _suffix(name)
            found.pop(name, None)  # the last copy counts
            links.pop(name, None)
            if any(map(_is_hidden, name.split("/"))):  # first: a Mac's ._NAME.tar is no archive
                self.left_out["hidden"] += member.isfile()
            elif member.isfile() and suffix == ".tar" and not folder:
                with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                    found |= self._scan(inner, os.path.splitext(name)[0], first + member.offset_data)
            elif suffix not in get_img_extensions(as_set=True):
                self.left_out[suffix or "none"] += member.isfile()
            elif member.isfile() and not member.issparse():
                found[name] = (first + member.offset_data, member.size)
            elif member.islnk():  # to the content that this name had until here
                target = os.path.normpath(os.path.join(folder, member.linkname.lstrip("/")))
                if target in found:
                    found[name] = found[target]
                else:
                    self.left_out["link to nothing"] += 1
            elif member.issym():
                links[name] = os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))
        for name, target in links.items():
            for _ in links:  # through other links, but not in a circle for ever
                target = links.get(target, target)
            if target in found:
                found[name] = found[target]
            else:
                self.left_out["link to nothing"] += 1
        return found

    def __getitem__(self, index: int) -> tuple[Any, int]:
        first, size = map(int, self.places[index])
        with open(self.path, "rb") as file:
            file.seek(first)
            return io.BytesIO(file.read(size)), int(self.targets[index])

    def __len__(self) -> int:
        return len(self.names)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = os.fsdecode(self.names[index])
        return os.path.basename(name) if basename else name


def check_rows(reader: Any, name: str) -> None:
    """Checks that every row of Hugging Face data has an image and a label, without reading images.

    Args:
        reader: timm's reader.
        name: Name of the data and its split, for the error message.

    Raises:
        ValueError: A column is missing, or rows have no image or no label.
    """
    table = reader.dataset.data
    images, labels = table.column(reader.image_key), table.column(reader.label_key).to_numpy()
    absent = np.logical_and.reduce([field.is_null().to_numpy() for field in images.flatten()])
    if absent.all():  # timm makes an empty column of one that is not there
        others = ", ".join(column for column in table.column_names if column != reader.image_key)
        raise ValueError(f"{name} has no column {reader.image_key!r}: there are {others}")
    for what, rows in (("image", absent), ("label", ~(labels >= 0))):
        if rows.any():
            first = int(rows.argmax())
            raise ValueError(f"{rows.sum()} of {len(rows)} rows of {name} have no {what}, the first is row {first}")


def _reason(error: BaseException | None) -> str:
    """Returns the first line of what an error says, or its type."""
    if isinstance(error, UnidentifiedImageError):  # its own message shows the file object
        return "not an image file"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Images(ImageDataset):
    """timm dataset over a folder, tar or Hugging Face reader that keeps track of unreadable images.

    In training, an unreadable image is replaced by the next readable one. In validation, its class becomes -1, which is
    not counted. The record is in shared memory, so that data loader workers can report to the training process.
    `classes` are the class names in order, and `left_out` is a message about files without an image suffix.

    Args:
        root: Folder of class folders, or tar file. If `reader` is given, it is passed on to timm.
        reader: '', timm's 'hfds/NAME', or a reader.
        train: Whether the images are for training.
        split: Name of the split, passed on to timm.
    """

    def __init__(self, root: str | None, reader: str | Reader = "", train: bool = False, split: str = "train") -> None:
        path = Path(root or "")
        if not reader:  # millions of files are listed once, not by every process
            reader = on_first_rank(lambda: ClassFolders(path) if path.is_dir() else ClassTar(path))
        super().__init__(root, reader=reader, split=split)
        self.train = train
        self.unreadable = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        self._told = torch.zeros_like(self.unreadable)
        self._news = torch.zeros((), dtype=torch.bool).share_memory_()  # spares a scan of all flags per step
        if isinstance(reader, str):
            check_rows(self.reader, f"{reader}, split {split}")
        by_index: Any = getattr(self.reader, "class_to_idx", {})
        self.classes = [compose_accents(name) for name in sorted(by_index, key=by_index.__getitem__)]
        where = ", ".join(map(str, getattr(self.reader, "roots", [root])))
        left_out: Any = getattr(self.reader, "left_out", LeftOut())
        self.left_out = left_out.describe(where)

    def __getitem__(self, index: int) -> tuple[object, int]:
        """Returns the RGB image, after `transform` if it is set, and its class index."""
        cause: Exception | None = None
        for candidate in (i % len(self) for i in range(index, index + _TRIES)):
            try:
                image, target = self.read(candidate)
                break
            except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
                if isinstance(error, MemoryError | TimeoutError) or getattr(error, "errno", None) in _OF_THE_MACHINE:
                    raise
                cause = cause or error
                self.unreadable[candidate] = True
                self._news.fill_(True)  # set last: whoever sees it also sees the flag of the image
        else:
            first = f"the first is {self.name(index)}: {_reason(cause)}"
            raise OSError(f"{_TRIES} images in a row cannot be read, {first}") from cause
        if candidate != index and not self.train:
            target = -1
        return image if self.transform is None else self.transform(image), target

    def read(self, index: int) -> tuple[Any, int]:
        """Returns the RGB image as it is, and its class index.

        Raises:
            Exception: The image cannot be read; Pillow's decoders raise nearly anything.
        """
        file, target = self.reader[index]
        with file:
            return open_rgb(file), target

    def name(self, index: int) -> str:
        """Returns the name of an image, or the number of its row if it has none."""
        try:
            return self.filename(index) or f"row {index}"
        except (KeyError, TypeError):
            return f"row {index}"

    def new_unreadable(self) -> list[str]:
        """Returns the names of images found unreadable since the last call, each with the reason.

        Raises:
            ValueError: More than 1 % of the images, and more than 10, are unreadable in total.
        """
        if not self._news:
            return []
        self._news.fill_(False)
        new = self.unreadable & ~self._told
        self._told |= new
        found = []
        for index in map(int, new.nonzero()):
            try:
                self.read(index)  # again, as a worker found it
                found.append(f"{self.name(index)} (it can be read now)")
            except Exception as error:
                found.append(f"{self.name(index)} ({_reason(error)})")
        self.check_unreadable(self._told)
        return found

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that identify these images by their order, names and content."""
        content = hashlib.sha256()
        for i, name in enumerate(self.filenames()):
            content.update(hashlib.sha256(os.fsencode(name)).digest())
            with suppress(OSError), self.reader[i][0] as file:  # one that cannot be opened has another take its place
                content.update(hashlib.sha256(file.read()).digest())
        return content.hexdigest()[:16]

    def check_unreadable(self, flags: torch.Tensor) -> None:
        """Checks that not too many images are unreadable.

        Args:
            flags: (images,), True for unreadable images, as found by this process or by all.

        Raises:
            ValueError: More than 1 % of the images, and more than 10, are unreadable.
        """
        if (count := int(flags.sum())) > max(10, len(self) // 100):
            last = self.name(int(flags.nonzero()[-1]))
            raise ValueError(f"{count} of {len(self)} images cannot be read, {last} among them")


def _split(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        for path in (root / name, root / f"{name}.tar"):
            if path.is_dir() or path.is_file():
                return path
    # Without this check, timm would use `root` itself as the split, and the split folders as classes.
    raise FileNotFoundError(f"no folder {' or '.join(names)} (or .tar) in {root}")


def check_classes(of: str, known: list[str] | None, found: list[str] | None) -> None:
    """Checks that the data has the same class names as the weights or the run, if both have names.

    Args:
        of: Description of the weights or the run, for the error message.
        known: Their class names in the order of the logits, or None.
        found: The data's class names in the order of its labels, or None.

    Raises:
        ValueError: The names differ, by more than the encoding of accents.
    """
    expected, actual = ([compose_accents(name) for name in names or ()] for names in (known, found))
    if expected and actual and expected != actual:
        i, (there, here) = next((i, pair) for i, pair in enumerate(zip_longest(expected, actual)) if pair[0] != pair[1])
        counts = f"{len(expected)} classes, and the data has {len(actual)}"
        raise ValueError(f"{of} knows {counts}: number {i} is {there or 'none'} there, and {here or 'none'} here")


def open_validation(data_dir: str | Path) -> tuple[Images, int]:
    """Opens images to evaluate on: the validation split of a folder, or a folder of class folders.

    ImageNet-V2 is of the second kind. Its folder names are numbers, and are sorted as numbers.

    Args:
        data_dir: The folder.

    Returns:
        The images, and the number of classes.

    Raises:
        OSError: The folder is missing, or cannot be read.
        ValueError: The folder has no images.
    """
    root = Path(data_dir)
    if not root.exists():
        raise FileNotFoundError(f"no folder {root}")
    with suppress(FileNotFoundError):
        root = _split(root, _VAL_NAMES)
    images = Images(str(root))
    return images, len(images.classes)


def open_photos(folders: list[str], exclude: str | None = None) -> tuple[Images, Images]:
    """Opens photos for training and validation without reading labels.

    Args:
        folders: Folders with `train` and `val` (or `validation`, `test`). If a folder has neither, all its photos are
            used for training.
        exclude: `fnmatch` pattern of file names to leave out.

    Raises:
        OSError: A folder is missing or unreadable.
        ValueError: A folder has no images, or no folder has a validation split.
    """
    train, val = [], []
    for root in map(Path, folders):
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}")
        held_out = [root / name for name in _VAL_NAMES if (root / name).is_dir()]
        if held_out and not (root / "train").is_dir():
            raise FileNotFoundError(f"{root} has a folder {held_out[0].name}, but no folder train")
        train.append(root / "train" if held_out or (root / "train").is_dir() else root)
        val += held_out[:1]
    if not val:
        raise ValueError(f"none of {', '.join(folders)} has a folder {' or '.join(_VAL_NAMES)} to validate on")
    readers = on_first_rank(lambda: (Photos(train, exclude), Photos(val, exclude)))
    return Images(None, readers[0], train=True), Images(None, readers[1])


def create_datasets(
    data_dir: str | Path | None = None,
    dataset: str = "",
    splits: tuple[str, str] = ("train", "validation"),
    num_classes: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> tuple[Any, Any, int]:
    """Opens the training and validation datasets.

    Args:
        data_dir: Folder of the data.
        dataset: '' for a folder with `train` and `val` (or `validation`, `test`), each a folder or a tar file with one
            folder of images per class; 'torch/cifar10', 'torch/cifar100', 'hfds/NAME', 'wds/' as in timm; 'digits', or
            '' without a folder, for scikit-learn's digits.
        splits: Names of the training and validation splits, for data with named splits. For WebDataset, these can also
            be shard patterns with a number of images, such as `train-{000..099}.tar|100000`.
        num_classes: Expected number of classes. Required for data without class names, such as WebDataset.
        batch_size: Batch size, a hint for WebDataset.
        seed: Seed for the order of streamed data.

    Returns:
        Training dataset, validation dataset, and number of classes.

    Raises:
        ImportError: A package that the format needs is not installed.
        OSError: The folder or one of its parts is missing or unreadable.
        ValueError: A split or a class has no images, the splits have different classes, or their number is not
            `num_classes`.
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
        names = val_names = Digits.classes
    elif kind == "":
        assert data_dir is not None
        train = Images(str(_split(Path(data_dir), _TRAIN_NAMES)), train=True)
        val = Images(str(_split(Path(data_dir), _VAL_NAMES)))
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
            create_dataset(
                *(dataset, str(data_dir)),
                split=split,
                is_training=i == 0,
                batch_size=batch_size,
                seed=seed,
                input_key=";".join(suffix[1:] for suffix in get_img_extensions()),
            )
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
    """Target transform that rejects class indices out of range.

    On a GPU, such an index would end the run with a failed assertion.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, target: int) -> int:
        if not 0 <= target < self.num_classes:
            raise ValueError(f"an image has class {target}, which is not in 0 to {self.num_classes - 1}")
        return target
