"""Measures peak memory and time of one image against the number of tokens.

python -m benchmarks.memory container container_light --sizes 224x224 448x448 800x1344 --device cpu

Each size is run in a forward pass, and in a forward and backward pass to all weights (as in training, without an
optimizer). Memory is linear in the number of tokens, but the time of attention is not. For comparison, the table also
has the memory of one explicit affinity matrix of the first stage: (H W / 16)^2 numbers per head.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import container.fuse

from . import measure

SIZES = ["224x224", "320x320", "448x448", "640x640", "800x800", "800x1344"]


def parse(word: str) -> tuple[int, int]:
    """Parses `HxW` into (H, W).

    Raises:
        argparse.ArgumentTypeError: The word does not consist of two whole numbers.
    """
    height, _, width = word.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{word!r} is not HEIGHTxWIDTH, as in 800x1344")
    return int(height), int(width)


def line(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Returns (slope, intercept, R^2) of the least-squares line through the points."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    sxx = sum((a - mx) ** 2 for a in x)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sxx
    residual = sum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, my - slope * mx, 1 - residual / sum((b - my) ** 2 for b in y)


def run(model: nn.Module, image: Tensor, backward: bool, seconds: float) -> dict[str, Any]:
    """Returns the peak memory of one image above the weights, and the seconds of each call.

    Args:
        model: The model, on the device.
        image: (1, 3, H, W), on the device.
        backward: Whether to also run the backward pass, in training mode.
        seconds: Minimum total duration of the calls. There is at least one.
    """
    model.train(backward)

    def work() -> None:
        with torch.set_grad_enabled(backward):
            logits = model(image)
            if backward:
                logits.float().sum().backward()
        model.zero_grad()

    peak = measure.peak_memory(work, image.device)
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        work()
        if image.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"peak_memory": peak, "seconds": times}


def draw(record: dict[str, Any], path: Path) -> None:
    """Plots memory and time against the number of tokens in the first stage, with and without the backward pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, model in enumerate(dict.fromkeys(row["model"] for row in record["rows"])):
        for backward, style in ((False, "o--"), (True, "o-")):
            rows = [row for row in record["rows"] if row["model"] == model and row["backward"] == backward]
            tokens = [row["tokens"] / 1000 for row in rows]
            label = f"{model}, {'forward and backward' if backward else 'forward'}"
            if all(row["peak_memory"] is not None for row in rows):
                axes[0].plot(tokens, [row["peak_memory"] / 2**30 for row in rows], style, color=f"C{i}", label=label)
            medians = [measure.spread(row["seconds"])[1] for row in rows]
            axes[1].loglog(tokens, medians, style, color=f"C{i}", label=label)
    axes[0].set(xlabel="thousand tokens in stage 1", ylabel="GiB above the weights", title="peak memory, one image")
    axes[1].set(xlabel="thousand tokens in stage 1", ylabel="seconds", title="time, one image (both axes logarithmic)")
    ticks = sorted({row["tokens"] / 1000 for row in record["rows"]})
    axes[1].set_xticks(ticks, [f"{tick:.1f}" for tick in ticks])
    axes[1].set_xticks([], minor=True)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylim(bottom=0)
    figure.suptitle(measure.device_name(record["environment"]), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark, prints the results, and writes `memory.json` and `memory.png` with --out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="NAME", help="timm models")
    parser.add_argument(
        "--sizes", nargs="+", type=parse, default=[parse(size) for size in SIZES], metavar="HxW", help="image sizes"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="data type; default: float32"
    )
    parser.add_argument("--forward-only", action="store_true", help="measure only the forward pass")
    parser.add_argument("--device", default="auto", help="device to use; default: auto")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of a measurement; default: 5")
    parser.add_argument("--out", metavar="DIR", help="folder for the results")
    parser.add_argument("--name", default="memory", help="name of the JSON file; default: memory")
    args = parser.parse_args(argv)
    device, dtype = measure.pick_device(args.device), getattr(torch, args.dtype)
    unknown = [name for name in args.models if not timm.is_model(name)]
    if unknown:
        raise SystemExit(f"benchmarks: timm knows no model {unknown[0]!r}")
    record: dict[str, Any] = {"environment": measure.environment(device), "dtype": args.dtype, "rows": []}
    print(measure.device_name(record["environment"]), file=sys.stderr)
    lines = []
    for name in args.models:
        torch.manual_seed(0)
        trained = timm.create_model(name, num_classes=0).to(device, dtype)
        fused = container.fuse.fuse(copy.deepcopy(trained).eval())
        for backward in (False,) if args.forward_only else (False, True):
            run(trained if backward else fused, torch.randn(1, 3, 64, 64, device=device, dtype=dtype), backward, 0)
            for height, width in sorted(args.sizes, key=lambda size: size[0] * size[1]):
                image = torch.randn(1, 3, height, width, device=device, dtype=dtype)
                row = run(trained if backward else fused, image, backward, args.seconds)
                row |= dict(
                    model=name, backward=backward, size=[height, width], tokens=-(-height // 4) * -(-width // 4)
                )
                record["rows"].append(row)
                explicit = row["tokens"] ** 2 * image.element_size()
                lines.append(
                    [
                        f"{name}, {'forward and backward' if backward else 'forward'}",
                        f"{height} x {width}",
                        row["tokens"],
                        "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f}",
                        f"{measure.spread(row['seconds'])[1]:.3f}",
                        f"{explicit / 2**20:.0f}",
                    ]
                )
                print("  " + ", ".join(map(str, lines[-1])), file=sys.stderr, flush=True)
    header = ["one image", "size", "tokens", "peak MiB", "s", "one explicit head, MiB"]
    print(measure.table(header, lines))
    for name in args.models:
        for backward in (False, True):
            rows = [r for r in record["rows"] if r["model"] == name and r["backward"] == backward]
            if len(rows) > 2 and all(r["peak_memory"] is not None for r in rows):
                slope, _, r2 = line([r["tokens"] for r in rows], [r["peak_memory"] for r in rows])
                record.setdefault("lines", []).append(dict(model=name, backward=backward, slope=slope, r2=r2))
                what = "forward and backward" if backward else "forward"
                print(f"{name}, {what}: {slope / 2**10:.2f} KiB a token of stage 1, R^2 of a straight line {r2:.4f}")
    if args.out:
        stem = measure.save(args.out, args.name, record)
        draw(record, stem.with_suffix(".png"))
        print(f"{stem}.json, {stem}.png", file=sys.stderr)


if __name__ == "__main__":
    main()
