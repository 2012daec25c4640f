"""Conversion to Lipschitz layers and constraints on models as they are."""

import re

import keras
import numpy as np
import pytest
from helpers import BACKEND, explicit_operator, largest_singular_value, normal, to_numpy

import hkr_keras as hkr
from hkr_keras import layers as L

K = keras.layers


def lenet():
    return keras.Sequential(
        [
            keras.Input((12, 12, 1)),
            *(K.Conv2D(6, 5, activation="relu", padding="same"), K.MaxPooling2D(2)),
            *(K.Conv2D(8, 3, activation="relu"), K.AveragePooling2D(2), K.Flatten()),
            *(K.Dense(16, "relu"), K.Dense(10, "softmax")),
        ],
        name="lenet",
    )


def vgg():
    model = keras.Sequential([keras.Input((16, 16, 3))], name="vgg")
    for count, filters in ((1, 4), (1, 8), (2, 8)):
        for _ in range(count):
            for layer in (K.Conv2D(filters, 3, padding="same"), K.BatchNormalization(), K.ReLU()):
                model.add(layer)
        model.add(K.MaxPooling2D(2))
    for layer in (K.Flatten(), K.Dense(16, "relu"), K.Dropout(0.5), K.Dense(10), K.Softmax()):
        model.add(layer)
    return model


def resnet():
    def unit(x, filters, stride=1, activation=True, window=3):
        x = K.Conv2D(filters, window, strides=stride, padding="same", use_bias=False)(x)
        x = K.BatchNormalization()(x)
        return K.ReLU()(x) if activation else x

    inputs = keras.Input((16, 16, 3))
    x = unit(K.ZeroPadding2D(1)(inputs), 4, stride=2, window=7)
    x = K.MaxPooling2D(3, strides=2, padding="same")(x)
    for filters, stride in ((4, 1), (8, 2)):
        shortcut = unit(x, filters, stride, activation=False, window=1) if stride > 1 else x
        x = K.ReLU()(K.Add()([shortcut, unit(unit(x, filters, stride), filters, activation=False)]))
    return keras.Model(inputs, K.Dense(10, "softmax")(K.GlobalAveragePooling2D()(x)), name="resnet")


def mobilenet():
    def unit(x, layer):
        return K.ReLU(6.0)(K.BatchNormalization()(layer(x)))

    inputs = keras.Input((16, 16, 3))
    x = unit(K.Rescaling(1 / 127.5, offset=-1)(inputs), K.Conv2D(4, 3, strides=2, padding="same", use_bias=False))
    for filters, stride in ((4, 1), (8, 2)):
        x = unit(x, K.DepthwiseConv2D(3, strides=stride, padding="same", use_bias=False))
        x = unit(x, K.Conv2D(filters, 1, use_bias=False))
    x = K.Dropout(0.1)(K.GlobalAveragePooling2D(keepdims=True)(x))
    return keras.Model(inputs, K.Activation("softmax")(K.Reshape((10,))(K.Conv2D(10, 1)(x))), name="mobilenet")


def convnext():
    inputs = keras.Input((16, 16, 3))
    x = K.LayerNormalization(name="stem_norm")(K.Conv2D(8, 4, strides=4)(inputs))
    y = K.LayerNormalization(name="block_norm")(K.DepthwiseConv2D(7, padding="same")(x))
    y = K.Dense(8)(K.Dense(16, activation="gelu")(y))
    return keras.Model(inputs, K.Dense(10)(K.GlobalAveragePooling2D()(x + y)), name="convnext")


def lstm():
    layers = [K.Embedding(100, 8, name="words"), K.LSTM(8, name="memory"), K.Dense(1, "sigmoid")]
    return keras.Sequential([keras.Input((6,), dtype="int32"), *layers], name="lstm")


ARCHITECTURES = [lenet] if BACKEND == "jax" else [lenet, vgg, resnet, mobilenet]  # JAX compiles every operation


