"""Rounding: every bound against what float32 really does, and what a rigorous certificate refuses."""

import math

import cases
import keras
import numpy as np
import pytest
from helpers import double_precision, normal, to_numpy

import hkr_keras as hkr
from hkr_keras import rounding
from hkr_keras.certification.floating_point import accumulated
from hkr_keras.certification.prediction import Predictor
from hkr_keras.certification.rounding import UNIT_ROUNDOFF, Affine, Tracer, layer_rounding, norms

pytestmark = pytest.mark.each  # what a compiler may do differs


K, L, C = keras.layers, hkr.layers, keras.initializers.Constant


def in_float64(layer, shape):
    """The same layer with the same float32 weights, computing in float64."""
    copy = type(layer).from_config({**layer.get_config(), "dtype": "float64"})
    copy.build((None, *shape))
    copy.set_weights([weight.astype("float64") for weight in layer.get_weights()])
    return copy


def points(shape, batch=24):
    """Ordinary inputs, large ones, and sums that cancel."""
    x = normal((batch, *shape), seed=3)
    x[8:16] *= 1e4
    flat = x[16:].reshape(len(x[16:]), -1)
    flat += 1e3 * np.where(np.arange(flat.shape[1]) % 2, 1.0, -1.0).astype("float32")
    return x


@pytest.mark.many
@pytest.mark.parametrize(("make", "shape"), cases.ROUNDED, ids=cases.name)
def test_rounding_of_a_layer_is_covered(make, shape):
    """At the centre, and at other points by the slope; the bound is of the right order where there is an error."""
    layer, x = make(), points(shape)
    layer(x)
    if not isinstance(layer, L.LipschitzLayer):
        layer.set_weights([w + 0.2 * np.abs(normal(w.shape, i)) for i, w in enumerate(layer.get_weights())])
    with double_precision():
        exact = in_float64(layer, shape)
        differences = [
            norms(to_numpy(layer(points)) - to_numpy(exact(points.astype("float64")))) for points in (x, x[::-1])
        ]
    found = layer_rounding(layer)(x, to_numpy(layer(x), "float32"))
    assert found.at_centre.shape == (len(x),)
    assert np.all(differences[0] <= found.at_centre)
    assert np.all(differences[1] <= found.at_centre + found.slope * norms(x.astype("float64") - x[::-1]))
    fan_in = max((math.prod(w.shape[:-1]) for w in layer.get_weights() if w.ndim > 1), default=math.prod(shape))
    assert np.all(found.at_centre <= 8 * (fan_in + 40) * UNIT_ROUNDOFF * (1 + np.max(norms(x))) * math.sqrt(fan_in))


@pytest.mark.parametrize("cls", cases.MERGES)
def test_rounding_of_a_merge_is_covered(cls):
    merge = cls()
    xs = [points((20,)), points((20,))[::-1].copy()]
    y = to_numpy(merge(xs))
    with double_precision():
        exact = type(merge).from_config({**merge.get_config(), "dtype": "float64"})
        difference = norms(y - to_numpy(exact([x.astype("float64") for x in xs])))
    found = rounding.merge_rounding(merge)(xs, y.astype("float32"))
    assert np.all(difference <= found.at_centre)
    assert len(found.slope) == 2


@pytest.mark.parametrize("make", cases.MODELS)
def test_rounding_of_a_model_is_covered(make):
    model = make()
    model.set_weights([w + 0.05 * normal(w.shape, i) for i, w in enumerate(model.get_weights())])
    x = points(model.input_shape[1:])
    with double_precision():
        exact = keras.models.clone_model(
            model, clone_function=lambda layer: type(layer).from_config({**layer.get_config(), "dtype": "float64"})
        )
        exact.set_weights([w.astype("float64") for w in model.get_weights()])
        truth = {name: to_numpy(exact(data.astype("float64"))) for name, data in {"x": x, "z": x + 0.01}.items()}
    trace, largest = Tracer(model)([x])
    assert np.all(norms(trace.value - truth["x"]) <= trace.centre_error)
    deployed = norms(to_numpy(model(x)) - truth["x"])
    assert np.all(deployed <= trace.error(0.0))
    assert np.any(deployed >= 1e-3 * trace.error(0.0))  # not absurdly far above
    assert np.all(trace.centre_error <= trace.error(0.0) * (1 + 1e-9))
    moved = (x + np.float32(0.01)).astype("float32")
    distance = norms(moved.astype("float64") - x)
    assert np.all(norms(to_numpy(model(moved)) - truth["z"]) <= trace.error(distance) + 1e-4)
    assert np.all(largest(0.0) >= norms(x))


