"""Predicts the most likely classes of photos, with readable names."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from . import weights
from .images import open_photo

__all__ = ["SAMPLE", "class_names", "label_names", "predict"]

SAMPLE = Path(__file__).with_name("sample.jpg")
"""A sample photo; `sample.txt` in the same folder has its source and licence."""


def label_names(model: nn.Module) -> list[str]:
    """Returns the names of a model's classes, as in its training folders, in the order of its logits.

    The names are those of the weights that were loaded: listed in `pretrained_cfg`, or ImageNet's if the weights are
    published as those of ImageNet's classes. Other weights and other classifiers have plain numbers.

    Args:
        model: A timm model, from `weights.create` or `timm.create_model`.

    Raises:
        ValueError: The model has no classifier.
    """
    network: Any = model
    if not network.num_classes:
        raise ValueError(f"{type(model).__name__} has no classifier")
    cfg, names = network.pretrained_cfg, network.pretrained_cfg.get("label_names")
    published = f"{cfg.get('architecture')}.{cfg.get('tag')}"
    of_imagenet = published in weights.manifest() or re.search(r"(^|[_.])in(1|12|21|22)k", published)
    if names is None and of_imagenet and (subset := infer_imagenet_subset(network)):
        names = ImageNetInfo(subset).label_names()
    if len(names or ()) != network.num_classes:  # missing, or those of another classifier
        names = map(str, range(network.num_classes))
    return list(names)


def class_names(model: nn.Module) -> list[str]:
    """Returns readable names of a model's classes, from WordNet: n02099601 is a golden retriever.

    Names without such a description stay as they are.

    Args:
        model: A timm model.

    Raises:
        ValueError: The model has no classifier.
    """
    names = label_names(model)
    info = ImageNetInfo(infer_imagenet_subset(model) or "imagenet-1k")  # each subset has the descriptions of all

    def in_words(name: str) -> str:
        try:
            return info.label_name_to_description(name)
        except KeyError:
            return name

    return [in_words(name) for name in names]


def predict(images: Iterable[str | Path], model: nn.Module, top: int = 5) -> list[list[tuple[str, float]]]:
    """Predicts the most likely classes of photos.

    Photos are resized, cropped and normalised according to `pretrained_cfg`, and run one at a time.

    Args:
        images: Image files.
        model: A timm model with weights, in evaluation mode.
        top: Maximum number of classes per photo.

    Returns:
        For each photo, (name, probability) of its classes, the most likely first.

    Raises:
        OSError: A file does not exist.
        ValueError: A file is not a photo, or the model has no classifier, does not take images of its `input_size`, or
            is in training mode.
    """
    if model.training:
        raise ValueError("a model in training mode drops branches and uses a batch's statistics: call eval() first")
    names, config = class_names(model), resolve_model_data_config(model)
    transform, parameter = create_transform(**config), next(model.parameters())
    found = []
    for image in images:
        given = transform(open_photo(image))[None].to(parameter.device, parameter.dtype)
        try:
            with torch.no_grad():
                logits = model(given)[0]
        except (AssertionError, RuntimeError) as error:
            size = " x ".join(map(str, given.shape[-2:]))
            raise ValueError(f"{type(model).__name__} fails at {size} pixels: {error}") from error
        likeliest = logits.float().softmax(0).topk(min(top, len(names)))
        found.append([(names[i], p) for p, i in zip(*map(torch.Tensor.tolist, likeliest), strict=True)])
    return found
