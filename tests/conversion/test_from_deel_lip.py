"""Models of deel-lip, for which classes of the same names, attributes and functions stand."""

import keras
import numpy as np
import pytest
from helpers import normal, to_numpy

import hkr_keras as hkr
from hkr_keras import layers as L

K, ops = keras.layers, keras.ops


class Coefficient:
    """What all of their layers have."""

    def __init__(self, *args, k_coef_lip=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.k_coef_lip = k_coef_lip

    def get_config(self):
        return {**super().get_config(), "k_coef_lip": self.k_coef_lip}


class Normalized(Coefficient):
    """A kernel layer that computes with `wbar` at inference, whatever its kernel is."""

    def build(self, input_shape):
        super().build(input_shape)
        self.wbar = keras.Variable(self.normalized(to_numpy(self.kernel), input_shape), trainable=False, name="wbar")

    def call(self, inputs, training=True):
        kernel, self._kernel = self._kernel, self.wbar
        outputs = super().call(inputs)
        self._kernel = kernel
        return outputs


def orthonormal(kernel, k=1.0):
    u, _, v = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), full_matrices=False)
    return (k * (u @ v)).reshape(kernel.shape).astype("float32")


class SpectralDense(Normalized, K.Dense):
    def normalized(self, kernel, input_shape):
        return orthonormal(kernel, self.k_coef_lip)


class FrobeniusDense(Normalized, K.Dense):
    def __init__(self, *args, disjoint_neurons=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.disjoint_neurons = disjoint_neurons

    def normalized(self, kernel, input_shape):
        return kernel / np.linalg.norm(kernel, axis=0 if self.disjoint_neurons else None) * self.k_coef_lip


class SpectralConv2D(Normalized, K.Conv2D):
    def __init__(self, *args, padding="same", **kwargs):
        super().__init__(*args, padding=padding, **kwargs)

    def normalized(self, kernel, input_shape):
        """Divided by the mean number of windows that see a pixel."""
        mean = 1.0
        for n, k in zip(input_shape[1:3], self.kernel_size, strict=True):
            mean *= (k * n - (k - 1) / 2 * ((k - 1) / 2 + 1)) / n
        return orthonormal(kernel, self.k_coef_lip / np.sqrt(mean))


class FrobeniusConv2D(SpectralConv2D):
    def normalized(self, kernel, input_shape):
        scale = self.k_coef_lip / np.linalg.norm(kernel) / np.sqrt(np.prod(self.kernel_size))
        return (scale * kernel).astype("float32")


class GroupSort(Coefficient, K.Layer):
    def __init__(self, n=None, data_format="channels_last", **kwargs):
        super().__init__(**kwargs)
        self.n = n

    def build(self, input_shape):
        self.n = min(self.n or input_shape[-1], input_shape[-1])

    def call(self, inputs):
        groups = ops.reshape(inputs, (-1, *inputs.shape[1:-1], inputs.shape[-1] // self.n, self.n))
        return self.k_coef_lip * ops.reshape(ops.sort(groups, axis=-1), (-1, *inputs.shape[1:]))

    def get_config(self):
        return {**super().get_config(), "n": self.n}


class GroupSort2(GroupSort):
    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "n": 2})


class FullSort(GroupSort):
    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "n": None})


class MaxMin(Coefficient, K.Layer):
    def call(self, inputs):
        return self.k_coef_lip * ops.concatenate([ops.relu(inputs), ops.relu(-inputs)], axis=-1)


