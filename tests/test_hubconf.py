"""torch.hub finds the family in a copy of the repository."""

import importlib.util
import runpy

import pytest
import timm
import torch
from conftest import ROOT
from test_weights import STATE


def test_every_member_is_an_entry_point():
    """All of what `torch.hub.list` lists, which itself takes repositories of GitHub alone: the callables in public."""
    found = runpy.run_path(str(ROOT / "hubconf.py"))
    listed = [name for name, thing in found.items() if callable(thing) and not name.startswith("_")]
    assert sorted(listed) == sorted(timm.list_models(module="container"))
    assert all(importlib.util.find_spec(name) for name in found["dependencies"])


def test_pretrained_weights_are_those_of_the_package():
    model = torch.hub.load(str(ROOT), "container_light_nano_32", source="local", pretrained=True)
    assert model.state_dict().keys() == STATE.keys()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in STATE.items())


def test_arguments_are_the_models():
    model = torch.hub.load(str(ROOT), "container_light_nano", source="local", num_classes=3).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_no_member_pretends_to_have_weights():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for container_conv"):
        torch.hub.load(str(ROOT), "container_conv", source="local", pretrained=True)
