"""The `container` command, also `python -m container`.

Models
  container list                                  list the models
  container predict [PHOTO ...] --model NAME      classify photos: the five most likely classes
  container explore [PHOTO] [--model NAME]        click a token in a browser to see what it reads
  container figures PHOTO --model NAME --out DIR  save pictures of what tokens read
  container probe DIR --model NAME                evaluate frozen features by k-NN and a linear classifier
  container export NAME OUT --format FORMAT       convert to ONNX, OpenVINO, ExecuTorch and others

Programs
  container train [ARGUMENT ...]                  train a model; same as train_imagenet.py
  container run SCRIPT | -m MODULE | COMMAND      run any program with these models registered in timm

Weights
  container weights list                          list all weights and where they are
  container weights show NAME                     show the record of a weights file
  container weights verify [NAME]                 check files against their records
  container weights fetch NAME                    download, convert, check and pin
  container weights import FILE --as NAME         convert your own checkpoint and pin it
  container weights export NAME DIR               write a folder for timm and the Hugging Face Hub

NAME is a timm model, such as container_light_nano. A tag chooses its weights: container_light_nano.lite2_dist.
"""

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

from . import deploy, explore, figures, predict, probe, weights, zoo
from .container import Container
from .files import write_atomically
from .images import open_photo

_CHILDREN = Path(__file__).parent / "children"


