"""The `container` command, as a user types it."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_weights import FREE, OURS, PACKAGED, RELEASED, STATE

from container import weights, zoo
from container.__main__ import main
from container.predict import SAMPLE


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "container", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_script_runs_with_its_arguments_and_the_models(tmp_path, monkeypatch, capsys):
    (tmp_path / "script.py").write_text(
        "import sys, timm\nif __name__ == '__main__':\n    print(sys.argv[1:], timm.is_model('container_light'))\n"
    )
    result = run("run", "script.py", "--model", "x", cwd=tmp_path)
    assert result.stdout == "['--model', 'x'] True\n" and result.returncode == 0
    monkeypatch.setattr(sys, "argv", ["container"])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("PYTHONPATH", "")
    main([str(tmp_path / "script.py"), "--model", "y"])
    assert capsys.readouterr().out == "['--model', 'y'] True\n"


CHILDREN = """
import multiprocessing, subprocess, sys
import beside  # as `python SCRIPT` finds it

def known(name):
    import timm
    return timm.is_model(name)

if __name__ == "__main__":
    child = "from timm.models import is_model; print(is_model('container_light'))"
    print(known("container_light"), multiprocessing.get_context("spawn").Pool(1).map(known, ["container_light"]))
    print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip())
    lazy = "import sys, importlib.util as u; print(u.find_spec('timm') is not None, 'torch' in sys.modules)"
    print(subprocess.run([sys.executable, "-c", lazy], capture_output=True, text=True).stdout.strip())
"""


@pytest.mark.parametrize(
    "how", ["script", *(pytest.param(how, marks=pytest.mark.slow) for how in ("module", "command"))]
)
def test_processes_that_are_started_know_the_models(how, tmp_path):
    """By spawn and by hand; a process that does not import timm imports nothing."""
    (tmp_path / "folder").mkdir()
    script = tmp_path / "folder" / "script.py"
    script.write_text(CHILDREN)
    (tmp_path / "folder" / "beside.py").touch()
    words = dict(script=["script.py"], module=["-m", "script"], command=[shutil.which("python"), "script.py"])[how]
    result = run("run", *words, cwd=script.parent)
    assert result.stdout == "True [True]\nTrue\nTrue False\n", result.stderr


@pytest.mark.slow
def test_a_module_of_the_user_s_called_container_does_not_hide_the_models(tmp_path):
    """It is named; if the script imports it before timm, it is the script's, and one line says what is missing."""
    (tmp_path / "container.py").write_text("value = 5\n")
    for first, printed, line in (
        (
            "",
            "True",
            f"`import container` is {ROOT / 'container' / '__init__.py'}, and not {tmp_path / 'container.py'}",
        ),
        ("import container; ", "False", "the models are not registered, as <module 'container' from"),
    ):
        (tmp_path / "script.py").write_text(f"{first}import timm; print(timm.is_model('container_light'))\n")
        result = run("run", sys.executable, str(tmp_path / "script.py"), cwd=ROOT)  # `container` itself is ours
        assert result.stdout == f"{printed}\n" and line in result.stderr


@pytest.mark.parametrize("prefix", [sys.prefix, "/elsewhere"])
def test_another_interpreter_is_left_alone(prefix):
    """Whose site-packages may have another timm, or none."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "container" / "children"), "CONTAINER_RUN_PREFIX": prefix}
    code = "import sys; print('AfterTimm' in str(sys.meta_path), [p for p in sys.path if 'children' in p])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{prefix == sys.prefix} []\n", done.stderr


@pytest.mark.slow
def test_a_sitecustomize_of_the_system_is_still_read(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.said = 'read'\n")
    code = "import sys, sitecustomize, timm; print(sys.said, sitecustomize.__file__, timm.is_model('container_light'))"
    result = subprocess.run(
        [sys.executable, "-m", "container", "run", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout == f"read {tmp_path / 'sitecustomize.py'} True\n", result.stderr


LAUNCHED = "import timm; print(timm.create_model('container_light_nano').num_features)\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, processes",
    [
        ("torchrun --nproc_per_node 2", 2),
        ("accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no", 1),
    ],
)
def test_launchers_start_processes_that_know_the_models(words, processes, tmp_path):
    (tmp_path / "script.py").write_text(LAUNCHED)
    result = run("run", *words.split(), "script.py", cwd=tmp_path)
    assert result.stdout.count("128") == processes and result.returncode == 0, result.stderr


@pytest.mark.slow
def test_commands_of_libraries_know_the_models(tmp_path):
    """Self-supervised pretraining by lightly-train, from its command line."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (48, 48), (60 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    settings = "out=out data=photos model=timm/container_light_nano method=dino epochs=1 batch_size=4 accelerator=cpu"
    result = run("run", "lightly-train", "pretrain", *settings.split(), "num_workers=0", cwd=tmp_path)
    assert (tmp_path / "out/exported_models/exported_last.pt").is_file(), result.stderr[-2000:]


