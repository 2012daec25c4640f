"""What rounding adds: how far a float32 network can be from the same network in exact arithmetic.

For every tensor the walk knows its computed value at the centre of a ball, and bounds, for all points of the ball,
the distance between what is computed and what exact arithmetic would give. Error bounds of single layers are rows of
the tables in `certification/rules`; register a layer of your own with `layer_rounding` or `merge_rounding`.

Assumed of the machine: what `certification/floating_point.py` says. Not covered, and refused when noticed: TF32,
float16, bfloat16, Winograd and FFT convolutions.

At the centre the truth is needed, not what some machine computes of it: Dense layers, which have the widest sums, are
evaluated in float64 there.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from hkr_keras.certification import bounds
from hkr_keras.certification.bounds import LipschitzState
from hkr_keras.certification.checks import check_is_itself
from hkr_keras.certification.floating_point import (
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    Affine,
    Rounding,
    RoundingRule,
    norms,
    relative,
)
from hkr_keras.certification.graph import Application, walk
from hkr_keras.certification.rules.registry import layer_bound, layer_rounding, merge_rounding
from hkr_keras.certification.singular_values import as_float64
from hkr_keras.geometry import flattened_layers

__all__ = ["Rounding", "layer_rounding", "merge_rounding", "relative"]

_LINEAR, _RELU = keras.activations.linear, keras.activations.relu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """What is known of one tensor for all points within a distance epsilon of each input of a batch.

    Args:
        value: at the inputs, `(n, ...)`: as float32 computes it, or nearer to the truth.
        centre_error: bound on the distance between `value` and the exact tensor, `(n,)`.
        state: in exact arithmetic.
        error: bound on the distance between the deployed and the exact tensor, anywhere in the ball.
        error_before_tail: of the tensor from which the affine tail starts; `None` without one.
        error_after_tail: what has been added to the error since that tensor, when it is left out; `None` without one.
    """

    value: np.ndarray
    centre_error: np.ndarray
    state: LipschitzState
    error: Affine
    error_before_tail: Affine | None = None
    error_after_tail: Affine | None = None

    def spread(self) -> Affine:
        """Bound on the distance between the deployed tensor, anywhere in the ball, and `value`."""
        return Affine(self.error.constant + self.centre_error, self.state.constant + self.error.slope)

    def rounded(self) -> "Trace":
        """The same after a cast to float32 on the machine."""
        spread = self.spread()
        flushed = SMALLEST_NORMAL * math.sqrt(math.prod(self.value.shape[1:]))
        added = Affine(UNIT_ROUNDOFF * (norms(self.value) + spread.constant) + flushed, UNIT_ROUNDOFF * spread.slope)
        after = None if self.error_after_tail is None else self.error_after_tail + added
        return dataclasses.replace(self, error=self.error + added, error_after_tail=after)

    def in_float32(self) -> "Trace":
        """The same with a value that layers can take."""
        single = self.value.astype(np.float32)
        return dataclasses.replace(
            self, value=single, centre_error=self.centre_error + norms(self.value - single.astype(np.float64))
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Known:
    """What depends on a layer and its weights alone."""

    state: LipschitzState
    rule: RoundingRule
    bound: float
    exact: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None
    settings: dict[str, Any]


class Tracer:
    """Follows the rounding of one model, batch after batch."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shapes = [tensor.shape for tensor in bounds.model_inputs(model)]
        inputs: list[Any] = []
        others: list[Any] = []
        for layer in flattened_layers(model):
            (inputs if isinstance(layer, keras.layers.InputLayer) else others).append(layer)
        wide = [x for x in others if {str(x.compute_dtype), str(x.variable_dtype)} != {"float32"}]
        if wide:  # Keras may compute in float32 all the same, and round its weights for that
            raise ValueError(
                "Expected layers of float32 for a rigorous certificate. "
                f"Received: '{wide[0].name}' with dtype policy {wide[0].dtype_policy.name}"
            )
        self._casts = {str(layer.dtype) for layer in inputs} != {"float32"}  # then a layer may be given float64
        self._known: dict[tuple[Any, ...], _Known] = {}

    def __call__(self, arrays: list[np.ndarray]) -> tuple[Trace, Affine]:
        """The trace of the one output of the model, and a bound on the largest number that can occur on the way."""
        nothing = np.zeros(len(arrays[0]))
        largest = Affine(nothing, 0.0)

        def apply(place: Application, traces: list[Trace]) -> Trace:
            nonlocal largest
            traces = [trace.rounded() for trace in traces] if self._casts else traces
            key = (place.path, *(trace.value.shape[1:] for trace in traces))  # batches may be of other sizes
            if key not in self._known:
                self._known[key] = _known(place, traces)
            output, added = _output(place, traces, self._known[key])
            reached = Affine(norms(output.value), 0.0) + output.spread()
            lost = added.times(1 / UNIT_ROUNDOFF)  # partial sums are below what they may lose
            largest = largest.larger(reached).larger(lost)
            if output.state.constant and not 2.0**-100 < output.state.constant < 2.0**100:
                # A compiler may multiply the numbers of neighbouring layers, and their product be none of float32's.
                largest = Affine(largest.constant + math.inf, largest.slope)
            return output

        rows = np.eye(len(arrays))
        traces = [
            Trace(value=array, centre_error=nothing, state=LipschitzState(row), error=Affine(nothing, 0.0))
            for array, row in zip(arrays, rows, strict=True)
        ]
        for trace in traces:
            largest = largest.larger(Affine(norms(trace.value), 1.0))
        (output,) = walk(self.model, traces, apply, self.shapes)
        return output, largest


