"""Data sets for demos, notebooks and benchmarks: images in [0, 1], so radii are in pixel units.

`digits` and `moons` come with scikit-learn and need no network. `mnist`, `fashion_mnist` and `cifar10` are those of
`keras.datasets`. Files of your own are `.npz` archives.
"""

import dataclasses
import os
import pathlib
import zipfile
import zlib
from typing import Any

import keras
import numpy as np

from hkr_keras import _display

__all__ = ["Dataset", "load"]

NAMES = ("digits", "moons", "mnist", "fashion_mnist", "cifar10")
_BROKEN = (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)
_MOST_CLASSES = 20  # of which a table tells the number of inputs
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Dataset:
    """Training and test data as float32 inputs and integer labels.

    Args:
        name: of the data set, or of the file without its suffix.
        x_train, x_test: `(n, height, width, channels)` images in [0, 1], `(n, 2)` points for `moons`, any `(n, ...)`
            from a file.
        y_train, y_test: `(n,)` int64 labels from 0 on.
        classes: number of classes.

    Example:

    >>> load("moons")
    Dataset('moons': 500 training and 500 test inputs of shape (2,), 2 classes)
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}: {len(self.x_train)} training and {len(self.x_test)} test inputs of shape "
            f"{self.x_train.shape[1:]}, {self.classes} classes)"
        )

    def _repr_html_(self) -> str:
        labels = {"training": self.y_train, "test": self.y_test}
        rows = [(name, len(y), *np.bincount(y, minlength=self.classes)[:_MOST_CLASSES]) for name, y in labels.items()]
        return _display.html_table(repr(self), ("", "inputs", *range(min(self.classes, _MOST_CLASSES))), rows)

    def __getitem__(self, rows: Any) -> "Dataset":
        """The same of some of the training and of the test data: a slice.

        >>> load("moons")[:20]
        Dataset('moons': 20 training and 20 test inputs of shape (2,), 2 classes)
        """
        if not isinstance(rows, slice):
            raise TypeError(f"Expected a slice, of training and test data alike. Received: {rows!r}")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in _ARRAYS})


def load(name: str | os.PathLike, seed: int = 0) -> Dataset:
    """Loads a data set by name, or one of your own from an `.npz` file.

    Args:
        name: one of `digits` (1,797 handwritten digits of 8 x 8 pixels, 25 % held out, stratified), `moons` (two
            interleaved half circles, 1,000 points, half held out), `mnist`, `fashion_mnist`, `cifar10`; or the path of
            an `.npz` file, as `numpy.savez` writes it, with the arrays `x_train`, `y_train`, `x_test` and `y_test`.
            Inputs `(n, ...)` of type uint8 are pixels: they are scaled from 0..255 to [0, 1], and images
            `(n, height, width)` get a channel. Other numbers are cast to float32. Labels are integers from 0 on,
            `(n,)` or `(n, 1)`.
        seed: of the split of `digits` and the points of `moons`.

    Raises:
        ValueError: for another name, and a file without these arrays or with others than those above.
        FileNotFoundError: for a file that is not there.
        ImportError: when `digits` or `moons` are asked for without scikit-learn.
        ConnectionError: when the data are not on this machine and cannot be downloaded.

    Example:

    >>> data = load("moons")
    >>> data.x_train.shape, data.classes
    ((500, 2), 2)
    """
    if isinstance(name, os.PathLike) or name.endswith(".npz"):
        return _own(pathlib.Path(name))
    if name not in NAMES:
        raise ValueError(f"Expected one of {', '.join(NAMES)}, or the path of an .npz file. Received: name={name}")
    if name in ("digits", "moons"):
        return _embedded(name, seed)
    try:
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except _BROKEN as error:
        raise ConnectionError(
            f"The data set '{name}' is not on this machine and could not be downloaded. Connect to the internet, "
            "put its files where keras.datasets looks for them (~/.keras/datasets), or use 'digits' or 'moons', "
            f"which need no network. ({error})"
        ) from error
    images = [(x.reshape(*x.shape[:3], -1) / np.float32(255)).astype("float32") for x in (x_train, x_test)]
    labels = [y.reshape(-1).astype("int64") for y in (y_train, y_test)]
    return Dataset(name=name, x_train=images[0], y_train=labels[0], x_test=images[1], y_test=labels[1], classes=10)


def _embedded(name: str, seed: int) -> Dataset:
    try:
        import sklearn.datasets
        import sklearn.model_selection
    except ImportError as error:
        raise ImportError(f"The data set '{name}' comes with scikit-learn: pip install 'hkr_keras[sklearn]'") from error
    if name == "digits":
        digits = sklearn.datasets.load_digits()
        x, y, share = (digits.images / 16)[..., None], digits.target, 0.25
    else:
        (x, y), share = sklearn.datasets.make_moons(1000, noise=0.1, random_state=seed), 0.5
    x_train, x_test, y_train, y_test = sklearn.model_selection.train_test_split(
        x.astype("float32"), y.astype("int64"), test_size=share, random_state=seed, stratify=y
    )
    classes = len(np.unique(y))
    return Dataset(name=name, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, classes=classes)


def _own(path: pathlib.Path) -> Dataset:
    arrays = read_npz(path)
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        raise ValueError(
            f"Expected the arrays {', '.join(_ARRAYS)}. Received: {path} with {', '.join(sorted(arrays)) or 'none'}; "
            f"missing: {', '.join(missing)}"
        )
    values = {name: _inputs(name, arrays[name]) for name in ("x_train", "x_test")}
    for part in ("train", "test"):
        values[f"y_{part}"] = _labels(f"y_{part}", arrays[f"y_{part}"], len(values[f"x_{part}"]))
    if values["x_train"].shape[1:] != values["x_test"].shape[1:]:
        shapes = f"x_train.shape={values['x_train'].shape}, x_test.shape={values['x_test'].shape}"
        raise ValueError(f"Expected training and test inputs of one shape. Received: {shapes}")
    classes = 1 + int(max(values["y_train"].max(), values["y_test"].max()))
    if classes < 2:
        raise ValueError("Expected labels of at least 2 classes, 0 and 1. Received: labels 0 alone")
    return Dataset(name=path.stem, classes=classes, **values)


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` file by name; pickled objects, which may hold code, are refused.

    Raises:
        ValueError: for a file that is no such archive, or holds objects.
        FileNotFoundError: for a file that is not there.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (*_BROKEN, MemoryError, RuntimeError) as error:
        raise ValueError(f"Expected an .npz file of plain arrays. Received: {path} ({error})") from error


def _inputs(name: str, x: np.ndarray) -> np.ndarray:
    if x.ndim < 2 or not x.size or x.dtype.kind not in "biuf":
        raise ValueError(f"Expected numbers of shape (n, ...). Received: {name} of shape {x.shape} and type {x.dtype}")
    if x.dtype == np.uint8:
        x = (x[..., None] if x.ndim == 3 else x) / np.float32(255)
    x = x.astype("float32")
    if not np.isfinite(x).all():
        raise ValueError(f"Expected finite numbers. Received: {name} with {np.sum(~np.isfinite(x))} that are not")
    return x


def _labels(name: str, y: np.ndarray, count: int) -> np.ndarray:
    if y.shape not in ((count,), (count, 1)) or y.dtype.kind not in "biu" or y.min() < 0:
        found = f"of shape {y.shape} and type {y.dtype}" + (f" from {y.min()} on" if y.dtype.kind == "i" else "")
        hint = "; np.unique(y, return_inverse=True)[1] numbers the classes" if y.ndim == 1 else ""
        raise ValueError(f"Expected {count} integer labels from 0 on. Received: {name} {found}{hint}")
    return y.reshape(-1).astype("int64")
