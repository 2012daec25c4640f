"""Norms and singular values of kernels: on the host, in float64, from the stored weights.

A bound here is proven: it is inflated by what float64 can have rounded away. What is called `largest` or
`smallest` was found, so it is an estimate from inside the spectrum.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from hkr_keras.certification.floating_point import MACHINE_EPSILON
from hkr_keras.geometry import Geometry, kernel_geometries, overlap

__all__ = [
    "Spectrum",
    "absolute_bound",
    "as_computed",
    "as_float64",
    "blocks_bound",
    "convolution_bound",
    "convolution_on",
    "convolution_spectrum",
    "is_cheap",
    "kernel_blocks",
    "kernel_bound",
    "kernel_spectrum",
    "matrix_spectrum",
    "nonnegative_norm_bound",
]

_SLACK = 2e-4  # of the eigenvalues between the points where they are computed
_CHUNK = 2**25  # bytes of Gram matrices, or of the terms of a Fourier sum, held at a time
_BUDGET = 2.0  # seconds, roughly, that the frequencies of one kernel may cost
_ENTRIES = 4_000_000  # of an explicit matrix
_ORDER = 1024  # of its Gram matrix
_SMALL = 16  # order below which eigenvalues cost no more than a Cholesky factor


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Singular values of a linear operator: the smallest and largest found, and a proven upper bound."""

    smallest: float
    largest: float
    bound: float


def as_float64(variable: Any) -> np.ndarray:
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


def as_computed(layer: Any, name: str) -> np.ndarray:
    """A weight as a layer computes with it, float64 on the host: half-precision policies cast it first.

    Raises:
        ValueError: as `as_float64`, also where a weight is not finite once it is cast.

    Example:

    >>> layer = keras.layers.Dense(1, kernel_initializer=keras.initializers.Constant(0.1), dtype="mixed_bfloat16")
    >>> layer.build((None, 1))
    >>> as_computed(layer, "kernel").item()
    0.10009765625
    """
    weight = getattr(layer, name)
    array = as_float64(weight)
    dtype = str(layer.compute_dtype)
    if dtype in ("float32", "float64") or str(weight.dtype).endswith(dtype):
        return array
    return as_float64(ops.cast(ops.convert_to_tensor(weight), dtype))


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


