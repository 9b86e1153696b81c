#!/usr/bin/env python
"""Trains RetinaNet or Deformable DETR with any timm backbone to detect blood cells, evaluates it, and draws the result.

    python examples/detect_cells.py --data-dir bccd
    python examples/detect_cells.py --data-dir bccd --untrained-backbone      # what the head alone can do
    python examples/detect_cells.py --data-dir bccd --backbone resnet18
    python examples/detect_cells.py --data-dir bccd --detector detr --pretrained --channels 128 --lr 4e-4 --size 192

Needs `pip install -e ".[downstream]"`. Results: docs/results.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from bccd import CLASSES, Cells
from deformable_detr import DeformableDetr
from detector import add_arguments, batches, train
from torch.utils.data import DataLoader
from torchvision.utils import draw_bounding_boxes, make_grid, save_image
from tqdm import tqdm

from container.detection import retinanet

try:
    from torchmetrics.detection import MeanAveragePrecision
except ImportError as error:
    raise SystemExit(f'{error}: pip install -e ".[downstream]"') from None

COLOURS = ("#0072b2", "#d55e00", "#009e73")  # colour-blind safe


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="bccd", help="folder of BCCD; default: bccd")
    parser.add_argument(
        "--detector",
        choices=["retinanet", "detr"],
        default="retinanet",
        help="architecture of the detector; default: retinanet",
    )
    parser.add_argument("--untrained-backbone", action="store_true", help="freeze the backbone at its initial weights")
    parser.add_argument("--output", default="cells", help="folder for the results; default: cells")
    parser.add_argument("--size", type=int, default=320, help="short side of the photos in pixels; default: 320")
    add_arguments(parser, epochs=20)
    return parser.parse_args()


@torch.inference_mode()
def evaluate(model: torch.nn.Module, loader: DataLoader, device: str) -> dict[str, Any]:
    """Computes COCO's mean average precision in percent, over classes and IoU thresholds of 0.5 to 0.95.

    Returns:
        `map`, `map50` (at IoU 0.5), and `by_class`.
    """
    model.eval()
    metric = MeanAveragePrecision(class_metrics=True, backend="pycocotools")
    for images, targets in tqdm(loader, desc="test", leave=False):
        found = model([image.to(device) for image in images])
        metric.update([{key: value.cpu() for key, value in f.items()} for f in found], targets)
    result = metric.compute()
    by_class = dict(zip(CLASSES, (100 * result["map_per_class"]).tolist(), strict=True))
    return dict(map=100 * result["map"].item(), map50=100 * result["map_50"].item(), by_class=by_class)


@torch.inference_mode()
def draw(model: torch.nn.Module, cells: Cells, device: str, path: Path, count: int = 3) -> None:
    """Draws a row of photos with their true boxes, and below it a row with the boxes found."""
    model.eval()
    rows: list[list[torch.Tensor]] = [[], []]
    for image, target in (cells[i * len(cells) // count] for i in range(count)):
        found = model([image.to(device)])[0]
        sure = {key: value[found["scores"] > 0.5].cpu() for key, value in found.items()}
        for row, boxes in zip(rows, (target, sure), strict=True):
            colours = [COLOURS[label] for label in boxes["labels"]]
            row.append(draw_bounding_boxes(image, boxes["boxes"], colors=colours, width=4) if colours else image)
    save_image(make_grid(rows[0] + rows[1], nrow=count, padding=8, pad_value=1.0), path)


def main() -> None:
    """Trains the detector, evaluates it on the test photos, and draws some of them."""
    args = parse_args()
    torch.manual_seed(args.seed)
    model: Any
    if args.detector == "detr":
        model = DeformableDetr(args.backbone, len(CLASSES), args.size, args.pretrained, args.channels)
        body = model.body
    else:
        sizes = dict(min_size=args.size, max_size=2 * args.size)
        model = retinanet(args.backbone, len(CLASSES), pretrained=args.pretrained, out_channels=args.channels, **sizes)
        body = model.backbone.body
    model.to(args.device)
    if args.untrained_backbone:
        body.requires_grad_(False)  # RetinaNet's batch norms still update their statistics
    loader = batches(Cells(args.data_dir, "trainval", augment=True), args.batch_size, shuffle=True)
    test_cells = Cells(args.data_dir, "test")
    train(model, loader, args.epochs, args.lr, args.device, args.amp)
    result = evaluate(model, batches(test_cells, args.batch_size, shuffle=False), args.device)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").write_text(json.dumps(dict(result, args=vars(args)), indent=2) + "\n")
    torch.save(model.state_dict(), output / "model.pth")
    draw(model, test_cells, args.device, output / "cells.png")
    print(f"mAP {result['map']:.1f} %, at IoU 0.5 {result['map50']:.1f} %, on {len(test_cells)} photos held out")
    print(", ".join(f"{name} {value:.1f} %" for name, value in result["by_class"].items()))
    print(f"true boxes above, found ones below: {output / 'cells.png'}")


if __name__ == "__main__":
    main()
