"""Explanations: exact where the model is linear, and at the boundary where a trained score is a distance."""

import keras
import numpy as np
import pytest
from helpers import normal

import hkr_keras as hkr
from hkr_keras.explanations import counterfactual, nearest_adversarial, saliency


def linear(kernel, bias=None):
    """A model that computes `x @ kernel + bias`."""
    kernel = np.asarray(kernel, "float32")
    model = keras.Sequential([keras.Input(kernel.shape[:1]), keras.layers.Dense(kernel.shape[1])])
    model.layers[0].set_weights([kernel, np.zeros(kernel.shape[1], "float32") if bias is None else np.float32(bias)])
    return model


UNIT = normal((4, 1)) / np.linalg.norm(normal((4, 1)))


def rotation():
    """A score of gradient norm 1: an orthonormal layer that permutes, GroupSort, and a unit vector."""
    hidden = hkr.layers.LipschitzDense(4, use_bias=False)
    head = hkr.layers.LipschitzDense(1, kernel_constraint=hkr.constraints.UnitNorm())
    return keras.Sequential([keras.Input((4,)), hidden, hkr.layers.GroupSort(2), head])


def test_saliency_of_a_linear_model():
    kernel = normal((4, 3))
    x = normal((5, 4), seed=1)
    model = linear(kernel)
    np.testing.assert_allclose(saliency(model, x), kernel.T[(x @ kernel).argmax(axis=1)], atol=1e-6)
    np.testing.assert_allclose(saliency(model, x, target=2), np.tile(kernel[:, 2], (5, 1)), atol=1e-6)
    np.testing.assert_allclose(saliency(model, x, target=[0, 1, 2, 0, 1]), kernel.T[[0, 1, 2, 0, 1]], atol=1e-6)


def test_saliency_of_a_score():
    model, x = linear(UNIT), normal((5, 4), seed=1)
    np.testing.assert_allclose(saliency(model, x, target=1), np.tile(UNIT.T, (5, 1)), atol=1e-6)
    np.testing.assert_allclose(saliency(model, x), np.sign(x @ UNIT) * UNIT.T, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0, 3.0])
def test_counterfactual_of_a_linear_score(t):
    model, x = linear(UNIT, [0.3]), normal((6, 4), seed=1)
    score = x @ UNIT + 0.3
    found = counterfactual(model, x, t=t)
    np.testing.assert_allclose(found, x - t * score * UNIT.T, atol=1e-6)
    np.testing.assert_allclose(found @ UNIT + 0.3, (1 - t) * score, atol=1e-6)


def test_the_step_of_length_f_lands_on_the_boundary_when_the_gradient_has_norm_1():
    # Piecewise linear, so it is exact where the step stays within one piece; float32 leaves 1e-6 of |x| = 2.
    model, x = rotation(), normal((64, 4), seed=1)
    score = model.predict(x, verbose=0)
    slope = saliency(model, x, target=1)
    np.testing.assert_allclose(np.linalg.norm(slope, axis=1), 1.0, atol=1e-6)
    moved = counterfactual(model, x, t=1.0)
    np.testing.assert_allclose(moved, x - score * slope, atol=2e-6)
    same_piece = np.abs(saliency(model, moved, target=1) - slope).max(axis=1) < 1e-6
    assert same_piece.sum() > 32
    np.testing.assert_allclose(model.predict(moved, verbose=0)[same_piece], 0.0, atol=3e-6)


def test_multiclass_margins():
    kernel, x = normal((4, 3)), normal((8, 4), seed=1)
    model = linear(kernel)
    logits = x @ kernel
    order = logits.argsort(axis=1)
    difference = (kernel[:, order[:, 1]] - kernel[:, order[:, 2]]).T
    gap = (difference * x).sum(axis=1, keepdims=True)
    boundary = x - gap * difference / np.square(difference).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(counterfactual(model, x, t=1.0), boundary, atol=1e-5)
    two = np.sort(boundary @ kernel, axis=1)
    beyond = counterfactual(model, x, target=0, t=40.0) @ kernel
    assert (two[:, 2] - two[:, 1] <= np.ptp(logits, axis=1)).all()
    assert (beyond[:, 0] > beyond[np.arange(8), logits.argmax(axis=1)])[logits.argmax(axis=1) != 0].all()


