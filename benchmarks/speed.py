"""Compares models in one run: throughput, latency, training step, memory.

python -m benchmarks.speed container_light:eager,fused resnet50:eager,channels_last released:eager --released models.py

An entry is the name of a timm model, including ours, followed by its settings. Commas separate settings, and `+` joins
the parts of one setting. All settings of all entries are measured in turns in the same run. Their outputs are compared
with those of the same weights in float32, eager, on the CPU. With --jobs, models are prepared in parallel, each in its
own process. Results are saved after every round. With --budget, the command ends in time with what it has measured.

  eager          as created
  fused          container.fuse.fuse, with weights in channels_last; for other models timm's reparameterize_model
  channels_last  weights and images in that memory format
  bf16           weights and images in bfloat16
  amp            autocast to bfloat16
  linear         1x1 convolutions as linear layers over the positions, for any model; on a GPU included in `fused`
  compile        torch.compile
  blocks         torch.compile of each block by itself; equal blocks are compiled once, so it is ready sooner
  max-autotune, reduce-overhead   torch.compile in these modes; GPU
  graph          replay of a CUDA graph of the call, or in training of the whole step; GPU
  freeze         torch.compile with the weights as constants (inductor's freezing); CPU
  aot            torch.export, then AOTInductor (on a CPU with freezing)
  onnx           ONNX Runtime; CPU
  openvino       OpenVINO; CPU, in float32, or in bfloat16 together with bf16
  int8           with onnx or openvino: matrix products in int8, as in `container export`; inaccurate for random weights
  depthwise      faster gradient of depthwise convolutions, as in train_imagenet.py; training on a CPU
  checkpointing  blocks recomputed in the backward pass (--grad-checkpointing of train_imagenet.py); training

`released` is the authors' network: `container_v1_light` from the models.py given by --released.
"""

import argparse
import contextlib
import copy
import importlib.util
import logging
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import container.fuse
from container.int8 import to_int8
from container.runtimes import openvino_core
from container.training import speed_up_depthwise

from . import measure
from .workers import Inline, Worker, end, first_answers

SETTINGS = (
    *("eager", "fused", "channels_last", "bf16", "amp", "linear", "compile", "blocks", "graph", "freeze", "aot"),
    *("onnx", "openvino", "int8", "depthwise", "checkpointing", "max-autotune", "reduce-overhead"),
)
MODES = {"max-autotune", "reduce-overhead"}
COMPILED = {"compile", "blocks", *MODES}
INFERENCE_ONLY = {"fused", "freeze", "aot", "onnx", "openvino", "int8"}
WORKS = {"infer": "images/s, inference", "latency": "ms, batch 1", "train": "images/s, training step"}


class Entry(NamedTuple):
    """Model with one setting."""

    model: str
    settings: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model}:{'+'.join(self.settings)}"


def parse(words: list[str]) -> list[Entry]:
    """Parses words of the form `NAME[:SETTING[+SETTING ...][,...]]` into entries.

    Raises:
        SystemExit: A setting is unknown, or an entry is named twice.
    """
    entries = []
    for word in words:
        name, _, variants = word.partition(":")
        for variant in (variants or "eager").split(","):
            settings = tuple(variant.split("+"))
            for setting in settings:
                if setting not in SETTINGS:
                    raise SystemExit(
                        f"benchmarks: unknown setting {setting!r} in {word}: choose from {', '.join(SETTINGS)}"
                    )
            entries.append(Entry(name, settings))
    twice = {str(entry) for entry in entries if entries.count(entry) > 1}
    if twice:
        raise SystemExit(f"benchmarks: named twice: {', '.join(sorted(twice))}")
    return entries


def released(path: str) -> Callable[[], nn.Module]:
    """Returns the function that creates the authors' CONTAINER-LIGHT, from their unmodified models.py.

    Args:
        path: That file, or its folder.

    Raises:
        SystemExit: The file does not exist, or does not define the network.
    """
    file = Path(path) / "models.py" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise SystemExit(f"benchmarks: no released code at {file}")
    spec = importlib.util.spec_from_file_location("released_container", file)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # timm's registry looks for it here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports layers from timm's module paths of 2021
        spec.loader.exec_module(module)
    if not hasattr(module, "container_v1_light"):
        raise SystemExit(f"benchmarks: {file} has no container_v1_light")
    return module.container_v1_light