def main(argv: list[str] | None = None) -> None:
    """Runs a command.

    Args:
        argv: Arguments, or None for those of the process.

    Raises:
        SystemExit: With a line that says what is wrong, or with the script's own exit status.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        _parser().print_help()
    elif argv[:1] == ["run"]:
        run(argv[1:])
    elif argv[:1] == ["train"]:
        sys.argv[:] = ["train_imagenet.py", *argv[1:]]
        runpy.run_module("train_imagenet", run_name="__main__")
    elif argv and os.path.splitext(argv[0])[1] == ".py":
        run(argv)
    else:
        args = _parser().parse_args(argv)
        try:
            args.command(args)
        except KeyboardInterrupt:
            raise SystemExit("container: interrupted") from None
        except weights.UnknownWeightsError as error:
            raise SystemExit(f"container: no weights {error}: `container weights list` names them") from None
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and error.strerror and error.filename:
                raise SystemExit(f"container: {error.strerror}: {error.filename!r}") from None
            lines = str(error).strip().splitlines() or [repr(error)]
            # A loader's process wraps its error in a traceback, which ends with it.
            raise SystemExit(f"container: {lines[-1 if lines[0].startswith('Caught ') else 0]}") from None


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
    usage = "usage: container run SCRIPT | -m MODULE | COMMAND [ARGUMENT ...]"
    if argv in (["-h"], ["--help"]):
        print(
            f"{usage}\n\nRuns any program with these models registered in timm, also in the processes that it starts."
        )
        return
    if not argv or argv == ["-m"]:
        raise SystemExit(usage)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "container",
        usage="container COMMAND ...",
        description=__doc__,
        epilog="`container COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, prog="container", metavar="COMMAND", help=argparse.SUPPRESS)
    family = commands.add_parser("list", help="list the models")
    family.add_argument("--markdown", action="store_true", help="print it as Markdown, for docs/models.md")
    family.set_defaults(command=lambda args: print(zoo.table(args.markdown)))
    guess = commands.add_parser("predict", help="classify photos: the five most likely classes")
    guess.add_argument("photos", metavar="PHOTO", nargs="*", help="an image file; default: the bundled photo of a cat")
    guess.add_argument("--model", metavar="NAME[.tag]", required=True, help="any timm model with weights")
    guess.add_argument("--checkpoint", metavar="FILE", default="", help="your own weights")
    guess.add_argument("--img-size", type=int, metavar="N", help="input size; default: that of the weights")
    guess.add_argument("--out", metavar="DIR", help="save a picture of what the affinities read there")
    guess.set_defaults(command=_predict)
    pictures = commands.add_parser("figures", help="save pictures of what tokens read")
    pictures.add_argument("image", metavar="IMAGE", help="an image file; the model sees its centre square")
    pictures.add_argument(
        "--model", metavar="NAME[.tag]", required=True, help="random weights without a tag or --checkpoint"
    )
    pictures.add_argument("--out", metavar="DIR", required=True, help="folder for the pictures")
    pictures.add_argument("--checkpoint", metavar="FILE", default="", help="your own weights")
    pictures.add_argument(
        "--pixel", nargs=2, type=int, metavar=("X", "Y"), help="pixel of the token to draw; default: the centre"
    )
    pictures.add_argument("--img-size", type=int, metavar="N", help="input size; default: the model's")
    pictures.set_defaults(command=_figures)
    page = commands.add_parser(
        "explore", help="click a token in a browser to see what it reads, and change alpha and beta"
    )
    page.add_argument("photo", metavar="PHOTO", nargs="?", help="an image file; default: the bundled photo of a cat")
    page.add_argument(
        "--model",
        metavar="NAME[.tag]",
        action="append",
        default=[],
        help=f"model to show; repeat to offer several; random weights without a tag; default: {explore.MODELS[0]}",
    )
    page.add_argument("--img-size", type=int, metavar="N", help="input size; default: that of the first model")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only")
    page.add_argument("--port", type=int, default=7860, metavar="N", help="port to listen on; default: 7860")
    page.set_defaults(command=_explore)
    deployed = commands.add_parser(
        "export", help="convert to ONNX, OpenVINO, ExecuTorch and others, and compare the outputs"
    )
    deployed.add_argument("model", metavar="NAME[.tag]", help="any timm model with weights")
    deployed.add_argument("out", metavar="OUT", help="file to write: .onnx, .xml, .pte, .pt2 or .pt")
    deployed.add_argument("--format", choices=deploy.FORMATS, required=True, help="file format")
    deployed.add_argument("--checkpoint", metavar="FILE", default="", help="your own weights")
    deployed.add_argument("--img-size", type=int, metavar="N", help="input size; default: that of the weights")
    deployed.add_argument("--batch", metavar="N|dynamic", default="dynamic", help="batch size; default: dynamic")
    deployed.add_argument("--dynamic-size", action="store_true", help="accept images of any height and width")
    deployed.add_argument(
        "--int8", action="store_true", help="quantize to 8 bits with --calibrate; for onnx and openvino"
    )
    deployed.add_argument("--calibrate", metavar="DIR", help="photos to calibrate int8 on; 300 are used")
    deployed.add_argument("--evaluate", metavar="DIR", help="print the accuracy on DIR/val/CLASS/* or DIR/CLASS/*")
    deployed.add_argument("--features-only", action="store_true", help="output the four feature maps instead of logits")
    deployed.set_defaults(command=_deploy)
    frozen = commands.add_parser(
        "probe", help="evaluate frozen features of any timm model by k-NN and a linear classifier"
    )
    frozen.add_argument(
        "data_dir", metavar="DIR", help="folder with train/CLASS/* and val/CLASS/*, or with train.tar and val.tar"
    )
    frozen.add_argument(
        "--model", metavar="NAME[.tag]", required=True, help="random weights without a tag or --checkpoint"
    )
    frozen.add_argument("--img-size", type=int, metavar="N", help="input size; default: the model's")
    frozen.add_argument("--checkpoint", metavar="FILE", default="", help="your own weights")
    frozen.add_argument("--json", metavar="FILE", help="also write the result as JSON, with 95 %% intervals")
    frozen.add_argument("--workers", type=int, metavar="N", help="data loading workers; default: the cores less one")
    frozen.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed for random weights and for the split that chooses C"
    )
    frozen.set_defaults(command=_probe)
    commands.add_parser("run", help="run any program with these models registered in timm", add_help=False)

    group = commands.add_parser("weights", help="list, check, download and convert weights").add_subparsers(
        required=True, metavar="COMMAND"
    )
    group.add_parser("list", help="list all weights and where they are").set_defaults(command=_list)
    show = group.add_parser("show", help="show the record of a weights file")
    show.add_argument("name", metavar="NAME")
    show.set_defaults(command=_show)
    verify = group.add_parser("verify", help="check files against their records")
    verify.add_argument("name", metavar="NAME", nargs="?")
    verify.set_defaults(command=_verify)
    fetch = group.add_parser("fetch", help="download, convert, check and pin")
    fetch.add_argument("name", metavar="NAME")
    fetch.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    fetch.set_defaults(command=_fetch)
    convert = group.add_parser("import", help="convert your own checkpoint and pin it")
    convert.add_argument("file", metavar="FILE")
    convert.add_argument("--as", dest="name", metavar="NAME", required=True, help="its timm name: MODEL.TAG")
    convert.add_argument("--out", help="file to write; default: where `timm.create_model(NAME)` finds it")
    convert.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="take the averaged weights of a file that has both"
    )
    convert.add_argument("--trained-by", metavar="TEXT", help="for the record: who trained them")
    convert.add_argument("--license", metavar="ID", help="for the record: the licence, such as apache-2.0")
    convert.add_argument("--data", metavar="TEXT", help="for the record: what they were trained on")
    convert.set_defaults(command=_import)
    export = group.add_parser("export", help="write a folder for timm and the Hugging Face Hub")
    export.add_argument("name", metavar="NAME")
    export.add_argument("out", metavar="FOLDER")
    export.set_defaults(command=_export)
    return parser


def _predict(args: argparse.Namespace) -> None:
    photos = [Path(photo) for photo in args.photos or [predict.SAMPLE]]
    if args.out:
        _check_matplotlib()
        if len({photo.stem for photo in photos}) < len(photos):
            raise ValueError("photos of the same name would have the same picture")
    model = weights.create(args.model, args.checkpoint, args.img_size, pretrained=True)
    if args.out and not isinstance(model, Container):
        raise ValueError(f"{args.model} has no affinities to draw: leave out --out")
    for photo in photos:
        (classes,) = predict.predict([photo], model)
        print(photo)
        print(zoo.columns([(f"{100 * p:7.1f} %", name) for name, p in classes]))
        if args.out:
            assert isinstance(model, Container)
            file = Path(args.out, f"{photo.stem}-affinities.png")
            name, p = classes[0]
            figures.draw_affinities(open_photo(photo), model, file, f"{args.model}: {name}, {100 * p:.1f} %")
            print(file)
    cfg = getattr(model, "pretrained_cfg", {})
    if not (args.checkpoint or args.img_size) and (line := zoo.accuracy(f"{cfg.get('architecture')}.{cfg.get('tag')}")):
        print(line)


def _check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("container: pictures need matplotlib: pip install matplotlib")


def _figures(args: argparse.Namespace) -> None:
    _check_matplotlib()
    pixel = tuple(args.pixel) if args.pixel else None
    for path in figures.draw(args.image, args.model, args.out, args.checkpoint, pixel, args.img_size):
        print(path)


def _explore(args: argparse.Namespace) -> None:
    models = dict.fromkeys([*args.model, *explore.MODELS])
    explore.serve(list(models), args.photo, args.img_size, args.host, args.port)


def _deploy(args: argparse.Namespace) -> None:
    if args.batch != "dynamic" and not (args.batch.isdigit() and int(args.batch)):
        raise ValueError(f"--batch {args.batch} is neither a number of images nor dynamic")
    if args.int8 != (args.calibrate is not None):
        raise ValueError("--int8 and --calibrate DIR go together")
    if args.evaluate and args.features_only:
        raise ValueError("--features-only gives maps, and --evaluate wants classes")
    batch = None if args.batch == "dynamic" else int(args.batch)
    model = weights.create(
        args.model, args.checkpoint, args.img_size, pretrained=True, features_only=args.features_only
    )
    found = deploy.export(model, args.out, args.format, batch, args.dynamic_size, args.calibrate, args.evaluate)
    one = f"{found.milliseconds:.1f} ms for one image, " if found.milliseconds else ""
    if found.agreement is None:
        compared = f"largest difference from {args.model}: {found.difference:.1e} of the largest output"
    else:
        compared = f"in int8 {found.agreement:.1%} of the photos in {args.calibrate} keep the class of {args.model}"
        compared += f"\nleft in float: {', '.join(found.in_float)}" if found.in_float else ""
    if found.accuracy:
        before, after, count = found.accuracy
        compared += f"\n{after:.2f} % of {count:,} photos in {args.evaluate} right, and {before:.2f} % by {args.model}"
    print(
        f"{', '.join(map(str, found.files))}: {found.bytes / 1e6:.1f} MB, loaded in {found.load_seconds:.2f} s\n"
        f"{compared}\n"
        f"{one}{found.images_per_second:.1f} images/s in batches of {found.batch}, by {torch.get_num_threads()} threads"
    )


def _probe(args: argparse.Namespace) -> None:
    if args.json and not Path(args.json).absolute().parent.is_dir():  # known before the work, not after it
        raise FileNotFoundError(f"no folder for {args.json}")
    found = probe.probe(args.data_dir, args.model, args.checkpoint, args.img_size, args.workers, args.seed)
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
    print(json.dumps(weights.record(args.name), indent=2, ensure_ascii=False))
    print(f"here: {weights.find(args.name) or 'no'}")


def _verify(args: argparse.Namespace) -> None:
    failed = False
    for name in [args.name] if args.name else weights.names():
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
    record = weights.record(args.name)
    if weights.find(args.name) is None and not record["file"]["sha256"]:
        print(f"{args.name}: weights of {record['trained_by']}, {weights.manifest()[args.name]['file']['url']}")
        print(f"Licence: {record['license']['stated']}\n{record['limits']}")
        print(
            f"It becomes {args.name}.safetensors in {weights.weights_dir()}. No file of another sha256 is taken later."
        )
        if not args.yes:
            print("Download it? [y/N] ", end="", flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise SystemExit("container: not downloaded")
    print(f"{zoo.fetch(args.name)}\ntimm.create_model({args.name!r}, pretrained=True) loads it")


def _import(args: argparse.Namespace) -> None:
    told = dict(trained_by=args.trained_by, license=args.license, data=args.data)
    path, record = zoo.convert(args.file, args.name, args.out, args.ema, **told)
    print(json.dumps(dict(weights={args.name: record}), indent=2, ensure_ascii=False))
    place = weights.weights_dir()
    if path.parent.resolve() != place.resolve() or path.stem != args.name:
        print(f"put {path} and {path.with_suffix('.json')} into {place}, as {args.name}.*, and", file=sys.stderr)
    print(f"timm.create_model({args.name!r}, pretrained=True) loads {path}", file=sys.stderr)


def _export(args: argparse.Namespace) -> None:
    zoo.export(args.name, args.out)
    print(f'timm.create_model("local-dir:{args.out}", pretrained=True)')


if __name__ == "__main__":
    main()