def _convolution_spectrum(blocks: np.ndarray, strides: Sequence[int], with_smallest: bool) -> Spectrum:
    taps = _polyphase(blocks, strides)
    window = taps.shape[: len(strides)]
    if math.prod(window) == 1:
        return matrix_spectrum(taps)
    scale = float(np.abs(taps).max())
    if scale == 0.0:
        return Spectrum(0.0, 0.0, 0.0)
    taps = taps / scale
    if taps.shape[-2] < taps.shape[-1]:
        taps = np.swapaxes(taps, -1, -2)
    flat = taps.reshape(-1, *taps.shape[-3:])
    inner, order = flat.shape[-2:]
    centre = np.einsum("tgio,tgip->gop", flat, flat, optimize=True)  # the mean of the Gram matrices
    total, absolute = flat.sum(axis=0), np.abs(flat).sum(axis=0)
    found = float(np.linalg.eigvalsh(np.stack([centre, np.swapaxes(total, -1, -2) @ total])).max())
    whole = (nonnegative_norm_bound(absolute) * (1 + 2 * len(flat) * MACHINE_EPSILON)) ** 2
    largest_sum = float(np.linalg.norm(np.swapaxes(absolute, -1, -2) @ absolute, axis=(-2, -1)).max())
    eigenvalues = 1 + 32 * MACHINE_EPSILON * order * (order + 2)  # what computing them, or Cholesky factors, may miss
    terms, is_gram = taps, False
    if _autocorrelation_seconds(taps.shape) <= max(0.5, _grid(taps.shape, False)[1]):
        terms, is_gram = _autocorrelation(taps), True
        rounding = 4 * MACHINE_EPSILON * (inner + len(flat)) * largest_sum
        shifts = math.prod(terms.shape[:-3])
        without = _bound_without_grid(terms.reshape(-1, *terms.shape[-3:]), found)
        whole = min(whole, without * (eigenvalues + 32 * MACHINE_EPSILON * shifts) + rounding)
    smallest = math.inf
    if whole > (1 + _SLACK) * found:
        sizes, _ = _grid(terms.shape, is_gram)
        for grams in _gram_matrices(terms, is_gram, sizes):
            found = _largest_eigenvalue(grams, found)
        correction = math.prod(math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(window, sizes, strict=True))
        fourier = _fourier_error(terms) + inner + len(flat)
        slack = 1.0 if order <= _SMALL else 1 + _SLACK
        reached = slack * found * eigenvalues + 8 * MACHINE_EPSILON * fourier * largest_sum
        whole = min(whole, reached / correction**2)
    smallest = found
    if with_smallest:
        coarse = _gram_matrices(terms, is_gram, [1 if k == 1 else 8 for k in window])
        smallest = min(float(np.linalg.eigvalsh(grams).min()) for grams in coarse)
    return Spectrum(
        smallest=scale * math.sqrt(max(0.0, smallest)),
        largest=scale * math.sqrt(found),
        bound=scale * math.sqrt(whole) * (1 + 16 * MACHINE_EPSILON),
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
    strides = [min(k, s) for k, s in zip(blocks.shape, strides, strict=False)]  # windows apart from each other
    padding = [(0, -k % s) for k, s in zip(blocks.shape, strides, strict=False)] + [(0, 0)] * 3
    padded = np.pad(blocks, padding)
    split = [size for k, s in zip(padded.shape, strides, strict=False) for size in (k // s, s)]
    taps = padded.reshape(*split, *blocks.shape[rank:])  # tap o = s q + r goes to phase r, tap q
    quotients, phases = range(0, 2 * rank, 2), range(1, 2 * rank, 2)
    taps = taps.transpose(*quotients, 2 * rank, *phases, 2 * rank + 1, 2 * rank + 2)
    taps = taps.reshape(*taps.shape[: rank + 1], -1, taps.shape[-1])
    used = np.abs(taps).max(axis=(*range(rank + 1), rank + 2)) > 0  # some phases of the last tap are empty
    return taps[..., used, :] if used.any() else taps


def _autocorrelation(taps: np.ndarray) -> np.ndarray:
    """Sums of `K_o^T K_p` over `p - o = shift`, shifts from `1 - k` to `k - 1`: `(*shifts, blocks, order, order)`."""
    window, order = taps.shape[:-3], taps.shape[-1]
    products = np.zeros((*(2 * k - 1 for k in window), taps.shape[-3], order, order))
    for position in np.ndindex(*window):
        where = tuple(slice(k - 1 - o, 2 * k - 1 - o) for o, k in zip(position, window, strict=True))
        products[where] += np.swapaxes(taps[position], -1, -2) @ taps
    return products


def _autocorrelation_seconds(shape: Sequence[int]) -> float:
    (blocks, inner, order), taps = shape[-3:], math.prod(shape[:-3])
    return taps**2 * blocks * (1e-7 + 1e-10 * inner * order**2)


def _gram_matrices(terms: np.ndarray, is_gram: bool, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """The Gram matrices at half the frequencies of a grid, `(m, order, order)` at a time, in a scattered order.

    A grid that is finer than the window is a union of shifted coarse ones, each of which is one fast Fourier transform
    of the turned terms; so memory does not depend on the size of the grid. Few terms of large matrices are summed
    directly. The kernel is real: opposite frequencies have the same spectrum, and half of the grid, which is half a
    step off in one direction, is left out.

    Args:
        terms: of the Fourier sum, `(*window, blocks, rows, columns)`.
        is_gram: whether the sum is a Gram matrix, its terms centred, or a matrix K whose Gram matrix is wanted.
        sizes: frequencies per dimension, at least.
    """
    rank, matrices, dense = len(sizes), terms.shape[-3:], _is_dense(terms.shape)
    window = np.array(terms.shape[:rank])
    half = np.arange(rank) == max(np.flatnonzero(window > 1))
    pieces = np.array([1 if dense else _smooth(k) for k in window])  # of one transform
    counts = -(-np.array(sizes) // (pieces * (1 + half)))  # of transforms
    offsets = np.unravel_index(np.random.default_rng(0).permutation(math.prod(counts)), counts)
    angles = (np.stack(offsets, axis=1) + half / 2) * 2 * np.pi / (counts * (1 + half) * pieces)
    shifts = [np.arange(k) - (k // 2 if is_gram else 0) for k in window]
    length = max(1, _CHUNK // (16 * (math.prod(pieces) * math.prod(matrices) + dense * math.prod(window))))
    for start in range(0, len(angles), length):
        part = angles[start : start + length]
        if dense:
            phases = part @ np.stack([grid.ravel() for grid in np.meshgrid(*shifts, indexing="ij")])
            rows = terms.reshape(phases.shape[1], -1)
            values = np.empty((len(part), rows.shape[1]), dtype=np.complex128)
            values.real, values.imag = np.cos(phases) @ rows, -(np.sin(phases) @ rows)
        else:
            values = terms[None]
            for axis in np.flatnonzero(window > 1):
                turned = np.exp(-1j * part[:, [axis]] * shifts[axis])
                values = np.moveaxis(values, axis + 1, -1) * turned.reshape(len(part), *(1,) * (rank + 2), -1)
                placed = np.zeros((*values.shape[:-1], pieces[axis]), dtype=np.complex128)
                placed[..., shifts[axis]] = values  # negative shifts at the end
                values = np.moveaxis(np.fft.fft(placed, axis=-1), -1, axis + 1)
        values = values.reshape(-1, *matrices[1:])
        if not is_gram and matrices[-1] == 1:
            values = np.sum(values.real**2 + values.imag**2, axis=-2, keepdims=True)
        elif not is_gram:
            values = np.conj(np.swapaxes(values, -1, -2)) @ values
        yield values


def _is_dense(shape: Sequence[int]) -> bool:
    """Whether sums of few large matrices are cheaper as they stand than as fast Fourier transforms."""
    return math.prod(shape[:-3]) * (1 + 100 / math.prod(shape[-3:])) < 150


def _smooth(number: int) -> int:
    """The next number without prime factors above 5: a length that is transformed fast and accurately."""
    rest = number
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return number if rest == 1 else _smooth(number + 1)


def _fourier_error(terms: np.ndarray) -> float:
    """What a Fourier sum may be off by, in units of machine epsilon and of the sum of absolute values."""
    window = terms.shape[:-3]
    if _is_dense(terms.shape):
        return math.prod(window) + 64.0 * sum(window)
    return 64.0 * (len(window) + math.log2(math.prod(2 * k for k in window)))


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


def _grid(shape: Sequence[int], is_gram: bool) -> tuple[list[int], float]:
    """Frequencies per dimension, and the seconds they take.

    Enough for a slack of 0.1 % (small matrices) or 0.3 %; fewer, though at least four a tap, if that takes long.
    """
    window = [(k + 1) // 2 if is_gram else k for k in shape[:-3]]
    count, (blocks, rows, order) = math.prod(shape[:-3]), shape[-3:]
    width, active = blocks * rows * order, sum(k > 1 for k in window)
    transform = count * (2.5e-8 + 1e-10 * width) if _is_dense(shape) else 6e-8 * active * width
    gram = 0.0 if is_gram else blocks * (1e-7 + 4e-10 * rows * order**2)
    eigenvalue = blocks * (1e-7 * order**2 if order <= _SMALL else 7e-11 * order**3 + 1e-8 * order**2)
    cost = (transform + gram + eigenvalue) / 2 * math.prod(k - 1 for k in window if k > 1)
    wanted = math.pi / 2 * math.sqrt(active / (0.002 if order <= _SMALL else 0.006))
    points = max(4.0, min(wanted, (_BUDGET / cost) ** (1 / max(active, 1))))
    return [max(1, math.ceil(points * (k - 1))) for k in window], cost * points**active


# ---- convolutions of images of a known size -------------------------------------------------------------


def convolution_on(
    blocks: np.ndarray, strides: Sequence[int], dilation: Sequence[int], padding: str, sizes: Sequence[int]
) -> Spectrum:
    """Spectrum of a zero-padded convolution on images of one size, from its explicit matrix.

    Below the bound for every image size where the window is not small beside the image. The positions of the taps are
    those of Keras on TensorFlow, JAX and PyTorch: output o sees the cells `o * stride + tap * dilation - left`. With n
    cells and an extent of `e = dilation * (k - 1) + 1`, "same" adds `(ceil(n / stride) - 1) * stride + e - n` zeros (if
    that is positive), the smaller half of them on the left; "causal" adds `e - 1` on the left; "valid" adds none.
    A transposed convolution is the adjoint (`kernel_bound` leaves its cropping out, which only takes away).

    Args:
        blocks: float64 kernel `(*window, blocks, inputs, outputs)` of a block-diagonal convolution.
        strides, dilation: one per dimension of the window.
        padding: "valid", "same" or "causal".
        sizes: of the image, one per dimension. The matrices hold `blocks * inputs * outputs` numbers for every pair of
            a cell of the image and one of the output.

    Raises:
        ValueError: for another padding, or an image that is smaller than the window without padding.

    Example:

    >>> round(convolution_on(np.ones((9, 1, 1, 1)), (1,), (1,), "same", (2,)).bound, 6)
    2.0
    """
    rank = len(sizes)
    taps, inside = [], np.ones((1,) * (2 * rank), dtype=bool)
    for axis, n in enumerate(sizes):
        outputs, left = _placement(blocks.shape[axis], strides[axis], dilation[axis], padding, n)
        steps = np.arange(n)[:, None] + left - strides[axis] * np.arange(outputs)
        tap, rest = np.divmod(steps, dilation[axis])
        shape = (*(1,) * (2 * axis), n, outputs, *(1,) * (2 * (rank - axis - 1)))
        inside = inside & ((rest == 0) & (tap >= 0) & (tap < blocks.shape[axis])).reshape(shape)
        taps.append(np.clip(tap, 0, blocks.shape[axis] - 1).reshape(shape))
    matrix = blocks[tuple(taps)] * inside[..., None, None, None]
    matrix = matrix.transpose(2 * rank, *range(0, 2 * rank, 2), 2 * rank + 1, *range(1, 2 * rank, 2), 2 * rank + 2)
    return matrix_spectrum(matrix.reshape(len(matrix), math.prod(matrix.shape[1 : rank + 2]), -1))


def _placement(k: int, stride: int, dilation: int, padding: str, n: int) -> tuple[int, int]:
    """How many outputs there are along one dimension, and how many zeros before the image."""
    extent = dilation * (k - 1) + 1
    if padding == "same":
        outputs = -(-n // stride)
        return outputs, max((outputs - 1) * stride + extent - n, 0) // 2
    if padding == "causal":
        return (n - 1) // stride + 1, extent - 1
    if padding != "valid" or n < extent:
        raise ValueError(
            "Expected padding 'same', 'causal', or 'valid' with an image that is no smaller than the window. "
            f"Received: padding={padding}, size={n}, extent of the window={extent}"
        )
    return (n - extent) // stride + 1, 0


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


def kernel_bound(layer: keras.layers.Layer, name: str, sizes: Sequence[int | None] | None = None) -> float:
    """The bound of `kernel_spectrum` alone, which costs less.

    Args:
        layer: a built Dense or convolution layer.
        name: of the weight, a key of `kernel_geometries(layer)`.
        sizes: of the images that the layer is applied to, without batch and channels. Where all are known and the
            explicit matrix is small (4e6 entries, order 1024), it may bring the bound down (see `convolution_on`).

    Example:

    >>> layer = keras.layers.Conv1D(1, 9, padding="same", kernel_initializer="ones")
    >>> layer.build((None, 2, 1))
    >>> round(kernel_bound(layer, "kernel"), 2), round(kernel_bound(layer, "kernel", (2,)), 2)
    (9.0, 2.0)
    """
    geometry = kernel_geometries(layer)[name]
    on_image = None if sizes is None or getattr(layer, "circular", False) else (layer.padding, sizes)
    blocks = kernel_blocks(layer, name)
    return blocks_bound(blocks, *_steps(layer, blocks), geometry.transposed, on_image)


def _steps(layer: Any, blocks: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides and dilation of the window of a kernel."""
    window = blocks.shape[:-3]
    if math.prod(window) == 1:
        return (1,) * len(window), (1,) * len(window)
    return tuple(layer.strides), tuple(layer.dilation_rate)


def kernel_blocks(layer: Any, name: str) -> np.ndarray:
    """A kernel of a layer, float64 `(*window, blocks, inputs, outputs)`; a transposed one as that of its adjoint."""
    return _blocks(as_computed(layer, name), kernel_geometries(layer)[name])


def _kernel_spectrum(layer: Any, name: str, with_smallest: bool) -> Spectrum:
    blocks = kernel_blocks(layer, name)
    return _known_spectrum(blocks, *_steps(layer, blocks), with_smallest)


def blocks_bound(
    blocks: np.ndarray,
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
    transposed: bool = False,
    on_image: tuple[str, Sequence[int | None]] | None = None,
) -> float:
    """Upper bound on the norm of a block-diagonal convolution, or of its adjoint.

    Args:
        blocks: float64 `(*window, blocks, inputs, outputs)`.
        strides, dilation: one per dimension of the window.
        transposed: whether the operator is the adjoint.
        on_image: padding and sizes of the images it is applied to. Where all are known, the explicit matrix is small
            and the window is not small beside the image, the matrix may bring the bound down.
    """
    bound = _known_spectrum(blocks, strides, dilation, with_smallest=False).bound
    image = None if on_image is None else _explicit(blocks, strides, dilation, transposed, *on_image)
    if image is None:
        return bound
    return min(bound, _remembered(_key(blocks, *image), lambda: convolution_on(blocks, *image)).bound)


def _explicit(
    blocks: np.ndarray,
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
    transposed: bool,
    padding: str,
    given: Sequence[int | None],
) -> tuple | None:
    """Arguments of `convolution_on` for a kernel on images of a size, or `None` where it would not pay."""
    window = blocks.shape[:-3]
    sizes = [size for size in given if size is not None]
    if math.prod(window) == 1 or len(window) != len(sizes):
        return None
    if transposed:  # the adjoint of a convolution that ends in these sizes; what is cropped only takes away
        pairs = zip(window, strides, dilation, sizes, strict=True)
        padding, sizes = "valid", [(n - 1) * s + d * (k - 1) + 1 for k, s, d, n in pairs]
    extents = [d * (k - 1) + 1 for k, d in zip(window, dilation, strict=True)]
    if padding == "valid" and any(n < extent for n, extent in zip(sizes, extents, strict=True)):
        return None  # Keras refuses it
    if all(n > 3 * extent for n, extent in zip(sizes, extents, strict=True)):
        return None  # near to the bound for every size
    pairs = zip(window, strides, dilation, sizes, strict=True)
    outputs = math.prod(_placement(k, s, d, padding, n)[0] for k, s, d, n in pairs)
    count, inputs, filters = blocks.shape[-3:]
    rows, columns = math.prod(sizes) * inputs, outputs * filters
    if rows * columns * count > _ENTRIES or min(rows, columns) > _ORDER:
        return None
    return strides, dilation, padding, tuple(sizes)


def _key(blocks: np.ndarray, *arguments: Any) -> tuple:
    return (hashlib.sha256(blocks.tobytes()).digest(), blocks.shape, *arguments)


def _remembered(key: tuple, compute: Callable[[], Spectrum]) -> Spectrum:
    if key not in _RESULTS:
        result = compute()
        if len(_RESULTS) >= 1024:
            _RESULTS.pop(next(iter(_RESULTS)))
        _RESULTS[key] = result
    return _RESULTS[key]


def _known_spectrum(
    blocks: np.ndarray, strides: tuple[int, ...], dilation: tuple[int, ...], with_smallest: bool
) -> Spectrum:
    if math.prod(blocks.shape[:-3]) == 1:
        strides = dilation = (1,) * len(strides)
    key = _key(blocks, strides, dilation)
    if (*key, True) in _RESULTS:
        return _RESULTS[*key, True]
    return _remembered((*key, with_smallest), lambda: _operator_spectrum(blocks, strides, dilation, with_smallest))


_RESULTS: dict[tuple, Spectrum] = {}  # of the last kernels: summaries, metrics and certificates ask more than once


def _operator_spectrum(
    blocks: np.ndarray, strides: Sequence[int], dilation: Sequence[int], with_smallest: bool
) -> Spectrum:
    window = blocks.shape[:-3]
    if math.prod(window) == 1:
        return matrix_spectrum(blocks)
    patches = np.moveaxis(blocks, -3, 0).reshape(blocks.shape[-3], -1, blocks.shape[-1])
    by_patches = math.sqrt(overlap(window, strides, dilation)) * matrix_spectrum(patches).bound
    if max(strides) > 1 and max(dilation) > 1:  # such a convolution has no polyphase form
        return Spectrum(0.0, 0.0, by_patches)
    spectrum = _convolution_spectrum(blocks, strides, with_smallest)
    return dataclasses.replace(spectrum, bound=min(spectrum.bound, by_patches))


def is_cheap(window: Sequence[int], channels: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a convolution of `channels` (inputs, outputs) can be bounded in seconds, and in less than a gibibyte."""
    steps = [min(k, s) for k, s in zip(window, strides, strict=True)]
    sides = channels[0] * math.prod(steps), channels[1]
    shape = (*(-(-k // s) for k, s in zip(window, steps, strict=True)), 1, max(sides), min(sides))
    seconds = min(_autocorrelation_seconds(shape), _grid(shape, False)[1])
    return seconds <= _BUDGET + 1e-5 * math.prod(channels) and math.prod(shape) <= 2**25


def absolute_bound(layer: keras.layers.Layer, name: str) -> float:
    """Upper bound on the norm of the operator whose kernel is the absolute value of a kernel of the layer."""
    blocks = np.abs(_blocks(as_computed(layer, name), kernel_geometries(layer)[name]))
    window = blocks.shape[:-3]
    if math.prod(window) == 1:
        return nonnegative_norm_bound(blocks)
    if max(layer.strides) > 1 and max(layer.dilation_rate) > 1:
        gain = math.sqrt(overlap(window, layer.strides, layer.dilation_rate))
        return gain * nonnegative_norm_bound(np.moveaxis(blocks, -3, 0).reshape(blocks.shape[-3], -1, blocks.shape[-1]))
    taps = _polyphase(blocks, layer.strides)  # without negative entries, frequency 0 is the worst
    return nonnegative_norm_bound(taps.sum(axis=tuple(range(len(window)))))
