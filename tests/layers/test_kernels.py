import inspect
import itertools

import keras
import numpy as np
import pytest
from helpers import BACKEND, adam_steps, check_layer, normal, operator_norm, to_numpy

import hkr_keras as hkr
from hkr_keras.constraints import SpectralBall, UnitNorm

L = hkr.layers
TOLERANCE = 1e-6  # float32 leaves about 4e-7
LEARNING_RATES = (1e-3, 1e-1, 10.0)
PAIRS = [
    (getattr(L, f"Lipschitz{name}"), getattr(keras.layers, name))
    for name in (
        *("Dense", "Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
        *("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"),
    )
]


def _table():
    """Rows `(class, arguments, input shape)`, kernel layers of every kind without a bias."""
    steps = [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)]  # strides and dilation
    channels = [(2, 3), (3, 2), (1, 4)]  # in and out, fixed for a window: equal kernels compile once
    paddings = itertools.cycle(["same", "valid", "causal"])
    for inputs, units in [(1, 1), (1, 5), (5, 1), (4, 7), (7, 4), (6, 6)]:
        yield L.LipschitzDense, {"units": units}, (inputs,)
    yield L.LipschitzDense, {"units": 2}, (4, 3)

    for k, (s, d) in itertools.product(range(1, 8), steps):
        (inputs, filters), padding = channels[k % 3], next(paddings)
        size = (k - 1) * d + 4 + (k + s) % 2
        convolution = {"kernel_size": k, "strides": s, "dilation_rate": d}
        yield L.LipschitzConv1D, {"filters": filters, "padding": padding, **convolution}, (size, inputs)
        two = "same" if padding == "same" else "valid"
        multiplier = {"depth_multiplier": 1 + k % 2, "padding": padding, **convolution}
        yield L.LipschitzDepthwiseConv1D, {**multiplier, "padding": two}, (size, inputs)
        if s == 2 or d == 2 or k == 3:
            yield L.LipschitzSeparableConv1D, {"filters": filters, **multiplier, "padding": two}, (size, inputs)
        if d == 1:
            yield L.LipschitzConv1DTranspose, {"filters": filters, **convolution, "padding": two}, (7 - s, inputs)

    for k, (s, d) in itertools.product([1, 2, 3, 4, 5, (1, 3), (3, 2)], [(1, 1), (2, 1), (3, 1), (1, 2)]):
        inputs, filters = channels[k[0] % 3 if isinstance(k, tuple) else (k - 1) % 3]
        padding = "same" if next(paddings) == "same" else "valid"
        size = (5, 6) if d == 1 else (9, 10)
        convolution = {"kernel_size": k, "strides": s, "dilation_rate": d, "padding": padding}
        yield L.LipschitzConv2D, {"filters": filters, **convolution}, (*size, inputs)
        if k in (2, 3, (3, 2)):
            yield L.LipschitzDepthwiseConv2D, {"depth_multiplier": filters, **convolution}, (*size, 2)
            yield L.LipschitzSeparableConv2D, {"filters": filters, **convolution}, (*size, 2)
        if d == 1 and k != 1:
            yield L.LipschitzConv2DTranspose, {"filters": filters, **convolution}, (3, 4, inputs)

    for groups, k in itertools.product((2, 3), (3, 4)):
        arguments = {"filters": 2 * groups, "kernel_size": k, "groups": groups, "padding": "same"}
        yield L.LipschitzConv1D, arguments, (7, groups)
        yield L.LipschitzConv2D, {**arguments, "strides": 2}, (5, 4, 2 * groups)

    for k, s, padding in [(1, 1, "valid"), (2, 1, "same"), (2, 2, "valid"), (3, 1, "same"), (3, 2, "same")]:
        convolution = {"filters": 2, "kernel_size": k, "strides": s, "padding": padding}
        yield L.LipschitzConv3D, convolution, (3, 4, 3, 2)
        yield L.LipschitzConv3DTranspose, convolution, (2, 3, 2, 2)
    yield L.LipschitzConv2DTranspose, {"filters": 2, "kernel_size": 3, "strides": 2, "output_padding": 1}, (3, 3, 2)
    yield L.LipschitzConv1D, {"filters": 12, "kernel_size": 3, "padding": "same"}, (4, 1)  # reaches norm 1
    yield L.LipschitzConv2D, {"filters": 9, "kernel_size": 3, "padding": "same"}, (4, 4, 1)


def _cases():
    turns = {cls: itertools.cycle(LEARNING_RATES) for cls, _ in PAIRS}
    for cls, arguments, shape in _table():
        learning_rate = next(turns[cls])
        words = [cls.__name__[9:], *(f"{value}" for value in arguments.values()), f"{shape}", f"lr{learning_rate:g}"]
        yield pytest.param(cls, arguments, shape, learning_rate, id="-".join(words).replace(" ", ""))


CASES = list(_cases())


