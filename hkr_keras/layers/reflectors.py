"""A dense layer that is orthonormal for every value of its weights: one reflection of a whole subspace."""

from typing import Any, TypeAlias

import keras
from keras import ops

from hkr_keras._backends.compiling import branch
from hkr_keras._registration import registered
from hkr_keras.geometry import Geometry, weight_geometries
from hkr_keras.layers.base import ComposedKernel, at_least_float32
from hkr_keras.linalg import SMALLEST_DIVISOR

__all__ = ["ReflectorDense"]

# Products are written with @, since `ops.matmul` of float64 tensors is float32 on PyTorch.

Tensor: TypeAlias = Any

_SMALLEST = 1e-6  # a vector weaker than this, relative to the largest entry, is not scaled up any further
_RIDGE = 1e-6  # of the trace of V^T V: above what float32 loses in it, so that its Cholesky factor exists
_SHRINK = 1.0 - 2.0**-18  # float32 leaves up to 3e-6 above 1 in the norm


def _at_least(x: Tensor, least: float) -> Tensor:
    """A maximum that stays in float64, where `ops.maximum` of a tensor and a number goes to float32 on PyTorch."""
    return ops.where(x > least, x, ops.full_like(x, least))


def _orthonormal_factor(vectors: Tensor) -> Tensor:
    """Y with the range of V and `Y Y^T = V (V^T V + eps I)^-1 V^T`: nearly orthonormal columns, by a Cholesky factor.

    `Y = V L^-T` with `L L^T = V^T V + eps I`, for columns of V scaled to norm 1 and `eps = 1e-6 rank`. So the singular
    values of Y are at most 1, and near 1 unless those of V are near 0. No gradient flows through L: it is only a choice
    of basis, and `reflect` does not depend on it to first order.

    Args:
        vectors: V, `(n, rank)`, float32 or float64, of any size: its scale does not matter. Zeros give zeros.

    Returns:
        Tensor of the same shape and dtype.

    Example:

    >>> factor = _orthonormal_factor(ops.array([[3.0, 3.0], [0.0, 4.0], [0.0, 0.0]]))
    >>> (abs(ops.convert_to_numpy(factor)).round(4) + 0.0).tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]

    Reference:
        Golub and Van Loan, *Matrix Computations*, section 5.1; BRO, Lai et al., ICML 2025 (arXiv 2505.15174).
    """
    rank = vectors.shape[-1]
    # With the largest entry at 1, no square that matters underflows; the result is the same for every scale.
    v = vectors / ops.stop_gradient(_at_least(ops.max(ops.abs(vectors)), SMALLEST_DIVISOR))
    v = v / ops.sqrt(_at_least(ops.sum(ops.square(v), axis=0, keepdims=True), _SMALLEST**2))
    identity = ops.eye(rank, dtype=v.dtype)
    gram = ops.stop_gradient(ops.transpose(v) @ v)
    # NaN stays in V and is not factored, which PyTorch and TensorFlow would answer with an error of their own.
    gram = ops.where(ops.isfinite(gram), gram, identity) + _RIDGE * rank * identity
    inverse = ops.solve_triangular(ops.cholesky(gram), identity, lower=True)
    return _at_most_root_two(v @ ops.transpose(ops.stop_gradient(inverse)))


def _at_most_root_two(factor: Tensor) -> Tensor:
    """Y, or, where its norm could exceed the root of 2, a multiple of it that does not: `reflect` wants no more.

    That happens where float32 loses more of `V^T V` than the ridge adds: with one large entry and thousands of small
    ones in nearly equal columns. The norm of `G = Y^T Y` is at most `1 + |G - I|_F`, which settles it where columns of
    V are not nearly dependent; and at most `|G^8|_F^(1/8)`, here in halves, so that no power leaves the range of
    float32. A right Y stays as it is, bit by bit.

    Example:

    >>> round(float(_at_most_root_two(ops.array([[1.0], [3.0]]))[1, 0]), 3)
    1.308
    """
    gram = ops.stop_gradient(ops.transpose(factor) @ factor)
    deviation = ops.sqrt(ops.sum(ops.square(gram - ops.eye(gram.shape[-1], dtype=gram.dtype))))
    one = ops.ones_like(deviation)

    def scale() -> Tensor:
        power = 0.5 * gram
        for _ in range(3):
            power = power @ power
        total = ops.sum(ops.square(power))  # at least the 16th power of half the squared norm
        root = total
        for _ in range(4):
            root = ops.sqrt(root)
        too_large = total > 0.95**16
        return ops.where(too_large, ops.sqrt(0.95 / ops.where(too_large, root, one)), one)

    return factor * branch(deviation > 0.9, scale, lambda: one)


