"""Centering against NumPy: a projection, or a shift by a constant."""

import numpy as np
import pytest
from helpers import check_layer, normal, operator_norm, to_numpy

import hkr_keras as hkr

L = hkr.layers


@pytest.mark.parametrize(("axis", "center"), [(-1, True), (1, True), ((1, 2), True), (-1, False)])
def test_layer_centering(axis, center):
    layer = L.LayerCentering(axis=axis, center=center)
    layer.build((None, 4, 3))
    if center:
        layer.set_weights([normal(layer.bias.shape)])
    check_layer(layer, (4, 3))
    x = normal((2, 4, 3))
    expected = x - x.mean(axis=axis, keepdims=True) + (to_numpy(layer.bias) if center else 0)
    np.testing.assert_allclose(to_numpy(layer(x)), expected, atol=1e-6)
    assert operator_norm(layer, (4, 3)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("axis", "shape"), [(0, (None, 3)), (-1, (None, None)), ((0, 1), (None, 4, 3))])
def test_layer_centering_refuses_axes_without_a_size(axis, shape):
    with pytest.raises(ValueError, match="Received: axis="):
        L.LayerCentering(axis=axis).build(shape)


@pytest.mark.parametrize("axis", [-1, 1])
def test_batch_centering(axis):
    layer = L.BatchCentering(axis=axis, momentum=0.75)
    shape = (4, 3)
    layer.build((None, *shape))
    x = normal((8, *shape)) + 2
    axes = (0, 1) if axis == -1 else (0, 2)
    mean = x.mean(axis=axes, keepdims=True)
    np.testing.assert_allclose(to_numpy(layer(x)), x, atol=1e-6)  # at first the moving mean is 0
    np.testing.assert_allclose(to_numpy(layer(x, training=True)), x - mean, atol=1e-5)
    np.testing.assert_allclose(to_numpy(layer.moving_mean), 0.25 * mean.ravel(), atol=1e-5)
    np.testing.assert_allclose(to_numpy(layer(x)), x - 0.25 * mean, atol=1e-5)
    check_layer(layer, shape)

    layer.trainable = False
    before = to_numpy(layer.moving_mean)
    np.testing.assert_allclose(to_numpy(layer(x, training=True)), x - 0.25 * mean, atol=1e-5)
    assert np.array_equal(to_numpy(layer.moving_mean), before)


def test_batch_centering_refuses_bad_arguments():
    for momentum in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="Received: momentum="):
            L.BatchCentering(momentum=momentum)
    with pytest.raises(ValueError, match="Received: axis=-1"):
        L.BatchCentering().build((None, None))


def test_batch_centering_has_no_bias_when_told_so():
    layer = L.BatchCentering(center=False)
    layer.build((None, 3))
    assert [weight.name for weight in layer.weights] == ["moving_mean"]
