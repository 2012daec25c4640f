"""Projections of matrices: tensors in, tensors out, `keras.ops` only.

Every function takes matrices of shape `(..., rows, columns)` with static `rows` and `columns`,
computes in float32 (or float64 when given float64) and returns the dtype it was given. The iteration
counts are fixed, so that all of them compile.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from hkr_keras._backends.compiling import branch, is_traced

__all__ = [
    "newton_schulz",
    "orthonormal_basis",
    "polar_direction",
    "spectral_ball",
    "spectral_norm_bound",
    "tangent",
    "unit_norm",
]

Tensor = Any

SMALLEST_DIVISOR = 1e-30  # keeps 0 / 0 at 0; far below any weight whose square is a normal float32
_NEAR = 1.5  # squares of norms up to here need no scaling: the cubic takes 1.22 to 0.92


def _working_dtype(tensor: Tensor) -> str:
    dtype = str(ops.dtype(tensor))
    return dtype if dtype in ("float32", "float64") else "float32"


def _norm(tensor: Tensor, axis: Any) -> Tensor:
    return ops.sqrt(ops.sum(ops.square(tensor), axis=axis, keepdims=True))


def _matrix_norm(matrices: Tensor) -> Tensor:
    """Frobenius norms, `(..., 1, 1)`."""
    return _norm(matrices, axis=(-2, -1))


def unit_norm(tensor: Tensor, axis: Any = -2) -> Tensor:
    """Scales every vector along `axis` to Euclidean norm 1.

    Solves `min |u - w|` subject to `|u| = 1`. A vector of zeros stays zero.

    Args:
        tensor: floating point tensor of any shape.
        axis: axis or axes along which one vector runs.

    Returns:
        Tensor of the same shape and dtype.

    Example:

    >>> from keras import ops
    >>> ops.convert_to_numpy(unit_norm(ops.array([[3.0], [4.0]]))).round(3).tolist()
    [[0.6000000238418579], [0.800000011920929]]
    """
    vectors = ops.cast(tensor, _working_dtype(tensor))
    # Dividing by the largest entry first keeps the squares from overflowing or vanishing.
    largest = ops.max(ops.abs(vectors), axis=axis, keepdims=True)
    vectors = vectors / ops.maximum(largest, SMALLEST_DIVISOR)
    vectors = vectors / ops.maximum(_norm(vectors, axis), SMALLEST_DIVISOR)
    return ops.cast(vectors, tensor.dtype)


def newton_schulz(matrices: Tensor, steps: int = 1) -> Tensor:
    """Moves matrices towards the nearest orthonormal ones, and never leaves a norm above 1.

    `steps` iterations of `W <- 1.5 W - 0.5 W W^T W` towards the solution of `min |Q - W|_F` subject to
    `Q^T Q = I` (or `Q Q^T = I` when there are fewer rows than columns). The cubic maps singular values in
    `[0, 2]` into `[-1, 1]` and turns a deviation d from 1 into 1.5 d^2. Two guards scale a matrix down first:

    - for soundness, until a proven bound on its norm is at most 2, so that the norm of the result is at most 1
      (up to rounding, 4e-7 in float32) for every finite input and every `steps >= 1`;
    - for quality, by an estimate of its norm when that is above 1, since the cubic shrinks what is well above 1
      and would wipe out the very direction in which the last step went.

    Where the bound is at most 1.22, as after the small steps of a training, neither is needed nor computed.

    Args:
        matrices: floating point tensor `(..., rows, columns)`.
        steps: number of iterations, at least 1. One is enough after an optimizer step.

    Returns:
        Tensor of the same shape and dtype. Zero matrices stay zero; NaN stays NaN.

    Example:

    >>> from keras import ops
    >>> ops.convert_to_numpy(newton_schulz(2 * ops.eye(2), steps=5)).round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    Reference:
        Björck and Bowie, SIAM J. Numer. Anal. 8 (1971), eq. 1.1; Anil et al., ICML 2019.
    """
    rows, columns = matrices.shape[-2:]
    if min(rows, columns) == 1:  # the projection in closed form
        return unit_norm(matrices, axis=(-2, -1))
    w = ops.cast(matrices, _working_dtype(matrices))
    wide = rows < columns
    w = w / ops.maximum(ops.max(ops.abs(w), axis=(-2, -1), keepdims=True), 1.0)  # the squares cannot overflow
    identity = ops.eye(min(rows, columns), dtype=w.dtype)
    for _ in range(steps):
        transposed = ops.swapaxes(w, -1, -2)
        gram = ops.matmul(w, transposed) if wide else ops.matmul(transposed, w)
        residual = identity - gram
        near = 1.0 + _matrix_norm(residual)  # at least the square of the norm
        scaled, kept = functools.partial(_scale, gram, residual, near), functools.partial(ops.ones_like, near)
        scale = branch(ops.any(near > _NEAR), scaled, kept)
        residual = identity - scale * gram
        correction = ops.matmul(residual, w) if wide else ops.matmul(w, residual)
        w = ops.sqrt(scale) * (w + 0.5 * correction)
    return ops.cast(w, matrices.dtype)


def _scale(gram: Tensor, residual: Tensor, near: Tensor) -> Tensor:
    """By what to scale `G = W^T W` down, at most 1: until its norm is proven to be at most 4, and estimated to be 1.

    The proof is `1 + |G - I|_F`, and after a wild step the smallest of three bounds.
    """

    def smallest() -> Any:
        fourth_power = _matrix_norm(ops.matmul(residual, residual))  # |G - I|^2 is at most this
        return ops.minimum(ops.minimum(near, _matrix_norm(gram)), 1.0 + ops.sqrt(fourth_power))

    proven = ops.maximum(branch(ops.any(near > 4.0), smallest, lambda: near), 4.0)
    estimate = ops.maximum(_largest_eigenvalue_estimate(gram), 1.0)
    return ops.where(near > _NEAR, ops.minimum(4.0 / proven, 1.0 / estimate), 1.0)  # others of a batch do not count


def _largest_eigenvalue_estimate(gram: Tensor) -> Tensor:
    """Four power iterations from a fixed vector: an estimate from below, so for quality and never for a bound."""
    start = np.cos(np.arange(gram.shape[-1]) * 2.4)[:, None]
    v = ops.matmul(gram, ops.convert_to_tensor(start, dtype=gram.dtype))
    for _ in range(4):
        v = ops.matmul(gram, v / ops.maximum(_matrix_norm(v), SMALLEST_DIVISOR))
    return _matrix_norm(v)


def orthonormal_basis(matrices: Tensor) -> Tensor:
    """Replaces matrices by orthonormal ones that span the same columns (or rows, when those are fewer).

    The Q factor of a QR decomposition with a positive diagonal in R. Unlike the iteration it works for
    rank-deficient matrices too, and on random ones it is as uniform as the usual orthogonal initializer.

    Args:
        matrices: floating point tensor `(..., rows, columns)`.

    Returns:
        Tensor of the same shape and dtype.

    Example:

    >>> from keras import ops
    >>> (ops.convert_to_numpy(orthonormal_basis(3 * ops.eye(2))) + 0.0).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    Reference:
        Saxe et al., ICLR 2014.
    """
    wide = matrices.shape[-2] < matrices.shape[-1]
    w = ops.cast(matrices, _working_dtype(matrices))
    if is_traced(w):
        q, r = ops.qr(ops.swapaxes(w, -1, -2) if wide else w)
        signs = ops.where(ops.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
        q = newton_schulz(q * ops.expand_dims(signs, -2))
        return ops.cast(ops.swapaxes(q, -1, -2) if wide else q, matrices.dtype)
    # With values at hand: float64 on the host, and nothing to compile for every new shape.
    values = np.asarray(ops.convert_to_numpy(w), dtype=np.float64)
    q, r = np.linalg.qr(values.swapaxes(-1, -2) if wide else values)
    q = q * np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]
    return ops.convert_to_tensor(q.swapaxes(-1, -2) if wide else q, dtype=matrices.dtype)


def spectral_norm_bound(matrices: Tensor, squarings: int = 6) -> Tensor:
    """An upper bound on the largest singular value, by Gram iteration.

    `|W| <= |(W^T W)^(2^t)|_F^(1 / 2^(t+1))` for every t; the slack is at most `rank^(1 / 2^(t+2))`, that is
    2.5 % for rank 512 and the default. A margin of 1e-5 covers the rounding of float32.

    Args:
        matrices: floating point tensor `(..., rows, columns)`.
        squarings: how often the Gram matrix is squared.

    Returns:
        Tensor `(..., 1, 1)` in the working dtype.

    Example:

    >>> from keras import ops
    >>> float(spectral_norm_bound(2 * ops.eye(2))[0, 0]) >= 2
    True

    Reference:
        Delattre et al., ICML 2023 (arXiv 2305.16173), theorem 1.
    """
    w = ops.cast(matrices, _working_dtype(matrices))
    largest = ops.maximum(ops.max(ops.abs(w), axis=(-2, -1), keepdims=True), SMALLEST_DIVISOR)
    w = w / largest
    transposed = ops.swapaxes(w, -1, -2)
    gram = ops.matmul(w, transposed) if w.shape[-2] < w.shape[-1] else ops.matmul(transposed, w)
    # invariant: |W|^2 <= largest^2 * root * |gram|_F^(1 / power)
    log_bound, power = 0.0, 1.0
    for _ in range(squarings):
        size = ops.maximum(_matrix_norm(gram), SMALLEST_DIVISOR)
        log_bound = log_bound + ops.log(size) / power
        gram = ops.matmul(gram / size, gram / size)
        power *= 2.0
    size = ops.maximum(_matrix_norm(gram), SMALLEST_DIVISOR)
    return (1.0 + 1e-5) * largest * ops.exp(0.5 * (log_bound + ops.log(size) / power))


def spectral_ball(matrices: Tensor) -> Tensor:
    """Scales matrices down until their norm is at most 1, and leaves them alone when it is already.

    `W / max(1, bound)` with the upper bound of `spectral_norm_bound`. No singular value is pulled up.

    Args:
        matrices: floating point tensor `(..., rows, columns)`.

    Returns:
        Tensor of the same shape and dtype.

    Example:

    >>> from keras import ops
    >>> ops.convert_to_numpy(spectral_ball(0.5 * ops.eye(2))).tolist()
    [[0.5, 0.0], [0.0, 0.5]]

    Reference:
        Gouk et al., Machine Learning 110 (2021), eq. 9.
    """
    w = ops.cast(matrices, _working_dtype(matrices))
    return ops.cast(w / ops.maximum(spectral_norm_bound(w), 1.0), matrices.dtype)


def tangent(matrices: Tensor, gradients: Tensor) -> Tensor:
    """The part of a gradient along the set of orthonormal matrices: it rotates them and leaves their norms.

    `G - W sym(W^T G)` for orthonormal columns, `G - sym(G W^T) W` for orthonormal rows: the nearest Z to G
    for which `W^T Z` (or `Z W^T`) is skew.

    Args:
        matrices: orthonormal, `(..., rows, columns)`.
        gradients: tensor of the same shape and dtype.

    Returns:
        Tensor of the same shape and dtype.

    Example:

    >>> from keras import ops
    >>> float(ops.max(ops.abs(tangent(ops.eye(2), 3 * ops.eye(2)))))
    0.0

    Reference:
        Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20 (1998), eq. 2.4.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        return ops.swapaxes(tangent(ops.swapaxes(matrices, -1, -2), ops.swapaxes(gradients, -1, -2)), -1, -2)
    product = ops.matmul(ops.swapaxes(matrices, -1, -2), gradients)
    return gradients - ops.matmul(matrices, 0.5 * (product + ops.swapaxes(product, -1, -2)))


