"""Distillation from a teacher's logits alone, without labels; they are kept on disk for views that repeat."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from timm.models import create_model
from torch import Tensor, nn
from torch.nn.functional import interpolate, kl_div, log_softmax

from container.files import write_atomically

from .data import Images
from .loader import create_val_loader
from .loop import Compute

__all__ = ["Distillation", "Divergence", "Teacher", "TeacherOutputs"]


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

    def label(self, photos: Images, config: dict[str, Any], batch_size: int, workers: int) -> None:
        """Labels every photo with the teacher's prediction. All processes must call it.

        Args:
            photos: Photos from `open_photos`.
            config: Preprocessing: `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
            batch_size: Photos per batch.
            workers: Number of data loader workers.
        """
        loader = create_val_loader(photos, config, batch_size, workers, self.compute.device)
        found = torch.cat([self(images).argmax(dim=1) for images, _ in loader])
        everywhere = [torch.empty_like(found) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, found)  # the sampler gives process r photos r, r + world, ...
        photos.reader.targets = torch.stack(everywhere, dim=1).flatten()[: len(photos)].cpu().numpy()

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that identify these weights."""
        content = hashlib.sha256()
        for key, tensor in self.model.state_dict().items():
            content.update(key.encode() + tensor.cpu().numpy().tobytes())
        return content.hexdigest()[:16]


class TeacherOutputs:
    """Disk store of a teacher's outputs for the views of the first epochs, which later epochs repeat.

    Each epoch has a file, with a record for each position in it: outputs in half precision, and their checksum. A
    record that is missing, incomplete or damaged is computed again, so any number of processes may share the files. The
    outputs of other settings have another folder.

    Args:
        folder: Parent of that folder.
        made_from: All that the outputs depend on, as plain values.
        classes: Number of the teacher's classes.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], classes: int) -> None:
        description = json.dumps(made_from, sort_keys=True, indent=1).encode()
        self.folder = folder / hashlib.sha256(description).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "made_from.json", description)
        self.classes, self.record = classes, 2 * classes + 4  # bytes

    def open(self, epoch: int) -> BinaryIO:
        """Opens an epoch's file, which is created if necessary."""
        return open(os.open(self.folder / f"{epoch:04d}.outputs", os.O_RDWR | os.O_CREAT, 0o666), "r+b")

    def read(self, epoch: int, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns outputs (images, classes), zeros where there are none, and whether there are any (images,)."""
        outputs, present = torch.zeros(len(positions), self.classes, dtype=torch.float16), []
        with self.open(epoch) as file:
            for row, position in zip(outputs, positions, strict=True):
                file.seek(position * self.record)
                record = file.read(self.record)
                present.append(len(record) == self.record and _checksum(record[:-4]) == record[-4:])
                if present[-1]:
                    row.copy_(torch.frombuffer(bytearray(record[:-4]), dtype=torch.float16))
        return outputs, torch.tensor(present)

    def write(self, epoch: int, positions: Sequence[int], outputs: Tensor) -> None:
        """Keeps outputs (images, classes).

        Raises:
            OSError: The disk is full.
        """
        with self.open(epoch) as file:
            for row, position in zip(outputs.half().cpu().numpy(), positions, strict=True):
                file.seek(position * self.record)
                file.write(row.tobytes() + _checksum(row.tobytes()))


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "big")


class Distillation:
    """Source of training batches whose targets are a teacher's logits.

    Args:
        teacher: The teacher, which runs once for each view.
        mix: Function that erases and mixes images, seeded by the view. The labels that it returns are ignored.
        batch_size: Images in a batch of this process.
        outputs: Store of the teacher's outputs for views that repeat, or None. Their images must not be mixed.
        repeat: Number of epochs after which views repeat; 0 for never.
    """

    def __init__(
        self,
        teacher: Teacher,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        batch_size: int,
        outputs: TeacherOutputs | None = None,
        repeat: int = 0,
    ) -> None:
        self.teacher, self.mix, self.batch_size, self.outputs, self.repeat = teacher, mix, batch_size, outputs, repeat
        self.epoch = self.at = 0  # epoch of the views, and index of the batch in it

    def batches(
        self, epoch: int, first: int, draw: Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of an epoch, from `first` on.

        Args:
            epoch: Epoch of the run.
            first: Index of the first batch.
            draw: Function that returns batches of images and labels for an epoch and the index of its first batch.
        """
        self.epoch = epoch % self.repeat if self.repeat else epoch
        for at, batch in enumerate(draw(self.epoch, first), first):
            self.at = at
            yield batch

    def prepare(self, images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Erases and mixes a batch, and returns it at the student's size with the teacher's logits.

        Args:
            images: (images, 3, side, side), as the teacher sees them.
            labels: (images,), not used.
            size: Side of the images that the student sees.
        """
        images, _ = self.mix(images, labels)
        logits = self.teacher(images) if self.outputs is None else self.look_up(images, self.outputs)
        if size != images.shape[-1]:
            images = interpolate(images, size=(size, size), mode="bicubic", antialias=True)
        return images, logits

    def look_up(self, images: Tensor, outputs: TeacherOutputs) -> Tensor:
        """Returns the teacher's logits for the views of this batch; those that are not kept yet are computed."""
        ours = range(self.at * self.batch_size, self.at * self.batch_size + len(images))
        positions = [i * dist.get_world_size() + dist.get_rank() for i in ours]  # as in SeededSampler
        logits, present = outputs.read(self.epoch, positions)
        logits, missing = logits.to(images.device), (~present).nonzero().flatten().tolist()
        if missing:
            logits[missing] = self.teacher(images[missing])
            outputs.write(self.epoch, [positions[i] for i in missing], logits[missing])
        return logits
