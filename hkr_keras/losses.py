"""Losses of 1-Lipschitz networks: pure functions of values per sample, and thin `keras.Loss` classes.

Expectations are means under the sample weights, so a weight of 2 equals a sample given twice. Every function returns
values `(n,)` whose weighted mean is the loss. When a batch is split over several replicas, the means over a class are
those of the whole batch, by one all-reduce.

Every loss takes `reduction`, `name` and `dtype` as `keras.Loss` does; the default reduction is a mean under the sample
weights.

Labels follow the conventions of `hkr_keras.margins`. Labels that fit none of them raise a `ValueError` where their
values can be seen; in a compiled step the loss and its gradient are NaN.

The numbers of a loss (`alpha`, `margin`, `temperature`) are Keras variables. A callback may change them during
training, by `loss.alpha.assign(10.0)` or `loss.alpha = 10.0`, and compiled steps see the change on every backend.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from hkr_keras import margins
from hkr_keras._backends.parameters import Parameter
from hkr_keras._hints import refuse_old_arguments, renamed
from hkr_keras._registration import registered
from hkr_keras._validation import number

Tensor = Any
Number = float | Any  #: or a scalar tensor

__all__ = [
    "HKR",
    "KR",
    "HingeMargin",
    "LogSumExpHKR",
    "MarginCrossentropy",
    "MultiMargin",
    "MulticlassHKR",
    "MulticlassHinge",
    "MulticlassKR",
    "SoftHKR",
    "margin_crossentropy",
]

__getattr__ = renamed(
    __name__,
    {
        "KRLoss": "KR, which is minus the distance,",
        "NegKRLoss": "KR",
        "HKRLoss": "HKR",
        "HingeMarginLoss": "HingeMargin",
        "KRMulticlassLoss": "MulticlassKR, which is minus the distance,",
        "HingeMulticlassLoss": "MulticlassHinge",
        "HKRMulticlass": "MulticlassHKR",
        "HKRMulticlassLoss": "MulticlassHKR",
        "MulticlassSoftHKR": "SoftHKR",
        "SoftHKRMulticlassLoss": "SoftHKR",
        "LseHKRMulticlassLoss": "LogSumExpHKR",
        "MultiMarginLoss": "MultiMargin",
        "TauCrossEntropyLoss": "MarginCrossentropy(tau, margin=0)",
        "TauCategoricalCrossentropy": "MarginCrossentropy(tau, margin=0)",
        "TauSparseCategoricalCrossentropy": "MarginCrossentropy(tau, margin=0)",
        **dict.fromkeys(
            ("TauBinaryCrossentropy", "TauBCEWithLogitsLoss"),
            "margin_crossentropy(y, margins.two_logits(f), tau, margin=0)",
        ),
        **dict.fromkeys(
            ("CategoricalHinge", "CategoricalHingeLoss"),
            "relu(margin - margins.multiclass_margin(margins.one_hot(y, f), f))",
        ),
    },
)


def _kr(y_true: Tensor, y_pred: Tensor, sample_weight: Any = None) -> Tensor:
    """Values whose weighted mean is `E_-[f] - E_+[f]`; a class that is missing from the batch has a mean of 0."""
    signs, scores = margins.signed_scores(y_true, y_pred)
    weights = margins.sample_weights(sample_weight, scores)
    weights = weights if len(scores.shape) == 1 else weights[:, None]
    positive, negative = (margins.class_balance(ops.relu(sign), weights, scores) for sign in (signs, -signs))
    return _mean_over_labels(-signs * scores * (positive + negative))


def _hinge(y_true: Tensor, y_pred: Tensor, sample_weight: Any = None, margin: Number = 1.0) -> Tensor:
    """`relu(margin - y f)` with y in {-1, +1}, averaged over several labels `(n, k)`."""
    signs, scores = margins.signed_scores(y_true, y_pred)
    return _mean_over_labels(ops.relu(margin - signs * scores))


def _mean_over_labels(values: Tensor) -> Tensor:
    """Values `(n, k)` of k binary problems as their mean `(n,)`; values `(n,)` as they are."""
    return values if len(values.shape) == 1 else ops.mean(values, axis=1)


def _multiclass_kr(y_true: Tensor, y_pred: Tensor, sample_weight: Any = None) -> Tensor:
    """Values whose weighted mean is the sum over classes of `E_-[f_c] - E_+[f_c]`."""
    member = margins.one_hot(y_true, y_pred)
    weights = margins.sample_weights(sample_weight, member[:, 0])[:, None]
    others, own = (margins.class_balance(side, weights, y_pred) for side in (1.0 - member, member))
    return ops.sum((others - own) * y_pred, axis=1)


def _multiclass_hinge(y_true: Tensor, y_pred: Tensor, sample_weight: Any = None, margin: Number = 1.0) -> Tensor:
    """`(C - 1) relu(m - f_true) + sum over the others of relu(m + f_c)`."""
    member = margins.one_hot(y_true, y_pred)
    hinges = ops.relu(margin - (2.0 * member - 1.0) * y_pred)
    return ops.sum(hinges * (1.0 + (y_pred.shape[1] - 2.0) * member), axis=1)


def _multi_margin(y_true: Tensor, y_pred: Tensor, sample_weight: Any = None, margin: Number = 1.0) -> Tensor:
    """The sum over the other classes of `relu(margin - (f_true - f_j))`, divided by the number of classes."""
    member = margins.one_hot(y_true, y_pred)
    true = ops.sum(member * y_pred, axis=1, keepdims=True)
    return ops.sum((1.0 - member) * ops.relu(margin - true + y_pred), axis=1) / y_pred.shape[1]


def _soft_hkr(
    y_true: Tensor, y_pred: Tensor, sample_weight: Any, alpha: Number, margin: Number, temperature: Number
) -> Tensor:
    member = margins.one_hot(y_true, y_pred)
    shares = ops.softmax(ops.stop_gradient(temperature * margins.rivals(member, y_pred)), axis=1)
    sides = member - shares  # +1 at the true class, -p_j at the others
    hinges = ops.abs(sides) * ops.relu(margin - (2.0 * member - 1.0) * y_pred)
    return _combine(alpha, ops.sum(hinges, axis=1), -ops.sum(sides * y_pred, axis=1))


def _log_sum_exp_hkr(
    y_true: Tensor, y_pred: Tensor, sample_weight: Any, alpha: Number, margin: Number, temperature: Number
) -> Tensor:
    member = margins.one_hot(y_true, y_pred)
    rival = ops.logsumexp(temperature * margins.rivals(member, y_pred), axis=1) / temperature
    half_margin = 0.5 * (ops.sum(member * y_pred, axis=1) - rival)
    return _combine(alpha, ops.relu(margin - half_margin), -half_margin)


def margin_crossentropy(y_true: Tensor, y_pred: Tensor, temperature: Number = 10.0, margin: Number = 0.5) -> Tensor:
    """The values `(n,)` of `MarginCrossentropy`, as a function.

    Args:
        y_true: integer labels `(n,)`, `(n, 1)` or one-hot `(n, classes)`.
        y_pred: logits `(n, classes)`.
        temperature, margin: as in `MarginCrossentropy`.

    Example:

    >>> round(float(margin_crossentropy(ops.array([0]), ops.array([[0.5, 0.0]]), temperature=1.0)[0]), 6)
    0.693147
    """
    member = margins.one_hot(y_true, y_pred)
    logits = temperature * (y_pred - margin * member)
    return (ops.logsumexp(logits, axis=1) - ops.sum(member * logits, axis=1)) / temperature


def _combine(alpha: Number, hinges: Tensor, kr_values: Tensor) -> Tensor:
    """`alpha * hinges + kr_values`, or the hinges alone when alpha is infinite."""
    alpha = ops.cast(alpha, hinges.dtype)
    is_infinite = ops.isinf(alpha)
    factor = ops.where(is_infinite, ops.ones_like(alpha), alpha)
    return factor * hinges + ops.where(is_infinite, ops.zeros_like(alpha), ops.ones_like(alpha)) * kr_values


_CHECKS = {
    "alpha": lambda value: number("alpha", value, finite=False),
    "margin": lambda value: number("margin", value),
    "temperature": lambda value: number("temperature", value, strict=True),
}


class _Number:
    """An attribute that is a Keras variable, and that assigns to the variable when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, loss: Any, owner: type | None = None) -> Any:
        if loss is None or self.name not in loss._parameters:
            raise AttributeError(f"'{(owner or type(loss)).__name__}' has no attribute '{self.name}'")
        return loss._parameters[self.name]

    def __set__(self, loss: Any, value: Any) -> None:
        self.__get__(loss).assign(value)


