"""The page of `container explore`: what is drawn are rows of the affinities, and visitors' mistakes are one line."""

import asyncio
import base64
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.parse import parse_qsl

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT, randomize
from matplotlib import colormaps
from PIL import Image

from container import explore, figures
from container.__main__ import main
from container.explore import Explorer, Pane, link, open_upload, paint, read_link, take_upload
from container.predict import SAMPLE, predict

NANO = "container_nano.lite2_dist"
SIDE = 64
PIXEL = (20, 40)


@pytest.fixture(scope="module")
def photo():
    return Image.open(SAMPLE).convert("RGB").resize((SIDE, SIDE)).tobytes()


@pytest.fixture(scope="module")
def explorer():
    torch.manual_seed(0)
    return Explorer(randomize(timm.create_model("container_nano")).eval(), SIDE)


def by_figures(explorer, photo, number, pixel):
    """Rows (M, H, W) of a block, and the token's place, from a pass of the model itself."""
    block, maps = explorer.blocks[number - 1], {}
    figures.watch(explorer.model, explorer._given(photo), lambda name, _, x: maps.update({name: x}))
    x = maps[block.name]
    token = (pixel[1] // block.stride, pixel[0] // block.stride)
    found = figures.affinities(explorer.model.get_submodule(block.name))
    return {kind: figures.rows(apply, heads, x, [token]) for kind, (apply, heads) in found.items()}, token


@pytest.mark.parametrize("number", [1, 4, 11, 13])
def test_what_is_drawn_are_the_rows_of_figures(explorer, photo, number):
    rows, token = by_figures(explorer, photo, number, PIXEL)
    block = explorer.blocks[number - 1]
    for head in (0, 1, block.heads):
        views = explorer.look(photo, number, PIXEL, block.alpha, block.beta, head)
        assert list(views) == ["dynamic", "static", "mixed"]
        for kind, view in views.items():
            own = rows[kind][0].chunk(block.heads)
            expected = (rows[kind][0] if head == 0 else own[head - 1]).abs().mean(0)
            torch.testing.assert_close(view.values, expected)
            assert view.entropy == pytest.approx(figures.entropy(expected).item(), rel=1e-5)
            assert view.reach == pytest.approx(
                figures.reach(expected[None, None], [token], block.stride).item(), rel=1e-5
            )


def test_the_same_as_the_figures_of_the_command(explorer, photo):
    """`figures.look` is another way to every block's rows."""
    for number, view in enumerate(figures.look(explorer.model, explorer._given(photo), PIXEL, samples=1), 1):
        block = explorer.blocks[number - 1]
        assert (block.name, block.stage, block.stride) == (view.name, view.stage, view.stride)
        for kind, row in explorer.look(photo, number, PIXEL, block.alpha, block.beta).items():
            torch.testing.assert_close(row.values, view.rows[kind])


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.9), (-0.5, 2.0)])
def test_sliders_mix_the_matrices(explorer, photo, alpha, beta):
    number = 4
    views = explorer.look(photo, number, PIXEL, alpha, beta)
    block, x = explorer.blocks[number - 1], explorer.maps(photo)[explorer.blocks[number - 1].name]
    aggregation = explorer.model.get_submodule(block.name)
    with torch.no_grad():
        dynamic, static = aggregation.dynamic.matrix(x), aggregation.static.matrix(x)
    times = static.shape[1] // dynamic.shape[1]
    mixed = (alpha * dynamic.repeat_interleave(times, 1) + beta * static)[0]
    token = (PIXEL[1] // block.stride) * x.shape[-1] + PIXEL[0] // block.stride
    torch.testing.assert_close(views["mixed"].values, mixed[:, token].abs().mean(0).unflatten(0, x.shape[-2:]))
    if (alpha, beta) in ((1, 0), (0, 1)):
        torch.testing.assert_close(views["mixed"].values, views["dynamic" if alpha else "static"].values)


def test_the_classes_follow_and_return(explorer, photo):
    """By a model whose own parameters are set; afterwards the gate is the module that it was."""
    number, (alpha, beta) = 6, (0.1, 1.7)
    block = explorer.blocks[number - 1]
    gate = explorer.model.get_submodule(block.name).gate
    given = explorer._given(photo)
    with torch.no_grad():
        learned = explorer.model(given)[0].softmax(0)
        found = explorer._probabilities(photo, number, alpha, beta)
        assert explorer.model.get_submodule(block.name).gate is gate
        assert torch.equal(explorer.model(given)[0].softmax(0), learned)
        gate.alpha.fill_(alpha), gate.beta.fill_(beta)
        expected = explorer.model(given)[0].softmax(0)
        gate.alpha.fill_(block.alpha), gate.beta.fill_(block.beta)
    torch.testing.assert_close(found, expected)
    assert (found - learned).abs().max() > 1e-3
    torch.testing.assert_close(explorer._probabilities(photo, number, block.alpha, block.beta), learned)


def test_the_gate_returns_after_an_error(explorer, photo):
    gates = figures.gates(explorer.model)
    with pytest.raises(RuntimeError, match="in the middle"), explorer._mixed_by(explorer.blocks[0], 1.0, 0.0):
        raise RuntimeError("in the middle")
    assert figures.gates(explorer.model) == gates


@pytest.mark.parametrize(
    ("name", "options", "kinds", "heads"),
    [
        ("container_light_nano", dict(), ("static", "mixed"), 16),
        ("container_nano", dict(static="none"), ("dynamic", "mixed"), 2),
        ("container_nano", dict(dynamic="none", static="matrix", num_heads=1), ("static", "mixed"), 1),
        ("container_nano", dict(static="matrix", gate="sum"), ("dynamic", "static", "mixed"), 2),
    ],
)
def test_other_kinds_of_blocks(name, options, kinds, heads, photo):
    """What is alone is the mixed one, whatever the sliders say."""
    explorer = Explorer(timm.create_model(name, img_size=SIDE, **options).eval(), SIDE)
    number = 1 if name == "container_light_nano" else 3
    block = explorer.block(number)
    assert block.kinds == kinds and block.heads == heads and block.gated == (len(kinds) == 3)
    rows, _ = by_figures(explorer, photo, number, PIXEL)
    views = explorer.look(photo, number, PIXEL, block.alpha, block.beta)
    for kind in kinds:
        torch.testing.assert_close(views[kind].values, rows[kind][0].abs().mean(0))
    other = explorer.look(photo, number, PIXEL, 0.2, 0.3)
    assert torch.equal(other["mixed"].values, views["mixed"].values) == (not block.gated)


def test_places_that_are_not_there(explorer, photo):
    for number, pixel, head, said in (
        (0, PIXEL, 0, "block 0 is not in 1 to 13"),
        (14, PIXEL, 0, "block 14 is not in 1 to 13"),
        (1, (SIDE, 0), 0, "x and y go from 0 to 63"),
        (1, (0, -1), 0, "not in the photo"),
        (3, PIXEL, 3, "head 3 is not in 1 to 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            explorer.look(photo, number, pixel, 1.0, 1.0, head)
    with pytest.raises(ValueError, match="ResNet has no affinities"):
        Explorer(timm.create_model("resnet10t").eval(), SIDE)


def test_colours():
    values = torch.tensor([[0.0, 0.1], [0.2, 0.4]])
    expected = colormaps["cividis"](np.array([[0, 0.25], [0.5, 1.0]]), bytes=True)[..., :3]
    assert np.array_equal(np.asarray(paint(values)), expected)
    assert np.array_equal(np.asarray(paint(torch.zeros(2, 2))), np.tile(expected[0, 0], (2, 2, 1)))


def test_a_page_shows_the_map_where_it_belongs(explorer, photo):
    """The picture in the page is the map, and reaches as far as its tokens do: beyond an image of 70 pixels."""
    views = explorer.look(photo, 4, PIXEL, 0.5, 0.5)
    page = explore._maps_page(views, explorer.blocks[3], SIDE)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)" style="width:([\d.]+)%', page)
    assert len(pictures) == 3
    for (data, width), view in zip(pictures, views.values()):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(paint(view.values)))
        assert float(width) == 100
    assert f"<b>{views['dynamic'].entropy:.2f} bits</b>" in page and f"<b>{views['mixed'].reach:.1f} pixels" in page
    assert "width:114.2857%" in explore._maps_page(
        {"mixed": views["mixed"]._replace(values=torch.ones(10, 10))}, explorer.blocks[3], 70
    )


def test_classes_are_text():
    page = explore._classes_page(["<b>, x", "cat"], torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5]))
    assert "&lt;b&gt;" in page and "75.0 %" in page and "left:50.00%" in page and "The line in a bar" in page
    unmoved = torch.tensor([0.5, 0.5])
    assert "left:" not in explore._classes_page(["a", "b"], unmoved, unmoved)


