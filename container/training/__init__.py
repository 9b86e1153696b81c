"""What `train_imagenet.py` wires together and timm does not have."""

from .curves import plot_curves
from .data import Digits, create_datasets
from .distributed import join_group
from .recipe import parse_with_recipe

__all__ = ["Digits", "create_datasets", "join_group", "parse_with_recipe", "plot_curves"]
