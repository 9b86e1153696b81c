"""The most likely classes of photos, by readable names."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from .images import open_photo

__all__ = ["SAMPLE", "class_names", "label_names", "predict"]

SAMPLE = Path(__file__).with_name("sample.jpg")
"""A photo to begin with; `sample.txt` beside it has its source and licence."""


def label_names(model: nn.Module) -> list[str]:
    """Names of a model's classes, as its training folders had them, in the order of its logits.

    They are those that come with its weights; else ImageNet's, of the subset that has as many classes; else numbers.

    Args:
        model: Of timm's, as `weights.create` or `timm.create_model` makes it.

    Raises:
        ValueError: It has no classifier.
    """
    network: Any = model
    if not network.num_classes:
        raise ValueError(f"{type(model).__name__} has no classifier")
    names = list(network.pretrained_cfg.get("label_names") or ())
    if len(names) != network.num_classes:  # of another classifier than the present one
        subset = infer_imagenet_subset(network)
        names = ImageNetInfo(subset).label_names() if subset else [str(i) for i in range(network.num_classes)]
    return names


def class_names(model: nn.Module) -> list[str]:
    """Readable names of the same classes, by WordNet: n02099601 is a golden retriever.

    Args:
        model: Of timm's.

    Raises:
        ValueError: It has no classifier.
    """
    names = label_names(model)
    info = ImageNetInfo(infer_imagenet_subset(model) or "imagenet-1k")  # the words of all subsets are in each

    def in_words(name: str) -> str:
        try:
            return info.label_name_to_description(name)
        except KeyError:
            return name

    return [in_words(name) for name in names]


def predict(images: Iterable[str | Path], model: nn.Module, top: int = 5) -> list[list[tuple[str, float]]]:
    """The most likely classes of photos.

    Photos are resized, cropped and normalised as `pretrained_cfg` says, one at a time, so that none depends on others.

    Args:
        images: Files.
        model: Of timm's, with weights, in evaluation mode.
        top: How many classes, at most.

    Returns:
        For each photo (name, probability) of each class, the likeliest first.

    Raises:
        OSError: A file does not exist.
        ValueError: A file is no photo, the model has no classifier, cannot have images of its `input_size`, or is in
            training mode.
    """
    if model.training:
        raise ValueError("a model in training mode drops branches and uses a batch's statistics: call eval() first")
    names, config = class_names(model), resolve_model_data_config(model)
    transform, device = create_transform(**config), next(model.parameters()).device
    found = []
    for image in images:
        given = transform(open_photo(image))[None].to(device)
        try:
            with torch.no_grad():
                logits = model(given)[0]
        except (AssertionError, RuntimeError) as error:
            size = " x ".join(map(str, given.shape[-2:]))
            raise ValueError(f"{type(model).__name__} fails at {size} pixels: {error}") from error
        likeliest = logits.float().softmax(0).topk(min(top, len(names)))
        found.append([(names[i], p) for p, i in zip(*map(torch.Tensor.tolist, likeliest), strict=True)])
    return found
