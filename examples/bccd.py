"""Dataset of BCCD blood cell photos (https://github.com/Shenggan/BCCD_Dataset, MIT): red and white cells, platelets."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image

CLASSES = ("RBC", "WBC", "Platelets")


class Cells(Dataset):
    """Dataset of photos and boxes in the format of torchvision's detectors.

    Args:
        folder: Folder with JPEGImages, Annotations (Pascal VOC) and ImageSets.
        split: Name of a list in ImageSets/Main: train, val, trainval or test.
        augment: Whether to flip photos at random, horizontally and vertically.
    """

    def __init__(self, folder: str | Path, split: str, augment: bool = False) -> None:
        self.folder = Path(folder)
        names = self.folder / "ImageSets" / "Main" / f"{split}.txt"
        if not names.is_file():
            raise SystemExit(f"no {names}: unpack BCCD there, https://github.com/Shenggan/BCCD_Dataset")
        self.names = names.read_text().split()
        steps = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if augment else []
        self.transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.names)

    def annotation(self, name: str) -> tuple[tuple[int, int], list[list[float]], list[int]]:
        """Returns (width, height), boxes (left, top, right, bottom) and labels of a photo."""
        root: Any = ElementTree.parse(self.folder / "Annotations" / f"{name}.xml").getroot()
        size = int(root.find("size/width").text), int(root.find("size/height").text)
        boxes, labels = [], []
        for thing in root.iter("object"):
            box = [float(thing.find(f"bndbox/{side}").text) for side in ("xmin", "ymin", "xmax", "ymax")]
            if box[2] > box[0] and box[3] > box[1]:  # one annotation is a line, without area
                boxes.append(box)
                labels.append(CLASSES.index(thing.find("name").text))
        return size, boxes, labels

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        name = self.names[index]
        (width, height), boxes, labels = self.annotation(name)
        image = Image(decode_image(str(self.folder / "JPEGImages" / f"{name}.jpg"), ImageReadMode.RGB))
        framed = BoundingBoxes(torch.tensor(boxes).reshape(-1, 4), format="XYXY", canvas_size=(height, width))
        image, framed = self.transform(image, framed)
        return image.as_subclass(torch.Tensor), dict(
            boxes=framed.as_subclass(torch.Tensor), labels=torch.tensor(labels, dtype=torch.int64)
        )
