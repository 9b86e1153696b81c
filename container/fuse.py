"""Models rewritten for inference."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["as_linear", "fuse"]


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a model with every `Block` rewritten for inference (`Block.fuse`), its weights in `channels_last`.

    It gives the model's answers up to rounding, at every output: features, embeddings, logits. timm's
    `reparameterize_model` does the same but for the memory format, in which the maps are from the first norm on.
    The copy of a model on a GPU computes `as_linear` as well, so move the model there first.

    Args:
        model: Any model that holds blocks, in evaluation mode.

    Raises:
        ValueError: It is in training mode.
    """
    if model.training:
        raise ValueError("a model in training mode has no fixed statistics to fuse: call eval() first")
    fused = timm.models.reparameterize_model(model).to(memory_format=torch.channels_last)
    if any(parameter.is_cuda for parameter in fused.parameters()):
        as_linear(fused)
    return fused


def as_linear(model: nn.Module) -> None:
    """Computes the 1x1 convolutions of any model as linear layers over positions, in place.

    y[b, :, i, j] = W x[b, :, i, j] + b: in `channels_last` the positions are the rows of one matrix. On GPUs
    the kernels for products are faster than those for convolutions, and add the bias as they go. Parameters, their
    names and the answers stay. `torch.compile` and `torch.export` go on seeing convolutions.

    Args:
        model: Any.
    """
    for module in model.modules():
        plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding == (0, 0)
        if plain and module.kernel_size == module.stride == (1, 1):
            module._conv_forward = _by_position  # type: ignore[assignment]


def _by_position(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if images.dim() < 4 or torch.compiler.is_compiling():
        return F.conv2d(images, weight, bias)
    return F.linear(images.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
