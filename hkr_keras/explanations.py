"""Explanations along the gradient: saliency maps, counterfactuals, nearest adversarial examples.

The gradient of an HKR network points to the other class along the optimal transport between the two, so moving an
input along it shows what the network takes for evidence. On ordinary networks the same steps look like noise.
"""

from typing import Any

import keras
import numpy as np

from hkr_keras import margins
from hkr_keras._backends.gradients import first_change, in_batches, input_gradient
from hkr_keras._validation import number

__all__ = ["counterfactual", "nearest_adversarial", "saliency"]


def saliency(model: keras.Model, x: Any, target: Any = None, batch_size: int = 128) -> np.ndarray:
    """The gradient of a logit with respect to the inputs.

    Args:
        model: built model with one input and outputs `(n,)`, `(n, 1)` or `(n, classes)`.
        x: inputs `(n, ...)`.
        target: class whose logit is meant, one integer or `(n,)`; `None` for the predicted one. A single score f
            counts as the logit of class 1, and `-f` as that of class 0.
        batch_size: inputs per batch.

    Returns:
        `(n, ...)` float32, in units of the logit per unit of the input.

    Raises:
        ValueError: for an empty x, a target that is no class, a model that is not built or has several inputs.

    Example:

    >>> import keras, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(2, kernel_initializer="identity")])
    >>> saliency(model, np.array([[2.0, 1.0]])).tolist()
    [[1.0, 0.0]]

    Reference:
        Serrurier et al., NeurIPS 2023 (arXiv 2206.06854).
    """
    x, logits = _inputs_and_logits(model, x, batch_size)
    chosen = _one_hot(logits.argmax(axis=1) if target is None else target, logits)
    return _gradient(model, x, 2 * chosen - 1 if _is_score(model) else chosen, batch_size)


def counterfactual(
    model: keras.Model,
    x: Any,
    target: Any = None,
    t: float = 2.0,
    clip: tuple[float, float] | None = None,
    batch_size: int = 128,
) -> np.ndarray:
    """Inputs moved along the gradient towards another class: `x - t g(x) grad g(x) / |grad g(x)|^2`.

    For one score g is f, for logits it is `f_target - f_predicted`. At `t=1` the input is where g would vanish if it
    were linear, on the boundary; at `t=2` it is the mirror image beyond. The gradient of an optimal HKR score has norm
    1, which leaves `x - t f(x) grad f(x)`, along the optimal transport to the other class.

    Args:
        model: built model with one input and raw scores `(n,)`, `(n, 1)` or logits `(n, classes)`.
        x: inputs `(n, ...)`.
        target: class to move to, one integer or `(n,)`; `None` for the strongest rival of the predicted class. Inputs
            of that class already stay where they are, as do those where the gradient is 0.
        t: how far to go, in units of the (linear) distance to the boundary.
        clip: smallest and largest value of an input, to which the result is clipped; `None` for no limits.
        batch_size: inputs per batch.

    Returns:
        `(n, ...)` float32.

    Raises:
        ValueError: as `saliency`; for a t or limits that are no finite numbers.

    Example:

    >>> import keras, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(2, kernel_initializer="identity")])
    >>> counterfactual(model, np.array([[2.0, 1.0]]), t=2.0).tolist()
    [[1.0, 2.0]]

    Reference:
        Serrurier et al., NeurIPS 2023 (arXiv 2206.06854).
    """
    t = number("t", t)
    x, logits = _inputs_and_logits(model, x, batch_size)
    return _clipped(x + t * _to_the_boundary(model, x, logits, target, batch_size), clip)


