"""Kernels that are composed in float32: what any order of sums may make of them, and of the layers that use them."""

import pathlib
import sys

import keras
import numpy as np
import pytest
from helpers import BACKEND, double_precision, normal, to_numpy

import hkr_keras as hkr
from hkr_keras._backends.compiling import compiled
from hkr_keras.certification.composition import (
    _split_product_error,
    composition_error,
    product_error,
    reflector,
)
from hkr_keras.certification.rounding import Tracer, layer_rounding, norms
from hkr_keras.certification.rules.activations import _ACCURACY
from hkr_keras.certification.singular_values import convolution_bound, matrix_spectrum
from hkr_keras.layers import orthogonal

K, L = keras.layers, hkr.layers

COMPOSED = [
    # layer, input shape
    (lambda: L.OrthogonalConv1D(6, 3, padding="causal", activation="relu"), (9, 4)),
    (lambda: L.OrthogonalConv2D(8, 3, padding="same"), (6, 6, 4)),
    (lambda: L.OrthogonalConv2D(8, 3, strides=2, groups=2, padding="circular"), (6, 6, 4)),
    (lambda: L.OrthogonalConv2D(16, 3), (5, 5, 1)),
    (lambda: L.OrthogonalConv1DTranspose(4, 4, strides=2, padding="same"), (5, 6)),
    (lambda: L.OrthogonalConv2DTranspose(3, 3, padding="circular"), (4, 4, 6)),
    (lambda: L.AOLDense(12), (30,)),
    (lambda: L.AOLDense(30, activation="relu"), (12,)),
    (lambda: L.AOLConv2D(6, 3, strides=2, padding="same"), (7, 7, 4)),
    (lambda: L.ReflectorDense(24, rank=6), (24,)),
    (lambda: L.ReflectorDense(10, activation="relu"), (24,)),
    (lambda: L.ReflectorDense(24, rank=8, activation="leaky_relu"), (10,)),
    (lambda: L.SLLDense(20), (12,)),
    (lambda: L.SLLConv2D(6, 3), (5, 5, 4)),
    (lambda: K.TimeDistributed(L.AOLDense(5)), (3, 12)),
]
IDS = [f"{i} {getattr(make(), 'name', '')}" for i, (make, _) in enumerate(COMPOSED)]


def model_of(make, shape):
    model = keras.Sequential([keras.Input(shape), make()])
    model.set_weights([w + 0.02 * normal(w.shape, i) for i, w in enumerate(model.get_weights())])
    return model


def wide(config):
    """A configuration with float64 for every type in it, those of wrapped layers too."""
    if isinstance(config, dict):
        return {name: "float64" if name == "dtype" else wide(value) for name, value in config.items()}
    return config


def in_double(model):
    """The model with the kernels that were composed here, stored in plain layers that compute in float64."""
    plain = hkr.to_keras(model)
    exact = keras.models.clone_model(
        plain, clone_function=lambda layer: type(layer).from_config(wide(layer.get_config()))
    )
    exact.set_weights([w.astype("float64") for w in plain.get_weights()])
    return exact


def points(shape):
    x = normal((12, *shape), seed=3)
    x[4:8] *= 1e4
    flat = x[8:].reshape(len(x[8:]), -1)
    flat += 1e3 * np.where(np.arange(flat.shape[1]) % 2, 1.0, -1.0).astype("float32")
    return x


@pytest.mark.many
@pytest.mark.parametrize(("make", "shape"), COMPOSED, ids=IDS)
def test_rounding_is_covered(make, shape):
    """Against the kernel that is known, in float64: the layer at the centre, and elsewhere by the slope."""
    model, x = model_of(make, shape), points(shape)
    if isinstance(model.layers[-1], K.TimeDistributed):
        pytest.skip("to_keras keeps layers that hold one of this package")
    with double_precision():
        exact = in_double(model)
        truth = [to_numpy(exact(each.astype("float64"))) for each in (x, x[::-1])]
    found = layer_rounding(model.layers[-1], (None, *shape))(x, to_numpy(model(x), "float32"))
    off = [norms(to_numpy(model(each)) - value) for each, value in zip((x, x[::-1]), truth, strict=True)]
    assert np.all(off[0] <= found.at_centre + found.composed * norms(x))
    moved = found.slope * norms(x.astype("float64") - x[::-1])
    assert np.all(off[1] <= found.at_centre + moved + found.composed * norms(x[::-1]))
    assert 0 < found.composed < 5e-4
    trace, _ = Tracer(model)([x])
    assert np.all(norms(trace.value - truth[0]) <= trace.centre_error)
    assert np.all(off[0] <= trace.error(0.0))


