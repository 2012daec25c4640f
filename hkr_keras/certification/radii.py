"""Radius arithmetic: from margins, and how fast they can change, to distances that are rounded down. Pure NumPy.

A margin is what a decision rests on: a score, or the difference of two logits. It is used up at the distance
`margin / constant`, where the constant bounds its change per unit of L2 distance at the input.
"""

import math
from typing import Any

import numpy as np

from hkr_keras.certification.bounds import LipschitzState
from hkr_keras.certification.floating_point import Affine

__all__ = ["ROUNDED_DOWN", "decide", "output_constants", "pair_constants", "radii", "rival_margins"]

ROUNDED_DOWN = 1 - 1e-9  # covers the float64 rounding of whatever a radius is made of


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def radii(
    margins: Any, constants: Any, rounding: Affine | None = None, reach: Any = math.inf, input_rounding: Any = 0.0
) -> np.ndarray:
    """The distances at which margins are used up; 0 where a margin is not positive.

    Args:
        margins: `(n, margins)`, of any numbers.
        constants: how far each margin moves at most per unit, of a shape that broadcasts with it.
        rounding: what floating point may take off the margin, and add to its change per unit; `None` for nothing.
        reach: distances beyond which nothing is known, `(n,)`.
        input_rounding: how far each input was moved before it was looked at, `(n,)`: taken off.

    Returns:
        `(n, margins)` float64, rounded down.

    Example:

    >>> radii(np.array([[3.0, -1.0]]), np.array([2.0, 2.0])).round(6).tolist()
    [[1.5, 0.0]]
    """
    margins, constants = np.asarray(margins, dtype=np.float64), np.asarray(constants, dtype=np.float64)
    if rounding is not None:
        margins = margins - rounding.constant / ROUNDED_DOWN
        constants = constants + rounding.slope
    found = np.where(margins > 0, margins / constants * ROUNDED_DOWN, 0.0)
    found = np.minimum(found, np.reshape(reach, (-1, 1))) - np.reshape(input_rounding, (-1, 1))
    return np.where(found > 0, found, 0.0)  # NaN included


def rival_margins(outputs: np.ndarray, label: int) -> np.ndarray:
    """How far one logit is in front of each other one, `(n, classes - 1)`.

    Example:

    >>> rival_margins(np.array([[3.0, 1.0, 5.0]]), 0).tolist()
    [[2.0, -2.0]]
    """
    return outputs[:, [label]] - np.delete(outputs, label, axis=1)


def pair_constants(state: LipschitzState, label: int, classes: int) -> np.ndarray:
    """How far the difference of one logit and each other one moves at most per unit, `(classes - 1,)`."""
    if state.tail is None:
        return np.full(classes - 1, math.sqrt(2) * state.constant)
    before = LipschitzState(state.tail.constants).constant
    return before * np.delete(state.tail.differences_from(label), label)


def output_constants(state: LipschitzState) -> np.ndarray:
    """How far each single output moves at most per unit, `(outputs,)`, or `(1,)` for all alike."""
    if state.tail is None:
        return np.array([state.constant])
    return np.minimum(LipschitzState(state.tail.constants).constant * state.tail.lengths(), state.constant)


def decide(outputs: np.ndarray, constants: np.ndarray, input_rounding: Any = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and radii in exact arithmetic, from outputs and the constants of their pairs.

    Args:
        outputs: `(n, classes)`, or `(n, 1)` for a score.
        constants: `(classes, classes)`, or `(1, 1)` for a score, whose diagonal is not looked at.
        input_rounding: as in `radii`.

    Returns:
        Classes `(n,)`, for a score 1 where it is positive, and radii `(n,)`.

    Example:

    >>> prediction, radius = decide(np.array([[3.0, 1.0]]), np.array([[0.0, 2.0], [2.0, 0.0]]))
    >>> prediction.tolist(), radius.round(6).tolist()
    ([0], [1.0])
    """
    if outputs.shape[1] == 1:
        found = radii(np.abs(outputs), constants, input_rounding=input_rounding)
        return (outputs[:, 0] > 0).astype(np.int64), found[:, 0]
    prediction, radius = outputs.argmax(axis=1), np.zeros(len(outputs))
    input_rounding = np.broadcast_to(input_rounding, len(outputs))
    for label in np.unique(prediction):
        chosen = prediction == label
        pairs = np.delete(constants[label], label)
        found = radii(rival_margins(outputs[chosen], label), pairs, input_rounding=input_rounding[chosen])
        radius[chosen] = found.min(axis=1)
    return prediction, radius
