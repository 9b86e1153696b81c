"""Context layer and timm backbones for Ultralytics YOLO, used by name in a model's YAML file.

    import container.yolo
    from ultralytics import YOLO

    model = YOLO(container.yolo.config("yolov8n-context.yaml"))

Ultralytics is under the AGPL-3.0. Only `register` and `config` import it, and no code is copied from it.
"""

import atexit
import copy
import re
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from .affinity import DoubleAttention, GlobalContext
from .detection import features, maps

__all__ = ["ContainerBackbone", "ContextAggregation", "config", "register"]


class _Row(nn.Module):
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "ultralytics.nn.tasks" in sys.modules:  # otherwise the layer is loaded without Ultralytics
            register()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Row":
        memo[id(self)] = row = object.__new__(type(self))
        vars(row).update(copy.deepcopy(vars(self), memo))  # without `__setstate__`, which is for layers that are loaded
        return row


class ContextAggregation(_Row):
    """Layer that adds one or more summaries of the whole feature map to every position, weighted by the position.

    y_i = x_i + a_i m(sum_j k_j v_j), where a is the sigmoid of a 1x1 projection, k is the softmax of another over all
    positions, and v and m are 1x1 projections. m is initialised to zero, so the layer starts as the identity. It is
    `GlobalContext`, the affinity of rank one, with m applied to the summary, where it costs almost nothing. With a
    higher rank, it is `DoubleAttention`.

    (B, C, H, W) -> (B, C, H, W) for any H and W. The layer has no norm, so it can be trained with batch size 1.

    Source: Liu et al., "Learning to Aggregate Multi-Scale Context for Instance Segmentation in Remote Sensing Images"
    (arXiv 2111.11057, CATNet), written from the formula. The CONTAINER paper has no such layer, despite the similar
    names.
    Cost: O(N C^2 / reduction).

    Args:
        in_channels: Channels C.
        reduction: v has C / reduction channels, rounded down.
        rank: Number of summaries.

    Raises:
        ValueError: `reduction` is not between 1 and `in_channels`, or `rank` is below 1.
    """

    def __init__(self, in_channels: int, reduction: int = 1, rank: int = 1) -> None:
        super().__init__()
        if not 1 <= reduction <= in_channels:
            raise ValueError(f"reduction {reduction} is not in 1 to {in_channels}, the channels")
        self.affinity = GlobalContext(in_channels) if rank == 1 else DoubleAttention(in_channels, rank)
        self.v = nn.Conv2d(in_channels, in_channels // reduction, 1)
        self.m = nn.Conv2d(in_channels // reduction, in_channels, 1)
        nn.init.zeros_(self.m.weight)
        nn.init.zeros_(self.m.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer: (B, C, H, W) -> (B, C, H, W)."""
        return x + self.affinity.distribute(x, self.m(self.affinity.context(x, self.v(x))))


class ContainerBackbone(_Row):
    """timm backbone for the first row of a YAML file: `[-1, 1, ContainerBackbone, [NAME, PRETRAINED]]`.

    Images (B, in_chans, H, W) -> feature maps, finest first. A row `[0, 1, ContainerLevel, [INDEX]]` selects one.

    Args:
        name: timm name of the model.
        pretrained: Whether to load pre-trained weights.
        in_chans: Number of image channels; in a YAML file, those of the data.
    """

    def __init__(self, name: str, pretrained: bool = False, in_chans: int = 3) -> None:
        super().__init__()
        self.body = features(name, pretrained=pretrained, in_chans=in_chans)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Computes the feature maps of images (B, in_chans, H, W)."""
        return maps(self.body, x)


class _ContextRow(ContextAggregation):
    """Factory that creates the `ContextAggregation` of a row.

    Its arguments are the channels of all previous rows, and the index of the input row among them.
    """

    __qualname__ = "ContextAggregation"  # the name that Ultralytics prints

    def __new__(  # type: ignore[misc]
        cls, channels: list[int], source: int, reduction: int = 1, rank: int = 1
    ) -> ContextAggregation:
        return ContextAggregation(channels[source], reduction, rank)


def register(_: Any = None) -> None:
    """Registers `ContextAggregation`, `ContainerBackbone` and `ContainerLevel` for Ultralytics' YAML files.

    Repeated calls have no effect. `config` calls this function, and so does loading a .pt file with these layers. With
    several GPUs, Ultralytics starts new processes and calls this function there as a callback; hence the unused
    argument.

    Raises:
        ImportError: Ultralytics is not installed.
    """
    try:
        from ultralytics.nn import tasks
    except ImportError:
        raise ImportError("this needs Ultralytics (AGPL-3.0): pip install ultralytics") from None
    from ultralytics.utils.callbacks import default_callbacks

    if hasattr(tasks, "ContainerBackbone"):
        return
    default_callbacks["on_pretrain_routine_start"].append(register)  # runs in every training process
    parse = tasks.parse_model
    tasks.parse_model = lambda d, ch, *args, **kwargs: parse(_rewritten(d, ch), ch, *args, **kwargs)
    vars(tasks).update(_ContextRow=_ContextRow, ContainerBackbone=ContainerBackbone)


def _rewritten(d: dict[str, Any], in_chans: int) -> dict[str, Any]:
    """Rewrites our rows so that Ultralytics' parser understands them.

    The parser passes the arguments of an unknown layer unchanged, except for strings that name one of its own
    variables: `ch`, the channels of all previous rows, and `f`, the index of the input row. Its layer for selecting one
    of several feature maps is `Index`, which needs the number of channels.
    """
    d, channels = copy.deepcopy(d), []
    for row in d["backbone"] + d["head"]:
        source, _, module, args = row
        if module == "ContextAggregation":
            row[2:] = ["_ContextRow", ["ch", "f", *args]]
        elif module == "ContainerBackbone":
            channels = features(args[0], device="meta").feature_info.channels()
            row[3] = [args[0], any(args[1:]), in_chans]
        elif module == "ContainerLevel":
            if source != 0 or not 0 <= args[0] < len(channels):
                raise ValueError(
                    f"row {source} has no ContainerLevel {args[0]}: row 0 has {len(channels)}, other rows none"
                )
            row[2:] = ["Index", [channels[args[0]], args[0]]]
    return d


def config(name: str, pretrained: bool = False) -> str:
    """Creates a YAML file for `ultralytics.YOLO` from one of Ultralytics' own; it is deleted when the process ends.

    Args:
        name: FAMILY-context.yaml inserts a `ContextAggregation` on each feature map that the last row reads, and
            FAMILY-contextR.yaml does so with rank R. FAMILY-MODEL.yaml replaces the backbone with a timm model. FAMILY
            is the name of an Ultralytics file with the letter of its scale, as in `yolov8n-context.yaml`,
            `yolo11s-container_light.yaml` and `yolo11n-seg-resnet18.yaml`. A classifier, as in
            `yolo11n-cls-container_light.yaml`, reads the model's last feature map, whatever its stride.
        pretrained: Whether to load the timm model's pre-trained weights.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: Ultralytics has no such family.
        ValueError: The family cannot use that model.
    """
    register()
    from ultralytics.nn import tasks
    from ultralytics.utils import ROOT, YAML

    files = {p.stem: p for p in ROOT.glob("cfg/models/*/*.yaml")}
    family, _, model = name.removesuffix(".yaml").rpartition("-")
    file = files.get(family) or files.get(re.sub(r"(\d)[nsmlx](?=-|$)", r"\1", family, count=1))
    if file is None:
        known = ", ".join(sorted(stem for stem in files if "-" not in stem))
        raise FileNotFoundError(f"no {name}: it is FAMILY-context.yaml or FAMILY-MODEL.yaml, and FAMILY one of {known}")
    d = YAML.load(file)
    rows, head, strides = d["backbone"], d["head"], []
    sources, *last = head[-1]
    context = re.fullmatch(r"context(\d*)", model)
    if last[1] == "Classify" and not context:
        deepest = len(features(model, device="meta").feature_info.reduction()) - 1
        d["backbone"] = [[-1, 1, "ContainerBackbone", [model, pretrained]], [0, 1, "ContainerLevel", [deepest]]]
    elif not isinstance(sources, list):
        raise ValueError(f"{file.name} ends in {last[1]}, which reads no list of maps")
    elif context:
        end = len(rows + head) - 1
        layers = [[i % end, 1, "ContextAggregation", [2, int(context[1] or 1)]] for i in sources]
        head[-1:] = [*layers, [list(range(end, end + len(sources))), *last]]
    elif any(row[0] != -1 for row in rows):
        raise ValueError(
            f"{file.name} has a backbone that is not a plain chain of layers, so another cannot replace it"
        )
    else:
        levels = features(model, device="meta").feature_info.reduction()
        with torch.device("meta"):
            layers, read = tasks.parse_model(dict(d, scale=next(iter(d.get("scales", [""])))), 3, verbose=False)
            x = torch.zeros(1, 3, 256, 256)
        for layer in layers[: len(rows)]:
            x = layer(x)
            strides.append(256 // x.shape[-1])
        tail = min(strides.index(strides[-1]) + 2, len(rows))  # after the last downsampling row and its block
        used = sorted({strides[-1], *(strides[i] for i in read if i < tail)})
        if not {*used} <= {*levels}:
            raise ValueError(f"{model} has maps at strides {levels}, and the head of {file.name} reads {used}")
        moved = {i: 1 + (used.index(strides[i]) if i < tail else len(used) + i - tail) for i in read}
        for row in head:
            row[0] = [moved.get(i, i) for i in row[0]] if isinstance(row[0], list) else moved.get(row[0], row[0])
        chosen = [[0, 1, "ContainerLevel", [levels.index(stride)]] for stride in used]
        d["backbone"] = [[-1, 1, "ContainerBackbone", [model, pretrained]], *chosen, *rows[tail:]]
    atexit.register((folder := tempfile.TemporaryDirectory(prefix="container-")).cleanup)
    YAML.save(path := f"{folder.name}/{family}-{model}.yaml", d)
    return path
