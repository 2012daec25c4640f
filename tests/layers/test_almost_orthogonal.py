"""Almost orthogonal layers and the residual block made of them: the norm is at most 1 for every weight."""

import inspect

import keras
import numpy as np
import pytest
from helpers import BACKEND, adam_steps, check_layer, explicit_operator, gradient, normal, operator_norm, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import hkr_keras as hkr
from hkr_keras.certification import singular_values
from hkr_keras.geometry import model_kernels
from hkr_keras.layers.almost_orthogonal import _almost_orthogonal

L = hkr.layers
TOLERANCE = 1e-6  # float32 leaves about 3e-7

# class, arguments, input shape
LINEAR = [
    (L.AOLDense, {"units": 5}, (3,)),
    (L.AOLDense, {"units": 3}, (5,)),
    (L.AOLConv2D, {"filters": 3, "kernel_size": 3, "padding": "same"}, (5, 6, 4)),
    (L.AOLConv2D, {"filters": 4, "kernel_size": 3, "padding": "valid"}, (5, 5, 1)),
    (L.AOLConv2D, {"filters": 4, "kernel_size": (2, 3), "padding": "same", "strides": 2}, (5, 6, 2)),
    (L.AOLConv2D, {"filters": 9, "kernel_size": 3, "padding": "same", "strides": (1, 2)}, (4, 5, 2)),
    (L.AOLConv2D, {"filters": 3, "kernel_size": 2, "padding": "same", "dilation_rate": 2}, (5, 6, 3)),
]
RESIDUAL = [
    (L.SLLDense, {"units": 3}, (5,)),
    (L.SLLDense, {"units": 7}, (5,)),
    (L.SLLConv2D, {"filters": 3, "kernel_size": 3}, (4, 5, 2)),
    (L.SLLConv2D, {"filters": 2, "kernel_size": (1, 5)}, (3, 4, 3)),
]


def built(cls, arguments, shape, **kwargs):
    layer = cls(**arguments, **({"use_bias": False} if "AOL" in cls.__name__ else {}), **kwargs)
    layer.build((None, *shape))
    return layer


def hostile(weight):
    """Weights that break careless rescaling."""
    rng = np.random.default_rng(0)
    random = rng.normal(size=weight.shape).astype("float32")
    mixed, silent, equal = random.copy(), random.copy(), np.ones(weight.shape, "float32")
    mixed[..., 0] *= 1e-25
    mixed[..., 0, :] *= 1e10
    silent[..., 0], silent[..., 0, :] = 0, 0
    return {
        **{f"times {scale:g}": random * np.float32(scale) for scale in (1e-42, 1e-30, 1e-20, 1e-3, 1e3, 1e18, 1e30)},
        "zero": 0 * random,
        "mixed": mixed,
        "silent": silent,
        "equal": equal,
        "tiny and equal": 1e-22 * equal,
    }


@pytest.mark.many
@pytest.mark.parametrize(("cls", "arguments", "shape"), LINEAR, ids=str)
def test_the_norm_is_at_most_one(cls, arguments, shape):
    layer = built(cls, arguments, shape)
    for learning_rate in (None, 1e-2, 10.0):
        if learning_rate is not None:
            adam_steps(layer, learning_rate)
        norm = operator_norm(layer, shape)
        assert 0.1 < norm <= 1 + TOLERANCE
        assert norm <= hkr.lipschitz_bound(layer) <= 1 + TOLERANCE


@pytest.mark.parametrize(("cls", "arguments", "shape"), LINEAR[1:6:2] + RESIDUAL[::2], ids=str)
def test_hostile_weights(cls, arguments, shape):
    layer = built(cls, arguments, shape)
    for name, weight in hostile(layer.unscaled).items():
        layer.unscaled.assign(weight)
        kernel = to_numpy(layer.kernel)
        assert np.isfinite(kernel).all(), name
        assert hkr.lipschitz_bound(layer) <= 1 + TOLERANCE, name
        x = normal((8, *shape))
        z = x + normal(x.shape, seed=1, scale=0.1)
        moved = np.linalg.norm((to_numpy(layer(x)) - to_numpy(layer(z))).ravel())
        assert moved <= np.linalg.norm((x.astype("float64") - z).ravel()) * (1 + 1e-6), name
        if name.startswith("times") and "e-42" not in name:  # the scale of the weights does not count
            assert np.linalg.norm(kernel) > 0.5, name


@settings(max_examples=25 if BACKEND != "jax" else 3, deadline=None, derandomize=True)
@given(st.tuples(*(st.integers(1, 4) for _ in range(4)), st.integers(1, 3)))
def test_any_kernel(shape):
    *window, inputs, outputs, stride = shape
    strides = (min(stride, window[0]), 1)
    kernel = to_numpy(_almost_orthogonal(keras.ops.convert_to_tensor(normal((*window, inputs, outputs))), strides))
    taps = singular_values._polyphase(kernel[..., None, :, :], strides)
    symbol = np.fft.fftn(taps, [16, 16], axes=(0, 1))
    assert np.linalg.svd(symbol, compute_uv=False).max() <= 1 + TOLERANCE


