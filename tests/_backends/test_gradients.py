"""Gradients with respect to inputs: those of explicit formulas, on every backend."""

import keras
import numpy as np
import pytest
from helpers import gradient, normal, to_numpy

import hkr_keras as hkr
from hkr_keras._backends.gradients import as_function, first_change, in_batches, input_gradient


def network(outputs=3):
    return hkr.models.lipschitz_mlp((4,), outputs, widths=(8,))


def test_of_a_linear_model_is_its_kernel():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    weights = normal((5, 3))
    expected = weights @ model.layers[0].get_weights()[0].T
    np.testing.assert_allclose(input_gradient(model)(normal((5, 4)), weights), expected, atol=1e-6)


def test_of_a_network_is_that_of_the_backend():
    model, x = network(), normal((6, 4))
    weights = np.tile([1.0, 0.0, -1.0], (6, 1))
    expected = gradient(lambda a: model(a)[:, 0] - model(a)[:, 2], x)
    found = in_batches(input_gradient(model), x, weights, batch_size=4)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_functions_see_weights_that_change_later():
    model, x = network(1), normal((6, 4))
    function, slope = as_function(model), input_gradient(model)
    before = to_numpy(function(keras.ops.convert_to_tensor(x))), slope(x, np.ones((6, 1)))
    model.compile("adam", loss="mse")
    model.fit(x, np.ones((6, 1)), verbose=0)
    after = to_numpy(function(keras.ops.convert_to_tensor(x)))
    assert np.abs(after - before[0]).max() > 1e-5
    np.testing.assert_allclose(after, model.predict(x, verbose=0), atol=1e-6)
    assert np.abs(slope(x, np.ones((6, 1))) - before[1]).max() > 1e-5


def test_models_are_not_changed():
    model, x = network(1), normal((6, 4))
    weights = model.get_weights()
    input_gradient(model)(x, np.ones((6, 1)))
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    if keras.backend.backend() == "torch":
        assert all(variable.value.grad is None for variable in model.trainable_variables)


def test_first_change_is_at_the_boundary():
    x, z = np.zeros((4, 2)), np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [4.0, 1.0]])
    found = first_change(lambda points: points[:, 0] >= 0.5, x, z)
    np.testing.assert_allclose(found, [[0.5, 0.0], [0.5, 0.0], [0.0, 1.0], [0.5, 0.125]], atol=1e-5)
    assert (found[[0, 1, 3], 0] >= 0.5).all()


def test_models_that_are_no_functions_of_one_tensor():
    with pytest.raises(ValueError, match="Received: model 'unbuilt', built=False"):
        as_function(keras.Sequential([keras.layers.Dense(1)], name="unbuilt"))
    pair = [keras.Input((2,)), keras.Input((2,))]
    with pytest.raises(ValueError, match="with 2 inputs and 1 outputs"):
        as_function(keras.Model(pair, keras.layers.Concatenate()(pair)))
