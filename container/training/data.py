"""Datasets of a training run: an ImageNet-layout folder, or the digits that come with scikit-learn."""

from pathlib import Path
from typing import Callable, Optional, Tuple, Union

from PIL import Image, ImageOps
from timm.data import ImageDataset, create_dataset
from timm.data.auto_augment import NAME_TO_OP
from torch.utils.data import Dataset

__all__ = ["Digits", "create_datasets"]


def _posterize(image: Image.Image, bits_to_keep: int, **hparams: object) -> Image.Image:
    """Keeps the highest bits of every pixel; none of them is black."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


# RandAugment m9-mstd0.5-inc1, the released recipe, keeps no bit of one image in some hundreds. Pillow made it black
# until version 13, which refuses: with timm's own operation a run then dies in its first epoch.
NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize))

_TRAIN_FOLDERS = ("train",)
_VAL_FOLDERS = ("val", "validation", "test")


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
        self.transform: Optional[Callable] = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> Tuple[object, int]:
        """The image, RGB and transformed, and its class."""
        pixels = (self.images[index].reshape(8, 8) * (255 / 16)).astype("uint8")  # they come as 0 to 16
        image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        return image if self.transform is None else self.transform(image), int(self.targets[index])


def _split(root: Path, names: Tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    # Without this check timm would take `root` itself for the split, and the splits for classes.
    raise FileNotFoundError(f"no folder {' or '.join(names)} in {root}")


def create_datasets(data_dir: Union[str, Path]) -> Tuple[ImageDataset, ImageDataset, int]:
    """Opens a folder in ImageNet's layout: `train/CLASS/*.jpg` and `val/CLASS/*.jpg` (or `validation/`, `test/`).

    Args:
        data_dir: The folder.

    Returns:
        Training data, validation data, number of classes.

    Raises:
        FileNotFoundError: The folder or one of its parts is missing.
        ValueError: A part has no images, or the parts have different classes.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    datasets = []
    for split in (_split(root, _TRAIN_FOLDERS), _split(root, _VAL_FOLDERS)):
        try:
            datasets.append(create_dataset("", root=str(split), search_split=False))
        except RuntimeError as error:
            raise ValueError(f"no images in class folders of {split}") from error
    train, val = datasets
    classes, val_classes = train.reader.class_to_idx, val.reader.class_to_idx
    if classes != val_classes:
        odd = sorted(set(classes) ^ set(val_classes))
        raise ValueError(
            f"{len(classes)} classes to train on, {len(val_classes)} to validate on in {root}; "
            f"{len(odd)} are in one only: {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}"
        )
    return train, val, len(classes)
