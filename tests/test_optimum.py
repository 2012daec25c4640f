"""No 1-Lipschitz function beats the exact linear programme, and a trained network comes close to it."""

import keras
import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linprog
from sklearn.datasets import make_moons

import hkr_keras as hkr
from hkr_keras.transport import hkr_optimum

ALPHA, MARGIN = 1.0, 0.3


def distances(x, z):
    return np.linalg.norm(x[:, None] - z[None], axis=-1)


def primal(x, labels, alpha, margin):
    """The smallest HKR loss of all functions on the points x that are 1-Lipschitz there."""
    n, signs = len(x), np.where(labels > 0, 1.0, -1.0)
    first, second = np.triu_indices(n, 1)
    rows = np.arange(len(first))
    pair = sparse.csr_array(
        (np.repeat([1.0, -1.0], rows.size), (np.tile(rows, 2), np.concatenate([first, second]))), shape=(rows.size, n)
    )
    no_slack = sparse.csr_array((rows.size, n))
    hinge = sparse.hstack([-sparse.diags_array(signs), -sparse.eye_array(n)])  # margin - y f <= slack
    constraints = sparse.vstack([sparse.hstack([pair, no_slack]), sparse.hstack([-pair, no_slack]), hinge])
    length = distances(x, x)[first, second]
    limits = np.concatenate([length, length, np.full(n, -margin)])
    mean_difference = signs / np.where(labels > 0, np.sum(labels > 0), np.sum(labels <= 0))
    costs = np.concatenate([-mean_difference, np.full(n, alpha / n)])
    bounds = [(None, None)] * n + [(0, None)] * n
    solution = linprog(costs, A_ub=constraints, b_ub=limits, bounds=bounds, method="highs-ipm")
    assert solution.status == 0, solution.message
    return solution.fun


@pytest.mark.parametrize("alpha", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("positives", [7, 15])
def test_primal_equals_dual(alpha, positives):
    x = np.random.default_rng(positives).normal(size=(30, 2))
    labels = (np.arange(30) < positives).astype(int)
    x[labels > 0, 0] += 1.0
    assert primal(x, labels, alpha, MARGIN) == pytest.approx(hkr_optimum(x, labels, alpha, MARGIN), abs=1e-6)


def test_two_points_have_a_known_optimum():
    # f = (1, -1) at distance 2: KR is -2, and a hinge of margin 1.5 costs 0.5 at each point.
    x, labels = np.array([[1.0], [-1.0]]), np.array([1, 0])
    assert primal(x, labels, 10.0, 1.5) == pytest.approx(10.0 * 0.5 - 2.0)
    assert hkr_optimum(x, labels, 10.0, 1.5) == pytest.approx(10.0 * 0.5 - 2.0)


def test_a_trained_network_reaches_the_optimum_and_never_passes_it():
    x, y = make_moons(200, noise=0.1, random_state=0)
    x = x.astype("float32")
    optimum = hkr_optimum(x, y, ALPHA, MARGIN)
    assert optimum < -1.0

    keras.utils.set_random_seed(0)
    layers = [keras.Input((2,))]
    for units in (64, 64, 64, 32):
        layers += [hkr.layers.LipschitzDense(units), hkr.layers.GroupSort(2)]
    model = keras.Sequential([*layers, hkr.layers.LipschitzDense(1)])
    loss, epochs, steps = hkr.losses.HKR(ALPHA, MARGIN), 150, 20
    rate = keras.optimizers.schedules.CosineDecay(2e-2, epochs * steps)
    at_once = 1 if keras.backend.backend() == "torch" else steps
    model.compile(keras.optimizers.Adam(rate), loss, steps_per_execution=at_once)
    whole_sample = {"x": np.tile(x, (steps, 1)), "y": np.tile(y, steps), "batch_size": len(x), "shuffle": False}
    polish = hkr.callbacks.Orthonormalize(every="train_end")
    model.fit(**whole_sample, epochs=epochs, verbose=0, callbacks=[polish])

    reached = float(loss(y, model.predict(x, verbose=0)))
    assert hkr.lipschitz_bound(model) <= 1 + 1e-5
    assert reached >= optimum - 1e-4
    assert -reached >= 0.97 * -optimum, f"{reached} of {optimum}"
