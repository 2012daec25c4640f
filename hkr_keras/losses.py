"""HKR and its relatives: pure functions of per-sample values, and thin `keras.Loss` classes.

Expectations are means under the sample weights, so a weight of 2 equals a sample given twice. Every function
takes `(y_true, y_pred, ..., sample_weight=None)` and returns values `(n,)` whose weighted mean is the loss. When
a batch is in parts on several replicas, class means are those of the whole batch (`hkr_keras._backends.replicas`).
"""

import math
from typing import Any

import keras
from keras import ops

from hkr_keras import margins
from hkr_keras._registration import registered
from hkr_keras._validation import number

Tensor = Any


def kr(y_true: Tensor, y_pred: Tensor, sample_weight=None) -> Tensor:
    """Kantorovich-Rubinstein term: the weighted mean is `E_-[f] - E_+[f]`.

    A class that is missing from the batch counts as a mean of 0.

    Example:

    >>> float(ops.mean(kr(ops.array([0, 1]), ops.array([-1.0, 2.0]))))
    -3.0
    """
    signs, scores = margins.signed_scores(y_true, y_pred)
    weights = margins.sample_weights(sample_weight, scores)
    positive, negative = (margins.class_balance(ops.relu(sign), weights, scores) for sign in (signs, -signs))
    return -signs * scores * (positive + negative)


def hinge(y_true: Tensor, y_pred: Tensor, margin: float = 1.0) -> Tensor:
    """`relu(margin - y f)` with y in {-1, +1}.

    Example:

    >>> ops.convert_to_numpy(hinge(ops.array([0, 1]), ops.array([-1.0, 0.25]))).tolist()
    [0.0, 0.75]
    """
    signs, scores = margins.signed_scores(y_true, y_pred)
    return ops.relu(margin - signs * scores)


def multiclass_kr(y_true: Tensor, y_pred: Tensor, sample_weight=None) -> Tensor:
    """One against all: the sum over classes of their `E_-[f_c] - E_+[f_c]`.

    Example:

    >>> float(ops.mean(multiclass_kr(ops.array([0, 1]), ops.array([[1.0, 0.0], [0.0, 2.0]]))))
    -3.0
    """
    member = margins.one_hot(y_true, y_pred)
    weights = margins.sample_weights(sample_weight, member[:, 0])[:, None]
    others, own = (margins.class_balance(side, weights, y_pred) for side in (1.0 - member, member))
    return ops.sum((others - own) * y_pred, axis=1)


def multiclass_hinge(y_true: Tensor, y_pred: Tensor, margin: float = 1.0) -> Tensor:
    """One against all: the sum over classes of their hinges, the true class weighing as much as all others.

    `(C - 1) relu(m - f_true) + sum over the others of relu(m + f_c)`.

    Example:

    >>> ops.convert_to_numpy(multiclass_hinge(ops.array([0]), ops.array([[0.5, -1.0, 0.0]]))).tolist()
    [2.0]
    """
    member = margins.one_hot(y_true, y_pred)
    hinges = ops.relu(margin - (2.0 * member - 1.0) * y_pred)
    return ops.sum(hinges * (1.0 + (y_pred.shape[1] - 2.0) * member), axis=1)


def soft_hkr(y_true: Tensor, y_pred: Tensor, alpha=50.0, margin=0.5, temperature=10.0) -> Tensor:
    """HKR of the true class against a softmax-weighted mean of the others.

    With p the softmax of `temperature * f` over the other classes (no gradient flows through p):
    `alpha (relu(m - f_true) + sum_j p_j relu(m + f_j)) - (f_true - sum_j p_j f_j)`.

    Example:

    >>> round(float(soft_hkr(ops.array([0]), ops.array([[1.0, -1.0]]))[0]), 6)
    -2.0
    """
    member = margins.one_hot(y_true, y_pred)
    shares = ops.softmax(ops.stop_gradient(temperature * margins.rivals(member, y_pred)), axis=1)
    sides = member - shares  # +1 at the true class, -p_j at the others
    hinges = ops.abs(sides) * ops.relu(margin - (2.0 * member - 1.0) * y_pred)
    return _combine(alpha, ops.sum(hinges, axis=1), -ops.sum(sides * y_pred, axis=1))