def test_inputs_of_the_target_class_stay():
    model, x = linear(normal((4, 3))), normal((8, 4), seed=1)
    labels = model.predict(x, verbose=0).argmax(axis=1)
    np.testing.assert_array_equal(counterfactual(model, x, target=labels), x)
    assert np.isnan(nearest_adversarial(model, x, target=labels)).all()


def test_clipping_keeps_the_range():
    model, x = linear(UNIT), np.random.default_rng(0).random((6, 4))
    free, clipped = (counterfactual(model, x, t=5.0, clip=clip) for clip in (None, (0.0, 1.0)))
    assert free.min() < 0
    np.testing.assert_array_equal(clipped, np.clip(free, 0.0, 1.0))


def test_nearest_adversarial_of_a_linear_score_is_at_the_distance_of_the_certificate():
    model, x = linear(UNIT, [0.3]), normal((6, 4), seed=1)
    found = nearest_adversarial(model, x)
    certificate = hkr.certify(model, x, verbose=0)
    assert ((model.predict(found, verbose=0)[:, 0] > 0) != certificate.prediction).all()
    np.testing.assert_allclose(np.linalg.norm(found - x, axis=1), certificate.radius, rtol=1e-5, atol=1e-6)


@pytest.mark.once
@pytest.mark.slow
def test_two_moons():
    """The step of length |f| takes a trained score near the boundary, and no adversarial example is inside a radius.

    Not onto it: the gradient bends on the way, and training leaves its norm below 1. 15 % of |f| in the median is what
    that leaves after 15 epochs.
    """
    data = hkr.datasets.load("moons")
    model = hkr.models.lipschitz_mlp((2,), 1, widths=(64, 64, 32))
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, 15 * 20)
    model.compile(keras.optimizers.Adam(schedule), loss=hkr.losses.HKR(alpha=10, margin=0.2))
    model.fit(data.x_train, data.y_train, batch_size=25, epochs=15, verbose=0)
    x = data.x_test[:200]
    score = model.predict(x, verbose=0)[:, 0]
    slope = saliency(model, x, target=1)
    moved = x - score[:, None] * slope
    left = np.abs(model.predict(moved, verbose=0)[:, 0]) / np.abs(score)
    assert np.median(left) < 0.15
    certificate, found = hkr.certify(model, x, verbose=0), nearest_adversarial(model, x)
    distance = np.linalg.norm(found - x, axis=1)
    assert np.isfinite(distance).mean() > 0.95
    reached = np.isfinite(distance)
    assert (distance[reached] >= certificate.radius[reached] * (1 - 1e-5) - 1e-5).all()
    assert np.median(certificate.radius[reached] / distance[reached]) > 0.85


@pytest.mark.once
def test_constant_models_have_no_direction():
    model, x = linear(np.zeros((4, 3)), [0.0, 1.0, 0.0]), normal((3, 4))
    np.testing.assert_array_equal(counterfactual(model, x), x)
    assert np.isnan(nearest_adversarial(model, x)).all()


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, x: saliency(model, x, target=3), "one class in 0..2.*Received: target=3"),
        (lambda model, x: saliency(model, x, target=[0]), r"each of 2 inputs. Received: target=\[0\]"),
        (lambda model, x: saliency(model, x, target=0.5), "Received: target=0.5"),
        (lambda model, x: saliency(model, x[:0]), r"Received: x.shape=\(0, 4\)"),
        (lambda model, x: counterfactual(model, x, t=np.nan), "Received: t=nan"),
        (lambda model, x: counterfactual(model, x, clip=(1.0, 0.0)), r"Received: clip=\(1.0, 0.0\)"),
        (lambda model, x: nearest_adversarial(model, x, reach=0.5), "Received: reach=0.5"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(linear(normal((4, 3))), normal((2, 4)))
