"""Cost estimate and summary of a run before it starts."""

import copy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["describe", "estimate"]


def estimate(
    model: torch.nn.Module, size: int, batch_size: int, half: bool = False, ema: bool = False
) -> dict[str, float]:
    """Estimates a model's cost on torch's meta device, without computing anything.

    Args:
        model: Model, set up as for training.
        size: Image size in pixels.
        batch_size: Images per forward pass.
        half: Whether activations have 16 bits.
        ema: Whether averaged weights are kept.

    Returns:
        `params`, the number of parameters; `gmacs`, billions of multiply-adds per image (convolutions, linear layers,
        attention); and `gib`, the estimated memory of a training step. It covers weights, gradients, AdamW's two
        moments, averaged weights and the tensors that autograd saves for the backward pass, but not the kernels'
        workspace.
    """
    model = copy.deepcopy(model).to("meta").train()
    params = sum(p.numel() for p in model.parameters())
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # by storage, so that two views of a tensor count once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (key := tensor.untyped_storage()._cdata) not in own:
            kept[key] = tensor
        return tensor

    images = torch.empty(2, 3, size, size, device="meta")  # two images, since batch norm rejects one
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


def teaching(run: Any) -> str:
    """Returns a line about distillation without labels and the disk space it needs, or '' without a teacher."""
    args = run.args
    if run.teacher is None:
        return ""
    size = f" at {args.teacher_size} px" if args.teacher_size else ""
    line = f"learns the logits of {args.teacher}{size} at temperature {args.temperature:g}, and no labels"
    if args.view_epochs:
        kept = min(args.view_epochs, args.epochs) * run.steps * run.images * 2 * run.model.num_classes / 2**30
        line += f"; views repeat after {args.view_epochs} epochs, and their logits take {kept:.1f} GiB on the disk"
    return f"{line}\n"


def describe(run: Any) -> str:
    """Returns a summary of what a `Run` will do and cost, in a few lines."""
    args, cost = run.args, run.cost
    told = [f"{part.left_out}\n" for part in (run.train_set, run.val_set) if getattr(part, "left_out", "")]
    if len(run.train_set) < 100_000 and args.epochs >= 100 and not (args.checkpoint or args.pretrained):
        told.append(
            f"{len(run.train_set)} images are few for training from scratch: if you have weights, "
            "take --recipe finetune with --checkpoint or --pretrained\n"
        )
    files = 4 * cost["params"] * (4 if args.ema_decay else 3) / 2**20
    minutes = args.epochs * run.steps * run.images / 1000 / 60
    length = f"{minutes / 60:.0f} h" if minutes > 120 else f"{minutes:.1f} min" if minutes > 1 else "less than a minute"
    warmup = f"{args.warmup_lr:.1e} to {run.lr:.1e} in the first {run.warmup_epochs} epochs"
    rise = warmup if run.warmup_epochs else f"{run.lr:.1e}"
    return (
        f"{args.model} at {run.size} px: {cost['params'] / 1e6:.2f} M parameters, {cost['gmacs']:.3f} GMACs\n"
        f"{len(run.train_set)} images to train on, {len(run.val_set)} to validate on, {run.model.num_classes} classes\n"
        f"recipe {args.recipe}: {args.epochs} epochs of {run.steps} steps of {run.images} images "
        f"({run.processes} x {args.batch_size} x {args.grad_accum})\n"
        f"learning rate: {rise}, then down to {args.min_lr:.1e}\n"
        f"{teaching(run)}"
        f"{''.join(told)}"
        f"on {torch.device(args.device).type}: about {cost['gib']:.2f} GiB of memory per process, "
        f"{args.workers} loader workers each\n"
        f"checkpoints: {files:.0f} MiB each, up to three at a time\n"
        f"at 1,000 images/s it would take {length}"
    )
