"""Runs the steps of benchmarks/gpu.sh in order of importance, within one time budget. That file has the usage.

A step is a list of commands that share a time limit. A command that reaches the limit is killed with all processes that
it started. A command that fails does not stop the others. Output is shown and kept in OUT/STEP.log. The commands write
what they measure to OUT themselves, as they go.
"""

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

from .workers import descendants, kill

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("tests", "infer", "train", "latency", "roofline", "transfer", "cifar")
NEEDS = dict(transfer="needs --transfer", cifar="needs --data")
PROJECT = "container-timm"
OURS = ("container_light", "container_light_mlp4", "container")
PEERS = ("resnet50", "convnext_tiny", "swin_tiny_patch4_window7_224", "pvt_v2_b2")
STAND_INS = {  # small models for a rehearsal
    "container_light": "container_light_nano",
    "container_light_mlp4": "container_light_nano",
    "container": "container_light_nano",
    **dict.fromkeys(PEERS, "resnet10t"),
}


class Step(NamedTuple):
    """A step of the plan."""

    name: str
    seconds: float  # time limit
    least: float  # the step is left out if less time is left
    commands: list[list[str]]


def plan(
    out: Path,
    seconds: float,
    rehearse: bool,
    released: str | None,
    data: str | None,
    names: Sequence[str] = STEPS,
    transfer: str | None = None,
) -> list[Step]:
    """Returns the steps with the given names, in order of importance.

    Args:
        out: Folder for their results.
        seconds: Time for all steps, of which each gets its share.
        rehearse: Whether to use small models and tiny sizes on the CPU, without compilers, which take minutes there,
            and in float32, since a CPU may lack all other types. A limit then only ends what hangs: it is all the time.
        released: Path of the authors' models.py, or None.
        data: Folder of CIFAR-10, or None.
        names: Names of the steps.
        transfer: Folder of data to fine-tune on, or None.
    """
    nhwc, compiled, graph = "bf16+channels_last", "+compile", "+graph"
    ours, peers = [f"{name}:fused+{nhwc}" for name in OURS], [f"{name}:{nhwc}" for name in PEERS]
    infer = [f"{entry}{more}" for entry in (f"{OURS[0]}:{nhwc}", *ours, *peers) for more in ("", compiled)]
    train = [f"{name}:amp+channels_last" for name in (*OURS, *PEERS)]
    # A minute is too short to compile a whole training step, but not its blocks one by one. A graph then launches all.
    whole = "+blocks" if rehearse else f"+blocks{graph}"  # a CPU has no CUDA graphs
    compiled_train = [f"{name}:amp+channels_last{whole}" for name in (OURS[0], PEERS[0])]
    latency = [f"{entry}{more}" for entry in (*ours, *peers) for more in ("", graph)]
    infer += [f"{ours[0]}+max-autotune"]  # the most that compilers can do
    train += [f"{OURS[0]}:amp+channels_last{more}" for more in ("+linear", "+checkpointing", graph, f"+linear{graph}")]
    latency += [f"{ours[0]}+reduce-overhead"]
    if released:
        infer += ["released:amp", "released:amp+channels_last+compile"]
        train += ["released:amp", f"released:amp+channels_last{graph}"]
        compiled_train += [f"released:amp+channels_last{whole}"]
        latency += ["released:amp"]

    def small(entries: list[str]) -> list[str]:
        if not rehearse:
            return entries
        pairs = [entry.partition(":") for entry in entries if not entry.startswith("released") and graph not in entry]
        settings = [[word for word in words.split("+") if word not in ("bf16", "amp")] for _, _, words in pairs]
        named = [f"{STAND_INS[name]}:{'+'.join(words)}" for (name, _, _), words in zip(pairs, settings, strict=True)]
        return list(dict.fromkeys(named))

    def command(module: str, *words: object) -> list[str]:
        return [sys.executable, "-m", module, *map(str, words)]

    def measured(module: str, batch: int, *words: object) -> list[str]:
        where = ["--device", "cpu" if rehearse else "cuda", "--out", out]
        return command(f"benchmarks.{module}", *words, "--batch-size", 2 if rehearse else batch, *where)

    def speed(work: str, entries: list[str], batch: int, jobs: int, name: str | None = None) -> list[str]:
        turns: list[object] = ["--rounds", 7, "--seconds", 0.25, "--jobs", jobs]
        if rehearse:
            turns = ["--rounds", 1, "--seconds", 0, "--jobs", 2, "--backend", "aot_eager"]
        source = ["--released", released] if released and not rehearse else []
        rest = ["--budget", "{left}", "--work", work, "--name", name or work]
        return measured("speed", batch, *small(entries), *size, *turns, *source, *rest)

    size: list[object] = ["--img-size", 32] if rehearse else []
    light, trained = small([ours[0]])[0], small(["container_light:amp+channels_last"])[0]
    # In a rehearsal nothing is measured against the machine's peak, which takes long to find on a slow one.
    rounds: list[object] = ["--limits", 100, 1] if rehearse else ["--rounds", 3, "--seconds", 0.2]
    parts: list[object] = ["--rounds", 1, "--seconds", 0, *(["--stages", 4] if rehearse else ["--dtype", "bfloat16"])]
    pytest = ["-m", "gpu", "tests/test_gpu.py", "-q", "-W", "default", "-p", "no:cacheprovider", "--durations", 8]
    pytest += ["-n", 2 if rehearse else 8, "--dist", "worksteal", "--results", out / "tests.json"]
    cifar = ["--data-dir", data, "--seconds", "{left}", *(["--images", 64, "--epochs", 1] if rehearse else ["--graph"])]
    cifar += ["--cutmix", 1, "--cutmix-off", 0.15]  # without CutMix, 56 epochs overfit the images
    tuned: list[object] = ["--data-dir", transfer, "--seconds", "{left}", "--out", out]
    tuned += ["--rehearse", "--device", "cpu", "--jobs", 2, "--only", "cifar10-*"] if rehearse else ["--device", "cuda"]
    commands = dict(
        tests=[command("pytest", *pytest)],
        infer=[speed("infer", infer, 256, 8)],
        train=[
            measured("kernels", 128, trained, *size, "--steps", 2 if rehearse else 20),
            speed("train", train, 128, 5),
            speed("train", compiled_train, 128, 5, "train-compiled"),
        ],
        latency=[speed("latency", latency, 1, 16)],
        roofline=[
            measured("roofline", 256, light, *size, *rounds, "--name", "roofline-infer"),
            measured("roofline", 128, trained, *size, *rounds, "--work", "train", "--name", "roofline-train"),
            measured("parts", 256, *parts, "--name", "parts-infer"),
            measured("parts", 128, *parts, "--backward", "--name", "parts-train"),
        ],
        transfer=[command("benchmarks.transfer", *tuned)] if transfer else [],
        cifar=[measured("cifar", 256, *cifar)] if data else [],
    )
    # Seconds on an H100 with 16 cores, most of them for compilation. The last step gets what is left.
    share = dict(tests=110, infer=115, train=150, latency=50, roofline=55)
    share["transfer"] = 420 if transfer else 0
    least = dict(tests=60, infer=60, train=60, latency=30, roofline=25, transfer=60, cifar=45)
    scale = seconds / max(1, sum(share.get(name, 0) for name in names))
    return [
        Step(
            name,
            seconds if rehearse else scale * share.get(name, seconds / scale),
            min(1.0, scale) * least[name],
            commands[name],
        )
        for name in STEPS
        if name in names
    ]


