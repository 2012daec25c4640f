"""Centering against NumPy: a projection, or a shift by a constant."""

import keras
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


@pytest.mark.parametrize(
    "make",
    [L.BatchCentering, L.LayerCentering, L.LipschitzBatchNormalization, lambda: L.SLLDense(4), lambda: L.Scale(2.0)],
)
def test_masks_go_on(make):
    x = normal((2, 5, 4))
    x[0, 3:] = x[1, 4:] = 0
    outputs = []
    for layers in ([], [make()]):  # the mean of the steps that count, without and with the layer in between
        model = keras.Sequential([keras.Input((5, 4)), keras.layers.Masking(), *layers])
        outputs.append((to_numpy(model(x)), to_numpy(keras.layers.GlobalAveragePooling1D()(model(x)))))
        pooled = keras.Sequential([*model.layers, keras.layers.GlobalAveragePooling1D()])
        kept = (np.abs(x).sum(axis=-1, keepdims=True) > 0).astype("float32")
        expected = (outputs[-1][0] * kept).sum(axis=1) / kept.sum(axis=1)
        np.testing.assert_allclose(to_numpy(pooled(x)), expected, atol=1e-6)


def test_masked_steps_do_not_count_in_means_of_a_batch():
    x = normal((6, 5, 4)) + 3
    mask = np.random.default_rng(0).uniform(size=(6, 5)) > 0.4
    layer, theirs = L.BatchCentering(momentum=0.0), keras.layers.BatchNormalization(momentum=0.0, scale=False)
    outputs = to_numpy(layer(x, training=True, mask=mask))
    theirs(x, training=True, mask=mask)
    np.testing.assert_allclose(to_numpy(layer.moving_mean), to_numpy(theirs.moving_mean), atol=1e-5)
    np.testing.assert_allclose(outputs, x - x[mask].mean(axis=0), atol=1e-5)
    with pytest.raises(ValueError, match="Received: mask"):
        layer(x, training=True, mask=mask[0])


@pytest.mark.parametrize(("axis", "scale"), [(-1, True), (1, False)])
def test_batch_normalization(axis, scale):
    layer = L.LipschitzBatchNormalization(axis=axis, momentum=0.75, epsilon=1e-2, scale=scale)
    shape = (4, 3)
    layer.build((None, *shape))
    axes = (0, 1) if axis == -1 else (0, 2)
    if scale:
        layer.gamma.assign([-1.5])
    layer.beta.assign(normal(layer.beta.shape))
    gamma, beta = -1.5 if scale else 1.0, np.expand_dims(to_numpy(layer.beta), 0 if axis == -1 else 1)
    x = 3 * normal((8, *shape)) + 2
    mean, variance = x.mean(axis=axes, keepdims=True), x.var(axis=axes).mean()
    trained = to_numpy(layer(x, training=True))
    moving = 0.75 + 0.25 * variance
    factor = gamma / np.sqrt(moving + 1e-2)
    np.testing.assert_allclose(to_numpy(layer.moving_variance), [moving], rtol=1e-5)
    np.testing.assert_allclose(trained, (x - mean) * factor + beta, atol=1e-5)
    np.testing.assert_allclose(to_numpy(layer(x)), (x - 0.25 * mean) * factor + beta, atol=1e-5)
    check_layer(layer, shape, constant=abs(factor))
    assert operator_norm(layer, shape) == pytest.approx(abs(factor), rel=1e-5)
    assert hkr.lipschitz_bound(layer) == pytest.approx(abs(factor), rel=1e-6)


def test_batch_normalization_trains_to_what_inference_computes():
    """With moments that have settled, the loss of a step is that of evaluation, but for the mean of the batch."""
    model = keras.Sequential([keras.Input((6,)), L.LipschitzDense(6), L.LipschitzBatchNormalization(momentum=0.5)])
    x = 5 * normal((64, 6))
    for _ in range(30):
        trained = to_numpy(model(x, training=True))
    np.testing.assert_allclose(to_numpy(model(x)), trained, atol=1e-5)
    assert abs(trained.std() - 1) < 1e-3
    scaled = keras.Sequential([keras.Input((6,)), *model.layers, L.Scale(1 / hkr.lipschitz_bound(model))])
    assert hkr.lipschitz_bound(scaled) == pytest.approx(1.0, abs=1e-6)


def test_batch_normalization_with_a_factor_for_each_channel_is_refused():
    layer = L.LipschitzBatchNormalization()
    layer.build((None, 3))
    layer.gamma = np.ones(3, "float32")
    with pytest.raises(ValueError, match="Expected the numbers"):
        hkr.lipschitz_bound(layer)
    for epsilon in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="Received: epsilon="):
            L.LipschitzBatchNormalization(epsilon=epsilon)
