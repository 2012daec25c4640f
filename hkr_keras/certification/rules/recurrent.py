"""Rows of recurrent layers."""

import math
from typing import Any

import keras

from hkr_keras import layers
from hkr_keras.certification.checks import build_shape, check_built, check_no_hooks, check_numbers, overridden
from hkr_keras.certification.floating_point import MACHINE_EPSILON
from hkr_keras.certification.rules.activations import activation_bound
from hkr_keras.certification.rules.registry import Shape, bound_of, rule
from hkr_keras.certification.singular_values import kernel_bound
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
_MERGED = {"concat": math.hypot, None: math.hypot, "sum": lambda a, b: a + b, "ave": lambda a, b: (a + b) / 2}


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
    return _MERGED[mode](*(bound_of(each, shape) for each in both)) * (1 + 4 * MACHINE_EPSILON)


rule(layers.LipschitzSimpleRNN, bound=_recurrence)
rule(keras.layers.Bidirectional, bound=_bidirectional)
