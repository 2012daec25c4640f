"""The recurrent layer: its bound is above what is measured, and near it."""

import math

import keras
import numpy as np
import pytest
from helpers import adam_steps, check_layer, explicit_operator, largest_singular_value, normal, to_numpy

import hkr_keras as hkr
from hkr_keras.layers.recurrent import recurrence_bound

SHAPE = (6, 3)


def built(shape=SHAPE, **arguments):
    layer = hkr.layers.LipschitzSimpleRNN(**{"units": 4, **arguments})
    layer.build((None, *shape))
    return layer


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_the_bound_of_the_recurrence(length):
    assert recurrence_bound(length, 2.0, 1.0, sequences=False) == pytest.approx(2 * math.sqrt(length))
    exact = 1 / (2 * math.sin(math.pi / (4 * length + 2)))
    assert recurrence_bound(length, 2.0, 1.0, sequences=True) == pytest.approx(2 * exact)
    for u in (0.0, 0.5, 1.0, 1.1):
        matrix = np.array([[u ** (t - j) if j <= t else 0.0 for j in range(length)] for t in range(length)])
        assert recurrence_bound(length, 1.0, u, sequences=True) >= largest_singular_value(matrix)
        assert recurrence_bound(length, 1.0, u, sequences=False) >= np.linalg.norm(matrix[-1])


def test_long_sequences_have_a_bound_too():
    exact = 1 / (2 * math.sin(math.pi / (4 * 600 + 2)))
    assert exact <= recurrence_bound(600, 1.0, 1.0, sequences=True) <= 601
    assert recurrence_bound(600, 1.0, 0.5, sequences=True) == pytest.approx(2.0)
    assert recurrence_bound(600, 1.0, 1e9, sequences=True) == math.inf


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("units", [2, 4])
def test_linear_recurrence(units, sequences):
    """Without activation the operator is explicit. With equal units and features the last state reaches the bound."""
    layer = built(units=units, return_sequences=sequences, activation="linear")
    for learning_rate in (None, 1e-2, 10.0):
        if learning_rate is not None:
            adam_steps(layer, learning_rate)
        norm = largest_singular_value(explicit_operator(layer, SHAPE))
        assert 0.1 < norm <= hkr.lipschitz_bound(layer) * (1 + 1e-6)  # the explicit matrix is rounded to float32
        assert hkr.lipschitz_bound(layer) <= 1 + 1e-5
    if not sequences:
        tight = built(units=3, activation="linear")
        assert largest_singular_value(explicit_operator(tight, SHAPE)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"return_sequences": True, "go_backwards": True}, {"activation": "relu"}])
def test_nonlinear_recurrence(arguments):
    layer = built(dropout=0.5, recurrent_dropout=0.5, **arguments)
    adam_steps(layer, 0.1)
    assert hkr.lipschitz_bound(layer) <= 1 + 1e-5
    check_layer(layer, SHAPE)


def test_the_bound_reads_weights_and_activation():
    layer = built(activation="linear")
    layer.cell.kernel.assign(2 * to_numpy(layer.cell.kernel, "float32"))
    assert hkr.lipschitz_bound(layer) == pytest.approx(2, abs=1e-4)
    layer.cell.recurrent_kernel.assign(1.5 * to_numpy(layer.cell.recurrent_kernel, "float32"))
    norm = largest_singular_value(explicit_operator(layer, SHAPE))
    assert (
        norm <= hkr.lipschitz_bound(layer) == pytest.approx(2 / math.sqrt(6) * math.hypot(*1.5 ** np.arange(6)), 1e-4)
    )
    assert hkr.lipschitz_bound(built(activation="selu")) > 1.7


