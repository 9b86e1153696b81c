"""Gathers the photos that the weights `wide_dist` are distilled from, out of public repositories, into one folder.

python -m benchmarks.photos --sources DIR --evaluated FOLDER ... --out PHOTOS

`DIR` has a clone of each repository and the unpacked archives, under the names of `SOURCES`. `PHOTOS/train/NAME` and
`PHOTOS/val/NAME` receive their photos, with the class folders that they had: every hundredth is held out. The folder
is written anew. Photos with a short side above 136 pixels are shrunk to it, all others are copied byte by byte.
Near-duplicates of every photo below an `--evaluated` folder are left out, by a perceptual hash.
"""

import argparse
import csv
import os
import shutil
import sys
from collections import Counter
from collections.abc import Collection
from concurrent.futures import Executor, ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

from container.images import open_rgb

SHORT_SIDE = 136  # pixels: views of 128 pixels lose nothing
NEAR = 8  # bits of 64 in which hashes of near-duplicates differ at most; at 8 nearly all are false alarms
HELD_OUT = 100  # one photo in so many is for validation
QUALITY = 92  # of the JPEG files of shrunk photos


class Source(NamedTuple):
    """Set of photos in a public repository.

    Args:
        folder: Where its photos are, below the folder of all sources; class folders below that.
        origin: The repository, and a commit if its newest version has the photos no longer.
        terms: Their licence or terms.
        leave_out: `fnmatch` patterns of relative paths to leave out.
        colour_only: Whether to leave out grey photos.
    """

    folder: str
    origin: str
    terms: str
    leave_out: tuple[str, ...] = ()
    colour_only: bool = False


SOURCES = {
    "tiny-imagenet": Source("DLA/tiny-imagenet-200/train", "github.com/Sachitbansal/DLA", "ImageNet"),
    "mini-imagenet": Source("split_minidataset", "github.com/Deo0330/split_minidataset", "ImageNet"),
    "flickr8k": Source(
        "Image-Text-Matching/data/images",
        "github.com/RlNZLER/Image-Text-Matching at 56a15d913c3f290e2ee896386ece6076c1eea02e",
        "research",
    ),
    "caltech-101": Source(
        "CVassimgement/caltech-101",
        "github.com/taibarehm/CVassimgement",
        "CC BY 4.0",
        ("accordion/*", "anchor/*", "ant/*", "BACKGROUND_Google/*"),
        colour_only=True,
    ),
    "corel5k": Source("Dian/images", "github.com/lza2293/Dian", "research"),
    "imagenette": Source("imagenette/train", "github.com/thunderInfy/imagenette", "ImageNet", ("*/ILSVRC2012_val_*",)),
    "imagewoof": Source("imagewoof/train", "github.com/q878787/imagewoof2-320", "ImageNet", ("*/ILSVRC2012_val_*",)),
    "imagenet-sample": Source("imagenet-sample", "github.com/EliSchwartz/imagenet-sample-images", "ImageNet"),
}


def held_out_classes(tiny: Path) -> list[str]:
    """Returns the quarter of Tiny ImageNet's classes from which no photo is taken, to evaluate features on.

    Args:
        tiny: The folder of all 200 class folders.
    """
    return sorted(entry.name for entry in tiny.iterdir() if entry.is_dir())[2::4]


def list_photos(folder: Path, leave_out: tuple[str, ...] = (), held_out: Collection[str] = ()) -> list[Path]:
    """Lists the photos below a folder, sorted, as paths relative to it.

    Args:
        folder: The folder.
        leave_out: `fnmatch` patterns of relative paths to leave out.
        held_out: Names of class folders to leave out.

    Raises:
        FileNotFoundError: There are none.
    """
    found = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.name.startswith(".")
    ]
    found = [path for path in found if not any(fnmatch(path.as_posix(), pattern) for pattern in leave_out)]
    kept = sorted(path for path in found if set(path.parts).isdisjoint(held_out))
    if not kept:
        raise FileNotFoundError(f"no photos in {folder}")
    return kept


def is_grey(image: Image.Image) -> bool:
    """Returns whether an RGB image has no colour."""
    pixels = np.asarray(image)
    return bool((pixels.max(axis=2) - pixels.min(axis=2)).mean() < 2)


def hash_photo(image: Image.Image) -> int:
    """Returns the perceptual hash of 64 bits (pHash: signs of the lowest frequencies) of an image."""
    return int(str(imagehash.phash(image)), 16)


def hash_file(path: Path) -> int:
    """Returns `hash_photo` of a file."""
    with path.open("rb") as file:
        return hash_photo(open_rgb(file))


def find_nearest(hashes: list[int], evaluated: list[int]) -> list[tuple[int, int]]:
    """Finds for every photo the evaluated photo that is most alike.

    Args:
        hashes: Hashes of photos.
        evaluated: Hashes of the photos that models are evaluated on.

    Returns:
        For each photo, the index of that photo and the number of bits in which the two hashes differ.
    """
    others = np.array(evaluated, dtype=np.uint64)
    found: list[tuple[int, int]] = []
    for i in range(0, len(hashes), 1000):
        bits = np.bitwise_count(np.array(hashes[i : i + 1000], dtype=np.uint64)[:, None] ^ others)
        found += zip(bits.argmin(axis=1).tolist(), bits.min(axis=1).tolist(), strict=True)
    return found


