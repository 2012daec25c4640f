"""Layers and models that several tests take: each case makes them anew, so that no test changes those of another."""

import math
from functools import partial

import keras
import numpy as np

import hkr_keras as hkr

K, L = keras.layers, hkr.layers
IMAGE, SEQUENCE, VECTOR = (6, 6, 4), (6, 4), (8,)


def name(value):
    """Of a case, for the name of a test: the first class that it calls; `None` for anything else."""
    if isinstance(value, (partial, type)):
        return getattr(value, "func", value).__name__
    called = value.__code__.co_names if hasattr(value, "__code__") else ()
    return next((each for each in called if len(each) > 1 and each[0].isupper()), None)


# ---- layers ---------------------------------------------------------------------------------------------

LINEAR = [
    # layer, input shape, how much the bound may lie above the norm of the explicit operator
    (lambda: K.Dense(3), (4,), 1.01),
    (lambda: K.Dense(3), (2, 4), 1.01),
    (lambda: K.Conv1D(3, 3, padding="causal"), (40, 2), 1.03),
    (lambda: K.Conv1D(3, 3, dilation_rate=2, padding="same"), (40, 2), 1.03),
    (lambda: K.Conv2D(3, 3, strides=2, padding="same"), (8, 8, 2), 1.3),
    (lambda: K.Conv1DTranspose(2, 4, strides=2), (20, 2), 1.03),
    (lambda: K.SeparableConv1D(3, 3, padding="same"), (40, 2), 1.5),
    (lambda: K.DepthwiseConv2D(3, depth_multiplier=2), (9, 9, 2), 1.3),
    (lambda: K.AveragePooling1D(2), (6, 2), 1.01),
    (lambda: K.AveragePooling1D(3, 1), (8, 1), 1.1),
    (lambda: K.AveragePooling2D(3, 2, padding="same"), (5, 5, 2), 6.0),
    (lambda: K.AveragePooling2D(2, padding="same"), (5, 5, 1), 1.01),
    (lambda: K.AveragePooling3D(2), (2, 2, 4, 1), 1.01),
    (K.GlobalAveragePooling2D, (3, 3, 2), 3.01),
    (lambda: K.Rescaling(2.5, offset=-1.0), (4,), 1.01),
    (lambda: K.Normalization(mean=[1.0, 2.0, 0.0], variance=[4.0, 0.25, 1.0]), (5, 3), 1.01),
    (lambda: K.Normalization(mean=1.0, variance=9.0, axis=None), (4,), 1.01),
    (lambda: K.Normalization(mean=[1.0, 2.0], variance=[4.0, 0.25], invert=True), (2,), 1.01),
    (lambda: K.UpSampling1D(3), (4, 2), 1.01),
    (lambda: K.UpSampling2D((2, 3)), (3, 3, 1), 1.01),
    (lambda: K.UpSampling3D(2), (2, 2, 2, 1), 1.01),
    (lambda: K.Rescaling([0.5, -2.0, 1.0]), (4, 3), 1.01),
    (lambda: K.RepeatVector(5), (3,), 1.01),
    (lambda: K.TimeDistributed(K.Dense(3)), (4, 2), 1.01),
    (K.BatchNormalization, (3,), 1.01),
    (lambda: K.BatchNormalization(scale=False), (4, 3), 1.01),
    (lambda: K.ZeroPadding2D(1), (3, 3, 1), 1.01),
    (lambda: K.Cropping1D(1), (5, 2), 1.01),
    (lambda: K.Permute((2, 1)), (3, 4), 1.01),
    (K.Flatten, (3, 2), 1.01),
    (lambda: K.Dropout(0.5), (4,), 1.01),
    (lambda: L.Scale(-3.0), (4,), 1.01),
    (L.LayerCentering, (4,), 1.01),
    (L.BatchCentering, (4,), 1.01),
    (L.LipschitzBatchNormalization, (3, 4), 1.00001),
    (lambda: L.LipschitzBatchNormalization(scale=False, center=False), (4,), 1.00001),
    (L.SpatialShift1D, (4, 3), 1.01),
    (lambda: L.SpatialShift2D(padding="same"), (3, 4, 5), 1.01),
    (lambda: L.ChannelShuffle(3), (2, 6), 1.01),
]

