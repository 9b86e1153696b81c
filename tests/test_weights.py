"""The manifest, and the way of a checkpoint from a file to a model."""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import jsonschema
import pytest
import reference
import safetensors.torch
import timm
import torch
from conftest import ROOT, shared
from server import LFS, PAGE, Hub, running
from timm.data import ImageNetInfo

from container import predict, weights, zoo
from container.container import checkpoint_filter_fn, default_cfgs

RELEASED, OURS = "container_light.ai2_in1k", "container_light_nano_32.cifar10"
FREE = "container_light_nano.trashnet"  # of ImageNet's terms, and not its model's default
LIGHT = "container_light.lite2_dist"  # in a checkout, not in a wheel
PHOTOS = ["container_light_nano.lite2_dist", "container_light_tiny.lite2_dist", "container_nano.lite2_dist"]
PACKAGED = ROOT / "container" / "pretrained" / f"{OURS}.safetensors"
SCHEMA = json.loads((ROOT / "container" / "weights_manifest.schema.json").read_text())
MANIFEST = json.loads((ROOT / "weights_manifest.json").read_text())
INPUT = weights.manifest()[FREE]["input"]
STATE = safetensors.torch.load_file(PACKAGED)


def test_manifest_follows_its_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(MANIFEST, SCHEMA)
    assert weights.manifest() == MANIFEST["weights"]
    for name, record in weights.manifest().items():
        assert f"{record['architecture']}.{record['tag']}" == name
        assert len(record["label_names"] or range(record["num_classes"])) == record["num_classes"]
        assert all(result["command"] or "authors" in result["measured_by"] for result in record["results"])
    for name, peer in MANIFEST["peers"].items():
        assert timm.is_model(name) and all(result["command"] for result in peer["results"])


@pytest.mark.parametrize(
    "name, change",
    [
        (OURS, dict(status="verified")),
        (OURS, dict(status="unverified")),
        (OURS, dict(results=[])),
        (OURS, dict(training=None)),
        (OURS, dict(file=None)),
        (OURS, dict(limits="")),
        (OURS, dict(limits=None)),
        (OURS, dict(extra=1)),
        (OURS, dict(results=[dict(MANIFEST["weights"][OURS]["results"][0], value=101)])),
        (OURS, dict(file=dict(MANIFEST["weights"][OURS]["file"], sha256=None))),
        (OURS, dict(file=dict(MANIFEST["weights"][OURS]["file"], packaged=False))),
        (OURS, dict(file=dict(MANIFEST["weights"][OURS]["file"], format="pth"))),
        (LIGHT, dict(file=dict(MANIFEST["weights"][OURS]["file"], packaged=False))),
        (OURS, dict(status="imported")),
        (RELEASED, dict(status="available")),
        (RELEASED, dict(status="imported")),
        (RELEASED, dict(limits=None)),
    ],
)
def test_schema_refuses(name, change):
    record = dict(MANIFEST["weights"][name], **change)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(dict(weights={name: record}), SCHEMA)


def test_released_record_says_what_is_unknown():
    record = weights.manifest()[RELEASED]
    assert record["status"] == "unverified"
    assert record["file"]["sha256"] is None and record["file"]["bytes"] is None and record["license"]["weights"] is None
    assert "MIT" in record["license"]["stated"] and "Apache 2.0" in record["license"]["stated"]
    assert all(result["measured_by"].startswith("the paper's authors") for result in record["results"])


def test_cfgs_and_manifest_say_the_same():
    """Each file on record has its cfg, with what the record says; every other cfg has no weights."""
    assert sorted(default_cfgs) == timm.list_models(module="container")
    registered = {f"{name}.{tag}" for name, cfgs in default_cfgs.items() for tag in cfgs.tags}
    assert set(weights.manifest()) <= registered
    for name in registered:
        cfg, record = timm.get_pretrained_cfg(name), weights.manifest().get(name)
        if record is None:
            assert name.endswith(".untrained") and not cfg.has_weights and not cfg.label_names
            continue
        for key, value in record["input"].items():
            assert getattr(cfg, key) == (tuple(value) if isinstance(value, list) else value)
        assert cfg.num_classes == record["num_classes"] and cfg.origin_url == record["origin_url"] and not cfg.url
        assert cfg.label_names == (tuple(record["label_names"]) if record["label_names"] else None)
        assert cfg.license == record["license"]["weights"] or (cfg.license == "unknown" and name == RELEASED)
        assert timm.is_model_pretrained(name) == (record["status"] == "available")
        folder = PACKAGED.parent if record["file"]["packaged"] else ROOT / "weights"
        assert record["status"] != "available" or os.path.realpath(cfg.file) == str(folder / f"{name}.safetensors")