@pytest.mark.once
@pytest.mark.parametrize("make", ARCHITECTURES)
def test_known_architectures_there_and_back(make):
    model = make()
    before = [to_numpy(w) for w in model.weights]
    converted = hkr.to_lipschitz(model, print_fn=None)
    assert all((to_numpy(w) == b).all() for w, b in zip(model.weights, before, strict=True)), "it changed its input"
    assert not converted.compiled
    assert converted.input_shape == model.input_shape
    assert converted.output_shape == model.output_shape
    assert not any(isinstance(layer, (K.Softmax, K.BatchNormalization, K.ReLU)) for layer in converted.layers)
    assert 0 < hkr.lipschitz_bound(converted) < 10**0.5 * 1.01  # ten outputs of unit norm

    x, y = normal((8, *model.input_shape[1:])), np.arange(8)
    converted.compile("adam", hkr.losses.MulticlassHKR(), run_eagerly=BACKEND != "jax")
    converted.fit(x, y, verbose=0)
    assert hkr.lipschitz_bound(converted) < 10**0.5 * 1.01

    again = hkr.to_lipschitz(converted, print_fn=None)
    assert again.get_config() == converted.get_config()
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(converted(x)))

    plain = hkr.to_keras(converted)
    assert "hkr_keras" not in plain.to_json()
    np.testing.assert_allclose(to_numpy(plain(x)), to_numpy(converted(x)), atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (convnext, ["stem_norm (LayerNormalization)", "block_norm (LayerNormalization)", "LayerCentering", "Add()"]),
        (lstm, ["words (Embedding)", "memory (LSTM)"]),
    ],
)
def test_refusals_list_every_layer_at_once(make, reasons):
    with pytest.raises(ValueError, match="Expected layers that can be converted") as error:
        hkr.to_lipschitz(make(), print_fn=None)
    for reason in reasons:
        assert reason in str(error.value)


def scaled_orthonormal(layer, factor):
    """Gives a plain layer kernels whose projection is a multiple of them."""
    for name, geometry in hkr.geometry.kernel_geometries(layer).items():
        constraint = hkr.constraints.Orthonormal().bind(geometry)
        kernel = getattr(layer, name)
        kernel.assign(factor * constraint.polish(constraint.start(kernel)))


@pytest.mark.once
def test_kernels_that_are_multiples_of_orthonormal_ones_keep_the_function_up_to_a_factor():
    """Biases, means of batches, sums and means of windows are scaled along: the classes stay the same."""
    inputs = keras.Input((8, 8, 2))
    x = K.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    x = K.AveragePooling2D(2)(K.BatchNormalization()(x))
    y = K.Conv2D(4, 3, padding="same", activation="relu")(x)
    y = K.Add()([x, K.Conv2D(4, 3, padding="same")(y)])
    y = K.TimeDistributed(K.Dense(8, activation="relu"))(K.Reshape((16, 4))(y))
    model = keras.Model(inputs, K.Dense(3)(K.Flatten()(y)))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        layer = layer.layer if isinstance(layer, K.TimeDistributed) else layer
        scaled_orthonormal(layer, rng.uniform(0.2, 5))
        for weight in layer.weights:
            if weight.name in ("bias", "beta", "moving_mean"):
                weight.assign(rng.normal(size=weight.shape))
            elif weight.name in ("gamma", "moving_variance"):
                weight.assign(np.full(weight.shape, rng.uniform(0.5, 2)))
    converted = hkr.to_lipschitz(model, activation=None, print_fn=None)
    x = normal((6, 8, 8, 2))
    old, new = to_numpy(model(x)), to_numpy(converted(x))
    head = next(layer for layer in reversed(model.layers) if isinstance(layer, K.Dense))
    assert np.ptp(np.linalg.norm(to_numpy(head.kernel), axis=0)) < 1e-5  # so that UnitNorm divides all by one number
    factor = np.vdot(old, new) / np.vdot(old, old)
    np.testing.assert_allclose(new, factor * old, atol=1e-5 * np.abs(new).max())


def test_trained_kernels_are_moved_to_the_nearest_orthonormal_ones():
    model = keras.Sequential([keras.Input((6,)), K.Dense(4), K.Dense(3)])
    converted = hkr.to_lipschitz(model, print_fn=None)
    u, _, v = np.linalg.svd(to_numpy(model.layers[0].kernel), full_matrices=False)
    np.testing.assert_allclose(to_numpy(converted.layers[0].kernel), u @ v, atol=1e-5)
    head = to_numpy(model.layers[1].kernel)
    expected = head / np.linalg.norm(head, axis=0)
    np.testing.assert_allclose(to_numpy(converted.layers[1].kernel), expected, atol=1e-6)
    assert isinstance(converted.layers[1].kernel_constraint, hkr.constraints.UnitNorm)


