"""Affinities: the matrices by which tokens read other tokens.

An affinity is A in `Y = (alpha A(X) + beta A) V W + X`, one N x N matrix per head. Row i holds the weights with which
token i reads every token j. A `dynamic` affinity is computed from X; a `static` affinity is a parameter. `Affinity` is
their common interface. The letters B, C, H, W, N, M, D are defined in `container/__init__.py`.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import _assert, resample_abs_pos_embed_nhwc, trunc_normal_, use_fused_attn
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

__all__ = ["Affinity", "DepthwiseConv", "DoubleAttention", "GlobalContext", "SelfAttention", "TokenMatrix"]


# PyTorch's FLOP counter has no formula for the CPU attention kernels and would count them as zero.
for _operator in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"):
    _on_cpu = _operator.replace("attention", "attention_for_cpu")
    flop_registry.setdefault(getattr(torch.ops.aten, _on_cpu), flop_registry[getattr(torch.ops.aten, _operator)])


def _check_heads(dim: int, num_heads: int) -> int:
    """Returns the head dimension D = dim / num_heads.

    Raises:
        ValueError: `dim` cannot be split into `num_heads` equal heads.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
    return dim // num_heads


class Affinity(nn.Module):
    """Base class of affinities: a fast kernel (`forward`) and the explicit matrix (`matrix`).

    Tests check that the two agree.

    * `forward(x, v)` computes A(x) v + bias with the fastest kernel, from two feature maps (B, C, H, W) to one. It
      never forms the N x N matrix, with two exceptions: a dense `TokenMatrix`, whose parameter it is, and attention
      with dropout in training or without a fused kernel.
    * `matrix(x)` writes out A(x) from its formula, (B or 1, M, N, N), for figures and tests.

    Channels are head-major: head m owns channels m D to (m + 1) D - 1.

    A subclass implements these two methods and sets `num_heads`. `Block.fuse` rewrites an affinity for inference only
    as far as its `readers` and `scale_` allow. These two are used only if they are defined in the same class as
    `forward`, or in a subclass of that class.

    Attributes:
        num_heads: M, the number of distinct matrices.
        bias: Added to A(x) v by `forward`, (C,); None if nothing is added.
    """

    __jit_unused_properties__ = ["bias"]

    num_heads: int

    @property
    def bias(self) -> Optional[Tensor]:
        """The bias that `forward` adds to A(x) v; None except for a convolution."""
        return None

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        """Computes A(x) v + bias for feature maps x and v, both (B, C, H, W)."""
        raise NotImplementedError

    def matrix(self, x: Tensor) -> Tensor:
        """Returns A(x), (B or 1, M, N, N), for a feature map x (B, C, H, W)."""
        raise NotImplementedError

    @torch.jit.ignore
    def readers(self) -> Optional[Tuple[nn.Module, ...]]:
        """Returns the 1x1 convolutions that read x, so that an affine norm can be folded into them.

        The tuple is empty if the affinity does not read x. None means that something else reads x as well.
        """
        return None

    @torch.jit.ignore
    def scale_(self, factor: float, bias: float) -> bool:
        """Scales the parameters in place: multiplies A by `factor` and the bias by `bias`.

        Returns:
            Whether the parameters were scaled; False if A is not a parameter.
        """
        return False


