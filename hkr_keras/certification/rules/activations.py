"""Rows of activations: the largest slope, and rounding where an activation compares and multiplies at most."""

import math
from collections.abc import Hashable
from typing import Any

import keras
import numpy as np

from hkr_keras import layers
from hkr_keras.certification.checks import check_elementwise, check_numbers, check_scalars
from hkr_keras.certification.floating_point import (
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    RoundingRule,
    relative,
)
from hkr_keras.certification.operators import as_stored
from hkr_keras.certification.rules.registry import Shape, bound_of, layer_bound, rule
from hkr_keras.certification.singular_values import as_computed

__all__ = ["ACTIVATION_BOUNDS", "activation_bound", "activation_error", "is_one_sided", "monotone_slope", "multiplied"]

_k, _a = keras.layers, keras.activations

#: The largest slope of every continuous activation function of Keras (default arguments).
ACTIVATION_BOUNDS: dict[Any, float] = {
    _a.linear: 1.0,
    _a.relu: 1.0,
    _a.relu6: 1.0,
    _a.leaky_relu: 1.0,
    _a.elu: 1.0,
    _a.celu: 1.0,
    _a.tanh: 1.0,
    _a.hard_tanh: 1.0,
    _a.softplus: 1.0,
    _a.softsign: 1.0,
    _a.soft_shrink: 1.0,
    _a.tanh_shrink: 1.0,
    _a.squareplus: 1.0,
    _a.sparse_plus: 1.0,
    _a.log_sigmoid: 1.0,
    _a.softmax: 0.5,
    _a.sparse_sigmoid: 0.5,
    _a.sigmoid: 0.25,
    _a.hard_sigmoid: math.nextafter(1 / 6, 1),
    _a.silu: 1.0998394,  # rounded up, as all of these
    _a.mish: 1.0885,
    _a.gelu: 1.1289100,
    _a.selu: 1.7580994,
    _a.hard_silu: 1.5,
}
# The operations of the same names compute the same functions with their default arguments, but for the form of gelu.
ACTIVATION_BOUNDS |= {
    getattr(keras.ops, name): ACTIVATION_BOUNDS[getattr(_a, name)]
    for name in (
        *("relu", "relu6", "leaky_relu", "elu", "celu", "tanh", "hard_tanh", "softplus", "softsign", "soft_shrink"),
        *("tanh_shrink", "squareplus", "sparse_plus", "log_sigmoid", "softmax", "sparse_sigmoid"),
        *("sigmoid", "hard_sigmoid", "silu", "selu", "hard_silu"),
    )
    if hasattr(keras.ops, name)
}

#: Functions of all numbers along the last axis.
_ALONG_AN_AXIS = ("softmax", "log_softmax", "sparsemax")
#: Activation functions that compare and multiply once at most.
_COMPARISONS = {getattr(module, name) for module in (_a, keras.ops) for name in ("relu", "relu6", "leaky_relu")} | {
    _a.linear
}
#: Smooth ones whose errors were measured, and these in units of 2^-24: relative to the output where it is positive
#: (of tanh, everywhere), absolute elsewhere; by `benchmarks/activation_accuracy.py`, rounded up.
_MEASURED = {getattr(module, name) for module in (_a, keras.ops) for name in ("tanh", "sigmoid", "elu", "softplus")}
_ACCURACY: dict[str, dict[str, tuple[float, float]]] = {
    "jax": {"tanh": (5.0, 0.0), "sigmoid": (0.0, 1.5), "elu": (0.0, 2.0), "softplus": (2.6, 1.6)},
    "tensorflow": {"tanh": (6.2, 0.0), "sigmoid": (0.0, 2.7), "elu": (0.0, 1.2), "softplus": (4.5, 2.2)},
    "torch": {"tanh": (1.1, 0.0), "sigmoid": (0.0, 1.5), "elu": (0.0, 1.1), "softplus": (1.8, 1.0)},
}
#: Activation functions of every number by itself that nowhere decrease.
_MONOTONE = {
    getattr(module, name)
    for module in (_a, keras.ops)
    for name in (
        *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "tanh", "hard_tanh", "softplus", "softsign"),
        *("soft_shrink", "tanh_shrink", "squareplus", "sparse_plus", "log_sigmoid", "sparse_sigmoid", "sigmoid"),
        "hard_sigmoid",
    )
    if hasattr(module, name)
} | {_a.linear}
#: Activation functions whose values have one sign.
_ONE_SIDED = {
    getattr(_a, name)
    for name in ("sigmoid", "hard_sigmoid", "sparse_sigmoid", "softmax", "sparsemax", "softplus", "relu", "relu6")
}


