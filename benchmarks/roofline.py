"""Compares the time of a model's parts with their roofline bound on the device.

python -m benchmarks.roofline container_light:fused container_light:fused+onnx --device cpu
python -m benchmarks.roofline container_light:fused+bf16 --limits 3350 989 --device cpu --batch-size 64   # of an H100

A part is one kind of PyTorch operator at one size of feature map. Every operator is timed where it runs, with its own
input; on a GPU, by the time of its kernels, from torch.profiler. The bytes of a part are those of the tensors that it
must read and write once. Its floating-point operations are counted by PyTorch's formulas. The bandwidth and the matrix
rate of the device are measured first, by copying a large tensor and by multiplying large matrices.

  bound of a part   max(bytes / bandwidth, operations / rate)
  sum of bounds     sum over all parts, as if none were fused with another
  least bound       the same with elementwise operators for free: what a perfect compiler could reach

Entries are those of benchmarks.speed. Compilers and ONNX Runtime do not run PyTorch operators. For them, only the whole
time is given, against the bounds of the same model without them. "busy" is the time per call in which the device
computes; in the rest of the call it waits for the host. With --limits, the bounds are those of another device, from its
data sheet: bytes and operations are counted here, but nothing is timed.
"""

import argparse
import sys
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import measure, speed

COMPILERS = {*speed.COMPILED, "freeze", "aot", "onnx", "openvino"}
_MARK = "part: "  # prefix of a part's name in a profile


class Operator(NamedTuple):
    """One run of one operator."""

    part: str
    moved: int
    flops: int


