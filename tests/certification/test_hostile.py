"""Legal but odd models: each is refused, or its bound is above what can be measured."""

from functools import partial

import keras
import numpy as np
import pytest
from helpers import BACKEND, to_numpy

import hkr_keras as hkr
from hkr_keras import bounds
from hkr_keras.certification import singular_values

K = keras.layers
X = np.array([[1.0, 0.0]], "float32")


class Ten(K.Dense):
    """Computes ten times what its kernel says."""

    def call(self, inputs, training=None):
        return 10 * super().call(inputs)


class TenTimes(K.Identity):
    def call(self, inputs):
        return 10 * inputs


class TenfoldCall(K.Layer):
    def __call__(self, *args, **kwargs):
        return 10 * super().__call__(*args, **kwargs)


class MixedIn(K.Dense, TenfoldCall):
    """The override stands behind Dense in the order of resolution."""


class TenfoldModel(keras.Sequential):
    def __call__(self, *args, **kwargs):
        return 10 * super().__call__(*args, **kwargs)


class TenfoldPrediction(keras.Sequential):
    def predict_step(self, data):
        return 10 * super().predict_step(data)


@pytest.fixture
def registered():
    """The (right) bounds that a user would register for the two layers."""
    bounds.layer_bound.register(Ten, lambda layer: 10 * singular_values.kernel_spectrum(layer, "kernel").bound)
    bounds.layer_bound.register(TenTimes, lambda layer: 10.0)


def identity(units=2, **kwargs):
    return K.Dense(units, kernel_initializer="identity", use_bias=False, **kwargs)


def test_a_registered_subclass_is_no_head(registered):
    for layers in ([Ten(2, kernel_initializer="identity")], [identity(), TenTimes()]):
        certificate = hkr.certify(keras.Sequential([keras.Input((2,)), *layers]), X, verbose=0)
        assert certificate.radius[0] == pytest.approx(0.5**0.5)  # the class flips half way to (0, 1)


def of_another_shape():
    rescaling = K.Rescaling(np.ones(4, "float32"))
    two = [keras.Input((4,)), keras.Input((4,))]
    return [
        (
            keras.Sequential([keras.Input((8, 8, 1)), K.GlobalAveragePooling2D(), K.Dense(2)]),
            np.ones((1, 2, 2, 1)),
        ),
        (
            keras.Sequential(
                [keras.Input((4, 4, 3)), K.Normalization(mean=[0.5] * 3, variance=[0.05] * 3), K.Flatten()]
            ),
            np.ones((1, 4, 4, 1)),
        ),
        (keras.Sequential([keras.Input((4,)), rescaling, K.Dense(1)]), np.ones((3, 1))),
        (keras.Model(two, K.Dense(1)(K.Add()(two))), [np.ones((1, 1)), np.ones((1, 4))]),
        (keras.Model(two, K.Dense(1)(K.Add()(two))), [np.ones((1, 4)), np.ones((2, 4))]),
        (keras.Model(two, K.Dense(1)(K.Add()(two))), [np.ones((1, 4))]),
        (keras.Sequential([keras.Input((4,)), K.Dense(1)]), np.float32(1.0)),
    ]


@pytest.mark.parametrize("rigorous", [False, True])
@pytest.mark.parametrize("index", range(7))
def test_inputs_of_another_shape_are_refused(index, rigorous):
    model, x = of_another_shape()[index]
    with pytest.raises(ValueError, match=r"Expected (inputs of|2 inputs|at least one input)"):
        hkr.certify(model, x, verbose=0, rigorous=rigorous)


@pytest.mark.parametrize("batch_size", [0, None, -1, 2.5])
def test_wrong_batch_sizes(batch_size):
    with pytest.raises(ValueError, match="batch size of at least 1"):
        hkr.certify(keras.Sequential([keras.Input((2,)), identity()]), X, batch_size, verbose=0)


def test_a_registered_subclass_has_no_rounding_of_its_base(registered):
    for layers in ([Ten(2, kernel_initializer="identity")], [TenTimes(), identity()]):
        with pytest.raises(ValueError, match="overrides call"):
            hkr.certify(keras.Sequential([keras.Input((2,)), *layers]), X, verbose=0, rigorous=True)


