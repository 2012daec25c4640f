import json
import math

import cases
import keras
import numpy as np
import pytest
from cases import doubling, graph
from helpers import adam_steps, double_precision, largest_ratio, normal, operator_norm, to_numpy

import hkr_keras as hkr
from hkr_keras import bounds
from hkr_keras.certification import singular_values
from hkr_keras.certification.rules.activations import activation_bound
from hkr_keras.geometry import Geometry

K, L = keras.layers, hkr.layers

# ---- activations ----------------------------------------------------------------------------------------

POINTWISE = [f for f in bounds.ACTIVATION_BOUNDS if f.__name__ != "softmax"]


@pytest.mark.parametrize("function", POINTWISE, ids=lambda function: function.__name__)
def test_activation_bounds_are_the_largest_slopes(function):
    grid = np.linspace(-40.0, 40.0, 400_001)
    with double_precision():
        values = keras.ops.convert_to_numpy(function(keras.ops.convert_to_tensor(grid, dtype="float64")))
    slope = np.abs(np.diff(values) / np.diff(grid)).max()
    rounding = 2 * np.finfo(values.dtype).eps * np.abs(values).max() / (grid[1] - grid[0])  # tanh of JAX: float32
    assert slope - rounding <= activation_bound(function) <= 1.01 * slope


def test_softmax_bound_is_the_norm_of_its_jacobian():
    logits = np.concatenate([normal((50, 4), scale=3.0), [[9.0, 9.0, -30.0, -30.0]]]).astype("float32")
    p = to_numpy(keras.activations.softmax(keras.ops.convert_to_tensor(logits)))
    jacobians = np.eye(4) * p[:, None, :] - p[:, :, None] * p[:, None, :]
    norm = np.linalg.norm(jacobians, ord=2, axis=(1, 2)).max()
    assert norm * (1 - 1e-6) <= bounds.ACTIVATION_BOUNDS[keras.activations.softmax] <= 1.01 * norm


@pytest.mark.parametrize("name", ["exponential", "hard_shrink", "threshold", "glu", "log_softmax"])
def test_activations_without_a_constant_are_refused(name):
    with pytest.raises(ValueError, match=f"Received: activation={name}"):
        activation_bound(getattr(keras.activations, name))


def test_the_activation_of_a_layer_counts():
    layer = K.Dense(2, activation="selu", kernel_initializer="identity")
    layer.build((None, 2))
    assert hkr.lipschitz_bound(layer) == pytest.approx(1.7580994, rel=1e-6)
    layer = K.Dense(2, activation=K.LeakyReLU(negative_slope=3.0), kernel_initializer="identity")
    layer.build((None, 2))
    assert hkr.lipschitz_bound(layer) == pytest.approx(3.0, rel=1e-6)


# ---- single layers --------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize(("make", "shape", "slack"), cases.LINEAR, ids=cases.name)
def test_linear_layers(make, shape, slack):
    layer = make()
    layer(np.zeros((1, *shape), "float32"))
    layer.set_weights([0.5 + np.abs(normal(weight.shape, seed=i)) for i, weight in enumerate(layer.weights)])
    norm, bound = operator_norm(layer, shape), hkr.lipschitz_bound(layer)
    assert isinstance(bound, float)
    assert norm * (1 - 1e-6) <= bound <= slack * norm


@pytest.mark.parametrize(("make", "shape", "constant"), cases.NONLINEAR, ids=cases.name)
def test_nonlinear_layers(make, shape, constant):
    layer = make()
    x = 0.01 * normal((200, *shape))
    spikes = 0.01 * np.eye(math.prod(shape), dtype="float32").reshape(-1, *shape)  # alone in every window they are in
    bound = hkr.lipschitz_bound(layer) if layer(x) is not None else None
    ratios = [
        largest_ratio(layer, x, x + 0.01 * normal(x.shape, seed=1)),
        largest_ratio(layer, 0 * spikes, spikes),
        largest_ratio(layer, 0 * spikes, -spikes),
    ]
    assert max(ratios) <= bound * (1 + 1e-5)
    if constant is not None:
        assert bound == pytest.approx(constant, rel=1e-9)
        assert max(ratios) >= 0.99 * constant


@pytest.mark.parametrize(("make", "shape"), cases.SIZED, ids=cases.name)
def test_pooling_of_a_known_size_has_its_own_norm(make, shape):
    layer = make()
    model = keras.Sequential([keras.Input(shape), layer])
    norm = operator_norm(model, shape)
    slack = 1.1 if getattr(layer, "padding", "") == "same" else 1 + 1e-5  # backends differ at the border
    assert norm * (1 - 1e-6) <= hkr.lipschitz_bound(model) <= slack * norm
    nested = keras.Sequential([keras.Input(shape), keras.Sequential([L.Scale(2.0), layer])])
    assert hkr.lipschitz_bound(nested) == pytest.approx(2 * hkr.lipschitz_bound(model))


