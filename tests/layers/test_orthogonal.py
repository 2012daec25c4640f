"""Orthogonal convolutions: singular values on circles by FFT, explicit operators with every padding."""

import inspect
import math

import keras
import numpy as np
import pytest
from helpers import BACKEND, adam_steps, check_layer, explicit_operator, gradient, normal, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import hkr_keras as hkr
from hkr_keras.certification import singular_values
from hkr_keras.geometry import model_kernels
from hkr_keras.layers.circular import wrap
from hkr_keras.layers.orthogonal import _block_convolution, _orthogonal_kernel, _product, two_tap_steps

L = hkr.layers
TOLERANCE = 1e-6  # the promise; float32 leaves less, see _SHRINK
NAMES = ("Conv1D", "Conv2D", "Conv1DTranspose", "Conv2DTranspose")

# name, arguments, input shape. Factors have few shapes, so that they compile once: 4 channels, 4 or 2 pairs.
SQUARE, STRIDED = {"filters": 4, "kernel_size": 3}, {"filters": 4, "kernel_size": 3, "strides": 2}
CASES = [
    ("Conv2D", {**SQUARE, "padding": "circular"}, (5, 6, 4)),
    ("Conv2D", {**SQUARE, "padding": "same"}, (5, 5, 2)),
    ("Conv2D", {**SQUARE, "padding": "circular", "dilation_rate": 2}, (5, 6, 3)),
    ("Conv2D", {**SQUARE, "padding": "valid", "filters": 3}, (4, 5, 4)),
    ("Conv2D", {**STRIDED, "padding": "same"}, (5, 6, 4)),
    ("Conv2D", {**STRIDED, "padding": "circular"}, (4, 6, 4)),
    ("Conv2D", {"filters": 9, "kernel_size": (2, 3), "padding": "valid", "strides": (1, 2)}, (4, 5, 2)),
    ("Conv2D", {"filters": 8, "kernel_size": 2, "padding": "circular", "groups": 2}, (4, 5, 8)),
    ("Conv1D", {**SQUARE, "padding": "circular", "kernel_size": 5}, (9, 3)),
    ("Conv1D", {**SQUARE, "padding": "causal", "filters": 3}, (7, 4)),
    ("Conv1D", {**SQUARE, "padding": "same", "dilation_rate": 3}, (8, 4)),
    ("Conv1D", {"filters": 1, "kernel_size": 3, "padding": "same"}, (7, 1)),
    ("Conv1D", {"filters": 3, "kernel_size": 1, "padding": "valid"}, (7, 4)),
    ("Conv1DTranspose", {**SQUARE, "padding": "circular", "dilation_rate": 2}, (9, 3)),
    ("Conv1DTranspose", {**STRIDED, "padding": "valid", "kernel_size": 4}, (5, 4)),
    ("Conv2DTranspose", {**STRIDED, "padding": "circular"}, (3, 4, 4)),
    ("Conv2DTranspose", {**STRIDED, "padding": "same"}, (3, 4, 4)),
    ("Conv2DTranspose", {**STRIDED, "padding": "valid", "output_padding": 1}, (3, 3, 4)),
]


OF_EVERY_KIND = [CASES[i] for i in (0, 5, 9, 16)]


def built(name, arguments, shape, **kwargs):
    layer = getattr(L, f"Orthogonal{name}")(**{"use_bias": False, **arguments, **kwargs})
    layer.build((None, *shape))
    return layer


def polish(layer):
    for _, factor, _ in model_kernels(layer):
        factor.assign(factor.constraint.polish(keras.ops.stop_gradient(keras.ops.convert_to_tensor(factor))))


def circular_singular_values(layer, periods=8):
    """Of the operator on a circle of `periods * strides` cells, from the composed kernel, in float64."""
    blocks = to_numpy(layer.kernel)
    blocks = np.moveaxis(blocks.reshape(*blocks.shape[:-1], layer.groups, -1), -2, -3)
    taps = singular_values._polyphase(blocks, layer.strides)
    axes = tuple(range(len(layer.strides)))
    return np.linalg.svd(np.fft.fftn(taps, [periods] * len(axes), axes=axes), compute_uv=False)


