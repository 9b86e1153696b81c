"""Exact rewriting for inference: what is affine moves into the weights of the layer behind it."""

from functools import cache
from typing import Any, Optional, Tuple

import timm
import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import get_act_layer
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from torchvision.ops.misc import FrozenBatchNorm2d

from .affinity import DepthwiseConv, GlobalContext, SelfAttention, TokenMatrix
from .aggregation import Aggregation, Block
from .container import Container

__all__ = ["ConvGELU", "FusedBlock", "fuse"]


@cache
def _has_conv_gelu() -> bool:
    """Whether this build of PyTorch computes a convolution and a GELU in one kernel on the CPU, and rightly."""
    try:
        one = torch.ones(1, 1, 1, 1)
        y = torch.ops.mkldnn._convolution_pointwise(one, one, None, [0, 0], [1, 1], [1, 1], 1, "gelu", [], "none")
        return bool(torch.allclose(y, F.gelu(one)))
    except (AttributeError, RuntimeError):
        return False


def _conv_gelu(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """gelu of a 1x1 convolution, by the best way for these tensors, now."""
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
        grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.enabled
        if on_cpu and not grad and not torch.is_autocast_enabled("cpu") and _has_conv_gelu():
            return torch.ops.mkldnn._convolution_pointwise(
                x, weight, bias, [0, 0], [1, 1], [1, 1], 1, "gelu", [], "none"
            )
    return F.gelu(F.conv2d(x, weight, bias))


torch.fx.wrap("_conv_gelu")  # a symbolic tracer records the call, not the way that it takes for a tensor of no device


if hasattr(torch.ops.mkldnn, "_convolution_pointwise"):

    @register_flop_formula(torch.ops.mkldnn._convolution_pointwise)
    def _conv_gelu_flop(x: Tuple[int, ...], weight: Tuple[int, ...], *args: Any, **kwargs: Any) -> int:
        """2 C C' for every token, as PyTorch counts convolutions."""
        return 2 * x[0] * x[2] * x[3] * weight[0] * weight[1]


class ConvGELU(nn.Module):
    """A 1x1 convolution and the exact GELU behind it, on a CPU in one kernel.

    gelu(conv(x)), gelu(x) = x Phi(x) with Phi the normal distribution, (B, C, H, W) -> (B, C', H, W). The kernel is
    oneDNN's convolution with a GELU as its post-operation, which torch.compile takes as well. The map is wide, so the
    GELU by itself is bound by memory. Elsewhere (another device or type, autocast, gradients, a build of PyTorch
    without that kernel, whatever compiles, exports or traces) it is the two layers.

    Args:
        conv: The convolution, which keeps its parameters.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return _conv_gelu(x, self.conv.weight, self.conv.bias)


class FusedBlock(nn.Module):
    """`Block` in evaluation, with everything affine in the weights.

    x = pos_conv'(x);  x = x + aggregation'(x);  x = x + mlp'(x)

    - pos_conv' = 1 + pos_conv: the residual is a one in the middle of every kernel.
    - A batch norm in front of 1x1 convolutions, W (s x + t) + b = (W s) x + (W t + b), is theirs. Another norm stays.
    - The exact GELU of the MLP is its first convolution's, `ConvGELU`.
    - The gate: alpha A(X) V + beta A V = A(X) V' + A' V' with V' = alpha V and A' = (beta / alpha) A. It stays where
      alpha is 0.

    Source: algebra; the released code does none of it.

    Args:
        block: The block, in evaluation mode. Its layers are taken over and changed.

    Raises:
        ValueError: It is in training mode, where its statistics are those of a batch.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        if block.training:
            raise ValueError("a model in training mode has no fixed statistics to fuse: call eval() first")
        self.pos_conv = block.pos_conv
        middle = self.pos_conv.kernel_size[0] // 2
        self.aggregation: Aggregation = block.aggregation  # type: ignore[assignment]
        self.mlp = block.mlp
        self.eval()
        with torch.no_grad():
            self.pos_conv.weight[:, 0, middle, middle] += 1
            self.norm1 = _absorb(block.norm1, *_readers(self.aggregation))
            self.norm2 = _absorb(block.norm2, self.mlp.fc1)
            _absorb_gate(self.aggregation)
        exact = getattr(self.mlp.act, "approximate", "none") == "none"
        if isinstance(self.mlp.act, (get_act_layer("gelu"), nn.GELU)) and exact:
            self.mlp.fc1 = ConvGELU(self.mlp.fc1)  # type: ignore[assignment, arg-type]
            self.mlp.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.pos_conv(x)
        x = x + self.aggregation(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a model with every `Block` as a `FusedBlock`, and the last norm in the classifier.

    Answers are those of the model but for rounding. The weights are in `channels_last`, which the maps follow: the
    faster layout of the MLPs, the residual convolutions and the norms (docs/benchmarks.md). The last norm moves only
    where a mean over the map and a linear classifier follow; `forward_features` of the copy then gives the map in front
    of it. timm's `reparameterize_model` does the same, also to a `features_only` model, except for the layout and this
    last norm.

    Args:
        model: Any model that holds blocks, in evaluation mode.

    Raises:
        ValueError: It is in training mode.
    """
    if model.training:
        raise ValueError("a model in training mode has no fixed statistics to fuse: call eval() first")
    fused = timm.models.reparameterize_model(model)
    if isinstance(fused, Container) and fused.head.global_pool.pool_type == "avg":
        with torch.no_grad():
            fused.norm = _absorb(fused.norm, fused.head.fc)
    return fused.to(memory_format=torch.channels_last)


def _readers(aggregation: Aggregation) -> Tuple[nn.Module, ...]:
    """The 1x1 convolutions that read an aggregation's input; static affinities read V."""
    dynamic = aggregation.dynamic
    if isinstance(dynamic, SelfAttention):
        return aggregation.value, dynamic.qk
    if isinstance(dynamic, GlobalContext):
        return aggregation.value, dynamic.query, dynamic.key
    return (aggregation.value,)


def _affine(norm: nn.Module) -> Optional[Tuple[Tensor, Tensor]]:
    """(s, t) of a norm that is s x + t over channels, in double; None for another."""
    if not isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d)):
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()  # type: ignore[union-attr]
    scale = scale * norm.weight.double() if norm.weight is not None else scale
    shift = -norm.running_mean.double() * scale  # type: ignore[union-attr]
    return scale, shift + norm.bias.double() if norm.bias is not None else shift


def _absorb(norm: nn.Module, *layers: nn.Module) -> nn.Module:
    """Moves a norm into the linear layers that read it; returns what is left of it."""
    affine = _affine(norm)
    if affine is None or not all(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in layers):
        return norm
    scale, shift = affine
    for layer in layers:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        bias: Tensor = layer.bias  # type: ignore[assignment]
        matrix = weight.double().flatten(1)
        bias.add_(matrix @ shift)
        weight.copy_((matrix * scale).view_as(weight))
    return nn.Identity()


def _absorb_gate(aggregation: Aggregation) -> None:
    if aggregation.gate is None:
        return
    alpha, beta = (float(scalar.double()) for scalar in aggregation.gate())
    if abs(alpha) < 1e-6:
        return
    static = aggregation.static
    if isinstance(static, DepthwiseConv):
        static.conv.weight.mul_(beta / alpha)
        static.conv.bias.mul_(beta)  # type: ignore[union-attr]
    elif isinstance(static, TokenMatrix):
        static.left.mul_(beta / alpha)
    aggregation.value.weight.mul_(alpha)
    aggregation.value.bias.mul_(alpha)  # type: ignore[union-attr]
    aggregation.gate = None
