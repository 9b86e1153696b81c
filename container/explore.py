"""Web page that shows what a token of a photo reads, and how convolution turns into attention.

`container explore [PHOTO] --model NAME[.tag]` serves it on this machine. The maps are small images with one pixel per
token, which the browser enlarges over the photo. The input feature maps of all blocks are cached, so a click costs one
backward pass through each affinity of one block, as in `figures.rows`. Moving alpha or beta needs no new pass for the
maps, because the mixed row is a weighted sum of two cached rows. Only the classes need another forward pass.
"""

import asyncio
import base64
import html
import importlib.util
import io
import math
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from . import figures, weights
from .aggregation import Aggregation, FreeGate
from .container import Container
from .images import open_photo
from .predict import SAMPLE, class_names

__all__ = [
    "MODELS",
    "BlockInfo",
    "Explorer",
    "Pane",
    "Row",
    "build",
    "link",
    "open_upload",
    "paint",
    "read_link",
    "serve",
]

MODELS = ("container_nano", "container_light_nano")
"""Models offered by default; the page starts with the first."""
_MEGABYTES = 10
_MEGAPIXELS = 50
_SCANS = 100  # of a JPEG
_decoder = ThreadPoolExecutor(1)  # one photo at a time, as each takes up to a gigabyte, and always in the same memory
_PATHS = re.compile(  # what the page asks for; Gradio serves more
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|(assets|static)/.*|"
    r"gradio_api/((run|queue|heartbeat|upload|upload_progress|startup-events|info|app_id|file=)([/?].*)?))"
)
_POST = 51 * 10**6  # bytes of one request: the largest upload, and its form
_POSTS, _PATIENCE = 8, 30  # requests that are received at once, and seconds without a byte after which one ends
_KINDS = ("JPEG", "PNG", "WEBP")
_TOP = 5
_STEP = 0.001  # slider step of alpha and beta
_TITLE = "What does a token read?"


class BlockInfo(NamedTuple):
    """Block that the page can show.

    Attributes:
        name: Name of its aggregation in the model.
        stage: Index of its stage, from 0.
        stride: Pixels per token.
        heads: Number of heads to choose from; a static affinity may have several matrices per head.
        alpha: Learned weight of its dynamic affinity.
        beta: Learned weight of its static affinity.
        kinds: Its affinities: 'dynamic', 'static' or both, followed by 'mixed'.
    """

    name: str
    stage: int
    stride: int
    heads: int
    alpha: float
    beta: float
    kinds: tuple[str, ...]

    @property
    def gated(self) -> bool:
        """Whether the block has two affinities to mix."""
        return len(self.kinds) == 3


class Row(NamedTuple):
    """Row of an affinity: how much one token reads from every token.

    Attributes:
        values: (H, W), |A_ij| over all tokens j, averaged over heads.
        entropy: Entropy of these values, in bits.
        reach: Reach of these values, in pixels.
    """

    values: Tensor
    entropy: float
    reach: float


