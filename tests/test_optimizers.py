"""The optimizer of orthonormal kernels: what it does to a matrix, and that everything else is Adam."""

import keras
import numpy as np
import pytest
from keras import ops

import hkr_keras as hkr
from hkr_keras import linalg

BACKEND = keras.backend.backend()
SHAPES = [(6, 6), (8, 3), (3, 8), (2, 5, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tangent_turns_and_does_not_stretch(shape):
    rng = np.random.default_rng(0)
    w = ops.convert_to_numpy(linalg.orthonormal_basis(ops.convert_to_tensor(rng.normal(size=shape), dtype="float32")))
    g = rng.normal(size=shape).astype("float32")
    z = ops.convert_to_numpy(linalg.tangent(ops.convert_to_tensor(w), ops.convert_to_tensor(g)))
    inner = w.swapaxes(-1, -2) @ z if shape[-2] >= shape[-1] else z @ w.swapaxes(-1, -2)
    np.testing.assert_allclose(inner, -inner.swapaxes(-1, -2), atol=1e-5)  # float32 products of entries of order 1
    normal = g - z
    assert abs((normal * z).sum()) < 1e-4 * np.linalg.norm(g) ** 2  # an orthogonal projection


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearly_orthonormal_is_near_the_polar_factor(shape):
    matrices = np.random.default_rng(1).normal(size=shape).astype("float32")
    found = ops.convert_to_numpy(linalg.polar_direction(ops.convert_to_tensor(1e-20 * matrices)))
    u, _, v = np.linalg.svd(matrices, full_matrices=False)
    values = np.linalg.svd(found, compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3
    np.testing.assert_allclose(
        u.swapaxes(-1, -2) @ found @ v.swapaxes(-1, -2) * (1 - np.eye(u.shape[-1])), 0, atol=0.02
    )
    assert not ops.convert_to_numpy(linalg.polar_direction(ops.zeros(shape))).any()


def small(optimizer, seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *(hkr.layers.OrthogonalConv2D(4, (3, 2)), hkr.layers.GroupSort(2)),
            *(hkr.layers.LipschitzConv2D(4, 3, strides=2), hkr.layers.GroupSort(2), keras.layers.Flatten()),
            hkr.layers.LipschitzDense(3, kernel_constraint=hkr.constraints.UnitNorm()),
        ]
    )
    model.compile(optimizer, hkr.losses.MarginCrossentropy(10.0, 0.1))
    return model


def task():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 192)
    x = rng.normal(0, 0.2, (192, 8, 8, 1)).astype("float32")
    x[np.arange(192), 2 * y] += 0.5
    return x, y


def test_trains_and_stays_on_the_constraint_set():
    x, y = task()
    model = small(hkr.optimizers.StiefelMuon(0.1))
    losses = model.fit(x, y, batch_size=32, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    assert (model.predict(x, verbose=0).argmax(axis=1) == y).mean() > 0.95
    head = np.linalg.norm(np.asarray(ops.convert_to_numpy(model.layers[-1].kernel)), axis=0)
    np.testing.assert_allclose(head, 1, atol=1e-5)
    body = keras.Sequential([keras.Input((8, 8, 1)), *model.layers[:-1]])
    assert hkr.lipschitz_bound(body) < 1 + 1e-4  # one projection a step, without polishing


def test_a_step_of_every_orthonormal_kernel_has_the_length_of_the_rate():
    rate = 0.1
    x, y = task()
    model = small(hkr.optimizers.StiefelMuon(rate, momentum=0.0))
    before = [np.array(ops.convert_to_numpy(v)) for v in model.trainable_variables]
    model.fit(x, y, batch_size=192, verbose=0)
    count = 0
    for old, variable in zip(before, model.trainable_variables, strict=True):
        constraint = getattr(variable, "constraint", None)
        if isinstance(constraint, hkr.constraints.Orthonormal):
            geometry = constraint.geometry
            moves = ops.convert_to_numpy(
                geometry.to_matrices(ops.convert_to_tensor(variable) - ops.convert_to_tensor(old)) * geometry.gain
            )
            norms = np.linalg.norm(moves, ord=2, axis=(-2, -1))
            assert norms.max() < 1.4 * rate
            assert norms.max() > 0.5 * rate
            count += 1
    assert count == 3


def test_other_weights_follow_adam():
    x, y = task()
    weights = []
    for optimizer in (
        hkr.optimizers.StiefelMuon(0.1, adam_ratio=0.05, beta_2=0.99, epsilon=1e-5),
        keras.optimizers.Adam(0.005, beta_2=0.99, epsilon=1e-5),
    ):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
        model.compile(optimizer, hkr.losses.MarginCrossentropy(10.0, 0.1))
        model.fit(x, y, batch_size=64, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for own, adam in zip(*weights, strict=True):
        np.testing.assert_allclose(own, adam, atol=1e-6)


def test_is_stored_with_the_model(tmp_path):
    x, y = task()
    model = hkr.models.lipschitz_mlp((8, 8, 1), 3, widths=(4,))
    model.compile(hkr.optimizers.StiefelMuon(0.05, adam_ratio=0.1, momentum=0.8), hkr.losses.MulticlassHKR())
    model.fit(x, y, epochs=1, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.optimizer.get_config() == model.optimizer.get_config()
    for one, other in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other))


def test_is_stored_before_the_first_step(tmp_path, recwarn):
    model = hkr.models.lipschitz_mlp((8,), 3, widths=(4,))
    model.compile(hkr.optimizers.StiefelMuon(0.05), hkr.losses.MulticlassHKR())
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert not [w for w in recwarn if "Skipping" in str(w.message)]
    np.testing.assert_allclose(float(ops.convert_to_numpy(again.optimizer.learning_rate)), 0.05, rtol=1e-6)
    again.fit(np.ones((4, 8), "float32"), np.arange(4) % 3, verbose=0)


def test_refuses_a_momentum_of_one():
    with pytest.raises(ValueError, match="Received: momentum=1"):
        hkr.optimizers.StiefelMuon(momentum=1.0)


def images(constraint):
    """Kernels of all kinds applied to inputs of rank 4 whose batch, height and width are unknown."""
    layers = hkr.layers
    return keras.Sequential(
        [
            keras.Input((None, None, 2)),
            layers.LipschitzDense(4, kernel_constraint=constraint),
            layers.LipschitzConv2D(4, 2, kernel_constraint=constraint),
            layers.LipschitzDepthwiseConv2D(2, depthwise_constraint=constraint),
            layers.LipschitzConv2DTranspose(3, 2, kernel_constraint=constraint),
            layers.LipschitzDense(4, kernel_constraint=constraint),
            keras.layers.GlobalAveragePooling2D(),
            layers.LipschitzDense(3, kernel_constraint=constraint),
        ]
    )


def sequences(constraint):
    layers = hkr.layers
    return keras.Sequential(
        [
            keras.Input((None, 2)),
            layers.LipschitzDense(4, kernel_constraint=constraint),
            layers.LipschitzConv1D(4, 2, groups=2, kernel_constraint=constraint),
            layers.LipschitzSeparableConv1D(4, 2, depthwise_constraint=constraint, pointwise_constraint=constraint),
            layers.LipschitzDense(5, kernel_constraint=constraint),
            keras.layers.GlobalAveragePooling1D(),
            layers.LipschitzDense(3, kernel_constraint=constraint),
        ]
    )


PAIRS = {
    "Orthonormal": lambda: hkr.optimizers.StiefelMuon(0.1),
    "UnitNorm": lambda: hkr.optimizers.StiefelMuon(0.1),
    "SpectralBall": lambda: keras.optimizers.Adam(0.1),
    "DeferredOrthonormal": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
}


@pytest.mark.many
@pytest.mark.skipif(BACKEND == "jax", reason="JAX knows every size")
@pytest.mark.parametrize("build", [sequences, images])
@pytest.mark.parametrize("constraint", PAIRS)
def test_inputs_of_rank_3_and_4_of_unknown_sizes(constraint, build):
    rng, shape = np.random.default_rng(0), (7,) if build is sequences else (6, 7)
    model = build(getattr(hkr.constraints, constraint)())
    model.compile(PAIRS[constraint](), hkr.losses.MulticlassHKR())
    before = [np.array(ops.convert_to_numpy(variable)) for variable in model.trainable_variables]

    def batches():  # sizes that Keras cannot know
        for count in (3, 4):
            yield rng.normal(size=(count, *shape, 2)).astype("float32"), np.arange(count) % 3

    callbacks = [hkr.callbacks.Orthonormalize()]
    history = model.fit(batches(), shuffle=False, steps_per_epoch=2, verbose=0, callbacks=callbacks)
    assert np.isfinite(history.history["loss"]).all()
    moved = [
        old
        for old, new in zip(before, model.trainable_variables, strict=True)
        if (old != ops.convert_to_numpy(new)).any()
    ]
    assert len(moved) > 0.8 * len(before)
    for layer, kernel, geometry in hkr.geometry.model_kernels(model):
        if constraint != "UnitNorm":
            matrices = np.asarray(ops.convert_to_numpy(geometry.to_matrices(ops.convert_to_tensor(kernel))), "float64")
            assert geometry.gain * np.linalg.norm(matrices, 2, axis=(-2, -1)).max() <= 1 + 1e-6, layer.name


@pytest.mark.parametrize("rate", [1e-3, 0.1, 10.0], ids=str)
def test_wide_kernels_turn_in_blocks_and_stay_on_the_constraint_set(rate):
    keras.utils.set_random_seed(0)
    dense = hkr.layers.LipschitzDense
    layers = [dense(12), hkr.layers.GroupSort(2), dense(14), hkr.layers.GroupSort(2), dense(3)]
    model = keras.Sequential([keras.Input((20,)), *layers])
    model.compile(hkr.optimizers.StiefelMuon(rate, block=4), hkr.losses.MarginCrossentropy(10.0, 0.1))
    rng = np.random.default_rng(0)
    y = np.arange(96) % 3
    x = rng.normal(0, 0.2, (96, 20)).astype("float32")
    x[np.arange(96), 5 * y] += 1.0
    kernels = [layer.kernel for layer in layers[::2]]
    constraint, before = kernels[1].constraint, [np.array(ops.convert_to_numpy(kernel)) for kernel in kernels]
    history = model.fit(x, y, batch_size=32, epochs=9, verbose=0).history["loss"]
    assert kernels[1].constraint is constraint
    for old, kernel in zip(before, kernels, strict=True):
        new = np.asarray(ops.convert_to_numpy(kernel), "float64")
        values = np.linalg.svd(new, compute_uv=False)
        assert values.max() <= 1 + 1e-5
        assert np.abs(new - old).max() > 0.1 * min(rate, 0.1)
        if rate < 1 and kernel is not kernels[-1]:  # which is projected once a step and not exactly
            assert values.min() > 1 - 1e-3
    if rate == 0.1:
        assert history[-1] < 0.5 * history[0]


def test_a_block_is_every_way_to_turn_when_it_has_all_rows():
    rng = np.random.default_rng(0)
    w = linalg.orthonormal_basis(ops.convert_to_tensor(rng.normal(size=(6, 4)), dtype="float32"))
    direction = ops.convert_to_tensor(rng.normal(size=(6, 4)), dtype="float32")
    moved = ops.convert_to_numpy(linalg.turned(w, direction, 0.01, 6) - w)
    assert (moved * ops.convert_to_numpy(linalg.tangent(w, direction))).sum() < 0  # against the gradient
    left = ops.convert_to_numpy(linalg.turned(w, direction, 0.01, 4) - w)[4:]
    assert not left.any()


def test_refuses_a_block_of_one():
    with pytest.raises(ValueError, match="Received: block=1"):
        hkr.optimizers.StiefelMuon(block=1)
