"""Records of pre-trained weights, and the checks on a file before `pretrained=True` loads it.

The package's `weights_manifest.json` has one record per weights file, under its timm name `architecture.tag`. Unknown
values are null. A user's own records are stored next to their files in `weights_dir()`, as `architecture.tag.json`.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pickletools
import re
import textwrap
import time
import unicodedata
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import safetensors.torch
import timm
import torch
from filelock import FileLock
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from timm.models import (
    get_pretrained_cfg,
    load_state_dict,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import Tensor
from tqdm import tqdm

from . import container as model_file
from .container import checkpoint_filter_fn, is_released
from .errors import in_one_line, suggest
from .files import read_text
from .images import MAX_SIDE

__all__ = [
    "UnknownWeightsError",
    "add_default_tag",
    "check",
    "check_family",
    "class_names",
    "create",
    "describe",
    "find",
    "fit",
    "load",
    "manifest",
    "names",
    "obtain",
    "provide",
    "read",
    "record",
    "register_own",
    "weights_dir",
]

_logger = logging.getLogger(__name__)
_PACKAGE = Path(__file__).parent
_MAX_HEADER = 1 << 22  # bytes of a safetensors header, and of what a torch file's objects may take beside its size
_TENSOR = 1000  # bytes that a tensor object takes, about
_INPUT = ("input_size", "pool_size", "fixed_input_size", "interpolation", "mean", "std", "crop_pct")  # of a record
_SILENCE = 60  # seconds without a byte, after which a download ends
_SLOWEST = 1e5  # bytes per second


class UnknownWeightsError(KeyError):
    """Raised when there is no record of the weights with a name."""

    def __str__(self) -> str:
        kin = [name for name in names() if name.partition(".")[0] == self.args[0].partition(".")[0]]
        known = f"there are {', '.join(kin)}" if kin else suggest(self.args[0], names())
        return f"no weights {self.args[0]!r}: {known or '`container weights list` names them'}"


@cache
def manifest() -> dict[str, dict[str, Any]]:
    """Returns the records of the package's `weights_manifest.json`, by name."""
    inside = _PACKAGE / "weights_manifest.json"  # in a wheel; in a checkout it is next to the package
    path = inside if inside.is_file() else _PACKAGE.parent / inside.name
    return json.loads(path.read_text(encoding="utf-8"))["weights"]


def weights_dir() -> Path:
    """Returns the folder of weights files: `CONTAINER_WEIGHTS_DIR`, or torch hub's folder of checkpoints."""
    return Path(os.environ.get("CONTAINER_WEIGHTS_DIR") or Path(torch.hub.get_dir(), "checkpoints"))


def names() -> list[str]:
    """Returns the names of all weights on record: the package's, then those in `weights_dir()`."""
    return [*manifest(), *(name for name in _own() if name not in manifest())]


def _own() -> list[str]:
    family = model_file.default_cfgs
    return sorted(path.stem for path in weights_dir().glob("*.json") if split_model_name_tag(path.stem)[0] in family)


def record(name: str) -> dict[str, Any]:
    """Returns the record of a weights file: the package's, or the user's own if the package has no sha256 for it.

    Args:
        name: `architecture.tag`.

    Raises:
        UnknownWeightsError: There is no such record.
        RuntimeError: The user's own record is damaged.
    """
    packaged, path = manifest().get(name), weights_dir() / f"{name}.json"
    if not path.is_file() or (packaged and packaged["file"]["sha256"]):
        if packaged is None:
            raise UnknownWeightsError(name)
        return packaged
    try:
        own = json.loads(read_text(path))["weights"][name]
        _check_record(own)
        return own
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise RuntimeError(f"{path} is not a record of {name} ({error}): delete it") from None