def test_a_stale_predict_function_is_not_used():
    model = keras.Sequential([keras.Input((2,)), identity(), hkr.layers.Scale(10.0)])
    model.compile()
    assert hkr.certify(model, X, verbose=0).radius[0] == pytest.approx(0.5**0.5)
    model.layers[-1].k = 1.0
    assert hkr.certify(model, X, verbose=0).radius[0] == pytest.approx(0.5**0.5)
    model.pop()
    assert hkr.certify(model, X, verbose=0).radius[0] == pytest.approx(0.5**0.5)


def nested_by_name():
    a, b = keras.Input((1,), name="a"), keras.Input((1,), name="b")
    inner = keras.Model([b, a], K.Add()([hkr.layers.Scale(100.0)(b), a]))
    x = keras.Input((1,))
    return keras.Model(x, inner({"a": hkr.layers.Scale(0.01)(x), "b": x}))


def broadcast_of_unknown_sizes():
    a, b = keras.Input((None,)), keras.Input((None,))
    inner = keras.Model([a, b], K.Add()([a, b]))
    x = keras.Input((16,))
    return keras.Model(x, inner([hkr.layers.LipschitzDense(1)(x), x]))


def merge_with_a_constant():
    x = keras.Input((1,))
    return keras.Model(x, K.Add()([x, x, np.ones((1, 4), "float32")]))


def shared_rescaling():
    layer = K.Rescaling([1.0, 1.0, 1.0, 1.0])
    layer(keras.Input((4,)))
    x = keras.Input((1,))
    return keras.Model(x, layer(x))


def training_mode():
    x = keras.Input((2,))
    return keras.Model(x, K.Dropout(0.5)(x, training=1))


def mask_of_fives():
    x = keras.Input((4, 1))
    return keras.Model(x, hkr.layers.ScaledGlobalAveragePooling1D()(x, mask=np.full((1, 4), 5.0)))


def shared(layer, size):
    """A layer made for `size` features, and then applied to a single one, which it would be broadcast over."""
    layer(keras.Input((size,)))
    x = keras.Input((1,))
    return keras.Model(x, layer(x))


def shared_along_time():
    layer = K.PReLU()
    layer(keras.Input((16, 3)))
    x = keras.Input((1, 3))
    return keras.Model(x, layer(x))


def nested_by_keyword():
    a, b = keras.Input((1,), name="a"), keras.Input((1,), name="b")
    inner = keras.Model([b, a], K.Add()([hkr.layers.Scale(100.0)(b), a]))
    x = keras.Input((1,))
    return keras.Model(x, inner(inputs={"a": hkr.layers.Scale(0.01)(x), "b": x}))


def activation_with_numbers():
    activation = K.Rescaling(np.ones(4))
    activation.build((None, 4))
    return keras.Sequential([keras.Input((4,)), K.Dense(1, kernel_initializer="ones", activation=activation)])


class Liar(K.Dense):
    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 16)


def lied_about_shape():
    x = keras.Input((16,))
    return keras.Model(x, K.Add()([Liar(1, kernel_initializer="ones")(x), x]))


class WideBias(K.Dense):
    def build(self, input_shape):
        super().build(input_shape)
        self.bias = np.ones(4, "float32")


class Tenfold(keras.DTypePolicy):
    def convert_input(self, x, autocast, dtype):
        return 10 * super().convert_input(x, autocast, dtype)


class TenfoldInputs(keras.Model):
    def _standardize_inputs(self, inputs):
        return [10 * x for x in super()._standardize_inputs(inputs)]


def functional_of_ones_own():
    x = keras.Input((2,))
    return TenfoldInputs(x, identity()(x))


def edited(layer, shape, **attributes):
    model = keras.Sequential([keras.Input(shape), layer])
    for name, value in attributes.items():
        setattr(layer, name, value)
    return model


def hooked():
    model = keras.Sequential([keras.Input((2,)), identity()])
    model.layers[0].register_forward_hook(lambda *arguments: None)
    return model


def nested_of_another_size(wrap=lambda inner, x: inner(x), shape=(1,)):
    inner = keras.Sequential([keras.Input((4,)), K.Rescaling(np.ones(4, "float32"))])
    x = keras.Input(shape)
    return keras.Model(x, wrap(inner, x))


def nested_maximum():
    two = [keras.Input((4,)), keras.Input((4,))]
    inner = keras.Model(two, K.Maximum()(two))
    x, z = keras.Input((1,)), keras.Input((4,))
    return keras.Model([x, z], inner([x, z]))


