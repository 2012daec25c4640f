"""However a model is trained, every kernel stays on its constraint set: measured in float64, from the operator."""

import shutil

import keras
import numpy as np
import pytest
from keras import ops

import hkr_keras as hkr

BACKEND = keras.backend.backend()
SIZE = 6  # of the images
generator = np.random.default_rng(0)
X = generator.normal(size=(48, SIZE, SIZE, 2)).astype("float32")
Y = (X[..., 0].mean(axis=(1, 2)) > 0).astype("int32")


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


def make_model(trainable=True):
    layers = hkr.layers
    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 2)),
            layers.LipschitzConv2D(4, 3, padding="same"),
            layers.GroupSort(2),
            layers.LipschitzSeparableConv2D(6, 2, strides=2),
            layers.LipschitzConv2DTranspose(4, 2),
            keras.layers.Flatten(),
            layers.LipschitzDense(8, trainable=trainable),
            layers.MaxMin(),
            layers.LipschitzDense(1),
        ]
    )


def host(variable):
    return np.asarray(ops.convert_to_numpy(ops.cast(variable, "float32")), dtype="float64")


def dense_operator(layer):
    """The matrix of a linear layer on the images it was built for, column by column."""
    shape = layer.input.shape[1:]
    basis = np.eye(int(np.prod(shape)), dtype="float32").reshape(-1, *shape)
    bias = host(layer(np.zeros((1, *shape), "float32")))
    return (host(layer(basis)) - bias).reshape(len(basis), -1)


def kernel_norms(model):
    """Largest singular value of every kernel, as the matrix that its layer multiplies patches with."""
    norms = {}
    for layer in model.layers:
        for name, geometry in hkr.geometry.kernel_geometries(layer).items():
            matrices = host(geometry.to_matrices(getattr(layer, name)))
            norms[f"{layer.name}/{name}"] = geometry.gain * np.linalg.norm(matrices, ord=2, axis=(-2, -1)).max()
    return norms


def assert_one_lipschitz(model):
    norms = kernel_norms(model)
    assert len(norms) == 6
    assert max(norms.values()) <= 1 + 1e-6, norms
    assert min(norms.values()) > 0.5, norms


def fit(model, optimizer, callbacks=(), **compile_arguments):
    before = [host(weight) for weight in model.trainable_weights]
    model.compile(optimizer, hkr.losses.HKR(alpha=5, margin=0.5), **compile_arguments)
    history = model.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=list(callbacks))
    assert np.isfinite(history.history["loss"]).all()
    for old, new in zip(before, model.trainable_weights, strict=True):
        assert np.abs(old - host(new)).max() > 1e-5
    return history


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(1e-2),
    "momentum": lambda: keras.optimizers.SGD(1e-1, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1, global_clipnorm=0.5),
    "accumulated": lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2),
}


@pytest.mark.many
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    model = make_model()
    fit(model, OPTIMIZERS[name]())
    assert_one_lipschitz(model)


@pytest.mark.many
@pytest.mark.parametrize("optimizer", [keras.optimizers.Adam, keras.optimizers.SGD])
def test_a_learning_rate_of_10(optimizer):
    model = make_model()
    fit(model, optimizer(10.0))
    norms = kernel_norms(model).values()
    assert 0.5 < min(norms) <= max(norms) <= 1 + 1e-6  # no kernel is wiped out either
    assert hkr.lipschitz_bound(model) <= 1 + 1e-5


def test_the_loss_falls_and_the_whole_operators_stay_on_the_set():
    model = make_model()
    history = fit(model, keras.optimizers.Adam(1e-2)).history["loss"]
    assert history[-1] < history[0]
    for layer in model.layers:
        if layer.trainable_weights:
            assert np.linalg.norm(dense_operator(layer), ord=2) <= 1 + 2e-6


@pytest.mark.once
def test_averaged_weights_are_repaired():
    model = make_model()
    fit(model, keras.optimizers.Adam(3e-2, use_ema=True, ema_momentum=0.8), [hkr.callbacks.Orthonormalize()])
    assert_one_lipschitz(model)


def make_orthogonal_model():
    layers = hkr.layers
    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 2)),
            layers.OrthogonalConv2D(4, 2, padding="same"),
            layers.GroupSort(2),
            keras.layers.Flatten(),
            layers.LipschitzDense(4),
            layers.LipschitzDense(1),
        ]
    )


def assert_orthonormal(model):
    """All that is constrained is float32 and orthonormal to its last bits, and so is the composed convolution."""
    for _, weight, geometry in hkr.geometry.model_kernels(model):
        assert weight.dtype == "float32"
        values = np.linalg.svd(geometry.gain * host(geometry.to_matrices(weight)), compute_uv=False)
        assert 1 - 1e-6 <= values.min() <= values.max() <= 1 + 4e-7, weight.path
    composed = model.layers[0].kernel
    assert keras.backend.standardize_dtype(composed.dtype) == "float32"
    copy = hkr.layers.OrthogonalConv2D(4, 2, padding="same", dtype="float32")
    copy.build((None, SIZE, SIZE, 2))
    copy.set_weights(model.layers[0].get_weights())
    operator = keras.Sequential([keras.Input((SIZE, SIZE, 2)), copy]).layers[0]
    assert np.linalg.norm(dense_operator(operator), ord=2) <= 1 + 4e-7
    # Kernels count as they are cast: three changes of at most a unit roundoff times a Frobenius norm of at most 2.
    roundoff = {"float32": 0.0, "bfloat16": 2.0**-9, "float16": 2.0**-12}[model.layers[-2].compute_dtype]
    assert hkr.lipschitz_bound(model) <= 1 + 1e-6 + 3 * 2 * roundoff