def assert_orthogonal(layer):
    values = circular_singular_values(layer)
    assert values.max() <= 1 + TOLERANCE
    assert values.min() >= 1 - 1e-5


# JAX compiles every operation for every shape, which takes 4 seconds a row there.
@pytest.mark.parametrize(("name", "arguments", "shape"), OF_EVERY_KIND if BACKEND == "jax" else CASES, ids=str)
def test_operator(name, arguments, shape):
    layer = built(name, arguments, shape)
    for learning_rate in (None, 1e-2, 10.0):
        if learning_rate is not None:
            adam_steps(layer, learning_rate)
        values = np.linalg.svd(explicit_operator(layer, shape), compute_uv=False)
        assert 0 < values.max() <= 1 + TOLERANCE
        assert values.max() <= hkr.lipschitz_bound(layer) * (1 + 1e-6)  # the explicit matrix is rounded to float32
        polish(layer)
        assert_orthogonal(layer)
    if arguments.get("padding") == "circular":
        values = np.linalg.svd(explicit_operator(layer, shape), compute_uv=False)
        assert 1 - 1e-5 <= values.min() <= values.max() <= 1 + TOLERANCE


@pytest.mark.parametrize(("name", "arguments", "shape"), OF_EVERY_KIND, ids=str)
def test_layer_with_bias_and_activation(name, arguments, shape):
    layer = built(name, arguments, shape, use_bias=True, bias_initializer="ones", activation="tanh")
    check_layer(layer, shape)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_keras(name):
    ours, theirs = getattr(L, f"Orthogonal{name}"), getattr(keras.layers, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert issubclass(ours, theirs)
    layer = ours(4, 3, 1, "CIRCULAR", name="positional")
    config = layer.get_config()
    assert config["padding"] == "circular"
    assert set(config) == set(theirs(4, 3).get_config())
    assert ours.from_config(config).get_config() == config


shapes = st.tuples(*(st.integers(1, 6) for _ in range(5)), st.integers(1, 3))


@settings(max_examples=15 if BACKEND != "jax" else 1, deadline=None, derandomize=True)
@given(shapes)
def test_any_channels_windows_and_strides(shape):
    inputs, filters, *window, stride, groups = shape
    strides = [min(k, stride) for k in window]
    layer = built(
        "Conv2D",
        {"filters": filters * groups, "kernel_size": window, "strides": strides, "groups": groups},
        (8, 8, inputs * groups),
    )
    assert_orthogonal(layer)
    area = math.prod(strides)
    gram_size = min(inputs * area, filters)
    assert circular_singular_values(layer).shape[-1] == gram_size  # all of them are 1: nothing is lost


def test_wide_kernels_keep_the_promise():
    channels = 64 if BACKEND != "jax" else 4
    layer = built("Conv2D", {"filters": channels, "kernel_size": 3}, (8, 8, channels))
    for learning_rate in (1e-6, 1e-2):
        adam_steps(layer, learning_rate, steps=1)
        polish(layer)
        assert_orthogonal(layer)
    assert hkr.lipschitz_bound(layer) <= 1 + 1e-5  # and not 0.1 % above, as between any frequencies of a grid


def test_block_convolution_is_the_composition():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(4, 2)))[0]
    projection = basis @ basis.T
    kernel = rng.normal(size=(3, 4, 5))  # taps, inputs, outputs
    taps = {False: (projection, np.eye(4) - projection), True: (np.eye(4) - projection, projection)}
    for flipped, (first, second) in taps.items():
        expected = np.zeros((4, 4, 5))
        expected[:-1] += np.einsum("ij,tjo->tio", first, kernel)
        expected[1:] += np.einsum("ij,tjo->tio", second, kernel)
        arguments = (kernel.transpose(1, 0, 2)[None].astype("float32"), projection[None].astype("float32"))
        composed = to_numpy(_block_convolution(*map(keras.ops.convert_to_tensor, arguments), axis=2, flipped=flipped))
        np.testing.assert_allclose(composed[0].transpose(1, 0, 2), expected, atol=1e-6)


