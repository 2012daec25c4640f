"""How far a kernel that float32 composes in any compiled form can be from the one that is composed here and now.

Each composition is done once more in float64, and beside it runs a bound on what float32 may do otherwise: sums in any
order, products fused or not. Bounds are of operators, at all frequencies: two-tap convolutions and rescalings do not
enlarge errors, which bounds of single numbers would not know.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from hkr_keras import layers
from hkr_keras.certification.floating_point import UNIT_ROUNDOFF, accumulated, sum_error
from hkr_keras.certification.operators import Matrix
from hkr_keras.certification.singular_values import as_float64, matrix_spectrum
from hkr_keras.layers.orthogonal import GRID, two_tap_steps

__all__ = ["Reflector", "composition_error", "product_error", "reflector", "reflector_operator"]

_FLUSHED = 1e-28  # far above what flushed subnormal numbers of any kernel amount to
_u = UNIT_ROUNDOFF
_LOW = 0.5 / GRID


def _norm(matrices: np.ndarray) -> float:
    return matrix_spectrum(matrices).bound


def product_error(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bound on what float32 may be off by in every entry of a product of matrices, whatever the order of its sums.

    Example:

    >>> round(float(product_error(np.ones((1, 1)), np.ones((1, 1)))[0, 0]) * 2**24, 6)
    2.0
    """
    of_sizes, of_sums = sum_error(left.shape[-1])
    return (of_sizes * (np.abs(left) @ np.abs(right)) + of_sums * np.abs(left @ right)) * (1 + 1e-9)


def _split_product_error(left: np.ndarray, right: np.ndarray, slack: float = 0.0) -> np.ndarray:
    """The same for products of split matrices, in which float32 has the sums of the high parts exactly.

    What is left of a number is at most `_LOW`, so that the other sums are of so little. The three sums count as if they
    were added in the worst order, which rounds twice. `slack`: what rows and columns may be longer by than those given.
    """
    terms = left.shape[-1]
    of_sizes, of_sums = sum_error(terms)
    low = _LOW * (np.abs(left).sum(axis=-1)[..., None] + np.abs(right).sum(axis=-2)[..., None, :] + terms * _LOW)
    error = (of_sizes + of_sums + 4 * _u) * low + 2 * _u * np.abs(left @ right)
    longest = [float(np.sqrt((part**2).sum(axis=axis)).max()) for part, axis in ((left, -1), (right, -2))]
    if math.prod(length + _LOW * math.sqrt(terms) + slack for length in longest) > 3.99:
        error = error + product_error(np.abs(left) + _LOW, np.abs(right) + _LOW)
    return error * (1 + 1e-6)


@functools.singledispatch
def composition_error(layer: Any) -> float:
    """Bound on the norm of the operator of (any float32 composition minus `layer.kernel`).

    Raises:
        ValueError: for a class whose composition is not known here, or weights for which nothing can be said.

    Example:

    >>> layer = layers.OrthogonalConv1D(4, 3)
    >>> layer.build((None, 8, 4))
    >>> 0 < composition_error(layer) < 1e-5
    True
    """
    raise ValueError(
        "Expected layers that store the kernel they compute with, for a rigorous certificate: the rounding of a kernel "
        "that is composed in the forward pass is not bounded. Certify hkr_keras.to_keras(model, kernels_only=True), "
        f"which stores it and has equal outputs. Received: layer={type(layer).__name__} '{layer.name}'"
    )


# ---- orthogonal convolutions ----------------------------------------------------------------------------


