"""Semidefinite bounds against every activation pattern of small nets, and against Jacobians of larger ones."""

import itertools
import math

import keras
import numpy as np
import pytest
from helpers import normal

import hkr_keras as hkr
from hkr_keras.certification import semidefinite
from hkr_keras.certification.semidefinite import semidefinite_bound

K = keras.layers
WIDTHS = [(3, 4, 2), (2, 5, 3), (4, 3, 3, 2), (2, 3, 3, 3, 2), (1, 6, 1), (5, 2, 5)]


def kernels_of(widths, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4) for shape in itertools.pairwise(widths)]


def largest_pattern(kernels):
    """The largest norm over all activation patterns, reachable or not: what no bound of this kind can go below."""
    largest = 0.0
    for pattern in itertools.product((0.0, 1.0), repeat=sum(kernel.shape[1] for kernel in kernels[:-1])):
        matrix, used = np.eye(len(kernels[0])), 0
        for kernel in kernels[:-1]:
            matrix = matrix @ kernel * np.array(pattern[used : used + kernel.shape[1]])
            used += kernel.shape[1]
        largest = max(largest, float(np.linalg.norm(matrix @ kernels[-1], 2)))
    return largest


def product_of_norms(kernels):
    return math.prod(float(np.linalg.norm(kernel, 2)) for kernel in kernels)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_bounds_lie_between_every_pattern_and_the_product(widths, seed):
    kernels = kernels_of(widths, seed)
    bound = semidefinite_bound(kernels)
    assert largest_pattern(kernels) <= bound <= product_of_norms(kernels) * (1 + 1e-9)
    assert bound <= 1.25 * largest_pattern(kernels)


@pytest.mark.once
def test_multipliers_from_elsewhere_are_never_trusted(monkeypatch):
    """Whatever the search returns, what is proven with it is above the truth: infinite where nothing is."""
    kernels = kernels_of((3, 4, 3, 2), 1)
    truth = largest_pattern(kernels)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(30):
        multipliers = [10 ** rng.uniform(-3, 6) * rng.uniform(0.1, 1, n) for n in (4, 3)]
        proven = semidefinite._proven(kernels, multipliers)
        assert proven >= truth
        found.append(proven)
    assert np.isfinite(found).any()
    monkeypatch.setattr(semidefinite, "_descend", lambda kernels, steps: [np.full(4, 1e-300), np.full(3, 1e-300)])
    assert semidefinite_bound(kernels) == pytest.approx(product_of_norms(kernels), rel=1e-9)


@pytest.mark.once
def test_a_matrix_that_is_not_definite_is_paid_for(monkeypatch):
    """With rho too small by a half, the negative eigenvalue must bring the bound back above the truth."""
    kernels = [np.array([[3.0]]), np.array([[1.0]])]
    gram, inverses = semidefinite._recursion(kernels, [np.array([1.0])])
    monkeypatch.setattr(semidefinite, "_recursion", lambda kernels, multipliers: (gram / 2, inverses))
    assert 3 <= semidefinite._proven(kernels, [np.array([1.0])]) < 6


@pytest.mark.once
def test_a_subclass_with_a_bound_of_its_own_ends_a_chain():
    class Backwards(K.ReLU):
        def call(self, inputs):
            return -keras.ops.abs(inputs)

    hkr.bounds.layer_bound.register(Backwards, lambda layer: 1.0)
    first, second = K.Dense(2, use_bias=False), K.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input((1,)), first, Backwards(), second])
    first.kernel.assign([[1.0, -1.0]])
    second.kernel.assign([[1.0], [1.0]])
    assert hkr.lipschitz_bound(model, method="semidefinite") == pytest.approx(2.0)  # 2 |x|


@pytest.mark.once
def test_gradients_are_those_of_differences():
    kernels = [np.random.default_rng(0).standard_normal(shape) for shape in ((5, 7), (7, 6), (6, 3))]
    logs = np.full(13, np.log(300.0))
    logs[:7] += np.log(300.0)
    _, gradient = semidefinite._loss(kernels, logs, 8)
    steps = 1e-5 * np.eye(13)
    differences = [
        (semidefinite._loss(kernels, logs + step, 8)[0] - semidefinite._loss(kernels, logs - step, 8)[0]) / 2e-5
        for step in steps
    ]
    np.testing.assert_allclose(gradient, differences, atol=1e-8)