def test_dense_layers_with_nothing_between_count_as_one():
    """The product of these two is 4, their composition 1."""
    model = keras.Sequential([keras.Input((2,)), K.Dense(2, use_bias=False), K.Dropout(0.5), K.Dense(2)])
    model.layers[0].kernel.assign([[2.0, 0.0], [0.0, 0.5]])
    model.layers[2].kernel.assign([[0.5, 0.0], [0.0, 2.0]])
    assert hkr.lipschitz_bound(model) == pytest.approx(1.0, rel=1e-9)
    assert hkr.lipschitz_bound(model) >= 1.0
    x = np.array([[1.0, 0.0]], "float32")
    assert hkr.certify(model, x, verbose=0).radius[0] == pytest.approx(0.5**0.5)
    model.layers[0].kernel.assign([[2.0, 0.0], [0.0, 4.0]])
    assert hkr.lipschitz_bound(model) == pytest.approx(8.0, rel=1e-9)


def test_composition_that_cancels_keeps_its_rounding():
    """Kernels of 1e8 whose product vanishes in float64, but not in exact arithmetic."""
    rng = np.random.default_rng(0)
    first = np.float32(1e8) * rng.standard_normal((6, 6)).astype("float32")
    second = np.linalg.inv(first.astype("float64")).astype("float32")
    model = keras.Sequential([keras.Input((6,)), K.Dense(6, use_bias=False), K.Dense(6, use_bias=False)])
    model.set_weights([first, second])
    exact = [[sum(int(a * 2**60) * int(b * 2**90) for a, b in zip(map(float, row), map(float, column), strict=True))
              for column in second.T] for row in first]  # fmt: skip
    norm = np.linalg.norm(np.array([[float(entry / 2**150) for entry in row] for row in exact]), 2)
    assert norm * (1 - 1e-12) <= hkr.lipschitz_bound(model) <= 1.001 * norm


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (K.LayerNormalization, (4,), "use LayerCentering"),
        (lambda: K.GroupNormalization(2), (4,), "use LayerCentering"),
        (K.UnitNormalization, (4,), "a norm that may be 0"),
        (lambda: K.LSTM(2), (3, 4), "recurrent"),
        (lambda: K.Bidirectional(K.GRU(2)), (3, 4), "recurrent"),
        (lambda: K.Bidirectional(L.LipschitzSimpleRNN(2), merge_mode="mul"), (3, 4), "merge_mode=mul"),
        (lambda: K.UpSampling2D(2, interpolation="bilinear"), (3, 3, 1), "repeat pixels"),
    ],
    ids=cases.name,
)
def test_layers_without_a_constant_are_refused_with_the_reason(make, shape, message):
    with pytest.raises(ValueError, match=message):
        hkr.lipschitz_bound(keras.Sequential([keras.Input(shape), make()]))


def test_multiply_and_embedding_are_refused():
    with pytest.raises(ValueError, match="Multiply"):
        hkr.lipschitz_bound(graph(lambda x: K.Multiply()([x, x])))
    layer = K.Embedding(5, 3)
    layer.build((None, 2))
    with pytest.raises(ValueError, match="table index"):
        hkr.lipschitz_bound(layer)


@pytest.mark.parametrize("cls", [L.BatchCentering, L.LipschitzBatchNormalization, L.LayerCentering, L.Householder])
def test_a_shared_layer_cannot_be_broadcast(cls):
    layer = cls()
    layer.build((None, 4))
    with pytest.raises(ValueError, match="incompatible"):
        layer(np.ones((1, 1), "float32"))


def test_relu_with_a_threshold_is_refused():
    with pytest.raises(ValueError, match=r"threshold=1"):
        hkr.lipschitz_bound(K.ReLU(threshold=1.0))


def test_a_mean_in_place_of_the_largest_overlap_is_caught():
    """On a 4x4 map a 3x3 window covers a pixel 6.25 times on average, and 9 times at most."""
    layer = K.Conv2D(9, 3, padding="same", use_bias=False)
    layer.build((None, 4, 4, 1))
    for gain, expected in ((math.sqrt(6.25), 1.2), (3.0, 1.0)):
        constraint = hkr.constraints.Orthonormal().bind(Geometry(gain=gain))
        layer.kernel.assign(constraint.start(normal(layer.kernel.shape)))
        assert operator_norm(layer, (4, 4, 1)) == pytest.approx(expected, rel=1e-6)
        assert hkr.lipschitz_bound(layer) == pytest.approx(expected, rel=1e-3)


