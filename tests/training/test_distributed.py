"""One process is a group of one, so every sampler of timm works in it."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from timm.data import create_loader

from container.training import Agreement, Digits, StopSignal, cores, describe_environment, join_group
from container.training.distributed import find_place


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


def agree(loss, norm, stop):
    return Agreement(loss, norm, torch.tensor(8.0), stop).read()


def test_agreement_of_one(group):
    assert agree(torch.tensor(2.5), torch.tensor(3.0), stop=False) == (2.5, 3.0, 8.0, False)
    assert agree(torch.tensor(2.5), torch.tensor(3.0), stop=True) == (2.5, 3.0, 8.0, True)


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
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_vote, args=(rank, tmp_path / "meet", queue)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    for answer in answers.values():
        assert answer[:2] == [(1.5, 1.0, 8.0, False), (1.0, 1.0, 8.0, True)]
        assert answer[2][0] != answer[2][0] and answer[3] == (1.0, float("inf"), 8.0, False)


LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", dict(SLURM_JOB_ID="7", SLURM_STEP_ID="0")),
    "mpirun": (
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
        dict(OMPI_COMM_WORLD_LOCAL_SIZE="2", MASTER_PORT="29611"),
    ),
    "others": ("RANK", "NONE", "WORLD_SIZE", dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29612")),
}


def _join(rank, launcher, queue):
    rank_name, local, world, more = LAUNCHERS[launcher]
    os.environ.update({rank_name: str(rank), local: str(rank), world: "2"}, **more)
    join_group("cpu")
    total = torch.ones(1)
    dist.all_reduce(total)
    queue.put((dist.get_rank(), dist.get_world_size(), total.item()))
    dist.destroy_process_group()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_of_any_launcher_are_one_group(launcher):
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_join, args=(rank, launcher, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    assert sorted(queue.get() for _ in processes) == [(0, 2, 2.0), (1, 2, 2.0)]
    for process in processes:
        process.join()


@pytest.mark.parametrize(
    "variables, place",
    [
        ({}, (0, 1, 0, 1)),
        (dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4"), (5, 8, 1, 4)),  # torchrun
        (dict(RANK="5", WORLD_SIZE="8"), (5, 8, 0, 1)),  # Kubernetes
        (
            dict(OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_RANK="1")
            | dict(OMPI_COMM_WORLD_LOCAL_SIZE="2"),
            (3, 4, 1, 2),
        ),
        (dict(PMI_RANK="3", PMI_SIZE="4", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2"), (3, 4, 1, 2)),
        (
            dict(SLURM_JOB_ID="7", SLURM_STEP_ID="0", SLURM_PROCID="6", SLURM_NTASKS="7", SLURM_LOCALID="0")
            | dict(SLURM_STEP_TASKS_PER_NODE="2(x3),1", SLURM_NODEID="3", SLURM_NNODES="4"),
            (6, 7, 0, 1),
        ),
        (
            dict(SLURM_JOB_ID="7", SLURM_STEP_ID="0", SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_LOCALID="1"),
            (1, 2, 1, 2),
        ),
        (dict(SLURM_JOB_ID="7", SLURM_NTASKS="8", SLURM_PROCID="0"), (0, 1, 0, 1)),  # a job's own script
    ],
)
def test_every_launcher_s_place(monkeypatch, tmp_path, variables, place):
    """For the group, the record of a run, the workers and their shared memory."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_place() == place
    assert describe_environment(torch.device("cpu"))["hardware"]["processes"] == place[1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr("container.training.loader._CPU_MAX", tmp_path / "none")
    assert cores() == 16 // place[3]


def test_what_makes_no_group_is_refused(monkeypatch):
    for name, value in dict(SLURM_PROCID="1", SLURM_NTASKS="8", SLURM_NNODES="2").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="8 processes on several machines: set MASTER_ADDR and MASTER_PORT"):
        join_group("cpu")
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # the script of a job, whose environment says how many tasks it may start
    join_group("cpu")
    assert dist.get_world_size() == 1
    dist.destroy_process_group()


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
