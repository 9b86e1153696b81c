"""Faster training transform: torchvision instead of Pillow decodes and crops the images."""

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

_ORIENTATION = 0x0112  # EXIF tag


def decode(file: BinaryIO) -> torch.Tensor:
    """Decodes an image like `container.images.to_rgb`, to (3, height, width), uint8, channels last in memory.

    torchvision decodes JPEG in colour or grey. Pillow decodes everything else: JPEG that torchvision would decode
    differently (EXIF orientation, CMYK), other formats, and damaged files, for its error message.

    Args:
        file: File open for reading.

    Raises:
        Exception: Raised by Pillow or `to_rgb` for a file that cannot be read.
    """
    content = file.read()
    image = Image.open(io.BytesIO(content))  # reads only the header
    check_shape(image)
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    if image.format == "JPEG" and image.mode in ("RGB", "L") and upright:
        try:
            return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode="RGB")
        except RuntimeError:
            pass  # damaged: left to Pillow
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


class _Crop:
    """Random resized crop of a tensor, with the box drawn by timm.

    Args:
        crop: timm's transform, which has the output size, the ranges of area and aspect ratio, and the interpolation.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        # Without the copy, torch does not detect channels last and takes twice as long, and Pillow afterwards 3 times.
        part = image.permute(1, 2, 0)[top : top + height, left : left + width].contiguous().permute(2, 0, 1)
        return resize(part, list(self.crop.size), interpolation=self.crop.interpolation, antialias=True)


def _to_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """Converts an image to (3, height, width), in memory line by line with one colour after the other.

    Lines of one colour are copied into a batch faster than interleaved pixels.
    """
    lines = torch.frombuffer(bytearray(image.tobytes("raw", "RGB;L")), dtype=torch.uint8)
    return lines.view(image.height, 3, image.width).transpose(0, 1)


def tensor_transform(config: dict[str, Any], augmentation: dict[str, Any]) -> Compose:
    """Creates timm's training transform for images from `decode`, with the same random numbers and policy.

    Args:
        config: `input_size`, `interpolation`.
        augmentation: Further arguments of `timm.data.create_transform`.

    Raises:
        ValueError: The interpolation is not bilinear or bicubic, or torchvision was built without its JPEG decoder.
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
    """Applies timm's shear or translation, twice as fast if bicubic.

    Pillow weights 16 input pixels for each output pixel, although 4 are enough if only rows or only columns move.
    These 4 of the 15 operations took more than half of the time of RandAugment m9-mstd0.5-inc1.
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
    """Shifts each row to the left, with bicubic interpolation like Pillow's `transform` (parameter a = -1).

    Fewer than one value in 300 differ from Pillow's, by 1.

    Args:
        image: RGB image.
        shift: (height,), pixels to shift each row by.
        fill: Colour of pixels from outside the image.
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
    # Pillow truncates: sums that are whole numbers up to rounding error must not fall below them.
    result = moved.add_(1e-4).clamp_(0, 255).numpy().astype(np.uint8).view(np.uint32)
    first = np.ceil(-0.5 - shift).astype(np.int32)[:, None]  # first column with its centre inside the image
    column = np.arange(width, dtype=np.int32)
    np.copyto(result, np.frombuffer(bytes((*fill, 255)), np.uint32), where=(column < first) | (column >= first + width))
    return Image.frombytes("RGB", image.size, result, "raw", "RGBX")
