"""Rows of the tables of rules, and the hooks that register rows for layers of your own.

A row tells of one class of layers, subclasses that compute the same function included:

- `bound`: an upper bound on its Lipschitz constant;
- `rounding`: how far float32 may be from it;
- `tail`: the linear operator that it applies, which joins those of its neighbours.

Every rule takes the layer and the shape, with the batch, that the layer is applied to (`None` when unknown, and
`None` for sizes that are unknown). A rule of your own may leave the shape out.
"""

import contextlib
import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from hkr_keras.certification import checks
from hkr_keras.certification.floating_point import RoundingRule
from hkr_keras.certification.operators import Operator

__all__ = ["Shape", "bound_of", "layer_bound", "layer_rounding", "merge", "merge_bound", "merge_rounding", "rule"]

#: Of one input of a layer, with the batch; `None` when it is unknown.
Shape = Any

#: A tail of a layer that is the identity at inference.
SAME = "same"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One class of layers; see the module. `slope` is that of an activation behind the operator of `tail`."""

    bound: Callable[..., Any] | None = None
    rounding: Callable[..., RoundingRule] | None = None
    tail: Callable[..., Operator | None] | str | None = None
    slope: Callable[..., float | None] | None = None


LAYERS: dict[type, Row] = {}
MERGES: dict[type, Row] = {}


def _row_of(table: dict[type, Row], cls: type, column: str) -> tuple[type | None, Row]:
    """The first class in the order of resolution with that column, and its row."""
    for known in cls.__mro__:
        if getattr(table.get(known), column, None) is not None:
            return known, table[known]
    return None, Row()


def _hook(table: dict[type, Row], column: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function that asks the rule of a layer's class, with `register` as `functools.singledispatch` has it.

    The decorated function is what happens for a class without a rule.
    """

    def decorate(missing: Any) -> Any:
        signature = inspect.signature(missing)

        def ask(layer: Any, *arguments: Any) -> Any:
            given = signature.bind(layer, *arguments)
            given.apply_defaults()
            known, row = _row_of(table, type(layer), column)
            return (missing if known is None else getattr(row, column))(*given.args)

        def register(cls: Any, given: Callable[..., Any] | None = None) -> Any:
            if given is None and isinstance(cls, type):
                return lambda own: register(cls, own)
            if given is None:  # used as a decorator of a function whose first argument is annotated
                annotations = [t for name, t in typing.get_type_hints(cls).items() if name != "return"]
                return register(annotations[0], cls)
            before = table.get(cls, Row()) if column == "rounding" else Row()  # a new bound voids the rest of the row
            table[cls] = dataclasses.replace(before, **{column: _lenient(given)})
            return given

        for name in ("__name__", "__qualname__", "__doc__", "__module__"):
            setattr(ask, name, getattr(missing, name))
        ask.__signature__ = signature  # type: ignore[attr-defined]
        ask.register = register  # type: ignore[attr-defined]
        ask.dispatch = lambda cls: getattr(_row_of(table, cls, column)[1], column) or missing  # type: ignore[attr-defined]
        ask.known = lambda cls: _row_of(table, cls, column)[0]  # type: ignore[attr-defined]
        return ask

    return decorate


def _lenient(given: Callable[..., Any]) -> Callable[..., Any]:
    """A rule that is given as many arguments as it takes."""
    parameters = inspect.signature(given).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return given
    count = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    return lambda *arguments: given(*arguments[:count])


def _constant(value: Any) -> Callable[..., Any] | None:
    return _lenient(value) if callable(value) or value is None else lambda *arguments: value


def rule(
    *classes: type,
    bound: Callable[..., float] | float | None = None,
    rounding: Callable[..., RoundingRule] | None = None,
    tail: Callable[..., Operator | None] | str | None = None,
    slope: Callable[..., float | None] | None = None,
) -> None:
    """Adds a row for classes with one input: `bound(layer, shape)`, `rounding(layer, shape)`, `tail(layer, shape)`.

    Args:
        *classes: of layers.
        bound: number or function; left out where `tail` tells it.
        rounding: `None` where nothing is known.
        tail: the operator, `"same"` for the identity, `None` for layers that are not linear.
        slope: Lipschitz constant of the activation that follows the operator, `None` when there is none.
    """

    def of_tail(layer: Any, shape: Shape = None) -> float:
        operator, steepness = tail_of(layer, shape)
        return operator.bound * (1.0 if steepness is None else steepness)  # type: ignore[union-attr]

    known = of_tail if bound is None and callable(tail) else _constant(bound)
    row = Row(bound=known, rounding=None if rounding is None else _lenient(rounding), tail=tail, slope=slope)
    LAYERS.update(dict.fromkeys(classes, row))


