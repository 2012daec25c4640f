"""Norms of kernels against explicit operators, and against the symbol of the convolution between the grid points."""

import itertools
import math
import tracemalloc

import keras
import numpy as np
import pytest
from helpers import BACKEND, explicit_operator, largest_singular_value, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import hkr_keras as hkr
from hkr_keras.certification import singular_values

K = keras.layers
CONFIGURATIONS = 312 if BACKEND == "torch" else 24  # the bounds are those of NumPy on every backend
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


#: Up to 1e5 weights: window, blocks, inputs and outputs, strides, and how far above what was found the bound may be.
LARGE = {
    "4x4x4": ((4, 4, 4, 1, 1, 1), 1, 1.002),
    "25x25": ((25, 25, 1, 1, 1), 1, 1.002),
    "316x316": ((316, 316, 1, 1, 1), 1, 1.05),
    "46x46x46": ((46, 46, 46, 1, 1, 1), 1, 1.3),
    "a long window": ((100_000, 1, 1, 1, 1, 1), 1, 1.002),
    "a long sequence": ((50_000, 1, 1, 2), 1, 1.002),
    "some channels": ((12, 12, 12, 1, 5, 5), 1, 1.3),
    "wide in space": ((7, 7, 7, 1, 17, 17), 1, 1.15),
    "wide": ((4, 4, 4, 1, 39, 40), 1, 1.1),
    "many channels": ((2, 1, 1, 50_000), 1, 1.01),
    "many filters": ((3, 3, 1, 1, 11_000), 1, 1.01),
    "depthwise": ((31, 31, 104, 1, 1), 1, 1.05),
    "depthwise, small": ((3, 3, 3, 3700, 1, 1), 1, 1.1),
    "grouped": ((10, 10, 10, 25, 2, 2), 2, 1.3),
    "strided": ((31, 31, 1, 10, 10), 3, 1.02),
    "windows apart": ((30, 30, 1, 10, 10), 100_000, 1.002),
}


@pytest.mark.once
@pytest.mark.parametrize("name", LARGE)
def test_memory_is_small_for_every_window(name):
    """Less than 1 GiB for any kernel of up to 1e5 weights; above the symbol at random frequencies all the same."""
    shape, stride, looseness = LARGE[name]
    blocks = normal(shape, 1).astype("float64")
    strides = (stride,) * (len(shape) - 3)
    tracemalloc.start()
    spectrum = singular_values.convolution_spectrum(blocks, strides)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**29
    assert spectrum.largest <= spectrum.bound <= looseness * spectrum.largest
    if stride == 1:
        frequencies = np.random.default_rng(0).uniform(-np.pi, np.pi, (8, len(strides)))
        frequencies[0] = 0
        reached = 0.0
        for block in np.moveaxis(blocks, -3, 0)[:4]:
            for frequency in frequencies:
                values = np.einsum("...io->io...", block)
                for angle in frequency[::-1]:
                    values = values @ np.exp(-1j * angle * np.arange(values.shape[-1]))
                reached = max(reached, float(np.linalg.norm(values, 2)))
        assert 0.1 * spectrum.largest < reached <= spectrum.bound


