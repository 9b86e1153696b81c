#!/usr/bin/env python
"""Trains a CONTAINER, or any other timm model, on a folder of images.

    python train_imagenet.py                                        # a small model on handwritten digits
    python train_imagenet.py --data-dir imagenet                    # DIR/train/CLASS/*, DIR/val/CLASS/*
    torchrun --nproc_per_node=8 train_imagenet.py --data-dir imagenet --resume auto --output run
    python train_imagenet.py --data-dir imagenet --eval --checkpoint run/model_best.safetensors

Settings come from recipes/NAME.yaml: `digits` without data, else `paper`, or --recipe NAME. Flags override them.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple, Type

import timm
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save
from timm.data import Mixup, RealLabelsImagenet, resolve_model_data_config
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.evaluator import evaluation_sample_limit
from timm.task.task import TrainingTask
from timm.utils import distribute_bn, get_outdir, get_state_dict, unwrap_model
from tqdm import tqdm

import container
from container.training import (
    Checkpoints,
    Images,
    Progress,
    Report,
    StopSignal,
    agree,
    create_datasets,
    create_train_loader,
    create_val_loader,
    describe_environment,
    epoch_batches,
    estimate,
    join_group,
    open_validation,
    parse_with_recipe,
    seed_everything,
    write_atomically,
)

RECIPES = Path(__file__).parent / "recipes"
HALF = dict(bfloat16=torch.bfloat16, float16=torch.float16)
# What may differ between a run and its continuation; the images of a step may be divided anew between processes.
FREE = {"output", "resume", "recipe", "save_steps", "device", "workers", "data_dir", "batch_size", "grad_accum"}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Reads the recipe and the command line.

    Args:
        argv: Arguments, or None for those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    run = parser.add_argument_group("run")
    run.add_argument("--recipe", help="settings: a name in recipes/")
    run.add_argument("--output", default="output", help="new folder for all that a run leaves (-1, -2, ... if taken)")
    run.add_argument("--resume", choices=("auto",), help="go on with the run in --output, if there is one")
    run.add_argument("--save-steps", type=int, default=0, help="checkpoint every so many steps, besides every epoch")
    run.add_argument("--eval", action="store_true", help="evaluate --checkpoint or --pretrained weights, and stop")
    run.add_argument("--dry-run", action="store_true", help="print what the run would cost, and stop")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    run.add_argument("--seed", type=int, default=0, help="of weights, shuffling and augmentation")
    run.add_argument("--epochs", type=int, help="passes over as many images as there are")
    run.add_argument("--batch-size", type=int, help="images per pass and process")
    run.add_argument("--grad-accum", type=int, help="passes per step")
    run.add_argument(
        "--amp", choices=("none", *HALF), help="16-bit type to compute in, with 32-bit weights; recipes set it for GPUs"
    )
    run.add_argument("--channels-last", action=switch, help="memory layout NHWC")
    run.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the training; none: do not"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-dir", help="folder with train/CLASS/* and val/CLASS/*; without data, scikit-learn's digits"
    )
    data.add_argument("--dataset", default="", help="torch/cifar10, torch/cifar100, hfds/NAME or wds/, instead")
    data.add_argument("--train-split", default="train", help="of Hugging Face data or WebDataset shards")
    data.add_argument("--val-split", default="validation", help="of the same")
    data.add_argument("--num-classes", type=int, help="as many as there must be; WebDataset needs it")
    data.add_argument("--real-labels", help="JSON of ImageNet-ReaL: --eval scores by it, too")
    data.add_argument("--img-size", type=int, help="side of the images, if not the model's own")
    data.add_argument("--start-size", type=int, help="side in the first epoch, from where it grows to the last")
    data.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loaders of data per process")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a timm model name")
    model.add_argument("--pretrained", action="store_true", help="start from the model's pretrained weights")
    model.add_argument("--checkpoint", help="start from the weights in this file")
    model.add_argument("--drop-path", type=float, help="stochastic depth of the last block")
    model.add_argument("--ema-decay", type=float, help="decay per step of averaged weights, kept and evaluated as well")
    model.add_argument("--best", choices=("model", "ema"), help="whose accuracy says which weights are the best")
    model.add_argument("--teacher", help="a timm model to learn from as well")
    model.add_argument("--teacher-checkpoint", help="its weights, if not its pretrained ones")
    model.add_argument("--distill", type=float, default=0.5, help="share of the teacher in the loss")
    optim = parser.add_argument_group("optimization (AdamW, cosine)")
    optim.add_argument("--lr-base", type=float, help="learning rate for 512 images in a step, scaled linearly")
    optim.add_argument(
        "--layer-decay", type=float, help="factor on the learning rate for each layer from the head down"
    )
    optim.add_argument("--weight-decay", type=float, help="of what has two dimensions or more")
    optim.add_argument("--warmup-epochs", type=int, help="epochs of rising learning rate")
    optim.add_argument("--warmup-lr", type=float, help="learning rate of the first step")
    optim.add_argument("--min-lr", type=float, help="learning rate of the last step")
    optim.add_argument("--sched-on-updates", action=switch, help="new rate every step, not epoch")
    optim.add_argument("--clip-grad", type=float, help="largest norm of the gradient")
    optim.add_argument("--smoothing", type=float, help="label smoothing")
    augment = parser.add_argument_group("augmentation")
    augment.add_argument("--scale", type=float, nargs=2, help="area of a random crop")
    augment.add_argument("--hflip", type=float, help="probability of a mirror image")
    augment.add_argument("--aa", help="auto-augment policy of timm, '' for none")
    augment.add_argument("--color-jitter", type=float, help="of brightness, contrast, saturation; without a policy")
    augment.add_argument("--aug-repeats", type=int, help="augmented copies of an image in one epoch, 0 for one of each")
    augment.add_argument("--reprob", type=float, help="probability of random erasing")
    augment.add_argument("--mixup", type=float, help="alpha of mixup, 0 for none")
    augment.add_argument("--cutmix", type=float, help="alpha of cutmix, 0 for none")

    given = parser.parse_args(argv)
    recipe = given.recipe or ("paper" if given.data_dir or given.dataset not in ("", "digits") else "digits")
    args = parse_with_recipe(parser, argv, RECIPES, recipe)
    args.recipe = recipe
    args.compile = None if args.compile == "none" else args.compile
    if given.amp is None and args.device == "cpu":
        args.amp = "none"  # recipes mean GPUs: on a CPU float16 takes 9 times as long as float32
    for name in ("epochs", "batch_size", "grad_accum", "img_size", "start_size", "num_classes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size} is odd, but mixup and cutmix mix images in pairs")
    if args.best == "ema" and not args.ema_decay:
        parser.error("--best ema needs --ema-decay")
    if args.eval and not (args.checkpoint or args.pretrained):
        parser.error("--eval needs --checkpoint FILE or --pretrained")
    if args.pretrained and args.checkpoint:
        parser.error("--pretrained and --checkpoint are two starting points")
    for name in filter(None, (args.model, args.teacher)):
        if not timm.is_model(name):
            parser.error(f"unknown model {name}; this package has {', '.join(timm.list_models('container*'))}")
    return args


def build_model(args: argparse.Namespace, num_classes: int, device: torch.device) -> torch.nn.Module:
    """The model with as many classes as the data, at the image size asked for, with the weights asked for."""
    options: Dict[str, Any] = {}
    cfg = get_pretrained_cfg(args.model)
    if args.img_size is not None and cfg is not None and cfg.fixed_input_size:
        options["img_size"] = args.img_size  # others take any size, and some no such argument
    if args.checkpoint:
        weights = container.weights.read(args.checkpoint, use_ema=args.best == "ema")
        overlay: Dict[str, Any] = dict(state_dict=weights)
        if (head := weights.get(f"{cfg.classifier}.weight" if cfg else "")) is not None:
            overlay["num_classes"] = len(head)  # if it is another number, timm leaves the classifier random
        options["pretrained_cfg_overlay"] = overlay
    model = timm.create_model(
        args.model,
        pretrained=args.pretrained or bool(args.checkpoint),
        num_classes=num_classes,
        drop_path_rate=args.drop_path or None,  # timm drops a None, for models that have no such argument
        **options,
    ).to(device)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def open_data(args: argparse.Namespace) -> Tuple[Any, Any, int]:
    """Training data (None for --eval of a folder), validation data, number of classes."""
    if args.eval and args.data_dir and not args.dataset:
        return (None, *open_validation(args.data_dir))
    splits = (args.train_split, args.val_split)
    return create_datasets(args.data_dir, args.dataset, splits, args.num_classes, args.batch_size, args.seed)


def build_task(args: argparse.Namespace, model: torch.nn.Module, device: torch.device) -> TrainingTask:
    """The loss of the model, a teacher's share in it if there is one, compiled and distributed as asked for."""
    soft = bool(args.mixup or args.cutmix)
    criterion = dict(soft_targets=True) if soft else dict(smoothing=args.smoothing)
    task: TrainingTask
    if args.teacher:
        cfg = get_pretrained_cfg(args.teacher)
        if not args.teacher_checkpoint and cfg is not None and cfg.num_classes != model.num_classes:
            raise ValueError(f"{args.teacher} knows {cfg.num_classes} classes, and the data has {model.num_classes}")
        task = LogitDistillationTask(
            model,
            args.teacher,
            teacher_pretrained_path=args.teacher_checkpoint,
            task_loss_weight=1 - args.distill,
            criterion_kwargs=criterion,
            device=device,
            verbose=False,
        )
    else:
        task = ClassificationTask(model, criterion_kwargs=criterion, device=device, verbose=False)
    if args.ema_decay:
        task.setup_ema(decay=args.ema_decay)
    if args.compile:
        task.compile(backend=args.compile)
    if dist.get_world_size() > 1:
        task.prepare_distributed(device_ids=[device.index] if device.type == "cuda" else None)
    return task


