"""Pictures as people see them."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

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


@pytest.mark.parametrize("tag, value", [(0x0100, -1), (0x0128, -1), (0x8825, 7)])
def test_a_photo_stands_upright_whatever_else_its_exif_says(tag, value):
    """Entries that Pillow cannot write again are not written again."""
    table = struct.pack("<HHIHHHHIi", 0x0112, 3, 1, 6, 0, tag, 9, 1, value)
    if tag < 0x0112:
        table = table[12:] + table[:12]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + table + bytes(4)
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(file, "JPEG")
    data = file.getvalue()
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert to_rgb(Image.open(io.BytesIO(data))).size == (30, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_kinds_are_as_pillow_has_them(mode):
    image = Image.fromarray(np.random.randint(0, 256, (8, 12, 3), dtype=np.uint8)).convert(mode)
    assert to_rgb(image.copy()).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize(
    "mode, suffix", [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "gif"), ("RGBA", "webp")]
)
def test_transparent_pictures_lie_on_white(tmp_path, mode, suffix):
    """A black disc on nothing; what lies below full transparency is not seen."""
    image = Image.new("RGBA", (64, 64), (90, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((10, 10, 50, 50), fill=(0, 0, 0, 255))
    image.convert(mode).save(tmp_path / f"disc.{suffix}", **(dict(lossless=True) if suffix == "webp" else {}))
    with Image.open(tmp_path / f"disc.{suffix}") as picture:
        pixels = np.asarray(to_rgb(picture))
    assert (pixels[0, 0] == 255).all() and (pixels[30, 30] == 0).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.asarray(to_rgb(half)).tolist() == np.full((4, 4, 3), 127).tolist()


def test_one_colour_of_a_png_may_be_transparent(tmp_path):
    image = Image.new("RGB", (8, 8), (10, 20, 30))
    image.putpixel((3, 3), (200, 0, 0))
    image.save(tmp_path / "key.png", transparency=(10, 20, 30))
    pixels = np.asarray(to_rgb(Image.open(tmp_path / "key.png")))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[3, 3].tolist() == [200, 0, 0]


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
