"""Utilities shared by the benchmarks: fair timing, memory, the record of the machine, tables, output."""

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
    """Times several functions in turns, so that a temporary slowdown of the machine affects all of them.

    Each is called once to warm up. A turn then has as many calls as fill the given time. Each round begins with another
    function.

    Args:
        works: Functions to time, by name.
        rounds: Number of turns of each.
        seconds: Minimum duration of a turn.

    Returns:
        Seconds per call by name, one value per round, in the order of the rounds.
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
    """Function on a GPU that, once captured, runs as a single launch: the replay of a CUDA graph.

    Args:
        call: The function. It must always do the same, on the same tensors.
    """

    def __init__(self, call: Work) -> None:
        self.call = call  # kept alive: a graph reads and writes its tensors, but does not own them
        self.replay: Work | None = None

    def capture(self) -> None:
        """Calls the function three times, so that it allocates memory and selects kernels, then captures the graph."""
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
        """Replays the graph if it has been captured, or else calls the function."""
        return self.call() if self.replay is None else self.replay()


def device_seconds(work: Work, device: torch.device, calls: int = 5) -> float:
    """Returns the seconds per call during which the device computes.

    On a GPU, this is the sum of its kernels' times, without the gaps between them. A host clock between two
    synchronisations would also count the launches, which take longer than small kernels.

    Args:
        work: Function to time, already warmed up.
        device: Device that it computes on. On a CPU, the result is the time of the call.
        calls: Number of calls to average.
    """
    if device.type != "cuda":
        return Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads()).timeit(calls).mean
    return sum(seconds for _, seconds, _ in kernels(work, device, calls)) / calls


def kernels(work: Work, device: torch.device, calls: int) -> list[tuple[str, float, int]]:
    """Returns (name, seconds, runs) of everything that the device ran in some calls, longest first, by torch.profiler.

    On a GPU, these are kernels and copies. On a CPU, they are PyTorch operators, each without those that it calls.
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
            continue  # an annotation spans kernels that have their own entries
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append((event.key, microseconds / 1e6, event.count))
    return sorted(found, key=lambda one: -one[1])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns (first quartile, median, third quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratios(reference: Sequence[float], values: Sequence[float]) -> list[float]:
    """Returns how many times faster than the reference the values are, round by round."""
    return [a / b for a, b in zip(reference, values, strict=True)]


def peak_memory(work: Work, device: torch.device) -> int | None:
    """Returns the peak memory of one call in bytes, above what was in use before it.

    It comes from PyTorch's allocator on a GPU, and from Linux's count of resident pages on a CPU. None if neither is
    available.
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
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
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
    """Returns the device, versions and settings that a measurement depends on."""
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
    """Returns the current driver version, clocks and power of the first GPU, as printed by nvidia-smi."""
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
    """Returns one line with the hardware and versions that a measurement was made with."""
    where = record.get("gpu") or f"{record['cpu']}, {record['cpu_capability']}, {record['threads']} threads"
    return f"{where}; torch {record['torch']}, timm {record['timm']}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table with aligned columns; the first is text, the others are numbers."""
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
    """Writes a record to `NAME.json` in a folder, which is created if needed. Returns the path without its suffix.

    The file is replaced atomically. A benchmark can thus save after every result, and loses nothing when it is stopped.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
    return folder / name


def pick_device(name: str) -> torch.device:
    """Returns the device with the given name; 'auto' is the GPU if there is one.

    On a GPU, cuDNN tries its kernels at the first call with each shape and keeps the fastest (`cudnn.benchmark`).

    Raises:
        SystemExit: A GPU is requested, and PyTorch cannot use one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("benchmarks: no GPU here that PyTorch can use; --device cpu measures the CPU")
    torch.backends.cudnn.benchmark = name.startswith("cuda")
    return torch.device(name)