def _check_record(own: dict[str, Any]) -> None:
    """Checks the types of what is read from a record that others may have written.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: A field is missing, or of another type.
    """

    def numbers(value: Any, count: int, kind: type) -> bool:
        return isinstance(value, list) and len(value) == count and all(isinstance(part, int | kind) for part in value)

    def text(value: Any) -> bool:
        return value is None or (isinstance(value, str) and len(value) < 1000)

    file, image, names = own["file"], own["input"], own["label_names"]
    fields = {
        "sha256": re.fullmatch("[0-9a-f]{64}", file["sha256"]),
        "bytes": type(file["bytes"]) is int,
        "num_classes": type(own["num_classes"]) is int,
        "label_names": names is None or (isinstance(names, list) and all(name and text(name) for name in names)),
        "input_size": numbers(image["input_size"], 3, int)
        and all(0 < part <= MAX_SIDE for part in image["input_size"]),
        "pool_size": numbers(image["pool_size"], 2, int),
        "fixed_input_size": isinstance(image["fixed_input_size"], bool),
        "mean": numbers(image["mean"], 3, float),
        "std": numbers(image["std"], 3, float) and all(image["std"]),
        "interpolation": image["interpolation"] in ("bicubic", "bilinear", "nearest", "random"),
        "crop_pct": isinstance(image["crop_pct"], int | float) and 0 < image["crop_pct"] <= 1,
        "license": all(map(text, own["license"].values())),
        "url": all(map(text, (file["url"], file["hf_hub_id"], own["origin_url"], own["trained_by"]))),
    }
    if wrong := [key for key, right in fields.items() if not right]:
        raise ValueError(f"{', '.join(wrong)} are not as in weights_manifest.schema.json")


def add_default_tag(name: str) -> str:
    """Returns the name of the weights that `timm.create_model(name, pretrained=True)` loads, with their tag.

    A name with a tag, of another source such as `local-dir:`, or of a model without weights is returned unchanged.

    Args:
        name: `architecture` or `architecture.tag`.
    """
    cfg = None if ":" in name or "." in name or not timm.is_model(name) else get_pretrained_cfg(name)
    tagged = f"{name}.{cfg.tag}" if cfg else name
    return tagged if tagged in names() or timm.is_model_pretrained(name) else name