def test_shared_layers_stay_shared_and_nested_models_nested():
    inner = keras.Sequential([keras.Input((4,)), K.Dense(4, "relu", name="inner_dense")], name="inner")
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    model = keras.Model({"left": left, "right": right}, K.Average()([inner(left), inner(right)]), name="twins")
    converted = hkr.to_lipschitz(model, print_fn=None)
    assert len(converted.weights) == 2
    assert [type(layer).__name__ for layer in converted.get_layer("inner").layers] == ["LipschitzDense", "GroupSort"]
    x = {"left": normal((3, 4)), "right": normal((3, 4), seed=1)}
    plain = hkr.to_keras(converted)
    assert len(plain.get_layer("inner").layers[0].weights) == 2
    np.testing.assert_allclose(to_numpy(plain(x)), to_numpy(converted(x)), atol=1e-6)
    assert hkr.lipschitz_bound(converted) < 1


@pytest.mark.once
def test_what_to_put_in_their_place_by_name_and_by_class():
    model = lenet()
    replace = {
        K.Conv2D: L.OrthogonalConv2D,
        model.layers[0].name: None,
        K.MaxPooling2D: L.L2NormPooling2D,
        K.Flatten: lambda layer: K.Reshape((-1,), name=layer.name),
    }
    converted = hkr.to_lipschitz(model, replace, activation=L.MaxMin, print_fn=None)
    kinds = [type(layer).__name__ for layer in converted.layers]
    assert kinds == [
        *("Conv2D", "L2NormPooling2D", "OrthogonalConv2D", "MaxMin", "ScaledAveragePooling2D", "Reshape"),
        *("LipschitzDense", "MaxMin", "LipschitzDense"),
    ]
    x = normal((2, 12, 12, 1))
    np.testing.assert_array_equal(to_numpy(converted.layers[0](x)), to_numpy(model.layers[0](x)))
    with pytest.raises(ValueError, match="Expected names of layers"):
        hkr.to_lipschitz(model, {"conv7": None}, print_fn=None)


def test_rectifiers_of_an_odd_number_of_channels_and_on_request_stay():
    model = keras.Sequential([keras.Input((4,)), K.Dense(5, "relu"), K.Dense(4), K.ReLU(), K.Dense(2)])
    converted = hkr.to_lipschitz(model, print_fn=None)
    assert converted.layers[0].activation is keras.activations.relu
    assert isinstance(converted.layers[2], L.GroupSort)
    kept = hkr.to_lipschitz(model, activation=None, print_fn=None)
    assert [type(layer).__name__ for layer in kept.layers] == [
        *("LipschitzDense", "LipschitzDense", "ReLU", "LipschitzDense"),
    ]


@pytest.mark.once
def test_the_report_names_every_layer_the_bound_and_what_to_do():
    texts = []
    binary = keras.Sequential([keras.Input((4,)), K.Dense(8, "relu", name="hidden"), K.Dense(1, "sigmoid")])
    hkr.to_lipschitz(binary, print_fn=texts.append)
    assert "hidden" in texts[0]
    assert "LipschitzDense + GroupSort" in texts[0]
    assert "sigmoid dropped" in texts[0]
    assert "losses.HKR(" in texts[0]
    hkr.to_lipschitz(lenet(), print_fn=texts.append)
    assert "losses.MulticlassHKR(" in texts[1]


class Doubling(K.Layer):
    def call(self, inputs):
        return 2 * inputs


class OwnDense(K.Dense):
    pass


@pytest.mark.once
def test_a_softmax_that_weights_read_as_well_stays():
    inputs = keras.Input((4,))
    shares = K.Softmax(name="shares")(K.Dense(4)(inputs))
    model = keras.Model(inputs, [shares, K.Dense(2)(shares)])
    converted = hkr.to_lipschitz(model, print_fn=None)
    assert type(converted.get_layer("shares")) is K.Softmax
    only = hkr.to_lipschitz(keras.Sequential([keras.Input((4,)), K.Dense(4), K.Softmax(name="shares")]), print_fn=None)
    assert type(only.layers[-1]) is K.Identity


@pytest.mark.once
def test_layers_of_users():
    model = keras.Sequential([keras.Input((4,)), K.Dense(4), Doubling(name="mine"), OwnDense(2, name="own")])
    with pytest.raises(ValueError, match=r"mine .Doubling.(.|\n)*own .OwnDense.: it has a kernel that nothing"):
        hkr.to_lipschitz(model, print_fn=None)
    hkr.bounds.layer_bound.register(Doubling, lambda layer: 2.0)
    converted = hkr.to_lipschitz(model, {OwnDense: L.LipschitzDense}, print_fn=None)
    assert isinstance(converted.layers[1], Doubling)
    assert isinstance(hkr.to_keras(converted).layers[1], Doubling)
    np.testing.assert_allclose(hkr.lipschitz_bound(converted), 2 * 2**0.5, rtol=0.4)
    x = normal((3, 4))
    np.testing.assert_allclose(to_numpy(hkr.to_keras(converted)(x)), to_numpy(converted(x)), atol=1e-6)


