"""The code of the README and of the guide runs, in order, page by page."""

import dataclasses
import functools
import math
import pathlib
import re
import types

import keras
import numpy as np
import pytest

import hkr_keras as hkr

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("guide/*.md")),
    ROOT / "docs/index.md",
    ROOT / "docs/migration.md",
]
K = keras.layers


def plain_model():
    """What a reader may have."""
    stem = K.Conv2D(8, 3, padding="same", activation="relu", name="stem")
    return keras.Sequential([keras.Input((8, 8, 1)), stem, K.Conv2D(8, 3), K.Flatten(), K.Dense(10, "softmax")])


def names_of_a_page(page, data):
    """What the code of a page takes for granted."""
    is_about_plain_models = page.stem == "swap_and_ship"
    flat = {"X_train": data.x_train.reshape(-1, 64), "X_test": data.x_test.reshape(-1, 64)}
    arrays = {name: getattr(data, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    model = plain_model() if is_about_plain_models else hkr.models.lipschitz_mlp((8, 8, 1), 10, widths=(32,))
    return {
        "keras": keras,
        "np": np,
        "math": math,
        "hkr": hkr,
        "model": model,
        "plain": plain_model(),
        **flat,
        **arrays,
        "x": data.x_train,
        "y": data.y_train,
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_pages_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    data = hkr.datasets.load("digits")
    few = {name: getattr(data, name)[:128] for name in ("x_train", "y_train", "x_test", "y_test")}
    data = dataclasses.replace(data, **few)
    monkeypatch.setattr(hkr.datasets, "load", lambda name: data)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    names = names_of_a_page(page, data)
    for code in blocks:
        if "deel-lip" not in code:
            exec(compile(code, f"{page.name}: {code.splitlines()[0]}", "exec"), names)
    assert blocks or page.stem in ("lipschitz_networks", "limits")


def test_names_of_the_migration_tables_exist():
    text = (ROOT / "docs/migration.md").read_text()
    cells = re.findall(r"^\|.+\| (.+) \|$", text, re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`([A-Za-z][\w.]*)(?=[(`])", cell)}
    owners = [types.SimpleNamespace(keras=keras), hkr, hkr.layers, hkr.constraints, hkr.callbacks]
    own = {"tau_binary", "categorical_hinge", "loss.alpha", "loss.margin", "loss.temperature", "logs"}
    assert {"LipschitzDense", "losses.MulticlassHKR", "lipschitz_summary", "keras.layers.PReLU", *own} <= names
    for name in names - own:
        found = [functools.reduce(lambda part, at: getattr(part, at, None), name.split("."), each) for each in owners]
        assert any(each is not None for each in found), name


def test_no_page_compares_a_score_with_one_half():
    """Keras takes `"accuracy"` of one output for that of a probability."""
    sources = [*PAGES, *sorted((ROOT / "notebooks").glob("*.py")), *sorted((ROOT / "hkr_keras").rglob("*.py"))]
    binary = re.compile(r"losses\.(HKR|KR|HingeMargin)\b")
    for source in sources:
        calls = re.findall(r"\.compile\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", source.read_text())
        assert [call for call in calls if binary.search(call) and re.search("[\"']accuracy[\"']", call)] == []
    for source in (ROOT / "README.md", ROOT / "docs/guide/training.md", ROOT / "notebooks/01_quickstart.py"):
        assert "metrics.Accuracy()" in source.read_text()


RAW = "https://raw.githubusercontent.com/hkr-keras/hkr_keras/main/"


def test_pages_have_no_dead_ends():
    """Links between files of the repository lead somewhere; those of the site are checked when it is built."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        text = page.read_text()
        links = re.findall(r"\]\((?!http|#)([^)#]+)", text)
        pictures = re.findall(r'src="([^"]+)"', text)
        assert all(picture.startswith(RAW) for picture in pictures), "a package index shows absolute addresses only"
        targets = links + [picture.removeprefix(RAW) for picture in pictures]
        assert [target for target in targets if not (page.parent / target).exists()] == []


def test_code_in_documents_is_at_most_88_wide():
    """What the pages of the site and of the repository show without a scroll bar."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))):
        blocks = re.findall(r"^( *)```[^\n]*\n(.*?)^\1```", page.read_text(), re.MULTILINE | re.DOTALL)
        wide = [line for _, block in blocks for line in block.splitlines() if len(line) > 88]
        assert (page.name, wide) == (page.name, [])