def test_affine():
    bound = (Affine(np.array([1.0, 2.0]), 3.0) + Affine(1.0, np.array([0.0, 1.0]))).times(2.0)
    assert bound(0.5).tolist() == [7.0, 10.0]
    assert bound.larger(Affine(5.0, 0.0))(0.5).tolist() == [8.0, 10.0]


@pytest.mark.parametrize("terms", [2**22, 2**24, 2**30])
def test_sums_that_are_too_wide_are_refused(terms):
    with pytest.raises(ValueError, match="fewer than 2\\^22 terms"):
        accumulated(terms)


# ---- certificates ------------------------------------------------------------------------------------------


def certify(model, x, **kwargs):
    return hkr.certify(model, x, verbose=0, rigorous=True, **kwargs)


@pytest.mark.parametrize("make", cases.MODELS)
def test_a_rigorous_radius_is_smaller_and_little_so(make):
    model, x = make(), normal((50, *make().input_shape[1:]))
    plain, rigorous = hkr.certify(model, x, verbose=0), certify(model, x, batch_size=16)
    assert rigorous.rigorous
    assert not plain.rigorous
    assert np.all(rigorous.radius <= plain.radius)
    assert np.mean(plain.radius - rigorous.radius) < 1e-3 * np.mean(plain.radius) + 1e-3
    assert "float32" in rigorous.to_dict()["statement"]
    assert "not covered" in plain.to_dict()["statement"]


def two_class(*layers):
    return keras.Sequential([keras.Input((2,)), *layers])


def planted(size):
    """A bias that swallows the signal, and the next layer that takes it away again."""
    model = two_class(K.Dense(2, kernel_initializer="identity"), K.Dense(2, kernel_initializer="identity"))
    model.layers[0].bias.assign([size, size])
    model.layers[1].bias.assign([-size, -size])
    return model


@pytest.mark.parametrize("size", [2.0**24, 1e10, 1e30])
def test_planted_biases_are_not_certified(size):
    model = planted(size)
    x = np.array([[1.0, 0.0], [3.0, -2.0]], "float32")
    assert certify(model, x).radius.tolist() == [0.0, 0.0]


def test_a_small_bias_is():
    assert np.all(certify(planted(1.0), np.array([[1.0, 0.0]])).radius > 0.7)


@pytest.mark.parametrize("scale", [1e18, 1e25, 1e37])
def test_huge_inputs_are_not_certified(scale):
    model = two_class(L.LipschitzDense(4), L.GroupSort(2), K.Dense(2))
    with np.errstate(over="ignore"):
        try:
            assert certify(model, np.array([[scale, 0.0]], "float32")).radius.tolist() == [0.0]
        except ValueError as error:
            assert "finite outputs" in str(error)  # noqa: PT017


@pytest.mark.parametrize("power", [-60, -20, 20, 60])
def test_powers_of_two_change_nothing(power):
    """Scaling one layer up and the next down is exact in float32, and cancels in the bound."""
    model = two_class(K.Dense(4, use_bias=False), L.GroupSort(2), K.Dense(2, use_bias=False))
    x = normal((10, 2))
    before = certify(model, x).radius
    first, _, second = model.layers
    first.kernel.assign(to_numpy(first.kernel) * 2.0**power)
    second.kernel.assign(to_numpy(second.kernel) / 2.0**power)
    if power > 40:
        assert np.all(certify(model, x).radius <= before * (1 + 1e-6))  # may come near to overflow
    else:
        np.testing.assert_allclose(certify(model, x).radius, before, rtol=1e-6)