def test_the_table_is_wide_enough():
    assert len(CASES) >= 150
    rates = {cls: {case.values[3] for case in CASES if case.values[0] is cls} for cls, _ in PAIRS}
    assert all(seen == set(LEARNING_RATES) for seen in rates.values())


def assert_bounded(norm, layer):
    # A separable layer multiplies two kernels in float32, so its explicit matrix is rounded; the others copy weights.
    rounding = 2e-7 if "Separable" in type(layer).__name__ else 0.0
    assert norm <= hkr.lipschitz_bound(layer) * (1 + rounding)


def built(cls, arguments, shape, **kwargs):
    layer = cls(**{"use_bias": False, **arguments}, **kwargs)
    layer.build((None, *shape))
    return layer


@pytest.mark.many
@pytest.mark.parametrize(("cls", "arguments", "shape", "learning_rate"), CASES)
def test_norm_is_at_most_one_and_the_bound_is_above_it(cls, arguments, shape, learning_rate):
    layer = built(cls, arguments, shape)
    for steps in (0, 3):
        adam_steps(layer, learning_rate, steps)
        norm = operator_norm(layer, shape)
        assert 0 < norm <= 1 + TOLERANCE
        assert_bounded(norm, layer)


LARGE = [
    # class, arguments, input shape: large enough for the norm to come near its supremum over sizes
    (L.LipschitzDense, {"units": 5}, (7,)),
    (L.LipschitzConv1D, {"filters": 3, "kernel_size": 3, "padding": "same"}, (64, 2)),
    (L.LipschitzConv1D, {"filters": 3, "kernel_size": 5, "padding": "causal"}, (96, 2)),
    (L.LipschitzConv1D, {"filters": 3, "kernel_size": 4, "strides": 2}, (98, 2)),
    (L.LipschitzConv1D, {"filters": 2, "kernel_size": 3, "dilation_rate": 2, "padding": "same"}, (96, 2)),
    (L.LipschitzConv1D, {"filters": 4, "kernel_size": 3, "groups": 2, "padding": "same"}, (64, 4)),
    (L.LipschitzConv1DTranspose, {"filters": 3, "kernel_size": 3, "strides": 2}, (48, 2)),
    (L.LipschitzDepthwiseConv1D, {"kernel_size": 3, "depth_multiplier": 2, "padding": "same"}, (64, 2)),
    (L.LipschitzConv2D, {"filters": 3, "kernel_size": 3, "padding": "same"}, (24, 24, 1)),
    (L.LipschitzConv2D, {"filters": 2, "kernel_size": 3, "strides": 2, "padding": "same"}, (24, 24, 1)),
]


@pytest.mark.parametrize(("cls", "arguments", "shape"), LARGE)
def test_the_bound_is_tight_on_large_inputs(cls, arguments, shape):
    layer = built(cls, arguments, shape)
    layer.set_weights([normal(weight.shape, seed=3) for weight in layer.weights])  # the bound trusts no constraint
    norm = operator_norm(layer, shape)
    assert_bounded(norm, layer)
    assert hkr.lipschitz_bound(layer) <= 1.01 * norm


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_signatures_are_those_of_keras(ours, theirs):
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert issubclass(ours, theirs)


CHANNELS_FIRST = {
    "tensorflow": [],  # has no such kernels on a CPU
    "jax": ["Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv2D", "Conv2DTranspose"],
    "torch": ["Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv2D", "Conv2DTranspose"],
}


@pytest.mark.many
@pytest.mark.parametrize("name", CHANNELS_FIRST[BACKEND] or ["Dense"])
def test_channels_first(name):
    rank = next((int(c) for c in name if c.isdigit()), 0)
    arguments = {"data_format": "channels_first", "kernel_size": 3, "padding": "same"} if rank else {}
    if not name.startswith("Depthwise"):
        arguments["filters" if rank else "units"] = 3
    shape = (2, 5, 4, 3)[: rank + 1]
    layer = built(getattr(L, f"Lipschitz{name}"), arguments, shape)
    adam_steps(layer, 0.1)
    norm = operator_norm(layer, shape)
    assert norm <= 1 + TOLERANCE
    assert_bounded(norm, layer)


EXAMPLES = [
    # class, arguments, input shape
    (L.LipschitzDense, {"units": 3}, (4,)),
    (L.LipschitzConv1D, {"filters": 3, "kernel_size": 3, "padding": "causal"}, (6, 2)),
    (L.LipschitzConv2D, {"filters": 3, "kernel_size": 3, "padding": "same"}, (5, 5, 2)),
    (L.LipschitzConv3D, {"filters": 3, "kernel_size": 2}, (3, 3, 3, 2)),
    (L.LipschitzConv1DTranspose, {"filters": 3, "kernel_size": 3, "strides": 2}, (6, 2)),
    (L.LipschitzConv2DTranspose, {"filters": 3, "kernel_size": 3, "strides": 2, "padding": "same"}, (4, 4, 2)),
    (L.LipschitzConv3DTranspose, {"filters": 3, "kernel_size": 2}, (2, 2, 2, 2)),
    (L.LipschitzDepthwiseConv1D, {"kernel_size": 3}, (6, 2)),
    (L.LipschitzDepthwiseConv2D, {"kernel_size": 3, "depth_multiplier": 2}, (5, 5, 2)),
    (L.LipschitzSeparableConv1D, {"filters": 3, "kernel_size": 3}, (6, 2)),
    (L.LipschitzSeparableConv2D, {"filters": 3, "kernel_size": 3}, (5, 5, 2)),
]


