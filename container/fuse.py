"""Models rewritten for inference."""

import timm
import torch
from torch import nn

__all__ = ["fuse"]


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a model with every `Block` rewritten for inference (`Block.fuse`), its weights in `channels_last`.

    It gives the model's answers up to rounding, at every output: features, embeddings, logits. timm's
    `reparameterize_model` does the same but for the memory format, in which the maps are from the first norm on.

    Args:
        model: Any model that holds blocks, in evaluation mode.

    Raises:
        ValueError: It is in training mode.
    """
    if model.training:
        raise ValueError("a model in training mode has no fixed statistics to fuse: call eval() first")
    return timm.models.reparameterize_model(model).to(memory_format=torch.channels_last)