class Recorder(TorchDispatchMode):
    """Dispatch mode that counts the bytes and operations of every operator, and names its part in a profile."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the operator unchanged, and records it."""
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)  # a view moves no data
        part = _part(func, args)
        with record_function(_MARK + part):
            out = func(*args, **kwargs)
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        written = {id(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}
        moved = sum(t.numel() * t.element_size() for t in {**read, **written}.values())
        self.operators.append(Operator(part, moved, _flops(func, args, kwargs, out)))
        return out


def _flops(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    """Returns the operations by PyTorch's formulas, except for the backward pass of a convolution.

    PyTorch's formula for it ignores groups.
    """
    if func is torch.ops.aten.convolution_backward.default:
        gradient, weight, wanted = args[0], args[2], args[10]
        return 2 * gradient.numel() * weight[0].numel() * sum(wanted[:2])  # gradients of input and weight
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def _part(func: Any, args: tuple) -> str:
    """Returns a readable name of the operator, with the size of its feature map."""
    name = func.overloadpacket.__name__.strip("_")
    tensors = [t for t in args if isinstance(t, Tensor)]
    backward = " backward" if "backward" in name else ""
    if "convolution" in name:
        weight = tensors[2 if backward else 1]
        depthwise = "depthwise " if weight.shape[1] == 1 and weight.shape[0] > 1 else ""
        name = f"convolution {depthwise}{weight.shape[-2]}x{weight.shape[-1]}{backward}"
    elif "attention" in name:
        return f"attention{backward}"
    maps = [t for t in tensors if t.ndim == 4]
    return f"{name} @ {maps[0].shape[-2]}x{maps[0].shape[-1]}" if maps else name


def record(work: measure.Work, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Returns the mean device seconds, bytes, operations and runs of every part in one call."""
    work()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    recorder = Recorder()
    with profile(activities=activities) as profiler, recorder:
        for _ in range(rounds):
            work()
        if on_gpu:
            torch.cuda.synchronize(device)
    parts: dict[str, dict[str, float]] = {}
    for op in recorder.operators:
        part = parts.setdefault(op.part, dict(runs=0, seconds=0.0, bytes=0, flops=0))
        part["runs"] += 1
        part["bytes"] += op.moved
        part["flops"] += op.flops
    for event in profiler.key_averages():
        name = event.key.removeprefix(_MARK)
        if event.key != name and name in parts and event.device_type == DeviceType.CPU:
            microseconds = event.device_time_total if on_gpu else event.cpu_time_total
            parts[name]["seconds"] += microseconds / 1e6
    return {name: {key: value / rounds for key, value in part.items()} for name, part in parts.items()}


def limits(device: torch.device, dtype: torch.dtype, rounds: int = 3) -> dict[str, float]:
    """Measures bytes per second of a large copy and operations per second of a large matrix product.

    Both are the best of some runs.
    """
    size = 2**28 if device.type == "cpu" else 2**30
    a, b = (torch.ones(size // 4, device=device) for _ in range(2))
    side = 3072 if device.type == "cpu" else 8192
    m = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(m)
    works: dict[str, measure.Work] = {"copy": lambda: b.copy_(a), "matrix": lambda: torch.mm(m, m, out=out)}
    best = {name: min(measure.device_seconds(work, device, 2) for _ in range(rounds)) for name, work in works.items()}
    return {"bandwidth": 2 * size / best["copy"], "rate": 2 * side**3 / best["matrix"]}


def bounds(parts: dict[str, dict[str, float]], limit: dict[str, float]) -> tuple[float, float]:
    """Returns (sum of bounds, least bound) in seconds, and adds to each part its `bound`."""
    for part in parts.values():
        part["bound"] = max(part["bytes"] / limit["bandwidth"], part["flops"] / limit["rate"])
    return sum(p["bound"] for p in parts.values()), sum(p["bound"] for p in parts.values() if p["flops"])


def report(parts: dict[str, dict[str, float]]) -> str:
    """Returns a table of the parts that take 1 % of the time or more, with the furthest above their bound first."""
    total = sum(part["seconds"] for part in parts.values())
    shown = {name: part for name, part in parts.items() if part["seconds"] >= total / 100}
    shown = dict(sorted(shown.items(), key=lambda item: item[1]["bound"] - item[1]["seconds"]))
    rest = [part for name, part in parts.items() if name not in shown]
    shown[f"{len(rest)} parts below 1 %"] = {key: sum(part[key] for part in rest) for key in next(iter(parts.values()))}
    shown["all"] = {key: sum(part[key] for part in parts.values()) for key in next(iter(parts.values()))}
    lines = [
        [
            name,
            f"{p['runs']:.0f}",
            f"{p['seconds'] * 1e3:.2f}",
            f"{p['seconds'] / total:.1%}",
            f"{p['bytes'] / 2**20:.1f}",
            f"{p['flops'] / 1e9:.2f}",
            f"{p['bound'] * 1e3:.2f}",
            f"{p['bound'] / p['seconds']:.0%}" if p["seconds"] else "",
        ]
        for name, p in shown.items()
    ]
    return measure.table(["part @ map", "runs", "ms", "of all", "MiB", "GFLOP", "bound ms", "reached"], lines)


def per_image(parts: dict[str, dict[str, float]], images: int, timed: bool) -> str:
    """Returns a table of costs per image by kind of part, over all feature map sizes, with the longest bound first."""
    kinds: dict[str, dict[str, float]] = {}
    for name, part in parts.items():
        kind = kinds.setdefault(name.partition(" @ ")[0], dict.fromkeys(part, 0.0))
        for key in part:
            kind[key] += part[key]
    total = {key: sum(kind[key] for kind in kinds.values()) for key in next(iter(kinds.values()))}
    shown = {name: kind for name, kind in kinds.items() if kind["bound"] >= total["bound"] / 100}
    shown = dict(sorted(shown.items(), key=lambda item: -item[1]["bound"]))
    rest = [kind for name, kind in kinds.items() if name not in shown]
    shown[f"{len(rest)} parts below 1 %"] = {key: sum(kind[key] for kind in rest) for key in total}
    shown["all"] = total
    lines = []
    for name, kind in shown.items():
        moved, flops = kind["bytes"] / 2**20 / images, kind["flops"] / 1e9 / images
        line = [name, f"{moved:.2f}", f"{flops:.2f}", f"{kind['bound'] * 1e6 / images:.1f}"]
        reached = f"{kind['bound'] / kind['seconds']:.0%}" if kind["seconds"] else ""
        lines.append([*line, f"{kind['seconds'] * 1e6 / images:.1f}", reached] if timed else line)
    header = ["an image", "MiB", "GFLOP", "bound, us", "us", "reached"]
    return measure.table(header if timed else header[:4], lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark, prints the results, and writes `roofline.json` with --out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "entries", nargs="+", metavar="NAME[:SETTING[+SETTING]...[,...]]", help="models with their settings"
    )
    parser.add_argument(
        "--work", choices=("infer", "train"), default="infer", help="inference or training; default: infer"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images per batch; default: 8")
    parser.add_argument("--img-size", type=int, default=224, help="image size in pixels; default: 224")
    parser.add_argument("--device", default="auto", help="device to use; default: auto")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds; default: 7")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per measurement in seconds; default: 1")
    parser.add_argument(
        "--limits", type=float, nargs=2, metavar=("GB/S", "TFLOP/S"), help="limits of another device; nothing is timed"
    )
    parser.add_argument("--released", metavar="PATH", help="the authors' models.py, or its folder")
    parser.add_argument("--out", metavar="DIR", help="folder for the results")
    parser.add_argument("--name", default="roofline", help="name of the JSON file; default: roofline")
    args = parser.parse_args(argv)
    entries, device = speed.parse(args.entries), measure.pick_device(args.device)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size).to(device)
    result: dict[str, Any] = {
        "environment": measure.environment(device),
        "work": args.work,
        "batch_size": args.batch_size,
        "img_size": args.img_size,
        "limits": {},
        "rows": [],
    }
    print(measure.device_name(result["environment"]), file=sys.stderr)
    works: dict[str, measure.Work] = {}
    for entry in entries:
        half = {"bf16", "amp"} & set(entry.settings)
        key = "bfloat16" if half else "float32"
        if key not in result["limits"]:
            if args.limits:
                limit = dict(bandwidth=1e9 * args.limits[0], rate=1e12 * args.limits[1])
            else:
                limit = limits(device, getattr(torch, key))
            result["limits"][key] = limit
            print(f"\n{key}: {limit['bandwidth'] / 1e9:.1f} GB/s, {limit['rate'] / 1e9:.0f} GFLOP/s\n")
        limit = result["limits"][key]
        model = speed.create(entry.model, args.img_size, args.released)
        plain = entry._replace(settings=tuple(s for s in entry.settings if s not in COMPILERS) or ("eager",))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work = speed.prepare(plain, model, images, args.work == "train")[0]
            parts = record(work, device, 1 if args.limits else args.rounds)
            if not args.limits:
                works[str(entry)] = speed.prepare(entry, model, images, args.work == "train")[0]
        summed, least = bounds(parts, limit)
        row: dict[str, Any] = {"entry": str(entry), "sum_of_bounds": summed, "least_bound": least}
        result["rows"].append(row)
        if args.limits:
            row["parts"] = parts
            print(f"{entry}\n\n{per_image(parts, args.batch_size, False)}\n", flush=True)
            continue
        row["busy"] = measure.device_seconds(works[str(entry)], device)
        if plain == entry:
            row["parts"] = parts
            print(f"{entry}\n\n{report(parts)}\n\n{per_image(parts, args.batch_size, True)}\n", flush=True)
        if args.out:
            measure.save(args.out, args.name, result)
    times = measure.interleave(works, args.rounds, args.seconds) if works else {}
    lines = []
    for row in [] if args.limits else result["rows"]:
        row["seconds"] = times[row["entry"]]
        median = measure.spread(row["seconds"])[1]
        figures = (median, row["busy"], row["sum_of_bounds"], row["least_bound"])
        lines.append(
            [
                row["entry"],
                *(f"{figure * 1e3:.1f}" for figure in figures),
                f"{row['sum_of_bounds'] / median:.0%}",
                f"{row['least_bound'] / median:.0%}",
            ]
        )
    header = [
        f"{args.work}, batch {args.batch_size}",
        "ms",
        "busy",
        "sum of bounds",
        "least bound",
        "of the sum",
        "of the least",
    ]
    if lines:
        print(measure.table(header, lines))
    if args.out:
        print(f"{measure.save(args.out, args.name, result)}.json", file=sys.stderr)


if __name__ == "__main__":
    main()
