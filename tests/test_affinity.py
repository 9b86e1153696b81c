"""One matrix by three routes: the kernel (`forward`), the formula (`matrix`), and a one-hot probe of the kernel."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from container import DepthwiseConv, DoubleAttention, GlobalContext, SelfAttention, TokenMatrix

DIM = 8
GRIDS = [(5, 5), (4, 7), (6, 3)]

AFFINITIES = {
    "attention": lambda grid: SelfAttention(DIM, 4),
    "attention, plain": lambda grid: unfused(SelfAttention(DIM, 2)),
    "conv 5x5": lambda grid: DepthwiseConv(DIM),
    "conv 3x3": lambda grid: DepthwiseConv(DIM, kernel_size=3),
    "conv 3x3, dilated": lambda grid: DepthwiseConv(DIM, kernel_size=3, dilation=2),
    "matrix": lambda grid: TokenMatrix(DIM, 1, grid),
    "matrix per head": lambda grid: TokenMatrix(DIM, 4, grid),
    "matrix of rank 3": lambda grid: TokenMatrix(DIM, 2, grid, rank=3),
    "context": lambda grid: GlobalContext(DIM),
    "double attention": lambda grid: DoubleAttention(DIM, 3),
}
cases = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
every = pytest.mark.parametrize("name", AFFINITIES)


def unfused(attention):
    attention.fused_attn = False
    return attention


def build(name, grid, batch=2):
    affinity = randomize(AFFINITIES[name](grid)).double().eval()
    return affinity, torch.randn(batch, DIM, *grid, dtype=torch.float64)


def read(affinity, x, v):
    """A(x) v without the bias."""
    return affinity(x, v) if affinity.bias is None else affinity(x, v) - affinity.bias[:, None, None]


def probe(affinity, x):
    """The matrix of every channel, column by column: the answer to a value map that is one at a single token."""
    tokens = x[0, 0].numel()
    columns = [
        read(affinity, x, e.view(1, 1, *x.shape[-2:]).expand_as(x)).flatten(2) for e in torch.eye(tokens, dtype=x.dtype)
    ]
    return torch.stack(columns, dim=-1)  # (B, C, N, N)


@every
@cases
@torch.no_grad()
def test_kernel_equals_formula(name, grid):
    affinity, x = build(name, grid)
    v = torch.randn_like(x)
    heads = affinity.matrix(x)
    assert heads.shape[1] == affinity.num_heads
    expected = torch.einsum(
        "bmij,bmdj->bmdi", heads.expand(2, -1, -1, -1), v.view(2, affinity.num_heads, -1, v[0, 0].numel())
    )
    torch.testing.assert_close(read(affinity, x, v), expected.reshape(v.shape), rtol=1e-10, atol=1e-12)


@every
@cases
@torch.no_grad()
def test_probe_equals_formula(name, grid):
    affinity, x = build(name, grid)
    heads = affinity.matrix(x).expand(2, -1, -1, -1)
    expected = heads.repeat_interleave(DIM // heads.shape[1], dim=1)
    torch.testing.assert_close(probe(affinity, x), expected, rtol=1e-10, atol=1e-12)


@every
def test_gradients(name):
    affinity, x = build(name, (3, 2), batch=1)
    x.requires_grad_()
    v = torch.randn_like(x, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: affinity(x, v), (x, v))


@every
@torch.no_grad()
def test_no_image(name):
    affinity, x = build(name, (3, 2), batch=0)
    assert affinity(x, x).shape == (0, DIM, 3, 2)


@every
@torch.no_grad()
def test_readers_are_all_that_reads_x(name):
    """A scaling of x is undone in the weights of what the affinity says reads it."""
    affinity, x = build(name, (4, 5))
    v, expected = torch.randn_like(x), None
    expected = affinity(x, v)
    for layer in affinity.readers():
        layer.weight.div_(3)
    torch.testing.assert_close(affinity(3 * x, v), expected)


@every
@torch.no_grad()
def test_scaled(name):
    affinity, x = build(name, (4, 5))
    v, matrix, bias = torch.randn_like(x), affinity.matrix(x).clone(), affinity.bias
    bias = None if bias is None else bias.clone()
    product = read(affinity, x, v)
    if affinity.scale_(-2.5, 7.0):
        torch.testing.assert_close(affinity.matrix(x), -2.5 * matrix)
        torch.testing.assert_close(read(affinity, x, v), -2.5 * product)
        assert bias is None or torch.equal(affinity.bias, 7.0 * bias)
    else:
        assert isinstance(affinity, (SelfAttention, GlobalContext, DoubleAttention))  # computed, and no parameter
        assert torch.equal(affinity.matrix(x), matrix)


class Allocations(TorchDispatchMode):
    """Notes the largest tensor that is made, and how many are copied."""

    largest, clones = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
            self.clones += "clone" in str(func) or "copy" in str(func)
        return out


@pytest.mark.parametrize("rank", [None, 8])
@torch.no_grad()
def test_a_matrix_is_not_copied_for_each_image(rank):
    affinity, v = TokenMatrix(DIM, 4, (14, 14), rank), torch.randn(16, DIM, 14, 14)
    with Allocations() as seen:
        affinity(v, v)
    assert seen.largest <= max(v.numel(), 16 * 8 * DIM)  # a matrix for each image would be 16 * 4 * 196 * 196


@torch.no_grad()
def test_attention_does_not_copy_channels_last_maps():
    affinity = SelfAttention(DIM, 2).to(memory_format=torch.channels_last)
    x, v = (torch.randn(2, DIM, 8, 8).to(memory_format=torch.channels_last) for _ in range(2))
    with Allocations() as seen:
        affinity(x, v)
    assert seen.clones == 0


@pytest.mark.parametrize("name", ["attention", "double attention"])
@cases
@torch.no_grad()
def test_attention_rows_sum_to_one(name, grid):
    affinity, x = build(name, grid)
    rows = torch.ones(2, affinity.num_heads, x[0, 0].numel(), dtype=x.dtype)
    torch.testing.assert_close(affinity.matrix(x).sum(-1), rows)


@torch.no_grad()
def test_double_attention_gathers_and_distributes():
    """Summary by summary and token by token, as A^2-Nets has it."""
    affinity, x = build("double attention", (4, 3))
    v = torch.randn_like(x)
    q, k, values = (t.flatten(2) for t in (affinity.query(x), affinity.key(x), v))
    for b in range(2):
        summaries = [sum(w * values[b, :, j] for j, w in enumerate(k[b, r].softmax(0))) for r in range(3)]
        for i in range(12):
            expected = sum(w * s for w, s in zip(q[b, :, i].softmax(0), summaries, strict=True))
            torch.testing.assert_close(affinity(x, v).flatten(2)[b, :, i], expected)
    with pytest.raises(ValueError, match="rank 0 is not at least 1"):
        DoubleAttention(DIM, 0)


@cases
@torch.no_grad()
def test_attention_is_multihead_attention(grid):
    affinity, x = build("attention", grid)
    reference = nn.MultiheadAttention(DIM, 4, batch_first=True, dtype=torch.float64)
    value = torch.randn(DIM, DIM, dtype=torch.float64)
    reference.in_proj_weight.copy_(torch.cat((affinity.qk.weight[:, :, 0, 0], value)))
    reference.in_proj_bias.copy_(torch.cat((affinity.qk.bias, torch.zeros(DIM, dtype=torch.float64))))
    reference.out_proj.weight.copy_(torch.eye(DIM))
    reference.out_proj.bias.zero_()
    tokens = x.flatten(2).transpose(1, 2)
    expected, _ = reference(tokens, tokens, tokens, need_weights=False)
    actual = affinity(x, F.conv2d(x, value[:, :, None, None])).flatten(2).transpose(1, 2)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kernel, dilation", [(5, 1), (3, 1), (3, 2)])
@cases
@torch.no_grad()
def test_conv_vanishes_outside_its_window_and_holds_its_kernel(grid, kernel, dilation):
    affinity = DepthwiseConv(DIM, kernel, dilation).double()
    matrix = affinity.matrix(torch.zeros(1, DIM, *grid))[0]
    tokens = list(itertools.product(range(grid[0]), range(grid[1])))
    reach = kernel // 2
    for (i, (yi, xi)), (j, (yj, xj)) in itertools.product(enumerate(tokens), enumerate(tokens)):
        dy, dx = (yj - yi) / dilation, (xj - xi) / dilation
        inside = dy == int(dy) and dx == int(dx) and max(abs(dy), abs(dx)) <= reach
        weight = affinity.conv.weight[:, 0, int(dy) + reach, int(dx) + reach] if inside else torch.zeros(DIM).double()
        assert torch.equal(matrix[:, i, j], weight)


@pytest.mark.parametrize("name", ["conv 5x5", "matrix", "matrix per head", "matrix of rank 3"])
@torch.no_grad()
def test_static_affinity_ignores_x(name):
    affinity, x = build(name, (5, 5))
    v = torch.randn_like(x)
    assert torch.equal(affinity(x, v), affinity(torch.randn_like(x), v))
    assert torch.equal(affinity.matrix(x), affinity.matrix(torch.randn_like(x)))


@cases
@torch.no_grad()
def test_ranks(grid):
    affinity, x = build("context", grid)
    assert (torch.linalg.matrix_rank(affinity.matrix(x)) == 1).all()
    affinity, x = build("double attention", grid)
    assert (torch.linalg.matrix_rank(affinity.matrix(x)) == 3).all()
    affinity, x = build("matrix of rank 3", grid)
    assert (torch.linalg.matrix_rank(affinity.matrix(x)) == 3).all()


@torch.no_grad()
def test_attention_drops_entries_in_training_only():
    affinity = SelfAttention(DIM, 2, attn_drop=0.5)
    x = torch.randn(1, DIM, 4, 4)
    assert torch.equal(affinity.eval()(x, x), affinity(x, x))
    affinity.train()
    assert not torch.equal(affinity(x, x), affinity(x, x))
    # A dropped entry is made up for by the others: on average nothing changes.
    many = x.expand(4000, -1, -1, -1)
    mean = affinity(many, many).mean(0, keepdim=True)
    torch.testing.assert_close(mean, affinity.eval()(x, x), rtol=0, atol=0.1)


@pytest.mark.parametrize("rank, std", [(None, 0.02), (1, 0.02), (16, 0.02)])
def test_token_matrix_starts_at_one_scale_whatever_its_rank(rank, std):
    matrix = TokenMatrix(DIM, DIM, (12, 12), rank).matrix(torch.empty(0))
    torch.testing.assert_close(matrix.std().item(), std, rtol=0.1, atol=0)


@pytest.mark.parametrize("rank", [None, 4])
@torch.no_grad()
def test_token_matrix_resampled(rank):
    """A token goes on reading the same total weight when it has more tokens to read."""
    affinity = TokenMatrix(DIM, 2, (8, 8), rank)
    affinity.left.fill_(1 / 64 if rank is None else 1 / 8)
    if rank is not None:
        affinity.right.fill_(1 / 32)
    affinity.left.requires_grad_(False)
    affinity.set_input_size((12, 16))
    assert affinity.grid == affinity.left.shape[1:3] == (12, 16) and not affinity.left.requires_grad
    v = torch.ones(1, DIM, 12, 16)
    torch.testing.assert_close(affinity(v, v), v)


@torch.no_grad()
def test_token_matrix_resampled_is_the_same_affinity_on_another_grid():
    """A matrix that is a formula of positions in the image (a token looks up and to the left) is that formula again."""

    def formula(grid):
        y = ((torch.arange(grid[0]) + 0.5) / grid[0]).repeat_interleave(grid[1])
        x = ((torch.arange(grid[1]) + 0.5) / grid[1]).repeat(grid[0])
        dy, dx = y[None] - y[:, None] + 0.2, x[None] - x[:, None] + 0.1
        return torch.exp(-(dy**2) / 0.1 - dx**2 / 0.3) / len(y)

    affinity = TokenMatrix(DIM, 2, (10, 8))
    affinity.left.copy_(formula((10, 8)).unflatten(0, (10, 8)))
    affinity.set_input_size((12, 16))
    expected = formula((12, 16)).expand(1, 2, -1, -1)
    torch.testing.assert_close(affinity.matrix(torch.empty(0)), expected, rtol=0, atol=0.1 * expected.max().item())
    correlation = torch.corrcoef(torch.stack((affinity.matrix(torch.empty(0)).flatten(), expected.flatten())))[0, 1]
    assert correlation > 0.999


@torch.no_grad()
def test_token_matrix_resampled_to_its_own_grid_is_unchanged():
    affinity, x = build("matrix of rank 3", (4, 7))
    before = affinity.matrix(x).clone()
    affinity.set_input_size((4, 7))
    assert torch.equal(affinity.matrix(x), before)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: SelfAttention(100, 16), "dim 100 is not divisible by num_heads 16"),
        (lambda: SelfAttention(64, 0), "dim 64 is not divisible by num_heads 0"),
        (lambda: TokenMatrix(100, 16, (7, 7)), "dim 100 is not divisible by num_heads 16"),
        (lambda: TokenMatrix(64, 2, (7, 7), rank=50), "rank 50 is not between 1 and the 49 tokens"),
        (lambda: DepthwiseConv(64, kernel_size=4), "kernel_size 4 is even"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("grid, message", [((7, 8), "7 rows of tokens for a TokenMatrix of 8"), ((8, 9), "9 columns")])
def test_token_matrix_on_a_wrong_grid(grid, message):
    x = torch.randn(1, DIM, *grid)
    with pytest.raises(AssertionError, match=message):
        TokenMatrix(DIM, 2, (8, 8))(x, x)