@torch.inference_mode()
def evaluate(
    args: argparse.Namespace,
    task: TrainingTask,
    loader: Any,
    ema: bool = False,
    real: Optional[RealLabelsImagenet] = None,
) -> Dict[str, float]:
    """Loss, top-1 and top-5 (in percent) over the validation data, of the model or of its averaged weights.

    Args:
        args: As `parse_args` returns them.
        task: The model's.
        loader: Of the validation data. Images of class -1 do not count.
        ema: Whether of the averaged weights.
        real: Is given all predictions, in the order of the data.
    """
    task.eval()
    evaluator = task.create_evaluator()
    left = evaluation_sample_limit(loader)  # what comes after pads the last batch
    model: Any = unwrap_model(task.get_eval_model(ema=ema))  # every process has its own share, and DDP nothing to do
    for images, targets in loader:
        with autocast(args, task.device):
            logits = model(to_layout(args, images))[:left].float()
        targets, left = targets[:left], None if left is None else left - len(logits)
        if real is not None:
            real.add_result(logits)
        evaluator.update(logits[targets >= 0], targets[targets >= 0])
    return evaluator.compute(distributed=dist.get_world_size() > 1)


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """The context to compute in: --amp."""
    return torch.autocast(device.type, dtype=HALF.get(args.amp, torch.bfloat16), enabled=args.amp in HALF)


