"""Upper bounds on Lipschitz constants: on the host, in float64, from the stored weights.

Nothing here trusts a projection. A bound is about the function in exact arithmetic at inference, L2 norm in,
L2 norm out. Bounds of layers live in `layer_bound`, a single-dispatch function: register a layer of your own
with `@hkr_keras.bounds.layer_bound.register(MyLayer)`, exactly as this module does.
"""

import dataclasses
import functools
import inspect
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import rich.box
import rich.console
import rich.table
from keras import ops

from hkr_keras import layers as hkr_layers
from hkr_keras.geometry import Geometry, kernel_geometries, overlap
from hkr_keras.layers.recurrent import LipschitzSimpleRNNCell, recurrence_bound

_EPSILON = float(np.finfo(np.float64).eps)

# ---- kernels --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Singular values of a linear operator: the smallest and largest found, and a proven upper bound."""

    smallest: float
    largest: float
    bound: float


def host(variable) -> np.ndarray:
    """Weights as float64 on the host.

    Raises:
        ValueError: for NaN or infinite weights.
    """
    tensor = ops.convert_to_tensor(variable)
    if keras.backend.standardize_dtype(tensor.dtype) not in ("float32", "float64"):
        tensor = ops.cast(tensor, "float32")
    array = np.asarray(ops.convert_to_numpy(tensor), dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(
            "Expected finite weights. "
            f"Received: {getattr(variable, 'path', 'weights')} with "
            f"{np.sum(~np.isfinite(array))} NaN or infinite entries"
        )
    return array


def matrix_spectrum(matrices: np.ndarray) -> Spectrum:
    """Spectrum of a stack of real or complex matrices `(..., rows, columns)`, seen as one block diagonal.

    Singular values are roots of the eigenvalues of the Gram matrices on the smaller side. Forming and
    decomposing those in float64 is off by at most a small multiple of `rows * columns * eps * norm^2`, and the
    bound is inflated by 16 times that.

    Args:
        matrices: float64 or complex128 array.

    Raises:
        ValueError: for an empty array.

    Example:

    >>> matrix_spectrum(np.diag([2.0, 0.5])).largest
    2.0
    """
    if matrices.size == 0:
        raise ValueError(f"Expected a kernel that is not empty. Received: shape={matrices.shape}")
    scale = float(np.abs(matrices).max())
    if scale == 0.0:
        return Spectrum(0.0, 0.0, 0.0)
    a = matrices / scale
    adjoint = np.conj(np.swapaxes(a, -1, -2))
    gram = a @ adjoint if a.shape[-2] < a.shape[-1] else adjoint @ a
    eigenvalues = np.linalg.eigvalsh(gram)
    smallest, largest = (scale * math.sqrt(max(0.0, float(value))) for value in (eigenvalues.min(), eigenvalues.max()))
    return Spectrum(smallest, largest, largest * (1.0 + 16 * a.shape[-2] * a.shape[-1] * _EPSILON))


def convolution_spectrum(blocks: np.ndarray, strides: Sequence[int]) -> Spectrum:
    """Spectrum of a convolution with zero, causal, valid or circular padding, for every image size.

    The stride is removed by the polyphase identity: a convolution with stride s is one with stride 1 from s
    times as many channels. What is left is `sup |K^(w)|` over all frequencies w. On a grid of N frequencies
    per dimension, `sup <= max over the grid / prod cos(pi (k - 1) / (2 N))`, since every `u* K^ v` is a
    trigonometric polynomial of degree (k - 1) / 2 after centring.

    Args:
        blocks: float64 kernel `(*window, blocks, inputs, outputs)` of a block-diagonal convolution.
        strides: one per dimension of the window.

    Example:

    >>> spectrum = convolution_spectrum(np.ones((3, 1, 1, 1)), (1,))
    >>> 3.0 <= spectrum.bound < 3.01
    True

    Reference:
        Sedghi, Gupta and Long, ICLR 2019 (arXiv 1805.10408), for the circular case; Ehlich and Zeller, Math.
        Z. 86 (1964), for what happens between the points of the grid.
    """
    taps = _polyphase(blocks, strides)
    window = taps.shape[: len(strides)]
    if all(k == 1 for k in window):
        return matrix_spectrum(taps)
    sizes = _grid(window, taps.shape[-2:])
    correction = math.prod(math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(window, sizes, strict=True))
    # The kernel is real: the half of the last axis that rfftn keeps holds every singular value.
    found = matrix_spectrum(np.fft.rfftn(taps, sizes, axes=tuple(range(len(strides)))))
    rounding = 1.0 + 64 * math.sqrt(taps.size) * math.log2(2 * math.prod(sizes)) * _EPSILON
    return Spectrum(found.smallest, found.largest, found.bound * rounding / correction)


def autocorrelation_bound(blocks: np.ndarray, strides: Sequence[int]) -> float:
    """Upper bound on the norm of the same convolution, tight when it is orthogonal up to rounding.

    `|K^(w)|^2 = |sum_d A_d e^iwd| <= sum_d |A_d|` with the autocorrelation `A_d = sum_o K_o^T K_(o + d)` (or `K K^T`,
    whichever is smaller). For an orthogonal convolution `A_0 = I` and all others vanish, so nothing is lost to
    what lies between frequencies. For an almost orthogonal one, where channels have been rescaled until
    `C = sum_d |A_d|` (of entries) is diagonally dominant, the largest eigenvalue of C is nearer: at most
    `max_i (C s)_i / s_i` for any positive s.

    Args:
        blocks: float64 kernel `(*window, blocks, inputs, outputs)` of a block-diagonal convolution.
        strides: one per dimension of the window.

    Example:

    >>> round(autocorrelation_bound(np.eye(2)[:, None, None, :], (2,)), 9)
    1.0

    Reference:
        Prach and Lampert, ECCV 2022 (arXiv 2208.03160), whose rescaling rests on the same sum.
    """
    taps = _polyphase(blocks, strides)
    scale = float(np.abs(taps).max())
    if scale == 0.0:
        return 0.0
    axes = tuple(range(len(strides)))
    symbol = np.fft.fftn(taps / scale, [2 * k - 1 for k in taps.shape[: len(strides)]], axes=axes)
    adjoint = np.conj(np.swapaxes(symbol, -1, -2))
    gram = symbol @ adjoint if taps.shape[-2] < taps.shape[-1] else adjoint @ symbol
    correlation = np.fft.ifftn(gram, axes=axes).real
    # One Gram iteration: |A|^2 <= |A^T A|_F, nearer to the norm than |A|_F.
    squares = np.linalg.norm(np.swapaxes(correlation, -1, -2) @ correlation, axis=(-2, -1))
    norms = np.sqrt(squares).reshape(-1, taps.shape[-3])
    norms[0] = [matrix_spectrum(centre).bound for centre in correlation[(0,) * len(axes)]]
    absolute = np.abs(correlation).sum(axis=axes)
    s = np.ones((*absolute.shape[:-1], 1))
    for _ in range(50):
        s = absolute @ s
        s = np.maximum(s / np.maximum(s.max(axis=-2, keepdims=True), _EPSILON), 0.05)  # ratios stay harmless
    squared = np.minimum(norms.sum(axis=0), (absolute @ s / s).max(axis=(-2, -1))).max()
    rounding = 1.0 + 256 * taps.size * len(norms) * _EPSILON
    return scale * math.sqrt(squared) * rounding


def _grid(window, matrix_shape) -> list[int]:
    """Frequencies per dimension: enough for a slack of 0.1 %, fewer where that would take long."""
    small, large = sorted(matrix_shape)
    active = sum(k > 1 for k in window)
    affordable = 4e10 / (4 * small**2 * (large + 4 * small))  # floating-point operations, a few seconds
    finest = max(2.0, affordable ** (1 / active))
    wanted = math.pi / 2 * math.sqrt(active / 0.002)
    return [1 if k == 1 else max(4 * (k - 1), math.ceil(min(wanted * (k - 1), finest))) for k in window]


def _polyphase(blocks: np.ndarray, strides: Sequence[int]) -> np.ndarray:
    """Kernel of the equivalent convolution with stride 1: `(*window, blocks, inputs * prod(strides), outputs)`."""
    rank = len(strides)
    padding = [(0, -k % s) for k, s in zip(blocks.shape, strides, strict=False)] + [(0, 0)] * 3
    padded = np.pad(blocks, padding)
    split = [size for k, s in zip(padded.shape, strides, strict=False) for size in (k // s, s)]
    taps = padded.reshape(*split, *blocks.shape[rank:])  # tap o = s q + r goes to phase r, tap q
    quotients, phases = range(0, 2 * rank, 2), range(1, 2 * rank, 2)
    taps = taps.transpose(*quotients, 2 * rank, *phases, 2 * rank + 1, 2 * rank + 2)
    return taps.reshape(*taps.shape[: rank + 1], -1, taps.shape[-1])


def _blocks(kernel: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Kernel as `(*window, blocks, inputs, outputs)`; a transposed one as that of its adjoint."""
    if geometry.depthwise:
        return kernel[..., :, None, :]
    split = kernel.reshape(*kernel.shape[:-1], geometry.groups, -1)
    return np.moveaxis(split, -2, -3)


def kernel_spectrum(layer: keras.layers.Layer, name: str) -> Spectrum:
    """Spectrum of the operator of one kernel of a layer.

    Args:
        layer: a built Dense or convolution layer.
        name: of the weight, a key of `kernel_geometries(layer)`.

    Example:

    >>> layer = keras.layers.Dense(2, kernel_initializer="ones")
    >>> layer.build((None, 2))
    >>> round(kernel_spectrum(layer, "kernel").bound, 6)
    2.0
    """
    geometry = kernel_geometries(layer)[name]
    blocks = _blocks(host(getattr(layer, name)), geometry)
    window = blocks.shape[:-3]
    if math.prod(window) == 1:
        return matrix_spectrum(blocks)
    patches = np.moveaxis(blocks, -3, 0).reshape(blocks.shape[-3], -1, blocks.shape[-1])
    gain = math.sqrt(overlap(window, layer.strides, layer.dilation_rate))
    by_patches = gain * matrix_spectrum(patches).bound
    if max(layer.strides) > 1 and max(layer.dilation_rate) > 1:  # such a convolution has no polyphase form
        return Spectrum(0.0, 0.0, by_patches)
    spectrum = convolution_spectrum(blocks, layer.strides)
    by_correlation = autocorrelation_bound(blocks, layer.strides)
    return dataclasses.replace(spectrum, bound=min(spectrum.bound, by_patches, by_correlation))


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
    _a.hard_sigmoid: 1 / 6,
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
    raise ValueError(
        "Expected a layer with a known Lipschitz bound. Tell us one with\n"
        f"    @hkr_keras.bounds.layer_bound.register({type(layer).__name__})\n"
        "    def _(layer): return ...  # an upper bound, as a float\n"
        f"Received: layer={type(layer).__name__} '{getattr(layer, 'name', '')}'"
    )


def _register(bound: Callable[[Any], float], *classes: type) -> None:
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
    _k.GlobalAveragePooling1D,  # 1 / sqrt(cells), for an unknown number of cells
    _k.GlobalAveragePooling2D,
    _k.GlobalAveragePooling3D,
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
    hkr_layers.LayerCentering,
    hkr_layers.BatchCentering,
)
_register(_factor, hkr_layers.Scale)


def _kernel_layer(layer) -> float:
    if getattr(layer, "quantization_mode", None):
        raise ValueError(
            "Expected floating point kernels, since the stored weights of a quantized layer are not the ones it "
            f"computes with. Received: {layer.name}.quantization_mode={layer.quantization_mode}"
        )
    bounds = [kernel_spectrum(layer, name).bound for name in kernel_geometries(layer)]
    return math.prod(bounds) * activation_bound(layer.activation)


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
    return max(1.0, (2 * kernel_spectrum(layer, "kernel").bound ** 2 - 1) * (1 + 8 * _EPSILON))


_register(_reflection, hkr_layers.SLLDense, hkr_layers.SLLConv2D)


@layer_bound.register
def _(layer: hkr_layers.LipschitzSimpleRNN) -> float:
    cell = layer.cell
    changed = type(cell) is not LipschitzSimpleRNNCell or _overridden(cell, LipschitzSimpleRNNCell)
    if changed or layer.return_state or layer.stateful:
        raise ValueError(
            "Expected a LipschitzSimpleRNN with its own cell, and no states in or out. Received: "
            f"cell={type(cell).__name__}, return_state={layer.return_state}, stateful={layer.stateful}"
        )
    _check_built(layer)
    slope = activation_bound(cell.activation)
    inputs, states = (slope * kernel_spectrum(cell, name).bound for name in ("kernel", "recurrent_kernel"))
    return recurrence_bound(layer.length, inputs, states, layer.return_sequences)


_register(lambda layer: activation_bound(layer.activation), _k.Activation)
_register(lambda layer: 1.0, _k.Softmax)
_register(lambda layer: max(1.0, abs(layer.negative_slope)), _k.LeakyReLU)
_register(lambda layer: max(1.0, abs(layer.alpha)), _k.ELU)


@layer_bound.register
def _(layer: keras.layers.PReLU) -> float:
    _check_built(layer)
    return max(1.0, float(np.abs(host(layer.alpha)).max()))


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


def _average_pooling(layer) -> float:
    # With padding="same" Keras divides by the cells inside the image, which may be a single one.
    cells = math.prod(layer.pool_size) if layer.padding == "valid" else 1
    return math.sqrt(_pool_overlap(layer) / cells)


_register(_average_pooling, _k.AveragePooling1D, _k.AveragePooling2D, _k.AveragePooling3D)

_register(lambda layer: math.sqrt(layer.n), _k.RepeatVector)
_register(lambda layer: lipschitz_bound(layer.layer), _k.TimeDistributed)


@layer_bound.register
def _(layer: keras.layers.Rescaling) -> float:
    input_shape = (layer.get_build_config() or {}).get("input_shape") or ()
    for numbers in (layer.scale, layer.offset):
        sizes = np.shape(numbers)
        known = (*(None for _ in sizes), *input_shape)[-len(sizes) :] if sizes else ()
        shared = len(layer._inbound_nodes) > 1 and math.prod(sizes) > 1  # perhaps with inputs of other shapes
        if shared or any(size not in (1, n) for size, n in zip(sizes, known, strict=True)):
            raise ValueError(
                f"Expected the scale and offset of Rescaling '{layer.name}' to have the sizes of its input, since "
                f"broadcasting enlarges norms. Received: shape={sizes}, input_shape={input_shape or None}"
            )
    return float(np.abs(np.asarray(layer.scale, dtype=np.float64)).max())


@layer_bound.register
def _(layer: keras.layers.BatchNormalization) -> float:
    gain = host(layer.gamma) if layer.scale else np.ones(1)
    return float((np.abs(gain) / np.sqrt(host(layer.moving_variance) + layer.epsilon)).max()) * (1 + 8 * _EPSILON)


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
    logits = host(layer.mixing_logits)
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum()) @ constants


# ---- models ---------------------------------------------------------------------------------------------


def _length(values) -> float:
    """An upper bound on the Euclidean norm; `hypot` neither overflows nor underflows to 0."""
    return math.hypot(*values) * (1 + 8 * _EPSILON)


@dataclasses.dataclass(frozen=True)
class Flow:
    """What is known of one tensor of a model.

    Args:
        constants: `(inputs of the model,)`, how far it moves at most per unit that each input moves.
        head: `(W, constants before W)` when the tensor is `x W + b` of another one, else `None`.
    """

    constants: np.ndarray
    head: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def constant(self) -> float:
        """The constant with respect to all inputs together (Cauchy-Schwarz)."""
        return _length(self.constants)


#: What a subclass may override: construction and configuration. Bounds are read from the stored weights.
_HARMLESS = {
    *("build", "add_weight", "get_config", "from_config", "compute_output_shape", "compute_output_spec"),
    *("enable_lora", "quantize", "loss"),
}
_ACCESS = {"__call__", "__getattribute__", "__getattr__"}


def _overridden(layer, known: type) -> set[str]:
    """Names of methods and properties of a known class that a layer of a subclass resolves to something else."""
    defined = {name for cls in type(layer).__mro__ if cls not in known.__mro__ for name in vars(cls)}
    changed = {
        name
        for name in defined - _HARMLESS
        if name in _ACCESS or (not name.startswith("__") and hasattr(known, name))
        if inspect.getattr_static(type(layer), name) is not inspect.getattr_static(known, name, None)
    }
    replaced = {name for name, value in vars(layer).items() if callable(value) and hasattr(known, name)}
    return changed | (replaced - _HARMLESS)


def _check_not_overridden(layer, registry) -> None:
    """Refuses a subclass that changes what a registered class computes: its bound would be somebody else's."""
    known = next((cls for cls in type(layer).__mro__ if cls in registry), object)
    changed = _overridden(layer, known) if known is not object else set()
    if changed:
        raise ValueError(
            f"Expected a subclass of {known.__name__} that computes the same function; a bound for it must be "
            f"registered with @hkr_keras.bounds.layer_bound.register({type(layer).__name__}). "
            f"Received: {type(layer).__name__} '{layer.name}', which overrides {', '.join(sorted(changed))}"
        )


Visit = Callable[[Any, list[Flow], Flow], None]


def flow_through(layer, flows: list[Flow], shapes: list | None = None, visit: Visit | None = None) -> list[Flow]:
    """The flows of the outputs of a layer or model, from those of its inputs.

    Args:
        layer: a built layer, Sequential or functional model.
        flows: one per input.
        shapes: of the inputs, when known.
        visit: called with `(layer, input flows, output flow)` after every layer.
    """
    is_model = isinstance(layer, keras.Model) and type(layer) not in layer_bound.registry
    if is_model and isinstance(layer, keras.Sequential):
        _check_is_plain_model(layer, keras.Sequential)
        for inner in layer.layers:
            flows = flow_through(inner, flows, visit=visit)
        return flows
    if is_model:
        return _flow_through_graph(layer, flows, visit)
    if len(flows) == 1:
        output = _flow_through_layer(layer, flows[0])
    else:
        _check_not_overridden(layer, merge_bound.registry)
        _check_no_broadcasting(layer, shapes or [])
        output = Flow(merge_bound(layer, np.stack([flow.constants for flow in flows])) * (1 + 8 * _EPSILON))
    if visit is not None:
        visit(layer, flows, output)
    return [output]


def _check_no_broadcasting(layer, shapes: list) -> None:
    if isinstance(layer, keras.layers.Concatenate):
        if layer.axis % len(shapes[0]) == 0:
            raise ValueError(f"Expected inputs to stay apart in the batch. Received: {layer.name}.axis={layer.axis}")
        return
    inner = {tuple(shape[1:]) for shape in shapes}
    if len(inner) != 1 or None in next(iter(inner)):
        raise ValueError(
            f"Expected the inputs of {type(layer).__name__} '{layer.name}' to have equal and known shapes, since "
            f"broadcasting enlarges norms. Received: shapes={shapes}"
        )


def _flow_through_layer(layer, flow: Flow) -> Flow:
    bound = lipschitz_bound(layer)
    constants = flow.constants * bound * (1 + 2 * _EPSILON)
    if bound > 0:  # a product of tiny constants must not underflow to 0
        constants = np.where(flow.constants > 0, np.maximum(constants, np.finfo(np.float64).tiny), 0.0)
    output = Flow(constants)
    rule = layer_bound.dispatch(type(layer))  # a class with a bound of its own may compute anything
    if rule is _kernel_layer and isinstance(layer, keras.layers.Dense) and layer.activation is keras.activations.linear:
        return dataclasses.replace(output, head=(host(layer.kernel), flow.constants))
    if rule is _one and isinstance(layer, (keras.layers.Dropout, keras.layers.Identity)):
        return dataclasses.replace(output, head=flow.head)
    if rule is _factor and flow.head is not None:
        return dataclasses.replace(output, head=(flow.head[0] * layer.k, flow.head[1]))
    return output


_GRAPH = {"call", "layers", "inputs", "outputs", "operations", "_nodes_by_depth", "_run_through_graph", *_ACCESS}


def _check_is_plain_model(model, cls: type | None) -> None:
    """Refuses a model whose forward pass is its own: its layers do not tell what it computes."""
    if cls is None or _overridden(model, cls) & _GRAPH:
        raise ValueError(
            "Expected a Sequential or functional model, whose graph can be read, or one whose class is registered "
            f"with @hkr_keras.bounds.layer_bound.register({type(model).__name__}). "
            f"Received: model={type(model).__name__} '{model.name}' with a forward pass of its own"
        )


def _check_arguments(node, model) -> None:
    """Refuses whatever a layer was called with beside its inputs: masks, constants, the training mode."""
    flat = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
    other = [value for value in flat if not (isinstance(value, keras.KerasTensor) or value is None or value is False)]
    if other:
        raise ValueError(
            "Expected every layer to be called with tensors of the model alone, in inference mode. "
            f"Received: {node.operation.name}(...) with {other[0]!r} in model '{model.name}'"
        )
    several = isinstance(node.operation, keras.Model) and len(node.input_tensors) > 1
    if several and any(isinstance(x, dict) for x in (*node.arguments.args[:1], node.operation.input)):
        raise ValueError(
            "Expected a nested model with several inputs to take them as a list, in order. "
            f"Received: a dictionary of inputs of '{node.operation.name}' in model '{model.name}'"
        )


def _flow_through_graph(model, flows: list[Flow], visit: Visit | None) -> list[Flow]:
    classes = (
        cls for cls in type(model).__mro__ if cls.__name__ == "Functional" and cls.__module__.startswith("keras.")
    )
    _check_is_plain_model(model, next(classes, None))
    known = {id(tensor): flow for tensor, flow in zip(model.inputs, flows, strict=True)}
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
            _check_arguments(node, model)
            outputs = flow_through(layer, [known[id(t)] for t in tensors], [t.shape for t in tensors], visit)
            known.update((id(tensor), flow) for tensor, flow in zip(node.outputs, outputs, strict=True))
    return [known[id(tensor)] for tensor in model.outputs]


def _check_built(model) -> None:
    if not model.built:
        raise ValueError(
            "Expected a built model: give it an Input, or call it once. "
            f"Received: {type(model).__name__} '{model.name}', built=False"
        )


def model_flows(model, visit: Visit | None = None) -> list[Flow]:
    """The flows of the outputs of a model with respect to its inputs.

    Raises:
        ValueError: for a model that is not built, or holds a layer without a known bound.
    """
    _check_built(model)
    inputs = (getattr(model, "inputs", None) or [None]) if isinstance(model, keras.Model) else [None]
    for tensor in inputs:
        if tensor is not None and "float" not in tensor.dtype:
            raise ValueError(
                "Expected inputs of a floating point type: rounding to integers has no Lipschitz constant. "
                f"Received: input '{tensor.name}' of dtype {tensor.dtype}"
            )
    return flow_through(model, [Flow(row) for row in np.eye(len(inputs))], visit=visit)


def _joint_constant(outputs: list[Flow]) -> float:
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
        return _joint_constant(model_flows(model))
    _check_not_overridden(model, layer_bound.registry)
    if kernel_geometries(model):
        _check_built(model)
    for variable in getattr(model, "weights", ()):
        host(variable)
    bound = float(layer_bound(model))
    if not 0 <= bound < math.inf:
        raise ValueError(
            f"Expected a finite Lipschitz bound. Received: {bound} for {type(model).__name__} '{model.name}'"
        )
    return bound


# ---- summary --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One layer of a summary; singular values are `None` for layers without a kernel."""

    layer: str
    kind: str
    sigma_min: float | None
    sigma_max: float | None
    bound: float | None
    product: float


@dataclasses.dataclass(frozen=True)
class LipschitzSummary:
    """What `lipschitz_summary` found: `rows` in the order of computation, and the `bound` of the model."""

    model: str
    bound: float
    rows: tuple[SummaryRow, ...]

    def to_dict(self) -> dict:
        """Plain Python values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The same, as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        table = rich.table.Table(title=f"Lipschitz bounds of {self.model}", box=rich.box.SIMPLE_HEAD)
        for column in ("layer", "kind"):
            table.add_column(column)
        for column in ("sigma_min", "sigma_max", "bound", "product"):
            table.add_column(column, justify="right")
        for row in self.rows:
            numbers = (row.sigma_min, row.sigma_max, row.bound, row.product)
            table.add_row(row.layer, row.kind, *("" if number is None else f"{number:.6g}" for number in numbers))
        table.add_section()
        table.add_row("model", "", "", "", "", f"{self.bound:.6g}")
        text = io.StringIO()
        rich.console.Console(file=text, width=100, force_terminal=False, force_jupyter=False).print(table)
        return text.getvalue()


def _spectra(layer) -> Iterator[Spectrum]:
    for name in kernel_geometries(layer):
        yield kernel_spectrum(layer, name)


def lipschitz_summary(model, print_fn: Callable[[str], Any] | None = print) -> LipschitzSummary:
    """Prints a table of the bound of every layer and of the model, and returns it.

    Columns: smallest and largest singular value found (of layers with a kernel), the proven upper bound of the
    layer, and the product: the bound from the input of the model to the output of the layer. The model is not
    changed.

    Args:
        model: a built Sequential or functional model.
        print_fn: takes the text; `None` prints nothing.

    Returns:
        A `LipschitzSummary` with `rows`, `bound`, `to_dict()` and `to_json()`.

    Raises:
        ValueError: as `lipschitz_bound`.

    Example:

    >>> import keras, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(2, name="head")])
    >>> summary = hkr.lipschitz_summary(model, print_fn=None)
    >>> [row.layer for row in summary.rows]
    ['head']
    """
    rows = []

    def visit(layer, inputs, output):
        spectra = list(_spectra(layer))
        rows.append(
            SummaryRow(
                layer=layer.name,
                kind=type(layer).__name__,
                sigma_min=math.prod(s.smallest for s in spectra) if spectra else None,
                sigma_max=math.prod(s.largest for s in spectra) if spectra else None,
                bound=lipschitz_bound(layer) if len(inputs) == 1 else None,
                product=output.constant,
            )
        )

    bound = _joint_constant(model_flows(model, visit))
    summary = LipschitzSummary(model.name, bound, tuple(rows))
    if print_fn is not None:
        print_fn(str(summary))
    return summary
