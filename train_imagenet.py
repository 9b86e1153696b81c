#!/usr/bin/env python
"""Trains a CONTAINER, or any other timm model, on a folder of images.

    python train_imagenet.py                                                  # a small model on handwritten digits
    python train_imagenet.py --data-dir imagenet --model container_light      # DIR/train/CLASS/*, DIR/val/CLASS/*

Defaults are the released recipe of CONTAINER-LIGHT (DeiT's) as far as one process goes; the digits have their own.
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
import yaml
from timm.data import FastCollateMixup, create_loader, resolve_model_data_config
from timm.data.loader import PrefetchLoader
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask
from timm.utils import AverageMeter, CheckpointSaver, get_outdir, random_seed, update_summary
from tqdm import tqdm

import container  # noqa: F401  registers the models
from container.training import Digits, create_datasets, plot_curves

# 1,437 images of 32 x 32 seen 12 times: gentle crops, no mirror images (a mirrored 2 is no 2), no mixing.
DIGITS = dict(
    model="container_light_nano_32",
    epochs=12,
    batch_size=32,
    lr_base=0.02,
    warmup_epochs=2,
    drop_path=0.0,
    scale=[0.6, 1.0],
    hflip=0.0,
    aa=None,
    reprob=0.0,
    mixup=0.0,
    cutmix=0.0,
    workers=0,
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the file's docstring as it stands."""


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Reads the command line; without `--data-dir` the defaults are those of DIGITS.

    Args:
        argv: Arguments, or None for those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", help="folder with train/CLASS/* and val/CLASS/*; without it, scikit-learn's digits")
    data.add_argument("--img-size", type=int, help="side of the images, None for the model's own")
    data.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that load data")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="container_light", help="a timm model name")
    model.add_argument("--pretrained", action="store_true", help="start from the model's pretrained weights")
    model.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth of the last block")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output", default="output", help="new folder for checkpoints, log and picture (-1, -2, ... if taken)"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run.add_argument("--device", default=device, help="where to train")
    run.add_argument("--seed", type=int, default=0, help="of weights, shuffling and augmentation")
    run.add_argument("--epochs", type=int, default=300, help="passes over the training images")
    run.add_argument("--batch-size", type=int, default=128, help="images per step")
    optim = parser.add_argument_group("optimization (AdamW, cosine)")
    optim.add_argument("--lr-base", type=float, default=5e-4, help="learning rate for 512 images, scaled linearly")
    optim.add_argument("--weight-decay", type=float, default=0.05, help="of what has two dimensions or more")
    optim.add_argument("--warmup-epochs", type=int, default=5, help="epochs of rising learning rate")
    optim.add_argument("--warmup-lr", type=float, default=1e-6, help="learning rate of the first step")
    optim.add_argument("--min-lr", type=float, default=1e-5, help="learning rate of the last step")
    optim.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    augment = parser.add_argument_group("augmentation")
    augment.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of a random crop")
    augment.add_argument("--hflip", type=float, default=0.5, help="probability of a mirror image")
    augment.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="auto-augment policy of timm")
    augment.add_argument("--reprob", type=float, default=0.25, help="probability of random erasing")
    augment.add_argument("--mixup", type=float, default=0.8, help="alpha of mixup, 0 for none")
    augment.add_argument("--cutmix", type=float, default=1.0, help="alpha of cutmix, 0 for none")
    if parser.parse_args(argv).data_dir is None:
        parser.set_defaults(**DIGITS)
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "img_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive")
    if not timm.is_model(args.model):
        parser.error(f"unknown model {args.model}; this package has {', '.join(timm.list_models('container*'))}")
    return args


def build_model(args: argparse.Namespace, num_classes: int) -> torch.nn.Module:
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
    ).to(args.device)


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
        scheduler.step_update(epoch * len(loader) + step + 1)
        losses.update(value, len(images))
        bar.update(len(images))
        bar.set_postfix(epoch=epoch + 1, loss=f"{losses.avg:.3f}", refresh=False)
    return dict(loss=losses.avg)


@torch.inference_mode()
def evaluate(task: ClassificationTask, loader: PrefetchLoader) -> Dict[str, float]:
    """Loss, top-1 and top-5 (in percent) over the validation data."""
    task.eval()
    evaluator = task.create_evaluator()
    model: Any = task.get_eval_model()
    for images, targets in loader:
        evaluator.update(model(images), targets)
    return evaluator.compute()


def main(argv: Optional[Sequence[str]] = None) -> float:
    """Trains, evaluates after every epoch, and leaves checkpoints, `summary.csv`, `args.yaml` and `curves.png`.

    Args:
        argv: Arguments, or None for those of the process.

    Returns:
        Validation top-1 of the last epoch, in percent.
    """
    args = parse_args(argv)
    random_seed(args.seed)
    try:
        train_set: Any
        val_set: Any
        if args.data_dir is None:
            train_set, val_set, num_classes = Digits(train=True), Digits(train=False), Digits.num_classes
        else:
            train_set, val_set, num_classes = create_datasets(args.data_dir)
        if len(train_set) < args.batch_size:
            raise ValueError(f"a batch of {args.batch_size} for {len(train_set)} training images")
        model = build_model(args, num_classes)
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"train_imagenet.py: {error}") from None

    config = resolve_model_data_config(model, args=dict(img_size=args.img_size))
    size, mean, std = config["input_size"], config["mean"], config["std"]
    common: Dict[str, Any] = dict(
        input_size=size,
        batch_size=args.batch_size,
        interpolation=config["interpolation"],
        mean=mean,
        std=std,
        num_workers=args.workers,
        device=torch.device(args.device),
        pin_memory=args.device.startswith("cuda"),
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
        re_prob=args.reprob,
        re_mode="pixel",
        collate_fn=mixup,
        **common,
    )
    val_loader = create_loader(val_set, crop_pct=config["crop_pct"], **common)

    criterion = dict(soft_targets=True) if mixup else dict(smoothing=args.smoothing)
    task = ClassificationTask(model, criterion_kwargs=criterion, device=torch.device(args.device), verbose=False)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=args.lr_base * args.batch_size / 512, weight_decay=args.weight_decay
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        warmup_epochs=min(args.warmup_epochs, args.epochs - 1),
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    output = Path(get_outdir(args.output, inc=True))
    (output / "args.yaml").write_text(yaml.safe_dump(vars(args)))
    summary, curves = output / "summary.csv", output / "curves.png"
    saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(output), max_history=2, task=task)

    params = sum(p.numel() for p in model.parameters())
    print(
        f"{args.model}: {params / 1e6:.2f} M parameters, {num_classes} classes, {size[1]} x {size[2]} on {args.device}"
    )
    print(f"{len(train_set)} images to train on, {len(val_set)} to validate on, {args.epochs} epochs")
    start = time.time()
    images = args.epochs * len(train_loader) * args.batch_size
    metrics: Dict[str, float] = {}
    try:
        refresh = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file needs few lines
        with tqdm(total=images, unit="img", unit_scale=True, dynamic_ncols=True, mininterval=refresh) as bar:
            for epoch in range(args.epochs):
                losses = train_one_epoch(task, train_loader, optimizer, scheduler, epoch, bar)
                metrics = evaluate(task, val_loader)
                lr = optimizer.param_groups[0]["lr"]
                update_summary(epoch, losses, metrics, str(summary), lr=lr)
                saver.save_checkpoint(epoch, metric=metrics["top1"])
                plot_curves(summary, curves)
                bar.write(f"epoch {epoch + 1:3d}: loss {losses['loss']:.3f}, validation {metrics['top1']:.2f} % top-1")
    except (AssertionError, FloatingPointError) as error:
        raise SystemExit(f"train_imagenet.py: {error}") from None
    print(f"\n{metrics['top1']:.2f} % of {len(val_set)} validation images right after {time.time() - start:.0f} s")
    print(f"best epoch: {saver.best_metric:.2f} %, in {output / 'model_best.pth.tar'}")
    print(f"curves: {curves}")
    return metrics["top1"]


if __name__ == "__main__":
    main()
