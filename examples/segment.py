#!/usr/bin/env python
"""Trains segmentation-models-pytorch's FPN or UPerNet with a CONTAINER-LIGHT or any other timm backbone.

    python examples/segment.py --data-dir DIR --classes 21 [--decoder UPerNet] [--pretrained]
    python examples/segment.py --data-dir dsb2018 --masks instances --foreground      # nuclei against background

The folder has {train,val}/images/ID.SUFFIX and {train,val}/masks/ID.png. The pixels of a mask are class indices; 255 is
ignored. Training uses random crops and flips. The mean IoU is measured on whole held-out images.

Needs `pip install -e ".[downstream]"`. Results: docs/results.md.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detector import add_arguments, batches, train
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as Picture
from torchvision.tv_tensors import Mask
from torchvision.utils import draw_segmentation_masks, make_grid, save_image

from container.images import open_rgb

try:
    import segmentation_models_pytorch as smp
    from torchmetrics.classification import MulticlassJaccardIndex
except ImportError as error:
    raise SystemExit(f'{error}: pip install -e ".[downstream]"') from None

IGNORED = 255
MULTIPLE = 32  # the decoders need sides that are multiples of it


class Masks(Dataset):
    """Dataset of images with the class of each pixel.

    Args:
        folder: Folder with `images`, and a folder of masks with the same names.
        masks: Name of the masks' folder.
        classes: Number of classes.
        foreground: Whether all values except 0 are class 1.
        crop: Side of a random crop, which is also flipped; 0 for the whole image.
    """

    def __init__(self, folder: Path, masks: str, classes: int, foreground: bool, crop: int = 0) -> None:
        self.paths = sorted(path for path in (folder / "images").glob("*") if path.is_file())
        if not self.paths:
            raise SystemExit(f"no images in {folder / 'images'}")
        self.masks = folder / masks
        missing = [path.stem for path in self.paths if not (self.masks / f"{path.stem}.png").is_file()]
        if missing:
            raise SystemExit(f"{len(missing)} images have no mask, the first {self.masks / missing[0]}.png")
        self.classes, self.foreground = classes, foreground
        if not foreground:
            self.check_classes()
        turns = [v2.RandomCrop(crop, pad_if_needed=True, fill={Picture: 0, Mask: IGNORED}), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose(turns) if crop else None

    def check_classes(self) -> None:
        """Refuses masks of 0 and 255 alone, in which the object would be ignored; ends at the first other class."""
        white = False
        for path in self.paths:
            with Image.open(self.masks / f"{path.stem}.png") as picture:
                values = np.unique(np.asarray(picture))
            if not set(values.tolist()) <= {0, IGNORED}:
                return
            white = white or IGNORED in values
        if white:
            raise SystemExit(f"{self.masks} has only 0 and {IGNORED}, which is ignored: --foreground makes it class 1")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        path = self.paths[index]
        with path.open("rb") as file:
            image = Picture(v2.functional.pil_to_tensor(open_rgb(file)))
        with Image.open(self.masks / f"{path.stem}.png") as picture:
            numbers = torch.from_numpy(np.asarray(picture, dtype=np.int64))
        if self.foreground:
            numbers = (numbers > 0).long()
        if numbers.shape != image.shape[1:]:
            raise SystemExit(f"{path} is {tuple(image.shape[1:])}, and its mask {tuple(numbers.shape)}")
        highest = numbers[numbers != IGNORED].max().item() if (numbers != IGNORED).any() else 0
        if highest >= self.classes:
            raise SystemExit(f"{self.masks / path.stem}.png has class {highest:.0f}, and --classes is {self.classes}")
        mask = Mask(numbers)
        if self.transform is not None:
            image, mask = self.transform(image, mask)
        return image.as_subclass(torch.Tensor).float() / 255, dict(mask=mask.as_subclass(torch.Tensor))


class Segmenter(nn.Module):
    """segmentation-models-pytorch network that takes lists, like torchvision's detectors.

    Args:
        decoder: `FPN` or `UPerNet`.
        backbone: timm name, with or without the tag of its weights.
        pretrained: Whether to load these weights.
        classes: Number of classes.
        channels: Width of the decoder.
    """

    def __init__(self, decoder: str, backbone: str, pretrained: bool, classes: int, channels: int) -> None:
        super().__init__()
        widths = dict(
            FPN=dict(decoder_pyramid_channels=channels, decoder_segmentation_channels=channels),
            UPerNet=dict(decoder_channels=channels),
        )
        weights = "timm" if pretrained else None  # any string makes timm load its own weights
        options = dict(widths[decoder], encoder_weights=weights, classes=classes)
        self.network = getattr(smp, decoder)(f"tu-{backbone}", **options)
        config = self.network.encoder.model.pretrained_cfg
        self.normalize = v2.Normalize(config["mean"], config["std"])

    def forward(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]] | None = None) -> Any:
        """Returns the loss of crops if targets are given, or else the classes of each image's pixels."""
        if targets is not None:
            logits = self.network(self.normalize(torch.stack(images)))
            mask = torch.stack([target["mask"] for target in targets])
            return dict(loss=F.cross_entropy(logits.float(), mask, ignore_index=IGNORED))
        return [self._classes(image) for image in images]

    def _classes(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[1:]
        padded = F.pad(self.normalize(image)[None], (0, -width % MULTIPLE, 0, -height % MULTIPLE))
        return self.network(padded)[0, :, :height, :width].argmax(0)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with train/ and val/")
    parser.add_argument("--masks", default="masks", help="name of the mask folders; default: masks")
    parser.add_argument("--classes", type=int, default=2, help="number of classes; default: 2")
    parser.add_argument("--foreground", action="store_true", help="treat all mask values except 0 as one class")
    parser.add_argument(
        "--decoder", choices=("FPN", "UPerNet"), default="FPN", help="segmentation network; default: FPN"
    )
    parser.add_argument("--output", default="segmented", help="folder for the results; default: segmented")
    parser.add_argument("--crop", type=int, default=192, help="side of the training crops in pixels; default: 192")
    add_arguments(parser, epochs=10)
    parser.set_defaults(batch_size=16)
    return parser.parse_args()


@torch.inference_mode()
def evaluate(model: Segmenter, images: Masks, device: str) -> list[float]:
    """Returns the intersection over union of each class over all pixels, in percent.

    A class that is neither in the masks nor predicted has none: NaN, which the mean leaves out.
    """
    model.eval()
    metric = MulticlassJaccardIndex(images.classes, average="none", ignore_index=IGNORED, zero_division=math.nan)
    for i in range(len(images)):
        image, target = images[i]
        metric.update(model([image.to(device)])[0].cpu()[None], target["mask"][None])
    return [100 * value for value in metric.compute().tolist()]


@torch.inference_mode()
def draw(model: Segmenter, images: Masks, device: str, path: Path, count: int = 3) -> None:
    """Draws a row of images with their true classes, and below it a row with those found."""
    model.eval()
    rows: list[list[torch.Tensor]] = [[], []]
    colors = [f"hsl({360 * k // (images.classes - 1)}, 100%, 50%)" for k in range(images.classes - 1)]
    for image, target in (images[i * len(images) // count] for i in range(count)):
        (found,) = model([image.to(device)])
        for row, numbers in zip(rows, (target["mask"], found.cpu()), strict=True):
            masks = torch.stack([numbers == k for k in range(1, images.classes)])
            drawn = draw_segmentation_masks(image, masks, alpha=0.5, colors=colors)
            row.append(v2.functional.center_crop(drawn, [256, 256]))
    save_image(make_grid(rows[0] + rows[1], nrow=count, padding=8, pad_value=1.0), path)


def main() -> None:
    """Trains the network, evaluates it on the held-out images, and draws some of them."""
    args = parse_args()
    torch.manual_seed(args.seed)
    for name, number in dict(crop=args.crop, channels=args.channels).items():  # FPN's group norms have 32 groups
        if number % MULTIPLE:
            raise SystemExit(f"--{name} {number} is no multiple of {MULTIPLE}")
    if args.classes < 2:
        raise SystemExit(f"--classes {args.classes}: there are two at least, and 0 is one of them")
    folder, options = Path(args.data_dir), (args.masks, args.classes, args.foreground)
    learned, held_out = Masks(folder / "train", *options, args.crop), Masks(folder / "val", *options)
    model = Segmenter(args.decoder, args.backbone, args.pretrained, args.classes, args.channels).to(args.device)
    train(model, batches(learned, args.batch_size, True), args.epochs, args.lr, args.device, args.amp)
    by_class = evaluate(model, held_out, args.device)
    miou = float(np.nanmean(by_class))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    known = [None if math.isnan(value) else value for value in by_class]  # JSON has no NaN
    result = dict(miou=miou, by_class=known, args=vars(args))
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    torch.save(model.network.state_dict(), output / "model.pth")
    draw(model, held_out, args.device, output / "segmented.png", min(3, len(held_out)))
    print(
        f"mean IoU {miou:.1f} %, by class {', '.join(f'{v:.1f}' for v in by_class)}, on {len(held_out)} images held out"
    )
    print(f"true classes above, found ones below: {output / 'segmented.png'}")


if __name__ == "__main__":
    main()