def separable(first, second, bias):
    options = {"depthwise_initializer": C(first), "pointwise_initializer": C(second), "bias_initializer": C(bias)}
    return keras.Sequential([keras.Input((1, 1)), K.SeparableConv1D(1, 1, **options), K.Flatten()])


def test_what_lies_between_two_kernels_counts():
    """It overflows at 2^120 * 256; and 2^-126 * 0.99 is flushed to 0 and then multiplied by 2^126."""
    assert certify(separable(2.0**120, -(2.0**-120), 300.0), np.array([[[200.0]]])).radius[0] == 0.0
    assert certify(separable(2.0**-126, 2.0**126, -0.5), np.array([[[1.1]]])).radius[0] <= 0.1
    assert certify(separable(1.0, 1.0, -0.5), np.array([[[1.1]]])).radius[0] == pytest.approx(0.6, rel=1e-4)


def test_every_flushed_cell_of_a_pooling_counts():
    layers = [L.ScaledAveragePooling2D(64, padding="same"), K.Flatten()]
    head = K.Dense(1, kernel_initializer="ones", bias_initializer=C(-64 * 5e-35 * 0.5))
    model = keras.Sequential([keras.Input((64, 64, 1)), *layers, head])
    assert certify(model, np.full((1, 64, 64, 1), 5e-35)).radius[0] == 0.0


def test_equal_logits_are_not_certified():
    model = two_class(K.Dense(2, kernel_initializer="ones"))
    assert certify(model, normal((10, 2))).radius.tolist() == [0.0] * 10


def test_normal_but_tiny_weights_are_not_certified():
    model = two_class(K.Dense(2, use_bias=False))
    model.layers[0].kernel.assign([[2e-38, 0.0], [0.0, 2e-38]])
    assert certify(model, np.array([[1.0, 0.0]])).radius.tolist() == [0.0]


@pytest.mark.parametrize("first", [(L.Scale, 1e-41), (K.Rescaling, 1e-41), (L.Scale, 1e-30)])
@pytest.mark.parametrize("last", [(L.Scale, 1e30), (K.Rescaling, 1e38)])
def test_factors_that_underflow_are_not_certified(first, last):
    """Tiny numbers times large ones: what was flushed to 0 on the way counts as much as the signal."""
    first, last = (cls(factor) for cls, factor in (first, last))
    model = two_class(first, L.Scale(1e-10), K.Dense(2), last)
    assert certify(model, np.array([[1.0, 0.0]], "float32")).radius[0] == 0.0


def test_inputs_in_float64_lose_what_rounding_moves_them_by():
    model = two_class(K.Dense(1, kernel_initializer="ones", use_bias=False))
    single = np.array([[1e4, 1.0]], "float32")
    double = single + np.array([[3e-4, 0.0]])  # float32 has steps of 1e-3 there
    difference = certify(model, single).radius[0] - certify(model, double).radius[0]
    assert difference == pytest.approx(3e-4, rel=1e-3)


def test_images_without_a_channel_axis():
    model, x = cases.cnn(), normal((5, 8, 8))
    np.testing.assert_allclose(certify(model, x).radius, certify(model, x[..., None]).radius)


def test_inputs_by_name():
    a, b = keras.Input((2,), name="b"), keras.Input((3,), name="a")
    model = keras.Model([a, b], K.Dense(2)(K.Concatenate()([L.Scale(3.0)(a), b])))
    x = {"b": normal((4, 2)), "a": normal((4, 3))}
    by_name = certify(model, x)
    np.testing.assert_allclose(by_name.radius, certify(model, [x["b"], x["a"]]).radius)
    with pytest.raises(ValueError, match="Expected the inputs"):
        certify(model, {"c": x["a"], "b": x["b"]})