@pytest.mark.slow
def test_training_from_the_command(tmp_path):
    """For those who installed the package, and have no copy of the script: by the recipes in it."""
    result = run("train", "--recipe", "digits", "--epochs", "1", "--dry-run", cwd=tmp_path)
    assert "recipe digits: 1 epochs of 44 steps of 32 images" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["weights"], "arguments are required: COMMAND"),
        (["nothing.py"], "no script and no command nothing.py"),
        (["run"], "usage: container run SCRIPT | -m MODULE | COMMAND"),
        (["run", "nothing"], "no script and no command nothing"),
        (["run", "-m", "no.such.module"], "no module no.such.module"),
        (["lsit"], "no command 'lsit': did you mean list?"),
        (["trian"], "did you mean train?"),
        (["weights", "lst"], "no command 'lst': did you mean list?"),
        (["no"], "no command 'no': list, predict, figures, explore, export, probe, weights, train, run"),
        (["weights", "show", "resnet18"], "no weights 'resnet18.a1_in1k': `container weights list` names them"),
        (["weights", "show", f"{OURS}0"], f"there are {OURS}"),
        (["weights", "verify", RELEASED], "no file of container_light.ai2_in1k in "),
        (["weights", "import", "nothing.pth", "--as", "container.x"], "no checkpoint at nothing.pth"),
        (["weights", "import", "nothing.pth", "--as", "container"], "container is not ARCHITECTURE.TAG"),
        (["weights", "import", str(PACKAGED), "--as", f"{OURS[:-7]}Mine"], "is not ARCHITECTURE.TAG"),
        (["weights", "export", RELEASED, "out"], f"`container weights fetch {RELEASED}` puts them there"),
        (["weights", "export", "container.untrained", "out"], "no weights 'container.untrained'"),
        (["weights", "fetch", "container.untrained"], "no weights 'container.untrained'"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("CONTAINER_WEIGHTS_DIR", str(tmp_path))
    before = os.environ.copy()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)
    output = capsys.readouterr()
    assert message in f"{stop.value} {output.out} {output.err}"
    assert not (tmp_path / "out").exists()
    assert os.environ == before