def factory(name: str, released_path: str | None) -> Callable[[], nn.Module]:
    """Returns the function that creates a model.

    Raises:
        SystemExit: No model has that name, or `released` comes without a path.
    """
    if name == "released":
        if released_path is None:
            raise SystemExit("benchmarks: `released` needs --released PATH, the authors' models.py")
        return released(released_path)
    if not timm.is_model(name):
        raise SystemExit(f"benchmarks: timm knows no model {name!r}")
    return lambda: timm.create_model(name)


def create(name: str, img_size: int, released_path: str | None) -> nn.Module:
    """Creates a model with random weights, the same at every call.

    Raises:
        SystemExit: No model has that name.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = factory(name, released_path)()
    default = getattr(model, "default_cfg", {}).get("input_size", (3, img_size, img_size))
    if tuple(default[-2:]) != (img_size, img_size) and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=img_size)  # type: ignore[operator]
    return model


def repeated(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a model: the children of innermost lists with two or more modules of one class."""
    found: list[nn.Module] = []
    for parent in model.modules():
        alike = isinstance(parent, (nn.ModuleList, nn.Sequential)) and len({type(c) for c in parent}) == 1
        if alike and len(list(parent.children())) > 1 and not any(repeated(child) for child in parent.children()):
            found += parent.children()
    return found


def prepare(
    entry: Entry, model: nn.Module, images: Tensor, train: bool, backend: str = "inductor"
) -> tuple[measure.Work, int]:
    """Returns the function to time, and the bytes that it holds between two calls (weights, statistics, optimizer).

    Args:
        entry: Entry to measure.
        model: Its model, in float32 on the CPU. Only a copy is changed.
        images: (B, 3, S, S) in float32 on the device.
        train: Whether to do a training step with AdamW on random labels, instead of a forward pass that returns the
            output.
        backend: Backend of torch.compile.

    Raises:
        ValueError: The settings cannot be combined.
    """
    settings, device = set(entry.settings), images.device
    if train and settings & INFERENCE_ONLY:
        raise ValueError(f"{'+'.join(sorted(settings & INFERENCE_ONLY))} is for inference")
    if "depthwise" in settings and (not train or device.type != "cpu"):
        raise ValueError("depthwise is for training on a CPU")
    if "checkpointing" in settings and not train:
        raise ValueError("checkpointing is for training")
    if "int8" in settings and not settings & {"onnx", "openvino"}:
        raise ValueError("int8 is for onnx or openvino")
    if "graph" in settings and device.type != "cuda":
        raise ValueError("graph is for a GPU")
    if len(COMPILED & settings) > 1:
        raise ValueError(f"{'+'.join(sorted(COMPILED & settings))} are several ways to compile")
    model = copy.deepcopy(model).train(train)
    model = model.to(device)
    if "fused" in settings:
        model = container.fuse.fuse(model)
    if "linear" in settings:
        container.fuse.as_linear(model)
    if "depthwise" in settings:
        speed_up_depthwise(model)
    if "checkpointing" in settings:
        model.set_grad_checkpointing()  # type: ignore[operator]
    if "bf16" in settings and "openvino" not in settings:
        model, images = model.bfloat16(), images.bfloat16()
    if "channels_last" in settings:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

    def cast() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if "amp" in settings else contextlib.nullcontext()

    run: Callable[[Tensor], Tensor] = model
    if "blocks" in settings:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64  # kinds of blocks; any more would silently stay eager
        for block in repeated(model):
            block.compile(backend=backend)
    elif settings & {*COMPILED, "freeze"}:
        torch._dynamo.reset()
        options: dict[str, Any] = {"freezing": True} if "freeze" in settings else {}
        for mode in MODES & settings:
            options = torch._inductor.list_mode_options(mode)
        run = torch.compile(model, backend=backend, options=options if backend == "inductor" else None)
    elif "aot" in settings:
        run = _aot(model, images)
    elif "openvino" in settings:
        return OpenVino(model, images, settings), held
    elif "onnx" in settings:
        run = _onnx(model, images, "int8" in settings)

    if not train:

        def infer() -> Tensor:
            with torch.no_grad(), cast():
                return run(images)

        return (measure.Graphed(infer) if "graph" in settings else infer), held

    labels = torch.randint(0, 1000, (len(images),), device=device)
    kind: dict[str, Any] = dict(fused=device.type == "cuda" or None, capturable="graph" in settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, **kind)

    def step() -> None:
        with cast():
            logits = run(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # creates the optimizer's state
    state = [t for group in optimizer.state.values() for t in group.values() if isinstance(t, Tensor)]
    held += sum(t.numel() * t.element_size() for t in state)
    return (measure.Graphed(step) if "graph" in settings else step), held


def _aot(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (images,))
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=f"{folder}/model.pt2",
            inductor_configs={"freezing": images.device.type == "cpu"},
        )
        return torch._inductor.aoti_load_package(package)


