"""Attacks on certificates: none may fall that holds, and the suite must find those that do not."""

import dataclasses
import math

import keras
import numpy as np
import pytest
from break_certificates import ATTACKS, HOSTILE, MODELS, TRAINED, Target, affine, attacked, count, is_within
from helpers import BACKEND, normal, operator_norm

import hkr_keras as hkr

pytestmark = pytest.mark.each  # what a compiler may do differs


OWN = ("gradient", "boundary", "exact", "rounding")
TRIED = {  # "exact" needs an affine model, "Square" an image; the CNN is slow
    "digits MLP": {*ATTACKS} - {"exact"},
    "digits CNN": {"PGD", "AutoPGD", "Square", "gradient", "boundary", "rounding"},
    "moons": {*ATTACKS} - {"exact", "Square"},
}
NOT_ATTACKED = {"AutoPGD"} if BACKEND == "jax" else set()  # ART has no classifier for it


def counts(target, attacks, effort=6):
    return {name: count(target, name, effort) for name in attacks}


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_certificates_of_trained_models_hold(name):
    attacks = TRIED[name] - NOT_ATTACKED
    found = counts(attacked(*TRAINED[name](4), rigorous=False), attacks)
    assert found == dict.fromkeys(attacks, (4, 0))


@pytest.mark.once
@pytest.mark.parametrize("name", [name for name in HOSTILE if name.startswith("planted")])
def test_planted_biases_break_certificates_that_are_not_rigorous(name):
    found = counts(attacked(*HOSTILE[name](8), rigorous=False), OWN)
    assert sum(broken for _, broken in found.values()) > 0


@pytest.mark.many
@pytest.mark.parametrize("name", MODELS)
def test_rigorous_certificates_hold(name):
    target = attacked(*MODELS[name](4), rigorous=True)
    if isinstance(target, str):
        assert name in HOSTILE
        assert target.startswith("Expected ")
    else:
        assert len(target) > 0 or name in HOSTILE
        found = counts(target, OWN)
        assert [name for name, (_, broken) in found.items() if broken] == []


# ---- the tests can fail --------------------------------------------------------------------------------------

MEAN_OVERLAP = 6.25  # of 3x3 windows on 4x4 pixels with padding="same"; the largest is 9


def patches():
    """A linear model with the norm 3: nine filters that copy one tap each, and the copies of one inner pixel."""
    convolution = keras.layers.Conv2D(9, 3, padding="same", use_bias=False)
    model = keras.Sequential([keras.Input((4, 4, 1)), convolution, keras.layers.Flatten(), keras.layers.Dense(1)])
    pixel = np.zeros((1, 4, 4, 1), "float32")
    pixel[0, 1, 2] = 1.0
    convolution.kernel.assign(np.eye(9).reshape(3, 3, 1, 9))
    copies = keras.ops.reshape(convolution(pixel), (-1, 1))
    model.layers[-1].kernel.assign(copies / 3)
    return model, convolution


@pytest.mark.once
def test_certificates_with_the_mean_overlap_are_broken():
    model, convolution = patches()
    convolution.kernel.assign(convolution.kernel / math.sqrt(MEAN_OVERLAP))  # "norm 1" by the unsound factor
    assert operator_norm(convolution, (4, 4, 1)) == pytest.approx(1.2)
    x = normal((6, 4, 4, 1))
    certificate = hkr.certify(model, x, verbose=0)
    assert certificate.bound == pytest.approx(1.2, rel=2e-3)
    unsound = dataclasses.replace(certificate, radius=certificate.radius * certificate.bound)
    attacks = {*ATTACKS} - {"exact", "Square"} - NOT_ATTACKED
    found = counts(Target.of(model, x, unsound), attacks, effort=20)
    assert found == dict.fromkeys(attacks, (6, 6))
    sound = counts(Target.of(model, x, certificate), ("gradient", "boundary"), effort=20)
    assert sound == {"gradient": (6, 0), "boundary": (6, 0)}


@pytest.mark.once
def test_certificates_of_twice_the_radius_are_broken():
    model, x = HOSTILE["linear logits"](3)
    certificate = hkr.certify(model, x, verbose=0)
    doubled = dataclasses.replace(certificate, radius=2 * certificate.radius)
    assert counts(Target.of(model, x, doubled), ("gradient", "exact")) == {"gradient": (3, 3), "exact": (3, 3)}


def test_distances_are_exact():
    zero, one = np.zeros(2, "float32"), np.array([1.0, 0.0], "float32")
    tiny = np.array([1.0, 1e-30], "float32")
    assert is_within(zero, one, 1.0)
    assert not is_within(zero, tiny, 1.0)
    assert not is_within(zero, one, math.nextafter(1.0, 0.0))
    assert is_within(zero, one, math.inf)


def test_affine_models_are_read_exactly():
    model, _ = HOSTILE["planted biases"](1)
    weights, bias = affine(model)
    assert weights.astype("float64").tolist() == [[0.25, -0.25]] * 8
    assert bias.tolist() == [0, 0]
    assert affine(HOSTILE["planted biases, GroupSort"](1)[0]) is None
