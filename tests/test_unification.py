"""docs/unification.md, run as it is read; the affinity that it adds passes the tests of every other."""

import re

import numpy as np
import pytest
import test_affinity
import test_figures
from conftest import ROOT
from PIL import Image

PAGE = (ROOT / "docs" / "unification.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The page's names after all its code, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("page")
    scope = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(code, scope)
    return scope, folder


def test_every_matrix_is_drawn(read):
    scope, folder = read
    assert len(scope["shown"]) == 9 + 1  # the page adds one after its picture
    drawn, committed = (
        Image.open(path).convert("RGB") for path in (folder / "unification.png", ROOT / "docs" / "unification.png")
    )
    assert len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 100 and drawn.size == committed.size
    # Matplotlib's versions shift pictures by a pixel, and fonts differ between machines.
    a, b = (np.asarray(p.resize((45, 43), Image.Resampling.BOX), dtype=float) for p in (drawn, committed))
    assert abs(a - b).mean() < 2


@pytest.mark.parametrize(
    "check",
    [
        test_affinity.test_kernel_equals_formula,
        test_affinity.test_probe_equals_formula,
        lambda name, grid: test_figures.test_rows_are_those_of_the_matrix(name),
    ],
)
@pytest.mark.parametrize("grid", test_affinity.GRIDS)
def test_the_affinity_of_the_page_is_one(read, check, grid, monkeypatch):
    scope, _ = read
    monkeypatch.setitem(test_affinity.AFFINITIES, "row mean", lambda grid: scope["RowMean"]())
    check("row mean", grid)


def test_a_wrong_one_would_fail(read, monkeypatch):
    scope, _ = read

    class Wrong(scope["RowMean"]):
        def matrix(self, x):
            return super().matrix(x) * (1 + 1e-6)

    monkeypatch.setitem(test_affinity.AFFINITIES, "wrong", lambda grid: Wrong())
    for check in (test_affinity.test_kernel_equals_formula, test_affinity.test_probe_equals_formula):
        with pytest.raises(AssertionError):
            check("wrong", (4, 7))
