"""The equation, its gates at their ends, and the residual block."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize

from container import (
    Aggregation,
    Block,
    ConvexGate,
    DepthwiseConv,
    DoubleAttention,
    FreeGate,
    GlobalContext,
    SelfAttention,
    TokenMatrix,
)

DIM, GRID = 12, (4, 5)

CASES = {
    "attention": lambda: dict(dynamic=SelfAttention(DIM, 4)),
    "conv": lambda: dict(static=DepthwiseConv(DIM)),
    "mixer": lambda: dict(static=TokenMatrix(DIM, 1, GRID)),
    "light": lambda: dict(dynamic=SelfAttention(DIM, 4), static=DepthwiseConv(DIM), gate=ConvexGate()),
    "container": lambda: dict(dynamic=SelfAttention(DIM, 4), static=DepthwiseConv(DIM), gate=FreeGate()),
    "pam": lambda: dict(dynamic=SelfAttention(DIM, 4), static=TokenMatrix(DIM, 4, GRID)),
    "heads that do not divide each other": lambda: dict(
        dynamic=SelfAttention(DIM, 4), static=TokenMatrix(DIM, 6, GRID)
    ),
    "context": lambda: dict(dynamic=GlobalContext(DIM), static=DepthwiseConv(DIM), gate=FreeGate()),
    "double": lambda: dict(dynamic=DoubleAttention(DIM, 3), static=DepthwiseConv(DIM), gate=FreeGate()),
}


def build(name):
    aggregation = randomize(Aggregation(DIM, **CASES[name]())).double().eval()
    if aggregation.static is not None and hasattr(aggregation.static, "conv"):
        torch.nn.init.zeros_(aggregation.static.conv.bias)  # no part of the matrix
    return aggregation, torch.randn(2, DIM, *GRID, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equation(name):
    """Y = (alpha A(X) + beta A) V W with the matrix written out and the projections as plain matrix products."""
    aggregation, x = build(name)
    tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
    v = tokens @ aggregation.value.weight[:, :, 0, 0].T + aggregation.value.bias
    a = aggregation.matrix(x).expand(2, -1, -1, -1)
    heads = v.unflatten(-1, (a.shape[1], -1))  # (B, N, M, D)
    av = torch.einsum("bmij,bjmd->bimd", a, heads).flatten(2)
    y = av @ aggregation.proj.weight[:, :, 0, 0].T + aggregation.proj.bias
    torch.testing.assert_close(aggregation(x), y.transpose(1, 2).reshape(x.shape), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", [ConvexGate, FreeGate])
def test_gate_starts_at_one_half(gate):
    assert [t.item() for t in gate()()] == [0.5, 0.5]


@torch.no_grad()
def test_convex_gate_at_its_ends_gives_the_pure_cases():
    aggregation, x = build("light")
    for logit, pure in ((1e3, dict(dynamic=aggregation.dynamic)), (-1e3, dict(static=aggregation.static))):
        aggregation.gate.logit.fill_(logit)
        alone = Aggregation(DIM, **pure).double()
        alone.value, alone.proj = aggregation.value, aggregation.proj
        # Not bit by bit: a matrix product may round as its operands happen to lie in memory.
        torch.testing.assert_close(aggregation(x), alone(x), rtol=1e-13, atol=1e-13)
        assert torch.equal(
            aggregation.matrix(x),
            alone.matrix(x).repeat_interleave(DIM // alone.matrix(x).shape[1], 1).expand(2, -1, -1, -1),
        )


@torch.no_grad()
def test_free_gate_scales_each_affinity_alone():
    aggregation, x = build("container")
    aggregation.gate.alpha.fill_(2.0)
    aggregation.gate.beta.fill_(-3.0)
    expected = 2 * aggregation.dynamic.matrix(x).repeat_interleave(3, 1) - 3 * aggregation.static.matrix(x)
    torch.testing.assert_close(aggregation.matrix(x), expected)


@torch.no_grad()
def test_gate_scales_the_bias_of_a_convolution():
    aggregation, x = build("light")
    before = aggregation(x)
    aggregation.static.conv.bias.copy_(torch.randn(DIM))
    _, beta = aggregation.gate()
    expected = F.conv2d((beta * aggregation.static.conv.bias)[None, :, None, None], aggregation.proj.weight)
    torch.testing.assert_close(aggregation(x) - before, expected.expand_as(x))


@pytest.mark.parametrize("name", ["light", "container"])
@torch.no_grad()
def test_gated_sum_is_in_the_type_of_autocast(name):
    """The scalars are float32 parameters; a map of theirs would be twice as large."""
    aggregation, x = build(name)
    aggregation, x = aggregation.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert aggregation.mix(x, aggregation.value(x)).dtype == torch.bfloat16


@torch.no_grad()
def test_block_is_the_sum_of_its_residuals():
    aggregation, x = build("light")
    block = randomize(Block(DIM, aggregation, mlp_ratio=2)).double().eval()

    def norm(n, x):
        scale = n.weight / (n.running_var + n.eps).sqrt()
        return x * scale[:, None, None] + (n.bias - n.running_mean * scale)[:, None, None]

    y = x + F.conv2d(x, block.pos_conv.weight, block.pos_conv.bias, padding=1, groups=DIM)
    y = y + aggregation(norm(block.norm1, y))
    hidden = F.gelu(F.conv2d(norm(block.norm2, y), block.mlp.fc1.weight, block.mlp.fc1.bias))
    y = y + F.conv2d(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), y)


@torch.no_grad()
def test_drop_path_drops_aggregation_and_mlp_but_not_position():
    aggregation, x = build("light")
    block = Block(DIM, aggregation, drop_path=1 - 1e-9).double().train()
    torch.testing.assert_close(block(x), x + block.pos_conv(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(), "needs a dynamic affinity, a static one, or both"),
        (dict(static=DepthwiseConv(DIM), gate=ConvexGate()), "a gate mixes two affinities; only one is given"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Aggregation(DIM, **arguments)