class _WeightedLoss(keras.Loss):
    """A loss whose values need the sample weights: they travel to `_values` beside the labels."""

    alpha = _Number()
    margin = _Number()
    temperature = _Number()

    _values: Callable[..., Tensor]  # `(y_true, y_pred, sample_weight, **numbers)`, whose weighted mean is the loss

    def __init__(
        self,
        numbers: dict[str, float],
        name: str,
        reduction: str | None = "mean_with_sample_weight",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        kept = "float64" if self.dtype == "float64" else "float32"
        self._parameters = {key: Parameter(value, _CHECKS[key], key, kept) for key, value in numbers.items()}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_old_arguments(cls)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Tensor:
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        if sample_weight is None:
            return super().__call__(y_true, y_pred)
        sample_weight = margins.sample_weights(sample_weight, y_pred)
        return super().__call__((y_true, sample_weight), y_pred, sample_weight)

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        labels, sample_weight = y_true if isinstance(y_true, tuple) else (y_true, None)
        numbers = {key: ops.cast(parameter.read(), y_pred.dtype) for key, parameter in self._parameters.items()}
        return self._values(labels, y_pred, sample_weight, **numbers)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._numbers()}

    def _numbers(self) -> dict[str, float]:
        return {key: parameter.number for key, parameter in self._parameters.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in self._numbers().items())})"

    def __reduce__(self) -> Any:
        return _restored, (type(self), self.get_config())