def _save_onnx(model: nn.Module, images: Tensor, file: str, in_int8: bool) -> None:
    import onnx

    torch.onnx.export(model, (images,), file, input_names=["images"], dynamo=True, verbose=False)
    if in_int8:
        logging.disable(logging.INFO)  # NNCF logs every node
        onnx.save(to_int8(onnx.load(file), images, len(images)), file)
        logging.disable(logging.NOTSET)


class OpenVino:
    """Model that OpenVINO runs on the same images at every call.

    Args:
        model: The model, in float32 on the CPU.
        images: (B, 3, S, S), likewise.
        settings: Settings of the entry, of which only `int8` and `bf16` matter.

    Raises:
        ValueError: The images are not on the CPU.
    """

    def __init__(self, model: nn.Module, images: Tensor, settings: set[str]) -> None:
        import openvino

        if images.device.type != "cpu":
            raise ValueError("openvino is measured on the CPU")
        self.images = images.numpy()
        with tempfile.TemporaryDirectory() as folder:
            if "int8" in settings:
                _save_onnx(model, images, f"{folder}/model.onnx", True)
                self.model = openvino.convert_model(f"{folder}/model.onnx")
            else:
                self.model = openvino.convert_model(torch.export.export(model, (images,), strict=False))
            self.options: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
            self.options["INFERENCE_PRECISION_HINT"] = "bf16" if "bf16" in settings else "f32"
            self.compiled = openvino_core().compile_model(self.model, "CPU", self.options)

    def __call__(self) -> Tensor:
        """Returns the output of the model."""
        return torch.from_numpy(self.compiled(self.images)[0])

    def kernels(self, calls: int) -> list[tuple[str, float, int]]:
        """Returns (node and its kernel, seconds, runs) of some calls, longest first, by OpenVINO's counters."""
        profiled = openvino_core().compile_model(self.model, "CPU", {**self.options, "PERF_COUNT": True})
        request = profiled.create_infer_request()
        request.infer([self.images])
        found: dict[str, tuple[float, int]] = {}
        for _ in range(calls):
            request.infer([self.images])
            for node in request.profiling_info:
                if seconds := node.real_time.total_seconds():
                    name = f"{node.node_type}, {node.exec_type}"
                    before, runs = found.get(name, (0.0, 0))
                    found[name] = before + seconds, runs + 1
        return sorted(((name, *figures) for name, figures in found.items()), key=lambda row: -row[1])


def _onnx(model: nn.Module, images: Tensor, in_int8: bool) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    if images.device.type != "cpu" or images.dtype != torch.float32:
        raise ValueError("onnx is measured on the CPU in float32")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        _save_onnx(model, images, file, in_int8)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run


class Task(NamedTuple):
    """Settings shared by all entries."""

    work: str
    batch_size: int
    img_size: int
    device: str
    alone: bool  # nothing else runs while an entry is prepared
    released: str | None
    backend: str
    traceback: bool


_works: dict[str, measure.Work] = {}  # functions to time in this process, by entry