@pytest.mark.parametrize(
    "panes",
    [
        [Pane("a.tag", 3)],
        [Pane("a.tag", 3, 2, 0.25, -1.5), Pane("b", 13, 0, None, 1.0)],
    ],
)
def test_links_go_there_and_back(panes):
    found = link((5, 60), panes)
    assert read_link(dict(parse_qsl(found.removeprefix("?"))), ["a.tag", "b"]) == ((5, 60), panes)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (dict(model="local-dir:/etc"), "names another model than a.tag"),
        (dict(model="a.tag", block="x"), "the link's block is not a whole number: x"),
        (dict(model="a.tag", alpha="nan"), "the link's alpha is not a number: nan"),
        (dict(model="a.tag", y="1.5"), "the link's y is not a whole number: 1.5"),
    ],
)
def test_links_that_lead_nowhere(query, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_link(query, ["a.tag"])
    assert read_link(dict(utm="x"), ["a.tag"]) == (None, [])


def test_a_number_beyond_all_bounds_is_one_line():
    with pytest.raises(ValueError, match="the link's x is not a whole number: 1111"):
        read_link(dict(x="1" * 400), [])


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_address_may_be_of_ipv6():
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="nothing can listen at ::1, port"):
            explore._check_address("::1", port)
    explore._check_address("::1", port)


