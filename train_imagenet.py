#!/usr/bin/env python
"""Trains a CONTAINER, or any other timm model, on a folder of images.

    python train_imagenet.py                                        # a small model on handwritten digits
    python train_imagenet.py --data-dir imagenet                    # DIR/train/CLASS/*, DIR/val/CLASS/*
    torchrun --nproc_per_node=8 train_imagenet.py --data-dir imagenet --resume auto --output run
    python train_imagenet.py --data-dir imagenet --eval --checkpoint run/model_best.safetensors

The loop is `train_one_epoch` in container/training/loop.py; `Run` in run.py beside it saves, evaluates and reports.
Settings come from container/training/recipes/NAME.yaml: `digits` without data, else `paper`, or --recipe NAME. Flags
override them.
"""

import argparse
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

if "OMP_WAIT_POLICY" not in os.environ:  # else idle threads wait busily: beside other work that is 13 times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # read when torch is imported

import timm
import torch
import torch.distributed as dist
from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset, resolve_model_data_config
from timm.models import get_pretrained_cfg
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.task import TrainingTask
from timm.utils import ParseKwargs, freeze

import container.training
from container.container import from_released, is_released
from container.errors import in_one_line, suggest
from container.images import MAX_SIDE
from container.training import (
    HALF,
    Checkpoints,
    Compute,
    Divergence,
    Run,
    Teacher,
    check_classes,
    compose_accents,
    create_datasets,
    create_val_loader,
    default_workers,
    describe,
    evaluate,
    join_group,
    name_killed_workers,
    number,
    on_first_rank,
    open_photos,
    open_validation,
    parse_with_recipe,
    seed_everything,
    speed_up_depthwise,
    tell_unreadable,
)

RECIPES = Path(container.training.__file__).parent / "recipes"

COUNT, NATURAL, SIDE = (number(int, values) for values in ("[1, inf)", "[0, inf)", f"[1, {MAX_SIDE}]"))
AMOUNT, SHARE, PART, RATE = (number(float, values) for values in ("[0, inf)", "[0, 1]", "(0, 1]", "[0, 1)"))

# Arguments of models and optimizers that are not for --model-args and --opt-args, and what sets them.
OWNERS = {
    "--model-args": {
        "pretrained": "--pretrained",
        "checkpoint_path": "--checkpoint",
        "drop_path_rate": "--drop-path",
        "img_size": "--img-size",
        "in_chans": "the data",
        "num_classes": "the data",
    },
    "--opt-args": {"lr": "--lr-base", "weight_decay": "--weight-decay", "layer_decay": "--layer-decay"},
}


