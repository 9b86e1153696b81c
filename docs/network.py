"""Draws the network, its block and the equation as SVG: `python docs/network.py` writes them beside itself.

What the picture says of the models is read from the models. The two matrices are drawings, not measurements: a
Gaussian kernel, and attention between the parts of the picture on the left.
"""

import math
from pathlib import Path
from typing import Any

import timm

import container

WIDTH, HEIGHT = 960, 1036
SANS = "-apple-system,BlinkMacSystemFont,'Segoe UI',Helvetica,Arial,sans-serif"
MATH = "'STIX Two Text','Cambria',Georgia,'Times New Roman',serif"
# Okabe and Ito's colours, as in container/figures.py; on dark grounds their sky blue, which is light enough.
SCHEMES = {
    "light": dict(ink="#1f2328", faint="#59636e", line="#8c959f", dynamic="#0072B2", static="#E69F00"),
    "dark": dict(ink="#f0f6fc", faint="#a5aeb8", line="#7d8590", dynamic="#56B4E9", static="#E69F00"),
}
PHOTO = (
    "0000000",
    "0000110",
    "0000110",
    "0000000",
    "0002200",
    "0022220",
    "2222222",
)  # 0 sky, 1 sun, 2 hill: a token each
CELL = 3  # pixels of an entry of a matrix


class Drawing:
    """Shapes in the order in which they are drawn."""

    def __init__(self, scheme: str) -> None:
        self.colors = SCHEMES[scheme]
        self.shapes: list[str] = []

    def shape(self, tag: str, text: str = "", **attributes: object) -> None:
        """One element; `fill` and `stroke` may be names of the scheme."""
        for name in ("fill", "stroke"):
            if name in attributes:
                attributes[name] = self.colors.get(str(attributes[name]), attributes[name])
        written = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.shapes.append(f"<{tag} {written}>{text}</{tag}>" if text else f"<{tag} {written}/>")

    def text(self, x: float, y: float, text: str, size: float = 14, fill: str = "ink", **attributes: object) -> None:
        """Text around x, or beside it by `text_anchor`."""
        style = dict(font_size=size, fill=fill, text_anchor="middle") | attributes
        self.shape("text", text, x=f"{x:g}", y=f"{y:g}", **style)

    def math(self, x: float, y: float, text: str, size: float = 26, **attributes: object) -> None:
        """Symbols as mathematics has them: letters slanted."""
        self.text(x, y, text, size, font_family=MATH, font_style="italic", **attributes)

    def box(self, x: float, y: float, width: float, height: float, radius: float = 8, **attributes: object) -> None:
        """A rounded box, tinted so that it suits any ground."""
        style = dict(fill="line", fill_opacity=0.1, stroke="line", stroke_width=1.2) | attributes
        self.shape("rect", x=f"{x:g}", y=f"{y:g}", width=f"{width:g}", height=f"{height:g}", rx=radius, **style)

    def line(self, path: str, arrow: bool = True, **attributes: object) -> None:
        """A line, which ends in an arrow."""
        end = dict(marker_end="url(#arrow)") if arrow else {}
        self.shape("path", d=path, **(dict(fill="none", stroke="line", stroke_width=1.6) | end | attributes))

    def plus(self, x: float, y: float) -> None:
        """A sum."""
        self.shape("circle", cx=x, cy=y, r=10, fill="none", stroke="line", stroke_width=1.6)
        self.line(f"M{x - 5} {y}H{x + 5}M{x} {y - 5}V{y + 5}", arrow=False, stroke="ink")

    def heading(self, y: float, text: str, says: str) -> None:
        """What the next part shows."""
        self.text(30, y, text, 19, text_anchor="start", font_weight=600)
        self.text(WIDTH - 30, y, says, 14, "faint", text_anchor="end")

    def matrix(self, x: float, y: float, entries: list[list[float]], color: str) -> None:
        """N x N entries between 0 and 1 as shades, on two sheets: there is one matrix per head or channel."""
        side = CELL * len(entries)
        for back in (10, 5):
            self.box(x + back, y - back, side, side, 0, fill="none", stroke=color, stroke_opacity=0.45)
        for level in range(1, 9):
            runs = []
            for i, row in enumerate(entries):
                shades = [min(8, math.ceil(8 * entry - 1e-6)) for entry in row]
                j = 0
                while j < len(row):
                    end = j
                    while end < len(row) and shades[end] == level:
                        end += 1
                    if end > j:
                        width = CELL * (end - j)
                        runs.append(f"M{x + CELL * j:g} {y + CELL * i:g}h{width}v{CELL}h-{width}z")
                    j = max(end, j + 1)
            if runs:
                self.shape("path", d="".join(runs), fill=color, fill_opacity=level / 8)
        self.box(x, y, side, side, 0, fill="none", stroke=color, stroke_width=1.4)

    def map(self, x: float, y: float, width: float, height: float) -> None:
        """Tokens by channels."""
        self.box(x, y, width, height, 3, fill_opacity=0.18)

    def svg(self) -> str:
        """The file."""
        said = (
            "The network: a stem and four stages. Every block: a depthwise convolution, the aggregation and an MLP, "
            "each with a residual. The aggregation: Y = (alpha A(X) + beta A) V W + X. A(X) is computed from the "
            "image, A is a parameter."
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
                f'height="{HEIGHT}" role="img" font-family="{SANS}">',
                f"<title>CONTAINER and CONTAINER-LIGHT</title><desc>{said}</desc>",
                "<style>.u{font-style:normal}</style>",
                '<defs><marker id="arrow" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" '
                f'orient="auto"><path d="M0 1L9 5L0 9z" fill="{self.colors["line"]}"/></marker></defs>',
                *self.shapes,
                "</svg>\n",
            ]
        )