def test_split_products_have_the_gradient_of_a_product():
    a, b = normal((6, 9), scale=0.3), normal((9, 4), seed=1, scale=0.3)
    left, right = keras.ops.convert_to_tensor(a), keras.ops.convert_to_tensor(b)
    np.testing.assert_allclose(to_numpy(_product(left, right)), a.astype("float64") @ b, rtol=0, atol=1.5e-7)
    ones = np.ones((6, 4), "float32")
    found = gradient(lambda x: _product(x, right), left), gradient(lambda x: _product(left, x), right)
    np.testing.assert_allclose(found[0], ones @ b.T, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[1], a.T @ ones, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["OrthogonalConv2D", "OrthogonalConv2DTranspose"])
def test_plain_products_will_do_in_training(name):
    layer = getattr(hkr.layers, name)(24, 3, padding="circular")
    x = normal((2, 6, 6, 24))
    trained, deployed = to_numpy(layer(x, training=True)), to_numpy(layer(x))
    np.testing.assert_allclose(trained, deployed, rtol=0, atol=1e-5)
    assert np.any(trained != deployed)


def test_small_factors_only_shrink():
    """Factors of norm below 1, as after a wild step, keep the norm at most 1."""
    mixing, bases = normal((1, 1, 4, 6), scale=0.2), normal((4, 4, 2), scale=0.3)
    kernel = _orthogonal_kernel(*map(keras.ops.convert_to_tensor, (mixing, bases)), window=(3, 3), inputs=4)
    values = np.linalg.svd(np.fft.fftn(to_numpy(kernel), [9, 9], axes=(0, 1)), compute_uv=False)
    assert np.linalg.norm(mixing[0, 0], 2) <= 1
    assert np.linalg.norm(bases.transpose(1, 0, 2), 2, axis=(1, 2)).max() <= 1
    assert values.max() <= np.linalg.norm(mixing[0, 0], 2) * (1 + TOLERANCE)


def test_steps_take_axes_and_directions_in_turn():
    assert two_tap_steps((1, 1), (1, 1)) == []
    assert two_tap_steps((4, 3), (2, 3)) == [(0, False), (0, True)]
    assert two_tap_steps((3, 3), (1, 1)) == [(0, False), (1, False), (0, True), (1, True)]


@pytest.mark.parametrize("amounts", [(0, 0), (2, 0), (0, 1), (3, 2)])
def test_wrap(amounts):
    x = normal((2, 3, 2))
    np.testing.assert_array_equal(
        to_numpy(wrap(keras.ops.convert_to_tensor(x), 1, *amounts), "float32"),
        np.pad(x, [(0, 0), amounts, (0, 0)], mode="wrap"),
    )


def test_circles_do_not_depend_on_where_they_start():
    layer = built("Conv1D", {**STRIDED, "kernel_size": 4, "padding": "circular"}, (8, 4))
    adjoint = built("Conv1DTranspose", {**STRIDED, "kernel_size": 4, "padding": "circular"}, (4, 4))
    adjoint.set_weights(layer.get_weights())  # the same kernel, seen from the other side
    x, y = normal((1, 8, 4)), normal((1, 4, 4), seed=1)
    np.testing.assert_allclose(
        to_numpy(layer(np.roll(x, 2, axis=1))), np.roll(to_numpy(layer(x)), 1, axis=1), atol=1e-6
    )
    np.testing.assert_allclose(np.sum(to_numpy(layer(x)) * y), np.sum(x * to_numpy(adjoint(y))), atol=1e-5)


