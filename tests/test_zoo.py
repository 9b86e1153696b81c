"""The zoo's table, and files of weights on their way in and out."""

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from functools import partial

import jsonschema
import pytest
import reference
import safetensors.torch
import timm
import torch
from conftest import ROOT, randomize
from safetensors.torch import save_file
from server import PAGE, Hub, Share, running
from test_weights import FREE, OURS, PACKAGED, RELEASED, SCHEMA

from container import weights, zoo
from container.__main__ import main


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The weights folder of a test."""
    monkeypatch.setenv("CONTAINER_WEIGHTS_DIR", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.mark.slow
def test_table_has_every_member_and_only_measured_numbers():
    rows, linked = zoo.table().splitlines(), zoo.table(markdown=True).splitlines()
    assert len(rows) == 1 + len(timm.list_models(module="container")) and len(linked) == len(rows) + 1
    for row, other in zip(rows[1:], linked[2:], strict=True):
        name, _, _, image, trained = re.split("  +", row)
        cfg = timm.get_pretrained_cfg(name)
        records = [record for record in weights.manifest().values() if record["architecture"] == name]
        assert image == f"{cfg.input_size[1]} px" and (trained == "none yet") == (not records)
        summaries = trained.split("; also ")
        assert trained == "none yet" or (len(summaries) == len(records) and summaries[0].startswith(f"{cfg.tag}: "))
        for record in records:  # the first of its accuracies is the one that a stranger takes it for
            first = next(result for result in record["results"] if result["metric"] == "top1")
            assert any(s.startswith(f"{record['tag']}: {first['value']} % ({first['data']}") for s in summaries)
            assert f"`{record['tag']}`" in other  # no weights are left out
    assert "; the paper's authors, README of the release), unverified; also lite2_dist: " in rows[1]


def test_released_layout_becomes_ours(tmp_path, place):
    """Either set of weights of a checkpoint; the file is what its record says, and gives the same answers."""
    model, averaged = reference.random_state(0), reference.random_state(1)
    torch.save(dict(model=model, model_ema=averaged, epoch=299), tmp_path / "released.pth")
    x = torch.randn(1, 3, 64, 64)
    for use_ema, state in ((None, model), (False, model), (True, averaged)):
        tag = f"ema_{use_ema}".lower()
        path, record = zoo.convert(tmp_path / "released.pth", f"container_light.{tag}", use_ema=use_ema)
        assert path == place / f"container_light.{tag}.safetensors"
        assert (
            record["file"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            and record["file"]["bytes"] == path.stat().st_size
        )
        overlay = dict(file=str(path))
        ours = timm.create_model("container_light", pretrained=True, pretrained_cfg_overlay=overlay).eval()
        torch.testing.assert_close(ours(x), reference.forward(state, x)[0], atol=1e-4, rtol=1e-4)


def test_an_import_says_nothing_that_it_was_not_told(tmp_path, place):
    """No provenance of the architecture's other weights, whatever is imported; the schema takes the file as it is."""
    for like, size, classes in (("container_light_nano_32", 32, 10), ("container_light", 224, 1000)):
        torch.save(timm.create_model(like, num_classes=classes).state_dict(), tmp_path / "mine.pth")
        _, record = zoo.convert(tmp_path / "mine.pth", f"{like}.mine")
        jsonschema.validate(json.loads((place / f"{like}.mine.json").read_text()), SCHEMA)
        assert record["status"] == "imported" and record["num_classes"] == classes
        assert record["input"]["input_size"] == (3, size, size)
        for key in ("trained_by", "date", "origin_url", "label_names", "training", "limits"):
            assert record[key] is None
        assert record["results"] == [] and set(record["license"].values()) == {None}
    told = dict(trained_by="us", license="mit", data="our photos")
    _, record = zoo.convert(tmp_path / "mine.pth", "container_light.told", **told)
    jsonschema.validate(json.loads((place / "container_light.told.json").read_text()), SCHEMA)
    assert (record["trained_by"], record["license"]["weights"], record["training"]["data"]) == tuple(told.values())