def upright(symbol: str) -> str:
    """What is not slanted among symbols."""
    return f'<tspan class="u">{symbol}</tspan>'


def attention() -> list[list[float]]:
    """Tokens of the photo read tokens of the same part, near ones more; the largest entry of a row is 1."""
    part = [int(p) for p in "".join(PHOTO)]
    side, entries = len(PHOTO), []
    for i, own in enumerate(part):
        scores = [
            2.2 * (own == other) - 0.18 * math.dist(divmod(i, side), divmod(j, side)) for j, other in enumerate(part)
        ]
        entries.append([math.exp(score - max(scores)) for score in scores])
    return entries


def convolution(kernel: int) -> list[list[float]]:
    """The same Gaussian of kernel x kernel tokens around every token."""
    side = len(PHOTO)

    def entry(i: int, j: int) -> float:
        rows, columns = (abs(a - b) for a, b in zip(divmod(i, side), divmod(j, side), strict=True))
        return math.exp(-(rows**2 + columns**2) / 2.4) if max(rows, columns) <= kernel // 2 else 0.0

    return [[entry(i, j) for j in range(side**2)] for i in range(side**2)]


def photo(drawing: Drawing, x: float, y: float, side: float) -> None:
    """A sun over a hill, cut into the patches that are the tokens of the last stage."""
    drawing.shape("rect", x=x, y=y, width=side, height=side, rx=4, fill="line", fill_opacity=0.16)
    drawing.shape("circle", cx=x + side * 0.71, cy=y + side * 0.29, r=side * 0.13, fill="line", fill_opacity=0.8)
    foot, right, top = y + side * 0.86, x + side, y + side * 0.25
    hill = f"M{x} {y + side}V{foot}Q{x + side * 0.58} {top} {right} {foot}V{y + side}z"
    drawing.shape("path", d=hill, fill="line", fill_opacity=0.5)
    drawing.shape("rect", x=x, y=y, width=side, height=side, rx=4, fill="none", stroke="line", stroke_width=1.2)


def affinities(drawing: Drawing, block: Any, x: float, y: float) -> None:
    """What a block mixes, as a label in its colours."""
    aggregation = block.aggregation
    assert aggregation.static is not None
    both = aggregation.dynamic is not None
    if both:
        tint = dict(arrow=False, stroke_width=1.2, fill_opacity=0.24)
        drawing.line(f"M{x - 2} {y - 13}H{x - 46}a13 13 0 0 0 0 26H{x - 2}z", fill="dynamic", stroke="dynamic", **tint)
        drawing.line(f"M{x + 2} {y - 13}H{x + 42}a13 13 0 0 1 0 26H{x + 2}z", fill="static", stroke="static", **tint)
        drawing.math(x - 28, y + 5, f"α A{upright('(')}X{upright(')')}", 15)
        drawing.math(x + 25, y + 5, "β A", 15)
    else:
        drawing.box(x - 22, y - 13, 44, 26, 13, fill="static", fill_opacity=0.24, stroke="static")
        drawing.math(x, y + 5, "A", 15)


def mlp_ratio(stage: Any) -> int:
    """Hidden channels of a stage's MLPs over channels."""
    layer = stage.blocks[0].mlp.fc1
    return layer.out_channels // layer.in_channels


