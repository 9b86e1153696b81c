"""The zoo's table, and files of weights on their way in and out."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import jsonschema
import pytest
import reference
import safetensors.torch
import timm
import torch
from conftest import ROOT
from test_weights import OURS, PACKAGED, RELEASED, SCHEMA

from container import weights, zoo


def test_table_has_every_entry_and_only_measured_numbers():
    rows = zoo.table(markdown=True).splitlines()
    assert len(rows) == 2 + len(weights.manifest())
    for row, record in zip(rows[2:], weights.manifest().values()):
        name, _, _, image, trained, _ = row.strip("| ").split(" | ")
        assert name == f"`{record['architecture']}`" and image == f"{record['input']['input_size'][1]} px"
        assert (trained == "none yet") == (record["status"] == "untrained")
        for result in record["results"]:
            assert (str(result["value"]) in trained) == (result["metric"] == "top1")
    assert "; the paper's authors, README of the release); unverified" in rows[2]


def test_released_layout_becomes_ours(tmp_path):
    """Both sets of weights of a checkpoint; the file is what the record says, and gives the same answers."""
    model, averaged = reference.random_state(0), reference.random_state(1)
    torch.save(dict(model=model, model_ema=averaged, epoch=299), tmp_path / "released.pth")
    x = torch.randn(1, 3, 64, 64)
    for use_ema, state in ((None, model), (False, model), (True, averaged)):
        out = tmp_path / f"{use_ema}.safetensors"
        digest, record = zoo.convert(tmp_path / "released.pth", RELEASED, out, use_ema)
        assert record["file"]["sha256"] == digest and record["file"]["bytes"] == out.stat().st_size
        assert record["license"] == weights.manifest()[RELEASED]["license"] and record["file"]["layout"] == "container"
        overlay = dict(file=str(out))
        ours = timm.create_model("container_light", pretrained=True, pretrained_cfg_overlay=overlay).eval()
        torch.testing.assert_close(ours(x), reference.forward(state, x)[0], atol=1e-4, rtol=1e-4)


def test_a_run_becomes_a_record(tmp_path):
    """What `train_imagenet.py` leaves; what it does not know is null, for people to fill in."""
    weights_of_run = timm.create_model("container_light_nano", num_classes=7).state_dict()
    safetensors.torch.save_file(weights_of_run, tmp_path / "model_best.safetensors")
    summary = dict(
        command="train_imagenet.py --data-dir x",
        hardware=dict(processes=8, gpu="NVIDIA H100", cpu="CPU", threads=1),
        epochs=90,
        seconds=7200,
        best=dict(top1=50.0, file="model_best.safetensors"),
    )
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    name = "container_light_nano.seven"
    _, record = zoo.convert(tmp_path / "model_best.safetensors", name, tmp_path / "out.safetensors")
    assert record["num_classes"] == 7 and record["status"] == "available" and record["limits"] is None
    assert record["training"]["hardware"] == "8 x NVIDIA H100, 1 threads" and record["training"]["time"] == "2.0 h"
    assert record["training"]["command"] == "python train_imagenet.py --data-dir x"
    assert [result["value"] for result in record["results"]] == [50.0]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(dict(weights={name: record}), SCHEMA)
    record.update(limits="None.", trained_by="us", file=dict(record["file"], packaged=True))
    record["license"] = dict(record["license"], weights="mit")
    jsonschema.validate(dict(weights={name: record}), SCHEMA)
    torch.save(dict(state_dict=weights_of_run), tmp_path / "last.pth")  # whose accuracy the summary does not say
    assert zoo.convert(tmp_path / "last.pth", name, tmp_path / "out.safetensors")[1]["results"] == []


@pytest.mark.parametrize(
    "name, message",
    [
        ("container_light.x", r"does not fit container_light: \d+ missing"),
        ("resnet18.x", "no model resnet18: choose from container, "),
        (OURS, r"does not fit container_light_nano_32: .* \(7,\) for \(10,\)"),
    ],
)
def test_what_does_not_fit_is_not_converted(tmp_path, name, message):
    torch.save(timm.create_model("container_light_nano_32", num_classes=7).state_dict(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        zoo.convert(tmp_path / "file.pth", name, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_matrices_of_another_image_size_are_not_resampled_on_the_way(tmp_path):
    torch.save(timm.create_model("container_mixer", img_size=64).state_dict(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"stages.0.blocks.0.aggregation.static.left .* another image size"):
        zoo.convert(tmp_path / "file.pth", "container_mixer.x", tmp_path / "out.safetensors")


def test_export_is_loaded_by_local_dir(tmp_path):
    folder = tmp_path / "export"
    zoo.export(OURS, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    state = safetensors.torch.load_file(PACKAGED)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert model.pretrained_cfg["input_size"] == (3, 32, 32) and model.pretrained_cfg["label_names"][0] == "airplane"
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, in_chans=1)
    card, record = (folder / "README.md").read_text(), weights.manifest()[OURS]
    for said in ("license: apache-2.0", record["limits"], record["results"][0]["command"], record["license"]["stated"]):
        assert said in card
    assert str(ROOT) not in card + (folder / "config.json").read_text()
    with pytest.raises(FileExistsError, match="is not empty"):
        zoo.export(OURS, folder)


class Hub(SimpleHTTPRequestHandler):
    """A folder as the Hugging Face Hub serves a repository, at OWNER/NAME/resolve/REVISION/FILE."""

    def translate_path(self, path):
        return os.path.join(self.directory, path.rpartition("/")[2])

    def end_headers(self):
        self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()

    def log_message(self, *_):
        pass


def test_export_is_loaded_from_a_hub(tmp_path):
    zoo.export(OURS, tmp_path / "export")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=tmp_path / "export")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = (
            "import container, timm; model = timm.create_model('hf-hub:owner/name', pretrained=True); "
            "print(sum(t.double().sum().item() for t in model.state_dict().values()))"
        )
        environment = dict(os.environ, PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path / "home"))
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        server.shutdown()
    state = timm.create_model(OURS, pretrained=True).state_dict()
    assert result.stdout == f"{sum(t.double().sum().item() for t in state.values())}\n", result.stderr
