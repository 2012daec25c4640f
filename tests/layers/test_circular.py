"""Circular padding of convolutions that keep Keras's kernel: against operators written out with indices modulo n."""

import itertools

import keras
import numpy as np
import pytest
from helpers import adam_steps, check_layer, explicit_operator, normal, operator_norm, to_numpy

import hkr_keras as hkr

L = hkr.layers

CASES = [
    # class, arguments, input shape: windows shorter than, as long as and longer than the circle
    (L.LipschitzConv1D, {"filters": 3, "kernel_size": 3}, (7, 2)),
    (L.LipschitzConv1D, {"filters": 2, "kernel_size": 4}, (4, 3)),
    (L.LipschitzConv1D, {"filters": 2, "kernel_size": 5}, (3, 2)),
    (L.LipschitzConv1D, {"filters": 2, "kernel_size": 3, "dilation_rate": 2}, (3, 1)),
    (L.LipschitzConv1D, {"filters": 3, "kernel_size": 5, "strides": 2}, (4, 2)),
    (L.LipschitzConv1D, {"filters": 3, "kernel_size": 2, "strides": 3}, (6, 2)),
    (L.LipschitzConv1D, {"filters": 4, "kernel_size": 3, "groups": 2}, (5, 2)),
    (L.LipschitzConv2D, {"filters": 2, "kernel_size": (3, 2)}, (4, 5, 2)),
    (L.LipschitzConv2D, {"filters": 1, "kernel_size": (5, 3), "strides": (2, 1)}, (4, 2, 2)),
    (L.LipschitzConv3D, {"filters": 2, "kernel_size": (2, 3, 3)}, (2, 3, 2, 1)),
]


def built(cls, arguments, shape, **kwargs):
    layer = cls(padding="circular", **{"use_bias": False, **arguments, **kwargs})
    layer.build((None, *shape))
    return layer


def circular_operator(layer, shape):
    """`(inputs, outputs)`: output o sees the cells `o * stride + tap * dilation - left`, modulo the size."""
    kernel, (*sizes, channels) = to_numpy(layer.kernel), shape
    places = list(zip(sizes, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True))
    outputs = [n // s for n, _, s, _ in places]
    lefts = [max(d * (k - 1) + 1 - s, 0) // 2 for _, k, s, d in places]
    each, filters = kernel.shape[-2], kernel.shape[-1] // layer.groups
    matrix = np.zeros((*sizes, channels, *outputs, kernel.shape[-1]))
    for place in itertools.product(*map(range, outputs)):
        for tap in itertools.product(*map(range, layer.kernel_size)):
            cell = tuple(
                (o * s + t * d - left) % n for o, t, left, (n, _, s, d) in zip(place, tap, lefts, places, strict=True)
            )
            for g in range(layer.groups):
                inputs, columns = slice(g * each, (g + 1) * each), slice(g * filters, (g + 1) * filters)
                matrix[(*cell, inputs, *place, columns)] += kernel[(*tap, slice(None), columns)]
    return matrix.reshape(int(np.prod(shape)), -1)


@pytest.mark.parametrize(("cls", "arguments", "shape"), CASES)
def test_operator_and_bound(cls, arguments, shape):
    layer = built(cls, arguments, shape)
    adam_steps(layer, 0.1)
    assert operator_norm(layer, shape) <= 1 + 1e-6
    layer.kernel.assign(normal(layer.kernel.shape, seed=3))  # the bound trusts no constraint
    matrix = circular_operator(layer, shape)
    np.testing.assert_allclose(explicit_operator(layer, shape), matrix, atol=1e-6)
    assert layer.compute_output_shape((5, *shape)) == tuple(layer(normal((5, *shape))).shape)
    norm = np.linalg.svd(matrix, compute_uv=False).max()
    assert norm <= hkr.lipschitz_bound(layer)


@pytest.mark.once
def test_ones_reach_the_bound():
    layer = built(L.LipschitzConv1D, {"filters": 1, "kernel_size": 5}, (3, 1))
    layer.kernel.assign(np.ones((5, 1, 1)))
    assert np.linalg.svd(circular_operator(layer, (3, 1)), compute_uv=False).max() == pytest.approx(5)
    assert 5 <= hkr.lipschitz_bound(layer) < 5 * (1 + 1e-9)


@pytest.mark.parametrize(("cls", "arguments", "shape"), [CASES[4], CASES[7]])
def test_round_trips(cls, arguments, shape):
    settings = {"use_bias": True, "bias_initializer": "ones", "activation": "relu"}
    layer = built(cls, arguments, shape, **settings)
    check_layer(layer, shape)
    assert layer.get_config()["padding"] == "circular"
    assert set(layer.get_config()) == set(keras.layers.Conv1D(4, 3).get_config())
    x = normal((20, *shape), seed=1)
    model = keras.Sequential([keras.Input(shape), layer, keras.layers.Flatten(), L.LipschitzDense(3)])
    plain = hkr.to_keras(model)
    assert not any(type(each).__module__.startswith("hkr_keras") for each in plain.layers)
    np.testing.assert_allclose(to_numpy(plain(x)), to_numpy(model(x)), atol=1e-6)
    same = hkr.to_lipschitz(model, print_fn=None, calibrate=x)
    np.testing.assert_allclose(to_numpy(same(x)), to_numpy(model(x)), atol=1e-6)
    exact, rigorous = (hkr.certify(model, x, verbose=0, rigorous=rigorous).radius for rigorous in (False, True))
    assert (rigorous < exact).all()
    np.testing.assert_allclose(rigorous, exact, atol=1e-4)


def test_refusals():
    layer = L.LipschitzConv1D(2, 3, strides=2, padding="circular")
    for shape in [(None, None, 2), (None, 5, 2)]:
        with pytest.raises(ValueError, match=r"known size, at least 1 and a multiple of 2. Received: shape"):
            layer.build(shape)
    with pytest.raises(ValueError, match="at least 4"):
        L.LipschitzConv1D(2, 9, padding="circular").build((None, 3, 2))
    with pytest.raises(ValueError, match="padding"):
        L.LipschitzConv1D(2, 9, padding="periodic")
