"""What the benchmarks share: fair timing, memory, the record of the machine, tables, output."""

import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

import container
from container.files import write_atomically

Work = Callable[[], Any]


def interleave(works: dict[str, Work], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Times works by turns, so that whatever slows the machine down for a while slows all of them.

    Each is called once to warm up, then as often a turn as fills the given time; which one begins a round changes.

    Args:
        works: What is timed, by name.
        rounds: Turns of each.
        seconds: Least length of a turn.

    Returns:
        Seconds per call, one number a round, in the order of the rounds.
    """
    timers = {
        name: Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        for name, work in works.items()
    }
    calls = {}
    for name, timer in timers.items():
        timer.timeit(1)
        once = timer.timeit(1).mean
        calls[name] = max(1, math.ceil(seconds / once)) if once else 1000
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(timers[name].timeit(calls[name]).mean)
    return times


class Graphed:
    """A call on a GPU that, once captured, is one launch: the replay of a CUDA graph.

    Args:
        call: What it does; always the same, on the same tensors.
    """

    def __init__(self, call: Work) -> None:
        self.call = call  # kept for good: a graph reads and writes its tensors, and does not keep them
        self.replay: Work | None = None

    def capture(self) -> None:
        """Runs the call three times, to let it allocate and choose kernels, then records it without running it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = self.call()

        def replay() -> Any:
            graph.replay()
            return answer

        self.replay = replay

    def __call__(self) -> Any:
        """Does it."""
        return self.call() if self.replay is None else self.replay()


def device_seconds(work: Work, device: torch.device, calls: int = 5) -> float:
    """Seconds a call for which the device computes: on a GPU the sum of its kernels' times, without the gaps between.

    A host clock between two synchronisations also counts the launches, which are longer than small kernels.

    Args:
        work: What is timed, warmed up.
        device: Where it computes. A CPU is its own host: there it is the time of the call.
        calls: So many are averaged.
    """
    if device.type != "cuda":
        return Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads()).timeit(calls).mean
    return sum(seconds for _, seconds, _ in kernels(work, device, calls)) / calls


def kernels(work: Work, device: torch.device, calls: int) -> list[tuple[str, float, int]]:
    """(name, seconds, runs) of everything that a device ran in some calls, the longest first, by torch.profiler.

    On a GPU these are its kernels and copies; on a CPU PyTorch's operators, each without those that it calls.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            work()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = []
    for event in profiler.key_averages():
        if on_gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue  # an annotation spans kernels that are here by themselves
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append((event.key, microseconds / 1e6, event.count))
    return sorted(found, key=lambda one: -one[1])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratios(reference: Sequence[float], values: Sequence[float]) -> list[float]:
    """How many times faster than the reference, round by round."""
    return [a / b for a, b in zip(reference, values, strict=True)]


def peak_memory(work: Work, device: torch.device) -> int | None:
    """Bytes in use at most during one call, above what was in use before it.

    On a GPU by PyTorch's allocator; on a CPU by Linux, which counts resident pages. None where neither can be asked.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        work()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def environment(device: torch.device) -> dict[str, Any]:
    """The device, and the versions and settings that a measurement depends on."""
    record: dict[str, Any] = {
        "command": "python -m benchmarks." + " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "container": container.__version__,
        "environment": {
            key: value
            for key, value in sorted(os.environ.items())
            if key.startswith(
                ("OMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "MALLOC_", "LD_PRELOAD", "THP_", "TORCHINDUCTOR_")
            )
            and not key.endswith("_DIR")
        },
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["cuda"] = torch.version.cuda
        record["cudnn"] = torch.backends.cudnn.version()
        record["nvidia_smi"] = _nvidia_smi()
    return record


def _nvidia_smi() -> dict[str, str]:
    """Driver, clocks and power of the GPUs at this moment, as nvidia-smi prints them."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, done.stdout.splitlines()[0].split(", "), strict=False))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0]}, {len(names)} processors" if names else f"{platform.processor()}, {os.cpu_count()} processors"


def device_name(record: dict[str, Any]) -> str:
    """One line about where a measurement was made."""
    where = record.get("gpu") or f"{record['cpu']}, {record['cpu_capability']}, {record['threads']} threads"
    return f"{where}; torch {record['torch']}, timm {record['timm']}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns; the first is text, the others are numbers."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def save(out: str | Path, name: str, record: dict[str, Any]) -> Path:
    """Writes a record as `NAME.json` into a folder, making it; returns the path without its suffix.

    What is measured bit by bit is saved bit by bit, so that nothing is lost when it is stopped: a file is whole or old.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
    return folder / name


def pick_device(name: str) -> torch.device:
    """The device of that name; 'auto' is the GPU where there is one.

    On a GPU, cuDNN tries its kernels at the first call of every shape and keeps the fastest (`cudnn.benchmark`).

    Raises:
        SystemExit: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("benchmarks: no GPU here that PyTorch can use; --device cpu measures the CPU")
    torch.backends.cudnn.benchmark = name.startswith("cuda")
    return torch.device(name)
