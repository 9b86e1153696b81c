"""timm backbones for torchvision's detectors: feature pyramids, RetinaNet, Mask R-CNN.

Source: the paper uses CONTAINER-LIGHT in both detectors, with a feature pyramid network (FPN). Its detection code was
never released, so these are torchvision's components with the usual settings.
"""

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import timm
import torch
from timm.layers import create_norm
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

__all__ = ["FeaturePyramid", "feature_pyramid", "mask_rcnn", "retinanet"]


class FeaturePyramid(nn.Module):
    """timm backbone, created with `features_only=True`, with torchvision's FPN on its last `levels` feature maps.

    Images (B, 3, H, W) -> feature maps by name, finest first. Each is (B, out_channels, ceil(H / r), ceil(W / r)) for
    its r in `reduction`; backbones of other families may round down. All feature maps are used if `levels` is None.

    The other arguments and the errors are those of `feature_pyramid`. If levels are frozen, `body` must return the last
    frozen one.

    Source: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, by torchvision.

    Attributes:
        out_channels: Channels of every feature map, read by torchvision's detectors.
        reduction: Stride of each feature map, in pixels.
    """

    def __init__(
        self, body: nn.Module, out_channels: int, coarser: int = 0, frozen_stages: int = 0, levels: int | None = None
    ) -> None:
        super().__init__()
        if coarser not in (0, 1, 2):
            raise ValueError(f"coarser {coarser} is not 0, 1 or 2")
        extra = (None, LastLevelMaxPool(), LastLevelP6P7(out_channels, out_channels))[coarser]
        info: Any = body.feature_info
        self.levels = levels or len(info.out_indices)
        reduction = info.reduction()[-self.levels :]
        if reduction != sorted(set(reduction)):
            raise ValueError(f"strides {reduction} do not make a pyramid: each map must be coarser than the one before")
        self.body = body
        self.fpn = FeaturePyramidNetwork(info.channels()[-self.levels :], out_channels, extra)
        self.out_channels = out_channels
        self.reduction = [*reduction, *(reduction[-1] * 2**i for i in range(1, coarser + 1))]
        self.frozen = _freeze(body, frozen_stages)
        self.train()

    def train(self, mode: bool = True) -> "FeaturePyramid":
        """Sets the training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            self.body.get_submodule(name).eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Computes feature maps by name from images (B, 3, H, W)."""
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(maps(self.body, x)[-self.levels :])))


