"""What rounding adds: how far a float32 network can be from the same network in exact arithmetic.

For every tensor the walk knows its computed value at the centre of a ball, and bounds, for all points of the ball,
the distance between what is computed and what exact arithmetic would give. Rounding of single layers lives in
`layer_rounding` and `merge_rounding`, single-dispatch functions: register a layer of your own as this module does.

Assumed of the machine: IEEE float32, round to nearest; products are sums of rounded (or fused) products, added in any
order; subnormal numbers may be flushed to 0; `exp`, `sin`, `cos` and reciprocal roots are right to 4 units in the last
place. Not covered, and refused when noticed: TF32, float16, bfloat16, Winograd and FFT convolutions.

At the centre the truth is needed, not what some machine computes of it: Dense layers, which have the widest sums, are
evaluated in float64 there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from hkr_keras import layers as hkr_layers
from hkr_keras.certification import bounds
from hkr_keras.certification.bounds import LipschitzState
from hkr_keras.certification.checks import check_is_itself
from hkr_keras.certification.singular_values import absolute_bound, as_float64, kernel_bound
from hkr_keras.geometry import kernel_geometries
from hkr_keras.layers.base import ComposedKernel

UNIT_ROUNDOFF = 2.0**-24  # unit roundoff of float32
SMALLEST_NORMAL = 2.0**-126  # what flushing a subnormal number to 0 changes at most
LARGEST = 2.0**60  # above, sums of squares may overflow: nothing is certified there


def accumulated(operations: float) -> float:
    """The relative error `n u / (1 - n u)` of n roundings in a row.

    Raises:
        ValueError: for so many that nothing is known of the result.

    Example:

    >>> accumulated(100) < 101 * UNIT_ROUNDOFF
    True
    """
    if operations * UNIT_ROUNDOFF >= 0.25:
        raise ValueError(f"Expected sums of fewer than 2^22 terms in float32. Received: {operations} terms")
    return operations * UNIT_ROUNDOFF / (1 - operations * UNIT_ROUNDOFF)


@dataclasses.dataclass(frozen=True)
class Affine:
    """`constant + slope * epsilon` for each input of a batch, arrays `(n,)`."""

    constant: Any
    slope: Any

    def __call__(self, epsilon):
        return self.constant + self.slope * epsilon

    def __add__(self, other: "Affine") -> "Affine":
        return Affine(self.constant + other.constant, self.slope + other.slope)

    def times(self, factor) -> "Affine":
        return Affine(self.constant * factor, self.slope * factor)

    def larger(self, other: "Affine") -> "Affine":
        return Affine(np.maximum(self.constant, other.constant), np.maximum(self.slope, other.slope))


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Error that one layer adds: `at_centre`, `(n,)`, plus `slope` per unit of L2 distance of its computed input."""

    at_centre: Any
    slope: float | tuple[float, ...]


Rule = Callable[..., Rounding]


def norms(values: np.ndarray) -> np.ndarray:
    """Euclidean norms `(n,)` of the entries of a batch, in float64."""
    return np.linalg.norm(np.asarray(values, dtype=np.float64).reshape(len(values), -1), axis=1)


def _size(values) -> float:
    return math.sqrt(math.prod(values.shape[1:]))


# ---- layers with one input ------------------------------------------------------------------------------


@functools.singledispatch
def layer_rounding(layer) -> Rule:
    """The rounding of a layer: a function of its computed input and output, float32 arrays, to a `Rounding`.

    Raises:
        ValueError: for a class whose rounding nothing is known of.

    Example:

    >>> class Half(keras.layers.Layer):
    ...     def call(self, inputs):
    ...         return inputs / 2
    >>> _ = layer_rounding.register(Half, lambda layer: relative(0.0))  # exact, but for flushed subnormals
    """
    raise ValueError(
        "Expected a layer whose rounding in float32 is bounded, for a rigorous certificate. Smooth activations depend "
        "on the mathematical library; GroupSort, MaxMin and ReLU are covered. Tell us a bound with "
        f"@hkr_keras.rounding.layer_rounding.register({type(layer).__name__}), or leave out rigorous=True. "
        f"Received: layer={type(layer).__name__} '{getattr(layer, 'name', '')}'"
    )