class Pairs(ParseKwargs):
    """KEY=VALUE ..., as timm reads them."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        """Refuses what is none, in one line."""
        if odd := [value for value in values if not value.partition("=")[1]]:
            parser.error(f"{option} {odd[0]} is not KEY=VALUE")
        for key, owner in OWNERS[option or ""].items():
            if any(value.startswith(f"{key}=") for value in values):
                parser.error(f"{option} {key} is set by {owner}")
        super().__call__(parser, namespace, values, option)
        pairs = {
            key: list(part) if isinstance(part, tuple) else part for key, part in getattr(namespace, self.dest).items()
        }
        setattr(namespace, self.dest, pairs)  # YAML has no tuples, and a run's settings are compared


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the recipe and the command line.

    Args:
        argv: Arguments, or None for those of the process.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--data-dir DIR] [--recipe NAME] [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    switch = argparse.BooleanOptionalAction
    run = parser.add_argument_group("run")
    run.add_argument("--recipe", help="settings: the name of one in container/training/recipes/, or a YAML file")
    run.add_argument(
        "--output", help="new folder for everything the run writes; default: output, or output-1, ... if it exists"
    )
    run.add_argument(
        "--resume",
        choices=("auto", "force"),
        help="continue the run in --output if there is one; force: even with different settings",
    )
    run.add_argument(
        "--save-minutes", type=AMOUNT, default=10.0, help="minutes between checkpoints, besides one every epoch"
    )
    run.add_argument("--save-steps", type=NATURAL, default=0, help="steps between checkpoints, 0 for none")
    run.add_argument("--wandb", metavar="PROJECT", help="also log to this Weights & Biases project")
    run.add_argument("--log-steps", type=COUNT, default=50, help="steps between lines in steps.csv")
    run.add_argument(
        "--eval", action="store_true", help="evaluate the weights of --checkpoint or --pretrained, and exit"
    )
    run.add_argument(
        "--dry-run",
        nargs="?",
        type=COUNT,
        const=1,
        default=0,
        metavar="PROCESSES",
        help="print what the run would cost with this many processes, on any --device, and exit",
    )
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to train on")
    run.add_argument("--seed", type=NATURAL, default=0, help="seed for weights, shuffling and augmentation")
    run.add_argument("--epochs", type=COUNT, help="number of epochs")
    run.add_argument("--batch-size", type=COUNT, help="images per process and forward pass")
    run.add_argument("--grad-accum", type=COUNT, help="forward passes per optimizer step")
    run.add_argument(
        "--amp", choices=("none", *HALF), help="16-bit type for mixed precision; recipes set one for GPUs only"
    )
    run.add_argument("--channels-last", action=switch, help="use the NHWC memory layout")
    run.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="use torch.compile; none turns it off"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-dir",
        nargs="+",
        metavar="DIR",
        help="folder with train/CLASS/* and val/CLASS/*; several for --distill 1; default: scikit-learn's digits",
    )
    data.add_argument("--exclude", metavar="PATTERN", help="file names that --distill 1 leaves out")
    data.add_argument(
        "--dataset", default="", help="torch/cifar10, torch/cifar100, hfds/NAME or wds/ instead of folders"
    )
    data.add_argument(
        "--train-split", default="train", help="training split of Hugging Face data, or WebDataset shards"
    )
    data.add_argument("--val-split", default="validation", help="the same for validation")
    data.add_argument("--num-classes", type=COUNT, help="expected number of classes; required for WebDataset")
    data.add_argument("--real-labels", help="ImageNet-ReaL's JSON: --eval also reports accuracy on its labels")
    data.add_argument("--img-size", type=SIDE, help="image size; default: the model's")
    data.add_argument(
        "--crop-pct", type=PART, help="centre crop in evaluation, as a share of the side; default: the model's"
    )
    data.add_argument(
        "--start-size", type=SIDE, help="image size in the first epoch, growing to the full size by the last"
    )
    data.add_argument(
        "--workers",
        type=NATURAL,
        default=default_workers(),
        help="data loading workers per process; default: the process's share of the cores less one, at most 16",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a timm model name")
    model.add_argument("--pretrained", action="store_true", help="start from the model's pre-trained weights")
    model.add_argument("--checkpoint", help="start from the weights in this file")
    model.add_argument("--model-args", nargs="*", default={}, action=Pairs, help="more model arguments, as KEY=VALUE")
    model.add_argument("--drop-path", type=RATE, help="stochastic depth rate of the last block")
    model.add_argument(
        "--grad-checkpointing", action=switch, help="recompute activations in the backward pass to save memory"
    )
    model.add_argument("--freeze", action=switch, help="train only the classifier")
    model.add_argument(
        "--ema-decay", type=SHARE, help="decay per step of an average of the weights, evaluated as well; 0 for none"
    )
    model.add_argument("--ema-warmup", action=switch, help="start with a smaller decay")
    model.add_argument("--best", choices=("model", "ema"), help="which weights to keep as the best: raw or averaged")
    model.add_argument("--teacher", help="a timm model to distil from")
    model.add_argument("--teacher-checkpoint", help="the teacher's weights; default: its pre-trained ones")
    model.add_argument(
        "--distill", type=SHARE, default=0.5, help="weight of the teacher in the loss; with 1, labels are not read"
    )
    model.add_argument("--teacher-size", type=SIDE, help="image size for the teacher; default: the model's")
    model.add_argument(
        "--temperature",
        type=number(float, "(0, inf)"),
        default=1.0,
        help="softmax temperature in the teacher's part of the loss",
    )
    model.add_argument(
        "--view-epochs",
        type=NATURAL,
        default=0,
        help="repeat the same views after this many epochs, so that the teacher runs once for each",
    )
    model.add_argument("--view-dir", help="folder for the teacher's logits for these views; default: in --output")
    optim = parser.add_argument_group("optimization (cosine)")
    optim.add_argument("--opt", help="a timm optimizer")
    optim.add_argument("--opt-args", nargs="*", default={}, action=Pairs, help="more optimizer arguments, as KEY=VALUE")
    optim.add_argument("--lr-base", type=AMOUNT, help="learning rate for 512 images per step, scaled linearly")
    optim.add_argument(
        "--layer-decay", type=PART, help="factor by which the learning rate falls with each stage below the head"
    )
    optim.add_argument("--weight-decay", type=AMOUNT, help="weight decay, of parameters with two or more dimensions")
    optim.add_argument("--warmup-epochs", type=NATURAL, help="epochs of learning rate warm-up")
    optim.add_argument("--warmup-lr", type=AMOUNT, help="learning rate at the first step")
    optim.add_argument("--min-lr", type=AMOUNT, help="learning rate at the last step")
    optim.add_argument(
        "--sched-on-updates", action=switch, help="update the learning rate every step instead of every epoch"
    )
    optim.add_argument("--sched-late", action=switch, default=False, help=argparse.SUPPRESS)  # `paper` alone sets it
    optim.add_argument("--clip-grad", type=AMOUNT, help="maximum gradient norm, 0 for none")
    optim.add_argument(
        "--loss", choices=("ce", "bce"), default="ce", help="cross-entropy, or binary cross-entropy per class"
    )
    optim.add_argument("--smoothing", type=RATE, help="label smoothing")
    augment = parser.add_argument_group("augmentation")
    augment.add_argument("--scale", type=PART, nargs=2, help="smallest and largest area of a random crop")
    augment.add_argument(
        "--ratio",
        type=number(float, "(0, inf)"),
        nargs=2,
        default=[3 / 4, 4 / 3],
        help="smallest and largest width of a random crop, as a multiple of its height; default: 3/4 to 4/3",
    )
    augment.add_argument(
        "--train-interpolation", choices=("bilinear", "bicubic", "random"), help="of random crops; default: the model's"
    )
    augment.add_argument("--hflip", type=SHARE, help="probability of a horizontal flip")
    augment.add_argument("--aa", help="timm's auto-augment policy, '' for none")
    augment.add_argument(
        "--color-jitter", type=AMOUNT, help="strength of colour jitter, used without an auto-augment policy"
    )
    augment.add_argument(
        "--aug-repeats", type=NATURAL, help="augmented copies of each image in an epoch, 0 for no repeats"
    )
    augment.add_argument("--reprob", type=SHARE, help="probability of random erasing")
    augment.add_argument("--mixup", type=AMOUNT, help="alpha of mixup, 0 for none")
    augment.add_argument("--cutmix", type=AMOUNT, help="alpha of cutmix, 0 for none")
    augment.add_argument("--mixup-off-epoch", type=NATURAL, help="epoch after which mixup and cutmix stop")

    given = parser.parse_args(argv)
    recipe = given.recipe or ("paper" if given.data_dir or given.dataset not in ("", "digits") else "digits")
    beside = Path(given.checkpoint or "").with_name("args.yaml") if given.checkpoint else None
    if given.eval and not given.recipe and beside is not None and beside.is_file():
        recipe = str(beside)  # what the run that left the checkpoint was: model, data, image size
    args = parse_with_recipe(parser, argv, RECIPES, recipe)
    args.recipe = recipe
    if args.output is None:
        args.output = "output"
        if args.resume and (others := sorted(map(str, Path().glob("output-[0-9]*")))):
            parser.error(
                f"--resume {args.resume} needs --output, as there are several runs: output, {', '.join(others)}"
            )
    if given.eval and given.checkpoint:
        args.pretrained = given.pretrained
    args.compile = None if args.compile == "none" else args.compile
    if args.data_dir is not None and not (learns_alone(args) and not args.dataset):
        if len(args.data_dir) > 1:
            parser.error(
                f"{len(args.data_dir)} folders, but only a teacher's logits (--distill 1) are learned from many"
            )
        args.data_dir = args.data_dir[0]
    refuse_unused(parser, args, given)
    if args.view_epochs and (args.mixup or args.cutmix or args.reprob):
        parser.error("--mixup, --cutmix and --reprob change the views that --view-epochs repeats")
    if given.amp is None and args.device == "cpu":
        args.amp = "none"  # recipes mean GPUs: on a CPU float16 takes 9 times as long as float32
    for name, (least, most) in (("scale", args.scale), ("ratio", args.ratio)):
        if least > most:
            parser.error(f"--{name} {least} {most} has the largest first")
    args.clip_grad = args.clip_grad or None
    args.sched_late = args.sched_late and not args.sched_on_updates  # only whole epochs can be late
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
            near = suggest(name, timm.list_models())
            parser.error(f"unknown model {name}: {near or '`container list` has ours, timm.list_models() all'}")
        try:
            get_pretrained_cfg(name)
        except RuntimeError as error:  # no such tag
            parser.error(str(error))
    if given.drop_path is None and args.drop_path and not _has_drop_path(args.model):
        print(f"{args.model} has no stochastic depth: the recipe's drop_path {args.drop_path} is not used")
        args.drop_path = 0.0
    return args


def refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace, given: argparse.Namespace) -> None:
    """Refuses settings that would have no effect, as they belong to data or a mode that is not asked for.

    Args:
        parser: The argument parser.
        args: Settings of the recipe and the command line.
        given: Those of the command line alone. In an evaluation they count, as the data need not be the run's.
    """
    kind = args.dataset.split("/")[0].lower()
    for used, owner, names in (
        (kind in ("hfds", "wds"), "--dataset hfds/NAME and wds/", ("train_split", "val_split")),
        (kind != "digits", "other data than digits", ("data_dir",)),
        (args.teacher, "--teacher NAME", ("teacher_checkpoint", "distill", "temperature")),
        (
            learns_alone(args) or args.eval,
            "--teacher NAME --distill 1",
            ("exclude", "teacher_size", "view_epochs", "view_dir"),
        ),
        (args.eval, "--eval", ("real_labels",)),
    ):
        for name in names:
            if not used and getattr(given if args.eval else args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for {owner}")


def classifier_names(name: str) -> tuple[str, ...]:
    """Names of a timm model's classifiers: one, or two of a distilled model."""
    cfg = get_pretrained_cfg(name)
    names = cfg.classifier if cfg else None
    return (names,) if isinstance(names, str) else tuple(names or ())