def merge(*classes: type, bound: Callable[..., np.ndarray], rounding: Callable[..., RoundingRule] | None) -> None:
    """Adds a row for classes with several inputs: `bound(layer, constants, shapes)`, `rounding(layer, shapes)`."""
    row = Row(bound=_lenient(bound), rounding=None if rounding is None else _lenient(rounding))
    MERGES.update(dict.fromkeys(classes, row))


# ---- the hooks ------------------------------------------------------------------------------------------


@_hook(LAYERS, "bound")
def layer_bound(layer: Any, shape: Shape = None) -> float:
    """Upper bound on the Lipschitz constant of a built layer, applied to inputs of a shape. Register your own classes.

    A rule is a function of the layer, or of the layer and the shape `(batch, ...)` that it is applied to.

    Raises:
        ValueError: for a class that nothing is known about.

    Example:

    >>> import hkr_keras as hkr
    >>> class Half(keras.layers.Layer):
    ...     def call(self, inputs):
    ...         return inputs / 2
    >>> _ = layer_bound.register(Half, lambda layer: 0.5)
    >>> hkr.lipschitz_bound(Half())
    0.5
    """
    name = f"{type(layer).__name__} '{getattr(layer, 'name', '')}'"
    reason = next((text for cls, text in WITHOUT_BOUND.items() if isinstance(layer, cls)), None)
    if reason:
        raise ValueError(f"Expected a layer with a finite Lipschitz constant: {reason}. Received: layer={name}")
    raise ValueError(
        "Expected a layer with a known Lipschitz bound. Tell us one with\n"
        f"    @hkr_keras.bounds.layer_bound.register({type(layer).__name__})\n"
        "    def _(layer, shape): return ...  # an upper bound, as a float\n"
        f"Received: layer={name}"
    )


#: Layers that have no finite constant, and why or what to use.
WITHOUT_BOUND: dict[type, str] = {
    **dict.fromkeys(
        (keras.layers.LayerNormalization, keras.layers.GroupNormalization, keras.layers.RMSNormalization),
        "it divides by a deviation that may be 0; use LayerCentering",
    ),
    keras.layers.UnitNormalization: "it divides by a norm that may be 0",
    keras.layers.Embedding: "its input is a table index, not a vector; certify the layers behind it",
    keras.layers.Discretization: "it jumps",
    keras.layers.Masking: "it jumps, and the layers behind it would ignore what is masked",
    **dict.fromkeys(
        (
            *(keras.layers.RNN, keras.layers.MultiHeadAttention),
            *(keras.layers.Attention, keras.layers.AdditiveAttention, keras.layers.GroupQueryAttention),
        ),
        "the constant of a recurrent or attention layer depends on its input",
    ),
    **dict.fromkeys(
        (keras.layers.Multiply, keras.layers.Dot), "the constant of a product of inputs depends on their size"
    ),
    keras.layers.Lambda: "any function may be in it; make it a layer class and register a bound for that",
}


@_hook(MERGES, "bound")
def merge_bound(layer: Any, constants: np.ndarray, shapes: Sequence[Shape] | None = None) -> np.ndarray:
    """Constants of the output of a layer with several inputs, from the constants of these inputs.

    Args:
        layer: the merging layer; its inputs have equal shapes (but for `Concatenate`).
        constants: `(inputs of the layer, inputs of the model)`.
        shapes: of the inputs, with the batch; a rule of your own may leave them out.

    Returns:
        Array `(inputs of the model,)`: how far the output moves at most for each unit that one input of the
        model moves.

    Raises:
        ValueError: for a class that nothing is known about.
    """
    reason = next((text for cls, text in WITHOUT_BOUND.items() if isinstance(layer, cls)), None)
    raise ValueError(
        "Expected a merging layer with a known Lipschitz bound (Add, Subtract, Average, Concatenate, Maximum, "
        "Minimum, LipschitzResidual), or one registered with @hkr_keras.bounds.merge_bound.register"
        f"{f': {reason}' if reason else ''}. Received: layer={type(layer).__name__} '{getattr(layer, 'name', '')}'"
    )


