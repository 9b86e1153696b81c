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
    """Mixes two affinities convexly by one scalar s: alpha = sigmoid(s), beta = 1 - alpha.

    s starts at 0, so both start at one half.
    Source: released code only (one scalar per block, shared by all heads).
    Note: the paper has two free scalars instead, `FreeGate`.

    Args:
        device: Device of the parameter.
        dtype: Type of the parameter.
    """

    def __init__(self, device: Optional[torch.device] = None, dtype: Optional[torch.dtype] = None) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """s = 0."""
        nn.init.zeros_(self.logit)

    def forward(self) -> Tuple[Tensor, Tensor]:
        """(alpha, beta), each of shape (1,)."""
        alpha = self.logit.sigmoid()
        return alpha, 1 - alpha


class FreeGate(nn.Module):
    """Mixes two affinities by two free scalars, alpha and beta.

    Source: paper (alpha and beta are learnable parameters).
    Note: the paper's initial values are not known to us; both start at one half, as in the released code.
    """

    def __init__(self, device: Optional[torch.device] = None, dtype: Optional[torch.dtype] = None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """alpha = beta = 1/2."""
        nn.init.constant_(self.alpha, 0.5)
        nn.init.constant_(self.beta, 0.5)

    def forward(self) -> Tuple[Tensor, Tensor]:
        """(alpha, beta), each of shape (1,)."""
        return self.alpha, self.beta


class Aggregation(nn.Module):
    """The paper's one operation, of which attention, convolution and token mixing are cases.

    Y = (alpha A(X) + beta A) V W, with V = X W_v. The residual `+ X` is added by the block.

    A(X) is `dynamic`, A is `static`, W_v is `value`, W is `proj`; alpha and beta come from `gate`. Both affinities read
    the same V, so mixing their outputs equals mixing their matrices, and no N x N matrix is formed.

    Source: paper, its central equation. Cost: O(N C^2) for the projections, plus that of the affinities.

    Args:
        dim: Channels C.
        dynamic: The affinity computed from X, or None.
        static: The affinity that is a parameter, or None.
        gate: Module that returns (alpha, beta) if both affinities are given; None for alpha = beta = 1.
        proj_drop: Dropout probability after `proj`.

    Raises:
        ValueError: There is no affinity, or a gate without two affinities to mix.
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
        """Y for a map X, both (B, C, H, W)."""
        return self.proj_drop(self.proj(self.mix(x, self.value(x))))

    def mix(self, x: Tensor, v: Tensor) -> Tensor:
        """(alpha A(X) + beta A) V for the maps X and V, both (B, C, H, W)."""
        if self.dynamic is not None and self.static is not None:
            if self.gate is not None:
                alpha, beta = self.gate()
                y = self.dynamic(x, v)
                # In the type of the maps: under autocast the scalars are float32, and would make the sum so.
                return alpha.to(y.dtype) * y + beta.to(y.dtype) * self.static(x, v)
            return self.dynamic(x, v) + self.static(x, v)
        if self.dynamic is not None:
            return self.dynamic(x, v)
        assert self.static is not None
        return self.static(x, v)

    def matrix(self, x: Tensor) -> Tensor:
        """alpha A(X) + beta A written out, (B or 1, M, N, N), for a map X (B, C, H, W).

        M is the smallest number of heads that fits both: C if one of them is a convolution.
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
    """The residual block: position, aggregation, MLP.

    x = x + pos_conv(x);  x = x + aggregation(norm1(x));  x = x + mlp(norm2(x))

    In training the last two branches are dropped per image with probability `drop_path`; the first never is.

    Source: released code only.
    Cost: O(N C^2 (2 + 2 mlp_ratio)), plus that of the affinities.

    Args:
        dim: Channels C.
        aggregation: The token mixing, (B, C, H, W) -> (B, C, H, W).
        mlp_ratio: Hidden channels of the MLP, as a multiple of `dim`.
        dilation: Distance between the taps of `pos_conv`.
        proj_drop: Dropout probability in the MLP.
        drop_path: Probability that a residual branch is dropped.
        norm_layer: Norm over a map, called with `dim`.
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
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.pos_conv(x)
        x = x + self.drop_path1(self.aggregation(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "Block":
        """Rewrites this block for inference, in place; timm's `reparameterize_model` calls it on a copy of a model.

        - A batch norm is folded into the 1x1 convolutions after it: W (s x + t) + b = (W s) x + (W t + b).
        - So is the gate: alpha A(X) V + beta A V = A(X) V' + A' V' with V' = alpha V and A' = (beta / alpha) A.

        Anything unusual is left unchanged: layers that are wrapped, subclassed, parametrized or quantized, affinities
        that do not define how they may be rewritten, other modules as aggregation, norms that are not affine, a gate
        whose alpha is 0, and the whole block if a hook is registered in it.

        A block in training mode is switched to evaluation mode first, because timm's scripts rewrite before `eval()`.

        Source: algebra; the released code does none of it.

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
    """Whether something looks at a module's input or output, or has taken its `forward` over."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _says(affinity: nn.Module, name: str) -> bool:
    """Whether a method is said of an affinity's own `forward`, not of one that a subclass has replaced."""
    classes = type(affinity).__mro__

    def place(method: str) -> int:
        return next(i for i, kind in enumerate(classes) if method in vars(kind))

    return isinstance(affinity, Affinity) and place(name) <= place("forward")


def _readers(aggregation: Aggregation) -> Optional[Tuple[nn.Module, ...]]:
    """The 1x1 convolutions through which alone an aggregation reads its input; None if there is another way."""
    found: Tuple[nn.Module, ...] = (aggregation.value,)
    for affinity in (aggregation.dynamic, aggregation.static):
        if affinity is not None:
            own = affinity.readers() if _says(affinity, "readers") else None
            if own is None:
                return None
            found += own
    return found


def _affine(norm: nn.Module) -> Optional[Tuple[Tensor, Tensor]]:
    """(s, t) of a norm that is s x + t over channels, in double; None for another."""
    if type(norm) not in (nn.BatchNorm2d, FrozenBatchNorm2d):
        return None
    stats: Any = norm
    if stats.running_var is None or (norm.training and type(norm) is nn.BatchNorm2d):
        return None  # it goes by the batch's own statistics
    scale = (stats.running_var.double() + stats.eps).rsqrt()
    scale = scale if stats.weight is None else scale * stats.weight.double()
    shift = -stats.running_mean.double() * scale
    return scale, shift if stats.bias is None else shift + stats.bias.double()


def _absorb(norm: nn.Module, *layers: nn.Module) -> nn.Module:
    """Moves a norm into the 1x1 convolutions that read it, all or none; returns what is left of it."""
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
    """Moves alpha and beta into V and into the static affinity, where that can be."""
    dynamic, static, value = aggregation.dynamic, aggregation.static, aggregation.value
    if aggregation.gate is None or dynamic is None or static is None or type(value) is not nn.Conv2d:
        return
    # A(x) v, and nothing else: so says what says how it reads x.
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