def _restored(cls: Any, config: dict[str, Any]) -> Any:
    """A copy of a loss, for `copy` and `pickle`: the variables of a backend cannot be copied as they are."""
    return cls.from_config(config)


@registered
class KR(_WeightedLoss):
    """The Kantorovich-Rubinstein loss `E_-[f] - E_+[f]`: its minimum over 1-Lipschitz f is minus the
    Wasserstein-1 distance of the two classes.

    Args:
        reduction, name, dtype: as in `keras.Loss`.

    Labels {0, 1} or {-1, +1}, smoothed or not, of shape `(n,)` or `(n, 1)`; scores `(n,)` or `(n, 1)`. With labels and
    scores `(n, k)` the loss is the mean of k binary problems.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> float(hkr.losses.KR()(np.array([0, 1]), np.array([[-1.0], [2.0]])))
    -3.0

    Reference:
        Serrurier et al., CVPR 2021 (arXiv 2006.06520), eq. 3.
    """

    def __init__(self, *, name: str = "kr", **kwargs: Any) -> None:
        super().__init__({}, name, **kwargs)

    _values = staticmethod(_kr)


@registered
class HingeMargin(_WeightedLoss):
    """The hinge loss `E[relu(margin - y f)]` with a margin of your choice.

    Args:
        margin: in units of the score, at least 0. (Other libraries: `min_margin = 2 * margin`.)
        reduction, name, dtype: as in `keras.Loss`.

    Labels and scores as in `HKR`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> float(hkr.losses.HingeMargin(1.0)(np.array([0, 1]), np.array([-1.0, 0.5])))
    0.25

    Raises:
        ValueError: for a negative margin.
    """

    def __init__(self, margin: float = 1.0, *, name: str = "hinge_margin", **kwargs: Any) -> None:
        super().__init__({"margin": margin}, name, **kwargs)

    _values = staticmethod(_hinge)


@registered
class HKR(_WeightedLoss):
    """Hinge-regularised Kantorovich-Rubinstein loss `alpha E[relu(margin - y f)] - (E_+[f] - E_-[f])`.

    Args:
        alpha: weight of the hinge, the paper's lambda, at least 0. `math.inf` is the hinge alone, 0 is KR.
            (An alpha a in [0, 1] elsewhere is a / (1 - a) here.) Larger is nearer to accuracy.
        margin: in units of the score, which are those of the input, at least 0. Larger is nearer to robustness.
        reduction, name, dtype: as in `keras.Loss`.

    Labels {0, 1} or {-1, +1}, smoothed or not, of shape `(n,)` or `(n, 1)`; scores `(n,)` or `(n, 1)`. With labels and
    scores `(n, k)` the loss is the mean of k binary problems. Sample weights `(n,)` weigh the expectations. A batch of
    one class has a finite loss and gradient.

    Raises:
        ValueError: for a negative or NaN alpha, a negative or infinite margin, labels of another kind or shape.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> float(hkr.losses.HKR(alpha=10, margin=1)(np.array([0, 1]), np.array([[-1.0], [0.5]])))
    1.0

    Reference:
        Serrurier et al., CVPR 2021 (arXiv 2006.06520), eq. 10.
    """

    def __init__(self, alpha: float = 50.0, margin: float = 0.5, *, name: str = "hkr", **kwargs: Any) -> None:
        super().__init__({"alpha": alpha, "margin": margin}, name, **kwargs)

    @staticmethod
    def _values(y_true: Tensor, y_pred: Tensor, sample_weight: Any, alpha: Number, margin: Number) -> Tensor:
        return _combine(alpha, _hinge(y_true, y_pred, margin=margin), _kr(y_true, y_pred, sample_weight))


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

    def __init__(self, *, name: str = "multiclass_kr", **kwargs: Any) -> None:
        super().__init__({}, name, **kwargs)

    _values = staticmethod(_multiclass_kr)