def to_layout(args: argparse.Namespace, images: torch.Tensor) -> torch.Tensor:
    """Images in the memory layout to compute in: --channels-last."""
    return images.contiguous(memory_format=torch.channels_last) if args.channels_last else images


def evaluate_weights(args: argparse.Namespace, device: torch.device) -> float:
    """Evaluates --checkpoint or --pretrained weights, prints the result, and returns top-1 in percent."""
    real = None
    _, dataset, num_classes = open_data(args)
    model = build_model(args, num_classes, device)
    if args.real_labels:
        if dist.get_world_size() > 1:
            raise ValueError("--real-labels needs all images in one process")
        labels = len(json.loads(Path(args.real_labels).read_text()))
        names = {f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(labels)}
        if set(files := dataset.filenames(basename=True)) != names:
            raise ValueError(f"the images are not those of {args.real_labels} ({labels} labels)")
        real = RealLabelsImagenet(files, args.real_labels)
    config = resolve_model_data_config(model, args=dict(img_size=args.img_size))
    task = ClassificationTask(model, device=device, verbose=False)
    metrics = evaluate(args, task, create_val_loader(dataset, config, args.batch_size, args.workers, device), real=real)
    tell_unreadable(dataset, "does not count")
    if dist.get_rank() == 0:
        side = " x ".join(map(str, config["input_size"][1:]))
        print(f"{len(dataset)} images of {num_classes} classes at {side}, loss {metrics['loss']:.4f}")
        print(f"{metrics['top1']:.2f} % top-1, {metrics['top5']:.2f} % top-5")
        if real is not None:
            print(f"{real.get_accuracy(1):.2f} % top-1, {real.get_accuracy(5):.2f} % top-5 by {args.real_labels}")
    return metrics["top1"]


def tell_unreadable(dataset: Any, fate: str) -> None:
    """Names the images of this process's share that newly turned out to be damaged."""
    for name in dataset.new_unreadable() if isinstance(dataset, Images) else []:
        tqdm.write(f"cannot be read, and {fate}: {name}", file=sys.stderr)