# ---- models ---------------------------------------------------------------------------------------------


def as_one_function(model):
    """The model as a function of one array, and its outputs as one."""
    count = len(model.inputs)

    def function(x):
        parts = np.split(x, count, axis=-1)
        outputs = model(parts if count > 1 else parts[0])
        return np.concatenate([to_numpy(y) for y in (outputs if isinstance(outputs, list) else [outputs])], axis=-1)

    return function, (4 * count,)


@pytest.mark.parametrize(("make", "constant"), [row[1:] for row in cases.GRAPHS], ids=[row[0] for row in cases.GRAPHS])
def test_graphs(make, constant):
    model = make()
    bound = hkr.lipschitz_bound(model)
    assert operator_norm(*as_one_function(model)) <= bound * (1 + 1e-6)
    assert operator_norm(*as_one_function(model)) == pytest.approx(constant, rel=1e-6)
    assert bound == pytest.approx(constant, rel=1e-9)


@pytest.mark.parametrize("cls", [K.Maximum, K.Minimum, K.Concatenate])
def test_layers_that_select(cls):
    """With two inputs the bound is the root of the sum of squares, here above the constant, which is 2."""
    model = graph(lambda x, z: cls()([doubling(2.0)(x), z]), 2)
    function, shape = as_one_function(model)
    x, z = normal((500, *shape)), normal((500, *shape), seed=1)
    assert largest_ratio(function, x, z) <= hkr.lipschitz_bound(model) * (1 + 1e-5)
    assert hkr.lipschitz_bound(model) == pytest.approx(math.sqrt(5))


def test_a_trained_residual_has_the_bound_of_its_weights():
    layer = L.LipschitzResidual()
    model = graph(lambda x: layer([x, doubling(5.0)(x)]))
    adam_steps(layer, 1.0)
    assert hkr.lipschitz_bound(model) == pytest.approx(operator_norm(model, (4,)), rel=1e-5)


class Doubled(K.Dense):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs)


class Renamed(K.Dense):
    """Computes the same."""


class Plus(K.Add):
    def _merge_function(self, inputs):
        return 2 * super()._merge_function(inputs)


class OwnModel(keras.Model):
    def call(self, x):
        return 2 * x


class Wrapped(keras.Sequential):
    def call(self, *args, **kwargs):
        return 2 * super().call(*args, **kwargs)


class Unknown(K.Layer):
    def call(self, x):
        return x * x


def monkeypatched():
    layer = K.Dense(4)
    layer.build((None, 4))
    original = layer.call
    layer.call = lambda x: 2 * original(x)
    return layer


def patched_deeper():
    layer = K.Conv1D(4, 1)
    layer.build((None, 4, 4))
    original = layer.convolution_op
    layer.convolution_op = lambda inputs, kernel: 2 * original(inputs, kernel)
    return layer


def unbuilt():
    return keras.Sequential([K.Dense(4)])


def own_model():
    model = OwnModel()
    model(np.zeros((1, 4), "float32"))
    return model


