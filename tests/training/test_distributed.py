"""One process is a group of one, so every sampler of timm works in it."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from timm.data import create_loader

from container.training import Digits, StopSignal, agree, join_group


@pytest.fixture
def group():
    assert join_group("cpu") == torch.device("cpu")
    yield
    dist.destroy_process_group()


def test_group_of_one(group):
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)


def test_repeated_augmentation_covers_the_data_in_one_process(group):
    """An epoch is as many samples as there are images, of a third of them; epochs differ, and reach all."""
    digits = Digits(train=True)
    loader = create_loader(
        digits, 32, 32, is_training=True, num_aug_repeats=3, num_workers=0, distributed=True, device=torch.device("cpu")
    )
    seen = set()
    for epoch in range(60):
        loader.sampler.set_epoch(epoch)
        indices = list(loader.sampler)
        assert len(indices) == 1437 // 256 * 256 and len(set(indices)) == -(-len(indices) // 3)
        seen.update(indices)
    assert len(seen) == len(digits)


def test_agreement_of_one(group):
    assert agree(torch.tensor(2.5), torch.tensor(3.0), stop=False) == (2.5, 3.0, False)
    assert agree(torch.tensor(2.5), torch.tensor(3.0), stop=True) == (2.5, 3.0, True)


def _vote(rank, path, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    one = torch.tensor(1.0)
    answers = [
        agree(torch.tensor(1.0 + rank), one, stop=False),
        agree(one, one, stop=rank == 1),
        agree(torch.tensor(float("nan") if rank else 1.0), one, stop=False),
        agree(one, torch.tensor(float("inf") if rank else 1.0), stop=False),
    ]
    queue.put((rank, answers))
    dist.destroy_process_group()


def test_agreement_of_two(tmp_path):
    """The means; one that was told to stop stops both; one whose loss or gradient is not finite tells the other."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_vote, args=(rank, tmp_path / "meet", queue)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    for answer in answers.values():
        assert answer[:2] == [(1.5, 1.0, False), (1.0, 1.0, True)]
        assert answer[2][0] != answer[2][0] and answer[3] == (1.0, float("inf"), False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_the_first_signal_counts_and_none_that_follows_ends_the_process(name):
    """As Slurm, torchrun and a terminal send them together; only a second Ctrl-C of a person is one more."""
    number, seen = getattr(signal, name), []
    before = {n: signal.signal(n, lambda n, _: seen.append(n)) for n in (number, signal.SIGTERM, signal.SIGINT)}
    try:
        with StopSignal() as stop:
            assert stop.received is None
            for other in (number, number, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), other)
                assert stop.received == number and not seen
            time.sleep(1.1)
            os.kill(os.getpid(), number)
            assert seen == ([signal.SIGINT] if number == signal.SIGINT else [])
        seen.clear()
        os.kill(os.getpid(), number)
        assert seen == [number]
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