def _known(place: Application, traces: list[Trace]) -> _Known:
    layer, shapes = place.layer, [trace.value.shape for trace in traces]
    hook = layer_rounding if len(traces) == 1 else merge_rounding
    rule = hook(layer, shapes[0] if len(traces) == 1 else shapes)
    check_is_itself(layer, hook.known(type(layer)))  # a subclass with a bound of its own may compute anything
    state = bounds.state_through(place, [trace.state for trace in traces])
    return _Known(
        state=state,
        rule=rule,
        bound=bounds.constant_of(layer, shapes),
        exact=_in_float64(layer) if layer_bound.known(type(layer)) is keras.layers.Dense else None,
        settings={"training": False} if "training" in inspect.signature(layer.call).parameters else {},
    )


def _in_float64(layer: Any) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None:
    """A Dense layer on the host, and what float64 may be off by: the widest sums are in these layers."""
    if not isinstance(layer, keras.layers.Dense) or layer.activation not in (_LINEAR, _RELU):
        return None
    kernel, bias = as_float64(layer.kernel), as_float64(layer.bias) if layer.use_bias else np.zeros(layer.units)
    error = (len(kernel) + 4) * 2.0**-51
    sizes = float(np.linalg.norm(kernel)), float(np.linalg.norm(bias))

    def exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y = x.astype(np.float64) @ kernel + bias
        centre_error = error * (sizes[0] * norms(x) + sizes[1] * math.sqrt(y[0].size / len(bias)))
        return (np.maximum(y, 0.0) if layer.activation is _RELU else y), centre_error

    return exact


def _output(place: Application, traces: list[Trace], known: _Known) -> tuple[Trace, Affine]:
    """The trace of the output of a layer, and what the layer itself adds to the error."""
    layer = place.layer
    singles = [trace.in_float32() for trace in traces]
    values = [trace.value for trace in singles]
    arguments = values if len(values) > 1 else values[0]
    if known.exact is not None:
        value, centre_error = known.exact(traces[0].value)
        rounding = known.rule(arguments, value)
        centre_error = traces[0].centre_error * known.bound + centre_error
    else:
        value = np.asarray(ops.convert_to_numpy(layer(arguments, **known.settings)))
        rounding = known.rule(arguments, value)
        centre_error = _carried(layer, [trace.centre_error for trace in singles], known.bound) + rounding.at_centre
    slopes = rounding.slope if isinstance(rounding.slope, tuple) else (rounding.slope,)
    if any(np.any(np.asarray(part) < 0) for part in (rounding.at_centre, rounding.composed, *slopes)):
        raise ValueError(
            "Expected a rule of rounding that gives numbers of at least 0. "
            f"Received: {rounding} for {type(layer).__name__} '{layer.name}'"
        )
    added = Affine(rounding.at_centre, 0.0)
    for slope, single in zip(slopes, singles, strict=True):
        added = added + single.spread().times(slope)
        added = added + (Affine(norms(single.value), 0.0) + single.spread()).times(rounding.composed)
    constant, grows = (
        _carried(layer, [np.broadcast_to(part, len(value)) for part in parts], known.bound)
        for parts in ([trace.error.constant for trace in traces], [trace.error.slope for trace in traces])
    )
    output = Trace(value=value, centre_error=centre_error, state=known.state, error=Affine(constant, grows) + added)
    if known.state.operator is None:
        return output, added
    trace = traces[0]
    if known.state.is_first or trace.error_before_tail is None or trace.error_after_tail is None:
        return dataclasses.replace(output, error_before_tail=trace.error, error_after_tail=added), added
    return dataclasses.replace(
        output,
        error_before_tail=trace.error_before_tail,
        error_after_tail=trace.error_after_tail.times(known.bound) + added,
    ), added


def _carried(layer: Any, distances: list[np.ndarray], bound: float) -> np.ndarray:
    """How far the exact output moves when the inputs move by these distances, `(n,)`."""
    return distances[0] * bound if len(distances) == 1 else bounds.merged_constants(layer, np.stack(distances))
