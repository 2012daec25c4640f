"""Upper bounds on Lipschitz constants: on the host, in float64, from the stored weights.

Nothing here trusts a projection. A bound is about the function in exact arithmetic at inference, L2 norm in,
L2 norm out. Bounds of layers live in `layer_bound`, a single-dispatch function: register a layer of your own
with `@hkr_keras.bounds.layer_bound.register(MyLayer)`, exactly as this module does.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import keras
import numpy as np

from hkr_keras import layers as hkr_layers
from hkr_keras.certification.checks import (
    build_shape,
    check_arguments,
    check_batch_apart,
    check_built,
    check_is_itself,
    check_is_plain_model,
    check_kernel_layer,
    check_merge,
    check_model_shapes,
    check_numbers,
    check_shape,
    check_sizes,
    overridden,
)
from hkr_keras.certification.singular_values import (
    MACHINE_EPSILON,
    as_float64,
    convolution_bound,
    kernel_bound,
    matrix_spectrum,
    separable_bound,
)
from hkr_keras.geometry import kernel_geometries, overlap
from hkr_keras.layers.recurrent import LipschitzSimpleRNNCell, recurrence_bound

# ---- activations ----------------------------------------------------------------------------------------

_a = keras.activations
#: The largest slope of every continuous activation function of Keras (default arguments).
ACTIVATION_BOUNDS: dict[Any, float] = {
    _a.linear: 1.0,
    _a.relu: 1.0,
    _a.relu6: 1.0,
    _a.leaky_relu: 1.0,
    _a.elu: 1.0,
    _a.celu: 1.0,
    _a.tanh: 1.0,
    _a.hard_tanh: 1.0,
    _a.softplus: 1.0,
    _a.softsign: 1.0,
    _a.soft_shrink: 1.0,
    _a.tanh_shrink: 1.0,
    _a.squareplus: 1.0,
    _a.sparse_plus: 1.0,
    _a.log_sigmoid: 1.0,
    _a.softmax: 0.5,
    _a.sparse_sigmoid: 0.5,
    _a.sigmoid: 0.25,
    _a.hard_sigmoid: math.nextafter(1 / 6, 1),
    _a.silu: 1.0998394,  # rounded up, as all of these
    _a.mish: 1.0885,
    _a.gelu: 1.1289100,
    _a.selu: 1.7580994,
    _a.hard_silu: 1.5,
}


def activation_bound(activation) -> float:
    """Lipschitz constant of an activation: a function of `keras.activations`, `None`, or a layer.

    Raises:
        ValueError: for a function that is unknown or has no finite constant.

    Example:

    >>> activation_bound(keras.activations.relu)
    1.0
    """
    if activation is None:
        return 1.0
    if isinstance(activation, keras.layers.Layer):
        if activation.weights or isinstance(activation, (keras.layers.Rescaling, keras.layers.Normalization)):
            raise ValueError(  # they may be larger than what they are applied to
                "Expected an activation without numbers of its own: put the layer behind the other one. "
                f"Received: activation={type(activation).__name__} '{activation.name}'"
            )
        return lipschitz_bound(activation)
    try:
        return ACTIVATION_BOUNDS[activation]
    except (KeyError, TypeError):
        raise ValueError(
            "Expected an activation with a known Lipschitz constant; add yours with "
            "hkr_keras.bounds.ACTIVATION_BOUNDS[function] = constant. "
            f"Received: activation={getattr(activation, '__name__', activation)}"
        ) from None


# ---- layers with one input ------------------------------------------------------------------------------


@functools.singledispatch
def layer_bound(layer) -> float:
    """Upper bound on the Lipschitz constant of a built layer. Register your own classes here.

    Raises:
        ValueError: for a class that nothing is known about.

    Example:

    >>> class Half(keras.layers.Layer):
    ...     def call(self, inputs):
    ...         return inputs / 2
    >>> _ = layer_bound.register(Half, lambda layer: 0.5)
    >>> lipschitz_bound(Half())
    0.5
    """
    reason = next((text for cls, text in _WITHOUT_BOUND.items() if isinstance(layer, cls)), None)
    if reason:
        raise ValueError(
            f"Expected a layer with a finite Lipschitz constant: {reason}. "
            f"Received: layer={type(layer).__name__} '{layer.name}'"
        )
    raise ValueError(
        "Expected a layer with a known Lipschitz bound. Tell us one with\n"
        f"    @hkr_keras.bounds.layer_bound.register({type(layer).__name__})\n"
        "    def _(layer): return ...  # an upper bound, as a float\n"
        f"Received: layer={type(layer).__name__} '{getattr(layer, 'name', '')}'"
    )


_RECURRENT = "the constant of a recurrent or attention layer depends on its input"
#: Layers that have no finite constant, and why or what to use.
_WITHOUT_BOUND: dict[type, str] = {
    keras.layers.LayerNormalization: "it divides by a deviation that may be 0; use LayerCentering",
    keras.layers.GroupNormalization: "it divides by a deviation that may be 0; use LayerCentering",
    keras.layers.UnitNormalization: "it divides by a norm that may be 0",
    keras.layers.Embedding: "its input is a table index, not a vector; certify the layers behind it",
    keras.layers.Discretization: "it jumps",
    keras.layers.RNN: _RECURRENT,
    keras.layers.Bidirectional: _RECURRENT,
    keras.layers.MultiHeadAttention: _RECURRENT,
    keras.layers.Attention: _RECURRENT,
}


def _register(bound: Callable[..., float], *classes: type) -> None:
    for cls in classes:
        layer_bound.register(cls, bound)


_k = keras.layers


def _one(layer) -> float:
    return 1.0


def _factor(layer) -> float:
    return abs(layer.k)


_register(
    _one,
    _k.InputLayer,
    _k.Identity,
    _k.Flatten,
    _k.Reshape,
    _k.Permute,
    _k.Dropout,
    _k.SpatialDropout1D,
    _k.SpatialDropout2D,
    _k.SpatialDropout3D,
    _k.AlphaDropout,
    _k.GaussianDropout,
    _k.GaussianNoise,
    _k.ActivityRegularization,
    _k.ZeroPadding1D,
    _k.ZeroPadding2D,
    _k.ZeroPadding3D,
    _k.Cropping1D,
    _k.Cropping2D,
    _k.Cropping3D,
    _k.GlobalMaxPooling1D,
    _k.GlobalMaxPooling2D,
    _k.GlobalMaxPooling3D,
    hkr_layers.GroupSort,
    hkr_layers.MaxMin,
    hkr_layers.FullSort,
    hkr_layers.Householder,
    hkr_layers.ScaledAveragePooling1D,
    hkr_layers.ScaledAveragePooling2D,
    hkr_layers.ScaledGlobalAveragePooling1D,
    hkr_layers.ScaledGlobalAveragePooling2D,
    hkr_layers.L2NormPooling1D,
    hkr_layers.L2NormPooling2D,
    hkr_layers.GlobalL2NormPooling1D,
    hkr_layers.GlobalL2NormPooling2D,
    hkr_layers.InvertibleDownsampling2D,
    hkr_layers.InvertibleUpsampling2D,
)
_register(_factor, hkr_layers.Scale)


def _kernel_layer(layer) -> float:
    if getattr(layer, "quantization_mode", None):
        raise ValueError(
            "Expected floating point kernels, since the stored weights of a quantized layer are not the ones it "
            f"computes with. Received: {layer.name}.quantization_mode={layer.quantization_mode}"
        )
    check_kernel_layer(layer)
    names = list(kernel_geometries(layer))
    bound = kernel_bound(layer, names[0]) if len(names) == 1 else separable_bound(layer, *names)
    return bound * activation_bound(layer.activation)


_register(
    _kernel_layer,
    _k.Dense,
    _k.Conv1D,
    _k.Conv2D,
    _k.Conv3D,
    _k.Conv1DTranspose,
    _k.Conv2DTranspose,
    _k.Conv3DTranspose,
    _k.DepthwiseConv1D,
    _k.DepthwiseConv2D,
    _k.SeparableConv1D,
    _k.SeparableConv2D,
    hkr_layers.OrthogonalConv1D,
    hkr_layers.OrthogonalConv2D,
    hkr_layers.OrthogonalConv1DTranspose,
    hkr_layers.OrthogonalConv2DTranspose,
    hkr_layers.AOLDense,
    hkr_layers.AOLConv2D,
)


def _reflection(layer) -> float:
    # The Jacobian I - 2 W D W^T, D diagonal in [0, 1], has eigenvalues in [1 - 2 |W|^2, 1].
    return max(1.0, (2 * kernel_bound(layer, "kernel") ** 2 - 1) * (1 + 8 * MACHINE_EPSILON))


_register(_reflection, hkr_layers.SLLDense, hkr_layers.SLLConv2D)


@layer_bound.register
def _(layer: hkr_layers.LipschitzSimpleRNN) -> float:
    cell = layer.cell
    changed = type(cell) is not LipschitzSimpleRNNCell or overridden(cell, LipschitzSimpleRNNCell)
    if changed or layer.return_state or layer.stateful:
        raise ValueError(
            "Expected a LipschitzSimpleRNN with its own cell, and no states in or out. Received: "
            f"cell={type(cell).__name__}, return_state={layer.return_state}, stateful={layer.stateful}"
        )
    check_built(layer)
    slope = activation_bound(cell.activation)
    inputs, states = (slope * kernel_bound(cell, name) for name in ("kernel", "recurrent_kernel"))
    return recurrence_bound(layer.length, inputs, states, layer.return_sequences)


_register(lambda layer: activation_bound(layer.activation), _k.Activation)
_register(lambda layer: max(1.0, abs(layer.negative_slope)), _k.LeakyReLU)
_register(lambda layer: max(1.0, abs(layer.alpha)), _k.ELU)


@layer_bound.register
def _(layer: keras.layers.PReLU) -> float:
    check_built(layer)
    return max(1.0, float(np.abs(as_float64(layer.alpha)).max()))


@layer_bound.register
def _(layer: keras.layers.ReLU) -> float:
    if layer.threshold:
        raise ValueError(
            "Expected a continuous activation: a ReLU with a threshold jumps there. "
            f"Received: {layer.name}.threshold={layer.threshold}"
        )
    return max(1.0, abs(layer.negative_slope or 0.0))


def _pool_overlap(layer) -> int:
    return overlap(layer.pool_size, layer.strides, (1,) * len(layer.pool_size))


_register(lambda layer: math.sqrt(_pool_overlap(layer)), _k.MaxPooling1D, _k.MaxPooling2D, _k.MaxPooling3D)


def spatial_sizes(layer, shape) -> tuple:
    """The sizes of an image or sequence, without batch and channels."""
    return tuple(shape[1:-1] if layer.data_format == "channels_last" else shape[2:])


def _average_pooling(layer, shape=None) -> float:
    """The norm of the tensor product of one matrix per dimension; for unknown sizes, the largest there is."""
    sizes = spatial_sizes(layer, shape) if shape else (None,) * len(layer.pool_size)
    return math.prod(
        _average_norm(k, s, n, layer.padding) for k, s, n in zip(layer.pool_size, layer.strides, sizes, strict=True)
    )


def _average_norm(k: int, stride: int, size: int | None, padding: str) -> float:
    """The norm in one dimension: of the explicit matrix when the size is known."""
    if size is None or size > 2048:
        if padding == "valid":
            return convolution_bound(np.full((k, 1, 1, 1), 1 / k), (stride,)) * (1 + k * MACHINE_EPSILON)
        return math.sqrt(overlap((k,), (stride,), (1,)))  # Keras divides by the cells inside, perhaps a single one
    count = (size - k) // stride + 1 if padding == "valid" else -(-size // stride)
    outside = 0 if padding == "valid" else max((count - 1) * stride + k - size, 0)
    seen = np.arange(count)[:, None] * stride - outside // 2 + np.arange(k)  # cells of every window
    inside = (seen >= 0) & (seen < size)
    # Outside the image there is nothing, or (PyTorch, where the two sides differ) the cell at the border once more.
    weights = (inside / np.maximum(inside.sum(axis=1, keepdims=True), 1), np.full(seen.shape, 1 / k))
    matrices = np.zeros((2, count, size))
    for matrix, weight in zip(matrices, weights, strict=True):
        np.add.at(matrix, (np.arange(count)[:, None], np.clip(seen, 0, size - 1)), weight)
    return matrix_spectrum(matrices).bound


def _time_distributed(layer, shape=None) -> float:
    shape = shape or build_shape(layer)
    return _bound(layer.layer, None if shape is None else (shape[0], *shape[2:]))


def _global_average(layer, shape=None) -> float:
    cells = spatial_sizes(layer, shape) if shape else (None,)
    return 1.0 if None in cells else 1.0 / math.sqrt(math.prod(cells))


_register(_one, _k.Softmax)
_register(_average_pooling, _k.AveragePooling1D, _k.AveragePooling2D, _k.AveragePooling3D)
_register(_global_average, _k.GlobalAveragePooling1D, _k.GlobalAveragePooling2D, _k.GlobalAveragePooling3D)
_SIZED = {
    _average_pooling,
    _global_average,
    _time_distributed,
}  # rules that take the shape of the input too, when it is known


def _upsampling(layer) -> float:
    if getattr(layer, "interpolation", "nearest") != "nearest":
        raise ValueError(
            f"Expected UpSampling2D to repeat pixels. Received: {layer.name}.interpolation={layer.interpolation}"
        )
    return math.sqrt(np.prod(layer.size))


_register(_upsampling, _k.UpSampling1D, _k.UpSampling2D, _k.UpSampling3D)
_register(lambda layer: math.sqrt(layer.n), _k.RepeatVector)
_register(_time_distributed, _k.TimeDistributed)


@layer_bound.register(hkr_layers.BatchCentering)
@layer_bound.register(hkr_layers.LayerCentering)
def _(layer) -> float:
    """A translation, or a projection and a translation, by numbers that are no larger than the input."""
    built = build_shape(layer)
    if built is not None and isinstance(layer, hkr_layers.BatchCentering):
        check_numbers(layer, [layer.moving_mean, *([layer.bias] if layer.center else [])], (built[layer.axis],))
    elif built is not None and layer.center:
        axes = {axis % len(built) for axis in ((layer.axis,) if isinstance(layer.axis, int) else layer.axis)}
        check_numbers(layer, [layer.bias], tuple(n if i in axes else 1 for i, n in enumerate(built))[1:])
    return 1.0


@layer_bound.register
def _(layer: keras.layers.Rescaling) -> float:
    check_sizes(layer, (layer.scale, layer.offset))
    return float(np.abs(np.asarray(layer.scale, dtype=np.float64)).max())


@layer_bound.register
def _(layer: keras.layers.Normalization) -> float:
    check_built(layer)
    mean, variance = as_float64(layer.mean), as_float64(layer.variance)
    check_sizes(layer, (mean, variance))
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon() * (1 - 2**-23))
    return float((deviation if layer.invert else 1 / deviation).max()) * (1 + 4 * MACHINE_EPSILON)


@layer_bound.register
def _(layer: keras.layers.BatchNormalization) -> float:
    gain = as_float64(layer.gamma) if layer.scale else np.ones(1)
    return float((np.abs(gain) / np.sqrt(as_float64(layer.moving_variance) + layer.epsilon)).max()) * (
        1 + 8 * MACHINE_EPSILON
    )


# ---- layers with several inputs -------------------------------------------------------------------------


@functools.singledispatch
def merge_bound(layer, constants: np.ndarray) -> np.ndarray:
    """Constants of the output of a layer with several inputs, from the constants of these inputs.

    Args:
        layer: the merging layer; its inputs have equal shapes (but for `Concatenate`).
        constants: `(inputs of the layer, inputs of the model)`.

    Returns:
        Array `(inputs of the model,)`: how far the output moves at most for each unit that one input of the
        model moves.

    Raises:
        ValueError: for a class that nothing is known about.
    """
    raise ValueError(
        "Expected a merging layer with a known Lipschitz bound (Add, Subtract, Average, Concatenate, Maximum, "
        "Minimum, LipschitzResidual), or one registered with @hkr_keras.bounds.merge_bound.register. "
        f"Received: layer={type(layer).__name__} '{getattr(layer, 'name', '')}'"
    )


def _root_sum_squares(layer, constants):
    return np.hypot.reduce(constants, axis=0)  # unlike squares, this cannot underflow to 0


merge_bound.register(keras.layers.Add, lambda layer, constants: constants.sum(axis=0))
merge_bound.register(keras.layers.Subtract, lambda layer, constants: constants.sum(axis=0))
merge_bound.register(keras.layers.Average, lambda layer, constants: constants.mean(axis=0))
merge_bound.register(keras.layers.Concatenate, _root_sum_squares)
merge_bound.register(keras.layers.Maximum, _root_sum_squares)
merge_bound.register(keras.layers.Minimum, _root_sum_squares)


@merge_bound.register
def _(layer: hkr_layers.LipschitzResidual, constants):
    logits = as_float64(layer.mixing_logits)
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum()) @ constants


# ---- models ---------------------------------------------------------------------------------------------


def _length(values) -> float:
    """An upper bound on the Euclidean norm; `hypot` neither overflows nor underflows to 0."""
    return math.hypot(*values) * (1 + 8 * MACHINE_EPSILON)


@dataclasses.dataclass(frozen=True)
class AffineTail:
    """A tensor as `x W + b` of an earlier one: what sharpens bounds on single outputs and their differences.

    Args:
        matrix: `(features, outputs)`, W.
        constants: `(inputs of the model,)`, those of the earlier tensor.
        rounding: bound on the norm of what is wrong with `matrix`, when it is a product.
    """

    matrix: np.ndarray
    constants: np.ndarray
    rounding: float = 0.0

    def differences_from(self, column: int) -> np.ndarray:
        """Upper bounds on the distances of all columns from one, `(outputs,)`."""
        return self._norms(self.matrix - self.matrix[:, [column]], math.sqrt(2) * self.rounding)

    def lengths(self) -> np.ndarray:
        """Upper bounds on the norms of the columns, `(outputs,)`."""
        return self._norms(self.matrix, self.rounding)

    @staticmethod
    def _norms(columns: np.ndarray, rounding: float) -> np.ndarray:
        scale = max(float(np.abs(columns).max()), np.finfo(np.float64).tiny)  # tiny squares would vanish
        return (scale * np.linalg.norm(columns / scale, axis=0) + rounding) * (1 + 4 * len(columns) * MACHINE_EPSILON)


@dataclasses.dataclass(frozen=True)
class LipschitzState:
    """What is known of one tensor of a model.

    Args:
        constants: `(inputs of the model,)`, how far it moves at most per unit that each input moves.
        head: set when the tensor is an affine function of an earlier one, through Dense layers alone.
    """

    constants: np.ndarray
    tail: AffineTail | None = None

    @property
    def constant(self) -> float:
        """The constant with respect to all inputs together (Cauchy-Schwarz)."""
        return _length(self.constants)


State = TypeVar("State")
#: Takes a layer, what is known of its inputs, and their shapes (`None` when unknown); tells the same of its output.
Apply = Callable[[Any, list[State], list], State]


def walk(layer, states: list[State], apply: Apply, shapes: list | None = None) -> list[State]:
    """Carries what is known of the inputs of a layer or model along its graph to its outputs.

    Args:
        layer: a built layer, Sequential or functional model.
        states: one per input.
        apply: called once for every layer that is not a model, in the order of computation.
        shapes: of the inputs, with the batch; `None` when unknown.
    """
    shapes = shapes or [None] * len(states)
    is_model = isinstance(layer, keras.Model) and type(layer) not in layer_bound.registry
    if is_model and isinstance(layer, keras.Sequential):
        check_is_plain_model(layer, keras.Sequential)
        if layer._functional is not None:  # what runs, whatever has become of the list of layers
            return _walk_graph(layer._functional, states, apply, shapes)
        for inner in layer.layers:
            states = walk(inner, states, apply)
        return states
    if is_model:
        return _walk_graph(layer, states, apply, shapes)
    if len(states) > 1:
        check_is_itself(layer, merge_bound.registry)
        check_merge(layer, shapes)
    return [apply(layer, states, shapes)]


def state_through(layer, states: list[LipschitzState], shapes: list) -> LipschitzState:
    """The flow of the output of a layer, from those of its inputs."""
    if len(states) > 1:
        return LipschitzState(
            merge_bound(layer, np.stack([state.constants for state in states])) * (1 + 8 * MACHINE_EPSILON)
        )
    state, bound = states[0], _bound(layer, shapes[0])
    constants = _times(state.constants, bound)
    rule = layer_bound.dispatch(type(layer))  # a class with a bound of its own may compute anything
    if rule is _kernel_layer and isinstance(layer, keras.layers.Dense) and layer.activation is keras.activations.linear:
        tail = _behind(state.tail, as_float64(layer.kernel), state.constants)
        if state.tail is not None:  # nothing but Dense layers since then: one matrix, no worse than its factors
            whole = matrix_spectrum(tail.matrix).bound + tail.rounding
            constants = np.minimum(constants, _times(state.tail.constants, whole))
        return LipschitzState(constants, tail)
    if rule is _one and isinstance(layer, (keras.layers.Dropout, keras.layers.Identity)):
        return LipschitzState(constants, state.tail)
    if rule is _factor and state.tail is not None:
        factor, size = abs(layer.k) * (1 + MACHINE_EPSILON), float(np.linalg.norm(state.tail.matrix))
        rounding = factor * (state.tail.rounding + 2 * MACHINE_EPSILON * size)
        return LipschitzState(constants, AffineTail(state.tail.matrix * layer.k, state.tail.constants, rounding))
    return LipschitzState(constants)


def constant_of(layer, shapes: list) -> float:
    """The constant of one layer, all its inputs taken together as one vector."""
    if len(shapes) == 1:
        return _bound(layer, shapes[0])
    return _length(merge_bound(layer, np.eye(len(shapes))))


def _times(constants: np.ndarray, bound: float) -> np.ndarray:
    """The product, rounded up; that of two tiny constants must not underflow to 0."""
    product = constants * bound * (1 + 2 * MACHINE_EPSILON)
    return np.where((constants > 0) & (bound > 0), np.maximum(product, np.finfo(np.float64).tiny), product)


def _behind(tail: AffineTail | None, kernel: np.ndarray, constants: np.ndarray) -> AffineTail:
    """The head of a Dense layer, seen from the first of the Dense layers that end in it."""
    if tail is None:
        return AffineTail(kernel, constants)
    length = float(np.linalg.norm(tail.matrix) * np.linalg.norm(kernel))
    rounding = tail.rounding * float(np.linalg.norm(kernel)) + 4 * len(kernel) * MACHINE_EPSILON * length
    tiny = np.finfo(np.float64).tiny * kernel.size  # what can underflow in the product
    return AffineTail(tail.matrix @ kernel, tail.constants, rounding * (1 + 8 * MACHINE_EPSILON) + tiny)


def _walk_graph(model, states: list[State], apply: Apply, shapes: list) -> list[State]:
    classes = (
        cls for cls in type(model).__mro__ if cls.__name__ == "Functional" and cls.__module__.startswith("keras.")
    )
    check_is_plain_model(model, next(classes, None))
    check_model_shapes(model, shapes)
    known = {id(tensor): state for tensor, state in zip(model.inputs, states, strict=True)}
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if node.is_input or not all(id(tensor) in known for tensor in node.input_tensors):
                continue
            layer, tensors = node.operation, node.input_tensors
            if not isinstance(layer, keras.layers.Layer):
                raise ValueError(
                    "Expected a model made of layers: use keras.layers.Add() and the like in place of operators "
                    f"and keras.ops. Received: operation={type(layer).__name__} '{layer.name}'"
                )
            check_arguments(node, model)
            outputs = walk(layer, [known[id(t)] for t in tensors], apply, [t.shape for t in tensors])
            known.update((id(tensor), state) for tensor, state in zip(node.outputs, outputs, strict=True))
    return [known[id(tensor)] for tensor in model.outputs]


def model_inputs(model) -> list:
    """The symbolic inputs of a model, or `[None]` for a layer.

    Raises:
        ValueError: for a model that is not built, or takes integers.
    """
    check_built(model)
    inputs = list((getattr(model, "inputs", None) or [None]) if isinstance(model, keras.Model) else [None])
    for tensor in inputs:
        if tensor is not None and "float" not in tensor.dtype:
            raise ValueError(
                "Expected inputs of a floating point type: rounding to integers has no Lipschitz constant. "
                f"Received: input '{tensor.name}' of dtype {tensor.dtype}"
            )
    return inputs


def model_states(model, apply: Apply = state_through) -> list[LipschitzState]:
    """The flows of the outputs of a model with respect to its inputs.

    Raises:
        ValueError: for a model that is not built, or holds a layer without a known bound.
    """
    inputs = model_inputs(model)
    shapes = [None if tensor is None else tensor.shape for tensor in inputs]
    return walk(model, [LipschitzState(row) for row in np.eye(len(inputs))], apply, shapes)


def joint_constant(outputs: list[LipschitzState]) -> float:
    """The constant of all outputs of a model, seen as one vector."""
    return outputs[0].constant if len(outputs) == 1 else _length([output.constant for output in outputs])


def lipschitz_bound(model) -> float:
    """A proven upper bound on the Lipschitz constant of a model or layer, from L2 norm to L2 norm.

    Computed in float64 on the host from the stored weights, whatever constraint they carry: at inference, in
    exact arithmetic, `|f(x) - f(z)| <= bound * |x - z|`. Several inputs count as one long vector, and so do
    several outputs.

    Args:
        model: a built Sequential or functional model, nested or not, or a layer.

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
        Gouk et al., Machine Learning 110 (2021), for the composition of bounds.
    """
    if isinstance(model, keras.Model) and type(model) not in layer_bound.registry:
        return joint_constant(model_states(model))
    return _bound(model)


def _bound(layer, shape=None) -> float:
    """The bound of a layer, for inputs of that shape when it is known."""
    if isinstance(layer, keras.Model) and type(layer) not in layer_bound.registry:
        if shape is not None:
            check_model_shapes(layer, [shape])
        return lipschitz_bound(layer)
    check_is_itself(layer, layer_bound.registry)
    check_batch_apart(layer, shape)
    if kernel_geometries(layer):
        check_built(layer)
    check_shape(layer, shape)
    for variable in getattr(layer, "weights", ()):
        as_float64(variable)
    rule = layer_bound.dispatch(type(layer))
    bound = float(rule(layer, shape) if rule in _SIZED else rule(layer))
    if not 0 <= bound < math.inf:
        raise ValueError(
            f"Expected a finite Lipschitz bound. Received: {bound} for {type(layer).__name__} '{layer.name}'"
        )
    return bound
