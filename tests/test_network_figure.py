"""docs/network-*.svg is what docs/network.py draws of the models as they are."""

import runpy
import xml.etree.ElementTree as ElementTree

import pytest
import timm
from conftest import ROOT

SVG = "{http://www.w3.org/2000/svg}"
DRAWING = runpy.run_path(str(ROOT / "docs" / "network.py"))


@pytest.mark.parametrize("scheme", DRAWING["SCHEMES"])
def test_the_committed_figure_is_the_drawn_one(scheme):
    committed = (ROOT / "docs" / f"network-{scheme}.svg").read_bytes()
    assert DRAWING["draw"](scheme).encode() == committed


@pytest.mark.parametrize("scheme", DRAWING["SCHEMES"])
def test_it_is_an_image_with_a_description(scheme):
    root = ElementTree.parse(ROOT / "docs" / f"network-{scheme}.svg").getroot()
    assert root.get("role") == "img" and root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
    assert {element.tag for element in root.iter()} & {f"{SVG}image", f"{SVG}script"} == set()


def test_it_follows_the_models(monkeypatch):
    """Another depth is another number and another layer in the stack."""
    create, before = timm.create_model, DRAWING["draw"]("light")
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **kwargs, depths=(3, 4, 9, 3)))
    after = DRAWING["draw"]("light")
    assert after.count(">9</text>") == before.count(">9</text>") + 1
    assert after.count("<rect") == before.count("<rect") + 1
