"""Trains a model on 32 x 32 or 64 x 64 images in a given time, with data and augmentation on the device.

python -m benchmarks.cifar --data-dir cifar10 --seconds 180 --graph --out OUT

The speed is measured first. The model is then trained for as many epochs as fit, with a learning rate schedule that
ends with them. The result is that of the last epoch; nothing is chosen by the test images. To repeat a run, pass the
epochs in its record as --epochs. The training loop is that of benchmarks.affinity_study.
"""

import argparse
import copy
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save
from timm.data import Mixup
from torch import nn

from container import weights
from container.files import write_atomically

from . import affinity_study as study
from . import measure


def epoch_seconds(
    model: nn.Module, data: study.Data, recipe: study.Recipe, device: torch.device, steps: int, graph: bool
) -> float:
    """Estimates the duration of an epoch from some training steps and an equal share of the test images.

    Args:
        model: Model on the device. If it uses torch.compile, it is compiled here. Its weights are restored afterwards.
        data: Dataset on the device.
        recipe: Training settings of the run.
        device: Device to train on.
        steps: Number of training steps.
        graph: Whether the steps are replayed as a CUDA graph.

    Returns:
        Seconds per epoch.
    """
    kept = copy.deepcopy(model.state_dict())
    share = steps * recipe.batch_size / len(data.images)
    train, test = steps * recipe.batch_size, max(500, round(share * len(data.test_images)))
    some = data._replace(
        images=data.images[:train],
        labels=data.labels[:train],
        test_images=data.test_images[:test],
        test_labels=data.test_labels[:test],
    )
    probe = recipe._replace(epochs=2, warmup_epochs=0)  # the first includes compilation
    history = study.train(model, 0, some, probe, device, "to measure the speed", graph)
    first, second = (entry["seconds"] for entry in history)
    model.load_state_dict(kept)  # in place, so that a compiled model keeps its tensors
    print(f"  ready after {first:.1f} s", file=sys.stderr)
    return second / share


def main(argv: list[str] | None = None) -> None:
    """Trains the model, and writes `cifar.json` and `MODEL.safetensors` to --out after every epoch."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cifar", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, help="folder in ImageNet layout of 32 x 32 or 64 x 64 images")
    parser.add_argument(
        "--model", default="container_light_nano_32", help="timm model; default: container_light_nano_32"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="time for the whole command; default: 120")
    parser.add_argument("--epochs", type=int, help="number of epochs, however long they take; default: as many as fit")
    parser.add_argument("--batch-size", type=int, default=256, help="images per batch; default: 256")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate; default: 0.002")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to start from; default: random ones")
    parser.add_argument("--cutmix", type=float, default=0.0, help="alpha of CutMix; default: 0, off")
    parser.add_argument(
        "--cutmix-off",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the epochs at the end without CutMix; default: 0",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed; default: 0")
    parser.add_argument("--images", type=int, default=0, help="training images, and half as many to test; default: all")
    parser.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="use torch.compile; default backend: inductor"
    )
    parser.add_argument("--graph", action="store_true", help="replay each step as a CUDA graph; not with --compile")
    parser.add_argument("--device", default="auto", help="device to use; default: auto")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the results")
    parser.add_argument("--name", default="cifar", help="name of the JSON file; default: cifar")
    args = parser.parse_args(argv)
    device, out = measure.pick_device(args.device), Path(args.out)
    if not timm.is_model(args.model):
        raise SystemExit(f"benchmarks: timm knows no model {args.model!r}")
    if args.graph and (args.compile or device.type != "cuda"):
        raise SystemExit("benchmarks: --graph is for a GPU, and without --compile, which makes graphs of its own")
    if not 0 <= args.cutmix_off <= 1:
        raise SystemExit(f"benchmarks: --cutmix-off {args.cutmix_off:g} is no share between 0 and 1")
    study.splits(args.data_dir)
    data = study.load(args.data_dir, args.images, args.images // 2)
    if len(data.images) < args.batch_size:
        raise SystemExit(f"benchmarks: {len(data.images)} images to train on are no batch of {args.batch_size}")
    data = study.Data(data.name, data.classes, *(tensor.to(device) for tensor in data[2:]))
    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, num_classes=data.classes)
    if args.checkpoint:
        try:
            model.load_state_dict(weights.read(args.checkpoint))
        except (OSError, RuntimeError) as error:
            raise SystemExit(f"benchmarks: {textwrap.shorten(str(error), 200)}") from None
    model = model.to(device)
    model = model.to(memory_format=torch.channels_last)
    if args.compile:  # its CUDA graphs save a small model the wait for kernel launches
        model.compile(backend=args.compile, mode="reduce-overhead" if args.compile == "inductor" else None)
    recipe = study.Recipe(batch_size=args.batch_size, lr=args.lr)
    mix = None
    if args.cutmix:
        np.random.seed(args.seed)  # the random generator of timm's CutMix
        mix = Mixup(0.0, args.cutmix, label_smoothing=recipe.smoothing, num_classes=data.classes)
    epochs = args.epochs
    if epochs is None:
        steps = min(40, len(data.images) // args.batch_size)
        epoch = epoch_seconds(model, data, recipe, device, steps, args.graph)
        epochs = max(1, int(0.9 * (args.seconds - (time.perf_counter() - start)) / epoch))
        print(f"  {epoch:.2f} s an epoch: {epochs} fit in {args.seconds:.0f} s", file=sys.stderr)
    recipe = recipe._replace(epochs=epochs, warmup_epochs=min(5, epochs // 4))
    record: dict[str, Any] = dict(
        environment=measure.environment(device),
        model=args.model,
        data=data.name,
        seed=args.seed,
        compile=args.compile,
        graph=args.graph,
        checkpoint=args.checkpoint and Path(args.checkpoint).name,
        cutmix=args.cutmix,
        cutmix_off=args.cutmix_off,
        recipe=recipe._asdict(),
        history=[],
    )
    out.mkdir(parents=True, exist_ok=True)
    for entry in study.train(model, args.seed, data, recipe, device, f"{data.name}, {args.model}", args.graph, mix):
        record["history"].append(entry)
        if mix is not None and entry["epoch"] >= (1 - args.cutmix_off) * epochs:
            mix.mixup_enabled = False
        record["seconds"] = time.perf_counter() - start
        measure.save(out, args.name, record)
        state = {key: tensor.contiguous().cpu() for key, tensor in model.state_dict().items()}
        write_atomically(out / f"{args.model}.safetensors", save(state))
    print(f"{record['history'][-1]['top1']:.2f} % top-1 after {epochs} epochs and {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