def activation_bound(activation: Any, shape: Shape = None) -> float:
    """Lipschitz constant of an activation: a function of `keras.activations`, `None`, or a layer.

    Args:
        activation: as in `keras.layers.Dense(activation=...)`.
        shape: that the activation is applied to, with the batch; what a layer with numbers of its own wants to know.

    Raises:
        ValueError: for a function that is unknown or has no finite constant, and as `lipschitz_bound` for layers.

    Example:

    >>> activation_bound(keras.activations.relu)
    1.0
    """
    if activation is None:
        return 1.0
    if isinstance(activation, keras.layers.Layer):
        own = activation.weights or isinstance(activation, (_k.Rescaling, _k.Normalization, keras.Model))
        if own and shape is None:
            raise ValueError(  # they may be larger than what they are applied to
                "Expected an activation without numbers of its own, or inputs of known shape: put the layer behind the "
                f"other one. Received: activation={type(activation).__name__} '{activation.name}'"
            )
        bound = bound_of(activation, shape)
        if shape is not None and tuple(activation.compute_output_shape(tuple(shape)))[1:] != tuple(shape)[1:]:
            raise ValueError(  # Keras promises the shape before it
                "Expected an activation that keeps the shape: put the layer behind the other one. "
                f"Received: activation={type(activation).__name__} '{activation.name}'"
            )
        return bound
    if shape is not None and len(shape) < 2 and getattr(activation, "__name__", "") in _ALONG_AN_AXIS:
        raise ValueError(
            "Expected inputs to stay apart in the batch. "
            f"Received: activation={activation.__name__} of inputs of shape {tuple(shape)}"
        )
    # An object of another type that says it is equal to a function may compute anything.
    known = [each for each in ACTIVATION_BOUNDS if type(each) is type(activation) and each == activation]
    if not known:
        raise ValueError(
            "Expected an activation with a known Lipschitz constant; add yours with "
            "hkr_keras.bounds.ACTIVATION_BOUNDS[function] = constant. "
            f"Received: activation={getattr(activation, '__name__', activation)}"
        )
    bound = ACTIVATION_BOUNDS[known[0]]
    if not 0 <= bound < math.inf:
        raise ValueError(f"Expected a constant of at least 0. Received: ACTIVATION_BOUNDS[{activation}]={bound}")
    return bound


def activation_error(layer: Any) -> tuple[float, float]:
    """What the activation of a layer is off by: per unit of its output, and in each entry.

    Raises:
        ValueError: for an activation whose rounding is unknown.
    """
    activation = layer.activation
    if isinstance(activation, Hashable) and activation in _MEASURED:
        return _accuracy(getattr(activation, "__name__", ""))
    if activation is not None and activation not in _COMPARISONS:
        name = getattr(layer.activation, "__name__", layer.activation)
        raise ValueError(
            "Expected an activation whose rounding in float32 is bounded, for a rigorous certificate: linear, relu, "
            "relu6, leaky_relu, tanh, sigmoid, elu or softplus; others depend on the mathematical library (or are "
            f"layers, which belong behind this one). Received: {layer.name}.activation={name}"
        )
    return (2 * UNIT_ROUNDOFF if getattr(activation, "__name__", "") == "leaky_relu" else 0.0), 0.0


def _accuracy(name: str) -> tuple[float, float]:
    """What the mathematical library of this backend was measured to be off by, twice."""
    device = str(getattr(keras.ops.convert_to_tensor(0.0), "device", ""))
    backend = keras.backend.backend()
    if "cpu" not in device.lower() or backend not in _ACCURACY:
        raise ValueError(
            f"Expected a backend and a device on which the accuracy of {name} was measured, for a rigorous "
            f"certificate: {', '.join(_ACCURACY)} on CPUs (benchmarks/activation_accuracy.py). "
            f"Received: {backend} on {device}"
        )
    factor, absolute = _ACCURACY[backend][name]
    return 2 * factor * UNIT_ROUNDOFF, 2 * absolute * UNIT_ROUNDOFF


