"""Compares implementations of each part of a block: which kernel, which memory format, fused or not.

python -m benchmarks.parts --batch-size 8 --device cpu

All implementations of a part get the same input and give the same output, which is checked, unless their name says
otherwise. They are timed in turns; on a GPU, by the time of their kernels. Shapes are those of `container_light` and
`container` at 224 pixels, stage by stage.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import measure

STAGES = ((64, 56, 8, 2), (128, 28, 8, 4), (320, 14, 4, 10), (512, 7, 4, 16))  # channels, side, MLP ratio, heads
Way = Callable[[Tensor], Tensor]
LAST = torch.channels_last


def mlp(dim: int, ratio: int, heads: int) -> dict[str, Way]:
    """Returns implementations of the MLP: 1x1 convolution C -> rC, exact GELU, 1x1 convolution back to C."""
    up, down = nn.Conv2d(dim, dim * ratio, 1), nn.Conv2d(dim * ratio, dim, 1)

    def linear(x: Tensor) -> Tensor:
        h = F.gelu(F.linear(x.permute(0, 2, 3, 1), up.weight.flatten(1), up.bias))
        return F.linear(h, down.weight.flatten(1), down.bias).permute(0, 3, 1, 2)

    return {
        "convolutions": lambda x: down(F.gelu(up(x))),
        "convolutions, channels_last": lambda x: down(F.gelu(up(x.contiguous(memory_format=LAST)))),
        "linear layers, channels_last": lambda x: linear(x.contiguous(memory_format=LAST)),
        "no GELU at all (not the same answer)": lambda x: down(up(x)),
    }


def residual_conv(dim: int, ratio: int, heads: int) -> dict[str, Way]:
    """Returns implementations of x + 3x3 depthwise convolution of x."""
    conv, whole = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
    with torch.no_grad():
        whole.weight.copy_(conv.weight)
        whole.weight[:, 0, 1, 1] += 1
        whole.bias.copy_(conv.bias)  # type: ignore[union-attr, arg-type]
    return {
        "convolution, then add": lambda x: x + conv(x),
        "convolution, then add, channels_last": lambda x: x + conv(x.contiguous(memory_format=LAST)),
        "one in the kernel": whole,
        "one in the kernel, channels_last": lambda x: whole(x.contiguous(memory_format=LAST)),
    }


def static_conv(dim: int, ratio: int, heads: int) -> dict[str, Way]:
    """Returns implementations of the static affinity, a 5x5 depthwise convolution."""
    conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
    return {"NCHW": conv, "channels_last": lambda x: conv(x.contiguous(memory_format=LAST))}


def norm(dim: int, ratio: int, heads: int) -> dict[str, Way]:
    """Returns implementations of the norm over channels after a patch embedding.

    The blocks' batch norms are left out, since they are gone after fusing.
    """
    layer = LayerNorm2d(dim)
    return {"LayerNorm2d": layer, "LayerNorm2d, channels_last": lambda x: layer(x.contiguous(memory_format=LAST))}


def qkv(dim: int, ratio: int, heads: int) -> dict[str, Way]:
    """Returns implementations of the projections to Q, K and V."""
    qk, value = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(dim, dim, 1)
    both = nn.Conv2d(dim, 3 * dim, 1)
    with torch.no_grad():
        both.weight.copy_(torch.cat([qk.weight, value.weight]))
        both.bias.copy_(torch.cat([qk.bias, value.bias]))  # type: ignore[union-attr, list-item]
    return {
        "QK and V": lambda x: torch.cat([qk(x).flatten(2), value(x).flatten(2)], dim=1),
        "one projection": lambda x: torch.cat(both(x).flatten(2).split([2 * dim, dim], dim=1), dim=1),
    }


def attention(dim: int, ratio: int, heads: int) -> dict[str, Way]:
    """Returns implementations of softmax(Q K^T / sqrt(D)) V at D = 32: explicit, and by each SDPA backend."""

    def tokens(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2).contiguous().unflatten(2, (heads, -1)).transpose(1, 2)

    def by(*backends: SDPBackend) -> Way:
        def way(x: Tensor) -> Tensor:
            t = tokens(x)
            with sdpa_kernel(list(backends)) if backends else contextlib.nullcontext():
                return F.scaled_dot_product_attention(t, t, t)

        return way

    def explicit(x: Tensor) -> Tensor:
        t = tokens(x)
        return (t * t.shape[-1] ** -0.5 @ t.transpose(-2, -1)).softmax(-1) @ t

    ways: dict[str, Way] = {
        "explicit N x N": explicit,
        "SDPA, its own choice": by(),
    }
    return ways | {
        f"SDPA, {name}": by(backend)
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("math", SDPBackend.MATH),
        )
    }


PARTS = {
    "mlp": (mlp, STAGES),
    "residual 3x3": (residual_conv, STAGES),
    "static 5x5": (static_conv, STAGES),
    "norm": (norm, STAGES),
    "qkv": (qkv, STAGES),
    "attention": (attention, STAGES),
}


def _modules(ways: dict[str, Way]) -> list[nn.Module]:
    """Returns the modules among the implementations and in their closures."""
    found = []
    for way in ways.values():
        values = [way, *(cell.cell_contents for cell in getattr(way, "__closure__", None) or ())]
        found += [value for value in values if isinstance(value, nn.Module)]
    return found


def compare(part: str, stage: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times the implementations of one part at the shape of one stage.

    Those that fail on this device have their error message in `failed` instead.
    """
    make, shapes = PARTS[part]
    dim, side, ratio, heads = shapes[stage]
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    torch.manual_seed(0)
    ways = make(dim, ratio, heads)
    x = torch.randn(args.batch_size, dim, side, side).to(device, dtype)
    for module in _modules(ways):
        module.to(device, dtype)
    works: dict[str, measure.Work] = {}
    failed: dict[str, str] = {}
    expected: Tensor | None = None
    for name, way in ways.items():
        given = x.to(memory_format=LAST) if "channels_last" in name else x
        work = _work(way, given, args.backward)
        try:
            with torch.no_grad():
                answer = way(given).float()
            work()
        except (RuntimeError, NotImplementedError) as error:
            failed[name] = str(error).splitlines()[0]
            continue
        expected = answer if expected is None else expected
        difference = float((answer - expected).abs().max() / expected.abs().max())
        if difference > (1e-4 if dtype == torch.float32 else 5e-2) and "not the same" not in name:
            raise SystemExit(f"benchmarks: {part}, {name}: answers differ by {difference:.1e}")
        works[name] = work
    if device.type == "cuda":
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(args.rounds):
            for name, work in works.items():
                seconds[name].append(measure.device_seconds(work, device))
    else:
        seconds = measure.interleave(works, args.rounds, args.seconds)
    return dict(part=part, stage=stage + 1, shape=list(x.shape), seconds=seconds, failed=failed)