def maps(body: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the feature maps of a timm model as (B, C, H, W), even if its own layout is NHWC."""
    return [m.permute(0, 3, 1, 2) if getattr(body, "output_fmt", None) == "NHWC" else m for m in body(x)]


def _freeze(body: nn.Module, frozen_stages: int) -> list[str]:
    """Freezes the parameters that a level depends on, and returns the names of their modules.

    Both are found from the autograd graph of a trial forward pass on the meta device. Module names and order are not
    sufficient, because wrappers change the names.
    """
    twin: Any = copy.deepcopy(body).to("meta", torch.float32).train()
    made: dict[nn.Module, set[Any]] = defaultdict(set)

    def note(module: nn.Module, _: Any, y: Any) -> None:
        made[module] |= {t.grad_fn for t in (y if isinstance(y, (list, tuple)) else [y]) if isinstance(t, Tensor)}

    for module in twin.modules():
        module.register_forward_hook(note)
    x = torch.zeros(2, getattr(body, "in_chans", 3), 96, 160, device="meta", requires_grad=True)
    try:
        tensors = [x, *maps(twin, x)]
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"the backbone fails at a trial of 96 x 160 pixels: {error!r}") from error
    levels = [0, *(i % len(twin.feature_info) + 1 for i in twin.feature_info.out_indices)]
    if frozen_stages not in levels:
        raise ValueError(f"frozen_stages {frozen_stages} is not in {levels}, the levels of the backbone")
    before: set[Any] = set()
    ahead: list[Any] = [tensors[levels.index(frozen_stages)].grad_fn]
    while ahead:
        if (node := ahead.pop()) not in before and node is not None:
            before.add(node)
            ahead += [n for n, _ in node.next_functions]
    reached = {node.variable for node in before if hasattr(node, "variable")}
    for p, q in zip(body.parameters(), twin.parameters(), strict=True):
        p.requires_grad_(p.requires_grad and q not in reached)
    return [name for name, module in twin.named_modules() if made[module] and made[module] <= before]


def features(name: str, **options: Any) -> Any:
    """Creates a timm model with `features_only=True`; rejects models that are tied to one image size."""
    model: Any = timm.create_model(name, features_only=True, **options)
    if model.pretrained_cfg.get("fixed_input_size"):  # its own: timm has no cfg for the name of a folder
        raise ValueError(f"{name} is tied to one image size, and detectors see many")
    return model


def feature_pyramid(
    name: str,
    pretrained: bool = False,
    levels: int = 4,
    coarser: int = 1,
    out_channels: int = 256,
    norm: str | None = None,
    frozen_stages: int = 0,
    drop_path_rate: float = 0.0,
    grad_checkpointing: bool = False,
) -> FeaturePyramid:
    """Creates a feature pyramid on any timm model that accepts images of any size.

    Args:
        name: Model name, as in `timm.create_model`.
        pretrained: Whether to load pre-trained weights.
        levels: Number of feature maps, counted from the coarsest: 4 for strides 4 to 32, 3 for strides 8 to 32.
        coarser: Number of additional, coarser feature maps: 1 by pooling (Mask R-CNN), 2 by convolutions of stride 2
            (RetinaNet).
        out_channels: Channels of every feature map.
        norm: 'frozen' for batch norms with fixed statistics and scales, or a timm name such as 'groupnorm1'. None means
            'frozen' with pre-trained weights, because detectors use small batches, and the model's own norm otherwise.
        frozen_stages: Number of feature levels, counted from the image, that are not trained. They get no gradients,
            and their norms and stochastic depth stay in evaluation mode, even after `train()`.
        drop_path_rate: Stochastic depth rate of the backbone's last block.
        grad_checkpointing: Whether to recompute blocks in the backward pass, which saves most of the backbone's memory.

    Raises:
        RuntimeError: timm has no such model, or no such weights.
        ValueError: The model is tied to one image size, or an argument does not fit the model.
    """
    norms = create_norm._NORM_MAP
    if norm not in (None, "frozen", *norms):
        raise ValueError(f"norm {norm!r} is not 'frozen' or one of {', '.join(norms)}")
    depth = len(features(name, device="meta").feature_info)
    if not 1 <= levels <= depth:
        raise ValueError(f"levels {levels} is not in 1 to {depth}, the levels of {name}")
    indices = tuple(range(min(depth - levels, (frozen_stages - 1) % depth), depth))
    options = dict(pretrained=pretrained, out_indices=indices, drop_path_rate=drop_path_rate or None)  # timm drops None
    try:
        try:
            body: Any = features(name, norm_layer=None if norm == "frozen" else norm, **options)
        except (AssertionError, KeyError, TypeError):  # some timm models accept a norm only as a class
            body = features(name, norm_layer=norms.get(str(norm)), **options)
    except (AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"{name}, {levels=}, {frozen_stages=}, {norm=}, {drop_path_rate=}: {error!r}") from error
    if norm == "frozen" or (norm is None and pretrained):
        body = freeze_batch_norm_2d(body)
    if grad_checkpointing:
        getattr(body, "model", body).set_grad_checkpointing()
    return FeaturePyramid(body, out_channels, coarser, frozen_stages, levels)


def retinanet(
    name: str, num_classes: int, min_size: int = 800, max_size: int = 1333, levels: int = 3, **pyramid: Any
) -> RetinaNet:
    """Creates torchvision's RetinaNet on a timm backbone: three levels, two coarser ones, nine anchors per position.

    At stride r, anchors have aspect ratios 1:2, 1:1 and 2:1, and the areas of squares with sides of 4 r, 5 r and 6.3 r
    pixels.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017. Sizes are the usual ones on COCO.

    Args:
        name: timm name of the backbone.
        num_classes: Number of classes, labelled 0 to `num_classes` - 1.
        min_size: Short side that images are resized to, in pixels.
        max_size: Upper limit of the long side, in pixels.
        levels: Number of feature maps from the backbone.
        **pyramid: Further arguments of `feature_pyramid`. Its errors are raised here too.
    """
    backbone = feature_pyramid(name, levels=levels, coarser=2, **pyramid)
    sizes = tuple(tuple(int(4 * r * 2 ** (i / 3)) for i in range(3)) for r in backbone.reduction)
    return _detector(RetinaNet, backbone, num_classes, min_size, max_size, anchor_generator=sizes)


def mask_rcnn(name: str, num_classes: int, min_size: int = 800, max_size: int = 1333, **pyramid: Any) -> MaskRCNN:
    """Creates torchvision's Mask R-CNN on a timm backbone: four levels, one pooled level, three anchors per position.

    At stride r, anchors have aspect ratios 1:2, 1:1 and 2:1, and the area of a square with a side of 8 r pixels.

    Source: He et al., "Mask R-CNN", ICCV 2017. Arguments as in `retinanet`, but the background counts as class 0.
    """
    backbone = feature_pyramid(name, coarser=1, **pyramid)
    sizes = tuple((8 * r,) for r in backbone.reduction)
    return _detector(MaskRCNN, backbone, num_classes, min_size, max_size, rpn_anchor_generator=sizes)


def _detector(
    kind: type[Any], backbone: FeaturePyramid, num_classes: int, min_size: int, max_size: int, **sizes: Any
) -> Any:
    cfg: Any = backbone.body.pretrained_cfg
    statistics = {f"image_{key}": cfg[key] for key in ("mean", "std") if cfg.get(key)}
    anchors = {key: AnchorGenerator(value, ((0.5, 1.0, 2.0),) * len(value)) for key, value in sizes.items()}
    return kind(backbone, num_classes, min_size=min_size, max_size=max_size, **statistics, **anchors)
