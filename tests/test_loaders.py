"""The measurement of the loader: what it runs and what it says, and not how fast."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loaders


@pytest.fixture
def photos(tmp_path):
    """Five, one of them in a folder."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for i, name in enumerate(("a.jpg", "b.jpeg", "more/c.JPG", "d.png", "e.jpg")):
        pixels = np.random.randint(0, 256, (40 + 10 * i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "README.txt").write_text("no photo")
    return tmp_path / "photos"


def test_loaders_side_by_side(photos, tmp_path, capsys):
    threads = torch.get_num_threads()
    loaders.main(["--photos", str(photos), "--size", "32", "--rounds", "3", "--json", str(tmp_path / "loaders.json")])
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "loaders.json").read_text())
    assert torch.get_num_threads() == threads
    assert record["photos"] | dict(bytes=0) == dict(count=5, width=60, height=60, bytes=0)
    times = record["seconds_per_image"]
    assert list(times) == [
        "training, recipe paper", "training, without auto-augment", "decoding alone", "evaluation",
    ]  # fmt: skip
    assert all(len(values) == 3 and min(values) > 0 for values in times.values())
    assert "5 photos, 60 x 60 pixels" in printed and "to 32 x 32; median (quartiles) of 3 rounds" in printed
    assert f"Pillow {Image.__version__} (not pillow-simd" in printed and record["cpu"] in printed


def test_the_table_has_rates():
    record = dict(
        photos=dict(count=2, width=500, height=375, bytes=110_000), size=224, rounds=3, cpu="a processor", threads=1,
        cpu_capability="AVX2", torch="2", timm="1", torchvision="0", pillow="13", pillow_simd=True, libjpeg_turbo="3",
        seconds_per_image=dict(training=[0.004, 0.004, 0.005], evaluation=[0.01, 0.01, 0.01]),
    )  # fmt: skip
    lines = loaders.report(record).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4]]
    assert cells == [["training", "250 (225 to 250)"], ["evaluation", "100 (100 to 100)"]]
    assert "2 photos, 500 x 375 pixels and 110 kB on average" in lines[5] and "(pillow-simd, libjpeg" in lines[6]


def test_pipelines_make_the_images_that_training_has(photos):
    paths, _ = loaders.find_photos(photos, 3)
    assert [path.name for path in paths] == ["a.jpg", "b.jpeg", "e.jpg"]
    for name, pipeline in loaders.pipelines(32).items():
        image, _ = loaders.SeededDataset(loaders.Photos(paths, pipeline))[1, (0, 0, 1)]
        if name != loaders.DECODING:
            assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        else:
            assert isinstance(image, Image.Image)


def test_what_cannot_be_measured_is_said(photos, tmp_path):
    with pytest.raises(SystemExit, match="benchmarks: no photos in "):
        loaders.main(["--photos", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        loaders.main(["--photos", str(photos), "--rounds", "0"])
    (photos / "a.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"benchmarks: .*a\.jpg cannot be read: cannot identify"):
        loaders.main(["--photos", str(photos)])
