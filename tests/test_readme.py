"""The README says what is so: its code runs, its numbers are the models', its commands are those of CI."""

import ast
import re

import pytest
import timm
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import container
from container.__main__ import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Pages whose blocks of Python each run by themselves; docs/unification.md has a test of its own.
PAGES = {
    f"docs/{name}.md": (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("README", "start", "models", "deploy", "inside")
}
CODE = [
    pytest.param(code, id=f"{page}-{i}")
    for page, text in ({"README.md": README} | PAGES).items()
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


@pytest.mark.parametrize("code", CODE)
def test_code(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for library in ("segmentation_models_pytorch", "transformers", "ultralytics"):
        if library in code:
            pytest.importorskip(library, reason=f"{library} is not installed")
    capsys.readouterr()  # Ultralytics speaks of the settings that it makes where it has none
    scope = {}
    exec(code.replace("PATH_OF_THE_CLONE", str(ROOT)), scope)
    printed = capsys.readouterr().out
    assert printed == "".join(line + "\n" for line in re.findall(r"^# (.*)$", code, re.MULTILINE))
    for name, shape in re.findall(r"^(\w) = .*# (\([\d, ]+\))", code, re.MULTILINE):
        assert str(tuple(scope[name].shape)) == shape


ROWS = re.findall(r"^\| `(container\w*)` .*\| ([\d.]+) M \| ([\d.]+) \|$", README, re.MULTILINE)
assert len(ROWS) >= 6


def test_it_is_short():
    """Tables may be wider."""
    lines = README.splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize("name, params, gmacs", ROWS)
def test_tables(name, params, gmacs):
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == params
    assert f"{counter.get_total_flops() / 2e9:.2f}" == gmacs


def test_the_zoo_is_what_the_command_prints(capsys):
    main(["list", "--markdown"])
    printed = capsys.readouterr().out
    table = re.search(r"<!-- container list --markdown -->\n(.*?)<!-- end -->", PAGES["docs/models.md"], re.DOTALL)
    assert table[1] == printed


def test_commands_are_those_of_ci():
    commands = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    assert 'pip install -e ".[test]" && pytest -n 2 --dist worksteal' in commands
    assert "\npytest -n 2 --dist worksteal\n" in (ROOT / ".ci" / "run").read_text()


def test_differences_has_every_note():
    """Classes whose docstring has a `Note:` are the rows of the table, and no others are."""
    noted = set()
    for file in (ROOT / "container").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and "Note:" in (ast.get_docstring(node) or ""):
                noted.add(node.name)
    page = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    assert noted == set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))


def test_models_to_add_are_short(monkeypatch):
    """The example of CONTRIBUTING.md, registered and built."""
    code = re.search(r"```python\n(@register_model.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    name = re.search(r"def (\w+)", code)[1]
    made = []
    scope = dict(vars(container.container), register_model=lambda entry: entry)
    scope["_create_container"] = lambda name, pretrained, **kwargs: made.append(name) or container.Container(**kwargs)
    exec(code, scope)
    model = scope[name](num_classes=3, depths=(1, 1, 1, 1))
    assert made == [name] and isinstance(model.stages[0].blocks[0].aggregation.dynamic, container.DoubleAttention)
    assert len(code.strip().splitlines()) <= 6


PAGES_WITH_LINKS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES_WITH_LINKS, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


def test_version_is_one():
    assert f"version: {container.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {container.__version__}" in (ROOT / "CHANGELOG.md").read_text()
