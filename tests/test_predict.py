"""`container predict`: the classes of photos, their names and their probabilities."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from test_weights import OURS, PACKAGED, RELEASED, STATE

from container import weights, zoo
from container.__main__ import main
from container.predict import SAMPLE, class_names, predict

LABELS = weights.manifest()[OURS]["label_names"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A file of weights with an ImageNet head that answers class 207, whatever it sees."""
    state = timm.create_model("container_light_nano").state_dict()
    state["head.fc.weight"].zero_()
    state["head.fc.bias"].zero_()[207] = 9.0
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    save_file(state, path, dict(classes=json.dumps(timm.data.ImageNetInfo().label_names())))
    return path


def lines(output):
    """[(percent, name)] of the printed lines that are no paths."""
    return [(float(p), name) for p, name in re.findall(r"^ +([\d.]+) %  (.+)$", output, re.MULTILINE)]


def test_probabilities_by_another_route():
    """Resized by Pillow, cropped and normalised by hand; softmax in float64."""
    photo = Image.open(SAMPLE).convert("RGB")
    photo = photo.resize((32 * photo.width // photo.height, 32), Image.Resampling.BICUBIC)
    left = round((photo.width - 32) / 2)
    pixels = np.asarray(photo.crop((left, 0, left + 32, 32)), dtype=np.float32) / 255
    x = torch.from_numpy((pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).float().permute(2, 0, 1)[None]
    model = timm.create_model(OURS, pretrained=True).eval()
    with torch.no_grad():
        e = np.exp(model(x)[0].double().numpy())
    expected = dict(zip(LABELS, e / e.sum()))
    (found,) = predict([SAMPLE], model, top=99)
    assert [name for name, _ in found] == sorted(LABELS, key=expected.get, reverse=True)
    assert dict(found) == pytest.approx(expected, abs=1e-5)


def test_a_block_for_each_photo(tmp_path, capsys):
    Image.open(SAMPLE).rotate(180).save(tmp_path / "down.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # a viewer turns it by 180 degrees
    Image.open(tmp_path / "down.png").save(tmp_path / "turned.png", exif=exif)
    Image.open(SAMPLE).save(tmp_path / "up.png")
    photos = [str(tmp_path / f"{name}.png") for name in ("up", "down", "turned")]
    main(["predict", *photos, "--model", "container_light_nano_32"])
    output = capsys.readouterr().out
    blocks = [output.splitlines()[i : i + 6] for i in (0, 6, 12)]
    assert [block[0] for block in blocks] == photos and len(output.splitlines()) == 19
    assert blocks[0][1:] == blocks[2][1:] != blocks[1][1:]
    model = timm.create_model(OURS, pretrained=True).eval()
    expected = [(float(f"{100 * p:.1f}"), name) for name, p in predict(photos, model)[0]]
    assert lines(output)[:5] == expected
    assert len({line.index("%") for block in blocks for line in block if "%" in line}) == 1
    assert output.splitlines()[18] == (
        "container_light_nano_32.cifar10 is right for 90.35 % of CIFAR-10 test, 10,000 images, "
        "and names the right class among five for 99.13 %"
    )


def test_only_weights_on_record_say_how_often_they_are_right(tmp_path, capsys):
    """The number is that of the file that was loaded: of one's own, and of other models, none is known."""
    record = weights.manifest()["container_light_nano.lite2_dist"]["results"][0]
    for words in (["container_light_nano"], ["container_light_nano.lite2_dist"]):
        main(["predict", "--model", *words])
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"container_light_nano.lite2_dist is right for {record['value']} % of {record['data']}")
    main(["predict", "--model", "container_light_nano", "--img-size", "64"])  # not the size of the record
    assert " is right for " not in capsys.readouterr().out
    save_file(timm.create_model("container_light_nano").state_dict(), tmp_path / "own.safetensors")
    main(["predict", "--model", "container_light_nano", "--checkpoint", str(tmp_path / "own.safetensors")])
    assert " is right for " not in capsys.readouterr().out
    assert zoo.accuracy("container_light_nano.none") == zoo.accuracy("resnet18.a1_in1k") == ""


def test_a_model_of_another_type(tmp_path):
    """Photos are of the type of its weights."""
    model = timm.create_model(OURS, pretrained=True).eval()
    (expected,), (found,) = predict([SAMPLE], model), predict([SAMPLE], model.double())
    assert found == [(name, pytest.approx(p, abs=1e-5)) for name, p in expected]


def test_golden_retriever(golden, capsys):
    main(["predict", "--model", "container_light_nano", "--checkpoint", str(golden), "--img-size", "64"])
    p, name = lines(capsys.readouterr().out)[0]
    assert name == "golden retriever" and p == pytest.approx(100 * np.exp(9) / (np.exp(9) + 999), abs=0.05)


def test_names_of_a_file(tmp_path):
    """Its own, WordNet's in words; where it says none, numbers."""
    names = ["n02099601", "mine", "n01440764"]
    state = timm.create_model("container_light_nano", num_classes=3).state_dict()
    save_file(state, tmp_path / "a.safetensors", dict(classes=json.dumps(names)))
    assert class_names(weights.create("container_light_nano", tmp_path / "a.safetensors")) == [
        *("golden retriever", "mine", "tench, Tinca tinca")
    ]
    state = timm.create_model("container_light_nano_32", num_classes=10).state_dict()
    save_file(state, tmp_path / "b.safetensors")
    numbers = [str(i) for i in range(10)]
    assert (
        class_names(weights.create("container_light_nano_32", tmp_path / "b.safetensors")) == numbers
    )  # not CIFAR-10's
    save_file(timm.create_model("container_light_nano").state_dict(), tmp_path / "c.safetensors")
    for model in (  # a thousand classes need not be ImageNet's
        weights.create("container_light_nano", tmp_path / "c.safetensors"),
        weights.create("resnet18", pretrained=False),
        timm.create_model("container_light_nano"),
        timm.create_model("container_light_nano", True, pretrained_cfg_overlay=dict(file=tmp_path / "c.safetensors")),
    ):
        assert class_names(model)[207] == "207"
    other = timm.create_model(OURS, pretrained=True, num_classes=3)  # a new classifier, for other classes
    assert class_names(other) == ["0", "1", "2"]


@pytest.mark.slow
def test_other_models_of_timm(tmp_path, capsys):
    """Weights of a file are all loaded, and the size of images is the model's from its making."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4)
    torch.nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    loaded = weights.create("vit_tiny_patch16_224", tmp_path / "vit.pth")
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert "state_dict" not in loaded.pretrained_cfg
    words = ["predict", "--model", "vit_tiny_patch16_224", "--checkpoint", str(tmp_path / "vit.pth")]
    main([*words, "--img-size", "64"])
    found = lines(capsys.readouterr().out)
    assert {name for _, name in found} == {"0", "1", "2", "3"} and sum(p for p, _ in found) == pytest.approx(100, 0.01)
    with pytest.raises(SystemExit, match="vit_tiny_patch16_224 has no affinities to draw"):
        main([*words, "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"vit.pth does not fit resnet18: .*Missing key"):
        weights.create("resnet18", tmp_path / "vit.pth")


def test_the_picture(tmp_path, capsys):
    main(["predict", "--model", OURS, "--out", str(tmp_path / "out")])
    file = capsys.readouterr().out.splitlines()[-2]
    assert file == str(tmp_path / "out" / "sample-affinities.png")
    colors, counts = np.unique(np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3), axis=0, return_counts=True)
    assert len(colors) > 100 and counts.max() < 0.9 * counts.sum()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--model", "nothing"], "no model 'nothing'"),
        (["--model", "container"], f"container has no pre-trained weights: there are {RELEASED}, "),
        (["--model", f"{OURS[:-7]}mine"], f"{OURS[:-7]}mine has no pre-trained weights: there are {OURS};"),
        (["--model", "resnet18.mine"], "resnet18.mine has no pre-trained weights: there are resnet18.a1_in1k, "),
        (["--model", RELEASED], f"`container weights fetch {RELEASED}`"),
        (["--model", OURS, "--checkpoint", "GOLDEN"], "give one of them"),
        (["--model", OURS, "--img-size", "0"], "image size 0 is not from 1 to 4,096 pixels"),
        (["--model", "container", "--checkpoint", "GOLDEN"], "does not fit container: "),
        (["no.jpg", "--model", OURS], "no file no.jpg"),
        ([__file__, "--model", OURS], f"{__file__} cannot be read as a photo: it is not an image file"),
        ([SAMPLE, SAMPLE, "--model", OURS, "--out", "out"], "photos of the same name"),
        (["--img-size", "1000000000"], "image size 1000000000 is not from 1 to 4,096 pixels"),
        (["--model", "container_light_nanoo"], "no model 'container_light_nanoo': did you mean container_light_nano?"),
        ([".", "--model", OURS], "no images in ."),
    ],
)
def test_mistakes(words, said, golden, tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTAINER_WEIGHTS_DIR", str(tmp_path))
    assert said in answer("predict", *(golden if word == "GOLDEN" else word for word in words))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_photos(tmp_path, capsys):
    """At any depth; what lies beside them is counted."""
    for name in ("b.png", "a/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.open(SAMPLE).save(tmp_path / name)
    (tmp_path / "list.txt").touch()
    main(["predict", str(tmp_path)])
    output = capsys.readouterr()
    assert [line for line in output.out.splitlines() if line.startswith(str(tmp_path))] == [
        str(tmp_path / "a/c.jpg"),
        str(tmp_path / "b.png"),
    ]
    assert output.err == f"1 files with other suffixes (.txt) in {tmp_path} are not used\n"


def test_a_name_without_a_tag_means_its_default_weights(tmp_path, monkeypatch, capsys):
    """In every command, and random weights only if they are asked for."""
    name = "container_light_nano_32"
    model = weights.create(name)
    assert torch.equal(model.norm.weight, STATE["norm.weight"])
    assert not torch.equal(weights.create(name, pretrained=False).head.fc.weight, model.head.fc.weight)
    for words in (["weights", "show"], ["weights", "verify"]):
        main([*words, name])
        assert str(PACKAGED) in capsys.readouterr().out
    main(["weights", "export", name, str(tmp_path / "out")])
    assert (tmp_path / "out/README.md").read_text().count(OURS)


def test_models_that_cannot_answer():
    with pytest.raises(ValueError, match="call eval"):
        predict([SAMPLE], timm.create_model("container_light_nano"))
    with pytest.raises(ValueError, match="Container has no classifier"):
        predict([SAMPLE], timm.create_model("container_light_nano", num_classes=0).eval())
    tied = timm.create_model("vit_tiny_patch16_224").eval()
    tied.pretrained_cfg["input_size"] = (3, 50, 50)
    with pytest.raises(ValueError, match="VisionTransformer fails at 50 x 50 pixels"):
        predict([SAMPLE], tied)


@pytest.mark.slow
def test_as_a_user_types_it(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "container", "predict", "--model", OURS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and not result.stderr
    assert result.stdout.startswith(f"{SAMPLE}\n") and lines(result.stdout)[0][1] == "cat"
