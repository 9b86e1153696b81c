"""Measures how many training images per second a CPU core prepares, with the Pillow that is installed.

    python -m benchmarks.loaders --photos DIR

It counts the CPU time of this process, with one thread and no workers. Other load on the machine thus matters little,
and waiting for a disk not at all.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import yaml
from PIL import __version__, features
from timm.data import create_transform
from timm.data.loader import fast_collate
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import Dataset

from benchmarks.measure import device_name, environment, spread, table
from container.files import write_atomically
from container.images import open_rgb
from container.training.seeding import SeededDataset

RECIPE = Path(__file__).parent.parent / "container" / "training" / "recipes" / "paper.yaml"
BATCH = 32  # images
DECODING = "decoding alone"  # gives images of different sizes, which cannot be batched

Pipeline = Callable[[Any], Any]  # from an open file to an image


def pipelines(size: int) -> dict[str, Pipeline]:
    """Returns the pipelines from a file to an image, by task.

    Args:
        size: Image size in pixels.
    """
    recipe = yaml.safe_load(RECIPE.read_text())
    cfg = timm.get_pretrained_cfg(recipe["model"])
    assert cfg is not None
    options: dict[str, Any] = dict(input_size=(3, size, size), interpolation=cfg.interpolation, use_prefetcher=True)
    policy = dict(scale=recipe["scale"], hflip=recipe["hflip"], auto_augment=recipe["aa"])
    plain = dict(scale=recipe["scale"], hflip=recipe["hflip"], auto_augment=None, color_jitter=None)

    transforms: dict[str, Pipeline] = {
        "training, recipe paper": create_transform(is_training=True, **options, **policy),
        "training, without auto-augment": create_transform(is_training=True, **options, **plain),
        DECODING: lambda image: image,
        "evaluation": create_transform(crop_pct=cfg.crop_pct, crop_mode=cfg.crop_mode, **options),
    }
    return {name: partial(prepare, transform=transform) for name, transform in transforms.items()}


def prepare(file: Any, transform: Pipeline) -> Any:
    """Returns what a transform makes of the photo in an open file."""
    return transform(open_rgb(file))


class Photos(Dataset):
    """Dataset of photos that are read by one pipeline."""

    def __init__(self, paths: Sequence[Path], pipeline: Pipeline) -> None:
        self.paths, self.pipeline = paths, pipeline

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns the image, and 0 as its class."""
        with self.paths[index].open("rb") as file:
            return self.pipeline(file), 0


def measure(paths: Sequence[Path], size: int, rounds: int) -> dict[str, list[float]]:
    """Measures the CPU seconds per image of every pipeline, one value per round.

    They include seeding, reading, the pipeline, and collating batches. Pipelines take turns at every batch, and the
    first one changes, so that other jobs on the same core slow all of them down alike.
    """
    works = [(name, SeededDataset(Photos(paths, pipeline))) for name, pipeline in pipelines(size).items()]
    times: dict[str, list[float]] = {name: [] for name, _ in works}
    for turn in range(rounds + 1):
        sums = [0.0] * len(works)
        for batch, first in enumerate(range(0, len(paths), BATCH)):
            places = [(i, (0, turn, i)) for i in range(first, min(first + BATCH, len(paths)))]
            for k in range(len(works)):
                k = (k + turn + batch) % len(works)
                start = time.process_time()
                images = [works[k][1][place] for place in places]
                if works[k][0] != DECODING:
                    fast_collate(images)
                sums[k] += time.process_time() - start
        if turn:  # the first round is a warm-up
            for (name, _), seconds in zip(works, sums, strict=True):
                times[name].append(seconds / len(paths))
    return times


def report(record: dict[str, Any]) -> str:
    """Returns a Markdown table of images per second and core, with quartiles, and a description of the setup."""
    rows = []
    for name, times in record["seconds_per_image"].items():
        low, median, high = spread([1 / seconds for seconds in times])
        rows.append([name, f"{median:.0f} ({low:.0f} to {high:.0f})"])
    photos = record["photos"]
    return "\n".join(
        [
            table(["task", "images/s and core"], rows),
            "",
            f"{photos['count']} photos, {photos['width']:.0f} x {photos['height']:.0f} pixels and "
            f"{photos['bytes'] / 1000:.0f} kB on average, to {record['size']} x {record['size']}; "
            f"median (quartiles) of {record['rounds']} rounds.",
            f"{device_name(record)}, torchvision {record['torchvision']}, Pillow {record['pillow']} "
            f"({'pillow-simd' if record['pillow_simd'] else 'not pillow-simd'}, "
            f"libjpeg-turbo {record['libjpeg_turbo']}).",
        ]
    )


def _simd() -> bool:
    try:
        return bool(metadata.version("pillow-simd"))
    except metadata.PackageNotFoundError:
        return False


def find_photos(folder: Path, count: int) -> tuple[list[Path], dict[str, float]]:
    """Returns up to `count` photos, evenly spread over a folder, and their mean size.

    Raises:
        SystemExit: The folder has no photos, or one of them cannot be read.
    """
    suffixes = get_img_extensions(as_set=True)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not paths:
        raise SystemExit(f"benchmarks: no photos in {folder}")
    count = min(count, len(paths))
    paths = [paths[i * len(paths) // count] for i in range(count)]
    sums = [0, 0, 0]
    for path in paths:
        try:
            with path.open("rb") as file:
                image = open_rgb(file)
        except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
            raise SystemExit(f"benchmarks: {path} cannot be read: {error}") from error
        sums = [a + b for a, b in zip(sums, (*image.size, path.stat().st_size), strict=True)]
    return paths, dict(count=count, width=sums[0] / count, height=sums[1] / count, bytes=sums[2] / count)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark, prints a table, and writes the numbers with --json.

    Args:
        argv: Command-line arguments, or None for those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photos, searched recursively")
    parser.add_argument("--count", type=int, default=300, help="number of photos, evenly spread; default: 300")
    parser.add_argument("--size", type=int, default=224, help="image size in pixels; default: 224")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds; default: 7")
    parser.add_argument("--json", type=Path, help="JSON file for all numbers")
    args = parser.parse_args(argv)
    for name in ("count", "size", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not positive")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a data loader worker
    try:
        paths, photos = find_photos(args.photos, args.count)
        record: dict[str, Any] = environment(torch.device("cpu")) | dict(
            torchvision=torchvision.__version__,
            pillow=__version__,
            pillow_simd=_simd(),
            libjpeg_turbo=features.version_feature("libjpeg_turbo"),
            photos=photos,
            size=args.size,
            rounds=args.rounds,
            seconds_per_image=measure(paths, args.size, args.rounds),
        )
    finally:
        torch.set_num_threads(threads)
    print(report(record))
    if args.json:
        write_atomically(args.json, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
