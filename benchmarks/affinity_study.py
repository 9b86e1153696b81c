"""Repeats the paper's comparison of affinities at small scale: one architecture, matched parameters, several seeds.

python -m benchmarks.affinity_study --data-dir cifar10 --data-dir tiny-imagenet-50 --out study      one GPU
python -m benchmarks.affinity_study --data-dir cifar10 --short --out study                          two cores, 2 h

It asks two questions. Which mixture of affinities is best? Does mixing converge in fewer epochs than attention alone?
Every member has the blocks of `container_nano` at the same four grids, with an MLP width that matches the parameter
count of CONTAINER. timm's ResNet, ConvNeXt and DeiT get the width that comes closest. All are trained with one recipe.

The command can be stopped and started again: each finished run (dataset, member, seed) has its own file and is not
repeated. The report is made from these files alone: `runs.csv` (every epoch of every run), `gates.csv`, `table.md`, and
plots. A seed that is run again on the same device gives the same numbers. On a CPU, each run uses one thread, and there
are as many runs at once as cores.
"""

import argparse
import bisect
import csv
import functools
import json
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from container.figures import gates
from container.files import write_atomically

from . import measure

BASE = "container_nano"
ATTENTION_LAST = ("none", "none", "none", "attention")
MEMBERS: dict[str, dict[str, Any]] = {
    "attention": dict(dynamic="attention", static="none"),
    "conv": dict(dynamic="none", static="conv"),
    "mixer": dict(dynamic="none", static="matrix", num_heads=1),
    "mixer_mh": dict(dynamic="none", static="matrix"),
    "pam": dict(dynamic="attention", static="matrix", gate="sum"),
    "container": dict(dynamic="attention", static="conv", gate="free"),
    "light": dict(dynamic=ATTENTION_LAST, static="conv", gate="convex"),
}
PEERS = ("resnet", "convnext", "deit")


class Data(NamedTuple):
    """Dataset in memory, with images as bytes."""

    name: str
    classes: int
    images: Tensor  # (n, 3, S, S), uint8
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Recipe(NamedTuple):
    """Training settings shared by all runs."""

    epochs: int = 12
    images: int = 0  # number of training images, the same for each class; 0 for all
    test_images: int = 0
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 2
    smoothing: float = 0.1


SHORT = Recipe(images=5000, test_images=2500, batch_size=64)


def splits(folder: str) -> tuple[Path, Path]:
    """Returns `train`, and `val` or `test`, of a folder in ImageNet layout.

    Raises:
        SystemExit: One of them is missing.
    """
    root = Path(folder)
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise SystemExit(f"affinity_study: {root} has no train/ and val/ (or test/)")
    return root / "train", test


@functools.cache
def load(folder: str, images: int, test_images: int) -> Data:
    """Loads images from a folder in ImageNet layout.

    Args:
        folder: Folder with `train`, and `val` or `test`.
        images: Number of training images, the first of each class by name; 0 for all.
        test_images: Number of test images, likewise.

    Raises:
        SystemExit: A folder is missing, fewer images than classes are requested, or the images are neither all
            32 x 32 nor all 64 x 64.
    """
    found: list[Tensor] = []
    for split, wanted in zip(splits(folder), (images, test_images), strict=True):
        dataset = ImageFolder(str(split))
        limit = wanted // len(dataset.classes)  # per class
        if wanted and limit < 1:
            raise SystemExit(f"affinity_study: {wanted} images are not one of each of {len(dataset.classes)} classes")
        taken: dict[int, int] = {}
        pixels, labels = [], []
        for path, label in dataset.samples:
            taken[label] = taken.get(label, 0) + 1
            if not limit or taken[label] <= limit:
                pixels.append(pil_to_tensor(dataset.loader(path)))
                labels.append(label)
        sizes = {tuple(image.shape[1:]) for image in pixels}
        if len(sizes) != 1 or not sizes <= {(32, 32), (64, 64)}:
            raise SystemExit(
                f"affinity_study: images of {split} are not all 32 x 32 or all 64 x 64: {sorted(sizes)[:3]}"
            )
        found += [torch.stack(pixels), torch.tensor(labels)]
    return Data(Path(folder).resolve().name, len(dataset.classes), *found)


