"""Training run: setup, training, checkpoints, evaluation and reports."""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml
from timm.data import Mixup, resolve_model_data_config
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.models._hub import save_config_for_hf
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.task.task import TrainingTask
from timm.utils import distribute_bn, get_outdir, unwrap_model
from tqdm import tqdm

from container.files import write_atomically
from container.images import pixels_per_token

from .checkpoint import Checkpoints, Progress, lock
from .data import Images, Photos, check_classes
from .distill import Distillation, Teacher, TeacherOutputs
from .distributed import Agreement, StopSignal, any_of, on_first_rank
from .loader import advice, ask_ahead, create_train_loader, create_val_loader, end_workers, epoch_batches, growing
from .loop import HALF, Compute, StoppedError, evaluate, train_one_epoch
from .plan import estimate
from .report import Report, StepLog, describe_environment, write_best

__all__ = ["Run", "tell_unreadable"]

# Settings that may change when a run is resumed. The images of a step may be divided differently between processes.
FREE = {"output", "resume", "recipe", "save_steps", "save_minutes", "log_steps", "wandb", "device", "workers"}
FREE |= {"data_dir", "batch_size", "grad_accum"}
FREE |= {"checkpoint", "pretrained", "teacher_checkpoint", "view_dir"}  # where the run started from
FREE |= {"compile", "channels_last", "grad_checkpointing"}  # other ways to compute the same
FREE |= {"eval", "dry_run", "real_labels"}
START = ("checkpoint", "pretrained", "teacher_checkpoint")  # what a run began with, whatever it is continued with
BAD_STEPS = 20  # consecutive steps without a finite gradient that end a run
FUSED = ("adam", "adamw", "sgd")  # torch optimizers whose fused version skips a step without waiting for the GPU


class _Stages(torch.nn.Module):
    """Wrapper that presents a model's stages as its layers to timm's layer-wise learning rate decay."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = [model]  # in a list, so not a submodule: its parameters keep their names

    def group_matcher(self, coarse: bool) -> dict[str, Any]:
        return self.model[0].group_matcher(coarse=True)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.model[0].named_parameters(*args, **kwargs)


def groups_by_stage(model: Any, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Returns parameter groups whose learning rate falls by a factor per stage, from the head down to the stem.

    Args:
        model: timm model.
        weight_decay: Weight decay of parameters with two or more dimensions that the model does not exempt.
        layer_decay: Factor per stage.

    Raises:
        ValueError: The model does not define its stages (`group_matcher`).
    """
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"{type(model).__name__} does not say what its layers are: --layer-decay cannot be used")
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return param_groups_layer_decay(_Stages(model), weight_decay, exempt, layer_decay=layer_decay)


def tell_unreadable(dataset: Any, fate: str) -> None:
    """Reports on stderr the images that this process has newly found unreadable."""
    for name in dataset.new_unreadable() if isinstance(dataset, Images) else []:
        tqdm.write(f"cannot be read, and {fate}: {name}", file=sys.stderr)