NONLINEAR = [
    # layer, input shape, exact constant
    (lambda: K.MaxPooling1D(2), (6, 2), 1.0),
    (lambda: K.MaxPooling1D(3, 1, padding="same"), (7, 1), math.sqrt(3)),
    (lambda: K.MaxPooling2D(3, 2), (7, 7, 1), 2.0),
    (lambda: K.MaxPooling2D(2, padding="same"), (5, 5, 1), 1.0),
    (lambda: K.MaxPooling3D(2), (4, 2, 2, 1), 1.0),
    (K.GlobalMaxPooling1D, (5, 2), 1.0),
    (lambda: K.ReLU(negative_slope=2.0), (4,), 2.0),
    (lambda: K.ReLU(max_value=1.0), (4,), 1.0),
    (lambda: K.LeakyReLU(negative_slope=0.1), (4,), 1.0),
    (lambda: K.ELU(alpha=2.0), (4,), 2.0),
    (lambda: K.PReLU(alpha_initializer=keras.initializers.Constant(-3.0)), (4,), 3.0),
    (lambda: K.Activation("tanh"), (4,), 1.0),
    (K.Softmax, (4,), None),
    (lambda: L.GroupSort(2), (4,), 1.0),
    (L.Householder, (4,), 1.0),
    (lambda: L.L2NormPooling2D(3, 1), (5, 5, 1), 1.0),
]

SIZED = [
    # layer, input shape: with the size at hand the bound is the norm
    (lambda: K.AveragePooling1D(3, 1), (8, 1)),
    (lambda: K.AveragePooling1D(4, 3, padding="same"), (8, 2)),
    (lambda: K.AveragePooling2D(3, 2, padding="same"), (5, 8, 2)),
    (lambda: K.AveragePooling2D((2, 3), (1, 2), padding="same"), (6, 4, 1)),
    (lambda: K.AveragePooling3D(2, 1, padding="same"), (3, 3, 4, 1)),
    (lambda: K.AveragePooling1D(3, 2, padding="same"), (4, 1)),
    (K.GlobalAveragePooling1D, (7, 2)),
    (K.GlobalAveragePooling2D, (3, 5, 2)),
    (K.GlobalAveragePooling3D, (2, 2, 3, 1)),
]

ROUNDED = [
    # layer, input shape: float32 against float64
    (lambda: K.Dense(5), (300,)),
    (lambda: K.Dense(4, activation="relu"), (3, 40)),
    (lambda: L.LipschitzDense(4, activation="leaky_relu"), (40,)),
    (lambda: K.Conv1D(4, 3, padding="causal", dilation_rate=2), (20, 3)),
    (lambda: K.Conv2D(4, 3, strides=2, padding="same"), (9, 9, 5)),
    (lambda: K.Conv2D(4, 3, groups=2), (7, 7, 4)),
    (lambda: L.LipschitzConv2D(4, 3, strides=2, padding="circular"), (6, 8, 5)),
    (lambda: L.LipschitzConv1D(4, 5, padding="circular", activation="relu"), (3, 40)),  # longer than the circle
    (lambda: K.Conv3D(2, 2), (4, 4, 4, 2)),
    (lambda: K.Conv1DTranspose(3, 4, strides=2), (9, 5)),
    (lambda: K.Conv2DTranspose(3, 3, strides=2, padding="same"), (4, 4, 5)),
    (lambda: K.DepthwiseConv2D(3, depth_multiplier=2), (6, 6, 3)),
    (lambda: K.SeparableConv1D(4, 3, depth_multiplier=2, padding="same"), (12, 3)),
    (lambda: L.LipschitzSeparableConv2D(4, 3), (6, 6, 3)),
    (lambda: K.TimeDistributed(K.Dense(3)), (4, 50)),
    (lambda: K.AveragePooling1D(3, 1, padding="same"), (9, 2)),
    (lambda: K.AveragePooling2D(2), (6, 6, 3)),
    (K.GlobalAveragePooling2D, (9, 9, 3)),
    (lambda: L.ScaledAveragePooling2D(3, 2, padding="same"), (7, 7, 2)),
    (lambda: L.ScaledAveragePooling1D(4), (12, 3)),
    (L.ScaledGlobalAveragePooling2D, (9, 9, 2)),
    (lambda: L.L2NormPooling2D(3), (9, 9, 2)),
    (lambda: L.L2NormPooling1D(2, padding="same"), (9, 2)),
    (L.GlobalL2NormPooling1D, (50, 2)),
    (K.BatchNormalization, (6, 4)),
    (lambda: K.Normalization(mean=[1.0, -30.0, 2.0], variance=[4.0, 0.3, 1.0]), (3,)),
    (lambda: K.Rescaling(1 / 255, offset=-0.3), (20,)),
    (L.LayerCentering, (40,)),
    (L.BatchCentering, (5, 4)),
    (L.LipschitzBatchNormalization, (6, 4)),
    (lambda: L.GroupSort(2), (30,)),
    (lambda: L.GroupSort(5), (30,)),
    (L.MaxMin, (30,)),
    (L.Householder, (30,)),
    (lambda: L.Scale(-1 / 3), (10,)),
    (lambda: K.ReLU(negative_slope=0.3), (10,)),
    (lambda: K.LeakyReLU(negative_slope=0.7), (10,)),
    (lambda: K.PReLU(alpha_initializer=keras.initializers.Constant(0.3)), (10,)),
    (lambda: K.Activation("relu6"), (10,)),
    (lambda: K.MaxPooling2D(2), (6, 6, 2)),
    (K.Flatten, (3, 3)),
    (lambda: K.UpSampling2D(2), (3, 3, 2)),
    (lambda: L.InvertibleDownsampling2D(2), (4, 4, 2)),
    (L.SpatialShift2D, (3, 4, 6)),
    (lambda: L.ChannelShuffle(2), (3, 6)),
]

