"""Pooling against windows taken with NumPy, with the exact operator norm where there is one."""

import itertools
import math

import cases
import keras
import numpy as np
import pytest
from helpers import check_layer, flat, gradient, largest_ratio, normal, operator_norm, to_numpy
from keras import ops

import hkr_keras as hkr

L = hkr.layers
LIPSCHITZ = 1 + 1e-5  # float32 outputs of random pairs


def windows(x, pool, strides, padding):
    """Cells of every window of channels-last data, zeros outside: `(batch, *outputs, cells, channels)`."""
    pads, outputs = [(0, 0)], []
    for size, k, s in zip(x.shape[1:-1], pool, strides, strict=True):
        count = -(-size // s) if padding == "same" else (size - k) // s + 1
        total = max(0, (count - 1) * s + k - size) if padding == "same" else 0
        pads.append((total // 2, total - total // 2))
        outputs.append(count)
    padded = np.pad(x.astype("float64"), [*pads, (0, 0)])
    found = [
        padded[(slice(None), *(slice(i * s, i * s + k) for i, k, s in zip(index, pool, strides, strict=True)))]
        for index in itertools.product(*map(range, outputs))
    ]
    cells = [window.reshape(len(x), -1, x.shape[-1]) for window in found]
    return np.stack(cells, axis=1).reshape(len(x), *outputs, -1, x.shape[-1])


POOLS = [
    # pool size, strides, padding, spatial size
    ((2,), None, "valid", (6,)),
    ((3,), (1,), "same", (5,)),
    ((3,), (2,), "same", (7,)),
    ((2,), (3,), "valid", (8,)),
    ((2, 2), None, "valid", (4, 6)),
    ((2, 2), None, "same", (5, 7)),
    ((3, 3), (1, 1), "same", (4, 4)),
    ((3, 3), (2, 2), "valid", (7, 7)),
    ((3, 2), (2, 2), "same", (5, 5)),
    ((2, 3), None, "same", (5, 5)),
    ((3, 3), None, "valid", (7, 8)),
    ((2, 2, 2), None, "valid", (4, 2, 3)),
    ((2, 3, 2), (1, 2, 2), "same", (3, 4, 5)),
]
KINDS = {
    "average": (L.ScaledAveragePooling1D, L.ScaledAveragePooling2D, L.ScaledAveragePooling3D),
    "l2": (L.L2NormPooling1D, L.L2NormPooling2D, L.L2NormPooling3D),
}


@pytest.mark.many
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pool", "strides", "padding", "size"), POOLS)
def test_pooling(kind, pool, strides, padding, size):
    layer = KINDS[kind][len(pool) - 1](pool, strides=strides, padding=padding)
    shape = (*size, 2)
    check_layer(layer, shape)
    x = normal((3, *shape))
    cells = windows(x, pool, strides or pool, padding)
    overlap = math.prod(-(-k // s) for k, s in zip(pool, strides or pool, strict=True))
    sums = cells.sum(axis=-2) / math.sqrt(math.prod(pool)) if kind == "average" else np.sqrt((cells**2).sum(axis=-2))
    np.testing.assert_allclose(to_numpy(layer(x)), sums / math.sqrt(overlap), atol=1e-5)

    if kind == "average":
        assert operator_norm(layer, shape) <= 1 + 1e-6
    else:
        spikes = np.eye(math.prod(shape), dtype="float32").reshape(-1, *shape)
        assert largest_ratio(layer, 0 * spikes, spikes) <= LIPSCHITZ
        assert largest_ratio(layer, x, x + 1e-2 * np.sign(x)) <= 1 + 1e-4
        everywhere = normal((64, *shape), seed=5)
        assert largest_ratio(layer, np.zeros_like(everywhere), everywhere) <= LIPSCHITZ
    assert hkr.lipschitz_bound(layer) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_of_inputs_of_unknown_size(kind):
    layer = KINDS[kind][1]((2, 3), strides=(1, 2), padding="same")
    inputs = keras.Input((None, None, 2))
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, None, None, 2)
    for size in ((5, 4), (1, 7)):
        x = normal((3, *size, 2))
        np.testing.assert_allclose(model.predict(x, verbose=0), to_numpy(layer(x)), atol=1e-6)
        assert layer(x).shape == (3, size[0], -(-size[1] // 2), 2)


@pytest.mark.many
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: L.L2NormPooling1D(3), (6, 2)),
        (lambda: L.L2NormPooling2D(2), (4, 6, 3)),
        (lambda: L.L2NormPooling2D(2, padding="same"), (5, 3, 3)),
        (L.GlobalL2NormPooling1D, (5, 2)),
        (L.GlobalL2NormPooling2D, (3, 4, 2)),
    ],
    ids=cases.name,
)
def test_l2_pooling_keeps_norms_and_has_a_finite_gradient_at_zero(make, shape):
    layer = make()
    x = normal((8, *shape))
    np.testing.assert_allclose(
        np.linalg.norm(flat(to_numpy(layer(x))), axis=1), np.linalg.norm(flat(x), axis=1), rtol=1e-5
    )
    assert np.isfinite(gradient(layer, np.zeros((2, *shape), "float32"))).all()


TILED = [
    (L.L2NormPooling1D, 3, (6, 2)),
    (L.L2NormPooling2D, (2, 3), (4, 6, 3)),
    (L.L2NormPooling3D, 2, (2, 4, 2, 1)),
]


@pytest.mark.once
@pytest.mark.parametrize(("cls", "pool", "shape"), TILED)
def test_norms_of_tiles_have_the_gradient_of_norms_of_windows(cls, pool, shape, monkeypatch):
    x, layer = normal((2, *shape)), cls(pool)
    x[0] = 0.0
    fast = to_numpy(layer(x)), gradient(lambda a: keras.ops.square(layer(a)) + layer(a), x)
    monkeypatch.setattr("hkr_keras.layers.pooling.tiled_norm", lambda *arguments: None)
    slow = to_numpy(layer(x)), gradient(lambda a: keras.ops.square(layer(a)) + layer(a), x)
    for one, other in zip(fast, slow, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_global_pooling(rank, keepdims):
    shape = (5, 4, 3)[-rank - 1 :]
    axes = tuple(range(1, rank + 1))
    x = normal((4, *shape))
    average = (L.ScaledGlobalAveragePooling1D, L.ScaledGlobalAveragePooling2D)[rank - 1](keepdims=keepdims)
    norm = (L.GlobalL2NormPooling1D, L.GlobalL2NormPooling2D)[rank - 1](keepdims=keepdims)
    check_layer(average, shape)
    check_layer(norm, shape)
    cells = math.prod(shape[:-1])
    np.testing.assert_allclose(to_numpy(average(x)), x.sum(axis=axes, keepdims=keepdims) / math.sqrt(cells), atol=1e-5)
    np.testing.assert_allclose(to_numpy(norm(x)), np.sqrt((x**2).sum(axis=axes, keepdims=keepdims)), atol=1e-5)
    assert operator_norm(average, shape) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("cls", [L.ScaledGlobalAveragePooling1D, L.GlobalL2NormPooling1D])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_masked_steps_count_as_zeros(cls, data_format):
    x = normal((3, 5, 2))
    mask = np.arange(5) < np.array([[5], [3], [0]])
    layer = cls(data_format=data_format)
    arrange = (lambda a: a) if data_format == "channels_last" else (lambda a: a.swapaxes(1, 2))
    masked = to_numpy(layer(arrange(x), mask=mask))
    np.testing.assert_allclose(masked, to_numpy(layer(arrange(x * mask[..., None]))), atol=1e-6)


@pytest.mark.many
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda f: L.ScaledAveragePooling1D(2, data_format=f), (6, 2)),
        (lambda f: L.L2NormPooling1D(3, strides=2, padding="same", data_format=f), (7, 2)),
        (lambda f: L.ScaledAveragePooling2D(3, strides=2, padding="same", data_format=f), (5, 7, 2)),
        (lambda f: L.L2NormPooling2D(2, data_format=f), (4, 6, 2)),
        (lambda f: L.ScaledGlobalAveragePooling2D(data_format=f), (4, 3, 2)),
        (lambda f: L.GlobalL2NormPooling1D(data_format=f), (4, 2)),
        (lambda f: L.InvertibleDownsampling2D((2, 3), data_format=f), (4, 6, 2)),
        (lambda f: L.InvertibleUpsampling2D((2, 3), data_format=f), (2, 2, 12)),
    ],
)
def test_channels_first_is_the_transpose_of_channels_last(make, shape):
    x = normal((2, *shape))
    last = to_numpy(make("channels_last")(x))
    layer = make("channels_first")
    first = to_numpy(layer(np.ascontiguousarray(np.moveaxis(x, -1, 1))))
    np.testing.assert_allclose(first, np.moveaxis(last, -1, 1), atol=1e-6)
    assert layer.compute_output_shape(np.moveaxis(x, -1, 1).shape) == first.shape


@pytest.mark.parametrize("pool_size", [2, (2, 3), (1, 1), (3, 1)])
def test_invertible_samplings_are_inverse_to_each_other(pool_size):
    x = normal((2, 6, 6, 3))
    down, up = L.InvertibleDownsampling2D(pool_size), L.InvertibleUpsampling2D(pool_size)
    check_layer(down, (6, 6, 3))
    y = to_numpy(down(x), "float32")
    assert np.array_equal(to_numpy(up(y), "float32"), x)
    p, q = down.pool_size
    assert y[1, 0, 0, ((p - 1) * q + q - 1) * 3 + 2] == x[1, p - 1, q - 1, 2]  # the documented channel index
    assert operator_norm(down, (6, 6, 1)) == operator_norm(up, (2, 2, p * q)) == 1.0


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (lambda: L.InvertibleDownsampling2D(2), (5, 4, 1), "height=5"),
        (lambda: L.InvertibleDownsampling2D((2, 3)), (4, 4, 1), "width=4"),
        (lambda: L.InvertibleUpsampling2D(2), (2, 2, 6), "channels=6"),
        (lambda: L.InvertibleDownsampling2D(0), (4, 4, 1), "pool_size=0"),
        (lambda: L.InvertibleUpsampling2D((2, 2, 2)), (2, 2, 8), "pool_size="),
    ],
)
@pytest.mark.parametrize("eager", [True, False])
def test_bad_sizes_are_refused(make, shape, message, eager):
    with pytest.raises(ValueError, match=f"Received: .*{message}"):
        make()(normal((1, *shape)) if eager else keras.Input(shape))


def test_half_precision_l2_pooling_does_not_overflow():
    x = ops.cast(ops.full((1, 2, 2, 1), 300.0), "float16")
    assert to_numpy(L.L2NormPooling2D(2, dtype="float16")(x)).item() == 600.0
    assert to_numpy(L.GlobalL2NormPooling2D(dtype="float16")(x)).item() == 600.0