def test_packaged_weights_are_those_of_the_record():
    packaged = [name for name, record in weights.manifest().items() if record["file"]["packaged"]]
    assert sorted(packaged) == sorted([FREE, OURS, *PHOTOS])
    assert sorted(timm.list_pretrained("container*")) == sorted([*packaged, LIGHT])
    for name in (*packaged, LIGHT):
        file = weights.manifest()[name]["file"]
        data = weights.find(name).read_bytes()
        assert len(data) == file["bytes"] and hashlib.sha256(data).hexdigest() == file["sha256"]
        state = safetensors.torch.load(data)
        for called in (name, *([] if name in (FREE, LIGHT) else [name.partition(".")[0]])):
            model = timm.create_model(called, pretrained=True)
            assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_packaged_weights_in_other_models():
    """Fewer channels, other classes, other sizes, features: as timm has it."""
    state = safetensors.torch.load_file(PACKAGED)
    kernel = state["stem.proj.weight"]
    model = timm.create_model(OURS, pretrained=True, in_chans=1, num_classes=3)
    torch.testing.assert_close(model.stem.proj.weight, kernel.sum(1, keepdim=True))
    assert model.head.fc.out_features == 3 and torch.equal(model.norm.weight, state["norm.weight"])
    assert timm.create_model(OURS, pretrained=True, num_classes=0)(torch.randn(2, 3, 47, 32)).shape == (2, 128)
    features = timm.create_model(OURS, pretrained=True, features_only=True).eval()
    full = timm.create_model(OURS, pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(full.norm(features(x)[-1]), full.forward_features(x))


@pytest.mark.slow
def test_packaged_weights_have_the_accuracy_of_the_record(tmp_path):
    """The record's command, literally, on the CIFAR-10 of the record."""
    archive = shared("data/cifar10.tar.xz")
    results = weights.manifest()[OURS]["results"]
    assert len({result["command"] for result in results}) == 1
    command = results[0]["command"].split()
    assert command[0] == "python"
    subprocess.run(["tar", "-xJf", archive, "-C", tmp_path], check=True)
    command[0], command[1] = sys.executable, str(ROOT / command[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    top1, top5 = (next(r["value"] for r in results if r["metric"] == metric) for metric in ("top1", "top5"))
    assert f"{top1:.2f} % top-1, {top5:.2f} % top-5" in printed


@pytest.fixture(scope="module")
def nips2017(tmp_path_factory):
    """Photos of ImageNet's classes in class folders, as docs/results.md makes them."""
    archive, folder = shared("data/nips2017.tar.xz"), tmp_path_factory.mktemp("photos")
    subprocess.run(["tar", "-xJf", archive, "-C", folder], check=True)
    names = ImageNetInfo().label_names()
    for line in (folder / "nips2017" / "labels.txt").read_text().splitlines():
        file, label = line.split()
        (folder / "classes" / "nips2017" / names[int(label)]).mkdir(parents=True, exist_ok=True)
        (folder / "nips2017" / "images" / file).rename(folder / "classes" / "nips2017" / names[int(label)] / file)
    return folder / "classes"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PHOTOS, "tf_efficientnet_lite0"])
def test_photo_weights_have_the_accuracy_of_the_record(name, nips2017):
    """Each command on record, literally; another processor may take one photo in a thousand for something else."""
    results = (MANIFEST["weights"].get(name) or MANIFEST["peers"][name])["results"]
    if name in MANIFEST["peers"]:
        script = [sys.executable, str(ROOT / "examples" / "efficientnet_lite.py"), "0", "lite0.safetensors"]
        subprocess.run(script, cwd=nips2017, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    commands = {result["command"]: result["data"] for result in results if "NIPS 2017" in result["data"]}
    assert commands
    for command, data in commands.items():
        words = [sys.executable, str(ROOT / "train_imagenet.py"), *command.split()[2:]]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        printed = subprocess.run(
            words, cwd=nips2017, env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert "1000 images of 1000 classes" in printed
        for metric, called in (("top1", "top-1"), ("top5", "top-5")):
            (value,) = (r["value"] for r in results if r["metric"] == metric and r["data"] == data)
            measured = float(re.search(rf"([0-9.]+) % {called}", printed)[1])
            assert measured == pytest.approx(value, abs=0.21)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The weights folder of this test, where OURS is looked for as if it were not packaged."""
    monkeypatch.setenv("CONTAINER_WEIGHTS_DIR", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    file = weights.manifest()[OURS]["file"]
    monkeypatch.setitem(weights.manifest()[OURS], "file", dict(file, packaged=False, url="https://127.0.0.1:9/none"))
    return tmp_path / "weights"


def load(**kwargs):
    return timm.create_model("container_light_nano_32", pretrained=True, **kwargs)


@pytest.fixture
def served(server, place, monkeypatch):
    """The server, where OURS is to be downloaded from."""
    server.content = PACKAGED.read_bytes()
    monkeypatch.setitem(weights.manifest()[OURS]["file"], "url", server.url)
    return server


def test_downloaded_once(served, place):
    for _ in range(2):
        assert torch.equal(load().head.fc.weight, STATE["head.fc.weight"])
    assert served.asked == 1 and [path.name for path in place.iterdir()] == [PACKAGED.name]
    load(cache_dir=place / "cache")
    assert (place / "cache" / PACKAGED.name).is_file()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(content=PAGE), 'is a web page, "Google Drive - Virus scan warning", not the weights'),
        (dict(content=LFS), "is a pointer of Git LFS in place of the file"),
        (dict(content=PACKAGED.read_bytes()[:-1] + b"x"), "has sha256"),
        (dict(limit=10**6), "has 1000000 bytes, and the weights .* have 3685608"),
        (dict(code=404), "HTTP Error 404: Not Found"),
        (dict(code=503), "HTTP Error 503"),
        (dict(content=PACKAGED.read_bytes() + bytes(10**7)), "there are more bytes than the recorded 3,685,608"),
        (dict(location="http://127.0.0.1:9/weights"), "[Cc]onnection refused|is not https"),
        (dict(location=f"file://{PACKAGED}"), "redirect|not allowed"),
    ],
)
def test_a_server_with_something_else_leaves_nothing(served, place, wrong, message):
    vars(served).update(wrong)
    with pytest.raises(RuntimeError, match=message) as error:
        load()
    file = weights.manifest()[OURS]["file"]
    for hint in (OURS, served.url, str(place / PACKAGED.name), str(file["bytes"]), file["sha256"]):
        assert hint in str(error.value)
    assert list(place.iterdir()) == [] and "\n" not in str(error.value)


@pytest.mark.parametrize("url", [f"file://{PACKAGED}", "http://127.0.0.1:9/weights", "ftp://127.0.0.1/weights"])
def test_downloads_are_by_https_alone(served, place, monkeypatch, url):
    monkeypatch.setitem(weights.manifest()[OURS]["file"], "url", url)
    with pytest.raises(RuntimeError, match=f"{url} is not https"):
        load()
    assert list(place.iterdir()) == [] and not served.asked


@pytest.mark.parametrize("pause, message", [(3, "timed out"), (0.9, "bytes in [0-9]+ s are too slow")])
def test_a_download_that_stands_still_or_drips_ends(served, place, monkeypatch, pause, message):
    """And lets its lock go."""
    monkeypatch.setattr(weights, "_SILENCE", 1)
    monkeypatch.setattr(weights, "_SLOWEST", 1e7)
    served.pause = pause
    with pytest.raises(RuntimeError, match=message):
        load()
    assert list(place.iterdir()) == []


def test_the_bytes_that_are_verified_are_those_that_are_loaded(place, monkeypatch):
    """A file that is exchanged as soon as it was read; no other is opened."""
    shutil.copy(PACKAGED, place)
    other = {key: t + 1 if t.is_floating_point() else t for key, t in STATE.items()}
    read = weights._read_checked

    def read_and_exchange(name, path):
        content = read(name, path)
        safetensors.torch.save_file(other, path)
        return content

    monkeypatch.setattr(weights, "_read_checked", read_and_exchange)
    assert torch.equal(load().norm.weight, STATE["norm.weight"])
    with pytest.raises(RuntimeError, match=r"has (\d+ bytes|sha256)"):
        load()


def test_no_network_but_a_file_placed_by_hand(place):
    with pytest.raises(RuntimeError, match=r"cannot download the weights .* refused.* Without a network, put"):
        load()
    shutil.copy(PACKAGED, place)
    assert torch.equal(load().norm.weight, STATE["norm.weight"])
    (place / PACKAGED.name).write_bytes(PACKAGED.read_bytes()[:-4])
    with pytest.raises(RuntimeError, match=r"has 3685604 bytes, and the weights .* have 3685608"):
        load()
    (place / PACKAGED.name).write_bytes(PAGE)
    with pytest.raises(RuntimeError, match=r"Virus scan warning.*not the weights"):
        load()
    (place / PACKAGED.name).write_bytes(LFS)
    with pytest.raises(RuntimeError, match=r"Git LFS.*not the weights"):
        load()


def python(code, *arguments, **environment):
    """A process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_in_the_middle(served, place):
    """What is left of it is cleared away by the next who asks."""
    served.pause = 0.05
    code = "import sys, container, timm; container.weights.manifest()[sys.argv[1]]['file'].update(packaged=False, "
    process = python(code + "url=sys.argv[2]); timm.create_model(sys.argv[1], pretrained=True)", OURS, served.url)
    while not any(path.stat().st_size for path in place.glob("*.part")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (place / PACKAGED.name).exists()
    served.pause = 0
    load()
    assert [path.name for path in place.iterdir()] == [PACKAGED.name]


FROM_HUB = """
import os, sys, container, timm
container.weights.manifest()[sys.argv[1]]["file"].update(packaged=False, hf_hub_id="owner/name")
for change in (lambda: None, lambda: eval(sys.argv[2])):
    change()
    try:
        model = timm.create_model(sys.argv[1], pretrained=True)
        print(model.head.fc.weight.data.double().sum())
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.slow
def test_from_the_hub(tmp_path):
    """By its own client: token, cache, the switch that keeps it offline; and checked like any other file."""
    environment = dict(HF_HOME=str(tmp_path / "home"), CONTAINER_WEIGHTS_DIR=str(tmp_path / "none"))
    shutil.copy(PACKAGED, tmp_path)
    expected = str(STATE["head.fc.weight"].double().sum())
    with running(Hub(tmp_path, token="hf_secret")) as server:
        environment["HF_ENDPOINT"] = server.url
        process = python(FROM_HUB, OURS, "os.environ.update(HF_TOKEN='hf_secret')", **environment)
        refused, printed = process.communicate(timeout=120)[0].splitlines()
    assert refused.startswith(f"cannot download the weights {OURS} from owner/name: ") and printed == expected
    (cached,) = (tmp_path / "home").rglob(f"snapshots/*/{PACKAGED.name}")
    process = python(FROM_HUB, OURS, f"os.truncate({str(cached)!r}, 1000)", **environment, HF_HUB_OFFLINE="1")
    printed, refused = process.communicate(timeout=120)[0].splitlines()
    assert printed == expected and "has 1000 bytes, and the weights" in refused


EIGHT = """
import multiprocessing, sys
import timm, torch
from container import weights, zoo
name, url, packaged = sys.argv[1:]
torch.set_num_threads(1)
weights.manifest()[name]["file"].update(packaged=False, url=url)

def ask(queue):
    model = timm.create_model(name, pretrained=True)
    queue.put(float(sum(p.double().sum() for p in model.state_dict().values())))

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=ask, args=(queue,)) for _ in range(8)]
    for process in processes: process.start()
    print(*{queue.get(timeout=60) for _ in processes})
    for process in processes: process.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that torch is imported once")
def test_eight_processes_at_once(served, place):
    served.pause = 0.01
    result = subprocess.run(
        [sys.executable, "-c", EIGHT, OURS, served.url, str(PACKAGED)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    expected = sum(p.double().sum() for p in timm.create_model(OURS, pretrained=True).state_dict().values())
    assert result.stdout == f"{expected}\n", result.stderr
    assert served.asked == 1 and [path.name for path in place.iterdir()] == [PACKAGED.name]


def test_the_released_weights_are_loaded_when_they_are_pinned(place):
    for name in ("container_light", RELEASED):
        with pytest.raises(
            RuntimeError, match=rf"`container weights fetch {RELEASED}` puts them there; {LIGHT} would load$"
        ):
            timm.create_model(name, pretrained=True, device="meta")
    safetensors.torch.save_file(STATE, place / f"{RELEASED}.safetensors")  # of which no record knows
    with pytest.raises(RuntimeError, match=r"may be any file: `container weights import .* checks and pins it$"):
        timm.create_model("container_light", pretrained=True)


@pytest.mark.parametrize(
    "old, new",
    [(".attn.", ".conv."), ("blocks4.0.conv.", "blocks4.0.attn."), ("head.", "fc."), ("", "stem.proj.weight")],
)
def test_the_released_layout_is_exact(tmp_path, old, new):
    state = reference.random_state(0)
    state = {key.replace(old, new): t for key, t in state.items()} if old else {**state, new: torch.zeros(64, 3, 4, 4)}
    torch.save(dict(model=state), tmp_path / "file.pth")
    message = r"does not fit container_light: .* unexpected" if old else f"and another key are both {new}"
    with pytest.raises(ValueError, match=message):
        timm.create_model(
            "container_light", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "file.pth"))
        )


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
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def bomb(path, rng):
    """A pickle that runs code: bare, as torch writes it now, as torch wrote it, or hidden among weights."""
    kind = rng.randrange(4)
    if kind == 0:
        path.write_bytes(pickle.dumps(Bomb(), protocol=rng.randrange(6)))
    else:
        content = {"state_dict": STATE, "x": Bomb()} if kind == 1 else Bomb()
        torch.save(content, path, _use_new_zipfile_serialization=kind < 3)


def rename(path, rng):
    key = rng.choice(list(STATE))
    other = rng.choice([key[::-1], key + "_", key.replace(".", "", 1), "model." + key, "stages.9." + key, ""])
    save({(other if k == key else k): t for k, t in STATE.items()}, path)


def drop(path, rng):
    save({k: STATE[k] for k in rng.sample(list(STATE), rng.randrange(len(STATE)))}, path)


def reshape(path, rng):
    key = rng.choice([key for key, tensor in STATE.items() if tensor.ndim])
    tensor = STATE[key]
    other = rng.choice([tensor[:-1], tensor[None], tensor.flatten()[:-1], torch.cat((tensor, tensor)), tensor.sum()])
    save({**STATE, key: other}, path)


def not_finite(path, rng):
    key = rng.choice([key for key, tensor in STATE.items() if tensor.is_floating_point() and tensor.ndim])
    tensor = STATE[key].clone()
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    save({**STATE, key: tensor}, path)


def other_model(path, rng):
    name = rng.choice(["container_light_nano", "container_nano", "test_vit", "test_resnet"])
    save(timm.create_model(name, num_classes=10).state_dict(), path)


def no_weights(path, rng):
    content = rng.choice([PAGE, b"", b"{}", b"PK\x03\x04", rng.randbytes(1000), LFS])
    path.write_bytes(content)


def no_tensors(path, rng):
    content = rng.choice([[1, 2], {"state_dict": None}, 3, {"model": {}}, {**STATE, "stem.proj.weight": 3}, "x", None])
    torch.save(content, path)


def truncate(path, rng):
    save(STATE, path)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def flip(path, rng):
    data = bytearray(PACKAGED.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path, rng):
    data = PACKAGED.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] + rng.randbytes(rng.randrange(2) * 1000))


