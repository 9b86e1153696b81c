"""Figures of a model's affinities on an image.

`container figures IMAGE --out DIR` draws four figures: the affinities' rows at one token, alpha and
beta of every block, entropy and reach of every head, and the feature pyramid. Rows are computed for a few tokens at a
time with the affinities' own kernels, so no N x N matrix is formed at any image size.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from . import weights
from .aggregation import Aggregation
from .container import Container
from .files import check_new
from .images import open_photo

__all__ = [
    "COLOR_MAP",
    "BlockView",
    "affinities",
    "draw",
    "draw_affinities",
    "entropy",
    "gates",
    "look",
    "reach",
    "rows",
    "seen",
    "token_at",
    "watch",
]

# Okabe and Ito's colours, which can be told apart with any colour vision; so can those of the colour map cividis.
_COLORS = {"dynamic": "#0072B2", "static": "#E69F00"}
COLOR_MAP = "cividis"
"""Matplotlib colour map of the affinity maps, readable with any colour vision."""
_NUMBERS = 2**24  # maximum number of values in a feature map repeated once per token


def _split(tokens: Sequence[tuple[int, int]], x: Tensor) -> list[Sequence[tuple[int, int]]]:
    """Splits tokens into groups for which the feature map may be repeated at once."""
    count = max(1, _NUMBERS // x.numel())
    return [tokens[start : start + count] for start in range(0, len(tokens), count)]


def rows(
    apply: Callable[[Tensor, Tensor], Tensor], num_heads: int, x: Tensor, tokens: Sequence[tuple[int, int]]
) -> Tensor:
    """Computes rows of an affinity from its kernel alone: A_ij = d y_i / d v_j for y = A(x) v.

    One backward pass gives the rows of all heads, because each head has its own channels.

    Args:
        apply: Function (x, v) -> A(x) v, such as an affinity's `forward`; it may add terms that do not depend on v.
        num_heads: Number of matrices M.
        x: Feature map (1, C, H, W).
        tokens: (row, column) of each token i on that grid.

    Returns:
        (tokens, M, H, W): the weight with which token i reads each token.

    Raises:
        ValueError: A token lies outside the grid, or `x` is not a single feature map.
    """
    if x.ndim != 4 or len(x) != 1:
        raise ValueError(f"rows are of one map (1, C, H, W), not of {tuple(x.shape)}")
    height, width = x.shape[-2:]
    for row, column in tokens:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"token ({row}, {column}) is outside the {height} x {width} grid")
    found = []
    for some in _split(tokens, x):
        at = torch.tensor(some, device=x.device)
        with torch.enable_grad():
            given = x.detach().expand(len(some), -1, -1, -1)
            v = torch.zeros_like(given, memory_format=torch.contiguous_format).requires_grad_()
            y = apply(given, v).unflatten(1, (num_heads, -1))  # (tokens, M, D, H, W)
            (grad,) = torch.autograd.grad(y[torch.arange(len(some)), :, 0, at[:, 0], at[:, 1]].sum(), v)
        found.append(grad.unflatten(1, (num_heads, -1))[:, :, 0])
    return torch.cat(found)


def entropy(rows: Tensor) -> Tensor:
    """Returns the entropy of rows (..., H, W) in bits: -sum_j p_j log2 p_j with p = |A_i| / sum |A_i|.

    It is 0 if a single token is read, and log2 N if all tokens are read equally.
    """
    p = rows.double().abs().flatten(-2)
    p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return torch.special.entr(p).sum(-1) / math.log(2)


def reach(rows: Tensor, tokens: Sequence[tuple[int, int]], stride: int) -> Tensor:
    """Returns the mean distance in pixels between a token and the tokens that it reads.

    sum_j p_j |x_j - x_i|, with p as in `entropy`.

    Args:
        rows: (tokens, M, H, W), from `rows`.
        tokens: (row, column) of each token.
        stride: Pixels per token.

    Returns:
        (tokens, M).
    """
    height, width = rows.shape[-2:]
    at = torch.tensor(tokens, device=rows.device, dtype=torch.float64)
    dy = torch.arange(height, device=rows.device) - at[:, :1]
    dx = torch.arange(width, device=rows.device) - at[:, 1:]
    distance = stride * torch.hypot(dy[:, :, None], dx[:, None, :]).unsqueeze(1)  # (tokens, 1, H, W)
    p = rows.double().abs()
    return (p * distance).sum((-2, -1)) / p.sum((-2, -1)).clamp_min(torch.finfo(p.dtype).tiny)


def gates(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Returns (alpha, beta) of every `Aggregation`, by name.

    Without a gate, each affinity that is present has weight 1, and an absent one has weight 0.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Aggregation):
            if module.gate is not None:
                alpha, beta = (scalar.item() for scalar in module.gate())
            else:
                alpha, beta = float(module.dynamic is not None), float(module.static is not None)
            found[name] = (alpha, beta)
    return found


class BlockView(NamedTuple):
    """Affinities of a block on an image, under 'dynamic' and 'static' as far as it has them, and under 'mixed'.

    Attributes:
        name: Name of the aggregation in the model.
        stage: Index of its stage, from 0.
        stride: Pixels per token.
        grid: (H, W) in tokens.
        token: (row, column) of the token that is shown.
        rows: (H, W), that token's row of |A|, averaged over heads.
        entropy: (M,), averaged over a sample of tokens, in bits.
        reach: (M,), averaged over the same tokens, in pixels.
    """

    name: str
    stage: int
    stride: int
    grid: tuple[int, int]
    token: tuple[int, int]
    rows: dict[str, Tensor]
    entropy: dict[str, Tensor]
    reach: dict[str, Tensor]


def affinities(aggregation: Aggregation) -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]]:
    """Returns the function (x, v) -> A(x) v and the number of matrices of each affinity.

    The keys are 'dynamic' and 'static', as far as the aggregation has them, and 'mixed'.
    """
    found: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {}
    for kind in ("dynamic", "static"):
        affinity: Any = getattr(aggregation, kind)
        if affinity is not None:
            found[kind] = affinity, affinity.num_heads
    heads = math.lcm(*(heads for _, heads in found.values()))
    return found | {"mixed": (aggregation.mix, heads)}


def token_at(pixel: tuple[int, int], stride: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Returns (row, column) of the token of a grid (H, W) that contains a pixel (x, y).

    Pixels beyond the grid belong to the last row or column.
    """
    return min(pixel[1] // stride, grid[0] - 1), min(pixel[0] // stride, grid[1] - 1)


def watch(model: Container, image: Tensor, see: Callable[[str, Aggregation, Tensor], None]) -> Tensor:
    """Runs a forward pass and calls `see` with the input feature map of each aggregation, without storing any.

    Args:
        model: Model in evaluation mode, not fused.
        image: (1, 3, H, W), normalised.
        see: Called with an aggregation's name, the aggregation, and its input feature map (1, C, H, W).

    Returns:
        Logits.

    Raises:
        ValueError: The model holds no `Aggregation` or is in training mode.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, Aggregation)}
    if not names:
        raise ValueError(f"{type(model).__name__} has no affinities to draw")
    if model.training:
        raise ValueError("a model in training mode drops branches and uses a batch's statistics: call eval() first")

    def hook(aggregation: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(aggregation, Aggregation)
        see(names[aggregation], aggregation, inputs[0])

    handles = [module.register_forward_pre_hook(hook) for module in names]
    try:
        with torch.no_grad():
            logits: Tensor = model(image)
            return logits
    finally:
        for handle in handles:
            handle.remove()


def look(model: Container, image: Tensor, pixel: tuple[int, int], samples: int = 5) -> list[BlockView]:
    """Computes the affinities of every block on an image, in one forward pass.

    Args:
        model: Model in evaluation mode, not fused.
        image: (1, 3, H, W), normalised.
        pixel: (x, y) of the token to show, from the image's upper left corner.
        samples: Entropy and reach are averaged over samples x samples evenly spaced tokens.

    Raises:
        ValueError: The pixel is not in the image, or the model holds no `Aggregation` or is in training mode.
    """
    height, width = image.shape[-2:]
    x, y = pixel
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"pixel ({x}, {y}) is not in the image of {width} x {height}")
    views = []

    def see(name: str, aggregation: Aggregation, map_: Tensor) -> None:
        stage = int(name.split(".")[1])
        stride = model.feature_info[stage]["reduction"]
        grid = (map_.shape[-2], map_.shape[-1])
        token = token_at(pixel, stride, grid)
        even = [[round((i + 0.5) * n / samples - 0.5) for i in range(samples)] for n in grid]
        spread = sorted({(row, column) for row in even[0] for column in even[1]})
        drawn, entropies, reaches = {}, {}, {}
        for kind, (apply, heads) in affinities(aggregation).items():
            drawn[kind] = rows(apply, heads, map_, [token])[0].abs().mean(0)
            measured = []
            for some in _split(spread, map_):
                part = rows(apply, heads, map_, some)
                measured.append(torch.stack([entropy(part), reach(part, some, stride)]))
            entropies[kind], reaches[kind] = torch.cat(measured, dim=1).mean(1)
        views.append(BlockView(name, stage, stride, grid, token, drawn, entropies, reaches))

    watch(model, image, see)
    return views


def _figure(width: float, height: float) -> Any:
    # Without pyplot, which would select a GUI backend that servers do not have.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _photo(axes: Any, picture: Image.Image, gray: bool = False) -> None:
    axes.imshow(picture.convert("L") if gray else picture, cmap="gray" if gray else None)
    axes.set_axis_off()


def _frame_token(axes: Any, view: BlockView) -> None:
    """Draws a frame around the pixels of the token that is shown, two pixels outside of them."""
    from matplotlib.patches import Rectangle

    left, top = view.stride * view.token[1] - 2.5, view.stride * view.token[0] - 2.5
    for color, width in (("white", 3), ("#D55E00", 1.5)):
        frame = Rectangle((left, top), view.stride + 4, view.stride + 4, fill=False, color=color, linewidth=width)
        axes.add_patch(frame)


def _overlay(axes: Any, map_: Tensor, stride: int, picture: Image.Image) -> None:
    """Draws a map in colours over the picture; the last tokens may extend beyond its border."""
    height, width = map_.shape
    axes.imshow(
        map_.numpy(force=True),
        cmap=COLOR_MAP,
        vmin=0,
        extent=(-0.5, width * stride - 0.5, height * stride - 0.5, -0.5),
        alpha=0.8,
    )
    axes.set(xlim=(-0.5, picture.width - 0.5), ylim=(picture.height - 0.5, -0.5))


def _draw_affinities(views: list[BlockView], picture: Image.Image, title: str) -> Any:
    """Draws one row of pictures per stage, for its last block."""
    last = list({view.stage: view for view in views}.values())
    figure = _figure(10.5, 2.75 * len(last) + 0.6)
    figure.suptitle(
        f"{title}\nwhat the framed token reads, mean of |A| over heads, last block of each stage", fontsize=11
    )
    grid = figure.subplots(len(last), 4, squeeze=False)
    shown = None
    for line, view in zip(grid, last, strict=True):
        _photo(line[0], picture)
        _frame_token(line[0], view)
        line[0].set_title(f"stage {view.stage + 1}: {view.grid[0]} x {view.grid[1]} tokens", fontsize=10)
        for axes, kind in zip(line[1:], ("static", "dynamic", "mixed"), strict=True):
            if kind not in view.rows:
                axes.set_axis_off()
                axes.text(0.5, 0.5, f"no {kind} affinity", ha="center", va="center", transform=axes.transAxes)
                continue
            row = view.rows[kind]
            _photo(axes, picture, gray=True)
            _overlay(axes, row / row.max().clamp_min(torch.finfo(row.dtype).tiny), view.stride, picture)
            shown = axes.images[-1]
            _frame_token(axes, view)
            name = {"static": "static A", "dynamic": "dynamic A(X)", "mixed": r"$\alpha$A(X) + $\beta$A"}[kind]
            axes.set_title(f"{name}, largest {row.max():.2g}", fontsize=10)
    if shown is not None:
        figure.colorbar(shown, ax=grid, location="bottom", shrink=0.4, aspect=40, label="share of the largest entry")
    return figure


def _stages(axes: Any, stages: list[int]) -> None:
    """Labels the x axis with block numbers from 1, with a line between stages and stage numbers above."""
    blocks = range(1, len(stages) + 1)
    axes.set_xticks(list(blocks))
    axes.set_xlabel("block")
    for stage in sorted(set(stages)):
        own = [block for block in blocks if stages[block - 1] == stage]
        axes.text(
            sum(own) / len(own),
            1.02,
            f"stage {stage + 1}",
            ha="center",
            transform=axes.get_xaxis_transform(),
            fontsize=9,
        )
        if own[0] > 1:
            axes.axvline(own[0] - 0.5, color="0.8", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_gates(views: list[BlockView], scalars: dict[str, tuple[float, float]], title: str) -> Any:
    figure = _figure(0.42 * len(views) + 2.4, 3.4)
    axes = figure.subplots()
    blocks = range(1, len(views) + 1)
    for i, (kind, symbol, marker) in enumerate((("dynamic", "alpha", "o"), ("static", "beta", "s"))):
        values = [scalars[view.name][i] for view in views]
        axes.plot(blocks, values, marker=marker, color=_COLORS[kind], label=f"$\\{symbol}$, of the {kind} affinity")
    axes.axhline(0, color="0.8", linewidth=1)
    axes.set_ylabel("weight of the affinity")
    axes.legend(frameon=False, fontsize=9)
    _stages(axes, [view.stage for view in views])
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_heads(views: list[BlockView], title: str) -> Any:
    figure = _figure(0.42 * len(views) + 3.0, 6.2)
    for axes, what in zip(figure.subplots(2, 1), ("entropy", "reach"), strict=True):
        for offset, kind, marker in ((-0.16, "dynamic", "o"), (0.16, "static", "s")):
            points = [
                (block + offset, value)
                for block, view in enumerate(views, 1)
                for value in getattr(view, what).get(kind, torch.empty(0)).tolist()
            ]
            if points:
                axes.scatter(
                    *zip(*points, strict=True),
                    s=9,
                    alpha=0.5,
                    marker=marker,
                    color=_COLORS[kind],
                    label=f"{kind}, each head",
                )
        if what == "entropy":
            full = [math.log2(view.grid[0] * view.grid[1]) for view in views]
            axes.plot(range(1, len(views) + 1), full, color="0.5", linestyle=":", label="all tokens alike")
        axes.set_ylabel({"entropy": "entropy, bits", "reach": "reach, pixels"}[what])
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        _stages(axes, [view.stage for view in views])
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_pyramid(model: Container, image: Tensor, picture: Image.Image, title: str) -> Any:
    with torch.no_grad():
        maps = model.forward_intermediates(image, intermediates_only=True)
    assert isinstance(maps, list)
    figure = _figure(2.6 * (len(maps) + 1), 3.3)
    line = figure.subplots(1, len(maps) + 1)
    _photo(line[0], picture)
    line[0].set_title(f"image, {picture.height} x {picture.width}", fontsize=10)
    for axes, map_, info in zip(line[1:], maps, model.feature_info, strict=True):
        norm = map_[0].float().norm(dim=0)
        axes.imshow(norm.numpy(force=True), cmap=COLOR_MAP)
        axes.set_axis_off()
        axes.set_title(f"stride {info['reduction']}: {map_.shape[1]} x {norm.shape[0]} x {norm.shape[1]}", fontsize=10)
    figure.suptitle(f"{title}\nlength of the feature vectors", fontsize=10)
    return figure


def seen(photo: Image.Image, config: dict[str, Any]) -> tuple[Tensor, Image.Image]:
    """Preprocesses a photo; returns the model's input (1, 3, H, W) and the same as a picture."""
    picture = create_transform(**{**config, "mean": (0, 0, 0), "std": (1, 1, 1)})(photo)
    given = (picture - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    return given[None], to_pil_image(picture)


def draw_affinities(photo: Image.Image, model: Container, file: str | Path, title: str) -> None:
    """Draws what the token in the middle of a photo reads, in the last block of each stage.

    Args:
        photo: Photo in RGB; it is resized and cropped as in the model's evaluation.
        model: Model in evaluation mode, not fused.
        file: Output picture; its folder is created if necessary.
        title: First line of the picture.

    Raises:
        OSError: The file cannot be written.
        ValueError: The model is in training mode.
    """
    given, shown = seen(photo, resolve_model_data_config(model))
    pixel = (shown.width // 2, shown.height // 2)
    figure = _draw_affinities(look(model, given, pixel, samples=1), shown, title)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def draw(
    image: str | Path,
    model: str,
    out: str | Path,
    checkpoint: str = "",
    pixel: tuple[int, int] | None = None,
    img_size: int | None = None,
    pretrained: bool = True,
) -> list[Path]:
    """Draws `affinities.png`, `gates.png`, `heads.png` and `pyramid.png` for an image file.

    Args:
        image: Image file; the model sees its central square.
        model: `NAME.tag`, or `NAME` for its default weights.
        out: Output folder, created if necessary.
        checkpoint: Weights file.
        pixel: (x, y) in the square that the model sees; its middle if None.
        img_size: Side of that square; the model's own if None.
        pretrained: As in `weights.create`.

    Returns:
        Paths of the files.

    Raises:
        FileExistsError: A picture of that name exists.
        OSError: The image cannot be read, or the folder cannot be written.
        RuntimeError: `checkpoint` is not a checkpoint file, or no published weights have that tag.
        ValueError: The model is not of this family, the checkpoint does not fit, both a tag and a checkpoint are given,
            the pixel is outside the image, or the image is too small.
    """
    name = model.partition(".")[0]
    weights.check_family(name)
    paths = {stem: Path(out, f"{stem}.png") for stem in ("affinities", "gates", "heads", "pyramid")}
    for path in paths.values():
        check_new(path)
    photo = open_photo(image)
    network = weights.create(model, checkpoint, pretrained=pretrained)
    if img_size is not None:
        if img_size < (token := network.feature_info[-1]["reduction"]):
            raise ValueError(f"{img_size} pixels are too few for {name}: one token of its last stage takes {token}")
        network.set_input_size(img_size)
    config = resolve_model_data_config(network)
    side = img_size or config["input_size"][-1]
    given, shown = seen(photo, config | dict(input_size=(3, side, side), crop_pct=1.0, crop_mode="center"))
    pixel = (side // 2, side // 2) if pixel is None else pixel
    views = look(network, given, pixel)
    title = f"{weights.describe(model, checkpoint, pretrained)}, {side} px"
    figures = {
        "affinities": _draw_affinities(views, shown, title),
        "gates": _draw_gates(views, gates(network), title),
        "heads": _draw_heads(views, title),
        "pyramid": _draw_pyramid(network, given, shown, title),
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    for stem, figure in figures.items():
        figure.savefig(paths[stem], dpi=100)
    return list(paths.values())
