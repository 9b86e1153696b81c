"""Training loop of the detection and segmentation examples: AdamW with a cosine schedule by steps."""

import argparse
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


def add_arguments(parser: argparse.ArgumentParser, epochs: int) -> None:
    """Adds the arguments that the examples share."""
    parser.add_argument("--backbone", default="container_light_nano", help="timm model that supports features_only")
    parser.add_argument("--pretrained", action="store_true", help="start from the backbone's pre-trained weights")
    parser.add_argument("--epochs", type=int, default=epochs, help="number of epochs; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=4, help="images per batch; default: %(default)s")
    parser.add_argument("--channels", type=int, default=64, help="width of the decoder or pyramid; default: 64")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate; default: %(default)s")
    parser.add_argument(
        "--amp", action="store_true", help="train in bfloat16, twice as fast on a CPU that computes in it"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed; default: 0")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to use; default: cuda if there is a GPU",
    )


def batches(images: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
    """Creates a data loader that yields lists of images and of targets. Images may differ in size."""
    return DataLoader(
        images,
        batch_size,
        shuffle,
        collate_fn=lambda batch: tuple(map(list, zip(*batch, strict=True))),
        drop_last=shuffle,
    )


def train(model: Any, loader: DataLoader, epochs: int, lr: float, device: str, amp: bool = False) -> None:
    """Trains a model that returns a dictionary of losses for images and targets.

    Args:
        model: The model, on the device.
        loader: Data loader from `batches`.
        epochs: Number of epochs, the first of which is the learning rate warm-up.
        lr: Peak learning rate.
        device: Device to train on.
        amp: Whether to use bfloat16.
    """
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05)
    steps = epochs * len(loader)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=steps, warmup_epochs=len(loader), warmup_lr=1e-5, step_on_epochs=True
    )
    bar, step = tqdm(total=steps), 0
    for epoch in range(epochs):
        model.train()
        for images, targets in loader:
            images = [image.to(device) for image in images]
            targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
                loss = sum(model(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            step += 1
            scheduler.step(step)
            bar.update()
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")
    bar.close()