@pytest.mark.many
@pytest.mark.parametrize(("make", "shape"), COMPOSED, ids=IDS)
def test_a_rigorous_certificate_costs_little(make, shape):
    model = keras.Sequential([*model_of(make, shape).layers, K.Flatten(), K.Dense(3)])
    model.build((None, *shape))
    x = normal((8, *shape))
    plain, rigorous = (hkr.certify(model, x, verbose=0, rigorous=flag) for flag in (False, True))
    assert np.all(rigorous.radius <= plain.radius)
    assert np.all(plain.radius - rigorous.radius < 3e-3 * np.linalg.norm(x.reshape(8, -1), axis=1))


def one_by_one(a, b):
    """A product of matrices in float32 whose sums begin with all positive terms, the largest first."""
    a, b = to_numpy(a).astype("float32"), to_numpy(b).astype("float32")
    terms = np.sort(a[..., :, :, None] * b[..., None, :, :], axis=-2)[..., ::-1, :]
    total = np.zeros((*terms.shape[:-2], terms.shape[-1]), "float32")
    for i in range(terms.shape[-2]):
        total = total + terms[..., i, :]
    return keras.ops.convert_to_tensor(total)


@pytest.mark.skipif(BACKEND != "torch", reason="other backends compile the composition as one program")
@pytest.mark.many
@pytest.mark.parametrize("index", [0, 1, 4, 6, 7])
def test_kernels_whose_sums_are_in_the_worst_order(index, monkeypatch):
    make, shape = COMPOSED[index]
    layer = model_of(make, shape).layers[-1]
    known, allowed = to_numpy(layer.kernel), composition_error(layer)
    monkeypatch.setattr(keras.ops, "matmul", one_by_one)
    difference = to_numpy(layer.kernel).astype("float64") - known
    groups = getattr(layer, "groups", 1)
    split = np.moveaxis(difference.reshape(*difference.shape[:-1], groups, -1), -2, -3)
    found = convolution_bound(split, layer.strides) if layer.kernel.ndim > 2 else matrix_spectrum(difference).bound
    splits = isinstance(layer, orthogonal._OrthogonalConvolution)
    assert found <= allowed < (2e-5 if splits else 1e-4)
    assert splits or found > 0


@pytest.mark.skipif(BACKEND != "torch", reason="other backends compile the composition as one program")
@pytest.mark.parametrize(("length", "exact"), [(1.0, True), (3.0, True), (30.0, False)])
def test_products_of_split_matrices(length, exact, monkeypatch):
    """The sums of their high parts are exact as long as rows and columns are short; without a split they are not."""
    layer = L.OrthogonalConv2D(32, 3)
    layer.build((None, 6, 6, 32))
    layer.mixing.assign(length * layer.mixing)
    known, allowed = to_numpy(layer.kernel), composition_error(layer)
    monkeypatch.setattr(keras.ops, "matmul", one_by_one)

    def apart():
        return matrix_spectrum(np.abs(to_numpy(layer.kernel).astype("float64") - known).sum(axis=(0, 1))).bound

    split = apart()
    assert split <= allowed
    assert (allowed < 2e-5 * length) == exact
    monkeypatch.setattr(orthogonal, "_product", one_by_one)
    assert (apart() > 4 * split) == exact


def test_products_of_split_matrices_are_within_their_bound_when_compiled():
    """TensorFlow may begin a sum of sums with any of them, and round twice as much."""
    angles = 1 / 3 + 0.01 * np.random.default_rng(0).random((2, 2000))
    turns = np.moveaxis([[np.cos(angles), np.sin(angles)], [-np.sin(angles), np.cos(angles)]], (0, 1), (2, 3))
    left, right = turns.astype("float32")
    product = compiled(lambda tensors: orthogonal._product(*tensors))
    found = to_numpy(product([keras.ops.convert_to_tensor(each) for each in (left, right)]))
    off = np.abs(found - left.astype("float64") @ right)
    allowed = _split_product_error(left.astype("float64"), right.astype("float64"))
    assert np.all(off <= allowed)
    assert np.any(off > 0.35 * allowed)


def test_reflectors_do_not_depend_on_the_order_of_their_vectors():
    rng = np.random.default_rng(0)
    layer = L.ReflectorDense(20, rank=8)
    layer.build((None, 20))
    for vectors in (rng.normal(size=(20, 8)), np.ones((20, 8)) + 0.3 * rng.normal(size=(20, 8))):
        layer.vectors.assign(vectors)
        first, allowed = to_numpy(layer.kernel), composition_error(layer)
        layer.vectors.assign(vectors[:, rng.permutation(8)])
        assert matrix_spectrum(to_numpy(layer.kernel) - first.astype("float64")).bound <= allowed < 1e-3


