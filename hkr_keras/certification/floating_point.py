"""Float32 and float64: unit roundoffs, what flushing loses, and error bounds of single layers.

Assumed of the machine: IEEE float32, rounding to nearest; products are sums of rounded (or fused) products, added in
any order; subnormal numbers may be flushed to 0; `exp`, `sin`, `cos` and reciprocal roots are right to 4 units in the
last place.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = [
    "LARGEST",
    "MACHINE_EPSILON",
    "SMALLEST_NORMAL",
    "SMALLEST_NORMAL_64",
    "UNIT_ROUNDOFF",
    "Affine",
    "Rounding",
    "RoundingRule",
    "accumulated",
    "entries",
    "norms",
    "relative",
    "sum_error",
]

MACHINE_EPSILON = float(np.finfo(np.float64).eps)
SMALLEST_NORMAL_64 = float(np.finfo(np.float64).tiny)  # what an underflow in float64 loses at most
UNIT_ROUNDOFF = 2.0**-24  # of float32
SMALLEST_NORMAL = 2.0**-126  # of float32: what flushing a subnormal number to 0 changes at most
LARGEST = 2.0**60  # above, sums of squares may overflow in float32: nothing is certified there


def accumulated(operations: float) -> float:
    """The relative error `n u / (1 - n u)` of n roundings in a row.

    Raises:
        ValueError: for so many that nothing is known of the result.

    Example:

    >>> accumulated(100) < 101 * UNIT_ROUNDOFF
    True
    """
    if operations * UNIT_ROUNDOFF >= 0.25:
        raise ValueError(f"Expected sums of fewer than 2^22 terms in float32. Received: {operations} terms")
    return operations * UNIT_ROUNDOFF / (1 - operations * UNIT_ROUNDOFF)


def sum_error(terms: int) -> tuple[float, float]:
    """What a sum of so many products is off by, in any order: per unit of the sum of absolute values, and of the sum.

    Each product is off by u times its size, and each partial sum, none of which is above half of both together, too.

    Example:

    >>> [round(error / UNIT_ROUNDOFF, 3) for error in sum_error(1)]
    [1.5, 0.5]
    """
    linear = terms * UNIT_ROUNDOFF * (0.5 + accumulated(terms + 2))
    return UNIT_ROUNDOFF + linear, linear


@dataclasses.dataclass(frozen=True)
class Affine:
    """`constant + slope * epsilon` for each input of a batch, arrays `(n,)`.

    Example:

    >>> (Affine(1.0, 2.0) + Affine(0.5, 0.0))(epsilon=0.25)
    2.0
    """

    constant: Any
    slope: Any

    def __call__(self, epsilon: Any) -> Any:
        return self.constant + self.slope * epsilon

    def __add__(self, other: "Affine") -> "Affine":
        return Affine(self.constant + other.constant, self.slope + other.slope)

    def times(self, factor: Any) -> "Affine":
        """Both parts multiplied by a factor of at least 0."""
        return Affine(self.constant * factor, self.slope * factor)

    def larger(self, other: "Affine") -> "Affine":
        """An affine function above both."""
        return Affine(np.maximum(self.constant, other.constant), np.maximum(self.slope, other.slope))


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Error bound of one layer: `at_centre`, `(n,)`, plus `slope` per unit of L2 distance of its computed input.

    `composed` is the norm of what the kernel that is deployed may differ by from the one that is known here: that much
    of the input, wherever it is, comes on top; but not where the layer is evaluated here.
    """

    at_centre: Any
    slope: Any
    composed: float = 0.0


#: From the computed input (or list of inputs) and output of a layer, float32 arrays, to its error bound.
RoundingRule = Callable[[Any, Any], Rounding]


def norms(values: Any) -> np.ndarray:
    """Euclidean norms `(n,)` of the entries of a batch, in float64."""
    return np.linalg.norm(np.asarray(values, dtype=np.float64).reshape(len(values), -1), axis=1)


def entries(values: Any) -> float:
    """The root of the number of entries of one input: what an error in each entry amounts to."""
    return math.sqrt(math.prod(values.shape[1:]))


def relative(factor: float, absolute: float = 0.0, gain: float = 1.0) -> RoundingRule:
    """The rounding of a layer that is off by `factor * |x|`, and by `absolute` in each entry of its output.

    Args:
        factor: relative error bound.
        absolute: error bound of each entry of the output.
        gain: what the layer multiplies its input by at most: that much of a flushed subnormal number is lost.

    Example:

    >>> float(relative(0.5)(np.ones((1, 4)), np.ones((1, 4))).at_centre[0])
    1.0
    """

    def rule(x: Any, y: Any) -> Rounding:
        flushed = 8 * (1 + gain) * SMALLEST_NORMAL * (entries(x) + entries(y))
        return Rounding(factor * norms(x) + absolute * entries(y) + flushed, factor)

    return rule
