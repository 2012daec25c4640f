"""Label conventions, margins and radii: the only module that knows them. Tensors in, tensors out.

Binary models put out one score f of shape `(n,)` or `(n, 1)`, class 1 where it is positive; labels are {0, 1}
or {-1, +1}. Multiclass models put out logits `(n, classes)`; labels are integers `(n,)`, `(n, 1)` or one-hot
`(n, classes)`.
"""

import math
from typing import Any

import numpy as np
from keras import ops

from hkr_keras._backends import replicas
from hkr_keras._validation import check_length, flat

Tensor = Any


def is_binary(y_pred: Tensor) -> bool:
    """Whether predictions of that shape are scores `(n,)` or `(n, 1)`, as opposed to logits.

    Raises:
        ValueError: for any other rank than 1 and 2.
    """
    shape = tuple(y_pred.shape)
    if len(shape) not in (1, 2):
        raise ValueError(f"Expected predictions of shape (n,), (n, 1) or (n, classes). Received: y_pred.shape={shape}")
    return len(shape) == 1 or shape[1] == 1


def sample_weights(sample_weight, like: Tensor) -> Tensor:
    """Sample weights `(n,)` of the dtype of `like`; ones for `None`.

    Raises:
        ValueError: for another shape than `(n,)` and `(n, 1)`, or another length than that of `like`.
    """
    if sample_weight is None:
        return ops.ones_like(like)
    weights = flat(ops.convert_to_tensor(sample_weight), "sample_weight")
    check_length(weights, like, "sample_weight")
    return ops.cast(weights, like.dtype)


def signed_scores(y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Signs in {-1, +1} and scores, both `(n,)`, from binary labels and predictions.

    Example:

    >>> signs, scores = signed_scores(ops.array([0, 1]), ops.array([[0.5], [2.0]]))
    >>> ops.convert_to_numpy(signs).tolist(), ops.convert_to_numpy(scores).tolist()
    ([-1.0, 1.0], [0.5, 2.0])
    """
    y_true, y_pred = flat(y_true, "y_true"), flat(y_pred, "y_pred")
    check_length(y_true, y_pred)
    one = ops.ones_like(y_pred)
    return ops.where(ops.cast(y_true, y_pred.dtype) > 0, one, -one), y_pred


def one_hot(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """One-hot labels of the shape of the logits, from integer or one-hot labels.

    Raises:
        ValueError: for logits of fewer than two classes, or labels of another shape.

    Example:

    >>> ops.convert_to_numpy(one_hot(ops.array([1]), ops.array([[0.5, 2.0]]))).tolist()
    [[0.0, 1.0]]
    """
    if len(y_pred.shape) != 2 or y_pred.shape[1] is None or y_pred.shape[1] < 2:
        raise ValueError(f"Expected logits of shape (n, classes >= 2). Received: y_pred.shape={tuple(y_pred.shape)}")
    classes = y_pred.shape[1]
    if len(y_true.shape) == 2 and y_true.shape[1] == classes:
        labels = ops.argmax(y_true, axis=1)
    elif len(y_true.shape) == 1 or (len(y_true.shape) == 2 and y_true.shape[1] == 1):
        labels = flat(y_true, "y_true")
    else:
        raise ValueError(
            f"Expected labels of shape (n,), (n, 1) or (n, {classes}). Received: y_true.shape={tuple(y_true.shape)}"
        )
    check_length(labels, y_pred)
    return ops.one_hot(ops.cast(labels, "int32"), classes, dtype=y_pred.dtype)


def class_indices(y_true, classes: int) -> np.ndarray:
    """Labels on the host as class indices `(n,)`; for one score (`classes=1`), 1 where the label is positive.

    Raises:
        ValueError: for labels of another shape than `(n,)`, `(n, 1)` and one-hot `(n, classes)`, or out of range.

    Example:

    >>> class_indices([-1, 1], classes=1).tolist(), class_indices([[0, 1], [1, 0]], classes=2).tolist()
    ([0, 1], [1, 0])
    """
    labels = np.asarray(ops.convert_to_numpy(y_true))
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
    return ops.where(share > 0, member * total / ops.where(share > 0, share, ops.ones_like(share)), 0.0)


def rivals(y_true_one_hot: Tensor, logits: Tensor) -> Tensor:
    """The logits with minus infinity at the true class, `(n, classes)`."""
    return ops.where(y_true_one_hot > 0, ops.cast(-math.inf, logits.dtype), logits)


def multiclass_margin(y_true_one_hot: Tensor, logits: Tensor) -> Tensor:
    """The logit of the true class minus the largest other one, `(n,)`: positive where the class is right."""
    true = ops.sum(y_true_one_hot * logits, axis=1)
    margin = true - ops.max(rivals(y_true_one_hot, logits), axis=1)
    return ops.where(ops.any(y_true_one_hot > 0, axis=1), margin, -math.inf)  # a label out of range is never right


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
