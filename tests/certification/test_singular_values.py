"""Norms of kernels against explicit operators, and against the symbol of the convolution between the grid points."""

import itertools
import math

import keras
import numpy as np
import pytest
from helpers import BACKEND, explicit_operator, largest_singular_value, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import hkr_keras as hkr
from hkr_keras.certification import singular_values

K = keras.layers
CONFIGURATIONS = 24 if BACKEND == "jax" else 312  # JAX compiles every one of them
KINDS = ("Dense", "Conv1D", "Conv2D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
KINDS += ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D")


def configuration(seed):
    """A random layer with random weights, and the shape of a small input."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    channels, outputs = (int(n) for n in rng.integers(1, 9, 2))
    if seed % 10 == 0 and kind in ("Dense", "Conv1D", "Conv2D"):
        channels, outputs = (int(n) for n in rng.choice([16, 24, 48, 64], 2))
    if kind == "Dense":
        layer, shape = K.Dense(outputs, use_bias=False), (channels,)
    else:
        rank = int(next(c for c in kind if c.isdigit()))
        size = tuple(int(k) for k in rng.integers(1, 6 if rank < 3 else 4, rank))
        strides = int(rng.integers(1, 4)) if rng.random() < 0.5 else 1
        dilation = int(rng.integers(1, 4)) if strides == 1 and rng.random() < 0.4 else 1
        causal = rank == 1 and kind == "Conv1D" and rng.random() < 0.3
        padding = "causal" if causal else str(rng.choice(["same", "valid"]))
        options = {"strides": strides, "padding": padding, "use_bias": False}
        if "Transpose" in kind:
            if strides > min(size):  # Keras would leave gaps, which is fine, but some backends refuse
                options["strides"] = 1
        else:
            options["dilation_rate"] = dilation
        if kind.startswith("Depthwise"):
            layer = getattr(K, kind)(size, depth_multiplier=int(rng.integers(1, 4)), **options)
        elif kind.startswith("Separable"):
            layer = getattr(K, kind)(outputs, size, depth_multiplier=int(rng.integers(1, 4)), **options)
        else:
            groups = int(rng.choice([g for g in (1, 2, 3) if channels % g == 0 and outputs % g == 0]))
            if "Transpose" not in kind and rng.random() < 0.3:
                options["groups"] = groups
            layer = getattr(K, kind)(outputs, size, **options)
        extent = [max(dilation * (k - 1) + 1, 8 if rank == 1 else 5 if rank == 2 else 3) for k in size]
        shape = (*(n + int(rng.integers(0, 3)) for n in extent), channels)
        if math.prod(shape) > 1500:
            shape = (*extent, channels)
    layer.build((None, *shape))
    layer.set_weights([normal(weight.shape, seed + i) for i, weight in enumerate(layer.weights)])
    return layer, shape


def blocks_of(layer):
    """Kernels `(*window, inputs, outputs)` of the blocks of a layer: composed, per group or per channel."""
    weights = [np.asarray(keras.ops.convert_to_numpy(weight), "float64") for weight in layer.weights]
    kernel = weights[0]
    if "Separable" in type(layer).__name__:
        pointwise = weights[1].reshape(*kernel.shape[-2:], -1)
        return [np.einsum("...cm,cmo->...co", kernel, pointwise)]
    if "Depthwise" in type(layer).__name__:
        return [kernel[..., [channel], :] for channel in range(kernel.shape[-2])]
    return np.split(kernel, getattr(layer, "groups", 1), axis=-1)


def symbol_norms(block, strides, frequencies):
    """Norms of a strided convolution at frequencies `(n, dimensions)`: each of all that alias there."""
    window = block.shape[:-2]
    taps = np.array(list(itertools.product(*(range(k) for k in window))))
    aliases = np.array(list(itertools.product(*(range(s) for s in strides)))) * 2 * np.pi / np.array(strides)
    points = np.asarray(frequencies)[:, None] / np.array(strides) + aliases
    symbols = np.einsum("nat,tio->naio", np.exp(-1j * points @ taps.T), block.reshape(-1, *block.shape[-2:]))
    stacked = symbols.reshape(len(points), -1, block.shape[-1])
    adjoint = stacked.conj().swapaxes(1, 2)
    smaller = stacked @ adjoint if stacked.shape[1] < stacked.shape[2] else adjoint @ stacked
    return np.sqrt(np.linalg.eigvalsh(smaller)[:, -1] / math.prod(strides))


def largest_symbol(block, strides):
    """The largest norm over frequencies: a coarse search, then finer ones around the eight best points."""
    rank = len(strides)
    points = 13 if rank == 3 else 25
    frequencies = np.array(list(itertools.product(np.linspace(-np.pi, np.pi, points), repeat=rank)))
    norms, width = symbol_norms(block, strides, frequencies), 2 * np.pi / (points - 1)
    for _ in range(3):
        around = np.array(list(itertools.product(np.linspace(-width, width, 5), repeat=rank)))
        frequencies = (frequencies[np.argsort(norms)[-8:], None] + around).reshape(-1, rank)
        norms, width = symbol_norms(block, strides, frequencies), width / 2
    return norms.max()


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_bounds_of_random_layers_are_above_the_truth_and_tight(seed):
    """Never below the explicit operator of a small image; at most 1 % above what large images reach."""
    layer, shape = configuration(seed)
    bound = hkr.lipschitz_bound(layer)
    norm = largest_singular_value(explicit_operator(layer, shape))
    assert norm <= bound * (1 + (1e-6 if "Separable" in type(layer).__name__ else 0))  # float32 composes two kernels
    blocks = blocks_of(layer)
    if isinstance(layer, K.Dense):
        reached = largest_singular_value(blocks[0])
    else:
        reached = max(largest_symbol(block, layer.strides) for block in blocks)
    assert reached <= bound <= 1.01 * reached


@settings(max_examples=25, deadline=None)
@given(
    window=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    stride=st.integers(1, 4),
    channels=st.integers(1, 4),
    outputs=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_convolution_bound_is_above_every_frequency(window, stride, channels, outputs, seed):
    block = np.random.default_rng(seed).standard_normal((*window, channels, outputs))
    strides = (stride,) * len(window)
    bound = singular_values.convolution_bound(block[..., None, :, :], strides)
    frequencies = np.random.default_rng(seed).uniform(-np.pi, np.pi, (20, len(window)))
    assert symbol_norms(block, strides, frequencies).max() <= bound


def test_wide_convolutions_take_the_same_route():
    """Beyond order 16 a Cholesky factor, and no eigenvalue, proves the bound: both must agree."""
    block = np.random.default_rng(0).standard_normal((3, 3, 1, 40, 40))
    spectrum = singular_values.convolution_spectrum(block, (1, 1))
    grid = np.fft.fftn(block[:, :, 0], (50, 50), axes=(0, 1))
    values = np.linalg.svd(grid, compute_uv=False)
    assert values.max() <= spectrum.bound <= 1.005 * values.max()
    assert spectrum.largest <= spectrum.bound
    assert values.min() * 0.5 <= spectrum.smallest <= 0.2 * values.max()


def test_an_orthogonal_convolution_has_the_bound_one():
    """Shifts by one pixel: the autocorrelation vanishes off the centre, and nothing is lost to the grid."""
    kernel = np.zeros((3, 3, 1, 2, 2))
    kernel[0, 2, 0, 0, 0] = kernel[2, 1, 0, 1, 1] = 1.0
    assert 1 <= singular_values.convolution_bound(kernel, (1, 1)) < 1 + 1e-12


def test_one_grid_point_less_is_noticed():
    """The value on the grid alone is below the truth: the correction is needed."""
    block = np.array([1.0, 0.7, -0.2]).reshape(3, 1, 1)
    truth = largest_symbol(block, (1,))
    on_a_coarse_grid = symbol_norms(block, (1,), 2 * np.pi * (np.arange(8)[:, None] + 0.5) / 8).max()
    assert on_a_coarse_grid < truth <= singular_values.convolution_bound(block[:, None], (1,))


def test_absolute_bounds_are_above_the_norm_of_the_absolute_values():
    for seed in range(CONFIGURATIONS // 2 if BACKEND == "jax" else 60):
        layer, shape = configuration(seed)
        names = list(hkr.geometry.kernel_geometries(layer))
        product = math.prod(singular_values.absolute_bound(layer, name) for name in names)
        for name in names:
            getattr(layer, name).assign(np.abs(keras.ops.convert_to_numpy(getattr(layer, name))))
        assert largest_singular_value(explicit_operator(layer, shape)) <= product


def test_equal_kernels_are_computed_once(monkeypatch):
    calls = []
    original = singular_values._operator_spectrum
    monkeypatch.setattr(singular_values, "_operator_spectrum", lambda *a: (calls.append(1), original(*a))[1])
    monkeypatch.setattr(singular_values, "_RESULTS", {})
    layer = K.Conv1D(2, 3)
    layer.build((None, 8, 2))
    first = hkr.lipschitz_bound(layer)
    assert hkr.lipschitz_bound(layer) == first
    assert len(calls) == 1
    layer.kernel.assign(2 * keras.ops.convert_to_numpy(layer.kernel))
    assert hkr.lipschitz_bound(layer) == pytest.approx(2 * first, rel=1e-12)
    assert len(calls) == 2
