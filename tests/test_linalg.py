import numpy as np
import pytest
from helpers import BACKEND, largest_singular_value, normal, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from hkr_keras import linalg

FEASIBLE = 1 + 1e-6
SHAPES = [(5, 3), (3, 5), (4, 4), (2, 6, 3), (2, 3, 6), (7, 1), (1, 7)]

# JAX compiles anew for each shape.
table = settings(deadline=None, max_examples=30 if BACKEND != "jax" else 8, derandomize=True)
sides = st.integers(1, 8)
exponents = st.integers(-30, 30)
seeds = st.integers(0, 10_000)


def matrices(rows, columns, exponent, seed):
    """Random matrices of a given scale, some of them of low rank."""
    a = np.random.default_rng(seed).standard_normal((2, rows, columns))
    a[1, :, 1:] = a[1, :, :1]
    return (a * 10.0**exponent).astype("float32")


def orthonormal(shape, seed=0):
    u, _, v = np.linalg.svd(normal(shape, seed).astype("float64"), full_matrices=False)
    return (u @ v).astype("float32")


def singular_values(tensor):
    return np.linalg.svd(to_numpy(tensor), compute_uv=False)


@table
@given(sides, sides, exponents, st.integers(1, 4), seeds)
def test_newton_schulz_is_feasible(rows, columns, exponent, steps, seed):
    result = to_numpy(linalg.newton_schulz(matrices(rows, columns, exponent, seed), steps))
    assert np.isfinite(result).all()
    assert largest_singular_value(result) <= FEASIBLE


@pytest.mark.parametrize("norm", [1.0, 1.2, 1.22, 1.23, 1.5, 3**0.5, 1.8, 2.0, 5.0, 1e4])
def test_newton_schulz_is_feasible_for_one_large_singular_value(norm):
    w = orthonormal((6, 4)) @ np.diag([norm, 1.0, 0.5, 0.0]).astype("float32")
    assert largest_singular_value(to_numpy(linalg.newton_schulz(w))) <= FEASIBLE


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_keeps_orthonormal_matrices_and_is_idempotent(shape):
    w = orthonormal(shape)
    np.testing.assert_allclose(to_numpy(linalg.newton_schulz(w, 3)), w, atol=1e-6)
    once = linalg.newton_schulz(normal(shape), 40)
    np.testing.assert_allclose(to_numpy(linalg.newton_schulz(once)), to_numpy(once), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_converges_to_the_polar_factor(shape):
    np.testing.assert_allclose(to_numpy(linalg.newton_schulz(normal(shape), 40)), orthonormal(shape), atol=3e-6)


def test_newton_schulz_turns_a_deviation_into_its_square():
    deviation = 1e-2
    result = singular_values(linalg.newton_schulz(orthonormal((5, 3)) * np.float32(1 - deviation)))
    np.testing.assert_allclose(1 - result, 1.5 * deviation**2, rtol=0.05)


@pytest.mark.parametrize("stretch", [1.2, 1.7, 3.0, 100.0])
def test_newton_schulz_keeps_the_direction_that_a_step_has_stretched(stretch):
    u = orthonormal((8, 1))
    result = to_numpy(linalg.newton_schulz((np.eye(8) + (stretch - 1) * u @ u.T).astype("float32")))
    assert float((u.T @ result @ u)[0, 0]) > 0.9


@pytest.mark.parametrize("function", [linalg.newton_schulz, linalg.spectral_ball, linalg.unit_norm])
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_stays_zero_and_nan_stays_nan(function, shape):
    assert not to_numpy(function(np.zeros(shape, "float32"))).any()
    assert np.isnan(to_numpy(function(np.full(shape, np.nan, "float32")))).all()


@pytest.mark.parametrize("function", [linalg.newton_schulz, linalg.orthonormal_basis, linalg.spectral_ball])
def test_matrices_of_a_batch_do_not_mix(function):
    batch = normal((3, 5, 4)) * np.array([1e-3, 1.0, 1e3], "float32")[:, None, None]
    single = [to_numpy(function(w)) for w in batch]
    np.testing.assert_allclose(to_numpy(function(batch)), single, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 1), (1, 6)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_newton_schulz_of_a_vector_is_its_direction(shape, scale):
    v = normal(shape)
    result = to_numpy(linalg.newton_schulz(v * np.float32(scale)))
    np.testing.assert_allclose(result, v / np.linalg.norm(v), atol=1e-6)


@pytest.mark.parametrize("axis", [-2, -1, 0, (-2, -1)])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_unit_norm(axis, scale):
    w = normal((4, 3))
    result = to_numpy(linalg.unit_norm(w * np.float32(scale), axis))
    np.testing.assert_allclose(result, w / np.linalg.norm(w, axis=axis, keepdims=True), atol=1e-6)


def test_unit_norm_leaves_a_zero_vector_beside_others():
    result = to_numpy(linalg.unit_norm(np.array([[0.0, 3.0], [0.0, 4.0]], "float32")))
    np.testing.assert_allclose(result, [[0.0, 0.6], [0.0, 0.8]], atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "rank 1", "zero"])
