"""Kinds of models that broke certificates: each with relatives, each bounded above what it does, or refused.

A bound that holds and a refusal that names what was expected are both right.
"""

import contextlib
import dataclasses
import json
import math
import tracemalloc
from fractions import Fraction

import keras
import numpy as np
import pytest
from helpers import BACKEND, REFUSALS, double_precision, normal, state_kept, to_numpy

import hkr_keras as hkr
from hkr_keras import exporting
from hkr_keras.certification.rules import registry

K, L = keras.layers, hkr.layers
TORCH = BACKEND == "torch"


def f(values):
    return np.asarray(values, "float32")


def cases(table: dict):
    return pytest.mark.parametrize("name", list(table))


@contextlib.contextmanager
def or_refused():
    """Passes what is refused in the words of this package."""
    try:
        yield
    except ValueError as error:
        if "Expected" not in str(error) or "Received" not in str(error):
            raise


def zeros(shape):
    return np.zeros(shape, "float32")


def full(shape, value=1.0):
    return np.full(shape, value, "float32")


def tenfold(*results):
    return keras.tree.map_structure(lambda y: 10 * y, results[-1])


def sequential(shape, *layers, **kwargs):
    return keras.Sequential([keras.Input(shape, **kwargs), *layers])


def ones(units=1, **kwargs):
    return K.Dense(units, kernel_initializer="ones", **kwargs)


def ones_convolution(**kwargs):
    return K.Conv1D(1, 1, kernel_initializer="ones", **kwargs)


def applied(layer, shape, **kwargs):
    """A model that applies a layer, perhaps built for another shape, to inputs of this one."""
    x = keras.Input(shape, **kwargs)
    return keras.Model(x, layer(x))


def stretch(model, x, z) -> float:
    """How far the outputs of two inputs (or lists of these) are apart, over the distance of the inputs."""
    pairs = [[f(each) for each in (points if isinstance(points, list) else [points])] for points in (x, z)]
    arguments = [[points] if len(points) > 1 else points for points in pairs]
    first, second = (
        np.concatenate([to_numpy(y).reshape(-1) for y in keras.tree.flatten(model(*given, training=False))])
        for given in arguments
    )
    moved = math.sqrt(sum(np.square(a.astype("float64") - b).sum() for a, b in zip(*pairs, strict=True)))
    return float(np.linalg.norm(first - second)) / moved


# ---- bounds: a model, and two inputs that it drives apart ------------------------------------------------------


def built_for(layer, shape):
    """A layer that was called with an array of that shape once."""
    layer(np.ones(shape, "float32"))
    return layer


def adapted(values, **kwargs):
    return K.Normalization(mean=np.zeros_like(values), variance=np.asarray(values), **kwargs)


def inner_model(*layers, shape=(4,), **kwargs):
    return sequential(shape, *layers, **kwargs)


def random_pair(shape, seed=0):
    x = normal((1, *shape), seed)
    return x, np.zeros_like(x)


def all_ones(*shape):
    return full((1, *shape)), zeros((1, *shape))


def rnn_over_more_steps(layer, built=2, steps=100, wrap=K.TimeDistributed):
    """A recurrent layer made for two steps, wrapped so that its input specification is not looked at."""
    layer(zeros((1, built, 1)))
    layer.cell.kernel.assign(np.full((1, 1), 1 / math.sqrt(built)))
    layer.cell.recurrent_kernel.assign(np.ones((1, 1)))
    return applied(wrap(layer), (3, steps, 1)), *all_ones(3, steps, 1)


def linear_rnn(**kwargs):
    return L.LipschitzSimpleRNN(1, activation="linear", **kwargs)


def channels_first(make):
    def build():
        with state_kept():
            keras.config.set_image_data_format("channels_first")
            return make()

    return build


def rescaled_with_channels_first():
    model = sequential((4,), K.Rescaling(np.ones(4)))
    return model, np.ones((1, 4)), np.zeros((1, 4))


def edited(layer, shape, pair=None, **attributes):
    """A layer whose attributes are set after it was built and its model was made."""
    model = sequential(shape, layer)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return model, *(pair or all_ones(*shape))


def edited_rnn():
    layer = linear_rnn()
    model = sequential((16, 1), layer)
    layer.cell.kernel.assign(np.ones((1, 1)))
    layer.cell.recurrent_kernel.assign(np.ones((1, 1)))
    layer.length = 1
    return model, *all_ones(16, 1)


def hooked(layer, shape, target=lambda layer: layer, kind="forward_hook"):
    """A tenfold output, or input, by a hook of PyTorch; elsewhere there are none."""
    model = sequential(shape, layer)
    if TORCH:
        getattr(target(layer), f"register_{kind}")(tenfold)
    return model, *all_ones(*shape)


def with_method(layer, shape, name, target=lambda layer: layer):
    """A tenfold output by a method that is replaced on the instance."""
    model = sequential(shape, layer)
    inner = target(layer)
    before = getattr(inner, name)
    object.__setattr__(inner, name, lambda *args, **kwargs: tenfold(before(*args, **kwargs)))
    return model, *all_ones(*shape)


def nested_unknown(layer, inside, outside, **kwargs):
    """A layer in a model of unknown sizes, applied to known ones."""
    return applied(inner_model(layer, shape=inside), outside, **kwargs), *random_pair(outside)


def shared_merge(merge, shapes):
    two = [keras.Input(shape) for shape in shapes]
    return keras.Model(two, merge(two))


def two_signs(other, relu=None):
    x = keras.Input((2,))
    h = K.Identity()(x)
    model = keras.Model(x, K.Concatenate()([(relu or K.ReLU())(h), (relu or K.ReLU())(other(h))]))
    return model, np.ones((1, 2)), np.zeros((1, 2))


def with_model_method(target, name):
    model = sequential((2,), K.Identity())
    inner = target(model)
    before = getattr(inner, name)
    object.__setattr__(inner, name, lambda *args, **kwargs: tenfold(before(*args, **kwargs)))
    return model, *all_ones(2)


def merged_with_broadcast(merge):
    two = [keras.Input((4, 1)), keras.Input((1, 4))]
    model = keras.Model(two, merge(two))
    x = [np.ones((1, 4, 1)), np.ones((1, 1, 4))]
    return model, x, [np.zeros_like(a) for a in x]


def two_heads_of(layer):
    x = keras.Input((2,))
    return keras.Model(x, [layer(x), layer(x)]), *all_ones(2)


def replaced(shape, layer, name, value):
    model = sequential(shape, layer)
    numbers = isinstance(layer, (K.Rescaling, L.Scale))
    setattr(layer, name, value if numbers else keras.ops.convert_to_tensor(value))
    return model, *all_ones(*shape)


def untracked(layer, name, value, shape):
    """An array in place of a variable, past the checks of `setattr`."""
    model = sequential(shape, layer)
    vars(layer).pop(name, None)
    object.__setattr__(layer, name, value)
    return model, *all_ones(*shape)


