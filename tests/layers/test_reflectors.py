"""Block reflectors: the norm is at most 1 for every weight, and 1 where nothing is cut."""

import keras
import numpy as np
import pytest
from helpers import adam_steps, check_layer, double_precision, gradient, normal, operator_norm, to_numpy

import hkr_keras as hkr
from hkr_keras.geometry import model_kernels
from hkr_keras.layers.reflectors import _orthonormal_factor, _reflect

L = hkr.layers
TOLERANCE = 1e-6

# units, rank, inputs
SIZES = [(8, None, 8), (8, 8, 8), (5, 2, 12), (12, 3, 5), (6, 12, 12), (1, 1, 1)]


def built(units, rank, inputs, **kwargs):
    layer = L.ReflectorDense(units, rank, **kwargs)
    layer.build((None, inputs))
    return layer


def hostile(shape):
    """Weights that break careless inversion."""
    rng = np.random.default_rng(0)
    random, ones = rng.normal(size=shape).astype("float32"), np.ones(shape, "float32")
    scales = np.logspace(-20, 20, shape[1]).astype("float32")
    return {
        **{
            f"times {scale:g}": random * np.float32(scale)
            for scale in (1e-42, 1e-30, 1e-20, 1e-3, 1e3, 1e18, 1e30, 3e37)
        },
        "zero": 0 * random,
        "equal": ones,
        "rank 1": np.outer(random[:, 0], random[0]),
        "half the rank": np.concatenate([random[:, ::2]] * 2, axis=1)[:, : shape[1]],
        **{f"nearly equal, {noise:g}": ones + np.float32(noise) * random for noise in (1e-2, 1e-4, 1e-6)},
        "columns of all sizes": random * scales,
        "rows of all sizes": random * np.logspace(-20, 20, shape[0]).astype("float32")[:, None],
    }


@pytest.mark.parametrize(("units", "rank", "inputs"), SIZES, ids=str)
def test_the_layer(units, rank, inputs):
    layer = check_layer(built(units, rank, inputs), (inputs,))
    assert layer.vectors.shape == (max(units, inputs), rank or 2)
    assert list(model_kernels(layer)) == []
    x = normal((4, inputs))
    np.testing.assert_allclose(to_numpy(layer(x)), x @ to_numpy(layer.kernel) + to_numpy(layer.bias), atol=1e-5)


@pytest.mark.parametrize(("units", "rank", "inputs"), SIZES, ids=str)
def test_the_norm_is_at_most_one(units, rank, inputs):
    layer = built(units, rank, inputs, use_bias=False)
    for learning_rate in (None, 1e-3, 1e-1, 10.0):
        if learning_rate is not None:
            adam_steps(layer, learning_rate)
        norm = operator_norm(layer, (inputs,))
        bound = hkr.lipschitz_bound(layer)
        assert norm <= bound
        assert bound <= 1 + TOLERANCE
        assert norm > 0.99


@pytest.mark.parametrize("shape", [(9, 1), (12, 4), (12, 12), (96, 24)], ids=str)
def test_the_norm_in_float64_for_any_vectors(shape):
    for name, vectors in hostile(shape).items():
        with double_precision():
            factor = _orthonormal_factor(keras.ops.convert_to_tensor(vectors.astype("float64"), dtype="float64"))
            identity = keras.ops.eye(shape[0], dtype="float64")
            kernel = to_numpy(_reflect(identity, factor, shape[0]))
        values = np.linalg.svd(kernel, compute_uv=False)
        assert values.max() <= 1 + 1e-12, name
        np.testing.assert_allclose(kernel, kernel.T, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("units", "rank", "inputs"), [(8, 3, 8), (24, 24, 24), (128, 32, 128), (20, 8, 40)], ids=str)
def test_hostile_vectors_in_float32(units, rank, inputs):
    layer = built(units, rank, inputs)
    for name, vectors in hostile(tuple(layer.vectors.shape)).items():
        layer.vectors.assign(vectors)
        assert np.isfinite(to_numpy(layer.kernel)).all(), name
        assert hkr.lipschitz_bound(layer) <= 1 + TOLERANCE, name
        x = normal((16, inputs))
        moved = to_numpy(layer(x)) - to_numpy(layer(np.zeros_like(x)))
        assert np.all(np.linalg.norm(moved, axis=1) <= np.linalg.norm(x, axis=1) * (1 + 1e-6)), name


