"""Every notebook runs from top to bottom in its fast mode, and is committed with outputs and a Colab badge.

The backends take turns. JAX, which compiles every operation of a cell, has one in five.
"""

import itertools
import pathlib

import nbclient
import nbformat
import pytest
from helpers import BACKEND

TURNS = ["tensorflow", "torch", "torch", "tensorflow", "jax"]
NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MINE = [path for path, backend in zip(NOTEBOOKS, itertools.cycle(TURNS), strict=False) if backend == BACKEND]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", MINE, ids=lambda path: path.stem)
def test_runs(path, monkeypatch, tmp_path):
    monkeypatch.setenv("HKR_FAST", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_with_outputs_and_badge(path):
    notebook = nbformat.read(path, as_version=4)
    assert f"colab.research.google.com/github/hkr-keras/hkr_keras/blob/main/notebooks/{path.name}" in (
        notebook.cells[0].source
    )
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    sources = [cell.source for cell in notebook.cells]
    paired = nbformat.read(path, as_version=4) if not path.with_suffix(".py").exists() else None
    assert paired is None, "a notebook without its .py pair"
    script = path.with_suffix(".py").read_text()
    for source in sources:
        first = source.splitlines()[0].removeprefix("%")
        assert first in script