def log_sum_exp_hkr(y_true: Tensor, y_pred: Tensor, alpha=50.0, margin=0.5, temperature=10.0) -> Tensor:
    """Binary HKR of half the margin over a smooth maximum of the other classes.

    `h = (f_true - logsumexp over the others of (t f_j) / t) / 2`, loss `alpha relu(m - h) - h`. For 1-Lipschitz
    logits h is 1-Lipschitz and never above the certified radius.

    Example:

    >>> round(float(log_sum_exp_hkr(ops.array([0]), ops.array([[1.0, -1.0]]))[0]), 6)
    -1.0
    """
    member = margins.one_hot(y_true, y_pred)
    rival = ops.logsumexp(temperature * margins.rivals(member, y_pred), axis=1) / temperature
    half_margin = 0.5 * (ops.sum(member * y_pred, axis=1) - rival)
    return _combine(alpha, ops.relu(margin - half_margin), -half_margin)


def margin_crossentropy(y_true: Tensor, y_pred: Tensor, temperature=10.0, margin=0.5) -> Tensor:
    """Cross-entropy of `temperature * (f - margin * onehot)`, divided by the temperature.

    Example:

    >>> round(float(margin_crossentropy(ops.array([0]), ops.array([[0.5, 0.0]]), temperature=1.0)[0]), 6)
    0.693147

    Reference:
        Prach and Lampert, ECCV 2022 (arXiv 2208.03160), section 5.
    """
    member = margins.one_hot(y_true, y_pred)
    logits = temperature * (y_pred - margin * member)
    return (ops.logsumexp(logits, axis=1) - ops.sum(member * logits, axis=1)) / temperature


def _combine(alpha: float, hinges: Tensor, kr_values: Tensor) -> Tensor:
    return hinges if math.isinf(alpha) else alpha * hinges + kr_values


_CHECKS = {
    "alpha": lambda value: number("alpha", value, finite=False),
    "margin": lambda value: number("margin", value),
    "temperature": lambda value: number("temperature", value, strict=True),
}


class _WeightedLoss(keras.Loss):
    """A loss whose values need the sample weights: they travel to `values` beside the labels."""

    alpha: float
    margin: float
    temperature: float

    def __init__(self, *, reduction="mean_with_sample_weight", name=None, dtype=None, **parameters):
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self._parameters = tuple(parameters)
        for key, value in parameters.items():
            setattr(self, key, _CHECKS[key](value))

    def __call__(self, y_true, y_pred, sample_weight=None):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        if sample_weight is None:
            return super().__call__(y_true, y_pred)
        sample_weight = margins.sample_weights(sample_weight, y_pred)
        return super().__call__((y_true, sample_weight), y_pred, sample_weight)

    def call(self, y_true, y_pred):
        labels, sample_weight = y_true if isinstance(y_true, tuple) else (y_true, None)
        return self.values(labels, y_pred, sample_weight)

    def values(self, y_true, y_pred, sample_weight):
        raise NotImplementedError

    def get_config(self):
        return {**super().get_config(), **{key: getattr(self, key) for key in self._parameters}}


@registered
class KR(_WeightedLoss):
    """The Kantorovich-Rubinstein loss `E_-[f] - E_+[f]`: its minimum over 1-Lipschitz f is minus the
    Wasserstein-1 distance of the two classes.

    Args:
        reduction: as in `keras.Loss`; the default takes means under the sample weights.
        name, dtype: as in `keras.Loss`.

    Labels {0, 1} or {-1, +1}, shape `(n,)` or `(n, 1)`; scores `(n,)` or `(n, 1)`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> float(hkr.losses.KR()(np.array([0, 1]), np.array([[-1.0], [2.0]])))
    -3.0

    Reference:
        Serrurier et al., CVPR 2021 (arXiv 2006.06520), eq. 3.
    """

    def __init__(self, reduction="mean_with_sample_weight", name="kr", dtype=None):
        super().__init__(reduction=reduction, name=name, dtype=dtype)

    def values(self, y_true, y_pred, sample_weight):
        return kr(y_true, y_pred, sample_weight)