def monotone_slope(activation: Any) -> float | None:
    """The largest slope of a function of every number by itself that nowhere decreases; `None` for any other.

    Args:
        activation: a function, a layer that applies one, or `None`.
    """
    known = layer_bound.known(type(activation))  # a subclass with a bound of its own may compute anything
    if known is _k.Activation:
        activation = activation.activation
    elif known in (_k.ReLU, _k.LeakyReLU, _k.ELU):
        lower = activation.alpha if known is _k.ELU else activation.negative_slope
        return bound_of(activation) if lower is None or lower >= 0 else None
    if activation is None:
        return 1.0
    monotone = isinstance(activation, Hashable) and activation in _MONOTONE
    return ACTIVATION_BOUNDS[activation] if monotone else None


def is_one_sided(layer: Any) -> bool:
    """Whether the output of a layer cannot change its sign."""
    activation = getattr(layer, "activation", layer)
    if isinstance(activation, _k.Activation):
        activation = activation.activation
    if isinstance(activation, keras.layers.Layer):
        return isinstance(activation, _k.Softmax) or (
            isinstance(activation, _k.ReLU) and not activation.negative_slope and not activation.threshold
        )
    return activation in _ONE_SIDED


def multiplied(factor: float, offset: float = 0.0) -> RoundingRule:
    """The rounding of a number that is rounded, perhaps flushed, and multiplied; then another one that is added."""
    return relative(4 * UNIT_ROUNDOFF * factor + 2 * SMALLEST_NORMAL, 4 * UNIT_ROUNDOFF * offset, gain=factor)


def _prelu(layer: Any, shape: Shape) -> float:
    check_elementwise(layer, [layer.alpha], shape or (None, *layer.alpha.shape))
    return max(1.0, float(np.abs(as_computed(layer, "alpha")).max()))


def _relu(layer: Any, shape: Shape) -> float:
    check_scalars(layer, "negative_slope", "threshold", "max_value")
    if layer.threshold:
        raise ValueError(
            "Expected a continuous activation: a ReLU with a threshold jumps there. "
            f"Received: {layer.name}.threshold={layer.threshold}"
        )
    return _slope(layer, layer.negative_slope or 0.0)


def _leaky(layer: Any, shape: Shape) -> float:
    check_scalars(layer, "negative_slope")
    return _slope(layer, layer.negative_slope)


def _elu(layer: Any, shape: Shape) -> float:
    check_scalars(layer, "alpha")
    return _slope(layer, layer.alpha)


def _slope(layer: Any, number: float) -> float:
    """The larger of 1 and a slope, as the layer computes with it."""
    return max(1.0, as_stored(float(number), str(layer.compute_dtype)).bound)


def _householder(layer: Any, shape: Shape) -> float:
    if layer.built and shape is not None:
        check_numbers(layer, [layer.angles], (shape[layer.axis] // 2,))
    return 1.0


def _slope_rounding(layer: Any, shape: Shape) -> RoundingRule:
    return multiplied(bound_of(layer, shape))


def _activation_rounding(layer: Any, shape: Shape) -> RoundingRule:
    factor, absolute = activation_error(layer)
    return relative(2 * UNIT_ROUNDOFF + factor, absolute + factor)  # a softplus is at most x + 0.7


def _elu_rounding(layer: Any, shape: Shape) -> RoundingRule:
    _, absolute = _accuracy("elu")
    return relative(4 * UNIT_ROUNDOFF * bound_of(layer, shape), absolute * abs(float(layer.alpha)))


def _sorting(layer: Any, shape: Shape) -> RoundingRule:
    return relative(4 * UNIT_ROUNDOFF)  # a difference and two sums


rule(layers.GroupSort, layers.MaxMin, bound=1.0, rounding=_sorting)
rule(layers.FullSort, bound=1.0, rounding=lambda layer, shape: relative(0.0))
rule(
    layers.Householder, bound=_householder, rounding=lambda layer, shape: relative(36 * UNIT_ROUNDOFF)
)  # sines, cosines
rule(
    _k.Activation,
    bound=lambda layer, shape: activation_bound(layer.activation, shape),
    rounding=_activation_rounding,
)
rule(_k.Softmax, bound=0.5)
rule(_k.ReLU, bound=_relu, rounding=_slope_rounding)
rule(_k.LeakyReLU, bound=_leaky, rounding=_slope_rounding)
rule(_k.PReLU, bound=_prelu, rounding=_slope_rounding)
rule(_k.ELU, bound=_elu, rounding=_elu_rounding)