def _strided(kernel: np.ndarray, strides: Any) -> float:
    """Upper bound on the norm, at all frequencies, of kernels `(groups, inputs, *window, outputs)` of that size."""
    rank = kernel.ndim - 3
    kernel = np.abs(kernel)
    widths = [(0, -k % s) for k, s in zip(kernel.shape[2:-1], strides, strict=True)]
    padded = np.pad(kernel, [(0, 0), (0, 0), *widths, (0, 0)])
    split = [size for k, s in zip(padded.shape[2:-1], strides, strict=True) for size in (k // s, s)]
    phases = padded.reshape(*padded.shape[:2], *split, padded.shape[-1]).sum(axis=tuple(range(2, 2 + 2 * rank, 2)))
    return _norm(phases.reshape(len(phases), -1, phases.shape[-1]))  # a tap r + s q goes to phase r


@composition_error.register(layers.OrthogonalConv1D)
@composition_error.register(layers.OrthogonalConv2D)
@composition_error.register(layers.OrthogonalConv1DTranspose)
@composition_error.register(layers.OrthogonalConv2DTranspose)
def _orthogonal(layer: Any) -> float:
    """A step `T_P K = P K + z (I - P) K` has `|T_P| <= 1`, and `T_P' - T_P = (P' - P)(1 - z)`."""
    strides, groups, rank = layer.strides, layer.groups, len(layer.strides)
    mixing = as_float64(layer.mixing)
    channels, filters = mixing.shape[-2:]
    kernel = mixing.reshape(*strides, channels, groups, filters // groups)
    kernel = kernel.transpose(rank + 1, rank, *range(rank), rank + 2)
    steps = two_tap_steps(layer.kernel_size, strides)
    bases = None
    if layer.bases is not None:
        bases = as_float64(layer.bases).transpose(1, 0, 2).reshape(len(steps), groups, channels, -1)
    whole = kernel.transpose(0, 2, 1, *range(3, rank + 3)) if rank == 1 else kernel.transpose(0, 2, 3, 1, 4)
    norm, error = _norm(whole.reshape(groups, -1, filters // groups)), 0.0
    for step, (axis, flipped) in enumerate(steps):
        base = np.zeros((groups, channels, 1)) if bases is None else bases[step]
        projection = base @ np.swapaxes(base, -1, -2)
        off = _norm(_split_product_error(base, np.swapaxes(base, -1, -2)))
        flat = kernel.reshape(groups, channels, -1)
        kept = (projection @ flat).reshape(kernel.shape)
        moved = kernel - kept
        first, second = (moved, kept) if flipped else (kept, moved)
        before, after = ([(0, 0)] * kernel.ndim for _ in range(2))
        before[axis + 2], after[axis + 2] = (1, 0), (0, 1)
        new = np.pad(first, after) + np.pad(second, before)
        # What the entries of the kernel and of P may be off by meets the rounding of this step once more.
        taps, outputs = math.prod(kernel.shape[2:-1]), kernel.shape[-1]
        sizes = taps * math.sqrt(min(channels, outputs)) * error
        absolute, wide = _norm(np.abs(projection)), _strided(kernel, strides)
        again = off * (wide + sizes) + absolute * sizes
        again += _LOW * (channels * sizes + taps * math.sqrt(channels * outputs) * off)
        rounded = _strided(_split_product_error(projection, flat, off + sizes).reshape(kernel.shape), strides)
        rounded += (1.1 * channels + 8) * _u * again
        sums = _u * (_strided(moved, strides) + _strided(new, strides) + 4 * (sizes + again + rounded))
        growth = max(1.0, 2 * _norm(base) ** 2 - 1)
        error = error * (growth + 2 * off) + 2 * off * norm + 2 * rounded + sums
        norm, kernel = norm * growth, new
    kernel = kernel[:, : layer.kernel.shape[-2]]
    error += 2 * _u * (_strided(kernel, strides) + error)
    shrunk = (1.0 - 2.0**-18) * kernel
    present = as_float64(layer.kernel)
    present = present.reshape(*present.shape[:-1], groups, -1)
    present = present.transpose(rank + 1, rank, *range(rank), rank + 2)
    return _checked(layer, error, _strided(present - shrunk, strides))


def _checked(layer: Any, error: float, difference: float) -> float:
    """Two compositions are within the error of the one in float64 each."""
    if not error < 0.1 or difference > 1.01 * error + _FLUSHED:
        raise ValueError(
            "Expected weights whose kernel float32 composes as float64 does, for a rigorous certificate. Received: "
            f"{type(layer).__name__} '{layer.name}', whose kernel differs by {difference:.3g} where {error:.3g} is "
            "allowed"
        )
    return (error + difference) * (1 + 1e-6) + _FLUSHED


# ---- almost orthogonal layers ---------------------------------------------------------------------------


@composition_error.register(layers.AOLDense)
@composition_error.register(layers.AOLConv2D)
@composition_error.register(layers.SLLDense)
@composition_error.register(layers.SLLConv2D)
def _almost_orthogonal(layer: Any) -> float:
    """A relative error of each entry, and one of each channel, which is what its scale is off by."""
    strides = tuple(layer.strides)
    taps = _phases(as_float64(layer.unscaled), strides)
    window = taps.shape[:-2]
    by_inputs = taps.shape[-2] < taps.shape[-1]
    if by_inputs:
        taps = np.swapaxes(taps, -1, -2)
    flat = taps.reshape(-1, taps.shape[-1])
    terms, moves = len(flat), math.prod(2 * k - 1 for k in window)
    flat = flat / max(np.abs(flat).max(), 1e-30)
    norms = np.sqrt(np.maximum((flat**2).sum(axis=0), 1e-12))
    entry = 6 * _u  # of each number, relative, after both divisions
    scale = accumulated(terms + 20)  # of the norms, relative: all terms are positive
    unit = (flat / norms).reshape(*window, -1, flat.shape[1])
    sums = np.abs(unit).sum(axis=tuple(range(len(window))))
    largest = sums.T @ sums  # of the absolute autocorrelation, if no signs cancelled
    correlation = _correlations(unit)
    dominant = np.maximum(correlation @ norms, norms)
    rounding = terms * _u * (0.5 + accumulated(terms + 2)) * (largest + correlation) + (3 * entry) * largest
    of_dominant = rounding @ norms / dominant + 3 * scale + accumulated(moves + flat.shape[1] + 20)
    of_channels = 1.01 * (scale + 0.5 * (scale + float(of_dominant.max()))) + 12 * _u
    result = unit * np.sqrt(norms / dominant)
    result = np.swapaxes(result, -1, -2) if by_inputs else result
    ones = (1,) * len(window)
    absolute = _strided(np.moveaxis(result[None], -2, 1), ones)
    error = 1.01 * of_channels * 1.0001 + 3 * entry * absolute
    if of_channels > 1e-3:
        raise ValueError(
            "Expected fewer or smaller channels in a layer that composes its kernel, for a rigorous certificate. "
            f"Received: {layer.name}, whose channels may be off by {of_channels:.3g}"
        )
    present = _phases(as_float64(layer.kernel), strides)
    return _checked(layer, error, _strided(np.moveaxis((present - result)[None], -2, 1), ones))


def _correlations(taps: np.ndarray) -> np.ndarray:
    """`sum over moves of |<K_i, K_j moved>|`, `(channels, channels)`, of taps `(*window, inputs, channels)`."""
    window = taps.shape[:-2]
    found = np.zeros((taps.shape[-1],) * 2)
    for move in np.ndindex(*(2 * k - 1 for k in window)):
        shift = [m - k + 1 for m, k in zip(move, window, strict=True)]
        here = tuple(slice(max(0, -s), k - max(0, s)) for s, k in zip(shift, window, strict=True))
        there = tuple(slice(max(0, s), k - max(0, -s)) for s, k in zip(shift, window, strict=True))
        left, right = (taps[part].reshape(-1, taps.shape[-1]) for part in (here, there))
        found += np.abs(left.T @ right)
    return found


def _phases(kernel: np.ndarray, strides: tuple[int, ...]) -> np.ndarray:
    """The kernel of the equivalent convolution with stride 1, `(*window, phases * inputs, outputs)`."""
    if math.prod(strides) == 1:
        return kernel
    rank, (*window, inputs, outputs) = len(strides), kernel.shape
    padded = np.pad(kernel, [*((0, -k % s) for k, s in zip(window, strides, strict=True)), (0, 0), (0, 0)])
    split = [size for k, s in zip(window, strides, strict=True) for size in (-(-k // s), s)]
    turned = padded.reshape(*split, inputs, outputs).transpose(
        *range(0, 2 * rank, 2), *range(1, 2 * rank, 2), 2 * rank, 2 * rank + 1
    )
    return turned.reshape(*split[::2], -1, outputs)


# ---- block reflectors -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reflector:
    """What is known of the factor Y and of `P = Y (2 I - Y^T Y) Y^T` of a `ReflectorDense`.

    Args:
        factor: Y, float64.
        kernel: of the layer, float64.
        near: bound on the norm of what Y may be off by in float32.
        sensitivity: what an error of the Cholesky factor may change of P: much, for vectors that are nearly dependent.
        error: bound on what P may be off by in float32.
    """

    factor: np.ndarray
    kernel: np.ndarray
    near: float
    sensitivity: float
    error: float


def reflector(layer: Any) -> Reflector:
    """What float32 may make of the factors of a `ReflectorDense`.

    P hardly depends on the Cholesky factor L of `V^T V + eps I`: with `S = Y Y^T` on the range of V, it is `2 S - S^2`,
    so that an error D of S counts `|D| (2 |I - S| + |D|)`; and what Y is off by across the range of V counts once.
    """
    vectors = as_float64(layer.vectors)
    size, rank = vectors.shape
    v = vectors / max(np.abs(vectors).max(), 1e-30)
    v = v / np.sqrt(np.maximum((v**2).sum(axis=0), 1e-12))
    epsilon = float(np.float32(1e-6)) * rank
    gram = v.T @ v
    lower = np.linalg.cholesky(gram + epsilon * np.eye(rank))
    inverse = np.linalg.inv(lower)
    factor = v @ inverse.T
    entry, gamma = 8 * _u, accumulated(4 * (rank + 8))  # twice and more what is known of Cholesky and substitution
    least = 1 / _norm(inverse) ** 2  # the smallest eigenvalue that was factored
    of_gram = _norm(product_error(v.T, v)) + 2 * entry * _norm(np.abs(v).T @ np.abs(v)) + 4 * _u * (1 + epsilon)
    of_gram += gamma * float(np.trace(gram) + epsilon * rank)  # | |L| |L^T| | is at most the trace
    turned = gamma * _norm(np.abs(inverse) @ np.abs(lower)) ** 2  # (I + R) L^-1 with |R| at most this
    apart = min(1.0, epsilon / least)  # |I - S|, in exact arithmetic
    inner = 1.1 * (of_gram / least + 2 * turned + turned**2) + 3 * accumulated(size + 20) * apart
    near = math.sqrt(rank) * of_gram / least + turned
    across = (1.1 + math.sqrt(rank) * near) * _norm(product_error(v, inverse.T))
    across += 1.1 * entry * _norm(np.abs(v)) * _norm(inverse)
    sensitivity = inner * (2 * apart + inner)
    known = of_gram / least <= 0.01 and turned <= 0.01
    error = sensitivity + across * (1 + 4 * (apart + inner)) + 6 * across**2 if known else math.inf
    kernel = np.eye(size) - 2 * factor @ (2 * np.eye(rank) - factor.T @ factor) @ factor.T
    kernel = (1.0 - 2.0**-18) * kernel[: layer.kernel.shape[0], : layer.units]
    return Reflector(
        factor=factor, kernel=kernel, near=across + near, sensitivity=min(sensitivity, 1.0), error=error + _FLUSHED
    )


def reflector_operator(layer: Any) -> Matrix:
    """The kernel as it was composed here, within what other programs may make of nearly dependent vectors.

    Its norm is at most 1 for any factor Y of norm at most the root of 2, which the layer sees to: P then has its
    eigenvalues in [0, 1]. Rounding may leave a little more here.
    """
    found, present = reflector(layer), as_float64(layer.kernel)
    error = _norm(present - found.kernel) + 2 * found.sensitivity
    return Matrix(present, error * (1 + 1e-6) + _FLUSHED, limit=max(1.0, _norm(present)))


@composition_error.register(layers.ReflectorDense)
def _reflector(layer: Any) -> float:
    found = reflector(layer)
    if math.isinf(found.error):
        raise ValueError(
            "Expected vectors that are not nearly dependent, for a rigorous certificate; "
            "hkr_keras.to_keras(model, kernels_only=True) stores the kernel. "
            f"Received: {type(layer).__name__} '{layer.name}', whose kernel depends on how its vectors are rounded"
        )
    return (2 * found.error + _norm(as_float64(layer.kernel) - found.kernel)) * (1 + 1e-6) + _FLUSHED
