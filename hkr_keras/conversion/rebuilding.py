"""Rebuilds a model: the same graph, made of other layers."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras

from hkr_keras.certification.checks import build_shape, check_built
from hkr_keras.certification.graph import applications_of, is_model, model_in_use

__all__ = [
    "Layer",
    "Rebuilder",
    "StandIns",
    "as_run",
    "calls_of",
    "copied",
    "from_config",
    "give_weights",
    "operations_of",
]

Layer: TypeAlias = keras.layers.Layer
#: Layers that stand for another one, in the order of computation, and what gives them weights once they are built.
StandIns: TypeAlias = tuple[list[Layer], Callable[[], None]]

_k = keras.layers


class Rebuilder:
    """Rebuilds a model with the layers that `stand_ins` gives for each of its layers; shared layers stay shared.

    Args:
        stand_ins: takes a layer, and returns new layers and what gives them their weights.
    """

    def __init__(self, stand_ins: Callable[[Layer], StandIns]):
        self.stand_ins = stand_ins
        self.known: dict[Layer, list[Layer]] = {}
        self.followers: dict[Layer, list[Layer]] = {}
        self.fills: list[Callable[[], None]] = []
        self.trained_by_default: set[Layer] = set()  # in the old model, if not told otherwise

    def __call__(self, model: keras.Model) -> keras.Model:
        new = self._model(model)
        for fill in self.fills:
            fill()
        return new

    def _layer(self, layer: Any) -> list[Layer]:
        if layer not in self.known:
            new = self.known[layer] = self._new(layer)
            self.followers[new[0]] = new[1:]
            if type(new[0]) is not type(layer) and _trains_by_default(layer):
                self.trained_by_default.add(new[0])
        return self.known[layer]

    def _new(self, layer: Any) -> list[Layer]:
        if not isinstance(layer, _k.Layer):  # an operation, which has no state
            return [layer]
        if is_model(layer):
            return [self._model(layer)]
        if type(layer) is _k.TimeDistributed:
            inner = self._layer(layer.layer)
            names = [layer.name, *(f"{layer.name}_{follower.name}" for follower in inner[1:])]
            dtype = layer.dtype_policy  # not the one that is the default by now
            return [_k.TimeDistributed(new, name=name, dtype=dtype) for new, name in zip(inner, names, strict=True)]
        if type(layer) is _k.Bidirectional:  # which makes layers of its own from the configurations of these
            (forward,), (backward,) = (self.stand_ins(each)[0] for each in (layer.forward_layer, layer.backward_layer))
            settings = {"merge_mode": layer.merge_mode, "name": layer.name, "trainable": layer.trainable}
            both = _k.Bidirectional(forward, backward_layer=backward, dtype=layer.dtype_policy, **settings)
            self.fills.append(lambda: both.set_weights(layer.get_weights()))
            return [both]
        new, fill = self.stand_ins(layer)
        self.fills.append(fill)
        return new or [_k.Identity(name=layer.name, dtype=layer.dtype_policy.name)]

    def _call(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if value is not None}  # masks, which not all layers know
        if layer in self.trained_by_default and given.get("training") is True:
            del given["training"]  # which Keras wrote down
        outputs = layer(*args, **given)
        for follower in self.followers.get(layer, ()):
            outputs = follower(outputs)
        return outputs

    def _model(self, model: keras.Model) -> keras.Model:
        view = as_run(model)
        if isinstance(model, keras.Sequential):
            (tensor,) = view.inputs
            start = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)
            behind = [n for layer in view.layers if not isinstance(layer, _k.InputLayer) for n in self._layer(layer)]
            return keras.Sequential([start, *behind], name=model.name)
        return keras.models.clone_model(view, clone_function=lambda old: self._layer(old)[0], call_function=self._call)


def _trains_by_default(layer: Any) -> bool:
    parameter = inspect.signature(layer.call).parameters.get("training")
    return parameter is not None and parameter.default is True


def as_run(model: keras.Model) -> keras.Model:
    """The graph that a model runs as a functional model, whatever has become of its list of layers.

    Raises:
        ValueError: for a Sequential model that has no graph.
    """
    if not isinstance(model, keras.Sequential):
        return keras.Model(model.input, model.output, name=model.name)
    if getattr(model, "inputs", None) is None:
        raise ValueError(
            "Expected a Sequential model with a graph: give it an Input of known shape. "
            f"Received: model '{model.name}' without inputs"
        )
    return keras.Model(model.inputs, model.outputs, name=model.name)


def calls_of(layer: Layer) -> list[list[tuple]]:
    """The shapes of the inputs in every call of a layer, or else the one it was built for; empty without either."""
    calls = [[tuple(t.shape) for t in inputs if t.dtype != "bool"] for inputs, _ in applications_of(layer)]  # no masks
    built = build_shape(layer)
    return calls or ([] if built is None else [[built]])


def operations_of(model: Any) -> list:
    """Every layer and operation of a model, those of nested models too, each once.

    Raises:
        ValueError: for anything but a built Sequential or functional model of such models and layers.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model. Received: model={type(model).__name__}")
    check_built(model)
    model_in_use(model)  # refuses a forward pass of its own
    found: dict[Any, None] = {}
    view = as_run(model)
    everything = view.layers if isinstance(model, keras.Sequential) else view.operations  # its operations are masks
    for operation in everything:
        inner = operation.layer if type(operation) is _k.TimeDistributed else operation
        found |= dict.fromkeys(operations_of(inner) if is_model(inner) else [inner])
    return list(found)


def copied(layer: Layer) -> StandIns:
    """A layer of the same class, configuration and weights."""
    new = type(layer).from_config(layer.get_config())

    def fill() -> None:
        give_weights(new, layer.get_weights())
        if isinstance(new, _k.Normalization) and new.weights:
            new.finalize_state()

    return [new], fill


def give_weights(new: Layer, weights: Sequence[Any]) -> None:
    """Sets the weights of a layer that was made from the configuration of another one.

    Raises:
        ValueError: where that configuration makes other weights than the layer had.
    """
    given, made = [tuple(weight.shape) for weight in weights], [tuple(weight.shape) for weight in new.weights]
    if given != made:
        raise ValueError(
            "Expected layers with the weights that their configuration makes, which was edited behind them: make the "
            f"layer anew. Received: {type(new).__name__} '{new.name}' with weights of shapes {given} instead of {made}"
        )
    new.set_weights(weights)


def from_config(cls: type, layer: Layer, **changes: Any) -> Layer:
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
