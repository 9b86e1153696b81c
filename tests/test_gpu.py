"""What is claimed of GPUs, held to the CPU's answers. Figures are recorded beside the outcomes (`--results FILE`).

pytest -m gpu                                  on a machine with a GPU
CONTAINER_TEST_DEVICE=cpu pytest -m gpu        the rehearsal: the same tests, smaller, on the CPU
"""

import csv
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, randomize
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask
from torch.nn.attention import SDPBackend, sdpa_kernel

import container.fuse
from benchmarks import measure
from benchmarks.workers import descendants
from container.training import Agreement, Compute, join_group, train_one_epoch
from container.training.plan import estimate

pytestmark = pytest.mark.gpu

MEMBERS = timm.list_models("container*")
CPU = torch.device("cpu")
NAME = os.environ.get("CONTAINER_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "")
TINY = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4))


@pytest.fixture(scope="module")
def device():
    """The GPU, with float32 as precise as the CPU's; or the CPU, where CONTAINER_TEST_DEVICE asks for a rehearsal."""
    if not NAME:
        pytest.skip("no GPU here; CONTAINER_TEST_DEVICE=cpu rehearses")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(NAME)


@pytest.fixture
def record(record_property):
    """Keeps a figure for the record, and returns it."""

    def keep(name, value):
        record_property(name, value)
        return value

    return keep


def create(name, size=64, **options):
    """A member in evaluation with every parameter moved from its initial value; tiny in a rehearsal."""
    options |= TINY if NAME == "cpu" else {}
    model = timm.create_model(name, img_size=size, num_classes=10, **options)
    return randomize(model).eval()


def answers(model, images, **cast):
    """Logits, and the gradient of a weighted sum of them by all parameters; in float32 on the CPU."""
    device = images.device
    with torch.autocast(device.type, **cast) if cast else torch.enable_grad():
        logits = model(images)
    weights = torch.linspace(-1, 1, logits.shape[1], device=device)
    gradients = torch.autograd.grad((logits.float() * weights).sum(), list(model.parameters()))
    return logits.detach().float().cpu(), torch.cat([g.detach().float().flatten().cpu() for g in gradients])