@pytest.mark.many
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 3e-3])
def test_reflectors_of_nearly_dependent_vectors(noise):
    """Compiled, the kernel is another one: the bound knows that, and no rigorous certificate is given."""
    rng = np.random.default_rng(1)
    model = keras.Sequential([keras.Input((3,)), L.ReflectorDense(2, rank=3, use_bias=False)])
    layer = model.layers[-1]
    for _ in range(5):
        layer.vectors.assign(rng.normal(size=(3, 1)) + noise * rng.normal(size=(3, 3)))
        compiled = hkr.certification.prediction.Predictor(model, 4)([np.eye(3, dtype="float32")])
        assert np.linalg.norm(compiled, 2) <= hkr.lipschitz_bound(model) + 1e-7
        known = reflector(layer)
        apart = matrix_spectrum(compiled - known.kernel).bound
        assert apart <= 2 * known.sensitivity + 1e-5
    layer.vectors.assign(np.ones((3, 3)))
    with pytest.raises(ValueError, match="nearly dependent"):
        hkr.certify(model, np.ones((1, 3), "float32"), verbose=0, rigorous=True)


@pytest.mark.once
def test_products():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 40)).astype("float32"), rng.normal(size=(40, 6)).astype("float32")
    off = np.abs(to_numpy(one_by_one(a, b)) - a.astype("float64") @ b)
    allowed = product_error(a.astype("float64"), b.astype("float64"))
    assert np.all(off <= allowed)
    assert np.any(off > 0.02 * allowed)


@pytest.mark.many
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize(
    ("activation", "directions"), [("relu", ""), ("linear", ""), ("relu", "concat"), ("linear", "sum")]
)
def test_recurrent_layers(sequences, activation, directions):
    backwards = sequences and not directions
    layer = L.LipschitzSimpleRNN(6, activation, return_sequences=sequences, go_backwards=backwards)
    layer = K.Bidirectional(layer, merge_mode=directions) if directions else layer
    model, x = model_of(lambda: layer, (7, 5)), points((7, 5))
    with double_precision():
        exact = in_double(model)
        truth = [to_numpy(exact(each.astype("float64"))) for each in (x, x[::-1])]
    found = layer_rounding(layer, (None, 7, 5))(x, to_numpy(model(x), "float32"))
    off = [norms(to_numpy(model(each)) - value) for each, value in zip((x, x[::-1]), truth, strict=True)]
    assert np.all(off[0] <= found.at_centre)
    assert np.all(off[1] <= found.at_centre + found.slope * norms(x.astype("float64") - x[::-1]))
    assert np.any(off[0] >= 1e-3 * found.at_centre)
    assert found.slope < 1e-4
    certificate = hkr.certify(keras.Sequential([model, K.Flatten(), K.Dense(2)]), x, verbose=0, rigorous=True)
    assert np.any(certificate.radius > 0)


@pytest.mark.skipif(BACKEND not in _ACCURACY, reason="not measured")
@pytest.mark.many
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "elu", "softplus"])
def test_smooth_activations(name):
    """By themselves, behind a kernel and in a recurrent layer, against float64."""
    x = points((12,))
    for layer in (K.Activation(name), K.Dense(5, activation=name), K.ELU(0.7), L.LipschitzSimpleRNN(4, name)):
        recurrent = isinstance(layer, L.LipschitzSimpleRNN)
        shape = (4, 3) if recurrent else (12,)
        model, inputs = model_of(lambda layer=layer: layer, shape), x.reshape(-1, *shape)
        with double_precision():
            exact = in_double(model)
            truth = [to_numpy(exact(each.astype("float64"))) for each in (inputs, inputs[::-1])]
        found = layer_rounding(layer, (None, *shape))(inputs, to_numpy(model(inputs), "float32"))
        off = [norms(to_numpy(model(each)) - value) for each, value in zip((inputs, inputs[::-1]), truth, strict=True)]
        assert np.all(off[0] <= found.at_centre)
        assert np.all(off[1] <= found.at_centre + found.slope * norms(inputs.astype("float64") - inputs[::-1]))
    model = keras.Sequential([keras.Input((12,)), K.Dense(8, name), K.Dense(3)])
    plain, rigorous = (hkr.certify(model, x, verbose=0, rigorous=flag).radius for flag in (False, True))
    assert np.all(rigorous <= plain)
    assert np.any(rigorous > 0.5 * plain)


def test_a_library_that_was_not_measured_is_refused(monkeypatch):
    monkeypatch.delitem(_ACCURACY, BACKEND, raising=False)
    model = keras.Sequential([keras.Input((2,)), K.Dense(4, "tanh"), K.Dense(2)])
    with pytest.raises(ValueError, match="accuracy of tanh was measured"):
        hkr.certify(model, np.ones((1, 2)), verbose=0, rigorous=True)


@pytest.mark.skipif(BACKEND not in _ACCURACY, reason="not measured")
def test_the_measured_accuracies_are_those_of_this_machine():
    """Every 50,000th number of the scan in the table."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
    import activation_accuracy

    for name, (relative, absolute) in _ACCURACY[BACKEND].items():
        layer = K.Activation(name)
        for x in activation_accuracy.numbers(50_000):
            found = activation_accuracy.errors(x, to_numpy(layer(x)), name)
            assert found[0] <= 2 * relative
            assert found[1] <= 2 * absolute
