#!/usr/bin/env python
"""Pre-trains a small CONTAINER-LIGHT with DINO, without labels, and measures k-NN accuracy before and after.

    python examples/dino.py --data-dir cifar10

Only the k-NN classifier reads labels, from DIR/train/CLASS and DIR/test/CLASS. The nearest training images vote on the
class of a test image, weighted by cosine similarity. Needs `pip install -e ".[downstream]"`. Results: docs/results.md.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021; implemented with lightly.
"""

import argparse
import copy
import json
import os
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import container  # noqa: F401  registers the models

try:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import DINOTransform
    from lightly.utils.benchmarking.knn import knn_predict
    from lightly.utils.scheduler import cosine_schedule
except ImportError as error:
    raise SystemExit(f'{error}: pip install -e ".[downstream]"') from None


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="cifar10", help="folder with train/CLASS/*, and test/ or val/CLASS/*")
    parser.add_argument("--model", default="container_light_nano_32", help="name of a timm model")
    parser.add_argument("--img-size", type=int, help="image size of the global views; default: the model's own")
    parser.add_argument("--images", type=int, default=10000, help="number of training images, taken evenly")
    parser.add_argument("--test-images", type=int, default=2000, help="number of test images, likewise")
    parser.add_argument("--epochs", type=int, default=4, help="number of epochs; default: 4")
    parser.add_argument("--batch-size", type=int, default=128, help="images per batch; default: 128")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate; default: 0.002")
    parser.add_argument("--momentum", type=float, default=0.99, help="initial momentum of the teacher; it rises to 1")
    parser.add_argument("--seed", type=int, default=0, help="random seed; default: 0")
    parser.add_argument("--workers", type=int, default=1, help="number of data loader workers; default: 1")
    parser.add_argument("--output", default="dino.safetensors", help="file for the teacher's weights; adds a .json")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to use; default: cuda if there is a GPU",
    )
    return parser.parse_args()


def some(folder: Path, count: int, transform: object) -> Dataset:
    """Returns up to `count` images of a folder, taken evenly from its classes."""
    images = ImageFolder(str(folder), transform)
    count = min(count, len(images))
    return Subset(images, [i * len(images) // count for i in range(count)])


@torch.inference_mode()
def features(model: nn.Module, loader: DataLoader, device: str) -> tuple[Tensor, Tensor]:
    """Returns normalised features (images, C) and labels."""
    model.eval()
    pairs = [(model(images.to(device)), labels.to(device)) for images, labels in loader]
    found, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return nn.functional.normalize(found, dim=1), labels


def knn_accuracy(model: nn.Module, train: DataLoader, test: DataLoader, device: str) -> float:
    """Returns the accuracy on the test images, in percent, of a classifier by the 20 nearest training images."""
    bank, known = features(model, train, device)
    queries, labels = features(model, test, device)
    found = knn_predict(queries, bank.T, known, num_classes=int(known.max()) + 1, knn_k=20, knn_t=0.1)
    return 100 * (found[:, 0] == labels).float().mean().item()


def main() -> None:
    """Pre-trains the model, measures k-NN accuracy before it and after each epoch, and saves the teacher."""
    args = parse_args()
    torch.manual_seed(args.seed)
    student: nn.Module = timm.create_model(args.model, num_classes=0).to(args.device)
    config = resolve_model_data_config(student, dict(img_size=args.img_size))
    size, statistics = config["input_size"][1], dict(mean=list(config["mean"]), std=list(config["std"]))
    plain, data = create_transform(**config), Path(args.data_dir)
    held_out = data / ("test" if (data / "test").is_dir() else "val")
    options = dict(batch_size=args.batch_size, num_workers=args.workers, persistent_workers=args.workers > 0)
    bank = DataLoader(some(data / "train", args.images, plain), **options)
    test = DataLoader(some(held_out, args.test_images, plain), **options)
    curve = [knn_accuracy(student, bank, test, args.device)]
    print(f"k-NN before: {curve[0]:.2f} %, chance {100 / len(os.listdir(data / 'train')):.0f} %")

    views = DINOTransform(
        global_crop_size=size, global_crop_scale=(0.4, 1.0), local_crop_size=size // 2, local_crop_scale=(0.1, 0.4),
        n_local_views=4, gaussian_blur=(0.0, 0.0, 0.0), normalize=statistics,
    )  # fmt: skip
    loader = DataLoader(some(data / "train", args.images, views), shuffle=True, drop_last=True, **options)
    width = student.num_features
    head, teacher_head = (DINOProjectionHead(width, 512, 64, 1024, freeze_last_layer=1).to(args.device) for _ in "12")
    teacher_head.load_state_dict(head.state_dict())
    teacher = copy.deepcopy(student)
    for module in (teacher, teacher_head):
        deactivate_requires_grad(module)
    criterion = DINOLoss(output_dim=1024, warmup_teacher_temp_epochs=1).to(args.device)
    both = nn.ModuleList([student, head])
    steps = args.epochs * len(loader)
    optimizer = create_optimizer_v2(both, "adamw", lr=args.lr, weight_decay=0.04)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=steps, warmup_epochs=steps // 10, warmup_lr=1e-5, step_on_epochs=True
    )
    bar, step = tqdm(total=steps * args.batch_size, unit="img", unit_scale=True), 0
    for epoch in range(args.epochs):
        both.train()
        teacher.train()
        for crops, _ in loader:
            momentum = cosine_schedule(step, steps, args.momentum, 1.0)
            update_momentum(student, teacher, m=momentum)
            update_momentum(head, teacher_head, m=momentum)
            crops = [crop.to(args.device) for crop in crops]
            with torch.no_grad():
                targets = [teacher_head(teacher(crop)) for crop in crops[:2]]
            loss = criterion(targets, [head(student(crop)) for crop in crops], epoch=epoch)
            optimizer.zero_grad()
            loss.backward()
            head.cancel_last_layer_gradients(epoch)
            nn.utils.clip_grad_norm_(both.parameters(), 3.0)
            optimizer.step()
            step += 1
            scheduler.step(step)
            bar.update(args.batch_size)
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}", knn=f"{curve[-1]:.2f}%")
        curve.append(knn_accuracy(teacher, bank, test, args.device))
        save_file({key: tensor.contiguous() for key, tensor in teacher.state_dict().items()}, args.output)
        Path(args.output).with_suffix(".json").write_text(json.dumps(dict(knn=curve, args=vars(args)), indent=1) + "\n")
    bar.close()
    print(f"k-NN after:  {curve[-1]:.2f} %, {curve[-1] - curve[0]:+.2f}; weights in {args.output}")


if __name__ == "__main__":
    main()
