"""The tensor loader: the pixels of Pillow's loader, or its refusals, by another way."""

import io
import pickle
import random
import tarfile
from contextlib import suppress

import numpy as np
import pytest
import torch
import torchvision
from conftest import shared
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.transforms import RandomResizedCropAndInterpolation

from container.images import to_rgb
from container.training import Images
from container.training.data import mend_posterize
from container.training.seeding import seed_everything
from container.training.tensor import _move, _to_pillow, _to_tensor, decode, tensor_transform

CONFIG = dict(input_size=(3, 64, 64), interpolation="bicubic")
POLICY = "rand-m9-mstd0.5-inc1"
# Of two libjpeg-turbos, or of two resizes in whole numbers; between equal versions decoding differs by 0.
LEVELS, MEAN = 3, 0.05


def photo(width=300, height=200):
    """Smooth, as photos are, with some noise; always the same."""
    draw = np.random.default_rng(0)
    small = Image.fromarray(draw.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + draw.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8))


def encoded(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def both(content):
    """(height, width, 3) by both loaders, as whole numbers."""
    tensor = decode(io.BytesIO(content))
    assert tensor.dtype == torch.uint8 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy().astype(int), np.asarray(to_rgb(Image.open(io.BytesIO(content)))).astype(int)


def assert_close(ours, pillows, levels=LEVELS, mean=MEAN):
    assert ours.shape == pillows.shape
    difference = np.abs(ours.astype(int) - pillows.astype(int))
    assert difference.max() <= levels and difference.mean() <= mean, (difference.max(), difference.mean())


@pytest.fixture
def fast(monkeypatch):
    """Counts what torchvision decodes."""
    calls, original = [], torchvision.io.decode_jpeg

    def counted(*arguments, **options):
        image = original(*arguments, **options)
        calls.append(image.shape)
        return image

    monkeypatch.setattr(torchvision.io, "decode_jpeg", counted)
    return calls


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [30, 95])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_has_pillow_s_pixels(mode, subsampling, quality, progressive, fast):
    content = encoded(photo(301, 203).convert(mode), quality=quality, subsampling=subsampling, progressive=progressive)
    assert_close(*both(content))
    assert fast == [(3, 203, 301)]


def test_photos_have_pillow_s_pixels(tmp_path, record_property, fast):
    with tarfile.open(shared("data/imagenet-sample.tar")) as archive:
        members = [member for member in archive if member.isfile() and member.name.endswith(".jpg")][::50]
        pairs = [both(archive.extractfile(member).read()) for member in members]
    record_property("levels", int(max(np.abs(a - b).max() for a, b in pairs)))
    for ours, pillows in pairs:
        assert_close(ours, pillows)
    assert len(fast) == len(pairs) == 20


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_photos_stand_upright(format, orientation, fast):
    exif = Image.Exif()
    exif[0x0112] = orientation
    ours, pillows = both(encoded(photo(48, 32), format, exif=exif))
    assert_close(ours, pillows)
    assert (ours.shape[:2] == (48, 32)) == (orientation > 4)
    assert len(fast) == (format == "JPEG" and orientation == 1)