HOLDS = {
    # A layer is applied to another shape than it was built for.
    "rescaling of two, built with an array": lambda: (
        applied(built_for(K.Rescaling([1.0, -1.0]), (1, 2)), (1,)),
        *all_ones(1),
    ),
    "rescaling of two, never built": lambda: (applied(K.Rescaling([1.0, -1.0]), (1,)), *all_ones(1)),
    "offsets of three": lambda: (applied(K.Rescaling(1.0, np.zeros(3)), (1,)), *all_ones(1)),
    "rescaling of a column": lambda: (applied(K.Rescaling(np.ones((4, 1))), (4,)), *all_ones(4)),
    "rescaling of a batch": lambda: (applied(K.Rescaling(np.ones((3, 1, 1))), (4,)), *all_ones(4)),
    "normalization of three": lambda: (
        applied(built_for(adapted(np.ones(3)), (1, 3)), (1,)),
        *all_ones(1),
    ),
    "normalization along two axes": lambda: (
        applied(built_for(K.Normalization((1, 2), np.zeros((2, 2)), np.ones((2, 2))), (1, 2, 2)), (1, 2)),
        *all_ones(1, 2),
    ),
    "rescaling in an unknown size": lambda: (
        applied(inner_model(K.Rescaling(np.ones(4)), shape=(None,)), (1,)),
        *all_ones(1),
    ),
    "PReLU in an unknown size": lambda: (
        applied(inner_model(built_for(K.PReLU(), (1, 4)), shape=(None,)), (1,)),
        *all_ones(1),
    ),
    "rescaling of an unknown size": lambda: (sequential((None,), K.Rescaling(np.ones(4))), *all_ones(1)),
    "recurrent layer in TimeDistributed": lambda: rnn_over_more_steps(linear_rnn()),
    "all its states": lambda: rnn_over_more_steps(linear_rnn(return_sequences=True)),
    "recurrent layer in TimeDistributed twice": lambda: (
        applied(K.TimeDistributed(K.TimeDistributed(built_rnn())), (2, 3, 100, 1)),
        *all_ones(2, 3, 100, 1),
    ),
    "batch normalization in TimeDistributed": lambda: (
        applied(K.TimeDistributed(built_for(K.BatchNormalization(epsilon=0.0), (1, 4))), (3, 1)),
        *all_ones(3, 1),
    ),
    "PReLU in TimeDistributed": lambda: (
        applied(K.TimeDistributed(built_for(K.PReLU(), (1, 4))), (3, 1)),
        *all_ones(3, 1),
    ),
    "centring in TimeDistributed": lambda: (
        applied(K.TimeDistributed(built_for(L.BatchCentering(), (1, 4))), (3, 1)),
        *all_ones(3, 1),
    ),
    "rescaling in TimeDistributed": lambda: (
        applied(K.TimeDistributed(built_for(K.Rescaling(np.ones(4)), (1, 4))), (3, 1)),
        *all_ones(3, 1),
    ),
    "Householder in TimeDistributed": lambda: (
        applied(K.TimeDistributed(built_for(L.Householder(), (1, 8))), (3, 2)),
        *all_ones(3, 2),
    ),
    "upsampling in TimeDistributed": lambda: (
        applied(K.TimeDistributed(K.UpSampling1D(3)), (3, 2, 1)),
        *all_ones(3, 2, 1),
    ),
    "merge that broadcasts in TimeDistributed": lambda: (
        applied(K.TimeDistributed(shared_add()), (3, 1)),
        *all_ones(3, 1),
    ),
    # Layers and models as activations.
    "rescaling model as activation": lambda: (
        sequential((3,), ones(activation=inner_model(K.Rescaling(np.ones(4))))),
        *all_ones(3),
    ),
    "rescaling as activation": lambda: (sequential((3,), ones(activation=K.Rescaling(np.ones(4)))), *all_ones(3)),
    "normalization model as activation": lambda: (
        sequential((3,), ones(activation=inner_model(adapted(np.ones(4))))),
        *all_ones(3),
    ),
    "rescaling model as activation of a convolution": lambda: (
        sequential(
            (5, 3),
            ones_convolution(activation=inner_model(K.Rescaling(np.ones(4)), shape=(None, 4))),
        ),
        *all_ones(5, 3),
    ),
    "rescaling model in Activation": lambda: (
        sequential((1,), K.Activation(inner_model(K.Rescaling(np.ones(4))))),
        *all_ones(1),
    ),
    "upsampling as activation": lambda: (
        sequential((5, 3), ones_convolution(activation=K.UpSampling1D(4))),
        *all_ones(5, 3),
    ),
    "repetition as activation": lambda: (sequential((3,), ones(activation=K.RepeatVector(4))), *all_ones(3)),
    "PReLU as activation": lambda: (
        sequential((3,), ones(activation=built_for(K.PReLU(), (1, 4)))),
        *all_ones(3),
    ),
    "PReLU model as activation": lambda: (
        sequential((3,), ones(activation=inner_model(K.PReLU()))),
        *all_ones(3),
    ),
    "Householder as activation": lambda: (
        sequential((3,), ones(2, activation=built_for(L.Householder(), (1, 8)))),
        *all_ones(3),
    ),
    "nested activations": lambda: (
        sequential((3,), ones(activation=K.Activation(K.Activation(inner_model(K.Rescaling(np.ones(4))))))),
        *all_ones(3),
    ),
    # The global format of images.
    "channels first, rescaling": channels_first(lambda: (sequential((4, 1), K.Rescaling(np.ones(4))), *all_ones(4, 1))),
    "channels first, rescaling of a matrix": channels_first(
        lambda: (sequential((1, 4), K.Rescaling(np.ones(4))), *all_ones(1, 4))
    ),
    "channels first, rescaling of an image": channels_first(
        lambda: (sequential((1, 2, 4), K.Rescaling(np.ones(4))), *all_ones(1, 2, 4))
    ),
    # Two inputs.
    **{
        f"{merge.__name__} of a row and a column": lambda merge=merge: merged_with_broadcast(merge())
        for merge in (K.Add, K.Subtract, K.Average, K.Maximum, K.Minimum, K.Multiply, L.LipschitzResidual)
    },
    "one layer, two outputs": lambda: two_heads_of(K.Dense(1, kernel_initializer="ones")),
    # Attributes and numbers that are edited after the model was made.
    "length of a recurrent layer": edited_rnn,
    "strides as a number": lambda: edited(K.MaxPooling1D(4), (8, 1), strides=1),
    "strides": lambda: edited(K.MaxPooling1D(4), (8, 1), strides=(1,)),
    "window of a pooling": lambda: edited(K.AveragePooling1D(2, 2), (8, 1), pool_size=(4,), strides=(1,)),
    "strides of a convolution": lambda: edited(
        K.Conv1D(1, 4, strides=4, kernel_initializer="ones", use_bias=False), (8, 1), strides=(1,)
    ),
    "padding of a convolution": lambda: edited(
        K.Conv1D(1, 4, strides=4, kernel_initializer="ones", use_bias=False), (8, 1), padding="same", strides=(1,)
    ),
    "dilation of a convolution": lambda: edited(
        K.Conv1D(1, 3, kernel_initializer="ones", use_bias=False), (9, 1), dilation_rate=(3,)
    ),
    "axis of a softmax": lambda: edited(K.Softmax(), (4, 4), axis=0),
    "axis of a centring": lambda: edited(L.LayerCentering(center=False), (4, 4), axis=0),
    "slope": lambda: edited(K.LeakyReLU(0.1), (4,), pair=(-np.ones((1, 4)), np.zeros((1, 4))), negative_slope=3.0),
    "epsilon": lambda: edited(K.BatchNormalization(moving_variance_initializer="zeros"), (4,), epsilon=1e-8),
    "size of an upsampling": lambda: edited(K.UpSampling1D(2), (4, 1), size=9),
    "repetitions": lambda: edited(K.RepeatVector(2), (4,), n=9),
    "units": lambda: edited(K.Dense(1, kernel_initializer="ones"), (4,), units=3),
    "invert": lambda: edited(adapted(np.full(4, 1e-4)), (4,), invert=False),
    "inverted": lambda: edited(adapted(np.full(4, 1e4)), (4,), invert=True),
    "group": lambda: edited(L.GroupSort(2), (4,), n=4),
    "use_bias": lambda: edited(
        K.Dense(1, kernel_initializer="ones", use_bias=False), (4,), use_bias=True, bias=zeros(9)
    ),
    "angles": lambda: replaced((2,), L.Householder(), "angles", zeros(4)),
    "angles of a matrix": lambda: replaced((2,), L.Householder(), "angles", zeros((4, 1))),
    "gamma": lambda: replaced((1,), K.BatchNormalization(epsilon=0.0), "gamma", full(4)),
    "beta": lambda: replaced((1,), K.BatchNormalization(epsilon=0.0), "beta", zeros(4)),
    "moving mean": lambda: replaced((1,), K.BatchNormalization(epsilon=0.0), "moving_mean", zeros(4)),
    "moving variance": lambda: replaced((1,), K.BatchNormalization(epsilon=0.0), "moving_variance", full(4)),
    "alpha": lambda: replaced((1,), K.PReLU(), "alpha", full(4)),
    "mean of a normalization": lambda: replaced((1,), adapted(np.ones(1)), "mean", zeros((1, 4))),
    "variance of a normalization": lambda: replaced((1,), adapted(np.ones(1)), "variance", full((1, 4))),
    "bias of SLLDense": lambda: replaced((4,), L.SLLDense(4), "bias", zeros((4, 4))),
    "bias of SLLConv2D": lambda: replaced((2, 2, 1), L.SLLConv2D(4, 3), "bias", zeros((2, 2, 4))),
    "bias of AOLDense": lambda: replaced((1,), L.AOLDense(1, kernel_initializer="ones"), "bias", zeros((4, 1))),
    "bias of a convolution": lambda: replaced((5, 1), ones_convolution(), "bias", zeros((4, 1, 1))),
    "bias of a centring": lambda: replaced((1,), L.LayerCentering(axis=-1), "bias", zeros(4)),
    "scale of a rescaling": lambda: replaced((1,), K.Rescaling(1.0), "scale", np.ones(4)),
    "offset of a rescaling": lambda: replaced((1,), K.Rescaling(1.0), "offset", np.zeros(4)),
    "factor": lambda: replaced((1,), L.Scale(1.0), "k", np.ones(4)),
    "untracked bias": lambda: untracked(ones(), "bias", zeros((4, 1)), (3,)),
    "untracked gamma": lambda: untracked(K.BatchNormalization(epsilon=0.0), "gamma", full(4), (1,)),
    "mixing logits": lambda: residual_with(zeros((3, 2))),
    # Hooks and methods of instances.
    "hook of a cell": lambda: hooked(linear_rnn(), (2, 1), lambda layer: layer.cell),
    "hook of a wrapped layer": lambda: hooked(K.TimeDistributed(ones()), (2, 3), lambda layer: layer.layer),
    "hook before a wrapped layer": lambda: hooked(
        K.TimeDistributed(ones()), (2, 3), lambda layer: layer.layer, "forward_pre_hook"
    ),
    "hook before an activation": lambda: hooked(
        ones(activation=K.ReLU()), (3,), lambda layer: layer.activation, "forward_pre_hook"
    ),
    "hook of an activation": lambda: hooked(ones(activation=K.ReLU()), (3,), lambda layer: layer.activation),
    "hook of a layer in a wrapped model": lambda: hooked(
        K.TimeDistributed(inner_model(ones(), shape=(3,))), (2, 3), lambda layer: layer.layer.layers[-1]
    ),
    "hook of a nested model": lambda: hooked(inner_model(ones(), shape=(3,)), (3,)),
    "call of a cell": lambda: with_method(linear_rnn(), (2, 1), "call", lambda layer: layer.cell),
    "call of a wrapped layer": lambda: with_method(
        K.TimeDistributed(ones()), (2, 3), "call", lambda layer: layer.layer
    ),
    "call of an activation": lambda: with_method(
        ones(activation=K.ReLU()), (3,), "call", lambda layer: layer.activation
    ),
    "convolution_op": lambda: with_method(ones_convolution(), (5, 1), "convolution_op"),
    "call of a nested model": lambda: with_method(inner_model(ones(), shape=(3,)), (3,), "call"),
    # Both signs of one tensor, but for a shift, a factor or an order: not norm-preserving.
    "relu of both signs, shifted": lambda: two_signs(K.Rescaling(-1.0, offset=5.0)),
    "relu of both signs, shifted by a bias": lambda: two_signs(
        K.Dense(2, kernel_initializer=keras.initializers.Identity(-1.0), bias_initializer=constant(5.0))
    ),
    "relu of both signs, shifted by a mean": lambda: two_signs(K.Normalization(mean=[5.0, 5.0], variance=[1.0, 1.0])),
    "relu of both signs, larger": lambda: two_signs(L.Scale(-2.0)),
    "relu of one sign, twice": lambda: two_signs(K.Rescaling([-1.0, 1.0])),
    "relu of both signs, one of them ends": lambda: two_signs(L.Scale(-1.0), K.ReLU(negative_slope=1.0)),
    "relu of both signs, a negative one": lambda: two_signs(L.Scale(-1.0), K.ReLU(negative_slope=-1.0)),
    # Methods of the model itself.
    "call of a model": lambda: with_model_method(lambda model: model, "call"),
    "call of the model in a Sequential": lambda: with_model_method(lambda model: model._functional, "call"),
    "forward of a model": lambda: with_model_method(lambda model: model, "forward"),
    # What Keras computes is not what its documentation says: its sparsemax is no projection, and jumps.
    "sparsemax": lambda: (sequential((2,), K.Activation("sparsemax")), f([[4.0, 2.999]]), f([[4.0, 3.001]])),
    "sparsemax as an argument": lambda: (
        sequential((2,), K.Dense(2, kernel_initializer="identity", activation="sparsemax")),
        f([[4.0, 2.999]]),
        f([[4.0, 3.001]]),
    ),
    "sparsemax of operations": lambda: (
        sequential((2,), K.Activation(keras.ops.sparsemax)),
        f([[4.0, 2.999]]),
        f([[4.0, 3.001]]),
    ),
    # Nested models of unknown sizes.
    "average over an unknown size": lambda: nested_unknown(K.GlobalAveragePooling1D(), (None, 3), (8, 3)),
    "pooling over an unknown size": lambda: nested_unknown(
        K.AveragePooling2D(2, padding="same"), (None, None, 1), (5, 5, 1)
    ),
}