@pytest.mark.parametrize("jit_compile", [False, True] if BACKEND != "torch" else [False])  # torch: its own test below
@pytest.mark.parametrize("name", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_precision_and_compilation(name, jit_compile):
    if BACKEND == "jax" and not jit_compile:
        pytest.skip("JAX, one operation at a time, takes long, and nobody trains so")
    keras.config.set_dtype_policy(name)
    model = make_orthogonal_model()
    fit(model, keras.optimizers.Adam(1e-2), [hkr.callbacks.Orthonormalize()], jit_compile=jit_compile)
    assert model.jit_compile is jit_compile
    assert model.layers[-2].compute_dtype == name.removeprefix("mixed_")
    assert (type(model.optimizer).__name__ == "LossScaleOptimizer") == (name == "mixed_float16")
    assert_orthonormal(model)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile")
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_torch_compile():
    weights = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(2), hkr.layers.LipschitzDense(1)])
        model.compile(keras.optimizers.SGD(0.1), hkr.losses.HKR(), jit_compile=jit_compile)
        model.fit(X[:32, 0, :2].reshape(32, 4), Y[:32], batch_size=16, shuffle=False, verbose=0)
        weights.append([host(weight) for weight in model.trainable_weights])
    for eager, compiled in zip(*weights, strict=True):
        np.testing.assert_allclose(compiled, eager, atol=1e-5)
    for kernel in weights[1][::2]:
        assert np.linalg.norm(kernel, ord=2) <= 1 + 4e-7


@pytest.mark.once
def test_loss_scaling():
    model = make_model()
    fit(model, keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2), initial_scale=2.0**10))
    assert_one_lipschitz(model)


def test_several_steps_per_execution():
    model = make_model()
    fit(model, keras.optimizers.Adam(1e-1), steps_per_execution=1 if BACKEND == "torch" else 3)
    assert_one_lipschitz(model)


@pytest.mark.once
def test_train_on_batch():
    model = make_model()
    model.compile(keras.optimizers.Adam(1e-1), hkr.losses.HKR())
    for start in range(0, 24, 8):
        model.train_on_batch(X[start : start + 8], Y[start : start + 8])
        assert_one_lipschitz(model)


def train_step(model, optimizer, loss):
    """One step of a training loop of one's own, on the backend in use."""
    x, y = ops.convert_to_tensor(X[:16]), ops.convert_to_tensor(Y[:16])
    if BACKEND == "jax":
        import jax

        def value(trainable):
            predictions, _ = model.stateless_call(trainable, non_trainable, x, training=True)
            return loss(y, predictions)

        trainable = [variable.value for variable in model.trainable_variables]
        non_trainable = [variable.value for variable in model.non_trainable_variables]
        optimizer.apply_gradients(zip(jax.jit(jax.grad(value))(trainable), model.trainable_variables, strict=True))
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
    else:
        import torch

        model.zero_grad()
        loss(y, model(x, training=True)).backward()
        gradients = [variable.value.grad for variable in model.trainable_variables]
        with torch.no_grad():
            optimizer.apply(gradients, model.trainable_variables)


def test_a_training_loop_of_ones_own():
    model, optimizer, loss = make_model(), keras.optimizers.Adam(1e-1), hkr.losses.HKR(alpha=5)
    start = host(model.layers[0].kernel)
    for _ in range(3):
        train_step(model, optimizer, loss)
        assert_one_lipschitz(model)
    assert np.abs(host(model.layers[0].kernel) - start).max() > 1e-2


@pytest.mark.once
def test_frozen_layers_do_not_move():
    model = make_model(trainable=False)
    frozen = next(layer for layer in model.layers if not layer.trainable)
    before = host(frozen.kernel)
    fit(model, keras.optimizers.Adam(1e-1))
    assert np.array_equal(host(frozen.kernel), before)
    assert_one_lipschitz(model)


def test_saving_midway(tmp_path):
    model = make_model()
    fit(model, keras.optimizers.Adam(1e-2))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    constraints = [layer.kernel.constraint for layer in loaded.layers if hasattr(layer, "kernel")]
    assert all(isinstance(constraint, hkr.constraints.Orthonormal) for constraint in constraints)
    for each in (model, loaded):
        keras.utils.set_random_seed(1)
        each.fit(X, Y, batch_size=16, epochs=1, shuffle=False, verbose=0)
        assert_one_lipschitz(each)
    for old, new in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(host(old), host(new), atol=1e-5)


@pytest.mark.many
@pytest.mark.parametrize(("name", "limit"), [("SpectralBall", 1 + 1e-6), ("UnitNorm", np.sqrt(8) * (1 + 1e-6))])
def test_other_constraints(name, limit):
    constraint = getattr(hkr.constraints, name)()
    layers = [keras.layers.Flatten(), hkr.layers.LipschitzDense(8, kernel_constraint=constraint)]
    model = keras.Sequential([keras.Input(X.shape[1:]), *layers, hkr.layers.LipschitzDense(1)])
    fit(model, keras.optimizers.Adam(1e-1))
    kernel = host(model.layers[1].kernel)
    assert np.linalg.norm(kernel, ord=2) <= limit
    if name == "UnitNorm":
        assert np.linalg.norm(kernel, axis=0) == pytest.approx(1.0, abs=1e-6)
