"""One-class learning: a score that is a signed distance to the data, trained against generated outliers."""

from typing import Any

import keras
import numpy as np

from hkr_keras import margins
from hkr_keras._validation import number

__all__ = ["fit", "surrounding_box"]


def surrounding_box(x: Any, share: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest values of data in every coordinate, moved apart on each side by a share of their distance.

    Example:

    >>> surrounding_box(np.array([[0.0, 1.0], [4.0, 1.0]]))[1].tolist()
    [5.0, 1.0]
    """
    low, high = np.min(x, axis=0), np.max(x, axis=0)
    return low - share * (high - low), high + share * (high - low)


def fit(
    model: keras.Model,
    x: Any,
    epochs: int,
    box: tuple[Any, Any] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """Trains a score on one class: inputs are labelled 1, and as many fresh uniform points of a box 0 in every epoch.

    The size of the score of a 1-Lipschitz model is a lower bound of the distance to the boundary that it draws around
    the data: positive inside, negative outside. `certify` and `certify_outputs(...).auroc` say how much of
    that no change of the inputs can undo.

    Args:
        model: built and compiled model with one input and one score, as with `losses.HKR(alpha, margin)`.
        x: inputs of the class, `(n, ...)`.
        epochs: of training, at least 1.
        box: lowest and highest inputs where outliers are sought, two arrays of the shape of one input; `None` for
            `surrounding_box(x)`. For images `(np.zeros(shape), np.ones(shape))`.
        batch_size: inputs and outliers per batch.
        seed: of the outliers.

    Returns:
        The loss of every epoch, `(epochs,)`.

    Raises:
        ValueError: for a model that is not compiled or does not have one score, an empty x, another shape of the box.

    Example:

    >>> import keras, hkr_keras as hkr
    >>> model = hkr.models.lipschitz_mlp((2,), 1, widths=(8,))
    >>> model.compile("adam", loss=hkr.losses.HKR(alpha=10, margin=0.1))
    >>> fit(model, np.array([[0.0, 0.1], [0.1, 0.0]]), epochs=2).shape
    (2,)

    Reference:
        Béthune et al., ICML 2023 (arXiv 2303.01978).
    """
    x = np.asarray(x, dtype=np.float32)
    if not model.built or not model.compiled or not margins.is_binary(model.outputs[0]):
        raise ValueError(f"Expected a built and compiled model with one score. Received: model '{model.name}'")
    if x.ndim < 2 or not len(x):
        raise ValueError(f"Expected inputs of shape (n, ...). Received: x.shape={x.shape}")
    low, high = (np.asarray(side) for side in (surrounding_box(x) if box is None else box))
    if not low.shape == high.shape == x.shape[1:]:
        raise ValueError(
            f"Expected a box of two arrays of the shape {x.shape[1:]}. Received: shapes {low.shape} and {high.shape}"
        )
    rng, labels, losses = np.random.default_rng(seed), np.repeat([1, 0], len(x)), []
    for _ in range(int(number("epochs", epochs, lowest=1))):
        points = np.concatenate([x, rng.uniform(low, high, x.shape).astype(np.float32)])
        losses.append(model.fit(points, labels, batch_size=batch_size, verbose=0).history["loss"][0])
    return np.array(losses)
