#!/usr/bin/env python
"""Trains a CONTAINER, or any other timm model, on a folder of images.

    python train_imagenet.py                                        # a small model on handwritten digits
    python train_imagenet.py --data-dir imagenet                    # DIR/train/CLASS/*, DIR/val/CLASS/*
    torchrun --nproc_per_node=8 train_imagenet.py --data-dir imagenet --model container_light

Settings come from recipes/NAME.yaml: `digits` without --data-dir, else `paper`, or --recipe NAME. Flags override them.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import timm
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_file
from timm.data import FastCollateMixup, create_loader, resolve_model_data_config
from timm.data.loader import PrefetchLoader
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask
from timm.task.evaluator import evaluation_sample_limit
from timm.utils import (
    AverageMeter,
    CheckpointSaver,
    distribute_bn,
    get_outdir,
    get_state_dict,
    random_seed,
    reduce_tensor,
    unwrap_model,
    update_summary,
)
from tqdm import tqdm

import container  # noqa: F401  registers the models
from container.training import Digits, create_datasets, join_group, parse_with_recipe, plot_curves

RECIPES = Path(__file__).parent / "recipes"


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Reads the recipe and the command line.

    Args:
        argv: Arguments, or None for those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = parser.add_argument_group("run")
    run.add_argument("--recipe", help="settings: a name in recipes/")
    run.add_argument("--output", default="output", help="new folder for all that a run leaves (-1, -2, ... if taken)")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    run.add_argument("--seed", type=int, default=0, help="of weights, shuffling and augmentation")
    run.add_argument("--epochs", type=int, help="passes over as many images as there are")
    run.add_argument("--batch-size", type=int, help="images per step and process")
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", help="folder with train/CLASS/* and val/CLASS/*; without it, scikit-learn's digits")
    data.add_argument("--img-size", type=int, help="side of the images, if not the model's own")
    data.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loaders of data per process")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a timm model name")
    model.add_argument("--pretrained", action="store_true", help="start from the model's pretrained weights")
    model.add_argument("--drop-path", type=float, help="stochastic depth of the last block")
    model.add_argument("--ema-decay", type=float, help="decay per step of averaged weights, kept and evaluated as well")
    model.add_argument("--best", choices=("model", "ema"), help="whose accuracy says which checkpoint is the best")
    optim = parser.add_argument_group("optimization (AdamW, cosine)")
    optim.add_argument("--lr-base", type=float, help="learning rate for 512 images in a step, scaled linearly")
    optim.add_argument("--weight-decay", type=float, help="of what has two dimensions or more")
    optim.add_argument("--warmup-epochs", type=int, help="epochs of rising learning rate")
    optim.add_argument("--warmup-lr", type=float, help="learning rate of the first step")
    optim.add_argument("--min-lr", type=float, help="learning rate of the last step")
    optim.add_argument(
        "--sched-on-updates", action=argparse.BooleanOptionalAction, help="new rate every step, not epoch"
    )
    optim.add_argument("--smoothing", type=float, help="label smoothing")
    augment = parser.add_argument_group("augmentation")
    augment.add_argument("--scale", type=float, nargs=2, help="area of a random crop")
    augment.add_argument("--hflip", type=float, help="probability of a mirror image")
    augment.add_argument("--aa", help="auto-augment policy of timm, '' for none")
    augment.add_argument("--aug-repeats", type=int, help="augmented copies of an image in one epoch, 0 for one of each")
    augment.add_argument("--reprob", type=float, help="probability of random erasing")
    augment.add_argument("--mixup", type=float, help="alpha of mixup, 0 for none")
    augment.add_argument("--cutmix", type=float, help="alpha of cutmix, 0 for none")

    given = parser.parse_args(argv)
    recipe = given.recipe or ("digits" if given.data_dir is None else "paper")
    args = parse_with_recipe(parser, argv, RECIPES, recipe)
    args.recipe = recipe
    for name in ("epochs", "batch_size", "img_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size} is odd, but mixup and cutmix mix images in pairs")
    if args.best == "ema" and not args.ema_decay:
        parser.error("--best ema needs --ema-decay")
    if not timm.is_model(args.model):
        parser.error(f"unknown model {args.model}; this package has {', '.join(timm.list_models('container*'))}")
    return args


def build_model(args: argparse.Namespace, num_classes: int, device: torch.device) -> torch.nn.Module:
    """The model with as many classes as the data, at the image size asked for."""
    size, cfg = {}, get_pretrained_cfg(args.model)
    if args.img_size is not None and cfg is not None and cfg.fixed_input_size:
        size = dict(img_size=args.img_size)  # others take any size, and some no such argument
    return timm.create_model(
        args.model,
        pretrained=args.pretrained,
        num_classes=num_classes,
        drop_path_rate=args.drop_path or None,  # timm drops a None, for models that have no such argument
        **size,
    ).to(device)


def train_one_epoch(
    task: ClassificationTask,
    loader: PrefetchLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    epoch: int,
    bar: tqdm,
) -> Dict[str, float]:
    """One pass over the training data.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    task.train()
    losses = AverageMeter()
    for step, (images, targets) in enumerate(loader):
        optimizer.zero_grad()
        loss = task(images, targets)["loss"]
        if not math.isfinite(value := loss.item()):
            lr = optimizer.param_groups[0]["lr"]
            raise FloatingPointError(f"loss is {value} in epoch {epoch + 1}, step {step + 1}, at lr {lr:.2e}")
        loss.backward()
        optimizer.step()
        task.update_ema()
        scheduler.step_update(epoch * len(loader) + step + 1)
        losses.update(value, len(images))
        bar.update(len(images) * dist.get_world_size())
        bar.set_postfix(epoch=epoch + 1, loss=f"{losses.avg:.3f}", refresh=False)
    scheduler.step(epoch + 1)
    if dist.get_world_size() > 1:  # each process has normed by its own images
        distribute_bn(unwrap_model(task.get_trainable_module()), dist.get_world_size(), reduce=True)
    return dict(loss=reduce_tensor(torch.tensor(losses.avg, device=task.device), dist.get_world_size()).item())