def network(drawing: Drawing, light: Any, full: Any) -> None:
    """The stem, the stages and the head, with what is in each."""
    size = light.default_cfg["input_size"][-1]
    drawing.heading(46, "The network", f"numbers for {size} × {size} pixels")
    centers, sides, middle = (250, 434, 618, 778), (92, 68, 50, 36), 142
    photo(drawing, 42, middle - 46, 92)
    drawing.line(f"M142 {middle}H{centers[0] - 54}")
    patch = light.stem.proj
    drawing.text(169, middle - 32, "stem", 14)
    drawing.text(169, middle - 14, f"{patch.kernel_size[0]} × {patch.kernel_size[1]}", 14, "faint")
    ends = []
    for stage, x, side in zip(light.stages, centers, sides, strict=True):
        depth = len(stage.blocks)
        for layer in reversed(range(depth)):
            back = 4 * layer
            drawing.box(x - side / 2 + back, middle - side / 2 - back, side, side, 3, fill_opacity=0.14)
        ends.append(x + side / 2 + 4 * (depth - 1))
    for i, x in enumerate(centers[1:]):
        begin, end = ends[i] + 8, x - sides[i + 1] / 2 - 8
        patch = light.stages[i + 1].downsample.proj
        drawing.line(f"M{begin:g} {middle}H{end:g}")
        drawing.text((begin + end) / 2, middle - 14, f"{patch.kernel_size[0]} × {patch.kernel_size[1]}", 14, "faint")
    drawing.line(f"M{ends[-1] + 8:g} {middle}H{ends[-1] + 42:g}")
    drawing.box(852, middle - 38, 72, 76)
    for y, name in ((-14, "norm"), (5, "mean"), (24, "linear")):
        drawing.text(888, middle + y, name, 14)

    strides = [info["reduction"] for info in light.feature_info]
    channels = [info["num_chs"] for info in light.feature_info]
    table = {
        "": [f"Stage {i + 1}" for i in range(len(centers))],
        "tokens": [f"{size // stride} × {size // stride}" for stride in strides],
        "channels": channels,
        "blocks": [len(stage.blocks) for stage in light.stages],
        "stride": strides,
    }
    y = 226
    for name, values in table.items():
        drawing.text(30, y, name, 14, "faint", text_anchor="start")
        for x, value in zip(centers, values, strict=True):
            drawing.text(x, y, str(value), 15, font_weight=400 if name else 600)
        y += 24
    for name, model in (("CONTAINER-LIGHT", light), ("CONTAINER", full)):
        y += 4
        ratios = list(dict.fromkeys(map(mlp_ratio, model.stages))) if model is full else map(mlp_ratio, model.stages)
        drawing.text(30, y + 5, name, 14, text_anchor="start", font_weight=600)
        drawing.text(30, y + 23, f"MLP ratio {', '.join(map(str, ratios))}", 13, "faint", text_anchor="start")
        for x, stage in zip(centers, model.stages, strict=True):
            affinities(drawing, stage.blocks[0], x, y + 9)
        y += 40
    drawing.text(888, 226, "Head", 15, font_weight=600)
    drawing.text(888, 250, f"{light.num_classes} classes", 14)


def block(drawing: Drawing, light: Any) -> None:
    """The three residual steps."""
    top, middle = 472, 552
    drawing.heading(top, "Every block", "names as in the code")
    first = light.stages[0].blocks[0]
    kernel = first.pos_conv.kernel_size
    boxes = [
        (116, 124, "pos_conv", f"{kernel[0]} × {kernel[1]} depthwise"),
        (322, 70, "norm1", "batch"),
        (414, 150, "aggregation", "the equation"),
        (646, 70, "norm2", "batch"),
        (738, 100, "mlp", "GELU"),
    ]
    drawing.line(f"M36 {middle}H108")
    for fork, box_end, plus, start in ((76, 240, 270, None), (296, 564, 594, 314), (620, 838, 868, 638)):
        drawing.line(f"M{box_end} {middle}H{plus - 12}")
        drawing.line(f"M{fork} {middle}V{middle - 42}q0 -10 10 -10H{plus - 10}q10 0 10 10V{middle - 12}")
        drawing.shape("circle", cx=fork, cy=middle, r=3, fill="line")
        drawing.plus(plus, middle)
        if start:
            drawing.line(f"M{fork - 16} {middle}H{start}")
    drawing.line(f"M392 {middle}H406")
    drawing.line(f"M716 {middle}H730")
    drawing.line(f"M878 {middle}H926")
    drawing.shape("path", d="M414 582L30 634H930L564 582z", fill="line", fill_opacity=0.1)
    for x, width, name, says in boxes:
        drawing.box(x, middle - 30, width, 60)
        drawing.text(x + width / 2, middle - 3, name, 15, font_weight=600)
        drawing.text(x + width / 2, middle + 17, says, 13, "faint")


