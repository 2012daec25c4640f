"""One-class learning: data inside, outliers outside, and an area under the curve that holds when inputs move."""

import keras
import numpy as np
import pytest

import hkr_keras as hkr
from hkr_keras.oneclass import fit, surrounding_box


def compiled(shape=(2,), rate=1e-2):
    model = hkr.models.lipschitz_mlp(shape, 1, widths=(32, 32))
    model.compile(keras.optimizers.Adam(rate), loss=hkr.losses.HKR(alpha=50, margin=0.1))
    return model


def disc(n, seed=0):
    """Points of the disc of radius 1 / 2."""
    rng = np.random.default_rng(seed)
    angle, radius = rng.uniform(0, 2 * np.pi, n), 0.5 * np.sqrt(rng.random(n))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype("float32")


def test_the_score_is_a_lower_bound_of_the_distance_to_the_class():
    model = compiled()
    losses = fit(model, disc(256), epochs=12, box=(np.full(2, -1.5), np.full(2, 1.5)))
    assert losses.shape == (12,)
    assert losses[-1] < losses[0]
    inside, outside = disc(200, seed=1), disc(200, seed=2)
    outside *= (1.0 / np.linalg.norm(outside, axis=1))[:, None]  # the circle of radius 1: 0.5 away
    assert (model.predict(inside, verbose=0) > 0).mean() > 0.9
    score = model.predict(outside, verbose=0)[:, 0]
    assert (score < 0).mean() > 0.95
    assert np.median(-score) > 0.3
    assert (-score / hkr.lipschitz_bound(model)).max() <= 0.5 + 0.15  # its boundary is not quite that of the disc
    points, labels = np.concatenate([inside, outside]), np.repeat([1, 0], 200)
    areas = [hkr.certify_outputs(model, points, epsilon, verbose=0).auroc(labels) for epsilon in (0.0, 0.1, 0.3)]
    assert areas[0] > 0.99
    assert areas[0] >= areas[1] >= areas[2]
    assert areas[1] > 0.95


@pytest.mark.once
def test_outliers_are_fresh_and_repeatable(monkeypatch):
    seen, model, x = [], compiled(), disc(20)
    original = model.fit
    monkeypatch.setattr(model, "fit", lambda points, *a, **k: (seen.append(points), original(points, *a, **k))[1])
    fit(model, x, epochs=2)
    fit(model, x, epochs=1)
    low, high = surrounding_box(x)
    for points in seen:
        np.testing.assert_array_equal(points[:20], x)
        assert (low <= points[20:]).all()
        assert (points[20:] <= high).all()
    assert not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(hkr.models.lipschitz_mlp((2,), 1, (4,)), disc(4), 1), "a built and compiled model"),
        (lambda: fit(compiled(), disc(4)[:0], 1), r"Received: x.shape=\(0, 2\)"),
        (lambda: fit(compiled(), disc(4), 0), "Received: epochs=0"),
        (lambda: fit(compiled(), disc(4), 1, box=(np.zeros(3), np.ones(3))), r"Received: shapes \(3,\) and \(3,\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
