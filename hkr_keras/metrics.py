"""Metrics of robustness: thin `keras.Metric` classes over `margins.py`."""

import keras
from keras import ops

from hkr_keras import margins
from hkr_keras._registration import registered
from hkr_keras._validation import number


@registered
class KRDistance(keras.Metric):
    """`E_+[f] - E_-[f]` over all samples seen: for a 1-Lipschitz f a lower bound on the Wasserstein-1 distance.

    Over all batches, not the mean of their values, so it does not depend on the batch size. Binary only.

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

    _direction = "up"

    def __init__(self, name="kr_distance", dtype=None):
        super().__init__(name=name, dtype=dtype)
        # rows: negative and positive class; columns: sum of scores, sum of weights
        self.totals = self.add_weight(name="totals", shape=(2, 2), initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred, dtype=self.dtype)
        signs, scores = margins.signed_scores(y_true, y_pred)
        weights = margins.sample_weights(sample_weight, scores)
        members = ops.stack([ops.relu(-signs), ops.relu(signs)]) * weights
        self.totals.assign_add(ops.stack([ops.sum(members * scores, axis=1), ops.sum(members, axis=1)], axis=1))

    def result(self):
        means = ops.divide_no_nan(self.totals[:, 0], self.totals[:, 1])
        return means[1] - means[0]


class _RadiusMetric(keras.metrics.Mean):
    """The mean of something made of the certified radius."""

    _direction = "up"

    def __init__(self, lipschitz, head, name, dtype):
        lipschitz = number("lipschitz", lipschitz, strict=True)
        if head not in margins.HEAD_FACTORS:
            raise ValueError(f"Expected one of {sorted(margins.HEAD_FACTORS)}. Received: head={head}")
        super().__init__(name=name, dtype=dtype)
        self.lipschitz = lipschitz
        self.head = head

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred, dtype=self.dtype)
        radius = margins.certified_radius(y_true, y_pred, self.lipschitz, self.head)
        super().update_state(self._value(radius), sample_weight=margins.sample_weights(sample_weight, radius))

    def get_config(self):
        return {"lipschitz": self.lipschitz, "head": self.head, "name": self.name, "dtype": self.dtype}


@registered
class CertifiedAccuracy(_RadiusMetric):
    """The share of samples that are classified correctly and whose certified radius is above `epsilon`.

    Also called verified robust accuracy. A metric sees only logits, so it trusts what you say of the network:
    `certify` proves it instead.

    Args:
        epsilon: L2 distance in input units, at least 0.
        lipschitz: constant of every logit (or of the score, or with `head="orthonormal"` of the vector of logits).
        head: `"unit_norm"`: every logit is `lipschitz`-Lipschitz, margins are divided by 2 (sound for orthonormal
            heads too). `"orthonormal"`: the vector of logits is, margins are divided by sqrt 2.
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

    def __init__(self, epsilon=0.0, lipschitz=1.0, head="unit_norm", name="certified_accuracy", dtype=None):
        super().__init__(lipschitz, head, name, dtype)
        self.epsilon = number("epsilon", epsilon)

    def _value(self, radius):
        return ops.cast(radius > self.epsilon, radius.dtype)

    def get_config(self):
        return {"epsilon": self.epsilon, **super().get_config()}


@registered
class CertifiedRadius(_RadiusMetric):
    """The mean certified radius, in L2 distance and input units; a wrong prediction counts as 0.

    Args:
        lipschitz, head, name, dtype: as in `CertifiedAccuracy`.

    Example:

    >>> import hkr_keras as hkr, numpy as np
    >>> metric = hkr.metrics.CertifiedRadius()
    >>> metric.update_state(np.array([0, 1]), np.array([[1.0, 0.0], [0.5, 0.0]]))
    >>> float(metric.result())
    0.25

    Reference:
        Zhai et al., ICLR 2020 (arXiv 2001.02378), average certified radius.
    """

    def __init__(self, lipschitz=1.0, head="unit_norm", name="certified_radius", dtype=None):
        super().__init__(lipschitz, head, name, dtype)

    def _value(self, radius):
        return ops.relu(radius)
