"""What readers who saw the package for the first time broke: each bound is above what can be measured, or refused."""

import cases
import keras
import numpy as np
import pytest
from helpers import explicit_operator, largest_singular_value, to_numpy

import hkr_keras as hkr
from hkr_keras import bounds, rounding
from hkr_keras.certification.local import local_radii
from hkr_keras.certification.rules.activations import activation_bound
from hkr_keras.certification.semidefinite import semidefinite_bound

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


@pytest.mark.parametrize("variance", [-np.nextafter(np.float32(1e-5), np.float32(0)), np.float32(1e-5)])
def test_epsilon_is_that_of_float32(variance):
    layer = K.BatchNormalization(epsilon=1e-5, scale=False, center=False)
    model = keras.Sequential([keras.Input((1,)), layer])
    model.set_weights([np.zeros(1), np.array([variance])])
    exact = 1 / (float(variance) + float(np.float32(1e-5))) ** 0.5
    assert exact <= hkr.lipschitz_bound(model) <= (1 + max(1e-6, exact * 1e-6)) * exact


@pytest.mark.parametrize("epsilon", [1e-46, 3e-45])
def test_an_epsilon_that_float32_takes_for_zero_is_refused(epsilon):
    layer = K.BatchNormalization(epsilon=epsilon, moving_variance_initializer="zeros")
    with pytest.raises(ValueError, match="variances above 0 with epsilon in float32"):
        hkr.lipschitz_bound(keras.Sequential([keras.Input((1,)), layer]))


@pytest.mark.parametrize("name", ["mean", "variance"])
def test_a_normalization_computes_with_what_its_file_holds(name):
    adapted = K.Normalization()
    adapted.adapt(np.array([[0.0, 1.0], [2.0, 1.5]], "float32"))
    for layer in (adapted, K.Normalization(mean=[0.0, 1.0], variance=[1.0, 2.0]), K.Normalization(None, 0.5, 2.0)):
        model = keras.Sequential([keras.Input((2,)), layer])
        assert hkr.lipschitz_bound(model) > 0
        setattr(layer, name, getattr(layer, name) * 0.5 + 1e-3)
        with pytest.raises(ValueError, match=f"another {name} than its weights"):
            hkr.lipschitz_bound(model)


class Marks(K.Layer):
    """The identity, and a mask of what is not 0."""

    supports_masking = True

    def call(self, inputs):
        return inputs

    def compute_mask(self, inputs, previous_mask=None):
        return keras.ops.any(keras.ops.not_equal(inputs, 0.0), axis=-1)

    def compute_output_shape(self, input_shape):
        return input_shape


@pytest.mark.parametrize(
    "first",
    [
        Marks,
        lambda: keras.Sequential([keras.Input((4, 2)), Marks()]),
        lambda: K.Activation(Marks()),
        lambda: K.Dense(2, activation=Marks()),
    ],
)
def test_masks_that_a_layer_makes_are_refused(first):
    bounds.layer_bound.register(Marks, lambda layer: 1.0)
    model = keras.Sequential([keras.Input((4, 2)), first(), K.GlobalAveragePooling1D()])
    with pytest.raises(ValueError, match=r"make no masks|operation="):
        hkr.lipschitz_bound(model)


def test_masks_that_an_edited_layer_makes_are_refused():
    layer = K.ReLU()
    model = keras.Sequential([keras.Input((4, 2)), layer])
    layer.compute_mask = lambda inputs, previous_mask=None: inputs > 0
    with pytest.raises(ValueError, match=r"make no masks|overrides compute_mask"):
        hkr.lipschitz_bound(model)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: K.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(0.1003), dtype=dtype),
        lambda dtype: K.PReLU(alpha_initializer=keras.initializers.Constant(1.0037), dtype=dtype),
        lambda dtype: K.Normalization(mean=0.0, variance=0.01029, axis=None, dtype=dtype),
    ],
    ids=["Dense", "PReLU", "Normalization"],
)
def test_weights_count_as_they_are_cast(make, dtype):
    """A power of two as input, so that the output is what one input is multiplied by."""
    layer = make(dtype)
    model = keras.Sequential([keras.Input((1,)), layer])
    found = abs(to_numpy(model(np.full((1, 1), -1.0, "float32"))).item())
    assert found <= hkr.lipschitz_bound(model) <= found * (1 + 2.0**-4)


