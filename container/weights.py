"""Weights: what `weights_manifest.json` records, and how a checkpoint gets from a file to a model.

The manifest has one record per weights entry, under its timm name `architecture.tag`; an unknown is null. timm's
default cfgs are made from it, and nothing is loaded that contradicts it.
"""

import json
import logging
import os
import re
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, Dict, Optional, Union

import torch
from huggingface_hub import hf_hub_url
from timm.models import load_state_dict, resolve_pretrained_cfg
from torch import Tensor

from .files import download, sha256_of, web_page

__all__ = [
    "check",
    "default_cfg",
    "find",
    "from_released",
    "is_released",
    "manifest",
    "obtain",
    "read",
    "resolve",
    "weights_dir",
]

_logger = logging.getLogger(__name__)
_PACKAGE = Path(__file__).parent


def _packaged(name: str) -> Path:
    return _PACKAGE / "pretrained" / f"{name}.safetensors"


@cache
def manifest() -> Dict[str, Dict[str, Any]]:
    """The records of `weights_manifest.json`, by name."""
    inside = _PACKAGE / "weights_manifest.json"  # in a wheel; in a checkout it lies beside the package
    path = inside if inside.is_file() else _PACKAGE.parent / inside.name
    return json.loads(path.read_text(encoding="utf-8"))["weights"]


def default_cfg(name: str) -> Dict[str, Any]:
    """A record as timm's pretrained cfg.

    Args:
        name: `architecture.tag`.

    Raises:
        KeyError: The manifest has no such record.
    """
    record = manifest()[name]
    file = record["file"] or {}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in record["input"].items()}
    source: Dict[str, Any] = dict(url="")
    if file.get("sha256"):  # what nobody can verify is no source: timm would announce it, and try
        source.update(url=file["url"] or "", hf_hub_id=file["hf_hub_id"])
    if file.get("packaged"):
        source.update(file=str(_packaged(name)))
    return dict(
        source,
        **given,
        num_classes=record["num_classes"],
        label_names=tuple(record["label_names"]) if record["label_names"] else None,
        license=record["license"]["weights"] or (record["license"]["code"] if not file else "unknown"),
        origin_url=record["origin_url"],
    )


def weights_dir() -> Path:
    """Where weights are looked for and downloaded to: `CONTAINER_WEIGHTS_DIR`, or torch hub's folder of checkpoints."""
    return Path(os.environ.get("CONTAINER_WEIGHTS_DIR") or Path(torch.hub.get_dir(), "checkpoints"))


def find(name: str, folder: Union[str, Path, None] = None) -> Optional[Path]:
    """The file of a record if it is here, in the package or in the folder; unread, so unverified.

    Args:
        name: `architecture.tag`.
        folder: `weights_dir()` if None.

    Raises:
        KeyError: The manifest has no such record.
    """
    file = manifest()[name]["file"]
    if file is None:
        return None
    places = [_packaged(name)] if file["packaged"] else []
    places += [Path(folder or weights_dir(), f"{name}.{suffix}") for suffix in ("safetensors", "pth")]
    return next((path for path in places if path.is_file()), None)


def check(name: str, path: Union[str, Path]) -> str:
    """Holds a file against its record's size and sha256, or against a pin where nobody published a hash.

    A pin is a file beside it, `FILE.sha256`, as `sha256sum` writes it.

    Args:
        name: `architecture.tag`.
        path: The file.

    Returns:
        Its sha256.

    Raises:
        RuntimeError: It is another file.
    """
    file, pin = manifest()[name]["file"] or {}, Path(f"{path}.sha256")
    if page := web_page(path):
        raise RuntimeError(f"{path} is {page}, not the weights {name}: download the file itself, {file.get('url')}")
    expected, by = file.get("sha256"), "its record"
    if not expected and pin.is_file():
        expected, by = (pin.read_text().split() or [""])[0].lower(), pin.name
    size, found = Path(path).stat().st_size, sha256_of(path)
    if file.get("bytes") not in (None, size):
        raise RuntimeError(f"{path} has {size} bytes, and the weights {name} have {file['bytes']}: delete it")
    if expected not in (None, found):
        raise RuntimeError(f"{path} has sha256 {found}, and {by} says {expected}: delete it")
    if not expected:
        _logger.warning(
            "%s is unverified: nobody published the hash of %s. Its sha256 is %s; "
            "`sha256sum FILE > FILE.sha256` beside it pins it.",
            path,
            name,
            found,
        )
    return found


# Names of the released checkpoint -> ours. Its stage and block numbers are spelt out; `attn` is the convolution of a
# static block, `conv` that of a mixed one, and a mixed block's `conv1` holds Q, K and V in one.
_RELEASED_NAMES = (
    (r"^patch_embed1\.", "stem."),
    *((rf"^patch_embed{i}\.", f"stages.{i - 1}.downsample.") for i in (2, 3, 4)),
    (r"^(blocks[123]\.\d+)\.attn\.", r"\1.aggregation.static.conv."),
    (r"^(blocks4\.\d+)\.conv\.", r"\1.aggregation.static.conv."),
    *((rf"^blocks{i}\.", f"stages.{i - 1}.blocks.") for i in (1, 2, 3, 4)),
    (r"\.pos_embed\.", ".pos_conv."),
    (r"\.conv1\.", ".aggregation.value."),
    (r"\.conv2\.", ".aggregation.proj."),
    (r"\.sa_weight$", ".aggregation.gate.logit"),
    (r"^head\.", "head.fc."),
)


