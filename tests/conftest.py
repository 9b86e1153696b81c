"""Fixtures shared by the tests, and the data that some of them need and the project does not ship."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import container  # noqa: F401  registers the models

ROOT = Path(__file__).parent.parent
# Data that cannot be committed for its licence or size; beside the checkout unless this variable names another place.
SHARED = Path(os.environ.get("CONTAINER_TEST_DATA", ROOT.parent / "shared"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one worker per core; more threads than cores make each other wait


def shared(name: str) -> Path:
    """The path of a shared file, or a skip that says what is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not in the test data folder (CONTAINER_TEST_DATA)")
    return path


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Moves every parameter and norm statistic away from its initial value, so that none can hide at 0 or 1."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * (0.3 / max(p[0].numel(), 1) ** 0.5))
        for name, b in module.named_buffers():
            if name.endswith("running_var"):
                b.mul_(1 + torch.rand_like(b))
            elif name.endswith("running_mean"):
                b.add_(0.3 * torch.randn_like(b))
    return module
