"""Metrics of accuracy and robustness: thin `keras.Metric` classes over `margins.py`.

Labels follow the conventions of `hkr_keras.margins`. Labels `(n, k)` for outputs `(n, k)` may be one-hot, for logits
of k classes, or several labels, one for each score. A metric keeps the sums of both readings: as long as all rows seen
since the last reset are one-hot, the outputs are logits; otherwise they are k binary problems, whose values
are averaged.

Labels that fit no convention raise a `ValueError` where their values can be seen; in a compiled step the metric is NaN.
"""

from typing import Any

import keras
from keras import ops

from hkr_keras import margins
from hkr_keras._hints import refuse_old_arguments, renamed
from hkr_keras._registration import registered
from hkr_keras._validation import number

Tensor = Any

__all__ = ["Accuracy", "CertifiedAccuracy", "CertifiedRadius", "KRDistance"]

__getattr__ = renamed(
    __name__,
    {
        "KR": "KRDistance",
        "CategoricalProvableRobustAccuracy": "CertifiedAccuracy",
        "BinaryProvableRobustAccuracy": "CertifiedAccuracy",
        "CategoricalProvableAvgRobustness": "CertifiedRadius",
        "BinaryProvableAvgRobustness": "CertifiedRadius",
    },
)


class _Metric(keras.Metric):
    """A metric that is better when it is larger.

    `EarlyStopping` and `ModelCheckpoint` of Keras find out by `_direction`, to which there is no public way but their
    argument `mode="max"`. A test notices when Keras changes it.
    """

    _direction = "up"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_old_arguments(cls)

    def __repr__(self) -> str:
        config = {key: value for key, value in self.get_config().items() if key not in ("name", "dtype")}
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in config.items())})"


@registered
class KRDistance(_Metric):
    """`E_+[f] - E_-[f]` over all samples seen: for a 1-Lipschitz f a lower bound on the Wasserstein-1 distance.

    It is taken over all batches, not as the mean of their values, so it does not depend on the batch size. For several
    labels `(n, k)` it is the mean over the k scores.

    Args:
        name, dtype: as in `keras.Metric`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> metric = hkr.metrics.KRDistance()
    >>> metric.update_state(np.array([0, 1]), np.array([[-1.0], [2.0]]))
    >>> float(metric.result())
    3.0

    Reference:
        Serrurier et al., CVPR 2021 (arXiv 2006.06520), eq. 3.
    """

    def __init__(self, name: str = "kr_distance", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.totals: Any = None

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred, dtype=self.dtype)
        signs, scores = margins.signed_scores(y_true, y_pred)
        weights = margins.sample_weights(sample_weight, scores)[:, None]
        signs, scores = (values if len(values.shape) == 2 else values[:, None] for values in (signs, scores))
        if self.totals is None:  # negative and positive class; sum of scores, sum of weights; scores
            self.totals = self.add_weight(name="totals", shape=(2, 2, scores.shape[1]), initializer="zeros")
        members = ops.stack([ops.relu(-signs), ops.relu(signs)]) * weights
        self.totals.assign_add(ops.stack([ops.sum(members * scores, axis=1), ops.sum(members, axis=1)], axis=1))

    def result(self) -> Tensor:
        if self.totals is None:
            return ops.zeros((), dtype=self.dtype)
        means = ops.divide_no_nan(self.totals[:, 0], self.totals[:, 1])
        return ops.mean(means[1] - means[0])


class _Mean(_Metric):
    """The weighted mean over samples of something made of labels and outputs, for both readings of labels `(n, k)`."""

    def __init__(self, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype)
        # sums of the values of logits, of the values of scores, of weights, of rows that are not one-hot
        self.totals = self.add_weight(name="totals", shape=(4,), initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred, dtype=self.dtype)
        weights = margins.sample_weights(sample_weight, y_pred)
        others = ops.zeros_like(weights)
        if margins.is_binary(y_pred):
            first = second = self._of_scores(*margins.signed_scores(y_true, y_pred))
        elif tuple(y_true.shape[1:]) == tuple(y_pred.shape[1:]):
            signs, rows, is_one_hot = margins.signs_and_rows(y_true, y_pred)
            first, second = self._of_logits(rows, y_pred), ops.mean(self._of_scores(signs, y_pred), axis=1)
            others = ops.cast(ops.logical_not(is_one_hot), self.dtype)
        else:
            first = second = self._of_logits(margins.one_hot(y_true, y_pred), y_pred)
        sums = [ops.sum(values) for values in (first * weights, second * weights, weights, others)]
        self.totals.assign_add(ops.cast(ops.stack(sums), self.dtype))

    def result(self) -> Tensor:
        logits, scores, weight, others = (self.totals[index] for index in range(4))
        return ops.divide_no_nan(ops.where(others > 0, scores, logits), weight)

    def _of_scores(self, signs: Tensor, scores: Tensor) -> Tensor:
        """Values of binary problems, of the shape of the scores."""
        raise NotImplementedError

    def _of_logits(self, one_hot: Tensor, logits: Tensor) -> Tensor:
        """Values of classifications, `(n,)`."""
        raise NotImplementedError


