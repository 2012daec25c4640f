"""Data sets by name, and from files of one's own."""

import re

import keras
import numpy as np
import pytest

from hkr_keras import datasets

pytestmark = pytest.mark.once


def test_stored_images_are_scaled(monkeypatch):
    images = np.arange(2 * 28 * 28, dtype="uint8").reshape(2, 28, 28)
    stored = ((images, np.array([1, 2], "uint8")), (images[:1], np.array([3], "uint8")))
    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", lambda: stored)
    data = datasets.load("fashion_mnist")
    assert data.x_train.shape == (2, 28, 28, 1)
    assert data.x_train.dtype == np.float32
    assert 0 <= data.x_train.min() <= data.x_train.max() == 1
    assert data.y_test.tolist() == [3]
    assert repr(data) == "Dataset('fashion_mnist': 2 training and 1 test inputs of shape (28, 28, 1), 10 classes)"


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"the path of an \.npz file\. Received: name=imagenet"):
        datasets.load("imagenet")


def arrays(**changed):
    """What a file of six images of two classes holds, with some arrays changed; `None` leaves one out."""
    pixels = np.arange(6 * 4, dtype="uint8").reshape(6, 2, 2) * 11
    labels = np.array([0, 1, 0, 1, 0, 1])
    found = {"x_train": pixels, "y_train": labels, "x_test": pixels[:2], "y_test": labels[:2], **changed}
    return {name: value for name, value in found.items() if value is not None}


def stored(folder, **changed):
    np.savez(folder / "mine.npz", **arrays(**changed))
    return folder / "mine.npz"


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_pixels_of_a_file_are_scaled(kind, tmp_path):
    data = datasets.load(kind(stored(tmp_path)))
    assert (data.name, data.classes) == ("mine", 2)
    assert data.x_train.shape == (6, 2, 2, 1)
    assert data.x_train.dtype == np.float32
    np.testing.assert_allclose(data.x_train[..., 0], arrays()["x_train"] / 255, rtol=1e-6)
    assert data.y_train.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.y_train.dtype == np.int64


def test_other_numbers_are_kept_as_they_are(tmp_path):
    x = np.linspace(-3, 500, 12).reshape(6, 2)
    data = datasets.load(stored(tmp_path, x_train=x, x_test=x[:2].astype("float32"), y_test=np.array([[0], [2]])))
    np.testing.assert_array_equal(data.x_train, x.astype("float32"))
    assert data.x_test.dtype == np.float32
    assert (data.y_test.tolist(), data.classes) == ([0, 2], 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_test": None}, "with x_test, x_train, y_train; missing: y_test"),
        ({"x_train": None, "x_test": None}, "missing: x_train, x_test"),
        ({"x_train": np.zeros(6)}, "Received: x_train of shape (6,) and type float64"),
        ({"x_train": np.full((6, 2, 2), "a")}, "Received: x_train of shape (6, 2, 2) and type <U1"),
        ({"x_train": np.full((6, 2, 2, 1), np.nan)}, "Received: x_train with 24 that are not"),
        ({"x_test": np.zeros((2, 3, 3), "uint8")}, "of one shape. Received: x_train.shape=(6, 2, 2, 1)"),
        ({"y_train": np.zeros(5, int)}, "Expected 6 integer labels from 0 on. Received: y_train of shape (5,)"),
        ({"y_train": np.array(["a", "b"] * 3)}, "type <U1; np.unique(y, return_inverse=True)[1] numbers the classes"),
        ({"y_train": np.array([-1, 1] * 3)}, "Received: y_train of shape (6,) and type int64 from -1 on"),
        ({"y_train": np.eye(2)[[0, 1] * 3]}, "Received: y_train of shape (6, 2) and type float64"),
        ({"y_train": np.zeros(6, int), "y_test": np.zeros(2, int)}, "at least 2 classes, 0 and 1"),
        ({"x_train": np.array([{}] * 6)}, "Expected an .npz file of plain arrays"),
    ],
)
def test_files_of_another_kind(changed, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        datasets.load(stored(tmp_path, **changed))


def test_broken_and_missing_files(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="file of plain arrays"):
        datasets.load(tmp_path / "broken.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ValueError, match="file of plain arrays"):
        datasets.load(tmp_path / "one.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        datasets.load("missing.npz")
