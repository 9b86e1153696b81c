"""The `container` command, also `python -m container`.

Models
  container list                                  list the models
  container predict [PHOTO ...] [--model NAME]    classify photos: the five most likely classes
  container explore [PHOTO] [--model NAME]        click a token in a browser to see what it reads
  container figures PHOTO --out DIR               save pictures of what tokens read
  container probe DIR [--model NAME]              evaluate frozen features by k-NN and a linear classifier
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

NAME is a timm model, such as container_light_nano, with its default weights. A tag chooses others:
container_light_nano.lite2_dist.
"""

# This module stands beside the package, because importing any part of the package imports torch, which takes seconds.
# Help, versions and mistakes need none of it.

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

__all__ = ["DEFAULT_MODEL", "FORMATS", "main", "parse_args"]

DEFAULT_MODEL = "container_nano"
"""Model of a command that is given none."""

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "executorch": ".pte", "pt2": ".pt2", "torchscript": ".pt"}
"""Export formats and the suffixes of their files."""

_RUN = """usage: container run SCRIPT | -m MODULE | COMMAND [ARGUMENT ...]

Runs any program with these models registered in timm, also in the processes that it starts."""


class _Parser(argparse.ArgumentParser):
    """Parser that answers a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main() -> None:
    """Runs the command of this process's arguments.

    Raises:
        SystemExit: With a line that says what is wrong, or with the script's own exit status.
    """
    parse_args(sys.argv[1:])  # help and mistakes end here
    if "OMP_WAIT_POLICY" not in os.environ:  # as in train_imagenet.py
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    importlib.import_module("container.__main__").main()


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Reads a command line.

    Args:
        argv: The arguments.

    Returns:
        The name of the command as `command`, with its arguments. Those of `train` and `run` are in `argv`, unread.

    Raises:
        SystemExit: After help or versions, or with a line that says what is wrong.
    """
    parser, commands, of_weights = _create_parsers()
    words = list(argv)
    if not words:
        words = ["--help"]
    elif os.path.splitext(words[0])[1] == ".py":
        words = ["run", *words]
    _check_command(parser, words[0], commands)
    if words[0] == "weights" and len(words) > 1:
        _check_command(parser, words[1], of_weights)
    if words[0] == "run" and len(words) == 1:
        parser.error(_RUN.partition("\n")[0])
    if words in (["run", "-h"], ["run", "--help"]):
        print(_RUN)
        parser.exit()
    if words[0] in ("run", "train"):
        return argparse.Namespace(command=words[0], argv=words[1:])
    return parser.parse_args(words)


def _check_command(parser: _Parser, word: str, commands: Collection[str]) -> None:
    if word not in commands and not word.startswith("-"):
        near = difflib.get_close_matches(word, commands, 1)
        parser.error(f"no command {word!r}: " + (f"did you mean {near[0]}?" if near else ", ".join(commands)))


def _existing(path: str) -> str:
    if path and not os.path.exists(path):  # the default is empty
        raise argparse.ArgumentTypeError(f"no file {path}")
    return path


