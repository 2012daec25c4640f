"""Rows of pooling layers."""

import math
from typing import Any

import keras
import numpy as np

from hkr_keras import layers
from hkr_keras.certification.floating_point import (
    MACHINE_EPSILON,
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    Rounding,
    RoundingRule,
    accumulated,
    relative,
)
from hkr_keras.certification.rules.kernels import check_convolution
from hkr_keras.certification.rules.registry import Shape, bound_of, rule
from hkr_keras.certification.singular_values import convolution_bound, matrix_spectrum
from hkr_keras.geometry import overlap

__all__ = []

_k = keras.layers


def _spatial_sizes(layer: Any, shape: Shape) -> tuple:
    """The sizes of an image or sequence, without batch and channels."""
    return tuple(shape[1:-1] if layer.data_format == "channels_last" else shape[2:])


def _check_mode(layer: Any, mode: str) -> None:
    if layer.pool_mode != mode:
        raise ValueError(
            f"Expected the mode that the class has, '{mode}'. Received: {layer.name}.pool_mode={layer.pool_mode}"
        )


def _max_pooling(layer: Any, shape: Shape) -> float:
    _check_mode(layer, "max")
    windows = overlap(layer.pool_size, layer.strides, (1,) * len(layer.pool_size))
    return math.sqrt(windows) * (1 + 2 * MACHINE_EPSILON if windows > 1 else 1)


def _average_pooling(layer: Any, shape: Shape) -> float:
    """The norm of the tensor product of one matrix per dimension; for unknown sizes, the largest there is."""
    _check_mode(layer, "average")
    sizes = _spatial_sizes(layer, shape) if shape else (None,) * len(layer.pool_size)
    return math.prod(
        _average_norm(k, s, n, layer.padding) for k, s, n in zip(layer.pool_size, layer.strides, sizes, strict=True)
    )


def _average_norm(k: int, stride: int, size: int | None, padding: str) -> float:
    """The norm in one dimension: of the explicit matrix when the size is known."""
    if size is None or size > 2048:
        if padding == "valid":
            return convolution_bound(np.full((k, 1, 1, 1), 1 / k), (stride,)) * (1 + k * MACHINE_EPSILON)
        # Keras divides by the cells inside, perhaps a single one
        return math.sqrt(overlap((k,), (stride,), (1,))) * (1 + 2 * MACHINE_EPSILON)
    count = (size - k) // stride + 1 if padding == "valid" else -(-size // stride)
    outside = 0 if padding == "valid" else max((count - 1) * stride + k - size, 0)
    seen = np.arange(count)[:, None] * stride - outside // 2 + np.arange(k)  # cells of every window
    inside = (seen >= 0) & (seen < size)
    # Outside the image there is nothing, or (PyTorch, where the two sides differ) the cell at the border once more.
    weights = (inside / np.maximum(inside.sum(axis=1, keepdims=True), 1), np.full(seen.shape, 1 / k))
    matrices = np.zeros((2, count, size))
    for matrix, weight in zip(matrices, weights, strict=True):
        np.add.at(matrix, (np.arange(count)[:, None], np.clip(seen, 0, size - 1)), weight)
    return matrix_spectrum(matrices).bound


def _global_average(layer: Any, shape: Shape) -> float:
    cells = _spatial_sizes(layer, shape) if shape else (None,)
    return 1.0 if None in cells else (1 + 2 * MACHINE_EPSILON) / math.sqrt(math.prod(cells))


def _scaled(layer: Any, shape: Shape) -> float:
    """A root of a number of cells, which half precision rounds."""
    return 1.0 + {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(str(layer.compute_dtype), 0.0)


def _flushed(cells: int) -> float:
    """What flushing every product of a mean over that many cells, times its root, changes at most."""
    return SMALLEST_NORMAL * (4 * cells + 8) * math.sqrt(cells)


def _cells(layer: Any, x: Any) -> int:
    return math.prod(layer.pool_size if hasattr(layer, "pool_size") else _spatial_sizes(layer, x.shape))


def _sums(layer: Any, shape: Shape) -> RoundingRule:
    """Sums of at most as many terms as a window, or the image, has cells; nothing negative in the operator."""

    def rounding(x: Any, y: Any) -> Rounding:
        check_convolution(layer, x)
        cells, bound = _cells(layer, x), bound_of(layer, x.shape)
        return relative(accumulated(cells + 8) * bound, _flushed(cells), gain=bound)(x, y)

    return rounding


def _norms(layer: Any, shape: Shape) -> RoundingRule:
    """As sums, with a root that is no smaller than 1e-12, and squares that may underflow below it."""

    def rounding(x: Any, y: Any) -> Rounding:
        check_convolution(layer, x)
        cells = _cells(layer, x)
        return relative(accumulated(cells + 8), 1e-12 * 8 * UNIT_ROUNDOFF + 1e-25 * cells**2)(x, y)

    return rounding


def _exact(layer: Any, shape: Shape) -> RoundingRule:
    return relative(0.0)


rule(_k.MaxPooling1D, _k.MaxPooling2D, _k.MaxPooling3D, bound=_max_pooling, rounding=_exact)
rule(_k.GlobalMaxPooling1D, _k.GlobalMaxPooling2D, _k.GlobalMaxPooling3D, bound=1.0, rounding=_exact)
rule(_k.AveragePooling1D, _k.AveragePooling2D, _k.AveragePooling3D, bound=_average_pooling, rounding=_sums)
rule(
    *(_k.GlobalAveragePooling1D, _k.GlobalAveragePooling2D, _k.GlobalAveragePooling3D),
    bound=_global_average,
    rounding=_sums,
)
rule(
    *(layers.ScaledAveragePooling1D, layers.ScaledAveragePooling2D, layers.ScaledAveragePooling3D),
    *(layers.ScaledGlobalAveragePooling1D, layers.ScaledGlobalAveragePooling2D),
    bound=_scaled,
    rounding=_sums,
)
rule(
    *(layers.L2NormPooling1D, layers.L2NormPooling2D, layers.L2NormPooling3D),
    *(layers.GlobalL2NormPooling1D, layers.GlobalL2NormPooling2D),
    bound=1.0,
    rounding=_norms,
)
