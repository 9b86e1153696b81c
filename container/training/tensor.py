"""The way from a file to a training image with less of Pillow in it: torchvision decodes and crops."""

import io
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch
import torchvision
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import Compose
from torchvision.transforms.v2.functional import resize

from container.images import check_shape, to_rgb

from .data import mend_posterize, operations

__all__ = ["decode", "tensor_transform"]

_ORIENTATION = 0x0112  # in EXIF


def decode(file: BinaryIO) -> torch.Tensor:
    """Decodes an image like `container.images.to_rgb`, to (3, height, width), uint8, channels last in memory.

    torchvision decodes JPEG in colour or grey. Pillow decodes everything else: JPEG that torchvision would show
    differently (EXIF orientation, CMYK), other formats, and damaged files, for its error message.

    Args:
        file: A file open for reading.

    Raises:
        Exception: From Pillow or `to_rgb`, for a file that they cannot read.
    """
    content = file.read()
    image = Image.open(io.BytesIO(content))  # reads the head
    check_shape(image)
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    if image.format == "JPEG" and image.mode in ("RGB", "L") and upright:
        try:
            return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode="RGB")
        except RuntimeError:
            pass  # damaged
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


class _Crop:
    """Crops a tensor to a box drawn by timm, and resizes it.

    Args:
        crop: timm's transform, with its ranges of area and ratio, and its interpolation.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        # Without the copy torch does not see channels last, and takes twice as long, and Pillow after it 3 times.
        part = image.permute(1, 2, 0)[top : top + height, left : left + width].contiguous().permute(2, 0, 1)
        return resize(part, list(self.crop.size), interpolation=self.crop.interpolation, antialias=True)


def _to_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, height, width), in lines of one colour: they are copied into a batch faster than single pixels."""
    lines = torch.frombuffer(bytearray(image.tobytes("raw", "RGB;L")), dtype=torch.uint8)
    return lines.view(image.height, 3, image.width).transpose(0, 1)


def tensor_transform(config: dict[str, Any], augmentation: dict[str, Any]) -> Compose:
    """timm's training transform for images of `decode`: the same random numbers, the same policy.

    Args:
        config: `input_size`, `interpolation`.
        augmentation: Further arguments of `timm.data.create_transform`.

    Raises:
        ValueError: The interpolation is not bilinear or bicubic, or torchvision was built without its decoder.
    """
    if not hasattr(torchvision.io, "decode_jpeg"):
        raise ValueError(f"torchvision {torchvision.__version__} decodes no JPEG: --loader pil")
    if config["interpolation"] not in ("bilinear", "bicubic"):
        raise ValueError(f"--loader tensor resizes bilinear or bicubic, not {config['interpolation']}: --loader pil")
    primary, secondary, _ = create_transform(
        config["input_size"],
        is_training=True,
        use_prefetcher=True,
        interpolation=config["interpolation"],
        separate=True,
        **augmentation,
    )
    for part in secondary.transforms:
        for operation in operations(mend_posterize(part)):
            if operation.name in _MOVES:
                operation.aug_fn = partial(_move, name=operation.name, op=operation.aug_fn)
    crop, *flips = primary.transforms
    policy = [_to_pillow, *secondary.transforms, _to_tensor] if secondary.transforms else []
    return Compose([_Crop(crop), *flips, *policy])


_MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")


def _move(image: Image.Image, amount: float, fillcolor: Any, resample: Any, name: str, op: Any) -> Image.Image:
    """timm's shear or translation, twice as fast if bicubic.

    Pillow weighs 16 pixels for each pixel, even if rows or columns alone move, for which 4 are enough. These four
    operations of 15 took more than half of the time of RandAugment m9-mstd0.5-inc1.
    """
    if resample != Image.Resampling.BICUBIC:
        return op(image, amount, fillcolor=fillcolor, resample=resample)
    columns = "Y" in name
    if columns:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    rows = np.arange(image.height) + 0.5
    if name.startswith("Translate"):
        rows[:] = image.width if name.endswith("Rel") else 1
    image = _move_rows(image, amount * rows, fillcolor)
    return image.transpose(Image.Transpose.TRANSPOSE) if columns else image


def _move_rows(image: Image.Image, shift: np.ndarray, fill: tuple[int, int, int]) -> Image.Image:
    """Moves each row to the left, bicubically like Pillow's `transform` (whose free parameter is -1).

    Less than one value in 300 differs from Pillow's, by 1.

    Args:
        image: An RGB image.
        shift: Pixels to move each row by, (height,).
        fill: Colour of what comes in from outside.
    """
    width, height = image.size
    whole = np.floor(shift)
    index = torch.from_numpy(np.arange(-1, width + 2) + whole.astype(np.int64)[:, None]).clamp_(0, width - 1)
    pixels = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.int32).view(height, width)
    taps = pixels.gather(1, index).view(torch.uint8).float()  # (height, 4 * (width + 3))
    d = shift - whole
    cubic = np.stack([d * (d * (2 - d) - 1), d * d * (d - 2) + 1, d * (d * (1 - d) + 1), d * d * (d - 1)])
    weights = torch.from_numpy(cubic.astype(np.float32)[:, :, None])
    moved = taps[:, : 4 * width] * weights[0]
    for i in (1, 2, 3):
        moved.addcmul_(taps[:, 4 * i : 4 * (i + width)], weights[i])
    # Pillow cuts off what follows the point: sums that are whole numbers but for rounding must not fall below them.
    result = moved.add_(1e-4).clamp_(0, 255).numpy().astype(np.uint8).view(np.uint32)
    first = np.ceil(-0.5 - shift).astype(np.int32)[:, None]  # column whose centre is inside the image
    column = np.arange(width, dtype=np.int32)
    np.copyto(result, np.frombuffer(bytes((*fill, 255)), np.uint32), where=(column < first) | (column >= first + width))
    return Image.frombytes("RGB", image.size, result, "raw", "RGBX")
