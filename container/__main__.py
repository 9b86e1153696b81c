"""What the `container` command does, also `python -m container`. Its arguments are those of `container_cli`."""

import argparse
import importlib.util
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from container_cli import parse_args

from . import deploy, explore, figures, predict, probe, weights, zoo
from .container import Container
from .errors import in_one_line
from .files import check_new, write_atomically
from .images import open_photo
from .training.data import LeftOut, list_images

_CHILDREN = Path(__file__).parent / "children"


def main(argv: list[str] | None = None) -> None:
    """Runs a command.

    Args:
        argv: Arguments, or None for those of the process.

    Raises:
        SystemExit: With a line that says what is wrong, or with the script's own exit status.
    """
    args = parse_args(sys.argv[1:] if argv is None else argv)
    if args.command == "run":
        run(args.argv)
    elif args.command == "train":
        sys.argv[:] = ["train_imagenet.py", *args.argv]
        runpy.run_module("train_imagenet", run_name="__main__")
    else:
        try:
            (_OF_WEIGHTS[args.of_weights] if args.command == "weights" else _COMMANDS[args.command])(args)
        except KeyboardInterrupt:
            raise SystemExit("container: interrupted") from None
        except weights.UnknownWeightsError as error:
            raise SystemExit(f"container: {error}") from None
        except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
            raise SystemExit(f"container: {in_one_line(error)}") from None


def run(argv: list[str]) -> None:
    """Runs a script, `-m MODULE` or a command as Python or the shell would, with the models registered.

    The models are also registered in processes that it starts, by a launcher, `spawn` or a shell. A folder of this
    package at the head of PYTHONPATH makes them import the family right after timm
    (`container/children/sitecustomize.py`).

    Args:
        argv: A script, `-m` and a module, or a command, followed by arguments.

    Raises:
        SystemExit: There is no such program, or with its exit status.
    """
    if argv == ["-m"]:
        raise SystemExit("container run: -m needs the name of a module")
    name, command = argv[0], shutil.which(argv[0])
    script = name != "-m" and os.path.isfile(name) and (name.endswith(".py") or command is None)
    if not getattr(sys.flags, "safe_path", False) and (script or name == "-m"):  # not python -P
        sys.path[0] = os.path.dirname(os.path.abspath(name)) if script else os.getcwd()
    if name == "-m" and importlib.util.find_spec(argv[1].partition(".")[0]) is None:
        raise SystemExit(f"container: no module {argv[1]}")
    if name != "-m" and not script and command is None:
        raise SystemExit(f"container: no script and no command {name}")
    os.environ["CONTAINER_RUN_PREFIX"] = sys.prefix  # other interpreters have other packages
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_CHILDREN), *([before] if before else [])])
    if name == "-m":
        sys.argv[:] = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif script:
        sys.argv[:] = argv
        runpy.run_path(name, run_name="__main__")
    elif command is not None:
        sys.stdout.flush()
        os.execv(command, argv)


def _predict(args: argparse.Namespace) -> None:
    photos = _list_photos(args.photos or [predict.SAMPLE])
    pictures = {photo: Path(args.out, f"{photo.stem}-affinities.png") for photo in photos} if args.out else {}
    if args.out:
        _check_matplotlib()
        if len(set(pictures.values())) < len(photos):
            raise ValueError("photos of the same name would have the same picture")
        for path in pictures.values():
            check_new(path)
    model = weights.create(args.model, args.checkpoint, args.img_size)
    if args.out and not isinstance(model, Container):
        raise ValueError(f"{args.model} has no affinities to draw: leave out --out")
    for photo in photos:
        (classes,) = predict.predict([photo], model)
        print(photo)
        print(zoo.columns([(f"{100 * p:7.1f} %", name) for name, p in classes]))
        if args.out:
            assert isinstance(model, Container)
            name, p = classes[0]
            figures.draw_affinities(open_photo(photo), model, pictures[photo], f"{args.model}: {name}, {100 * p:.1f} %")
            print(pictures[photo])
    cfg = getattr(model, "pretrained_cfg", {})
    if not (args.checkpoint or args.img_size) and (line := zoo.accuracy(f"{cfg.get('architecture')}.{cfg.get('tag')}")):
        print(line)


def _list_photos(paths: list[str]) -> list[Path]:
    """Returns image files: those named, and those below the folders named."""
    photos = []
    for path in paths:
        if os.path.isdir(path):
            left_out = LeftOut()
            if not (found := list_images(path, left_out)):
                raise ValueError(f"no images in {path}")
            if line := left_out.describe(path):
                print(line, file=sys.stderr)
            photos += [Path(image) for image in sorted(found)]
        else:
            photos.append(Path(path))
    return photos


def _check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("container: pictures need matplotlib: pip install matplotlib")


def _figures(args: argparse.Namespace) -> None:
    _check_matplotlib()
    pixel = tuple(args.pixel) if args.pixel else None
    paths = figures.draw(
        args.image, args.model, args.out, args.checkpoint, pixel, args.img_size, not args.random_weights
    )
    print("\n".join(map(str, paths)))


def _explore(args: argparse.Namespace) -> None:
    models = args.model if args.random_weights and args.model else [*args.model, *explore.MODELS]
    explore.serve(models, args.photo, args.img_size, args.host, args.port, not args.random_weights)