def test_inputs_of_a_model_made_of_a_dictionary():
    inputs = {"z": keras.Input((2,), name="z"), "y": keras.Input((3,), name="y")}
    model = keras.Model(inputs, K.Dense(2)(K.Concatenate()([L.Scale(3.0)(inputs["z"]), inputs["y"]])))
    x = {"y": normal((4, 3)), "z": normal((4, 2))}
    exact, rigorous = hkr.certify(model, x, verbose=0), certify(model, x)
    assert np.all(rigorous.radius <= exact.radius)
    assert rigorous.prediction.tolist() == model.predict(x, verbose=0).argmax(axis=1).tolist()


def softened():
    return two_class(K.Dense(4, activation="gelu"), K.Dense(2))


def subnormal():
    model = two_class(K.Dense(2))
    model.layers[0].kernel.assign([[1.0, 1e-42], [0.0, 1.0]])
    return model


class Unknown(K.Layer):
    def call(self, inputs):
        return inputs / 2


def unknown():
    hkr.bounds.layer_bound.register(Unknown, lambda layer: 0.5)
    return two_class(Unknown(), K.Dense(2))


def negative_variance():
    model = two_class(K.BatchNormalization(), K.Dense(2))
    model.layers[0].moving_variance.assign([-1e-4, 1.0])
    return model


REFUSED = {
    "negative variance": (negative_variance, "variances of at least 0"),
    "no epsilon": (
        lambda: two_class(K.BatchNormalization(epsilon=2e-45, moving_variance_initializer="zeros")),
        "variances above 0 with epsilon in float32",
    ),
    "gelu": (softened, "activation=gelu"),
    "layer": (lambda: two_class(K.Softmax()), "Softmax"),
    "subnormal": (subnormal, "1 subnormal entries"),
    "unknown": (unknown, r"layer_rounding.register\(Unknown\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_rigorous_certificate_covers(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        certify(make(), np.array([[1.0, 0.5]]))


def test_models_whose_layers_cannot_be_seen():
    class Halved(keras.Model):
        def call(self, x):
            return x / 2

    hkr.bounds.layer_bound.register(Halved, lambda layer: 0.5)
    model, x = Halved(), np.array([[1.0, 0.5]], "float32")
    model(x)
    assert hkr.certify(model, x, verbose=0).radius[0] > 0
    with pytest.raises(ValueError, match="Sequential or functional"):
        certify(model, x)


def test_a_registered_layer_is_covered():
    model = unknown()
    layer_rounding.register(Unknown, lambda layer: rounding.relative(0.0))
    assert certify(model, np.array([[1.0, 0.5]])).radius[0] > 0


def test_reduced_precision_is_noticed(monkeypatch):
    product = keras.ops.matmul

    def tf32(a, b):
        return product(np.round(np.asarray(a) * 2.0**10) / np.float32(2.0**10), b)

    monkeypatch.setattr(keras.ops, "matmul", tf32)
    with pytest.raises(ValueError, match="full float32"):
        certify(two_class(K.Dense(2)), np.array([[1.0, 0.5]]))


def test_predictions_that_round_more_than_the_layers_are_noticed(monkeypatch):
    model = two_class(K.Dense(2))
    predict = Predictor.__call__
    monkeypatch.setattr(Predictor, "__call__", lambda self, arrays: predict(self, arrays) + 1e-3)
    with pytest.raises(ValueError, match="within float32 rounding"):
        certify(model, np.array([[1.0, 0.5]]))


def test_scores_intervals_and_top_k_have_it_too():
    model, x = cases.mlp(), normal((6, 30))
    exact, rigorous = (hkr.certify_top_k(model, x, k=2, verbose=0, rigorous=flag).radius for flag in (False, True))
    assert np.all(rigorous <= exact)
    assert np.any(rigorous < exact)
    exact, rigorous = (hkr.certify_outputs(model, x, 0.1, verbose=0, rigorous=flag) for flag in (False, True))
    assert np.all(rigorous.upper > exact.upper)
    assert np.all(rigorous.upper - exact.upper < 1e-2)
    score = keras.Sequential([keras.Input((30,)), K.Dense(1)])
    exact, rigorous = (hkr.certify(score, x, verbose=0, rigorous=flag).radius for flag in (False, True))
    assert np.all(rigorous < exact)