def test_kernels_of_every_kind_count_as_they_are_cast():
    for layer, shape in (
        (K.Conv1D(1, 1, use_bias=False), (1, 1)),
        (K.DepthwiseConv1D(1, use_bias=False), (1, 1)),
        (K.SeparableConv1D(1, 1, use_bias=False), (1, 1)),
        (L.AOLDense(1, use_bias=False), (1,)),
    ):
        config = {**layer.get_config(), "dtype": "mixed_bfloat16"}
        model = keras.Sequential([keras.Input(shape), type(layer).from_config(config)])
        for weight in model.weights:
            weight.assign(np.full(weight.shape, 1.0037 if weight.name != "unscaled" else 1.0))
        found = abs(to_numpy(model(np.ones((1, *shape), "float32"))).item())
        assert found <= hkr.lipschitz_bound(model) <= found * 1.01


@pytest.mark.parametrize("make", [lambda s: K.LeakyReLU(negative_slope=s), lambda s: K.ReLU(negative_slope=s)])
def test_slopes_are_those_of_float32(make):
    slope = 1 + 2.0**-24 + 2.0**-40
    model = keras.Sequential([keras.Input((1,)), *(make(slope) for _ in range(20))])
    assert -to_numpy(model(np.array([[-1.0]], "float32"))).item() <= hkr.lipschitz_bound(model) < 1 + 1e-5
    distances, _ = hkr.exporting.certificate.constants(keras.Sequential([keras.Input((1,)), make(1.1)]), 1)
    assert float(np.float32(1.1)) <= distances.item()


def test_numbers_in_half_precision():
    x = np.ones((1, 7, 1), "float32")
    for layer in (
        K.LeakyReLU(negative_slope=3.01, dtype="bfloat16"),
        K.Normalization(mean=[0.0], variance=[0.011], dtype="float16"),
    ):
        found = np.abs(to_numpy(layer(-x))).max()
        assert found <= hkr.lipschitz_bound(keras.Sequential([keras.Input((7, 1)), layer])) <= 1.1 * found
    layer = L.ScaledGlobalAveragePooling1D(dtype="bfloat16")
    found = to_numpy(layer(x)).item() / 7**0.5
    assert found * (1 - 2.0**-8) <= hkr.lipschitz_bound(keras.Sequential([keras.Input((7, 1)), layer]))
    with pytest.raises(ValueError, match="largest of float16"):
        hkr.lipschitz_bound(keras.Sequential([keras.Input((1,)), L.Scale(70000.0, dtype="float16")]))


def test_a_softmax_that_others_read_stays():
    x = keras.Input((2,))
    y = K.Dense(3, "softmax", name="p")(x)
    new = hkr.to_lipschitz(keras.Model(x, [y, K.Dense(2, name="q")(y)]))
    assert new.get_layer("p").activation is keras.activations.softmax
    assert new.get_layer("q").kernel.shape == (3, 2)
    assert hkr.lipschitz_bound(new.get_layer("p")) <= 1.0


def test_labels_of_another_order_are_refused():
    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return np.array([[1.0, 0.0], [0.0, 1.0]], "float32"), np.array([0, 1])

    model = keras.Sequential([keras.Input((2,)), L.LipschitzDense(2, kernel_initializer="identity")])
    callback = hkr.callbacks.CertifiedEvaluation(Data(), np.array([1, 0]), [0.1])
    callback.set_model(model)
    with pytest.raises(ValueError, match="labels that come with the data"):
        callback.on_epoch_end(0, {})


def test_local_radii_of_ties_and_of_numbers_out_of_range():
    tie = keras.Sequential([keras.Input((2,)), K.Dense(2, kernel_initializer="ones")])
    assert local_radii(tie, np.ones((1, 2))).tolist() == [0.0]
    for size in (1e38, 1e-38):
        layers = [K.Dense(2, "relu", use_bias=False) for _ in range(8)]
        model = keras.Sequential([keras.Input((2,)), *layers, K.Dense(2, use_bias=False)])
        model.set_weights([size * np.eye(2, dtype="float32")] * 9)
        with pytest.raises(ValueError, match="multiply to between"):
            local_radii(model, np.array([[2.0, 1.0]]))


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [keras.Input((1,), dtype="float16")],
        lambda: [keras.Input((1,)), K.Identity(dtype="bfloat16")],
    ],
)
def test_local_bounds_want_full_precision(layers):
    model = keras.Sequential([*layers(), K.Dense(2)])
    for bound in (lambda: local_radii(model, np.ones((1, 1))), lambda: hkr.local_bound(model, np.ones((1, 1)), 0.1)):
        with pytest.raises(ValueError, match="float32 or float64"):
            bound()