@_hook(LAYERS, "rounding")
def layer_rounding(layer: Any, shape: Shape = None) -> RoundingRule:
    """The rounding of a layer: a function of its computed input and output, float32 arrays, to a `Rounding`.

    Raises:
        ValueError: for a class whose rounding nothing is known of.

    Example:

    >>> from hkr_keras.certification.floating_point import relative
    >>> class Third(keras.layers.Layer):
    ...     def call(self, inputs):
    ...         return inputs / 3
    >>> _ = layer_rounding.register(Third, lambda layer: relative(2.0**-24))  # one division
    """
    raise ValueError(
        "Expected a layer whose rounding in float32 is bounded, for a rigorous certificate. Smooth activations depend "
        "on the mathematical library; GroupSort, MaxMin and ReLU are covered. Tell us a bound with "
        f"@hkr_keras.rounding.layer_rounding.register({type(layer).__name__}), or leave out rigorous=True. "
        f"Received: layer={type(layer).__name__} '{getattr(layer, 'name', '')}'"
    )


@_hook(MERGES, "rounding")
def merge_rounding(layer: Any, shapes: Sequence[Shape] | None = None) -> RoundingRule:
    """The rounding of a layer with several inputs: as `layer_rounding`, of a list of inputs, with a slope for each.

    Raises:
        ValueError: for a class whose rounding nothing is known of.
    """
    raise ValueError(
        "Expected a merging layer whose rounding in float32 is bounded, or one registered with "
        f"@hkr_keras.rounding.merge_rounding.register. Received: layer={type(layer).__name__} '{layer.name}'"
    )


# ---- asking about a layer, with every check --------------------------------------------------------------


def bound_of(layer: Any, shape: Shape = None) -> float:
    """The bound of a layer or model for inputs of that shape, after every check of the layer.

    Raises:
        ValueError: for a layer that does not compute what its class says, NaN or infinite weights, or no finite bound.
    """
    if not is_model(layer):
        check(layer, shape)
    with _as_built(layer):
        bound = float(layer_bound(layer, shape))
    if not 0 <= bound < math.inf:
        raise ValueError(
            f"Expected a finite Lipschitz bound. Received: {bound} for {type(layer).__name__} '{layer.name}'"
        )
    return bound


def check(layer: Any, shape: Shape = None) -> None:
    """Refuses a layer with one input that does not compute what its class says, at inputs of that shape."""
    checks.check_layer(layer, layer_bound.known(type(layer)), shape)


def tail_of(layer: Any, shape: Shape) -> tuple[Operator | str | None, float | None]:
    """The operator of a layer (or `"same"`, or `None`), and the Lipschitz constant of an activation that follows it."""
    _, row = _row_of(LAYERS, type(layer), "bound")
    with _as_built(layer):
        operator = row.tail(layer, shape) if callable(row.tail) else row.tail
        return operator, None if row.slope is None else row.slope(layer, shape)


@contextlib.contextmanager
def _as_built(layer: Any) -> Iterator[None]:
    """Attributes that no constructor would store make a rule fail: that is a refusal."""
    try:
        yield
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"Expected {type(layer).__name__} '{layer.name}' with the attributes that its constructor stores. "
            f"Received: one whose rule fails with {type(error).__name__}: {error}"
        ) from error


def is_a(layer: Any, *classes: type) -> bool:
    """Whether the rule of a layer is that of one of these classes: a subclass with a rule of its own is no member."""
    return (layer_bound.known(type(layer)) or merge_bound.known(type(layer))) in classes


def is_model(layer: Any) -> bool:
    """Whether a layer is a model that is read layer by layer: one without a bound registered for its class."""
    return isinstance(layer, keras.Model) and layer_bound.known(type(layer)) is keras.Model