def test_the_formula():
    vectors = normal((10, 3)).astype("float64")
    layer = built(10, 3, 10)
    layer.vectors.assign(vectors)
    expected = np.eye(10) - 2 * vectors @ np.linalg.solve(vectors.T @ vectors, vectors.T)
    np.testing.assert_allclose(to_numpy(layer.kernel), expected, atol=2e-5)
    np.testing.assert_allclose(np.linalg.svd(to_numpy(layer.kernel), compute_uv=False), 1, atol=2e-5)


def test_the_gradient_is_that_of_the_formula():
    """The Cholesky factor is held fixed: what is left out is of the order of eps."""
    vectors, target = normal((7, 3)), keras.ops.convert_to_tensor(normal((7, 7), seed=1))

    def score(v):
        return keras.ops.sum(_reflect(keras.ops.eye(7), _orthonormal_factor(v), 7) * target)

    def exact(v):
        return np.sum((np.eye(7) - 2 * v @ np.linalg.solve(v.T @ v, v.T)) * to_numpy(target))

    v, step = vectors.astype("float64"), 1e-5
    expected = np.zeros(v.shape)
    for index in np.ndindex(v.shape):
        move = np.zeros(v.shape)
        move[index] = step
        expected[index] = (exact(v + move) - exact(v - move)) / (2 * step)
    np.testing.assert_allclose(gradient(score, vectors), expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.once
def test_fit_save_certify_and_convert(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            L.LipschitzDense(16),
            L.GroupSort(2),
            L.ReflectorDense(16, rank=4, kernel_regularizer="l2"),
            L.GroupSort(2),
            L.ReflectorDense(8, activation="relu"),
            L.LipschitzDense(2),
        ]
    )
    x, y = normal((64, 6)), np.arange(64) % 2
    x[:, 0] += 2 * y
    before = to_numpy(model.layers[2].vectors)
    model.compile(keras.optimizers.Adam(1e-2), hkr.losses.MulticlassHKR(10, 0.3))
    history = model.fit(x, y, batch_size=16, epochs=4, verbose=0, callbacks=[hkr.callbacks.Orthonormalize()]).history
    assert history["loss"][-1] < history["loss"][0]
    assert np.abs(to_numpy(model.layers[2].vectors) - before).max() > 1e-3
    assert hkr.lipschitz_bound(model) <= 1 + 1e-5
    assert np.all(hkr.certify(model, x, verbose=0).radius >= 0)
    assert (hkr.certify(model, x, verbose=0, rigorous=True).radius > 0).any()

    plain = hkr.to_keras(model, kernels_only=True)
    assert type(plain.layers[2]) is keras.layers.Dense
    np.testing.assert_allclose(to_numpy(plain(x)), to_numpy(model(x)), atol=1e-5)
    assert (hkr.certify(plain, x, verbose=0, rigorous=True).radius > 0).any()

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[2].rank == 4
    np.testing.assert_allclose(to_numpy(loaded(x)), to_numpy(model(x)), atol=1e-6)
    assert hkr.lipschitz_bound(loaded) == hkr.lipschitz_bound(model)


def test_takes_the_place_of_dense_layers():
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((6,)), dense(8, "relu"), dense(8, "tanh"), dense(3)])
    new = hkr.to_lipschitz(model, replace={dense: L.ReflectorDense}, print_fn=None)
    assert [type(layer) for layer in new.layers] == [L.ReflectorDense, L.GroupSort, L.ReflectorDense, L.ReflectorDense]
    assert new.layers[2].activation is keras.activations.tanh
    assert hkr.lipschitz_bound(new) <= 1 + 1e-5


def test_mixed_precision_and_what_is_refused():
    layer = built(8, 2, 8, dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(layer(normal((1, 8))).dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(layer.kernel.dtype) == "float32"
    layer.vectors.assign(np.nan * np.ones((8, 2)))
    assert np.isnan(to_numpy(layer(normal((1, 8))))).all()  # and no error of a factorization
    with pytest.raises(ValueError, match="finite weights"):
        hkr.lipschitz_bound(layer)
    with pytest.raises(ValueError, match="Received: rank=2"):
        layer.enable_lora(2)
    with pytest.raises(ValueError, match="Received: rank=0"):
        L.ReflectorDense(4, rank=0)
    with pytest.raises(ValueError, match=r"at most 6.*Received: rank=7"):
        built(4, 7, 6)
    with pytest.raises(ValueError, match="Received: kernel_constraint"):
        L.ReflectorDense(4, kernel_constraint=hkr.constraints.Orthonormal())


def test_sequences_pass_through():
    layer = built(6, 2, 4)
    assert tuple(layer(normal((2, 3, 4))).shape) == (2, 3, 6)