MERGES = [K.Add, K.Average, K.Maximum, K.Concatenate, L.LipschitzResidual, K.Subtract]

IMAGES = [
    # layers that take (4, 4, 4)
    *(lambda: L.GroupSort(2), lambda: L.GroupSort(4), L.MaxMin, L.FullSort),
    *(L.Householder, lambda: L.ScaledAveragePooling2D(2), lambda: L.L2NormPooling2D(3, 1, "same")),
    *(L.ScaledGlobalAveragePooling2D, L.GlobalL2NormPooling2D),
    *(lambda: L.InvertibleDownsampling2D(2), lambda: L.InvertibleUpsampling2D(2)),
    *(L.LayerCentering, L.BatchCentering, L.LipschitzBatchNormalization, lambda: L.Scale(2.0)),
    lambda: L.ChannelShuffle(2),
]


def _converted():
    for n, shape in ((1, SEQUENCE), (2, IMAGE), (3, (4, 4, 4, 2))):
        yield partial(getattr(L, f"LipschitzConv{n}D"), 4, 3, padding="same", activation="relu"), shape
        yield partial(getattr(L, f"LipschitzConv{n}DTranspose"), 4, 3, strides=2), shape
        for kind in ("ScaledAverage", "L2Norm"):
            yield partial(getattr(L, f"{kind}Pooling{n}D"), 2), shape
            yield partial(getattr(L, f"{kind}Pooling{n}D"), 3, 2, padding="same"), shape
    for n, shape in ((1, SEQUENCE), (2, IMAGE)):
        yield partial(getattr(L, f"LipschitzDepthwiseConv{n}D"), 3, padding="same", depth_multiplier=2), shape
        yield partial(getattr(L, f"LipschitzSeparableConv{n}D"), 4, 3, padding="same"), shape
        for padding in ("same", "valid", "circular"):
            yield partial(getattr(L, f"OrthogonalConv{n}D"), 8, 3, strides=2, padding=padding, activation="relu"), shape
            yield partial(getattr(L, f"OrthogonalConv{n}DTranspose"), 4, 3, strides=2, padding=padding), shape
        yield partial(getattr(L, f"ScaledGlobalAveragePooling{n}D")), shape
        yield partial(getattr(L, f"GlobalL2NormPooling{n}D"), keepdims=True), shape
    yield partial(L.LipschitzDense, 4), VECTOR
    yield partial(L.LipschitzDense, 4, kernel_constraint=hkr.constraints.UnitNorm(), use_bias=False), SEQUENCE
    yield partial(L.OrthogonalConv1D, 4, 3, padding="causal"), SEQUENCE
    yield partial(L.ReflectorDense, 4), VECTOR
    yield partial(L.AOLDense, 4), VECTOR
    yield partial(L.AOLConv2D, 4, 3), IMAGE
    yield partial(L.SLLDense, 4), VECTOR
    yield partial(L.SLLConv2D, 4, 3), IMAGE
    yield partial(L.LipschitzSimpleRNN, 4), SEQUENCE
    yield partial(L.LipschitzSimpleRNN, 4, return_sequences=True, go_backwards=True), SEQUENCE
    for shape in (VECTOR, IMAGE, (128,)):
        for make in (partial(L.GroupSort, 2), partial(L.GroupSort, 4), L.MaxMin, L.FullSort, L.Householder):
            yield make, shape
    yield partial(L.GroupSort, 2, axis=1), (8, 5, 3)
    for cls, axis in ((L.MaxMin, 1), (L.Householder, 1), (L.FullSort, 2)):
        yield partial(cls, axis=axis), (8, 5, 3)
    yield partial(L.InvertibleDownsampling2D, (2, 3)), IMAGE
    yield partial(L.InvertibleUpsampling2D, (1, 2)), IMAGE
    for padding in ("circular", "same"):
        yield partial(L.SpatialShift1D, padding), SEQUENCE
        yield partial(L.SpatialShift2D, padding, data_format="channels_first"), (6, 5, 4)
    yield partial(L.ChannelShuffle, 2), IMAGE
    yield partial(L.ChannelShuffle, 3, axis=1), IMAGE
    yield partial(L.Scale, -2.5), VECTOR
    yield L.LayerCentering, IMAGE
    yield partial(L.LayerCentering, axis=(1, 2), center=False), IMAGE
    yield L.BatchCentering, IMAGE
    yield partial(L.BatchCentering, center=False, axis=1), IMAGE
    yield L.LipschitzBatchNormalization, IMAGE
    yield partial(L.LipschitzBatchNormalization, axis=1, center=False, scale=False, epsilon=0.5), IMAGE


