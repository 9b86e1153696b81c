"""The equation of the paper, its gate, and the residual block around it."""

import math
from typing import Any, Dict, Optional, Tuple, Type

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from .affinity import Affinity

__all__ = ["Aggregation", "Block", "ConvexGate", "FreeGate"]


class ConvexGate(nn.Module):
    """Gate that mixes two affinities convexly with one scalar s: alpha = sigmoid(s), beta = 1 - alpha.

    s is initialised to 0, so alpha and beta both start at one half.
    Source: released code only (one scalar per block, shared by all heads).
    Note: the paper uses two free scalars instead, `FreeGate`.

    Args:
        device: Device of the parameter.
        dtype: Data type of the parameter.
    """

    def __init__(self, device: Optional[torch.device] = None, dtype: Optional[torch.dtype] = None) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets s = 0."""
        nn.init.zeros_(self.logit)

    def forward(self) -> Tuple[Tensor, Tensor]:
        """Returns (alpha, beta), each of shape (1,)."""
        alpha = self.logit.sigmoid()
        return alpha, 1 - alpha


class FreeGate(nn.Module):
    """Gate that mixes two affinities with two free scalars, alpha and beta.

    Source: paper (alpha and beta are learnable parameters).
    Note: we do not know the paper's initial values. Both scalars start at one half, as in the released code.
    """

    def __init__(self, device: Optional[torch.device] = None, dtype: Optional[torch.dtype] = None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets alpha = beta = 1/2."""
        nn.init.constant_(self.alpha, 0.5)
        nn.init.constant_(self.beta, 0.5)

    def forward(self) -> Tuple[Tensor, Tensor]:
        """Returns (alpha, beta), each of shape (1,)."""
        return self.alpha, self.beta


