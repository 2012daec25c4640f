"""Converts models to plain Keras layers, for deployment.

Every layer of this package has a method `as_keras`, which makes the layers that stand for it; here it is called.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import keras

from hkr_keras import layers
from hkr_keras.certification.checks import overridden
from hkr_keras.certification.graph import is_model
from hkr_keras.conversion.rebuilding import (
    Layer,
    Rebuilder,
    StandIns,
    calls_of,
    copied,
    from_config,
    give_weights,
    operations_of,
)
from hkr_keras.geometry import kernel_geometries
from hkr_keras.layers.base import LipschitzLayer

__all__ = ["keras_layers", "to_keras"]

_k = keras.layers


def to_keras(model: keras.Model, kernels_only: bool = False) -> keras.Model:
    """A copy of a model in plain Keras layers with equal outputs, for deployment.

    The result needs Keras alone to be loaded, and costs what plain layers of these shapes cost: kernels that are
    composed in the forward pass are stored. It is meant for inference; nothing holds it on the constraint set. Layers
    that are not of this package are copied. Activations and poolings that Keras has no layer for become small models of
    Keras layers and operations.

    Args:
        model: a built Sequential or functional model, nested or not.
        kernels_only: whether to convert only the layers with a kernel and leave the other layers of this package as
            they are. Such a model can still be certified, with `rigorous=True` too.

    An activation that is a layer becomes a layer of its own, behind the one whose argument it was.

    Returns:
        A model that is not compiled. Outputs differ by what float32 rounds, about 1e-6 for outputs of order 1.

    Raises:
        ValueError: for a model that is not built or has a forward pass of its own; for layers whose conversion needs a
            size that is unknown; for layers of yours that hold one of this package; for masks where one is several.

    Example:

    >>> model = keras.Sequential([keras.Input((8, 8, 1)), layers.OrthogonalConv2D(4, 3), layers.GroupSort(2)])
    >>> [type(layer).__name__ for layer in to_keras(model).layers]
    ['Conv2D', 'Functional']
    >>> [type(layer).__name__ for layer in to_keras(model, kernels_only=True).layers]
    ['Conv2D', 'GroupSort']
    """
    operations = operations_of(model)
    if any(map(_is_followed, operations)):
        model = Rebuilder(_split)(model)
    masking = [o.name for o in operations if isinstance(o, _k.Masking) or getattr(o, "mask_zero", False)]

    def stand_ins(layer: Layer) -> StandIns:
        found, fill = _kernels_only(layer) if kernels_only else keras_layers(layer)
        if masking and hasattr(layer, "as_keras") and is_model(found[0]):
            raise ValueError(
                "Expected no masks where a layer becomes several ones, which do not all pass masks on. Received: masks "
                f"of {', '.join(masking)}, and {type(layer).__name__} '{layer.name}'"
            )
        return found, fill

    new = Rebuilder(stand_ins)(model)
    held = [layer.name for layer in operations_of(new) if not kernels_only and _mentions_us(layer)]
    if held:
        raise ValueError(
            "Expected layers that are of this package or do not mention it; register what stands for yours with "
            f"@hkr_keras.conversion.keras_layers.register. Received: {', '.join(held)}"
        )
    return new


def _mentions_us(operation: Any) -> bool:
    return isinstance(operation, _k.Layer) and '"hkr_keras' in json.dumps(operation.get_config(), default=str)


def _kernels_only(layer: Layer) -> StandIns:
    has_kernel = isinstance(layer, LipschitzLayer) and kernel_geometries(layer)
    whole = isinstance(layer, (layers.SLLDense, layers.SLLConv2D)) or getattr(layer, "circular", False)
    return keras_layers(layer) if has_kernel and not whole else copied(layer)


@functools.singledispatch
def keras_layers(layer: Layer) -> StandIns:
    """Plain Keras layers that stand for a layer: what its method `as_keras` says; a layer without one is copied.

    Register a layer of your own whose class shall not be needed to load the result.

    Args:
        layer: a built layer.

    Returns:
        A list of new layers, and a function without arguments that gives them their weights when they are built.

    Raises:
        ValueError: for a layer of this package that is not built, or that was applied to inputs of several ranks and
            becomes several layers.

    Example:

    >>> layer = layers.Scale(2.0)
    >>> outputs = layer(keras.ops.ones((1, 3)))
    >>> stand_ins, fill = keras_layers(layer)
    >>> [type(layer).__name__ for layer in stand_ins]
    ['Rescaling']
    """
    if not hasattr(layer, "as_keras"):
        return copied(layer)
    _check_computes_as_its_class(layer)
    new, calls = _PlainLayers(layer), calls_of(layer)
    if not calls:
        raise ValueError(f"Expected a built layer. Received: {type(layer).__name__} '{layer.name}', built=False")
    ranks = {tuple(map(len, shapes)) for shapes in calls}
    known = zip(*(calls if len(ranks) == 1 else calls[:1]), strict=True)  # the shapes of one input in all calls
    shapes = [[sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*seen, strict=True)] for seen in known]
    inputs = [keras.Input(shape[1:], dtype=layer.compute_dtype) for shape in shapes]
    result = layer.as_keras(new, *inputs)
    if isinstance(result, _k.Layer):
        return [result], new.fill
    if len(ranks) > 1:
        raise ValueError(
            f"Expected {type(layer).__name__} '{layer.name}' to be applied to inputs of one rank, since it becomes "
            f"several layers. Received: shapes={calls}"
        )
    return [keras.Model(inputs if len(inputs) > 1 else inputs[0], result, name=layer.name)], new.fill


def _check_computes_as_its_class(layer: Layer) -> None:
    """Refuses a subclass of a layer of this package that computes something else and has no `as_keras` of its own."""
    known = [cls for cls in type(layer).__mro__ if cls.__module__.startswith(("hkr_keras.", "keras."))]
    told = next(cls for cls in type(layer).__mro__ if "as_keras" in vars(cls))
    changed = overridden(layer, next(cls for cls in known if issubclass(cls, _k.Layer)))
    if told in known and changed:
        raise ValueError(
            "Expected a subclass that computes the same function, has a method `as_keras`, or is registered with "
            f"@hkr_keras.conversion.keras_layers.register({type(layer).__name__}). "
            f"Received: {type(layer).__name__} '{layer.name}', which overrides {', '.join(sorted(changed))}"
        )


class _PlainLayers:
    """Makes plain layers in place of one, and keeps their weights until they are built."""

    def __init__(self, layer: Layer):
        self.layer = layer
        self.waiting: list[tuple[Layer, Sequence[Any]]] = []

    def __call__(self, cls: type, *args: Any, weights: Sequence[Any] = (), **settings: Any) -> Layer:
        new = cls(*args, **{"dtype": self.layer.dtype_policy.name, "trainable": False, **settings})
        self.waiting.append((new, weights))
        return new

    def alike(self, cls: type, weights: Sequence[Any] = (), **changes: Any) -> Layer:
        new = from_config(cls, self.layer, **changes)
        self.waiting.append((new, weights))
        return new

    def fill(self) -> None:
        for new, weights in self.waiting:
            if len(weights):
                give_weights(new, weights)


# ---- layers as activations ------------------------------------------------------------------------------


def _is_followed(operation: Any) -> bool:
    """Whether the activation of a kernel layer is a layer that is to stand behind it."""
    activation = getattr(operation, "activation", None)
    if not isinstance(activation, _k.Layer) or not isinstance(operation, _ENDING_IN_ACTIVATION):
        return False
    ours = isinstance(operation, LipschitzLayer) and bool(activation.weights)
    return ours or '"hkr_keras' in json.dumps(keras.saving.serialize_keras_object(activation), default=str)


_ENDING_IN_ACTIVATION = (
    *(_k.Activation, _k.Dense, _k.Conv1D, _k.Conv2D, _k.Conv3D, _k.Conv1DTranspose, _k.Conv2DTranspose),
    *(_k.Conv3DTranspose, _k.DepthwiseConv1D, _k.DepthwiseConv2D, _k.SeparableConv1D, _k.SeparableConv2D),
)


def _split(layer: Layer) -> StandIns:
    """A copy of a layer, and behind it a copy of its activation."""
    if not _is_followed(layer):
        return copied(layer)
    activation = layer.activation
    new = type(layer).from_config({**layer.get_config(), "activation": None})
    behind = type(activation).from_config({**activation.get_config(), "name": f"{layer.name}_activation"})
    own = [weight for weight in layer.weights if all(weight is not other for other in activation.weights)]

    def fill() -> None:
        give_weights(new, own)
        if activation.weights:  # otherwise it was never called, and starts as any copy does
            behind.set_weights(activation.weights)

    return [new, behind], fill
