"""Conventions of labels, margins and certified radii: the only module that knows them. Tensors in, tensors out.

- One score f, of shape `(n,)` or `(n, 1)`: class 1 where it is positive. Labels `(n,)` or `(n, 1)` are {0, 1} or
  {-1, +1}, smoothed or not, such as {0.05, 0.95}.
- Several scores `(n, k)` with labels `(n, k)` of that kind: k binary problems, one per column.
- Logits `(n, classes)`: labels are integers `(n,)` or `(n, 1)`, or one-hot `(n, classes)`, smoothed or not.

Labels of another kind are refused with a `ValueError` where their values can be seen. In compiled programs they cannot:
there the signs and the one-hot rows of such labels are NaN, and so are the loss, its gradient and the metrics.
"""

import math
from typing import Any

import numpy as np
from keras import ops

from hkr_keras._backends import replicas
from hkr_keras._backends.compiling import is_traced
from hkr_keras._validation import check_length, flat

Tensor = Any

__all__ = [
    "HEAD_FACTORS",
    "certified_radius",
    "class_balance",
    "class_indices",
    "is_binary",
    "multiclass_margin",
    "one_hot",
    "rivals",
    "sample_weights",
    "signed_scores",
    "signs_and_rows",
    "two_logits",
]

_TOLERANCE = 1e-3  # between labels that are meant to be equal; half precision keeps 1e-3


def is_binary(y_pred: Tensor) -> bool:
    """Whether predictions of that shape are scores `(n,)` or `(n, 1)`, as opposed to logits.

    Raises:
        ValueError: for any other rank than 1 and 2.
    """
    shape = tuple(y_pred.shape)
    if len(shape) not in (1, 2):
        raise ValueError(f"Expected predictions of shape (n,), (n, 1) or (n, classes). Received: y_pred.shape={shape}")
    return len(shape) == 1 or shape[1] == 1


def sample_weights(sample_weight: Any, like: Tensor) -> Tensor:
    """Sample weights `(n,)` of the dtype of `like`, which has n rows; ones for `None`.

    Raises:
        ValueError: for another shape than `(n,)` and `(n, 1)`, or another length than that of `like`.
    """
    if sample_weight is None:
        return ops.ones_like(like if len(like.shape) == 1 else like[:, 0])
    weights = flat(ops.convert_to_tensor(sample_weight), "sample_weight")
    check_length(weights, like, "sample_weight")
    return ops.cast(weights, like.dtype)