@pytest.mark.parametrize(("inputs", "filters"), [(4, 4), (4, 3)])
def test_gradients_keep_their_norm(inputs, filters):
    layer = built("Conv2D", {"filters": filters, "kernel_size": 3, "padding": "circular"}, (5, 6, inputs))
    found = gradient(layer, normal((1, 5, 6, inputs)))
    assert np.linalg.norm(found) == pytest.approx(math.sqrt(5 * 6 * filters), rel=1e-5)


def make_model(**first):
    return keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            L.OrthogonalConv2D(4, 3, strides=2, padding="circular", **first),
            L.GroupSort(2),
            L.OrthogonalConv2DTranspose(4, 3, strides=2, padding="same"),
            keras.layers.Flatten(),
            L.LipschitzDense(1),
        ]
    )


X, Y = normal((32, 6, 6, 4)), np.arange(32) % 2


@pytest.mark.once
def test_fit_save_and_certify(tmp_path):
    model = make_model(kernel_regularizer="l2")
    convolution = model.layers[0]
    before = to_numpy(convolution.kernel)
    model.compile(keras.optimizers.Adam(3e-2), hkr.losses.HKR(alpha=5, margin=0.3))
    callbacks = [hkr.callbacks.Orthonormalize(), hkr.callbacks.LipschitzMonitor()]
    history = model.fit(X, Y, batch_size=16, epochs=4, verbose=0, callbacks=callbacks).history
    assert history["loss"][-1] < history["loss"][0]
    assert np.abs(to_numpy(convolution.kernel) - before).max() > 1e-2
    assert history["sigma_min"][-1] > 1 - 1e-5
    for layer in model.layers:
        if "orthogonal" in layer.name:
            assert_orthogonal(layer)
    convolution(X)
    assert to_numpy(sum(convolution.losses)) == pytest.approx(0.01 * 4, rel=1e-4)  # l2 of 4 orthonormal outputs

    assert hkr.lipschitz_bound(model) <= 1 + 1e-5
    summary = hkr.lipschitz_summary(model, print_fn=None)
    assert summary.rows[0].sigma_min == pytest.approx(1, abs=1e-5)
    certificate = hkr.certify(model, X, verbose=0)
    assert np.all(certificate.radius > 0)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(to_numpy(loaded(X)), to_numpy(model(X)), atol=1e-6)
    assert hkr.lipschitz_bound(loaded) == hkr.lipschitz_bound(model)
    assert loaded.layers[0].circular


def test_only_the_factors_are_projected():
    model = make_model()
    found = [(layer.name, variable.name) for layer, variable, _ in model_kernels(model)]
    convolutions = [layer for layer in model.layers if "orthogonal" in layer.name]
    assert found[:-1] == [(layer.name, name) for layer in convolutions for name in ("mixing", "bases")]
    assert all(len(layer.trainable_variables) == 3 for layer in convolutions)


def test_layers_start_different_and_seeds_count():
    arguments = {"filters": 4, "kernel_size": 2}  # two bases of half rank: as many numbers as in the mixing
    first, second = (built("Conv2D", arguments, (4, 4, 4)) for _ in range(2))
    assert np.abs(to_numpy(first.kernel) - to_numpy(second.kernel)).max() > 1e-3
    seeded = [
        built("Conv2D", arguments, (4, 4, 4), kernel_initializer=keras.initializers.RandomNormal(seed=3))
        for _ in range(2)
    ]
    np.testing.assert_array_equal(to_numpy(seeded[0].kernel), to_numpy(seeded[1].kernel))
    mixing, basis = to_numpy(seeded[0].mixing)[0, 0], to_numpy(seeded[0].bases)[:, 0]
    overlap = np.linalg.svd(mixing[:, :2].T @ basis, compute_uv=False)
    assert overlap.min() < 0.99  # not the span of the first columns


