"""Backbones under torchvision's detectors: feature pyramids, RetinaNet, Mask R-CNN.

Source: the paper puts CONTAINER-LIGHT under both, with a feature pyramid network (FPN); its detection code was never
released, so what follows are torchvision's parts and the field's usual settings.
"""

from collections import OrderedDict
from typing import Any, Dict, Optional, Type

import timm
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

__all__ = ["FeaturePyramid", "feature_pyramid", "mask_rcnn", "retinanet"]


class FeaturePyramid(nn.Module):
    """A timm backbone with torchvision's FPN on its maps.

    Image (B, 3, H, W) -> maps by name, the finest first, each (B, out_channels, ceil(H / r), ceil(W / r)) for its r in
    `reduction`.

    Source: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, by torchvision.

    Args:
        body: A model made with `features_only=True`.
        out_channels: Channels of every map.
        coarser: Maps beyond the body's: 1 by pooling (as Mask R-CNN has it), 2 by convolutions of stride 2 (RetinaNet).
        frozen_stages: So many of the body's feature levels, and all before them, are not trained: they get no
            gradients, and their norms and stochastic depth behave as in evaluation, also after `train()`.

    Attributes:
        out_channels: As given; torchvision's detectors read it.
        reduction: Pixels per position of each map.

    Raises:
        ValueError: `coarser` is not 0, 1 or 2, or the body has fewer levels than `frozen_stages`.
    """

    def __init__(self, body: nn.Module, out_channels: int, coarser: int = 0, frozen_stages: int = 0) -> None:
        super().__init__()
        if coarser not in (0, 1, 2):
            raise ValueError(f"coarser {coarser} is not 0, 1 or 2")
        extra = (None, LastLevelMaxPool(), LastLevelP6P7(out_channels, out_channels))[coarser]
        info: Any = body.feature_info
        if not 0 <= frozen_stages <= len(info.info):
            raise ValueError(
                f"frozen_stages {frozen_stages} is not in 0 to {len(info.info)}, the levels of the backbone"
            )
        self.body = body
        self.fpn = FeaturePyramidNetwork(info.channels(), out_channels, extra)
        self.out_channels = out_channels
        reduction = info.reduction()
        self.reduction = [*reduction, *(reduction[-1] * 2**i for i in range(1, coarser + 1))]
        children = [name for name, _ in body.named_children()]
        last = info.info[frozen_stages - 1]["module"].replace(".", "_")
        self.frozen = children[: children.index(last) + 1] if frozen_stages else []
        for name in self.frozen:
            body.get_submodule(name).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "FeaturePyramid":
        """Training mode for all but the frozen stages."""
        super().train(mode)
        for name in self.frozen:
            self.body.get_submodule(name).eval()
        return self

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """(B, 3, H, W) -> maps by name."""
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(x))))


def feature_pyramid(
    name: str,
    pretrained: bool = False,
    levels: int = 4,
    coarser: int = 1,
    out_channels: int = 256,
    norm: Optional[str] = None,
    frozen_stages: int = 0,
    drop_path_rate: float = 0.0,
    grad_checkpointing: bool = False,
) -> FeaturePyramid:
    """A feature pyramid on any timm model that has features of any image size.

    Args:
        name: timm's, as in `timm.create_model`.
        pretrained: Start from its pretrained weights.
        levels: The last so many of its maps: 4 for strides 4 to 32, 3 for 8 to 32.
        coarser: Maps beyond them, as in `FeaturePyramid`.
        out_channels: Channels of every map.
        norm: 'frozen' for batch norms with fixed statistics and scales, else a name of timm's norm layers
            ('batchnorm2d', 'groupnorm1', 'layernorm2d', ...). None means 'frozen' with pretrained weights, as batches
            of detectors are too small for statistics, and the model's own norm without.
        frozen_stages: As in `FeaturePyramid`.
        drop_path_rate: Stochastic depth of the backbone's last block.
        grad_checkpointing: Recompute blocks in the backward pass, which saves most of the backbone's memory.

    Raises:
        RuntimeError: timm has no such model, or no such weights.
        ValueError: The model is tied to an image size, or an argument does not fit it.
    """
    frozen_norm = norm == "frozen" or (norm is None and pretrained)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        raise ValueError(f"{name} is tied to one image size, and detectors see many")
    options: Dict[str, Any] = dict(norm_layer=norm) if norm not in (None, "frozen") else {}
    if drop_path_rate:
        options["drop_path_rate"] = drop_path_rate
    try:
        body: Any = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=tuple(range(-levels, 0)), **options
        )
    except (AssertionError, IndexError):
        raise ValueError(f"{name} has fewer than {levels} levels") from None
    if frozen_norm:
        body = freeze_batch_norm_2d(body)
    if grad_checkpointing:
        body.set_grad_checkpointing()
    return FeaturePyramid(body, out_channels, coarser, frozen_stages)