def test_local_bounds_want_as_many_radii_as_inputs():
    model = keras.Sequential([keras.Input((1,)), K.Dense(2)])
    for x, epsilon in ((np.ones((1, 1)), [0.1, 0.2]), (np.ones((0, 1)), 0.1)):
        with pytest.raises(ValueError, match="Expected"):
            hkr.local_bound(model, x, epsilon)


class Sum(K.Add):
    """An Add with a rule of its own."""


@pytest.mark.parametrize("result", [lambda c: -c.sum(axis=0), lambda c: 1.0, lambda c: c])
def test_results_of_registered_rules_are_checked(result):
    bounds.merge_bound.register(Sum, lambda layer, constants: result(constants))
    x = keras.Input((2,))
    with pytest.raises(ValueError, match="Expected a rule that gives"):
        hkr.lipschitz_bound(keras.Model(x, Sum()([x, x])))


def test_bounds_of_activations_are_not_negative(monkeypatch):
    monkeypatch.setitem(bounds.ACTIVATION_BOUNDS, abs, -3.0)
    with pytest.raises(ValueError, match="constant of at least 0"):
        activation_bound(abs)


def test_a_backend_of_its_own_is_refused():
    layer = K.Rescaling(1.0)
    model = keras.Sequential([keras.Input((2,)), layer])
    layer.backend = type("Tenfold", (), {"cast": lambda self, x, dtype: 10 * x})()
    with pytest.raises(ValueError, match="computes with Keras"):
        hkr.lipschitz_bound(model)


def test_a_mean_over_inputs_of_several_channels_is_refused():
    layer, inputs = L.ScaledAveragePooling1D(3, 1, padding="same"), (keras.Input((4, 2)), keras.Input((9, 5)))
    with pytest.raises(ValueError, match="one number of channels"):
        hkr.to_keras(keras.Model(list(inputs), [layer(each) for each in inputs]))


def test_replaced_helpers_of_keras_are_seen(monkeypatch):
    base = next(cls for cls in K.Conv1D.__mro__ if "convolution_op" in vars(cls))
    old = base.convolution_op
    monkeypatch.setattr(base, "convolution_op", lambda self, *arguments: 10 * old(self, *arguments))
    with pytest.raises(ValueError, match="convolution_op was replaced"):
        hkr.lipschitz_bound(keras.Sequential([keras.Input((4, 1)), K.Conv1D(1, 1)]))


@pytest.mark.parametrize("down_first", [True, False])
def test_products_may_leave_the_range_of_float64_on_the_way(down_first):
    """The product of all constants is 1."""
    scales = [1e-38] * 10 + [1e38] * 10
    kernels = [np.eye(2) * scale for scale in (scales if down_first else scales[::-1])]
    assert semidefinite_bound(kernels) == pytest.approx(1.0)


def test_local_bounds_know_what_is_deployed():
    model = keras.Sequential([keras.Input((1,)), K.Dense(1), K.LeakyReLU(0.1), K.Dense(1)])
    model.set_weights([np.ones((1, 1)), np.zeros(1)] * 2)
    stored = float(np.float32(0.1))
    assert stored <= hkr.local_bound(model, [[-2.0]], 0.1)[0] <= stored * (1 + 1e-9)
    with pytest.raises(ValueError, match="float64 can hold"):
        hkr.local_bound(model, np.array([[2**53 + 1]]), 0.1)


class Renamed(K.ReLU):
    """A ReLU with a rounding of its own."""


@pytest.mark.parametrize(("at_centre", "slope"), [(-1.0, 0.0), (0.0, -1.0)])
def test_rules_of_rounding_are_not_negative(at_centre, slope):
    rounding.layer_rounding.register(Renamed, lambda layer: lambda x, y: rounding.Rounding(at_centre, slope))
    model = keras.Sequential([keras.Input((2,)), Renamed(), K.Dense(2)])
    with pytest.raises(ValueError, match=r"rule of rounding .* Renamed"):
        hkr.certify(model, np.ones((1, 2), "float32"), verbose=0, rigorous=True)