def known_classes(name: str, checkpoint: str | None = None) -> tuple[int, list[str]]:
    """Number of classes of a model's weights, and their names if known.

    Args:
        name: A timm model.
        checkpoint: Weights file, or None for the model's pretrained weights.
    """
    cfg = get_pretrained_cfg(name)
    known, names = cfg.num_classes if cfg else 0, getattr(cfg, "label_names", None)
    if checkpoint and cfg is not None:
        head, *_ = classifier_names(name) or ("",)
        known = len(container.weights.read(checkpoint).get(f"{head}.weight", ()))
        names = container.weights.class_names(checkpoint)
    subset = None if names else infer_imagenet_subset(dict(num_classes=known))
    return known, [compose_accents(name) for name in names or (ImageNetInfo(subset).label_names() if subset else ())]


def learns_alone(args: argparse.Namespace) -> bool:
    """Whether a teacher's logits are all that is learned, and labels are not read."""
    return bool(args.teacher) and args.distill == 1 and not args.eval


def _has_drop_path(name: str) -> bool:
    """Whether a model of timm's takes `drop_path_rate`; ResNets and transformers do, GhostNet and RepViT do not."""
    try:
        with torch.device("meta"):
            timm.create_model(name, drop_path_rate=0.1)
    except TypeError as error:
        return "drop_path_rate" not in str(error)
    return True


