"""The named architectures: constants, gradients, training, storage."""

import keras
import numpy as np
import pytest
from helpers import gradient, normal

import hkr_keras as hkr
from hkr_keras import models

SMALL = {
    "mlp": lambda: models.lipschitz_mlp((8, 8, 1), 3, widths=(16, 8)),
    "cnn": lambda: models.lipschitz_cnn((8, 8, 1), 3, filters=(4, 4), width=8),
    "cnn_orthogonal": lambda: models.lipschitz_cnn((8, 8, 1), 3, filters=(4, 4), width=8, orthogonal=True),
    "resnet": lambda: models.lipschitz_resnet((8, 8, 1), 3, channels=4, blocks=(1, 1), width=8),
    "shift_net": lambda: models.lipschitz_shift_net((8, 8, 1), 3, channels=10, depth=2, patch=2, width=8),
}


@pytest.mark.many
@pytest.mark.parametrize("name", SMALL)
def test_every_output_is_one_lipschitz_before_and_after_training(name):
    model, x, y = SMALL[name](), normal((32, 8, 8, 1)), np.arange(32) % 3
    model.compile(keras.optimizers.Adam(1e-2), hkr.losses.MulticlassHKR())
    for _ in range(2):
        before = keras.Model(model.inputs, model.layers[-2].output)
        assert hkr.lipschitz_bound(before) <= 1 + 4e-3  # what lies between frequencies, of one reshaped convolution
        lengths = np.linalg.norm(keras.ops.convert_to_numpy(model.layers[-1].kernel), axis=0)
        np.testing.assert_allclose(lengths, 1.0, atol=1e-6)
        model.fit(x, y, epochs=1, batch_size=16, verbose=0, callbacks=[hkr.callbacks.Orthonormalize()])


@pytest.mark.parametrize(
    "make",
    [
        lambda head: models.lipschitz_mlp((8, 8, 1), 3, (16, 8), head_constraint=head),
        lambda head: models.lipschitz_cnn((8, 8, 1), 3, (4, 4), 8, orthogonal=True, head_constraint=head),
        lambda head: models.lipschitz_resnet((8, 8, 1), 3, 4, (1, 1), 8, head_constraint=head),
        lambda head: models.lipschitz_shift_net((8, 8, 1), 3, 10, 1, 4, 8, head_constraint=head),
    ],
)
def test_an_orthonormal_head_makes_the_net_one_lipschitz_and_classes_equally_far_apart(make):
    model = make(hkr.constraints.Orthonormal())
    assert hkr.lipschitz_bound(model) <= 1 + 2e-6  # five or six layers of 1 + 4e-7
    kernel = keras.ops.convert_to_numpy(model.layers[-1].kernel)
    distances = np.linalg.norm(kernel[:, :, None] - kernel[:, None, :], axis=0)
    np.testing.assert_allclose(distances, np.sqrt(2) * (1 - np.eye(3)), atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_storage(name, tmp_path):
    model, x = SMALL[name](), normal((4, 8, 8, 1))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    assert hkr.lipschitz_bound(loaded) == pytest.approx(hkr.lipschitz_bound(model), rel=1e-6)


def test_gradients_pass_through_a_deep_residual_net():
    model = models.lipschitz_resnet((8, 8, 2), 4, channels=4, blocks=(10, 10), width=16)
    norms = np.linalg.norm(gradient(lambda x: model(x)[:, :1], normal((8, 8, 8, 2))).reshape(8, -1), axis=1)
    assert np.all(norms <= 1 + 1e-5)
    assert np.all(norms >= 0.3)


def test_the_shift_net_takes_channels_first_and_images_of_any_size(monkeypatch):
    last = models.lipschitz_shift_net((8, 8, 3), 2, channels=6, depth=1, width=4)
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    first = models.lipschitz_shift_net((3, 8, 8), 2, channels=6, depth=1, width=4)
    monkeypatch.undo()
    first.set_weights(last.get_weights())
    x = normal((2, 8, 8, 3))
    np.testing.assert_array_equal(first.predict(np.moveaxis(x, -1, 1), verbose=0), last.predict(x, verbose=0))
    model = models.lipschitz_shift_net((None, None, 3), 2, channels=6, depth=1, width=4)
    assert model.predict(normal((2, 12, 4, 3)), verbose=0).shape == (2, 2)
    assert hkr.lipschitz_bound(model) <= np.sqrt(2) * (1 + 1e-5)


@pytest.mark.once
def test_size_of_the_residual_net():
    assert 0.9e6 < models.lipschitz_resnet((28, 28, 1), 10).count_params() < 1.4e6


def tabular(outputs=1, seed=0):
    keras.utils.set_random_seed(seed)
    return models.lipschitz_mlp((5,), outputs, widths=(16, 8))


@pytest.mark.parametrize("slope", [1.001, -1.001])
def test_monotone_models_grow_with_the_features_chosen_and_stay_lipschitz(slope):
    base = tabular(3)
    model = hkr.monotone(base, slope, [0, 3])
    x = normal((200, 5), seed=3, scale=2.0)
    before = np.asarray(keras.ops.convert_to_numpy(model(x)), "float64")
    for feature in (0, 3):
        further = x.copy()
        further[:, feature] += np.abs(normal((200,), seed=4)) + 0.01
        change = np.sign(slope) * (keras.ops.convert_to_numpy(model(further)) - before)
        assert change.min() > -1e-5  # what float32 rounds
    other = x.copy()
    other[:, 1] += 1
    change = keras.ops.convert_to_numpy(model(other)) - before
    assert change.min() < 0 < change.max()
    assert hkr.lipschitz_bound(model) <= hkr.lipschitz_bound(base) + abs(slope) * np.sqrt(6) + 1e-6


def test_monotone_models_are_trained_stored_and_checked_again(tmp_path):
    base = tabular()
    model = hkr.monotone(base, 1.001, [0])
    frozen = keras.ops.convert_to_numpy(model.get_layer("monotone").kernel)
    x = normal((256, 5), seed=1)
    y = x[:, 0] - np.abs(x[:, 1])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, y, epochs=2, verbose=0, callbacks=[hkr.callbacks.Orthonormalize()])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.get_layer("monotone").kernel), frozen)
    again = hkr.monotone(base, 1.001, [0])
    np.testing.assert_allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    base.layers[-1].kernel.assign(3 * keras.ops.convert_to_numpy(base.layers[-1].kernel))
    with pytest.raises(ValueError, match=r"slope of at least (3\.0|2\.99999)"):
        hkr.monotone(base, 1.001, [0])


def test_monotone_models_want_features_and_shapes_that_exist():
    for features in ([], [5], [-1], [1, 1], [0.0], ["0"], [False, True], None):
        with pytest.raises(ValueError, match="different features from 0 to 4"):
            hkr.monotone(tabular(), 2.0, features)
    with pytest.raises(ValueError, match="slope of at least"):
        hkr.monotone(tabular(), np.inf, [0])
    with pytest.raises(ValueError, match="slope='a'"):
        hkr.monotone(tabular(), "a", [0])
    with pytest.raises(ValueError, match="one input"):
        hkr.monotone(SMALL["mlp"](), 2.0, [0])