def built_rnn():
    layer = linear_rnn()
    layer(zeros((1, 2, 1)))
    layer.cell.kernel.assign(np.full((1, 1), 1 / math.sqrt(2)))
    layer.cell.recurrent_kernel.assign(np.ones((1, 1)))
    return layer


def shared_add():
    x = keras.Input((None,))
    return keras.Model(x, K.Add()([x, K.Rescaling(np.ones(4))(x)]))


def residual_with(logits):
    x = keras.Input((2, 2))
    layer = L.LipschitzResidual()
    model = keras.Model(x, layer([x, x]))
    layer.mixing_logits = keras.ops.convert_to_tensor(logits)
    return model, *all_ones(2, 2)


@cases(HOLDS)
@pytest.mark.filterwarnings("ignore:.*You are using a softmax over axis")
def test_a_bound_holds_or_is_refused(name):
    try:
        model, x, z = HOLDS[name]()
        seen = stretch(model, x, z)
    except REFUSALS:
        pytest.skip("Keras or the backend refuses to run it")
    with or_refused():
        assert hkr.lipschitz_bound(model) >= seen * (1 - 1e-6)


REPLACED = [
    *("angles", "angles of a matrix", "gamma", "beta", "moving mean", "moving variance", "alpha", "factor"),
    *("mean of a normalization", "variance of a normalization", "scale of a rescaling", "offset of a rescaling"),
    *("bias of SLLDense", "bias of SLLConv2D", "bias of AOLDense", "bias of a convolution", "bias of a centring"),
    *("untracked bias", "untracked gamma", "mixing logits"),
]


@cases(dict.fromkeys(REPLACED))
def test_numbers_of_another_shape_are_refused_where_no_backend_runs_them_too(name):
    with pytest.raises(ValueError, match="Expected"):
        hkr.lipschitz_bound(HOLDS[name]()[0])


def test_a_summary_shows_no_lower_estimate_above_its_bound():
    layer = K.Rescaling([1.0, -1.0])
    layer(full((1, 2)))
    with or_refused():
        summary = hkr.lipschitz_summary(applied(layer, (1,)), print_fn=None)
        assert all(row.lower <= row.bound * (1 + 1e-5) for row in summary.rows)


def test_registered_bounds_that_are_seen_to_be_too_small_are_an_error():
    class Doubled(K.Layer):
        def call(self, inputs):
            return 2 * inputs

    hkr.bounds.layer_bound.register(Doubled, lambda layer: 1.0)
    with pytest.raises(ValueError, match="Expected"):
        hkr.lipschitz_summary(sequential((2,), Doubled()), print_fn=None)


@pytest.mark.skipif(not TORCH, reason="hooks of PyTorch")
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
@pytest.mark.parametrize("rigorous", [False, True])
def test_global_hooks_are_refused(kind, rigorous):
    import torch.nn.modules.module as module

    model = sequential((2,), ones(2))
    hook = tenfold if kind == "forward_hook" else (lambda m, x: None)
    handle = getattr(module, f"register_module_{kind}")(hook)
    try:
        with pytest.raises(ValueError, match="hook"):
            hkr.certify(model, f([[1.0, 0.0]]), verbose=0, rigorous=rigorous)
        with pytest.raises(ValueError, match="hook"):
            hkr.lipschitz_bound(model)
    finally:
        handle.remove()
    assert np.isfinite(hkr.lipschitz_bound(model))


# ---- certificates: a model, an input, and another one that has another class ------------------------------------


constant = keras.initializers.Constant


def scores(slope=1.0, offset=0.0, **kwargs):
    return K.Dense(
        1,
        kernel_initializer=keras.initializers.Constant(slope),
        bias_initializer=keras.initializers.Constant(offset),
        **kwargs,
    )


def nested(*layers, depth=1, shape=(1,), inside=(1,), **kwargs):
    """Layers behind an Input of another type, in models within models."""
    inner = sequential(inside, *layers, **kwargs)
    for _ in range(depth - 1):
        x = keras.Input(shape)
        inner = keras.Model(x, inner(x))
    x = keras.Input(shape)
    return keras.Model(x, inner(x))


def half_float(build):
    def with_floatx():
        with state_kept():
            keras.config.set_floatx("float16")
            return build()

    return with_floatx


def to_whole_numbers(dtype):
    return nested(K.Rescaling(1.0), scores(1.0, -99.5), dtype=dtype), f([[100.0]]), f([[99.999]])


def in_steps(dtype, x=1.0, step=2.0**-10, **kwargs):
    """An input just above the middle of two numbers of a type, which a threshold of the score lies between."""
    model = nested(scores(1.0, -(x + 0.01 * step)), dtype=dtype, **kwargs)
    return model, f([[x + 0.51 * step]]), f([[x + 0.49 * step]])


