"""Fills a CONTAINER-LIGHT state dict, in the published checkpoint's own layout, with reproducible numbers.

The published checkpoint ("Container-Light" in the authors' model zoo, 82.3 % top-1) has no licence of its own, so it is
not here. Here are its layout, and what the authors' network answers for weights in that layout, computed with their
code in float32 on a CPU. A port that loads this checkpoint as it loads a real one, and gives the same answers, loads
the real one right.

    layout.json              every key of the published layout, in order, with its shape
    golden_light_seed0.npz   logits       (2, 1000)  evaluation, of `image_batch(0)`
                             stage1..4    (C_i,)     mean over batch and space of each stage's output
                             train_loss   ()         training (batch statistics), cross-entropy, targets [3, 7]
                             grad_norms   (K,)       norm of each parameter's gradient of that loss,
                             grad_keys    (K,)       and that parameter's key in the published layout

NumPy's legacy RandomState is used because its stream is frozen for good.
"""

import json
import zlib
from pathlib import Path

import numpy as np

LAYOUT = Path(__file__).with_name("layout.json")


def synthetic_state_dict(seed: int, layout: dict[str, list[int]] | None = None) -> dict[str, np.ndarray]:
    """Arrays for every key of the layout: fan-in scaled weights, and norm statistics away from 0 and 1."""
    layout = layout or json.loads(LAYOUT.read_text())
    state = {}
    for key, shape in layout.items():
        noise = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(tuple(shape))
        if key.endswith("num_batches_tracked"):
            array = np.zeros(shape, np.int64)
        elif key.endswith("running_var"):
            array = 1.0 + 0.5 * np.abs(noise)
        elif key.endswith("sa_weight"):
            array = noise
        elif len(shape) > 1:
            array = noise / np.sqrt(np.prod(shape[1:]))
        elif (".norm" in key and key.endswith("weight")) or key == "norm.weight":
            array = 1.0 + 0.2 * noise
        else:  # biases and running means
            array = 0.2 * noise
        state[key] = array if array.dtype == np.int64 else array.astype(np.float32)
    return state


def image_batch(seed: int, batch: int = 2, size: int = 224) -> np.ndarray:
    """Already-normalised images, (batch, 3, size, size) float32."""
    return np.random.RandomState(seed).standard_normal((batch, 3, size, size)).astype(np.float32)
