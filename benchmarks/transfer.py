"""Runs fine-tuning, DINO and YOLO training in parallel on one device, until the time is up.

python -m benchmarks.transfer --data-dir DATA --seconds 420 --out OUT

DATA holds any of `cifar10`, `trashnet` and `bccd`, in the layout that train_imagenet.py and the examples read. It may
hold `photos`, a folder with train/CLASS and val/CLASS for DINO at 64 pixels. It may also hold weights,
MODEL.safetensors or MODEL.TAG.safetensors, which are fine-tuned as well. DINO needs lightly, and `bccd` needs
Ultralytics. `transfer.json` is rewritten whenever a run ends, with its result and its last line of output. A run that
is stopped leaves what it has measured so far.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from . import measure

ROOT = Path(__file__).resolve().parent.parent
RANDOM = (
    "container_light_nano",
    "container_nano",
    "container_light",
    "container_light_tiny",
    "resnet18",
    "pvt_v2_b0",
    "mobilenetv3_small_100",
)
PUBLISHED = ("container_light_nano.lite2_dist", "container_nano.lite2_dist", "container_light_tiny.lite2_dist")
DETECTORS = ("yolov8n", "yolov8n-context", "yolov8n-container_light_nano", "yolo11n", "yolo11n-context")
SEEDS = (0, 1, 2)
EDGES = 15.0  # seconds for imports, and to stop unfinished runs and keep their results


class Job(NamedTuple):
    """Training run in a process of its own."""

    name: str
    command: tuple[str, ...]
    result: Path  # JSON file that it writes


def jobs(data: Path, folder: Path, device: str, rehearse: bool = False) -> Iterator[Job]:
    """Yields the runs for which there is data, longest first.

    Args:
        data: Folder of the data.
        folder: Folder for the results of the runs.
        device: 'cuda' or 'cpu'.
        rehearse: Whether to run one epoch on a few images.
    """

    def python(script: str, *words: object) -> tuple[str, ...]:
        return sys.executable, str(ROOT / script), *map(str, words)

    def dino(name: str, model: str, epochs: int, *more: object) -> Job:
        result = folder / f"dino-{name}.json"
        few = ["--images", 64, "--test-images", 32, "--batch-size", 32, "--img-size", 32]
        size = few if rehearse else ["--batch-size", 256, *more]
        words = ["--model", model, "--epochs", 1 if rehearse else epochs, "--workers", 6, *size, "--device", device]
        weights = result.with_suffix(".safetensors")
        command = python("examples/dino.py", "--data-dir", data / name, *words, "--output", weights)
        return Job(f"dino-{name}", command, result)

    def tune(name: str, start: str, seed: int, *more: object) -> Job:
        weights = next((["--checkpoint", f] for f in data.glob("*.safetensors") if f.stem == start), None)
        published = ["--pretrained"] if "." in start else []
        model = start if weights is None else start.partition(".")[0]
        to = folder / f"{name}-{start}-{seed}"
        words = ["--data-dir", data / name, "--model", model, *(weights or published), "--seed", seed, "--output", to]
        own = 64 if name == "cifar10" else 128  # CIFAR-10's images have 32 pixels
        size = ["--epochs", 1, "--img-size", 32] if rehearse else ["--img-size", own, *more]
        command = python("train_imagenet.py", "--recipe", "transfer", *words, *size)
        return Job(to.name, command, to / "summary.json")

    def detect(model: str, seed: int, *more: object) -> Job:
        to = folder / f"bccd-{model}{'-pretrained' if more else ''}-{seed}"
        words = ["--data-dir", data / "bccd", "--model", f"{model}.yaml", "--seed", seed, *more, "--output", to]
        words += ["--device", "0" if device == "cuda" else device]
        size = ["--epochs", 1, "--size", 64] if rehearse else []
        return Job(to.name, python("examples/detect_cells_yolo.py", *words, *size), to / "result.json")

    here = {name for name in ("photos", "cifar10", "trashnet", "bccd") if (data / name).is_dir()}
    files = [file.stem for file in sorted(data.glob("*.safetensors"))]
    starts = [PUBLISHED[0], *files] if rehearse else [*PUBLISHED, *files, *RANDOM]
    if "photos" in here:
        yield dino("photos", "container_light_nano", 20, "--images", 10**6, "--test-images", 10**6, "--img-size", 64)
    if "cifar10" in here:
        yield dino("cifar10", "container_light_nano_32", 8, "--images", 50000, "--test-images", 10000)
        yield from (tune("cifar10", start, 0, "--epochs", 2) for start in starts)
    for seed in SEEDS[:1] if rehearse else SEEDS:
        if "bccd" in here:
            yield detect("yolov8n-container_light_nano", seed, "--pretrained")
            yield from (detect(model, seed) for model in DETECTORS)
        if "trashnet" in here:
            yield from (tune("trashnet", start, seed) for start in starts)


def share_gpu(folder: Path) -> dict[str, str]:
    """Lets several processes run kernels at once, with CUDA MPS if it is installed.

    Args:
        folder: Folder for its pipe and log.

    Returns:
        Environment variables for these processes.
    """
    if shutil.which("nvidia-cuda-mps-control") is None:
        return {}
    variables = dict(CUDA_MPS_PIPE_DIRECTORY=str(folder), CUDA_MPS_LOG_DIRECTORY=str(folder))
    subprocess.run(["nvidia-cuda-mps-control", "-d"], env=os.environ | variables, check=True)
    return variables


def run(todo: Sequence[Job], width: int, seconds: float, out: Path, record: dict[str, Any]) -> None:
    """Runs jobs until the time is up, and keeps their results in `record` and in `transfer.json`.

    Args:
        todo: Jobs in order of importance.
        width: Number of jobs at once.
        seconds: Time for all jobs.
        out: Folder for `transfer.json`.
        record: Its `runs` gets an entry for each job.
    """
    end, waiting = time.monotonic() + seconds, list(todo)
    running: dict[Job, tuple[subprocess.Popen, float, Path]] = {}

    def close(job: Job, outcome: str) -> None:
        process, begun, log = running.pop(job)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        took = round(time.monotonic() - begun, 1)
        try:
            result = json.loads(job.result.read_text())
        except (OSError, ValueError):  # not written yet, or stopped while writing
            result = None
        lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
        said = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
        record["runs"][job.name] = dict(outcome=outcome, seconds=took, said=said, result=result)
        print(f"{job.name}: {outcome} after {took:.0f} s: {said[:120]}", flush=True)
        measure.save(out, "transfer", record)

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT / "examples"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        variables = dict(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1", YOLO_CONFIG_DIR=folder)
        shared = share_gpu(Path(folder)) if record["device"] == "cuda" else {}
        try:
            while (waiting or running) and time.monotonic() < end:
                while waiting and len(running) < width:
                    job = waiting.pop(0)
                    log = Path(folder) / f"{job.name}.log"
                    with open(log, "w") as file:
                        process = subprocess.Popen(
                            job.command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
                            env=os.environ | variables | shared, start_new_session=True,
                        )  # fmt: skip
                    running[job] = process, time.monotonic(), log
                for job in [job for job, (process, *_) in running.items() if process.poll() is not None]:
                    close(job, "done" if running[job][0].returncode == 0 else "failed")
                time.sleep(0.2)
        finally:
            for job in list(running):
                close(job, "stopped")
            if shared:
                subprocess.run(["nvidia-cuda-mps-control"], input="quit", text=True, env=os.environ | shared)
    record["not_begun"] = [job.name for job in waiting]
    measure.save(out, "transfer", record)


def main(argv: list[str] | None = None) -> None:
    """Runs the jobs that there is time for, and writes `transfer.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, metavar="DATA", help="folder of the data sets")
    parser.add_argument("--seconds", type=float, default=420.0, help="time for all runs; default: 420")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at once; default: one per core"
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="runs, such as `bccd-yolo11n*`")
    parser.add_argument("--rehearse", action="store_true", help="run one epoch of each kind, on a few images")
    parser.add_argument("--device", default="auto", help="device to use; default: auto")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the results")
    args = parser.parse_args(argv)
    device, data = measure.pick_device(args.device), Path(args.data_dir).resolve()
    with tempfile.TemporaryDirectory() as folder:
        found = list(jobs(data, Path(folder), device.type, args.rehearse))
        todo = [job for job in found if any(fnmatch(job.name, pattern) for pattern in args.only)]
        if not todo:
            raise SystemExit(f"benchmarks: {data} has no data for {' '.join(args.only)}")
        record: dict[str, Any] = dict(environment=measure.environment(device), device=device.type, runs={})
        run(todo, args.jobs, max(1.0, args.seconds - EDGES), Path(args.out), record)
    outcomes = [entry["outcome"] for entry in record["runs"].values()]
    print(f"{outcomes.count('done')} of {len(todo)} runs done")
    if outcomes.count("done") < len(todo):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