@registered
class MulticlassHinge(_WeightedLoss):
    """One against all: the sum over classes of the hinge of each logit, the true class weighing `C - 1`.

    The loss is `(C - 1) relu(m - f_true) + sum over the others of relu(m + f_c)`.

    Args:
        margin: in units of the logits, at least 0.
        reduction, name, dtype: as in `keras.Loss`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> float(hkr.losses.MulticlassHinge(1.0)(np.array([0]), np.array([[0.5, -1.0, 0.0]])))
    2.0
    """

    def __init__(self, margin: float = 1.0, *, name: str = "multiclass_hinge", **kwargs: Any) -> None:
        super().__init__({"margin": margin}, name, **kwargs)

    _values = staticmethod(_multiclass_hinge)


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

    def __init__(
        self, alpha: float = 50.0, margin: float = 0.5, *, name: str = "multiclass_hkr", **kwargs: Any
    ) -> None:
        super().__init__({"alpha": alpha, "margin": margin}, name, **kwargs)

    @staticmethod
    def _values(y_true: Tensor, y_pred: Tensor, sample_weight: Any, alpha: Number, margin: Number) -> Tensor:
        hinges = _multiclass_hinge(y_true, y_pred, margin=margin)
        return _combine(alpha, hinges, _multiclass_kr(y_true, y_pred, sample_weight))


@registered
class MultiMargin(_WeightedLoss):
    """The hinge of the margin to every other class: `sum_j relu(margin - (f_true - f_j)) / C` over the others.

    The values are those of `torch.nn.MultiMarginLoss`.

    Args:
        margin: in units of a difference of logits, at least 0.
        reduction, name, dtype: as in `keras.Loss`.

    Integer labels `(n,)`, `(n, 1)` or one-hot `(n, classes)`; logits `(n, classes)`.

    Raises:
        ValueError: for a negative margin.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> float(hkr.losses.MultiMargin(1.0)(np.array([0]), np.array([[0.5, 0.0]])))
    0.25

    Reference:
        Crammer and Singer, JMLR 2 (2001).
    """

    def __init__(self, margin: float = 1.0, *, name: str = "multi_margin", **kwargs: Any) -> None:
        super().__init__({"margin": margin}, name, **kwargs)

    _values = staticmethod(_multi_margin)


@registered
class SoftHKR(_WeightedLoss):
    """HKR of the true class against a softmax-weighted mean of the others.

    With p the softmax of `temperature * f` over the other classes (no gradient flows through p) the loss is
    `alpha (relu(m - f_true) + sum_j p_j relu(m + f_j)) - (f_true - sum_j p_j f_j)`. On harder data it reaches a higher
    accuracy than `MulticlassHKR`, since the classes nearest to the true one count.

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
        self,
        alpha: float = 50.0,
        margin: float = 0.5,
        temperature: float = 10.0,
        *,
        name: str = "soft_hkr",
        **kwargs: Any,
    ) -> None:
        super().__init__({"alpha": alpha, "margin": margin, "temperature": temperature}, name, **kwargs)

    _values = staticmethod(_soft_hkr)


@registered
class LogSumExpHKR(_WeightedLoss):
    """Binary HKR of half the margin over a smooth maximum of the other classes.

    With `h = (f_true - logsumexp over the others of (t f_j) / t) / 2` the loss is `alpha relu(m - h) - h`. For
    1-Lipschitz logits h is 1-Lipschitz and never above the certified radius.

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
        alpha: float = 50.0,
        margin: float = 0.5,
        temperature: float = 10.0,
        *,
        name: str = "log_sum_exp_hkr",
        **kwargs: Any,
    ) -> None:
        super().__init__({"alpha": alpha, "margin": margin, "temperature": temperature}, name, **kwargs)

    _values = staticmethod(_log_sum_exp_hkr)


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
        self, temperature: float = 10.0, margin: float = 0.5, *, name: str = "margin_crossentropy", **kwargs: Any
    ) -> None:
        super().__init__({"temperature": temperature, "margin": margin}, name, **kwargs)

    @staticmethod
    def _values(y_true: Tensor, y_pred: Tensor, sample_weight: Any, temperature: Number, margin: Number) -> Tensor:
        return margin_crossentropy(y_true, y_pred, temperature, margin)