def test_mixed_precision_composes_in_float32():
    layer = built("Conv2D", CASES[0][1], CASES[0][2], dtype="mixed_bfloat16")
    outputs = layer(normal((1, *CASES[0][2])))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(layer.kernel.dtype) == "float32"
    assert_orthogonal(layer)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused(name):
    cls = getattr(L, f"Orthogonal{name}")
    with pytest.raises(ValueError, match="Received: kernel_size="):
        cls(2, 2, strides=3)
    with pytest.raises(ValueError, match="Received: kernel_constraint="):
        cls(2, 3, kernel_constraint=hkr.constraints.SpectralBall())
    with pytest.raises(ValueError, match="Received: constraint="):
        cls(2, 3, kernel_constraint="max_norm")
    with pytest.raises(ValueError, match="padding"):
        cls(2, 3, padding="reflect")
    with pytest.raises(AttributeError, match="kernel"):
        cls(2, 3).kernel
    layer = cls(2, 3, kernel_constraint=hkr.constraints.DeferredOrthonormal())
    layer.build((None, 4, 4, 2)[-layer.rank - 2 :])
    with pytest.raises(ValueError, match="Received: rank=2"):
        layer.enable_lora(2)
    with pytest.raises(ValueError, match="Received: mode=int8"):
        layer.quantize("int8")


def test_circles_that_do_not_close_are_refused():
    layer = L.OrthogonalConv1D(2, 3, strides=2, padding="circular")
    for steps in (None, 5):
        with pytest.raises(ValueError, match=r"multiple of 2. Received: shape=\(None, "):
            layer.build((None, steps, 2))
    layer.build((None, 4, 2))
    with pytest.raises(ValueError, match=r"Received: shape=\(1, 7, 2\)"):
        layer(normal((1, 7, 2)))
    with pytest.raises(ValueError, match="at least 4"):
        L.OrthogonalConv1D(2, 9, padding="circular").build((None, 3, 2))
    with pytest.raises(ValueError, match="Received: output_padding="):
        L.OrthogonalConv1DTranspose(2, 3, strides=2, padding="circular", output_padding=1)


def test_the_bound_sees_what_a_factor_became():
    layer = built("Conv2D", {"filters": 4, "kernel_size": 3}, (5, 5, 4))
    layer.mixing.assign(2.0 * to_numpy(layer.mixing, "float32"))
    assert hkr.lipschitz_bound(layer) == pytest.approx(2.0, abs=1e-4)
    layer.bases.assign(3.0 * to_numpy(layer.bases, "float32"))
    assert hkr.lipschitz_bound(layer) > circular_singular_values(layer, 32).max() > 100


def test_a_subclass_with_another_forward_pass_is_refused():
    class Doubled(L.OrthogonalConv2D):
        def call(self, inputs):
            return 2 * super().call(inputs)

    layer = Doubled(2, 3)
    layer.build((None, 4, 4, 2))
    with pytest.raises(ValueError, match="overrides call"):
        hkr.lipschitz_bound(layer)


def test_the_bound_without_a_grid_is_above_the_norm(monkeypatch):
    monkeypatch.setattr(singular_values, "_SLACK", math.inf)  # no grid
    rng = np.random.default_rng(0)
    for window, inputs, outputs, strides in [((3,), 2, 3, (1,)), ((2, 3), 3, 2, (1, 2)), ((4, 4), 1, 5, (2, 2))]:
        blocks = rng.normal(size=(*window, 2, inputs, outputs))
        taps = singular_values._polyphase(blocks, strides)
        symbol = np.fft.fftn(taps, [32] * len(strides), axes=range(len(strides)))
        norm = np.linalg.svd(symbol, compute_uv=False).max()
        assert norm <= singular_values.convolution_bound(blocks, strides) <= 3 * norm
    assert singular_values.convolution_bound(np.zeros((3, 1, 2, 2)), (1,)) == 0.0
    assert singular_values.convolution_bound(np.full((3, 1, 1, 1), 1e-40), (1,)) == pytest.approx(3e-40)