def build_model(
    args: argparse.Namespace, num_classes: int, device: torch.device, class_names: list[str] | None = None
) -> torch.nn.Module:
    """The model with as many classes as the data, at the image size asked for, with the weights asked for."""
    options: dict[str, Any] = dict(args.model_args)
    cfg = get_pretrained_cfg(args.model)
    if args.img_size is not None and cfg is not None and cfg.fixed_input_size:
        options["img_size"] = args.img_size  # others take any size, and some no such argument
    known = cfg.num_classes if cfg else None
    if args.checkpoint:
        weights = container.weights.read(args.checkpoint, use_ema=None if args.best == "ema" else False)
        if is_released(weights):
            weights = from_released(weights)
        classifiers = tuple(f"{name}." for name in classifier_names(args.model)) or ("?",)
        if (head := weights.get(f"{classifiers[0]}weight")) is not None:
            known = len(head)
        names = container.weights.class_names(args.checkpoint)
        if args.eval:
            check_classes(args.checkpoint, names, class_names)
        elif names and class_names and names != class_names:  # others, even if they are as many
            weights, known = {key: t for key, t in weights.items() if not key.startswith(classifiers)}, 0
        options["pretrained_cfg_overlay"] = dict(state_dict=weights, num_classes=known)
    if args.eval and known != num_classes:
        raise ValueError(f"the weights know {known} classes, and the data has {num_classes}")
    create = partial(
        timm.create_model,
        args.model,
        num_classes=num_classes,
        drop_path_rate=args.drop_path or None,  # timm drops a None, for models that have no such argument
        **options,
    )
    if args.checkpoint:
        check_fit(args, create, classifiers)
    model: Any = create(pretrained=args.pretrained or bool(args.checkpoint))
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.freeze:
        freeze(model)
        for parameter in model.get_classifier().parameters():
            parameter.requires_grad = True
    model = model.to(device)
    if device.type == "cpu":
        speed_up_depthwise(model)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def check_fit(args: argparse.Namespace, create: Callable[..., torch.nn.Module], classifiers: tuple[str, ...]) -> None:
    """Refuses a checkpoint of which little fits: timm loads what does, be it nothing, where classes differ."""
    models = []
    for pretrained in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0x5EED)  # so that what is equal in both was not in the file
            models.append(dict(create(pretrained=pretrained).named_parameters()))
    drawn = [key for key, p in models[0].items() if p.numel() > 1 and p.std() > 0 and not key.startswith(classifiers)]
    left = [key for key in drawn if torch.equal(models[0][key], models[1][key])]
    if len(left) > len(drawn) / 10:
        raise ValueError(
            f"{args.checkpoint} is not for {args.model}: {len(left)} of {len(drawn)} weights are not in it, "
            f"{left[0]} among them"
        )


