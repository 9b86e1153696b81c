"""Parts of `train_imagenet.py` that timm does not provide."""

from .checkpoint import Checkpoints, Progress
from .curves import plot_curves
from .data import Digits, Images, Photos, check_classes, compose_accents, create_datasets, open_photos, open_validation
from .depthwise import speed_up_depthwise
from .distill import Distillation, Divergence, Teacher, TeacherOutputs
from .distributed import Agreement, StopSignal, join_group, on_first_rank
from .loader import (
    advice,
    ask_ahead,
    cores,
    create_train_loader,
    create_val_loader,
    default_workers,
    epoch_batches,
    name_killed_workers,
)
from .loop import HALF, Compute, evaluate, train_one_epoch
from .plan import describe, estimate
from .recipe import number, parse_with_recipe
from .report import Report, describe_environment
from .run import Run, tell_unreadable
from .seeding import seed_everything

__all__ = [
    "HALF",
    "Agreement",
    "Checkpoints",
    "Compute",
    "Digits",
    "Distillation",
    "Divergence",
    "Images",
    "Photos",
    "Progress",
    "Report",
    "Run",
    "StopSignal",
    "Teacher",
    "TeacherOutputs",
    "advice",
    "ask_ahead",
    "check_classes",
    "compose_accents",
    "cores",
    "create_datasets",
    "create_train_loader",
    "create_val_loader",
    "default_workers",
    "describe",
    "describe_environment",
    "epoch_batches",
    "estimate",
    "evaluate",
    "join_group",
    "name_killed_workers",
    "number",
    "on_first_rank",
    "open_photos",
    "open_validation",
    "parse_with_recipe",
    "plot_curves",
    "seed_everything",
    "speed_up_depthwise",
    "tell_unreadable",
    "train_one_epoch",
]
