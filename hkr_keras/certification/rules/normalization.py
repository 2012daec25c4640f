"""Rows of layers that shift, and multiply by numbers of their own."""

import math
from typing import Any

import keras
import numpy as np

from hkr_keras import layers
from hkr_keras.certification.checks import build_shape, check_built, check_elementwise, check_numbers, check_scalars
from hkr_keras.certification.floating_point import (
    MACHINE_EPSILON,
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    Rounding,
    RoundingRule,
    accumulated,
    relative,
)
from hkr_keras.certification.operators import Diagonal, as_stored
from hkr_keras.certification.rules.activations import multiplied
from hkr_keras.certification.rules.registry import Shape, bound_of, rule
from hkr_keras.certification.singular_values import as_float64

__all__ = []

_k = keras.layers


def _largest(*arrays: Any) -> float:
    return sum(float(np.abs(np.asarray(array, dtype=np.float64)).max()) for array in arrays)


def _aligned(layer: Any, numbers: np.ndarray, shape: Shape) -> np.ndarray:
    """Numbers with one axis for each axis of an input but the batch, after checking that they do not enlarge it."""
    check_elementwise(layer, [numbers], shape)
    if numbers.size == 1:
        return numbers.reshape(())
    numbers = numbers[0] if numbers.ndim == len(shape) else numbers
    return numbers.reshape((1,) * (len(shape) - 1 - numbers.ndim) + numbers.shape)


def _rescaling(layer: Any, shape: Shape) -> Diagonal:
    scale, offset = (np.asarray(numbers, dtype=np.float64) for numbers in (layer.scale, layer.offset))
    if scale.ndim and keras.config.image_data_format() == "channels_first":
        scale = scale.reshape(scale.shape + (1,) * (3 - scale.ndim))  # as Keras does, whatever the rank of the input
    shape = build_shape(layer) if shape is None else shape
    check_elementwise(layer, [scale, offset], shape)
    stored = as_stored(scale, str(layer.compute_dtype))
    return Diagonal(_aligned(layer, stored.numbers, shape), stored.relative)


def _normalization(layer: Any, shape: Shape) -> Diagonal:
    check_built(layer)
    mean, variance = as_float64(layer.mean), as_float64(layer.variance)
    shape = build_shape(layer) if shape is None else shape
    check_elementwise(layer, [mean, variance], shape)
    for name, used in (("mean", mean), ("variance", variance)):
        _check_source(layer, name, used)
    if (variance < 0).any():
        raise ValueError(
            f"Expected variances of at least 0. Received: {layer.name} with a variance of {variance.min()}"
        )
    smallest = keras.config.epsilon()
    deviation = np.sqrt(variance)
    # The root and epsilon are float32 numbers in the end: off by two roundings.
    factor = np.maximum(deviation, smallest) if layer.invert else 1 / np.maximum(deviation, smallest)
    cast = {"float16": 2.0**-9, "bfloat16": 2.0**-6}.get(str(layer.compute_dtype), 0.0)  # of variances, under the root
    return Diagonal(_aligned(layer, factor, shape), 4 * UNIT_ROUNDOFF + cast)