def relative(factor: float, absolute: float = 0.0, gain: float = 1.0) -> Rule:
    """The rule of a layer that is off by `factor * |x|`, and by `absolute` in each entry of its output.

    `gain` is what the layer multiplies its input by at most: that much of a flushed subnormal is lost.
    """

    def rule(x, y):
        flushed = 8 * (1 + gain) * SMALLEST_NORMAL * (_size(x) + _size(y))
        return Rounding(factor * norms(x) + absolute * _size(y) + flushed, factor)

    return rule


_k = keras.layers
_EXACT = (
    *(_k.InputLayer, _k.Identity, _k.Flatten, _k.Reshape, _k.Permute, _k.RepeatVector, _k.ActivityRegularization),
    *(_k.Dropout, _k.SpatialDropout1D, _k.SpatialDropout2D, _k.SpatialDropout3D, _k.AlphaDropout),
    *(_k.GaussianDropout, _k.GaussianNoise),
    *(_k.ZeroPadding1D, _k.ZeroPadding2D, _k.ZeroPadding3D, _k.Cropping1D, _k.Cropping2D, _k.Cropping3D),
    *(_k.MaxPooling1D, _k.MaxPooling2D, _k.MaxPooling3D),
    *(_k.GlobalMaxPooling1D, _k.GlobalMaxPooling2D, _k.GlobalMaxPooling3D),
    *(_k.UpSampling1D, _k.UpSampling2D, _k.UpSampling3D),
    *(hkr_layers.FullSort, hkr_layers.InvertibleDownsampling2D, hkr_layers.InvertibleUpsampling2D),
)
for _cls in _EXACT:
    layer_rounding.register(_cls, lambda layer: relative(0.0))

for _cls in (hkr_layers.GroupSort, hkr_layers.MaxMin):  # a difference and two sums
    layer_rounding.register(_cls, lambda layer: relative(4 * UNIT_ROUNDOFF))
layer_rounding.register(
    hkr_layers.Householder, lambda layer: relative(36 * UNIT_ROUNDOFF)
)  # sines and cosines of the angle


def _multiplied(factor: float, offset: float = 0.0) -> Rule:
    """A number that is rounded, perhaps flushed, and multiplied; then another one that is added."""
    return relative(4 * UNIT_ROUNDOFF * factor + 2 * SMALLEST_NORMAL, 4 * UNIT_ROUNDOFF * offset, gain=factor)


layer_rounding.register(hkr_layers.Scale, lambda layer: _multiplied(abs(layer.k)))
for _cls in (_k.ReLU, _k.LeakyReLU, _k.PReLU):
    layer_rounding.register(_cls, lambda layer: _multiplied(bounds.lipschitz_bound(layer)))

#: Activation functions that compare and multiply once at most.
_COMPARISONS = {getattr(keras.activations, name) for name in ("linear", "relu", "relu6", "leaky_relu")}


def _check_activation(layer) -> None:
    if layer.activation not in _COMPARISONS:
        name = getattr(layer.activation, "__name__", layer.activation)
        raise ValueError(
            "Expected an activation whose rounding in float32 is bounded, for a rigorous certificate: linear, relu, "
            "relu6 or leaky_relu; others depend on the mathematical library (or are layers, which belong behind this "
            f"one). Received: {layer.name}.activation={name}"
        )


@layer_rounding.register
def _(layer: keras.layers.Activation) -> Rule:
    _check_activation(layer)
    return relative(2 * UNIT_ROUNDOFF)


def _largest(*arrays) -> float:
    return sum(float(np.abs(np.asarray(array, dtype=np.float64)).max()) for array in arrays)


@layer_rounding.register
def _(layer: keras.layers.Rescaling) -> Rule:
    return _multiplied(_largest(layer.scale), _largest(layer.offset))