def test_the_formula_of_the_paper():
    """`d_i = (sum_j |W^T W|_ij)^(-1/2)` for columns; the vector s of norms gives the same."""
    weight = normal((6, 4))
    expected = weight / np.sqrt(np.abs(weight.T @ weight).sum(axis=0))
    kernel = to_numpy(_almost_orthogonal(keras.ops.convert_to_tensor(weight)))
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)


def test_orthogonal_channels_are_left_alone():
    basis = np.linalg.qr(normal((6, 4)))[0]
    np.testing.assert_allclose(to_numpy(_almost_orthogonal(keras.ops.convert_to_tensor(5 * basis))), basis, atol=1e-6)
    delta = np.zeros((3, 3, 2, 2), "float32")
    delta[1, 1] = np.eye(2)
    np.testing.assert_allclose(
        to_numpy(_almost_orthogonal(keras.ops.convert_to_tensor(0.1 * delta), (1, 1))), delta, atol=1e-6
    )


@pytest.mark.many
@pytest.mark.parametrize(("cls", "arguments", "shape"), RESIDUAL, ids=str)
def test_residual_blocks(cls, arguments, shape):
    layer = built(cls, arguments, shape, bias_initializer=keras.initializers.RandomNormal(seed=1))
    for learning_rate in (None, 1e-2, 10.0):
        if learning_rate is not None:
            adam_steps(layer, learning_rate)
        assert hkr.lipschitz_bound(layer) <= 1 + 2 * TOLERANCE
        check_layer(layer, shape)
    layer.bias.assign(1e3 * np.ones(layer.bias.shape))  # every ReLU is on: an affine function
    jacobian = explicit_operator(layer, shape)
    rounding = 1e3 * 1e-5  # of sums of that size
    np.testing.assert_allclose(
        jacobian, jacobian.T, atol=rounding
    )  # so the second operator is the adjoint of the first
    assert np.abs(np.linalg.eigvalsh((jacobian + jacobian.T) / 2)).max() <= 1 + rounding


def test_adjoint_and_reflection():
    """With orthogonal channels and ReLUs on, the block is the reflection `I - 2 W W^T`."""
    layer = built(L.SLLConv2D, {"filters": 2, "kernel_size": 3}, (4, 4, 4), bias_initializer="ones")
    delta = np.zeros((3, 3, 4, 2), "float32")
    delta[1, 1, :2] = np.eye(2)
    layer.unscaled.assign(delta)
    x = np.abs(normal((1, 4, 4, 4)))
    expected = x * [-1, -1, 1, 1] - np.array([2, 2, 0, 0])
    np.testing.assert_allclose(to_numpy(layer(x)), expected, atol=1e-5)


def test_gradients_by_depth():
    """Forty blocks in a row keep the norm of the gradient; random columns would leave a hundredth."""
    model = keras.Sequential([keras.Input((32,)), *(L.SLLDense(16) for _ in range(40))])
    norms = np.linalg.norm(gradient(lambda x: model(x)[:, :1], normal((16, 32))), axis=1)
    assert 1 - 1e-4 < norms.min() <= norms.max() <= 1 + 1e-5
    assert hkr.lipschitz_bound(model) <= 1 + 1e-4


def test_the_bound_of_a_block_does_not_trust_the_rescaling(monkeypatch):
    layer = built(*RESIDUAL[0])
    kernel = keras.ops.convert_to_tensor(2 * np.eye(5, 3, dtype="float32"))
    monkeypatch.setattr(type(layer).__mro__[1], "kernel", property(lambda self: kernel))
    assert hkr.bounds.layer_bound(layer) == pytest.approx(7.0)  # |1 - 2 * 2^2|


def test_signatures_are_those_of_keras():
    assert inspect.signature(L.AOLDense) == inspect.signature(keras.layers.Dense)
    assert inspect.signature(L.AOLConv2D) == inspect.signature(keras.layers.Conv2D)


