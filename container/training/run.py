"""A training run."""

import argparse
import json
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save
from timm.data import Mixup, RealLabelsImagenet, resolve_model_data_config
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task.evaluator import evaluation_sample_limit
from timm.task.task import TrainingTask
from timm.utils import distribute_bn, get_outdir, get_state_dict, unwrap_model
from tqdm import tqdm

from container.files import write_atomically

from .checkpoint import Checkpoints, Progress, lock
from .data import Images, check_classes
from .distributed import StopSignal, agree
from .loader import create_train_loader, create_val_loader, epoch_batches
from .plan import estimate
from .report import Report, describe_environment
from .seeding import seed_everything

__all__ = ["HALF", "Run", "evaluate", "tell_unreadable"]

HALF = dict(bfloat16=torch.bfloat16, float16=torch.float16)
# What may differ between a run and its continuation; the images of a step may be divided anew between processes.
FREE = {"output", "resume", "recipe", "save_steps", "device", "workers", "data_dir", "batch_size", "grad_accum"}
FREE |= {"checkpoint", "pretrained", "teacher_checkpoint"}  # where the beginning was
FREE |= {"compile", "channels_last"}  # how the same is computed
FREE |= {"eval", "dry_run", "real_labels"}
BAD_STEPS = 20  # in a row, without a finite gradient, end a run


class StoppedError(Exception):
    """An evaluation was left before its end."""


def growing(start: int, end: int, epochs: int) -> list[int]:
    """Side of the images in each epoch: from `start` to `end` in multiples of 32, both exactly.

    Args:
        start: Of the first epoch.
        end: Of the last one, and of a single one.
        epochs: How many there are.

    Raises:
        ValueError: `start` is larger than `end`.
    """
    if start > end:
        raise ValueError(f"--start-size {start} is larger than the model's images, {end}: images cannot shrink")
    even = [start + (end - start) * epoch / max(epochs - 1, 1) for epoch in range(epochs)]
    sizes = [min(max(round(size / 32) * 32, start), end) for size in even]
    sizes[0] = start
    sizes[-1] = end
    return sizes