def over_the_batch(layer):
    layer(keras.Input((4, 4)))
    x = keras.Input((4,))
    return keras.Model(x, layer(x))


def with_lora():
    model = keras.Sequential([keras.Input((4,)), K.Dense(4)])
    model.layers[0].enable_lora(2)
    return model


def negative_variance():
    model = keras.Sequential([keras.Input((2,)), K.BatchNormalization()])
    model.layers[0].moving_variance.assign([-1.0, 1.0])
    return model


REFUSED = {
    "nested by name": (nested_by_name, "dictionary of inputs"),
    "broadcast": (broadcast_of_unknown_sizes, "equal and known shapes"),
    "constant": (merge_with_a_constant, "tensors of the model alone"),
    "shared rescaling": (shared_rescaling, "broadcasting enlarges norms"),
    "training": (training_mode, "inference mode"),
    "mask": (mask_of_fives, "tensors of the model alone"),
    "variance": (negative_variance, "finite Lipschitz bound"),
    "mixed in": (lambda: keras.Sequential([keras.Input((2,)), MixedIn(2)]), "overrides __call__"),
    "model": (lambda: TenfoldModel([keras.Input((2,)), identity()]), "a forward pass of its own"),
    "shared centring": (lambda: shared(hkr.layers.BatchCentering(), 4), "incompatible"),
    "shared PReLU": (lambda: shared(K.PReLU(), 4), "of the shape it was built for"),
    "shared PReLU along time": (shared_along_time, "of the shape it was built for"),
    "nested by keyword": (nested_by_keyword, "dictionary of inputs"),
    "activation": (activation_with_numbers, "have the sizes of its input"),
    "shape": (lied_about_shape, "overrides compute_output_shape"),
    "bias": (lambda: keras.Sequential([keras.Input((3,)), WideBias(1)]), r"to have shape \(1,\)"),
    "policy": (lambda: edited(identity(dtype=Tenfold("float32")), (2,)), "dtype policy of Keras"),
    "inputs": (functional_of_ones_own, "a forward pass of its own"),
    **({"hook": (hooked, "without forward hooks")} if BACKEND == "torch" else {}),  # elsewhere there are none
    "edited bias": (lambda: edited(K.Dense(1), (3,), bias=np.zeros(4, "float32")), r"to have shape \(1,\)"),
    "edited mean": (
        lambda: edited(hkr.layers.BatchCentering(), (1,), moving_mean=np.zeros(4, "float32")),
        r"to have shape \(1,\)",
    ),
    "edited groups": (lambda: edited(K.Conv1D(4, 1), (3, 4), groups=4), "as many groups"),
    "integer layer": (lambda: keras.Sequential([keras.Input((3,)), K.Flatten(dtype="int32")]), "in floating point"),
    "nested of another size": (nested_of_another_size, "the shape that model"),
    "nested in time": (
        lambda: nested_of_another_size(lambda inner, x: K.TimeDistributed(inner)(x), (2, 1)),
        "the shape that model",
    ),
    "nested maximum": (nested_maximum, "the shape that model"),
    "centring over the batch": (
        lambda: over_the_batch(hkr.layers.LayerCentering(axis=-2, center=False)),
        "apart in the batch",
    ),
    "sorting over the batch": (lambda: over_the_batch(hkr.layers.FullSort(axis=-2)), "apart in the batch"),
    "halves of the batch": (lambda: over_the_batch(hkr.layers.MaxMin(axis=-2)), "apart in the batch"),
    "LoRA": (with_lora, "LoRA"),
    "softmax over the batch": (lambda: keras.Sequential([keras.Input((3,)), K.Softmax(axis=0)]), "apart in the batch"),
    "softmax over the batch, from behind": (
        lambda: keras.Sequential([keras.Input((3,)), K.Softmax(axis=-2)]),
        "apart in the batch",
    ),
    "integers": (lambda: keras.Sequential([keras.Input((1,), dtype="int32"), K.Dense(1)]), "floating point type"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt")
def test_is_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        hkr.lipschitz_bound(build())


@pytest.mark.parametrize("make", [hkr.layers.FullSort, partial(hkr.layers.LayerCentering, center=False)])
def test_the_batch_is_no_axis(make):
    with pytest.raises(ValueError, match="not the batch"):
        make(axis=0)(np.ones((2, 2), "float32"))


def test_predictions_of_ones_own_are_refused():
    with pytest.raises(ValueError, match="overrides predict_step"):
        hkr.certify(TenfoldPrediction([keras.Input((2,)), identity()]), X, verbose=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [K.Dense(1, activation=K.Activation("sigmoid"))],
        lambda: [K.Dense(1, activation="sigmoid"), K.ActivityRegularization()],
        lambda: [K.Dense(1, activation="sigmoid"), hkr.layers.Scale(-2.0), K.Reshape((1,))],
        lambda: [K.Dense(1), K.ReLU()],
    ],
)
def test_a_score_of_one_sign_is_refused(make):
    with pytest.raises(ValueError, match="cannot change its sign"):
        hkr.certify(keras.Sequential([keras.Input((2,)), *make()]), X, verbose=0)


def test_a_shifted_sigmoid_has_both_signs():
    model = keras.Sequential([keras.Input((2,)), K.Dense(1, activation="sigmoid"), K.Rescaling(1.0, offset=-0.5)])
    assert np.isfinite(hkr.certify(model, X, verbose=0).radius).all()


@pytest.mark.parametrize(("model", "x"), [(lambda x: x, X), (None, X)])
def test_what_is_no_model_is_refused(model, x):
    with pytest.raises(ValueError, match="Expected a Keras model"):
        hkr.certify(model, x)


def test_text_is_no_input():
    with pytest.raises(ValueError, match="numeric inputs"):
        hkr.certify(keras.Sequential([keras.Input((2,)), identity()]), np.array([["a", "b"]]), verbose=0)


def test_an_infinite_radius_survives_json():
    model = keras.Sequential([keras.Input((2,)), K.Dense(2, kernel_initializer="ones")])
    model.layers[0].bias.assign([1.0, 0.0])
    certificate = hkr.certify(model, X, verbose=0)
    assert np.isinf(certificate.radius[0])  # both logits move together
    assert "Infinity" not in certificate.to_json()
    assert np.isinf(hkr.Certificate.from_json(certificate.to_json()).radius[0])


@pytest.mark.parametrize("y", [[[0.2, 0.3]], [[0, 0]], [[1, 1]]])
def test_labels_that_are_not_one_hot_are_refused(y):
    certificate = hkr.Certificate(
        radius=np.array([1.0]), prediction=np.array([1]), bound=1.0, classes=2, method="pairwise"
    )
    with pytest.raises(ValueError, match="Expected labels"):
        certificate.accuracy(y)


def test_scale_of_integers_is_not_rounded():
    assert to_numpy(hkr.layers.Scale(2.5)(np.array([[2]], "int32"))).tolist() == [[5.0]]


def test_a_mask_counts_as_boolean():
    layer, x = hkr.layers.ScaledGlobalAveragePooling1D(), np.ones((1, 4, 1), "float32")
    assert float(layer(x, mask=np.full((1, 4), 5.0))[0, 0]) == pytest.approx(2.0)


def test_a_layer_taken_from_the_list_still_counts():
    model = keras.Sequential([keras.Input((2,)), identity(), hkr.layers.Scale(10.0)])
    model._layers.pop()
    assert to_numpy(model(X)).tolist() == [[10.0, 0.0]]
    assert hkr.lipschitz_bound(model) == pytest.approx(10.0)


@pytest.mark.parametrize("rigorous", [False, True])
@pytest.mark.parametrize("x", [np.array([[1e8 + 4.5]]), np.array([[100_000_004]])])
def test_an_input_that_is_rounded_loses_radius(x, rigorous):
    """Rounded to float32, which has steps of 8 there, this input is at 1e8 or 1e8 + 8."""
    model = keras.Sequential([keras.Input((1,)), K.Dense(1, kernel_initializer="ones")])
    model.layers[0].bias.assign([-1e8])
    radius = hkr.certify(model, x, verbose=0, rigorous=rigorous).radius[0]
    assert radius <= abs(float(x[0, 0]) - 1e8)
    exact = keras.Sequential([keras.Input((1,)), hkr.layers.Scale(1.0)])
    assert hkr.certify(exact, np.array([[2.0**24 + 1]]), verbose=0).radius[0] == pytest.approx(2.0**24 - 1, rel=1e-8)