@torch.inference_mode()
def evaluate(task: ClassificationTask, loader: PrefetchLoader, ema: bool = False) -> Dict[str, float]:
    """Loss, top-1 and top-5 (in percent) over the validation data, of the model or of its averaged weights."""
    task.eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    model: Any = unwrap_model(task.get_eval_model(ema=ema))  # every process has its own share, and DDP nothing to do
    for images, targets in loader:
        evaluator.update(model(images), targets)
    return evaluator.compute(distributed=dist.get_world_size() > 1)


def train(args: argparse.Namespace, device: torch.device) -> float:
    """Trains, evaluates after every epoch, and leaves checkpoints, `summary.csv`, `args.yaml` and `curves.png`.

    Args:
        args: As `parse_args` returns them.
        device: This process's.

    Returns:
        Validation top-1 of the last epoch, in percent.

    Raises:
        SystemExit: Data or model do not fit, or the loss is not finite: one line that says how.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    random_seed(args.seed)
    try:
        train_set: Any
        val_set: Any
        if args.data_dir is None:
            train_set, val_set, num_classes = Digits(train=True), Digits(train=False), Digits.num_classes
        else:
            train_set, val_set, num_classes = create_datasets(args.data_dir)
        if len(train_set) < args.batch_size * world:
            raise ValueError(f"a step of {world} x {args.batch_size} for {len(train_set)} training images")
        model = build_model(args, num_classes, device)
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"train_imagenet.py: {error}") from None
    random_seed(args.seed, rank)  # the same weights everywhere, but not the same augmentation

    config = resolve_model_data_config(model, args=dict(img_size=args.img_size))
    size = config["input_size"]
    common: Dict[str, Any] = dict(
        input_size=size,
        batch_size=args.batch_size,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=args.workers,
        distributed=True,
        device=device,
        pin_memory=device.type == "cuda",
    )
    mixup = None
    if args.mixup or args.cutmix:
        mixup = FastCollateMixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)
    train_loader = create_loader(
        train_set,
        is_training=True,
        scale=args.scale,
        hflip=args.hflip,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        re_prob=args.reprob,
        re_mode="pixel",
        collate_fn=mixup,
        **common,
    )
    val_loader = create_loader(val_set, crop_pct=config["crop_pct"], **common)

    criterion = dict(soft_targets=True) if mixup else dict(smoothing=args.smoothing)
    task = ClassificationTask(model, criterion_kwargs=criterion, device=device, verbose=False)
    lr = args.lr_base * args.batch_size * world / 512
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=args.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        warmup_epochs=min(args.warmup_epochs, args.epochs - 1),
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=len(train_loader),
    )
    if args.ema_decay:
        task.setup_ema(decay=args.ema_decay)
    if world > 1:
        task.prepare_distributed(device_ids=[device.index] if device.type == "cuda" else None)

    if rank == 0:
        output = Path(get_outdir(args.output, inc=True))
        (output / "args.yaml").write_text(yaml.safe_dump(vars(args)))
        summary, curves, best = output / "summary.csv", output / "curves.png", output / "model_best.safetensors"
        saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(output), max_history=2, task=task)
        params = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{args.model}: {params:.2f} M parameters, {num_classes} classes, {size[1]} x {size[2]}")
        print(f"{len(train_set)} images to train on, {len(val_set)} to validate on")
        print(
            f"recipe {args.recipe}: {args.epochs} epochs, {world} x {args.batch_size} images a step, on {device.type}"
        )

    start = time.time()
    images = args.epochs * len(train_loader) * args.batch_size * world
    refresh = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file needs few lines
    metrics: Dict[str, float] = {}
    try:
        with tqdm(
            total=images, unit="img", unit_scale=True, dynamic_ncols=True, mininterval=refresh, disable=rank > 0
        ) as bar:
            for epoch in range(args.epochs):
                train_loader.sampler.set_epoch(epoch)
                losses = train_one_epoch(task, train_loader, optimizer, scheduler, epoch, bar)
                metrics = evaluate(task, val_loader)
                if args.ema_decay:
                    metrics |= {f"ema_{key}": value for key, value in evaluate(task, val_loader, ema=True).items()}
                if rank > 0:
                    continue
                update_summary(epoch, losses, metrics, str(summary), lr=optimizer.param_groups[0]["lr"])
                _, best_epoch = saver.save_checkpoint(
                    epoch, metric=metrics["ema_top1" if args.best == "ema" else "top1"]
                )
                if best_epoch == epoch:
                    # The weights that were the best, alone: of a checkpoint with both, timm loads the averaged.
                    state = get_state_dict(task.get_eval_model(ema=args.best == "ema"))
                    save_file({key: tensor.contiguous() for key, tensor in state.items()}, best)
                plot_curves(summary, curves)
                averaged = f", averaged weights {metrics['ema_top1']:.2f} %" if args.ema_decay else ""
                bar.write(
                    f"epoch {epoch + 1:3d}: loss {losses['loss']:.3f}, "
                    f"validation {metrics['top1']:.2f} % top-1{averaged}"
                )
    except (AssertionError, FloatingPointError) as error:
        raise SystemExit(f"train_imagenet.py: {error}") from None
    if rank == 0:
        print(f"\n{metrics['top1']:.2f} % of {len(val_set)} validation images right after {time.time() - start:.0f} s")
        print(f"best epoch: {saver.best_metric:.2f} %, in {best}")
        print(f"curves: {curves}")
    return metrics["top1"]


def main(argv: Optional[Sequence[str]] = None) -> float:
    """Runs `train` in this process, alone or as one of those that torchrun started.

    Args:
        argv: Arguments, or None for those of the process.
    """
    args = parse_args(argv)
    device = join_group(args.device)
    try:
        return train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