def retinanet(
    name: str, num_classes: int, min_size: int = 800, max_size: int = 1333, levels: int = 3, **pyramid: Any
) -> RetinaNet:
    """torchvision's RetinaNet on a backbone: three levels and two coarser ones, nine anchors at each position.

    The anchors of a level with stride r are squares, and rectangles of 1:2 and 2:1, of 4 r, 5 r and 6.3 r pixels.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017. Sizes are the usual ones on COCO; which the
    paper used is not known here.

    Args:
        name: timm's, of the backbone.
        num_classes: Classes, labelled 0 to `num_classes` - 1.
        min_size: Short side of an image in pixels, to which it is resized.
        max_size: Limit on its long side.
        levels: Of the backbone.
        **pyramid: Further arguments of `feature_pyramid`.

    Raises:
        RuntimeError: As `feature_pyramid`.
        ValueError: As `feature_pyramid`.
    """
    backbone = feature_pyramid(name, levels=levels, coarser=2, **pyramid)
    sizes = tuple(tuple(int(4 * r * 2 ** (i / 3)) for i in range(3)) for r in backbone.reduction)
    return _detector(RetinaNet, name, backbone, num_classes, min_size, max_size, anchor_generator=_anchors(sizes))


def mask_rcnn(name: str, num_classes: int, min_size: int = 800, max_size: int = 1333, **pyramid: Any) -> MaskRCNN:
    """torchvision's Mask R-CNN on a backbone: four levels and a pooled one, three anchors at each position.

    The anchors of a level with stride r are a square, and rectangles of 1:2 and 2:1, of 8 r pixels.

    Source: He et al., "Mask R-CNN", ICCV 2017. Sizes as for `retinanet`.

    Args:
        name: timm's, of the backbone.
        num_classes: Classes, the background among them, which has label 0.
        min_size: Short side of an image in pixels, to which it is resized.
        max_size: Limit on its long side.
        **pyramid: Further arguments of `feature_pyramid`.

    Raises:
        RuntimeError: As `feature_pyramid`.
        ValueError: As `feature_pyramid`.
    """
    backbone = feature_pyramid(name, coarser=1, **pyramid)
    sizes = tuple((8 * r,) for r in backbone.reduction)
    return _detector(MaskRCNN, name, backbone, num_classes, min_size, max_size, rpn_anchor_generator=_anchors(sizes))


def _anchors(sizes: Any) -> AnchorGenerator:
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


def _detector(
    kind: Type[Any], name: str, backbone: FeaturePyramid, num_classes: int, min_size: int, max_size: int, **anchors: Any
) -> Any:
    cfg = timm.get_pretrained_cfg(name)
    statistics = dict(image_mean=cfg.mean, image_std=cfg.std) if cfg is not None else {}
    return kind(backbone, num_classes, min_size=min_size, max_size=max_size, **statistics, **anchors)
