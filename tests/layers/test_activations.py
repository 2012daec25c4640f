"""Activations against sorting with NumPy, and what they keep: the norms of inputs and of gradients."""

import math

import cases
import keras
import numpy as np
import pytest
from helpers import check_layer, flat, gradient, largest_ratio, normal, state_kept, to_numpy
from keras import ops

import hkr_keras as hkr

L = hkr.layers
LIPSCHITZ = 1 + 1e-5  # float32 outputs of random pairs


def sorted_groups(x, n, axis):
    moved = np.moveaxis(x, axis, -1)
    groups = np.sort(moved.reshape(*moved.shape[:-1], -1, n), axis=-1)
    return np.moveaxis(groups.reshape(moved.shape), -1, axis)


@pytest.mark.many
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("channels", [12, 120])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_group_sort(rank, channels, n, axis):
    shape = [3] * rank
    shape[axis] = channels
    x = normal(shape)
    layer = L.GroupSort(n, axis=axis)
    expected = sorted_groups(x, n, axis)
    np.testing.assert_allclose(to_numpy(layer(x)), expected, atol=1e-6)
    assert layer.compute_output_shape(x.shape) == x.shape
    model = keras.Sequential([keras.Input(shape[1:]), layer])
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 64), (5, 66), (5, 72), (2, 3, 96), (2, 3, 3, 128)])
def test_group_sort_in_all_its_forms(shape):
    x = normal(shape, scale=100.0)
    np.testing.assert_allclose(to_numpy(L.GroupSort(2)(x)), sorted_groups(x, 2, -1), rtol=1e-6, atol=1e-4)
    model = keras.Sequential([keras.Input(shape[1:]), L.GroupSort(2)])  # the batch is unknown to the compiler
    np.testing.assert_allclose(model.predict(x, verbose=0), sorted_groups(x, 2, -1), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("n", [1, 0, -2, 2.0, None])
def test_bad_group_size(n):
    with pytest.raises(ValueError, match="Received: n="):
        L.GroupSort(n)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: L.GroupSort(2), (None, 5)),
        (lambda: L.GroupSort(3), (None, 4, 4)),
        (lambda: L.GroupSort(2, axis=1), (None, 5, 4)),
        (lambda: L.GroupSort(2), (None, 4, None)),
        (L.MaxMin, (None, 3)),
        (L.Householder, (None, 7)),
    ],
    ids=lambda value: cases.name(value) or str(value),
)
def test_channels_that_do_not_divide_are_refused(make, shape):
    with pytest.raises(ValueError, match=r"Received: input_shape=\("):
        make().build(shape)


def test_max_min_and_full_sort():
    x = normal((6, 4, 10))
    first, second = np.split(x, 2, axis=-1)
    expected = np.concatenate([np.maximum(first, second), np.minimum(first, second)], axis=-1)
    largest = 3 * 2.0**-24 * np.hypot(first, second).max()  # what a difference and a sum round
    np.testing.assert_allclose(to_numpy(L.MaxMin()(x), "float32"), expected, rtol=0, atol=largest)
    assert np.array_equal(to_numpy(L.FullSort()(x), "float32"), np.sort(x, axis=-1))
    assert np.array_equal(to_numpy(L.FullSort(axis=1)(x), "float32"), np.sort(x, axis=1))
    np.testing.assert_allclose(
        to_numpy(L.MaxMin(axis=1)(x[:, :, 0]), "float32"),
        np.sort(x[:, :, 0].reshape(6, 2, 2), axis=1)[:, ::-1].reshape(6, 4),
        rtol=0,
        atol=largest,
    )


ACTIVATIONS = [
    (lambda axis: L.GroupSort(2, axis=axis)),
    (lambda axis: L.GroupSort(4, axis=axis)),
    (lambda axis: L.MaxMin(axis=axis)),
    (lambda axis: L.FullSort(axis=axis)),
    (lambda axis: L.Householder(axis=axis)),
]


@pytest.mark.many
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("make", ACTIVATIONS)
def test_activations_keep_norms_of_inputs_and_gradients(make, axis):
    shape = (8, 3) if axis == 1 else (3, 8)
    layer = make(axis)
    layer.build((None, *shape))
    if layer.weights:
        layer.set_weights([normal(layer.weights[0].shape, scale=3.0)])
    check_layer(layer, shape)
    x = normal((16, *shape))
    np.testing.assert_allclose(
        np.linalg.norm(flat(to_numpy(layer(x))), axis=1), np.linalg.norm(flat(x), axis=1), rtol=1e-5
    )
    direction = normal(x.shape, seed=7)
    pulled = gradient(lambda a: layer(a) * ops.convert_to_tensor(direction), x)
    np.testing.assert_allclose(np.linalg.norm(flat(pulled), axis=1), np.linalg.norm(flat(direction), axis=1), rtol=1e-5)


def test_householder_starts_as_max_min():
    x = normal((10, 6))
    np.testing.assert_allclose(to_numpy(L.Householder()(x)), to_numpy(L.MaxMin()(x)), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_householder_is_continuous_for_any_angle(seed):
    angle = np.random.default_rng(seed).uniform(-10, 10)
    layer = L.Householder(theta_initializer=keras.initializers.Constant(0.5))
    assert L.Householder.from_config(layer.get_config()).get_config() == layer.get_config()
    layer.build((None, 4))
    np.testing.assert_allclose(to_numpy(layer.angles), 0.5)
    layer = L.Householder()
    layer.build((None, 2))
    layer.set_weights([np.array([angle], "float32")])
    along = np.array([math.cos(angle / 2), math.sin(angle / 2)])
    across = np.array([-along[1], along[0]])
    radii = np.linspace(-2, 2, 41)[:, None]
    left, right = (np.float32(radii * along + side * 1e-3 * across) for side in (-1, 1))
    assert np.linalg.norm(to_numpy(layer(left)) - to_numpy(layer(right)), axis=1).max() <= 2e-3 * 1.01
    x, z = normal((200, 2), seed), normal((200, 2), seed + 100)
    assert largest_ratio(layer, x, z) <= LIPSCHITZ


@pytest.mark.parametrize("make", ACTIVATIONS)
def test_the_axis_is_that_of_the_data_format_when_it_is_left_out(make):
    with state_kept():
        keras.config.set_image_data_format("channels_first")
        layer = make(None)
        x = normal((2, 8, 3, 5))
        np.testing.assert_allclose(to_numpy(layer(x)), to_numpy(make(1)(x)))
        vector = make(None)(x[:, :, 0, 0])
        np.testing.assert_allclose(to_numpy(vector), to_numpy(make(-1)(x[:, :, 0, 0])))
    config = layer.get_config()
    assert config["axis"] == 1  # a file means the same everywhere
    np.testing.assert_allclose(to_numpy(type(layer).from_config(config)(x)), to_numpy(make(1)(x)))
    assert make(None).axis == -1
    assert type(layer).from_config({**config, "axis": -1}).axis == -1  # as stored before


def test_a_stored_activation_of_another_layer_comes_back_with_its_weights(tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.LipschitzDense(6, activation=L.Householder())])
    (angles,) = (weight for weight in model.weights if weight.name == "angles")  # before the first call
    angles.assign(normal(angles.shape))
    model.save(tmp_path / "model.keras")
    copy = keras.models.load_model(tmp_path / "model.keras")
    x = normal((5, 4))
    assert np.array_equal(to_numpy(copy(x)), to_numpy(model(x)))