def _reflect(x: Tensor, factor: Tensor, units: int) -> Tensor:
    """`x - 2 P x` with `P = Y (2 I - Y^T Y) Y^T`, for vectors continued by zeros or cut to `units` entries.

    For every Y of norm at most `sqrt 2`, P has eigenvalues in [0, 1], so that the norm of the result is at most that of
    x; for orthonormal columns it is equal to it where nothing is cut. The factor 2 I - Y^T Y makes P stationary in
    what Y lacks in orthonormality: P and its gradient are those of the projection onto the range of Y.

    Args:
        x: `(batch, ..., inputs)`.
        factor: Y, `(max(inputs, units), rank)`, of the same dtype.
        units: entries of the result.

    Returns:
        Tensor `(batch, ..., units)`.

    Example:

    >>> ops.convert_to_numpy(_reflect(ops.array([[3.0, 4.0]]), ops.array([[1.0], [0.0]]), 2)).tolist()
    [[-3.0, 4.0]]
    """
    inputs, rank = x.shape[-1], factor.shape[-1]
    middle = 2.0 * ops.eye(rank, dtype=factor.dtype) - ops.transpose(factor) @ factor
    moved = x @ factor[:inputs] @ (2.0 * middle) @ ops.transpose(factor[:units])
    if inputs < units:
        x = ops.pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, units - inputs)])
    return x[..., :units] - moved


@registered
class ReflectorDense(ComposedKernel, keras.layers.Dense):
    """A dense layer whose kernel is a block reflector: orthonormal for every weight, with nothing to project.

    The kernel is `I - 2 V (V^T V + eps I)^-1 V^T`, which reflects the range of V, padded with zeros or cut to
    `(inputs, units)`. Its norm is at most 1 whatever V is, so that any optimizer may move V in any way. With n inputs
    and units a step costs `12 n rank` operations per sample and about `20 n rank^2` for V, in place of `6 n^2` and
    `4 n^3` for `LipschitzDense`: for a quarter of n about as much as a plain layer at batch 128, and less above.
    Inputs behind the first `units` only pass through V, so that a layer that shrinks much, such as the first one, is
    better a `LipschitzDense`.

    Args:
        units: outputs, at least 1.
        rank: columns of V, from 1 to `max(inputs, units)`; by default a quarter of that. More of them can turn more
            directions.
        **kwargs: of `keras.layers.Dense`, such as `activation`, `use_bias` and `kernel_initializer` (of V).

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    Raises:
        ValueError: for a rank that is not in this range, for `kernel_constraint`, for LoRA and quantization.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.ReflectorDense(8, rank=2)
    >>> y = layer(np.ones((2, 8), "float32"))
    >>> bool(hkr.lipschitz_bound(layer) < 1 + 1e-6)
    True

    Reference:
        Lai et al., ICML 2025 (arXiv 2505.15174), for block reflectors as layers.
    """

    vectors: Any

    def __init__(self, units: int, rank: int | None = None, **kwargs: Any) -> None:
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ValueError(f"Expected the rank to be an integer of at least 1, or None. Received: rank={rank}")
        super().__init__(units, **kwargs)
        self.rank = rank
        if self.kernel_constraint is not None:
            raise ValueError(
                "Expected no constraint: the kernel has a norm of at most 1 for every weight. "
                f"Received: kernel_constraint={self.kernel_constraint}"
            )

    def add_weight(
        self, *args: Any, name: str | None = None, shape: Any = None, regularizer: Any = None, **kwargs: Any
    ) -> Any:
        if name != "kernel":
            return super().add_weight(*args, name=name, shape=shape, regularizer=regularizer, **kwargs)
        size = max(shape)
        rank = max(1, size // 4) if self.rank is None else self.rank
        if rank > size:
            raise ValueError(
                f"Expected a rank of at most {size}, the larger of inputs and units of '{self.name}'. "
                f"Received: rank={rank}"
            )
        self._inputs = shape[0]
        self.vectors = super().add_weight(*args, name="vectors", shape=(size, rank), **{**kwargs, "autocast": False})
        return self.vectors

    def compose(self) -> Tensor:
        factor = _orthonormal_factor(at_least_float32(self.vectors))
        return _reflect(_SHRINK * ops.eye(self._inputs, dtype=factor.dtype), factor, self.units)

    def call(self, inputs: Tensor) -> Tensor:
        if self.kernel_regularizer is not None:
            self.add_loss(self.kernel_regularizer(self.kernel))
        factor = ops.cast(_orthonormal_factor(at_least_float32(self.vectors)), self.compute_dtype)
        outputs = _reflect(_SHRINK * inputs, factor, self.units)
        outputs = outputs + self.bias if self.use_bias else outputs
        return outputs if self.activation is None else self.activation(outputs)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rank": self.rank}


@weight_geometries.register(ReflectorDense)
def _(layer: ReflectorDense) -> dict[str, Geometry]:
    return {}  # nothing to project