@pytest.mark.many
@pytest.mark.parametrize(("cls", "arguments", "shape"), EXAMPLES)
def test_layer_with_bias_and_activation(cls, arguments, shape):
    layer = cls(**arguments, activation="tanh", bias_initializer="ones")
    layer.build((None, *shape))
    check_layer(layer, shape)


@pytest.mark.many
@pytest.mark.parametrize(("cls", "arguments", "shape"), EXAMPLES)
def test_dynamic_sizes(cls, arguments, shape):
    layer = cls(**arguments, use_bias=False)
    unknown = (*[None] * (len(shape) - 1), shape[-1])
    model = keras.Sequential([keras.Input(unknown), layer])
    assert model.output_shape[-1] == layer.compute_output_shape((None, *shape))[-1]
    for size in (shape, (*(n + 1 for n in shape[:-1]), shape[-1])):
        assert operator_norm(model, size) <= 1 + TOLERANCE
    assert hkr.lipschitz_bound(model) <= 1 + TOLERANCE


@pytest.mark.parametrize(("cls", "arguments", "shape"), EXAMPLES)
def test_lora_and_quantize_are_refused(cls, arguments, shape):
    layer = cls(**arguments)
    layer.build((None, *shape))
    with pytest.raises(ValueError, match="Received: rank=2"):
        layer.enable_lora(2)
    with pytest.raises(ValueError, match="Received: mode=int8"):
        layer.quantize("int8")
    if "lora_rank" in inspect.signature(cls).parameters:
        with pytest.raises(ValueError, match="Received: rank=1"):
            cls(**arguments, lora_rank=1).build((None, *shape))


@pytest.mark.parametrize(
    ("cls", "arguments", "name", "shape"),
    [
        (L.LipschitzDense, {"units": 6}, "kernel", (4,)),
        (L.LipschitzConv2D, {"filters": 9, "kernel_size": 3, "padding": "same"}, "kernel", (4, 4, 1)),
        (L.LipschitzConv1D, {"filters": 4, "kernel_size": 3, "groups": 2}, "kernel", (7, 4)),
        (L.LipschitzConv2DTranspose, {"filters": 2, "kernel_size": 3, "strides": 2}, "kernel", (3, 3, 3)),
        (L.LipschitzDepthwiseConv1D, {"kernel_size": 3, "depth_multiplier": 3}, "depthwise", (6, 2)),
    ],
)
def test_other_constraints(cls, arguments, name, shape):
    ball = built(cls, arguments, shape, **{f"{name}_constraint": SpectralBall()})
    unit = built(cls, arguments, shape, **{f"{name}_constraint": UnitNorm()})
    for learning_rate in (None, *LEARNING_RATES):
        if learning_rate is not None:
            adam_steps(ball, learning_rate)
            adam_steps(unit, learning_rate)
        assert operator_norm(ball, shape) <= 1 + TOLERANCE
        assert_bounded(operator_norm(unit, shape), unit)
    assert hkr.lipschitz_bound(unit) > 1.01


def test_spectral_ball_keeps_small_kernels_small():
    layer = L.LipschitzDense(
        3, use_bias=False, kernel_constraint=SpectralBall(), kernel_initializer=keras.initializers.Constant(0.01)
    )
    layer.build((None, 3))
    assert operator_norm(layer, (3,)) == pytest.approx(0.03, rel=1e-5)


@pytest.mark.many
@pytest.mark.parametrize(("cls", "arguments", "shape"), EXAMPLES)
def test_layers_of_equal_shape_start_different(cls, arguments, shape):
    first, second = built(cls, arguments, shape), built(cls, arguments, shape)
    assert np.abs(to_numpy(first.weights[0]) - to_numpy(second.weights[0])).max() > 1e-3


@pytest.mark.many
@pytest.mark.parametrize(("cls", "arguments", "shape"), EXAMPLES)
def test_mixed_precision_keeps_a_float32_kernel_of_norm_one(cls, arguments, shape):
    layer = built(cls, arguments, shape, dtype="mixed_bfloat16")
    adam_steps(layer, 0.1)
    assert all(weight.dtype == "float32" for weight in layer.weights)
    assert keras.backend.standardize_dtype(layer(normal((1, *shape))).dtype) == "bfloat16"
    exact = built(cls, arguments, shape)
    exact.set_weights(layer.get_weights())
    assert operator_norm(exact, shape) <= 1 + TOLERANCE
