"""Training loop of an epoch, and evaluation."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.data import RealLabelsImagenet
from timm.task.evaluator import evaluation_sample_limit
from timm.task.task import TrainingTask
from timm.utils import unwrap_model

from .seeding import seed_everything

__all__ = ["HALF", "Compute", "StoppedError", "evaluate", "train_one_epoch"]

HALF = dict(bfloat16=torch.bfloat16, float16=torch.float16)


class StoppedError(Exception):
    """Raised when an evaluation is stopped before its end."""


@dataclass(frozen=True)
class Compute:
    """Device, mixed-precision dtype and memory layout to compute in."""

    device: torch.device
    amp: str = "none"
    channels_last: bool = False

    def autocast(self) -> torch.autocast:
        """Returns the autocast context to compute in."""
        return torch.autocast(self.device.type, HALF.get(self.amp, torch.bfloat16), enabled=self.amp in HALF)

    def layout(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the images in the memory layout to compute in."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def scaler(self) -> torch.amp.GradScaler:
        """Returns a gradient scaler, which also makes the optimizer skip steps whose gradient is not finite.

        It scales the loss in float16 only. Other dtypes have enough range, and keep a scale of 1.
        """
        return torch.amp.GradScaler(self.device.type, init_scale=2.0**16 if self.amp == "float16" else 1.0)


def train_one_epoch(
    task: TrainingTask,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    scaler: torch.amp.GradScaler,
    compute: Compute,
    prepare: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    after_step: Callable[[torch.Tensor, torch.Tensor, float], None],
    steps: range,
    accum: int = 1,
    clip_grad: float | None = None,
    seed: int = 0,
) -> None:
    """Trains for an epoch, or for the rest of one, without waiting for the GPU.

    Args:
        task: The model and its loss.
        batches: Batches of images and targets. Each optimizer step takes `accum` of them.
        optimizer: The optimizer. `scaler` skips its step if the gradient is not finite on any process.
        scheduler: timm scheduler.
        scaler: Gradient scaler from `compute.scaler()`.
        compute: Dtype and memory layout.
        prepare: Function applied to each batch on the device: random erasing, mixing.
        after_step: Called after each step with this process's mean loss, the gradient norm before clipping (the same on
            all processes), and the highest learning rate. It may end the epoch with an exception.
        steps: Indices of the optimizer steps, counted from the start of the run.
        accum: Forward and backward passes per optimizer step.
        clip_grad: Maximum gradient norm, or None for no clipping.
        seed: The run's seed. With the index of a pass and the rank, it determines all random numbers.
    """
    task.train()
    for step in steps:
        lr, loss = max(group["lr"] for group in optimizer.param_groups), torch.zeros((), device=task.device)
        for i in range(accum):
            images, targets = next(batches)
            seed_everything(seed, step * accum + i, dist.get_rank(), 1)
            images, targets = prepare(images, targets)
            with nullcontext() if i + 1 == accum else task.no_sync():
                with compute.autocast():
                    part = task(compute.layout(images), targets)["loss"] / accum
                scaler.scale(part).backward()
            loss += part.detach()
        scaler.unscale_(optimizer)
        parameters = [p for p in task.get_clip_parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
        scaler.step(optimizer)
        scaler.update(None if compute.amp == "float16" else 1.0)
        optimizer.zero_grad()
        task.update_ema(step=step)
        scheduler.step_update(step + 1)
        after_step(loss, norm, lr)


@torch.inference_mode()
def evaluate(
    task: TrainingTask,
    loader: Any,
    compute: Compute,
    real: RealLabelsImagenet | None = None,
    classes: torch.Tensor | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Returns `loss`, `top1` and `top5` (in percent) on the validation data, and the number of `images` counted.

    If the task has averaged weights, they are evaluated on the same batches: `ema_loss`, `ema_top1`, `ema_top5`.

    Args:
        task: The model and its loss.
        loader: Validation loader. Images of class -1 are not counted.
        compute: Dtype and memory layout.
        real: Receives the logits of all images, in the order of the data.
        classes: Indices of the data's classes in the model, in the data's order, if the data has only some of them.
            Accuracies are then over all classes of the model, and `part_loss`, `part_top1`, `part_top5` over those of
            the data.
        stop: Called every few batches, on all processes at once. True ends the evaluation.

    Raises:
        StoppedError: `stop` returned True.
    """
    task.eval()
    # Each process evaluates its own share, so DDP is not needed.
    models: dict[str, Any] = {"": unwrap_model(task.get_eval_model())}
    if task.has_ema():
        models["ema_"] = unwrap_model(task.get_eval_model(ema=True))
    evaluators = {prefix: task.create_evaluator() for prefix in (*models, *(["part_"] if classes is not None else []))}
    left = evaluation_sample_limit(loader)  # any further images are padding of the last batch
    for i, (images, targets) in enumerate(loader):
        if left is not None and i % 10 == 0 and stop():  # not for streams: ranks may have unequal counts
            raise StoppedError
        targets = targets[:left]
        count = targets >= 0
        for prefix, model in models.items():
            with compute.autocast():
                logits = model(compute.layout(images))[: len(targets)].float()
            if real is not None and not prefix:
                real.add_result(logits)
            logits, known = logits[count], targets[count]
            if classes is not None:
                evaluators["part_"].update(logits[:, classes], known)
                known = classes[known]
            evaluators[prefix].update(logits, known)
        left = None if left is None else left - len(targets)
    found: dict[str, float] = {}
    for prefix, evaluator in evaluators.items():
        found |= {
            prefix + key: value for key, value in evaluator.compute(distributed=dist.get_world_size() > 1).items()
        }
    counted = evaluators[""].counts[0].clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(counted)
    if not counted:
        raise ValueError("none of the validation images can be counted: they cannot be read, or there are none")
    return {**found, "images": int(counted)}
