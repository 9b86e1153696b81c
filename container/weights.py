"""Weights: what `weights_manifest.json` records, and how a checkpoint gets from a file to a model.

The manifest has one record per weights entry, under its timm name `architecture.tag`; an unknown is null.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Dict, Optional, Union

import torch
from timm.models import load_state_dict, resolve_pretrained_cfg
from torch import Tensor

__all__ = ["from_released", "is_released", "manifest", "pretrained_cfg", "read", "resolve"]

_PACKAGE = Path(__file__).parent


@cache
def manifest() -> Dict[str, Dict[str, Any]]:
    """The records of `weights_manifest.json`, by name."""
    inside = _PACKAGE / "weights_manifest.json"  # in a wheel; in a checkout it lies beside the package
    path = inside if inside.is_file() else _PACKAGE.parent / inside.name
    return json.loads(path.read_text(encoding="utf-8"))["weights"]


def pretrained_cfg(name: str) -> Dict[str, Any]:
    """The record's input and licence as entries of timm's pretrained cfg.

    Args:
        name: `architecture.tag`.

    Raises:
        KeyError: The manifest has no such record.
    """
    record = manifest()[name]
    size = record["input"]
    return dict(
        input_size=tuple(size["input_size"]),
        mean=tuple(size["mean"]),
        std=tuple(size["std"]),
        interpolation=size["interpolation"],
        crop_pct=size["crop_pct"],
        num_classes=record["num_classes"],
        license=record["license"]["weights"] or "unknown",
        origin_url=record["origin_url"],
    )


# Names of the released checkpoint -> ours. Its stage and block numbers are spelt out; `attn` is the convolution of a
# static block, `conv` that of a mixed one, and a mixed block's `conv1` holds Q, K and V in one.
_RELEASED_NAMES = (
    (r"^patch_embed1\.", "stem."),
    *((rf"^patch_embed{i}\.", f"stages.{i - 1}.downsample.") for i in (2, 3, 4)),
    *((rf"^blocks{i}\.", f"stages.{i - 1}.blocks.") for i in (1, 2, 3, 4)),
    (r"\.pos_embed\.", ".pos_conv."),
    (r"\.(attn|conv)\.", ".aggregation.static.conv."),
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
    """
    renamed = {}
    for key, tensor in state_dict.items():
        mixed = key.partition(".conv1.")[0] + ".sa_weight" in state_dict
        for pattern, name in _RELEASED_NAMES:
            key = re.sub(pattern, name, key)
        if mixed and ".aggregation.value." in key:
            q, k, tensor = tensor.chunk(3)
            renamed[key.replace(".value.", ".dynamic.qk.")] = torch.cat((q, k))
        renamed[key] = tensor
    return renamed


def read(path: Union[str, Path], use_ema: bool = True) -> Dict[str, Any]:
    """The state dict in a checkpoint file (safetensors, or a torch file read without executing pickled code).

    Of a released checkpoint these are the weights under `model`, which the authors evaluated; they never evaluated
    its `model_ema`.

    Args:
        path: The file.
        use_ema: Whether to take the averaged (EMA) weights of a training checkpoint that has them, as timm does.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: It is not a checkpoint, or holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    state_dict = load_state_dict(str(path), use_ema=use_ema)
    return load_state_dict(str(path), use_ema=False) if is_released(state_dict) else state_dict


def resolve(
    variant: str, pretrained_cfg: Union[str, Dict[str, Any], None], overlay: Optional[Dict[str, Any]]
) -> Dict[str, Any]:
    """Finds the weights that `pretrained=True` means and reads them where they are a file.

    Args:
        variant: Model name without tag.
        pretrained_cfg: Tag or cfg given to `timm.create_model`.
        overlay: `pretrained_cfg_overlay` given to `timm.create_model`.

    Returns:
        The overlay, with the state dict of a file in it; a Hub id, URL or folder is left to timm.

    Raises:
        FileNotFoundError: The file named does not exist.
        RuntimeError: The weights exist, but can only be had by hand.
    """
    overlay = dict(overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)
    if cfg.source == "local-dir" or cfg.state_dict:
        return overlay
    if cfg.file:
        return dict(overlay, state_dict=read(cfg.file))
    record = manifest().get(f"{variant}.{cfg.tag}")
    if record is not None and not (cfg.url or cfg.hf_hub_id):
        raise RuntimeError(
            f"the weights {variant}.{cfg.tag} have to be downloaded by hand, and nobody published their hash: get "
            f"{record['file']['url']} and pass pretrained_cfg_overlay=dict(file=PATH)"
        )
    return overlay
