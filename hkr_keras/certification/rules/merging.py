"""Rows of layers with several inputs, and of those that multiply by a number."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from hkr_keras import layers
from hkr_keras.certification.checks import check_numbers, check_scalars
from hkr_keras.certification.floating_point import SMALLEST_NORMAL, Rounding, RoundingRule, accumulated, entries, norms
from hkr_keras.certification.operators import Diagonal, as_stored
from hkr_keras.certification.rules.activations import multiplied
from hkr_keras.certification.rules.registry import Shape, merge, rule
from hkr_keras.certification.singular_values import as_computed

__all__ = []

_k = keras.layers


def _factor(layer: Any, shape: Shape) -> Diagonal:
    check_scalars(layer, "k")
    return as_stored(float(layer.k), str(layer.compute_dtype))


def _sum(layer: Any, constants: np.ndarray) -> np.ndarray:
    return constants.sum(axis=0)


def _mean(layer: Any, constants: np.ndarray) -> np.ndarray:
    return constants.mean(axis=0)


def _root_sum_squares(layer: Any, constants: np.ndarray) -> np.ndarray:
    return np.hypot.reduce(constants, axis=0)  # unlike squares, this cannot underflow to 0


def _shares(layer: Any, count: int) -> tuple[np.ndarray, float]:
    """The weights of the branches of a residual, and the relative error of their float32 form."""
    check_numbers(layer, [layer.mixing_logits], (count,))
    logits = as_computed(layer, "mixing_logits")
    weights = np.exp(logits - logits.max())
    least = np.finfo(np.float64).tiny  # what underflows is positive all the same
    return np.maximum(weights / weights.sum(), least), accumulated(count + 32 + 2 * math.ceil(np.ptp(logits)))


def _convex(layer: Any, constants: np.ndarray) -> np.ndarray:
    return _shares(layer, len(constants))[0] @ constants


def _weighted(weights: Callable[[Any, int], tuple[np.ndarray, float]]) -> Callable[..., RoundingRule]:
    """The rounding of a weighted sum: one factor for all weights, `(inputs,)`."""

    def of(layer: Any, shapes: Sequence[Shape] | None = None) -> RoundingRule:
        def rounding(xs: Any, y: Any) -> Rounding:
            shares, factor = weights(layer, len(xs))
            slopes = tuple(factor * share + 2 * SMALLEST_NORMAL for share in shares)
            at_centre = sum(slope * norms(x) for slope, x in zip(slopes, xs, strict=True))
            return Rounding(at_centre + 16 * SMALLEST_NORMAL * len(xs) * entries(y), slopes)

        return rounding

    return of


rule(
    layers.Scale,
    tail=_factor,
    rounding=lambda layer, shape: multiplied(abs(layer.k)),
)
merge(
    *(_k.Add, _k.Subtract),
    bound=_sum,
    rounding=_weighted(lambda layer, count: (np.ones(count), accumulated(count))),
)
merge(
    _k.Average,
    bound=_mean,
    rounding=_weighted(lambda layer, count: (np.full(count, 1 / count), accumulated(count + 4))),
)
merge(
    *(_k.Concatenate, _k.Maximum, _k.Minimum),
    bound=_root_sum_squares,
    rounding=_weighted(lambda layer, count: (np.ones(count), 0.0)),
)
merge(layers.LipschitzResidual, bound=_convex, rounding=_weighted(_shares))
