"""Rewrites models for faster inference."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["as_linear", "fuse"]


def fuse(model: nn.Module) -> nn.Module:
    """Returns a copy of a model with every `Block` fused (`Block.fuse`) and its weights in `channels_last`.

    All outputs (features, embeddings, logits) equal those of the model up to rounding. timm's `reparameterize_model`
    does the same, except for the memory format.
    On a GPU, `as_linear` is applied to the copy as well, so move the model to the GPU first.

    Args:
        model: Any model that contains `Block` modules, in evaluation mode.

    Raises:
        ValueError: The model is in training mode.
    """
    if model.training:
        raise ValueError("a model in training mode has no fixed statistics to fuse: call eval() first")
    fused = timm.models.reparameterize_model(model).to(memory_format=torch.channels_last)
    if any(parameter.is_cuda for parameter in fused.parameters()):
        as_linear(fused)
    return fused


def as_linear(model: nn.Module) -> None:
    """Makes a model compute its 1x1 convolutions as linear layers over positions, in place.

    y[b, :, i, j] = W x[b, :, i, j] + b. In `channels_last`, the positions are the rows of one matrix. On GPUs, matrix
    product kernels are faster than convolution kernels, and they add the bias in the same step. Parameters, their names
    and the outputs do not change. `torch.compile` and `torch.export` still see convolutions.

    Args:
        model: Any model.
    """
    for module in model.modules():
        plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding == (0, 0)
        if plain and module.kernel_size == module.stride == (1, 1):
            module._conv_forward = _by_position  # type: ignore[assignment]


def _by_position(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if images.dim() < 4 or torch.compiler.is_compiling():
        return F.conv2d(images, weight, bias)
    return F.linear(images.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