def distance(found, expected):
    """|found - expected| / |expected|, in the Euclidean norm."""
    expected = expected.detach().double()
    return float((found.detach().double() - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------------------------------ training
# The two that take longest are the first and the last, so that processes that share the tests do not get both.


def train(folder, *words, wait=True):
    """`train_imagenet.py` on the digits under torchrun, one process: on a GPU by nccl."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    small = ["--model", "container_light_nano_32", "--workers", "0", "--output", str(folder / "run")]
    small += ["--epochs", "1", "--batch-size", "128", "--img-size", "16"] if NAME == "cpu" else ["--epochs", "2"]
    process = subprocess.Popen(
        [*launcher, str(ROOT / "train_imagenet.py"), *small, "--device", NAME, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    if not wait:
        return process
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def epochs(folder):
    with open(folder / "run" / "summary.csv") as file:
        return list(csv.DictReader(file))


def test_trains_stops_and_goes_on(tmp_path, device, record):
    """Told to stop in the middle of its first epoch, it saves, goes on from there, and ends as one that was not."""
    process = train(tmp_path, "--resume", "auto", "--save-steps", "1", wait=False)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(descendants(process.pid)[0], signal.SIGTERM)  # the trainer itself: torchrun's only child
    out, _ = process.communicate(timeout=120)
    assert "told to stop after 0 epochs" in out, out
    out = train(tmp_path, "--resume", "auto")
    assert re.search(r"going on after 0 epochs and \d+ steps", out), out
    rows = epochs(tmp_path)
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1 if NAME == "cpu" else 2)]
    assert record("top-1", float(rows[-1]["eval_top1"])) > (60 if device.type == "cuda" else 0)
    record("images/s", float(rows[-1]["images_per_second"]))


# ------------------------------------------------------------------------------------------------- the same answers


@pytest.mark.parametrize("name", ["container_light_nano", "container_nano", "container_mixer_mh"])
def test_compiled(name, device, record):
    """One graph, without a break; and bfloat16 under autocast beside float32."""
    torch._dynamo.reset()
    model, images = create(name, **TINY).to(device), torch.randn(4, 3, 64, 64, device=device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected, found = answers(model, images), answers(compiled, images)
    assert record("logits", distance(found[0], expected[0])) < 5e-5
    assert record("gradients", distance(found[1], expected[1])) < 2e-4
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        assert record("bfloat16", distance(compiled(images).float().cpu(), expected[0])) < 5e-2


def test_a_replayed_training_step(device, record):
    """A CUDA graph of a step trains as calls do, whoever else holds its tensors; on a CPU both are calls."""

    def make():
        torch.manual_seed(0)
        model = create("container_light_nano", **TINY).to(device).train()
        images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        targets = torch.arange(8, device=device) % model.num_classes
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=device.type == "cuda")

        def step():
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

        return model, measure.Graphed(step)

    weights = []
    for graph in (False, device.type == "cuda"):
        model, work = make()
        if graph:
            work.capture()  # after three calls
            torch.cuda.empty_cache()
        for _ in range(2 if graph else 5):
            work()
        weights.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]))
    assert record("weights", distance(weights[1], weights[0])) < 1e-3


@pytest.mark.parametrize("name", MEMBERS)
def test_float32(name, device, record):
    """Logits and gradients of every member; TensorFloat-32 would be off by 1e-3."""
    model, images = create(name), torch.randn(2, 3, 64, 64)
    logits, gradients = answers(model, images)
    found = answers(model.to(device), images.to(device))
    assert record("logits", distance(found[0], logits)) < 5e-5
    assert record("gradients", distance(found[1], gradients)) < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["container_light_nano", "container_nano", "container_pam"])
def test_autocast(name, dtype, device, record):
    """A type of 8 bits of precision is right to 1 or 2 %, one of 11 bits to 0.2 %."""
    bound = 5e-2 if dtype == torch.bfloat16 else 1e-2
    model, images = create(name).to(device), torch.randn(4, 3, 64, 64, device=device)
    logits, gradients = answers(model, images)
    found = answers(model, images, dtype=dtype)
    assert record("logits", distance(found[0], logits)) < bound
    assert record("gradients", distance(found[1], gradients)) < 3 * bound


@pytest.mark.parametrize("name", ["container_light_nano", "container_nano"])
def test_channels_last(name, device, record):
    model, images = create(name).to(device), torch.randn(4, 3, 64, 64, device=device)
    expected = answers(model, images)
    last = dict(memory_format=torch.channels_last)
    found = answers(model.to(**last), images.to(**last))
    assert record("logits", distance(found[0], expected[0])) < 5e-5
    assert record("gradients", distance(found[1], expected[1])) < 2e-4


@pytest.mark.parametrize("name", ["container_light", "container", "container_pam"])
@torch.no_grad()
def test_fused(name, device, record):
    """Exact in float32. In bfloat16 the errors of both are recorded, and both are those of the type."""
    model, images = create(name), torch.randn(4, 3, 64, 64, device=device)
    fused = container.fuse.fuse(model.to(device))
    if device.type == "cuda":
        assert any("_conv_forward" in vars(module) for module in fused.modules())  # by `as_linear`
    container.fuse.as_linear(fused)
    expected = model(images)
    assert record("float32", distance(fused(images), expected)) < 5e-5
    for key, one in (("bfloat16", model), ("fused bfloat16", fused)):
        half = one.bfloat16()(images.bfloat16()).float()
        assert record(key, distance(half, expected)) < 0.1


BACKENDS = {
    "cpu": {torch.float32: ["FLASH_ATTENTION"], torch.bfloat16: ["FLASH_ATTENTION"]},
    "cuda": {
        torch.float32: ["EFFICIENT_ATTENTION"],
        torch.bfloat16: ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"],
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_attention(dtype, device, record):
    """Every fused kernel takes an affinity's tokens as they come, forward and backward, and gives A(x) v."""
    attention = container.affinity.SelfAttention(64, 2).to(device)
    x, v = (torch.randn(2, 64, 28, 28, device=device).to(memory_format=torch.channels_last) for _ in range(2))
    expected = torch.einsum("bmij,bmdj->bmdi", attention.matrix(x), v.unflatten(1, (2, 32)).flatten(3))
    expected = expected.reshape(v.shape)
    attention, x, v = attention.to(dtype), x.to(dtype), v.to(dtype).requires_grad_()
    for name in BACKENDS[device.type][dtype]:
        with sdpa_kernel(getattr(SDPBackend, name)):
            y = attention(x, v)
            y.float().square().sum().backward()
        assert record(name, distance(y.float().cpu(), expected.cpu())) < (5e-5 if dtype == torch.float32 else 2e-2)
        assert v.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["container", "container_light"])
def test_memory_at_detection_sizes(name, device, record):
    """Forward and backward at 800 x 1344; a matrix of one head and block alone would be 16.8 GiB in float32."""
    sizes = [(400, 672), (800, 1344)] if device.type == "cuda" else [(64, 96), (128, 192)]
    model = create(name).to(device).train()
    peaks = []
    for size in sizes:
        images = torch.randn(2, 3, *size, device=device)

        def step(images=images):
            model(images).sum().backward()
            model.zero_grad()

        peaks.append(measure.peak_memory(step, device))
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        record(f"{size[0]} x {size[1]}", dict(MiB=peaks[-1] and peaks[-1] / 2**20, seconds=time.perf_counter() - start))
    if device.type == "cuda":
        assert peaks[1] < 4.5 * peaks[0]  # four times the tokens
        assert peaks[1] < 16 * 2**30


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_a_training_step_does_not_wait_for_the_gpu(device, amp):
    """By torch's own watch, with erasing and mixing; what a step has brought is read a step later."""
    join_group("cpu")  # of one: nothing is sent
    tiny = TINY if NAME == "cpu" else {}
    try:
        network = timm.create_model("container_light_nano", num_classes=10, **tiny).to(device)
        task = ClassificationTask(network, criterion_kwargs=dict(soft_targets=True), device=device, verbose=False)
        task.setup_ema(decay=0.9)
        compute = Compute(device, amp, channels_last=True)
        optimizer = create_optimizer_v2(network, opt="adamw", lr=1e-3, weight_decay=0.05, fused=True)
        scheduler, scaler = CosineLRScheduler(optimizer, 100, t_in_epochs=False), compute.scaler()
        erase, mixup = RandomErasing(1.0, mode="pixel", device=device), Mixup(0.8, 1.0, num_classes=10)
        batch = torch.randn(8, 3, 64, 64, device=device), torch.randint(0, 10, (8,), device=device)
        pending, losses = [], []

        def after_step(loss, norm, lr):
            if pending:
                losses.append(pending.pop().read()[0])
            pending.append(Agreement(loss, norm, scaler.scale(torch.ones((), device=device)), False))

        def train(steps):
            def prepare(images, targets):
                return mixup(erase(images.clone()), targets)

            batches = itertools.repeat(batch)
            train_one_epoch(task, batches, optimizer, scheduler, scaler, compute, prepare, after_step, steps, 2, 5.0)

        train(range(3))  # kernels are loaded, and measured, by the first
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        train(range(3, 8))
        assert len(losses) == 7 and all(math.isfinite(loss) for loss in losses)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()


@pytest.mark.parametrize("half", [False, True])
def test_memory_of_a_step_is_as_estimated(half, device, record):
    """What `--dry-run` says beside what a step of AdamW takes: the whole of it, weights and optimizer included."""
    batch, size = (64, 224) if device.type == "cuda" else (2, 64)
    model = timm.create_model("container_light_nano" if NAME == "cpu" else "container_light", drop_path_rate=0.1)
    expected = record("estimate, GiB", estimate(model, size, batch, half)["gib"])
    if device.type != "cuda":
        return  # a CPU's pages are other memory
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(images).float(), torch.arange(batch, device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = record("measured, GiB", (torch.cuda.max_memory_allocated() - before) / 2**30)
    assert 0.67 < found / expected < 1.5


def test_trains_in_half_precision_compiled(tmp_path, device, record):
    compiler = [] if device.type == "cuda" else ["eager"]
    train(tmp_path, "--amp", "bfloat16", "--channels-last", "--compile", *compiler)
    rows = epochs(tmp_path)
    assert record("top-1", float(rows[-1]["eval_top1"])) > (60 if device.type == "cuda" else 0)
    record("images/s", float(rows[-1]["images_per_second"]))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["args"]["amp"] == "bfloat16" and summary["args"]["device"].startswith(NAME)
