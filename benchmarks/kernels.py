"""Lists the kernels of a model's step, by the time that they take on the device.

python -m benchmarks.kernels container_light:amp+channels_last --work train --batch-size 128 --steps 20

Entries are those of benchmarks.speed. On a GPU, the rows are kernels, as recorded by torch.profiler. On a CPU, they are
PyTorch operators, or for an OpenVINO entry its nodes, by OpenVINO's own counters. "busy" is the share of the step in
which the device computes; in the rest it waits for the host.
"""

import argparse
import sys
from typing import Any

import torch

from . import measure, speed


def main(argv: list[str] | None = None) -> None:
    """Profiles, prints the longest kernels, and writes all of them to `kernels.json` with --out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "entries", nargs="+", metavar="NAME[:SETTING[+SETTING]...[,...]]", help="models with their settings"
    )
    parser.add_argument(
        "--work", choices=("infer", "train"), default="train", help="inference or training; default: train"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images per batch; default: 8")
    parser.add_argument("--img-size", type=int, default=224, help="image size in pixels; default: 224")
    parser.add_argument("--steps", type=int, default=20, help="number of steps; default: 20")
    parser.add_argument("--device", default="auto", help="device to use; default: auto")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile; default: inductor")
    parser.add_argument("--released", metavar="PATH", help="the authors' models.py, or its folder")
    parser.add_argument("--shown", type=int, default=25, help="number of rows to print; default: 25")
    parser.add_argument("--out", metavar="DIR", help="folder for the results")
    parser.add_argument("--name", default="kernels", help="name of the JSON file; default: kernels")
    args = parser.parse_args(argv)
    entries, device = speed.parse(args.entries), measure.pick_device(args.device)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size).to(device)
    record: dict[str, Any] = dict(environment=measure.environment(device), rows=[])
    record |= dict(work=args.work, batch_size=args.batch_size, img_size=args.img_size, steps=args.steps)
    print(measure.device_name(record["environment"]), file=sys.stderr)
    for entry in entries:
        model = speed.create(entry.model, args.img_size, args.released)
        work, _ = speed.prepare(entry, model, images, args.work == "train", args.backend)
        work()
        step = measure.spread(measure.interleave({"step": work}, 3, 0.2)["step"])[1]
        if isinstance(work, speed.OpenVino):
            found = work.kernels(args.steps)
        else:
            found = measure.kernels(work, device, args.steps)
        busy = sum(seconds for _, seconds, _ in found) / args.steps
        kernels = [
            dict(name=name, ms=1e3 * seconds / args.steps, share=seconds / args.steps / busy, runs=runs / args.steps)
            for name, seconds, runs in found
        ]
        record["rows"].append(dict(entry=str(entry), step=step, busy=busy, kernels=kernels))
        if args.out:
            measure.save(args.out, args.name, record)
        lines = [
            [k["name"][:90].replace("|", "/"), f"{k['runs']:.0f}", f"{k['ms']:.3f}", f"{k['share']:.1%}"]
            for k in kernels[: args.shown]
        ]
        runs = sum(runs for _, _, runs in found) / args.steps
        print(f"\n{entry}: {1e3 * step:.2f} ms a step, {busy / step:.0%} busy, {runs:.0f} runs")
        print(measure.table(["kernel", "runs", "ms a step", "of busy"], lines), flush=True)


if __name__ == "__main__":
    main()
