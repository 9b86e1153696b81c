"""CONTAINER-LIGHT a second time, from the description of the release: functions over a state dict in its own layout.

No module, no timm, nothing from the package: an independent route to the same numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DEPTHS, DIMS, PATCHES, RATIOS, HEADS = (3, 4, 8, 3), (64, 128, 320, 512), (4, 2, 2, 2), (8, 8, 4, 4), 16


def layout() -> dict[str, tuple[int, ...]]:
    """Every key of the released checkpoint with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, per_group: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, per_group, kernel, kernel)
        shapes[f"{name}.bias"] = (out,)

    def batch_norm(name: str, dim: int) -> None:
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{key}"] = (dim,)
        shapes[f"{name}.num_batches_tracked"] = ()

    for i, (depth, dim, patch, ratio) in enumerate(zip(DEPTHS, DIMS, PATCHES, RATIOS), start=1):
        conv(f"patch_embed{i}.proj", dim, 3 if i == 1 else DIMS[i - 2], patch)
        shapes[f"patch_embed{i}.norm.weight"] = shapes[f"patch_embed{i}.norm.bias"] = (dim,)
        for j in range(depth):
            block = f"blocks{i}.{j}"
            conv(f"{block}.pos_embed", dim, 1, 3)
            batch_norm(f"{block}.norm1", dim)
            conv(f"{block}.conv1", 3 * dim if i == 4 else dim, dim, 1)
            conv(f"{block}.conv2", dim, dim, 1)
            conv(f"{block}.conv" if i == 4 else f"{block}.attn", dim, 1, 5)
            batch_norm(f"{block}.norm2", dim)
            conv(f"{block}.mlp.fc1", ratio * dim, dim, 1)
            conv(f"{block}.mlp.fc2", dim, ratio * dim, 1)
            if i == 4:
                shapes[f"{block}.sa_weight"] = (1,)
    batch_norm("norm", DIMS[-1])
    shapes["head.weight"], shapes["head.bias"] = (1000, DIMS[-1]), (1000,)
    return shapes


def random_state(seed: int) -> dict[str, Tensor]:
    """A checkpoint of random numbers in the released layout, every one of which changes the network's answer."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in layout().items():
        noise = torch.randn(shape, generator=generator)
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.long)
        elif key.endswith("running_var"):
            state[key] = 1 + noise.abs()
        elif len(shape) > 1:
            state[key] = noise / noise[0].numel() ** 0.5
        elif "norm" in key and key.endswith("weight"):
            state[key] = 1 + 0.3 * noise
        else:
            state[key] = 0.3 * noise
    return state


def forward(state: dict[str, Tensor], x: Tensor, train: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Logits and the four stages' maps; `train` uses the batch's statistics."""

    def batch_norm(name: str, x: Tensor) -> Tensor:
        if train:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        else:
            mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def conv(name: str, x: Tensor, **kwargs) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **kwargs)

    maps = []
    for i, (depth, dim, patch) in enumerate(zip(DEPTHS, DIMS, PATCHES), start=1):
        x = conv(f"patch_embed{i}.proj", x, stride=patch)
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        weight, bias = state[f"patch_embed{i}.norm.weight"], state[f"patch_embed{i}.norm.bias"]
        x = (x - mean) / (var + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]
        for j in range(depth):
            block = f"blocks{i}.{j}"
            x = x + conv(f"{block}.pos_embed", x, padding=1, groups=dim)
            y = conv(f"{block}.conv1", batch_norm(f"{block}.norm1", x))
            if i < 4:
                y = conv(f"{block}.attn", y, padding=2, groups=dim)
            else:
                q, k, v = y.flatten(2).unflatten(1, (3, HEADS, dim // HEADS)).unbind(1)  # (B, heads, D, N)
                attention = torch.softmax(q.transpose(-2, -1) @ k * (dim // HEADS) ** -0.5, dim=-1)
                dynamic = (v @ attention.transpose(-2, -1)).reshape(x.shape)
                gate = torch.sigmoid(state[f"{block}.sa_weight"])
                static = conv(f"{block}.conv", v.reshape(x.shape), padding=2, groups=dim)
                y = gate * dynamic + (1 - gate) * static
            x = x + conv(f"{block}.conv2", y)
            x = x + conv(f"{block}.mlp.fc2", F.gelu(conv(f"{block}.mlp.fc1", batch_norm(f"{block}.norm2", x))))
        maps.append(x)
    return F.linear(batch_norm("norm", x).mean((2, 3)), state["head.weight"], state["head.bias"]), maps
