"""What a run is going to cost."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["estimate"]


def estimate(
    model: torch.nn.Module, size: int, batch_size: int, half: bool = False, ema: bool = False
) -> dict[str, float]:
    """Counts a model's cost on torch's meta device, where nothing is computed.

    Args:
        model: In the state that it is trained in.
        size: Side of the images.
        batch_size: Images in a pass.
        half: Whether activations have 16 bits.
        ema: Whether averaged weights are kept.

    Returns:
        `params`; `gmacs`, billions of multiply-adds for one image (convolutions, linear layers, products of attention);
        `gib`, an estimate of a training step's memory: weights, gradients, AdamW's two moments, averaged weights, and
        what autograd keeps for the backward pass. Workspace of the kernels comes on top.
    """
    model = copy.deepcopy(model).to("meta").train()
    params = sum(p.numel() for p in model.parameters())
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # by storage: two views of one tensor are one tensor

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (key := tensor.untyped_storage()._cdata) not in own:
            kept[key] = tensor
        return tensor

    images = torch.empty(2, 3, size, size, device="meta")  # of two, since batch norm refuses one
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(images)
    activations = sum(t.untyped_storage().nbytes() for t in kept.values()) / len(images) * batch_size
    del output
    states = 4 * params * (5 if ema else 4)
    return dict(
        params=params,
        gmacs=counter.get_total_flops() / 2e9 / len(images),
        gib=(states + activations / (2 if half else 1)) / 2**30,
    )
