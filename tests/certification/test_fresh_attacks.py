"""What readers who saw the package for the first time broke: each bound is above what can be measured, or refused."""

import cases
import keras
import numpy as np
import pytest
from helpers import explicit_operator, largest_singular_value

import hkr_keras as hkr
from hkr_keras import bounds
from hkr_keras.certification.local import local_radii

K, L = keras.layers, hkr.layers


class Twice(K.Flatten):
    def call(self, inputs):
        return 2 * super().call(inputs)


class Absolute(K.ReLU):
    def call(self, inputs):
        return keras.ops.abs(inputs)


class TenAndOne(K.Concatenate):
    def call(self, inputs):
        return 10 * inputs[0] + inputs[1]

    def compute_output_shape(self, input_shape):
        return input_shape[0]


def channels_first(scaling):
    layer = K.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input((2, 3)), scaling, K.Flatten(data_format="channels_first"), layer])
    kernel = np.zeros((6, 1), "float32")
    kernel[1] = 1
    layer.set_weights([kernel])
    return model


@pytest.mark.parametrize("scale", [[[1.0], [100.0]], [[100.0], [1.0]]])
def test_flatten_may_move_channels(scale):
    model = channels_first(K.Rescaling(np.array(scale)))
    exact = largest_singular_value(explicit_operator(model, (2, 3)))
    assert exact * (1 - 1e-6) <= hkr.lipschitz_bound(model)


def test_registered_subclasses_of_layers_that_fold_are_themselves():
    bounds.layer_bound.register(Twice, lambda layer: 2.0)
    bounds.layer_bound.register(Absolute, lambda layer: 1.0)
    bounds.merge_bound.register(TenAndOne, lambda layer, constants: 10 * constants[0] + constants[1])
    assert hkr.lipschitz_bound(keras.Sequential([keras.Input((2, 3)), Twice()])) == pytest.approx(2.0)
    x = keras.Input((2,))
    mirrored = K.Rescaling(-1.0)(x)
    pair = keras.Model(x, K.Concatenate()([Absolute()(x), Absolute()(mirrored)]))
    assert hkr.lipschitz_bound(pair) == pytest.approx(2**0.5)
    merged = keras.Model(x, TenAndOne()([K.ReLU()(x), K.ReLU()(mirrored)]))
    assert hkr.lipschitz_bound(merged) == pytest.approx(11.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: K.Cropping1D((0, 3)),
        lambda: K.UpSampling1D(2),
        lambda: K.ZeroPadding1D(2),
        lambda: K.Permute((2, 1)),
        lambda: K.AveragePooling1D(4, padding="same"),
    ],
    ids=cases.name,
)
def test_an_activation_keeps_the_shape(make):
    for inner in (K.Activation(make()), K.Dense(2, activation=make())):
        model = keras.Sequential([keras.Input((4, 2)), inner])
        with pytest.raises(ValueError, match="keeps the shape"):
            hkr.lipschitz_bound(model)


def test_the_semidefinite_bound_counts_relative_errors():
    model = keras.Sequential(
        [keras.Input((1,)), K.Rescaling(2.2e-45), K.Dense(1, "relu", use_bias=False), K.Dense(1, use_bias=False)]
    )
    model.set_weights([np.array([[1e30]]), np.array([[1e10]])])
    stored = float(np.float32(2.2e-45)) * 1e40
    assert stored * (1 - 1e-6) <= hkr.lipschitz_bound(model, method="semidefinite") <= hkr.lipschitz_bound(model)


def test_local_bounds_want_inputs_in_order():
    model = keras.Sequential([keras.Input((2, 3)), K.Flatten(data_format="channels_first"), K.Dense(2)])
    with pytest.raises(ValueError, match="Flatten"):
        hkr.local_bound(model, np.ones((1, 2, 3), "float32"), 0.1)


def test_local_radii_want_logits_and_continuous_activations():
    x = np.ones((1, 1), "float32")
    jumps = keras.Sequential([keras.Input((1,)), K.Dense(1), K.ReLU(threshold=1.0), K.Dense(2)])
    with pytest.raises(ValueError, match="ReLU"):
        local_radii(jumps, x)
    for last in (K.Dense(2, activation="relu"), K.Dense(1)):
        with pytest.raises(ValueError, match="at least two logits"):
            local_radii(keras.Sequential([keras.Input((1,)), K.Dense(2, "relu"), last]), x)


@pytest.mark.parametrize("make", [K.Softmax, lambda: K.Activation("softmax")], ids=["layer", "function"])
def test_softmax_over_the_batch_is_refused(make):
    model = keras.Sequential([keras.Input((1,)), K.Reshape(()), make(), K.Rescaling(1.0, offset=-0.3)])
    with pytest.raises(ValueError, match="stay apart in the batch"):
        hkr.certify(model, np.ones((3, 1), "float32"), verbose=0)


class Labelled(K.Dense):
    """Computes what Dense does, and keeps one more setting."""

    def __init__(self, *args, label="", **kwargs):
        super().__init__(*args, **kwargs)
        self.label = label

    def get_config(self):
        return {**super().get_config(), "label": self.label}


def test_settings_of_a_subclass_are_no_hindrance():
    model = keras.Sequential([keras.Input((3,)), Labelled(2, label="head")])
    assert hkr.certify(model, np.ones((2, 3), "float32"), verbose=0, rigorous=True).rigorous


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_are_rounded_to_the_type_of_their_layer(dtype):
    for layer in (L.Scale(0.1, dtype=dtype), K.Rescaling(0.1, dtype=dtype)):
        model = keras.Sequential([keras.Input((1,)), layer])
        assert hkr.lipschitz_bound(model) >= 0.10009765625  # what 0.1 is in bfloat16
    with pytest.raises(ValueError, match="normal in"):
        hkr.lipschitz_bound(keras.Sequential([keras.Input((1,)), L.Scale(1e-30, dtype="float16")]))


@pytest.mark.parametrize("what", [None, "abc", 3, K.Dense, keras.Input((2,))], ids=str)
def test_what_is_no_layer_has_no_bound(what):
    with pytest.raises(ValueError, match="Expected a Keras model or layer"):
        hkr.lipschitz_bound(what)


@pytest.mark.parametrize("epsilon", [None, "a", [0.1]])
def test_epsilon_is_a_number(epsilon):
    model = keras.Sequential([keras.Input((1,)), L.Scale(2.0)])
    with pytest.raises(ValueError, match="finite distance"):
        hkr.certify_outputs(model, np.ones((1, 1)), epsilon=epsilon, verbose=0)


def test_edited_poolings_and_unfinished_normalizations_are_refused():
    pooling = K.AveragePooling1D(4)
    model = keras.Sequential([keras.Input((8, 1)), pooling])
    pooling.pool_mode = "max"
    with pytest.raises(ValueError, match="pool_mode=max"):
        hkr.lipschitz_bound(model)
    normalization = K.Normalization()
    normalization.adapt(np.array([[1.0], [3.0]], "float32"))
    model = keras.Sequential([keras.Input((1,)), normalization])
    assert hkr.lipschitz_bound(model) == pytest.approx(1.0)
    normalization.mean = normalization.mean + 1.0  # as after set_weights without finalize_state
    with pytest.raises(ValueError, match="finalize_state"):
        hkr.lipschitz_bound(model)
