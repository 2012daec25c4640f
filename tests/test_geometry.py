import itertools
import math
from collections import Counter

import cases
import keras
import numpy as np
import pytest
from helpers import normal, to_numpy

import hkr_keras as hkr
from hkr_keras.geometry import Geometry, kernel_geometries, model_kernels, overlap

KERNELS = [
    # geometry, kernel shape, shape of the matrices
    (Geometry(), (5, 3), (1, 5, 3)),
    (Geometry(gain=3.0), (3, 3, 2, 4), (1, 18, 4)),
    (Geometry(groups=2), (3, 2, 6), (2, 6, 3)),
    (Geometry(groups=3), (2, 2, 2, 1, 6), (3, 8, 2)),
    (Geometry(depthwise=True), (3, 4, 2), (4, 3, 2)),
    (Geometry(depthwise=True), (3, 2, 5, 1), (5, 6, 1)),
    (Geometry(transposed=True), (3, 3, 4, 2), (1, 36, 2)),
]


@pytest.mark.parametrize(("geometry", "shape", "matrix_shape"), KERNELS)
def test_matrices_and_back(geometry, shape, matrix_shape):
    kernel = normal(shape)
    matrices = geometry.to_matrices(kernel)
    assert tuple(matrices.shape) == matrix_shape
    assert np.array_equal(to_numpy(geometry.from_matrices(matrices, shape), "float32"), kernel)


def test_blocks_hold_the_weights_of_their_own_outputs():
    kernel = normal((3, 2, 6))
    blocks = to_numpy(Geometry(groups=2).to_matrices(kernel), "float32")
    assert np.array_equal(blocks[1], kernel[:, :, 3:].reshape(6, 3))
    kernel = normal((3, 4, 2))
    blocks = to_numpy(Geometry(depthwise=True).to_matrices(kernel), "float32")
    assert np.array_equal(blocks[2], kernel[:, 2, :])


@pytest.mark.parametrize("k", range(1, 8))
def test_overlap_is_the_largest_count(k):
    for s, d in itertools.product(range(1, 5), range(1, 4)):
        windows = ({o * s + tap * d for tap in range(k)} for o in range(-30, 30))
        counts = Counter(pixel for window in windows for pixel in window)
        assert overlap((k,), (s,), (d,)) == max(counts.values()), (k, s, d)


def test_overlap_multiplies_over_dimensions():
    assert overlap((3, 5), (2, 1), (1, 1)) == 2 * 5


@pytest.mark.parametrize(
    ("make", "gains"),
    [
        (lambda: keras.layers.Dense(2), {"kernel": 1.0}),
        (lambda: keras.layers.Conv1D(2, 3), {"kernel": math.sqrt(3)}),
        (lambda: keras.layers.Conv2D(2, 3, strides=2), {"kernel": 2.0}),
        (lambda: keras.layers.Conv2D(2, 3, strides=3), {"kernel": 1.0}),
        (lambda: keras.layers.Conv2D(2, (3, 5), dilation_rate=2), {"kernel": math.sqrt(15)}),
        (lambda: keras.layers.Conv3D(2, 2), {"kernel": math.sqrt(8)}),
        (lambda: keras.layers.Conv2DTranspose(2, 4, strides=2), {"kernel": 2.0}),
        (lambda: keras.layers.DepthwiseConv2D(3), {"kernel": 3.0}),
        (lambda: keras.layers.SeparableConv1D(2, 4), {"depthwise_kernel": 2.0, "pointwise_kernel": 1.0}),
        (keras.layers.Flatten, {}),
    ],
    ids=cases.name,
)
def test_gains(make, gains):
    assert {name: geometry.gain for name, geometry in kernel_geometries(make()).items()} == pytest.approx(gains)


@pytest.mark.parametrize(
    ("geometry", "rank", "axes"),
    [
        (Geometry(), 2, (0,)),
        (Geometry(groups=2), 4, (0, 1, 2)),
        (Geometry(depthwise=True), 4, (0, 1)),
        (Geometry(transposed=True), 4, (0, 1, 3)),
    ],
)
def test_output_vector_axes(geometry, rank, axes):
    assert geometry.output_vector_axes(rank) == axes


def test_model_kernels_yields_every_variable_once():
    shared = hkr.layers.LipschitzDense(4, name="shared")
    x = keras.Input((4,))
    inner = keras.Model(x, hkr.layers.LipschitzDense(4, name="inner")(shared(x)))
    x = keras.Input((4,))
    y = keras.layers.Dense(2, name="last")(inner(shared(inner(x))))
    model = keras.Sequential([keras.Input((4,)), keras.Model(x, y), keras.layers.Flatten()])

    found = list(model_kernels(model))
    assert sorted(layer.name for layer, _, _ in found) == ["inner", "last", "shared"]
    assert len({id(variable) for _, variable, _ in found}) == 3
    assert all(variable is layer.kernel for layer, variable, _ in found)


def test_model_kernels_finds_both_kernels_of_a_separable_layer_and_skips_unbuilt_layers():
    model = keras.Sequential([keras.Input((8, 2)), keras.layers.SeparableConv1D(3, 3)])
    assert [tuple(variable.shape) for _, variable, _ in model_kernels(model)] == [(3, 2, 1), (1, 2, 3)]
    assert list(model_kernels(keras.layers.Dense(2))) == []


def test_geometries_can_be_registered():
    class Mine(keras.layers.Layer):
        pass

    assert kernel_geometries(Mine()) == {}
    kernel_geometries.register(Mine, lambda layer: {"w": Geometry(gain=2.0)})
    assert kernel_geometries(Mine())["w"].gain == 2.0
