"""Plain Keras layers in place of the layers of this package: what is shipped."""

import functools
import json
import math
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from hkr_keras import layers
from hkr_keras.certification.checks import build_shape
from hkr_keras.conversion.rebuilding import Layer, Rebuilder, StandIns, copied, from_config, nothing, operations_of
from hkr_keras.geometry import kernel_geometries
from hkr_keras.layers.activations import MATRIX_CHANNELS, pair_differences
from hkr_keras.layers.base import ComposedKernel, LipschitzLayer
from hkr_keras.layers.pooling import SQUARED_FLOOR

_k = keras.layers


def to_keras(model, kernels_only: bool = False):
    """A copy of a model in plain Keras layers, with equal outputs: what you ship.

    The result needs Keras alone to be loaded, and costs what plain layers of these shapes cost: kernels that are
    composed in the forward pass are stored. It is meant for inference; nothing holds it on the constraint set. Layers
    that are not of this package are copied. Activations and poolings that Keras has no layer for become small models of
    Keras layers and operations.

    Args:
        model: a built Sequential or functional model, nested or not.
        kernels_only: whether to convert only the layers with a kernel and leave the other layers of this package as
            they are. Such a model can still be certified, and with `rigorous=True` where composed kernels could not.

    Returns:
        A model that is not compiled. Outputs differ by what float32 rounds, about 1e-6 for outputs of order 1.

    Raises:
        ValueError: for a model that is not built or has a forward pass of its own; for layers whose conversion needs a
            size that is unknown; for layers of yours that hold one of this package.

    Example:

    >>> model = keras.Sequential([keras.Input((8, 8, 1)), layers.OrthogonalConv2D(4, 3), layers.GroupSort(2)])
    >>> [type(layer).__name__ for layer in to_keras(model).layers]
    ['Conv2D', 'Functional']
    >>> [type(layer).__name__ for layer in to_keras(model, kernels_only=True).layers]
    ['Conv2D', 'GroupSort']
    """
    operations_of(model)
    new = Rebuilder(lambda layer: _kernels_only(layer) if kernels_only else keras_layers(layer))(model)
    held = [layer.name for layer in operations_of(new) if not kernels_only and _mentions_us(layer)]
    if held:
        raise ValueError(
            "Expected layers that are of this package or do not mention it; register what stands for yours with "
            f"@hkr_keras.conversion.keras_layers.register. Received: {', '.join(held)}"
        )
    return new


def _mentions_us(operation) -> bool:
    return isinstance(operation, _k.Layer) and '"hkr_keras' in json.dumps(operation.get_config(), default=str)


def _kernels_only(layer) -> StandIns:
    has_kernel = isinstance(layer, LipschitzLayer) and kernel_geometries(layer) and not _is_block(layer)
    return keras_layers(layer) if has_kernel and not getattr(layer, "circular", False) else copied(layer)


def _is_block(layer) -> bool:
    return isinstance(layer, (layers.SLLDense, layers.SLLConv2D))


@functools.singledispatch
def keras_layers(layer) -> StandIns:
    """Plain Keras layers that stand for a layer of this package; any other layer is copied.

    Register a layer of your own whose class shall not be needed to load the result.

    Args:
        layer: a built layer.

    Returns:
        A list of new layers, and a function without arguments that gives them their weights when they are built.

    Example:

    >>> stand_ins, fill = keras_layers(layers.Scale(2.0))
    >>> [type(layer).__name__ for layer in stand_ins]
    ['Rescaling']
    """
    return copied(layer)


def _with(new: Layer, weights: Callable[[], list]) -> StandIns:
    return [new], lambda: new.set_weights(weights())


def _keras_class(layer) -> type:
    return next(cls for cls in type(layer).__mro__ if cls.__module__.startswith("keras."))


@keras_layers.register
def _(layer: LipschitzLayer) -> StandIns:
    return _with(from_config(_keras_class(layer), layer), layer.get_weights)  # type: ignore[attr-defined]


@keras_layers.register
def _(layer: layers.LipschitzSimpleRNN) -> StandIns:
    return _with(from_config(_k.SimpleRNN, layer), layer.get_weights)


@keras_layers.register
def _(layer: ComposedKernel) -> StandIns:
    if getattr(layer, "circular", False):
        return _model(layer, _on_circle)
    return _with(from_config(_keras_class(layer), layer), lambda: _stored(layer))


def _stored(layer) -> list:
    """The composed kernel and the bias of a layer."""
    return [ops.convert_to_numpy(weight) for weight in (layer.kernel, layer.bias) if weight is not None]