class Explorer:
    """Thread-safe computation of what a token of a photo reads in any block of a model.

    A photo is passed as the square that the model sees: `side` x `side` x 3 bytes of RGB.

    Args:
        model: Model in evaluation mode, not fused.
        side: Side of the square in pixels.

    Raises:
        ValueError: The model is not of this family, or has no classifier.
    """

    def __init__(self, model: Any, side: int) -> None:
        if not isinstance(model, Container):
            raise ValueError(f"{type(model).__name__} has no affinities to look into")
        self.model, self.side = model, side
        self.classes = class_names(model)
        # Held during every forward pass, because `_mixed_by` temporarily replaces the gate of a block.
        self._lock = threading.Lock()
        self._config = resolve_model_data_config(model) | dict(
            input_size=(3, side, side), crop_pct=1.0, crop_mode="center"
        )
        self.blocks = []
        for name, (alpha, beta) in figures.gates(model).items():
            stage = int(name.split(".")[1])
            matrices = {kind: heads for kind, (_, heads) in figures.affinities(self._aggregation(name)).items()}
            stride = model.feature_info[stage]["reduction"]
            self.blocks.append(
                BlockInfo(name, stage, stride, math.gcd(*matrices.values()), alpha, beta, tuple(matrices))
            )
        # Caches for a few photos, and for the positions that a visitor returns to.
        self.maps = lru_cache(8)(self._maps)
        self.rows = lru_cache(64)(self._rows)
        self.probabilities = lru_cache(64)(self._probabilities)

    def _aggregation(self, name: str) -> Aggregation:
        module = self.model.get_submodule(name)
        assert isinstance(module, Aggregation)
        return module

    def block(self, number: int) -> BlockInfo:
        """Returns a block by its number.

        Args:
            number: Number of the block, from 1.

        Raises:
            ValueError: There is no such block.
        """
        if not 1 <= number <= len(self.blocks):
            raise ValueError(f"block {number} is not in 1 to {len(self.blocks)}")
        return self.blocks[number - 1]

    def _given(self, photo: bytes) -> Tensor:
        return figures.seen(Image.frombytes("RGB", (self.side, self.side), photo), self._config)[0]

    def _maps(self, photo: bytes) -> dict[str, Tensor]:
        """Returns the input feature map (1, C, H, W) of each aggregation, by name."""
        found = {}

        def see(name: str, aggregation: Aggregation, map_: Tensor) -> None:
            found[name] = map_

        with self._lock:
            figures.watch(self.model, self._given(photo), see)
        return found

    def _rows(self, photo: bytes, number: int, token: tuple[int, int]) -> dict[str, Tensor]:
        """Returns a token's row (M, H, W) of each affinity of a block, under 'dynamic' and 'static'."""
        block = self.block(number)
        x = self.maps(photo)[block.name]
        return {
            kind: figures.rows(apply, heads, x, [token])[0]
            for kind, (apply, heads) in figures.affinities(self._aggregation(block.name)).items()
            if kind != "mixed"
        }

    def look(
        self, photo: bytes, number: int, pixel: tuple[int, int], alpha: float, beta: float, head: int = 0
    ) -> dict[str, Row]:
        """Computes what the token at a pixel reads in a block.

        Args:
            photo: The square.
            number: Number of the block, from 1.
            pixel: (x, y), from the upper left corner.
            alpha: Weight of the dynamic affinity in the mixture. A block with one affinity ignores it and uses 1.
            beta: Weight of the static affinity in the mixture. A block with one affinity ignores it and uses 1.
            head: Number of the head, from 1; 0 for the mean over all heads.

        Returns:
            Rows under 'dynamic' and 'static', as far as the block has them, and under 'mixed'.

        Raises:
            ValueError: There is no such block, head or pixel.
        """
        block = self.block(number)
        if not 0 <= head <= block.heads:
            raise ValueError(f"head {head} is not in 1 to {block.heads}")
        if not all(0 <= place < self.side for place in pixel):
            raise ValueError(f"x and y go from 0 to {self.side - 1}: pixel {pixel} is not in the photo")
        x = self.maps(photo)[block.name]
        token = figures.token_at(pixel, block.stride, (x.shape[-2], x.shape[-1]))
        rows = dict(self.rows(photo, number, token))
        heads = math.lcm(*map(len, rows.values()))
        weight = dict(dynamic=alpha, static=beta) if block.gated else dict.fromkeys(rows, 1.0)
        # The same mixture as in `Aggregation.matrix`.
        spread = [weight[kind] * row.repeat_interleave(heads // len(row), dim=0) for kind, row in rows.items()]
        rows["mixed"] = torch.stack(spread).sum(0)
        found = {}
        for kind, row in rows.items():
            own = row.unflatten(0, (block.heads, -1))
            values = (own if head == 0 else own[head - 1 : head]).abs().mean((0, 1))
            drawn = values[None, None]
            found[kind] = Row(values, figures.entropy(drawn).item(), figures.reach(drawn, [token], block.stride).item())
        return found

    @contextmanager
    def _mixed_by(self, block: BlockInfo, alpha: float, beta: float) -> Iterator[None]:
        """Temporarily replaces the gate of a block; the caller must hold the lock."""
        aggregation = self._aggregation(block.name)
        learned, gate = aggregation.gate, FreeGate()
        nn.init.constant_(gate.alpha, alpha)
        nn.init.constant_(gate.beta, beta)
        aggregation.gate = gate
        try:
            yield
        finally:
            aggregation.gate = learned

    def _probabilities(self, photo: bytes, number: int, alpha: float, beta: float) -> Tensor:
        """Returns the probability of each class, with the given alpha and beta in one block."""
        block = self.block(number)
        with torch.no_grad(), self._lock, self._mixed_by(block, alpha, beta):
            logits: Tensor = self.model(self._given(photo))[0]
            return logits.float().softmax(0)


class Pane(NamedTuple):
    """Settings of one model on the page.

    Attributes:
        model: Name of the model.
        block: Number of the block, from 1.
        head: Number of the head, from 1; 0 for the mean over all heads.
        alpha: Weight of the block's dynamic affinity; None for the learned weight.
        beta: Weight of the block's static affinity; None for the learned weight.
    """

    model: str
    block: int
    head: int = 0
    alpha: float | None = None
    beta: float | None = None


def link(pixel: tuple[int, int], panes: Sequence[Pane]) -> str:
    """Returns the query string of a link to the current view, `?x=64&y=40&model=...`; `read_link` parses it."""
    query: dict[str, Any] = dict(x=pixel[0], y=pixel[1])
    for pane, end in zip(panes, ("", "2"), strict=False):
        query |= {f"{key}{end}": value for key, value in pane._asdict().items() if value is not None}
    return f"?{urlencode(query)}"


def read_link(query: Mapping[str, str], models: Sequence[str]) -> tuple[tuple[int, int] | None, list[Pane]]:
    """Parses the pixel (x, y), or None, and the panes from a link.

    Args:
        query: Parameters of the link; unknown ones are ignored.
        models: Names of the available models.

    Raises:
        ValueError: There is no such model, or a value is not a number.
    """

    def number(key: str, kind: Callable[[str], Any], otherwise: Any) -> Any:
        try:
            value = kind(query[key]) if key in query else otherwise
            if value is None or math.isfinite(value):
                return value
        except (OverflowError, ValueError):
            pass
        raise ValueError(f"the link's {key} is not a {'whole ' if kind is int else ''}number: {query[key][:40]}")

    panes = []
    for end in ("", "2"):
        if name := query.get(f"model{end}"):
            if name not in models:
                raise ValueError(f"the link names another model than {', '.join(models)}: {name[:60]}")
            alpha, beta = number(f"alpha{end}", float, None), number(f"beta{end}", float, None)
            panes.append(Pane(name, number(f"block{end}", int, 1), number(f"head{end}", int, 0), alpha, beta))
    x, y = number("x", int, None), number("y", int, None)
    return (None if x is None or y is None else (x, y)), panes


def open_upload(path: str | Path) -> Image.Image:
    """Opens a photo that a visitor has uploaded.

    Args:
        path: The file. Error messages show its name without its folder.

    Raises:
        ValueError: The file is not a JPEG, PNG or WebP, is damaged, or is too large.
    """
    name = Path(path).name
    if os.path.getsize(path) > _MEGABYTES * 10**6:
        raise ValueError(f"{name} is larger than {_MEGABYTES} MB")
    try:
        with Image.open(path, formats=_KINDS) as image:
            pixels = image.width * image.height
            # Each scan of a progressive JPEG goes over all pixels, and may take 100 bytes. Cameras write up to ten.
            scans = Path(path).read_bytes().count(b"\xff\xda") if image.format == "JPEG" else 0
    except Exception:  # decoders raise nearly anything for damaged or foreign files
        raise ValueError(f"{name} cannot be read as a JPEG, PNG or WebP photo") from None
    if pixels > _MEGAPIXELS * 10**6:
        raise ValueError(f"{name} has more than {_MEGAPIXELS} million pixels")
    if scans > _SCANS:
        raise ValueError(f"{name} is stored in {scans:,} scans, and {_SCANS} are allowed")
    try:
        return open_photo(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from None


@lru_cache(maxsize=8)
def take_upload(path: str, crop: Callable[[Image.Image], bytes]) -> bytes:
    """Reads a photo that a visitor has uploaded, and removes its file.

    Gradio keeps the same photo of two visitors in one file, so the last photos are remembered.

    Args:
        path: The file.
        crop: Function that returns the pixels to remember.

    Raises:
        ValueError: See `open_upload`; or another visitor's copy was removed meanwhile.
    """
    try:
        return _decoder.submit(lambda: crop(open_upload(path))).result()
    except FileNotFoundError:
        raise ValueError("this photo is here no longer: please choose it again") from None
    finally:
        Path(path).unlink(missing_ok=True)


def paint(values: Tensor) -> Image.Image:
    """Colours a map (H, W) from 0 to its largest value, with one pixel per token."""
    shares = values / values.max().clamp_min(torch.finfo(values.dtype).tiny)
    return Image.fromarray(_colors(shares.numpy(force=True), bytes=True)[..., :3])


def _colors(*args: Any, **kwargs: Any) -> Any:
    from matplotlib import colormaps

    return colormaps[figures.COLOR_MAP](*args, **kwargs)


def _data_uri(picture: Image.Image, kind: str = "png", **options: Any) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


_HEADER = """
<h1>What does a token read?</h1>
<p class="equation"><i>Y</i> = ( <i>α</i> <span class="dynamic"><i>A</i>(<i>X</i>)</span> + <i>β</i> <span
class="static"><i>A</i></span> ) <i>V</i> <i>W</i> + <i>X</i></p>
<p>A block mixes two affinities: attention, <span class="dynamic"><i>A</i>(<i>X</i>)</span>, is computed from the photo;
convolution, <span class="static"><i>A</i></span>, is learned once for all photos. Click the photo: bright cells are
what that spot reads. Move <i>α</i> and <i>β</i> to go from convolution to attention, and watch the prediction
change.</p>
"""

# The position is kept in the page's CSS, so that the circle in every picture moves without redrawing the pictures.
_PHOTO = """
<div class="spot photo" tabindex="0" role="application" aria-label="Photo. Click a place, or move it by arrow keys.">
<div class="picture"></div><div class="ring"></div></div>
<p class="hint">Click a place, here or in a map. Arrow keys move it by one token.</p>
"""

_SCRIPT = """
const number = name => Number(getComputedStyle(document.documentElement).getPropertyValue(name));
const go = (x, y) => {
    const last = number('--side') - 1;
    trigger('place', {x: Math.min(Math.max(x, 0), last), y: Math.min(Math.max(y, 0), last)});
};
document.addEventListener('click', event => {
    const spot = event.target.closest('.spot');
    if (!spot) return;
    element.querySelector('.spot').focus({preventScroll: true}); // keys move the place after a click in a map too
    const box = spot.getBoundingClientRect(), scale = number('--side') / box.width;
    go(Math.floor((event.clientX - box.left) * scale), Math.floor((event.clientY - box.top) * scale));
});
element.addEventListener('keydown', event => {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!step) return;
    event.preventDefault();
    go(number('--x') + step[0] * number('--stride'), number('--y') + step[1] * number('--stride'));
});
"""

_CSS = """
.unseen {display: none}
footer {display: none !important}
.gradio-container {max-width: 1500px !important; margin: auto}
.dynamic, .static {border-bottom: 3px solid #0072B2; padding: 0 1px}
.static {border-color: #E69F00}
h1 {font-size: 1.7rem; margin: 0}
.equation {font-family: Georgia, "Times New Roman", serif; font-size: 1.5rem; margin: .4rem 0}
.hint, figcaption, .here {font-size: .85rem; margin: 0; opacity: .8}
.spot + .hint {margin-top: 6px}
.spot {position: relative; width: 100%; aspect-ratio: 1; overflow: hidden; cursor: crosshair; border-radius: 6px}
.spot .picture {position: absolute; inset: 0; background: var(--picture) 0 0 / 100% 100%}
.map .picture {filter: grayscale(1)}
.spot img {position: absolute; left: 0; top: 0; max-width: none; opacity: .8; image-rendering: pixelated; margin: 0}
.ring {position: absolute; width: 16px; height: 16px; margin: -8px; border: 2px solid #D55E00; border-radius: 50%;
    box-shadow: 0 0 0 2px white, inset 0 0 0 2px white; left: calc((var(--x) + .5) / var(--side) * 100%);
    top: calc((var(--y) + .5) / var(--side) * 100%); pointer-events: none}
.spot:focus-visible {outline: 3px solid #56B4E9; outline-offset: 2px}
.maps {display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px}
.map {margin: 0}
h3 {font-size: 1rem !important; margin: 0 0 4px !important; font-weight: 600}
h3 span {font-family: Georgia, "Times New Roman", serif; font-weight: 400}
.map .none {display: grid; place-items: center; aspect-ratio: 1; border: 1px dashed var(--border-color-primary);
    border-radius: 6px; text-align: center; padding: 8px; opacity: .8}
.bar {display: flex; align-items: center; gap: 6px; margin: 6px 0; font-size: .8rem}
.bar i {flex: 1; max-width: 220px; height: 8px; border-radius: 4px}
.classes {display: grid; grid-template-columns: minmax(7rem, max-content) 1fr max-content; gap: 3px 10px; width: 100%;
    align-items: center; font-size: .9rem}
.classes div {height: 10px; position: relative; background: var(--border-color-primary); border-radius: 3px}
.classes div i {position: absolute; inset: 0 auto 0 0; background: #009E73; border-radius: 3px}
.classes div b {position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--body-text-color)}
#said:not(:has(.said)) {display: none}
.here {margin-top: 10px}
.said {border-left: 4px solid #D55E00; padding: 6px 10px; margin: 0; font-weight: 600}
@media (min-width: 900px) {#given {position: sticky; top: 8px; align-self: flex-start}}
@media (max-width: 640px) {.maps {grid-template-columns: 1fr}}
"""

_TITLES = {
    "dynamic": ("Dynamic", '<span class="dynamic"><i>A</i>(<i>X</i>)</span>'),
    "static": ("Static", '<span class="static"><i>A</i></span>'),
    "mixed": ("Mixed", "<i>α</i> <i>A</i>(<i>X</i>) + <i>β</i> <i>A</i>"),
}


def _maps_page(views: dict[str, Row], block: BlockInfo, side: int) -> str:
    """Returns the HTML of the three maps side by side, with a colour legend."""
    found = []
    for kind, (word, formula) in _TITLES.items():
        title = f"<h3>{word} <span>{formula}</span></h3>"
        if kind not in views:
            found.append(
                f'<figure class="map">{title}<div class="none">This block has no {kind} affinity.</div></figure>'
            )
            continue
        row = views[kind]
        height, width = row.values.shape
        size = f"width:{100 * width * block.stride / side:.4f}%;height:{100 * height * block.stride / side:.4f}%"
        said = f"{row.entropy:.1f} bits of entropy, reach {row.reach:.0f} pixels"
        found.append(
            f'<figure class="map" data-kind="{kind}">{title}<div class="spot"><div class="picture"></div>'
            f'<img src="{_data_uri(paint(row.values))}" style="{size}" alt="{word} map: {said}">'
            f'<div class="ring"></div></div><figcaption>entropy <b>{row.entropy:.2f} bits</b> of '
            f"{math.log2(height * width):.0f}<br>reach <b>{row.reach:.1f} pixels</b><br>largest entry "
            f"<b>{row.values.max():.2g}</b></figcaption></figure>"
        )
    stops = ",".join(f"rgb({r},{g},{b})" for r, g, b, _ in _colors([0, 0.25, 0.5, 0.75, 1.0], bytes=True))
    bar = f'<div class="bar">reads nothing<i style="background:linear-gradient(90deg,{stops})"></i>largest entry</div>'
    return f'<div class="maps">{"".join(found)}</div>{bar}'


def _classes_page(names: Sequence[str], now: Tensor, learned: Tensor) -> str:
    """Returns the HTML of the most likely classes as bars; lines mark the values with learned alpha and beta."""
    moved = not torch.equal(now, learned)
    lines = []
    for i in now.topk(min(_TOP, len(names))).indices.tolist():
        name = html.escape(names[i].split(",")[0])
        line = f'<b style="left:{100 * learned[i]:.2f}%"></b>' if moved else ""
        lines.append(
            f'<span>{name}</span><div><i style="width:{100 * now[i]:.2f}%"></i>{line}</div>'
            f"<span>{100 * now[i]:.1f} %</span>"
        )
    hint = "The line in a bar is where it was with the learned <i>α</i> and <i>β</i>." if moved else ""
    return f'<h3>What the model sees</h3><div class="classes">{"".join(lines)}</div><p class="hint">{hint}</p>'


class _Controls(NamedTuple):
    """Gradio components of one model: its settings and its outputs."""

    box: Any
    model: Any
    block: Any
    head: Any
    alpha: Any
    beta: Any
    attention: Any
    convolution: Any
    learned: Any
    note: Any
    maps: Any
    classes: Any


class _Models:
    """Models of a page, created on first use, and the square of a photo that all of them see."""

    def __init__(self, names: Sequence[str], img_size: int | None = None, pretrained: bool = True) -> None:
        for name in names:
            weights.check_family(name.partition(".")[0])
        names = [weights.add_default_tag(name) for name in names] if pretrained else names
        first = weights.create(names[0], img_size=img_size, pretrained=pretrained)
        self._config, self._pretrained = resolve_model_data_config(first), pretrained
        self.names, self.side = list(dict.fromkeys(names)), self._config["input_size"][-1]
        if self.side < (token := first.feature_info[-1]["reduction"]):
            raise ValueError(
                f"{self.side} pixels are too few for {names[0]}: one token of its last stage takes {token}"
            )
        self._made = {names[0]: Explorer(first, self.side)}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Explorer:
        with self._lock:
            if name not in self._made:
                model = weights.create(name, img_size=self.side, pretrained=self._pretrained)
                self._made[name] = Explorer(model, self.side)
            return self._made[name]

    def square(self, photo: Image.Image) -> bytes:
        """Crops and resizes a photo as the first model does in evaluation; the other models see the same square."""
        return figures.seen(photo, self._config)[1].tobytes()

    def first_pane(self) -> Pane:
        """Returns the initial settings: the last mixing block of the earliest stage that mixes two affinities.

        The first stage is skipped if possible, because its tokens have little context yet. If no block mixes two
        affinities, any block may be chosen.
        """
        blocks = list(enumerate(self[self.names[0]].blocks, 1))
        mixing = [(number, block) for number, block in blocks if block.gated] or blocks
        stage = min((block.stage for _, block in mixing if block.stage), default=0)
        return Pane(self.names[0], max(number for number, block in mixing if block.stage == stage))

    def first_pixel(self) -> tuple[int, int]:
        """Returns the initial pixel: an eye in the sample photo, which reads the other eye."""
        return int(0.35 * self.side), int(0.43 * self.side)

    def choices(self) -> list[tuple[str, str]]:
        """Returns (label, name) of each model for a dropdown."""
        return [(weights.describe(name, pretrained=self._pretrained), name) for name in self.names]

    def settled(self, pane: Pane) -> Pane:
        """Returns a pane with alpha and beta set to None if they equal the learned ones within half a slider step."""
        block = self[pane.model].block(pane.block)
        alpha, beta = (
            None if given is None or not block.gated or abs(given - learned) < _STEP / 2 else given
            for given, learned in ((pane.alpha, block.alpha), (pane.beta, block.beta))
        )
        return pane._replace(alpha=alpha, beta=beta)

    def pages(self, square: bytes, pixel: tuple[int, int], pane: Pane) -> tuple[str, str]:
        """Returns the maps and the classes of a pane, as HTML."""
        explorer = self[pane.model]
        block = explorer.block(pane.block)
        alpha = block.alpha if pane.alpha is None else pane.alpha
        beta = block.beta if pane.beta is None else pane.beta
        views = explorer.look(square, pane.block, pixel, alpha, beta, pane.head)
        learned = explorer.probabilities(square, pane.block, block.alpha, block.beta)
        now = explorer.probabilities(square, pane.block, alpha, beta)
        return _maps_page(views, block, self.side), _classes_page(explorer.classes, now, learned)


def build(
    models: Sequence[str] = MODELS,
    photo: Image.Image | None = None,
    img_size: int | None = None,
    pretrained: bool = True,
) -> Any:
    """Builds the page, a `gradio.Blocks`.

    Args:
        models: `NAME.tag`, or `NAME` for its default weights. The first is shown; the others are created when selected.
        photo: Initial photo, in RGB; the package's sample if None. Links work for the sample only.
        img_size: Side in pixels of the square that all models see; that of the first model's weights if None.
        pretrained: As in `weights.create`.

    Raises:
        ImportError: Gradio or Matplotlib is not installed.
        RuntimeError: The first model's weights cannot be loaded.
        ValueError: A model is not of this family, or `img_size` is too small for the first one.
    """
    for module in ("gradio", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"the page needs {module}: pip install {module}")
    import gradio as gr

    every = _Models(models, img_size, pretrained)
    side, first, start = every.side, every.first_pane(), every.first_pixel()
    own = photo is not None
    sample = every.square(open_photo(SAMPLE) if photo is None else photo)

    def create_pane(model: Any, number: int) -> _Controls:
        with gr.Column(visible=number == 1, elem_id=f"pane{number}", elem_classes="pane") as box:
            with gr.Row():
                if number == 1:
                    model = gr.Dropdown(every.choices(), value=first.model, label="Model", min_width=220)
                block = gr.Dropdown([], label="Block", min_width=220)
                head = gr.Dropdown([], label="Head", min_width=220)
            maps = gr.HTML()
            with gr.Row():
                alpha = gr.Slider(0, 1, 0.5, step=_STEP, label="α: weight of the dynamic affinity", buttons=[])
                beta = gr.Slider(0, 1, 0.5, step=_STEP, label="β: weight of the static affinity", buttons=[])
            with gr.Row():
                attention = gr.Button("Attention: α = 1, β = 0", size="sm")
                convolution = gr.Button("Convolution: α = 0, β = 1", size="sm")
                learned = gr.Button("Reset to what was learned", size="sm")
            note, classes = gr.HTML(), gr.HTML()
        return _Controls(box, model, block, head, alpha, beta, attention, convolution, learned, note, maps, classes)

    with gr.Blocks(analytics_enabled=False, title=_TITLE, delete_cache=(600, 600)) as page:
        square = gr.State(sample)
        gr.HTML(_HEADER)
        style, place = gr.HTML(elem_classes="unseen"), gr.HTML(elem_classes="unseen")
        with gr.Row():
            with gr.Column(scale=1, min_width=280, elem_id="given"):
                spot = gr.HTML(_PHOTO, js_on_load=_SCRIPT)
                with gr.Row():
                    x, y = (
                        gr.Number(place, label=f"{axis}, pixels", precision=0, min_width=80, elem_id=axis)
                        for axis, place in zip("xy", start, strict=True)
                    )
                upload = gr.File(
                    label="Your own photo", file_types=[".jpg", ".jpeg", ".png", ".webp"], height=150, elem_id="upload"
                )
                said = gr.HTML(elem_id="said")
                back = gr.Button("Back to the first photo", size="sm", visible=False)
                anchor = gr.HTML()
            with gr.Column(scale=4, min_width=320):
                one = create_pane(None, 1)
                second = gr.Dropdown(
                    [("no other model", ""), *every.choices()], value="", label="Compare with", elem_id="second"
                )
                two = create_pane(second, 2)

        def asked(values: dict[Any, Any]) -> list[Pane]:
            """Returns the panes that are on the page."""
            return [
                every.settled(Pane(*(values[part] for part in (c.model, c.block, c.head, c.alpha, c.beta))))
                for c in (one, two)
                if values[c.model] and values[c.block]
            ]

        def pixel_of(values: dict[Any, Any]) -> tuple[int, int]:
            if values[x] is None or values[y] is None:
                raise ValueError(f"x and y are pixels from 0 to {side - 1}")
            return int(values[x]), int(values[y])

        def controls(c: _Controls, pane: Pane) -> dict[Any, Any]:
            """Returns updates that make the controls show the settings of a pane."""
            blocks = every[pane.model].blocks
            block = every[pane.model].block(pane.block)
            before = [sum(other.stage < b.stage for other in blocks) for b in blocks]
            names = [(f"stage {b.stage + 1}, block {n - before[n - 1]}", n) for n, b in enumerate(blocks, 1)]
            heads = [(f"mean of {block.heads} heads", 0), *((f"head {n}", n) for n in range(1, block.heads + 1))]
            if block.heads == 1:
                heads = [("single head", 0)]
            sliders = {
                slider: gr.update(
                    value=round(learned if given is None else given, 3),
                    minimum=min(0, math.floor(learned)),
                    maximum=max(1, math.ceil(learned)),
                    interactive=block.gated,
                )
                for slider, given, learned in ((c.alpha, pane.alpha, block.alpha), (c.beta, pane.beta, block.beta))
            }
            if block.gated:
                note = f"Learned here: <i>α</i> = {block.alpha:.3f}, <i>β</i> = {block.beta:.3f}."
            else:
                note = f"This block has a {block.kinds[0]} affinity alone: there is nothing to mix."
            if "." not in pane.model:
                note += " The weights are random, so the classes mean nothing."
            return sliders | {
                c.box: gr.update(visible=True),
                c.model: pane.model,
                c.block: gr.update(choices=names, value=pane.block),
                c.head: gr.update(choices=heads, value=pane.head),
                c.note: f'<p class="hint">{note}</p>',
                **{button: gr.update(interactive=block.gated) for button in (c.attention, c.convolution, c.learned)},
            }

        def views(photo: bytes, pixel: tuple[int, int], panes: list[Pane]) -> dict[Any, Any]:
            """Returns updates of everything that is drawn: maps, classes, position and link."""
            found = {}
            for c, pane in zip((one, two), panes, strict=False):
                found[c.maps], found[c.classes] = every.pages(photo, pixel, pane)
            stride = every[panes[0].model].block(panes[0].block).stride
            if photo == sample and not own:
                words = f'<a href="{html.escape(link(pixel, panes))}" target="_blank">Link to this view</a>'
            else:
                words = "No link: your photo stays on this machine."
            return found | {
                place: f"<style>:root{{--x:{pixel[0]};--y:{pixel[1]};--stride:{stride}}}</style>",
                anchor: f'<p class="hint">JPEG, PNG or WebP, up to {_MEGABYTES} MB; it is not kept.</p>'
                f'<p class="here">{words}</p>',
                said: "",
            }

        def shown(photo: bytes) -> dict[Any, Any]:
            picture = _data_uri(Image.frombytes("RGB", (side, side), photo), "webp", quality=95)
            return {
                square: photo,
                style: f"<style>:root{{--side:{side};--picture:url({picture})}}</style>",
                back: gr.update(visible=photo != sample),
            }

        def told(answer: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
            """Wraps a handler so that its errors appear as a line on the page."""

            @wraps(answer)
            def answered(*args: Any) -> dict[Any, Any]:
                try:
                    return answer(*args)
                except (OSError, RuntimeError, ValueError) as error:
                    return {said: f'<p class="said" role="alert">{html.escape(str(error).splitlines()[0])}</p>'}

            return answered

        @told
        def look(values: dict[Any, Any]) -> dict[Any, Any]:
            return views(values[square], pixel_of(values), asked(values))

        @told
        def click(values: dict[Any, Any], event: gr.EventData) -> dict[Any, Any]:
            pixel = (event.x, event.y)
            return {x: pixel[0], y: pixel[1]} | views(values[square], pixel, asked(values))

        def choose(number: int, change: Callable[[Pane], Pane]) -> Callable[..., dict[Any, Any]]:
            """Returns a handler that changes the settings of a pane and redraws the page."""

            @told
            def chosen(values: dict[Any, Any]) -> dict[Any, Any]:
                panes = asked(values)
                panes[number] = every.settled(change(panes[number]))
                found = controls((one, two)[number], panes[number])
                return found | views(values[square], pixel_of(values), panes)

            return chosen

        def of_another(pane: Pane) -> Pane:
            """Returns a pane with default settings for a newly selected model, at the same block if it has one."""
            return Pane(pane.model, min(pane.block, len(every[pane.model].blocks)))

        def of_block(pane: Pane) -> Pane:
            return Pane(pane.model, pane.block)

        @told
        def compare(values: dict[Any, Any]) -> dict[Any, Any]:
            (pane, *_) = panes = asked({**values, second: ""})
            found = {two.box: gr.update(visible=False)}
            if values[second]:
                panes.append(of_another(pane._replace(model=values[second])))
                found = controls(two, panes[1])
            return found | views(values[square], pixel_of(values), panes)

        @told
        def receive(values: dict[Any, Any]) -> dict[Any, Any]:
            photo = take_upload(values[upload], every.square)
            return shown(photo) | views(photo, pixel_of(values), asked(values))

        @told
        def return_(values: dict[Any, Any]) -> dict[Any, Any]:
            return shown(sample) | views(sample, pixel_of(values), asked(values))

        def load(request: gr.Request) -> dict[Any, Any]:
            pixel, panes, found = start, [first], {}
            try:
                asked_pixel, asked_panes = read_link(dict(request.query_params), every.names)
                asked_pixel, asked_panes = asked_pixel or pixel, asked_panes or panes
                asked_panes = [every.settled(pane) for pane in asked_panes]
                for pane in asked_panes:
                    every.pages(sample, asked_pixel, pane)
                pixel, panes = asked_pixel, asked_panes
            except (RuntimeError, ValueError) as error:
                found = {said: f'<p class="said" role="alert">{html.escape(str(error))}</p>'}
            state = {x: pixel[0], y: pixel[1], **shown(sample)}
            for c, pane in zip((one, two), panes, strict=False):
                state |= controls(c, pane)
            return state | views(sample, pixel, panes) | found

        parts = {square, x, y, second, upload}
        for c in (one, two):
            parts |= {c.model, c.block, c.head, c.alpha, c.beta}
        drawn = [
            square,
            style,
            place,
            x,
            y,
            second,
            back,
            said,
            anchor,
            *one,
            *(part for part in two if part is not second),
        ]
        quick: dict[str, Any] = dict(
            inputs=parts, outputs=drawn, queue=False, show_progress="hidden", api_visibility="private"
        )
        latest = quick | dict(trigger_mode="always_last")
        page.load(load, None, drawn, queue=False, show_progress="hidden", api_visibility="private")
        spot.place(click, **latest)
        gr.on([x.input, y.input, one.head.input, two.head.input], look, **latest)
        gr.on([slider.input for c in (one, two) for slider in (c.alpha, c.beta)], look, **latest)
        one.model.input(choose(0, of_another), **quick)
        second.input(compare, **quick)
        for number, c in enumerate((one, two)):
            c.block.input(choose(number, of_block), **quick)
            c.attention.click(choose(number, lambda pane: pane._replace(alpha=1.0, beta=0.0)), **quick)
            c.convolution.click(choose(number, lambda pane: pane._replace(alpha=0.0, beta=1.0)), **quick)
            c.learned.click(choose(number, lambda pane: pane._replace(alpha=None, beta=None)), **quick)
        upload.upload(receive, **quick).then(lambda: None, None, upload, queue=False, api_visibility="private")
        back.click(return_, **quick)
    return page


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """Gives everything temporary, whoever writes it, one folder that is removed in the end."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield folder
        finally:
            tempfile.tempdir = before


class _Guard:
    """ASGI middleware that refuses what the page does not ask for itself.

    On a loopback address, other names for this machine and pages of other origins are refused: a page elsewhere may
    have a name that leads here.

    Args:
        app: The application.
        host: Address that is listened on.
    """

    def __init__(self, app: Any, host: str) -> None:
        self.app, self.names = app, {host, "127.0.0.1", "localhost", "::1"}
        self.local = host in ("127.0.0.1", "localhost", "::1")
        self.posts = asyncio.Semaphore(_POSTS)

    def refusal(self, scope: Any) -> tuple[int, str] | None:
        """Returns the status and the words with which a request is refused, or None."""
        headers = {key.decode().lower(): value.decode("latin-1") for key, value in scope["headers"]}
        asked = urlsplit(f"//{headers.get('host', '')}").hostname
        origin = urlsplit(headers["origin"]).netloc if "origin" in headers else headers.get("host")
        if self.local and asked not in self.names:
            return 400, f"this page is not {asked}"
        if self.local and origin != headers.get("host"):
            return 403, f"this page takes nothing from {origin or 'elsewhere'}"
        if not _PATHS.fullmatch(scope["path"]):
            return 404, "there is no such page"
        if scope["method"] == "POST" and not 0 <= int(headers.get("content-length", -1)) <= _POST:
            return 413, f"at most {_POST:,} bytes can be sent at once"
        return None

    async def receive_whole(self, receive: Any) -> bytes | None:
        """Receives the body of a request; None if it breaks off, so that no part of it becomes a file."""
        body = bytearray()
        with suppress(TimeoutError, asyncio.TimeoutError):
            while len(body) <= _POST:
                message = await asyncio.wait_for(receive(), _PATIENCE)
                if message["type"] != "http.request":
                    return None
                body += message.get("body", b"")
                if not message.get("more_body") and len(body) <= _POST:
                    return bytes(body)
        return None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request, or passes it on."""
        refused = None
        if scope["type"] == "http":
            try:
                refused = self.refusal(scope)
            except ValueError:  # an address, or a length, that is none
                refused = 400, "this is no request"
        if refused is None and scope.get("method") == "POST":
            async with self.posts:
                body = await self.receive_whole(receive)
            if body is None:
                return

            async def receive_body() -> Any:
                nonlocal body
                if body is None:
                    return await receive()
                message, body = dict(type="http.request", body=body, more_body=False), None
                return message

            await self.app(scope, receive_body, send)
            return
        if refused is None:
            await self.app(scope, receive, send)
            return
        await send(dict(type="http.response.start", status=refused[0], headers=[(b"content-type", b"text/plain")]))
        await send(dict(type="http.response.body", body=refused[1].encode()))


def _check_address(host: str, port: int) -> None:
    """Checks that the server can listen at an address, before the model is created and with a readable error."""
    if not 0 < port < 2**16:
        raise ValueError(f"there is no port {port}: they go from 1 to {2**16 - 1}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise OSError(f"nothing can listen at {host}, port {port}: {reason}") from None


def serve(
    models: Sequence[str] = MODELS,
    photo: str | Path | None = None,
    img_size: int | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    pretrained: bool = True,
) -> None:
    """Serves the page until interrupted, and stores no uploads.

    Args:
        models: As in `build`.
        photo: File with the initial photo; the package's sample if None.
        img_size: As in `build`.
        host: Address to listen on: 127.0.0.1 for this machine alone, 0.0.0.0 for the network.
        port: Port to listen on.
        pretrained: As in `weights.create`.

    Raises:
        ImportError: Gradio or Matplotlib is not installed.
        OSError: The photo does not exist, the port is taken, or there is no such host.
        RuntimeError: The first model's weights cannot be loaded.
        ValueError: The file is not a photo, a model is not of this family, `img_size` is too small for the first one,
            or there is no such port.
    """
    _check_address(host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # otherwise SIGTERM would leave uploads behind
    with _temporary_folder() as folder:
        # Gradio reads these when it is imported and when a page is created.
        os.environ |= dict(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        page = build(models, None if photo is None else open_photo(photo), img_size, pretrained)
        from gradio.themes import Base
        from starlette.middleware import Middleware

        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            inline=False,
            prevent_thread_lock=True,
            ssr_mode=False,
            max_file_size=f"{5 * _MEGABYTES}mb",  # files between _MEGABYTES and this limit get our own message
            state_session_capacity=500,
            app_kwargs=dict(middleware=[Middleware(_Guard, host=host)]),
            footer_links=[],
            # System fonts, so that nothing is fetched from another server.
            theme=Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=_CSS,
        )
        print(f"{models[0]}: http://{host}:{port}, until Ctrl+C", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            page.close(verbose=False)