@layer_rounding.register
def _(layer: keras.layers.Normalization) -> Rule:
    bound = bounds.lipschitz_bound(layer)
    return relative(
        16 * UNIT_ROUNDOFF * bound, 16 * UNIT_ROUNDOFF * max(bound, 1.0) * _largest(as_float64(layer.mean)), gain=bound
    )


@layer_rounding.register
def _(layer: keras.layers.BatchNormalization) -> Rule:
    variance = as_float64(layer.moving_variance)
    if (variance < 0).any() or (variance + layer.epsilon < 1e-30).any():
        raise ValueError(
            "Expected variances of at least 0, and 1e-30 with epsilon, for a rigorous certificate. Received: "
            f"{layer.name} with a variance of {variance.min()} and epsilon={layer.epsilon}"
        )
    bound = bounds.lipschitz_bound(layer)
    shift = bound * _largest(as_float64(layer.moving_mean)) + (
        _largest(as_float64(layer.beta)) if layer.center else 0.0
    )
    return relative(16 * UNIT_ROUNDOFF * bound, 16 * UNIT_ROUNDOFF * shift, gain=bound)


@layer_rounding.register
def _(layer: hkr_layers.BatchCentering) -> Rule:
    shift = _largest(as_float64(layer.moving_mean)) + (_largest(as_float64(layer.bias)) if layer.center else 0.0)
    return relative(4 * UNIT_ROUNDOFF, 4 * UNIT_ROUNDOFF * shift)


@layer_rounding.register
def _(layer: hkr_layers.LayerCentering) -> Rule:
    axes = (layer.axis,) if isinstance(layer.axis, int) else layer.axis

    def rule(x, y):
        terms = math.prod(x.shape[axis] for axis in axes)
        shift = _largest(as_float64(layer.bias)) if layer.center else 0.0
        return relative(accumulated(terms + 8), 4 * UNIT_ROUNDOFF * shift + _flushed(terms))(x, y)

    return rule


def _flushed(cells: int) -> float:
    """What flushing every product of a mean over that many cells, times its root, changes at most."""
    return SMALLEST_NORMAL * (4 * cells + 8) * math.sqrt(cells)


def _cells(layer, x) -> int:
    return math.prod(layer.pool_size if hasattr(layer, "pool_size") else bounds.spatial_sizes(layer, x.shape))


def _pooling(layer) -> Rule:
    """Sums of at most as many terms as a window, or the image, has cells; nothing negative in the operator."""

    def rule(x, y):
        _check_convolution(layer, x)
        cells, bound = _cells(layer, x), bounds.constant_of(layer, [x.shape])
        return relative(accumulated(cells + 8) * bound, _flushed(cells), gain=bound)(x, y)

    return rule


def _l2_norm_pooling(layer) -> Rule:
    """As sums, with a root that is no smaller than 1e-12, and squares that may underflow below it."""

    def rule(x, y):
        _check_convolution(layer, x)
        cells = _cells(layer, x)
        return relative(accumulated(cells + 8), 1e-12 * 8 * UNIT_ROUNDOFF + 1e-25 * cells**2)(x, y)

    return rule


def _check_convolution(layer, x) -> None:
    """Refuses what PyTorch 2.13 gets wrong on CPUs: one channel and unequal strides, for some sizes and batches."""
    strides = getattr(layer, "strides", ())
    channels = x.shape[-1 if getattr(layer, "data_format", "") != "channels_first" else 1]
    if keras.backend.backend() == "torch" and channels == 1 and len(set(strides)) > 1:
        raise ValueError(
            "Expected equal strides, or more than one channel, for a rigorous certificate on PyTorch, whose "
            f"convolutions of one channel can be wrong otherwise. Received: {layer.name}.strides={strides}"
        )


for _cls in (
    *(_k.AveragePooling1D, _k.AveragePooling2D, _k.AveragePooling3D),
    *(_k.GlobalAveragePooling1D, _k.GlobalAveragePooling2D, _k.GlobalAveragePooling3D),
    *(hkr_layers.ScaledAveragePooling1D, hkr_layers.ScaledAveragePooling2D),
    *(hkr_layers.ScaledGlobalAveragePooling1D, hkr_layers.ScaledGlobalAveragePooling2D),
):
    layer_rounding.register(_cls, _pooling)
