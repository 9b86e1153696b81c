"""The loop, against the same written out plainly."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask
from torch.utils._python_dispatch import TorchDispatchMode

from container.training import Compute, evaluate, join_group, train_one_epoch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def group():
    join_group("cpu")
    yield
    dist.destroy_process_group()


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.randint(0, 10, (4,), generator=generator))
        for _ in range(count)
    ]


def model():
    torch.manual_seed(1)
    return timm.create_model("container_light_nano_32", num_classes=10)


def train(
    network, data, amp="none", accum=1, after_step=lambda *_: None, prepare=lambda *it: it, opt="adamw", **options
):
    task = ClassificationTask(network, device=CPU, verbose=False)
    task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(network, opt=opt, lr=1e-3, weight_decay=0.05, fused=True)
    compute = Compute(CPU, amp)
    scheduler = CosineLRScheduler(optimizer, 100, t_in_epochs=False)
    steps = range(10, 10 + len(data) // accum)
    train_one_epoch(
        task, iter(data), optimizer, scheduler, compute.scaler(), compute, prepare, after_step, steps, accum, **options
    )
    return task


@pytest.mark.parametrize("accum, clip_grad", [(1, None), (2, None), (2, 0.1)])
def test_the_plain_loop(accum, clip_grad):
    """Without scaler and fused kernels. By SGD: where a gradient is 0 but for rounding, Adam steps by its sign."""
    data, told = batches(4), []
    task = train(model(), data, accum=accum, clip_grad=clip_grad, after_step=lambda *it: told.append(it), opt="sgd")
    plain = model().train()
    average = copy.deepcopy(plain)
    optimizer = create_optimizer_v2(plain, opt="sgd", lr=1e-3, weight_decay=0.05, foreach=False)
    scheduler = CosineLRScheduler(optimizer, 100, t_in_epochs=False)
    for step in range(4 // accum):
        losses = []
        for images, targets in data[step * accum : (step + 1) * accum]:
            losses.append(torch.nn.functional.cross_entropy(plain(images), targets))
        loss = sum(losses) / accum
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
        if clip_grad is not None:
            for p in plain.parameters():
                p.grad.mul_(min(1, clip_grad / norm.item()))
        lr = optimizer.param_groups[0]["lr"]
        assert [float(value) for value in told[step]] == pytest.approx([loss.item(), norm.item(), lr], rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, now in zip(average.state_dict().values(), plain.state_dict().values()):
                mean.copy_(0.5 * mean + 0.5 * now)
        scheduler.step_update(10 + step + 1)
    for ours, theirs in ((task.get_eval_model(), plain), (task.get_eval_model(ema=True), average)):
        for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
            if a.is_floating_point():
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("amp", ["none", "bfloat16", "float16"])
def test_a_gradient_that_is_not_finite_changes_no_weight(amp):
    def spoil(images, targets):
        network.head.fc.weight.register_hook(lambda gradient: gradient * torch.inf)
        return images, targets

    network, norms = model(), []
    before = {key: p.clone() for key, p in network.named_parameters()}
    train(network, batches(1), amp, prepare=spoil, after_step=lambda loss, norm, _: norms.append((loss, norm)))
    assert all(torch.equal(p, before[key]) for key, p in network.named_parameters())
    assert norms[0][0].isfinite() and not norms[0][1].isfinite()


class Waits(TorchDispatchMode):
    """Collects the operations for which a host has to wait for its GPU: those whose result it needs."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique")):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_a_step_waits_for_nothing(amp):
    """On a CPU, by the operations that would wait on a GPU; tests/test_gpu.py asks torch itself."""
    with Waits() as waits:
        torch.ones(1).item()
        assert waits.found.pop().startswith("aten._local_scalar_dense")
        train(model(), batches(2), amp, accum=2, clip_grad=1.0)
    assert not waits.found


def test_both_weights_are_evaluated_on_the_same_batches():
    task, read = train(model(), batches(3)), []

    def loader():
        for images, targets in batches(2):
            read.append(len(images))
            yield images, torch.where(targets == 0, -1, targets)

    found = evaluate(task, loader(), Compute(CPU))
    assert read == [4, 4]
    for prefix, ema in (("", False), ("ema_", True)):
        logits, targets = [], []
        for images, some in batches(2):
            with torch.no_grad():
                logits.append(task.get_eval_model(ema=ema).eval()(images)[some > 0])
            targets.append(some[some > 0])
        logits, targets = torch.cat(logits), torch.cat(targets)
        assert found["images"] == len(targets) < 8
        assert found[f"{prefix}loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item())
        assert found[f"{prefix}top1"] == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item())
