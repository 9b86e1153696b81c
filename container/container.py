"""CONTAINER: Context Aggregation Network.

Paper: Gao, Lu, Li, Mottaghi, Kembhavi, "Container: Context Aggregation Network", NeurIPS 2021, arXiv 2106.01401.
Released code (one model, CONTAINER-LIGHT): https://github.com/allenai/container, MIT licence file.

Written from the paper's formulas and the layout of the released weights; no code is taken from the release.
"""

import os
import re
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Type, TypeVar, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    LayerNorm2d,
    calculate_drop_path_rates,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
    to_2tuple,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    clean_state_dict,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from .affinity import Affinity, DepthwiseConv, DoubleAttention, GlobalContext, SelfAttention, TokenMatrix
from .aggregation import Aggregation, Block, ConvexGate, FreeGate

__all__ = ["Container"]

T = TypeVar("T")
PerStage = Union[T, Sequence[T]]

# "none" instead of None, because timm.create_model drops arguments that are None.
_AFFINITIES = {"dynamic": ("none", "attention", "context", "double"), "static": ("none", "conv", "matrix")}
_GATES: Dict[str, Optional[Type[nn.Module]]] = {"convex": ConvexGate, "free": FreeGate, "sum": None}


class PatchEmbed(nn.Module):
    """Patch embedding that downsamples: convolution with kernel = stride, then LayerNorm over channels.

    (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))

    Source: released code only.
    Note: the release accepts one image size. Here, a feature map that the patches do not tile is padded with zeros at
    its right and bottom. No pixel is lost, and the grid is that of any strided convolution with padding. A stride
    smaller than the patch (`output_stride`) pads in the same way.

    Args:
        in_chs: Channels C.
        dim: Channels C'.
        patch_size: Side of a patch, in positions of the feature map.
        stride: Distance between patches.
        dilation: Dilation of the convolution.
    """

    def __init__(
        self,
        in_chs: int,
        dim: int,
        patch_size: int,
        stride: int,
        dilation: int = 1,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.reach = dilation * (patch_size - 1)
        self.proj = nn.Conv2d(in_chs, dim, patch_size, stride, dilation=dilation, device=device, dtype=dtype)
        self.norm = LayerNorm2d(dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds patches: (B, C, H, W) -> (B, C', H', W')."""
        # Always pad by the reach of a patch beyond its first position; the convolution ignores padding that it does not
        # need. A padding computed from the image size would be fixed by fx and torch.export.
        return self.norm(self.proj(F.pad(x, (0, self.reach, 0, self.reach))))


class Stage(nn.Module):
    """Stage of the network: downsampling, then blocks at one resolution.

    (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))

    The first stage does not downsample, because the network's stem does.

    Args:
        downsample: The patch embedding, or the identity.
        blocks: The residual blocks.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the stage: (B, C, H, W) -> (B, C', H', W')."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


def _per_stage(name: str, value: PerStage[T], num_stages: int) -> List[T]:
    """Returns one value per stage; a single value, such as a string, is repeated for all stages.

    Raises:
        ValueError: `value` is a sequence of the wrong length.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * num_stages  # type: ignore[list-item]
    if len(value) != num_stages:
        raise ValueError(f"{name} has {len(value)} entries for {num_stages} stages: {tuple(value)}")
    return list(value)


def _create_affinity(
    role: str,
    name: str,
    dim: int,
    num_heads: int,
    grid: Tuple[int, int],
    rank: int,
    dilation: int,
    attn_drop: float,
    dd: Dict[str, Any],
) -> Optional[Affinity]:
    """Creates the affinity of the given name, or returns None for 'none'.

    Each affinity uses only the settings of the stage that it needs.

    Raises:
        ValueError: There is no dynamic (or static) affinity of that name.
    """
    if name not in _AFFINITIES[role]:
        raise ValueError(f"unknown {role} affinity {name!r}: choose from {', '.join(_AFFINITIES[role])}")
    if name == "none":
        return None
    if name == "attention":
        return SelfAttention(dim, num_heads, attn_drop=attn_drop, **dd)
    if name == "context":
        return GlobalContext(dim, **dd)
    if name == "double":
        return DoubleAttention(dim, max(1, dim // 4), **dd)  # the rank of A^2-Nets
    if name == "conv":
        return DepthwiseConv(dim, dilation=dilation, **dd)
    return TokenMatrix(dim, num_heads, grid, rank or None, **dd)


class Container(nn.Module):
    """CONTAINER network: a stem, stages of residual blocks, a final norm, and a pooled linear head.

    Every block computes Y = (alpha A(X) + beta A) V W + X (`container.aggregation.Aggregation`). A member of the family
    chooses A(X) (`dynamic`) and A (`static`) for each stage.

    Any image size works, square or not, odd or even, unless a stage has a `TokenMatrix`, which is tied to `img_size`
    (see `set_input_size`). At 32 x 32 pixels and below, the last stage has a single token.

    Source: paper (the aggregation); everything around it (stem, norms, `pos_conv`, head) from the released code.
    Note: the release also applies dropout after the stem. Here, `drop_rate` acts before the classifier, as in timm.

    Args:
        in_chans: Number of image channels.
        num_classes: Number of classes; 0 for no classifier.
        global_pool: 'avg', 'max', 'avgmax', 'catavgmax', or '' for none.
        output_stride: 8, 16 or 32; beyond it, patch embeddings have stride 1 and later convolutions are dilated.
        img_size: Image size, as one side or (H, W), that token matrices are tied to; other affinities ignore it.
        depths: Number of blocks per stage.
        embed_dims: Channels per stage.
        patch_sizes: Downsampling factor per stage; the first is that of the stem.
        mlp_ratios: Hidden width of the MLP as a multiple of `embed_dims`, per stage.
        dynamic: 'attention', 'context', 'double' or 'none', per stage.
        static: 'conv' (5x5), 'matrix' or 'none', per stage.
        gate: How alpha and beta are computed if a stage has both affinities: 'convex' (released), 'free' (paper), or
            'sum' for alpha = beta = 1.
        num_heads: Heads of attention and token matrices, per stage.
        ranks: Rank of token matrices, per stage; 0 for dense matrices.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after aggregation and in the MLP.
        attn_drop_rate: Dropout on the attention weights.
        drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 over the blocks.
        norm_layer: Norm in the blocks and before the head: a class, a partial, or a timm name.
        act_layer: Activation of the MLP: a class, a partial, or a timm name.

    Raises:
        ValueError: A per-stage argument has the wrong length, an affinity or gate is unknown, `output_stride` is not 8,
            16 or 32, or the number of heads does not divide the channels.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        img_size: Union[int, Tuple[int, int]] = 224,
        depths: Sequence[int] = (3, 4, 8, 3),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        mlp_ratios: PerStage[float] = 4.0,
        dynamic: PerStage[str] = ("none", "none", "none", "attention"),
        static: PerStage[str] = "conv",
        gate: str = "convex",
        num_heads: PerStage[int] = (2, 4, 10, 16),
        ranks: PerStage[int] = 0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Union[str, Callable] = "batchnorm2d",
        act_layer: Union[str, Callable] = "gelu",
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd: Dict[str, Any] = {"device": device, "dtype": dtype}
        n = len(depths)
        embed_dims, patch_sizes = _per_stage("embed_dims", embed_dims, n), _per_stage("patch_sizes", patch_sizes, n)
        mlp_ratios, num_heads = _per_stage("mlp_ratios", mlp_ratios, n), _per_stage("num_heads", num_heads, n)
        dynamic, static = _per_stage("dynamic", dynamic, n), _per_stage("static", static, n)
        ranks = _per_stage("ranks", ranks, n)
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride {output_stride} is not 8, 16 or 32")
        if gate not in _GATES:
            raise ValueError(f"unknown gate {gate!r}: choose from {', '.join(_GATES)}")
        norm, act = get_norm_layer(norm_layer), get_act_layer(act_layer)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        self.num_classes = num_classes
        self.in_chans = in_chans

        self.stem = PatchEmbed(in_chans, embed_dims[0], patch_sizes[0], patch_sizes[0], **dd)
        strides, reduction, dilation = [patch_sizes[0]], patch_sizes[0], 1
        stages: List[nn.Module] = []
        feature_info: List[Dict[str, Any]] = []
        for i, dim in enumerate(embed_dims):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                # Beyond output_stride, the patch embedding keeps its kernel but has stride 1, and later convolutions
                # are dilated instead. If only convolutions mix tokens, every dilation-th position of the feature map
                # equals the feature map of the strided network.
                stride = patch_sizes[i] if reduction * patch_sizes[i] <= output_stride else 1
                downsample = PatchEmbed(embed_dims[i - 1], dim, patch_sizes[i], stride, dilation, **dd)
                dilation *= patch_sizes[i] // stride
                reduction *= stride
                strides.append(stride)

            create_affinity = partial(
                _create_affinity,
                dim=dim,
                num_heads=num_heads[i],
                grid=_grid(img_size, strides),
                rank=ranks[i],
                dilation=dilation,
                attn_drop=attn_drop_rate,
                dd=dd,
            )
            create_gate = _GATES[gate] if "none" not in (dynamic[i], static[i]) else None
            blocks = [
                Block(
                    dim,
                    Aggregation(
                        dim,
                        dynamic=create_affinity("dynamic", dynamic[i]),
                        static=create_affinity("static", static[i]),
                        gate=create_gate(**dd) if create_gate is not None else None,
                        proj_drop=proj_drop_rate,
                        **dd,
                    ),
                    mlp_ratio=mlp_ratios[i],
                    dilation=dilation,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_paths[i][j],
                    norm_layer=norm,
                    act_layer=act,
                    **dd,
                )
                for j in range(depths[i])
            ]
            stages.append(Stage(downsample, blocks))
            feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.feature_info = feature_info
        self.strides = strides
        self.stages = nn.Sequential(*stages)
        self.num_features = embed_dims[-1]
        self.norm = norm(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises the weights: truncated normal (std 0.02) for the classifier, each layer's own default elsewhere.

        Source: released code, which keeps PyTorch's default for convolutions and zeroes nothing.

        Args:
            needs_reset: Whether to reset every other layer too, as required after `to_empty()`.
        """
        if needs_reset:
            for module in self.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]
        if isinstance(self.head.fc, nn.Linear):
            trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Returns an empty set: no parameters are exempt from weight decay, except those that timm exempts itself.

        timm exempts all one-dimensional parameters: norms, biases and gates.

        Source: released code. It tries to exempt `pos_conv`, but by a name that matches no parameter. The published
        weights were therefore trained with weight decay on every kernel, and so are ours.
        """
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Returns the patterns that group parameters for layer-wise decay: per stage if coarse, else per block."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=[(r"^stages\.(\d+)", None), (r"^norm", (99999,))] if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enables gradient checkpointing: each block is recomputed in the backward pass to save memory.

        Batch norms then see every batch twice and update their running statistics twice, as in every timm model.
        Gradients do not change. Frozen norms are unaffected.
        """
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Resamples every `TokenMatrix` to the grid of another image size; other affinities need no change.

        Args:
            img_size: The new image size, as one side or (H, W).
        """
        for i, stage in enumerate(self.stages):
            for module in stage.modules():
                if isinstance(module, TokenMatrix):
                    module.set_input_size(_grid(img_size, self.strides[: i + 1]))
        update_model_input_size(self, img_size)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Returns the linear layer, or the identity if `num_classes` is 0."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replaces the classifier.

        Args:
            num_classes: Number of classes; 0 for no classifier.
            global_pool: New pooling, '' for none; None keeps the current pooling.
        """
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Runs a forward pass that also returns the feature maps at the ends of stages.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages to return: the last n if an int, the given indices if a sequence, all stages if None.
            norm: Whether to apply the final norm to the last stage's feature map; the others are never normalised.
            stop_early: Whether to stop after the last requested stage. Its feature map is then the final one.
            output_fmt: 'NCHW', the only format.
            intermediates_only: Whether to leave out the final feature map.

        Returns:
            The feature maps, or (final feature map, feature maps).
        """
        assert output_fmt in ("NCHW",), "Output format must be NCHW."
        intermediates = []
        last = len(self.stages) - 1
        take_indices, max_index = feature_take_indices(len(self.stages), indices)

        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        feat_idx = 0
        for feat_idx, stage in enumerate(stages):
            x = stage(x)
            if feat_idx in take_indices:
                if norm and feat_idx == last:
                    intermediates.append(self.norm(x))
                else:
                    intermediates.append(x)

        if intermediates_only:
            return intermediates
        if feat_idx == last:
            x = self.norm(x)
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Removes the layers that the requested stages do not need.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Whether to remove the final norm. It is always removed along with the last stage.
            prune_head: Whether to remove pooling and classifier. They are always removed along with the last stage.

        Returns:
            The indices of the requested stages.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Computes the normalised feature map of the last stage: (B, in_chans, H, W) -> (B, num_features, H', W')."""
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Computes logits (B, num_classes), or pooled features (B, head_hidden_size), from the last feature map."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Computes logits: (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _grid(img_size: Union[int, Tuple[int, int]], strides: Sequence[int]) -> Tuple[int, int]:
    """Returns (H, W) of the feature map after the given strides, each rounding up as in `PatchEmbed`."""
    height, width = to_2tuple(img_size)
    for stride in strides:
        height, width = -(-height // stride), -(-width // stride)
    return height, width


# Names in the released checkpoint -> ours. The release numbers stages in its names (`patch_embed1`, `blocks4`). `attn`
# is the convolution of a static block, and `conv` is that of a mixed block. The `conv1` of a mixed block holds Q, K and
# V in one projection.
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
    """Returns whether a state dict is in the layout of the authors' release."""
    return any(key.startswith("patch_embed1.") for key in state_dict)


def from_released(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Converts a state dict of the released CONTAINER-LIGHT to our layout.

    Args:
        state_dict: The weights under `model` in the released file.

    Returns:
        The same tensors under our names. The joint Q, K, V projection of mixed blocks is split in two: Q and K, and V.

    Raises:
        ValueError: The state dict is not in the released layout. Unknown keys are kept, and the model rejects them.
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


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Tensor]:
    """Adapts a checkpoint to a model, or rejects it before anything is loaded.

    Both our layout and the released one are accepted, at the top level or under `state_dict` / `model`. Any number of
    image channels works, because timm adapts them. Token matrices are resampled to the model's grids. The classifier is
    kept if its width fits. Otherwise it is dropped, but only if the model was created with a number of classes other
    than that of its pretrained cfg.

    Args:
        state_dict: The checkpoint.
        model: The model to load it into.

    Returns:
        A state dict with the model's names and shapes, except for the first convolution and a dropped classifier.

    Raises:
        ValueError: Keys are missing or unexpected, or shapes differ.
    """
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    state_dict = clean_state_dict(state_dict)  # removes the prefixes of DDP and torch.compile
    if is_released(state_dict):
        state_dict = from_released(state_dict)

    for name, module in model.named_modules():
        left, right = f"{name}.left", f"{name}.right"
        if not isinstance(module, TokenMatrix) or left not in state_dict:
            continue
        whole = (right in state_dict) == (module.right is not None)  # otherwise it does not fit and is rejected below
        if whole and state_dict[left].ndim == 4 and state_dict[left].shape[1:3] != module.left.shape[1:3]:
            resampled = module.resample(state_dict[left], state_dict.get(right), module.grid)
            state_dict = {
                **state_dict,
                **{k: t for k, t in zip((left, right), resampled, strict=True) if t is not None},
            }

    own, cfg = model.state_dict(), getattr(model, "pretrained_cfg", {})
    head: Tuple[str, ...] = ("head.fc.weight", "head.fc.bias")
    if head[0] in state_dict and state_dict[head[0]].shape[:1] == (model.num_classes,):
        cfg["num_classes"] = model.num_classes  # as in the file: timm drops a classifier that differs from the cfg
    if model.num_classes == cfg.get("num_classes", model.num_classes):
        head = ()  # the classifier must be present and fit

    def shape(key: str, tensor: Tensor) -> Tuple[int, ...]:
        return tuple(tensor.shape[i] for i in range(tensor.ndim) if key != "stem.proj.weight" or i != 1)

    problems = {
        # Frozen norms are saved without `num_batches_tracked`, which torch fills in.
        "missing": [k for k in own if not (k in state_dict or k in head or k.endswith(".num_batches_tracked"))],
        "unexpected": [k for k in state_dict if not (k in own or k in head)],
        "of another shape": [
            f"{k} {tuple(state_dict[k].shape)} for {tuple(own[k].shape)}"
            for k in own
            if k in state_dict and k not in head and shape(k, state_dict[k]) != shape(k, own[k])
        ],
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(keys)} {problem} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})"
            for problem, keys in problems.items()
            if keys
        )
        raise ValueError(f"checkpoint does not fit {cfg.get('architecture', type(model).__name__)}: {found}")
    return state_dict


# Hook that `pretrained=True` calls before timm: (variant, arguments) -> arguments. `container.weights` installs its
# verification of files here. Without it, this file is an ordinary timm model file.
provide: Optional[Callable[[str, Dict[str, Any]], Dict[str, Any]]] = None


def _create_container(variant: str, pretrained: bool = False, **kwargs: Any) -> Container:
    if pretrained and provide is not None:
        kwargs = provide(variant, kwargs)
    if kwargs.get("features_only"):
        kwargs.setdefault("num_classes", 0)  # features need no classifier, so a checkpoint's may have any width
    model = build_model_with_cfg(
        Container,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore # otherwise the model would hold its weights twice
    if pretrained:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor._is_hf_initialized = True  # type: ignore # or transformers' from_pretrained would reset batch norms
    else:
        model.pretrained_cfg["label_names"] = ()  # type: ignore # random weights have no classes with names
    return model


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "fixed_input_size": False,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2106.01401",
        "paper_name": "Container: Context Aggregation Network",
        **kwargs,
    }


def _file(name: str, folder: str = "pretrained") -> str:
    return os.path.join(os.path.dirname(__file__), folder, f"{name}.safetensors")


_PHOTOS: Dict[str, Any] = dict(input_size=(3, 128, 128), pool_size=(4, 4), crop_pct=0.95)


def _distilled(name: str, folder: str = "pretrained") -> Dict[str, Any]:
    """Returns the cfg of weights distilled from EfficientNet-Lite2 on photos at 128 pixels."""
    return _cfg(file=_file(name, folder), license="other", **_PHOTOS)


default_cfgs = generate_default_cfgs(
    {
        "container_light.lite2_dist": _distilled("container_light.lite2_dist", "../weights"),  # too large for a wheel
        # The star, and its position after the entry above, make this the default, with 224 pixels. It has no url,
        # because the authors' file is on a share, without a hash. `container weights fetch` downloads and pins it.
        "container_light.ai2_in1k*": _cfg(origin_url="https://github.com/allenai/container", license="unknown"),
        "container_light_mlp4.untrained": _cfg(),
        "container_light_nano.lite2_dist": _distilled("container_light_nano.lite2_dist"),
        "container_light_nano.trashnet": _cfg(
            file=_file("container_light_nano.trashnet"),
            num_classes=6,
            label_names=("cardboard", "glass", "metal", "paper", "plastic", "trash"),
            **_PHOTOS,
        ),
        "container_light_tiny.lite2_dist": _distilled("container_light_tiny.lite2_dist"),
        "container_light_base.untrained": _cfg(),
        "container_light_nano_32.cifar10": _cfg(
            file=_file("container_light_nano_32.cifar10"),
            num_classes=10,
            label_names=(
                *("airplane", "automobile", "bird", "cat", "deer"),
                *("dog", "frog", "horse", "ship", "truck"),
            ),
            input_size=(3, 32, 32),
            pool_size=(4, 4),
            crop_pct=1.0,
        ),
        "container.untrained": _cfg(),
        "container_nano.lite2_dist": _distilled("container_nano.lite2_dist"),
        "container_pam.untrained": _cfg(fixed_input_size=True),
        "container_attention.untrained": _cfg(),
        "container_conv.untrained": _cfg(),
        "container_mixer.untrained": _cfg(fixed_input_size=True),
        "container_mixer_mh.untrained": _cfg(fixed_input_size=True),
    }
)

# A dense token matrix per head on 56 x 56 or 28 x 28 tokens would have more parameters than the rest of the network.
_RANKS = (16, 16, 0, 0)

# The family's scaling rule. The width w multiplies the channels 64/128/320/512, rounded to multiples of 8. Depths stay
# 3/4/8/3. Tiny has w = 9/16 and base has w = 25/16, both with head dimension 32. Nano has w = 1/4, fewer blocks, and
# head dimension 16, because 32 is more than the 16 channels of its first stage.
_NANO = dict(depths=(2, 3, 6, 2), embed_dims=(16, 32, 80, 128), num_heads=(1, 2, 5, 8))


@register_model
def container_light(pretrained: bool = False, **kwargs: Any) -> Container:
    """CONTAINER-LIGHT as released: static 5x5 convolution everywhere, attention mixed in in stage 4.

    Known from the release: this configuration, 20,633,643 parameters, and 82.3 % ImageNet-1k top-1 accuracy in the
    authors' README. The paper's numbers match a smaller configuration, `container_light_mlp4`.
    """
    model_args = dict(mlp_ratios=(8, 8, 4, 4))
    return _create_container("container_light", pretrained, **dict(model_args, **kwargs))


@register_model
def container_light_mlp4(pretrained: bool = False, **kwargs: Any) -> Container:
    """CONTAINER-LIGHT with MLP ratio 4 in every stage. Reconstruction.

    It matches the "20M, 82.0" of the authors' first README and the paper's 20M parameters; the release differs.
    """
    return _create_container("container_light_mlp4", pretrained, **kwargs)


@register_model
def container_light_nano(pretrained: bool = False, **kwargs: Any) -> Container:
    """CONTAINER-LIGHT at about 1 M parameters. Ours: width 1/4, depths 2/3/6/2."""
    return _create_container("container_light_nano", pretrained, **dict(_NANO, **kwargs))


@register_model
def container_light_nano_32(pretrained: bool = False, **kwargs: Any) -> Container:
    """`container_light_nano` for 32 x 32 images. Ours: a stem of stride 1, so the grids are 32, 16, 8 and 4."""
    model_args = dict(_NANO, patch_sizes=(1, 2, 2, 2))
    return _create_container("container_light_nano_32", pretrained, **dict(model_args, **kwargs))


@register_model
def container_light_tiny(pretrained: bool = False, **kwargs: Any) -> Container:
    """CONTAINER-LIGHT at 6-7 M parameters. Ours: width 9/16."""
    model_args = dict(embed_dims=(40, 72, 184, 288), num_heads=9)
    return _create_container("container_light_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def container_light_base(pretrained: bool = False, **kwargs: Any) -> Container:
    """CONTAINER-LIGHT at about 50 M parameters. Ours: width 25/16."""
    model_args = dict(embed_dims=(104, 200, 504, 800), num_heads=25)
    return _create_container("container_light_base", pretrained, **dict(model_args, **kwargs))


@register_model
def container(pretrained: bool = False, **kwargs: Any) -> Container:
    """CONTAINER: attention and 5x5 convolution mixed in every stage, gated by free alpha and beta. Reconstruction.

    `container_light_mlp4` with attention of head dimension 32 in every stage matches the paper's 22M parameters. Its
    code was never released.
    """
    model_args = dict(dynamic="attention", gate="free")
    return _create_container("container", pretrained, **dict(model_args, **kwargs))


@register_model
def container_nano(pretrained: bool = False, **kwargs: Any) -> Container:
    """CONTAINER at about 1 M parameters. Ours: `container_light_nano` with attention in every stage."""
    model_args = dict(_NANO, dynamic="attention", gate="free")
    return _create_container("container_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def container_pam(pretrained: bool = False, **kwargs: Any) -> Container:
    """CONTAINER-PAM: a matrix per head added to attention after the softmax, alpha = beta = 1. Reconstruction.

    The paper's listing modifies DeiT; this makes the same change to `container`. The model is tied to its image size.
    """
    model_args = dict(dynamic="attention", static="matrix", gate="sum", ranks=_RANKS)
    return _create_container("container_pam", pretrained, **dict(model_args, **kwargs))


@register_model
def container_attention(pretrained: bool = False, **kwargs: Any) -> Container:
    """The base architecture with self-attention alone. Reconstruction of the paper's comparison."""
    model_args = dict(dynamic="attention", static="none")
    return _create_container("container_attention", pretrained, **dict(model_args, **kwargs))


@register_model
def container_conv(pretrained: bool = False, **kwargs: Any) -> Container:
    """The base architecture with 5x5 depthwise convolution alone. Reconstruction of the paper's comparison."""
    model_args = dict(dynamic="none")
    return _create_container("container_conv", pretrained, **dict(model_args, **kwargs))


@register_model
def container_mixer(pretrained: bool = False, **kwargs: Any) -> Container:
    """The base architecture with one token matrix per block. Reconstruction; tied to its image size."""
    model_args = dict(dynamic="none", static="matrix", num_heads=1, ranks=_RANKS)
    return _create_container("container_mixer", pretrained, **dict(model_args, **kwargs))


@register_model
def container_mixer_mh(pretrained: bool = False, **kwargs: Any) -> Container:
    """The base architecture with a token matrix per head. Reconstruction; tied to its image size."""
    model_args = dict(dynamic="none", static="matrix", ranks=_RANKS)
    return _create_container("container_mixer_mh", pretrained, **dict(model_args, **kwargs))
