"""Operators that layers are folded into: norms of compositions against explicit operators in float64."""

import keras
import numpy as np
import pytest
from helpers import explicit_operator, largest_singular_value, normal

import hkr_keras as hkr
from hkr_keras.certification.operators import Convolution, Diagonal, Matrix

K, L = keras.layers, hkr.layers


def batch_normalization():
    layer = K.BatchNormalization()
    layer.build((None, 5, 5, 3))
    layer.set_weights([normal((3,), 1), normal((3,), 2), normal((3,), 3), np.exp(3 * normal((3,), 4))])
    return layer


def scaled_channels(n=3, seed=5):
    return K.Rescaling(np.exp(2 * normal((n,), seed)), offset=1.0)


CHAINS = {
    "normalization, dense": (
        (6,),
        lambda: [K.Normalization(mean=[0.0] * 6, variance=10.0 ** np.arange(-3, 3)), K.Dense(4)],
    ),
    "dense, scale, dense": ((6,), lambda: [K.Dense(5), L.Scale(-0.3), K.Dense(4)]),
    "dense, rescaling": ((6,), lambda: [K.Dense(3), scaled_channels()]),
    "rescaling, dense on a sequence": ((4, 3), lambda: [scaled_channels(), K.Dense(2)]),
    "convolution, batch normalization": ((5, 5, 2), lambda: [K.Conv2D(3, 2, padding="same"), batch_normalization()]),
    "rescaling, convolution": ((5, 5, 3), lambda: [scaled_channels(), K.Conv2D(2, 3, strides=2)]),
    "rescaling, groups": ((9, 4), lambda: [scaled_channels(4), K.Conv1D(6, 3, groups=2, padding="causal")]),
    "groups, rescaling": ((9, 4), lambda: [K.Conv1D(6, 3, groups=2, padding="same"), scaled_channels(6)]),
    "rescaling, depthwise": ((5, 5, 3), lambda: [scaled_channels(), K.DepthwiseConv2D(2, depth_multiplier=2)]),
    "depthwise, rescaling": ((5, 5, 3), lambda: [K.DepthwiseConv2D(2, depth_multiplier=2), scaled_channels(6)]),
    "rescaling, transposed, rescaling": (
        (4, 4, 3),
        lambda: [scaled_channels(), K.Conv2DTranspose(2, 3, strides=2), scaled_channels(2, 6)],
    ),
    "rescaling, separable, rescaling": (
        (5, 5, 3),
        lambda: [scaled_channels(), K.SeparableConv2D(4, 2, depth_multiplier=2), scaled_channels(4, 6)],
    ),
    "rescaling, flatten, dense": ((2, 2, 3), lambda: [scaled_channels(), K.Flatten(), K.Dense(4)]),
    "convolution over the whole image": ((6, 6, 1), lambda: [K.Conv2D(2, 6)]),
    "dropout between": ((6,), lambda: [K.Dense(3), K.Dropout(0.5), scaled_channels()]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_folded_chains_have_the_norm_of_their_product(name):
    shape, make = CHAINS[name]
    model = keras.Sequential([keras.Input(shape), *make()])
    for seed, layer in enumerate(model.layers):
        if isinstance(layer, (K.Dense, K.Conv1D, K.Conv2D, K.SeparableConv2D)):
            layer.set_weights([normal(weight.shape, 10 * seed + i) for i, weight in enumerate(layer.get_weights())])
            layer.bias.assign(np.zeros(layer.bias.shape))
    exact = largest_singular_value(explicit_operator(model, shape))
    bound = hkr.lipschitz_bound(model)
    looser = (
        1.7
        if "conv" in name or "groups" in name or "separable" in name or "depthwise" in name or "transposed" in name
        else 1.0
    )
    assert exact * (1 - 1e-5) <= bound <= exact * looser * (1 + 1e-4)


@pytest.mark.once
def test_an_activation_ends_a_chain():
    scale = K.Normalization(mean=[0.0] * 4, variance=[1e-4, 1.0, 1.0, 1.0])
    model = keras.Sequential([keras.Input((4,)), scale, K.ReLU(), K.Dense(3)])
    kernel = largest_singular_value(keras.ops.convert_to_numpy(model.layers[-1].kernel))
    assert hkr.lipschitz_bound(model) == pytest.approx(100 * kernel, rel=1e-5)


@pytest.mark.once
def test_activations_of_slope_1_end_a_chain_too():
    """tanh and sorting are no linear operators, though their constant is 1."""
    for activation in (K.Activation("tanh"), L.GroupSort(2)):
        model = keras.Sequential(
            [keras.Input((2,)), K.Dense(2, kernel_initializer="identity"), activation, L.Scale(3.0), K.Dense(1)]
        )
        kernel = largest_singular_value(keras.ops.convert_to_numpy(model.layers[-1].kernel))
        assert hkr.lipschitz_bound(model) == pytest.approx(3 * kernel, rel=1e-5)
        head = keras.Sequential([keras.Input((2,)), K.Dense(2, activation="tanh"), K.Dense(2)])
        assert hkr.certify(head, np.ones((1, 2)), verbose=0).method == "pairwise"


@pytest.mark.once
@pytest.mark.parametrize("axis", [0, -1])
def test_diagonals_that_vary_along_another_axis_do_not_fold(axis):
    numbers = np.ones((2, 1)) if axis == 0 else np.ones((1, 3))
    assert (Matrix(np.eye(3)).after(Diagonal(numbers)) is None) == (axis == 0)


def test_differences_of_scaled_columns_allow_for_the_error_of_each():
    first = Matrix(np.ones((1, 2)))
    scaled = Diagonal(np.array([1.0, 1.0]), relative=1e-3).after(first)
    assert scaled.error >= 1e-3 * np.sqrt(2)
    assert Matrix(np.ones((2, 1))).after(Diagonal(np.array([1.0, 1.0]), relative=1e-3)).relative >= 1e-3


def test_products_that_underflow_stay_above_the_truth():
    product = Diagonal(np.array(1e-200)).after(Diagonal(np.array(1e-200)))
    assert 0 < product.bound < 1e-300
    assert Matrix(np.full((2, 2), 1e-200)).after(Diagonal(np.array(1e-200))).bound > 0


def test_a_convolution_keeps_its_other_bound():
    settings = {"blocks": np.ones((3, 1, 1, 1)), "strides": (1,), "dilation": (1,)}
    assert Convolution(**settings, limit=2.0).bound == 2.0
    assert Convolution(**settings, limit=2.0).after(Diagonal(np.array([0.5]))).bound == pytest.approx(1.0)