_FIVE_STEPS = ((3.4445, -4.775, 2.0315),) * 5
_THREE_STEPS = ((3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))


def polar_direction(matrices: Tensor, coefficients: Sequence[tuple[float, float, float]] = _FIVE_STEPS) -> Tensor:
    """Roughly the nearest orthonormal matrices, from any start: all singular values that count end in [0.6, 1.3].

    A quintic iteration that trades precision for speed: it is for directions of a step, never for kernels, since it
    ends above 1.

    Args:
        matrices: floating point tensor `(..., rows, columns)`.
        coefficients: of `a x + b x^3 + c x^5`, for each iteration; the five of the default lift singular values from
            1/500 of the largest.

    Returns:
        Tensor of the same shape and dtype. Zero matrices stay zero.

    Example:

    >>> from keras import ops
    >>> bool(ops.all(ops.abs(polar_direction(ops.diag([9.0, 0.1])) - ops.eye(2)) < 0.4))
    True

    Reference:
        Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024, for the coefficients.
    """
    w = ops.cast(matrices, _working_dtype(matrices))
    wide = w.shape[-2] < w.shape[-1]
    w = ops.swapaxes(w, -1, -2) if wide else w
    w = w / ops.maximum(ops.max(ops.abs(w), axis=(-2, -1), keepdims=True), SMALLEST_DIVISOR)
    w = w / ops.maximum(_matrix_norm(w), SMALLEST_DIVISOR)
    for first, third, fifth in coefficients:
        gram = ops.matmul(ops.swapaxes(w, -1, -2), w)
        w = first * w + ops.matmul(w, fifth * ops.matmul(gram, gram) + third * gram)
    return ops.cast(ops.swapaxes(w, -1, -2) if wide else w, matrices.dtype)


