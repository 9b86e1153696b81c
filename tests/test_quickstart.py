"""examples/quickstart.ipynb runs from its first cell to its last, in an empty folder."""

import re

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's parts, about each other
def test_it_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="Jupyter is not installed")
    nbclient = pytest.importorskip("nbclient", reason="Jupyter is not installed")
    committed = nbformat.read(NOTEBOOK, as_version=4)
    found = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(found, timeout=300, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    printed = [
        "".join(o.get("text", "") for o in cell.get("outputs", []) if o.get("name") == "stdout") for cell in found.cells
    ]
    text = "".join(printed)
    assert "1.04 M parameters" in text and "stride 32: (1, 128, 7, 10)" in text
    assert float(re.search(r"([\d.]+) % of the held-out pieces", text)[1]) >= 90
    assert re.search(r"flower/0.jpg: flower", text) and re.search(r"temple/0.jpg: temple", text)
    # What is committed is what the cells gave: every one that prints has its output there.
    for before, after in zip(committed.cells, found.cells, strict=True):
        shown = [o for o in after.get("outputs", []) if o.get("name") != "stderr"]
        assert bool(before.get("outputs", [])) == bool(shown)


def test_it_is_small_and_has_no_paths():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 200_000 and "/home" not in text and "/work" not in text and "/root" not in text