def save(state, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: t.clone() for k, t in state.items()}, path)
    else:
        torch.save(dict(state_dict=state), path)


def corrupt(count, place, monkeypatch):
    """So many damaged files of every kind: none is loaded, nothing in them is executed."""
    monkeypatch.setenv("BOMB", str(place / "exploded"))
    rng = random.Random(0)
    unhashed = (bomb, rename, drop, reshape, not_finite, other_model, no_weights, no_tensors, truncate)
    for i in range(count):
        if i % 2:  # under the record's name, where its hash decides
            kind, path, options = (flip, cut)[i // 2 % 2], place / PACKAGED.name, {}
        else:  # a file that the user names, of which nothing is known
            kind = unhashed[i // 2 % len(unhashed)]
            suffix = "pth" if kind in (bomb, no_tensors) else rng.choice(["pth", "safetensors"])
            path = place / f"file.{suffix}"
            options = dict(pretrained_cfg_overlay=dict(file=str(path)))
        kind(path, rng)
        with pytest.raises((RuntimeError, ValueError)) as error:
            load(**options)
            pytest.fail(f"{kind.__name__} {i} was loaded")
        assert "\n" not in str(error.value) and ("checkpoint" in str(error.value) or str(path) in str(error.value))
        assert not (place / "exploded").exists()
        path.unlink()


def test_damaged_files(place, monkeypatch):
    corrupt(72, place, monkeypatch)


@pytest.mark.slow
def test_a_thousand_damaged_files(place, monkeypatch):
    corrupt(1000, place, monkeypatch)


def test_a_flipped_bit_in_a_file_of_torch(tmp_path):
    """torch does not look at the checksums of its archives. What they do not cover carries no weight."""
    path, rng = tmp_path / "file.pth", random.Random(0)
    save(STATE, path)
    data, refused = path.read_bytes(), 0
    for _ in range(50):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            state = weights.read(path)
            assert all(torch.equal(tensor, state[key]) for key, tensor in STATE.items())
        except RuntimeError as error:
            refused += "is not a checkpoint that can be loaded" in str(error)
    assert refused > 40


def test_a_model_is_untouched_by_what_it_refuses(tmp_path):
    model = timm.create_model("container_light_nano_32")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    reshape(tmp_path / "file.pth", random.Random(0))
    with pytest.raises(ValueError, match="of another shape"):
        timm.models.load_pretrained(
            model, dict(model.pretrained_cfg, file=str(tmp_path / "file.pth")), 10, filter_fn=checkpoint_filter_fn
        )
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_other_sources_are_left_to_timm(tmp_path):
    state = timm.create_model("container_light_nano_32").state_dict()
    given = dict(state_dict=state)
    model = timm.create_model("container_light_nano_32", pretrained=True, pretrained_cfg_overlay=given)
    assert torch.equal(model.head.fc.weight, state["head.fc.weight"])
    overlay = dict(url="https://example.org/x.pth")
    given = weights.provide("container_light", dict(pretrained_cfg_overlay=overlay))
    assert given == dict(pretrained_cfg_overlay=overlay)


def test_the_file_that_no_wheel_has_lies_in_a_checkout_or_in_the_users_folder(place, monkeypatch, capsys):
    """Where it is in neither, the line says which file goes where."""
    assert weights.find(LIGHT) == ROOT / "weights" / f"{LIGHT}.safetensors"
    content = weights.find(LIGHT).read_bytes()
    monkeypatch.setattr(weights, "_PACKAGE", place / "container")
    size, name = f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}", f"{LIGHT}.safetensors"
    message = f"the weights {LIGHT} are in no wheel: put weights/{name} of the repository ({size}) at {place / name}"
    for ask in (lambda: timm.create_model(LIGHT, pretrained=True), lambda: zoo.fetch(LIGHT)):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            ask()
    (place / name).write_bytes(content)
    assert timm.create_model(LIGHT, pretrained=True).pretrained_cfg["input_size"] == (3, 128, 128)
    assert zoo.fetch(LIGHT) == place / name


@pytest.mark.slow
def test_an_editable_install_runs_the_checkout(tmp_path):
    """A copy of the training script beside it would stay as it was on the day of the installation."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    command = [*pip, "--ignore-installed", "--prefix", tmp_path, "--editable", ROOT]
    subprocess.run(command, check=True, timeout=300)
    (link,) = tmp_path.rglob("*.pth")
    assert set(link.read_text().split()) == {str(ROOT)} and list(tmp_path.rglob("train_imagenet.py")) == []


@pytest.mark.slow
def test_wheel_has_the_manifest_and_registers_the_models(tmp_path):
    """Built, installed without the repository around it, and used from an empty folder."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, timeout=300)
    code = (
        "import container, timm; from container import weights; print(container.__file__); "
        "print(len(timm.list_models('container*')), list(weights.manifest()), timm.list_pretrained('container*')); "
        f"from container.__main__ import main; main(['predict', '--model', '{OURS}'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    there = sorted([FREE, LIGHT, OURS, *PHOTOS])
    file, found, photo, likeliest, *_ = result.stdout.splitlines()
    assert photo == str(tmp_path / "site" / "container" / "sample.jpg") and likeliest.endswith(" cat")
    assert file.startswith(str(tmp_path / "site")) and found == f"13 {list(weights.manifest())} {there}"


@pytest.mark.parametrize(
    "change",
    [
        *(dict(input=[]), dict(input=None), dict(license=None), dict(num_classes={}), dict(label_names=7), None),
        *(dict(label_names=[1, 2]), dict(trained_by=["x"]), dict(origin_url="x" * 1000)),
        *(dict(input=INPUT | change) for change in (dict(mean=[1]), dict(std=[1, 1, 0]), dict(crop_pct="1"))),
        *(dict(input=INPUT | change) for change in (dict(input_size=[3, 10**9, 32]), dict(interpolation="x"))),
    ],
)
def test_no_record_can_break_an_import(place, tmp_path, caplog, change):
    """It is warned of and skipped; the family and the records beside it are as they were."""
    name = "container_light_nano.mine"
    record = dict(weights.manifest()[FREE], status="imported")
    (tmp_path / "weights").mkdir(exist_ok=True)
    text = "{" if change is None else json.dumps(dict(weights={name: record | change}))
    (tmp_path / "weights" / f"{name}.json").write_text(text)
    before = list(default_cfgs["container_light_nano"].tags)
    weights.register_own()
    assert [message.split(":")[0] for message in caplog.messages] == [f"no weights {name}"]
    assert list(default_cfgs["container_light_nano"].tags) == before


def test_a_record_leads_to_no_other_file_than_its_own(place, tmp_path):
    """What it says beside the preparation of images is not taken over."""
    name = "container_light_nano.mine"
    record = dict(weights.manifest()[FREE], status="imported")
    record["input"] = record["input"] | dict(source="hf-hub", hf_hub_id="evil/repo", custom_load=True)
    (tmp_path / "weights" / f"{name}.json").write_text(json.dumps(dict(weights={name: record})))
    weights.register_own()
    cfg = timm.get_pretrained_cfg(name)
    assert not (cfg.source or cfg.hf_hub_id or cfg.custom_load) and cfg.input_size == tuple(
        record["input"]["input_size"]
    )


def expanded():
    return dict(x=torch.zeros(1).expand(400_000_000))


def many():
    return {str(i): torch.zeros(0) for i in range(40_000)}


@pytest.mark.parametrize(
    "content, message",
    [
        (expanded, "x has 1600000000 bytes, and its storage 4"),
        (lambda: dict(x=torch.zeros(2, device="meta")), "sparse or has no values"),
        (many, "objects in [0-9,]+ bytes are more than a checkpoint has"),
    ],
)
def test_a_small_file_takes_little_memory(tmp_path, content, message):
    """Refused before it is paid for."""
    torch.save(content(), tmp_path / "x.pth")
    with pytest.raises(RuntimeError, match=message):
        weights.read(tmp_path / "x.pth")


def test_compressed_parts_and_long_headers_are_refused(tmp_path):
    torch.save(dict(x=torch.zeros(10_000_000)), tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as a,
        zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as b,
    ):
        for name in a.namelist():
            b.writestr(name, a.read(name))
    with pytest.raises(RuntimeError, match="its parts are compressed, which torch does not do"):
        weights.read(tmp_path / "x.pth")
    safetensors.torch.save_file({f"{i:060}": torch.zeros(0) for i in range(50_000)}, tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError, match=r"its header has [0-9,]+ bytes, and 4,194,304 are allowed"):
        weights.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("classes", [5, [1, 2], {"a": 1}, "abc", ["ok", "\x1b[31mred"], None])
def test_names_that_are_none_are_left_out(tmp_path, classes):
    """Of another type, or with what a terminal would obey; the model's classes have numbers then."""
    state = timm.create_model("container_light_nano_32", num_classes=2).state_dict()
    safetensors.torch.save_file(state, tmp_path / "x.safetensors", dict(classes=json.dumps(classes)))
    assert weights.class_names(tmp_path / "x.safetensors") is None
    model = weights.create("container_light_nano_32", tmp_path / "x.safetensors")
    assert predict.class_names(model) == ["0", "1"]


def test_an_empty_file_is_called_empty(tmp_path):
    for suffix in ("pth", "safetensors"):
        (tmp_path / f"x.{suffix}").touch()
        with pytest.raises(RuntimeError, match=rf"x.{suffix} is not a checkpoint that can be loaded: it is empty"):
            weights.read(tmp_path / f"x.{suffix}")