def turned(matrices: Tensor, directions: Tensor, angle: Tensor, block: int) -> Tensor:
    """Turns blocks of rows of matrices against a direction: a product with orthonormal matrices, so norms stay.

    Each `block` rows W with direction D become `R W`, where R is the projection of `I - angle Q` and Q nearly the
    nearest orthonormal matrix to the skew part of `D W^T`. For a set of all rows that is every way in which an
    orthonormal W can turn; a block turns them among themselves, for a fraction `block / rows` of the operations and,
    for R itself, `(block / rows)^2`. Rows that are left over stay.

    Args:
        matrices: `(..., rows, columns)`, of norm at most 1.
        directions: tensor of the same shape and dtype, such as gradients with momentum.
        angle: a scalar tensor; of the turn, roughly in radians when small.
        block: rows in a block.

    Returns:
        Tensor of the same shape and dtype, whose norm is at most that of `matrices`, up to rounding.

    Example:

    >>> result = turned(ops.eye(2), ops.array([[0.0, 1.0], [-1.0, 0.0]]), 0.01, block=2)
    >>> bool(0.005 < float(result[1, 0]) < 0.015), bool(abs(float(result[0, 0]) - 1) < 1e-3)
    (True, True)
    """
    *first, rows, columns = matrices.shape
    whole = rows // block * block
    shape = (*first, rows // block, block, columns)
    w = ops.reshape(matrices[..., :whole, :], shape)
    product = ops.matmul(ops.reshape(directions[..., :whole, :], shape), ops.swapaxes(w, -1, -2))
    turn = polar_direction(product - ops.swapaxes(product, -1, -2), _THREE_STEPS)
    w = ops.matmul(newton_schulz(ops.eye(block, dtype=w.dtype) - angle * turn), w)
    w = ops.reshape(w, (*first, whole, columns))
    return w if whole == rows else ops.concatenate([w, matrices[..., whole:, :]], axis=-2)