def place_photo(paths: tuple[Path, Path], colour_only: bool) -> int | str:
    """Copies a photo, shrunk if it is large.

    Args:
        paths: The photo, and where its copy goes. The copy of a shrunk photo is a JPEG file.
        colour_only: Whether to leave out a grey photo.

    Returns:
        Its hash, or why it is left out: `grey` or `unreadable`.
    """
    photo, copy = paths
    try:
        with photo.open("rb") as file:
            image = open_rgb(file)
    except Exception:  # Pillow's decoders raise nearly anything for a damaged file
        return "unreadable"
    if colour_only and is_grey(image):
        return "grey"
    copy.parent.mkdir(parents=True, exist_ok=True)
    if (share := SHORT_SIDE / min(image.size)) < 1:
        size = (round(image.width * share), round(image.height * share))
        image.resize(size, Image.Resampling.LANCZOS).save(copy, "JPEG", quality=QUALITY)
    else:
        shutil.copyfile(photo, copy)
    return hash_photo(image)


def copy_photos(
    source: Source, name: str, folder: Path, photos: list[Path], out: Path, evaluated: dict[Path, int], pool: Executor
) -> tuple[Counter[str], list[tuple[Path, Path, int]]]:
    """Copies the photos of a source, but no near-duplicates of evaluated ones.

    Args:
        source: The source.
        name: Its name, which becomes a folder in `train` and in `val`.
        folder: The folder of its photos.
        photos: Their paths in it.
        out: Folder to write to.
        evaluated: Hashes of the photos that models are evaluated on.
        pool: Threads to work in.

    Returns:
        Number of photos by what became of them, and for each near-duplicate its path, that of the evaluated photo, and
        the number of bits in which their hashes differ.
    """
    parts = ["val" if i % HELD_OUT == 0 else "train" for i in range(len(photos))]
    copies = [out / part / name / photo for part, photo in zip(parts, photos, strict=True)]
    pairs = [(folder / photo, copy) for photo, copy in zip(photos, copies, strict=True)]
    place = partial(place_photo, colour_only=source.colour_only)
    fates = dict(zip(copies, pool.map(place, pairs), strict=True))
    counts = Counter(fate for fate in fates.values() if isinstance(fate, str))
    hashes = {copy: fate for copy, fate in fates.items() if isinstance(fate, int)}
    others = list(evaluated)
    near = []
    for copy, (index, bits) in zip(hashes, find_nearest(list(hashes.values()), list(evaluated.values())), strict=True):
        if bits <= NEAR:
            near.append((copy.relative_to(out), others[index], bits))
            copy.unlink()
    counts.update({"taken": len(hashes) - len(near), "near-duplicates": len(near)})
    return counts, near


def main(argv: list[str] | None = None) -> None:
    """Writes the folder, `near-duplicates.csv` in it, and a line for each source."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.photos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"sources, default all: {', '.join(SOURCES)}")
    parser.add_argument("--sources", type=Path, required=True, metavar="DIR", help="folder of clones and archives")
    parser.add_argument(
        "--evaluated", type=Path, nargs="+", required=True, metavar="FOLDER", help="folders of photos to evaluate on"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PHOTOS", help="folder to write; it must be new")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads; default: one per core")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.names) - set(SOURCES)):
        parser.error(f"no source {unknown[0]}: there are {', '.join(SOURCES)}")
    if args.out.exists():
        parser.error(f"{args.out} exists")
    names = args.names or list(SOURCES)
    try:
        tiny = args.sources / SOURCES["tiny-imagenet"].folder
        held_out = held_out_classes(tiny)
        photos = {
            name: list_photos(args.sources / SOURCES[name].folder, SOURCES[name].leave_out, held_out) for name in names
        }
        evaluated = [folder / path for folder in args.evaluated for path in list_photos(folder)]
        evaluated += [tiny / path for path in list_photos(tiny) if path.parts[0] in held_out]
    except OSError as error:
        raise SystemExit(f"benchmarks: {error}") from None
    total = 0
    with ThreadPoolExecutor(args.workers) as pool:
        hashes = dict(zip(evaluated, pool.map(hash_file, evaluated), strict=True))
        args.out.mkdir(parents=True)
        with (args.out / "near-duplicates.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["photo", "evaluated", "bits"])
            for name in names:
                source = SOURCES[name]
                folder = args.sources / source.folder
                counts, near = copy_photos(source, name, folder, photos[name], args.out, hashes, pool)
                table.writerows(near)
                total += counts.pop("taken")
                left_out = ", ".join(f"{count} {fate}" for fate, count in counts.items() if count)
                print(
                    f"{name} ({source.terms}): {len(photos[name])} photos, left out: {left_out or 'none'}", flush=True
                )
    print(f"{total} photos in {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