@registered
class Accuracy(_Mean):
    """The share of right predictions of a network that puts out raw scores or logits.

    - One score `(n,)` or `(n, 1)`: class 1 where it is positive; labels {0, 1} or {-1, +1}, smoothed or not.
    - Logits `(n, classes)`: the class of the largest one; integer or one-hot labels.
    - Several labels `(n, k)` for scores `(n, k)`: the share of right signs.

    Keras's `"accuracy"` compares a single output with 0.5, which is right for probabilities and wrong for scores.

    Args:
        name, dtype: as in `keras.Metric`.

    Raises:
        ValueError: in `update_state`, for labels of another kind or shape.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> metric = hkr.metrics.Accuracy()
    >>> metric.update_state(np.array([-1, 1, 1, -1]), np.array([[-0.3], [0.2], [0.7], [0.1]]))
    >>> float(metric.result())
    0.75
    """

    def __init__(self, name: str = "accuracy", dtype: Any = None) -> None:
        super().__init__(name, dtype)

    def _of_scores(self, signs: Tensor, scores: Tensor) -> Tensor:
        right = ops.equal(scores > 0, signs > 0) & ops.equal(scores, scores)  # a score of NaN is never right
        return ops.cast(right, scores.dtype) * ops.abs(signs)  # a sign of NaN is a label that is refused

    def _of_logits(self, one_hot: Tensor, logits: Tensor) -> Tensor:
        is_number = ops.all(ops.equal(logits, logits), axis=1)
        right = ops.equal(ops.argmax(logits, axis=1), ops.argmax(one_hot, axis=1)) & is_number
        return ops.cast(right, logits.dtype) * ops.sum(one_hot, axis=1)


class _RadiusMetric(_Mean):
    """The mean of something made of the certified radius."""

    def __init__(self, lipschitz: float, head: str, name: str, dtype: Any) -> None:
        lipschitz = number("lipschitz", lipschitz, strict=True)
        if head not in margins.HEAD_FACTORS:
            raise ValueError(f"Expected one of {sorted(margins.HEAD_FACTORS)}. Received: head={head}")
        super().__init__(name, dtype)
        self.lipschitz = lipschitz
        self.head = head

    def _of_scores(self, signs: Tensor, scores: Tensor) -> Tensor:
        return self._value(signs * scores / self.lipschitz)

    def _of_logits(self, one_hot: Tensor, logits: Tensor) -> Tensor:
        factor = margins.HEAD_FACTORS[self.head] * self.lipschitz
        return self._value(margins.multiclass_margin(one_hot, logits) / factor)

    def _value(self, radius: Tensor) -> Tensor:
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {"lipschitz": self.lipschitz, "head": self.head, "name": self.name, "dtype": self.dtype}


@registered
class CertifiedAccuracy(_RadiusMetric):
    """The share of samples that are classified correctly and whose certified radius is above `epsilon`.

    It is also called verified robust accuracy. A metric sees only logits, so it trusts what you say of the network;
    `certify` proves it instead. For several labels `(n, k)` it is the share of labels.

    Args:
        epsilon: L2 distance in input units, at least 0.
        lipschitz: Lipschitz constant of every logit (or of every score, or with `head="orthonormal"` of the vector of
            logits).
        head: `"unit_norm"`: every logit is `lipschitz`-Lipschitz, margins are divided by 2 (sound for orthonormal
            heads too). `"orthonormal"`: the vector of logits is, margins are divided by the root of 2.
        name, dtype: as in `keras.Metric`.

    Raises:
        ValueError: for a negative epsilon, a constant that is not positive and finite, an unknown head.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> metric = hkr.metrics.CertifiedAccuracy(epsilon=0.25)
    >>> metric.update_state(np.array([0, 1]), np.array([[1.0, 0.0], [0.0, 0.1]]))
    >>> float(metric.result())
    0.5
    """

    def __init__(
        self,
        epsilon: float = 0.0,
        lipschitz: float = 1.0,
        head: str = "unit_norm",
        name: str = "certified_accuracy",
        dtype: Any = None,
    ) -> None:
        super().__init__(lipschitz, head, name, dtype)
        self.epsilon = number("epsilon", epsilon)

    def _value(self, radius: Tensor) -> Tensor:
        is_number = ops.equal(radius, radius)
        return ops.where(is_number, ops.cast(radius > self.epsilon, radius.dtype), radius)

    def get_config(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, **super().get_config()}


@registered
class CertifiedRadius(_RadiusMetric):
    """The mean certified radius, an L2 distance in input units. For several labels `(n, k)` the mean over all labels.

    Args:
        lipschitz, head: as in `CertifiedAccuracy`.
        negative: whether a wrong prediction counts as minus the distance within which it stays wrong; by default it
            counts as 0.
        name, dtype: as in `keras.Metric`.

    Raises:
        ValueError: for a constant that is not positive and finite, an unknown head.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> for negative in (False, True):
    ...     metric = hkr.metrics.CertifiedRadius(negative=negative)
    ...     metric.update_state(np.array([0, 1]), np.array([[1.0, 0.0], [0.5, 0.0]]))
    ...     print(float(metric.result()))
    0.25
    0.125

    Reference:
        Zhai et al., ICLR 2020 (arXiv 2001.02378), average certified radius.
    """

    def __init__(
        self,
        lipschitz: float = 1.0,
        head: str = "unit_norm",
        negative: bool = False,
        name: str = "certified_radius",
        dtype: Any = None,
    ) -> None:
        super().__init__(lipschitz, head, name, dtype)
        self.negative = negative

    def _value(self, radius: Tensor) -> Tensor:
        return radius if self.negative else ops.relu(radius)

    def get_config(self) -> dict[str, Any]:
        return {"negative": self.negative, **super().get_config()}