REFUSED = [
    # what, words of the message
    (lambda: graph(Doubled(4)), "Received: Doubled .*overrides call"),
    (lambda: graph(monkeypatched()), "Received: Dense .*overrides call"),
    (patched_deeper, "Received: Conv1D .*overrides convolution_op"),
    (lambda: graph(lambda x: Plus()([x, x])), "Received: Plus .*overrides _merge_function"),
    (lambda: graph(Unknown(name="square")), r"(?s)bounds\.layer_bound\.register\(Unknown\).*layer=Unknown 'square'"),
    (lambda: graph(lambda x: K.Multiply()([x, x])), "merge_bound.register.*layer=Multiply"),
    (lambda: graph(K.LayerNormalization()), "layer=LayerNormalization"),
    (lambda: graph(lambda x: K.Dropout(0.5)(x, training=True)), r"inference mode"),
    (lambda: graph(lambda x: K.BatchNormalization()(x, training=True)), r"inference mode"),
    (lambda: graph(lambda x: graph(K.Dropout(0.5))(x, training=True)), r"inference mode"),
    (lambda: graph(lambda x: x + x), "made of layers.*operation="),
    (lambda: graph(keras.ops.exp), "made of layers.*operation="),
    (lambda: graph(lambda x: K.Add()([x, K.Dense(1)(x)])), "equal and known shapes.*Received: shapes="),
    (lambda: keras.Sequential([keras.Input((3, 1)), K.Rescaling([1.0, 1.0])]), "broadcasting.*Received: shape="),
    (lambda: keras.Sequential([keras.Input((3, 1)), K.Rescaling(1.0, [0.0, 0.0])]), "broadcasting.*Received: shape="),
    (lambda: K.Rescaling([1.0, 1.0]), "broadcasting.*input_shape=None"),
    (unbuilt, "built=False"),
    (lambda: K.Dense(4), "built=False"),
    (own_model, "model=OwnModel"),
    (lambda: Wrapped([keras.Input((4,)), K.Dense(4)]), "model=Wrapped"),
    (lambda: graph(K.Dense(4, activation="exponential")), "activation=exponential"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_has_no_bound_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        hkr.lipschitz_bound(make())


def test_a_subclass_that_computes_the_same_is_fine():
    assert hkr.lipschitz_bound(graph(Renamed(4, kernel_initializer="identity"))) == pytest.approx(1.0)


def test_registering_gives_a_bound():
    class Tripled(K.Layer):
        def call(self, x):
            return 3 * x

    class Sum(K.Layer):
        def call(self, inputs):
            return inputs[0] + inputs[1]

    class TripledDense(K.Dense):
        def call(self, inputs, training=None):
            return 3 * super().call(inputs)

    class TripledModel(keras.Model):
        def call(self, x):
            return 3 * x

    bounds.layer_bound.register(Tripled, lambda layer: 3.0)
    bounds.layer_bound.register(TripledModel, lambda layer: 3.0)
    bounds.layer_bound.register(
        TripledDense, lambda layer: 3.0 * singular_values.kernel_spectrum(layer, "kernel").bound
    )
    bounds.merge_bound.register(Sum, lambda layer, constants: constants.sum(axis=0))
    identity = TripledDense(4, kernel_initializer="identity")
    assert hkr.lipschitz_bound(graph(lambda x: Sum()([x, Tripled()(x)]))) == pytest.approx(4.0)
    assert hkr.lipschitz_bound(graph(identity)) == pytest.approx(3.0)
    assert hkr.lipschitz_bound(graph(TripledModel())) == pytest.approx(3.0)
    model = TripledModel()
    model(np.zeros((1, 4), "float32"))
    assert hkr.lipschitz_bound(model) == pytest.approx(3.0)

    bounds.ACTIVATION_BOUNDS[keras.ops.sin] = 1.0
    assert hkr.lipschitz_bound(K.Activation(keras.ops.sin)) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [lambda: K.Dense(2), lambda: K.Conv1D(2, 3), K.BatchNormalization])
def test_weights_that_are_not_finite_are_refused(make, bad):
    layer = make()
    layer.build((None, 4, 3))
    weights = layer.get_weights()
    weights[0].flat[0] = bad
    layer.set_weights(weights)
    with pytest.raises(ValueError, match="NaN or infinite"):
        hkr.lipschitz_bound(layer)


@pytest.mark.parametrize("power", [-60, -3, 5, 60])
def test_powers_of_two_cancel_exactly(power):
    model = keras.Sequential([keras.Input((4,)), K.Dense(5), K.Dense(3)])
    before = hkr.lipschitz_bound(model)
    first, second = model.layers
    first.kernel.assign(to_numpy(first.kernel) * 2.0**power)
    second.kernel.assign(to_numpy(second.kernel) / 2.0**power)
    assert hkr.lipschitz_bound(model) == before


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_tiny_weights_give_a_bound_above_zero(layers):
    model = keras.Sequential([keras.Input((4,)), *(K.Dense(4, use_bias=False) for _ in range(layers))])
    model.set_weights([np.full((4, 4), 1e-38, "float32")] * layers)
    bound = hkr.lipschitz_bound(model)
    assert bound >= max(4e-38**layers, 1e-308) * (1 - 1e-6)
    assert bound < 1e-37


def test_zero_weights_give_zero():
    model = keras.Sequential([keras.Input((4,)), K.Dense(4, kernel_initializer="zeros")])
    assert hkr.lipschitz_bound(model) == 0.0


def test_bounds_of_random_matrices_are_above_the_singular_values():
    for seed in range(50):
        w = normal((7, 5), seed).astype("float64")
        spectrum = singular_values.matrix_spectrum(w)
        values = np.linalg.svd(w, compute_uv=False)
        assert values[0] <= spectrum.bound <= values[0] * (1 + 1e-12)
        assert spectrum.smallest == pytest.approx(values[-1], rel=1e-6)


# ---- summary --------------------------------------------------------------------------------------------


def example():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            L.LipschitzConv2D(2, 3, name="convolution"),
            L.GroupSort(2, name="sort"),
            K.Flatten(name="flat"),
            K.Dense(3, kernel_initializer="ones", name="head"),
        ],
        name="example",
    )