class Run:
    """Training run with its model, data, progress and files.

    The loop itself is `train_one_epoch`.

    Args:
        args: Settings, named as in `train_imagenet.py`.
        model: The model, with its initial weights.
        task: The model with its loss, compiled and distributed.
        train_set: Training images.
        val_set: Validation images.
        teacher: Teacher whose logits are learned instead of labels, or None.

    Raises:
        RuntimeError, ValueError: Data, model and settings do not fit together.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: Any,
        task: TrainingTask,
        train_set: Any,
        val_set: Any,
        teacher: Teacher | None = None,
    ) -> None:
        self.args, self.rank, self.world = args, dist.get_rank(), dist.get_world_size()
        self.model, self.task, self.train_set, self.val_set = model, task, train_set, val_set
        self.compute = Compute(task.device, args.amp, args.channels_last)
        self.config = resolve_model_data_config(model, args=dict(img_size=args.img_size, crop_pct=args.crop_pct))
        self.size = self.config["input_size"][-1]
        self.sizes = growing(args.start_size or self.size, self.size, args.epochs, pixels_per_token(model))
        if args.start_size is not None and model.pretrained_cfg.get("fixed_input_size"):
            raise ValueError(f"{args.model} is tied to one image size: images cannot grow from --start-size")
        self.processes = max(self.world, args.dry_run)  # a dry run may plan for more processes than there are
        self.images = args.batch_size * args.grad_accum * self.processes  # per optimizer step
        self.loader_size = self.sizes[0] if teacher is None else self.size  # a teacher sees large images all the time
        self.loader = self.train_loader(self.loader_size)
        self.val_loader = create_val_loader(
            val_set, self.config, args.batch_size, args.workers, task.device, persistent=True
        )
        self.steps = len(self.loader) * self.world // (self.processes * args.grad_accum)  # per epoch
        if self.steps == 0:
            raise ValueError(f"a step takes {self.images} images, and there are {len(train_set)} to train on")
        self.lr, self.warmup_epochs = args.lr_base * self.images / 512, min(args.warmup_epochs, args.epochs - 1)
        self.cost = estimate(self.model, self.size, args.batch_size, args.amp in HALF, bool(args.ema_decay))

        fused = {"fused": True} if task.device.type == "cuda" and args.opt in FUSED else {}
        by_stage = None
        if args.layer_decay is not None:
            by_stage = partial(groups_by_stage, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
        self.optimizer = create_optimizer_v2(
            self.model,
            opt=args.opt,
            lr=self.lr,
            weight_decay=args.weight_decay,
            param_group_fn=by_stage,
            **fused | args.opt_args,
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=args.epochs,
            warmup_epochs=self.warmup_epochs,
            warmup_lr=args.warmup_lr,
            min_lr=args.min_lr,
            step_on_epochs=not args.sched_on_updates,
            updates_per_epoch=self.steps,
        )
        self.scaler = self.compute.scaler()
        self.erase = RandomErasing(args.reprob, mode="pixel", device=task.device)
        self.mixup = None
        if args.mixup or args.cutmix:
            self.mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=model.num_classes)
        self.teacher = teacher
        self.distillation: Distillation | None = None
        self.progress = Progress()
        self.signal = StopSignal()
        self.stopped = False  # whether any process was told to stop, as agreed by all
        self.pending: tuple[Agreement, dict[str, float]] | None = None  # values of the last step, not read yet
        self.since = self.saved = time.perf_counter()
        self.waited = 0.0  # seconds that this step waited for data
        self.bar = tqdm(disable=True)
        self.output = Path(args.output)
        self.checkpoints = Checkpoints(self.output)
        self.report: Report | None = None  # only rank 0 writes: it has these two and the lock
        self.log: StepLog | None = None
        self.lock: Any = None
        self.environment: dict[str, Any] = {}
        self.forced: dict[str, list[Any]] = {}
        self.parts: dict[str, Any] = dict(
            state_dict=self.model, optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler
        )
        if self.task.has_ema():
            self.parts["state_dict_ema"] = unwrap_model(self.task.get_trainable_module(ema=True))
        self.fixed = {key: value for key, value in vars(args).items() if key not in FREE}
        self.settings = dict(vars(args))  # as they are written down
        self.fixed |= dict(images=self.images, steps=self.steps, class_names=getattr(train_set, "classes", None))
        if teacher is not None:
            self.fixed["teacher_weights"] = teacher.digest()

    def train_loader(self, size: int) -> PrefetchLoader:
        """Creates the training loader for an image size."""
        args = self.args
        interpolation = dict(interpolation=args.train_interpolation) if args.train_interpolation else {}
        return create_train_loader(
            self.train_set,
            self.config | dict(input_size=(3, size, size)) | interpolation,
            augmentation=dict(
                scale=args.scale,
                ratio=args.ratio,
                hflip=args.hflip,
                auto_augment=args.aa,
                color_jitter=args.color_jitter,
            ),
            repeats=args.aug_repeats,
            batch_size=args.batch_size,
            workers=args.workers,
            seed=args.seed,
            device=self.task.device,
        )

    def open(self) -> bool:
        """Creates the run's folder, or resumes the run in it.

        Returns:
            Whether the run is resumed.

        Raises:
            OSError: The folder cannot be written.
            ValueError: The run in the folder has other settings, is still in progress, or has only damaged checkpoints.
        """
        args = self.args
        saved: list[Any] = [None]
        if self.rank == 0:
            self.output = Path(args.output if args.resume else get_outdir(args.output, inc=True))
            self.output.mkdir(parents=True, exist_ok=True)
            args.output = self.settings["output"] = str(self.output)
            self.lock = lock(self.output)
            self.checkpoints = Checkpoints(self.output)
            if args.resume:
                saved = [self.checkpoints.load()]
                if saved == [None] and (damaged := self.checkpoints.damaged()):
                    raise ValueError(
                        f"all {len(damaged)} checkpoints in {self.output} are damaged: take another --output"
                    )
        dist.broadcast_object_list(saved)  # nodes need not share a disk
        if (state := saved[0]) is not None:
            fixed = state["fixed"]
            check_classes(f"the run in {args.output}", fixed.get("class_names"), self.fixed["class_names"])
            for key, value in self.fixed.items():
                if fixed.get(key, value) != value:  # a later version may have more settings
                    if args.resume != "force":
                        raise ValueError(f"{args.output} was begun with {key} {fixed[key]}, not {value}")
                    self.forced[key] = [fixed[key], value]
            options = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
            for key, part in self.parts.items():
                if not (self.forced and key == "scheduler"):
                    part.load_state_dict(state[key])
            self.progress = Progress(**state["progress"])
            self.settings |= {key: state["settings"][key] for key in START if key in state.get("settings", {})}
            if self.forced:  # loaded optimizer states override the settings: restore those of this call
                for group, own in zip(self.optimizer.param_groups, options, strict=True):
                    group.update(own)
                self.scheduler.step(max(0, self.progress.epoch - args.sched_late))
                self.scheduler.step_update(self.done)
        if self.teacher is not None:
            self.distillation = self.begin_distillation(self.teacher)
        if self.rank == 0:
            (self.output / "stopped").unlink(missing_ok=True)
            self.report = Report(self.output, self.progress.epoch, args.wandb, self.settings)
            self.log = StepLog(self.output, self.done, self.images, args.log_steps, self.report.wandb)
            self.environment = describe_environment(self.task.device)
            write_atomically(self.output / "args.yaml", yaml.safe_dump(self.settings).encode())
            # Together with the weights, this is what timm's `local-dir:` reads.
            names = dict(label_names=names) if (names := self.fixed["class_names"]) else {}
            save_config_for_hf(self.model, str(self.output / "config.json"), names, None, self.config)
        return state is not None

    def begin_distillation(self, teacher: Teacher) -> Distillation:
        """Opens the store of the teacher's outputs, and has it label validation photos that have no labels."""
        args, config, outputs = self.args, self.config, None
        if args.view_epochs:
            if not isinstance(self.train_set, Images):
                raise ValueError("--view-epochs is for photos in folders")
            names = [
                "teacher",
                "teacher_size",
                "seed",
                "scale",
                "ratio",
                "train_interpolation",
                "hflip",
                "aa",
                "color_jitter",
            ]
            names += ["aug_repeats", "amp"]
            made_from = {name: getattr(args, name) for name in names}
            made_from |= {key: config[key] for key in ("input_size", "mean", "std", "interpolation")}
            made_from |= dict(weights=self.fixed["teacher_weights"], device=self.task.device.type)
            made_from |= dict(
                photos=on_first_rank(self.train_set.digest), versions=describe_environment(self.task.device)["versions"]
            )
            folder = [args.view_dir or os.path.join(args.output, "views")]
            dist.broadcast_object_list(folder)
            outputs = TeacherOutputs(Path(folder[0]), made_from, self.model.num_classes)
        if isinstance(self.val_set, Images) and isinstance(self.val_set.reader, Photos):
            teacher.label(self.val_set, config, args.batch_size, args.workers)
        return Distillation(teacher, self.mix, args.batch_size, outputs, args.view_epochs)

    @property
    def done(self) -> int:
        """Number of optimizer steps since the start of the run."""
        return self.progress.epoch * self.steps + self.progress.step

    def train(self) -> float:
        """Trains to the last epoch, or until a signal asks to stop.

        Returns:
            Validation top-1 of the last epoch, in percent.

        Raises:
            FloatingPointError: The loss or weights are not finite, or gradients were not finite many times in a row.
            OSError: The disk is full.
            SystemExit: A process was told to stop; the state is saved (`leave`).
        """
        args = self.args
        self.write_report()  # the run may have been interrupted before the last report
        self.bar = tqdm(
            total=args.epochs * self.steps * self.images,
            initial=self.done * self.images,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,  # seconds; a log file needs few lines
            disable=self.rank > 0,
        )
        with self.signal, self.bar:
            while self.progress.epoch < args.epochs:
                if self.progress.step < self.steps:
                    self.train_epoch()
                started = time.perf_counter()
                try:
                    line = self.finish_epoch()
                except StoppedError:
                    self.progress.total_seconds += time.perf_counter() - started
                    self.leave()
                if self.rank == 0:
                    self.bar.write(line)
                if self.told() and self.progress.epoch < args.epochs:
                    self.leave()
        return self.progress.history[-1]["eval_top1"]

    def train_epoch(self) -> None:
        """Trains the remaining steps of the epoch, and saves before the evaluation, which may fail."""
        args, progress = self.args, self.progress
        size = self.sizes[progress.epoch]
        if self.distillation is None and size != self.loader_size:
            self.loader, self.loader_size = self.train_loader(size), size
        if self.mixup is not None and args.mixup_off_epoch is not None:
            self.mixup.mixup_enabled = progress.epoch < args.mixup_off_epoch
        self.since = time.perf_counter()
        train_one_epoch(
            self.task,
            self.batches(),
            self.optimizer,
            self.scheduler,
            self.scaler,
            self.compute,
            self.prepare,
            self.after_step,
            steps=range(self.done, (progress.epoch + 1) * self.steps),
            accum=args.grad_accum,
            clip_grad=args.clip_grad,
            seed=args.seed,
        )
        self.heed()
        self.scheduler.step(progress.epoch + 1 - args.sched_late)  # late: as of this epoch again
        if self.world > 1:  # each process has batch norm statistics of its own images
            distribute_bn(self.model, self.world, reduce=True)
            if self.task.has_ema():
                distribute_bn(self.parts["state_dict_ema"], self.world, reduce=False)
        if self.stopped:
            self.leave()
        self.save()

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the remaining batches of this epoch, and records the time spent waiting for each."""
        progress = self.progress
        first = progress.step * self.args.grad_accum
        draw = partial(epoch_batches, self.loader, self.args.seed)
        source = self.distillation.batches(progress.epoch, first, draw) if self.distillation else None
        batches, drawn = source or draw(progress.epoch, first), first
        while True:
            waiting = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - waiting
            if batch is None:  # only a stream does not know how many images it has
                wanted = self.steps * self.args.grad_accum
                raise ValueError(
                    f"the training data ended after {drawn} of {wanted} batches of {self.args.batch_size}: the stream "
                    "has fewer images than it is said to have, or their names or labels are not read"
                )
            drawn += 1
            yield batch

    def prepare(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies random erasing and mixing. In distillation without labels, also gets the teacher's logits."""
        if self.distillation is None:
            return self.mix(images, targets)
        return self.distillation.prepare(images, targets, self.sizes[self.progress.epoch])

    def mix(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies random erasing, then Mixup or CutMix."""
        images = self.erase(images)
        return self.mixup(images, targets) if self.mixup else (images, targets)

    def after_step(self, loss: torch.Tensor, norm: torch.Tensor, lr: float) -> None:
        """Updates the progress after a step, and saves or stops if that is due.

        All processes act on a step's values one step later, when they have arrived.

        Raises:
            FloatingPointError: See `heed`.
            SystemExit: A process was told to stop.
        """
        args, progress = self.args, self.progress
        self.heed()
        progress.step, progress.lr = progress.step + 1, lr
        row = dict(step=self.done, epoch=progress.epoch, lr=lr, seconds=time.perf_counter() - self.since)
        row["wait"], self.waited, self.since = self.waited, 0.0, time.perf_counter()
        progress.seconds, progress.wait = progress.seconds + row["seconds"], progress.wait + row["wait"]
        scale = self.scaler.scale(torch.ones((), device=loss.device))
        self.pending = Agreement(loss, norm, scale, self.signal.received is not None), row
        before = progress.step - 1
        self.bar.set_postfix(
            epoch=progress.epoch + 1,
            loss=f"{progress.loss / before:.3f}" if before else "-",  # mean of the steps before
            data_wait=f"{100 * progress.wait / progress.seconds:.0f}%",
            refresh=False,
        )
        self.bar.update(self.images)
        tell_unreadable(self.train_set, "another takes its place")
        if progress.step < self.steps:
            if self.stopped:
                self.leave()
            old = time.perf_counter() - self.saved > 60 * args.save_minutes
            if self.rank == 0 and (old or (args.save_steps and progress.step % args.save_steps == 0)):
                self.save()

    def heed(self) -> None:
        """Reads and checks the values of the last step, unless this was done before.

        Raises:
            FloatingPointError: The loss is not finite, or too many gradients in a row were not.
        """
        if self.pending is None:
            return
        progress = self.progress
        (agreement, row), self.pending = self.pending, None
        loss, norm, scale, stop = agreement.read()
        self.stopped = self.stopped or stop
        where = f"epoch {row['epoch'] + 1:.0f}, step {row['step'] - row['epoch'] * self.steps:.0f}"
        if not math.isfinite(loss):  # neither is the gradient, so the step was skipped
            raise FloatingPointError(f"loss is {loss} in {where}, at lr {row['lr']:.2e}")
        progress.loss += loss
        if math.isfinite(norm):
            progress.bad = 0
        else:  # the optimizer has skipped the step on all processes
            progress.bad, progress.skipped = progress.bad + 1, progress.skipped + 1
            if progress.bad == BAD_STEPS:
                raise FloatingPointError(f"{BAD_STEPS} steps in a row had a gradient that is not finite, up to {where}")
        if self.log is not None:
            self.log.add(**row, loss=loss, grad_norm=norm, loss_scale=scale, skipped=progress.skipped)

    def told(self) -> bool:
        """Returns whether any process was told to stop. All processes must call it."""
        return bool(any_of(torch.tensor(self.signal.received is not None), self.task.device))

    def save(self, wait: bool = False) -> None:
        """Writes a checkpoint of the current step in a background thread.

        Args:
            wait: Whether all processes wait until it is on disk.

        Raises:
            FloatingPointError: Weights are not finite, or see `heed`.
            OSError: The disk is full. An error in the thread is raised by the next call.
        """
        self.heed()
        if self.rank == 0:
            self.saved = time.perf_counter()
            state = {key: part.state_dict() for key, part in self.parts.items()}
            weights = {key: tensor for key, tensor in state["state_dict"].items() if tensor.is_floating_point()}
            finite = torch.stack([tensor.isfinite().all() for tensor in weights.values()]).tolist()
            if not all(finite):
                which = list(weights)[finite.index(False)]
                raise FloatingPointError(f"{which} is not finite: not saved, the checkpoints before are as they were")
            self.checkpoints.begin(
                self.done, state | dict(progress=asdict(self.progress), fixed=self.fixed, settings=self.settings)
            )
            if wait:
                self.checkpoints.finish()
                if self.stopped:
                    (self.output / "stopped").touch()
        if wait:
            dist.barrier()  # if a process exited now, torchrun would end the one that writes

    def leave(self) -> NoReturn:
        """Saves a checkpoint, and ends the process as the signal asked.

        Raises:
            SystemExit: Always, with exit status 128 plus the signal's number, as in a shell.
        """
        self.stopped = True
        self.save(wait=True)
        if self.rank == 0:
            where = f"after {self.progress.epoch} epochs and {self.progress.step} steps"
            self.bar.write(f"told to stop {where}: goes on with --resume auto --output {self.output}")
        raise SystemExit(128 + (self.signal.received or signal.SIGTERM))

    def finish_epoch(self) -> str:
        """Evaluates, writes the weights if they are the best so far, and writes the report.

        The epoch's checkpoint has been saved before. After the last epoch, another one is saved.

        Returns:
            A line with the result, and advice if the epoch waited long for data.

        Raises:
            StoppedError: A process was told to stop.
        """
        args, progress, start = self.args, self.progress, time.perf_counter()
        if self.sizes[progress.epoch + 1 :][:1] == [self.loader_size] and self.distillation is None:
            ask_ahead(self.loader, self.loader_size, args.seed, progress.epoch + 1)
        metrics = evaluate(self.task, self.val_loader, self.compute, stop=self.told)
        tell_unreadable(self.val_set, "does not count")
        for data in (self.train_set, self.val_set):  # a process reads a share, but the limit is for the whole
            if isinstance(data, Images):
                data.check_unreadable(any_of(data.unreadable, self.task.device))
        row = dict(
            epoch=progress.epoch,
            train_loss=progress.loss / self.steps,
            **{f"eval_{key}": value for key, value in metrics.items()},
            lr=progress.lr,
            images_per_second=self.images * self.steps / progress.seconds,
            data_wait=progress.wait / progress.seconds,
        )
        top1 = metrics["ema_top1" if args.best == "ema" else "top1"]
        better = progress.best is None or top1 > progress.best
        self.progress = Progress(
            epoch=progress.epoch + 1,
            total_seconds=progress.total_seconds + progress.seconds + time.perf_counter() - start,
            best=top1 if better else progress.best,
            history=[*progress.history, row],
            bad=progress.bad,
            skipped=progress.skipped,
        )
        if self.rank == 0 and better:
            model: Any = self.task.get_eval_model(ema=args.best == "ema")
            write_best(self.output, model, self.fixed["class_names"])
        if self.progress.epoch == args.epochs:
            self.save(wait=True)
        self.write_report()
        line = f"epoch {progress.epoch + 1:3d}: loss {row['train_loss']:.3f}, validation {metrics['top1']:.2f} % top-1"
        line += f", averaged weights {metrics['ema_top1']:.2f} %" if self.task.has_ema() else ""
        # In a short epoch, most of the wait is for the workers to start.
        slow = advice(row["data_wait"], args.workers) if progress.seconds > 60 else ""
        return f"{line}\n{slow}" if slow else line

    def write_report(self) -> None:
        """Writes the report of the run up to its last completed epoch."""
        progress = self.progress
        if self.report is None or not progress.history:
            return
        summary = self.environment | dict(
            recipe=self.args.recipe,
            model=dict(name=self.args.model, image_size=self.size, **self.cost),
            data=dict(train_images=len(self.train_set), val_images=len(self.val_set), classes=self.model.num_classes),
            class_names=self.fixed["class_names"],
            epochs=progress.epoch,
            seconds=progress.total_seconds,
            best=dict(weights=self.args.best, top1=progress.best, file="model_best.safetensors"),
            last=progress.history[-1],
            skipped_steps=progress.skipped,
            forced=self.forced,
            args=self.settings,
        )
        self.report.write(progress.history, summary)

    def close(self) -> None:
        """Ends what would outlive the run: the checkpoint thread, data loader workers, logs, and the folder's lock."""
        with suppress(OSError):  # it was already raised where it could be reported
            self.checkpoints.close()
        end_workers(self.loader, self.val_loader)
        if self.report is not None:
            self.report.close()
        if self.lock is not None:
            self.lock.release()
