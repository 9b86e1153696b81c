"""One process or many: the same way to train."""

import os

import torch
import torch.distributed as dist

__all__ = ["join_group"]


def join_group(device: str) -> torch.device:
    """Joins the group of processes that torchrun started; a process that was started alone is a group of one.

    So samplers, repeated augmentation among them, need no second way for a single process.

    Args:
        device: 'cpu', 'cuda' or 'cuda:N'; under torchrun each process takes the GPU of its local rank.

    Returns:
        This process's device.
    """
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return torch.device(device)
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device)
