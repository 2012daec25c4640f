"""Every notebook runs from top to bottom, with less training, and is committed with outputs and a Colab badge."""

import pathlib

import nbclient
import nbformat
import pytest
from jupyter_client import KernelManager

pytestmark = pytest.mark.once

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

SHORTCUTS = {  # what the cells of a notebook say, and what the test has them do
    "01": {"epochs = 30": "epochs = 2", "epochs = 40": "epochs = 2"},
    "02": {
        '"fashion_mnist"': '"digits"',
        "orthogonal=True": "orthogonal=False",
        "30 if SMALL else 4": "3",
        "30 if SMALL else 1": "1",
        "rng.choice(correct, 40": "rng.choice(correct, 4",
        "(100, 0.4), (50, 0.6), (20, 1.0)]": "]",
    },
    "03": {"epochs=15": "epochs=2", "epochs=3": "epochs=1", "epochs = 3": "epochs = 1", "max_trials=4": "max_trials=1"},
    "04": {"epochs=epochs": "epochs=2", "(1, 0.6), (100, 0.1), (100, 0.6)]": "]"},
    "05": {"epochs=40": "epochs=3", "(256,) * 6, 20": "(64, 64), 1"},
    "06": {"epochs=60": "epochs=3", "epochs=30": "epochs=2", "epochs=15": "epochs=1"},
    "07": {
        "data.x_test, data.y_test": "data.x_test[:32], data.y_test[:32]",
        "STEPS = 40": "STEPS = 5",
        "epochs=20": "epochs=2",
    },
    "08": {"epochs=60": "epochs=2", "epochs=40": "epochs=2"},
}


def test_there_are_notebooks():
    assert {path.name[:2] for path in NOTEBOOKS} == set(SHORTCUTS)


def shortened(path):
    """The notebook with its shortcuts, each of which must be there to be taken."""
    notebook = nbformat.read(path, as_version=4)
    for text, shorter in SHORTCUTS[path.name[:2]].items():
        cells = [cell for cell in notebook.cells if cell.cell_type == "code" and text in cell.source]
        assert cells, f"{path.name} does not say {text!r}"
        for cell in cells:
            cell.source = cell.source.replace(text, shorter)
    return notebook


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One process for all notebooks: most of the time goes into its imports."""
    manager = KernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
        manager.start_kernel(cwd=tmp_path_factory.mktemp("notebooks"))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, kernel):
    notebook = shortened(path)
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
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    sources = [cell.source for cell in notebook.cells]
    paired = nbformat.read(path, as_version=4) if not path.with_suffix(".py").exists() else None
    assert paired is None, "a notebook without its .py pair"
    script = path.with_suffix(".py").read_text()
    for source in sources:
        first = source.splitlines()[0].removeprefix("%")
        assert first in script