def test_two_visitors_may_give_the_same_photo(tmp_path):
    """Gradio keeps it in one file, which the first to read it removes; what is gone is one plain line."""

    def crop(photo):
        return photo.crop((0, 0, 20, 20)).tobytes()

    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), (9, 99, 200)).save(path)
    first = take_upload(str(path), crop)
    assert not path.exists() and take_upload(str(path), crop) == first == bytes((9, 99, 200)) * 400
    with pytest.raises(ValueError, match=r"^this photo is here no longer: please choose it again$"):
        take_upload(str(tmp_path / "other.png"), crop)
    path.write_bytes(b"no photo")
    with pytest.raises(ValueError, match="cannot be read as a JPEG, PNG or WebP photo"):
        take_upload(str(path), Image.Image.tobytes)
    assert not path.exists()


def test_uploads(tmp_path, monkeypatch):
    for kind in ("jpg", "png", "webp"):
        Image.open(SAMPLE).save(tmp_path / f"photo.{kind}")
        assert open_upload(tmp_path / f"photo.{kind}").size == (451, 300)
    (tmp_path / "text.png").write_text("no photo")
    Image.open(SAMPLE).save(tmp_path / "other.png", "BMP")  # Pillow reads it, but it is none of the kinds
    whole = (tmp_path / "photo.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (4000, 10)).save(tmp_path / "thin.png")
    for name, said in (
        ("text.png", "text.png cannot be read as a JPEG, PNG or WebP photo"),
        ("other.png", "other.png cannot be read as a JPEG, PNG or WebP photo"),
        ("half.png", "half.png cannot be read as a photo: "),
        ("thin.png", "thin.png cannot be read as a photo: 4000 x 10 pixels are over 100 times as long as wide"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}") as error:
            open_upload(tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
    Image.open(SAMPLE).save(tmp_path / "scans.jpg", progressive=True)
    whole = (tmp_path / "scans.jpg").read_bytes()
    last = whole.rindex(b"\xff\xda")
    (tmp_path / "scans.jpg").write_bytes(whole[:last] + whole[last:-2] * 100 + whole[-2:])
    with pytest.raises(ValueError, match=r"^scans.jpg is stored in 1\d\d scans, and 100 are allowed$"):
        open_upload(tmp_path / "scans.jpg")
    monkeypatch.setattr(explore, "_MEGAPIXELS", 0.1)
    with pytest.raises(ValueError, match=r"photo.png has more than 0.1 million pixels"):
        open_upload(tmp_path / "photo.png")
    monkeypatch.setattr(explore, "_MEGABYTES", 0.1)
    with pytest.raises(ValueError, match=r"photo.png is larger than 0.1 MB"):
        open_upload(tmp_path / "photo.png")


def ask(guard, method="GET", path="/", messages=(), **headers):
    """The status of an answer, and the body that the application received."""
    received, sent, rest = [], [], list(messages)

    async def application(scope, receive, send):
        received.append((await receive())["body"] if method == "POST" else None)
        await send(dict(type="http.response.start", status=200, headers=[]))

    async def receive():
        return rest.pop(0) if rest else dict(type="http.disconnect")

    async def send(message):
        sent.append(message)

    guard.app = application
    names = [(key.replace("_", "-").encode(), str(value).encode()) for key, value in headers.items()]
    asyncio.run(guard(dict(type="http", method=method, path=path, headers=names), receive, send))
    return (sent[0]["status"] if sent else None), (received or [None])[0]


HERE = "127.0.0.1:7860"


@pytest.mark.parametrize(
    ("status", "path", "headers"),
    [
        (200, "/", dict(host=HERE)),
        (200, "/gradio_api/queue/data", dict(host="localhost:7860")),
        (200, "/assets/index.js", dict(host="[::1]:7860", origin="http://[::1]:7860")),
        (400, "/", dict(host="evil.example:7860")),
        (400, "/", {}),
        (403, "/", dict(host=HERE, origin="http://evil.example")),
        (403, "/", dict(host=HERE, origin="http://127.0.0.1:9000")),
        (403, "/", dict(host=HERE, origin="null")),
        (404, "/gradio_api/process_recording", dict(host=HERE)),
        (404, "/monitoring/summary", dict(host=HERE)),
        (404, "/openapi.json", dict(host=HERE)),
    ],
)
def test_the_page_answers_to_itself_alone(status, path, headers):
    """On a loopback address; on a network, whatever its name is there."""
    assert ask(explore._Guard(None, "127.0.0.1"), path=path, **headers)[0] == status
    if status != 404:
        assert ask(explore._Guard(None, "0.0.0.0"), path=path, **headers)[0] == 200


def test_a_request_that_breaks_off_leaves_nothing(monkeypatch):
    """The application hears of a whole one only."""
    guard, upload = explore._Guard(None, "127.0.0.1"), "/gradio_api/upload"
    parts = [dict(type="http.request", body=bytes(5), more_body=more) for more in (True, False)]
    assert ask(guard, "POST", upload, parts, host=HERE, content_length=10) == (200, bytes(10))
    assert ask(guard, "POST", upload, parts[:1], host=HERE, content_length=10) == (None, None)
    assert ask(guard, "POST", upload, parts, host=HERE, content_length=10**9) == (413, None)
    assert ask(guard, "POST", upload, parts, host=HERE) == (413, None)
    assert ask(guard, "POST", upload, parts, host=HERE, content_length="x") == (400, None)
    monkeypatch.setattr(explore, "_POST", 8)
    assert ask(guard, "POST", upload, parts * 3, host=HERE, content_length=7) == (None, None)


def test_the_page_sees_what_predict_sees():
    """The sample's square goes through the model's own preparation unchanged."""
    models = explore._Models([NANO])
    square = models.square(Image.open(SAMPLE).convert("RGB"))
    seen, _ = figures.seen(Image.open(SAMPLE).convert("RGB"), models._config)
    torch.testing.assert_close(models[NANO]._given(square), seen, rtol=0, atol=1e-6)
    ((name, p), *_), *_ = predict([SAMPLE], models[NANO].model)
    block = models[NANO].block(1)
    found = models[NANO].probabilities(square, 1, block.alpha, block.beta)
    assert found.max().item() == pytest.approx(p, abs=1e-5) and models[NANO].classes[found.argmax()] == name


def test_learned_values_are_not_moved_by_the_sliders_steps():
    models = explore._Models([NANO])
    block = models[NANO].block(5)
    rounded = Pane(NANO, 5, 0, round(block.alpha, 3), round(block.beta, 3))
    assert models.settled(rounded) == Pane(NANO, 5)
    moved = rounded._replace(alpha=round(block.alpha, 3) + 0.001)
    assert models.settled(moved) == moved._replace(beta=None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no.jpg"], "argument PHOTO: no file no.jpg"),
        ([__file__], "cannot be read as a photo: it is not an image file"),
        (["--model", "resnet18"], "no model 'resnet18' in this family: `container list` has them"),
        (
            ["--model", "container_nano.mine"],
            "container_nano.mine has no pre-trained weights: there are container_nano.lite2_dist",
        ),
        (["--img-size", "8"], f"8 pixels are too few for {NANO}: one token of its last stage takes 32"),
        (["--port", "70000"], "there is no port 70000: they go from 1 to 65535"),
        (["--host", "192.0.2.1"], "nothing can listen at 192.0.2.1, port "),
        (["--port", "TAKEN"], "nothing can listen at 127.0.0.1, port "),
    ],
)
def test_mistakes(words, said, monkeypatch, answer):
    pytest.importorskip("gradio", reason="gradio is not installed")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in words]
        if "--port" not in words:
            words += ["--port", str(free_port())]
        assert said in answer("explore", *words)


def test_without_gradio(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit) as stop:
        main(["explore", "--port", str(free_port())])
    assert str(stop.value) == "container: the page needs gradio: pip install gradio"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# ------------------------------------------------------------------------------------------------------ in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
QUIET += ["--disable-component-update", "--disable-sync", "--disable-quic"]
PATIENCE = 60_000  # milliseconds, of machines that have other things to do


@contextmanager
def serving(command, folder, **environment):
    """The address of a page that a command serves, which leaves nothing behind, and what it has printed."""
    (folder / "tmp").mkdir()
    (folder / "here").mkdir()
    port, log = free_port(), folder / "log.txt"
    command = [word.replace("PORT", str(port)) for word in command]
    known = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    known |= {key: value.replace("PORT", str(port)) for key, value in environment.items()}
    with log.open("w") as printed:
        process = subprocess.Popen(command, cwd=folder / "here", env=known, stdout=printed, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 180
        while "until Ctrl+C" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/", log
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert len(log.read_text().splitlines()) == 1, log.read_text()
    left = [path for path in folder.rglob("*") if path.is_file() and path != log]
    # PyTorch keeps what it compiles there, Matplotlib its list of fonts.
    assert [path for path in left if "torchinductor" not in str(path) and "matplotlib" not in str(path)] == []


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("gradio", reason="gradio is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    command = [sys.executable, "-m", "container", "explore", "--port", "PORT"]
    with serving(command, tmp_path_factory.mktemp("served")) as found:
        yield found


DROPPED = """bytes => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], "blue.png", {type: "image/png"}));
    return transfer;
}"""  # what a browser hands over with a file that is dropped


class Visit:
    """A visitor, who sees what is on the page."""

    def __init__(self, browser, address, log):
        self.page, self.address, self.log = browser.new_page(viewport=dict(width=1440, height=1000)), address, log
        self.page.set_default_timeout(PATIENCE)
        self.wrong = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.wrong.append(request.url) if self.elsewhere(request.url) else None)

    def elsewhere(self, url):
        return not url.startswith((self.address, "data:", "blob:"))

    def open(self, query=""):
        self.page.goto(self.address + query)
        self.page.wait_for_selector("#pane1 .classes")
        return self

    def source(self, kind, pane=1):
        return self.page.locator(f"#pane{pane} .map[data-kind={kind}] img").get_attribute("src")

    def map(self, kind, pane=1):
        data = base64.b64decode(self.source(kind, pane).partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(data)))

    def until_changed(self, act, selector="#pane1 .maps"):
        """Does something and waits for its effect."""
        before = self.page.locator(selector).inner_html()
        act()
        code = "([selector, before]) => document.querySelector(selector)?.innerHTML != before"
        self.page.wait_for_function(code, arg=[selector, before])

    def place(self):
        return tuple(int(self.page.locator(f"#{axis} input").input_value()) for axis in "xy")

    def told(self):
        return self.page.get_by_role("alert").inner_text()

    def classes(self):
        return self.page.locator("#pane1 .classes").inner_text()

    def link(self):
        return self.page.locator(".here a").get_attribute("href")

    def choose(self, field, text):
        """Takes an entry of a list, and waits for the list to have faded: another may have the same entry."""
        field.click()
        self.page.get_by_role("option", name=text, exact=True).click()
        self.page.get_by_role("listbox").wait_for(state="detached")

    def button(self, name):
        return self.page.locator("#pane1").get_by_role("button", name=name)


@pytest.fixture
def visit(browser, served):
    visit = Visit(browser, *served)
    yield visit.open()
    visit.page.close()
    assert visit.wrong == []


@pytest.fixture(scope="module")
def models():
    return explore._Models([NANO, "container_light_nano.lite2_dist"], None)


def sees(models, pane, pixel):
    """The pictures that a page should have of the sample."""
    square = models.square(Image.open(SAMPLE).convert("RGB"))
    block = models[pane.model].block(pane.block)
    alpha = block.alpha if pane.alpha is None else pane.alpha
    beta = block.beta if pane.beta is None else pane.beta
    views = models[pane.model].look(square, pane.block, pixel, alpha, beta, pane.head)
    return {kind: np.asarray(paint(view.values)) for kind, view in views.items()}


def same(found, expected):
    """Other kernels round otherwise: a step of the colour map."""
    return found.shape == expected.shape and np.abs(found.astype(int) - expected.astype(int)).max() <= 3


def check(visit, models, pane, pixel):
    assert visit.place() == pixel
    for kind, expected in sees(models, pane, pixel).items():
        assert same(visit.map(kind), expected), kind


@pytest.mark.slow
def test_a_click_shows_what_the_token_reads(visit, models):
    pane = models.first_pane()
    check(visit, models, pane, models.first_pixel())
    box = visit.page.locator(".spot.photo").bounding_box()
    at = dict(x=box["width"] * 100.5 / 128, y=box["height"] * 30.5 / 128)
    visit.until_changed(lambda: visit.page.locator(".spot.photo").click(position=at))
    check(visit, models, pane, (100, 30))
    visit.until_changed(lambda: visit.page.keyboard.press("ArrowLeft"))
    check(visit, models, pane, (100 - models[NANO].block(pane.block).stride, 30))
    visit.until_changed(lambda: visit.page.locator("#y input").fill("127"))
    check(visit, models, pane, (92, 127))
    visit.until_changed(lambda: visit.page.locator(".map .spot").first.click(position=dict(x=3, y=3)))
    before = visit.place()
    visit.until_changed(lambda: visit.page.keyboard.press("ArrowDown"))  # after a click in a map too
    check(visit, models, pane, (before[0], before[1] + models[NANO].block(pane.block).stride))
    visit.page.locator("#y input").fill("128")
    assert visit.told().startswith("x and y go from 0 to 127")
    assert visit.page.locator("footer").is_hidden()


@pytest.mark.slow
def test_sliders_and_buttons(visit, models):
    pane, pixel = models.first_pane(), models.first_pixel()
    learned = visit.classes()
    visit.until_changed(lambda: visit.button("Attention").click())
    assert visit.source("mixed") == visit.source("dynamic") and visit.classes() != learned
    assert dict(parse_qsl(visit.link()[1:]))["alpha"] == "1.0"
    visit.until_changed(lambda: visit.button("Convolution").click())
    assert visit.source("mixed") == visit.source("static")
    visit.until_changed(lambda: visit.page.locator("#pane1 input[type=range]").first.press("End"))  # alpha
    check(visit, models, pane._replace(alpha=1.0, beta=1.0), pixel)
    visit.until_changed(lambda: visit.button("Reset").click())
    check(visit, models, pane, pixel)
    assert visit.classes() == learned and "alpha" not in visit.link()


@pytest.mark.slow
def test_a_link_shows_the_same(visit, models):
    panes = [Pane(NANO, 8, 3, 0.25, 0.5), Pane("container_light_nano.lite2_dist", 12, 2)]
    visit.open(link((70, 20), panes))
    check(visit, models, panes[0], (70, 20))
    for kind, expected in sees(models, panes[1], (70, 20)).items():
        assert same(visit.map(kind, pane=2), expected), kind
    assert visit.link() == link((70, 20), panes)
    visit.open("?model=resnet18")
    assert visit.told().startswith("the link names another model than")
    check(visit, models, models.first_pane(), models.first_pixel())


@pytest.mark.slow
def test_another_block_and_another_model(visit, models):
    def choose(label, text):
        visit.choose(visit.page.locator("#pane1").get_by_label(label, exact=True), text)

    visit.until_changed(lambda: choose("Block", "stage 3, block 2"))
    check(visit, models, Pane(NANO, 7), models.first_pixel())
    visit.until_changed(lambda: choose("Head", "head 4"))
    check(visit, models, Pane(NANO, 7, 4), models.first_pixel())
    visit.until_changed(lambda: choose("Model", "container_light_nano.lite2_dist"))
    check(visit, models, Pane("container_light_nano.lite2_dist", 7), models.first_pixel())
    assert "This block has no dynamic affinity." in visit.page.locator("#pane1").inner_text()
    assert visit.button("Attention").is_disabled()
    assert visit.page.locator("#pane2").is_hidden()
    visit.choose(visit.page.locator("#second input"), NANO)
    visit.page.wait_for_selector("#pane2 .map[data-kind=dynamic]")
    assert same(visit.map("dynamic", pane=2), sees(models, Pane(NANO, 7), models.first_pixel())["dynamic"])


@pytest.mark.slow
def test_a_photo_of_ones_own(visit, tmp_path):
    given = visit.page.locator("#upload input[type=file]")
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    visit.until_changed(lambda: given.set_input_files(tmp_path / "red.png"), "#pane1 .classes")
    assert "your photo stays on this machine" in visit.page.locator(".here").inner_text()
    for name, content, said in (
        ("text.png", b"no photo", "text.png cannot be read as a JPEG, PNG or WebP photo"),
        ("large.png", bytes(11 * 10**6), "large.png is larger than 10 MB"),
    ):
        (tmp_path / name).write_bytes(content)
        visit.page.locator("#upload input[type=file]").set_input_files(tmp_path / name)
        visit.page.get_by_role("alert").get_by_text(said, exact=True).wait_for()
        assert "Traceback" not in visit.page.content()
    assert list((visit.log.parent / "tmp").rglob("*.png")) == []  # as soon as they have been read
    visit.until_changed(lambda: visit.page.get_by_role("button", name="Back to the first photo").click())
    assert "Link to this view" in visit.page.locator(".here").inner_text()
    Image.new("RGB", (40, 50), (30, 30, 200)).save(tmp_path / "blue.png")
    dropped = visit.page.evaluate_handle(DROPPED, list((tmp_path / "blue.png").read_bytes()))
    visit.until_changed(
        lambda: visit.page.dispatch_event("#upload button", "drop", dict(dataTransfer=dropped)), "#pane1 .classes"
    )
    assert "your photo stays on this machine" in visit.page.locator(".here").inner_text()
    assert visit.log.read_text().count("\n") == 1


@pytest.mark.slow
def test_the_space(browser, tmp_path):
    """Its file starts, and its card names it."""
    command = [sys.executable, str(ROOT / "examples" / "space" / "app.py")]
    with serving(command, tmp_path, GRADIO_SERVER_PORT="PORT") as (address, log):
        visit = Visit(browser, address, log).open()
        assert visit.page.title() == "What does a token read?" and visit.map("mixed").shape == (16, 16, 3)
        visit.page.close()
        assert visit.wrong == []
    header = yaml.safe_load((ROOT / "examples" / "space" / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header["sdk"] == "gradio" and header["app_file"] == "app.py" and header["title"]
    assert f'"gradio>={header["sdk_version"].removesuffix(".0")}"' in (ROOT / "pyproject.toml").read_text()
