"""The manifest, and the way of a checkpoint from a file to a model."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import reference
import timm
import torch
from conftest import ROOT

from container import weights

NAME = "container_light.ai2_in1k"


def test_manifest_has_the_released_record_and_says_what_is_unknown():
    assert weights.manifest() == json.loads((ROOT / "weights_manifest.json").read_text())["weights"]
    record = weights.manifest()[NAME]
    assert f"{record['architecture']}.{record['tag']}" == NAME and record["architecture"] in timm.list_models()
    assert record["status"] == "unverified"
    assert record["file"]["sha256"] is None and record["file"]["bytes"] is None and record["license"]["weights"] is None
    assert "MIT" in record["license"]["stated"] and "Apache 2.0" in record["license"]["stated"]
    assert all(result["measured_by"].startswith("the paper's authors") for result in record["results"])


def test_default_cfg_is_the_record():
    cfg, record = timm.get_pretrained_cfg(NAME), weights.manifest()[NAME]
    for key, value in record["input"].items():
        assert getattr(cfg, key) == (tuple(value) if isinstance(value, list) else value)
    assert cfg.num_classes == record["num_classes"] and cfg.origin_url == record["origin_url"] and not cfg.url


def test_weights_that_have_to_be_fetched_by_hand():
    for name in ("container_light", NAME):
        with pytest.raises(
            RuntimeError, match=r"downloaded by hand.*get https://drive.google.com/.* and pass pretrained"
        ):
            timm.create_model(name, pretrained=True, device="meta")


def test_weights_that_do_not_exist():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for container_conv"):
        timm.create_model("container_conv", pretrained=True, device="meta")
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("container_conv.in1k", pretrained=True, device="meta")


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere\.pth"):
        timm.create_model("container_light", pretrained=True, pretrained_cfg_overlay=dict(file="nowhere.pth"))


def test_which_weights_of_a_checkpoint_are_read(tmp_path):
    path = tmp_path / "checkpoint.pth"
    released, ours = reference.random_state(0), timm.create_model("container_light_nano").state_dict()
    torch.save(dict(model=released, model_ema={k: v * 0 for k, v in released.items()}), path)
    assert torch.equal(weights.read(path)["head.weight"], released["head.weight"])
    torch.save(dict(state_dict={k: v * 0 for k, v in ours.items()}, state_dict_ema=ours), path)
    assert torch.equal(weights.read(path)["head.fc.weight"], ours["head.fc.weight"])


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(RuntimeError, match="weights_only"):
        weights.read(path)
    assert not (tmp_path / "exploded").exists()


def test_other_sources_are_left_to_timm(tmp_path):
    state = timm.create_model("container_light_nano_32").state_dict()
    given = dict(state_dict=state)
    model = timm.create_model("container_light_nano_32", pretrained=True, pretrained_cfg_overlay=given)
    assert torch.equal(model.head.fc.weight, state["head.fc.weight"])
    assert weights.resolve("container_light", None, dict(url="https://example.org/x.pth")) == dict(
        url="https://example.org/x.pth"
    )


@pytest.mark.slow
def test_wheel_has_the_manifest_and_registers_the_models(tmp_path):
    """Built, installed without the repository around it, and used from an empty folder."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, timeout=300)
    code = (
        "import container, timm; from container import weights; print(container.__file__); "
        "print(len(timm.list_models('container*')), list(weights.manifest()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    file, found = result.stdout.splitlines()
    assert file.startswith(str(tmp_path / "site")) and found == f"13 ['{NAME}']"
