"""The photos that weights are distilled from: what is taken and left out, and that nothing evaluated is among them."""

import csv

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from benchmarks import photos

NAMES = ["tiny-imagenet", "mini-imagenet", "caltech-101", "imagenette"]


def draw(seed, size=(64, 64)):
    """A picture of large soft blobs, as photos have them: noise would be another picture at another size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def read(path):
    with Image.open(path) as image:
        return image.convert("RGB")


@pytest.fixture
def sources(tmp_path):
    """Eight classes of Tiny ImageNet, of which the third and the seventh are held out, and a little of the others."""
    root, seed = tmp_path / "sources", iter(range(10**6))
    for c in range(8):
        for i in range(2):
            write(root / f"DLA/tiny-imagenet-200/train/n{c}/images/n{c}_{i}.JPEG", draw(next(seed)))
    for c, split in (("n2", "train"), ("n9", "train"), ("n9", "val")):
        write(root / f"split_minidataset/{split}/{c}/{split}.jpg", draw(next(seed), (84, 84)))
    for name in ("crab/1", "ant/1", "BACKGROUND_Google/1"):
        write(root / f"CVassimgement/caltech-101/{name}.jpg", draw(next(seed), (300, 200)))
    write(root / "CVassimgement/caltech-101/crab/2.jpg", draw(next(seed), (300, 200)).convert("L"))
    (root / "CVassimgement/caltech-101/crab/3.jpg").write_bytes(b"no photo")
    for name in ("n1_1", "ILSVRC2012_val_00000001"):
        write(root / f"imagenette/train/n1/{name}.JPEG", draw(next(seed), (136, 200)))
    return root


def gather(sources, out, evaluated, *names):
    words = [*names, "--sources", sources, "--evaluated", evaluated, "--out", out, "--workers", "2"]
    photos.main([str(word) for word in words])


def test_photos_are_gathered_and_evaluated_ones_are_not(sources, tmp_path, capsys):
    """A copy of an evaluated photo, smaller, brighter and compressed again, is left out and named."""
    evaluated = write(tmp_path / "evaluated/7.png", draw(999, (400, 300)))
    copy = ImageEnhance.Brightness(read(evaluated).resize((84, 63))).enhance(1.1)
    write(sources / "split_minidataset/train/n9/copy.jpg", copy, quality=70)
    twin = draw(4)  # of a photo of a held-out class: it is evaluated on, too
    write(sources / "imagenette/train/n1/twin.JPEG", twin.resize((200, 200)))
    assert photos.held_out_classes(sources / "DLA/tiny-imagenet-200/train") == ["n2", "n6"]
    gather(sources, tmp_path / "out", evaluated.parent, *NAMES)
    taken = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*") if p.suffix != ".csv"}
    tiny = {f"tiny-imagenet/n{c}/images/n{c}_{i}.JPEG" for c in (0, 1, 3, 4, 5, 7) for i in range(2)}
    others = {f"mini-imagenet/{split}/n9/{split}.jpg" for split in ("train", "val")} | {"imagenette/n1/n1_1.JPEG"}
    assert {name.partition("/")[2] for name in taken} == tiny | others | {"caltech-101/crab/1.jpg"}
    with open(tmp_path / "out/near-duplicates.csv") as file:
        near = {row["photo"]: row for row in csv.DictReader(file)}
    assert {name.rpartition("/")[2] for name in near} == {"copy.jpg", "twin.JPEG"}
    assert {row["evaluated"].rpartition("/")[2] for row in near.values()} == {"7.png", "n2_0.JPEG"}
    assert max(int(row["bits"]) for row in near.values()) <= photos.NEAR
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "tiny-imagenet (ImageNet): 12 photos, left out: none",
        "mini-imagenet (ImageNet): 3 photos, left out: 1 near-duplicates",
        "caltech-101 (CC BY 4.0): 3 photos, left out: 1 grey, 1 unreadable",
        "imagenette (ImageNet): 2 photos, left out: 1 near-duplicates",
    ]
    assert err == f"16 photos in {tmp_path / 'out'}\n"


def test_large_photos_are_shrunk_and_small_ones_are_copied(sources, tmp_path):
    evaluated = write(tmp_path / "evaluated/7.png", draw(999)).parent
    gather(sources, tmp_path / "out", evaluated, "tiny-imagenet", "caltech-101")
    (crab,) = (tmp_path / "out").rglob("crab/1.jpg")
    before = read(sources / "CVassimgement/caltech-101/crab/1.jpg").resize((204, 136))
    assert np.abs(np.asarray(before, dtype=int) - np.asarray(read(crab), dtype=int)).mean() < 3
    (small,) = (tmp_path / "out").rglob("n3_1.JPEG")
    assert small.read_bytes() == (sources / "DLA/tiny-imagenet-200/train/n3/images/n3_1.JPEG").read_bytes()


def test_one_photo_in_a_hundred_is_held_out(sources, tmp_path):
    for i in range(250):
        write(sources / f"DLA/tiny-imagenet-200/train/n0/images/more_{i}.JPEG", draw(1000 + i))
    evaluated = write(tmp_path / "evaluated/7.png", draw(999)).parent
    gather(sources, tmp_path / "out", evaluated, "tiny-imagenet")
    assert [len([*(tmp_path / "out" / part).rglob("*.JPEG")]) for part in ("train", "val")] == [259, 3]


def test_the_nearest_is_that_of_the_fewest_bits():
    """Against imagehash's own difference."""
    mine, others = [draw(i) for i in range(5)], [draw(i) for i in range(3, 9)]
    found = photos.find_nearest([photos.hash_photo(p) for p in mine], [photos.hash_photo(p) for p in others])
    for photo, (index, bits) in zip(mine, found):
        differences = [imagehash.phash(photo) - imagehash.phash(other) for other in others]
        assert bits == min(differences) == differences[index]
    assert found[3] == (0, 0) and found[4] == (1, 0)


@pytest.mark.parametrize(
    "names, gone, message",
    [
        (["huge"], "", "no source huge: there are tiny-imagenet, mini-imagenet"),
        ([], "split_minidataset", "split_minidataset"),
        (["tiny-imagenet"], "out", "out exists"),
    ],
)
def test_what_is_wrong_is_one_line(sources, tmp_path, capsys, names, gone, message):
    evaluated = write(tmp_path / "evaluated/7.png", draw(999)).parent
    if gone == "out":
        (tmp_path / "out").mkdir()
    elif gone:
        (sources / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit) as stop:
        gather(sources, tmp_path / "out", evaluated, *names)
    lines = [str(stop.value), *capsys.readouterr().err.splitlines()[-1:]]  # argparse prints its own, and ends with 2
    assert sum(message in line for line in lines) == 1
    assert gone == "out" or not (tmp_path / "out").exists()