class Run:
    """A training run: what it is made of, how far it has come, and its steps.

    Args:
        args: As `parse_args` returns them.
        device: This process's.

    Raises:
        ImportError, OSError, RuntimeError, ValueError: Data, model or settings do not fit each other.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.rank, self.world = args, dist.get_rank(), dist.get_world_size()
        self.train_set, self.val_set, num_classes = open_data(args)
        seed_everything(args.seed)
        self.model = build_model(args, num_classes, device)
        self.config = resolve_model_data_config(self.model, args=dict(img_size=args.img_size))
        self.size = self.config["input_size"][-1]
        self.images = args.batch_size * args.grad_accum * self.world  # of a step
        if len(self.train_set) < self.images:
            raise ValueError(f"a step of {self.images} images for {len(self.train_set)} training images")
        self.loader = self.train_loader(self.size)
        self.val_loader = create_val_loader(self.val_set, self.config, args.batch_size, args.workers, device)
        self.steps = len(self.loader) // args.grad_accum  # of an epoch
        lr, warmup_epochs = args.lr_base * self.images / 512, min(args.warmup_epochs, args.epochs - 1)
        self.cost = estimate(self.model, self.size, args.batch_size, args.amp in HALF, bool(args.ema_decay))
        self.plan = (
            f"{args.model} at {self.size} px: {self.cost['params'] / 1e6:.2f} M parameters, "
            f"{self.cost['gmacs']:.3f} GMACs\n"
            f"{len(self.train_set)} images to train on, {len(self.val_set)} to validate on, {num_classes} classes\n"
            f"recipe {args.recipe}: {args.epochs} epochs of {self.steps} steps of {self.images} images "
            f"({self.world} x {args.batch_size} x {args.grad_accum})\n"
            f"learning rate {args.warmup_lr:.1e} to {lr:.1e} in {warmup_epochs} epochs, then to {args.min_lr:.1e}\n"
            f"on {device.type}, memory about {self.cost['gib']:.2f} GiB per process"
        )

        self.task = build_task(args, self.model, device)
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
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "float16")
        self.erase = RandomErasing(args.reprob, mode="pixel", device=device)
        self.mixup = None
        if args.mixup or args.cutmix:
            self.mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)
        self.progress = Progress()
        self.parts: Dict[str, Any] = dict(
            state_dict=self.model, optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler
        )
        if self.task.has_ema():
            self.parts["state_dict_ema"] = unwrap_model(self.task.get_trainable_module(ema=True))
        self.fixed = {key: value for key, value in vars(args).items() if key not in FREE}
        self.fixed |= dict(images=self.images, steps=self.steps)

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
            device=torch.device(args.device),
        )

    def open(self) -> bool:
        """Makes the folder of the run, or goes on with the run in it.

        Returns:
            Whether it goes on.

        Raises:
            OSError: The folder cannot be written.
            ValueError: The run in it has other settings.
        """
        saved = [Checkpoints(self.args.output).load() if self.args.resume and self.rank == 0 else None]
        dist.broadcast_object_list(saved)  # nodes need not share a disk
        if (state := saved[0]) is not None:
            for key, value in self.fixed.items():
                if state["fixed"].get(key) != value:
                    raise ValueError(f"{self.args.output} was begun with {key} {state['fixed'].get(key)}, not {value}")
            for key, part in self.parts.items():
                part.load_state_dict(state[key])
            self.progress = Progress(**state["progress"])
        if self.rank == 0:
            self.output = Path(self.args.output if self.args.resume else get_outdir(self.args.output, inc=True))
            self.output.mkdir(parents=True, exist_ok=True)
            self.checkpoints = Checkpoints(self.output)
            self.report = Report(self.output, self.progress.epoch)
            write_atomically(self.output / "args.yaml", yaml.safe_dump(vars(self.args)).encode())
        return state is not None

    def save(self) -> None:
        """Writes a checkpoint of this very step."""
        if self.rank == 0:
            state = {key: part.state_dict() for key, part in self.parts.items()}
            state |= dict(progress=asdict(self.progress), fixed=self.fixed)
            self.checkpoints.save(self.progress.epoch * self.steps + self.progress.step, state)

    def epoch(self) -> Iterator[None]:
        """The steps of an epoch that are left, one at a time.

        Raises:
            FloatingPointError: The loss is not finite; the weights are those before the step.
        """
        args, progress, accum = self.args, self.progress, self.args.grad_accum
        if args.start_size is not None:
            grown = progress.epoch / max(args.epochs - 1, 1)
            size = round((args.start_size + (self.size - args.start_size) * grown) / 32) * 32
            self.loader = self.train_loader(size)
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
            mean, self.stopped = agree(loss, self.signal.received is not None)
            if not math.isfinite(mean):
                where = f"epoch {progress.epoch + 1}, step {progress.step + 1}"
                raise FloatingPointError(f"loss is {mean} in {where}, at lr {self.lr:.2e}")
            if args.clip_grad:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.task.get_clip_parameters(), args.clip_grad)
            self.scaler.step(self.optimizer)  # with float16, not if the gradient overflows: the scale is halved instead
            self.scaler.update()
            self.optimizer.zero_grad()
            self.task.update_ema()
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

    @property
    def lr(self) -> float:
        """The learning rate, of the layer that has the highest."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def finish_epoch(self) -> str:
        """Evaluates, keeps the best weights, writes checkpoint and report.

        Returns:
            A line that says how it was.
        """
        args, progress, start = self.args, self.progress, time.perf_counter()
        metrics = evaluate(args, self.task, self.val_loader)
        if self.task.has_ema():
            averaged = evaluate(args, self.task, self.val_loader, ema=True)
            metrics |= {f"ema_{key}": value for key, value in averaged.items()}
        tell_unreadable(self.val_set, "does not count")
        row = dict(
            epoch=progress.epoch,
            train_loss=progress.loss / self.steps,
            **{f"eval_{key}": value for key, value in metrics.items()},
            lr=self.lr,
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
        )
        if self.rank == 0:
            if better:
                # The weights that were the best, alone: of a checkpoint with both, timm loads the averaged.
                weights = get_state_dict(self.task.get_eval_model(ema=args.best == "ema"))
                best = save({key: tensor.contiguous() for key, tensor in weights.items()})
                write_atomically(self.output / "model_best.safetensors", best)
            self.save()
            self.write_report()
        line = f"epoch {progress.epoch + 1:3d}: loss {row['train_loss']:.3f}, validation {metrics['top1']:.2f} % top-1"
        return line + (f", averaged weights {metrics['ema_top1']:.2f} %" if self.task.has_ema() else "")

    def write_report(self) -> None:
        """What is known of the run after its last whole epoch."""
        progress = self.progress
        summary = describe_environment(self.task.device) | dict(
            recipe=self.args.recipe,
            model=dict(name=self.args.model, image_size=self.size, **self.cost),
            data=dict(train_images=len(self.train_set), val_images=len(self.val_set), classes=self.model.num_classes),
            epochs=progress.epoch,
            seconds=progress.total_seconds,
            best=dict(weights=self.args.best, top1=progress.best, file="model_best.safetensors"),
            last=progress.history[-1],
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
            SystemExit: A process was told to stop, and the state is saved: 128 and the signal's number, as in a shell.
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
                    due = args.save_steps and progress.step % args.save_steps == 0 and progress.step < self.steps
                    if due or self.stopped:
                        self.save()
                    if self.stopped:
                        where = f"after {progress.epoch} epochs and {progress.step} steps"
                        bar.write(f"told to stop {where}: goes on with --resume auto --output {args.output}")
                        raise SystemExit(128 + (self.signal.received or signal.SIGTERM))
                bar.write(self.finish_epoch())
        return self.progress.history[-1]["eval_top1"]


@contextmanager
def one_line(*errors: Type[BaseException]) -> Iterator[None]:
    """Ends the process with one line for errors that are the user's, or the machine's."""
    try:
        yield
    except errors as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise SystemExit(f"train_imagenet.py: {lines[-1 if lines[0].startswith('Caught ') else 0]}") from None


def main(argv: Optional[Sequence[str]] = None) -> float:
    """Trains or evaluates in this process, alone or as one of those that torchrun started.

    Args:
        argv: Arguments, or None for those of the process.

    Returns:
        Validation top-1 in percent; NaN for a dry run.
    """
    args = parse_args(argv)
    device = join_group(args.device)
    args.device = str(device)
    try:
        with one_line(AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError):
            if args.eval:
                return evaluate_weights(args, device)
            run = Run(args, device)
            if run.rank == 0:
                print(run.plan)
            if args.dry_run:
                return math.nan
            if run.open() and run.rank == 0:
                print(f"going on after {run.progress.epoch} epochs and {run.progress.step} steps")
        with one_line(FloatingPointError, OSError, ValueError, torch.OutOfMemoryError):
            top1 = run.train()
        if run.rank == 0:
            seconds, best = run.progress.total_seconds, run.output / "model_best.safetensors"
            print(f"\n{top1:.2f} % of {len(run.val_set)} validation images right after {seconds:.0f} s")
            print(f"best epoch: {run.progress.best:.2f} %, in {best}")
            print(f"curves: {run.output / 'curves.png'}")
        return top1
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