CONVERTED = list(_converted())


# ---- models ---------------------------------------------------------------------------------------------


def doubling(factor, **kwargs):
    return K.Rescaling(factor, **kwargs)


def graph(make, inputs=1):
    """A functional model with inputs of 4 features."""
    x = [keras.Input((4,)) for _ in range(inputs)]
    return keras.Model(x if inputs > 1 else x[0], make(*x))


def threefold():
    return K.Dense(4, use_bias=False, kernel_initializer=lambda shape, dtype=None: 3 * np.eye(4, dtype="float32"))


def twice(layer):
    return lambda x: layer(layer(x))


GRAPHS = [
    # name, model, constant (known, since every branch is a multiple of the identity)
    ("add", lambda: graph(lambda x: K.Add()([x, doubling(2.0)(x)])), 3.0),
    ("add twice the same", lambda: graph(lambda x: K.Add()([x, x])), 2.0),
    ("subtract", lambda: graph(lambda x: K.Subtract()([x, doubling(-2.0)(x)])), 3.0),
    ("average", lambda: graph(lambda x: K.Average()([x, doubling(2.0)(x)])), 1.5),
    ("concatenate", lambda: graph(lambda x: K.Concatenate()([doubling(3.0)(x), doubling(4.0)(x)])), 5.0),
    ("residual", lambda: graph(lambda x: L.LipschitzResidual()([x, doubling(5.0)(x)])), 3.0),
    ("two inputs, add", lambda: graph(lambda x, z: K.Add()([doubling(3.0)(x), doubling(4.0)(z)]), 2), 5.0),
    ("two outputs", lambda: graph(lambda x: [doubling(3.0)(x), doubling(4.0)(x)]), 5.0),
    ("shared layer", lambda: graph(twice(threefold())), 9.0),
    ("nested", lambda: graph(lambda x: graph(lambda z: K.Add()([z, threefold()(z)]))(doubling(2.0)(x))), 8.0),
    (
        "nested Sequential",
        lambda: keras.Sequential([keras.Input((4,)), keras.Sequential([doubling(2.0), L.Scale(3.0)]), K.Flatten()]),
        6.0,
    ),
    (
        "one model of two inputs inside another",
        lambda: graph(lambda x: graph(lambda y, z: K.Subtract()([y, doubling(2.0)(z)]), 2)([x, doubling(-1.0)(x)])),
        3.0,
    ),
]


def mlp():
    return keras.Sequential([keras.Input((30,)), K.Dense(40), L.GroupSort(2), K.Dense(20), K.Dense(3)])


def cnn():
    return keras.Sequential(
        [
            *(keras.Input((8, 8, 1)), L.LipschitzConv2D(8, 3, padding="same"), L.MaxMin(), L.L2NormPooling2D(2)),
            *(L.BatchCentering(), K.Flatten(), L.LipschitzDense(10), L.FullSort(), K.Dropout(0.5), L.Scale(2.0)),
            *(K.Dense(3), L.Scale(-0.7)),
        ]
    )


def residual():
    x = keras.Input((30,))
    h = L.LipschitzDense(30)(x)
    h = L.LipschitzResidual()([x, L.GroupSort(2)(h)])
    h = K.Add()([K.Average()([h, x]), K.Subtract()([x, h])])
    return keras.Model(x, K.Dense(3)(K.Concatenate()([h, x])))


MODELS = [mlp, cnn, residual]
