#!/usr/bin/env python
"""Draws the feature maps of a backbone for a sample photo from scikit-learn.

    python examples/pyramid.py
    python examples/pyramid.py --backbone resnet18 --output resnet18.png

Each picture shows the first principal component of a feature map's channels, scaled to its range. Needs
`pip install -e ".[train]"`.
"""

import argparse

import matplotlib.pyplot as plt
import timm
import torch
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms.functional import to_pil_image

import container  # noqa: F401  registers the models


def main() -> None:
    """Computes the feature maps and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="container_light_nano_32.cifar10", help="timm model with features_only")
    parser.add_argument("--size", type=int, default=320, help="image size in pixels; default: 320")
    parser.add_argument("--output", default="pyramid.png", help="picture to write; default: pyramid.png")
    args = parser.parse_args()

    known = timm.is_model_pretrained(args.backbone)
    model = timm.create_model(args.backbone, pretrained=known, features_only=True).eval()
    data = dict(resolve_model_data_config(model), input_size=(3, args.size, args.size), crop_pct=1.0)
    photo = to_pil_image(load_sample_image("china.jpg"))
    image = create_transform(**data)(photo)
    with torch.inference_mode():
        maps = model(image[None])
    figure, axes = plt.subplots(1, 1 + len(maps), figsize=(2.4 * (1 + len(maps)), 2.8), layout="constrained")
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    axes[0].imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0))
    axes[0].set_title("photo")
    for axis, level, reduction in zip(axes[1:], maps, model.feature_info.reduction(), strict=True):
        tokens = level[0].flatten(1).T  # (N, C)
        component = torch.pca_lowrank(tokens, q=1, niter=4)[0][:, 0].view(level.shape[-2:])
        axis.imshow(component, cmap="cividis")
        axis.set_title(f"stride {reduction}, {level.shape[1]} channels")
    for axis in axes:
        axis.axis("off")
    figure.suptitle(f"{args.backbone}{'' if known else ' (random weights)'}")
    figure.savefig(args.output, dpi=120)
    print(args.output)


if __name__ == "__main__":
    main()
