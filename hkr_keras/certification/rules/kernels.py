"""Rows of layers with a kernel: Dense and convolutions of every kind, composed kernels, reflecting residual blocks."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from hkr_keras import layers
from hkr_keras.certification.checks import check_built, check_kernel_layer, check_numbers
from hkr_keras.certification.composition import composition_error, product_error, reflector, reflector_operator
from hkr_keras.certification.floating_point import (
    MACHINE_EPSILON,
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    Rounding,
    RoundingRule,
    accumulated,
    entries,
    norms,
    sum_error,
)
from hkr_keras.certification.operators import Convolution, Matrix, Operator
from hkr_keras.certification.rules.activations import activation_bound, activation_error
from hkr_keras.certification.rules.registry import Shape, layer_rounding, rule
from hkr_keras.certification.singular_values import (
    absolute_bound,
    as_computed,
    as_float64,
    is_cheap,
    kernel_blocks,
    kernel_bound,
    matrix_spectrum,
)
from hkr_keras.geometry import kernel_geometries, overlap
from hkr_keras.layers.base import ComposedKernel
from hkr_keras.layers.circular import CircularConv

__all__ = ["check_convolution"]

_k = keras.layers


def _operator(layer: Any, shape: Shape) -> Operator | None:
    """The linear part of a layer with one kernel, or a depthwise and a pointwise one; `None` if that is too large."""
    check_built(layer)
    check_kernel_layer(layer, shape)
    (name, geometry), *second = kernel_geometries(layer).items()
    if isinstance(layer, layers.ReflectorDense):
        return reflector_operator(layer)
    if isinstance(layer, _k.Dense):
        return Matrix(as_computed(layer, "kernel"))
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    where: dict[str, Any] = {"channel_axis": 0 if first else -1}
    if not second and shape is not None and not getattr(layer, "circular", False):
        where |= {"padding": layer.padding, "sizes": tuple(shape[2:] if first else shape[1:-1])}
    strides, dilation = tuple(layer.strides), tuple(layer.dilation_rate)
    if not second:
        blocks = kernel_blocks(layer, name)
        return Convolution(blocks=blocks, strides=strides, dilation=dilation, transposed=geometry.transposed, **where)
    depthwise, pointwise = as_computed(layer, name), as_computed(layer, second[0][0])
    channels, multiplier = depthwise.shape[-2:]
    if not is_cheap(layer.kernel_size, (channels, pointwise.shape[-1]), strides):
        return None
    composed = np.einsum("...cm,cmo->...co", depthwise, pointwise.reshape(channels, multiplier, -1))[..., None, :, :]
    gain = math.sqrt(overlap(layer.kernel_size, layer.strides, layer.dilation_rate))
    return Convolution(
        blocks=composed,
        strides=strides,
        dilation=dilation,
        error=4 * multiplier * MACHINE_EPSILON * gain * float(np.linalg.norm(depthwise) * np.linalg.norm(pointwise)),
        limit=_product(layer),
        **where,
    )


def _product(layer: Any) -> float:
    """Upper bound on the norm from those of the kernels."""
    return math.prod(kernel_bound(layer, name) for name in kernel_geometries(layer)) * (1 + MACHINE_EPSILON)


def _bound(layer: Any, shape: Shape) -> float:
    operator, slope = _operator(layer, shape), _slope(layer, shape)
    return (_product(layer) if operator is None else operator.bound) * (1.0 if slope is None else slope)


def _slope(layer: Any, shape: Shape) -> float | None:
    if layer.activation is None or layer.activation is keras.activations.linear:
        return None
    outputs = None
    if isinstance(layer.activation, keras.layers.Layer) and shape is not None:
        outputs = tuple(layer.compute_output_shape(shape))
    return activation_bound(layer.activation, outputs)


def check_convolution(layer: Any, x: Any) -> None:
    """Refuses what PyTorch 2.13 gets wrong on CPUs: one channel and unequal strides, for some sizes and batches."""
    strides = getattr(layer, "strides", ())
    channels = x.shape[-1 if getattr(layer, "data_format", "") != "channels_first" else 1]
    if keras.backend.backend() == "torch" and channels == 1 and len(set(strides)) > 1:
        raise ValueError(
            "Expected equal strides, or more than one channel, for a rigorous certificate on PyTorch, whose "
            f"convolutions of one channel can be wrong otherwise. Received: {layer.name}.strides={strides}"
        )


def _absolute_twin(layer: Any) -> Callable[[Any], Any]:
    """The operator with the absolute values of the kernels, and nothing else."""
    if isinstance(layer, ComposedKernel):
        kernel = ops.abs(layer.kernel)
        return lambda x: layer.operate(ops.convert_to_tensor(x), kernel)
    plain: Any = next(cls for cls in type(layer).__mro__ if cls.__module__.startswith("keras."))
    config = plain.get_config(layer)  # without what a subclass adds
    config |= {name: None for name in config if name.endswith(("_constraint", "_regularizer"))}
    twin = plain.from_config({**config, "use_bias": False, "activation": None})
    shape = layer.get_build_config()["input_shape"]
    twin.build(layer.continued_shape(shape) if isinstance(layer, CircularConv) else shape)
    for name in kernel_geometries(layer):
        getattr(twin, name).assign(ops.abs(ops.convert_to_tensor(getattr(layer, name))))
    return twin


def _rounding(layer: Any, shape: Shape) -> RoundingRule:
    """Sums of n products and a bias in any order, elementwise; then an activation that only compares.

    Every partial sum of products lies between the sum of the negative and that of the positive ones, so it is at
    most `(|W|^T |x| + |W^T x|) / 2`, and each of the n additions is off by u times a partial sum.
    """
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
        sums = UNIT_ROUNDOFF + terms * UNIT_ROUNDOFF * (0.5 + gamma)
        linear = terms * UNIT_ROUNDOFF / 2 * kernel_bound(layer, names[0])
    else:
        sums, linear = gamma, 0.0
    last, absolute_error = activation_error(layer)
    # Between the two kernels of a separable convolution numbers can be flushed, and overflow, too.
    inner = absolute_bound(layer, names[0]) if len(names) == 2 else 0.0
    outer = absolute_bound(layer, names[1]) if len(names) == 2 else 0.0
    between = math.prod(getattr(layer, names[0]).shape[-2:]) if len(names) == 2 else 0.0  # channels there
    norm = math.prod(kernel_bound(layer, name) for name in names)
    composed, more = 0.0, 0.0
    if isinstance(layer, ComposedKernel):
        composed = composition_error(layer)
        window, (inputs, outputs) = kernels[names[0]][:-2], kernels[names[0]][-2:]
        rough = math.prod(window) * math.sqrt(min(inputs, outputs)) * composed  # of the absolute values
        more = sums * rough + terms * UNIT_ROUNDOFF * composed
    slope = sums * absolute + UNIT_ROUNDOFF * inner + linear + last * norm + more

    def rounding(x: Any, y: Any) -> Rounding:
        check_convolution(layer, x)
        copies = math.sqrt(y[0].size / len(bias)) if layer.use_bias else 0.0
        continued = layer.continued(x) if isinstance(layer, CircularConv) else x
        absolute_sums = norms(ops.convert_to_numpy(twin(ops.abs(continued)))) * (1 + 2 * gamma)
        shift = gamma * float(np.linalg.norm(bias)) * copies
        flushed = (4 * terms + 8) * (entries(y) + outer * between * entries(y)) + 2 * absolute * entries(x)
        at_centre = sums * absolute_sums + (UNIT_ROUNDOFF * inner + linear + more) * norms(x)
        at_centre = at_centre + shift + last * norms(y) + absolute_error * entries(y)
        return Rounding(at_centre + SMALLEST_NORMAL * flushed, slope, composed)

    return rounding


def _copies(layer: Any, y: Any) -> float:
    """The root of how often the bias is added to one input."""
    return math.sqrt(y[0].size / layer.bias.shape[0])


def _reflector_rounding(layer: Any, shape: Shape) -> RoundingRule:
    """Three products and a difference, each off by what sums are, carried on by factors of norm 1, 2 and 1."""
    last, absolute_error = activation_error(layer)
    composed, known = composition_error(layer), reflector(layer)
    factor, near = known.factor, known.near
    (size, rank), inputs = factor.shape, layer.kernel.shape[0]
    first, rough = np.abs(factor[:inputs]), math.sqrt(rank) * near
    enters, leaves = (matrix_spectrum(np.abs(part)).bound + rough for part in (first, factor[: layer.units]))
    middle = 2 * np.eye(rank) - factor.T @ factor
    of_middle = 1.1 * matrix_spectrum(product_error(factor.T, factor)).bound + 4 * UNIT_ROUNDOFF
    of_middle += 4 * size * UNIT_ROUNDOFF * (enters + leaves) * rough
    wide = matrix_spectrum(np.abs(middle)).bound + math.sqrt(rank) * (of_middle + 2.2 * near)
    entering, entering_linear = sum_error(inputs)
    inner, inner_linear = sum_error(rank)
    constant = 2.1 * (entering * rough + entering_linear + 2 * UNIT_ROUNDOFF)
    constant += 2.1 * (inner * wide + inner_linear + of_middle) + 2.2 * (inner * leaves + inner_linear)
    constant += 4 * UNIT_ROUNDOFF
    bias = float(np.linalg.norm(as_float64(layer.bias))) if layer.use_bias else 0.0
    centre_too = 0.0 if layer.activation in (keras.activations.linear, keras.activations.relu) else composed

    def rounding(x: Any, y: Any) -> Rounding:
        copies = _copies(layer, y) if layer.use_bias else 0.0
        absolute_sums = norms(np.abs(x.astype(np.float64)) @ first)
        at_centre = 2.1 * entering * absolute_sums + (constant + centre_too) * norms(x)
        at_centre = at_centre + 4 * UNIT_ROUNDOFF * bias * copies + last * norms(y) + absolute_error * entries(y)
        flushed = SMALLEST_NORMAL * (8 * (inputs + rank) + 8) * (entries(x) + entries(y)) * (1 + leaves)
        slope = 2.1 * entering * enters + constant + last * 1.01
        return Rounding(at_centre + flushed, slope, composed)

    return rounding


def _reflection_rounding(layer: Any, shape: Shape) -> RoundingRule:
    """Of `x - 2 W h`, `h = relu(W^T x + b)`: h is off by what sums are; W carries that on, and adds its own."""
    composed = composition_error(layer)
    kernel = np.abs(as_float64(layer.kernel)).astype("float32")
    *window, inputs, units = kernel.shape
    absolute, norm = absolute_bound(layer, "kernel"), kernel_bound(layer, "kernel") + composed
    rough = math.prod(window) * math.sqrt(min(inputs, units)) * composed
    terms = math.prod(window) * inputs + 2, math.prod(window) * units + 2
    (first, first_linear), (second, second_linear) = map(sum_error, terms)
    bias = float(np.linalg.norm(as_float64(layer.bias)))
    own = first * rough + first_linear * norm
    slope_hidden = first * absolute + own
    slope = 2 * (norm * slope_hidden + second * absolute * (norm + slope_hidden) + second_linear * norm)
    slope += 4 * (second * rough) + 4 * UNIT_ROUNDOFF
    slack = 1 + 4 * accumulated(max(terms))  # of what float32 computes here

    def through(values: Any, weights: Any, back: bool) -> Any:
        values, weights = ops.convert_to_tensor(values), ops.convert_to_tensor(weights)
        if not window:
            return np.asarray(ops.convert_to_numpy(ops.matmul(values, ops.transpose(weights) if back else weights)))
        convolve = ops.conv_transpose if back else ops.conv
        moved = convolve(values, weights, strides=1, padding="same", data_format="channels_last")
        return np.asarray(ops.convert_to_numpy(moved))

    def rounding(x: Any, y: Any) -> Rounding:
        hidden = through(x, layer.kernel, back=False) + np.asarray(ops.convert_to_numpy(layer.bias))
        hidden = np.maximum(hidden, 0.0)
        copies = math.sqrt(hidden[0].size / units)
        off = first * norms(through(np.abs(x), kernel, back=False)) * slack + own * norms(x) + 2 * first * bias * copies
        size = norms(hidden) + off  # `hidden` is off by that much itself
        back = norms(through(hidden, kernel, back=True)) * slack + 2 * absolute * off
        at_centre = 2 * (norm * off + second * back + (second * rough + second_linear * norm) * (size + off))
        at_centre = at_centre + 2 * UNIT_ROUNDOFF * (norms(y) + norms(x)) + 2 * composed * bias * copies
        flushed = SMALLEST_NORMAL * (8 * sum(terms) + 8) * (entries(x) + entries(hidden)) * (1 + 4 * absolute)
        return Rounding(at_centre + flushed, slope, 4 * composed * norm)

    return rounding


def _reflection(layer: Any, shape: Shape) -> float:
    """The Jacobian `I - 2 W D W^T`, D diagonal in [0, 1], has eigenvalues in `[1 - 2 |W|^2, 1]`."""
    check_built(layer)
    kernel = tuple(layer.kernel.shape)
    check_numbers(layer, [layer.bias], kernel[-1:])
    if shape is not None and shape[-1] != kernel[-2]:
        raise ValueError(
            f"Expected '{layer.name}' to receive as many channels as its kernel was made for. "
            f"Received: shape={shape}, kernel.shape={kernel}"
        )
    return max(1.0, (2 * kernel_bound(layer, "kernel") ** 2 - 1) * (1 + 8 * MACHINE_EPSILON))


rule(
    *(_k.Dense, _k.Conv1D, _k.Conv2D, _k.Conv3D, _k.Conv1DTranspose, _k.Conv2DTranspose, _k.Conv3DTranspose),
    *(_k.DepthwiseConv1D, _k.DepthwiseConv2D, _k.SeparableConv1D, _k.SeparableConv2D),
    *(layers.LipschitzConv1D, layers.LipschitzConv2D, layers.LipschitzConv3D),  # which may be circular
    bound=_bound,
    tail=_operator,
    slope=_slope,
    rounding=_rounding,
)
rule(
    *(layers.OrthogonalConv1D, layers.OrthogonalConv2D),
    *(layers.OrthogonalConv1DTranspose, layers.OrthogonalConv2DTranspose),
    *(layers.AOLDense, layers.AOLConv2D),
    tail=_operator,
    slope=_slope,
    rounding=_rounding,
)
rule(layers.ReflectorDense, tail=_operator, slope=_slope, rounding=_reflector_rounding)
rule(layers.SLLDense, layers.SLLConv2D, bound=_reflection, rounding=_reflection_rounding)
layer_rounding.register(ComposedKernel, lambda layer, shape: composition_error(layer) and _rounding(layer, shape))