def _prepare(task: Task, entries: list[Entry]) -> list[dict[str, Any]]:
    """Prepares the functions of a model's entries, calls each once, and returns their rows."""
    device = measure.pick_device(task.device)
    # While other processes compute, cuDNN's trials would select kernels by chance. They wait for `_begin`.
    torch.backends.cudnn.benchmark &= task.alone
    # Compile the backward pass with the forward pass, not later when the activations already take memory.
    if not task.alone and hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
        torch._functorch.config.force_non_lazy_backward_lowering = True
    images = torch.randn(task.batch_size, 3, task.img_size, task.img_size, generator=torch.Generator().manual_seed(0))
    model = create(entries[0].model, task.img_size, task.released)
    expected: Tensor | None = None
    rows = []
    for entry in entries:
        row: dict[str, Any] = dict(entry=str(entry), model=entry.model, work=task.work, batch_size=task.batch_size)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        rows.append(row)
        print(f"  {task.work}: preparing {entry}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # from the compilers, about themselves
                call, row["held"] = prepare(entry, model, images.to(device), task.work == "train", task.backend)
                answer = call()
        except (Exception, SystemExit) as error:  # a failed entry gets a row and does not stop the others
            if task.traceback:
                traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        finally:
            if device.type == "cuda" and task.work == "train":
                torch.cuda.empty_cache()
        if task.work != "train":
            if expected is None:
                with torch.no_grad():
                    expected = model.eval()(images[:2])
            row["difference"] = float((answer[:2].float().cpu() - expected).abs().max() / expected.abs().max())
        row["prepared_in"] = time.perf_counter() - start
        _works[str(entry)] = call
    return rows


def _begin(task: Task, entry: str, seconds: float) -> tuple[int | None, int]:
    """Warms up an entry while nothing else runs.

    Returns:
        The peak memory of a call, and the number of calls that fill a turn.
    """
    device = measure.pick_device(task.device)
    work = _works[entry]
    work()  # cuDNN tries its kernels
    peak = None if "onnx" in entry or "openvino" in entry else measure.peak_memory(work, device)
    if isinstance(work, measure.Graphed):  # a replay allocates nothing, so the memory was measured before
        work.capture()
    once = _turn(task, entry, 1)
    return peak, max(1, math.ceil(seconds / once)) if once else 1000


def _turn(task: Task, entry: str, calls: int) -> float:
    """Returns the seconds per call.

    For latency, every call is waited for. Otherwise, calls follow one another without waiting.
    """
    work, on_gpu = _works[entry], task.device.startswith("cuda")
    if on_gpu:
        work()  # allocates again the memory that it released after its last turn
        torch.cuda.synchronize()
    if on_gpu and task.work == "latency":
        timer = Timer("work(); wait()", globals=dict(work=work, wait=torch.cuda.synchronize))
    else:
        timer = Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads())
    seconds = timer.timeit(calls).mean
    if on_gpu and task.work == "train":
        torch.cuda.empty_cache()  # the activations of all processes together would not fit
    return seconds


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark, prints tables, and writes `speed.json` and `speed.png` with --out."""
    args = _parser().parse_args(argv)
    entries, device = parse(args.entries), measure.pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    for name in dict.fromkeys(entry.model for entry in entries):
        factory(name, args.released)  # exits here if there is no such model
    record: dict[str, Any] = {
        "environment": measure.environment(device),
        "img_size": args.img_size,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "rows": [],
    }
    print(measure.device_name(record["environment"]), file=sys.stderr)
    for work in args.work:
        _measure(work, entries, device, args, record)
        print(report(record, work), flush=True)
    if args.out:
        stem = measure.save(args.out, args.name, record)
        draw(record, stem.with_suffix(".png"))
        print(f"{stem}.json, {stem}.png", file=sys.stderr)
    failed = [row for row in record["rows"] if "error" in row]
    for row in failed:
        print(f"benchmarks: {row['entry']}, {row['work']}: {row['error']}", file=sys.stderr)
    print(f"{len(record['rows']) - len(failed)} of {len(record['rows'])} rows measured", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def _measure(
    work: str, entries: list[Entry], device: torch.device, args: argparse.Namespace, record: dict[str, Any]
) -> None:
    """Measures one kind of work, adds its rows to the record, and saves the record after every change."""
    start = time.perf_counter()

    def left(share: float = 1.0) -> float:
        return share * args.budget - (time.perf_counter() - start) if args.budget else math.inf

    def save() -> None:
        if args.out:
            measure.save(args.out, args.name, record)

    task = Task(
        work=work,
        batch_size=1 if work == "latency" else args.batch_size,
        img_size=args.img_size,
        device=str(device),
        alone=not args.jobs,
        released=args.released,
        backend=args.backend,
        traceback=args.traceback,
    )
    # A compiler that is not ready in time, or a graph that crashes, takes along only the entries in its process.
    groups: dict[str, list[Entry]] = {}
    for apart in (set(), {"graph"}, {"compile"}, {"compile", "graph"}):
        for entry in entries:
            kinds = {"compile" if setting in COMPILED else setting for setting in entry.settings}
            if apart == {"compile", "graph"} & kinds:
                groups.setdefault(", ".join([entry.model, *sorted(apart)]), []).append(entry)
    group_of = {str(entry): group for group, own in groups.items() for entry in own}
    workers: dict[str, Inline | Worker] = {}
    rows: dict[str, dict[str, Any]] = {}

    def fail(group: str, error: str) -> None:
        """Ends the process of a group, and marks its entries as failed."""
        if group in workers:
            end([workers.pop(group)])
        for entry in groups[group]:
            row = rows.setdefault(str(entry), dict(entry=str(entry), model=entry.model, work=work))
            row.setdefault("error", error)

    def ask(group: str, function: Callable, *arguments: Any) -> Any:
        """Has a group's process call a function, and returns the result, or None if it fails or the time is up."""
        workers[group].order(function, task, *arguments)
        if not first_answers({group: workers[group]}, left()):
            end([workers.pop(group)])  # the time is up
            return None
        try:
            return workers[group].answer()
        except RuntimeError as error:
            fail(group, str(error).splitlines()[0])
            return None

    def prepared(found: list[dict[str, Any]]) -> None:
        """Adds rows to the record, in the order of the entries."""
        rows.update({row["entry"]: row for row in found})
        own = [rows[str(entry)] for entry in entries if str(entry) in rows]
        record["rows"] = [row for row in record["rows"] if row["work"] != work] + own
        save()

    try:
        waiting = list(groups)
        busy: dict[str, Inline | Worker] = {}
        while waiting or busy:
            while waiting and len(busy) < max(1, args.jobs):
                group = waiting.pop(0)
                workers[group] = busy[group] = Worker() if args.jobs else Inline()
                busy[group].order(_prepare, task, groups[group])
            ready = first_answers(busy, left(0.7))
            if not ready:
                for group in [*busy, *waiting]:
                    fail(group, f"not prepared in {0.7 * args.budget:.0f} s")
                break
            for group, worker in ready:
                del busy[group]
                try:
                    prepared(worker.answer())
                except RuntimeError as error:
                    fail(group, str(error).splitlines()[0])
        for group in list(workers):  # those that ran out of memory beside the others may fit now
            again = [entry for entry in groups[group] if "OutOfMemory" in rows[str(entry)].get("error", "")]
            if again and args.jobs:
                prepared(ask(group, _prepare, again) or [])
        prepared([])
        calls: dict[str, int] = {}

        def turn(name: str) -> None:
            """Times an entry for one turn, and adds the result to its row, if there is time left."""
            if name not in calls or group_of[name] not in workers or left() < 2 * args.seconds:
                return
            if (seconds := ask(group_of[name], _turn, name, calls[name])) is not None:
                rows[name]["seconds"].append(seconds)

        for entry in entries:
            name, row = str(entry), rows[str(entry)]
            if "error" in row or group_of[name] not in workers or left() < 2 * args.seconds:
                continue
            if (begun := ask(group_of[name], _begin, name, args.seconds)) is not None:
                peak, calls[name] = begun
                row["peak_memory"] = None if peak is None else peak + row["held"]
                row["seconds"] = []
                turn(name)
            save()
        names = list(calls)
        for i in range(1, args.rounds):
            for name in names[i % len(names) :] + names[: i % len(names)] if names else []:
                turn(name)
            save()
    finally:
        end(workers.values())
        _works.clear()
    timed = [row for row in rows.values() if row.get("seconds") and "error" not in row]
    for row in rows.values():
        if row not in timed:
            row.setdefault("error", "not timed in the time that there was")
        else:  # only rounds that all have completed
            row["seconds"] = row["seconds"][: min(len(other["seconds"]) for other in timed)]
    first = next((rows[str(entry)] for entry in entries if "error" not in rows[str(entry)]), None)
    for row in rows.values():
        if "error" not in row and first is not None:
            row["faster"] = measure.ratios(first["seconds"], row["seconds"])