@registered
class HingeMargin(_WeightedLoss):
    """The hinge loss `E[relu(margin - y f)]` with a margin of your choice.

    Args:
        margin: in units of the score, at least 0. (Other libraries: `min_margin = 2 * margin`.)
        reduction, name, dtype: as in `keras.Loss`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> float(hkr.losses.HingeMargin(1.0)(np.array([0, 1]), np.array([-1.0, 0.5])))
    0.25

    Raises:
        ValueError: for a negative margin.
    """

    def __init__(self, margin=1.0, reduction="mean_with_sample_weight", name="hinge_margin", dtype=None):
        super().__init__(margin=margin, reduction=reduction, name=name, dtype=dtype)

    def values(self, y_true, y_pred, sample_weight):
        return hinge(y_true, y_pred, self.margin)


@registered
class HKR(_WeightedLoss):
    """Hinge-regularised Kantorovich-Rubinstein loss `alpha E[relu(margin - y f)] - (E_+[f] - E_-[f])`.

    Args:
        alpha: weight of the hinge, the paper's lambda, at least 0. `math.inf` is the hinge alone, 0 is KR.
            (An alpha a in [0, 1] elsewhere is a / (1 - a) here.) Larger is nearer to accuracy.
        margin: in units of the score, which are those of the input, at least 0. Larger is nearer to robustness.
        reduction, name, dtype: as in `keras.Loss`.

    Labels {0, 1} or {-1, +1}, shape `(n,)` or `(n, 1)`; scores `(n,)` or `(n, 1)`. Sample weights weigh the
    expectations. A batch of one class has a finite loss and gradient.

    Raises:
        ValueError: for a negative or NaN alpha, a negative or infinite margin, labels of another shape.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> float(hkr.losses.HKR(alpha=10, margin=1)(np.array([0, 1]), np.array([[-1.0], [0.5]])))
    1.0

    Reference:
        Serrurier et al., CVPR 2021 (arXiv 2006.06520), eq. 10.
    """

    def __init__(self, alpha=50.0, margin=0.5, reduction="mean_with_sample_weight", name="hkr", dtype=None):
        super().__init__(alpha=alpha, margin=margin, reduction=reduction, name=name, dtype=dtype)

    def values(self, y_true, y_pred, sample_weight):
        return _combine(self.alpha, hinge(y_true, y_pred, self.margin), kr(y_true, y_pred, sample_weight))


@registered
class MulticlassKR(_WeightedLoss):
    """One against all: the sum over classes of the `KR` loss of each logit.

    Args:
        reduction, name, dtype: as in `keras.Loss`.

    Integer labels `(n,)`, `(n, 1)` or one-hot `(n, classes)`; logits `(n, classes)`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> float(hkr.losses.MulticlassKR()(np.array([0, 1]), np.array([[1.0, 0.0], [0.0, 2.0]])))
    -3.0
    """

    def __init__(self, reduction="mean_with_sample_weight", name="multiclass_kr", dtype=None):
        super().__init__(reduction=reduction, name=name, dtype=dtype)

    def values(self, y_true, y_pred, sample_weight):
        return multiclass_kr(y_true, y_pred, sample_weight)


@registered
class MulticlassHinge(_WeightedLoss):
    """One against all: the sum over classes of the hinge of each logit, the true class weighing `C - 1`.

    Args:
        margin: in units of the logits, at least 0.
        reduction, name, dtype: as in `keras.Loss`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> float(hkr.losses.MulticlassHinge(1.0)(np.array([0]), np.array([[0.5, -1.0, 0.0]])))
    2.0
    """

    def __init__(self, margin=1.0, reduction="mean_with_sample_weight", name="multiclass_hinge", dtype=None):
        super().__init__(margin=margin, reduction=reduction, name=name, dtype=dtype)

    def values(self, y_true, y_pred, sample_weight):
        return multiclass_hinge(y_true, y_pred, self.margin)


