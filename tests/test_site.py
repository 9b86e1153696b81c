"""The site builds without a warning, its links and pictures are there, and it has every public name."""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from conftest import ROOT

CODE = "https://code.invalid/container"
HOST = "https://site.invalid/"
MODULES = sorted(path.stem for path in (ROOT / "docs" / "reference").glob("*.md") if path.stem != "index")
LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("source", "srcset"), ("iframe", "src")}


class Page(HTMLParser):
    """Its anchors, its links, its pictures, and what a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.images, self.loaded = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids.add(found.get("id"))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "img":
            self.images.append((found["src"], found.get("alt")))
        self.loaded += [value for name, value in attrs if (tag, name) in LOADED and found.get("rel") != "canonical"]


@pytest.fixture(scope="module", params=["", CODE], ids=["no repository", "repository"])
def site(request, tmp_path_factory):
    """The folder, and its pages by their address under HOST."""
    for library in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    variables = dict(os.environ, REPOSITORY_URL=request.param, NO_MKDOCS_2_WARNING="1")
    build = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    paths = [path for path in folder.rglob("*.html") if path.name != "404.html"]
    return folder, {urljoin(HOST, path.relative_to(folder).as_posix()): Page(path) for path in paths}


def _target(folder: Path, page: str, link: str) -> tuple[str, Path, str]:
    """Where a link leads: address, file, anchor."""
    parts = urlsplit(urljoin(page, link))
    path = folder / unquote(parts.path).lstrip("/")
    path = path / "index.html" if path.is_dir() else path
    return urljoin(HOST, path.relative_to(folder).as_posix()), path, unquote(parts.fragment)


def test_pictures_have_captions(site):
    """Under each stands what GitHub shows only to those who do not see it."""
    for source in (ROOT / "docs").glob("*.md"):
        for text in re.findall(r"^!\[(.+)\]\(", source.read_text(encoding="utf-8"), flags=re.MULTILINE):
            name = "index.html" if source.stem == "README" else f"{source.stem}/index.html"
            assert f"<figcaption>{text}</figcaption>" in (site[0] / name).read_text(encoding="utf-8")


def test_links_resolve(site):
    folder, pages = site
    lost, followed = [], 0
    for page, content in pages.items():
        for link in content.links:
            if not urljoin(page, link).startswith(HOST):
                continue
            address, path, anchor = _target(folder, page, link)
            found = path.is_file() and (not anchor or anchor in pages[address].ids)
            lost += [] if found else [f"{page}: {link}"]
            followed += 1
    assert followed > 1000 and lost == []


def test_links_to_code_lead_to_files(site, request):
    _, pages = site
    code = {link for content in pages.values() for link in content.links if link.startswith(CODE)}
    assert bool(code) == ("no repository" not in request.node.callspec.id)
    for link in code:
        assert (ROOT / link.removeprefix(f"{CODE}/blob/HEAD/")).exists(), link


def test_pictures_are_there_and_described(site):
    folder, pages = site
    found = [(page, *image) for page, content in pages.items() for image in content.images]
    assert {Path(urlsplit(src).path).name for _, src, _ in found} >= {"network-light.svg", "network-dark.svg"}
    for page, src, alt in found:
        assert _target(folder, page, src)[1].is_file(), f"{page}: {src}"
        assert alt and alt.strip(), f"{page}: {src} has no text"


def test_nothing_is_loaded_from_elsewhere(site):
    folder, pages = site
    for page, content in pages.items():
        for link in content.loaded:
            assert urljoin(page, link).startswith((HOST, "data:")), f"{page}: {link}"
    for sheet in folder.rglob("*.css"):
        assert "url(http" not in sheet.read_text(encoding="utf-8") and "url(//" not in sheet.read_text(encoding="utf-8")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_documented(site, module):
    _, pages = site
    names = importlib.import_module(f"container.{module}").__all__
    missing = {f"container.{module}.{name}" for name in names} - pages[f"{HOST}reference/{module}/index.html"].ids
    assert missing == set()


def test_the_package_is_documented():
    """What `container` exports, by the module that it comes from."""
    import container

    for name in container.__all__:
        thing = getattr(container, name)
        module = getattr(thing, "__module__", thing.__name__).removeprefix("container.")
        assert module in MODULES, name