for _cls in (
    *(hkr_layers.L2NormPooling1D, hkr_layers.L2NormPooling2D),
    *(hkr_layers.GlobalL2NormPooling1D, hkr_layers.GlobalL2NormPooling2D),
):
    layer_rounding.register(_cls, _l2_norm_pooling)


@layer_rounding.register
def _(layer: keras.layers.TimeDistributed) -> Rule:
    inner = layer_rounding(layer.layer)

    def rule(x, y):
        steps = inner(x.reshape(-1, *x.shape[2:]), y.reshape(-1, *y.shape[2:]))
        return Rounding(norms(steps.at_centre.reshape(x.shape[:2])), steps.slope)

    return rule


# ---- kernels --------------------------------------------------------------------------------------------


def _absolute_twin(layer) -> keras.layers.Layer:
    """The plain Keras layer with the absolute values of the kernels, and nothing else."""
    plain: Any = next(cls for cls in type(layer).__mro__ if cls in layer_rounding.registry)
    config = {name: None for name in layer.get_config() if name.endswith(("_constraint", "_regularizer"))}
    twin = plain.from_config({**layer.get_config(), **config, "use_bias": False, "activation": None})
    twin.build(layer.get_build_config()["input_shape"])
    for name in kernel_geometries(layer):
        getattr(twin, name).assign(ops.abs(ops.convert_to_tensor(getattr(layer, name))))
    return twin


def _kernel_layer(layer) -> Rule:
    """Sums of n products and a bias in any order, elementwise; then an activation that only compares.

    Every partial sum of products lies between the sum of the negative and that of the positive ones, so it is at
    most `(|W|^T |x| + |W^T x|) / 2`, and each of the n additions is off by u times a partial sum.
    """
    _check_activation(layer)
    names = list(kernel_geometries(layer))
    twin, absolute = _absolute_twin(layer), math.prod(absolute_bound(layer, name) for name in names)
    kernels = {name: tuple(getattr(layer, name).shape) for name in names}
    terms = sum(
        math.prod(kernels[name]) // geometry.outputs(kernels[name])
        for name, geometry in kernel_geometries(layer).items()
    )
    bias = as_float64(layer.bias) if layer.use_bias else np.zeros(1)
    gamma = accumulated(terms + len(names) + 1)
    if len(names) == 1:
        sums, linear = (
            UNIT_ROUNDOFF + terms * UNIT_ROUNDOFF * (0.5 + gamma),
            terms * UNIT_ROUNDOFF / 2 * kernel_bound(layer, names[0]),
        )
    else:
        sums, linear = gamma, 0.0
    last = 2 * UNIT_ROUNDOFF if layer.activation is keras.activations.leaky_relu else 0.0
    # Between the two kernels of a separable convolution numbers can be flushed, and overflow, too.
    inner = absolute_bound(layer, names[0]) if len(names) == 2 else 0.0
    outer = absolute_bound(layer, names[1]) if len(names) == 2 else 0.0
    between = math.prod(getattr(layer, names[0]).shape[-2:]) if len(names) == 2 else 0.0  # channels there
    slope = (
        sums * absolute + UNIT_ROUNDOFF * inner + linear + last * math.prod(kernel_bound(layer, name) for name in names)
    )

    def rule(x, y):
        _check_convolution(layer, x)
        copies = math.sqrt(y[0].size / len(bias)) if layer.use_bias else 0.0
        absolute_sums = norms(ops.convert_to_numpy(twin(np.abs(x)))) * (1 + 2 * gamma)
        shift = gamma * float(np.linalg.norm(bias)) * copies
        underflow = SMALLEST_NORMAL * (
            (4 * terms + 8) * (_size(y) + outer * between * _size(y)) + 2 * absolute * _size(x)
        )
        at_centre = (
            sums * absolute_sums + (UNIT_ROUNDOFF * inner + linear) * norms(x) + shift + last * norms(y) + underflow
        )
        return Rounding(at_centre, slope)

    return rule


