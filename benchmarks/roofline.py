"""A model's parts against the bound of its device: bytes over bandwidth, or floating-point operations over matrix rate.

python -m benchmarks.roofline container_light:fused container_light:fused+onnx --device cpu

Every operator that PyTorch runs is timed where it runs, with its own input. The bytes of a part are those of the
tensors that it has to read and write once; its operations are counted by PyTorch's own formulas; what the device can
do is measured first, by copying a large tensor and by multiplying large matrices.

  bound of a part   max(bytes / bandwidth, operations / rate)
  sum of bounds     of all parts, as if none were merged with another
  least bound       the same, elementwise operators for nothing: what a perfect compiler could leave

Entries are those of benchmarks.speed. Compilers and ONNX Runtime run no operators of PyTorch: for them there is the
whole time only, against the bounds of the same model without them.
"""

import argparse
import statistics
import sys
import time
import warnings
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import measure, speed

COMPILERS = {"compile", "freeze", "aot", "onnx"}


class Operator(NamedTuple):
    """One run of one operator."""

    part: str
    seconds: float
    moved: int
    flops: int


class Recorder(TorchDispatchMode):
    """Times every operator and counts what it moves and computes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.operators: List[Operator] = []

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Tuple = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        """Runs the operator as it would run anyhow."""
        kwargs = kwargs or {}
        start = self._now()
        out = func(*args, **kwargs)
        seconds = self._now() - start
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        written = {id(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}
        if func.is_view or not written:
            return out  # nothing is moved
        moved = sum(t.numel() * t.element_size() for t in {**read, **written}.values())
        formula = flop_registry.get(func.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        self.operators.append(Operator(_part(func, args, out), seconds, moved, flops))
        return out


def _part(func: Any, args: Tuple, out: Any) -> str:
    """What a person calls the operator, and at which size of map it runs."""
    name = func.overloadpacket.__name__.strip("_")
    tensors = [t for t in args if isinstance(t, Tensor)]
    backward = " backward" if "backward" in name else ""
    if "convolution" in name:
        weight = tensors[2 if backward else 1]
        depthwise = "depthwise " if weight.shape[1] == 1 and weight.shape[0] > 1 else ""
        gelu = " + GELU" if "gelu" in [a for a in args if isinstance(a, str)] else ""
        name = f"convolution {depthwise}{weight.shape[-2]}x{weight.shape[-1]}{gelu}{backward}"
    elif "attention" in name:
        return f"attention{backward}"
    maps = [t for t in [out, *tensors] if isinstance(t, Tensor) and t.ndim == 4]
    return f"{name} @ {maps[0].shape[-2]}x{maps[0].shape[-1]}" if maps else name


def record(work: measure.Work, device: torch.device, rounds: int) -> Dict[str, Dict[str, float]]:
    """Seconds (median), bytes, operations and runs of every part in one call."""
    work()
    calls = []
    for _ in range(rounds):
        recorder = Recorder(device)
        with recorder:
            work()
        calls.append(recorder.operators)
    parts: Dict[str, Dict[str, float]] = {}
    for name in dict.fromkeys(op.part for op in calls[0]):
        own = [op for op in calls[0] if op.part == name]
        parts[name] = {
            "runs": len(own),
            "seconds": statistics.median(sum(op.seconds for op in ops if op.part == name) for ops in calls),
            "bytes": sum(op.moved for op in own),
            "flops": sum(op.flops for op in own),
        }
    return parts


def limits(device: torch.device, dtype: torch.dtype, rounds: int = 7) -> Dict[str, float]:
    """Bytes a second of a large copy, and operations a second of a large matrix product, the best of some runs."""
    size = 2**28 if device.type == "cpu" else 2**30
    a, b = (torch.ones(size // 4, device=device) for _ in range(2))
    side = 3072 if device.type == "cpu" else 8192
    m = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(m)
    times = measure.interleave({"copy": lambda: b.copy_(a), "matrix": lambda: torch.mm(m, m, out=out)}, rounds, 0.2)
    return {"bandwidth": 2 * size / min(times["copy"]), "rate": 2 * side**3 / min(times["matrix"])}


def bounds(parts: Dict[str, Dict[str, float]], limit: Dict[str, float]) -> Tuple[float, float]:
    """(sum of bounds, least bound) in seconds; adds each part's own to it."""
    for part in parts.values():
        part["bound"] = max(part["bytes"] / limit["bandwidth"], part["flops"] / limit["rate"])
    return sum(p["bound"] for p in parts.values()), sum(p["bound"] for p in parts.values() if p["flops"])


def report(parts: Dict[str, Dict[str, float]]) -> str:
    """A table of the parts that take 1 % or more, those that lose most time against their bound first."""
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


def main(argv: Optional[List[str]] = None) -> None:
    """Measures, prints, and writes `roofline.json` with --out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entries", nargs="+", metavar="NAME[:SETTING[+SETTING]...[,...]]")
    parser.add_argument("--work", choices=("infer", "train"), default="infer")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--released", metavar="PATH", help="the authors' models.py, or its folder")
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--name", default="roofline")
    args = parser.parse_args(argv)
    entries, device = speed.parse(args.entries), measure.pick_device(args.device)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size).to(device)
    result: Dict[str, Any] = {
        "environment": measure.environment(device),
        "work": args.work,
        "batch_size": args.batch_size,
        "img_size": args.img_size,
        "limits": {},
        "rows": [],
    }
    print(measure.device_name(result["environment"]), file=sys.stderr)
    works: Dict[str, measure.Work] = {}
    for entry in entries:
        half = {"bf16", "amp"} & set(entry.settings)
        key = "bfloat16" if half else "float32"
        if key not in result["limits"]:
            limit = limits(device, getattr(torch, key))
            result["limits"][key] = limit
            print(f"\n{key}: {limit['bandwidth'] / 1e9:.1f} GB/s, {limit['rate'] / 1e9:.0f} GFLOP/s\n")
        limit = result["limits"][key]
        model = speed.create(entry.model, args.img_size, args.released)
        plain = entry._replace(settings=tuple(s for s in entry.settings if s not in COMPILERS) or ("eager",))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = record(speed.prepare(plain, model, images, args.work == "train")[0], device, args.rounds)
            works[str(entry)] = speed.prepare(entry, model, images, args.work == "train")[0]
        summed, least = bounds(parts, limit)
        row: Dict[str, Any] = {"entry": str(entry), "sum_of_bounds": summed, "least_bound": least}
        if plain == entry:
            row["parts"] = parts
            print(f"{entry}\n\n{report(parts)}\n", flush=True)
        result["rows"].append(row)
    times = measure.interleave(works, args.rounds, args.seconds)
    lines = []
    for row in result["rows"]:
        row["seconds"] = times[row["entry"]]
        median = measure.spread(row["seconds"])[1]
        figures = (median, row["sum_of_bounds"], row["least_bound"])
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
        "sum of bounds",
        "least bound",
        "of the sum",
        "of the least",
    ]
    print(measure.table(header, lines))
    if args.out:
        print(f"{measure.save(args.out, args.name, result)}.json", file=sys.stderr)


if __name__ == "__main__":
    main()
