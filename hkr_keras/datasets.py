"""Data sets for demos, notebooks and benchmarks: images in [0, 1], so radii are in pixel units.

`digits` and `moons` come with scikit-learn and need no network. The others are those of `keras.datasets`.
"""

import dataclasses

import keras
import numpy as np

NAMES = ("digits", "moons", "mnist", "fashion_mnist", "cifar10")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and test data as float32 inputs and integer labels.

    Args:
        x_train, x_test: `(n, height, width, channels)` in [0, 1], or `(n, 2)` for `moons`.
        y_train, y_test: `(n,)` integers.
        classes: number of classes.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int


def load(name: str, seed: int = 0) -> Dataset:
    """Loads a data set by name.

    Args:
        name: one of `digits` (1,797 handwritten digits of 8 x 8 pixels, 25 % held out, stratified), `moons` (two
            interleaved half circles, 1,000 points, half held out), `mnist`, `fashion_mnist`, `cifar10`.
        seed: of the split of `digits` and the points of `moons`.

    Raises:
        ValueError: for another name.
        ImportError: when `digits` or `moons` are asked for without scikit-learn.
        ConnectionError: when the data are not on this machine and cannot be downloaded.

    Example:

    >>> data = load("moons")
    >>> data.x_train.shape, data.classes
    ((500, 2), 2)
    """
    if name not in NAMES:
        raise ValueError(f"Expected one of {', '.join(NAMES)}. Received: name={name}")
    if name in ("digits", "moons"):
        return _embedded(name, seed)
    try:
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except Exception as error:
        raise ConnectionError(
            f"The data set '{name}' is not on this machine and could not be downloaded. Connect to the internet, "
            "put its files where keras.datasets looks for them (~/.keras/datasets), or use 'digits' or 'moons', "
            f"which need no network. ({error})"
        ) from error
    images = [(x.reshape(*x.shape[:3], -1) / np.float32(255)).astype("float32") for x in (x_train, x_test)]
    return Dataset(
        name, images[0], y_train.reshape(-1).astype("int64"), images[1], y_test.reshape(-1).astype("int64"), 10
    )


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
    return Dataset(name, x_train, y_train, x_test, y_test, len(np.unique(y)))
