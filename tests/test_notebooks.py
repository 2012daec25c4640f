"""Every notebook runs from top to bottom in its fast mode, and is committed with outputs and a Colab badge."""

import pathlib

import nbclient
import nbformat
import pytest
from jupyter_client import KernelManager

pytestmark = pytest.mark.once

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One process for all notebooks: most of the time goes into its imports."""
    manager = KernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HKR_FAST", "1")
        manager.start_kernel(cwd=tmp_path_factory.mktemp("notebooks"))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, kernel):
    notebook = nbformat.read(path, as_version=4)
    forget = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f")])
    for each in (forget, notebook):
        client = nbclient.NotebookClient(each, kernel, timeout=120)
        client.execute()
        client.kc.stop_channels()
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