@pytest.mark.once
def test_summary():
    model, lines = example(), []
    before = model.get_weights()
    summary = hkr.lipschitz_summary(model, print_fn=lines.append)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.array_equal(old, new)

    assert [row.layer for row in summary.rows] == ["convolution", "sort", "flat", "head"]
    assert [row.kind for row in summary.rows] == ["LipschitzConv2D", "GroupSort", "Flatten", "Dense"]
    head = summary.rows[-1]
    assert head.sigma_max == pytest.approx(math.sqrt(32 * 3))
    assert head.sigma_min == pytest.approx(0.0, abs=1e-3)
    assert summary.rows[1].sigma_max is None
    assert summary.bound == pytest.approx(hkr.lipschitz_bound(model), rel=1e-12)
    assert head.product == pytest.approx(summary.bound)
    assert summary.rows[0].product * head.bound == pytest.approx(summary.bound)

    assert json.loads(summary.to_json()) == json.loads(json.dumps(summary.to_dict()))
    assert summary.to_dict()["model"] == "example"
    text = "\n".join(lines)
    assert text == str(summary)
    assert all(word in text for word in ("example", "convolution", "GroupSort", f"{summary.bound:.5g}"))
    assert max(map(len, text.splitlines())) <= 80
    assert all(word in summary.table(details=True) for word in ("sigma_max", f"{summary.bound:.6g}"))


@pytest.mark.once
def test_summary_can_be_silent(capsys):
    hkr.lipschitz_summary(example(), print_fn=None)
    assert capsys.readouterr().out == ""
    hkr.lipschitz_summary(example())
    assert "convolution" in capsys.readouterr().out


@pytest.mark.once
def test_summary_of_merging_layers():
    summary = hkr.lipschitz_summary(graph(lambda x: K.Add(name="sum")([x, x])), print_fn=None)
    assert [(row.layer, row.bound) for row in summary.rows] == [("sum", pytest.approx(math.sqrt(2)))]
    assert summary.rows[0].product == pytest.approx(2.0)


@pytest.mark.once
def test_summary_shows_both_sides():
    model, x = example(), normal((20, 6, 6, 1))
    summary = hkr.lipschitz_summary(model, print_fn=None, x=x)
    assert 0 < summary.lower <= summary.bound
    assert summary.ratio == summary.bound / summary.lower
    for row in summary.rows:
        assert 0 < row.lower <= row.bound * (1 + 1e-9)
        assert row.ratio >= 1 - 1e-9
    assert summary.rows[-1].lower == pytest.approx(summary.rows[-1].bound, rel=1e-6)
    text = str(summary)
    assert f"{summary.lower:.5g}" in text
    assert "ratio" in text


@pytest.mark.parametrize("units", [1, 5])
def test_the_lower_estimate_of_a_linear_model_is_its_constant(units):
    model = keras.Sequential([keras.Input((3, 4)), K.Flatten(), K.Dense(6, use_bias=False), K.Dense(units)])
    summary = hkr.lipschitz_summary(model, print_fn=None)
    assert summary.lower == pytest.approx(summary.bound, rel=1e-4)


def test_the_lower_estimate_of_several_inputs_and_large_ones():
    model = graph(lambda x, z: K.Add()([doubling(3.0)(x), doubling(4.0)(z)]), 2)
    summary = hkr.lipschitz_summary(model, print_fn=None)
    assert summary.lower == pytest.approx(5.0, rel=1e-3)
    assert hkr.lipschitz_summary(model, print_fn=None, x=[normal((9, 4)), normal((9, 4))]).lower > 4.9
    wide = keras.Sequential([keras.Input((1500,)), doubling(2.0)])
    assert hkr.lipschitz_summary(wide, print_fn=None).lower == pytest.approx(2.0, rel=1e-3)


@pytest.mark.once
def test_summary_of_a_model_of_unknown_shape_wants_data():
    class Twice(keras.Model):
        def call(self, x):
            return 2 * x

    bounds.layer_bound.register(Twice, lambda layer: 2.0)
    model = Twice()
    model(np.zeros((1, 4), "float32"))
    with pytest.raises(ValueError, match="Expected inputs x"):
        hkr.lipschitz_summary(model, print_fn=None)
    summary = hkr.lipschitz_summary(model, print_fn=None, x=normal((4, 4)))
    assert summary.lower == pytest.approx(2.0, rel=1e-3)