# ---------------------------------------------------------------------------------------------------------- the check


def check(rehearse: bool, files: dict[str, str | None]) -> dict[str, Any]:
    """Checks the requirements, and returns the versions found and a list of what is `missing`.

    Args:
        rehearse: Whether this is a rehearsal, which needs no GPU.
        files: Paths that were given, by flag.
    """
    from packaging.requirements import Requirement

    found: dict[str, Any] = dict(python=sys.version.split()[0], missing=[])
    try:
        needed = [Requirement(line) for line in requires(PROJECT) or []]
    except PackageNotFoundError:
        found["missing"].append(f"{PROJECT} itself: its metadata say what it needs")
        return found
    needed = [r for r in needed if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", "train"))]
    for requirement in [*needed, Requirement("pytest"), Requirement("pytest-xdist")]:
        try:
            found[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            found["missing"].append(str(requirement))
            continue
        if not requirement.specifier.contains(found[requirement.name], prereleases=True):
            found["missing"].append(f"{requirement} (here is {found[requirement.name]})")
    for name, path in files.items():
        if path is not None and not Path(path).exists():
            found["missing"].append(f"{name} {path}")
    if not rehearse and not found["missing"]:
        import torch

        if not torch.cuda.is_available():
            found["missing"].append("a GPU that PyTorch can use; --rehearse needs none")
        else:
            free, total = torch.cuda.mem_get_info()
            found["gpu"], found["cuda"] = torch.cuda.get_device_name(), torch.version.cuda
            found["memory"] = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return found


# ------------------------------------------------------------------------------------------------------------ running


def kill_descendants(spared: set[int]) -> None:
    """Kills all descendants of this process that are still running, except those in `spared`."""
    for _ in range(50):
        left = set(descendants(os.getpid())) - spared
        if not left:
            return
        kill(left)
        time.sleep(0.02)


def execute(command: list[str], seconds: float, log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a command, shows and logs its output, and kills it at its time limit.

    Returns:
        `outcome` (done, failed or killed), `code` (the exit status, None if killed), `seconds`, and `said`, the last
        line of output.
    """
    start, said = time.perf_counter(), ""
    before = set(descendants(os.getpid()))
    with open(log, "a") as file:
        file.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", stdin=subprocess.DEVNULL,
        )  # fmt: skip

        def copy() -> None:
            nonlocal said
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                print(line, end="", flush=True)
                said = line.strip() or said

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        try:
            code: int | None = process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        kill_descendants(before)
        process.wait()
        reader.join(timeout=2)
        if process.stdout is not None and not reader.is_alive():
            process.stdout.close()
    outcome = {None: "killed", 0: "done"}.get(code, "failed")
    return dict(outcome=outcome, code=code, seconds=round(time.perf_counter() - start, 1), said=said)


def run(steps: list[Step], out: Path, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Runs steps until the time is up, and writes `summary.json` after each.

    Args:
        steps: Steps in order of importance.
        out: Folder for `summary.json` and the logs.
        seconds: Time for all steps.
        environment: Environment variables of the commands.

    Returns:
        The records in `summary.json`, by step, including those of earlier calls.
    """
    end = time.monotonic() + seconds
    records = summary(out)
    for step in steps:
        left = end - time.monotonic()
        if not step.commands:
            records[step.name] = dict(outcome="left out", seconds=0, said=NEEDS[step.name])
            continue
        if left < step.least:
            records[step.name] = dict(outcome="left out", seconds=0, said=f"{left:.0f} s left, {step.least:.0f} needed")
            continue
        limit = min(step.seconds, left - 1)
        stop = time.monotonic() + limit
        log = out / f"{step.name}.log"
        log.unlink(missing_ok=True)
        print(f"\n== {step.name}: at most {limit:.0f} of {left:.0f} s", flush=True)
        parts = []
        for command in step.commands:
            rest = stop - time.monotonic()
            words = [word.replace("{left}", f"{max(1.0, rest - 6):.0f}") for word in command]
            parts.append(execute(words, rest, log, environment))
        worst = next((p for name in ("killed", "failed") for p in parts if p["outcome"] == name), parts[-1])
        records[step.name] = dict(worst, seconds=round(sum(p["seconds"] for p in parts), 1))
        write(out, records)
    write(out, records)
    return records


def summary(out: Path) -> dict[str, Any]:
    """Returns the records that earlier calls have left in `summary.json`, by step."""
    file = out / "summary.json"
    return json.loads(file.read_text())["steps"] if file.is_file() else {}


def left_to_do(out: Path, only: Sequence[str] | None) -> list[str]:
    """Returns the steps requested by name, or else all that are not done."""
    before = summary(out)
    return [name for name in STEPS if (name in only if only else before.get(name, {}).get("outcome") != "done")]


def make_images(folder: Path) -> None:
    """Writes 32 x 32 noise images of two classes, bright and dark, in the layout of CIFAR-10, for the rehearsal."""
    from PIL import Image

    noise = random.Random(0)
    for split, count in (("train", 128), ("test", 64)):
        for name, level in (("bright", 150), ("dark", 50)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = bytes(noise.randint(level - 40, level + 40) for _ in range(32 * 32 * 3))
                Image.frombytes("RGB", (32, 32), pixels).save(folder / split / name / f"{i}.png")


def write(out: Path, records: dict[str, Any]) -> None:
    """Writes `summary.json`."""
    temporary = out / "summary.json.tmp"
    temporary.write_text(json.dumps(dict(steps=records), indent=1) + "\n")
    temporary.replace(out / "summary.json")


def main(argv: list[str] | None = None) -> None:
    """Checks the machine, runs the plan, and prints the outcome of every step."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("out", metavar="OUT", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all steps; default: 8")
    parser.add_argument("--rehearse", action="store_true", help="run the same steps on the CPU, with tiny sizes")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"steps to run: {', '.join(STEPS)}")
    parser.add_argument("--released", metavar="PATH", help="the authors' models.py, or its folder")
    parser.add_argument("--data", metavar="DIR", help="folder of CIFAR-10, with {train,test}/CLASS/*")
    parser.add_argument("--transfer", metavar="DIR", help="data to fine-tune on, as in benchmarks/transfer.py")
    parser.add_argument("--from", dest="origin", default=".", help=argparse.SUPPRESS)  # base of relative paths
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes} are none")
    origin = Path(args.origin).resolve()
    released, data, transfer = (
        None if path is None else str(origin / path) for path in (args.released, args.data, args.transfer)
    )
    out = origin / args.out
    out.mkdir(parents=True, exist_ok=True)
    files = {"--released": released, "--data": data, "--transfer": transfer}
    found = check(args.rehearse, files)
    (out / "check.json").write_text(json.dumps(found, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in found.items() if key != "missing"), flush=True)
    if found["missing"]:
        raise SystemExit("benchmarks: missing: " + "; ".join(found["missing"]))
    if args.rehearse and data is None:
        data = str(out / "images")
        make_images(Path(data))
    if args.rehearse and transfer is None:
        transfer = str(out / "transfer")
        make_images(Path(transfer) / "cifar10")
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(out / "cache" / "inductor"),
        "TRITON_CACHE_DIR": str(out / "cache" / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "4",  # in each of the processes that compile in parallel
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 8)),  # likewise
        "CONTAINER_TEST_DEVICE": "cpu" if args.rehearse else "cuda",
        "PYTHONUNBUFFERED": "1",
    }
    if sys.platform == "linux":  # PR_SET_CHILD_SUBREAPER: orphans become our children, so they can be killed
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    seconds = 60 * args.minutes - (time.monotonic() - start)
    steps = plan(out, seconds, args.rehearse, released, data, left_to_do(out, args.only), transfer)
    records = run(steps, out, seconds, environment)
    print(f"\n== after {time.monotonic() - start:.0f} s")
    for name, record in sorted(records.items(), key=lambda item: STEPS.index(item[0])):
        print(f"{name:10} {record['outcome']:9} {record['seconds']:6.1f} s   {record['said'][:110]}")
    if any(records[step.name]["outcome"] != "done" for step in steps):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