def equation(drawing: Drawing, light: Any, full: Any) -> None:
    """The matrices of the aggregation, over the letters of the equation."""
    last, free = (model.stages[-1].blocks[0].aggregation for model in (light, full))
    kernel = last.static.conv.kernel_size[0]
    assert isinstance(last.gate, container.ConvexGate) and isinstance(free.gate, container.FreeGate)
    mixed = [i for i, stage in enumerate(light.stages, 1) if stage.blocks[0].aggregation.gate is not None]
    assert len(mixed) == 1
    drawing.box(30, 634, 900, 384, 0, fill_opacity=0.1, stroke="none")

    side = CELL * len(PHOTO) ** 2
    top, bottom = 708, 708 + side
    x = dict(y=96, eq=146, open=178, alpha=206, dynamic=312, plus=416, beta=448, static=554, close=646)
    x |= dict(v=694, w=762, and_=816, x=866)
    drawing.map(x["y"] - 22, top, 44, side)
    drawing.matrix(x["dynamic"] - side / 2, top, attention(), "dynamic")
    drawing.matrix(x["static"] - side / 2, top, convolution(kernel), "static")
    drawing.map(x["v"] - 22, top, 44, side)
    drawing.map(x["w"] - 22, top + (side - 44) / 2, 44, 44)
    drawing.map(x["x"] - 22, top, 44, side)

    drawing.text(50, 672, "The aggregation", 19, text_anchor="start", font_weight=600)
    drawing.text(x["y"], top - 8, "C channels", 13, "faint")
    drawing.text(0, 0, "N tokens", 13, "faint", transform=f"translate({x['y'] - 32} {top + side / 2}) rotate(-90)")

    # From the residual's X, through the norm, to what is computed of it.
    bus = 674
    drawing.line(f"M{x['x']} {top}V{bus}H822", arrow=False)
    drawing.line(f"M750 {bus}H{x['dynamic']}V{top - 14}")
    drawing.line(f"M{x['v']} {bus}V{top - 4}")
    drawing.shape("circle", cx=x["v"], cy=bus, r=3, fill="line")
    drawing.box(750, bus - 13, 72, 26, 13)
    drawing.text(786, bus + 5, "norm1", 14)
    drawing.text(x["dynamic"] + 10, bus - 8, "Q and K, 1 × 1", 13, "faint", text_anchor="start")
    drawing.text(x["v"] - 10, bus - 8, "V, 1 × 1", 13, "faint", text_anchor="end")

    row = bottom + 36
    opened, closed, plus = upright("("), upright(")"), upright("+")
    symbols = dict(y="Y", eq=upright("="), open=opened, alpha="α", dynamic=f"A{opened}X{closed}", plus=plus, beta="β")
    symbols |= dict(static="A", close=closed, v="V", w="W", and_=plus, x="X")
    for name, symbol in symbols.items():
        drawing.math(x[name], row, symbol, 28)
    for name, lines in dict(
        dynamic=("dynamic", "computed from the image", "attention, one matrix per head"),
        static=("static", "a parameter", f"{kernel} × {kernel} depthwise, one matrix per channel"),
    ).items():
        drawing.shape("rect", x=x[name] - 36, y=row + 16, width=72, height=3, rx=1.5, fill=name)
        drawing.text(x[name], row + 40, lines[0], 15, font_weight=600)
        drawing.text(x[name], row + 60, lines[1], 14)
        drawing.text(x[name], row + 79, lines[2], 13, "faint")
    for name, says in dict(v="values", w="projection", x="residual").items():
        drawing.text(x[name], row + 38, says, 13, "faint")
    gates = f"CONTAINER: α and β free.  CONTAINER-LIGHT, stage {mixed[0]}: α = sigmoid(s), β = 1 − α."
    drawing.text(WIDTH / 2, row + 108, gates, 13, "faint")


def draw(scheme: str) -> str:
    """The figure.

    Args:
        scheme: "light" or "dark".
    """
    drawing = Drawing(scheme)
    light, full = (timm.create_model(name, device="meta") for name in ("container_light", "container"))
    network(drawing, light, full)
    block(drawing, light)
    equation(drawing, light, full)
    return drawing.svg()


if __name__ == "__main__":
    for scheme in SCHEMES:
        Path(__file__).with_name(f"network-{scheme}.svg").write_text(draw(scheme), encoding="utf-8")
