"""Data of a training run."""

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from container.training import Digits, create_datasets

# timm's image reader leaves closing a file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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
    result = np.asarray(AugmentOp(operation, prob=1, magnitude=magnitude)(Image.fromarray(pixels)))
    kept = {"Posterize": magnitude * 4 // 10, "PosterizeIncreasing": 4 - magnitude * 4 // 10}
    bits = kept.get(operation, 4 + magnitude * 4 // 10)
    assert np.array_equal(result, pixels >> (8 - bits) << (8 - bits))


def test_released_augmentation_takes_thousands_of_images():
    augment = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    image = Image.fromarray(np.random.randint(0, 256, (8, 8, 3), dtype=np.uint8))
    for _ in range(5000):
        assert augment(image).size == (8, 8)