@torch.inference_mode()
def evaluate(
    args: argparse.Namespace,
    task: TrainingTask,
    loader: Any,
    ema: bool = False,
    real: RealLabelsImagenet | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Loss, top-1 and top-5 (in percent) over the validation data, and how many `images` counted.

    Of the model, or of its averaged weights.

    Args:
        args: The settings, as `train_imagenet.py` names them.
        task: The model's.
        loader: Of the validation data. Images of class -1 do not count.
        ema: Whether of the averaged weights.
        real: Is given all predictions, in the order of the data.
        stop: Asked now and then, on all processes at once, whether to leave it at that.

    Raises:
        StoppedError: `stop` said so.
    """
    task.eval()
    evaluator = task.create_evaluator()
    left = evaluation_sample_limit(loader)  # what comes after pads the last batch
    model: Any = unwrap_model(task.get_eval_model(ema=ema))  # every process has its own share, and DDP nothing to do
    for i, (images, targets) in enumerate(loader):
        if left is not None and i % 10 == 0 and stop():  # processes have as many batches, but of streams
            raise StoppedError
        with autocast(args, task.device):
            logits = model(to_layout(args, images))[:left].float()
        targets, left = targets[:left], None if left is None else left - len(logits)
        if real is not None:
            real.add_result(logits)
        evaluator.update(logits[targets >= 0], targets[targets >= 0])
    metrics = evaluator.compute(distributed=dist.get_world_size() > 1)
    count = evaluator.counts[0].clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(count)
    return {**metrics, "images": int(count)}


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """The context to compute in: --amp."""
    return torch.autocast(device.type, dtype=HALF.get(args.amp, torch.bfloat16), enabled=args.amp in HALF)


def to_layout(args: argparse.Namespace, images: torch.Tensor) -> torch.Tensor:
    """Images in the memory layout to compute in: --channels-last."""
    return images.contiguous(memory_format=torch.channels_last) if args.channels_last else images


def tell_unreadable(dataset: Any, fate: str) -> None:
    """Names the images of this process's share that newly turned out to be damaged."""
    for name in dataset.new_unreadable() if isinstance(dataset, Images) else []:
        tqdm.write(f"cannot be read, and {fate}: {name}", file=sys.stderr)


class Run:
    """A training run: what it is made of, how far it has come, and its steps.

    Args:
        args: The settings, as `train_imagenet.py` names them.
        model: With the weights to start from.
        task: Its loss, compiled and distributed.
        train_set: Images to train on.
        val_set: Images to validate on.

    Raises:
        RuntimeError, ValueError: Data, model or settings do not fit each other.
    """

    def __init__(self, args: argparse.Namespace, model: Any, task: TrainingTask, train_set: Any, val_set: Any) -> None:
        self.args, self.rank, self.world = args, dist.get_rank(), dist.get_world_size()
        self.model, self.task, self.train_set, self.val_set = model, task, train_set, val_set
        self.config = resolve_model_data_config(model, args=dict(img_size=args.img_size))
        self.size = self.config["input_size"][-1]
        self.sizes = growing(args.start_size or self.size, self.size, args.epochs)
        if args.start_size is not None and model.pretrained_cfg.get("fixed_input_size"):
            raise ValueError(f"{args.model} is tied to one image size: images cannot grow from --start-size")
        self.images = args.batch_size * args.grad_accum * self.world  # of a step
        self.loader, self.loader_size = self.train_loader(self.sizes[0]), self.sizes[0]
        self.val_loader = create_val_loader(val_set, self.config, args.batch_size, args.workers, task.device)
        self.steps = len(self.loader) // args.grad_accum  # of an epoch
        if self.steps == 0:
            raise ValueError(f"a step of {self.images} images for {len(train_set)} training images")
        lr, warmup_epochs = args.lr_base * self.images / 512, min(args.warmup_epochs, args.epochs - 1)
        told = "".join(f"{part.left_out}\n" for part in (train_set, val_set) if getattr(part, "left_out", ""))
        self.cost = estimate(self.model, self.size, args.batch_size, args.amp in HALF, bool(args.ema_decay))
        self.plan = (
            f"{args.model} at {self.size} px: {self.cost['params'] / 1e6:.2f} M parameters, "
            f"{self.cost['gmacs']:.3f} GMACs\n"
            f"{len(train_set)} images to train on, {len(val_set)} to validate on, {model.num_classes} classes\n"
            f"recipe {args.recipe}: {args.epochs} epochs of {self.steps} steps of {self.images} images "
            f"({self.world} x {args.batch_size} x {args.grad_accum})\n"
            f"learning rate {args.warmup_lr:.1e} to {lr:.1e} in {warmup_epochs} epochs, then to {args.min_lr:.1e}\n"
            f"{told}"
            f"on {task.device.type}, memory about {self.cost['gib']:.2f} GiB per process"
        )

        self.optimizer = create_optimizer_v2(
            self.model, opt="adamw", lr=lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=args.epochs,
            warmup_epochs=warmup_epochs,
            warmup_lr=args.warmup_lr,
            min_lr=args.min_lr,
            step_on_epochs=not args.sched_on_updates,
            updates_per_epoch=self.steps,
        )
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=args.amp == "float16")
        self.erase = RandomErasing(args.reprob, mode="pixel", device=task.device)
        self.mixup = None
        if args.mixup or args.cutmix:
            self.mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=model.num_classes)
        self.progress = Progress()
        self.lock: Any = None
        self.forced: dict[str, list[Any]] = {}
        self.parts: dict[str, Any] = dict(
            state_dict=self.model, optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler
        )
        if self.task.has_ema():
            self.parts["state_dict_ema"] = unwrap_model(self.task.get_trainable_module(ema=True))
        self.fixed = {key: value for key, value in vars(args).items() if key not in FREE}
        self.fixed |= dict(images=self.images, steps=self.steps, class_names=getattr(train_set, "classes", None))

    def train_loader(self, size: int) -> PrefetchLoader:
        """Training images of a size."""
        args = self.args
        return create_train_loader(
            self.train_set,
            self.config | dict(input_size=(3, size, size)),
            augmentation=dict(scale=args.scale, hflip=args.hflip, auto_augment=args.aa, color_jitter=args.color_jitter),
            repeats=args.aug_repeats,
            batch_size=args.batch_size,
            workers=args.workers,
            seed=args.seed,
            device=self.task.device,
            loader=args.loader,
        )

    def open(self) -> bool:
        """Makes the folder of the run, or goes on with the run in it.

        Returns:
            Whether it goes on.

        Raises:
            OSError: The folder cannot be written.
            ValueError: The run in it has other settings.
        """
        saved: list[Any] = [None]
        if self.rank == 0:
            self.output = Path(self.args.output if self.args.resume else get_outdir(self.args.output, inc=True))
            self.output.mkdir(parents=True, exist_ok=True)
            self.args.output = str(self.output)
            self.lock = lock(self.output)
            self.checkpoints = Checkpoints(self.output)
            if self.args.resume:
                saved = [self.checkpoints.load()]
                if saved == [None] and (damaged := self.checkpoints.damaged()):
                    raise ValueError(
                        f"all {len(damaged)} checkpoints in {self.output} are damaged: take another --output"
                    )
        dist.broadcast_object_list(saved)  # nodes need not share a disk
        if (state := saved[0]) is not None:
            fixed = state["fixed"]
            check_classes(f"the run in {self.args.output}", fixed.get("class_names"), self.fixed["class_names"])
            for key, value in self.fixed.items():
                if fixed.get(key, value) != value:  # a later version may know more settings
                    if self.args.resume != "force":
                        raise ValueError(f"{self.args.output} was begun with {key} {fixed[key]}, not {value}")
                    self.forced[key] = [fixed[key], value]
            for key, part in self.parts.items():
                part.load_state_dict(state[key])
            self.progress = Progress(**state["progress"])
        if self.rank == 0:
            (self.output / "stopped").unlink(missing_ok=True)
            self.report = Report(self.output, self.progress.epoch)
            self.environment = describe_environment(self.task.device)
            write_atomically(self.output / "args.yaml", yaml.safe_dump(vars(self.args)).encode())
        return state is not None

    def save(self) -> None:
        """Writes a checkpoint of this very step; all processes wait for it.

        Raises:
            FloatingPointError: Weights are not finite.
            OSError: The disk is full.
        """
        if self.rank == 0:
            state = {key: part.state_dict() for key, part in self.parts.items()}
            for key, tensor in state["state_dict"].items():
                if not torch.isfinite(tensor).all():
                    raise FloatingPointError(f"{key} is not finite: not saved, the checkpoints before are as they were")
            state |= dict(progress=asdict(self.progress), fixed=self.fixed)
            self.checkpoints.save(self.progress.epoch * self.steps + self.progress.step, state)
        dist.barrier()  # a process that left now would have torchrun end the one that writes

    def epoch(self) -> Iterator[None]:
        """The steps of an epoch that are left, one at a time.

        Raises:
            FloatingPointError: The loss is not finite; the weights are those before the step.
        """
        args, progress, accum = self.args, self.progress, self.args.grad_accum
        if (size := self.sizes[progress.epoch]) != self.loader_size:
            self.loader, self.loader_size = self.train_loader(size), size
        batches = epoch_batches(self.loader, args.seed, progress.epoch, progress.step * accum)
        self.task.train()
        while progress.step < self.steps:
            start, loss = time.perf_counter(), torch.zeros((), device=self.task.device)
            done = progress.epoch * self.steps + progress.step
            for i in range(accum):
                waiting = time.perf_counter()
                images, targets = next(batches)
                progress.wait += time.perf_counter() - waiting
                seed_everything(args.seed, done * accum + i, self.rank, 1)
                images = self.erase(images)
                if self.mixup:
                    images, targets = self.mixup(images, targets)
                with nullcontext() if i + 1 == accum else self.task.no_sync():
                    with autocast(args, self.task.device):
                        part = self.task(to_layout(args, images), targets)["loss"] / accum
                    self.scaler.scale(part).backward()
                loss += part.detach()
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.task.get_clip_parameters(), args.clip_grad or math.inf)
            mean, mean_norm, self.stopped = agree(loss, norm, self.signal.received is not None)
            progress.lr = max(group["lr"] for group in self.optimizer.param_groups)  # of the layer that has the highest
            if not math.isfinite(mean):
                where = f"epoch {progress.epoch + 1}, step {progress.step + 1}"
                raise FloatingPointError(f"loss is {mean} in {where}, at lr {progress.lr:.2e}")
            if math.isfinite(mean_norm):
                self.scaler.step(self.optimizer)
                self.task.update_ema()
                progress.bad = 0
            else:  # the weights stay as they are, on all processes
                progress.bad, progress.skipped = progress.bad + 1, progress.skipped + 1
                if progress.bad == BAD_STEPS:
                    raise FloatingPointError(f"{BAD_STEPS} steps in a row had a gradient that is not finite")
            self.scaler.update()  # float16: the scale is halved after an overflow
            self.optimizer.zero_grad()
            self.scheduler.step_update(done + 1)
            progress.step, progress.loss = progress.step + 1, progress.loss + mean
            if progress.step == self.steps:
                self.scheduler.step(progress.epoch + 1)
                if self.world > 1:  # each process has normed by its own images
                    distribute_bn(self.model, self.world, reduce=True)
                    if self.task.has_ema():
                        distribute_bn(self.parts["state_dict_ema"], self.world, reduce=False)
            progress.seconds += time.perf_counter() - start
            yield

    def told(self) -> bool:
        """Whether any process was told to stop; all have to ask."""
        flag = torch.tensor(float(self.signal.received is not None), device=self.task.device)
        if self.world > 1:
            dist.all_reduce(flag)
        return bool(flag)

    def finish_epoch(self) -> str:
        """Evaluates, keeps the best weights, writes the report; the checkpoint is older, and the same epoch's.

        Returns:
            A line that says how it was.

        Raises:
            StoppedError: A process was told to stop.
        """
        args, progress, start = self.args, self.progress, time.perf_counter()
        metrics = evaluate(args, self.task, self.val_loader, stop=self.told)
        if self.task.has_ema():
            averaged = evaluate(args, self.task, self.val_loader, ema=True, stop=self.told)
            metrics |= {f"ema_{key}": value for key, value in averaged.items() if key != "images"}
        tell_unreadable(self.val_set, "does not count")
        row = dict(
            epoch=progress.epoch,
            train_loss=progress.loss / self.steps,
            **{f"eval_{key}": value for key, value in metrics.items()},
            lr=progress.lr,
            images_per_second=self.images * self.steps / progress.seconds,
            data_wait=progress.wait / progress.seconds,
        )
        top1 = metrics["ema_top1" if args.best == "ema" else "top1"]
        better = progress.best is None or top1 > progress.best
        self.progress = Progress(
            epoch=progress.epoch + 1,
            total_seconds=progress.total_seconds + progress.seconds + time.perf_counter() - start,
            best=top1 if better else progress.best,
            history=[*progress.history, row],
            bad=progress.bad,
            skipped=progress.skipped,
        )
        if self.rank == 0 and better:
            # The weights that were the best, alone: of a checkpoint with both, timm loads the averaged.
            weights = get_state_dict(self.task.get_eval_model(ema=args.best == "ema"))
            names = dict(classes=json.dumps(self.fixed["class_names"]))  # one entry: of two, the order is of chance
            best = save({key: tensor.contiguous() for key, tensor in weights.items()}, metadata=names)
            write_atomically(self.output / "model_best.safetensors", best)
        if self.progress.epoch == args.epochs:
            self.save()
        if self.rank == 0:
            self.write_report()
        line = f"epoch {progress.epoch + 1:3d}: loss {row['train_loss']:.3f}, validation {metrics['top1']:.2f} % top-1"
        return line + (f", averaged weights {metrics['ema_top1']:.2f} %" if self.task.has_ema() else "")

    def write_report(self) -> None:
        """What is known of the run after its last whole epoch."""
        progress = self.progress
        summary = self.environment | dict(
            recipe=self.args.recipe,
            model=dict(name=self.args.model, image_size=self.size, **self.cost),
            data=dict(train_images=len(self.train_set), val_images=len(self.val_set), classes=self.model.num_classes),
            class_names=self.fixed["class_names"],
            epochs=progress.epoch,
            seconds=progress.total_seconds,
            best=dict(weights=self.args.best, top1=progress.best, file="model_best.safetensors"),
            last=progress.history[-1],
            skipped_steps=progress.skipped,
            forced=self.forced,
            args=vars(self.args),
        )
        self.report.write(progress.history, summary)

    def train(self) -> float:
        """Trains to the end, or until a signal.

        Returns:
            Validation top-1 of the last epoch, in percent.

        Raises:
            FloatingPointError: The loss is not finite.
            OSError: The disk is full.
            SystemExit: A process was told to stop, and the state is saved (`leave`).
        """
        args, progress = self.args, self.progress
        if self.rank == 0 and progress.history:
            self.write_report()  # the interruption may have come before it
        bar = tqdm(
            total=args.epochs * self.steps * self.images,
            initial=(progress.epoch * self.steps + progress.step) * self.images,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,  # seconds; a log file needs few lines
            disable=self.rank > 0,
        )
        with StopSignal() as self.signal, bar:
            while (progress := self.progress).epoch < args.epochs:
                for _ in self.epoch():
                    wait = f"{100 * progress.wait / progress.seconds:.0f}%"
                    bar.set_postfix(
                        epoch=progress.epoch + 1,
                        loss=f"{progress.loss / progress.step:.3f}",
                        data_wait=wait,
                        refresh=False,
                    )
                    bar.update(self.images)
                    tell_unreadable(self.train_set, "another takes its place")
                    due = args.save_steps and progress.step % args.save_steps == 0
                    if due or self.stopped or progress.step == self.steps:  # before the evaluation, which may fail
                        self.save()
                    if self.stopped:
                        self.leave(bar)
                start = time.perf_counter()
                try:
                    line = self.finish_epoch()
                except StoppedError:
                    progress.total_seconds += time.perf_counter() - start
                    self.save()
                    self.leave(bar)
                if self.rank == 0:
                    bar.write(line)
                if self.told() and self.progress.epoch < args.epochs:
                    self.save()
                    self.leave(bar)
        return self.progress.history[-1]["eval_top1"]

    def leave(self, bar: tqdm) -> NoReturn:
        """Ends the process, whose state is saved, as it was told to.

        Raises:
            SystemExit: 128 and the signal's number, as in a shell.
        """
        if self.rank == 0:
            (self.output / "stopped").touch()
            where = f"after {self.progress.epoch} epochs and {self.progress.step} steps"
            bar.write(f"told to stop {where}: goes on with --resume auto --output {self.output}")
        raise SystemExit(128 + (self.signal.received or signal.SIGTERM))

    def close(self) -> None:
        """Ends what would outlive the run: loaders, and the hold on its folder."""
        # They shield themselves from the signals that end jobs; torch takes a dead one for a failure.
        if children := multiprocessing.active_children():
            before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for child in children:
                child.kill()
                child.join()
            signal.signal(signal.SIGCHLD, before)
        if self.lock is not None:
            self.lock.release()
