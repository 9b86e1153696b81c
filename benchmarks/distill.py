"""Distils one teacher into several students in minutes on one GPU, with the same fresh views for all of them.

python -m benchmarks.distill container_light=1e-3 container_nano=2e-3 --photos DIR --teacher-checkpoint FILE --out OUT

Each student is given with its highest learning rate. All photos are kept on the device, where crops are drawn. The
teacher sees each view once, and all students learn from its logits. On a GPU, the whole step is one CUDA graph, since
models this small take longer to launch than to compute. The learning rate is a cosine of the elapsed time, so a run
ends when its --seconds are over. For a repeatable run with one student, use `train_imagenet.py --recipe distill`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save
from timm.data import ImageNetInfo
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torchvision.ops import roi_align

import container  # noqa: F401  (registers the models)
from container import weights
from container.files import write_atomically
from container.training import Compute, Divergence, Images, Teacher, open_photos

from . import measure

_LONG = 204  # pixels of the longer side of a stored photo: 136 times 3 / 2
_TRIES = 10  # boxes per crop, of which the first that fits is taken, as in timm
_MEAN, _STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD


def load(photos: Images, side: int, device: torch.device, workers: int) -> tuple[Tensor, Tensor]:
    """Loads all photos to the device.

    Args:
        photos: The photos. Their labels are not used.
        side: Largest length of the longer side, in pixels.
        device: Device to load to.
        workers: Number of decoding threads.

    Returns:
        Pixels, uint8, of shape (photos, 3, side, side), with each photo in the upper left corner and its edges
        repeated; heights and widths, of shape (photos, 2).
    """
    pixels = torch.empty(len(photos), 3, side, side, dtype=torch.uint8)
    sizes = torch.empty(len(photos), 2)

    def place(i: int) -> None:
        image: Any = photos[i][0]
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        sizes[i] = torch.tensor([image.height, image.width])
        edges = ((0, side - image.height), (0, side - image.width), (0, 0))
        pixels[i] = torch.from_numpy(np.pad(np.asarray(image), edges, mode="edge")).permute(2, 0, 1)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(place, range(len(photos))))
    return pixels.to(device), sizes.to(device)


def boxes(sizes: Tensor, scale: tuple[float, float], random: torch.Generator) -> Tensor:
    """Draws random crops like timm: by a share of the area and an aspect ratio from 3 / 4 to 4 / 3.

    If no crop fits, the whole image is used.

    Args:
        sizes: Heights and widths, of shape (images, 2).
        scale: Range of the share of the area.
        random: Generator on the device of the sizes.

    Returns:
        Left, top, right and bottom, of shape (images, 4).
    """
    count = len(sizes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=random, device=sizes.device)

    area = uniform(*scale, count, _TRIES) * sizes.prod(dim=1, keepdim=True)
    ratio = uniform(math.log(3 / 4), math.log(4 / 3), count, _TRIES).exp()
    tries = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=2)  # heights and widths
    fits = (tries <= sizes[:, None]).all(dim=2)
    first = fits.int().argmax(dim=1)  # index of the first that fits
    chosen = tries[torch.arange(count, device=sizes.device), first]
    chosen = torch.where(fits.any(dim=1, keepdim=True), chosen, sizes)
    corner = uniform(0, 1, count, 2) * (sizes - chosen)
    return torch.cat([corner.flip(1), (corner + chosen).flip(1)], dim=1)


def views(pixels: Tensor, sizes: Tensor, scale: tuple[float, float], size: int, random: torch.Generator) -> Tensor:
    """Creates the views that all models see: photos cropped, flipped, normalised and mixed in pairs.

    Image i of n is mixed with image j = n - 1 - i, x' = l x + (1 - l) x_j, with l uniform in [0, 1]. This is mixup
    (Zhang et al. 2018) with alpha 1, drawn for each image, as in Beyer et al. 2022.

    Args:
        pixels: Photos, of shape (images, 3, side, side).
        sizes: Their heights and widths, of shape (images, 2).
        scale: Range of the share of the area.
        size: Image size of a view.
        random: Generator on the same device.

    Returns:
        Views in float32, of shape (images, 3, size, size).
    """
    count, device = len(pixels), pixels.device
    numbers = torch.arange(count, device=device, dtype=torch.float32)[:, None]
    crops = torch.cat([numbers, boxes(sizes, scale, random)], dim=1)
    images = roi_align(pixels.float(), crops, size, aligned=True)
    flipped = torch.rand(count, 1, 1, 1, generator=random, device=device) < 0.5
    images = torch.where(flipped, images.flip(3), images)
    mean, std = (torch.tensor(values, device=device).mul(255).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    share = torch.rand(count, 1, 1, 1, generator=random, device=device)
    images = (images - mean) / std
    return images.lerp(images.flip(0), share)


class Student:
    """Student model with its optimizer.

    Args:
        name: Name of a timm model.
        rate: Highest learning rate.
        checkpoint: Weights to start from, or None for random ones.
        loss: Divergence between its logits and the teacher's.
        compute: Device, dtype and memory layout.
        clip: Maximum gradient norm.
    """

    def __init__(
        self, name: str, rate: float, checkpoint: Path | None, loss: Divergence, compute: Compute, clip: float = 1.0
    ) -> None:
        model = weights.create(name, checkpoint) if checkpoint else timm.create_model(name, num_classes=1000)
        self.name, self.rate, self.divergence, self.compute, self.clip = name, rate, loss, compute, clip
        self.model = model.train().to(compute.device)
        if compute.channels_last:
            self.model.to(memory_format=torch.channels_last)
        gpu = compute.device.type == "cuda"  # a graph needs the learning rate as a tensor on the device
        self.lr = torch.zeros((), device=compute.device)
        groups = param_groups_weight_decay(self.model, 0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=gpu or None, capturable=gpu)
        self.loss = torch.zeros((), device=compute.device)  # the sum over steps

    def learn(self, images: Tensor, logits: Tensor) -> None:
        """Does a training step with AdamW.

        Args:
            images: Views, of shape (images, 3, side, side).
            logits: The teacher's logits, of shape (images, classes).
        """
        with self.compute.autocast():
            loss = self.divergence(self.model(self.compute.layout(images)), logits)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.loss += loss.detach()

    def mean_loss(self, steps: int) -> float:
        """Returns the mean loss since the last call, which was `steps` steps ago."""
        mean = float(self.loss) / steps
        self.loss.zero_()
        return mean

    def save(self, folder: Path) -> None:
        """Writes `MODEL.safetensors` in half precision, with the class names."""
        state = {
            key: tensor.half() if tensor.is_floating_point() else tensor
            for key, tensor in self.model.state_dict().items()
        }
        state = {key: tensor.cpu().contiguous() for key, tensor in state.items()}
        names = dict(classes=json.dumps(ImageNetInfo().label_names()))
        write_atomically(folder / f"{self.name}.safetensors", save(state, metadata=names))


def one_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Captures a step as one CUDA graph, after three warm-up steps that allocate all that it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def rate_at(passed: float, warmup: float = 0.03) -> float:
    """Returns the share of the highest learning rate: linear warm-up, then half a cosine down to zero.

    Args:
        passed: Share of the run that has passed.
        warmup: Share of the run used for warm-up.
    """
    if passed < warmup:
        return passed / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (passed - warmup) / (1 - warmup))))


def main(argv: list[str] | None = None) -> None:
    """Trains until the time is up, and writes weights and `distill.json` every minute."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("students", nargs="+", metavar="MODEL=RATE", help="models to train and their learning rates")
    parser.add_argument("--begin-from", type=Path, metavar="DIR", help="folder with MODEL.safetensors to start from")
    parser.add_argument(
        "--photos", nargs="+", required=True, metavar="DIR", help="folders, at least one of them with train/ and val/"
    )
    parser.add_argument("--exclude", default="ILSVRC2012_val_*", help="pattern of file names to leave out")
    parser.add_argument(
        "--teacher", default="tf_efficientnet_lite2", help="timm model to distil from; default: tf_efficientnet_lite2"
    )
    parser.add_argument("--teacher-checkpoint", required=True, metavar="FILE", help="the teacher's weights")
    parser.add_argument("--teacher-size", type=int, default=224, help="image size for the teacher; default: 224")
    parser.add_argument("--temperature", type=float, default=2.0, help="softmax temperature; default: 2")
    parser.add_argument("--scale", type=float, nargs=2, default=(0.35, 1.0), help="range of the area of a crop")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for the whole command; default: 480")
    parser.add_argument("--batch-size", type=int, default=512, help="images per batch; default: 512")
    parser.add_argument("--img-size", type=int, default=128, help="image size in pixels; default: 128")
    parser.add_argument("--workers", type=int, default=16, help="number of decoding threads; default: 16")
    parser.add_argument("--seed", type=int, default=0, help="random seed; default: 0")
    parser.add_argument("--eager", action="store_true", help="do not use a CUDA graph")
    parser.add_argument("--log-steps", type=int, default=50, help="steps between lines of the log; default: 50")
    parser.add_argument("--device", default="auto", help="device to use; default: auto")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    args = parser.parse_args(argv)
    rates: dict[str, float] = {}
    for word in args.students:
        name, _, rate = word.partition("=")
        try:
            rates[name] = float(rate)
        except ValueError:
            raise SystemExit(f"benchmarks: {word} is no MODEL=RATE") from None
        if not timm.is_model(name):
            raise SystemExit(f"benchmarks: timm knows no model {name!r}")
    device = measure.pick_device(args.device)
    torch.backends.cudnn.benchmark = False  # its trials take more than a minute for five models
    compute = Compute(device, "bfloat16" if device.type == "cuda" else "none", channels_last=True)
    torch.manual_seed(args.seed)
    random = torch.Generator(device).manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    loss, students = Divergence(args.temperature), []
    try:
        photos, _ = open_photos(args.photos, args.exclude)
        teacher = Teacher(args.teacher, args.teacher_checkpoint, 1000, args.teacher_size, _MEAN, _STD, compute)
        for name, rate in rates.items():
            file = args.begin_from and args.begin_from / f"{name}.safetensors"
            students.append(Student(name, rate, file if file and file.is_file() else None, loss, compute))
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"benchmarks: {str(error).splitlines()[0]}") from None
    pixels, sizes = load(photos, _LONG, device, args.workers)
    if len(pixels) < args.batch_size:
        raise SystemExit(f"benchmarks: {len(pixels)} photos are no batch of {args.batch_size}")
    print(f"{len(pixels)} photos on {device} after {time.monotonic() - begin:.1f} s", flush=True)

    images = torch.empty(args.batch_size, 3, args.img_size, args.img_size, device=device)
    order = torch.empty(0, dtype=torch.long, device=device)

    def draw() -> None:
        nonlocal order
        if len(order) < args.batch_size:
            order = torch.randperm(len(pixels), device=device, generator=random)
        chosen, order = order.tensor_split([args.batch_size])
        images.copy_(views(pixels[chosen], sizes[chosen], args.scale, args.img_size, random))

    def step() -> None:
        logits = teacher(images)
        for student in students:
            student.learn(images, logits)

    draw()
    replay = one_graph(step) if device.type == "cuda" and not args.eager else step
    start = written = time.monotonic()
    for student in students:
        student.loss.zero_()
    print(f"ready after {start - begin:.1f} s", flush=True)
    rows: list[dict[str, float]] = []
    steps = since = 0
    while not rows or rows[-1]["passed"] < 1:
        now = time.monotonic()
        passed = min(1.0, (now - start) / max(1e-9, begin + args.seconds - start))
        draw()
        for student in students:
            student.lr.fill_(student.rate * rate_at(passed))
        replay()
        steps, since = steps + 1, since + 1
        if device.type == "cuda":
            torch.cuda.synchronize()  # otherwise the host runs far ahead of the GPU, and its clock misleads
        if passed == 1 or since == args.log_steps:
            row = dict(step=steps, seconds=round(time.monotonic() - begin, 1), passed=passed, rate=rate_at(passed))
            rows.append(row | {student.name: student.mean_loss(since) for student in students})
            print(", ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
            since = 0
        if passed == 1 or now - written > 60:
            written = now
            for student in students:
                student.save(args.out)
            settings = {key: str(value) for key, value in vars(args).items()}
            record = dict(settings=settings, photos=len(pixels), steps=steps, rows=rows)
            write_atomically(args.out / "distill.json", json.dumps(record, indent=1).encode())
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB of the GPU's memory")
    images_seen = steps * args.batch_size
    print(f"{steps} steps, {images_seen / len(pixels):.1f} epochs, {images_seen / (now - start):,.0f} images/s each")


if __name__ == "__main__":
    main()