@pytest.mark.once
def test_refuses_models_that_cannot_be_read():
    with pytest.raises(ValueError, match="Expected a Keras model"):
        hkr.to_lipschitz(K.Dense(3))
    with pytest.raises(ValueError, match="Expected a built model"):
        hkr.to_lipschitz(keras.Sequential([K.Dense(3)]))

    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    own = Own()
    own.build((None, 3))
    with pytest.raises(ValueError, match="forward pass of its own"):
        hkr.to_lipschitz(own)
    broken = keras.Sequential([keras.Input((2,)), K.Dense(2, name="broken")])
    broken.layers[0].kernel.assign(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="broken"):
        hkr.to_lipschitz(broken)


def test_constrain_keeps_kernels_of_plain_layers_on_the_set(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *(K.Conv2D(4, 3, activation="relu"), K.DepthwiseConv2D(3), K.SeparableConv2D(4, 3), K.Flatten()),
            K.Dense(3, name="head"),
        ]
    )
    model.compile("adam", hkr.losses.MulticlassHKR())
    x, y = normal((16, 8, 8, 1)), np.arange(16) % 3
    model.fit(x, y, verbose=0)  # the compiled step knows no constraint
    assert hkr.constrain(model, replace={"head": hkr.constraints.UnitNorm()}) is model
    for _ in range(2):
        norms = [
            largest_singular_value(explicit_operator(layer, layer.input.shape[1:]))
            for layer in model.layers
            if layer.name != "head" and layer.weights and layer.name != model.layers[0].name
        ]
        assert max(norms) < 1 + 1e-5
        np.testing.assert_allclose(np.linalg.norm(to_numpy(model.layers[-1].kernel), axis=0), 1, atol=1e-5)
        model.fit(x, y, verbose=0, epochs=2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.layers[-1].kernel.constraint, hkr.constraints.UnitNorm)
    assert isinstance(loaded.layers[0].kernel.constraint, hkr.constraints.Orthonormal)


def test_constrain_leaves_alone_what_it_is_told_to_and_layers_of_this_package():
    model = keras.Sequential([keras.Input((4,)), L.LipschitzDense(4), K.Dense(4, name="free"), K.Dense(4)])
    before, constraint = to_numpy(model.layers[1].kernel), model.layers[0].kernel.constraint
    hkr.constrain(model, hkr.constraints.SpectralBall(), replace={"free": None})
    assert model.layers[0].kernel.constraint is constraint
    assert model.layers[1].kernel.constraint is None
    np.testing.assert_array_equal(to_numpy(model.layers[1].kernel), before)
    assert largest_singular_value(to_numpy(model.layers[2].kernel)) < 1 + 1e-6
    with pytest.raises(ValueError, match=r"Received: replace=.*'absent'"):
        hkr.constrain(model, replace={"absent": None})
    with pytest.raises(ValueError, match="Expected layers with kernels"):
        hkr.constrain(keras.Sequential([keras.Input((4,)), K.ReLU()]))
    with pytest.raises(ValueError, match="Expected the constraint"):
        hkr.constrain(model, keras.constraints.NonNeg())


def digits_cnn(data, epochs):
    """Batch normalisation, a sum, max pooling and dropout; trained."""
    inputs = keras.Input((8, 8, 1))
    x = K.ReLU()(K.BatchNormalization(momentum=0.8)(K.Conv2D(8, 3, padding="same", use_bias=False)(inputs)))
    y = K.ReLU()(K.BatchNormalization(momentum=0.8)(K.Conv2D(8, 3, padding="same", use_bias=False)(x)))
    x = K.Dropout(0.2)(K.Flatten()(K.MaxPooling2D(2)(K.Add()([x, y]))))
    model = keras.Model(inputs, K.Dense(10, "softmax")(K.Dense(32, "relu")(x)))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    model.fit(data.x_train, data.y_train, batch_size=64, epochs=epochs, verbose=0)
    return model


