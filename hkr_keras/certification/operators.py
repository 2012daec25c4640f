"""Linear operators that neighbouring layers are folded into: numbers, matrices and convolutions, float64 on the host.

The norm of `Dense(Normalization(x))` can be far below the product of both norms. Operators compose by
`second.after(first)`; what does not compose to an operator of these kinds gives `None`.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from hkr_keras.certification.floating_point import MACHINE_EPSILON
from hkr_keras.certification.singular_values import blocks_bound, matrix_spectrum

__all__ = ["Convolution", "Diagonal", "Matrix", "Operator"]

_TINY = float(np.finfo(np.float64).tiny)  # what an underflow in float64 loses at most
_UP = 1 + 8 * MACHINE_EPSILON


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))


def _length(array: np.ndarray) -> float:
    """An upper bound on the Frobenius norm, whose squares neither overflow nor vanish."""
    scale = _largest(array)
    return scale * float(np.linalg.norm(array / scale)) * (1 + array.size * MACHINE_EPSILON) if scale else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Diagonal:
    """Multiplies every entry of an input by a number.

    Args:
        numbers: float64, one axis for each axis of an input but the batch, of its size or 1; or no axis.
        error: bound on the absolute error of every number.

    Example:

    >>> Diagonal(np.array([3.0, -4.0])).bound < 4 + 1e-12
    True
    """

    numbers: np.ndarray
    error: float = 0.0

    @property
    def bound(self) -> float:
        """Upper bound on the norm."""
        return (_largest(self.numbers) + self.error) * _UP

    def along(self, axis: int) -> np.ndarray | None:
        """The numbers along one axis of an input without the batch, if they depend on nothing else; `(1,)` or more."""
        if self.numbers.ndim == 0:
            return self.numbers.reshape(1)
        axis %= self.numbers.ndim
        others = math.prod(size for i, size in enumerate(self.numbers.shape) if i != axis)
        return self.numbers.reshape(-1) if others == 1 else None

    def after(self, first: "Operator") -> "Operator | None":
        """The operator that computes `first` and then this one."""
        if isinstance(first, Diagonal):
            if self.numbers.ndim and first.numbers.ndim and self.numbers.ndim != first.numbers.ndim:
                return None
            product = self.numbers * first.numbers
            mine, theirs = _largest(self.numbers), _largest(first.numbers)
            error = self.error * (theirs + first.error) + first.error * mine + 2 * MACHINE_EPSILON * _largest(product)
            return Diagonal(product, error * _UP + _TINY)
        numbers = self.along(-1 if isinstance(first, Matrix) else first.channel_axis)
        return None if numbers is None else first.scaled(numbers, self.error, outputs=True)

    def reshaped(self, shape: Any, new_shape: Any) -> "Diagonal | None":
        """The same numbers for inputs that are reshaped, without the batch; `None` for unknown sizes."""
        if self.numbers.ndim == 0:
            return self
        if None in shape or None in new_shape or len(shape) != self.numbers.ndim:
            return None
        return Diagonal(np.broadcast_to(self.numbers, shape).reshape(new_shape), self.error)


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """Multiplies the last axis of an input by a matrix.

    Args:
        matrix: `(features, outputs)` float64.
        error: bound on the norm of what is wrong with it, when it is a product.

    Example:

    >>> Matrix(np.eye(2)).after(Diagonal(np.array([2.0, 3.0]))).matrix.tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """

    matrix: np.ndarray
    error: float = 0.0

    @property
    def bound(self) -> float:
        """Upper bound on the norm."""
        return (matrix_spectrum(self.matrix).bound + self.error) * _UP

    def after(self, first: "Operator") -> "Operator | None":
        """The operator that computes `first` and then this one."""
        if isinstance(first, Matrix):
            sizes = _length(first.matrix), _length(self.matrix)
            rounding = 4 * len(self.matrix) * MACHINE_EPSILON * sizes[0] * sizes[1] + _TINY * self.matrix.size
            error = first.error * (sizes[1] + self.error) + self.error * sizes[0] + rounding
            return Matrix(first.matrix @ self.matrix, error * _UP)
        numbers = first.along(-1) if isinstance(first, Diagonal) else None
        return None if numbers is None else self.scaled(numbers, first.error, outputs=False)

    def scaled(self, numbers: np.ndarray, error: float, outputs: bool) -> "Matrix":
        """Rows or columns multiplied by numbers with an error."""
        product = self.matrix * (numbers if outputs else numbers[:, None])
        rounding = error * (_length(self.matrix) + self.error) + self.error * _largest(numbers)
        return Matrix(product, (rounding + 2 * MACHINE_EPSILON * _length(product) + _TINY * product.size) * _UP)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Convolution:
    """A convolution, transposed or not.

    Args:
        blocks: float64 `(*window, blocks, inputs, outputs)` of a block-diagonal convolution; of its adjoint when
            transposed.
        strides, dilation: one per dimension of the window.
        transposed: whether the operator is the adjoint.
        channel_axis: of the inputs without the batch: 0 or -1.
        padding, sizes: with them, the operator at that image size, which may be smaller than at all sizes.
        error: bound on the norm of what is wrong with the blocks.
        limit: another upper bound on the norm.
    """

    blocks: np.ndarray
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    channel_axis: int = -1
    padding: str | None = None
    sizes: tuple[int | None, ...] | None = None
    error: float = 0.0
    limit: float = math.inf

    @property
    def bound(self) -> float:
        """Upper bound on the norm."""
        image = None if self.padding is None or self.sizes is None else (self.padding, self.sizes)
        found = blocks_bound(self.blocks, self.strides, self.dilation, self.transposed, image)
        return min((found + self.error) * _UP, self.limit)

    def after(self, first: "Operator") -> "Operator | None":
        """The operator that computes `first` and then this one."""
        numbers = first.along(self.channel_axis) if isinstance(first, Diagonal) else None
        return None if numbers is None else self.scaled(numbers, first.error, outputs=False)

    def scaled(self, numbers: np.ndarray, error: float, outputs: bool) -> "Convolution":
        """Input or output channels multiplied by numbers with an error."""
        count, inputs, channels = self.blocks.shape[-3:]
        if outputs != self.transposed:  # the last axis of the blocks
            by = numbers if numbers.size == 1 else numbers.reshape(count, 1, channels)
        else:
            by = numbers if numbers.size == 1 else numbers.reshape(count, inputs, 1)
        product, largest = self.blocks * by, _largest(numbers)
        gain = math.sqrt(math.prod(self.blocks.shape[:-3]))  # of a kernel of that length, for any stride
        rounding = error * gain * _length(self.blocks) + self.error * (largest + error)
        rounding += gain * (2 * MACHINE_EPSILON * _length(product) + _TINY * product.size)
        return dataclasses.replace(
            self, blocks=product, error=rounding * _UP, limit=self.limit * (largest + error) * _UP
        )


Operator = Diagonal | Matrix | Convolution
