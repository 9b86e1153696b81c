"""The context layer and CONTAINER backbones for Ultralytics YOLO, by name in a model's YAML file.

    import container.yolo
    from ultralytics import YOLO

    container.yolo.register()
    model = YOLO(container.yolo.config("yolov8n-context.yaml"))

Ultralytics is under the AGPL-3.0: it is imported by `register`, and by nothing else here.
"""

import copy
import re
from pathlib import Path
from typing import Any, Dict, List

import timm
from torch import Tensor, nn

from .affinity import GlobalContext

__all__ = ["ContainerBackbone", "ContextAggregation", "config", "register"]

_CONFIGS = Path(__file__).parent / "cfg"


class ContextAggregation(nn.Module):
    """Adds to every position what it wants of one summary of the whole map.

    y_i = x_i + a_i m(sum_j k_j v_j), with a the sigmoid of a 1x1 map, k the softmax over all positions of another, v
    and m 1x1 projections. m starts at zero, so the layer begins as the identity. It is `GlobalContext`, the affinity
    of rank one, with m applied to the summary, where it costs next to nothing.

    (B, C, H, W) -> (B, C, H, W), any H and W, in training also for a batch of one: there is no norm in it.

    Source: Liu et al., "Learning to Aggregate Multi-Scale Context for Instance Segmentation in Remote Sensing Images"
    (arXiv 2111.11057, CATNet), written from the formula. The CONTAINER paper has no such layer; the names are alike.
    Cost: O(N C^2 / reduction).

    In a YAML file, after `register`: `[-1, 1, ContextAggregation, [reduction]]`.

    Args:
        in_channels: Channels C.
        reduction: v has C / reduction channels, rounded down.

    Raises:
        ValueError: `reduction` is not between 1 and `in_channels`.
    """

    def __init__(self, in_channels: int, reduction: int = 1) -> None:
        super().__init__()
        if not 1 <= reduction <= in_channels:
            raise ValueError(f"reduction {reduction} is not in 1 to {in_channels}, the channels")
        self.affinity = GlobalContext(in_channels)
        self.v = nn.Conv2d(in_channels, in_channels // reduction, 1)
        self.m = nn.Conv2d(in_channels // reduction, in_channels, 1)
        nn.init.zeros_(self.m.weight)
        nn.init.zeros_(self.m.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.affinity.query(x).sigmoid() * self.m(self.affinity.context(x, self.v(x)))


class ContainerBackbone(nn.Module):
    """A timm model's feature maps, for the first row of a YAML file: `[-1, 1, ContainerBackbone, [NAME, PRETRAINED]]`.

    Image (B, 3, H, W) -> maps, the finest first. The rows after it take one each, by
    `[0, 1, ContainerLevel, [INDEX]]`, whose channels are then known to the rows that follow.

    Args:
        name: timm's name of the model.
        pretrained: Start from its pretrained weights.
    """

    def __init__(self, name: str, pretrained: bool = False) -> None:
        super().__init__()
        self.body = timm.create_model(name, pretrained=pretrained, features_only=True)

    def forward(self, x: Tensor) -> List[Tensor]:
        """(B, 3, H, W) -> maps."""
        return self.body(x)


class _ContextRow(ContextAggregation):
    """What makes the layer of a row, given the channels of all rows before it and the one that it reads."""

    __qualname__ = "ContextAggregation"  # what Ultralytics prints

    def __new__(cls, channels: List[int], source: int, reduction: int = 1) -> ContextAggregation:  # type: ignore[misc]
        return ContextAggregation(channels[source], reduction)


def register() -> None:
    """Makes `ContextAggregation`, `ContainerBackbone` and `ContainerLevel` known to Ultralytics' YAML files.

    Doing it again changes nothing. A saved .pt needs no registration to be loaded, only this package.

    Raises:
        ImportError: Ultralytics is not installed.
    """
    try:
        from ultralytics.nn import tasks
    except ImportError:
        raise ImportError("this needs Ultralytics (AGPL-3.0): pip install ultralytics") from None
    if getattr(tasks.parse_model, "knows_container", False):
        return
    parse_model = tasks.parse_model

    def parse(d: Dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return parse_model(_rewritten(d), *args, **kwargs)

    parse.knows_container = True  # type: ignore[attr-defined]
    tasks.parse_model = parse
    vars(tasks).update(_ContextRow=_ContextRow, ContainerBackbone=ContainerBackbone)


def _rewritten(d: Dict[str, Any]) -> Dict[str, Any]:
    """Our rows in words that Ultralytics' parser has.

    It passes the arguments of a layer that it does not know as they are, but for strings that name one of its own
    variables: `ch`, the channels of all rows before, and `f`, the row that this one reads. And it has `Index`, for one
    of several maps, which wants to be told its channels.
    """
    d, channels = copy.deepcopy(d), []
    for row in d["backbone"] + d["head"]:
        source, _, module, args = row
        if module == "ContextAggregation":
            row[2:] = ["_ContextRow", ["ch", "f", *args]]
        elif module == "ContainerBackbone":
            model: Any = timm.create_model(args[0], features_only=True, device="meta")
            channels = model.feature_info.channels()
        elif module == "ContainerLevel":
            if not channels or source != 0:
                raise ValueError(f"ContainerLevel reads row {source}, but only a ContainerBackbone in row 0 has levels")
            if not 0 <= args[0] < len(channels):
                raise ValueError(f"ContainerLevel {args[0]} is not in 0 to {len(channels) - 1}")
            row[2:] = ["Index", [channels[args[0]], args[0]]]
    return d


def config(name: str) -> str:
    """The path of a YAML file that comes with the package, for `ultralytics.YOLO`.

    Args:
        name: `yolov8-context.yaml` (YOLOv8 with `ContextAggregation` before each detection head) or
            `yolov8-container_light.yaml` (CONTAINER-LIGHT as its backbone); a letter after the 8, as in
            `yolov8s-context.yaml`, sets the scale, as Ultralytics has it.

    Raises:
        FileNotFoundError: There is no such file.
    """
    file = re.sub(r"^(yolov8)[nsmlx]-", r"\1-", name)
    if not (_CONFIGS / file).is_file():
        raise FileNotFoundError(f"no {name}: choose from {', '.join(sorted(p.name for p in _CONFIGS.glob('*.yaml')))}")
    return str(_CONFIGS / name)
