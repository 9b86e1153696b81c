"""The paper's comparison of affinities, at small scale: one architecture, matched parameters, one recipe, some seeds.

python -m benchmarks.affinity_study --data-dir cifar10 --data-dir tiny-imagenet-50 --out study      one GPU
python -m benchmarks.affinity_study --data-dir cifar10 --short --out study                          two cores, 2 h

Two questions: which mixture of affinities is best, and does mixing converge in fewer epochs than attention alone? Every
member has the blocks of `container_nano` at the same four grids, and an MLP as wide as makes its parameters those of
CONTAINER; a ResNet, a ConvNeXt and a DeiT of timm's are made as wide as comes closest. All train alike.

The command can be stopped and started again: a run (data, member, seed) that is finished is in a file of its own and is
not repeated. The report is made from these files alone: `runs.csv` (every epoch of every run), `gates.csv`, `table.md`,
and pictures. A seed run again on the same device gives the same numbers: on a CPU each run has one thread and there are
as many at once as cores.
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
    """Images in memory, as bytes."""

    name: str
    classes: int
    images: Tensor  # (n, 3, S, S), uint8
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Recipe(NamedTuple):
    """What every run shares."""

    epochs: int = 12
    images: int = 0  # so many to train on, of each class as many; 0 is all
    test_images: int = 0
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 2
    smoothing: float = 0.1


SHORT = Recipe(images=5000, test_images=2500, batch_size=64)


def splits(folder: str) -> tuple[Path, Path]:
    """`train`, and `val` or `test`, of an ImageNet-layout folder.

    Raises:
        SystemExit: It lacks one of them.
    """
    root = Path(folder)
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise SystemExit(f"affinity_study: {root} has no train/ and val/ (or test/)")
    return root / "train", test


@functools.cache
def load(folder: str, images: int, test_images: int) -> Data:
    """So many images of an ImageNet-layout folder, the first of each class, by name; 0 is all.

    Raises:
        SystemExit: There is no such folder, fewer images than classes are asked for, or the images are neither all
            32 x 32 nor all 64 x 64.
    """
    found: list[Tensor] = []
    for split, wanted in zip(splits(folder), (images, test_images), strict=True):
        dataset = ImageFolder(str(split))
        limit = wanted // len(dataset.classes)  # of each class
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
    """How many there are."""
    return sum(p.numel() for p in model.parameters())


def build(name: str, classes: int, size: int, width: float) -> nn.Module:
    """A member with an MLP of that ratio, or a peer of that width; grids of 16, 8, 4 and 2, but DeiT's one of 8."""
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
        first = bisect.bisect_left(choices, target, key=count)  # it grows with the width
        return min(choices[max(first - 1, 0) : first + 1], key=lambda width: abs(count(width) - target))


def create(name: str, classes: int, size: int) -> nn.Module:
    """A member of the study, or a peer, with the parameters of CONTAINER as nearly as its width allows.

    Raises:
        SystemExit: There is none of that name.
    """
    if name not in (*MEMBERS, *PEERS):
        raise SystemExit(f"affinity_study: no member {name!r}: choose from {', '.join([*MEMBERS, *PEERS])}")
    return build(name, classes, size, _width(name, classes, size))


def augment(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Random crops of padded images, half of them mirrored: (B, 3, S, S), uint8, on the device of the generator."""
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
    """Trains a model and yields an entry after each epoch: its loss, the accuracy behind it, its seconds.

    Args:
        model: On the device, compiled or not.
        seed: Of the order of the images and of their augmentation.
        data: On the device.
        recipe: How.
        device: Where.
        label: What its lines on the terminal begin with.
        graph: Replay each step as one CUDA graph: a small model is then as fast as its kernels. Recording takes
            three more steps, at the lowest rate.
        mix: CutMix of a batch on the device; its numbers are NumPy's.
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
    images = data.images[: recipe.batch_size].clone()  # a graph reads its batch from one place
    targets = data.labels[: recipe.batch_size].clone()
    if mix is not None:
        targets = mix(images, targets)[1]
    losses = torch.zeros((), device=device)
    rates = [torch.tensor(float(group["lr"]), device=device) for group in optimizer.param_groups]

    def forward_backward() -> None:
        with cast():
            logits = model((images - mean) / std)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # before the next forward pass, whose CUDA graph may want their memory
        losses.add_(loss.detach())

    def keep_rates() -> None:
        """Writes the scheduler's new rates, which are numbers, where a graph reads them."""
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
            for some, answers in zip(data.test_images.split(500), data.test_labels.split(500), strict=True):
                right += (model((some - mean) / std).argmax(1) == answers).sum()
        top1 = 100 * right.item() / len(data.test_labels)
        seconds = time.perf_counter() - start
        loss_mean = losses.item() / steps
        print(f"  {label}, epoch {epoch + 1}: loss {loss_mean:.3f}, top-1 {top1:.2f} %, {seconds:.1f} s", flush=True)
        yield dict(epoch=epoch + 1, train_loss=loss_mean, top1=top1, seconds=seconds)


def run(name: str, seed: int, data: Data, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Trains one member with one seed; the data are on the device.

    Returns:
        Its history, one entry an epoch, and alpha and beta of every block.
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
    """Prepares a process for runs: one thread on a CPU, repeatable, stopped by its parent or with it."""

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
    """Does a run in one of the processes and writes its file."""
    data = load(folder, recipe.images, recipe.test_images)
    if len(data.images) < recipe.batch_size:
        raise SystemExit(f"affinity_study: {folder} has {len(data.images)} images, a batch {recipe.batch_size}")
    data = Data(data.name, data.classes, *(tensor.to(device) for tensor in data[2:]))
    result = run(name, seed, data, recipe, device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result, indent=1).encode())


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of the 95 % interval by Student's t); infinite for one value."""
    from scipy.stats import t

    if len(values) < 2:
        return values[0], float("inf")
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def _shown(values: list[float], digits: int = 2) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half < float("inf") else "")


def first_epoch(history: list[dict[str, Any]], top1: float) -> int | None:
    """The first epoch whose accuracy is at least that, or None."""
    return next((entry["epoch"] for entry in history if entry["top1"] >= top1), None)


def table(runs: list[dict[str, Any]]) -> str:
    """One line a member: last accuracy, how far above either half alone, seed by seed, epochs to attention's last."""
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
    """Writes `runs.csv`, `gates.csv`, `table.md` and a picture per data set from finished runs; prints the tables."""
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
    """Accuracy over epochs, mean and range of the seeds, and alpha and beta by depth, into a PNG."""
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
    """Does the runs that are not done, then the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.affinity_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", action="append", default=[], help="an ImageNet-layout folder; may be repeated")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--members", nargs="+", default=[*MEMBERS, *PEERS], metavar="NAME", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    short = f"{SHORT.images} images to train on, {SHORT.test_images} to test on, batches of {SHORT.batch_size}"
    parser.add_argument("--short", action="store_true", help=short)
    parser.add_argument("--epochs", type=int, help=f"default {Recipe().epochs}")
    parser.add_argument("--images", type=int, help="so many to train on, of each class as many; default all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once; default: the cores, or 1 on a GPU")
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