def test_orthonormal_basis(shape, kind):
    w = {"random": normal(shape), "rank 1": np.ones(shape, "float32"), "zero": np.zeros(shape, "float32")}[kind]
    basis = to_numpy(linalg.orthonormal_basis(w))
    if kind != "zero" or min(shape[-2:]) > 1:
        np.testing.assert_allclose(singular_values(basis), 1.0, atol=1e-6)
    if kind == "random":  # the same span
        q = basis if shape[-2] >= shape[-1] else np.swapaxes(basis, -1, -2)
        a = w if shape[-2] >= shape[-1] else np.swapaxes(w, -1, -2)
        np.testing.assert_allclose(q @ (np.swapaxes(q, -1, -2) @ a), a, atol=1e-5)


@table
@given(sides, sides, exponents, seeds)
def test_spectral_norm_bound(rows, columns, exponent, seed):
    w = matrices(rows, columns, exponent, seed)
    bound = to_numpy(linalg.spectral_norm_bound(w))[:, 0, 0]
    norm = np.linalg.svd(w.astype("float64"), compute_uv=False).max(axis=-1)
    assert (bound >= norm).all()
    assert (bound <= norm * min(rows, columns) ** (1 / 2**8) * (1 + 3e-5)).all()


def test_spectral_norm_bound_slack_is_largest_for_orthonormal_matrices():
    bound = float(to_numpy(linalg.spectral_norm_bound(np.eye(512, dtype="float32"))).item())
    assert 1.02 < bound < 1.025
    coarse = float(to_numpy(linalg.spectral_norm_bound(np.eye(16, dtype="float32"), squarings=0)).item())
    assert coarse == pytest.approx(2.0, rel=1e-4)


@table
@given(sides, sides, exponents, seeds)
def test_spectral_ball(rows, columns, exponent, seed):
    w = matrices(rows, columns, exponent, seed)
    once = to_numpy(linalg.spectral_ball(w), "float32")
    assert largest_singular_value(once) <= FEASIBLE
    np.testing.assert_allclose(to_numpy(linalg.spectral_ball(once)), once, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("shape", SHAPES)
def test_spectral_ball_is_the_identity_inside(shape):
    w = 0.9 * orthonormal(shape)
    assert np.array_equal(to_numpy(linalg.spectral_ball(w), "float32"), w)
    assert largest_singular_value(to_numpy(linalg.spectral_ball(3 * w))) > 0.98


@pytest.mark.parametrize(
    "function", [linalg.newton_schulz, linalg.unit_norm, linalg.orthonormal_basis, linalg.spectral_ball]
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_kept(function, dtype):
    w = ops.cast(ops.convert_to_tensor(normal((4, 3))), dtype)
    result = function(w)
    assert ops.dtype(result) == dtype if isinstance(ops.dtype(result), str) else dtype in str(ops.dtype(result))
    assert tuple(result.shape) == (4, 3)


def compiled(function, w):
    """The result where there are no values at hand, in a function that the backend compiles."""
    if BACKEND == "torch":  # nothing is traced: the same call
        return function(ops.convert_to_tensor(w))
    if BACKEND == "jax":
        import jax

        return jax.jit(function)(w)
    import tensorflow as tf

    return tf.function(function)(tf.constant(w))


@pytest.mark.parametrize(
    ("function", "scale"), [(linalg.orthonormal_basis, 1.0), (linalg.newton_schulz, 0.3), (linalg.newton_schulz, 30.0)]
)
def test_the_same_while_it_is_traced(function, scale):
    w = normal((2, 7, 4), seed=3, scale=scale)
    np.testing.assert_allclose(to_numpy(compiled(function, w)), to_numpy(function(w)), atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_newton_schulz_compiles_nothing_with_values_at_hand(monkeypatch, scale):
    monkeypatch.delattr(linalg.ops, "cond")  # whose branches JAX compiles anew in every call
    assert largest_singular_value(to_numpy(linalg.newton_schulz(normal((7, 4), scale=scale)))) <= 1 + 1e-6