def nearest_adversarial(
    model: keras.Model,
    x: Any,
    target: Any = None,
    clip: tuple[float, float] | None = None,
    reach: float = 16.0,
    batch_size: int = 128,
) -> np.ndarray:
    """The nearest input along the gradient that is classified differently.

    From the (linear) distance to the boundary on, steps double until the prediction has changed, and bisection goes
    back to where it does. For a score that is optimal and has gradient norm 1 no adversarial example is nearer.

    Args:
        model, x, target, clip, batch_size: as for `counterfactual`.
        reach: how far to look, in units of the (linear) distance to the boundary.

    Returns:
        `(n, ...)` float32; NaN for inputs whose prediction does not change within reach.

    Raises:
        ValueError: as `counterfactual`; for a reach below 1.

    Example:

    >>> import keras, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(2, kernel_initializer="identity")])
    >>> nearest_adversarial(model, np.array([[2.0, 1.0]])).round(4).tolist()
    [[1.5, 1.5]]
    """
    reach = number("reach", reach, lowest=1.0)
    x, logits = _inputs_and_logits(model, x, batch_size)
    prediction, move = logits.argmax(axis=1), _to_the_boundary(model, x, logits, target, batch_size)

    def changed(points: np.ndarray) -> np.ndarray:
        return _logits(model, points, batch_size).argmax(axis=1) != prediction

    found, t = np.full(x.shape, np.nan, dtype=np.float32), 1.0
    while t <= reach and np.isnan(found).any():
        points = _clipped(x + t * move, clip)
        found, t = np.where(_column(changed(points), x.ndim) & np.isnan(found), points, found), 2 * t
    nearest = first_change(changed, x, np.where(np.isnan(found), x, found))
    return np.where(np.isnan(found), found, nearest)


def _is_score(model: keras.Model) -> bool:
    return margins.is_binary(model.outputs[0])


def _logits(model: keras.Model, x: np.ndarray, batch_size: int) -> np.ndarray:
    outputs = model.predict(x.astype(np.float32), batch_size=batch_size, verbose=0)
    return margins.two_logits(np.asarray(outputs, dtype=np.float64))


def _inputs_and_logits(model: keras.Model, x: Any, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim < 2 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"Expected finite inputs of shape (n, ...). Received: x.shape={x.shape}")
    return x, _logits(model, x, batch_size)


def _one_hot(target: Any, logits: np.ndarray) -> np.ndarray:
    labels = np.broadcast_to(np.asarray(target), len(logits)) if np.ndim(target) == 0 else np.asarray(target)
    count = logits.shape[1]
    if (
        labels.shape != (len(logits),)
        or labels.dtype.kind not in "iu"
        or not set(np.unique(labels)) <= set(range(count))
    ):
        raise ValueError(
            f"Expected one class in 0..{count - 1}, or one for each of {len(logits)} inputs. Received: target={target}"
        )
    return np.eye(count)[labels]


def _gradient(model: keras.Model, x: np.ndarray, weights: np.ndarray, batch_size: int) -> np.ndarray:
    """Of the weighted sum of the logits; a score counts as `(-f / 2, f / 2)`."""
    if _is_score(model):
        weights = 0.5 * (weights[:, 1:] - weights[:, :1])
    return in_batches(input_gradient(model), x, weights, batch_size=batch_size)


def _to_the_boundary(model: keras.Model, x: np.ndarray, logits: np.ndarray, target: Any, batch_size: int) -> np.ndarray:
    """The moves `-g grad g / |grad g|^2` to where g would vanish if it were linear, `(n, ...)` float64."""
    own = np.eye(logits.shape[1])[logits.argmax(axis=1)]
    rival = np.where(own > 0, -np.inf, logits).argmax(axis=1) if target is None else target
    difference = _one_hot(rival, logits) - own
    gap = (difference * logits).sum(axis=1)
    gradient = _gradient(model, x, difference, batch_size).astype(np.float64)
    squares = np.square(gradient).reshape(len(x), -1).sum(axis=1)
    return -_column(np.divide(gap, squares, out=np.zeros(len(x)), where=squares > 0), x.ndim) * gradient


def _clipped(x: np.ndarray, clip: tuple[float, float] | None) -> np.ndarray:
    if clip is not None:
        low, high = clip
        if not low < high:
            raise ValueError(f"Expected the smallest and the largest value of an input. Received: clip={clip}")
        x = np.clip(x, low, high)
    return x.astype(np.float32)


def _column(values: np.ndarray, rank: int) -> np.ndarray:
    return values.reshape((-1,) + (1,) * (rank - 1))