def test_slopes_errors_and_single_kernels():
    kernels = kernels_of((3, 4, 2), 0)
    bound = semidefinite_bound(kernels)
    assert semidefinite_bound(kernels, [0.25]) == pytest.approx(bound / 4, rel=1e-9)
    assert semidefinite_bound(kernels[:1]) == pytest.approx(np.linalg.norm(kernels[0], 2), rel=1e-9)
    assert semidefinite_bound(kernels, [0.0]) == 0.0
    moved = [kernels[0] + 1e-3 * np.ones((3, 4)) / math.sqrt(12), kernels[1]]
    assert (
        largest_pattern(moved)
        <= semidefinite_bound(kernels, errors=[1e-3, 0.0])
        <= bound + 1.01e-3 * np.linalg.norm(kernels[1], 2)
    )
    for wrong in ([kernels[1], kernels[0].T[:3]], [], [np.ones(3)]):
        with pytest.raises(ValueError, match="Expected kernels"):
            semidefinite_bound(wrong)
    with pytest.raises(ValueError, match="slopes"):
        semidefinite_bound(kernels, [-1.0])


def plain_mlp(widths=(64, 128, 64, 10), scale=2.0, activation="relu"):
    """Weights near to low rank, as those of trained nets."""
    model = keras.Sequential([keras.Input((widths[0],))])
    for i, width in enumerate(widths[1:]):
        model.add(K.Dense(width, activation=activation if i < len(widths) - 2 else None))
    for i, layer in enumerate(model.layers):
        shape = layer.kernel.shape
        rank_one = np.outer(normal((shape[0],), i), normal((shape[1],), i + 9)) / math.sqrt(shape[0] * shape[1])
        layer.kernel.assign(scale * (normal(shape, i + 20) / math.sqrt(shape[0] + shape[1]) + rank_one))
    return model


def jacobians(model, points):
    """The largest norm of the Jacobian of a ReLU net at some points, in float64."""
    kernels = [keras.ops.convert_to_numpy(layer.kernel).astype("float64") for layer in model.layers]
    biases = [keras.ops.convert_to_numpy(layer.bias).astype("float64") for layer in model.layers]
    largest = 0.0
    for point in points:
        value, matrix = point, np.eye(len(point))
        for kernel, bias in zip(kernels[:-1], biases[:-1], strict=True):
            value = value @ kernel + bias
            matrix, value = matrix @ kernel * (value > 0), np.maximum(value, 0)
        largest = max(largest, float(np.linalg.norm(matrix @ kernels[-1], 2)))
    return largest


def test_a_plain_network_is_bounded_below_the_product():
    model = plain_mlp()
    product, bound = hkr.lipschitz_bound(model), hkr.lipschitz_bound(model, method="semidefinite")
    points = np.random.default_rng(0).standard_normal((200, 64))
    assert jacobians(model, points) <= bound <= 0.6 * product


@pytest.mark.once
def test_chains_go_through_layers_that_are_linear_and_end_at_others():
    """Scale, normalisation and dropout join a chain; pooling, sorting and merging end it; branches add up."""
    inputs = keras.Input((6,))
    hidden = K.Rescaling(2.0)(inputs)
    for width in (8, 7):
        hidden = K.Activation("relu")(K.Dropout(0.1)(K.Dense(width)(hidden)))
    hidden = hkr.layers.Scale(0.5)(K.Dense(4, activation="tanh")(hidden))
    hidden = K.BatchNormalization()(K.LeakyReLU(0.1)(hidden))
    one = K.Dense(4)(hkr.layers.GroupSort(2)(hidden))
    two = K.Dense(4)(K.ReLU()(K.Dense(5)(hidden)))
    model = keras.Model(inputs, K.Add()([one, two]))
    product, bound = hkr.lipschitz_bound(model), hkr.lipschitz_bound(model, method="semidefinite")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)).astype("float32")
    z = x + 0.05 * rng.standard_normal((400, 6)).astype("float32")
    change = keras.ops.convert_to_numpy(model(x)) - keras.ops.convert_to_numpy(model(z))
    assert np.max(np.linalg.norm(change, axis=1) / np.linalg.norm(x - z, axis=1)) <= bound < 0.9 * product


@pytest.mark.once
def test_models_without_chains_have_the_product():
    model = hkr.models.lipschitz_cnn((8, 8, 1), 3)
    assert hkr.lipschitz_bound(model, method="semidefinite") <= hkr.lipschitz_bound(model)
    dense = K.Dense(2)
    dense.build((None, 3))
    assert hkr.lipschitz_bound(dense, method="semidefinite") == hkr.lipschitz_bound(dense)
    with pytest.raises(ValueError, match="method='exact'"):
        hkr.lipschitz_bound(dense, method="exact")


@pytest.mark.parametrize("activation", ["gelu", "silu", "softmax"])
def test_activations_that_are_not_monotone_end_a_chain(activation):
    model = plain_mlp((4, 5, 3), activation=activation)
    assert hkr.lipschitz_bound(model, method="semidefinite") == pytest.approx(hkr.lipschitz_bound(model), rel=1e-12)