class SelfAttention(Affinity):
    """Dynamic affinity computed by multi-head self-attention.

    A(x)_m = softmax(Q_m K_m^T / sqrt(D)), where Q and K are 1x1 projections of x. Rows sum to one.

    Source: paper (A_sa); the released code uses it in the last stage of CONTAINER-LIGHT.
    Cost: O(N C^2) for the projections, O(N^2 C) for the product; memory O(N C) with a fused kernel.

    Args:
        dim: Channels C.
        num_heads: Number of heads M; must divide `dim`.
        attn_drop: Dropout probability of the entries of A, in training.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_drop: float = 0.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = _check_heads(dim, num_heads)
        self.scale = self.head_dim**-0.5
        self.fused_attn = use_fused_attn()
        # V is computed by the aggregation, so that a static affinity can share it.
        self.qk = nn.Conv2d(dim, 2 * dim, 1, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        """Computes A(x) v for feature maps x and v, both (B, C, H, W)."""
        batch, _, height, width = v.shape
        # The fused kernels need contiguous D. This is free for channels_last, the layout of the network's feature maps.
        qk = self.qk(x).flatten(2).transpose(1, 2).contiguous()  # (B, N, 2C)
        qk = qk.reshape(batch, height * width, 2, self.num_heads, self.head_dim)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)  # (B, M, N, D), views
        y = v.flatten(2).transpose(1, 2).contiguous()
        y = y.reshape(batch, height * width, self.num_heads, self.head_dim).transpose(1, 2)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, y, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, M, N, N)
            y = self.attn_drop(attn) @ y
        return y.transpose(1, 2).flatten(2).transpose(1, 2).reshape(v.shape)

    def matrix(self, x: Tensor) -> Tensor:
        """Returns A(x), (B, M, N, N), for a feature map x (B, C, H, W)."""
        q, k = self.qk(x).unflatten(1, (2, self.num_heads, self.head_dim)).flatten(4).unbind(1)  # (B, M, D, N)
        return torch.softmax(torch.einsum("bmdi,bmdj->bmij", q, k) / self.head_dim**0.5, dim=-1)

    @torch.jit.ignore
    def readers(self) -> Optional[Tuple[nn.Module, ...]]:
        """Returns the joint projection of Q and K."""
        return (self.qk,)


class DepthwiseConv(Affinity):
    """Static, local affinity of a depthwise convolution: one matrix per channel, with one kernel for all positions.

    A_cij = w_c[p_j - p_i] if token j lies in the window around token i, else 0; p is a token's (row, column).

    The convolution also adds a bias after A V. The bias is not part of `matrix`; the gate scales it by beta, as in the
    released code. So `forward(x, v) - forward(x, 0)` is A v.

    Source: paper (A_conv); the released code uses it, 5x5, in every block of CONTAINER-LIGHT.
    Cost: O(N C k^2); parameters C (k^2 + 1).

    Args:
        dim: Channels C, which is also the number of heads M.
        kernel_size: Side k of the window in tokens; odd, so that the window is centred on a token.
        dilation: Distance in tokens between adjacent taps of the kernel.

    Raises:
        ValueError: `kernel_size` is even.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 5,
        dilation: int = 1,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} is even; a window has a token in its middle")
        self.num_heads = dim
        pad = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(
            dim, dim, kernel_size, padding=pad, dilation=dilation, groups=dim, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        """Computes A v + bias for a feature map v (B, C, H, W); x is not read."""
        return self.conv(v)

    def matrix(self, x: Tensor) -> Tensor:
        """Returns A, (1, C, N, N), on the grid of a feature map x (B, C, H, W)."""
        height, width = x.shape[-2:]
        kernel, dilation = self.conv.kernel_size[0], self.conv.dilation[0]
        row = torch.arange(height, device=x.device).repeat_interleave(width)  # (N,) row of each token
        col = torch.arange(width, device=x.device).repeat(height)  # (N,) column of each token

        def tap(p: Tensor) -> Tuple[Tensor, Tensor]:
            offset = p[None, :] - p[:, None]  # p_j - p_i, (N, N)
            index = torch.div(offset, dilation, rounding_mode="floor") + kernel // 2
            return index.clamp(0, kernel - 1), (offset % dilation == 0) & (index >= 0) & (index < kernel)

        (dy, in_y), (dx, in_x) = tap(row), tap(col)
        return (self.conv.weight[:, 0, dy, dx] * (in_y & in_x))[None]

    @property
    def bias(self) -> Optional[Tensor]:
        """The bias of the convolution."""
        return self.conv.bias

    @torch.jit.ignore
    def readers(self) -> Optional[Tuple[nn.Module, ...]]:
        """Returns an empty tuple, because x is not read."""
        return ()

    @torch.jit.ignore
    @torch.no_grad()
    def scale_(self, factor: float, bias: float) -> bool:
        """Scales the kernels and the bias."""
        if type(self.conv) is not nn.Conv2d:  # a wrapper may add something to the convolution's output
            return False
        self.conv.weight.mul_(factor)
        if self.conv.bias is not None:
            self.conv.bias.mul_(bias)
        return True


class TokenMatrix(Affinity):
    """Static, dense affinity: the token-mixing matrix itself is the parameter.

    A_m = L_m, or A_m = L_m R_m of rank r where N is too large for N x N parameters.
    One head gives the (linear) token mixing of MLP-Mixer. Several heads give its multi-head form, which is also the
    table of CONTAINER-PAM.

    Source: paper (A_mlp = W_MLP^T) and its CONTAINER-PAM listing (a table per head, truncated normal).
    Cost: O(N^2 C) and M N^2 parameters dense; O(N r C) and 2 M N r parameters with rank r.

    Note: the paper's tables are dense. The low rank is ours; without it, a 56x56 grid would need too many parameters.

    Args:
        dim: Channels C.
        num_heads: Number of heads M; must divide `dim`.
        grid: The (H, W) that the matrix is tied to; `set_input_size` resamples it to another grid.
        rank: Rank r, or None for a dense matrix.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`, or `rank` is not between 1 and N.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Tuple[int, int],
        rank: Optional[int] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = _check_heads(dim, num_heads)
        self.grid = grid
        tokens = grid[0] * grid[1]
        if rank is not None and not 1 <= rank <= tokens:
            raise ValueError(f"rank {rank} is not between 1 and the {tokens} tokens of grid {grid}")
        # Rows of L and columns of R are stored as (H, W), so that a checkpoint records its grid; N alone would not.
        left = torch.empty(num_heads, *grid, tokens if rank is None else rank, device=device, dtype=dtype)
        self.left = nn.Parameter(left)
        self.right = None if rank is None else nn.Parameter(left.new_empty(num_heads, rank, *grid))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws from a truncated normal, such that the entries of A have standard deviation 0.02 at any rank."""
        if self.right is None:
            trunc_normal_(self.left, std=0.02)
        else:
            std = (0.02 / self.right.shape[1] ** 0.5) ** 0.5
            trunc_normal_(self.left, std=std)
            trunc_normal_(self.right, std=std)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        """Computes A v for a feature map v (B, C, H, W) on the layer's own grid; x is not read."""
        batch, _, height, width = v.shape
        _assert(
            height == self.grid[0], f"{height} rows of tokens for a TokenMatrix of {self.grid[0]}: use set_input_size"
        )
        _assert(
            width == self.grid[1], f"{width} columns of tokens for a TokenMatrix of {self.grid[1]}: use set_input_size"
        )
        tokens = height * width
        # One product for the whole batch; a batched product would copy the matrix for each image.
        y = v.reshape(batch, self.num_heads, self.head_dim, tokens).permute(1, 3, 0, 2)
        y = y.reshape(self.num_heads, tokens, batch * self.head_dim)  # (M, N, B D)
        if self.right is not None:
            y = self.right.flatten(2) @ y  # (M, r, B D)
        y = (self.left.flatten(1, 2) @ y).reshape(self.num_heads, tokens, batch, self.head_dim)
        return y.permute(2, 0, 3, 1).reshape(v.shape)

    def matrix(self, x: Tensor) -> Tensor:
        """Returns A, (1, M, N, N); x is not read."""
        left = self.left.flatten(1, 2)
        return (left if self.right is None else torch.einsum("mir,mrj->mij", left, self.right.flatten(2)))[None]

    @torch.jit.ignore
    def readers(self) -> Optional[Tuple[nn.Module, ...]]:
        """Returns an empty tuple, because x is not read."""
        return ()

    @torch.jit.ignore
    @torch.no_grad()
    def scale_(self, factor: float, bias: float) -> bool:
        """Scales the matrix, or its left factor."""
        self.left.mul_(factor)
        return True

    @torch.jit.ignore
    def resample(self, left: Tensor, right: Optional[Tensor], grid: Tuple[int, int]) -> Tuple[Tensor, Optional[Tensor]]:
        """Resamples the factors of a token matrix to another grid by bicubic interpolation.

        Rows and columns are interpolated at the new tokens. Columns are also scaled by N / N', so that the total weight
        that a token reads stays the same.

        Args:
            left: (M, H, W, N), or (M, H, W, r) if `right` is given.
            right: (M, r, H, W) or None.
            grid: The new (H', W').

        Returns:
            The two factors on the new grid.
        """
        heads, height, width, _ = left.shape
        scale = height * width / (grid[0] * grid[1])

        def rows(a: Tensor) -> Tensor:  # (M, H, W, K) -> (M, H', W', K)
            a = resample_abs_pos_embed_nhwc(a.permute(1, 2, 0, 3).flatten(2), list(grid))
            return a.reshape(*grid, heads, -1).permute(2, 0, 1, 3).contiguous()

        def columns(a: Tensor) -> Tensor:  # (M, K, H, W) -> (M, K, H', W')
            return (rows(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * scale).contiguous()

        if right is not None:
            return rows(left), columns(right)
        whole = columns(rows(left).flatten(1, 2).unflatten(2, (height, width)))  # (M, N', H', W')
        return whole.flatten(2).unflatten(1, grid), None

    @torch.jit.ignore
    def set_input_size(self, grid: Tuple[int, int]) -> None:
        """Resamples the parameters to another grid (H, W) with `resample`; frozen parameters stay frozen."""
        with torch.no_grad():
            left, right = self.resample(self.left, self.right, grid)
        self.left = nn.Parameter(left, requires_grad=self.left.requires_grad)
        if self.right is not None and right is not None:
            self.right = nn.Parameter(right, requires_grad=self.right.requires_grad)
        self.grid = grid


class GlobalContext(Affinity):
    """Dynamic affinity of rank one: all tokens read the same summary of the image, each with its own weight.

    A(x)_ij = sigmoid(a_i) softmax(k)_j, where a and k are 1x1 projections of x to one channel.

    Source: not in the paper; the context layer of Liu et al., "Learning to Aggregate Multi-Scale Context for Instance
    Segmentation in Remote Sensing Images" (arXiv 2111.11057), written from its formula. Without a, it is GCNet's.
    Cost: O(N C), linear in the number of tokens.

    Args:
        dim: Channels C.
    """

    def __init__(self, dim: int, device: Optional[torch.device] = None, dtype: Optional[torch.dtype] = None) -> None:
        super().__init__()
        self.num_heads = 1
        self.query = nn.Conv2d(dim, 1, 1, device=device, dtype=dtype)
        self.key = nn.Conv2d(dim, 1, 1, device=device, dtype=dtype)

    def context(self, x: Tensor, v: Tensor) -> Tensor:
        """Computes the summary sum_j softmax(k)_j v_j, (B, C', 1, 1), from x (B, C, H, W) and v (B, C', H, W)."""
        k = self.key(x).flatten(2).softmax(dim=-1)  # (B, 1, N)
        return (v.flatten(2) @ k.transpose(1, 2)).unsqueeze(-1)

    def distribute(self, x: Tensor, context: Tensor) -> Tensor:
        """Multiplies the summary (B, C', 1, 1) by sigmoid(a_i) at each token i: (B, C', H, W)."""
        return self.query(x).sigmoid() * context

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        """Computes A(x) v for feature maps x and v, both (B, C, H, W)."""
        return self.distribute(x, self.context(x, v))

    def matrix(self, x: Tensor) -> Tensor:
        """Returns A(x), (B, 1, N, N), for a feature map x (B, C, H, W)."""
        a, k = self.query(x).flatten(2), self.key(x).flatten(2)  # (B, 1, N)
        return torch.einsum("bmi,bmj->bmij", torch.sigmoid(a), torch.softmax(k, dim=-1))

    @torch.jit.ignore
    def readers(self) -> Optional[Tuple[nn.Module, ...]]:
        """Returns the two projections."""
        return self.query, self.key


class DoubleAttention(Affinity):
    """Dynamic affinity of rank r: the image is gathered into r summaries, and each token reads its own mixture of them.

    A(x)_ij = sum_r softmax(q_i)_r softmax(k_r)_j, where q and k are 1x1 projections of x to r channels. The first
    softmax is over the r summaries and the second over the N tokens, so rows sum to one.

    Source: not in the paper; Chen et al., "A^2-Nets: Double Attention Networks" (arXiv 1810.11579), equation 5, written
    from its formula.
    Cost: O(N C r), linear in the number of tokens.

    Args:
        dim: Channels C.
        rank: Number of summaries r.

    Raises:
        ValueError: `rank` is below 1.
    """

    def __init__(
        self, dim: int, rank: int, device: Optional[torch.device] = None, dtype: Optional[torch.dtype] = None
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank} is not at least 1")
        self.num_heads = 1
        self.query = nn.Conv2d(dim, rank, 1, device=device, dtype=dtype)
        self.key = nn.Conv2d(dim, rank, 1, device=device, dtype=dtype)

    def context(self, x: Tensor, v: Tensor) -> Tensor:
        """Computes the r summaries sum_j softmax(k_r)_j v_j, (B, C', r, 1), from x (B, C, H, W) and v (B, C', H, W)."""
        k = self.key(x).flatten(2).softmax(dim=-1)  # (B, r, N)
        return (v.flatten(2) @ k.transpose(1, 2)).unsqueeze(-1)

    def distribute(self, x: Tensor, context: Tensor) -> Tensor:
        """Mixes the summaries (B, C', r, 1) at each token i with weights softmax(q_i)_r: (B, C', H, W)."""
        q = self.query(x).softmax(dim=1)  # (B, r, H, W)
        return (context.squeeze(-1) @ q.flatten(2)).unflatten(2, q.shape[-2:])

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        """Computes A(x) v for feature maps x and v, both (B, C, H, W)."""
        return self.distribute(x, self.context(x, v))

    def matrix(self, x: Tensor) -> Tensor:
        """Returns A(x), (B, 1, N, N), for a feature map x (B, C, H, W)."""
        q, k = self.query(x).flatten(2), self.key(x).flatten(2)  # (B, r, N)
        return torch.einsum("bri,brj->bij", torch.softmax(q, dim=1), torch.softmax(k, dim=2))[:, None]

    @torch.jit.ignore
    def readers(self) -> Optional[Tuple[nn.Module, ...]]:
        """Returns the two projections."""
        return self.query, self.key
