"""Constants and radii around inputs, against Jacobians, differences and every boundary near the inputs."""

import dataclasses
import itertools
import math

import keras
import numpy as np
import pytest

import hkr_keras as hkr
from hkr_keras.certification.local import local_bounds, local_radii

K = keras.layers


def network(widths=(5, 12, 8, 3), seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    kernels = [scale * rng.standard_normal(shape) / math.sqrt(shape[0]) for shape in itertools.pairwise(widths)]
    return kernels, [0.5 * rng.standard_normal(width) for width in widths[1:]]


def outputs_and_jacobians(kernels, biases, slopes, x):
    value, jacobian = x, np.broadcast_to(np.eye(x.shape[1]), (len(x), x.shape[1], x.shape[1]))
    for kernel, bias, slope in zip(kernels[:-1], biases[:-1], slopes, strict=True):
        value = value @ kernel + bias
        sides = np.where(value > 0, 1.0, slope)
        value, jacobian = value * sides, jacobian @ kernel * sides[:, None]
    return value @ kernels[-1] + biases[-1], jacobian @ kernels[-1]


def in_balls(x, epsilon, count, seed=0):
    """Points `(count, n, features)` of the balls, half of them on their boundary."""
    directions = np.random.default_rng(seed).standard_normal((count, *x.shape))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return x + epsilon * directions * np.where(np.arange(count) % 2, 1.0, 0.5)[:, None, None]


@pytest.mark.parametrize("slopes", [(0.0, 0.0), (0.1, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.05, 0.5, 20.0])
@pytest.mark.parametrize("scale", [1.0, 1e-90])
def test_constants_are_above_the_jacobians_in_the_ball(slopes, epsilon, scale):
    kernels, biases = network(scale=scale)
    biases = [bias * scale**i for i, bias in enumerate(biases, 1)]
    x = np.random.default_rng(1).standard_normal((70, 5))
    found = local_bounds(kernels, biases, slopes, x, epsilon)
    columns = np.arange(70) % 3
    differences = local_bounds(kernels, biases, slopes, x, epsilon, columns)
    for points in in_balls(x, epsilon, 40):
        _, jacobians = outputs_and_jacobians(kernels, biases, slopes, points)
        assert np.all(np.linalg.norm(jacobians, 2, axis=(1, 2)) <= found)
        moved = jacobians - jacobians[np.arange(70), :, columns][:, :, None]
        assert np.all(np.linalg.norm(moved, axis=1) <= differences)
    if epsilon == 0:
        _, jacobians = outputs_and_jacobians(kernels, biases, slopes, x)
        np.testing.assert_allclose(found, np.linalg.norm(jacobians, 2, axis=(1, 2)), rtol=1e-6)
    product = math.prod(float(np.linalg.norm(kernel, 2)) for kernel in kernels)
    assert np.all(found <= product * (1 + 1e-9))


@pytest.mark.once
def test_constants_grow_with_the_ball_and_each_ball_counts_by_itself():
    kernels, biases = network()
    x = np.random.default_rng(2).standard_normal((6, 5))
    radii = np.array([0.0, 0.01, 0.1, 0.3, 1.0, 3.0])
    table = np.stack([local_bounds(kernels, biases, [0.0, 0.0], x, radius) for radius in radii])
    assert np.all(np.diff(table, axis=0) >= -1e-9)
    each = local_bounds(kernels, biases, [0.0, 0.0], x, radii)
    np.testing.assert_allclose(each, table[np.arange(6), np.arange(6)], rtol=1e-12)
    assert local_bounds(kernels, biases, [0.0, 0.0], x[:0], 1.0).shape == (0,)


def relu_model(kernels, biases, head=()):
    model = keras.Sequential([keras.Input((len(kernels[0]),)), *head])
    for kernel in kernels[:-1]:
        model.add(K.Dense(kernel.shape[1], activation="relu"))
    model.add(K.Dense(kernels[-1].shape[1]))
    model.set_weights([part for pair in zip(kernels, biases, strict=True) for part in pair])
    return model


def test_radii_hold_and_are_larger_than_those_of_the_whole_space():
    kernels, biases = network((2, 16, 16, 3), seed=3)
    model = relu_model(kernels, biases)
    kernels, biases = ([keras.ops.convert_to_numpy(w).astype("float64") for w in model.weights[i::2]] for i in (0, 1))
    x = np.random.default_rng(0).standard_normal((60, 2)).astype("float32")
    radii = local_radii(model, x)
    outputs, _ = outputs_and_jacobians(kernels, biases, [0.0, 0.0], x.astype("float64"))
    classes = outputs.argmax(axis=1)
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for part in (0.25, 0.5, 0.75, 1 - 1e-9):
        points = x[:, None].astype("float64") + part * radii[:, None, None] * circle
        moved, _ = outputs_and_jacobians(kernels, biases, [0.0, 0.0], points.reshape(-1, 2))
        assert np.all(moved.argmax(axis=1).reshape(60, -1) == classes[:, None])
    everywhere = hkr.certify(model, x, verbose=0).radius
    assert np.mean(radii > everywhere) > 0.9
    assert np.median(radii / everywhere) > 1.5
    further = x[:, None].astype("float64") + 3 * radii[:, None, None] * circle  # and they are not far from the truth
    moved, _ = outputs_and_jacobians(kernels, biases, [0.0, 0.0], further.reshape(-1, 2))
    assert np.mean(np.any(moved.argmax(axis=1).reshape(60, -1) != classes[:, None], axis=1)) > 0.3


@pytest.mark.once
def test_models_are_read_as_they_are_written():
    """Activations as functions and layers, a bias that is missing, two Dense layers in a row, a last activation."""
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [
            *(keras.Input((2, 2)), K.Flatten(), K.Dense(6, use_bias=False), K.LeakyReLU(0.1), K.Dropout(0.5)),
            *(K.Dense(5), K.Dense(4, activation="relu"), K.Dense(3), K.Activation("leaky_relu"), K.Dense(3), K.ReLU()),
        ]
    )
    model.set_weights([rng.standard_normal(weight.shape) for weight in model.weights])
    x = rng.standard_normal((20, 2, 2)).astype("float32")
    found = hkr.local_bound(model, x, 0.1)
    assert found.shape == (20,)
    assert np.all(found <= hkr.lipschitz_bound(model, method="semidefinite"))
    for points in in_balls(x.reshape(20, 4), 0.1, 20):
        results = [keras.ops.convert_to_numpy(model(z.astype("float32"))) for z in (points.reshape(x.shape), x)]
        change = results[0] - results[1]
        distances = np.linalg.norm(points - x.reshape(20, 4), axis=1)
        assert np.all(np.linalg.norm(change, axis=1) <= found * distances * (1 + 1e-4))


@pytest.mark.once
@pytest.mark.parametrize(
    "make",
    [
        lambda: [K.Dense(3, activation="tanh"), K.Dense(2)],
        lambda: [K.Dense(4), hkr.layers.GroupSort(2), K.Dense(2)],
        lambda: [K.ReLU(), K.Dense(2)],
        lambda: [K.Dense(3), K.ReLU(max_value=1.0), K.Dense(2)],
        lambda: [K.Reshape((2, 2)), K.Dense(2)],
    ],
    ids=["tanh", "GroupSort", "first", "max_value", "Reshape"],
)
def test_other_layers_are_named(make):
    model = keras.Sequential([keras.Input((4,)), *make()])
    with pytest.raises(ValueError, match=r"Expected Dense layers with ReLU .* Received: \w+ '\w+'"):
        hkr.local_bound(model, np.zeros((1, 4)), 0.1)


@pytest.mark.once
def test_wrong_arguments_are_refused():
    kernels, biases = network()
    model = relu_model(kernels, biases)
    with pytest.raises(ValueError, match="finite inputs"):
        hkr.local_bound(model, np.zeros((1, 4)), 0.1)
    with pytest.raises(ValueError, match="finite inputs"):
        hkr.local_bound(model, np.full((1, 5), np.nan), 0.1)
    with pytest.raises(ValueError, match="epsilon=-1"):
        hkr.local_bound(model, np.zeros((1, 5)), -1.0)
    with pytest.raises(ValueError, match="slopes"):
        local_bounds(kernels, biases, [0.0], np.zeros((1, 5)), 1.0)


def relu_network(seed=0):
    keras.utils.set_random_seed(seed)
    hidden = [K.Dense(16, activation="relu"), K.Dense(12), K.LeakyReLU(negative_slope=0.1)]
    return keras.Sequential([keras.Input((2, 3)), K.Flatten(), *hidden, K.Dense(4)])


def test_certificates_take_the_larger_radius_around_each_input():
    model, x = relu_network(), np.random.default_rng(0).standard_normal((70, 2, 3))  # float64, rounded before the model
    labels = np.arange(70) % 4
    everywhere = hkr.certify(model, x, verbose=0)
    local = hkr.certify(model, iter([(x[:40], labels[:40]), (x[40:], labels[40:])]), verbose=0, local=True)
    around = local_radii(model, x.astype("float32"), prediction=everywhere.prediction)
    assert (local.method, local.bound) == ("local", everywhere.bound)
    np.testing.assert_allclose(local.radius, np.maximum(everywhere.radius, around), atol=1e-6)
    assert (local.radius > everywhere.radius).mean() > 0.5
    np.testing.assert_array_equal(local.labels, labels)

    flat = x.reshape(70, 6)
    points = in_balls(flat, 1.0, 400) - flat
    points = flat + points * np.where(np.isfinite(local.radius), local.radius, 1.0)[:, None] * 0.9999
    found = model.predict(points.reshape(-1, 2, 3), batch_size=4096, verbose=0).argmax(axis=1).reshape(400, 70)
    assert (found == local.prediction).all()

    stored = hkr.Certificate.from_json(local.to_json())
    assert stored.method == "local"
    assert stored.verify(model, x, verbose=0)
    assert not dataclasses.replace(stored, radius=1.01 * stored.radius).verify(model, x, verbose=0)


def test_another_class_in_front_has_no_radius():
    model, x = relu_network(), np.random.default_rng(0).standard_normal((30, 2, 3)).astype("float32")
    right = hkr.certify(model, x, verbose=0).prediction
    assert (local_radii(model, x, prediction=right) > 0).all()
    assert (local_radii(model, x, prediction=(right + 1) % 4) == 0).all()


def test_certificates_around_inputs_are_refused_where_nothing_is_known():
    x = np.ones((1, 3), "float32")
    with pytest.raises(ValueError, match="rigorous=True"):
        hkr.certify(relu_network(), x.reshape(1, 1, 3), verbose=0, rigorous=True, local=True)
    for layer, name in (
        (K.Dense(4, "tanh"), "Dense"),
        (hkr.layers.GroupSort(3), "GroupSort"),
        (K.Dense(1), "two logits"),
    ):
        model = keras.Sequential([keras.Input((3,)), *([layer, K.Dense(2)] if name != "two logits" else [layer])])
        with pytest.raises(ValueError, match=f"Received: .*{name}|{name}"):
            hkr.certify(model, x, verbose=0, local=True)
    left, right = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([left, right], K.Dense(2)(K.Add()([left, right])))
    with pytest.raises(ValueError, match="Add"):
        hkr.certify(model, [x, x], verbose=0, local=True)