def open_data(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Training data (None for --eval of a folder), validation data, number of classes."""
    if args.eval and args.data_dir and not args.dataset:
        return (None, *open_validation(args.data_dir))
    if learns_alone(args) and args.data_dir and not args.dataset:
        train, val = open_photos(args.data_dir, args.exclude)
        num_classes, train.classes = known_classes(args.teacher, args.teacher_checkpoint)
        if not num_classes:
            raise ValueError(f"{args.teacher_checkpoint or args.teacher} does not say how many classes it knows")
        return train, val, num_classes
    splits = (args.train_split, args.val_split)
    return create_datasets(args.data_dir, args.dataset, splits, args.num_classes, args.batch_size, args.seed)


def check_teacher(args: argparse.Namespace, num_classes: int, class_names: list[str] | None) -> None:
    """Refuses a teacher whose classes are others than the data's; names are compared where both have them."""
    if not args.teacher:
        return
    teacher = args.teacher_checkpoint or args.teacher
    known, names = known_classes(args.teacher, args.teacher_checkpoint)
    if known != num_classes:
        raise ValueError(f"{teacher} knows {known} classes, and the data has {num_classes}")
    if args.teacher_checkpoint:  # otherwise names may be those of ImageNet, by their number
        names = container.weights.class_names(args.teacher_checkpoint) or []
    check_classes(teacher, names, class_names)


def build_task(args: argparse.Namespace, model: torch.nn.Module, device: torch.device) -> TrainingTask:
    """The loss of the model, a teacher's share in it if there is one, compiled and distributed as asked for."""
    soft = bool(args.mixup or args.cutmix)
    criterion: dict[str, Any] = dict(soft_targets=True) if soft else dict(smoothing=args.smoothing)
    criterion["loss_type"] = args.loss
    task: TrainingTask
    if learns_alone(args):
        task = ClassificationTask(model, Divergence(args.temperature), device=device, verbose=False)
    elif args.teacher:
        task = LogitDistillationTask(
            model,
            args.teacher,
            teacher_pretrained_path=args.teacher_checkpoint,
            task_loss_weight=1 - args.distill,
            temperature=args.temperature,
            criterion_kwargs=criterion,
            device=device,
            verbose=False,
        )
    else:
        task = ClassificationTask(model, criterion_kwargs=criterion, device=device, verbose=False)
    if args.ema_decay:
        task.setup_ema(decay=args.ema_decay, use_warmup=args.ema_warmup)
    if args.compile:
        task.compile(backend=args.compile)
    if dist.get_world_size() > 1:
        # A depthwise weight (C, 1, 3, 3) has two sets of strides for one order in memory: torch copies those gradients.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        task.prepare_distributed(device_ids=[device.index] if device.type == "cuda" else None)
    return task


def build_teacher(args: argparse.Namespace, model: Any, device: torch.device) -> Teacher | None:
    """The teacher, if it is the only one to learn from."""
    if not learns_alone(args):
        return None
    config = resolve_model_data_config(model)
    compute = Compute(device, args.amp, channels_last=True)
    return Teacher(
        *(args.teacher, args.teacher_checkpoint, model.num_classes, args.teacher_size),
        *(config["mean"], config["std"], compute),
    )


def evaluate_weights(args: argparse.Namespace, device: torch.device) -> float:
    """Evaluates --checkpoint or --pretrained weights, prints the result, and returns top-1 in percent."""
    real = None
    _, dataset, num_classes = open_data(args)
    names = getattr(dataset, "classes", None)
    known, known_names = known_classes(args.model, args.checkpoint)
    part = None
    if names and set(names) < set(known_names):  # as of ImageNet-A, ImageNet-R or Imagenette
        part = torch.tensor([known_names.index(name) for name in names], device=device)
        num_classes, names = known, known_names
    model = build_model(args, num_classes, device, names)
    if args.real_labels:
        if dist.get_world_size() > 1:
            raise ValueError("--real-labels needs all images in one process")
        labels = len(json.loads(Path(args.real_labels).read_text()))
        names = {f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(labels)}
        if set(files := dataset.filenames(basename=True)) != names:
            raise ValueError(f"the images are not those of {args.real_labels} ({labels} labels)")
        real = RealLabelsImagenet(files, args.real_labels)
    config = resolve_model_data_config(model, args=dict(img_size=args.img_size, crop_pct=args.crop_pct))
    task = ClassificationTask(model, device=device, verbose=False)
    compute = Compute(device, args.amp, args.channels_last)
    loader = create_val_loader(dataset, config, args.batch_size, args.workers, device)
    metrics = evaluate(task, loader, compute, real=real, classes=part)
    tell_unreadable(dataset, "does not count")
    if dist.get_rank() == 0:
        side = " x ".join(map(str, config["input_size"][1:]))
        if told := getattr(dataset, "left_out", ""):
            print(told)
        print(f"{metrics['images']} images of {num_classes} classes at {side}, loss {metrics['loss']:.4f}")
        print(f"{metrics['top1']:.2f} % top-1, {metrics['top5']:.2f} % top-5")
        if part is not None:
            print(
                f"{metrics['part_top1']:.2f} % top-1, {metrics['part_top5']:.2f} % top-5 among the {len(part)} classes "
                "of these images"
            )
        if real is not None:
            print(f"{real.get_accuracy(1):.2f} % top-1, {real.get_accuracy(5):.2f} % top-5 by {args.real_labels}")
    return metrics["top1"]


@contextmanager
def one_line(*errors: type[BaseException]) -> Iterator[None]:
    """Ends the process with one line for errors of the user or the machine.

    With CONTAINER_TRACEBACK=1 the traceback is shown.
    """
    try:
        yield
    except errors as error:
        if os.environ.get("CONTAINER_TRACEBACK"):
            raise
        raise SystemExit(f"train_imagenet.py: {in_one_line(error)}") from None


def main(argv: Sequence[str] | None = None) -> float:
    """Trains or evaluates in this process, alone or as one of a launcher's.

    Args:
        argv: Arguments, or None for those of the process.

    Returns:
        Validation top-1 in percent; NaN for a dry run.
    """
    args = parse_args(argv)
    with one_line(KeyError, RuntimeError, ValueError):
        device = join_group("cpu" if args.dry_run else args.device)
    args.device = args.device if args.dry_run else str(device)
    run = None
    try:
        with one_line(AssertionError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError):
            if args.eval:
                return evaluate_weights(args, device)
            train_set, val_set, num_classes = open_data(args)
            if num_classes < 2:
                raise ValueError(f"{args.data_dir} has one class: there is nothing to tell apart")
            check_teacher(args, num_classes, getattr(train_set, "classes", None))
            seed_everything(args.seed)
            start = args
            if args.resume and on_first_rank(lambda: bool(Checkpoints(args.output).paths())):
                # A run's checkpoints hold all that it began with, whose files may be gone.
                start = argparse.Namespace(**vars(args) | dict(checkpoint=None, pretrained=False))
            model = build_model(start, num_classes, device, getattr(train_set, "classes", None))
            teacher = build_teacher(args, model, device)
            run = Run(args, model, build_task(args, model, device), train_set, val_set, teacher)
            if run.rank == 0:
                print(describe(run))
            if args.dry_run:
                return math.nan
            asked, resumed = args.output, run.open()
            if run.rank == 0:
                print(f"output: {run.output}" + ("" if str(run.output) == asked else f" ({asked} exists)"))
                if resumed:
                    print(f"going on after {run.progress.epoch} epochs and {run.progress.step} steps")
        with one_line(FloatingPointError, OSError, ValueError, torch.OutOfMemoryError), name_killed_workers():
            top1 = run.train()
        if run.rank == 0:
            seconds, best = run.progress.total_seconds, run.output / "model_best.safetensors"
            counted = run.progress.history[-1]["eval_images"]
            print(f"\n{top1:.2f} % top-1 on {counted} validation images, after {seconds:.0f} s")
            kind = " of averaged weights" if args.best == "ema" else ""
            print(f"best epoch{kind}: {run.progress.best:.2f} %, saved in {best}")
            print(f"curves: {run.output / 'curves.png'}")
        return top1
    finally:
        if run is not None:
            run.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