def test_a_run_becomes_a_record(tmp_path, place):
    """What `train_imagenet.py` leaves; what it does not know is null."""
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
    _, record = zoo.convert(tmp_path / "model_best.safetensors", name, data="x")
    jsonschema.validate(json.loads((place / f"{name}.json").read_text()), SCHEMA)
    assert record["num_classes"] == 7 and record["limits"] is None
    assert record["training"]["hardware"] == "8 x NVIDIA H100, 1 threads" and record["training"]["time"] == "2.0 h"
    assert (
        record["training"]["command"] == "python train_imagenet.py --data-dir x" and record["training"]["data"] == "x"
    )
    assert [result["value"] for result in record["results"]] == [50.0]
    torch.save(dict(state_dict=weights_of_run), tmp_path / "last.pth")  # whose accuracy the summary does not say
    assert zoo.convert(tmp_path / "last.pth", name, tmp_path / "out.safetensors")[1]["results"] == []


@pytest.mark.slow
def test_what_was_imported_is_a_tag_like_any_other(tmp_path, place):
    """In the next process, for timm's registry too; held to its hash, and named once."""
    mine = randomize(timm.create_model("container_light_nano", num_classes=7))
    torch.save(mine.state_dict(), tmp_path / "mine.pth")
    zoo.convert(tmp_path / "mine.pth", "container_light_nano.mine")
    (place / "container_conv.broken.json").write_text("{}")
    code = (
        "import container, timm; model = timm.create_model('container_light_nano.mine', pretrained=True); "
        "print(timm.list_pretrained('container_light_nano*'), model.num_classes, float(model.norm.weight.data.sum())); "
        "features = timm.create_model('container_light_nano.mine', pretrained=True, features_only=True); "
        "print(float(features.stem.proj.weight.data.sum()))"
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT), CONTAINER_WEIGHTS_DIR=str(place))
    run = partial(subprocess.run, [sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    result = run()
    first, second = result.stdout.splitlines()
    named = ["container_light_nano.lite2_dist", "container_light_nano.mine", FREE, OURS]
    assert first == f"{named} 7 {float(mine.norm.weight.data.sum())}"
    assert second == str(float(mine.stem.proj.weight.data.sum()))
    assert "no weights container_conv.broken: " in result.stderr and "delete it" in result.stderr
    other = timm.create_model("container_light_nano", num_classes=7).state_dict()
    torch.save(other, tmp_path / "mine.pth")
    with pytest.raises(ValueError, match=r"container_light_nano.mine is pinned to sha256 .*: choose another tag"):
        zoo.convert(tmp_path / "mine.pth", "container_light_nano.mine")
    safetensors.torch.save_file(other, place / "container_light_nano.mine.safetensors", dict(format="pt"))
    assert "has sha256" in run().stderr.splitlines()[-1]


@pytest.fixture
def share(tmp_path, monkeypatch):
    """The share that `container weights fetch` brings the released weights from."""
    with running(Share(tmp_path)) as share:
        for key, value in share.environment.items():
            monkeypatch.setenv(key, value)
        yield share


def released(state, **others):
    file = io.BytesIO()
    torch.save(dict(model=state, **others), file)
    return file.getvalue()


def test_fetch(share, place):
    """Through the page about viruses, of both sets of weights the evaluated ones; pinned at first sight."""
    state = reference.random_state(0)
    share.content = released(state, model_ema=reference.random_state(1), args=argparse.Namespace(lr=1))
    path = zoo.fetch(RELEASED)
    assert share.asked == ["1WMOWoxTX7AQDCbfMYh7naqIHube3K85A"] * 2
    assert sorted(file.name for file in place.iterdir()) == [f"{RELEASED}.json", f"{RELEASED}.safetensors"]
    jsonschema.validate(json.loads(path.with_suffix(".json").read_text()), SCHEMA)
    x = torch.randn(1, 3, 64, 64)
    model = timm.create_model("container_light", pretrained=True).eval()
    torch.testing.assert_close(model(x), reference.forward(state, x)[0], atol=1e-4, rtol=1e-4)
    features = timm.create_model("container_light", pretrained=True, features_only=True).eval()
    torch.testing.assert_close(features(x)[-1], model.forward_intermediates(x, norm=False)[1][-1])

    share.content = b"never asked for"
    assert zoo.fetch(RELEASED) == path and len(share.asked) == 2
    share.content = released(state)  # the same weights in another file
    path.unlink()
    with pytest.raises(RuntimeError, match=rf"`container weights fetch {RELEASED}` puts them there"):
        timm.create_model("container_light", pretrained=True)
    assert zoo.fetch(RELEASED) == path and path.is_file()
    share.content = released(reference.random_state(1))
    path.unlink()
    with pytest.raises(ValueError, match=rf"{RELEASED} is pinned to sha256 "):
        zoo.fetch(RELEASED)
    assert [file.name for file in place.iterdir()] == [f"{RELEASED}.json"]


@pytest.mark.parametrize(
    "content, error, message",
    [
        (b"", "Too many users have viewed or downloaded this file recently.", "Too many users have viewed"),
        (PAGE, "", "is a web page, .*, not a checkpoint"),
        (b"x" * 1000, "", "is not a checkpoint that can be loaded"),
        (b"hi\n", "", "is not a checkpoint that can be loaded: it is neither safetensors nor a torch file"),
        (released({}), "", "does not fit container_light: 391 missing"),
        (released({**reference.random_state(0), "head.bias": torch.full((1000,), torch.nan)}), "", "1000 numbers that"),
        (
            released(reference.random_state(0) | {"head.bias": torch.ones(21)}),
            "",
            r"head.fc.bias \(21,\) for \(1000,\)",
        ),
        (PACKAGED.read_bytes(), "", "can be loaded: it is safetensors, so its name must end in .safetensors"),
        (b'{"top1": 1}', "", "can be loaded: it is neither safetensors nor a torch file"),
        (pickle.dumps(print), "", "it has Python objects, which could run code"),
    ],
    ids=["busy", "page", "bytes", "text", "empty", "nan", "head", "safetensors", "json", "pickle"],
)
def test_fetch_takes_nothing_else(share, place, content, error, message):
    share.content, share.error = content, error
    with pytest.raises((OSError, RuntimeError, ValueError), match=message) as caught:
        zoo.fetch(RELEASED)
    assert not place.exists() and "\n" not in str(caught.value)


def test_fetch_takes_no_more_than_weights_have(share, place, monkeypatch):
    """Ended while it comes, or refused when it has come, and nothing of it is left."""
    share.content = bytes(10**7)
    monkeypatch.setattr(zoo, "_SHARED_BYTES", 10**6)
    with pytest.raises(OSError, match=r"cannot download https://.*: [\d,]+ bytes (came|are more than 1,000,000)"):
        zoo.fetch(RELEASED)
    monkeypatch.setattr(zoo, "_SHARED_SECONDS", 0)
    with pytest.raises(OSError, match="bytes came, and it is not at its end"):
        zoo.fetch(RELEASED)
    assert not place.exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("container_light.x", r"does not fit container_light: \d+ missing"),
        ("resnet18.x", "no model 'resnet18' in this family"),
        (OURS, r"does not fit container_light_nano_32: .* \(7,\) for \(10,\)"),
    ],
)
def test_what_does_not_fit_is_not_converted(tmp_path, name, message):
    torch.save(timm.create_model("container_light_nano_32", num_classes=7).state_dict(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        zoo.convert(tmp_path / "file.pth", name, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]


def test_matrices_of_another_image_size_are_not_resampled_on_the_way(tmp_path):
    torch.save(timm.create_model("container_mixer", img_size=64).state_dict(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"static.left is \(1, 16, 16, 16\), not \(1, 56, 56, 16\)"):
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
    assert f'timm.create_model("hf-hub:OWNER/{OURS}", pretrained=True)' in card
    for said in ("license: apache-2.0", record["limits"], record["results"][0]["command"], record["license"]["stated"]):
        assert said in card
    assert str(ROOT) not in card + (folder / "config.json").read_text()
    with pytest.raises(FileExistsError, match="is not empty"):
        zoo.export(OURS, folder)


def test_a_card_says_what_is_known_and_nothing_else(tmp_path, place):
    """Of a checkpoint without a run's summary beside it, the model and the file; and how it is loaded here."""
    save_file(timm.create_model("container_light_nano", num_classes=7).state_dict(), tmp_path / "own.safetensors")
    zoo.convert(tmp_path / "own.safetensors", "container_light_nano.mine")
    card = zoo.card("container_light_nano.mine")
    assert "None" not in card and "Trained by" not in card
    for line in ("**Parameters:** 0.91 M", "**GMACs:** 0.05", "**Image size:** 128 x 128", "**File:** 3.7 MB"):
        assert line in card
    assert 'timm.create_model("container_light_nano.mine", pretrained=True)' in card
    assert "hf-hub:me/mine" in zoo.card("container_light_nano.mine", "hf-hub:me/mine")


SUMMARY = dict(hardware=dict(cpu="x", processes=1, threads=1), epochs=1, seconds=1.0, command="x")
SUMMARY |= dict(best=dict(top1=1.0, file="x"))


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", '{"hardware": 1}', '{"hardware": {}', "\x00", "[" * 10**5),
        *(
            json.dumps(SUMMARY | change)
            for change in (dict(command=["x"]), dict(seconds="1"), dict(command="x" * 10**5))
        ),
        json.dumps(SUMMARY | dict(other="x" * 2**20)),
    ],
)
def test_a_foreign_summary_beside_a_checkpoint_is_named_and_left_out(tmp_path, place, caplog, content):
    save_file(timm.create_model("container_light_nano").state_dict(), tmp_path / "own.safetensors")
    (tmp_path / "summary.json").write_text(content)
    _, record = zoo.convert(tmp_path / "own.safetensors", "container_light_nano.mine")
    assert record["training"] is None and record["results"] == []
    assert caplog.messages == [f"{tmp_path / 'summary.json'} is not used: it is no summary of train_imagenet.py"]


def test_only_unknown_weights_are_called_unknown(monkeypatch, capsys):
    with pytest.raises(weights.UnknownWeightsError):
        weights.record("container_light_nano.none")
    with pytest.raises(SystemExit, match=r"no weights 'container_light_nano.none': there are .*_nano.lite2_dist"):
        main(["weights", "show", "container_light_nano.none"])
    monkeypatch.setattr(weights, "record", lambda name: {}["hardware"])
    with pytest.raises(KeyError, match="hardware"):  # a fault of ours is shown as one
        main(["weights", "show", OURS])


@pytest.mark.slow
def test_export_is_loaded_from_a_hub(tmp_path):
    zoo.export(OURS, tmp_path / "export")
    with running(Hub(tmp_path / "export")) as server:
        code = (
            "import container, timm; model = timm.create_model('hf-hub:owner/name', pretrained=True); "
            "print(sum(t.double().sum().item() for t in model.state_dict().values()))"
        )
        environment = dict(os.environ, PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=server.url)
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
    state = timm.create_model(OURS, pretrained=True).state_dict()
    assert result.stdout == f"{sum(t.double().sum().item() for t in state.values())}\n", result.stderr


def test_cards_are_of_the_records():
    """`container weights export NAME DIR` writes what docs/cards has."""
    packaged = [name for name, record in weights.manifest().items() if record["status"] == "available"]
    cards = ROOT / "docs" / "cards"
    assert sorted(path.stem for path in cards.iterdir()) == sorted(packaged)
    assert all((cards / f"{name}.md").read_text(encoding="utf-8") == zoo.card(name) for name in packaged)
