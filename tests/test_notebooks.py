"""The notebooks run from a checkout, and are committed with what they show."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def pictures(notebook):
    return [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


@notebooks
def test_pictures_are_committed_and_small(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert pictures(notebook) and path.stat().st_size < 300_000
    assert not [o for cell in notebook.cells for o in cell.get("outputs", []) if o["output_type"] == "error"]
    longest = max(len(cell.source.splitlines()) for cell in notebook.cells if cell.cell_type == "code")
    assert longest <= 25, "cells are to be read at a glance"


@pytest.mark.slow
@notebooks
def test_it_runs_and_shows_as_many_pictures(path):
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, 4)
    committed = len(pictures(notebook))
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[], execution_count=None)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert len(pictures(notebook)) == committed
