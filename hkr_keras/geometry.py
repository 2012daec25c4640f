"""The table of kernels: which axes of a kernel form a matrix, and by what factor the operator norm can exceed its norm.

It knows Keras classes only. Layers of this package, converted layers and subclasses of users inherit those
classes, so the dispatch finds them by method resolution order.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

__all__ = ["Geometry", "kernel_geometries"]

Tensor = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a kernel is laid out as block-diagonal matrices.

    Args:
        groups: number of blocks along the output channels (grouped convolution).
        depthwise: whether the kernel is `(..., channels, multiplier)`, with one block per channel.
        transposed: whether the kernel is `(..., outputs, inputs)`, as in transposed convolutions.
        gain: the operator norm is at most `gain` times the largest norm of a block.

    Example:

    >>> tuple(Geometry(gain=3.0).to_matrices(keras.ops.zeros((3, 3, 4, 8))).shape[1:])
    (36, 8)
    """

    groups: int = 1
    depthwise: bool = False
    transposed: bool = False
    gain: float = 1.0

    def to_matrices(self, kernel: Tensor) -> Tensor:
        """Kernel `(*window, in, out)` to matrices `(blocks, rows, columns)`."""
        shape = tuple(kernel.shape)
        if self.depthwise:
            window, channels, multiplier = math.prod(shape[:-2]), shape[-2], shape[-1]
            return ops.transpose(ops.reshape(kernel, (window, channels, multiplier)), (1, 0, 2))
        rows, columns = math.prod(shape[:-1]), shape[-1] // self.groups
        if self.groups == 1:
            return ops.reshape(kernel, (1, rows, columns))
        return ops.transpose(ops.reshape(kernel, (rows, self.groups, columns)), (1, 0, 2))

    def from_matrices(self, matrices: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `to_matrices`, for a kernel of the given shape."""
        if self.depthwise or self.groups > 1:
            matrices = ops.transpose(matrices, (1, 0, 2))
        return ops.reshape(matrices, tuple(shape))

    def outputs(self, shape: tuple[int, ...]) -> int:
        """How many output channels a kernel of that shape has."""
        return math.prod(shape[-2:]) if self.depthwise else shape[-2 if self.transposed else -1]

    def output_vector_axes(self, rank: int) -> tuple[int, ...]:
        """The axes of a kernel of that rank along which the weights of one output run."""
        outputs = {rank - 2} if self.transposed else {rank - 2, rank - 1} if self.depthwise else {rank - 1}
        return tuple(axis for axis in range(rank) if axis not in outputs)


def overlap(window: Any, strides: Any, dilation: Any) -> int:
    """The largest number of windows that see one pixel.

    Per dimension `ceil(k / (s / gcd(s, d)))`; for dilation 1 this is `ceil(k / s)`. It is the maximum over
    pixels, never the mean, so `|convolution|^2 <= overlap * |matrix|^2` for zero, causal, valid and circular
    padding: each output sees one patch, and each pixel lies in at most `overlap` patches.

    Example:

    >>> overlap((3, 3), (1, 1), (1, 1)), overlap((3,), (2,), (1,))
    (9, 2)
    """
    return math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in zip(window, strides, dilation, strict=True))


def _convolution(layer: Any, **kwargs: Any) -> Geometry:
    return Geometry(gain=math.sqrt(overlap(layer.kernel_size, layer.strides, layer.dilation_rate)), **kwargs)


@functools.singledispatch
def kernel_geometries(layer: Any) -> dict[str, Geometry]:
    """The geometry of every kernel of a layer, keyed by weight name. Empty: nothing to project.

    Register a layer of your own with `@kernel_geometries.register(MyLayer)`.

    Example:

    >>> kernel_geometries(keras.layers.Conv2D(8, 3))["kernel"].gain
    3.0
    """
    return {}


@kernel_geometries.register
def _(layer: keras.layers.Dense) -> dict[str, Geometry]:
    return {"kernel": Geometry()}


@kernel_geometries.register(keras.layers.Conv1D)
@kernel_geometries.register(keras.layers.Conv2D)
@kernel_geometries.register(keras.layers.Conv3D)
def _(layer: Any) -> dict[str, Geometry]:
    return {"kernel": _convolution(layer, groups=layer.groups)}


@kernel_geometries.register(keras.layers.Conv1DTranspose)
@kernel_geometries.register(keras.layers.Conv2DTranspose)
@kernel_geometries.register(keras.layers.Conv3DTranspose)
def _(layer: Any) -> dict[str, Geometry]:
    return {"kernel": _convolution(layer, transposed=True)}


@kernel_geometries.register(keras.layers.DepthwiseConv1D)
@kernel_geometries.register(keras.layers.DepthwiseConv2D)
def _(layer: Any) -> dict[str, Geometry]:
    return {"kernel": _convolution(layer, depthwise=True)}


@kernel_geometries.register(keras.layers.SeparableConv1D)
@kernel_geometries.register(keras.layers.SeparableConv2D)
def _(layer: Any) -> dict[str, Geometry]:
    return {"depthwise_kernel": _convolution(layer, depthwise=True), "pointwise_kernel": Geometry()}


@functools.singledispatch
def weight_geometries(layer: Any) -> dict[str, Geometry]:
    """The geometry of every weight that is kept on a constraint set, keyed by weight name.

    Of most layers these are the kernels themselves; a layer that composes its kernel registers its factors here.

    Example:

    >>> list(weight_geometries(keras.layers.Dense(2)))
    ['kernel']
    """
    return kernel_geometries(layer)


def flattened_layers(layer: Any) -> list[keras.layers.Layer]:
    """Every layer inside a layer or model, at any depth, each once: nested models, wrapped layers, cells, activations.

    Example:

    >>> inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="deep")])
    >>> "deep" in [each.name for each in flattened_layers(keras.Sequential([inner]))]
    True
    """
    found: dict[int, keras.layers.Layer] = {}
    waiting = _inner_layers(layer)
    while waiting:
        each = waiting.pop(0)
        if each is not layer and id(each) not in found:
            found[id(each)] = each
            waiting += _inner_layers(each)
    return list(found.values())


def _inner_layers(layer: Any) -> list[keras.layers.Layer]:
    """The layers that are attributes of a layer, by themselves or in lists and dictionaries."""
    found: list[keras.layers.Layer] = []

    def visit(value: Any) -> None:
        if isinstance(value, keras.layers.Layer):
            found.append(value)
        elif isinstance(value, (list, tuple, set)):
            for each in value:
                visit(each)
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)

    for value in list(vars(layer).values()):
        visit(value)
    return found


def model_kernels(model: keras.layers.Layer) -> Iterator[tuple[keras.layers.Layer, Any, Geometry]]:
    """Every `(layer, variable, geometry)` of a model, nested and shared layers included, each variable once.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> [layer.name for layer, kernel, geometry in model_kernels(model)] == [model.layers[0].name]
    True
    """
    seen = set()
    for layer in (model, *flattened_layers(model)):
        if not layer.built:
            continue
        for name, geometry in weight_geometries(layer).items():
            variable = getattr(layer, name)
            if variable is not None and id(variable) not in seen:
                seen.add(id(variable))
                yield layer, variable, geometry
