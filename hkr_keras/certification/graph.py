"""Reading the graph of a Keras model: the only file of this package that uses private attributes of Keras.

| read here | stands for | public way |
|---|---|---|
| `Functional._nodes_by_depth` | the applications of layers, in the order of computation | none |
| `Sequential._functional` | the graph that a Sequential model runs | none; `layers` can differ after an edit |
| `Operation._inbound_nodes`, `_outbound_nodes` | where an operation was applied, and what reads it | none |
| `KerasTensor._keras_history` | the operation that made a tensor | none |

`tests/certification/test_graph.py` notices when Keras changes one of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import keras

from hkr_keras.certification.checks import (
    check_arguments,
    check_input_dtype,
    check_is_itself,
    check_is_plain_model,
    check_merge,
    check_model_shapes,
)
from hkr_keras.certification.rules.registry import Shape, is_model, layer_bound, merge_bound

__all__ = [
    "Application",
    "applications_of",
    "consumers_of",
    "functional_class",
    "is_model",
    "model_in_use",
    "nodes_of",
    "source_of",
    "walk",
]


def functional_class(model: Any) -> type | None:
    """The functional class of Keras that a model derives from, which has no public name."""
    classes = (c for c in type(model).__mro__ if c.__name__ == "Functional" and c.__module__.startswith("keras."))
    return next(classes, None)


def model_in_use(model: Any) -> Any:
    """The functional model that runs when a model is called; a Sequential one without known inputs is itself.

    Raises:
        ValueError: for a model with a forward pass of its own.
    """
    if not isinstance(model, keras.Sequential):
        check_is_plain_model(model, functional_class(model))
        return model
    check_is_plain_model(model, keras.Sequential)
    return model if model._functional is None else model_in_use(model._functional)


def nodes_of(model: Any) -> list[Any]:
    """The nodes of a functional model, in the order of computation."""
    return [node for depth in sorted(model._nodes_by_depth, reverse=True) for node in model._nodes_by_depth[depth]]


def applications_of(operation: Any) -> list[tuple[list[Any], list[Any]]]:
    """Where an operation was applied to symbolic tensors: its inputs and outputs each time."""
    return [(list(node.input_tensors), list(node.outputs)) for node in operation._inbound_nodes]


def consumers_of(operation: Any) -> list[Any]:
    """The operations that read what an operation makes, once for each time."""
    return [node.operation for node in operation._outbound_nodes]


def source_of(tensor: Any) -> tuple[Any, list[Any], int]:
    """The operation that made a symbolic tensor, its inputs there, and which of its outputs the tensor is."""
    operation, node, index = tensor._keras_history
    return operation, list(operation._inbound_nodes[node].input_tensors), index


# ---- following what is known of tensors ------------------------------------------------------------------

State = TypeVar("State")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Application:
    """One layer at one place of a graph.

    Args:
        layer: that is applied.
        shapes: of its inputs, with the batch; `None` where unknown.
        output_shape: of its output; `None` when unknown.
        path: what tells this place from all others of the model: the nodes that lead to it.
    """

    layer: Any
    shapes: list[Shape]
    output_shape: Shape = None
    path: tuple[Any, ...] = ()


#: Takes a layer at its place and what is known of its inputs; tells the same of its output.
Apply = Callable[[Application, list[State]], State]


def walk(layer: Any, states: list[State], apply: Apply, shapes: list[Shape] | None = None) -> list[State]:
    """Carries what is known of the inputs of a layer or model along its graph to its outputs.

    Args:
        layer: a built layer, Sequential or functional model.
        states: one per input.
        apply: called once for every application of a layer that is not a model, in the order of computation.
        shapes: of the inputs, with the batch; `None` when unknown.
    """
    return [state for state, _ in _walk(layer, states, apply, shapes or [None] * len(states), ())]


def _walk(
    layer: Any, states: list[Any], apply: Apply, shapes: list[Shape], path: tuple, promised: Shape = None
) -> list[tuple[Any, Shape]]:
    if not is_model(layer):
        if len(states) > 1:
            check_is_itself(layer, merge_bound.known(type(layer)))
            check_merge(layer, shapes)
        hook = layer_bound if len(states) == 1 else merge_bound
        has_rule = hook.known(type(layer)) is not None  # otherwise it is about to be refused
        output_shape = _output_shape(layer, shapes, promised) if has_rule else None
        place = Application(layer=layer, shapes=shapes, output_shape=output_shape, path=path)
        return [(apply(place, states), output_shape)]
    runs = model_in_use(layer)
    if not isinstance(runs, keras.Sequential):
        return _walk_graph(runs, states, apply, shapes, path)
    known = list(zip(states, shapes, strict=True))
    for position, inner in enumerate(runs.layers):
        states, shapes = ([pair[i] for pair in known] for i in (0, 1))
        known = _walk(inner, states, apply, shapes, (*path, position))
    return known


def _output_shape(layer: Any, shapes: list[Shape], promised: Shape) -> Shape:
    """What a layer makes of inputs of these shapes; `promised` where Keras would have to trace the layer for that."""
    if any(shape is None for shape in shapes):
        return None
    if promised is not None and type(layer).compute_output_shape is keras.layers.Layer.compute_output_shape:
        return promised
    given = [tuple(shape) for shape in shapes]
    try:
        return tuple(layer.compute_output_shape(given if len(given) > 1 else given[0]))
    except NotImplementedError as error:  # Keras could not trace the layer at these sizes
        raise ValueError(
            "Expected layers that tell the shape of their output: define compute_output_shape. "
            f"Received: layer={type(layer).__name__} '{layer.name}', shape={given}"
        ) from error


def _walk_graph(
    model: Any, states: list[Any], apply: Apply, shapes: list[Shape], path: tuple
) -> list[tuple[Any, Shape]]:
    check_model_shapes(model, shapes)
    for tensor in model.inputs:
        check_input_dtype(tensor)
    sizes = [tuple(t.shape) if given is None else tuple(given) for t, given in zip(model.inputs, shapes, strict=True)]
    known = {id(t): pair for t, pair in zip(model.inputs, zip(states, sizes, strict=True), strict=True)}
    operators: list[Any] = []
    for node in nodes_of(model):
        if node.is_input or not all(id(tensor) in known for tensor in node.input_tensors):
            continue
        layer = node.operation
        if not isinstance(layer, keras.layers.Layer):
            operators.append(layer)  # refused below; a layer that brings one along, as for masks, tells more
            continue
        check_arguments(node, model)
        pairs = [known[id(tensor)] for tensor in node.input_tensors]
        given = [shape for _, shape in pairs]
        as_built = all(tuple(t.shape) == shape for t, shape in zip(node.input_tensors, given, strict=True))
        promise = tuple(node.outputs[0].shape) if as_built else None
        outputs = _walk(layer, [state for state, _ in pairs], apply, given, (*path, node), promise)
        if len(outputs) != len(node.outputs):
            raise ValueError(
                "Expected layers with one output. "
                f"Received: {len(node.outputs)} outputs of {type(layer).__name__} '{layer.name}'"
            )
        for tensor, (state, found) in zip(node.outputs, outputs, strict=True):
            promised = tuple(tensor.shape)
            shape = promised if found is None else found
            fits = len(promised) == len(shape) and all(
                a is None or b is None or a == b for a, b in zip(promised[1:], shape[1:], strict=True)
            )
            if not fits:
                raise ValueError(
                    f"Expected '{layer.name}' to make what it made when the model was built: it was edited since. "
                    f"Received: shape={shape}, where the model '{model.name}' has {promised}"
                )
            known[id(tensor)] = state, shape
    if operators and any(id(tensor) not in known for tensor in model.outputs):
        raise ValueError(
            "Expected a model made of layers: use keras.layers.Add() and the like in place of operators "
            f"and keras.ops. Received: operation={type(operators[0]).__name__} '{operators[0].name}'"
        )
    return [known[id(tensor)] for tensor in model.outputs]