def _work(way: Way, x: Tensor, backward: bool) -> measure.Work:
    if not backward:

        def forward() -> Tensor:
            with torch.inference_mode():
                return way(x)

        return forward
    leaf = x.detach().requires_grad_()

    def both() -> None:
        way(leaf).sum().backward()
        leaf.grad = None

    return both


def report(row: dict[str, Any]) -> str:
    """Returns a table of one part at one stage."""
    times = row["seconds"]
    fastest = min(measure.spread(seconds)[1] for seconds in times.values())
    lines = []
    for name, seconds in times.items():
        low, median, high = measure.spread(seconds)
        lines.append([name, f"{median * 1e3:.3f}", f"{low * 1e3:.3f} - {high * 1e3:.3f}", f"{median / fastest:.2f}"])
    lines += [[name, "not here", "", ""] for name in row["failed"]]
    title = f"{row['part']}, stage {row['stage']}, {' x '.join(map(str, row['shape']))}"
    return measure.table([title, "ms", "quartiles", "x fastest"], lines)


def parser() -> argparse.ArgumentParser:
    """Returns the argument parser."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.parts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to measure; default: all"
    )
    options.add_argument(
        "--stages",
        nargs="+",
        type=int,
        choices=(1, 2, 3, 4),
        default=(1, 2, 3, 4),
        help="stages to measure; default: 1 2 3 4",
    )
    options.add_argument("--batch-size", type=int, default=8, help="images per batch; default: 8")
    options.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="data type; default: float32"
    )
    options.add_argument("--device", default="auto", help="device to use; default: auto")
    options.add_argument("--backward", action="store_true", help="time forward and backward pass, as in training")
    options.add_argument("--rounds", type=int, default=7, help="number of rounds; default: 7")
    options.add_argument("--seconds", type=float, default=0.1, help="minimum duration of a turn; default: 0.1")
    options.add_argument("--out", metavar="DIR", help="folder for the results")
    options.add_argument("--name", default="parts", help="name of the JSON file; default: parts")
    return options


def main(argv: list[str] | None = None) -> None:
    """Measures and prints all requested parts, and writes `parts.json` with --out."""
    args = parser().parse_args(argv)
    device = measure.pick_device(args.device)
    record: dict[str, Any] = {"environment": measure.environment(device), "dtype": args.dtype, "rows": []}
    print(measure.device_name(record["environment"]), file=sys.stderr)
    for part in args.parts:
        for stage in args.stages:
            record["rows"].append(compare(part, stage - 1, args, device))
            print(report(record["rows"][-1]) + "\n", flush=True)
            if args.out:
                measure.save(args.out, args.name, record)


if __name__ == "__main__":
    main()