for _cls in (
    *(_k.Dense, _k.Conv1D, _k.Conv2D, _k.Conv3D, _k.Conv1DTranspose, _k.Conv2DTranspose, _k.Conv3DTranspose),
    *(_k.DepthwiseConv1D, _k.DepthwiseConv2D, _k.SeparableConv1D, _k.SeparableConv2D),
):
    layer_rounding.register(_cls, _kernel_layer)


@layer_rounding.register
def _(layer: ComposedKernel) -> Rule:
    raise ValueError(
        "Expected layers that store the kernel they compute with, for a rigorous certificate: the rounding of a kernel "
        "that is composed in the forward pass is not bounded. Copy `layer.kernel` into a plain Keras layer. "
        f"Received: layer={type(layer).__name__} '{layer.name}'"
    )


# ---- layers with several inputs -------------------------------------------------------------------------


@functools.singledispatch
def merge_rounding(layer) -> Rule:
    """The rounding of a layer with several inputs: as `layer_rounding`, of a list of inputs, with a slope for each.

    Raises:
        ValueError: for a class whose rounding nothing is known of.
    """
    raise ValueError(
        "Expected a merging layer whose rounding in float32 is bounded, or one registered with "
        f"@hkr_keras.rounding.merge_rounding.register. Received: layer={type(layer).__name__} '{layer.name}'"
    )


def _weighted(weights: Callable[[Any, int], tuple[np.ndarray, float]]) -> Callable[[Any], Rule]:
    def of(layer) -> Rule:
        def rule(xs, y):
            shares, factor = weights(layer, len(xs))
            slopes = tuple(factor * share + 2 * SMALLEST_NORMAL for share in shares)
            at_centre = sum(slope * norms(x) for slope, x in zip(slopes, xs, strict=True))
            return Rounding(at_centre + 16 * SMALLEST_NORMAL * len(xs) * _size(y), slopes)

        return rule

    return of


def _mixing(layer, count):
    logits = as_float64(layer.mixing_logits)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum(), accumulated(count + 32 + 2 * math.ceil(np.ptp(logits)))


for _cls in (_k.Add, _k.Subtract):
    merge_rounding.register(_cls, _weighted(lambda layer, count: (np.ones(count), accumulated(count))))
merge_rounding.register(_k.Average, _weighted(lambda layer, count: (np.full(count, 1 / count), accumulated(count + 4))))
merge_rounding.register(hkr_layers.LipschitzResidual, _weighted(_mixing))
for _cls in (_k.Concatenate, _k.Maximum, _k.Minimum):
    merge_rounding.register(_cls, _weighted(lambda layer, count: (np.ones(count), 0.0)))


# ---- models ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
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

    def in_float32(self) -> "Trace":
        """The same with a value that layers can take."""
        single = self.value.astype(np.float32)
        return dataclasses.replace(
            self, value=single, centre_error=self.centre_error + norms(self.value - single.astype(np.float64))
        )


@dataclasses.dataclass(frozen=True)
class _Known:
    """What depends on a layer and its weights alone."""

    state: LipschitzState
    rule: Rule
    bound: float
    exact: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None


class Tracer:
    """Follows the rounding of one model, batch after batch."""

    def __init__(self, model):
        self.model = model
        self.shapes = [tensor.shape for tensor in bounds.model_inputs(model)]
        self._known: list[_Known] = []

    def __call__(self, arrays: list[np.ndarray]) -> tuple[Trace, Affine]:
        """The trace of the one output of the model, and a bound on the largest number that can occur on the way."""
        nothing, position = np.zeros(len(arrays[0])), 0
        largest = Affine(nothing, 0.0)

        def apply(layer, traces, shapes):
            nonlocal largest, position
            if position == len(self._known):
                self._known.append(_known(layer, traces, shapes))
            known, position = self._known[position], position + 1
            output, added = _output(layer, traces, known)
            reached = Affine(norms(output.value), 0.0) + output.spread()
            largest = largest.larger(reached).larger(
                added.times(1 / UNIT_ROUNDOFF)
            )  # partial sums are below what they may lose
            return output

        rows = np.eye(len(arrays))
        traces = [
            Trace(array, nothing, LipschitzState(row), Affine(nothing, 0.0))
            for array, row in zip(arrays, rows, strict=True)
        ]
        for trace in traces:
            largest = largest.larger(Affine(norms(trace.value), 1.0))
        (output,) = bounds.walk(self.model, traces, apply, self.shapes)
        return output, largest


