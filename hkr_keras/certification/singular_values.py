"""Norms and singular values of kernels: on the host, in float64, from the stored weights.

A bound here is proven: it is inflated by what float64 can have rounded away. What is called `largest` or
`smallest` was found, so it is an estimate from inside the spectrum.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import keras
import numpy as np
from keras import ops

from hkr_keras.geometry import Geometry, kernel_geometries, overlap

MACHINE_EPSILON = float(np.finfo(np.float64).eps)

_SLACK = 2e-4  # of the eigenvalues between the points where they are computed
_CHUNK = 2**25  # bytes of Gram matrices held at a time
_BUDGET = 6e10  # floating-point operations that one kernel may cost
_SMALL = 16  # order below which eigenvalues cost no more than a Cholesky factor


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Singular values of a linear operator: the smallest and largest found, and a proven upper bound."""

    smallest: float
    largest: float
    bound: float


def as_float64(variable) -> np.ndarray:
    """Weights as float64 on the host.

    Raises:
        ValueError: for NaN or infinite weights, or none at all.
    """
    try:
        tensor = ops.convert_to_tensor(variable)
    except TypeError as error:  # while JAX trains, the variables of Keras are empty
        raise ValueError(
            "Expected weights that hold values. While fit runs on JAX they are elsewhere: a callback that reads "
            f"`self.model` brings them back. Received: {getattr(variable, 'path', 'weights')} without a value"
        ) from error
    if keras.backend.standardize_dtype(tensor.dtype) not in ("float32", "float64"):
        tensor = ops.cast(tensor, "float32")
    array = np.asarray(ops.convert_to_numpy(tensor), dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(
            "Expected finite weights. "
            f"Received: {getattr(variable, 'path', 'weights')} with "
            f"{np.sum(~np.isfinite(array))} NaN or infinite entries"
        )
    return array


# ---- matrices -------------------------------------------------------------------------------------------


def matrix_spectrum(matrices: np.ndarray) -> Spectrum:
    """Spectrum of a stack of matrices `(..., rows, columns)`, seen as one block diagonal.

    Singular values are roots of the eigenvalues of the Gram matrices on the smaller side. Forming and
    decomposing those in float64 is off by at most a small multiple of `rows * columns * eps * norm^2`, and the
    bound is inflated by 16 times that.

    Args:
        matrices: float64 array.

    Raises:
        ValueError: for an empty array.

    Example:

    >>> matrix_spectrum(np.diag([2.0, 0.5])).largest
    2.0
    """
    if matrices.size == 0:
        raise ValueError(f"Expected a kernel that is not empty. Received: shape={matrices.shape}")
    scale = float(np.abs(matrices).max())
    if scale == 0.0:
        return Spectrum(0.0, 0.0, 0.0)
    a = matrices / scale
    transposed = np.swapaxes(a, -1, -2)
    eigenvalues = np.linalg.eigvalsh(a @ transposed if a.shape[-2] < a.shape[-1] else transposed @ a)
    smallest, largest = (scale * math.sqrt(max(0.0, float(value))) for value in (eigenvalues.min(), eigenvalues.max()))
    return Spectrum(smallest, largest, largest * (1.0 + 16 * a.shape[-2] * a.shape[-1] * MACHINE_EPSILON))


def nonnegative_norm_bound(matrices: np.ndarray) -> float:
    """Upper bound on the norm of matrices without negative entries, `sqrt(|A|_1 |A|_inf)`.

    Nearly tight when rows, and columns, are of similar weight, as in the absolute values of a kernel.
    """
    columns, rows = matrices.sum(axis=-2).max(axis=-1), matrices.sum(axis=-1).max(axis=-1)
    return float(np.sqrt(columns * rows).max()) * (1.0 + 4 * sum(matrices.shape[-2:]) * MACHINE_EPSILON)


# ---- convolutions ---------------------------------------------------------------------------------------


def convolution_spectrum(blocks: np.ndarray, strides: Sequence[int]) -> Spectrum:
    """Spectrum of a convolution with zero, causal, valid or circular padding, for every image size.

    The stride is removed by the polyphase identity: a convolution with stride s is one with stride 1 from s
    times as many channels. What is left is `sup |K^(w)|` over all frequencies w. On a grid of N frequencies
    per dimension, `sup <= max over the grid / prod cos(pi (k - 1) / (2 N))`, since every `u* K^ v` is a
    trigonometric polynomial of degree (k - 1) / 2 after centring. The Gram matrices of all frequencies are
    Fourier sums of the kernel's autocorrelation; a Cholesky factor proves that none exceeds the largest
    eigenvalue found by more than 0.01 % (of the norm).

    Args:
        blocks: float64 kernel `(*window, blocks, inputs, outputs)` of a block-diagonal convolution.
        strides: one per dimension of the window.

    Example:

    >>> spectrum = convolution_spectrum(np.ones((3, 1, 1, 1)), (1,))
    >>> 3.0 <= spectrum.bound < 3.03
    True

    Reference:
        Sedghi, Gupta and Long, ICLR 2019 (arXiv 1805.10408), for the circular case; Ehlich and Zeller, Math.
        Z. 86 (1964), for what happens between the points of the grid; Rump, BIT 46 (2006), for Cholesky.
    """
    return _convolution_spectrum(blocks, strides, with_smallest=True)


def convolution_bound(blocks: np.ndarray, strides: Sequence[int]) -> float:
    """The bound of `convolution_spectrum` alone, which costs less."""
    return _convolution_spectrum(blocks, strides, with_smallest=False).bound


def _convolution_spectrum(blocks, strides, with_smallest: bool) -> Spectrum:
    taps = _polyphase(blocks, strides)
    window = taps.shape[: len(strides)]
    if math.prod(window) == 1:
        return matrix_spectrum(taps)
    scale = float(np.abs(taps).max())
    if scale == 0.0:
        return Spectrum(0.0, 0.0, 0.0)
    taps = taps.reshape(math.prod(window), *taps.shape[-3:]) / scale
    if taps.shape[-2] < taps.shape[-1]:
        taps = np.swapaxes(taps, -1, -2)
    shifts, products = _autocorrelation(taps, window)
    order = products.shape[-1]
    centre = products[len(products) // 2]  # shift 0: the mean of the Gram matrices over all frequencies
    found = float(np.linalg.eigvalsh(centre).max())
    rounding = 4 * MACHINE_EPSILON * order * (len(taps) * (sum(taps.shape[-2:]) * len(shifts) + 16) + order + 8)
    whole = _bound_without_grid(products, found)
    if whole > (1 + _SLACK) * found:
        sizes = _grid(window, order)
        for grams in _gram_matrices(shifts, products, sizes):
            found = _largest_eigenvalue(grams, found)
        correction = math.prod(math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(window, sizes, strict=True))
        whole = min(whole, (1 + _SLACK) * found / correction**2)
    smallest = found
    if with_smallest:
        coarse = [1 if k == 1 else 8 for k in window]
        smallest = min(float(np.linalg.eigvalsh(grams).min()) for grams in _gram_matrices(shifts, products, coarse))
    return Spectrum(
        smallest=scale * math.sqrt(max(0.0, smallest)),
        largest=scale * math.sqrt(found),
        bound=scale * math.sqrt(whole * (1 + rounding)) * (1 + 8 * MACHINE_EPSILON),
    )


def _bound_without_grid(products: np.ndarray, found: float) -> float:
    """Two upper bounds on the Gram matrices of all frequencies: tight for orthogonal and for rescaled convolutions.

    The norms of the terms of the Fourier sum: next to nothing but the first when the channels are orthogonal. And, with
    C the sum of their absolute values, `max_i (C s)_i / s_i` for any positive s, here near the eigenvector of C: 1
    when the channels were rescaled to make C dominated by its diagonal (Prach and Lampert, ECCV 2022).
    """
    squares = np.linalg.norm(np.swapaxes(products, -1, -2) @ products, axis=(-1, -2))  # |A|^2 <= |A^T A|_F
    norms = np.sqrt(squares)
    norms[len(norms) // 2] = found  # the largest eigenvalue of any block
    absolute = np.abs(products).sum(axis=0)
    s = np.ones((*absolute.shape[:-1], 1))
    for _ in range(50):
        s = absolute @ s
        s = np.maximum(s / s.max(axis=-2, keepdims=True).clip(MACHINE_EPSILON), 0.05)  # ratios stay harmless
    return float(np.minimum(norms.sum(axis=0), (absolute @ s / s).max(axis=(-2, -1))).max())


def _polyphase(blocks: np.ndarray, strides: Sequence[int]) -> np.ndarray:
    """Kernel of the equivalent convolution with stride 1: `(*window, blocks, inputs * prod(strides), outputs)`."""
    rank = len(strides)
    padding = [(0, -k % s) for k, s in zip(blocks.shape, strides, strict=False)] + [(0, 0)] * 3
    padded = np.pad(blocks, padding)
    split = [size for k, s in zip(padded.shape, strides, strict=False) for size in (k // s, s)]
    taps = padded.reshape(*split, *blocks.shape[rank:])  # tap o = s q + r goes to phase r, tap q
    quotients, phases = range(0, 2 * rank, 2), range(1, 2 * rank, 2)
    taps = taps.transpose(*quotients, 2 * rank, *phases, 2 * rank + 1, 2 * rank + 2)
    taps = taps.reshape(*taps.shape[: rank + 1], -1, taps.shape[-1])
    used = np.abs(taps).max(axis=(*range(rank + 1), rank + 2)) > 0  # strides above the window leave phases empty
    return taps[..., used, :] if used.any() else taps


def _autocorrelation(taps: np.ndarray, window) -> tuple[np.ndarray, np.ndarray]:
    """Shifts `(n, dimensions)` and the sums of `K_o^T K_p` over `p - o = shift`, `(n, blocks, order, order)`."""
    positions = np.array(list(itertools.product(*(range(k) for k in window))))
    shifts = np.array(list(itertools.product(*(range(1 - k, k) for k in window))))
    extent = [2 * k - 1 for k in window]
    products = np.zeros((len(shifts), taps.shape[1], taps.shape[-1], taps.shape[-1]))
    for position, tap in zip(positions, taps, strict=True):
        where = np.ravel_multi_index((positions - position + np.array(window) - 1).T, extent)
        products[where] += np.swapaxes(tap, -1, -2) @ taps
    return shifts, products


def _gram_matrices(shifts, products, sizes) -> Iterator[np.ndarray]:
    """The Gram matrices at the frequencies of a grid, `(m, order, order)` at a time, in a scattered order."""
    # The kernel is real: opposite frequencies have the same spectrum.
    half = [*sizes[:-1], sizes[-1] // 2 + 1]
    steps = np.random.default_rng(0).permutation(math.prod(half))
    frequencies = 2 * np.pi * np.stack(np.unravel_index(steps, half), axis=1) / np.array(sizes)
    rows, order = products.reshape(len(shifts), -1), products.shape[-1]
    length = max(1, _CHUNK // (16 * rows.shape[1]))
    for start in range(0, len(frequencies), length):
        angles = frequencies[start : start + length] @ shifts.T
        grams = np.empty((len(angles), rows.shape[1]), dtype=np.complex128)
        grams.real, grams.imag = np.cos(angles) @ rows, np.sin(angles) @ rows
        yield grams.reshape(-1, order, order)


def _largest_eigenvalue(grams: np.ndarray, found: float) -> float:
    """An eigenvalue, or `found`, that no eigenvalue of the matrices exceeds by more than the slack."""
    if len(grams) == 1 or grams.shape[-1] <= _SMALL:
        return max(found, float(np.linalg.eigvalsh(grams).max()))
    try:
        np.linalg.cholesky((1 + _SLACK) * found * np.eye(grams.shape[-1]) - grams)
        return found
    except np.linalg.LinAlgError:
        half = len(grams) // 2
        return _largest_eigenvalue(grams[half:], _largest_eigenvalue(grams[:half], found))


def _grid(window, order: int) -> list[int]:
    """Frequencies per dimension: enough for a slack of 0.1 % (small matrices) or 0.3 %, fewer if that takes long."""
    active = sum(k > 1 for k in window)
    terms = math.prod(2 * k - 1 for k in window)
    affordable = 2 * _BUDGET / (2 * order**3 + 4 * terms * order**2)
    finest = max(2.0, affordable ** (1 / active))
    wanted = math.pi / 2 * math.sqrt(active / (0.002 if order <= _SMALL else 0.006))
    return [1 if k == 1 else max(4 * (k - 1), math.ceil(min(wanted * (k - 1), finest))) for k in window]


# ---- kernels of layers ----------------------------------------------------------------------------------


def _blocks(kernel: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Kernel as `(*window, blocks, inputs, outputs)`; a transposed one as that of its adjoint."""
    if geometry.depthwise:
        return kernel[..., :, None, :]
    split = kernel.reshape(*kernel.shape[:-1], geometry.groups, -1)
    return np.moveaxis(split, -2, -3)


def kernel_spectrum(layer: keras.layers.Layer, name: str) -> Spectrum:
    """Spectrum of the operator of one kernel of a layer.

    Args:
        layer: a built Dense or convolution layer.
        name: of the weight, a key of `kernel_geometries(layer)`.

    Example:

    >>> layer = keras.layers.Dense(2, kernel_initializer="ones")
    >>> layer.build((None, 2))
    >>> round(kernel_spectrum(layer, "kernel").bound, 6)
    2.0
    """
    return _kernel_spectrum(layer, name, with_smallest=True)


def kernel_bound(layer: keras.layers.Layer, name: str) -> float:
    """The bound of `kernel_spectrum` alone, which costs less."""
    return _kernel_spectrum(layer, name, with_smallest=False).bound


def _kernel_spectrum(layer, name: str, with_smallest: bool) -> Spectrum:
    blocks = _blocks(as_float64(getattr(layer, name)), kernel_geometries(layer)[name])
    window = blocks.shape[:-3]
    if math.prod(window) == 1:
        strides, dilation = (1,) * len(window), (1,) * len(window)
    else:
        strides, dilation = layer.strides, layer.dilation_rate
    key = (hashlib.sha256(blocks.tobytes()).digest(), blocks.shape, tuple(strides), tuple(dilation))
    for known in ((*key, True), (*key, with_smallest)):
        if known in _RESULTS:
            return _RESULTS[known]
    if len(_RESULTS) >= 1024:
        _RESULTS.pop(next(iter(_RESULTS)))
    result = _RESULTS[*key, with_smallest] = _operator_spectrum(blocks, strides, dilation, with_smallest)
    return result


_RESULTS: dict[tuple, Spectrum] = {}  # of the last kernels: summaries, metrics and certificates ask more than once


def _operator_spectrum(blocks: np.ndarray, strides, dilation, with_smallest: bool) -> Spectrum:
    window = blocks.shape[:-3]
    if math.prod(window) == 1:
        return matrix_spectrum(blocks)
    patches = np.moveaxis(blocks, -3, 0).reshape(blocks.shape[-3], -1, blocks.shape[-1])
    by_patches = math.sqrt(overlap(window, strides, dilation)) * matrix_spectrum(patches).bound
    if max(strides) > 1 and max(dilation) > 1:  # such a convolution has no polyphase form
        return Spectrum(0.0, 0.0, by_patches)
    spectrum = _convolution_spectrum(blocks, strides, with_smallest)
    return dataclasses.replace(spectrum, bound=min(spectrum.bound, by_patches))


def separable_bound(layer: keras.layers.Layer, depthwise: str, pointwise: str) -> float:
    """Upper bound on the norm of a separable convolution: of its composed kernel, or the product if smaller."""
    first, second = as_float64(getattr(layer, depthwise)), as_float64(getattr(layer, pointwise))
    product = kernel_bound(layer, depthwise) * kernel_bound(layer, pointwise) * (1 + MACHINE_EPSILON)
    channels, multiplier = first.shape[-2:]
    second = second.reshape(channels, multiplier, -1)
    composed = np.einsum("...cm,cmo->...co", first, second)[..., None, :, :]
    if max(layer.strides) > 1 and max(layer.dilation_rate) > 1:
        return product
    gain = math.sqrt(overlap(layer.kernel_size, layer.strides, layer.dilation_rate))
    rounding = 4 * multiplier * MACHINE_EPSILON * gain * float(np.linalg.norm(first) * np.linalg.norm(second))
    return min(product, convolution_bound(composed, layer.strides) + rounding)


def absolute_bound(layer: keras.layers.Layer, name: str) -> float:
    """Upper bound on the norm of the operator whose kernel is the absolute value of a kernel of the layer."""
    blocks = np.abs(_blocks(as_float64(getattr(layer, name)), kernel_geometries(layer)[name]))
    window = blocks.shape[:-3]
    if math.prod(window) == 1:
        return nonnegative_norm_bound(blocks)
    if max(layer.strides) > 1 and max(layer.dilation_rate) > 1:
        gain = math.sqrt(overlap(window, layer.strides, layer.dilation_rate))
        return gain * nonnegative_norm_bound(np.moveaxis(blocks, -3, 0).reshape(blocks.shape[-3], -1, blocks.shape[-1]))
    taps = _polyphase(blocks, layer.strides)  # without negative entries, frequency 0 is the worst
    return nonnegative_norm_bound(taps.sum(axis=tuple(range(len(window)))))