def is_released(state_dict: Dict[str, Any]) -> bool:
    """Whether a state dict is in the layout of the authors' release."""
    return any(key.startswith("patch_embed1.") for key in state_dict)


def from_released(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The released layout of CONTAINER-LIGHT in our names.

    Args:
        state_dict: The weights under `model` in the released file.

    Returns:
        The same tensors under our names, with the projection to Q, K and V of mixed blocks cut in two.

    Raises:
        ValueError: It is not the released layout; keys that are foreign to it are left for the model to refuse.
    """
    renamed: Dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        old, mixed = key, key.partition(".conv1.")[0] + ".sa_weight" in state_dict
        for pattern, name in _RELEASED_NAMES:
            key = re.sub(pattern, name, key)
        if mixed and ".aggregation.value." in key:
            if not tensor.ndim or len(tensor) % 3:
                raise ValueError(f"checkpoint is not in the released layout: {old} of shape {tuple(tensor.shape)}")
            q, k, tensor = tensor.chunk(3)
            renamed[key.replace(".value.", ".dynamic.qk.")] = torch.cat((q, k))
        if key in renamed:
            raise ValueError(f"checkpoint is not in the released layout: {old} and another key are both {key}")
        renamed[key] = tensor
    return renamed


def read(path: Union[str, Path], use_ema: Optional[bool] = None) -> Dict[str, Tensor]:
    """The state dict in a checkpoint file (safetensors, or a torch file read without executing pickled code).

    Args:
        path: The file.
        use_ema: Whether to take the averaged (EMA) weights of a training checkpoint that has them. None means those
            that were evaluated: of the released layout the weights under `model`, as its authors did; else averaged
            ones, as timm does.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: It is not a checkpoint, holds more than tensors and plain values, or numbers that are not finite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if page := web_page(path):
        raise RuntimeError(f"{path} is {page}, not a checkpoint")
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):  # torch ignores the checksums
            raise RuntimeError(f"checksum of {damaged} is wrong")
        state_dict = load_state_dict(str(path), use_ema=use_ema is not False)
        if use_ema is None and is_released(state_dict):
            state_dict = load_state_dict(str(path), use_ema=False)
    except Exception as error:  # whatever a damaged or foreign file makes its parsers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"{path} is not a checkpoint that can be loaded: {reason}") from error
    for key, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise RuntimeError(f"{path} is not a state dict of tensors: {key} is a {type(tensor).__name__}")
        if not torch.isfinite(tensor).all():
            raise RuntimeError(f"{path}: {key} has {(~torch.isfinite(tensor)).sum()} numbers that are NaN or infinite")
    return state_dict


def obtain(name: str, folder: Union[str, Path, None] = None) -> Path:
    """The verified file of a record, downloaded if it has to be.

    Args:
        name: `architecture.tag`.
        folder: Where it is looked for and downloaded to, `weights_dir()` if None.

    Raises:
        KeyError: The manifest has no such record.
        RuntimeError: There is no file to be had, or it is another one than the record's.
    """
    file = manifest()[name]["file"]
    if file is None:
        raise RuntimeError(f"No pretrained weights exist for {name}. Use `pretrained=False` for random init.")
    path = find(name, folder)
    if path is None:
        path = Path(folder or weights_dir(), f"{name}.{file['format']}")
        if not file["sha256"]:
            raise RuntimeError(
                f"the weights {name} have to be downloaded by hand, as nobody published their hash: put the file from "
                f"{file['url']} at {path} (CONTAINER_WEIGHTS_DIR), or pass pretrained_cfg_overlay=dict(file=PATH)"
            )
        url = file["url"] or hf_hub_url(file["hf_hub_id"], f"{name}.{file['format']}")
        try:
            download(url, path, file["bytes"], file["sha256"])
        except OSError as error:
            raise RuntimeError(
                f"cannot download the weights {name}: {error}. Without a network, put that file "
                f"({file['bytes']} bytes, sha256 {file['sha256']}) at {path} (CONTAINER_WEIGHTS_DIR)"
            ) from error
    check(name, path)
    return path


def resolve(
    variant: str,
    pretrained_cfg: Union[str, Dict[str, Any], None],
    overlay: Optional[Dict[str, Any]],
    folder: Union[str, Path, None] = None,
) -> Dict[str, Any]:
    """Finds the weights that `pretrained=True` means and reads them where they are a file.

    Args:
        variant: Model name without tag.
        pretrained_cfg: Tag or cfg given to `timm.create_model`.
        overlay: `pretrained_cfg_overlay` given to `timm.create_model`.
        folder: `cache_dir` given to `timm.create_model`.

    Returns:
        The overlay, with the state dict of a file in it; a Hub id, URL or folder that the user named is left to timm.

    Raises:
        FileNotFoundError: The file named does not exist.
        RuntimeError: The weights cannot be had, or are not what their record says.
    """
    overlay = dict(overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)
    name = f"{variant}.{cfg.tag}"
    own = not any(overlay.get(key) for key in ("url", "file", "hf_hub_id", "state_dict"))
    if own and not isinstance(pretrained_cfg, dict) and manifest().get(name, {}).get("file"):
        return dict(overlay, state_dict=read(obtain(name, folder)))
    if cfg.file and not cfg.state_dict and cfg.source != "local-dir":
        state_dict = read(cfg.file)
        if is_released(state_dict):
            check(name, cfg.file)
        return dict(overlay, state_dict=state_dict)
    return overlay