@pytest.mark.parametrize(
    "words, file",
    [
        (["predict", "--out", "out"], "out/sample-affinities.png"),
        (["figures", SAMPLE, "--out", "out"], "out/gates.png"),
        (["export", "container_light_nano", "model.onnx", "--format", "onnx"], "model.onnx"),
        (["probe", ".", "--json", "found.json"], "found.json"),
        (["weights", "import", PACKAGED, "--as", "container_light_nano_32.mine", "--out", "w.safetensors"],
         "w.safetensors"),
        (["weights", "export", "container_light_nano", "out"], "out/README.md"),
    ],
)  # fmt: skip
def test_no_file_is_overwritten(words, file, tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    line = answer(*words)
    assert f"{file} exists: delete it, or choose another name" in line or line == "container: out is not empty"
    assert (tmp_path / file).read_text() == "mine" and len(list((tmp_path / file).parent.iterdir())) == 1


def test_list(monkeypatch, capsys):
    monkeypatch.setattr(zoo, "table", lambda markdown: "the table\nof the zoo")
    main(["list"])
    assert capsys.readouterr().out.splitlines() == ["the table", "of the zoo"]
    main(["weights", "list"])
    header, released, *photos, free, ours = capsys.readouterr().out.splitlines()
    assert free.startswith(FREE)
    assert header.startswith("weights") and released.endswith(" no") and ours.endswith(str(PACKAGED))
    assert len(photos) == 4 and all(line.endswith(".lite2_dist.safetensors") for line in photos)
    main(["weights", "show", OURS])
    shown, here = capsys.readouterr().out.split("here: ")
    assert json.loads(shown) == weights.manifest()[OURS] and here == f"{PACKAGED}\n"


def test_verify(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CONTAINER_WEIGHTS_DIR", str(tmp_path))
    main(["weights", "verify"])
    released, *photos, free, ours = capsys.readouterr().out.splitlines()
    assert free.startswith(f"{FREE}: whole, ")
    assert all(".lite2_dist: whole, sha256 " in line for line in photos)
    assert released == f"{RELEASED}: no file of {RELEASED} in {tmp_path}"
    assert ours == f"{OURS}: whole, sha256 {weights.manifest()[OURS]['file']['sha256']}, {PACKAGED}"
    shutil.copy(PACKAGED, tmp_path / f"{RELEASED}.safetensors")
    with pytest.raises(SystemExit):
        main(["weights", "verify"])
    assert f"{RELEASED}: REFUSED, nobody published the hash" in capsys.readouterr().out
    main(["weights", "import", str(PACKAGED), "--as", f"{OURS[:-7]}mine"])
    (tmp_path / f"{OURS[:-7]}mine.safetensors").write_bytes(PACKAGED.read_bytes()[:-1])
    with pytest.raises(SystemExit):
        main(["weights", "verify"])
    assert f"{OURS[:-7]}mine: REFUSED, " in capsys.readouterr().out


def test_import_and_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTAINER_WEIGHTS_DIR", "weights")
    torch.save(dict(state_dict={k: v * 0 for k, v in STATE.items()}, state_dict_ema=STATE), "checkpoint.pth")
    name = "container_light_nano_32.mine"
    main(["weights", "import", "checkpoint.pth", "--as", name, "--ema", "--license", "mit"])
    output = capsys.readouterr()
    assert output.err == f"timm.create_model('{name}', pretrained=True) loads weights/{name}.safetensors\n"
    record = json.loads(output.out)["weights"][name]
    assert record["file"]["bytes"] == os.path.getsize(f"weights/{name}.safetensors")
    assert record["license"]["weights"] == "mit" and json.loads(output.out) == json.loads(
        (tmp_path / "weights" / f"{name}.json").read_text()
    )
    assert torch.equal(weights.read(f"weights/{name}.safetensors")["norm.weight"], STATE["norm.weight"])
    main(["weights", "import", "checkpoint.pth", "--as", f"{OURS[:-7]}raw", "--no-ema", "--out", "raw.safetensors"])
    assert not weights.read("raw.safetensors")["norm.weight"].any()
    assert "put raw.safetensors and raw.json into weights, as container_light_nano_32.raw.*" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=f"{OURS} is pinned to sha256 .*: choose another tag"):
        main(["weights", "import", "raw.safetensors", "--as", OURS])
    main(["weights", "list"])
    assert f"{name}     imported    mit" in capsys.readouterr().out
    main(["weights", "export", OURS, "folder"])
    assert 'timm.create_model("local-dir:folder", pretrained=True)' in capsys.readouterr().out


@pytest.mark.slow
def test_fetch_asks(tmp_path, monkeypatch, capsys):
    """Whose file it is, where it lies and under which licence are said first; without a yes nothing is done."""
    monkeypatch.setenv("CONTAINER_WEIGHTS_DIR", str(tmp_path / "weights"))
    for answer in ("n\n", ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        with pytest.raises(SystemExit, match="container: not downloaded"):
            main(["weights", "fetch", RELEASED])
        output = capsys.readouterr().out
        for said in ("the paper's authors", "https://drive.google.com/file/d/", "MIT", "Apache 2.0", str(tmp_path)):
            assert said in output
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    result = run("weights", "fetch", RELEASED, "--yes", cwd=tmp_path)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert list(tmp_path.iterdir()) == []