def at_the_top(dtype, step):
    model = sequential((1,), scores(1.0, -(1.0 + 0.01 * step)), dtype=dtype)
    return model, f([[1.0 + 0.51 * step]]), f([[1.0 + 0.49 * step]])


def time_distributed(dtype, step):
    inner = sequential((1,), scores(1.0, -(1.0 + 0.01 * step)), dtype=dtype)
    model = sequential((1, 1), K.TimeDistributed(inner), K.Flatten())
    return model, f([[[1.0 + 0.51 * step]]]), f([[[1.0 + 0.49 * step]]])


def as_activation(dtype, step):
    inner = sequential((1,), K.Identity(), dtype=dtype)
    model = sequential((1,), scores(activation=inner), scores(1.0, -(1.0 + 0.01 * step)))
    return model, f([[1.0 + 0.51 * step]]), f([[1.0 + 0.49 * step]])


def merged(dtype, step):
    x, other = keras.Input((1,)), keras.Input((1,))
    inner = sequential((1,), K.Identity(), dtype=dtype)
    total = K.Add()([inner(x), other])
    model = keras.Model([x, other], scores(1.0, -(1.0 + 0.01 * step))(total))
    zero = f([[0.0]])
    return model, [f([[1.0 + 0.51 * step]]), zero], [f([[1.0 + 0.49 * step]]), zero]


def pixels():
    net = sequential((4,), K.Rescaling(1 / 255.0), K.Dense(2), dtype="uint8")
    kernel = np.zeros((4, 2))
    kernel[0, 0] = 1.0
    net.layers[-1].set_weights([kernel, np.array([-99.5 / 255, 0.0])])
    x = keras.Input((4,))
    moved = f([[100.0, 0, 0, 0]])
    return keras.Model(x, net(x)), moved, f([[99.999, 0, 0, 0]])


FLIPS = {
    "pixels in a nested model": pixels,
    "bytes": lambda: to_whole_numbers("uint8"),
    "integers": lambda: to_whole_numbers("int32"),
    "long integers": lambda: to_whole_numbers("int64"),
    "truth values": lambda: (nested(K.Rescaling(1.0), scores(1.0, -0.5), dtype="bool"), f([[1e-3]]), f([[0.0]])),
    "half floats": lambda: in_steps("float16"),
    "half floats in half floats": lambda: in_steps("float16", depth=3),
    "bfloat": lambda: in_steps("bfloat16", step=2.0**-7),
    "half floats at the top": lambda: at_the_top("float16", 2.0**-10),
    "bfloat at the top": lambda: at_the_top("bfloat16", 2.0**-7),
    "half floats along time": lambda: time_distributed("float16", 2.0**-10),
    "whole numbers along time": lambda: (
        sequential((1, 1), K.TimeDistributed(sequential((1,), scores(1.0, -99.5), dtype="int32")), K.Flatten()),
        f([[[100.0]]]),
        f([[[99.999]]]),
    ),
    "half floats as an activation": lambda: as_activation("float16", 2.0**-10),
    "half floats in one branch": lambda: merged("float16", 2.0**-10),
}


def predicted(model, x):
    y = to_numpy(model.predict(x, verbose=0))
    return int(y.argmax()) if y.shape[-1] > 1 else int(y[0, 0] > 0)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64:UserWarning")  # JAX makes int32 of it
@cases(FLIPS)
@pytest.mark.parametrize("rigorous", [False, True])
def test_no_radius_reaches_an_input_of_another_class(name, rigorous):
    try:
        model, x, z = FLIPS[name]()
        before, after = predicted(model, x), predicted(model, z)
    except REFUSALS:
        pytest.skip("Keras or the backend refuses to run it")
    if before == after:
        pytest.skip("this backend does not round there")
    xs, zs = (points if isinstance(points, list) else [points] for points in (x, z))
    distance = math.sqrt(sum(np.square(a.astype("float64") - b).sum() for a, b in zip(xs, zs, strict=True)))
    with or_refused():
        assert hkr.certify(model, x, verbose=0, rigorous=rigorous).radius[0] <= distance