@pytest.mark.once
@pytest.mark.parametrize("window", [(12,), (5, 4), (3, 3, 2)])
@pytest.mark.parametrize(("channels", "blocks"), [(1, 3), (3, 1), (18, 1)])
@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_every_way_to_the_symbol_gives_the_same_bound(window, channels, blocks, products, dense, monkeypatch):
    """With and without the autocorrelation, by sums and by fast transforms: against the symbol on a grid of its own."""
    kernel = normal((*window, blocks, channels, channels + 1), 3).astype("float64")
    monkeypatch.setattr(singular_values, "_autocorrelation_seconds", lambda shape: 0.0 if products else math.inf)
    monkeypatch.setattr(singular_values, "_is_dense", lambda shape: dense)
    bound = singular_values.convolution_bound(kernel, (1,) * len(window))
    fine = np.fft.fftn(kernel, [200 // len(window) ** 2] * len(window), axes=range(len(window)))
    reached = math.sqrt(np.linalg.eigvalsh(fine @ np.swapaxes(fine.conj(), -1, -2)).max())
    assert reached <= bound <= 1.02 * reached


@pytest.mark.once
@pytest.mark.parametrize("dense", [True, False])
def test_the_grid_is_where_it_is_said_to_be(dense, monkeypatch):
    """The Gram matrices of a kernel of one tap pair tell their frequencies: a grid as fine as asked for, each once."""
    monkeypatch.setattr(singular_values, "_is_dense", lambda shape: dense)
    monkeypatch.setattr(singular_values, "_CHUNK", 2**10)
    for axis, sizes in itertools.product(range(2), [(7, 12), (16, 5)]):
        taps = np.zeros((3, 4, 1, 1, 1))
        taps[0, 0] = taps[(1, 0) if axis == 0 else (0, 1)] = 1.0  # |1 + exp(i w)|^2 = 2 + 2 cos w
        for terms, is_gram in ((taps, False), (singular_values._autocorrelation(taps), True)):
            grams = np.concatenate(list(singular_values._gram_matrices(terms, is_gram, sizes))).ravel().real
            frequencies = np.arccos(np.clip(grams / 2 - 1, -1, 1))
            different = np.unique(np.round(np.concatenate([frequencies, -frequencies]), 6))
            different = different[different > -np.pi + 1e-6]
            gaps = np.diff(np.concatenate([different, different[:1] + 2 * np.pi]))
            np.testing.assert_allclose(gaps, gaps[0], atol=1e-4)
            assert len(different) >= sizes[axis]


def image_operator(kind, size, stride, dilation, padding, image, channels, groups=1):
    """A layer, the bound of its kernel on images of that size, and the norm of its explicit operator."""
    options = {"strides": stride, "padding": padding, "use_bias": False}
    if "Transpose" not in kind:
        options["dilation_rate"] = dilation
    if groups > 1:
        options["groups"] = groups
    layer = getattr(K, kind)(*(() if "Depthwise" in kind else (2,)), size, **options)
    layer.build((None, *image, channels))
    layer.set_weights([normal(layer.weights[0].shape, 5)])
    name = next(iter(hkr.geometry.kernel_geometries(layer)))
    return layer, name, largest_singular_value(explicit_operator(layer, (*image, channels)))


IMAGES = [
    *(
        ("Conv1D", k, s, 1, p, (n,), 2)
        for k, n in ((7, 7), (5, 4), (6, 9))
        for s in (1, 2, 3)
        for p in ("same", "causal")
    ),
    *(("Conv1D", 4, s, d, p, (10,), 2) for s, d in ((1, 2), (1, 3), (3, 1)) for p in ("same", "causal", "valid")),
    *(("Conv2D", (5, 4), s, 1, p, (6, 5), 2) for s in (1, 2, 3) for p in ("same", "valid")),
    *(("Conv2D", (3, 4), 1, (2, 1), p, (5, 6), 2) for p in ("same", "valid")),
    *(("Conv2D", 5, (2, 2), 1, "same", (n, n), 1) for n in (2, 3, 7)),
    *(("Conv3D", (3, 2, 3), s, 1, "same", (3, 2, 4), 1) for s in (1, 2)),
    *(("DepthwiseConv2D", 5, s, 1, p, (5, 6), 2) for s in (1, 2) for p in ("same", "valid")),
    ("DepthwiseConv1D", 6, 2, 1, "same", (7,), 3),
    *(("Conv1DTranspose", 5, s, 1, p, (4,), 2) for s in (1, 2, 3) for p in ("same", "valid")),
    *(("Conv2DTranspose", (4, 3), s, 1, p, (3, 2), 2) for s in (1, 2) for p in ("same", "valid")),
]


@pytest.mark.many
@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_bounds_on_images_of_a_size_are_those_of_the_explicit_operator(case):
    """Equal, where nothing is cropped; never below; the taps are where every backend puts them."""
    kind, *_, padding, image, _ = case
    layer, name, norm = image_operator(*case)
    bound = singular_values.kernel_bound(layer, name, image)
    assert norm <= bound * (1 + 1e-6)  # the layer computes in float32
    if "Transpose" not in kind or padding == "valid":
        blocks, transposed = singular_values.kernel_blocks(layer, name), "Transpose" in kind
        steps = singular_values._steps(layer, blocks)
        arguments = singular_values._explicit(blocks, *steps, transposed, padding, image)
        assert singular_values.convolution_on(blocks, *arguments).largest == pytest.approx(norm, rel=1e-5)
        assert bound <= norm * (1 + 1e-5)
    assert bound <= singular_values.kernel_bound(layer, name)


def test_groups_on_images_of_a_size():
    layer, name, norm = image_operator("Conv2D", 5, 2, 1, "same", (5, 4), 4, groups=2)
    assert singular_values.kernel_bound(layer, name, (5, 4)) == pytest.approx(norm, rel=1e-5)


def test_a_window_as_large_as_its_image_has_the_bound_of_its_matrix():
    layer = K.Conv2D(1, 6, padding="valid", use_bias=False)
    layer.build((None, 6, 6, 1))
    layer.set_weights([normal(layer.weights[0].shape)])
    exact = float(np.linalg.norm(keras.ops.convert_to_numpy(layer.kernel).astype("float64")))
    assert singular_values.kernel_bound(layer, "kernel", (6, 6)) == pytest.approx(exact, rel=1e-9)
    assert singular_values.kernel_bound(layer, "kernel", (None, 6)) > 1.5 * exact


def test_images_without_an_explicit_matrix():
    """Unknown or large images, one cell, circles, and images that Keras refuses: the bound for every size."""
    layer = K.Conv1D(2, 3)
    layer.build((None, 8, 2))
    for sizes in (None, (None,), (10_000,), (2,), (4, 4)):
        assert singular_values.kernel_bound(layer, "kernel", sizes) == singular_values.kernel_bound(layer, "kernel")
    circular = hkr.layers.OrthogonalConv1D(2, 3, padding="circular")
    circular.build((None, 4, 2))
    assert singular_values.kernel_bound(circular, "kernel", (4,)) == singular_values.kernel_bound(circular, "kernel")
    with pytest.raises(ValueError, match="no smaller than the window"):
        singular_values.convolution_on(np.ones((3, 1, 1, 1)), (1,), (1,), "valid", (2,))


def test_separable_layers_with_large_compositions_fall_back_on_the_product():
    layer = K.SeparableConv2D(1000, 31, use_bias=False)
    layer.build((None, 32, 32, 33))
    tracemalloc.start()
    bound = hkr.lipschitz_bound(layer)
    singular_values.absolute_bound(layer, "depthwise_kernel")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    product = math.prod(singular_values.kernel_bound(layer, name) for name in ("depthwise_kernel", "pointwise_kernel"))
    assert bound == pytest.approx(product, rel=1e-12)
    assert peak < 2**29


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


@pytest.mark.once
def test_one_grid_point_less_is_noticed():
    """The value on the grid alone is below the truth: the correction is needed."""
    block = np.array([1.0, 0.7, -0.2]).reshape(3, 1, 1)
    truth = largest_symbol(block, (1,))
    on_a_coarse_grid = symbol_norms(block, (1,), 2 * np.pi * (np.arange(8)[:, None] + 0.5) / 8).max()
    assert on_a_coarse_grid < truth <= singular_values.convolution_bound(block[:, None], (1,))


@pytest.mark.once
def test_absolute_bounds_are_above_the_norm_of_the_absolute_values():
    for seed in range(CONFIGURATIONS // 2 if BACKEND == "jax" else 60):
        layer, shape = configuration(seed)
        names = list(hkr.geometry.kernel_geometries(layer))
        product = math.prod(singular_values.absolute_bound(layer, name) for name in names)
        for name in names:
            getattr(layer, name).assign(np.abs(keras.ops.convert_to_numpy(getattr(layer, name))))
        assert largest_singular_value(explicit_operator(layer, shape)) <= product


@pytest.mark.once
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