def _known(layer, traces: list[Trace], shapes) -> _Known:
    registered = layer_rounding if len(traces) == 1 else merge_rounding
    rule = registered(layer)
    check_is_itself(layer, registered.registry)  # a subclass with a bound of its own may compute anything
    return _Known(
        state=bounds.state_through(layer, [trace.state for trace in traces], shapes),
        rule=rule,
        bound=bounds.constant_of(layer, [trace.value.shape for trace in traces]),
        exact=_in_float64(layer) if layer_rounding.dispatch(type(layer)) is _kernel_layer else None,
    )


def _in_float64(layer):
    """A Dense layer on the host, and what float64 may be off by: the widest sums are in these layers."""
    if not isinstance(layer, keras.layers.Dense) or layer.activation not in (_LINEAR, _RELU):
        return None
    kernel, bias = as_float64(layer.kernel), as_float64(layer.bias) if layer.use_bias else np.zeros(layer.units)
    error = (len(kernel) + 4) * 2.0**-51
    sizes = float(np.linalg.norm(kernel)), float(np.linalg.norm(bias))

    def exact(x):
        y = x.astype(np.float64) @ kernel + bias
        centre_error = error * (sizes[0] * norms(x) + sizes[1] * math.sqrt(y[0].size / len(bias)))
        return (np.maximum(y, 0.0) if layer.activation is _RELU else y), centre_error

    return exact


_LINEAR, _RELU = keras.activations.linear, keras.activations.relu


def _output(layer, traces: list[Trace], known: _Known) -> tuple[Trace, Affine]:
    """The trace of the output of a layer, and what the layer itself adds to the error."""
    singles = [trace.in_float32() for trace in traces]
    values = [trace.value for trace in singles]
    arguments = values if len(values) > 1 else values[0]
    if known.exact is not None:
        value, centre_error = known.exact(traces[0].value)
        rounding = known.rule(arguments, value)
        centre_error = traces[0].centre_error * known.bound + centre_error
    else:
        value = np.asarray(ops.convert_to_numpy(layer(arguments)))
        rounding = known.rule(arguments, value)
        centre_error = _carried(layer, [trace.centre_error for trace in singles], known.bound) + rounding.at_centre
    slopes = rounding.slope if isinstance(rounding.slope, tuple) else (rounding.slope,)
    added = Affine(rounding.at_centre, 0.0)
    for slope, single in zip(slopes, singles, strict=True):
        added = added + single.spread().times(slope)
    constant, grows = (
        _carried(layer, [np.broadcast_to(part, len(value)) for part in parts], known.bound)
        for parts in ([trace.error.constant for trace in traces], [trace.error.slope for trace in traces])
    )
    output = Trace(value, centre_error, known.state, Affine(constant, grows) + added)
    if known.state.tail is None:
        return output, added
    trace = traces[0]
    if trace.error_before_tail is None or trace.error_after_tail is None:
        return dataclasses.replace(output, error_before_tail=trace.error, error_after_tail=added), added
    return dataclasses.replace(
        output,
        error_before_tail=trace.error_before_tail,
        error_after_tail=trace.error_after_tail.times(known.bound) + added,
    ), added


def _carried(layer, distances: list[np.ndarray], bound: float) -> np.ndarray:
    """How far the exact output moves when the inputs move by these distances, `(n,)`."""
    return distances[0] * bound if len(distances) == 1 else bounds.merge_bound(layer, np.stack(distances))