def parameters(model: nn.Module) -> int:
    """Returns the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def build(name: str, classes: int, size: int, width: float) -> nn.Module:
    """Builds a member with `width` as its MLP ratio, or a peer with that width.

    The grids have a side of 16, 8, 4 and 2 tokens, except for DeiT, which has a single grid with a side of 8.
    """
    widths = tuple(int(width) * m for m in (1, 2, 4, 8))
    if name == "resnet":
        model: Any = timm.create_model("resnet18", num_classes=classes, channels=widths)
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, stride=2, padding=1, bias=False)
        if size == 32:
            model.maxpool = nn.Identity()
        return model
    if name == "convnext":
        return timm.create_model("convnext_atto", num_classes=classes, patch_size=size // 16, dims=widths)
    if name == "deit":  # heads of dimension 16, as ours
        heads = widths[3] // 16
        options: dict[str, Any] = dict(img_size=size, patch_size=size // 8, embed_dim=widths[3], num_heads=heads)
        return timm.create_model("deit_tiny_patch16_224", num_classes=classes, **options)
    patches = (size // 16, 2, 2, 2)
    return timm.create_model(
        BASE, num_classes=classes, img_size=size, patch_sizes=patches, mlp_ratios=width, **MEMBERS[name]
    )


@functools.cache
def _width(name: str, classes: int, size: int) -> float:
    choices = [float(w) for w in range(2, 65, 2)] if name in PEERS else [ratio / 16 for ratio in range(16, 97)]
    with torch.device("meta"):
        target = parameters(build("container", classes, size, 4.0))
        count = functools.cache(lambda width: parameters(build(name, classes, size, width)))
        first = bisect.bisect_left(choices, target, key=count)  # the count grows with the width
        return min(choices[max(first - 1, 0) : first + 1], key=lambda width: abs(count(width) - target))


def create(name: str, classes: int, size: int) -> nn.Module:
    """Creates a member of the study or a peer, with a parameter count as close to CONTAINER's as its width allows.

    Raises:
        SystemExit: No member or peer has that name.
    """
    if name not in (*MEMBERS, *PEERS):
        raise SystemExit(f"affinity_study: no member {name!r}: choose from {', '.join([*MEMBERS, *PEERS])}")
    return build(name, classes, size, _width(name, classes, size))


def augment(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Crops padded images at random, and flips half of them horizontally.

    Args:
        images: (B, 3, S, S), uint8, on the device of the generator.
        pad: Pixels of zero padding on each side.
        generator: Source of the random numbers.
    """
    count, _, side, _ = images.shape
    draw = functools.partial(torch.randint, generator=generator, device=images.device)
    rows, columns = (draw(0, 2 * pad + 1, (count, 1)) + torch.arange(side, device=images.device) for _ in range(2))
    mirrored = draw(0, 2, (count, 1)).bool()
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(
    model: nn.Module,
    seed: int,
    data: Data,
    recipe: Recipe,
    device: torch.device,
    label: str,
    graph: bool = False,
    mix: Mixup | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains a model, and yields an entry after each epoch: training loss, test accuracy, seconds.

    Args:
        model: Model on the device, compiled or not.
        seed: Seed for the order and the augmentation of the images.
        data: Dataset on the device.
        recipe: Training settings.
        device: Device to train on.
        label: Prefix of the line printed after each epoch.
        graph: Whether to replay each step as one CUDA graph, so that a small model does not wait for kernel launches.
            Capturing the graph takes three extra steps, at the lowest learning rate.
        mix: CutMix for a batch on the device, or None. It draws its random numbers from NumPy.
    """
    size = data.images.shape[-1]
    generator = torch.Generator(device).manual_seed(seed)
    kind: dict[str, Any] = dict(fused=True, capturable=True) if graph else {}
    optimizer = create_optimizer_v2(model, "adamw", lr=recipe.lr, weight_decay=recipe.weight_decay, **kind)
    steps = len(data.images) // recipe.batch_size
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps,
        lr_min=recipe.lr / 100,
        warmup_t=recipe.warmup_epochs * steps,
        warmup_lr_init=recipe.lr / 100,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1) * 255

    def cast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    smoothing = recipe.smoothing if mix is None else 0.0  # mixed targets are smoothed already
    images = data.images[: recipe.batch_size].clone()  # a graph always reads its batch from here
    targets = data.labels[: recipe.batch_size].clone()
    if mix is not None:
        targets = mix(images, targets)[1]
    losses = torch.zeros((), device=device)
    part = 500 if device.type == "cpu" else 2500  # a GPU would wait for small batches, a CPU's caches are small
    rates = [torch.tensor(float(group["lr"]), device=device) for group in optimizer.param_groups]

    def forward_backward() -> None:
        with cast():
            logits = model((images - mean) / std)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # before the next forward pass, whose CUDA graph may need this memory
        losses.add_(loss.detach())

    def keep_rates() -> None:
        """Copies the scheduler's new learning rates, which are numbers, to the tensors that a graph reads."""
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            rate.fill_(group["lr"])
            group["lr"] = rate

    step_once: measure.Work = forward_backward
    if graph:
        keep_rates()
        model.train()
        step_once = measure.Graphed(forward_backward)
        step_once.capture()
    for epoch in range(recipe.epochs):
        start = time.perf_counter()
        losses.zero_()
        model.train()
        order = torch.randperm(len(data.images), generator=generator, device=device)
        for step in range(steps):
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            images.copy_(augment(data.images[chosen], size // 8, generator))
            targets.copy_(data.labels[chosen] if mix is None else mix(images, data.labels[chosen])[1])
            step_once()
            schedule.step_update(epoch * steps + step + 1)
            if graph:
                keep_rates()
        model.eval()
        right = torch.zeros((), device=device)
        with torch.inference_mode(), cast():
            for some, answers in zip(data.test_images.split(part), data.test_labels.split(part), strict=True):
                right += (model((some - mean) / std).argmax(1) == answers).sum()
        top1 = 100 * right.item() / len(data.test_labels)
        seconds = time.perf_counter() - start
        loss_mean = losses.item() / steps
        print(f"  {label}, epoch {epoch + 1}: loss {loss_mean:.3f}, top-1 {top1:.2f} %, {seconds:.1f} s", flush=True)
        yield dict(epoch=epoch + 1, train_loss=loss_mean, top1=top1, seconds=seconds)


def run(name: str, seed: int, data: Data, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Trains one member with one seed, on data that is already on the device.

    Returns:
        The settings, the history with one entry per epoch, and alpha and beta of every block.
    """
    torch.manual_seed(seed)
    model = create(name, data.classes, data.images.shape[-1]).to(device)
    history = list(train(model, seed, data, recipe, device, f"{data.name}, {name}, seed {seed}"))
    return dict(
        data=data.name,
        member=name,
        seed=seed,
        parameters=parameters(model),
        recipe=recipe._asdict(),
        environment=measure.environment(device),
        history=history,
        gates={key: list(value) for key, value in gates(model).items()},
    )


def _worker() -> None:
    """Prepares a process for reproducible runs with one CPU thread.

    It ignores Ctrl-C: its parent stops it, or it ends together with its parent.
    """

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


def _finish(file: Path, folder: str, name: str, seed: int, recipe: Recipe, device: torch.device) -> None:
    """Performs one run in a worker process, and writes its result file."""
    data = load(folder, recipe.images, recipe.test_images)
    if len(data.images) < recipe.batch_size:
        raise SystemExit(f"affinity_study: {folder} has {len(data.images)} images, a batch {recipe.batch_size}")
    data = Data(data.name, data.classes, *(tensor.to(device) for tensor in data[2:]))
    result = run(name, seed, data, recipe, device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result, indent=1).encode())


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean and half of its 95 % confidence interval by Student's t, which is infinite for one value."""
    from scipy.stats import t

    if len(values) < 2:
        return values[0], float("inf")
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def _shown(values: list[float], digits: int = 2) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half < float("inf") else "")


def first_epoch(history: list[dict[str, Any]], top1: float) -> int | None:
    """Returns the first epoch whose accuracy is at least `top1`, or None."""
    return next((entry["epoch"] for entry in history if entry["top1"] >= top1), None)


def table(runs: list[dict[str, Any]]) -> str:
    """Returns a table with one row per member.

    It has the last accuracy, and the gain over attention alone and over convolution alone (seed by seed). The last
    column is the number of epochs to reach attention's last accuracy.
    """
    by_member: dict[str, dict[int, dict[str, Any]]] = {}
    for one in runs:
        by_member.setdefault(one["member"], {})[one["seed"]] = one

    def last(member: str) -> dict[int, float]:
        return {seed: one["history"][-1]["top1"] for seed, one in by_member.get(member, {}).items()}

    def over(member: str, other: str) -> str:
        gains = [last(member)[seed] - top1 for seed, top1 in last(other).items() if seed in by_member[member]]
        return _shown(gains) if gains and member != other else ""

    lines = []
    for member, seeds in by_member.items():
        aims = {seed: top1 for seed, top1 in last("attention").items() if seed in seeds}
        epochs = [first_epoch(seeds[seed]["history"], top1) for seed, top1 in aims.items()]
        reached = [float(epoch) for epoch in epochs if epoch is not None]
        all_did = 0 < len(reached) == len(aims)
        lines.append(
            [
                member,
                f"{next(iter(seeds.values()))['parameters'] / 1e6:.3f}",
                " ".join(map(str, sorted(seeds))),
                _shown(list(last(member).values())),
                over(member, "attention"),
                over(member, "conv"),
                _shown(reached, 1) if all_did else f"{len(reached)} of {len(aims)} seeds",
            ]
        )
    header = ["member", "M parameters", "seeds", "top-1 %", "over attention", "over conv", "epochs to attention's last"]
    return measure.table(header, lines)


def report(out: Path) -> None:
    """Writes `runs.csv`, `gates.csv`, `table.md` and a plot per dataset from finished runs, and prints the tables."""
    order = {name: i for i, name in enumerate([*MEMBERS, *PEERS])}
    files = sorted(out.glob("*/*.json"))
    runs = sorted(
        (json.loads(file.read_text()) for file in files), key=lambda r: (r["data"], order[r["member"]], r["seed"])
    )
    with open(out / "runs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["data", "member", "seed", "parameters", "device", "epoch", "train_loss", "top1", "seconds"])
        for r in runs:
            head = [r["data"], r["member"], r["seed"], r["parameters"], measure.device_name(r["environment"])]
            rows.writerows([*head, e["epoch"], e["train_loss"], e["top1"], e["seconds"]] for e in r["history"])
    with open(out / "gates.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["data", "member", "seed", "block", "name", "alpha", "beta"])
        for r in runs:
            head = [r["data"], r["member"], r["seed"]]
            rows.writerows([*head, i, name, *ab] for i, (name, ab) in enumerate(r["gates"].items(), 1))
    text = ""
    for data in dict.fromkeys(r["data"] for r in runs):
        own = [r for r in runs if r["data"] == data]
        text += f"{data}, {own[0]['recipe']['epochs']} epochs\n\n{table(own)}\n\n"
        draw(own, out / f"{data}.png")
    (out / "table.md").write_text(text)
    print(text)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Plots accuracy over epochs (mean and range of the seeds), and alpha and beta by depth, to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    markers = "os^vDP*Xh<"
    for i, member in enumerate(dict.fromkeys(r["member"] for r in runs)):
        curves = [[e["top1"] for e in r["history"]] for r in runs if r["member"] == member]
        epochs = range(1, len(curves[0]) + 1)
        by_epoch = list(zip(*curves, strict=True))
        style = "--" if member in PEERS else "-"
        middle = [statistics.mean(values) for values in by_epoch]
        line = left.plot(epochs, middle, style, marker=markers[i % 10], markersize=4, label=member)[0]
        left.fill_between(
            epochs, *zip(*((min(v), max(v)) for v in by_epoch), strict=True), alpha=0.15, color=line.get_color()
        )
    left.set(xlabel="epoch", ylabel="top-1, %", title="mean of the seeds, their range shaded")
    left.legend(frameon=False, fontsize=8, ncols=2)
    for member, style in (("container", "-"), ("light", ":")):
        for k, (symbol, color) in enumerate((("alpha", "#0072B2"), ("beta", "#E69F00"))):
            curves = [[ab[k] for ab in r["gates"].values()] for r in runs if r["member"] == member]
            if curves:
                blocks = range(1, len(curves[0]) + 1)
                middle = [statistics.mean(values) for values in zip(*curves, strict=True)]
                label = f"$\\{symbol}$, {member} ({'dynamic' if k == 0 else 'static'})"
                right.plot(blocks, middle, style, marker=".", color=color, label=label)
                for curve in curves:
                    right.plot(blocks, curve, style, color=color, linewidth=0.5, alpha=0.5)
    right.axhline(0, color="0.8", linewidth=1)
    right.set(xlabel="block", title="learned weights of the affinities, mean and each seed")
    if right.lines[1:]:
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0, 0.78))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    devices = dict.fromkeys(measure.device_name(r["environment"]) for r in runs)  # a study may move between machines
    figure.suptitle("\n".join([runs[0]["data"], *devices]), fontsize=9)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Performs the runs that are not finished, then writes the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.affinity_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", action="append", default=[], help="folder in ImageNet layout; may be repeated")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--members", nargs="+", default=[*MEMBERS, *PEERS], metavar="NAME", help="default: all members")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="random seeds; default: 0 1 2")
    short = f"{SHORT.images} images to train on, {SHORT.test_images} to test on, batches of {SHORT.batch_size}"
    parser.add_argument("--short", action="store_true", help=short)
    parser.add_argument("--epochs", type=int, help=f"number of epochs; default: {Recipe().epochs}")
    parser.add_argument("--images", type=int, help="number of training images, the same for each class; default: all")
    parser.add_argument("--device", default="auto", help="device to use; default: auto")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once; default: one per core, or 1 on a GPU")
    args = parser.parse_args(argv)
    device, out = measure.pick_device(args.device), Path(args.out)
    recipe = SHORT if args.short else Recipe()
    recipe = recipe._replace(**{k: v for k, v in dict(epochs=args.epochs, images=args.images).items() if v is not None})
    unknown = [name for name in args.members if name not in (*MEMBERS, *PEERS)]
    if unknown:
        raise SystemExit(f"affinity_study: no member {unknown[0]!r}: choose from {', '.join([*MEMBERS, *PEERS])}")
    if args.jobs is not None and args.jobs < 1:
        raise SystemExit(f"affinity_study: {args.jobs} runs at once are none")
    if len({Path(folder).resolve().name for folder in args.data_dir}) < len(args.data_dir):
        raise SystemExit("affinity_study: two data folders have one name, and so would their results")
    todo = []
    for folder in args.data_dir:
        splits(folder)
        for seed in args.seeds:
            for member in args.members:
                file = out / Path(folder).resolve().name / f"{member}-{seed}.json"
                if not file.is_file():
                    todo.append((file, folder, member, seed, recipe, device))
                elif (done := json.loads(file.read_text())["recipe"]) != recipe._asdict():
                    raise SystemExit(f"affinity_study: {file} is of another recipe, {done}: give another --out")
    spawn = multiprocessing.get_context("spawn")
    jobs = args.jobs or (torch.get_num_threads() if device.type == "cpu" else 1)
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_worker) as pool:
        try:
            for finished in as_completed([pool.submit(_finish, *one) for one in todo]):
                finished.result()
        except BaseException as error:
            for child in multiprocessing.active_children():
                child.terminate()
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit("affinity_study: stopped; the same command goes on") from None
            if isinstance(error, BrokenProcessPool):
                raise SystemExit("affinity_study: a run was killed, by want of memory perhaps: --jobs") from None
            raise
    if not any(out.glob("*/*.json")):
        raise SystemExit(f"affinity_study: no finished runs in {out}; --data-dir says on what to run them")
    report(out)


if __name__ == "__main__":
    main()
