"""Checks of arguments that several modules share: each returns the checked value, or says what was expected."""

import math
import numbers
from typing import Any

from keras import ops

Tensor = Any

__all__ = ["check_length", "flat", "number"]


def number(name: str, value: Any, lowest: float = 0.0, strict: bool = False, finite: bool = True) -> float:
    """The value as a float, after checking that it is a number in the allowed range.

    Args:
        name: name of the argument, for the message.
        value: any real number, of Python or NumPy.
        lowest: smallest allowed value.
        strict: whether the value has to be larger than `lowest`.
        finite: whether `math.inf` is refused.

    Raises:
        ValueError: for what is not a number, NaN, or out of range.

    Example:

    >>> number("margin", 1)
    1.0
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
    if not is_number or value < lowest or (strict and value == lowest) or (finite and math.isinf(value)):
        sign, kind = (">" if strict else ">="), ("a finite number" if finite else "a number (math.inf allowed)")
        raise ValueError(f"Expected {name} to be {kind} {sign} {lowest}. Received: {name}={value}")
    return float(value)


def flat(values: Tensor, name: str) -> Tensor:
    """Values of shape `(n,)` or `(n, 1)` as `(n,)`.

    Raises:
        ValueError: for any other shape.

    Example:

    >>> tuple(flat(ops.ones((3, 1)), "y_true").shape)
    (3,)
    """
    shape = tuple(values.shape)
    if len(shape) == 2 and shape[1] == 1:
        return ops.squeeze(values, axis=1)
    if len(shape) != 1:
        raise ValueError(f"Expected shape (n,) or (n, 1). Received: {name}.shape={shape}")
    return values


def check_length(values: Tensor, y_pred: Tensor, name: str = "y_true") -> None:
    """Refuses values of another length than that of the predictions, where both lengths are known.

    Raises:
        ValueError: for another length.

    Example:

    >>> check_length(ops.ones((3,)), ops.ones((3, 2)))
    """
    expected, received = y_pred.shape[0], values.shape[0]
    if expected is not None and received is not None and expected != received:
        raise ValueError(
            f"Expected {name} to be as long as the predictions. "
            f"Received: {name}.shape={tuple(values.shape)}, y_pred.shape={tuple(y_pred.shape)}"
        )