def _model(layer, compute: Callable) -> StandIns:
    """A small model that stands for a layer: `compute(layer, new, *inputs)`; `new` makes layers of its precision."""
    calls = [[tensor.shape for tensor in node.input_tensors] for node in layer._inbound_nodes] or [[build_shape(layer)]]
    shapes = [
        tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*seen, strict=True))
        for seen in zip(*calls, strict=True)
    ]
    inputs = [keras.Input(shape[1:], dtype=layer.compute_dtype) for shape in shapes]
    outputs = compute(layer, functools.partial(_new, layer), *inputs)
    return [keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs, name=layer.name)], nothing


def _new(layer, cls: type, *args, **kwargs) -> Layer:
    return cls(*args, **{"dtype": layer.dtype_policy.name, "trainable": False, **kwargs})


def _fixed(layer, x, *weights):
    """The output of a new layer with these weights."""
    outputs = layer(x)
    layer.set_weights(weights)
    return outputs


def _known(layer, shape) -> tuple[int, ...]:
    if None in shape[1:]:
        raise ValueError(f"Expected inputs of known size to convert '{layer.name}'. Received: shape={tuple(shape)}")
    return tuple(shape[1:])


def _on_circle(layer, new, x):
    plain = from_config(_keras_class(layer), layer, padding="valid", activation=None)
    outputs = layer.cut(_fixed(plain, layer.continued(x), *_stored(layer)), x.shape)
    return new(_k.Activation, layer.activation)(outputs)


def _block(layer, new, x):
    """`x - 2 W relu(W^T x + b)`."""
    kernel, bias = ops.convert_to_numpy(layer.kernel), ops.convert_to_numpy(layer.bias)
    if isinstance(layer, layers.SLLDense):
        inner = new(_k.Dense, layer.units, activation="relu")
        outer, back = new(_k.Dense, x.shape[-1], use_bias=False), kernel.T
    else:
        settings = {"kernel_size": layer.kernel_size, "padding": "same", "data_format": "channels_last"}
        inner = new(_k.Conv2D, layer.filters, activation="relu", **settings)
        outer, back = new(_k.Conv2DTranspose, x.shape[-1], use_bias=False, **settings), kernel
    return new(_k.Add)([x, _fixed(outer, _fixed(inner, x, kernel, bias), -2 * back)])


def _channels_last(compute: Callable) -> Callable:
    """The same along the last axis, where a layer works along another one."""

    def moved(layer, new, x):
        axis, rank = layer.axis % len(x.shape), len(x.shape)
        if axis == rank - 1:
            return compute(layer, new, x)
        there = [i for i in range(1, rank) if i != axis] + [axis]
        back = [there.index(i) + 1 for i in range(1, rank)]
        return new(_k.Permute, back)(compute(layer, new, new(_k.Permute, there)(x)))

    return moved


def _reflected(new, x, normals, factor: float):
    """`x - factor relu(x N) N^T`: reflects what lies beyond a line, for every pair of channels."""
    beyond = _fixed(new(_k.Dense, normals.shape[1], activation="relu", use_bias=False), x, normals)
    return new(_k.Add)([x, _fixed(new(_k.Dense, x.shape[-1], use_bias=False), beyond, -factor * normals.T)])


def _householder(layer, new, x):
    half = ops.convert_to_numpy(layer.angles) / 2
    return _reflected(new, x, np.concatenate([np.diag(-np.sin(half)), np.diag(np.cos(half))]), 2.0)