def signed_scores(y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Signs in {-1, +1} and scores from binary labels and predictions: both `(n,)`, or `(n, k)` for several labels.

    A label stands for class 1 where it is at least 0.5, which is between the two values of every convention.

    Raises:
        ValueError: for shapes that do not fit, and for labels of more than two values, outside [-1, 1], or on the same
            side of 0.5. In compiled programs the signs of such labels are NaN.

    Example:

    >>> signs, scores = signed_scores(ops.array([0.05, 0.95]), ops.array([[0.5], [2.0]]))
    >>> ops.convert_to_numpy(signs).tolist(), ops.convert_to_numpy(scores).tolist()
    ([-1.0, 1.0], [0.5, 2.0])
    """
    if not _is_several(y_true, y_pred):
        y_true, y_pred = flat(y_true, "y_true"), flat(y_pred, "y_pred")
    check_length(y_true, y_pred)
    signs, is_valid = _signs(ops.cast(y_true, y_pred.dtype))
    return _refuse(signs, is_valid, y_true, _TWO_VALUES), y_pred


def one_hot(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """One-hot labels of the shape of the logits, from integer or one-hot labels; smoothed ones become 0 and 1.

    Raises:
        ValueError: for logits of fewer than two classes, for labels of another shape, for integers that are no class,
            and for rows that do not have one larger entry while all others are equal (such as rows with several ones).
            In compiled programs such rows are NaN.

    Example:

    >>> ops.convert_to_numpy(one_hot(ops.array([1]), ops.array([[0.5, 2.0]]))).tolist()
    [[0.0, 1.0]]
    """
    if len(y_pred.shape) != 2 or y_pred.shape[1] is None or y_pred.shape[1] < 2:
        raise ValueError(f"Expected logits of shape (n, classes >= 2). Received: y_pred.shape={tuple(y_pred.shape)}")
    classes, shape = y_pred.shape[1], tuple(y_true.shape)
    if shape[1:] not in ((), (1,), (classes,)):
        raise ValueError(f"Expected labels of shape (n,), (n, 1) or (n, {classes}). Received: y_true.shape={shape}")
    check_length(y_true, y_pred)
    if _is_several(y_true, y_pred):
        rows, is_valid = _one_hot_rows(ops.cast(y_true, y_pred.dtype))
        expected = "one larger entry in every row, and all others equal"
    else:
        labels = flat(y_true, "y_true")
        indices = ops.cast(labels, "int32")
        is_valid = (ops.cast(indices, "float32") == ops.cast(labels, "float32")) & (indices >= 0) & (indices < classes)
        rows, expected = (
            ops.one_hot(ops.clip(indices, 0, classes - 1), classes, dtype=y_pred.dtype),
            f"integers in 0..{classes - 1}",
        )
        is_valid = is_valid[:, None]
    return _refuse(rows, is_valid, y_true, f"Expected labels to be {expected}.")


def signs_and_rows(y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels `(n, k)` read in both ways, for metrics that find out which of the two is meant.

    Returns:
        Signs `(n, k)` as in `signed_scores`, rows `(n, k)` as in `one_hot`, and booleans `(n,)`: is the row one-hot?

    Raises:
        ValueError: for labels that fit neither reading; in compiled programs they are NaN.

    Example:

    >>> labels = ops.array([[1, 0, 1], [0, 0, 1]])
    >>> ops.convert_to_numpy(signs_and_rows(labels, ops.zeros((2, 3)))[2]).tolist()
    [False, True]
    """
    check_length(y_true, y_pred)
    labels = ops.cast(y_true, y_pred.dtype)
    (signs, signs_valid), (rows, rows_valid) = _signs(labels), _one_hot_rows(labels)
    is_valid = signs_valid | ops.all(rows_valid)
    message = f"Expected one-hot rows, or several labels in each: {_TWO_VALUES[0].lower()}{_TWO_VALUES[1:]}"
    return _refuse(signs, is_valid, y_true, message), rows, rows_valid[:, 0]


_TWO_VALUES = "Expected labels of two values, {0, 1} or {-1, +1}, smoothed or not: one below 0.5, the other above."


def _is_several(y_true: Tensor, y_pred: Tensor) -> bool:
    """Whether labels and predictions are both `(n, k)` with the same k of at least 2."""
    shapes = tuple(y_true.shape), tuple(y_pred.shape)
    return all(len(shape) == 2 for shape in shapes) and shapes[0][1] == shapes[1][1] and shapes[0][1] != 1


def _signs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of binary labels, and whether each label can be one."""
    low, high = ops.min(labels, initial=1.0), ops.max(labels, initial=-1.0)
    is_valid = ops.minimum(ops.abs(labels - low), ops.abs(labels - high)) <= _TOLERANCE
    sides = (high - low <= _TOLERANCE) | ((low < 0.5) & (high >= 0.5))
    one = ops.ones_like(labels)
    return ops.where(labels >= 0.5, one, -one), is_valid & sides & (ops.abs(labels) <= 1.0)


def _one_hot_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of 0 and 1 from labels `(n, classes)`; whether each has one larger entry and equal others, `(n, 1)`."""
    # The initial values are for batches without rows, which PyTorch refuses without them.
    low = ops.min(labels, axis=1, keepdims=True, initial=math.inf)
    high = ops.max(labels, axis=1, keepdims=True, initial=-math.inf)
    rows = ops.cast(labels > 0.5 * (low + high), labels.dtype)
    others = ops.max(ops.where(rows > 0, low, labels), axis=1, keepdims=True, initial=-math.inf) - low
    return rows, (ops.sum(rows, axis=1, keepdims=True) == 1) & (others <= _TOLERANCE * (high - low))


def _refuse(values: Tensor, is_valid: Tensor, y_true: Tensor, message: str) -> Tensor:
    """The values, when all are valid; otherwise an error, or NaN in a program that is being compiled."""
    if is_traced(is_valid):
        return ops.where(is_valid, values, ops.cast(math.nan, values.dtype))
    if not ops.convert_to_numpy(ops.all(is_valid)):
        labels = np.asarray(ops.convert_to_numpy(y_true))
        wrong = labels[~ops.convert_to_numpy(is_valid).reshape(len(labels), -1).all(axis=1)]
        raise ValueError(f"{message} Received: y_true.shape={labels.shape} with {wrong[:3].tolist()}")
    return values


def class_indices(y_true: Any, classes: int) -> np.ndarray:
    """Labels on the host as class indices `(n,)`; for one score (`classes=1`), 1 where the label is positive.

    Raises:
        ValueError: for labels of another shape than `(n,)`, `(n, 1)` and one-hot `(n, classes)`, or out of range.

    Example:

    >>> class_indices([-1, 1], classes=1).tolist(), class_indices([[0, 1], [1, 0]], classes=2).tolist()
    ([0, 1], [1, 0])
    """
    labels = np.asarray(ops.convert_to_numpy(y_true))
    if labels.dtype.kind not in "biuf":
        raise ValueError(
            "Expected labels that are numbers; np.unique(labels, return_inverse=True)[1] numbers words. "
            f"Received: y.shape={labels.shape}, y.dtype={labels.dtype}"
        )
    if labels.ndim == 2 and labels.shape[1] == classes > 1:
        is_one_hot = set(np.unique(labels).tolist()) <= {-1, 0, 1} and ((labels > 0).sum(axis=1) == 1).all()
        labels = labels.argmax(axis=1) if is_one_hot else np.full(len(labels), -1)
    elif labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    found, allowed = set(np.unique(labels).tolist()), [{0, 1}, {-1, 1}] if classes == 1 else [set(range(classes))]
    if labels.ndim != 1 or not any(found <= values for values in allowed):
        wanted = "in {0, 1} or {-1, +1}" if classes == 1 else f"in 0..{classes - 1}, or one-hot (n, {classes})"
        raise ValueError(
            f"Expected labels of shape (n,) or (n, 1) {wanted}. "
            f"Received: y.shape={np.shape(y_true)} with values {np.unique(labels)[:5]}"
        )
    return (labels > 0).astype(np.int64) if classes == 1 else labels.astype(np.int64)


def two_logits(outputs: Any) -> Any:
    """Scores `(n,)` or `(n, 1)` as the logits `(-f / 2, f / 2)`, `(n, 2)`; logits as they are. Tensors or arrays.

    The difference of the two is the score, so margins and certified radii stay what they were, and argmax is class 1
    where the score is positive.

    Example:

    >>> two_logits(np.array([[3.0], [-1.0]])).tolist()
    [[-1.5, 1.5], [0.5, -0.5]]
    """
    if not is_binary(outputs):
        return outputs
    half = 0.5 * (outputs if len(outputs.shape) == 1 else outputs[:, 0])
    return np.stack([-half, half], axis=1) if isinstance(half, np.ndarray) else ops.stack([-half, half], axis=1)


def class_balance(member: Tensor, weights: Tensor, predictions: Tensor) -> Tensor:
    """Factors that turn the weighted mean over a batch into the mean over one class.

    `sum(w * class_balance(member, w, f) * v) / sum(w)` is the weighted mean of v over the members; 0 when there
    are none. Of a batch in parts on several replicas, the mean over replicas of that is the mean over all members:
    with R replicas, W the weight of a part and M that of all members, the factor is `R W / M`.

    Args:
        member: 1 for members of the class and 0 for the others, `(n,)` or `(n, classes)`.
        weights: sample weights of a shape that broadcasts with it.
        predictions: what the loss is differentiated by, see `replicas.mean`.
    """
    total = ops.sum(weights)
    share = replicas.mean(ops.sum(weights * member, axis=0, keepdims=True), predictions)
    is_empty = share <= 0  # false for NaN, which stands for labels that are refused
    return ops.where(is_empty, 0.0, member * total / ops.where(is_empty, ops.ones_like(share), share))


def rivals(y_true_one_hot: Tensor, logits: Tensor) -> Tensor:
    """The logits with minus infinity at the true class, `(n, classes)`."""
    return ops.where(y_true_one_hot > 0, ops.cast(-math.inf, logits.dtype), logits)


def multiclass_margin(y_true_one_hot: Tensor, logits: Tensor) -> Tensor:
    """The logit of the true class minus the largest other one, `(n,)`: positive where the class is right."""
    largest = ops.max(rivals(y_true_one_hot, logits), axis=1, initial=-math.inf)
    return ops.sum(y_true_one_hot * logits, axis=1) - largest


#: What the difference of two logits changes by, over what the input moved, when the layers before are 1-Lipschitz.
HEAD_FACTORS = {"unit_norm": 2.0, "orthonormal": math.sqrt(2.0)}


def certified_radius(y_true: Tensor, y_pred: Tensor, lipschitz: float = 1.0, head: str = "unit_norm") -> Tensor:
    """Radius within which a correct prediction stays correct, `(n,)`; negative where it is wrong.

    Binary: `y f / L`. Multiclass: `(f_true - max of the others) / (c L)`, with c = 2 when every logit is
    L-Lipschitz (`head="unit_norm"`) and c = sqrt(2) when the vector of logits is (`head="orthonormal"`).

    Reference:
        Tsuzuku, Sato and Sugiyama, NeurIPS 2018 (arXiv 1802.04034), proposition 1.
    """
    if is_binary(y_pred):
        signs, scores = signed_scores(y_true, y_pred)
        return signs * scores / lipschitz
    return multiclass_margin(one_hot(y_true, y_pred), y_pred) / (HEAD_FACTORS[head] * lipschitz)
