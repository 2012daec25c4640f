"""A model with the same graph, made of other layers."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import keras

from hkr_keras.certification.bounds import layer_bound
from hkr_keras.certification.checks import check_built, check_is_plain_model

Layer: TypeAlias = keras.layers.Layer
#: Layers that stand for another one, in the order of computation, and what gives them weights once they are built.
StandIns: TypeAlias = tuple[list[Layer], Callable[[], None]]

_k = keras.layers


class Rebuilder:
    """Rebuilds a model; what was shared stays shared. `stand_ins` tells of every layer what stands for it."""

    def __init__(self, stand_ins: Callable[[Layer], StandIns]):
        self.stand_ins = stand_ins
        self.known: dict[int, list[Layer]] = {}
        self.followers: dict[int, list[Layer]] = {}
        self.fills: list[Callable[[], None]] = []

    def __call__(self, model):
        new = self.model(model)
        for fill in self.fills:
            fill()
        return new

    def layer(self, layer) -> list[Layer]:
        if id(layer) not in self.known:
            new = self.known[id(layer)] = self._new(layer)
            self.followers[id(new[0])] = new[1:]
        return self.known[id(layer)]

    def _new(self, layer) -> list[Layer]:
        if not isinstance(layer, _k.Layer):  # an operation, which has no state
            return [layer]
        if is_model(layer):
            return [self.model(layer)]
        if type(layer) is _k.TimeDistributed:
            inner = self.layer(layer.layer)
            names = [layer.name, *(f"{layer.name}_{follower.name}" for follower in inner[1:])]
            return [_k.TimeDistributed(new, name=name) for new, name in zip(inner, names, strict=True)]
        new, fill = self.stand_ins(layer)
        self.fills.append(fill)
        return new or [_k.Identity(name=layer.name, dtype=layer.dtype_policy.name)]

    def _call(self, layer, *args, **kwargs):
        given = {name: value for name, value in kwargs.items() if value is not None}  # masks, which not all layers know
        outputs = layer(*args, **given)
        for follower in self.followers.get(id(layer), ()):
            outputs = follower(outputs)
        return outputs

    def model(self, model):
        if isinstance(model, keras.Sequential):
            (tensor,) = model.inputs
            start = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)
            return keras.Sequential([start, *(n for layer in model.layers for n in self.layer(layer))], name=model.name)
        view = keras.Model(model.input, model.output, name=model.name)  # the same graph, not compiled
        return keras.models.clone_model(view, clone_function=lambda old: self.layer(old)[0], call_function=self._call)


def is_model(layer) -> bool:
    """Whether a layer is a model that is read layer by layer."""
    return isinstance(layer, keras.Model) and type(layer) not in layer_bound.registry


def operations_of(model) -> list:
    """Every layer and operation of a model, those of nested models too, each once.

    Raises:
        ValueError: for anything but a built Sequential or functional model of such models and layers.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model. Received: model={type(model).__name__}")
    check_built(model)
    functional = (c for c in type(model).__mro__ if c.__name__ == "Functional" and c.__module__.startswith("keras."))
    check_is_plain_model(model, keras.Sequential if isinstance(model, keras.Sequential) else next(functional, None))
    found: dict[int, Any] = {}
    for operation in model.layers if isinstance(model, keras.Sequential) else model.operations:
        inner = operation.layer if type(operation) is _k.TimeDistributed else operation
        for each in operations_of(inner) if is_model(inner) else [inner]:
            found.setdefault(id(each), each)
    return list(found.values())


def copied(layer) -> StandIns:
    """A layer of the same class, configuration and weights."""
    new = type(layer).from_config(layer.get_config())

    def fill():
        new.set_weights(layer.get_weights())
        if isinstance(new, _k.Normalization) and new.weights:
            new.finalize_state()

    return [new], fill


def nothing() -> None:
    """Gives no weights: the layer has them already, or none."""


def from_config(cls: type, layer, **changes) -> Layer:
    """A layer of another class, with the settings of a layer that the class knows; kernel constraints are dropped."""
    known = {"name", "trainable", "dtype"}
    for base in cls.__mro__:  # as far as arguments are passed on
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            known |= {parameter.name for parameter in parameters}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
    config = {name: value for name, value in layer.get_config().items() if name in known}
    config |= {name: None for name in config if name.endswith("_constraint") and name != "bias_constraint"}
    return cls.from_config({**config, **changes})  # type: ignore[attr-defined]