@pytest.mark.once
def test_fit_save_and_certify(tmp_path):
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            hkr.layers.LipschitzSimpleRNN(4, return_sequences=True),
            hkr.layers.LipschitzSimpleRNN(4, kernel_constraint=hkr.constraints.SpectralBall()),
            hkr.layers.LipschitzDense(1),
        ]
    )
    x, y = normal((32, *SHAPE)), np.arange(32) % 2
    before = [to_numpy(weight) for weight in model.trainable_weights]
    model.compile(keras.optimizers.Adam(3e-2), hkr.losses.HKR(alpha=5, margin=0.3))
    callbacks = [hkr.callbacks.Orthonormalize(), hkr.callbacks.LipschitzMonitor()]
    history = model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=callbacks).history
    assert history["lipschitz_bound"][-1] <= 1 + 1e-5
    moved = [np.abs(old - to_numpy(new)).max() for old, new in zip(before, model.trainable_weights, strict=True)]
    assert min(moved) > 1e-5
    recurrent = to_numpy(model.layers[0].cell.recurrent_kernel)
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(4), atol=1e-5)
    assert np.all(hkr.certify(model, x, verbose=0).radius > 0)
    assert len(hkr.lipschitz_summary(model, print_fn=None).rows) == 3

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(to_numpy(loaded(x)), to_numpy(model(x)), atol=1e-6)
    assert hkr.lipschitz_bound(loaded) == hkr.lipschitz_bound(model)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"known length.*Received: input_shape=\(None, None, 3\)"):
        built((None, 3))
    with pytest.raises(ValueError, match="incompatible"):
        built()(normal((2, 7, 3)))  # longer than the bound is about
    with pytest.raises(ValueError, match="Received: constraint="):
        built(recurrent_constraint="max_norm")
    with pytest.raises(ValueError, match="built=False"):
        hkr.lipschitz_bound(hkr.layers.LipschitzSimpleRNN(2))
    for arguments in ({"return_state": True}, {"stateful": True, "batch_shape": (2, *SHAPE)}):
        layer = hkr.layers.LipschitzSimpleRNN(2, **{k: v for k, v in arguments.items() if k != "batch_shape"})
        layer.build(arguments.get("batch_shape", (None, *SHAPE)))
        with pytest.raises(ValueError, match="no states in or out"):
            hkr.lipschitz_bound(layer)
    layer = built()
    layer.cell.call = lambda sequence, states, training=False: (10 * sequence, states)
    with pytest.raises(ValueError, match="with its own cell"):
        hkr.lipschitz_bound(layer)


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize(
    ("mode", "factor"), [("concat", math.sqrt(2)), ("sum", 2.0), ("ave", 1.0), (None, math.sqrt(2))]
)
def test_two_directions(mode, factor, sequences):
    inner = hkr.layers.LipschitzSimpleRNN(3, activation="linear", return_sequences=sequences)
    layer = keras.layers.Bidirectional(inner, merge_mode=mode)
    layer.build((None, *SHAPE))

    def joined(x):
        outputs = layer(x)
        return keras.ops.concatenate(outputs, axis=-1) if mode is None else outputs

    assert hkr.lipschitz_bound(layer) == pytest.approx(factor, rel=1e-5)
    adam_steps(layer, 1e-2)
    norm = largest_singular_value(explicit_operator(joined, SHAPE))
    assert 0.1 < norm <= hkr.lipschitz_bound(layer) * (1 + 1e-6)
    assert hkr.lipschitz_bound(layer) <= factor * (1 + 1e-5)
    if mode != "ave":
        layer.backward_layer.cell.kernel.assign(2 * to_numpy(layer.backward_layer.cell.kernel, "float32"))
        assert hkr.lipschitz_bound(layer) == pytest.approx(3.0 if mode == "sum" else math.sqrt(5), rel=0.02)
        assert largest_singular_value(explicit_operator(joined, SHAPE)) <= hkr.lipschitz_bound(layer) * (1 + 1e-6)


def test_two_directions_of_other_sizes_are_not_summed():
    pair = [hkr.layers.LipschitzSimpleRNN(units, go_backwards=units == 1) for units in (3, 1)]
    layer = keras.layers.Bidirectional(pair[0], backward_layer=pair[1], merge_mode="sum")
    layer.build((None, *SHAPE))
    with pytest.raises(ValueError, match=r"Received: .*3.*1"):
        hkr.lipschitz_bound(layer)


def test_two_directions_in_a_model():
    layers = [keras.layers.Bidirectional(hkr.layers.LipschitzSimpleRNN(4)), hkr.layers.Scale(0.5**0.5)]
    model = keras.Sequential([keras.Input(SHAPE), *layers, hkr.layers.LipschitzDense(2)])
    model.compile("adam", "mse")
    model.fit(normal((16, *SHAPE)), normal((16, 2)), verbose=0)
    assert hkr.lipschitz_bound(model) <= 1 + 1e-5
    assert len(list(hkr.geometry.model_kernels(model))) == 5
    assert hkr.certify(model, normal((3, *SHAPE)), verbose=0).radius.shape == (3,)
