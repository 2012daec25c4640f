"""Upper bounds on Lipschitz constants: on the host, in float64, from the stored weights.

Nothing here trusts a projection. A bound is about the function in exact arithmetic at inference, L2 norm in,
L2 norm out. Bounds of layers are rows of the tables in `certification/rules`; register a layer of your own with
`@hkr_keras.bounds.layer_bound.register(MyLayer)`. Here they are composed along the graph: layers that are linear are
folded into their neighbours, since the norm of a product of operators can be far below the product of their norms.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from hkr_keras.certification.checks import check_built, check_input_dtype
from hkr_keras.certification.floating_point import MACHINE_EPSILON, SMALLEST_NORMAL_64
from hkr_keras.certification.graph import Application, is_model, walk
from hkr_keras.certification.operators import Diagonal, Matrix, Operator
from hkr_keras.certification.rules.activations import ACTIVATION_BOUNDS, is_one_sided, monotone_slope
from hkr_keras.certification.rules.registry import (
    Shape,
    bound_of,
    check,
    is_a,
    layer_bound,
    merge_bound,
    rule,
    tail_of,
)
from hkr_keras.certification.rules.reshaping import RESHAPING
from hkr_keras.certification.semidefinite import semidefinite_bound
from hkr_keras.layers import Scale

__all__ = ["ACTIVATION_BOUNDS", "layer_bound", "merge_bound"]


def _length(values: Sequence[float] | np.ndarray) -> float:
    """An upper bound on the Euclidean norm; `hypot` neither overflows nor underflows to 0."""
    return math.hypot(*values) * (1 + 8 * MACHINE_EPSILON)


class AffineTail:
    """A tensor as `x W + b` of an earlier one: what sharpens bounds on single outputs and their differences.

    Args:
        matrix: `(features, outputs)` float64, W.
        constants: `(inputs of the model,)`, those of the earlier tensor.
        error: bound on the norm of what is wrong with `matrix`, when it is a product.
        relative: bound on the relative error of what its rows were multiplied by.
    """

    def __init__(self, matrix: np.ndarray, constants: np.ndarray, error: float = 0.0, relative: float = 0.0) -> None:
        self.matrix, self.constants, self.error, self.relative = matrix, constants, error, relative

    def differences_from(self, column: int) -> np.ndarray:
        """Upper bounds on the distances of all columns from one, `(outputs,)`."""
        return self._norms(self.matrix - self.matrix[:, [column]], math.sqrt(2) * self.error)

    def lengths(self) -> np.ndarray:
        """Upper bounds on the norms of the columns, `(outputs,)`."""
        return self._norms(self.matrix, self.error)

    def _norms(self, columns: np.ndarray, error: float) -> np.ndarray:
        # Each by its own scale: squares of small ones would vanish.
        scale = np.maximum(np.abs(columns).max(axis=0), SMALLEST_NORMAL_64)
        lengths = scale * np.linalg.norm(columns / scale, axis=0) + error
        return lengths * (1 + self.relative) * (1 + 4 * len(columns) * MACHINE_EPSILON)


class LipschitzState:
    """What is known of one tensor of a model.

    Args:
        constants: `(inputs of the model,)`, how far it moves at most per unit that each input moves; or a function
            without arguments that computes them when they are asked for.
        operator: set when the tensor is an affine function of an earlier one, `start`: the linear part.
        start: the state of that earlier tensor.
        is_first: whether `operator` began with the layer that made the tensor.
        one_sided: whether no entry can change its sign.
        multiple: set for `a h` with a number a: the state of h, and a.
        rectified: set for `relu(a h)`: the state of h, and a.
    """

    def __init__(
        self,
        constants: np.ndarray | Callable[[], np.ndarray],
        operator: Operator | None = None,
        start: "LipschitzState | None" = None,
        is_first: bool = False,
        one_sided: bool = False,
        multiple: "tuple[LipschitzState, float] | None" = None,
        rectified: "tuple[LipschitzState, float] | None" = None,
    ) -> None:
        self._constants = constants
        self.operator, self.start, self.is_first = operator, start, is_first
        self.one_sided, self.multiple, self.rectified = one_sided, multiple, rectified

    def with_shape(self, operator: Operator | None) -> "LipschitzState":
        """The same numbers, perhaps of another shape: with an operator if it is still known."""
        start = None if operator is None else self.start
        return LipschitzState(
            lambda: self.constants, operator, start, False, self.one_sided, self.multiple, self.rectified
        )

    @property
    def constants(self) -> np.ndarray:
        """`(inputs of the model,)`, float64."""
        if callable(self._constants):
            self._constants = self._constants()
            if not np.isfinite(self._constants).all():
                raise ValueError(
                    "Expected Lipschitz constants below 1e308 all along the model. "
                    f"Received: layers whose constants multiply to {self._constants.max()}"
                )
        return self._constants

    @property
    def constant(self) -> float:
        """The constant with respect to all inputs together (Cauchy-Schwarz)."""
        return _length(self.constants)

    @property
    def tail(self) -> AffineTail | None:
        """Set when the tensor is a product of an earlier one with a matrix, plus numbers."""
        if not isinstance(self.operator, Matrix) or self.start is None:
            return None
        return AffineTail(self.operator.matrix, self.start.constants, self.operator.error, self.operator.relative)


def state_through(place: Application, states: list[LipschitzState]) -> LipschitzState:
    """What is known of the output of a layer, from what is known of its inputs."""
    layer = place.layer
    if len(states) > 1:
        merged = merged_constants(layer, _stacked(layer, states), place.shapes) * (1 + 8 * MACHINE_EPSILON)
        return LipschitzState(lambda: merged, one_sided=all(state.one_sided for state in states))
    state, shape = states[0], place.shapes[0]
    check(layer, shape)
    if is_a(layer, *RESHAPING):
        return _reshaped(place, state)
    operator, slope = tail_of(layer, shape)
    if operator is not None:
        _check_same_shape(place, operator)
    if isinstance(operator, str):
        return state.with_shape(state.operator)
    if operator is not None:
        return _behind(layer, state, operator, slope)
    bound = bound_of(layer, shape)
    return LipschitzState(
        lambda: _times(state.constants, bound),
        one_sided=is_one_sided(layer),
        rectified=(state.multiple or (state, 1.0)) if _is_relu(layer) else None,
    )


def _check_same_shape(place: Application, operator: Operator | str) -> None:
    """Refuses what broadcasts its input: operators that act on every entry keep the shape."""
    shape, output = place.shapes[0], place.output_shape
    known = isinstance(operator, (str, Diagonal)) and shape is not None and output is not None
    if known and tuple(shape[1:]) != tuple(output[1:]):
        raise ValueError(
            f"Expected {type(place.layer).__name__} '{place.layer.name}' to keep the shape of its input. "
            f"Received: shape={tuple(shape)}, output_shape={tuple(output)}"
        )


def _behind(layer: Any, state: LipschitzState, operator: Operator, slope: float | None) -> LipschitzState:
    """The state behind a layer: a linear operator, and perhaps an activation."""
    no_shift = is_a(layer, Scale) or (is_a(layer, keras.layers.Rescaling) and not np.any(layer.offset))
    one_sided = is_one_sided(layer) or (state.one_sided and is_a(layer, Scale))
    whole = None if state.operator is None else operator.after(state.operator)
    start = state if whole is None or state.start is None else state.start
    joined = operator if whole is None else whole

    def constants() -> np.ndarray:
        found = _times(start.constants, joined.bound)
        if isinstance(operator, Matrix) and whole is not None:  # no worse than its factors
            found = np.minimum(found, _times(state.constants, operator.bound))
        return found

    if slope is not None:
        return LipschitzState(lambda: _times(constants(), slope), one_sided=one_sided)
    multiple = None
    if no_shift and isinstance(operator, Diagonal) and operator.numbers.size == 1 and operator.relative == 0.0:
        source, factor = state.multiple or (state, 1.0)
        multiple = source, factor * float(operator.numbers.reshape(()))
    return LipschitzState(constants, joined, start, whole is None, one_sided, multiple)


def _reshaped(place: Application, state: LipschitzState) -> LipschitzState:
    bound_of(place.layer, place.shapes[0])
    shape, output, operator = place.shapes[0], place.output_shape, state.operator
    kept: Operator | None = None
    in_order = getattr(place.layer, "data_format", "channels_last") == "channels_last"  # else Flatten moves channels
    if in_order and isinstance(operator, Diagonal) and shape is not None and output is not None:
        kept = operator.reshaped(tuple(shape[1:]), tuple(output[1:]))
    elif operator is not None and shape is not None and tuple(shape) == tuple(output or ()):
        kept = operator
    return state.with_shape(kept)


def _is_relu(layer: Any) -> bool:
    activation = layer.activation if is_a(layer, keras.layers.Activation) else layer
    if isinstance(activation, keras.layers.Layer):
        if not is_a(activation, keras.layers.ReLU):
            return False
        return not activation.negative_slope and not activation.threshold and activation.max_value is None
    return activation in (keras.activations.relu, keras.ops.relu)


def _stacked(layer: Any, states: list[LipschitzState]) -> np.ndarray:
    """The constants of the inputs of a merging layer, `(inputs of the layer, inputs of the model)`.

    `relu(a h)` beside `relu(b h)` with a and b of opposite signs is no longer than `max(|a|, |b|) h`: where one of
    them changes the other is 0. Concatenated, such a pair counts as one.
    """
    rows = [state.constants for state in states]
    if not is_a(layer, keras.layers.Concatenate):
        return np.stack(rows)
    paired: set[int] = set()
    for i, first in enumerate(states):
        for j, second in enumerate(states[:i]):
            if i in paired or j in paired or first.rectified is None or second.rectified is None:
                continue
            (source, a), (other, b) = first.rectified, second.rectified
            if source is other and a * b < 0:
                rows[i] = _times(source.constants, max(abs(a), abs(b)))
                rows[j] = np.zeros_like(rows[j])
                paired |= {i, j}
    return np.stack(rows)


def _times(constants: np.ndarray, bound: float) -> np.ndarray:
    """The product, rounded up; that of two tiny constants must not underflow to 0."""
    with np.errstate(over="ignore", invalid="ignore"):  # refused when the constants are asked for
        product = constants * bound * (1 + 2 * MACHINE_EPSILON)
    return np.where((constants > 0) & (bound > 0), np.maximum(product, SMALLEST_NORMAL_64), product)


def constant_of(layer: Any, shapes: list[Shape]) -> float:
    """The constant of one layer, all its inputs taken together as one vector."""
    if len(shapes) == 1:
        return bound_of(layer, shapes[0])
    return _length(merged_constants(layer, np.eye(len(shapes)), shapes))


def merged_constants(layer: Any, constants: np.ndarray, shapes: Sequence[Shape] | None = None) -> np.ndarray:
    """What the rule of a merging layer says, checked: anybody may have registered it."""
    merged = np.asarray(merge_bound(layer, constants, shapes), dtype=np.float64)
    if merged.shape != constants.shape[1:] or not (merged >= 0).all():
        raise ValueError(
            f"Expected a rule that gives a constant of at least 0 for each of {constants.shape[1]} columns. "
            f"Received: {merged!r} for {type(layer).__name__} '{layer.name}'"
        )
    return merged


def model_inputs(model: Any) -> list[Any]:
    """The symbolic inputs of a model, or `[None]` for a layer.

    Raises:
        ValueError: for a model that is not built, or takes integers.
    """
    check_built(model)
    inputs = list((getattr(model, "inputs", None) or [None]) if isinstance(model, keras.Model) else [None])
    for tensor in inputs:
        if tensor is not None:
            check_input_dtype(tensor)
    return inputs


def model_states(model: Any, apply: Any = state_through) -> list[LipschitzState]:
    """The states of the outputs of a model with respect to its inputs.

    Raises:
        ValueError: for a model that is not built, or holds a layer without a known bound.
    """
    inputs = model_inputs(model)
    shapes = [None if tensor is None else tensor.shape for tensor in inputs]
    return walk(model, [LipschitzState(row) for row in np.eye(len(inputs))], apply, shapes)


def joint_constant(outputs: list[LipschitzState]) -> float:
    """The constant of all outputs of a model, seen as one vector."""
    return outputs[0].constant if len(outputs) == 1 else _length([output.constant for output in outputs])


class _Chain:
    """A tensor behind a chain of matrices and monotone activations, whose constant a semidefinite program may lower.

    Args:
        state: what the product of bounds tells.
        links: `(matrix, slope)` since the start of the chain, the activation behind each.
        last: the linear operator since the last activation.
        start: the constants of the tensor where the chain starts.
    """

    def __init__(
        self,
        state: LipschitzState,
        links: tuple[tuple[Matrix, float], ...] = (),
        last: Operator | None = None,
        start: np.ndarray | None = None,
    ) -> None:
        self.state, self.links, self.last, self.start = state, links, last, start
        self._constants: np.ndarray | None = None

    @property
    def constants(self) -> np.ndarray:
        """`(inputs of the model,)`, the smaller of both bounds."""
        if self._constants is None:
            self._constants = self.state.constants
            if self.links and isinstance(self.last, Matrix) and self.start is not None:
                matrices = [*(matrix for matrix, _ in self.links), self.last]
                bound = semidefinite_bound(
                    [link.matrix for link in matrices],
                    [slope for _, slope in self.links],
                    [link.total_error for link in matrices],
                )
                self._constants = np.minimum(self._constants, _times(self.start, bound))
        return self._constants

    def through(self, place: Application) -> "_Chain":
        """Behind a layer with one input."""
        layer, state = place.layer, state_through(place, [self.state])
        operator, _ = tail_of(layer, place.shapes[0])
        if isinstance(operator, str):
            return _Chain(state, self.links, self.last, self.start)
        start = self.constants if self.start is None else self.start
        last, slope, activated = self.last, monotone_slope(layer), True
        if isinstance(operator, (Matrix, Diagonal)):
            last, slope = (
                operator if last is None else operator.after(last),
                monotone_slope(getattr(layer, "activation", None)),
            )
            activated = getattr(layer, "activation", None) not in (None, keras.activations.linear)
        if isinstance(last, (Matrix, Diagonal)) and not activated:
            return _Chain(state, self.links, last, start)
        if isinstance(last, Matrix) and slope is not None:
            return _Chain(state, (*self.links, (last, slope)), None, start)
        return _Chain(_lowered(place, [self], state))


def _lowered(place: Application, chains: list[_Chain], state: LipschitzState) -> LipschitzState:
    """The state behind a layer that ends the chains of its inputs."""
    ended = [LipschitzState(chain.constants, one_sided=chain.state.one_sided) for chain in chains]
    lowered = state_through(place, ended)

    def constants() -> np.ndarray:
        return np.minimum(lowered.constants, state.constants)

    return LipschitzState(constants, one_sided=state.one_sided, multiple=state.multiple, rectified=state.rectified)


def _chain_through(place: Application, chains: list[_Chain]) -> _Chain:
    if len(chains) == 1:
        return chains[0].through(place)
    return _Chain(_lowered(place, chains, state_through(place, [chain.state for chain in chains])))


def lipschitz_bound(model: Any, method: str = "product") -> float:
    """A proven upper bound on the Lipschitz constant of a model or layer, from L2 norm to L2 norm.

    Computed in float64 on the host from the stored weights, whatever constraint they carry: at inference, in
    exact arithmetic, `|f(x) - f(z)| <= bound * |x - z|`. Kernels count as the layer
    computes with them: cast, where a policy says so. Several inputs count as one long vector, and so do
    several outputs. The bound of a convolution by itself holds for images of every size.

    Args:
        model: a built Sequential or functional model, nested or not, or a layer.
        method: "product" multiplies the bounds of layers, linear ones folded into each other; "semidefinite" takes
            chains of Dense layers and monotone activations (ReLU, tanh, sigmoid...) together, which brings the bound of
            networks without constraints near to the truth (`semidefinite.semidefinite_bound`); never above the product.

    Returns:
        The bound, a Python float; never an estimate.

    Raises:
        ValueError: for NaN or infinite weights, a model that is not built, a layer without a known bound.

    Example:

    >>> import keras, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(2), hkr.layers.Scale(3.0)])
    >>> bool(abs(hkr.lipschitz_bound(model) - 3) < 1e-5)
    True

    Reference:
        Gouk et al., Machine Learning 110 (2021), for the composition of bounds; Fazlyab et al., NeurIPS 2019 (arXiv
        1906.04893), for the semidefinite ones.
    """
    if method not in ("product", "semidefinite"):
        raise ValueError(f"Expected method 'product' or 'semidefinite'. Received: method={method!r}")
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(f"Expected a Keras model or layer. Received: model={model!r}")
    if not is_model(model):
        return bound_of(model)
    product = joint_constant(model_states(model))
    if method == "product":
        return product
    inputs = model_inputs(model)
    shapes = [None if tensor is None else tensor.shape for tensor in inputs]
    chains = [_Chain(LipschitzState(row)) for row in np.eye(len(inputs))]
    found = walk(model, chains, _chain_through, shapes)
    # Where a chain ends nothing is folded over its end, as it may be in the product.
    return min(product, joint_constant([LipschitzState(chain.constants) for chain in found]))


def _model_bound(model: Any, shape: Shape = None) -> float:
    """The bound of a model inside a layer, for inputs of that shape when it is known."""
    check_built(model)
    inputs = [LipschitzState(row) for row in np.eye(len(model.inputs))]
    return joint_constant(walk(model, inputs, state_through, [shape] if len(inputs) == 1 else None))


rule(keras.Model, bound=_model_bound)