@pytest.mark.once
def test_fit_save_and_certify(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            L.AOLConv2D(4, 3, padding="same", kernel_regularizer="l2"),
            L.GroupSort(2),
            L.SLLConv2D(4, 3),
            keras.layers.Flatten(),
            L.SLLDense(8),
            L.AOLDense(1),
        ]
    )
    x, y = normal((32, 4, 4, 2)), np.arange(32) % 2
    before = [to_numpy(weight) for weight in model.trainable_weights]
    model.compile(keras.optimizers.Adam(3e-2), hkr.losses.HKR(alpha=5, margin=0.3))
    callbacks = [hkr.callbacks.Orthonormalize(), hkr.callbacks.LipschitzMonitor()]
    history = model.fit(x, y, batch_size=16, epochs=3, verbose=0, callbacks=callbacks).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["lipschitz_bound"][-1] <= 1 + 1e-5
    assert all(
        np.abs(old - to_numpy(new)).max() > 1e-4 for old, new in zip(before, model.trainable_weights, strict=True)
    )
    assert list(model_kernels(model)) == []  # nothing to project
    assert hkr.lipschitz_summary(model, print_fn=None).rows[0].sigma_max <= 1 + TOLERANCE
    certificate = hkr.certify(model, x, verbose=0)
    assert np.all(certificate.radius > 0)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(to_numpy(loaded(x)), to_numpy(model(x)), atol=1e-6)
    assert hkr.lipschitz_bound(loaded) == hkr.lipschitz_bound(model)


@pytest.mark.parametrize(("cls", "arguments", "shape"), [LINEAR[1], LINEAR[2], RESIDUAL[0], RESIDUAL[2]], ids=str)
def test_mixed_precision_and_what_is_refused(cls, arguments, shape):
    layer = built(cls, arguments, shape, dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(layer(normal((1, *shape))).dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(layer.kernel.dtype) == "float32"
    assert hkr.lipschitz_bound(layer) <= (1 + 2.0**-8) ** 2  # of the kernel that is cast, in SLL twice
    with pytest.raises(ValueError, match="Received: rank=2"):
        layer.enable_lora(2)
    with pytest.raises(ValueError, match="Received: mode=int8"):
        layer.quantize("int8")
    layer.unscaled.assign(np.nan * np.ones(layer.unscaled.shape))
    with pytest.raises(ValueError, match="finite weights"):
        hkr.lipschitz_bound(layer)


def test_refused_arguments():
    with pytest.raises(ValueError, match="Received: groups=2"):
        L.AOLConv2D(4, 3, groups=2)
    with pytest.raises(ValueError, match="Received: units=0"):
        L.SLLDense(0)
    with pytest.raises(ValueError, match="Received: filters=0"):
        L.SLLConv2D(0, 3)
    with pytest.raises(ValueError, match="Received: kernel_size=2"):
        L.SLLConv2D(4, 2)


SILENCED = ("all", "outputs", "inputs", "both", "tiny", "denormal")


def silenced(weight, what):
    """Weights with channels that start at zero, or so small that the square of their gradient would overflow."""
    weight = weight.copy()
    if what == "all":
        weight[...] = 0
    if what in ("outputs", "both"):
        weight[..., 0] = 0
    if what in ("inputs", "both"):
        weight[..., 0, :] = 0
    return weight * np.float32({"tiny": 1e-30, "denormal": 1e-42}.get(what, 1.0))


@pytest.mark.many
@pytest.mark.parametrize(("cls", "arguments", "shape"), [LINEAR[4], *LINEAR[:2], *RESIDUAL[:3]], ids=str)
def test_channels_that_start_at_zero_train(cls, arguments, shape):
    layer = cls(**arguments)
    model = keras.Sequential([keras.Input(shape), layer, keras.layers.Flatten(), L.LipschitzDense(1)])
    model.compile("adam", loss="mse")
    model.optimizer.build(model.trainable_variables)
    first, moments = model.get_weights(), [to_numpy(each, "float32") for each in model.optimizer.variables]
    for what in SILENCED:  # in one program
        model.set_weights(first)
        for variable, value in zip(model.optimizer.variables, moments, strict=True):
            variable.assign(value)
        start = silenced(to_numpy(layer.unscaled, "float32"), what)
        layer.unscaled.assign(start)
        model.fit(normal((8, *shape)), normal((8, 1), seed=1), epochs=2, batch_size=4, verbose=0)
        assert all(np.isfinite(to_numpy(weight)).all() for weight in model.weights), what
        zero_is_stationary = cls in (L.SLLDense, L.SLLConv2D) and what in ("all", "denormal")
        assert zero_is_stationary or not np.array_equal(to_numpy(layer.unscaled, "float32"), start), what
        assert hkr.lipschitz_bound(model) <= 1 + 1e-5, what


def test_a_layer_of_zeros_from_its_initializer_trains():
    model = keras.Sequential([keras.Input((6,)), L.AOLDense(4, kernel_initializer="zeros"), L.LipschitzDense(1)])
    model.compile("adam", loss="mse")
    model.fit(normal((8, 6)), normal((8, 1), seed=1), verbose=0)
    assert np.isfinite(to_numpy(model.layers[0].unscaled)).all()
    assert np.abs(to_numpy(model.layers[0].unscaled)).max() > 0