def _versions() -> str:
    found = []
    for name in ("container-timm", "timm", "torch", "torchvision"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join([*found, f"Python {sys.version.split()[0]}"])


def _create_parsers() -> tuple[_Parser, Collection[str], Collection[str]]:
    """Returns the parser, the names of its commands, and those of `container weights`."""
    parser = _Parser(
        "container",
        usage="container COMMAND ...",
        description=__doc__,
        epilog="`container COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_versions(), help="print versions for a bug report")
    commands = parser.add_subparsers(
        dest="command", required=True, prog="container", metavar="COMMAND", help=argparse.SUPPRESS
    )
    model = _Parser(add_help=False)
    model.add_argument(
        "--model", metavar="NAME[.tag]", default=DEFAULT_MODEL, help=f"a timm model; default: {DEFAULT_MODEL}"
    )
    own = _Parser(add_help=False)
    own.add_argument("--checkpoint", metavar="FILE", type=_existing, default="", help="your own weights")
    size = _Parser(add_help=False)
    size.add_argument("--img-size", type=int, metavar="N", help="input size; default: that of the weights")
    drawn = _Parser(add_help=False)
    drawn.add_argument("--random-weights", action="store_true", help="random weights in place of pre-trained ones")

    family = commands.add_parser("list", help="list the models")
    family.add_argument("--markdown", action="store_true", help="print it as Markdown, for docs/models.md")

    predict = commands.add_parser(
        "predict", parents=[model, own, size], help="classify photos: the five most likely classes"
    )
    predict.add_argument(
        "photos",
        metavar="PHOTO",
        nargs="*",
        type=_existing,
        help="an image file, or a folder of them; default: the bundled photo of a cat",
    )
    predict.add_argument("--out", metavar="DIR", help="save a picture of what the affinities read there")

    figures = commands.add_parser(
        "figures", parents=[model, own, size, drawn], help="save pictures of what tokens read"
    )
    figures.add_argument(
        "image", metavar="IMAGE", type=_existing, help="an image file; the model sees its centre square"
    )
    figures.add_argument("--out", metavar="DIR", required=True, help="folder for the pictures")
    figures.add_argument(
        "--pixel", nargs=2, type=int, metavar=("X", "Y"), help="pixel of the token to draw; default: the centre"
    )

    explore = commands.add_parser(
        "explore",
        parents=[size, drawn],
        help="click a token in a browser to see what it reads, and change alpha and beta",
    )
    explore.add_argument(
        "photo", metavar="PHOTO", nargs="?", type=_existing, help="an image file; default: the bundled photo of a cat"
    )
    explore.add_argument(
        "--model",
        metavar="NAME[.tag]",
        action="append",
        default=[],
        help=f"model to show; repeat to offer several; default: {DEFAULT_MODEL}",
    )
    explore.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only"
    )
    explore.add_argument("--port", type=int, default=7860, metavar="N", help="port to listen on; default: 7860")

    export = commands.add_parser(
        "export", parents=[own, size], help="convert to ONNX, OpenVINO, ExecuTorch and others, and compare the outputs"
    )
    export.add_argument("model", metavar="NAME[.tag]", help="any timm model with weights")
    export.add_argument("out", metavar="OUT", help=f"new file to write: {', '.join(FORMATS.values())}")
    export.add_argument("--format", choices=FORMATS, required=True, help="file format")
    export.add_argument("--batch", metavar="N|dynamic", default="dynamic", help="batch size; default: dynamic")
    export.add_argument("--dynamic-size", action="store_true", help="accept images of any height and width")
    export.add_argument(
        "--int8", action="store_true", help="quantize to 8 bits with --calibrate; for onnx and openvino"
    )
    export.add_argument("--calibrate", metavar="DIR", help="100 photos or more: half calibrate int8, half judge it")
    export.add_argument("--evaluate", metavar="DIR", help="print the accuracy on DIR/val/CLASS/* or DIR/CLASS/*")
    export.add_argument("--features-only", action="store_true", help="output the four feature maps instead of logits")

    probe = commands.add_parser(
        "probe",
        parents=[model, own, size, drawn],
        help="evaluate frozen features of any timm model by k-NN and a linear classifier",
    )
    probe.add_argument(
        "data_dir", metavar="DIR", help="folder with train/CLASS/* and val/CLASS/*, or with train.tar and val.tar"
    )
    probe.add_argument("--json", metavar="FILE", help="also write the result as JSON, with 95 %% intervals")
    probe.add_argument("--workers", type=int, metavar="N", help="data loading workers; default: the cores less one")
    probe.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed for random weights and for the split that chooses C"
    )

    weights = commands.add_parser("weights", help="list, check, download and convert weights")
    of_weights = weights.add_subparsers(dest="of_weights", required=True, metavar="COMMAND")
    of_weights.add_parser("list", help="list all weights and where they are")
    show = of_weights.add_parser("show", help="show the record of a weights file")
    show.add_argument("name", metavar="NAME")
    verify = of_weights.add_parser("verify", help="check files against their records")
    verify.add_argument("name", metavar="NAME", nargs="?")
    fetch = of_weights.add_parser("fetch", help="download, convert, check and pin")
    fetch.add_argument("name", metavar="NAME")
    fetch.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    convert = of_weights.add_parser("import", help="convert your own checkpoint and pin it")
    convert.add_argument("file", metavar="FILE")
    convert.add_argument("--as", dest="name", metavar="NAME", required=True, help="its timm name: MODEL.TAG")
    convert.add_argument("--out", help="file to write; default: where `timm.create_model(NAME)` finds it")
    convert.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="take the averaged weights of a file that has both"
    )
    convert.add_argument("--trained-by", metavar="TEXT", help="for the record: who trained them")
    convert.add_argument("--license", metavar="ID", help="for the record: the licence, such as apache-2.0")
    convert.add_argument("--data", metavar="TEXT", help="for the record: what they were trained on")
    publish = of_weights.add_parser("export", help="write a folder for timm and the Hugging Face Hub")
    publish.add_argument("name", metavar="NAME")
    publish.add_argument("out", metavar="FOLDER", help="new folder")
    return parser, [*commands.choices, "train", "run"], of_weights.choices
