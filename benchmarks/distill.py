"""Photo weights in some minutes: models learn one teacher's logits side by side, from the same views.

python -m benchmarks.distill container_light=24 container_nano=32 --photos DIR --teacher-checkpoint FILE --out OUT

A model comes with its epochs. The first runs alone until the epochs of views that repeat are on disk, with what the
teacher says of them; then all run, and ask it no more. Each is `train_imagenet.py --recipe distill --resume force` in
OUT/MODEL: the same command goes on with what is left, with fewer epochs too, if time is short.
"""

import argparse
import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import timm

import container  # noqa: F401  (registers the models)

ROOT = Path(__file__).resolve().parent.parent


def epochs_done(run: Path) -> int:
    """Whole epochs of a run, by its `summary.csv`."""
    file = run / "summary.csv"
    return len(list(csv.DictReader(file.read_text().splitlines()))) if file.is_file() else 0


def start(model: str, epochs: int, out: Path, settings: list[str]) -> subprocess.Popen[bytes]:
    """A run of a model in its folder; what it prints goes to a log beside it."""
    command = [sys.executable, "-u", str(ROOT / "train_imagenet.py"), "--recipe", "distill", "--resume", "force"]
    command += ["--model", model, "--epochs", str(epochs), "--output", str(out / model)]
    with (out / f"{model}.log").open("ab") as log:
        return subprocess.Popen([*command, "--view-dir", str(out / "views"), *settings], stdout=log, stderr=log)


def main(argv: list[str] | None = None) -> None:
    """Runs the models until all are done, or the time is over, when they save where they are."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL=EPOCHS")
    parser.add_argument("--photos", nargs="+", required=True, metavar="DIR", help="folders with train/ and val/")
    parser.add_argument("--teacher", default="tf_efficientnet_lite2")
    parser.add_argument("--teacher-checkpoint", required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything; default 480")
    parser.add_argument("--view-epochs", type=int, default=5, help="of views that repeat")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--img-size", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    models = dict(word.partition("=")[::2] for word in args.models)
    if odd := [name for name, epochs in models.items() if not (timm.is_model(name) and epochs.isdigit())]:
        raise SystemExit(f"benchmarks: {odd[0]}={models[odd[0]]} is no MODEL=EPOCHS")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = ["--data-dir", *args.photos, "--exclude", "ILSVRC2012_val_*", "--device", args.device]
    for name in ("teacher", "teacher_checkpoint", "view_epochs", "batch_size", "img_size"):
        settings += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    first, end, running = next(iter(models)), begin + args.seconds, {}
    stopped = False
    while True:
        recorded = epochs_done(args.out / first) >= min(args.view_epochs, int(models[first]))
        for name in list(models) if recorded else [first]:
            if name not in running:
                running[name] = start(name, int(models[name]), args.out, settings)
        alive = [process for process in running.values() if process.poll() is None]
        failed = [name for name, process in running.items() if process.poll() not in (None, 0)]
        if (not stopped and time.monotonic() > end) or (failed and not stopped):
            stopped = True
            for process in alive:
                process.send_signal(signal.SIGTERM)  # it saves
        if not alive and (stopped or recorded):
            break
        time.sleep(0.2)
    for name, epochs in models.items():
        print(f"{name}: {epochs_done(args.out / name)} of {epochs} epochs, {args.out / name}")
    ended = (0, 128 + signal.SIGTERM, -signal.SIGTERM)  # done, stopped, stopped before it had begun
    if failed := [name for name, process in running.items() if process.poll() not in ended]:
        raise SystemExit(f"benchmarks: {failed[0]} failed: {args.out / failed[0]}.log")


if __name__ == "__main__":
    main()
