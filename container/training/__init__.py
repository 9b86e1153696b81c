"""What `train_imagenet.py` wires together and timm does not have: data checks, the digits, the picture of a run."""

from .curves import plot_curves
from .data import Digits, create_datasets

__all__ = ["Digits", "create_datasets", "plot_curves"]
