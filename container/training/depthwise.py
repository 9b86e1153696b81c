"""Faster gradient of depthwise convolutions on a CPU."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["speed_up_depthwise"]

COLUMNS = 3  # widest kernel for which oneDNN is fast


def speed_up_depthwise(model: nn.Module) -> int:
    """Speeds up the weight gradient of a model's depthwise convolutions on a CPU, in place.

    dL/dw_c[i, j] = sum over b, h, w of x_c[b, h + i, w + j] dL/dy_c[b, h, w], with x padded. The columns j of the
    kernel are independent, so the gradient of a wide kernel is computed in parts of up to three columns.

    oneDNN (seen with 3.7 and 3.12) is fast for kernels of up to three columns. For a 5x5 kernel, its gradient takes
    fifteen times as long as for a 5x3 kernel in float32, and forty times as long in bfloat16.

    Outputs and gradients are the same up to rounding. Strided, dilated and subclassed convolutions are left unchanged.

    Args:
        model: Any model. Its modules keep their classes, parameters and hooks.

    Returns:
        The number of convolutions changed.
    """
    count = 0
    for conv in model.modules():
        if type(conv) is nn.Conv2d and isinstance(conv.padding, tuple) and conv.padding_mode == "zeros":
            wide, depthwise = conv.kernel_size[1] > COLUMNS, conv.groups == conv.in_channels == conv.out_channels
            if wide and depthwise and conv.stride == conv.dilation == (1, 1):
                conv._conv_forward = partial(_convolve, padding=conv.padding)  # type: ignore[arg-type, method-assign]
                count += 1
    return count


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
    """Computes the convolution in the dtype set by autocast."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Depthwise.apply(x, weight, bias, padding)


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution of stride 1 that computes its weight gradient in parts of up to three columns."""

    @staticmethod
    def forward(ctx, x, weight, bias, padding):  # type: ignore[no-untyped-def]
        ctx.padding, ctx.has_bias = padding, bias is not None
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        rows, columns = ctx.padding
        width = dy.shape[-1]

        def gradient(x: Tensor, weight: Tensor, columns: int, of: str) -> Tensor:
            mask, one = [of == "x", of == "weight", False], (1, 1)
            args = (dy, x, weight, None, one, (rows, columns), one, False, (0, 0), len(weight), mask)
            index = int(of == "weight")  # torch 2.9 compiles no index of type bool
            return torch.ops.aten.convolution_backward(*args)[index]

        dx = gradient(x, weight, columns, "x") if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            padded = F.pad(x, (columns, columns))
            parts = [
                gradient(padded[..., i : i + width + part.shape[-1] - 1], part, 0, "weight")
                for i, part in zip(range(0, weight.shape[-1], COLUMNS), weight.split(COLUMNS, -1), strict=True)
            ]
            dweight = torch.cat(parts, -1)
        # The bias gradient is summed here: oneDNN computes it only together with the weight gradient.
        return dx, dweight, dy.sum((0, 2, 3)) if ctx.has_bias else None, None