def kinds():
    """Format, mode, content: all that there are."""
    small, sixteen = photo(48, 32), np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    palette = small.quantize(16)
    palette.info["transparency"] = 3
    images = {mode: small.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")}
    images |= {"I;16": Image.fromarray(sixteen), "palette with transparency": palette}
    for format in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"):
        for mode, image in images.items():
            with suppress(KeyError, OSError, ValueError):
                yield format, mode, encoded(image, format)


@pytest.mark.parametrize("format, mode, content", [pytest.param(*kind, id=f"{kind[0]} {kind[1]}") for kind in kinds()])
def test_every_kind_is_pillow_s_picture(format, mode, content, fast):
    assert_close(*both(content))
    assert len(fast) == (format == "JPEG" and mode in ("1", "L", "RGB"))


def damaged():
    """Name, content."""
    content = encoded(photo(), quality=90)
    yield "no image", b"no image"
    yield "empty", b""
    for share in (0.02, 0.1, 0.5, 0.9, 0.999):
        yield f"cut at {share}", content[: int(len(content) * share)]
    yield "without its end", content[:-2]
    for seed in range(12):
        noise, changed = random.Random(seed), bytearray(content)
        for _ in range(20):
            changed[noise.randrange(len(changed) // (1 + seed % 3))] = noise.randrange(256)
        yield f"changed bytes {seed}", bytes(changed)
    thin = encoded(Image.new("RGB", (1, 101)))
    yield "thin", thin
    yield "thin on its side", encoded(Image.new("RGB", (101, 1)), "PNG")
    yield "grey without a scale", encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name, content", list(damaged()), ids=lambda value: value if isinstance(value, str) else "")
def test_damaged_files_are_refused_as_pillow_does(name, content):
    try:
        pillows = np.asarray(to_rgb(Image.open(io.BytesIO(content))))
    except Exception as error:
        with pytest.raises(type(error)) as caught:
            decode(io.BytesIO(content))
        assert str(caught.value).split("<")[0] == str(error).split("<")[0]  # without an address
    else:
        assert_close(decode(io.BytesIO(content)).permute(1, 2, 0).numpy(), pillows)


def test_damaged_images_are_noted(folder):
    (folder / "train" / "bright" / "0.jpg").write_bytes(b"no image")
    cut = folder / "train" / "bright" / "1.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    images = Images(str(folder / "train"), train=True)
    images.decode = decode
    assert torch.equal(images[0][0], images[2][0])
    assert sorted(images.new_unreadable()) == ["bright/0.jpg", "bright/1.jpg"]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(300, 200), (40, 30), (900, 700), (64, 64)])
def test_a_crop_is_timm_s(interpolation, size):
    """From the same draws the same box, resized alike: up and down.

    Both round between two passes, and not always in the same order. A box that is a pixel off differs by 3 on average.
    """
    image, config = photo(*size), CONFIG | dict(interpolation=interpolation)
    options = dict(scale=(0.08, 1), hflip=0.5, auto_augment=None, color_jitter=None)
    ours = tensor_transform(config, options)
    pillows = create_transform(is_training=True, use_prefetcher=True, **config, **options)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for place in range(20):
        images = []
        for transform, source in ((ours, pixels), (pillows, image)):
            seed_everything(place)
            images.append(transform(source))
        assert images[0].shape == (3, 64, 64) and images[0].dtype == torch.uint8
        assert_close(images[0].numpy(), images[1].numpy(), levels=2, mean=0.35)


def test_crops_are_spread_as_timm_s(monkeypatch):
    """Their area is even between the bounds, and as many are wide as are high."""
    boxes, original = [], RandomResizedCropAndInterpolation.get_params
    kept = staticmethod(lambda *arguments: boxes.append(original(*arguments)) or boxes[-1])
    monkeypatch.setattr(RandomResizedCropAndInterpolation, "get_params", kept)
    transform = tensor_transform(CONFIG, dict(scale=(0.2, 0.6), hflip=0.5, auto_augment=None, color_jitter=None))
    image = torch.from_numpy(np.array(photo(200, 200))).permute(2, 0, 1)
    for _ in range(2000):
        transform(image)
    area = np.array([height * width / 200**2 for _, _, height, width in boxes])
    ratio = np.array([width / height for _, _, height, width in boxes])
    assert 0.19 < area.min() < 0.22 and 0.58 < area.max() < 0.62
    assert np.quantile(area, [0.25, 0.5, 0.75]) == pytest.approx([0.3, 0.4, 0.5], abs=0.02)
    assert 0.73 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.37
    assert np.mean(ratio > 1) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("policy", [POLICY, "rand-m9-n3", "augmix-m5-w2", "v0", "original", "3a"])
def test_the_policy_is_the_recipe_s(policy):
    """The same operations at the same strengths on each image, as the whole images are nearly equal.

    Equalize and AutoContrast make more of a difference of one level: some pixels may differ more.
    """
    options = dict(scale=(0.5, 1), hflip=0.5, auto_augment=policy)
    ours = tensor_transform(CONFIG, options)
    pillows = create_transform(is_training=True, use_prefetcher=True, **CONFIG, **options)
    for part in pillows.transforms:
        mend_posterize(part)
    plain = tensor_transform(CONFIG, options | dict(auto_augment=None, color_jitter=None))
    changed, image = 0, photo()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for place in range(60):
        images = []
        for transform, source in ((ours, pixels), (pillows, image), (plain, pixels)):
            seed_everything(place)
            images.append(transform(source).numpy())
        difference = np.abs(images[0].astype(int) - images[1])
        assert difference.mean() < 1.5 and np.quantile(difference, 0.9) <= 4, (place, difference.mean())
        changed += not np.array_equal(images[0], images[2])
    assert changed > 30


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"])
@pytest.mark.parametrize("size", [(60, 40), (40, 60)])
def test_a_move_is_timm_s(name, size):
    image, fill = photo(*size), (124, 116, 104)
    largest = 0.45 if "Rel" in name else 0.3 if "Shear" in name else 18
    for amount in [0.0, 3.0, largest, -largest, *np.random.uniform(-largest, largest, 20)]:
        for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
            theirs = NAME_TO_OP[name](image, amount, fillcolor=fill, resample=resample)
            ours = _move(image, amount, fillcolor=fill, resample=resample, name=name, op=NAME_TO_OP[name])
            assert ours.mode == "RGB" and ours.size == image.size
            assert_close(np.asarray(ours), np.asarray(theirs), levels=1, mean=1 / 300)


def test_moves_leave_plain_surfaces_as_they_are():
    levels = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8), 90).reshape(256, 30, 3))
    for pct in np.random.uniform(-0.4, 0.4, 20):
        options = dict(fillcolor=(0, 0, 0), resample=Image.Resampling.BICUBIC)
        theirs = NAME_TO_OP["TranslateXRel"](levels, pct, **options)
        ours = _move(levels, pct, **options, name="TranslateXRel", op=None)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_the_moves_are_in_the_policy_and_nowhere_else():
    before = dict(NAME_TO_OP)
    transform = tensor_transform(CONFIG, dict(auto_augment=POLICY))
    assert before == NAME_TO_OP
    fast = [op.name for op in transform.transforms[-2].ops if getattr(op.aug_fn, "func", None) is _move]
    assert sorted(fast) == ["ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]


def test_between_pillow_and_tensors_nothing_is_lost():
    pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    assert torch.equal(_to_tensor(_to_pillow(pixels)), pixels)
    assert np.array_equal(np.asarray(_to_pillow(pixels)), pixels.permute(1, 2, 0).numpy())


def test_workers_of_any_kind_can_take_it():
    transform = pickle.loads(pickle.dumps(tensor_transform(CONFIG, dict(auto_augment=POLICY))))
    assert transform(torch.zeros(3, 50, 60, dtype=torch.uint8)).shape == (3, 64, 64)


def test_what_it_cannot_do_is_said(monkeypatch):
    with pytest.raises(ValueError, match="--loader tensor resizes bilinear or bicubic, not lanczos: --loader pil"):
        tensor_transform(CONFIG | dict(interpolation="lanczos"), {})
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    with pytest.raises(ValueError, match="decodes no JPEG: --loader pil"):
        tensor_transform(CONFIG, {})
