"""Pictures show the rows of the explicit matrices, and are the same each time."""

import math

import numpy as np
import pytest
import timm
import torch
from conftest import randomize
from PIL import Image
from test_affinity import AFFINITIES, DIM, build

from benchmarks.measure import peak_memory
from container import figures
from container.__main__ import main
from container.affinity import DepthwiseConv, SelfAttention
from container.aggregation import Aggregation, ConvexGate, FreeGate

GRID = (5, 7)
TOKENS = [(0, 0), (2, 3), (4, 6), (4, 0)]


def image(height=64, width=64):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def of_tokens(matrix, tokens=TOKENS):
    """(1, M, N, N) -> (tokens, M, H, W)."""
    index = torch.tensor([row * GRID[1] + column for row, column in tokens])
    return matrix[0, :, index].transpose(0, 1).unflatten(-1, GRID)


@pytest.mark.parametrize("name", AFFINITIES)
def test_rows_are_those_of_the_matrix(name):
    affinity, x = build(name, GRID, batch=1)
    found = figures.rows(affinity, affinity.num_heads, x, TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(found, of_tokens(affinity.matrix(x)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", [ConvexGate, FreeGate, lambda: None])
@pytest.mark.parametrize("static", ["conv 5x5", "matrix per head"])
def test_mixed_rows_are_those_of_the_mixed_matrix(static, gate):
    aggregation = Aggregation(DIM, SelfAttention(DIM, 2), AFFINITIES[static](GRID), gate())
    aggregation = randomize(aggregation).double()
    x = torch.randn(1, DIM, *GRID, dtype=torch.float64)
    with torch.no_grad():
        expected = of_tokens(aggregation.matrix(x))
    found = figures.rows(aggregation.mix, expected.shape[1], x, TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_row_of_a_convolution_is_its_kernel():
    conv = DepthwiseConv(DIM, 5)
    row = figures.rows(conv, DIM, torch.randn(1, DIM, 9, 9), [(4, 4)])[0]
    assert torch.equal(row[:, 2:7, 2:7], conv.conv.weight[:, 0])
    assert row.abs().sum() == row[:, 2:7, 2:7].abs().sum()


def test_at_the_gates_ends_the_pure_cases_are_drawn():
    model = randomize(timm.create_model("container_light_nano")).eval()
    for logit, pure in ((1e3, "dynamic"), (-1e3, "static")):
        for module in model.modules():
            if isinstance(module, ConvexGate):
                module.logit.data.fill_(logit)
        view = figures.look(model, image(), (20, 40))[-1]
        torch.testing.assert_close(view.rows["mixed"], view.rows[pure])


def test_rows_need_no_whole_matrix():
    """16,384 tokens: a matrix of one head would take a GiB."""
    if peak_memory(lambda: None, torch.device("cpu")) is None:
        pytest.skip("this system does not tell a process's peak of resident pages")
    affinity, x = SelfAttention(16, 1), torch.randn(1, 16, 128, 128)
    peak = peak_memory(lambda: figures.rows(affinity, 1, x, [(0, 0), (64, 64)]), x.device)
    assert peak < 2**28


def test_entropy():
    one = torch.zeros(1, 1, *GRID)
    one[..., 2, 3] = -5.0  # a weight's sign does not matter
    assert figures.entropy(one).item() == 0
    assert figures.entropy(torch.full((1, 1, *GRID), 0.3)).item() == pytest.approx(math.log2(35))
    p = torch.rand(4, 3, *GRID)
    q = (p / p.sum((-2, -1), keepdim=True)).double()
    torch.testing.assert_close(figures.entropy(p), -(q * q.log2()).sum((-2, -1)), rtol=1e-6, atol=0)
    assert figures.entropy(torch.zeros(1, 1, *GRID)).item() == 0


def test_reach():
    row = torch.zeros(2, 1, *GRID)
    row[0, 0, 0, 0], row[0, 0, 3, 4], row[1, 0, 4, 6] = 1.0, -3.0, 2.0
    found = figures.reach(row, [(0, 0), (4, 6)], stride=8)
    assert found.tolist() == [[8 * 5 * 3 / 4], [0.0]]


def test_gates():
    assert set(figures.gates(timm.create_model("container_nano")).values()) == {(0.5, 0.5)}
    light = figures.gates(timm.create_model("container_light_nano"))
    assert list(light.values()) == [(0.0, 1.0)] * 11 + [(0.5, 0.5)] * 2
    assert set(figures.gates(timm.create_model("container_attention")).values()) == {(1.0, 0.0)}
    assert set(figures.gates(timm.create_model("container_pam")).values()) == {(1.0, 1.0)}


def test_look_at_every_block():
    """On an image that is not square, against the matrices of the same maps."""
    model = randomize(timm.create_model("container_nano")).eval()
    maps = []
    for module in model.modules():
        if isinstance(module, Aggregation):
            module.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0].detach()))
    views = figures.look(model, image(96, 65), (64, 95), samples=2)
    assert len(views) == len(maps) == 13 and [view.stride for view in views] == [4] * 2 + [8] * 3 + [16] * 6 + [32] * 2
    for view, x in zip(views, maps):
        aggregation = model.get_submodule(view.name)
        assert view.grid == x.shape[-2:] and view.token == (95 // view.stride, 64 // view.stride)
        with torch.no_grad():
            matrices = dict(
                mixed=aggregation.matrix(x), static=aggregation.static.matrix(x), dynamic=aggregation.dynamic.matrix(x)
            )
        for kind, matrix in matrices.items():
            row = matrix[0, :, view.token[0] * view.grid[1] + view.token[1]].unflatten(-1, view.grid)
            assert (view.rows[kind] - row.abs().mean(0)).abs().max() < 1e-4 * row.abs().max()
            assert view.entropy[kind].shape == view.reach[kind].shape == (matrix.shape[1],)
            assert (view.entropy[kind] <= math.log2(matrix.shape[-1]) + 1e-6).all()


@pytest.mark.parametrize("pixel", [(64, 0), (0, -1)])
def test_pixel_outside(pixel):
    with pytest.raises(ValueError, match=r"is not in the image of 64 x 64"):
        figures.look(timm.create_model("container_light_nano").eval(), image(), pixel)


def test_models_that_cannot_be_looked_at():
    with pytest.raises(ValueError, match="call eval"):
        figures.look(timm.create_model("container_light_nano"), image(), (0, 0))
    with pytest.raises(ValueError, match="ResNet has no affinities"):
        figures.look(timm.create_model("resnet10t").eval(), image(), (0, 0))
    with pytest.raises(ValueError, match=r"token \(5, 0\) is outside the 5 x 7 grid"):
        figures.rows(DepthwiseConv(DIM), DIM, torch.randn(1, DIM, *GRID), [(5, 0)])
    with pytest.raises(ValueError, match=r"of one map"):
        figures.rows(DepthwiseConv(DIM), DIM, torch.randn(2, DIM, *GRID), [(0, 0)])


# ---------------------------------------------------------------------------------------------------------- pictures

NAMES = ["affinities.png", "gates.png", "heads.png", "pyramid.png"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    from sklearn.datasets import load_sample_image

    path = tmp_path_factory.mktemp("photo") / "china.jpg"
    Image.fromarray(load_sample_image("china.jpg")).resize((160, 107)).save(path)
    return path


def test_the_frame_lies_around_the_token():
    """In every picture of a row; its token has the pixel, and stages have strides of 4 to 32."""
    views = figures.look(timm.create_model("container_nano").eval(), image(96, 64), (37, 70), samples=1)
    drawn = figures._draw_affinities(views, Image.new("RGB", (64, 96)), "")
    frames = [[patch.get_bbox().extents for patch in axes.patches] for axes in drawn.axes if axes.images]
    assert len(frames) == 16  # four stages of four pictures
    for i, found in enumerate(frames):
        stride = 4 << i // 4
        left, top = stride * (37 // stride), stride * (70 // stride)
        expected = (left - 2.5, top - 2.5, left + stride + 1.5, top + stride + 1.5)
        assert len(found) == 2 and all(tuple(extents) == expected for extents in found)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.slow
def test_pictures_from_the_command(photo, tmp_path, capsys):
    """With trained weights: not blank, the same twice, another at another token."""
    name = "container_light_nano_32.cifar10"
    words = ["figures", photo, "--model", name, "--img-size", 64, "--out", tmp_path / "a"]
    main([*map(str, words)])
    assert capsys.readouterr().out.split() == [str(tmp_path / "a" / name) for name in NAMES]
    figures.draw(photo, name, tmp_path / "b", img_size=64)
    figures.draw(photo, name, tmp_path / "c", img_size=64, pixel=(10, 50))
    for name in NAMES:
        a, b, c = (pixels(tmp_path / folder / name) for folder in "abc")
        assert np.array_equal(a, b)
        assert np.array_equal(a, c) == (name != "affinities.png")
        colors, counts = np.unique(a.astype(np.int64) @ (65536, 256, 1), return_counts=True)
        assert len(colors) > 100 and counts.max() < 0.98 * counts.sum()


@pytest.mark.parametrize(
    "name",
    ["container_pam", *(pytest.param(n, marks=pytest.mark.slow) for n in ("container_attention", "container_mixer"))],
)
def test_pictures_of_other_members(name, photo, tmp_path):
    assert len(figures.draw(photo, name, tmp_path, img_size=64, pretrained=False)) == 4


@pytest.mark.parametrize("num_classes", [7, pytest.param(0, marks=pytest.mark.slow)])
def test_pictures_of_a_checkpoint(num_classes, photo, tmp_path):
    model = randomize(timm.create_model("container_light_nano", num_classes=num_classes))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    figures.draw(photo, "container_light_nano", tmp_path / "a", checkpoint=tmp_path / "model.pth", img_size=64)
    figures.draw(photo, "container_light_nano", tmp_path / "b", img_size=64)
    assert not np.array_equal(pixels(tmp_path / "a/pyramid.png"), pixels(tmp_path / "b/pyramid.png"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no.jpg"], "argument IMAGE: no file no.jpg"),
        ([__file__, "--model", "container_light_nano"], "it is not an image file"),
        (["PHOTO", "--model", "resnet18"], "no model 'resnet18' in this family"),
        (["PHOTO", "--model", "container_light_nano.no_such"], "no_such"),
        (["PHOTO", "--model", "container_light_nano", "--pixel", 3000, 2], "pixel (3000, 2) is not in the image"),
        (
            ["PHOTO", "--model", "container_light_nano", "--checkpoint", "no.pth"],
            "argument --checkpoint: no file no.pth",
        ),
        (["PHOTO", "--model", "container_light_nano_32.cifar10", "--checkpoint", __file__], "give one of them"),
        (
            ["PHOTO", "--model", "container_light_nano", "--img-size", 2],
            "2 pixels are too few for container_light_nano",
        ),
    ],
)
def test_mistakes(words, said, photo, tmp_path, answer):
    words = [photo if word == "PHOTO" else word for word in words]
    assert said in answer("figures", *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
