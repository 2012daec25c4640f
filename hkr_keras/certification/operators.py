"""Linear operators that neighbouring layers are folded into: numbers, matrices and convolutions, float64 on the host.

The norm of `Dense(Normalization(x))` can be far below the product of both norms. Operators compose by
`second.after(first)`; what does not compose to an operator of these kinds gives `None`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hkr_keras.certification.floating_point import MACHINE_EPSILON, SMALLEST_NORMAL_64
from hkr_keras.certification.singular_values import blocks_bound

__all__ = ["Convolution", "Diagonal", "Matrix", "Operator", "as_stored"]

_UP = 1 + 8 * MACHINE_EPSILON


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))


@np.errstate(over="ignore", invalid="ignore")
def _length(array: np.ndarray) -> float:
    """An upper bound on the Frobenius norm, whose squares neither overflow nor vanish."""
    scale = _largest(array)
    return scale * float(np.linalg.norm(array / scale)) * (1 + array.size * MACHINE_EPSILON) if scale else 0.0


def _joint(first: float, second: float) -> float:
    """The relative error of a product, from those of its factors."""
    return (first + second + first * second) * _UP


@dataclasses.dataclass(frozen=True, eq=False)
class Diagonal:
    """Multiplies every entry of an input by a number.

    Args:
        numbers: float64, one axis for each axis of an input but the batch, of its size or 1; or no axis.
        relative: bound on the relative error of every number.

    Example:

    >>> Diagonal(np.array([3.0, -4.0])).bound < 4 + 1e-12
    True
    """

    numbers: np.ndarray
    relative: float = 0.0

    @property
    def bound(self) -> float:
        """Upper bound on the norm."""
        largest = _largest(self.numbers)
        return largest * (1 + self.relative) * _UP if self.relative else largest  # nothing was rounded

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
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                product = self.numbers * first.numbers
            lost = (np.abs(product) < SMALLEST_NORMAL_64) & (self.numbers != 0) & (first.numbers != 0)
            relative = _joint(self.relative, first.relative) + 4 * MACHINE_EPSILON
            return Diagonal(np.where(lost, SMALLEST_NORMAL_64, product), relative)  # larger numbers than the true ones
        numbers = self.along(-1 if isinstance(first, Matrix) else first.channel_axis)
        return None if numbers is None else first.scaled(numbers, self.relative, outputs=True)

    def reshaped(self, shape: Any, new_shape: Any) -> "Diagonal | None":
        """The same numbers for inputs that are reshaped, without the batch; `None` for unknown sizes."""
        if self.numbers.ndim == 0:
            return self
        if None in shape or None in new_shape or len(shape) != self.numbers.ndim:
            return None
        return Diagonal(np.broadcast_to(self.numbers, shape).reshape(new_shape), self.relative)


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def _scaled(array: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, float]:
    """Numbers times numbers, and a bound on the Frobenius norm of what rounding makes of it."""
    product = array * numbers
    return product, (2 * MACHINE_EPSILON * _length(product) + SMALLEST_NORMAL_64 * product.size) * _UP


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Matrix:
    """Multiplies the last axis of an input by a matrix.

    Args:
        matrix: `(features, outputs)` float64.
        error: bound on the norm of what is wrong with it, when it is a product.
        relative: bound on the relative error of what its rows were multiplied by.
        limit: another upper bound on the norm.

    Example:

    >>> Matrix(np.eye(2)).after(Diagonal(np.array([2.0, 3.0]))).matrix.tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """

    matrix: np.ndarray = dataclasses.field(kw_only=False)
    error: float = dataclasses.field(default=0.0, kw_only=False)
    relative: float = dataclasses.field(default=0.0, kw_only=False)
    limit: float = math.inf

    @property
    def total_error(self) -> float:
        """Bound on the norm of what is wrong with the matrix, relative errors of its rows included."""
        return (self.error + self.relative * (_length(self.matrix) + self.error)) * _UP

    @property
    def bound(self) -> float:
        """Upper bound on the norm."""
        found = _finite(self.matrix, lambda: blocks_bound(self.matrix[None], (), ()))  # which is remembered
        return min((found + self.error) * (1 + self.relative) * _UP, self.limit)

    def after(self, first: "Operator") -> "Operator | None":
        """The operator that computes `first` and then this one."""
        if isinstance(first, Matrix):
            sizes, entries = (_length(first.matrix), _length(self.matrix)), self.matrix.size
            rounding = 4 * len(self.matrix) * MACHINE_EPSILON * sizes[0] * sizes[1] + SMALLEST_NORMAL_64 * entries
            mine = self.error + self.relative * (sizes[1] + self.error)
            error = first.error * (sizes[1] + mine) + mine * sizes[0] + rounding
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                return Matrix(first.matrix @ self.matrix, error * _UP, first.relative)
        numbers = first.along(-1) if isinstance(first, Diagonal) else None
        return None if numbers is None else self.scaled(numbers, first.relative, outputs=False)

    def scaled(self, numbers: np.ndarray, relative: float, outputs: bool) -> "Matrix":
        """Rows or columns multiplied by numbers with a relative error."""
        product, rounding = _scaled(self.matrix, numbers if outputs else numbers[:, None])
        error = (self.error * _largest(numbers) * (1 + relative) + rounding) * _UP
        if outputs:  # differences of columns are not as near as the columns
            return Matrix(product, (error + relative * _length(product)) * _UP, self.relative)
        return Matrix(product, error, _joint(self.relative, relative))


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
        relative: bound on the relative error of what channels were multiplied by.
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
    relative: float = 0.0
    limit: float = math.inf

    @property
    def bound(self) -> float:
        """Upper bound on the norm."""
        image = None if self.padding is None or self.sizes is None else (self.padding, self.sizes)
        steps = self.strides, self.dilation
        found = _finite(self.blocks, lambda: blocks_bound(self.blocks, *steps, self.transposed, image))
        return min((found + self.error) * (1 + self.relative) * _UP, self.limit)

    def after(self, first: "Operator") -> "Operator | None":
        """The operator that computes `first` and then this one."""
        numbers = first.along(self.channel_axis) if isinstance(first, Diagonal) else None
        return None if numbers is None else self.scaled(numbers, first.relative, outputs=False)

    def scaled(self, numbers: np.ndarray, relative: float, outputs: bool) -> "Convolution":
        """Input or output channels multiplied by numbers with a relative error."""
        count, inputs, channels = self.blocks.shape[-3:]
        shape = (count, 1, channels) if outputs != self.transposed else (count, inputs, 1)
        product, rounding = _scaled(self.blocks, numbers if numbers.size == 1 else numbers.reshape(shape))
        largest = _largest(numbers) * (1 + relative)
        gain = math.sqrt(math.prod(self.blocks.shape[:-3]))  # of a kernel of that length, for any stride
        return dataclasses.replace(
            self,
            blocks=product,
            error=(self.error * largest + gain * rounding) * _UP,
            relative=_joint(self.relative, relative),
            limit=self.limit * largest * _UP if math.isfinite(self.limit) else math.inf,
        )


def _finite(array: np.ndarray, bound: Callable[[], float]) -> float:
    """A bound on an operator, infinite where its numbers are."""
    return bound() if np.isfinite(array).all() else math.inf


Operator = Diagonal | Matrix | Convolution


def as_stored(numbers: Any, dtype: str) -> Diagonal:
    """Numbers that a layer multiplies by, and how far those are that it computes with: it rounds them to its type."""
    exact = np.asarray(numbers, dtype=np.float64)
    if not np.isfinite(exact).all():
        raise ValueError(f"Expected finite numbers to multiply by. Received: {numbers}")
    with np.errstate(over="ignore", divide="ignore", invalid="ignore", under="ignore"):
        single = exact.astype(np.float32).astype(np.float64)
        relative = np.where(exact == 0, 0.0, np.abs(single - exact) / np.abs(exact))
    half = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype, 0.0)  # of numbers that are normal there
    if half and ((exact != 0) & (np.abs(exact) < 2.0**-14)).any():
        raise ValueError(f"Expected numbers that are normal in {dtype}. Received: {numbers}")
    if dtype == "float16" and (np.abs(exact) > 65504.0).any():
        raise ValueError(f"Expected numbers of at most 65504, the largest of float16. Received: {numbers}")
    return Diagonal(exact, float(relative.max(initial=0.0)) + half)