class Aggregation(nn.Module):
    """The paper's unified operation; attention, convolution and token mixing are special cases of it.

    Y = (alpha A(X) + beta A) V W, with V = X W_v. The residual `+ X` is added by the block.

    A(X) is `dynamic`, A is `static`, W_v is `value`, W is `proj`; alpha and beta come from `gate`. Both affinities read
    the same V, so mixing their outputs equals mixing their matrices, and no N x N matrix is formed.

    Source: paper, its central equation. Cost: O(N C^2) for the projections, plus the cost of the affinities.

    Args:
        dim: Channels C.
        dynamic: The affinity computed from X, or None.
        static: The affinity that is a parameter, or None.
        gate: Module that returns (alpha, beta) if both affinities are given; None for alpha = beta = 1.
        proj_drop: Dropout probability after `proj`.

    Raises:
        ValueError: No affinity is given, or a gate is given without two affinities to mix.
    """

    def __init__(
        self,
        dim: int,
        dynamic: Optional[Affinity] = None,
        static: Optional[Affinity] = None,
        gate: Optional[nn.Module] = None,
        proj_drop: float = 0.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        if dynamic is None and static is None:
            raise ValueError("an aggregation needs a dynamic affinity, a static one, or both")
        if gate is not None and (dynamic is None or static is None):
            raise ValueError("a gate mixes two affinities; only one is given")
        self.value = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)
        self.dynamic = dynamic
        self.static = static
        self.gate = gate
        self.proj = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Computes Y for a feature map X, both (B, C, H, W)."""
        return self.proj_drop(self.proj(self.mix(x, self.value(x))))

    def mix(self, x: Tensor, v: Tensor) -> Tensor:
        """Computes (alpha A(X) + beta A) V for feature maps X and V, both (B, C, H, W)."""
        if self.dynamic is not None and self.static is not None:
            if self.gate is not None:
                alpha, beta = self.gate()
                y = self.dynamic(x, v)
                # Cast to the dtype of the feature maps: under autocast, the float32 scalars would promote the sum.
                return alpha.to(y.dtype) * y + beta.to(y.dtype) * self.static(x, v)
            return self.dynamic(x, v) + self.static(x, v)
        if self.dynamic is not None:
            return self.dynamic(x, v)
        assert self.static is not None
        return self.static(x, v)

    def matrix(self, x: Tensor) -> Tensor:
        """Returns alpha A(X) + beta A, (B or 1, M, N, N), for a feature map X (B, C, H, W).

        M is the least common multiple of the two numbers of heads: C if one affinity is a convolution.
        """
        if self.dynamic is None or self.static is None:
            alone = self.dynamic if self.static is None else self.static
            assert alone is not None
            return alone.matrix(x)
        dynamic, static = self.dynamic.matrix(x), self.static.matrix(x)
        heads = math.lcm(dynamic.shape[1], static.shape[1])
        alpha, beta = (1.0, 1.0) if self.gate is None else self.gate()
        return alpha * dynamic.repeat_interleave(heads // dynamic.shape[1], dim=1) + beta * static.repeat_interleave(
            heads // static.shape[1], dim=1
        )


class Block(nn.Module):
    """Residual block: positional convolution, aggregation, MLP.

    x = x + pos_conv(x);  x = x + aggregation(norm1(x));  x = x + mlp(norm2(x))

    In training, the last two branches are dropped per image with probability `drop_path`. The first is never dropped.

    Source: released code only.
    Cost: O(N C^2 (2 + 2 mlp_ratio)), plus the cost of the affinities.

    Args:
        dim: Channels C.
        aggregation: The token mixing, (B, C, H, W) -> (B, C, H, W).
        mlp_ratio: Hidden channels of the MLP, as a multiple of `dim`.
        dilation: Dilation of `pos_conv`.
        proj_drop: Dropout probability in the MLP.
        drop_path: Probability that a residual branch is dropped.
        norm_layer: Norm layer for feature maps, called with `dim`.
        act_layer: Activation of the MLP.
    """

    def __init__(
        self,
        dim: int,
        aggregation: nn.Module,
        mlp_ratio: float = 4.0,
        dilation: int = 1,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Type[nn.Module] = nn.BatchNorm2d,
        act_layer: Type[nn.Module] = nn.GELU,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd: Dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_conv = nn.Conv2d(dim, dim, 3, padding=dilation, dilation=dilation, groups=dim, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.aggregation = aggregation
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, use_conv=True, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block: (B, C, H, W) -> (B, C, H, W)."""
        x = x + self.pos_conv(x)
        x = x + self.drop_path1(self.aggregation(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "Block":
        """Rewrites this block for inference, in place.

        timm's `reparameterize_model` calls this method on a copy of the model.

        - Each batch norm is folded into the 1x1 convolutions after it: W (s x + t) + b = (W s) x + (W t + b).
        - The gate is folded into V and the static affinity: alpha A(X) V + beta A V = A(X) V' + A' V' with
          V' = alpha V and A' = (beta / alpha) A.

        Anything unusual is left unchanged:

        - layers that are wrapped, subclassed, parametrized or quantized,
        - affinities that do not define how they may be rewritten,
        - an aggregation of another class,
        - norms that are not affine,
        - a gate whose alpha is 0,
        - the whole block, if a module in it has a hook or a replaced `forward`.

        A block in training mode is switched to evaluation mode first, because timm's scripts fuse before `eval()`.

        Source: algebra; the released code does none of this.

        Returns:
            The block itself.
        """
        if self.training:
            self.eval()
        if any(_is_hooked(module) for module in self.modules() if module is not self):
            return self
        if type(self.aggregation) is Aggregation:
            readers = _readers(self.aggregation)
            if readers is not None:
                self.norm1 = _absorb(self.norm1, *readers)
            _absorb_gate(self.aggregation)
        if type(self.mlp) is Mlp:
            self.norm2 = _absorb(self.norm2, self.mlp.fc1)
        return self


def _is_hooked(module: nn.Module) -> bool:
    """Returns whether a module has hooks, or a `forward` that has been replaced on the instance."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _says(affinity: nn.Module, name: str) -> bool:
    """Returns whether a method describes the `forward` in use, not one that a subclass has overridden."""
    classes = type(affinity).__mro__

    def place(method: str) -> int:
        return next(i for i, kind in enumerate(classes) if method in vars(kind))

    return isinstance(affinity, Affinity) and place(name) <= place("forward")


def _readers(aggregation: Aggregation) -> Optional[Tuple[nn.Module, ...]]:
    """Returns the 1x1 convolutions that read an aggregation's input; None if anything else reads it too."""
    found: Tuple[nn.Module, ...] = (aggregation.value,)
    for affinity in (aggregation.dynamic, aggregation.static):
        if affinity is not None:
            own = affinity.readers() if _says(affinity, "readers") else None
            if own is None:
                return None
            found += own
    return found


def _affine(norm: nn.Module) -> Optional[Tuple[Tensor, Tensor]]:
    """Returns (s, t) in double precision if a norm computes s x + t per channel; None otherwise."""
    if type(norm) not in (nn.BatchNorm2d, FrozenBatchNorm2d):
        return None
    stats: Any = norm
    if stats.running_var is None or (norm.training and type(norm) is nn.BatchNorm2d):
        return None  # it uses the statistics of the batch
    scale = (stats.running_var.double() + stats.eps).rsqrt()
    scale = scale if stats.weight is None else scale * stats.weight.double()
    shift = -stats.running_mean.double() * scale
    return scale, shift if stats.bias is None else shift + stats.bias.double()


def _absorb(norm: nn.Module, *layers: nn.Module) -> nn.Module:
    """Folds a norm into all 1x1 convolutions that read it, or into none.

    Returns:
        The identity, or the norm itself if it could not be folded.
    """
    affine = _affine(norm)
    convolutions = [layer for layer in layers if type(layer) is nn.Conv2d]
    if affine is None or len(convolutions) < len(layers):
        return norm
    if any(c.kernel_size != (1, 1) or c.groups > 1 or c.padding != (0, 0) or c.bias is None for c in convolutions):
        return norm
    scale, shift = affine
    for convolution in convolutions:
        matrix = convolution.weight.double().flatten(1)
        assert convolution.bias is not None
        convolution.bias.copy_(convolution.bias.double() + matrix @ shift)
        convolution.weight.copy_((matrix * scale).view_as(convolution.weight))
    return nn.Identity()


def _absorb_gate(aggregation: Aggregation) -> None:
    """Folds alpha and beta into V and the static affinity, if possible."""
    dynamic, static, value = aggregation.dynamic, aggregation.static, aggregation.value
    if aggregation.gate is None or dynamic is None or static is None or type(value) is not nn.Conv2d:
        return
    # Scaling V is only valid if `forward` is exactly A(x) v. An affinity that defines `readers` guarantees this.
    linear = _says(dynamic, "readers") and dynamic.readers() is not None and dynamic.bias is None
    if not linear or not _says(static, "scale_"):
        return
    alpha, beta = (float(scalar.double()) for scalar in aggregation.gate())
    if abs(alpha) < 1e-6 or not static.scale_(beta / alpha, beta):
        return
    value.weight.mul_(alpha)
    if value.bias is not None:
        value.bias.mul_(alpha)
    aggregation.gate = None