class Householder(Coefficient, K.Layer):
    def build(self, input_shape):
        self.theta = self.add_weight(name="theta", shape=(input_shape[-1] // 2,), initializer="random_normal")

    def call(self, inputs):
        a, b = ops.split(inputs, 2, axis=-1)
        t = self.theta
        near = a * ops.sin(t / 2) <= b * ops.cos(t / 2)
        reflected = a * ops.cos(t) + b * ops.sin(t), a * ops.sin(t) - b * ops.cos(t)
        return ops.concatenate([ops.where(near, a, reflected[0]), ops.where(near, b, reflected[1])], axis=-1)


class ScaledAveragePooling2D(Coefficient, K.AveragePooling2D):
    def call(self, inputs):
        return super().call(inputs) * self.k_coef_lip * np.sqrt(np.prod(self.pool_size))


class ScaledL2NormPooling2D(Coefficient, K.AveragePooling2D):
    def call(self, inputs):
        return ops.sqrt(super().call(inputs**2)) * self.k_coef_lip * np.sqrt(np.prod(self.pool_size))


class ScaledGlobalAveragePooling2D(Coefficient, K.GlobalAveragePooling2D):
    def call(self, inputs):
        return super().call(inputs) * self.k_coef_lip * np.sqrt(np.prod(inputs.shape[1:3]))


class ScaledGlobalL2NormPooling2D(Coefficient, K.GlobalAveragePooling2D):
    def call(self, inputs):
        return self.k_coef_lip * ops.sqrt(ops.sum(inputs**2, axis=(1, 2)))


class InvertibleDownSampling(K.Layer):
    def __init__(self, pool_size, data_format="channels_last", **kwargs):
        super().__init__(**kwargs)
        self.pool_size, self.data_format = pool_size, data_format

    def call(self, inputs):
        p, q = self.pool_size
        return ops.concatenate([inputs[:, i::p, j::q] for i in range(p) for j in range(q)], axis=-1)

    def get_config(self):
        return {**super().get_config(), "pool_size": self.pool_size, "data_format": self.data_format}


class InvertibleUpSampling(InvertibleDownSampling):
    def call(self, inputs):
        """Right for square images and windows only."""
        (p, q), (_, w, h, channels) = self.pool_size, inputs.shape
        c = channels // (p * q)
        x = ops.transpose(ops.reshape(inputs, (-1, w, h, p, q, c)), (0, 5, 2, 4, 1, 3))
        x = ops.transpose(ops.reshape(x, (-1, c, w, p, h * q)), (0, 1, 4, 2, 3))
        return ops.transpose(ops.reshape(x, (-1, c, h * q, w * p)), (0, 2, 3, 1))


def model_of(*layers, shape):
    return keras.Sequential([keras.Input(shape), *layers])


def with_biases(model):
    rng = np.random.default_rng(1)
    for layer in model.layers:
        if getattr(layer, "use_bias", False):
            layer.bias.assign(rng.normal(size=layer.bias.shape))
    return model


IMAGE = (4, 4, 8)


@pytest.mark.once
@pytest.mark.many
@pytest.mark.parametrize(
    ("layer", "expected", "shape"),
    [
        (GroupSort2, ["GroupSort"], (8,)),
        (lambda: GroupSort(4, k_coef_lip=2.0), ["GroupSort", "Scale"], IMAGE),
        (lambda: GroupSort(n=100), ["GroupSort"], (8,)),
        (FullSort, ["FullSort"], IMAGE),
        (MaxMin, ["LipschitzDense", "MaxMin", "Rescaling"], (8,)),
        (lambda: MaxMin(k_coef_lip=0.5), ["LipschitzDense", "MaxMin", "Rescaling", "Scale"], IMAGE),
        (Householder, ["Householder"], IMAGE),
        (lambda: ScaledAveragePooling2D(2), ["ScaledAveragePooling2D"], IMAGE),
        (lambda: ScaledL2NormPooling2D((2, 4), k_coef_lip=0.5), ["L2NormPooling2D", "Scale"], IMAGE),
        (ScaledGlobalAveragePooling2D, ["ScaledGlobalAveragePooling2D"], IMAGE),
        (lambda: ScaledGlobalL2NormPooling2D(k_coef_lip=3.0), ["GlobalL2NormPooling2D", "Scale"], IMAGE),
        (lambda: InvertibleDownSampling((2, 4)), ["InvertibleDownsampling2D"], IMAGE),
        (lambda: InvertibleUpSampling((2, 2)), ["InvertibleUpsampling2D"], IMAGE),
    ],
)
def test_layers_without_kernels_compute_the_same(layer, expected, shape):
    model = model_of(layer(), shape=shape)
    converted = hkr.conversion.from_deel_lip(model, print_fn=None)
    assert [type(each).__name__ for each in converted.layers] == expected
    x = normal((16, *shape), seed=1)
    np.testing.assert_allclose(to_numpy(converted(x)), to_numpy(model(x)), rtol=1e-5, atol=1e-5)
    k = getattr(model.layers[0], "k_coef_lip", 1.0)
    assert hkr.lipschitz_bound(converted) == pytest.approx(k, rel=1e-6)


@pytest.mark.once
@pytest.mark.parametrize(
    ("layer", "expected", "constraint"),
    [
        (lambda: SpectralDense(6), ["LipschitzDense"], "Orthonormal"),
        (lambda: SpectralDense(6, "tanh", k_coef_lip=2.0), ["LipschitzDense", "Scale", "Activation"], "Orthonormal"),
        (lambda: SpectralDense(6, GroupSort2(k_coef_lip=2.0)), ["LipschitzDense", "GroupSort", "Scale"], "Orthonormal"),
        (
            lambda: SpectralDense(6, MaxMin()),
            ["LipschitzDense", "LipschitzDense", "MaxMin", "Rescaling"],
            "Orthonormal",
        ),
        (lambda: FrobeniusDense(1, use_bias=False, k_coef_lip=0.5), ["LipschitzDense", "Scale"], "UnitNorm"),
        (lambda: FrobeniusDense(6), ["LipschitzDense"], "UnitNorm"),
        (lambda: FrobeniusDense(6, disjoint_neurons=False), ["LipschitzDense"], "SpectralBall"),
    ],
)
def test_dense_layers_keep_their_kernels(layer, expected, constraint):
    model = with_biases(model_of(layer(), shape=(8,)))
    old = model.layers[0]
    old.kernel.assign(normal(old.kernel.shape))  # what training left there is not what it computes with
    converted = hkr.conversion.from_deel_lip(model, print_fn=None)
    assert [type(each).__name__ for each in converted.layers] == expected
    assert type(converted.layers[0].kernel_constraint).__name__ == constraint
    x = normal((16, 8), seed=1)
    np.testing.assert_allclose(to_numpy(converted(x)), to_numpy(model(x)), rtol=1e-4, atol=1e-4)
    if constraint != "UnitNorm":
        assert hkr.lipschitz_bound(converted.layers[0]) <= 1 + 1e-5


def test_convolutions_get_a_norm_of_at_most_one_and_keep_directions():
    said = []
    model = with_biases(
        model_of(
            *(SpectralConv2D(8, 3), GroupSort2(), SpectralConv2D(4, 3, strides=2, k_coef_lip=2.0)),
            *(FrobeniusConv2D(4, 3, activation=GroupSort2()), K.Flatten(), FrobeniusDense(3)),
            shape=(8, 8, 2),
        )
    )
    old = model.layers[0]
    converted = hkr.conversion.from_deel_lip(model, print_fn=said.append)
    names = [type(each).__name__ for each in converted.layers]
    assert names == [
        *("LipschitzConv2D", "GroupSort", "LipschitzConv2D", "Scale", "LipschitzConv2D", "GroupSort", "Flatten"),
        "LipschitzDense",
    ]
    new = converted.layers[0]
    assert hkr.lipschitz_bound(new) <= 1 + 1e-5
    kernel, wbar = to_numpy(new.kernel), to_numpy(old.wbar)
    ratio = np.vdot(kernel, wbar) / np.vdot(wbar, wbar)
    assert ratio < 0.98  # the mean overlap leaves a norm above 1
    np.testing.assert_allclose(kernel, ratio * wbar, atol=1e-5)
    np.testing.assert_allclose(to_numpy(new.bias), ratio * to_numpy(old.bias), atol=1e-5)
    assert type(converted.layers[4].kernel_constraint).__name__ == "SpectralBall"
    assert hkr.lipschitz_bound(converted.layers[3]) == pytest.approx(2.0)
    norms = [line.split("norm ")[1].split(" -> ") for line in said[0].splitlines() if "norm" in line]
    assert len(norms) == 4
    assert "SpectralConv2D" in said[0]
    before, after = (float(norm) for norm in norms[0])
    assert after <= 1.0
    assert before == pytest.approx(after / ratio, rel=1e-3)


def test_their_models_and_nested_ones():
    class Sequential(Coefficient, keras.Sequential):
        """As theirs, a Sequential model with a few methods more."""

        def condense(self):
            raise AssertionError

    inputs = keras.Input((8,))
    inner = Sequential([keras.Input((8,)), SpectralDense(8), GroupSort2()], name="inner")
    model = keras.Model(inputs, FrobeniusDense(1)(SpectralDense(8, activation=Householder())(inner(inputs))))
    x = normal((16, 8), seed=1)
    converted = hkr.conversion.from_deel_lip(model, print_fn=None)
    np.testing.assert_allclose(to_numpy(converted(x)), to_numpy(model(x)), rtol=1e-4, atol=1e-4)
    assert hkr.lipschitz_bound(converted) <= 1 + 1e-5
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(converted))
    again.set_weights(converted.get_weights())
    np.testing.assert_allclose(to_numpy(again(x)), to_numpy(converted(x)), atol=1e-6)
    twice = hkr.conversion.from_deel_lip(converted, print_fn=None)  # layers of the same names here stay
    np.testing.assert_allclose(to_numpy(twice(x)), to_numpy(converted(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.once
def test_layers_that_compute_something_else_are_refused_by_name():
    with pytest.raises(ValueError, match=r"InvertibleUpSampling 'up' .*Received: other outputs"):
        hkr.conversion.from_deel_lip(model_of(InvertibleUpSampling((2, 2), name="up"), shape=(2, 4, 8)))

    class Reversed(K.Layer):
        def call(self, inputs):
            return -ops.sort(-inputs, axis=-1)

    Reversed.__name__ = "FullSort"
    with pytest.raises(ValueError, match=r"FullSort 'down' .*Received: other outputs"):
        hkr.conversion.from_deel_lip(model_of(Reversed(name="down"), shape=(4,)))
    first = MaxMin()
    first.data_format = "channels_first"
    with pytest.raises(ValueError, match="channels_last"):
        hkr.conversion.from_deel_lip(model_of(first, shape=(4, 2, 2)))

    class Unknown(K.Layer):
        def call(self, inputs):
            return inputs

    with pytest.raises(ValueError, match="Unknown"):
        hkr.conversion.from_deel_lip(model_of(Unknown(), shape=(4,)))


def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return (x / 16).astype("float32"), y


@pytest.mark.once
def test_accuracy_is_kept_on_digits():
    x, y = digits()
    ours = keras.Sequential([keras.Input((64,)), L.LipschitzDense(64), L.GroupSort(2), L.LipschitzDense(10)])
    ours.compile(keras.optimizers.Adam(0.01), loss=hkr.losses.MarginCrossentropy(temperature=10.0, margin=0.1))
    ours.fit(x[:1200], y[:1200], batch_size=100, epochs=4, verbose=0)

    theirs = model_of(SpectralDense(64, GroupSort2(), k_coef_lip=2.0), SpectralDense(10), shape=(64,))
    exported = model_of(K.Dense(64), GroupSort2(), K.Dense(10), shape=(64,))  # what vanilla_export makes of it
    for new, layer, k in zip((theirs.layers[0], theirs.layers[1]), ours.layers[::2], (2, 1), strict=True):
        new.wbar.assign(k * layer.kernel)
        new.bias.assign(k * layer.bias)
    theirs.layers[1].bias.assign(2 * ours.layers[2].bias)
    for new, old in zip(exported.layers[::2], theirs.layers, strict=True):
        new.set_weights([to_numpy(old.wbar), to_numpy(old.bias)])

    def classes(model):
        return to_numpy(model(x[1200:])).argmax(axis=1)

    accuracy = np.mean(classes(theirs) == y[1200:])
    assert accuracy > 0.85
    for model, bound in ((theirs, 2.0), (exported, 1.0)):
        converted = hkr.conversion.from_deel_lip(model, print_fn=None)
        assert np.mean(classes(converted) == y[1200:]) > accuracy - 0.005
        assert hkr.lipschitz_bound(converted) <= bound * (1 + 1e-4)
