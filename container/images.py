"""Loads images as image viewers show them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

__all__ = ["MAX_SIDE", "check_shape", "open_photo", "open_rgb", "pixels_per_token", "to_rgb"]

MAX_SIDE = 4096
"""Largest image size that models are created for, in pixels."""

_TURNS = {  # EXIF orientation: what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LONGEST = 100  # maximum aspect ratio; resizing a thinner image by its short side would take gigabytes


def check_shape(image: Image.Image) -> None:
    """Checks that an image is not too long and thin to be a photo.

    Raises:
        ValueError: One side is more than 100 times the other.
    """
    if max(image.size) > _LONGEST * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels are over {_LONGEST} times as long as wide")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to 8-bit RGB on white ground, upright according to its EXIF orientation.

    Note: timm and torchvision ignore the EXIF orientation, so phone photos lie on their side. They clip 16-bit grey
    values at 255, so these images turn white. They drop transparency, so what it hid is seen. Here, photos are turned
    upright, 16 bits are scaled to 8, and transparent pictures lie on white.

    Args:
        image: Image from `PIL.Image.open`.

    Raises:
        ValueError: The scale of its grey values is unknown (32 bits, floats), or one side is more than 100 times the
            other.
    """
    check_shape(image)
    image.load()  # some formats turn the image themselves, and then have no orientation
    # ImageOps.exif_transpose would write all other entries anew, and fail at those that Pillow cannot write.
    if (orientation := image.getexif().get(ExifTags.Base.Orientation)) in _TURNS:
        image = image.transpose(_TURNS[orientation])
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # mode I: older Pillow versions
        image = Image.fromarray((np.asarray(image) // 257).astype("uint8"))
    elif image.mode in ("I", "F"):
        raise ValueError(f"the scale of grey values of mode {image.mode} is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_rgb(file: Any) -> Image.Image:
    """Reads an image from an open file and converts it with `to_rgb`.

    Raises:
        Exception: The file is damaged; Pillow's decoders raise nearly anything.
    """
    return to_rgb(Image.open(file))


def open_photo(path: str | Path) -> Image.Image:
    """Reads a photo from a file named by the user and converts it with `to_rgb`.

    Raises:
        OSError: There is no such file.
        ValueError: The file is not a photo, or is damaged.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device could be read for ever
        raise ValueError(f"{path} cannot be read as a photo: it is no regular file")
    with open(path, "rb") as file:
        try:
            return open_rgb(file)
        except UnidentifiedImageError as error:  # its own message shows the file object
            raise ValueError(f"{path} cannot be read as a photo: it is not an image file") from error
        except Exception as error:  # decoders raise nearly anything for damaged or foreign files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} cannot be read as a photo: {reason}") from error


def pixels_per_token(model: Any) -> int:
    """Returns the side in pixels of a token in a timm model's last feature map; 32 if the model does not state it."""
    info = getattr(model, "feature_info", None)
    if not info:
        return 32
    return info.reduction()[-1] if hasattr(info, "reduction") else info[-1]["reduction"]