def report(record: dict[str, Any], work: str) -> str:
    """Returns a Markdown table of one kind of work. Its column `x first` is the speed relative to the first row."""
    rows = [row for row in record["rows"] if row["work"] == work]
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["entry"], "failed", "", "", "", ""])
            continue
        low, median, high = (_figure(row, s) for s in measure.spread(row["seconds"]))
        _, faster, _ = measure.spread(row["faster"])
        peak, difference = row["peak_memory"], row.get("difference")
        lines.append(
            [
                row["entry"],
                _shown(work, median),
                f"{_shown(work, min(low, high))} - {_shown(work, max(low, high))}",
                f"{faster:.2f}",
                "" if peak is None else f"{peak / 2**20:.0f}",
                "" if difference is None else f"{difference:.0e}",
            ]
        )
    batch = next((row["batch_size"] for row in rows if "batch_size" in row), "?")
    header = [f"batch {batch}, {record['img_size']} px", WORKS[work], "quartiles", "x first", "peak MiB", "difference"]
    return "\n" + measure.table(header, lines) + "\n"


def _figure(row: dict[str, Any], seconds: float) -> float:
    return seconds * 1e3 if row["work"] == "latency" else row["batch_size"] / seconds


def _shown(work: str, figure: float) -> str:
    return f"{figure:.{2 if work == 'latency' else 1 if figure < 1000 else 0}f}"


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws a bar chart of each kind of work, medians with quartiles, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    works = list(dict.fromkeys(row["work"] for row in record["rows"]))
    by_work = [[row for row in record["rows"] if row["work"] == work and row.get("seconds")] for work in works]
    height = 1.2 + 0.3 * max(len(rows) for rows in by_work)
    figure, axes = plt.subplots(1, len(works), figsize=(7 * len(works), height), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(row["model"] for row in record["rows"]))
    colors = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    for axis, work, rows in zip(axes[0], works, by_work, strict=True):
        for i, row in enumerate(rows):
            low, median, high = sorted(_figure(row, s) for s in measure.spread(row["seconds"]))
            axis.barh(i, median, color=colors[row["model"]], xerr=[[median - low], [high - median]], capsize=2)
            axis.text(high, i, f"  {_shown(work, median)}", va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), [row["entry"] for row in rows], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.2, y=0.01)
        axis.set_xlabel(WORKS[work])
        axis.set_title("less is better" if work == "latency" else "more is better", fontsize=9)
    figure.suptitle(measure.device_name(record["environment"]), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "entries", nargs="+", metavar="NAME[:SETTING[+SETTING]...[,...]]", help="models with their settings"
    )
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=["infer"], help="default: infer")
    parser.add_argument("--batch-size", type=int, default=8, help="batch size of infer and train; default: 8")
    parser.add_argument("--img-size", type=int, default=224, help="image size in pixels; default: 224")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; default: the GPU if there is one")
    parser.add_argument("--threads", type=int, help="number of CPU threads; default: PyTorch's")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each entry; default: 9")
    parser.add_argument("--seconds", type=float, default=1.0, help="minimum duration of a turn; default: 1")
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="models to prepare in parallel, each in its own process"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="time per kind of work; rounds end with it")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile; default: inductor")
    parser.add_argument("--released", metavar="PATH", help="the authors' models.py, or its folder")
    parser.add_argument("--out", metavar="DIR", help="folder for the JSON file and the plot")
    parser.add_argument("--name", default="speed", help="name of these two files; default: speed")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a failed entry")
    return parser


if __name__ == "__main__":
    main()