def _group_sorted(layer, new, x):
    if layer.n == 2 and x.shape[-1] <= MATRIX_CHANNELS:
        return _reflected(new, x, pair_differences(x.shape[-1]), 1.0)
    *sizes, channels = _known(layer, x.shape)
    groups = new(_k.Reshape, (*sizes, channels // layer.n, layer.n))(x)
    if layer.n == 2:
        ends = [extreme(groups, axis=-1, keepdims=True) for extreme in (ops.min, ops.max)]
        groups = new(_k.Concatenate)(ends)
    else:
        groups = ops.sort(groups, axis=-1)
    return new(_k.Reshape, (*sizes, channels))(groups)


def _max_min(layer, new, x):
    pair = ops.split(x, 2, axis=layer.axis)
    return new(_k.Concatenate, axis=layer.axis)([new(_k.Maximum)(pair), new(_k.Minimum)(pair)])


def _fully_sorted(layer, new, x):
    return ops.sort(x, axis=layer.axis)


def _window_means(layer, new, x):
    """As `layer.call` takes them: cells outside the input count as zeros."""
    settings = {"strides": layer.strides, "padding": layer.padding, "data_format": layer.data_format}
    rank = len(layer.pool_size)
    if layer.padding == "valid":
        return new(getattr(_k, f"AveragePooling{rank}D"), layer.pool_size, **settings)(x)
    channels = x.shape[-1 if layer.data_format == "channels_last" else 1]
    window = ops.convert_to_numpy(ops.full((*layer.pool_size, channels, 1), 1 / math.prod(layer.pool_size)))
    return _fixed(new(getattr(_k, f"DepthwiseConv{rank}D"), layer.pool_size, use_bias=False, **settings), x, window)


def _scaled_means(layer, new, x):
    return new(_k.Rescaling, math.sqrt(layer.cells))(_window_means(layer, new, x))


def _root(new, squares):
    return ops.sqrt(ops.maximum(squares, SQUARED_FLOOR))


def _window_norms(layer, new, x):
    wide = functools.partial(new, dtype="float32")  # half precision cannot hold the squares
    squares = _window_means(layer, wide, wide(_k.Multiply)([x, x]))
    return new(_k.Identity)(_root(new, wide(_k.Rescaling, layer.cells)(squares)))


def _sum(layer, x):
    return ops.sum(x, axis=layer.spatial_axes(x), keepdims=layer.keepdims)


def _scaled_sum(layer, new, x):
    sizes = _known(layer, x.shape)
    return new(_k.Rescaling, 1 / math.sqrt(math.prod(sizes[axis - 1] for axis in layer.spatial_axes(x))))(
        _sum(layer, x)
    )


def _global_norm(layer, new, x):
    wide = functools.partial(new, dtype="float32")
    return new(_k.Identity)(_root(new, _sum(layer, wide(_k.Multiply)([x, x]))))


def _rearranged(layer, new, x):
    first = layer.data_format == "channels_first"
    height, width, channels = _known(layer, new(_k.Permute, (2, 3, 1))(x).shape if first else x.shape)
    x = new(_k.Permute, (2, 3, 1))(x) if first else x
    p, q = layer.pool_size
    if isinstance(layer, layers.InvertibleDownsampling2D):
        split, result = (height // p, p, width // q, q * channels), (height // p, width // q, p * q * channels)
    else:
        split, result = (height, width, p, channels // p), (height * p, width * q, channels // (p * q))
    x = new(_k.Reshape, result)(new(_k.Permute, (1, 3, 2, 4))(new(_k.Reshape, split)(x)))
    return new(_k.Permute, (3, 1, 2))(x) if first else x


def _layer_centred(layer, new, x):
    outputs = x - ops.mean(x, axis=layer.axis, keepdims=True)
    return (
        new(_k.Rescaling, 1.0, offset=ops.convert_to_numpy(layer.bias).tolist())(outputs) if layer.center else outputs
    )


def _mixed(layer, new, *branches):
    weights = ops.convert_to_numpy(ops.softmax(layer.mixing_logits)).tolist()
    return new(_k.Add)([new(_k.Rescaling, w)(x) for w, x in zip(weights, branches, strict=True)])


for _compute, *_classes in (
    (_block, layers.SLLDense, layers.SLLConv2D),
    (_channels_last(_group_sorted), layers.GroupSort),
    (_channels_last(_householder), layers.Householder),
    (_max_min, layers.MaxMin),
    (_fully_sorted, layers.FullSort),
    (_scaled_means, layers.ScaledAveragePooling1D, layers.ScaledAveragePooling2D),
    (_window_norms, layers.L2NormPooling1D, layers.L2NormPooling2D),
    (_scaled_sum, layers.ScaledGlobalAveragePooling1D, layers.ScaledGlobalAveragePooling2D),
    (_global_norm, layers.GlobalL2NormPooling1D, layers.GlobalL2NormPooling2D),
    (_rearranged, layers.InvertibleDownsampling2D, layers.InvertibleUpsampling2D),
    (_layer_centred, layers.LayerCentering),
    (_mixed, layers.LipschitzResidual),
):
    for _class in _classes:
        keras_layers.register(_class, functools.partial(_model, compute=_compute))


@keras_layers.register
def _(layer: layers.Scale) -> StandIns:
    return [_k.Rescaling(layer.k, name=layer.name, dtype=layer.dtype_policy)], nothing


@keras_layers.register
def _(layer: layers.BatchCentering) -> StandIns:
    new = from_config(_k.BatchNormalization, layer, epsilon=0.0, scale=False)

    def weights():
        mean = ops.convert_to_numpy(layer.moving_mean)
        return [*([ops.convert_to_numpy(layer.bias)] if layer.center else []), mean, mean * 0 + 1]

    return _with(new, weights)
