"""Rows of recurrent layers."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from hkr_keras import layers
from hkr_keras.certification.checks import build_shape, check_built, check_no_hooks, check_numbers, overridden
from hkr_keras.certification.floating_point import (
    MACHINE_EPSILON,
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    Rounding,
    RoundingRule,
    entries,
    norms,
    sum_error,
)
from hkr_keras.certification.rules.activations import activation_bound, activation_error
from hkr_keras.certification.rules.registry import Shape, bound_of, layer_rounding, rule
from hkr_keras.certification.singular_values import absolute_bound, as_float64, kernel_bound
from hkr_keras.layers.recurrent import LipschitzSimpleRNNCell, recurrence_bound

__all__ = []


def _recurrence(layer: Any, shape: Shape) -> float:
    cell = layer.cell
    changed = type(cell) is not LipschitzSimpleRNNCell or overridden(cell, LipschitzSimpleRNNCell)
    if changed or layer.return_state or layer.stateful:
        raise ValueError(
            "Expected a LipschitzSimpleRNN with its own cell, and no states in or out. Received: "
            f"cell={type(cell).__name__}, return_state={layer.return_state}, stateful={layer.stateful}"
        )
    check_built(layer)
    check_no_hooks(cell)
    shape = build_shape(layer) if shape is None else shape
    if shape is None or len(shape) != 3 or shape[1] is None or shape[2] != cell.kernel.shape[0]:
        raise ValueError(
            f"Expected '{layer.name}' to receive sequences of known length, of as many features as its kernel was made "
            f"for. Received: shape={shape}, kernel.shape={tuple(cell.kernel.shape)}"
        )
    check_numbers(cell, [cell.bias] if cell.use_bias else [], (cell.units,))
    slope = activation_bound(cell.activation, (shape[0], cell.units))
    inputs, states = (slope * kernel_bound(cell, name) for name in ("kernel", "recurrent_kernel"))
    return recurrence_bound(shape[1], inputs, states, layer.return_sequences)


#: The constant of what is made of two outputs, from theirs; turning one of them around in time changes nothing.
_MERGED: dict[str | None, Callable[..., Any]] = {
    "concat": np.hypot,
    None: np.hypot,
    "sum": lambda a, b: a + b,
    "ave": lambda a, b: (a + b) / 2,
}


def _bidirectional(layer: Any, shape: Shape) -> float:
    both, mode = (layer.forward_layer, layer.backward_layer), layer.merge_mode
    if mode not in _MERGED:
        raise ValueError(
            "Expected two directions that are joined by 'concat', 'sum', 'ave' or None: the constant of a product "
            f"depends on its factors. Received: {layer.name}.merge_mode={mode}"
        )
    known = build_shape(both[0]) if shape is None else tuple(shape)
    made = [None if known is None else tuple(each.compute_output_shape(known)) for each in both]
    if made[0] != made[1] and mode in ("sum", "ave"):
        raise ValueError(
            "Expected two directions of equal shape, since broadcasting enlarges norms. "
            f"Received: {layer.name} of shapes {made}"
        )
    return float(_MERGED[mode](*(bound_of(each, shape) for each in both))) * (1 + 4 * MACHINE_EPSILON)


def _both_roundings(layer: Any, shape: Shape) -> RoundingRule:
    """The error bounds of both directions, joined as their constants are, and that of a sum."""
    first, second = (layer_rounding(each, shape) for each in (layer.forward_layer, layer.backward_layer))
    joined, summed, bound = _MERGED[layer.merge_mode], layer.merge_mode in ("sum", "ave"), _bidirectional(layer, shape)

    def rounding(x: Any, y: Any) -> Rounding:
        one, other = first(x, y), second(x, y)
        centre, slope = joined(one.at_centre, other.at_centre), float(joined(one.slope, other.slope))
        if summed:
            centre = centre + 2 * UNIT_ROUNDOFF * norms(y) + SMALLEST_NORMAL * entries(y)
            slope += 2 * UNIT_ROUNDOFF * bound
        return Rounding(centre * (1 + 4 * MACHINE_EPSILON), slope * (1 + 4 * MACHINE_EPSILON))

    return rounding


def _rounding(layer: Any, shape: Shape) -> RoundingRule:
    """Each step is off by what two products, two sums and the activation are, and carries on what came before."""
    cell = layer.cell
    last, absolute_error = activation_error(cell)
    known = _VALUES[cell.activation.__name__]
    steep = activation_bound(cell.activation, (None, cell.units))
    kernel, recurrent = as_float64(cell.kernel), as_float64(cell.recurrent_kernel)
    shift = as_float64(cell.bias) if cell.use_bias else np.zeros(cell.units)
    enters, goes_on = (kernel_bound(cell, name) for name in ("kernel", "recurrent_kernel"))
    wide, wide_on = (absolute_bound(cell, name) for name in ("kernel", "recurrent_kernel"))
    (first, first_linear), (second, second_linear) = sum_error(len(kernel) + 2), sum_error(len(recurrent) + 2)
    each = math.sqrt(cell.units) * (absolute_error + SMALLEST_NORMAL * 8 * (sum(kernel.shape) + sum(recurrent.shape)))
    each += math.sqrt(cell.units) * SMALLEST_NORMAL * 8 * (wide + wide_on)

    def joined(parts: list) -> Any:
        return np.sqrt(np.sum(np.square(parts), axis=0)) if layer.return_sequences else parts[-1]

    def rounding(x: Any, y: Any) -> Rounding:
        x = x.astype(np.float64)[:, :: -1 if layer.go_backwards else 1]
        state, off, slope, moved = np.zeros((len(x), cell.units)), np.zeros(len(x)), 0.0, 0.0
        offs, slopes = [], []
        for step in range(x.shape[1]):
            now = x[:, step]
            size = norms(state) + off
            made = first * norms(np.abs(now) @ np.abs(kernel)) + first_linear * enters * norms(now)
            made += second * (norms(np.abs(state) @ np.abs(recurrent)) + wide_on * off) + second_linear * goes_on * size
            made += 3 * UNIT_ROUNDOFF * (enters * norms(now) + goes_on * size + float(np.linalg.norm(shift)))
            off = steep * (goes_on * off + made * (1 + 1e-6))
            more = first * wide + first_linear * enters + second * wide_on * (moved + slope)
            more += second_linear * goes_on * (moved + slope) + 3 * UNIT_ROUNDOFF * (enters + goes_on * (moved + slope))
            slope = steep * (goes_on * slope + more * (1 + 1e-6))
            moved = math.hypot(steep * enters, steep * goes_on * moved)
            state = known(now @ kernel + state @ recurrent + shift)
            off = (off + last * (norms(state) + off) + each) * (1 + 1e-9)
            slope = (slope + last * (moved + slope)) * (1 + 1e-9)
            offs.append(off)
            slopes.append(slope)
        return Rounding(joined(offs), float(joined(slopes)))

    return rounding


#: Activations in float64.
_VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0.0),
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "leaky_relu": lambda x: np.where(x > 0, x, float(np.float32(0.2)) * x),
    "tanh": np.tanh,
    "sigmoid": lambda x: 0.5 * (1 + np.tanh(0.5 * x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    "softplus": lambda x: np.logaddexp(0.0, x),
}

rule(layers.LipschitzSimpleRNN, bound=_recurrence, rounding=_rounding)
rule(keras.layers.Bidirectional, bound=_bidirectional, rounding=_both_roundings)
