"""Rows of recurrent layers."""

from typing import Any

from hkr_keras import layers
from hkr_keras.certification.checks import build_shape, check_built, check_no_hooks, check_numbers, overridden
from hkr_keras.certification.rules.activations import activation_bound
from hkr_keras.certification.rules.registry import Shape, rule
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


rule(layers.LipschitzSimpleRNN, bound=_recurrence)