@pytest.mark.parametrize("rigorous", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_predict_casts_by_the_global_type_is_no_certificate(dtype, rigorous):
    step = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    model = sequential((1,), scores(1.0, -(1.0 + 0.01 * step)), dtype="float32")
    x, z = f([[1.0 + 0.51 * step]]), f([[1.0 + 0.49 * step]])
    keras.config.set_floatx(dtype)
    if predicted(model, x) != predicted(model, z):
        with or_refused():
            assert hkr.certify(model, x, verbose=0, rigorous=rigorous).radius[0] <= float(x[0, 0] - z[0, 0])


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.parametrize("depth", [1, 2])
def test_nothing_else_is_claimed_about_inputs_that_are_cast(dtype, depth, tmp_path):
    model = nested(K.Rescaling(1 / 255.0), K.Dense(3), dtype=dtype, depth=depth)
    x = f([[100.0]])
    evaluation = hkr.callbacks.CertifiedEvaluation(x, [0])
    evaluation.set_model(model)
    for claim in (
        lambda: hkr.certify_top_k(model, x, 1, verbose=0),
        lambda: hkr.certify_outputs(model, x, epsilon=0.1, verbose=0),
        lambda: hkr.certify(model, x, verbose=0, local=True),
        lambda: hkr.local_bound(model, x, 0.1),
        lambda: hkr.export(model, tmp_path / FILE[FORMAT], FORMAT),
        evaluation.on_train_begin,
    ):
        with pytest.raises(ValueError, match="Expected"):
            claim()


def test_intervals_know_of_casts_on_the_way():
    model, x, z = in_steps("float16")
    with or_refused():
        found = hkr.certify_outputs(model, x, epsilon=float(x[0, 0] - z[0, 0]), verbose=0, rigorous=True)
        assert found.lower[0, 0] <= to_numpy(model.predict(z, verbose=0))[0, 0] <= found.upper[0, 0]


# ---- numbers at the edge --------------------------------------------------------------------------------------


def in_double(layers, shape):
    with state_kept(), double_precision():
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        return sequential(shape, *layers())


def columns_of(*values):
    model = in_double(lambda: [K.Dense(len(values), use_bias=True, dtype="float64")], (1,))
    model.layers[-1].set_weights([np.array([values], "float64"), np.array([0.0, *[-1e-198] * (len(values) - 1)])])
    return model


def bare(*layers, shape):
    return sequential(shape, *layers)


def squared_at_least(number, square):
    return Fraction(number) ** 2 >= Fraction(square)


def three_outputs():
    x = keras.Input((2,))
    y = K.Identity()(x)
    return keras.Model(x, [y, y, y])


SMALLEST_DEVIATION = Fraction(np.float32(1e-7).item())
#: A model and the square of its constant, an exact number.
SQUARES = {
    "RepeatVector": (lambda: bare(K.RepeatVector(3), shape=(2,)), 3),
    "RepeatVector of 7": (lambda: bare(K.RepeatVector(7), shape=(2,)), 7),
    "UpSampling1D": (lambda: bare(K.UpSampling1D(3), shape=(2, 1)), 3),
    "UpSampling2D": (lambda: bare(K.UpSampling2D((3, 5)), shape=(2, 2, 1)), 15),
    "UpSampling3D": (lambda: bare(K.UpSampling3D((1, 2, 3)), shape=(2, 2, 2, 1)), 6),
    "MaxPooling1D": (lambda: bare(K.MaxPooling1D(3, 1), shape=(9, 1)), 3),
    "MaxPooling2D": (lambda: bare(K.MaxPooling2D((3, 5), 1), shape=(15, 15, 1)), 15),
    "MaxPooling3D": (lambda: bare(K.MaxPooling3D((1, 2, 3), 1), shape=(4, 4, 9, 1)), 6),
    "Concatenate": (lambda: repeated_by(K.Concatenate()), 3),
    "outputs": (three_outputs, 3),
    "scale": (lambda: bare(L.Scale(0.1), shape=(2,)), Fraction(0.1) ** 2),
    "scales": (lambda: bare(*[L.Scale(0.1)] * 7, shape=(2,)), Fraction(0.1) ** 14),
    "rescaling": (lambda: bare(K.Rescaling(1 / 255.0), shape=(2,)), Fraction(1 / 255.0) ** 2),
    "sums": (lambda: repeated_by(K.Add(), L.Scale(0.1)), (3 * Fraction(0.1)) ** 2),
    "averages": (lambda: repeated_by(K.Average(), L.Scale(0.1)), Fraction(0.1) ** 2),
    "ELU": (lambda: bare(K.ELU(1.1), shape=(2,)), Fraction(1.1) ** 2),
    "leaky ReLU": (lambda: bare(K.LeakyReLU(1.1), shape=(2,)), Fraction(1.1) ** 2),
    "deviations of 0": (
        lambda: bare(adapted(np.zeros(2), invert=True), shape=(2,)),
        SMALLEST_DEVIATION**2,
    ),
    "small deviations": (
        lambda: bare(adapted(np.full(2, 1e-20), invert=True), shape=(2,)),
        SMALLEST_DEVIATION**2,
    ),
    "deviations of 0, divided by": (
        lambda: bare(adapted(np.zeros(2)), shape=(2,)),
        1 / SMALLEST_DEVIATION**2,
    ),
}


def repeated_by(merge, *between):
    x = keras.Input((2,))
    y = x
    for layer in between:
        y = layer(y)
    return keras.Model(x, merge([y, y, y]))


@cases(SQUARES)
def test_a_bound_is_not_below_an_irrational_constant(name):
    build, square = SQUARES[name]
    assert squared_at_least(hkr.lipschitz_bound(build()), square)


BY_THEMSELVES = {
    "RepeatVector": (lambda: K.RepeatVector(3), 3),
    "UpSampling1D": (lambda: K.UpSampling1D(3), 3),
    "UpSampling2D": (lambda: K.UpSampling2D((3, 5)), 15),
    "UpSampling3D": (lambda: K.UpSampling3D((1, 2, 3)), 6),
    "MaxPooling1D": (lambda: K.MaxPooling1D(3, 1), 3),
    "MaxPooling2D": (lambda: K.MaxPooling2D((3, 5), 1), 15),
    "MaxPooling3D": (lambda: K.MaxPooling3D((1, 2, 3), 1), 6),
    "Scale": (lambda: L.Scale(0.1), Fraction(np.float32(0.1).item()) ** 2),
    "Normalization": (
        lambda: built_for(adapted(np.zeros(2), invert=True), (1, 2)),
        Fraction(np.float32(1e-7).item()) ** 2,
    ),
}


@cases(BY_THEMSELVES)
def test_nor_is_that_of_a_layer_in_no_model(name):
    build, square = BY_THEMSELVES[name]
    assert squared_at_least(hkr.lipschitz_bound(build()), square)


def test_a_normalization_of_variance_0_is_what_float32_makes_of_it():
    model = bare(adapted(np.zeros(2), invert=True), shape=(2,))
    assert hkr.lipschitz_bound(model) >= stretch(model, f([[1.0, 0.0]]), f([[0.0, 0.0]]))


@pytest.mark.parametrize("small", [1e-200, 1e-30, 1e-160])
def test_small_columns_beside_large_ones_keep_their_distance(small):
    with double_precision(), or_refused():
        model = columns_of(0.0, small, 1.0)
        kernel = np.array([[0.0, small, 1.0]])
        model.layers[-1].set_weights([kernel, np.array([9 * small, -0.0, -1e6])])
        certificate = hkr.certify(model, np.array([[0.0]]), verbose=0)
        assert certificate.prediction[0] == 0
        assert certificate.radius[0] <= 9.0 * (1 + 1e-9)


@pytest.mark.parametrize("small", [2.0**-120, 2.0**-149])
def test_small_columns_in_single_precision(small):
    model = sequential((1,), K.Dense(3))
    model.layers[-1].set_weights([f([[0.0, small, 1.0]]), f([8 * small, 0.0, -1e6])])
    with or_refused():
        certificate = hkr.certify(model, f([[0.0]]), verbose=0)
        assert certificate.radius[0] <= 8.0 * (1 + 1e-9)


def residual_that_underflows(logit, factor, times):
    x = keras.Input((1,))
    layer = L.LipschitzResidual()
    y = layer([x, K.Rescaling(0.0)(x)])
    layer.mixing_logits.assign(f([-logit, logit]))
    for _ in range(times):
        y = L.Scale(factor)(y)
    return keras.Model(x, y)


@pytest.mark.parametrize(("logit", "times"), [(400.0, 10), (100.0, 10), (373.0, 11)])
def test_weights_that_underflow_are_not_0(logit, times):
    """In exact arithmetic the constant is `exp(-2 logit) 1e30^times`, which is huge for the first of these."""
    model = residual_that_underflows(logit, 1e30, times)
    with or_refused():
        bound = hkr.lipschitz_bound(model)
        assert math.log(bound) >= -2 * logit + times * math.log(1e30) - 1e-6 if bound else False


@pytest.mark.parametrize(
    "factors", [(1e200, 1e200), (1e200, 1e200, 0.0), (1e-200, 1e-200, 1e200, 1e200), (0.0, 1e200, 1e200)]
)
def test_overflow_and_underflow_of_products(factors):
    model = bare(*[L.Scale(k) if k else K.Rescaling(k) for k in factors], shape=(1,))
    with or_refused():
        bound = hkr.lipschitz_bound(model)
        assert np.isfinite(bound)
        assert Fraction(bound) >= math.prod(Fraction(k) for k in factors)


def test_overflow_behind_a_layer_of_zeros():
    model = bare(L.Scale(1e200), L.Scale(1e200), K.Dense(2, kernel_initializer="zeros"), shape=(2,))
    with or_refused():
        assert np.isfinite(hkr.lipschitz_bound(model))
    two = [keras.Input((2,)), keras.Input((2,))]
    sum_of_both = K.Add()([L.Scale(1e200)(L.Scale(1e200)(two[0])), two[1]])
    with or_refused():
        assert np.isfinite(hkr.lipschitz_bound(keras.Model(two, K.Dense(1, kernel_initializer="zeros")(sum_of_both))))


# ---- certificates as files --------------------------------------------------------------------------------------


def identity_model(size=2):
    return sequential((size,), K.Dense(size, kernel_initializer="identity"))


def test_slack_is_per_input():
    model, x = identity_model(), f([[1e-9, 0.0], [1e6, 0.0]])
    certificate = hkr.certify(model, x, verbose=0)
    assert certificate.verify(model, x, verbose=0)
    forged = dataclasses.replace(certificate, radius=np.array([0.9, certificate.radius[1]]))
    assert not forged.verify(model, x, verbose=0)


@pytest.mark.parametrize(("near", "far"), [(1e-6, 1e4), (1e-3, 1e5), (0.0, 1e7)])
def test_slack_is_per_input_of_others(near, far):
    model, x = identity_model(), f([[near, 0.0], [far, 0.0], [0.5, 0.25]])
    certificate = hkr.certify(model, x, verbose=0)
    assert certificate.verify(model, x, verbose=0)
    for forge in (2e-3, 0.1):
        radius = certificate.radius.copy()
        radius[0] += forge
        assert not dataclasses.replace(certificate, radius=radius).verify(model, x, verbose=0)


#: What is changed in the JSON of a certificate of two inputs and two classes.
FORGED = {
    "another norm": {"norm": "Linf"},
    "no norm": {"norm": None},
    "norm 1": {"norm": 1},
    "bound NaN": {"bound": math.nan},
    "bound of 0": {"bound": 0},
    "bound of -1": {"bound": -1},
    "infinite bound": {"bound": math.inf},
    "bound as text": {"bound": "1.0"},
    "bound of true": {"bound": True},
    "classes in fractions": {"classes": 2.5},
    "classes of 0": {"classes": 0},
    "classes as text": {"classes": "2"},
    "classes below": {"classes": -2},
    "prediction of -1": {"prediction": [-1, 0]},
    "prediction beyond the classes": {"prediction": [2, 0]},
    "predictions in fractions": {"prediction": [0.5, 0]},
    "predictions as truth values": {"prediction": [True, False]},
    "radii as text": {"radius": "12"},
    "radii of text": {"radius": ["1", "2"]},
    "radii of truth values": {"radius": [True, True]},
    "negative radius": {"radius": [-1.0, 1.0]},
    "radius NaN": {"radius": [math.nan, 1.0]},
    "a matrix of radii": {"radius": [[1.0], [1.0]]},
    "radii as an object": {"radius": {"0": 1.0, "1": 1.0}},
    "too many radii": {"radius": [1.0, 1.0, 1.0]},
    "another method": {"method": "magic"},
    "method None": {"method": None},
    "dimension of 0": {"dimension": 0},
    "dimension in fractions": {"dimension": 1.5},
    "rigorous as text": {"rigorous": "yes"},
    "rigorous of 1": {"rigorous": 1},
    "a hash that is a number": {"model_sha256": 3},
    "no statement of versions": {"versions": []},
}


@pytest.mark.once
@cases(FORGED)
def test_forged_certificates_are_not_read(name):
    certificate = hkr.certify(identity_model(), f([[1.0, 0.0], [0.0, 2.0]]), verbose=0)
    stored = {**json.loads(certificate.to_json()), **FORGED[name]}
    with pytest.raises(ValueError, match="Expected the JSON text of a certificate"):
        hkr.Certificate.from_json(json.dumps(stored))


FORGED_FILES = {
    "distances of 0": {"distances": [[0.0, 0.0], [0.0, 0.0]]},
    "tiny distances that are not symmetric": {"distances": [[0.0, 1e-9], [1e-12, 0.0]]},
    "one distance of 0": {"distances": [[0.0, 1.0], [0.0, 0.0]]},
    "score with a distance of 0": {"distances": [[0.0]], "method": "score"},
    "distances that are not symmetric": {"distances": [[0.0, 1.0], [1e-3, 0.0]]},
    "distances on the diagonal": {"distances": [[-5.0, 1.0], [1.0, 0.0]]},
    "infinite distances": {"distances": [[0.0, math.inf], [math.inf, 0.0]]},
    "distances NaN": {"distances": [[0.0, math.nan], [math.nan, 0.0]]},
    "distances as text": {"distances": [["0", "1"], ["1", "0"]]},
    "bound NaN": {"bound": math.nan},
    "bound as text": {"bound": "1"},
    "another method": {"method": "magic"},
    "score of two classes": {"method": "score"},
    "another norm": {"norm": "L1"},
}


@pytest.mark.once
@cases(FORGED_FILES)
def test_forged_constants_of_files_are_not_read(name):
    distances = np.array([[0.0, 1.0], [1.0, 0.0]])
    certificate = exporting.ExportedCertificate(distances=distances, bound=1.5, method="pairwise")
    stored = {**json.loads(certificate.to_json()), **FORGED_FILES[name]}
    with pytest.raises(ValueError, match="Expected"):
        exporting.ExportedCertificate.from_json(json.dumps(stored))


# ---- memory and time of bounds ----------------------------------------------------------------------------------

KERNELS = {
    "Conv3D of 4x4x4": lambda: bare(K.Conv3D(1, 4), shape=(8, 8, 8, 1)),
    "Conv3D of 5x5x5": lambda: bare(K.Conv3D(8, 5), shape=(8, 8, 8, 8)),
    "Conv3D of 7x7x7": lambda: bare(K.Conv3D(4, 7), shape=(9, 9, 9, 4)),
    "Conv2D of 25x25": lambda: bare(K.Conv2D(1, 25), shape=(64, 64, 1)),
    "Conv2D of 31x31 in 8 channels": lambda: bare(K.Conv2D(8, 31), shape=(64, 64, 8)),
    "Conv2D of 100x100": lambda: bare(K.Conv2D(2, 100), shape=(120, 120, 2)),
    "Conv1D of 10000": lambda: bare(K.Conv1D(2, 10_000), shape=(20_000, 2)),
    "Conv1D of 1000 in 10 channels": lambda: bare(K.Conv1D(10, 1000), shape=(2000, 10)),
    "DepthwiseConv2D of 50x50": lambda: bare(K.DepthwiseConv2D(50), shape=(64, 64, 8)),
    "Conv3D of 4x4x4, strided": lambda: bare(K.Conv3D(16, 4, strides=2), shape=(8, 8, 8, 8)),
    "Conv2DTranspose of 25x25": lambda: bare(K.Conv2DTranspose(1, 25), shape=(8, 8, 1)),
    "SeparableConv2D of 25x25": lambda: bare(K.SeparableConv2D(4, 25), shape=(64, 64, 4)),
    "SeparableConv2D of 79x79 in 6250 channels": lambda: bare(K.SeparableConv2D(6250, 79), shape=(80, 80, 8)),
    "AveragePooling2D of unknown size": lambda: bare(K.AveragePooling2D(200, 1), shape=(None, None, 1)),
    "AveragePooling1D": lambda: bare(K.AveragePooling1D(2000, 1), shape=(20_000, 1)),
    "Dense of 10 x 10000": lambda: bare(K.Dense(10), shape=(10_000,)),
    "Conv2D of 3x3 in 100 channels": lambda: bare(K.Conv2D(100, 3), shape=(32, 32, 100)),
    "Conv2D as large as its image": lambda: bare(K.Conv2D(100, 30), shape=(30, 30, 1)),
    "recurrent layer": lambda: bare(L.LipschitzSimpleRNN(16, return_sequences=True), shape=(2000, 4)),
}


#: Entries of arrays that NumPy transforms, and of matrices that it decomposes times their order: each about 5 seconds
#: of one core, where the kernels above take 1.4 at most.
WORK = {"fft": 1e8, "cos": 1e8, "eigvalsh": 1.5e9, "cholesky": 2e10, "svd": 1e8}


@pytest.mark.once
@cases(KERNELS)
def test_no_kernel_takes_a_gibibyte_or_the_work_of_seconds(name, monkeypatch):
    model, work = KERNELS[name](), dict.fromkeys(WORK, 0)

    def counted(module, name):
        function = getattr(module, name)

        def count(array, *arguments, **options):
            work[name] += np.size(array) * (np.shape(array)[-1] if module is np.linalg else 1)
            return function(array, *arguments, **options)

        monkeypatch.setattr(module, name, count)

    for module, function in ((np.fft, "fft"), (np, "cos"), *((np.linalg, f) for f in ("eigvalsh", "cholesky", "svd"))):
        counted(module, function)
    tracemalloc.start()
    try:
        bound, (_, peak) = hkr.lipschitz_bound(model), tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.isfinite(bound)
    assert peak <= 2**30
    assert {function: count for function, count in work.items() if count > WORK[function]} == {}


@pytest.mark.once
@pytest.mark.parametrize("name", ["Conv3D of 4x4x4", "Conv2D of 25x25"])
def test_rigorous_certificates_of_large_windows_take_as_little(name):
    model = sequential(KERNELS[name]().input_shape[1:], KERNELS[name]().layers[-1], K.Flatten(), K.Dense(2))
    x = full((1, *model.input_shape[1:]))
    hkr.certify(model, x, verbose=0)  # Keras and the backend allocate what is theirs
    tracemalloc.start()
    try:
        certificate, (_, peak) = (
            hkr.certify(model, x, verbose=0, rigorous=True),
            tracemalloc.get_traced_memory(),
        )
    finally:
        tracemalloc.stop()
    assert certificate.rigorous
    assert peak <= 2**30


# ---- what compilers do with constants -------------------------------------------------------------------------


def folded(*factors):
    return bare(*[L.Scale(k) for k in factors], shape=(1,))


@pytest.mark.parametrize(
    "factors", [(1e-20, 1e-20, 1e18, 1e18), (1e-30, 1e-15, 1e30, 1e15), (2.0**-100, 2.0**-60, 2.0**100, 2.0**60)]
)
def test_constants_that_a_compiler_folds(factors):
    model = folded(*factors)
    x, z = f([[3.0]]), f([[1.0]])
    with or_refused():
        found = hkr.certify_outputs(model, x, epsilon=2.0, verbose=0, rigorous=True)
        for point in (x, z):
            for output in (model.predict(point, verbose=0), model(point)):
                assert found.lower[0, 0] <= to_numpy(output)[0, 0] <= found.upper[0, 0]
    with or_refused():
        certificate = hkr.certify(model, x, verbose=0, rigorous=True)
        points = f([[3.0]]) - certificate.radius[0] * f([[0.0], [0.5], [0.999]])
        assert (to_numpy(model.predict(points, verbose=0)) > 0).ravel().tolist() == [
            bool(certificate.prediction[0])
        ] * 3


# ---- activations that are layers ------------------------------------------------------------------------------

LAYERS_AS_ACTIVATIONS = {
    "GroupSort": lambda: L.GroupSort(2),
    "MaxMin": L.MaxMin,
    "FullSort": L.FullSort,
    "Householder": L.Householder,
    "ReLU": K.ReLU,
    "LeakyReLU": lambda: K.LeakyReLU(0.1),
}


@cases(LAYERS_AS_ACTIVATIONS)
def test_a_layer_as_activation_is_stripped(name):
    model = sequential((3,), L.LipschitzDense(4, activation=LAYERS_AS_ACTIVATIONS[name]()), L.LipschitzDense(2))
    x = normal((5, 3))
    assert hkr.lipschitz_bound(model) <= 1 + 1e-5  # before anything was called
    plain = hkr.to_keras(model)
    np.testing.assert_allclose(to_numpy(plain(x)), to_numpy(model(x)), atol=1e-5)
    assert "hkr_keras" not in json.dumps(plain.get_config(), default=str)
    assert hkr.lipschitz_bound(model) <= 1 + 1e-5


@pytest.mark.parametrize("name", ["Orthonormal", "SpectralBall", "UnitNorm", "DeferredOrthonormal"])
def test_an_initializer_of_a_constraint_is_saved(name):
    layer = L.LipschitzDense(4, kernel_constraint=getattr(hkr.constraints, name)())
    layer.build((None, 3))
    for constraint in (layer.kernel_constraint, getattr(hkr.constraints, name)()):
        initializer = constraint.initializer("glorot_uniform")
        stored = json.loads(json.dumps(keras.initializers.serialize(initializer)))
        again = keras.initializers.deserialize(stored)
        assert type(again) is type(initializer)
        assert np.linalg.norm(to_numpy(again((3, 4))), 2) <= (1 + 1e-5 if name != "UnitNorm" else 2.0)
    plain = K.Dense(4, kernel_initializer=hkr.constraints.Orthonormal().initializer("glorot_uniform"))
    model = sequential((3,), plain)
    again = keras.models.model_from_json(model.to_json())
    assert type(again.layers[-1].kernel_initializer) is type(plain.kernel_initializer)


# ---- what is accepted, and how tight ------------------------------------------------------------------------------


def behind(*layers, shape=(4, 4, 3)):
    return bare(*layers, shape=shape)


def spectral():
    model = bare(K.SpectralNormalization(K.Dense(2)), shape=(3,))
    norm = np.linalg.norm(to_numpy(model.layers[-1].layer.kernel), 2)
    return model, float(norm)


def both_signs(*before):
    x = keras.Input((2,))
    h = x
    for layer in before:
        h = layer(h)
    return keras.Model(x, K.Concatenate()([K.ReLU()(h), K.ReLU()(L.Scale(-1.0)(h))]))


#: A model and the largest bound that it may have.
ACCEPTED = {
    **{
        name: (lambda name=name, arguments=arguments: behind(getattr(K, name)(*arguments)), 1.0)
        for name, arguments in {
            "RandomFlip": (),
            "RandomRotation": (0.1,),
            "RandomZoom": (0.1,),
            "RandomTranslation": (0.1, 0.1),
            "RandomContrast": (0.1,),
            "RandomBrightness": (0.1,),
            "RandomCrop": (4, 4),
            "RandomShear": (0.1,),
            "RandomErasing": (),
            "RandomGrayscale": (),
            "RandomHue": (0.1,),
            "RandomSaturation": (0.1,),
            "RandomSharpness": (0.1,),
            "RandomGaussianBlur": (),
            "RandomInvert": (),
            "RandomPosterization": (4,),
            "RandomColorDegeneration": (0.1,),
            "CenterCrop": (2, 2),
            "Resizing": (4, 4),
        }.items()
        if hasattr(K, name)
    },
    "relu of ops": (lambda: bare(K.Activation(keras.ops.relu), shape=(3,)), 1.0),
    "relu of ops as an argument": (lambda: bare(ones(activation=keras.ops.relu), shape=(4,)), 2.0),
    "tanh of ops": (lambda: bare(K.Activation(keras.ops.tanh), shape=(3,)), 1.0),
    "a list of scales": (lambda: bare(K.Rescaling([1.0, 0.5, 2.0]), shape=(3,)), 2.0),
    "a tuple of scales": (lambda: bare(K.Rescaling((1.0, 0.5, 2.0), (0.0, 1.0, 0.0)), shape=(3,)), 2.0),
    "list of means": (lambda: bare(K.Normalization(mean=[0.0, 1.0], variance=[1.0, 4.0]), shape=(2,)), 1.0),
    "softmax": (lambda: bare(K.Softmax(), shape=(3,)), 0.5),
    "softmax behind Dense": (lambda: bare(ones(2), K.Softmax(), shape=(2,)), 1.0),
    "softmax along an axis": (lambda: bare(K.Softmax(axis=1), shape=(3, 2)), 0.5),
    "average of a nested model": (
        lambda: applied(inner_model(K.GlobalAveragePooling2D(), shape=(None, None, 3)), (8, 8, 3)),
        1 / 8,
    ),
    "average in a model in a model": (
        lambda: applied(
            inner_model(inner_model(K.GlobalAveragePooling1D(), shape=(None, 3)), shape=(None, 3)), (16, 3)
        ),
        1 / 4,
    ),
    "pooling of a nested model": (
        lambda: applied(inner_model(K.AveragePooling1D(2), shape=(None, 3)), (8, 3)),
        math.sqrt(0.5),
    ),
    "relu of both signs": (both_signs, 1.0),
    "relu of both signs of a Dense layer": (lambda: both_signs(K.Dense(2, kernel_initializer="identity")), 1.0),
}


@cases(ACCEPTED)
def test_what_is_sound_is_accepted(name):
    build, largest = ACCEPTED[name]
    model = build()
    bound = hkr.lipschitz_bound(model)
    assert bound <= largest * (1 + 1e-6)
    shape = [each or 4 for each in model.input_shape[1:]]
    for seed in range(3):
        assert bound >= stretch(model, normal((1, *shape), seed), normal((1, *shape), seed + 10)) * (1 - 1e-5)


#: Layers that augment images, and what they have to be given.
AUGMENTATION = {
    name: arguments
    for arguments, names in {
        (): (
            *(
                "AugMix",
                "CutMix",
                "MixUp",
                "RandAugment",
                "RandomColorJitter",
                "RandomElasticTransform",
                "RandomErasing",
            ),
            *("RandomFlip", "RandomGaussianBlur", "RandomGrayscale", "RandomInvert", "RandomPerspective"),
        ),
        (0.1,): (
            *("RandomBrightness", "RandomColorDegeneration", "RandomContrast", "RandomHue", "RandomRotation"),
            *("RandomSaturation", "RandomSharpness", "RandomShear", "RandomZoom"),
        ),
        (4,): ("RandomPosterization",),
        (0.1, 0.1): ("RandomTranslation",),
        (4, 4): ("CenterCrop", "RandomCrop", "Resizing"),  # to the size that the images have
    }.items()
    for name in names
    if hasattr(K, name)
}


@pytest.mark.many
@cases(AUGMENTATION)
def test_augmentation_changes_nothing_at_inference(name):
    """Neither rounded nor clipped, whatever the range of the numbers."""
    model = sequential((4, 4, 3), getattr(K, name)(*AUGMENTATION[name]))
    x = 300 * normal((2, 4, 4, 3))
    assert hkr.lipschitz_bound(model) == pytest.approx(1.0, rel=1e-9)
    for outputs in (model(x, training=False), model.predict(x, verbose=0)):
        np.testing.assert_array_equal(to_numpy(outputs, "float32"), x)


@pytest.mark.once
def test_all_layers_of_images_are_in_that_table():
    known = {cls.__name__ for cls in registry.LAYERS if "image_preprocessing" in cls.__module__}
    assert known == set(AUGMENTATION)


def test_a_shifted_sigmoid_is_a_score():
    for layers in (
        [K.Dense(1, activation="sigmoid"), K.Rescaling(1.0, -0.5)],
        [K.Dense(1, activation="sigmoid"), L.Scale(2.0), K.Rescaling(1.0, -1.0)],
        [K.Dense(1), K.Activation("sigmoid"), K.Rescaling(2.0, -1.0), K.Flatten()],
    ):
        assert np.isfinite(hkr.certify(bare(*layers, shape=(2,)), f([[1.0, 2.0]]), verbose=0).radius).all()


def test_the_stored_kernel_of_spectral_normalization_is_plain():
    model, norm = spectral()
    assert hkr.lipschitz_bound(model) <= norm * (1 + 1e-6)
    assert hkr.lipschitz_bound(model) >= stretch(model, normal((1, 3)), np.zeros((1, 3))) * (1 - 1e-6)


NAMED = {
    "attention": lambda: bare_two(K.Attention()),
    "additive attention": lambda: bare_two(K.AdditiveAttention()),
    "multi-head attention": lambda: bare_two(K.MultiHeadAttention(2, 4)),
    "LSTM": lambda: bare(K.LSTM(3, name="guilty"), shape=(4, 3)),
    "masking": lambda: bare(K.Masking(name="guilty"), shape=(4, 3)),
    "Lambda": lambda: bare(K.Lambda(lambda x: 2 * x, name="guilty"), shape=(3,)),
    "layer normalization": lambda: bare(K.LayerNormalization(name="guilty"), shape=(3,)),
    "RMS normalization": lambda: bare(K.RMSNormalization(name="guilty"), shape=(3,)),
    "einsum": lambda: bare(K.EinsumDense("ab,bc->ac", 3, name="guilty"), shape=(3,)),
    "product": lambda: bare_two(K.Multiply()),
    "dot product": lambda: bare_two(K.Dot(axes=-1)),
    "masked average": lambda: bare(K.Masking(name="guilty"), K.GlobalAveragePooling1D(), shape=(4, 3)),
}


def bare_two(layer):
    layer.name = "guilty"
    two = [keras.Input((4, 3)), keras.Input((4, 3))]
    arguments = two if isinstance(layer, K.MultiHeadAttention) else [two]
    return keras.Model(two, layer(*arguments))


@cases(NAMED)
def test_the_layer_is_named(name):
    model = NAMED[name]()
    with pytest.raises(ValueError, match="guilty"):
        hkr.lipschitz_bound(model)


def test_composed_kernels_name_the_way_out():
    layer = L.ReflectorDense(3, rank=3)
    model = bare(layer, K.Dense(2), shape=(3,))
    layer.vectors.assign(np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"to_keras\(model, kernels_only=True\)"):
        hkr.certify(model, full((1, 3)), verbose=0, rigorous=True)


# ---- folding ----------------------------------------------------------------------------------------------------


def matrix_of(model):
    """The linear part of a model that is affine, of one flat input, from its weights in float64 by hand."""
    size = model.input_shape[1:]
    points = np.eye(math.prod(size), dtype="float32").reshape(-1, *size)
    zero = to_numpy(model(zeros((1, *size))))
    return (to_numpy(model(points)) - zero).reshape(len(points), -1)


def normalization_and_dense():
    rng = np.random.default_rng(0)
    deviations = np.geomspace(1e-3, 1e2, 8)
    model = sequential((8,), K.Normalization(mean=np.zeros(8), variance=deviations**2), K.Dense(4, use_bias=False))
    kernel = rng.standard_normal((8, 4)) * deviations[:, None]
    model.layers[-1].set_weights([f(kernel)])
    return model


def dense_bn_dense():
    rng = np.random.default_rng(0)
    gains = np.geomspace(1e-2, 1e2, 8)
    model = sequential((8,), K.Dense(8, use_bias=False), K.BatchNormalization(epsilon=1e-6), K.Dense(4, use_bias=False))
    first, last = rng.standard_normal((8, 8)) / gains, rng.standard_normal((8, 4)) / gains[::-1, None]
    model.layers[0].set_weights([f(first)])
    variance = f(1 / gains**2)
    model.layers[1].set_weights([full(8), zeros(8), zeros(8), variance])
    model.layers[2].set_weights([f(last)])
    return model


def rescaling_and_dense():
    scales = np.geomspace(1e-3, 1e3, 6)
    model = sequential((6,), K.Rescaling(scales), K.Dense(3, use_bias=False))
    model.layers[-1].set_weights([f(normal((6, 3)) / scales[:, None])])
    return model


def normalization_of_channels_and_convolution():
    deviations = np.geomspace(1e-2, 1e1, 4)
    model = sequential(
        (6, 6, 4), K.Normalization(mean=np.zeros(4), variance=deviations**2), K.Conv2D(3, 3, use_bias=False)
    )
    model.layers[-1].set_weights([f(normal((3, 3, 4, 3)) * deviations[:, None])])
    return model


def convolution_and_bn():
    gains = np.geomspace(1e-2, 1e2, 4)
    model = sequential((6, 6, 2), K.Conv2D(4, 3, use_bias=False), K.BatchNormalization(epsilon=1e-6))
    model.layers[0].set_weights([f(normal((3, 3, 2, 4)) / gains)])
    model.layers[1].set_weights([full(4), zeros(4), zeros(4), f(1 / gains**2)])
    return model


def whole_window():
    model = sequential((6, 6, 1), K.Conv2D(4, 6, use_bias=False), K.Flatten())
    keras.utils.set_random_seed(0)
    model.layers[0].set_weights([normal((6, 6, 1, 4))])
    return model


def whole_window_1d():
    model = sequential((12, 2), K.Conv1D(3, 12, use_bias=False))
    model.layers[0].set_weights([normal((12, 2, 3))])
    return model


FOLDED = {
    "Normalization, Dense": (normalization_and_dense, 1.001),
    "Dense, BatchNormalization, Dense": (dense_bn_dense, 1.001),
    "Rescaling, Dense": (rescaling_and_dense, 1.001),
    "Normalization, Conv2D": (normalization_of_channels_and_convolution, 1.35),
    "Conv2D, BatchNormalization": (convolution_and_bn, 1.35),
    "window as large as the image": (whole_window, 1.001),
    "window as long as the sequence": (whole_window_1d, 1.001),
}


@cases(FOLDED)
def test_diagonal_layers_fold(name):
    build, slack = FOLDED[name]
    model = build()
    true = np.linalg.norm(matrix_of(model), 2)
    assert true * (1 - 1e-5) <= hkr.lipschitz_bound(model) <= true * slack


# ---- exported files -----------------------------------------------------------------------------------------------

FORMATS = {"tensorflow": ["tf_saved_model", "onnx", "litert"], "torch": ["onnx"], "jax": ["tf_saved_model"]}[BACKEND]
FORMAT = FORMATS[0]
FILE = {"tf_saved_model": "net", "onnx": "net.onnx", "litert": "net.tflite"}

DEEP = {
    "200 scales": lambda: [L.Scale(1 + 2.0**-24 + 2.0**-40) for _ in range(200)],
    "200 rescalings": lambda: [K.Rescaling(1 + 2.0**-24 + 2.0**-40) for _ in range(200)],
    "40 centrings": lambda: [L.BatchCentering() for _ in range(40)],
    "100 scales of a third": lambda: [L.Scale(k) for _ in range(50) for k in (1 / 3, 3.0)],
}


@pytest.mark.many
@cases(DEEP)
def test_constants_of_a_file_grow_with_its_depth(name, tmp_path):
    """The score is 0 at 0, so that no radius is above the distance of an input from there."""
    model = bare(*DEEP[name](), shape=(1,))
    path = tmp_path / FILE[FORMAT]
    with or_refused():
        hkr.export(model, path, FORMAT)
        assert exporting.load(path).certify(f([[1000.0]])).radius[0] <= 1000.0


def test_a_file_is_what_the_model_computes_after_a_pop(tmp_path):
    model = sequential((2,), K.Dense(2, kernel_initializer="identity"), L.Scale(10.0))
    model._layers.pop()
    x, path = f([[1.0, 0.5]]), tmp_path / FILE[FORMAT]
    with or_refused():
        np.testing.assert_allclose(to_numpy(hkr.to_keras(model)(x)), to_numpy(model(x)))
    with or_refused():
        hkr.export(model, path, FORMAT)
        np.testing.assert_allclose(exporting.load(path).predict(x), to_numpy(model(x)))


def test_an_insertion_into_the_list_of_layers(tmp_path):
    model = sequential((2,), K.Dense(2, kernel_initializer="identity"))
    extra = L.Scale(10.0)
    extra(full((1, 2)))
    model._layers.append(extra)
    x = f([[1.0, 0.5]])
    with or_refused():
        np.testing.assert_allclose(to_numpy(hkr.to_keras(model)(x)), to_numpy(model(x)))


def test_a_file_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    before = keras.Model.export

    def export(model, *args, **kwargs):
        for weight in model.trainable_weights:
            weight.assign(2 * to_numpy(weight))
        return before(model, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "export", export)
    with pytest.raises(ValueError, match="Expected"):
        hkr.export(sequential((2,), K.Dense(2)), tmp_path / FILE[FORMAT], FORMAT)


@pytest.mark.skipif("onnx" not in FORMATS, reason="needs ONNX")
def test_weights_outside_an_onnx_file_are_hashed(tmp_path):
    onnx = pytest.importorskip("onnx")

    path = tmp_path / "net.onnx"
    hkr.export(sequential((8,), K.Dense(8)), path, "onnx")
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = exporting.certificate.file_hash(path)
    weights = tmp_path / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[3] ^= 255
    weights.write_bytes(bytes(content))
    assert exporting.certificate.file_hash(path) != before


@pytest.mark.skipif("litert" not in FORMATS, reason="needs LiteRT")
@pytest.mark.parametrize("option", ["optimizations", "float16"])
def test_a_quantised_file_has_no_constants_of_the_float_model(option, tmp_path):
    import tensorflow as tf

    options = {"optimizations": [tf.lite.Optimize.DEFAULT]}
    if option == "float16":
        options["target_spec"] = {"supported_types": [tf.float16]}
    model = sequential((64,), K.Dense(64), K.ReLU(), K.Dense(3))
    with or_refused():
        hkr.export(model, tmp_path / "net.tflite", "litert", **options)
        x = normal((50, 64))
        np.testing.assert_allclose(exporting.load(tmp_path / "net.tflite").predict(x), to_numpy(model(x)), atol=1e-4)