def _deploy(args: argparse.Namespace) -> None:
    if args.batch != "dynamic" and not (args.batch.isdigit() and int(args.batch)):
        raise ValueError(f"--batch {args.batch} is neither a number of images nor dynamic")
    if args.int8 != (args.calibrate is not None):
        raise ValueError("--int8 and --calibrate DIR go together")
    if args.evaluate and args.features_only:
        raise ValueError("--features-only gives maps, and --evaluate wants classes")
    batch = None if args.batch == "dynamic" else int(args.batch)
    check_new(args.out)
    model = weights.create(args.model, args.checkpoint, args.img_size, features_only=args.features_only)
    found = deploy.export(model, args.out, args.format, batch, args.dynamic_size, args.calibrate, args.evaluate)
    if found.agreement is None:
        compared = f"largest difference from {args.model}: " + ", ".join(
            f"{difference:.1e} of the largest output in {precision}"
            for precision, difference in found.differences.items()
        )
    else:
        compared = (
            f"in int8 {found.agreement:.1%} of {found.photos} photos in {args.calibrate} that it was not calibrated on "
            f"keep the class of {args.model}"
        )
        compared += f"\nleft in float: {', '.join(found.in_float)}" if found.in_float else ""
    if found.accuracy:
        before, after, count = found.accuracy
        compared += f"\n{after:.2f} % of {count:,} photos in {args.evaluate} right, and {before:.2f} % by {args.model}"
    one = f"{found.speed.milliseconds:.1f} ms for one image, " if found.speed.milliseconds else ""
    print(
        f"{', '.join(map(str, found.files))}: {found.bytes / 1e6:.1f} MB, loaded in {found.load_seconds:.2f} s\n"
        f"{compared}\n"
        f"{one}{found.speed.images_per_second:.1f} images/s in batches of {found.speed.batch}, "
        f"by {torch.get_num_threads()} threads"
    )


def _probe(args: argparse.Namespace) -> None:
    if args.json:
        check_new(args.json)
        if not Path(args.json).absolute().parent.is_dir():  # known before the work, not after it
            raise FileNotFoundError(f"no folder for {args.json}")
    found = probe.probe(
        args.data_dir, args.model, args.checkpoint, args.img_size, args.workers, args.seed, not args.random_weights
    )
    print(probe.describe(found))
    if args.json:
        write_atomically(args.json, f"{json.dumps(found)}\n".encode())


def _list(args: argparse.Namespace) -> None:
    rows: list[tuple[str, ...]] = [("weights", "status", "licence", "MB", "top-1 %", "data", "measured by", "here")]
    for name in weights.names():
        record = weights.record(name)
        file = record["file"]
        result: dict[str, Any] = next((r for r in record["results"] if r["metric"] == "top1"), {})
        size = f"{file['bytes'] / 1e6:.1f}" if file["bytes"] else "?"
        rows.append(
            (
                name,
                record["status"],
                record["license"]["weights"] or "none stated",
                size,
                str(result.get("value", "")),
                result.get("data", ""),
                result.get("measured_by", ""),
                str(weights.find(name) or "no"),
            )
        )
    print(zoo.columns(rows))


def _show(args: argparse.Namespace) -> None:
    name = weights.add_default_tag(args.name)
    print(json.dumps(weights.record(name), indent=2, ensure_ascii=False))
    print(f"here: {weights.find(name) or 'no'}")


def _verify(args: argparse.Namespace) -> None:
    failed = False
    for name in [weights.add_default_tag(args.name)] if args.name else weights.names():
        try:
            path, digest = zoo.verify(name)
            print(f"{name}: whole, sha256 {digest}, {path}")
        except FileNotFoundError as error:
            print(f"{name}: {error}")
            failed |= args.name is not None
        except (RuntimeError, ValueError) as error:
            print(f"{name}: REFUSED, {error}")
            failed = True
    if failed:
        raise SystemExit(1)


def _fetch(args: argparse.Namespace) -> None:
    name = weights.add_default_tag(args.name)
    record = weights.record(name)
    if weights.find(name) is None and not record["file"]["sha256"]:
        print(f"{name}: weights of {record['trained_by']}, {weights.manifest()[name]['file']['url']}")
        print(f"Licence: {record['license']['stated']}\n{record['limits']}")
        print(f"It becomes {name}.safetensors in {weights.weights_dir()}. No file of another sha256 is taken later.")
        if not args.yes:
            print("Download it? [y/N] ", end="", flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise SystemExit("container: not downloaded")
    print(f"{zoo.fetch(name)}\ntimm.create_model({name!r}, pretrained=True) loads it")


def _import(args: argparse.Namespace) -> None:
    if args.out:
        check_new(args.out)
    told = dict(trained_by=args.trained_by, license=args.license, data=args.data)
    path, record = zoo.convert(args.file, args.name, args.out, args.ema, **told)
    print(json.dumps(dict(weights={args.name: record}), indent=2, ensure_ascii=False))
    place = weights.weights_dir()
    if path.parent.resolve() != place.resolve() or path.stem != args.name:
        print(f"put {path} and {path.with_suffix('.json')} into {place}, as {args.name}.*, and", file=sys.stderr)
    print(f"timm.create_model({args.name!r}, pretrained=True) loads {path}", file=sys.stderr)


def _export(args: argparse.Namespace) -> None:
    zoo.export(weights.add_default_tag(args.name), args.out)
    print(f'timm.create_model("local-dir:{args.out}", pretrained=True)')


_COMMANDS = {
    "list": lambda args: print(zoo.table(args.markdown)),
    "predict": _predict,
    "explore": _explore,
    "figures": _figures,
    "probe": _probe,
    "export": _deploy,
}
_OF_WEIGHTS = {
    "list": _list,
    "show": _show,
    "verify": _verify,
    "fetch": _fetch,
    "import": _import,
    "export": _export,
}

if __name__ == "__main__":
    main()
