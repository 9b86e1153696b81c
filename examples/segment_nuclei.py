#!/usr/bin/env python
"""Trains and evaluates Mask R-CNN on nuclei with a CONTAINER-LIGHT or any other timm backbone, and draws the result.

    python examples/segment_nuclei.py --data-dir dsb2018                   # from random weights
    python examples/segment_nuclei.py --data-dir dsb2018 --pretrained      # from the backbone's own
    python examples/segment_nuclei.py --data-dir dsb2018 --backbone resnet18

The folder has stage 1 of the Data Science Bowl 2018 (CC0): {train,val}/images/ID.png and 16-bit instances/ID.png, where
nucleus k has the value k and the background 0. Images are upscaled by 2. Training uses random crops of them.

Needs `pip install -e ".[downstream]"`. Results: docs/results.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detector import add_arguments, batches, train
from PIL import Image
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as Picture
from torchvision.tv_tensors import Mask
from torchvision.utils import draw_segmentation_masks, make_grid, save_image
from tqdm import tqdm

from container.detection import mask_rcnn
from container.images import open_rgb

try:
    from torchmetrics.detection import MeanAveragePrecision
except ImportError as error:
    raise SystemExit(f'{error}: pip install -e ".[downstream]"') from None

SCALE = 2  # a nucleus is 16 pixels wide, half as wide as the smallest anchor of Mask R-CNN


class Nuclei(Dataset):
    """Dataset of images with a mask and its bounding box for each nucleus.

    Args:
        folder: Folder with `images` and `instances`.
        crop: Side of a random crop, which is also flipped at random in both directions; 0 for the whole image.
    """

    def __init__(self, folder: Path, crop: int = 0) -> None:
        self.paths = sorted((folder / "images").glob("*.png"))
        if not self.paths:
            raise SystemExit(f"no {folder / 'images'}/*.png: unpack the images of DSB 2018 there")
        turns = [v2.RandomCrop(crop, pad_if_needed=True), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
        self.transform = v2.Compose(turns) if crop else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        path = self.paths[index]
        with path.open("rb") as file:
            image = Picture(v2.functional.pil_to_tensor(open_rgb(file)))
        with Image.open(path.parent.parent / "instances" / path.name) as picture:
            instances = Mask(torch.from_numpy(np.asarray(picture, dtype=np.int32))[None])
        if self.transform is not None:
            image, instances = self.transform(image, instances)
        numbers = instances.unique()
        masks = instances.as_subclass(torch.Tensor) == numbers[numbers > 0].view(-1, 1, 1)
        masks = masks[masks.sum((1, 2)) > 4]  # smaller masks are edges of nuclei cut off by the crop
        boxes = masks_to_boxes(masks) if len(masks) else torch.empty(0, 4)
        boxes[:, 2:] += 1  # to the outer edge of the last pixel, so that no box is empty
        target = dict(boxes=boxes, labels=torch.ones(len(masks), dtype=torch.int64), masks=masks.to(torch.uint8))
        return image.as_subclass(torch.Tensor).float() / 255, target


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="dsb2018", help="folder of the images; default: dsb2018")
    parser.add_argument("--output", default="nuclei", help="folder for the results; default: nuclei")
    parser.add_argument("--crop", type=int, default=160, help="side of the training crops in pixels; default: 160")
    add_arguments(parser, epochs=10)
    return parser.parse_args()


@torch.inference_mode()
def evaluate(model: Any, nuclei: Nuclei, device: str) -> dict[str, float]:
    """Computes COCO's average precision of boxes and masks in percent, over IoUs of 0.5 to 0.95 and at 0.5."""
    model.eval()
    metric = MeanAveragePrecision(iou_type=("bbox", "segm"), backend="pycocotools")
    for image, target in tqdm((nuclei[i] for i in range(len(nuclei))), total=len(nuclei), desc="test", leave=False):
        model.transform.min_size = (SCALE * min(image.shape[1:]),)
        (found,) = model([image.to(device)])
        found = {key: value.cpu() for key, value in found.items()}
        metric.update([dict(found, masks=found["masks"][:, 0] > 0.5)], [dict(target, masks=target["masks"].bool())])
    result = metric.compute()
    return {
        name: 100 * result[key].item()
        for name, key in dict(box="bbox_map", box50="bbox_map_50", mask="segm_map", mask50="segm_map_50").items()
    }


@torch.inference_mode()
def draw(model: Any, nuclei: Nuclei, device: str, path: Path, count: int = 3) -> None:
    """Draws a row of images with their true masks, and below it a row with those found."""
    model.eval()
    rows: list[list[torch.Tensor]] = [[], []]
    for image, target in (nuclei[i * len(nuclei) // count] for i in range(count)):
        model.transform.min_size = (SCALE * min(image.shape[1:]),)
        (found,) = model([image.to(device)])
        sure = found["masks"][found["scores"] > 0.5, 0].cpu() > 0.5
        for row, masks in zip(rows, (target["masks"].bool(), sure), strict=True):
            drawn = draw_segmentation_masks(image, masks, alpha=0.6) if len(masks) else image
            row.append(v2.functional.center_crop(drawn, [256, 256]))
    save_image(make_grid(rows[0] + rows[1], nrow=count, padding=8, pad_value=1.0), path)


def main() -> None:
    """Trains the model, evaluates it on the held-out images, and draws some of them."""
    args = parse_args()
    torch.manual_seed(args.seed)
    size, folder = SCALE * args.crop, Path(args.data_dir)
    options = dict(pretrained=args.pretrained, out_channels=args.channels)
    model: Any = mask_rcnn(args.backbone, 2, min_size=size, max_size=4 * size, **options).to(args.device)
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 64  # a crop has about 20 nuclei; 512 take 4 times as long
    loader, held_out = batches(Nuclei(folder / "train", args.crop), args.batch_size, True), Nuclei(folder / "val")
    train(model, loader, args.epochs, args.lr, args.device, args.amp)
    result = evaluate(model, held_out, args.device)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").write_text(json.dumps(dict(result, args=vars(args)), indent=2) + "\n")
    torch.save(model.state_dict(), output / "model.pth")
    draw(model, held_out, args.device, output / "nuclei.png")
    print(f"AP of masks {result['mask']:.1f} %, of boxes {result['box']:.1f} %, on {len(held_out)} images held out")
    print(f"at IoU 0.5: masks {result['mask50']:.1f} %, boxes {result['box50']:.1f} %")
    print(f"true masks above, found ones below: {output / 'nuclei.png'}")


if __name__ == "__main__":
    main()
