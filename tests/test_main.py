"""The `container` command, as a user types it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_weights import OURS, PACKAGED, RELEASED, STATE

from container import weights, zoo
from container.__main__ import main


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "container", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_script_runs_with_its_arguments_and_the_models(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys, timm\nif __name__ == '__main__':\n    print(sys.argv[1:], timm.is_model('container_light'))\n"
    )
    for command in (["script.py"], ["run", "script.py"]):
        result = run(*command, "--model", "x", cwd=tmp_path)
        assert result.stdout == "['--model', 'x'] True\n" and result.returncode == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "arguments are required: COMMAND"),
        (["nothing.py"], "no script at nothing.py"),
        (["run"], "usage: container run SCRIPT"),
        (["run", "nothing"], "no script at nothing"),
        (["lsit"], "invalid choice: 'lsit'"),
        (["weights", "show", "container_light"], "no weights 'container_light': `container weights list` names them"),
        (["weights", "verify", RELEASED], "no file of container_light.ai2_in1k in "),
        (["weights", "import", "nothing.pth", "--as", OURS], "no checkpoint at nothing.pth"),
        (["weights", "export", RELEASED, "out"], "have to be downloaded by hand"),
        (["weights", "export", "container.untrained", "out"], "No pretrained weights exist for container.untrained"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTAINER_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)
    output = capsys.readouterr()
    assert message in f"{stop.value} {output.out} {output.err}"
    assert not (tmp_path / "out").exists()


def test_list(capsys):
    main(["list"])
    assert capsys.readouterr().out.splitlines() == zoo.table().splitlines()
    main(["weights", "list"])
    header, released, ours = capsys.readouterr().out.splitlines()
    assert header.startswith("weights") and released.endswith(" no") and ours.endswith(str(PACKAGED))
    main(["weights", "show", OURS])
    shown, here = capsys.readouterr().out.split("here: ")
    assert json.loads(shown) == weights.manifest()[OURS] and here == f"{PACKAGED}\n"


def test_verify(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CONTAINER_WEIGHTS_DIR", str(tmp_path))
    main(["weights", "verify"])
    released, ours = capsys.readouterr().out.splitlines()
    assert released == f"{RELEASED}: no file of {RELEASED} in {tmp_path}"
    assert ours == f"{OURS}: whole, sha256 {weights.manifest()[OURS]['file']['sha256']}, {PACKAGED}"
    shutil.copy(PACKAGED, tmp_path / f"{RELEASED}.safetensors")
    with pytest.raises(SystemExit):
        main(["weights", "verify"])
    assert f"{RELEASED}: REFUSED, checkpoint does not fit container_light: " in capsys.readouterr().out


def test_import_and_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict={k: v * 0 for k, v in STATE.items()}, state_dict_ema=STATE), "checkpoint.pth")
    main(["weights", "import", "checkpoint.pth", "--as", OURS, "--ema"])
    output = capsys.readouterr()
    assert json.loads(output.out)[OURS]["file"]["bytes"] == os.path.getsize(f"{OURS}.safetensors")
    assert torch.equal(weights.read(f"{OURS}.safetensors")["norm.weight"], STATE["norm.weight"])
    main(["weights", "import", "checkpoint.pth", "--as", OURS, "--no-ema", "--out", "raw.safetensors"])
    assert not weights.read("raw.safetensors")["norm.weight"].any()
    main(["weights", "export", OURS, "folder"])
    assert 'timm.create_model("local-dir:folder", pretrained=True)' in capsys.readouterr().out
