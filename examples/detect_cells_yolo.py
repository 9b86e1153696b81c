#!/usr/bin/env python
"""Trains a YOLO with the context layer, or with a CONTAINER-LIGHT backbone, to detect blood cells.

    python examples/detect_cells_yolo.py --data-dir bccd
    python examples/detect_cells_yolo.py --data-dir bccd --model yolov8n-container_light_nano.yaml --pretrained

Needs `pip install -e ".[downstream]" ultralytics`; Ultralytics is under the AGPL-3.0. Results: docs/results.md.
"""

import argparse
import json
import shutil
from pathlib import Path

import yaml
from bccd import CLASSES, Cells

import container.yolo

try:
    from ultralytics import YOLO
except ImportError as error:
    raise SystemExit(f"{error}: pip install ultralytics") from None


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="bccd", help="folder of BCCD; default: bccd")
    parser.add_argument(
        "--model", default="yolov8n-context.yaml", help="model of container.yolo.config, or one of Ultralytics"
    )
    parser.add_argument("--pretrained", action="store_true", help="start from the timm model's pre-trained weights")
    parser.add_argument("--output", default="cells-yolo", help="folder for the run; default: cells-yolo")
    parser.add_argument("--epochs", type=int, default=20, help="number of epochs; default: 20")
    parser.add_argument("--batch-size", type=int, default=8, help="images per batch; default: 8")
    parser.add_argument("--size", type=int, default=416, help="side that photos are padded to; default: 416")
    parser.add_argument("--seed", type=int, default=0, help="random seed; default: 0")
    parser.add_argument("--device", default="cpu", help="device to use; default: cpu")
    return parser.parse_args()


def convert(data_dir: Path, folder: Path) -> Path:
    """Writes photos and boxes in Ultralytics' layout, and returns the YAML file that describes them."""
    for split, name in (("trainval", "train"), ("test", "val")):
        cells = Cells(data_dir, split)
        for kind in ("images", "labels"):
            (folder / kind / name).mkdir(parents=True, exist_ok=True)
        for photo in cells.names:
            (width, height), boxes, labels = cells.annotation(photo)
            shutil.copy(data_dir / "JPEGImages" / f"{photo}.jpg", folder / "images" / name)
            lines = (
                f"{label} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} {(x2 - x1) / width} {(y2 - y1) / height}\n"
                for label, (x1, y1, x2, y2) in zip(labels, boxes, strict=True)
            )
            (folder / "labels" / name / f"{photo}.txt").write_text("".join(lines))
    description = dict(path=str(folder.resolve()), train="images/train", val="images/val", names=list(CLASSES))
    (folder / "cells.yaml").write_text(yaml.safe_dump(description))
    return folder / "cells.yaml"


def main() -> None:
    """Converts the data, trains the model, and evaluates it on the test photos."""
    args = parse_args()
    output = Path(args.output).resolve()
    data = convert(Path(args.data_dir), output / "data")
    ours = args.model.endswith(".yaml") and "-" in args.model
    model = YOLO(container.yolo.config(args.model, args.pretrained) if ours else args.model)
    model.train(
        data=str(data), epochs=args.epochs, batch=args.batch_size, imgsz=args.size, device=args.device, seed=args.seed,
        project=str(output), name="run", exist_ok=True, workers=1, val=False, plots=False,
        amp=False,  # Ultralytics' AMP check downloads a model
    )  # fmt: skip
    best = YOLO(output / "run" / "weights" / "last.pt").val(
        data=str(data), imgsz=args.size, device=args.device, project=str(output), name="val", exist_ok=True, plots=False
    )
    result = dict(map=100 * best.box.map, map50=100 * best.box.map50, args=vars(args))
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"mAP {100 * best.box.map:.1f} %, at IoU 0.5 {100 * best.box.map50:.1f} %, on the photos held out")


if __name__ == "__main__":
    main()
