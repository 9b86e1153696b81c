"""Distillation from a teacher's logits alone, without labels, with a disk cache for repeated views."""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.models import create_model
from torch import Tensor, nn
from torch.nn.functional import interpolate, kl_div, log_softmax

from container.files import write_atomically

from .data import Images
from .loader import create_val_loader
from .loop import Compute
from .seeding import seed_everything

__all__ = ["Distillation", "Divergence", "Teacher", "Views"]


class Divergence(nn.Module):
    """Distillation loss T^2 KL(softmax(t / T) || softmax(s / T)), averaged over the batch.

    Here t are the teacher's logits and s the student's. The factor T^2 keeps gradients equally large at all
    temperatures (Hinton et al. 2015, section 2).

    Args:
        temperature: Temperature T.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor, of_teacher: Tensor) -> Tensor:
        """Returns the loss for student and teacher logits, each of shape (batch, classes)."""
        ours, theirs = (log_softmax(t.float() / self.temperature, dim=-1) for t in (logits, of_teacher))
        return kl_div(ours, theirs, reduction="batchmean", log_target=True) * self.temperature**2


class Teacher:
    """Trained model that returns logits for the student's views, resized to its own image size.

    Args:
        name: Name of a timm model.
        checkpoint: Path of its weights, or None for its pre-trained weights.
        num_classes: Number of its classes.
        size: Image size that views are resized to, with bicubic interpolation. None leaves their size unchanged.
        mean: Mean used to normalise the student's images.
        std: Standard deviation used to normalise the student's images.
        compute: Device and dtype to compute in.

    Raises:
        OSError, RuntimeError, ValueError: Raised by timm if the weights are missing or do not fit.
    """

    def __init__(
        self,
        name: str,
        checkpoint: str | None,
        num_classes: int,
        size: int | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        compute: Compute,
    ) -> None:
        overlay = dict(file=checkpoint, num_classes=num_classes) if checkpoint else None
        self.size, self.compute = size, compute
        model: Any = create_model(name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)
        self.model = model.eval().requires_grad_(False).to(compute.device, memory_format=torch.channels_last)
        own = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        self.scale, self.shift = (
            torch.tensor(values, device=compute.device).view(1, -1, 1, 1)
            for values in (
                [s / own_s for s, own_s in zip(std, own[1], strict=True)],
                [(m - own_m) / own_s for m, own_m, own_s in zip(mean, *own, strict=True)],
            )
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Returns logits (batch, classes) in half precision.

        Args:
            images: (batch, 3, side, side), normalised for the student.
        """
        if self.size not in (None, images.shape[-1]):
            images = interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True)
        images = torch.addcmul(self.shift, images, self.scale).contiguous(memory_format=torch.channels_last)
        with self.compute.autocast():
            return self.model(images).half()

    def label(
        self, photos: Images, config: dict[str, Any], batch_size: int, workers: int, kept: Path | None = None
    ) -> None:
        """Labels every photo with the teacher's prediction. All processes must call it.

        Args:
            photos: Photos from `open_photos`.
            config: Preprocessing: `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
            batch_size: Photos per batch.
            workers: Number of data loader workers.
            kept: File to cache the predictions in, or None.
        """
        known = [np.load(kept) if kept is not None and kept.exists() else None]
        dist.broadcast_object_list(known)
        if known[0] is not None:
            photos.reader.targets = known[0]
            return
        loader = create_val_loader(photos, config, batch_size, workers, self.compute.device)
        found = torch.cat([self(images).argmax(dim=1) for images, _ in loader])
        everywhere = [torch.empty_like(found) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, found)  # the sampler gives process r photos r, r + world, ...
        photos.reader.targets = torch.stack(everywhere, dim=1).flatten()[: len(photos)].cpu().numpy()
        if kept is not None and dist.get_rank() == 0:
            buffer = io.BytesIO()
            np.save(buffer, photos.reader.targets)
            write_atomically(kept, buffer.getbuffer())

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that identify these weights."""
        content = hashlib.sha256()
        for key, tensor in self.model.state_dict().items():
            content.update(key.encode() + tensor.cpu().numpy().tobytes())
        return content.hexdigest()[:16]


class Views:
    """Disk cache of the views and teacher logits of the first epochs, read again when these views repeat.

    Each epoch and process has one file, with one record per batch: pixels (uint8, before mixing), the teacher's logits
    (half precision, for the mixed images) and a checksum. Damaged and incomplete records are computed again. Each
    combination of settings has its own folder.

    Args:
        folder: Parent of that folder.
        made_from: Settings that determine views and logits, as plain values.
        shape: Shape of a batch, (images, 3, side, side).
        classes: Number of the teacher's classes.
        passes: Batches per epoch.
        rank: Rank of this process.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(
        self, folder: Path, made_from: dict[str, Any], shape: tuple[int, ...], classes: int, passes: int, rank: int
    ) -> None:
        said = json.dumps(made_from, sort_keys=True, indent=1)
        self.folder = folder / hashlib.sha256(said.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "made_from.json").write_text(said, encoding="utf-8")
        self.shape, self.classes, self.passes, self.rank = shape, classes, passes, rank
        self.pixels = int(np.prod(shape))
        self.record = self.pixels + 2 * shape[0] * classes + 4
        self.known: dict[int, set[int]] = {}  # intact records of each epoch

    def path(self, epoch: int) -> Path:
        """Returns the path of an epoch's file."""
        return self.folder / f"{epoch:04d}-{self.rank}.views"

    def whole(self, epoch: int, first: int = 0) -> bool:
        """Returns whether all batches of an epoch from `first` on are cached and intact."""
        if epoch not in self.known:
            self.known[epoch] = set()
            if self.path(epoch).exists():
                with self.path(epoch).open("rb") as file:
                    for i in range(self.passes):
                        if self._is_whole(file.read(self.record)):
                            self.known[epoch].add(i)
        return self.known[epoch] >= set(range(first, self.passes))

    def _is_whole(self, record: bytes) -> bool:
        return len(record) == self.record and zlib.crc32(record[:-4]).to_bytes(4, "big") == record[-4:]

    def read(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields pixels and logits of an epoch's batches, from `first` on.

        `whole` must have returned True for these batches.
        """
        size = self.passes * self.record
        content = torch.from_file(str(self.path(epoch)), shared=False, size=size, dtype=torch.uint8)
        for record in content.view(self.passes, self.record)[first:]:
            logits = record[self.pixels : -4].clone().view(torch.float16)  # cloned: it may be misaligned
            yield record[: self.pixels].view(self.shape), logits.view(self.shape[0], self.classes)

    def write(self, epoch: int, i: int, pixels: Tensor, logits: Tensor) -> None:
        """Writes a batch to the cache.

        Args:
            epoch: Epoch of the views.
            i: Index of the batch in the epoch.
            pixels: (images, 3, side, side), uint8.
            logits: (images, classes), half precision.

        Raises:
            OSError: The disk is full.
        """
        parts = [t.detach().cpu().contiguous().numpy().tobytes() for t in (pixels, logits)]
        content = b"".join(parts)
        descriptor = os.open(self.path(epoch), os.O_WRONLY | os.O_CREAT, 0o666)
        with open(descriptor, "wb") as file:
            file.seek(i * self.record)
            file.write(content + zlib.crc32(content).to_bytes(4, "big"))
        self.known.setdefault(epoch, set()).add(i)


class Distillation:
    """Source of training batches whose targets are a teacher's logits.

    Args:
        teacher: The teacher, which runs once for each view.
        mix: Function that erases and mixes images, seeded by the view. The labels that it returns are ignored.
        seed: The run's seed.
        passes: Batches per epoch.
        mean: Mean used to normalise the student's images.
        std: Standard deviation used to normalise the student's images.
        views: Cache of the views, or None if they do not repeat.
        repeat: Number of epochs after which views repeat.
    """

    def __init__(
        self,
        teacher: Teacher,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        seed: int,
        passes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        views: Views | None = None,
        repeat: int = 0,
    ) -> None:
        self.teacher, self.mix, self.seed, self.passes = teacher, mix, seed, passes
        self.views, self.repeat = views, repeat
        # The same arithmetic as in timm's loader, so that cached pixels give bit-identical images.
        self.mean, self.std = (
            torch.tensor([255 * x for x in values], device=teacher.compute.device).view(1, 3, 1, 1)
            for values in (mean, std)
        )
        self.epoch = self.at = 0
        self.known: Tensor | None = None  # cached teacher logits of this batch

    def batches(
        self, epoch: int, first: int, draw: Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of an epoch, from `first` on.

        Args:
            epoch: Epoch of the run.
            first: Index of the first batch.
            draw: Function that returns batches of images and labels for an epoch and the index of its first batch.
        """
        self.epoch = epoch
        view = epoch % self.repeat if self.repeat else epoch
        if self.views is None or not self.views.whole(view, first):
            for self.at, batch in enumerate(draw(view, first), first):
                yield batch
            return
        device = self.teacher.compute.device
        for at, (pixels, logits) in enumerate(self.views.read(view, first), first):
            self.at, self.known = at, logits.to(device)
            images = pixels.to(device).float().sub_(self.mean).div_(self.std)
            yield images, torch.zeros(len(images), dtype=torch.long, device=device)

    def prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Erases and mixes a batch, and returns it with the teacher's logits for the result."""
        view = self.epoch % self.repeat if self.repeat else self.epoch
        pixels = None
        if self.views is not None and self.known is None:
            pixels = (images * self.std).add_(self.mean).round_().byte()
        seed_everything(self.seed, view * self.passes + self.at, dist.get_rank(), 1)
        images, _ = self.mix(images, labels)
        seed_everything(self.seed, self.epoch * self.passes + self.at, dist.get_rank(), 1)
        logits, self.known = self.teacher(images) if self.known is None else self.known, None
        if self.views is not None and pixels is not None:
            self.views.write(view, self.at, pixels, logits)
        return images, logits