@pytest.mark.once
def test_calibration_keeps_the_classes_of_a_trained_network():
    keras.utils.set_random_seed(0)
    data = hkr.datasets.load("digits")
    model = digits_cnn(data, epochs=3)
    before = [to_numpy(weight) for weight in model.weights]

    def accuracy(net):
        return (to_numpy(net(data.x_test)).argmax(axis=1) == data.y_test).mean()

    said = []
    calibrated = hkr.to_lipschitz(model, activation=None, calibrate=data.x_train, print_fn=said.append)
    usual = hkr.to_lipschitz(model, activation=None, print_fn=None)
    assert all(np.array_equal(to_numpy(w), b) for w, b in zip(model.weights, before, strict=True))
    assert accuracy(model) > 0.9
    assert accuracy(calibrated) > max(0.85, accuracy(usual))
    (line,) = (line for line in said[0].splitlines() if "before and after" in line)
    share = np.mean(
        to_numpy(model(data.x_train[:1024])).argmax(1) == to_numpy(calibrated(data.x_train[:1024])).argmax(1)
    )
    assert f"Of 1,024 inputs, {share:.1%} are of the same class" in line
    first_two = np.sort(to_numpy(calibrated(data.x_train[:1024])), axis=1)[:, -2:]
    margin = float(re.search(r"MulticlassHKR\(alpha=50, margin=([0-9.]+)\)", said[0])[1])
    assert margin == pytest.approx(np.median(first_two[:, 1] - first_two[:, 0]), rel=0.06)
    assert hkr.lipschitz_bound(calibrated) < 10**0.5 * 1.01
    for layer in calibrated.layers:
        for name in hkr.geometry.kernel_geometries(layer):
            kernel = to_numpy(getattr(layer, name))
            np.testing.assert_allclose(to_numpy(getattr(layer, name).constraint(kernel)), kernel, atol=1e-4)
    start, reached = accuracy(calibrated), {}
    scratch = keras.models.clone_model(calibrated)
    for name, net, epochs in (("tuned", calibrated, 1), ("scratch", scratch, 2)):
        net.compile("adam", hkr.losses.MulticlassHKR(alpha=50, margin=margin))
        net.fit(data.x_train, data.y_train, batch_size=64, epochs=epochs, verbose=0)
        reached[name] = accuracy(net)
    assert reached["tuned"] > max(start - 0.01, reached["scratch"] + 0.05), (start, reached)
    again = hkr.to_lipschitz(model, calibrate=data.x_train[:300], print_fn=None)
    assert accuracy(again) > 0.7  # with GroupSort


@pytest.mark.many
@pytest.mark.parametrize(
    "make",
    [
        lambda: [K.Conv2D(4, (2, 3), strides=2, padding="same", activation="relu"), K.Flatten()],
        lambda: [K.Conv2D(4, 3, dilation_rate=2, padding="valid", activation="relu"), K.Flatten()],
        lambda: [K.Conv2D(4, 3, groups=2), K.DepthwiseConv2D(3, activation="relu"), K.Flatten()],
        lambda: [K.SeparableConv2D(4, 3), K.Conv2DTranspose(4, 3, strides=2), K.GlobalAveragePooling2D()],
        lambda: [K.Reshape((18, 8)), K.Conv1D(4, 3, padding="causal", activation="relu"), K.Flatten()],
        lambda: [K.Reshape((18, 8)), K.TimeDistributed(K.Dense(4, activation="relu")), K.Flatten()],
        lambda: [keras.Sequential([keras.Input((6, 12, 2)), K.Conv2D(4, 3, activation="tanh")]), K.Flatten()],
        lambda: [K.AveragePooling2D(2), K.BatchNormalization(), K.Flatten(), K.Dense(8, activation="softplus")],
    ],
)
def test_calibration_of_every_kind_of_kernel(make):
    """A model whose kernels are multiples of orthonormal ones keeps its function up to a factor and a shift."""
    model = keras.Sequential([keras.Input((6, 12, 2)), *make(), K.Dense(3)])
    x = normal((40, 6, 12, 2))
    converted = hkr.to_lipschitz(model, activation=None, calibrate=x, print_fn=None)
    assert hkr.lipschitz_bound(converted) < 3**0.5 * 1.01
    old, new = (to_numpy(net(x)) - to_numpy(net(x)).mean(axis=0) for net in (model, converted))
    assert np.vdot(old, new) / np.linalg.norm(old) / np.linalg.norm(new) > 0.7


@pytest.mark.parametrize("x", [np.ones((4, 3)), np.ones((1, 4)), [np.ones((4, 4))] * 2, np.full((4, 4), np.nan)])
def test_calibration_refuses_other_inputs(x):
    model = keras.Sequential([keras.Input((4,)), K.Dense(3)])
    with pytest.raises(ValueError, match="Received: calibrate of shape"):
        hkr.to_lipschitz(model, calibrate=x, print_fn=None)
