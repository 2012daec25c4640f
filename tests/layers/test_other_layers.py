import itertools
import math

import keras
import numpy as np
import pytest
from helpers import BACKEND, adam_steps, check_layer, flat, gradient, largest_ratio, normal, operator_norm, to_numpy
from keras import ops

import hkr_keras as hkr

L = hkr.layers
LIPSCHITZ = 1 + 1e-5  # float32 outputs of random pairs

# ---- activations ----------------------------------------------------------------------------------------


def sorted_groups(x, n, axis):
    moved = np.moveaxis(x, axis, -1)
    groups = np.sort(moved.reshape(*moved.shape[:-1], -1, n), axis=-1)
    return np.moveaxis(groups.reshape(moved.shape), -1, axis)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("channels", [12, 120])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_group_sort(rank, channels, n, axis):
    shape = [3] * rank
    shape[axis] = channels
    x = normal(shape)
    layer = L.GroupSort(n, axis=axis)
    expected = sorted_groups(x, n, axis)
    np.testing.assert_allclose(to_numpy(layer(x)), expected, atol=1e-6)
    assert layer.compute_output_shape(x.shape) == x.shape
    model = keras.Sequential([keras.Input(shape[1:]), layer])
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 64), (5, 66), (5, 72), (2, 3, 96), (2, 3, 3, 128)])
def test_group_sort_in_all_its_forms(shape):
    x = normal(shape, scale=100.0)
    np.testing.assert_allclose(to_numpy(L.GroupSort(2)(x)), sorted_groups(x, 2, -1), rtol=1e-6, atol=1e-4)
    model = keras.Sequential([keras.Input(shape[1:]), L.GroupSort(2)])  # the batch is unknown to the compiler
    np.testing.assert_allclose(model.predict(x, verbose=0), sorted_groups(x, 2, -1), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("n", [1, 0, -2, 2.0, None])
def test_bad_group_size(n):
    with pytest.raises(ValueError, match="Received: n="):
        L.GroupSort(n)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (L.GroupSort(2), (None, 5)),
        (L.GroupSort(3), (None, 4, 4)),
        (L.GroupSort(2, axis=1), (None, 5, 4)),
        (L.GroupSort(2), (None, 4, None)),
        (L.MaxMin(), (None, 3)),
        (L.Householder(), (None, 7)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_channels_that_do_not_divide_are_refused(layer, shape):
    with pytest.raises(ValueError, match=r"Received: input_shape=\("):
        layer.build(shape)


def test_max_min_and_full_sort():
    x = normal((6, 4, 10))
    first, second = np.split(x, 2, axis=-1)
    expected = np.concatenate([np.maximum(first, second), np.minimum(first, second)], axis=-1)
    largest = 3 * 2.0**-24 * np.hypot(first, second).max()  # what a difference and a sum round
    np.testing.assert_allclose(to_numpy(L.MaxMin()(x), "float32"), expected, rtol=0, atol=largest)
    assert np.array_equal(to_numpy(L.FullSort()(x), "float32"), np.sort(x, axis=-1))
    assert np.array_equal(to_numpy(L.FullSort(axis=1)(x), "float32"), np.sort(x, axis=1))
    np.testing.assert_allclose(
        to_numpy(L.MaxMin(axis=1)(x[:, :, 0]), "float32"),
        np.sort(x[:, :, 0].reshape(6, 2, 2), axis=1)[:, ::-1].reshape(6, 4),
        rtol=0,
        atol=largest,
    )


ACTIVATIONS = [
    (lambda axis: L.GroupSort(2, axis=axis)),
    (lambda axis: L.GroupSort(4, axis=axis)),
    (lambda axis: L.MaxMin(axis=axis)),
    (lambda axis: L.FullSort(axis=axis)),
    (lambda axis: L.Householder(axis=axis)),
]


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("make", ACTIVATIONS)
def test_activations_keep_norms_of_inputs_and_gradients(make, axis):
    shape = (8, 3) if axis == 1 else (3, 8)
    layer = make(axis)
    layer.build((None, *shape))
    if layer.weights:
        layer.set_weights([normal(layer.weights[0].shape, scale=3.0)])
    check_layer(layer, shape)
    x = normal((16, *shape))
    np.testing.assert_allclose(
        np.linalg.norm(flat(to_numpy(layer(x))), axis=1), np.linalg.norm(flat(x), axis=1), rtol=1e-5
    )
    direction = normal(x.shape, seed=7)
    pulled = gradient(lambda a: layer(a) * ops.convert_to_tensor(direction), x)
    np.testing.assert_allclose(np.linalg.norm(flat(pulled), axis=1), np.linalg.norm(flat(direction), axis=1), rtol=1e-5)


def test_householder_starts_as_max_min():
    x = normal((10, 6))
    np.testing.assert_allclose(to_numpy(L.Householder()(x)), to_numpy(L.MaxMin()(x)), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_householder_is_continuous_for_any_angle(seed):
    angle = np.random.default_rng(seed).uniform(-10, 10)
    layer = L.Householder()
    layer.build((None, 2))
    layer.set_weights([np.array([angle], "float32")])
    along = np.array([math.cos(angle / 2), math.sin(angle / 2)])
    across = np.array([-along[1], along[0]])
    radii = np.linspace(-2, 2, 41)[:, None]
    left, right = (np.float32(radii * along + side * 1e-3 * across) for side in (-1, 1))
    assert np.linalg.norm(to_numpy(layer(left)) - to_numpy(layer(right)), axis=1).max() <= 2e-3 * 1.01
    x, z = normal((200, 2), seed), normal((200, 2), seed + 100)
    assert largest_ratio(layer, x, z) <= LIPSCHITZ


# ---- pooling --------------------------------------------------------------------------------------------


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
]
KINDS = {
    "average": (L.ScaledAveragePooling1D, L.ScaledAveragePooling2D),
    "l2": (L.L2NormPooling1D, L.L2NormPooling2D),
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


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (L.L2NormPooling1D(3), (6, 2)),
        (L.L2NormPooling2D(2), (4, 6, 3)),
        (L.L2NormPooling2D(2, padding="same"), (5, 3, 3)),
        (L.GlobalL2NormPooling1D(), (5, 2)),
        (L.GlobalL2NormPooling2D(), (3, 4, 2)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_l2_pooling_keeps_norms_and_has_a_finite_gradient_at_zero(layer, shape):
    x = normal((8, *shape))
    np.testing.assert_allclose(
        np.linalg.norm(flat(to_numpy(layer(x))), axis=1), np.linalg.norm(flat(x), axis=1), rtol=1e-5
    )
    assert np.isfinite(gradient(layer, np.zeros((2, *shape), "float32"))).all()


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


# ---- normalization and merging --------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "center"), [(-1, True), (1, True), ((1, 2), True), (-1, False)])
def test_layer_centering(axis, center):
    layer = L.LayerCentering(axis=axis, center=center)
    layer.build((None, 4, 3))
    if center:
        layer.set_weights([normal(layer.bias.shape)])
    check_layer(layer, (4, 3))
    x = normal((2, 4, 3))
    expected = x - x.mean(axis=axis, keepdims=True) + (to_numpy(layer.bias) if center else 0)
    np.testing.assert_allclose(to_numpy(layer(x)), expected, atol=1e-6)
    assert operator_norm(layer, (4, 3)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("axis", "shape"), [(0, (None, 3)), (-1, (None, None)), ((0, 1), (None, 4, 3))])
def test_layer_centering_refuses_axes_without_a_size(axis, shape):
    with pytest.raises(ValueError, match="Received: axis="):
        L.LayerCentering(axis=axis).build(shape)


@pytest.mark.parametrize("axis", [-1, 1])
def test_batch_centering(axis):
    layer = L.BatchCentering(axis=axis, momentum=0.75)
    shape = (4, 3)
    layer.build((None, *shape))
    x = normal((8, *shape)) + 2
    axes = (0, 1) if axis == -1 else (0, 2)
    mean = x.mean(axis=axes, keepdims=True)
    np.testing.assert_allclose(to_numpy(layer(x)), x, atol=1e-6)  # at first the moving mean is 0
    np.testing.assert_allclose(to_numpy(layer(x, training=True)), x - mean, atol=1e-5)
    np.testing.assert_allclose(to_numpy(layer.moving_mean), 0.25 * mean.ravel(), atol=1e-5)
    np.testing.assert_allclose(to_numpy(layer(x)), x - 0.25 * mean, atol=1e-5)
    check_layer(layer, shape)

    layer.trainable = False
    before = to_numpy(layer.moving_mean)
    np.testing.assert_allclose(to_numpy(layer(x, training=True)), x - 0.25 * mean, atol=1e-5)
    assert np.array_equal(to_numpy(layer.moving_mean), before)


def test_batch_centering_refuses_bad_arguments():
    for momentum in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="Received: momentum="):
            L.BatchCentering(momentum=momentum)
    with pytest.raises(ValueError, match="Received: axis=-1"):
        L.BatchCentering().build((None, None))


def test_batch_centering_has_no_bias_when_told_so():
    layer = L.BatchCentering(center=False)
    layer.build((None, 3))
    assert [weight.name for weight in layer.weights] == ["moving_mean"]


def test_residual_is_a_convex_combination():
    layer = L.LipschitzResidual()
    x, z = normal((4, 3)), normal((4, 3), seed=1)
    np.testing.assert_allclose(to_numpy(layer([x, z])), (x + z) / 2, atol=1e-6)
    adam_steps(layer, 10.0)
    weights = np.exp(to_numpy(layer.mixing_logits))
    weights /= weights.sum()
    np.testing.assert_allclose(to_numpy(layer([x, z])), weights[0] * x + weights[1] * z, atol=1e-5)
    assert largest_ratio(lambda a: layer([a, -a]), x, z) <= LIPSCHITZ
    assert layer.compute_output_shape([x.shape, z.shape]) == x.shape


@pytest.mark.parametrize("shapes", [[(None, 3)], [(None, 3), (None, 1)], [(None, 3), (None, 3), (None, 4)], (None, 3)])
def test_residual_refuses_other_inputs(shapes):
    with pytest.raises(ValueError, match="Received: input_shape="):
        L.LipschitzResidual().build(shapes)


@pytest.mark.parametrize("k", [2.5, -3, 0.125])
def test_scale(k):
    layer = check_layer(L.Scale(k), (4, 3), constant=abs(k))
    x = normal((2, 4, 3))
    np.testing.assert_allclose(to_numpy(layer(x)), k * x, rtol=1e-6)


@pytest.mark.parametrize("k", [0, 0.0, float("inf"), float("nan"), "2", None, 1j])
def test_bad_scale(k):
    with pytest.raises(ValueError, match="Received: k="):
        L.Scale(k)


# ---- all of them ----------------------------------------------------------------------------------------

SEQUENCES = [
    # layers that take (4, 4, 4)
    *(lambda: L.GroupSort(2), lambda: L.GroupSort(4), L.MaxMin, L.FullSort),
    *(L.Householder, lambda: L.ScaledAveragePooling2D(2), lambda: L.L2NormPooling2D(3, 1, "same")),
    *(L.ScaledGlobalAveragePooling2D, L.GlobalL2NormPooling2D),
    *(lambda: L.InvertibleDownsampling2D(2), lambda: L.InvertibleUpsampling2D(2)),
    *(L.LayerCentering, L.BatchCentering, lambda: L.Scale(2.0)),
]


@pytest.mark.parametrize("make", SEQUENCES)
def test_dynamic_sizes(make):
    layer = make()
    model = keras.Sequential([keras.Input((None, None, 4)), layer])
    for size in (4, 8):
        x = normal((2, size, size, 4))
        outputs = model.predict(x, verbose=0)
        np.testing.assert_allclose(outputs, to_numpy(layer(x)), atol=1e-5)
        assert all(known in (None, n) for known, n in zip(model.output_shape, outputs.shape, strict=True))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("make", [*SEQUENCES, lambda: L.L2NormPooling2D(2, padding="same")])
def test_mixed_precision(make, policy):
    layer = make()
    half = type(layer).from_config({**layer.get_config(), "dtype": policy})
    x = normal((2, 4, 4, 4))
    outputs = half(x)
    assert keras.backend.standardize_dtype(outputs.dtype) == policy[6:]
    assert all(keras.backend.standardize_dtype(weight.dtype) == "float32" for weight in half.weights)
    np.testing.assert_allclose(to_numpy(outputs), to_numpy(layer(x)), atol=0.1)


def test_mixed_precision_of_the_residual():
    x = normal((2, 4))
    outputs = L.LipschitzResidual(dtype="mixed_bfloat16")([x, x])
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"


def test_half_precision_l2_pooling_does_not_overflow():
    x = ops.cast(ops.full((1, 2, 2, 1), 300.0), "float16")
    assert to_numpy(L.L2NormPooling2D(2, dtype="float16")(x)).item() == 600.0
    assert to_numpy(L.GlobalL2NormPooling2D(dtype="float16")(x)).item() == 600.0


def test_a_model_with_one_of_each_comes_back_from_its_file(tmp_path):
    image = keras.Input((8, 8, 4))
    x = image
    for make in (*SEQUENCES[:5], SEQUENCES[6], *SEQUENCES[9:14]):
        x = make()(x)
    x = L.LipschitzResidual()([x, image])
    x = L.ScaledAveragePooling2D(2)(x)
    series = keras.layers.Reshape((16, 4))(x)
    outputs = [
        *(L.ScaledGlobalAveragePooling2D()(x), L.GlobalL2NormPooling2D()(x)),
        *(L.ScaledAveragePooling1D(2)(series), L.L2NormPooling1D(2)(series)),
        *(L.ScaledGlobalAveragePooling1D()(series), L.GlobalL2NormPooling1D()(series)),
    ]
    model = keras.Model(image, outputs)
    names = {type(layer).__name__ for layer in model.layers}
    expected = {
        name
        for name in L.__all__
        if not name.startswith(("LipschitzConv", "LipschitzD", "LipschitzS", "Orthogonal", "AOL", "SLL"))
    }
    assert expected - {"LipschitzLayer"} <= names
    for i, variable in enumerate(model.weights):
        variable.assign(normal(variable.shape, seed=i))
    model.save(tmp_path / "model.keras")
    copy = keras.models.load_model(tmp_path / "model.keras")
    data = normal((3, 8, 8, 4))
    for old, new in zip(model(data), copy(data), strict=True):
        assert np.array_equal(to_numpy(old), to_numpy(new))


@pytest.mark.parametrize("make", SEQUENCES)
def test_layers_train_inside_fit(make):
    model = keras.Sequential([keras.Input((4, 4, 4)), make(), keras.layers.Flatten(), L.LipschitzDense(1)])
    model.compile("sgd", loss="mse", jit_compile=BACKEND == "jax")
    history = model.fit(normal((8, 4, 4, 4)), np.ones((8, 1), "float32"), verbose=0)
    assert np.isfinite(history.history["loss"]).all()
