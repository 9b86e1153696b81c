"""`python -m container SCRIPT`: a script that knows nothing of the package finds its models."""

import os
import subprocess
import sys

from conftest import ROOT


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
    result = run("script.py", "--model", "x", cwd=tmp_path)
    assert result.stdout == "['--model', 'x'] True\n" and result.returncode == 0


def test_mistakes(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == "usage: python -m container SCRIPT [ARGUMENT ...]\n"
    result = run("nothing.py", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == "no script at nothing.py\n"