@registered
class MulticlassHKR(_WeightedLoss):
    """One against all HKR: `alpha * MulticlassHinge(margin) + MulticlassKR`.

    Args:
        alpha: weight of the hinge, at least 0; `math.inf` is the hinge alone. Larger is nearer to accuracy.
        margin: in units of the logits, at least 0. Larger is nearer to robustness.
        reduction, name, dtype: as in `keras.Loss`.

    Integer labels `(n,)`, `(n, 1)` or one-hot `(n, classes)`; logits `(n, classes)`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> float(hkr.losses.MulticlassHKR(alpha=1, margin=1)(np.array([0]), np.array([[0.5, -1.0, 0.0]])))
    0.5

    Reference:
        Serrurier et al., CVPR 2021 (arXiv 2006.06520), section 4.
    """

    def __init__(self, alpha=50.0, margin=0.5, reduction="mean_with_sample_weight", name="multiclass_hkr", dtype=None):
        super().__init__(alpha=alpha, margin=margin, reduction=reduction, name=name, dtype=dtype)

    def values(self, y_true, y_pred, sample_weight):
        hinges = multiclass_hinge(y_true, y_pred, self.margin)
        return _combine(self.alpha, hinges, multiclass_kr(y_true, y_pred, sample_weight))


@registered
class SoftHKR(_WeightedLoss):
    """HKR of the true class against a softmax-weighted mean of the others: see `soft_hkr`.

    Stronger than `MulticlassHKR` on harder data, since it pushes against the classes that matter.

    Args:
        alpha: weight of the hinge, at least 0; `math.inf` is the hinge alone.
        margin: in units of the logits, at least 0.
        temperature: of the softmax over the other classes, above 0. Larger looks at the nearest rival only.
        reduction, name, dtype: as in `keras.Loss`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> round(float(hkr.losses.SoftHKR()(np.array([0]), np.array([[1.0, -1.0]]))), 6)
    -2.0
    """

    def __init__(
        self, alpha=50.0, margin=0.5, temperature=10.0, reduction="mean_with_sample_weight", name="soft_hkr", dtype=None
    ):
        parameters = {"alpha": alpha, "margin": margin, "temperature": temperature}
        super().__init__(**parameters, reduction=reduction, name=name, dtype=dtype)

    def values(self, y_true, y_pred, sample_weight):
        return soft_hkr(y_true, y_pred, self.alpha, self.margin, self.temperature)


@registered
class LogSumExpHKR(_WeightedLoss):
    """Binary HKR of half the margin over a smooth maximum of the other classes: see `log_sum_exp_hkr`.

    Args:
        alpha: weight of the hinge, at least 0; `math.inf` is the hinge alone.
        margin: the certified radius that the hinge asks for, in units of the input, at least 0.
        temperature: of the smooth maximum, above 0.
        reduction, name, dtype: as in `keras.Loss`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> round(float(hkr.losses.LogSumExpHKR()(np.array([0]), np.array([[1.0, -1.0]]))), 6)
    -1.0
    """

    def __init__(
        self,
        alpha=50.0,
        margin=0.5,
        temperature=10.0,
        reduction="mean_with_sample_weight",
        name="log_sum_exp_hkr",
        dtype=None,
    ):
        parameters = {"alpha": alpha, "margin": margin, "temperature": temperature}
        super().__init__(**parameters, reduction=reduction, name=name, dtype=dtype)

    def values(self, y_true, y_pred, sample_weight):
        return log_sum_exp_hkr(y_true, y_pred, self.alpha, self.margin, self.temperature)


@registered
class MarginCrossentropy(_WeightedLoss):
    """Cross-entropy of `temperature * (f - margin * onehot)`, divided by the temperature.

    Args:
        temperature: above 0; larger is nearer to accuracy.
        margin: in units of the logits, at least 0; larger is nearer to robustness.
        reduction, name, dtype: as in `keras.Loss`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> round(float(hkr.losses.MarginCrossentropy(1.0, 0.5)(np.array([0]), np.array([[0.5, 0.0]]))), 6)
    0.693147

    Reference:
        Prach and Lampert, ECCV 2022 (arXiv 2208.03160), section 5.
    """

    def __init__(
        self,
        temperature=10.0,
        margin=0.5,
        reduction="mean_with_sample_weight",
        name="margin_crossentropy",
        dtype=None,
    ):
        super().__init__(temperature=temperature, margin=margin, reduction=reduction, name=name, dtype=dtype)

    def values(self, y_true, y_pred, sample_weight):
        return margin_crossentropy(y_true, y_pred, self.temperature, self.margin)
