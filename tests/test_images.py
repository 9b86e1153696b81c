"""Pictures as people see them."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from container.images import to_rgb


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_of_sixteen_bits_is_the_same_picture_in_eight(tmp_path, suffix):
    ramp = np.tile(np.linspace(0, 1, 256), (4, 1))
    Image.fromarray((ramp * 65535).astype("uint16")).save(tmp_path / f"sixteen.{suffix}")
    Image.fromarray((ramp * 255).astype("uint8")).save(tmp_path / f"eight.{suffix}")
    sixteen, eight = (np.asarray(to_rgb(Image.open(tmp_path / f"{name}.{suffix}"))) for name in ("sixteen", "eight"))
    assert np.array_equal(sixteen, eight) and sixteen.shape == (4, 256, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.randint(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "photo.png"))  # what viewers show
    assert np.array_equal(np.asarray(to_rgb(Image.open(tmp_path / "photo.png"))), np.asarray(shown))
    assert (shown.size == (8, 12)) == (orientation > 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_kinds_are_as_pillow_has_them(mode):
    image = Image.fromarray(np.random.randint(0, 256, (8, 12, 3), dtype=np.uint8)).convert(mode)
    assert to_rgb(image.copy()).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize(
    "image, message",
    [
        (Image.fromarray(np.zeros((4, 4), np.float32)), "grey values of mode F"),
        (Image.fromarray(np.zeros((4, 4), np.int32)), "grey values of mode I"),
        (Image.new("RGB", (1, 101)), "1 x 101 pixels are over 100 times as long as wide"),
    ],
)
def test_what_nobody_can_show_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(image)