def _check_source(layer: Any, name: str, used: np.ndarray) -> None:
    """Refuses numbers of a Normalization that are not those of its weights, or its configuration: files hold these."""
    stored = getattr(layer, f"adapt_{name}") if layer.weights else getattr(layer, f"input_{name}")
    expected = as_float64(keras.ops.cast(keras.ops.convert_to_tensor(stored, "float32"), layer.compute_dtype))
    if used.size % max(expected.size, 1) or not np.array_equal(
        used.ravel(), np.broadcast_to(expected.ravel(), (used.size // expected.size, expected.size)).ravel()
    ):
        raise ValueError(
            f"Expected a Normalization that computes with its weights: call finalize_state() of '{layer.name}' after "
            f"setting them, or make it anew with other numbers. Received: another {name} than its weights, or its "
            "configuration, say"
        )


def _batch_normalization(layer: Any, shape: Shape) -> Diagonal:
    check_built(layer)
    shape = build_shape(layer) if shape is None else shape
    size = tuple(layer.moving_mean.shape) if shape is None else (shape[layer.axis],)
    one = isinstance(layer, layers.LipschitzBatchNormalization)  # one factor for all channels
    check_numbers(layer, [layer.moving_mean, *([layer.beta] if layer.center else [])], size)
    check_numbers(layer, [layer.moving_variance, *([layer.gamma] if layer.scale else [])], (1,) if one else size)
    check_scalars(layer, "epsilon")
    variance = as_float64(layer.moving_variance)
    low, high = (variance + epsilon for epsilon in sorted((layer.epsilon, float(np.float32(layer.epsilon)))))
    if (low < SMALLEST_NORMAL).any():
        raise ValueError(
            "Expected variances above 0 with epsilon in float32, for a finite Lipschitz bound. Received: "
            f"{layer.name} with a variance of {variance.min()} and epsilon={layer.epsilon}"
        )
    gain = as_float64(layer.gamma) if layer.scale else np.ones_like(variance)
    factor, relative = gain / np.sqrt(low), 8 * MACHINE_EPSILON + 1 - math.sqrt(float((low / high).min()))
    if shape is None or one:
        return Diagonal(np.asarray(np.abs(factor).max()), relative)
    axis = layer.axis % len(shape)
    numbers = factor.reshape(tuple(-1 if i == axis else 1 for i in range(1, len(shape))))
    return Diagonal(numbers, relative)


def _centering(layer: Any, shape: Shape) -> float:
    """A translation, or a projection and a translation, by numbers that are no larger than the input."""
    shape = build_shape(layer) if shape is None else shape
    if shape is None:
        return 1.0
    if isinstance(layer, layers.BatchCentering):
        numbers = [layer.moving_mean, *([layer.bias] if layer.center else [])]
        check_numbers(layer, numbers, (shape[layer.axis],))
    elif layer.center:
        axes = {axis % len(shape) for axis in _axes(layer)}
        check_numbers(layer, [layer.bias], tuple(n if i in axes else 1 for i, n in enumerate(shape))[1:])
    return 1.0


def _axes(layer: Any) -> tuple[int, ...]:
    return (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)


def _rescaling_rounding(layer: Any, shape: Shape) -> RoundingRule:
    return multiplied(_largest(layer.scale), _largest(layer.offset))


def _normalization_rounding(layer: Any, shape: Shape) -> RoundingRule:
    bound = bound_of(layer, shape)
    shift = max(bound, 1.0) * _largest(as_float64(layer.mean))
    return relative(16 * UNIT_ROUNDOFF * bound, 16 * UNIT_ROUNDOFF * shift, gain=bound)


def _batch_normalization_rounding(layer: Any, shape: Shape) -> RoundingRule:
    variance = as_float64(layer.moving_variance)
    if (variance < 0).any() or (variance + layer.epsilon < 1e-30).any():
        raise ValueError(
            "Expected variances of at least 0, and 1e-30 with epsilon, for a rigorous certificate. Received: "
            f"{layer.name} with a variance of {variance.min()} and epsilon={layer.epsilon}"
        )
    bound = bound_of(layer, shape)
    beta = _largest(as_float64(layer.beta)) if layer.center else 0.0
    shift = bound * _largest(as_float64(layer.moving_mean)) + beta
    return relative(16 * UNIT_ROUNDOFF * bound, 16 * UNIT_ROUNDOFF * shift, gain=bound)


def _batch_centering_rounding(layer: Any, shape: Shape) -> RoundingRule:
    bias = _largest(as_float64(layer.bias)) if layer.center else 0.0
    shift = _largest(as_float64(layer.moving_mean)) + bias
    return relative(4 * UNIT_ROUNDOFF, 4 * UNIT_ROUNDOFF * shift)


def _layer_centering_rounding(layer: Any, shape: Shape) -> RoundingRule:
    shift = _largest(as_float64(layer.bias)) if layer.center else 0.0

    def rounding(x: Any, y: Any) -> Rounding:
        terms = math.prod(x.shape[axis] for axis in _axes(layer))
        flushed = SMALLEST_NORMAL * (4 * terms + 8) * math.sqrt(terms)
        return relative(accumulated(terms + 8), 4 * UNIT_ROUNDOFF * shift + flushed)(x, y)

    return rounding


rule(_k.Rescaling, tail=_rescaling, rounding=_rescaling_rounding)
rule(_k.Normalization, tail=_normalization, rounding=_normalization_rounding)
rule(
    _k.BatchNormalization,
    layers.LipschitzBatchNormalization,
    tail=_batch_normalization,
    rounding=_batch_normalization_rounding,
)
rule(layers.BatchCentering, bound=_centering, rounding=_batch_centering_rounding)
rule(layers.LayerCentering, bound=_centering, rounding=_layer_centering_rounding)