def _stand_in(path: str | Path) -> str | None:
    """Describes a file that is a web page or a Git LFS pointer instead of weights; None for any other file."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if head.startswith(b"version https://git-lfs.github.com/spec"):
        return "a pointer of Git LFS in place of the file (`git lfs pull` brings it)"
    if not re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return None
    title = re.search(rb"<title[^>]*>(.*?)</title>", head, re.DOTALL | re.IGNORECASE)
    return f'a web page, "{" ".join(title[1].decode(errors="replace").split())}"' if title else "a web page"


def check(name: str, path: str | Path) -> str:
    """Checks a file against the size and the sha256 of its record.

    Args:
        name: `architecture.tag`.
        path: The file.

    Returns:
        Its sha256.

    Raises:
        UnknownWeightsError: There is no such record.
        RuntimeError: Size or hash differ, or the record has no hash.
    """
    _read_checked(name, path)
    return record(name)["file"]["sha256"]


def _read_checked(name: str, path: str | Path) -> bytes:
    """Returns the content of a file that is as in its record."""
    file = record(name)["file"]
    if not file["sha256"]:
        raise RuntimeError(
            f"nobody published the hash of {name}, so {path} may be any file: "
            f"`container weights import {path} --as {name}` checks and pins it"
        )
    if what := _stand_in(path):
        raise RuntimeError(f"{path} is {what}, not the weights {name}")
    with open(path, "rb") as opened:
        content = opened.read(file["bytes"] + 1)
        size = max(len(content), os.fstat(opened.fileno()).st_size)
    if file["bytes"] != size:
        raise RuntimeError(f"{path} has {size} bytes, and the weights {name} have {file['bytes']}: delete it")
    if file["sha256"] != (digest := hashlib.sha256(content).hexdigest()):
        raise RuntimeError(f"{path} has sha256 {digest}, and the weights {name} have {file['sha256']}: delete it")
    return content


def find(name: str, folder: str | Path | None = None) -> Path | None:
    """Finds the file of a record on this machine: in the package, in the folder, or in a checkout's `weights`.

    Returns None if there is no such file. The file is not read, so it is not verified.

    Args:
        name: `architecture.tag`.
        folder: Folder to look in; `weights_dir()` if None.

    Raises:
        UnknownWeightsError: There is no such record.
    """
    file = record(name)["file"]
    folders = [_PACKAGE / "pretrained"] if file["packaged"] else [folder or weights_dir()]
    folders += [_PACKAGE.parent / "weights"] if file.get("checkout") else []
    return next((path for path in (Path(f, f"{name}.safetensors") for f in folders) if path.is_file()), None)


def obtain(name: str, folder: str | Path | None = None) -> Path:
    """Returns the verified file of a record, and downloads it if necessary.

    If several processes ask for the file at the same time, only one of them downloads it.

    Args:
        name: `architecture.tag`.
        folder: Where to look, and where to download to; `weights_dir()` if None. Without a folder, files from the
            Hugging Face Hub go to the Hub's own cache.

    Raises:
        UnknownWeightsError: There is no such record.
        RuntimeError: The file cannot be found or downloaded, or differs from its record.
    """
    path = _locate(name, folder)
    check(name, path)
    return path


def _locate(name: str, folder: str | Path | None) -> Path:
    """Returns the file of a record, downloaded if necessary and then verified; one that was here is not."""
    file, path, place = record(name)["file"], find(name, folder), Path(folder or weights_dir(), f"{name}.safetensors")
    if path is None and file["sha256"] and (file["url"] or file["hf_hub_id"]):
        try:
            if file["hf_hub_id"]:
                path = Path(hf_hub_download(file["hf_hub_id"], place.name, cache_dir=folder))
            else:
                path = _download(name, file["url"], place)
        except Exception as error:  # from any library involved
            source = file["hf_hub_id"] or file["url"]
            raise RuntimeError(
                f"cannot download the weights {name} from {source}: {in_one_line(error)}. Without a "
                f"network, put that file ({file['bytes']} bytes, sha256 {file['sha256']}) at {place}"
            ) from error
    if path is None and file.get("checkout"):
        raise RuntimeError(
            f"the weights {name} are in no wheel: put weights/{place.name} of the repository ({file['bytes']} bytes, "
            f"sha256 {file['sha256']}) at {place}"
        )
    if path is None:
        how = "fetch" if name in manifest() else "import FILE --as"
        kin = [other for other in manifest() if other.split(".")[0] == name.split(".")[0] and find(other, folder)]
        raise RuntimeError(
            f"the weights {name} are not at {place}: `container weights {how} {name}` puts them there"
            + (f"; {' and '.join(kin)} would load" if kin else "")
        )
    return path


def load(name: str, folder: str | Path | None = None) -> dict[str, Tensor]:
    """Returns the state dict of a record's file, from the bytes that were compared with the record.

    Args:
        name: `architecture.tag`.
        folder: As in `obtain`.

    Raises:
        UnknownWeightsError: There is no such record.
        RuntimeError: As in `obtain`.
    """
    return safetensors.torch.load(_read_checked(name, _locate(name, folder)))


def _download(name: str, url: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part, lock = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.lock")
    with FileLock(lock):
        try:
            if not path.is_file():  # otherwise the previous holder of the lock downloaded it
                part.unlink(missing_ok=True)  # left by a process that was killed
                with open(part, "xb") as file:
                    for chunk in _receive(url, record(name)["file"]["bytes"]):
                        file.write(chunk)
                check(name, part)
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
            with suppress(OSError):  # a waiting process may have it open, which can prevent its removal
                lock.unlink()
    return path


def _receive(url: str, size: int) -> Iterator[bytes]:
    """Yields what a URL has, up to a size.

    Raises:
        OSError: The server cannot be reached, is silent for a minute, or slower than 0.1 MB/s.
        ValueError: The URL, or one that it leads to, is not https, or there is more than that size.
    """
    start, allowed = time.monotonic(), _SILENCE + size / _SLOWEST
    if urlsplit(url).scheme != "https":
        raise ValueError(f"{url} is not https")
    try:
        response = urlopen(url, timeout=_SILENCE)
    except HTTPError as error:
        error.close()  # closes its connection
        raise
    with response:
        if urlsplit(response.url).scheme != "https":
            raise ValueError(f"{url} leads to {response.url}, which is not https")
        with tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            while chunk := response.read1(1 << 16):
                size -= len(chunk)
                if size < 0:
                    raise ValueError(f"there are more bytes than the recorded {bar.total:,}")
                if (seconds := time.monotonic() - start) > allowed:
                    raise TimeoutError(f"{bar.n:,} bytes in {seconds:.0f} s are too slow")
                bar.update(len(chunk))
                yield chunk


def read(path: str | Path, use_ema: bool | None = None) -> dict[str, Tensor]:
    """Reads the state dict of a checkpoint: safetensors, or a torch file without executing its pickled code.

    Args:
        path: The file.
        use_ema: Whether to load the EMA weights of a training checkpoint, if it has any. None loads the weights that
            were evaluated: in the released layout those under `model`, as its authors did; otherwise the EMA weights,
            as timm does.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The file is not a checkpoint, has more than tensors and plain values, or has non-finite values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if what := _stand_in(path):
        raise RuntimeError(f"{path} is {what}, not a checkpoint")
    try:
        _check_size(Path(path))
        state_dict = load_state_dict(str(path), use_ema=use_ema is not False)
        if use_ema is None and is_released(state_dict):
            state_dict = load_state_dict(str(path), use_ema=False)
    except Exception as error:  # parsers raise nearly anything for damaged or foreign files
        raise RuntimeError(f"{path} is not a checkpoint that can be loaded: {_reason(Path(path), error)}") from error
    for key, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise RuntimeError(f"{path} is not a state dict of tensors: {key} is a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise RuntimeError(f"{path}: {key} is sparse or has no values")
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # expanded: to copy it would cost any memory
            raise RuntimeError(
                f"{path}: {key} has {tensor.nbytes} bytes, and its storage {tensor.untyped_storage().nbytes()}"
            )
        if not torch.isfinite(tensor).all():
            raise RuntimeError(f"{path}: {key} has {(~torch.isfinite(tensor)).sum()} numbers that are NaN or infinite")
    return state_dict


def _check_size(path: Path) -> None:
    """Refuses a file that would cost much more memory than its size, before it is parsed.

    Raises:
        RuntimeError: It would, or a part of it is damaged.
    """
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _MAX_HEADER:
            raise RuntimeError(f"its header has {header:,} bytes, and {_MAX_HEADER:,} are allowed")
        return
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if (
            any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            or sum(e.file_size for e in entries) > size
        ):
            raise RuntimeError("its parts are compressed, which torch does not do")
        if damaged := archive.testzip():  # torch ignores the checksums
            raise RuntimeError(f"checksum of {damaged} is wrong")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                made = sum(opcode.name == "REDUCE" for opcode, _, _ in pickletools.genops(archive.open(entry)))
                if made * _TENSOR > _MAX_HEADER + 2 * size:
                    raise RuntimeError(f"{made:,} objects in {size:,} bytes are more than a checkpoint has")


def _reason(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        return "it is empty"
    if path.suffix != ".safetensors" and head[8:] == b"{":
        return "it is safetensors, so its name must end in .safetensors"
    opcode = isinstance(error, EOFError | IndexError | KeyError)  # the unpickler's messages
    torch_file = head[:1] in (b"P", b"\x80")  # a zip file or a pickle
    if opcode or (path.suffix != ".safetensors" and not torch_file):
        return "it is neither safetensors nor a torch file"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "weights_only" in reason:  # of torch or timm, which advise to load it all the same
        return "besides tensors and plain values it has Python objects, which could run code"
    return reason


def class_names(path: str | Path) -> list[str] | None:
    """Returns the class names in the order of the logits, with composed accents (NFC), or None if the file has none.

    Files from `train_imagenet.py` have class names.

    Args:
        path: A file that `read` accepts.
    """
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                names = json.loads((file.metadata() or {}).get("classes", "null"))
        else:
            names = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["fixed"]["class_names"]
        if not (isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)):
            return None
        return [unicodedata.normalize("NFC", name) for name in names]
    except Exception:  # any other file has no class names
        return None


def fit(state_dict: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Converts a checkpoint, including its classifier, to the names and shapes of its model.

    Args:
        state_dict: As returned by `read`.
        name: `architecture.tag`. If it has no record, any number of classes is accepted, and the image size is the
            architecture's own.

    Raises:
        ValueError: There is no such model, or the checkpoint does not fit it exactly.
    """
    architecture, _ = split_model_name_tag(name)
    check_family(architecture)
    head = state_dict.get("head.weight", state_dict.get("head.fc.weight", torch.empty(0)))
    classes = record(name)["num_classes"] if name in names() else len(head)
    overlay = dict(num_classes=classes)  # so that the classifier must be present and fit
    model = timm.create_model(architecture, device="meta", pretrained_cfg_overlay=overlay)
    fitted = checkpoint_filter_fn(dict(state_dict), model)
    for key, tensor in model.state_dict().items():
        found = tuple(state_dict.get(key, fitted.get(key, tensor)).shape)
        if found != tuple(tensor.shape):  # timm or the filter would otherwise adapt it
            raise ValueError(f"checkpoint does not fit {name}: {key} is {found}, not {tuple(tensor.shape)}")
    return fitted


def create(
    model: str,
    checkpoint: str | Path = "",
    img_size: int | None = None,
    pretrained: bool = True,
    seed: int = 0,
    features_only: bool = False,
) -> Any:
    """Creates a timm model in evaluation mode, with published, own or random weights.

    Args:
        model: timm name: `NAME.tag`, or `NAME` for its default weights; also timm's other sources, such as
            `local-dir:FOLDER`.
        checkpoint: Weights file, which must fit. The model gets as many classes as the file has.
        img_size: Side of the images in pixels, also written to `input_size` of `pretrained_cfg`; the weights' own if
            None.
        pretrained: Whether to load published weights if there is no `checkpoint`. Otherwise weights are random.
        seed: Seed of random weights.
        features_only: Whether to return feature maps instead of logits.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        RuntimeError: The file is not a checkpoint, the published weights cannot be loaded, or the model cannot be
            created, for example at that image size.
        ValueError: There is no such model, it has no weights, `img_size` is not from 1 to `MAX_SIDE`, the checkpoint
            does not fit, or a tag is given with a checkpoint or for random weights.
    """
    elsewhere = ":" in model
    name, tag = ("", model) if elsewhere else split_model_name_tag(model)
    if not elsewhere and not timm.is_model(name):
        near = suggest(name, timm.list_models())
        raise ValueError(f"no model {name!r}: {near or '`container list` has ours, timm.list_models() all'}")
    if tag and checkpoint:
        raise ValueError(f"{model} names published weights, and the checkpoint {checkpoint} others: give one of them")
    if tag and not pretrained:
        raise ValueError(f"{model} names published weights, and random ones are asked for")
    if img_size is not None and not 1 <= img_size <= MAX_SIDE:
        raise ValueError(f"image size {img_size} is not from 1 to {MAX_SIDE:,} pixels")
    if pretrained and not (checkpoint or elsewhere):
        _check_has_weights(model)
    overlay: dict[str, Any] = {} if img_size is None else dict(input_size=(3, img_size, img_size))
    options: dict[str, Any] = dict(features_only=True) if features_only else {}
    if checkpoint:
        state_dict = read(checkpoint)
        if name in timm.list_models(module="container"):
            state_dict = fit(state_dict, name)
        cfg = get_pretrained_cfg(name)
        classifier = cfg.classifier if cfg else None  # a list for distilled models, all of the same width
        head = classifier if isinstance(classifier, str) or classifier is None else classifier[0]
        options["num_classes"] = classes = len(state_dict.get(f"{head}.weight", ()))
        overlay |= dict(state_dict=state_dict, num_classes=classes, label_names=class_names(checkpoint) or ())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found: Any = timm.create_model(
                model, bool(checkpoint or pretrained), pretrained_cfg_overlay=overlay, **options
            )
    except Exception as error:  # from timm, the Hub, or timm's filters, which raise nearly anything for foreign files
        if checkpoint:
            raise ValueError(
                f"{checkpoint} does not fit {model}: {textwrap.shorten(str(error) or repr(error), 200)}"
            ) from error
        at = "" if img_size is None else f" at {img_size} px"
        raise RuntimeError(f"{model}{at} cannot be created: {in_one_line(error)}") from error
    found.pretrained_cfg.pop("state_dict", None)  # otherwise the model would hold its weights twice
    if not (checkpoint or pretrained):
        found.pretrained_cfg["label_names"] = ()
    return found.eval()


def describe(model: str, checkpoint: str | Path = "", pretrained: bool = True) -> str:
    """Returns a name for a model of `create` with its weights: `NAME.tag`, or what they are in parentheses."""
    if checkpoint:
        return f"{model} ({Path(checkpoint).name})"
    return add_default_tag(model) if pretrained else f"{model} (random weights)"


def check_family(name: str) -> None:
    """Checks that a model is of this family.

    Raises:
        ValueError: It is not.
    """
    if name not in (family := timm.list_models(module="container")):
        raise ValueError(f"no model {name!r} in this family: {suggest(name, family) or '`container list` has them'}")


def _check_has_weights(model: str) -> None:
    if timm.is_model_pretrained(model) or add_default_tag(model) in names():
        return
    architecture = split_model_name_tag(model)[0]
    known = [name for name in names() if name.startswith(f"{architecture}.")]
    known = known or timm.list_pretrained(f"{architecture}.*") or names()
    raise ValueError(
        f"{model} has no pre-trained weights: there are {', '.join(known)}; or use your own as --checkpoint, or random "
        "ones"
    )


def provide(variant: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Verifies the file that `pretrained=True` refers to, and passes its weights to timm.

    A file on record is downloaded if necessary and checked against its sha256; the bytes that were checked are those
    that are loaded. A file named by the user is read; it must be a checkpoint with only finite values. A Hub id, URL,
    folder or state dict from the user is left to timm.

    Args:
        variant: Model name without tag.
        arguments: Arguments for `timm.models.build_model_with_cfg`.

    Returns:
        The arguments, with the weights if they are on record.

    Raises:
        FileNotFoundError: The user's file does not exist.
        RuntimeError: The weights cannot be loaded, or differ from their record.
    """
    overlay = dict(arguments.get("pretrained_cfg_overlay") or {})
    cfg = resolve_pretrained_cfg(variant, arguments.get("pretrained_cfg"), overlay)
    name = f"{variant}.{cfg.tag}"
    if cfg.state_dict or cfg.source in ("hf-hub", "local-dir"):
        pass
    elif name in names() and _sources(cfg) == _sources(get_pretrained_cfg(name)):
        overlay["state_dict"] = load(name, arguments.get("cache_dir"))
    elif cfg.file:
        state_dict = read(cfg.file)
        if is_released(state_dict):
            # From such a file, timm would load the EMA weights; its authors evaluated these.
            overlay["state_dict"] = state_dict
        overlay.setdefault("label_names", ())  # the registered names belong to another file
    return dict(arguments, pretrained_cfg_overlay=overlay)


def _sources(cfg: Any) -> list[Any]:
    return [getattr(cfg, key) or None for key in ("url", "file", "hf_hub_id", "state_dict")]


def register_own() -> None:
    """Registers the weights on record in `weights_dir()` with timm; warns about damaged records and skips them."""
    for name in _own():
        try:
            own = record(name)
            prepared = {key: own["input"][key] for key in _INPUT}
            prepared = {key: tuple(value) if isinstance(value, list) else value for key, value in prepared.items()}
            architecture, tag = split_model_name_tag(name)
            own_cfg = dataclasses.replace(
                model_file.default_cfgs[architecture].default,
                **prepared,
                file=str(find(name) or ""),
                num_classes=own["num_classes"],
                label_names=tuple(own["label_names"]) if own["label_names"] else None,
                license=own["license"]["weights"] or "unknown",
                origin_url=own["origin_url"],
            )
        except Exception as error:  # nothing in a folder that others write to may break an import
            _logger.warning("no weights %s: %s", name, error)
            continue
        family = model_file.default_cfgs[architecture]
        family.cfgs[tag] = own_cfg
        if tag not in family.tags:
            family.tags.append(tag)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm warns that the model is registered again
            register_model(model_entrypoint(architecture))


model_file.provide = provide
register_own()
