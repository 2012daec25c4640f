"""Almost orthogonal layers: any kernel, rescaled in the forward pass until its norm is proven to be at most 1."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from hkr_keras._backends.compiling import in_one_go
from hkr_keras._registration import registered
from hkr_keras.geometry import Geometry, kernel_geometries, weight_geometries
from hkr_keras.layers.base import ComposedKernel, LipschitzLayer, PlainLayers, at_least_float32
from hkr_keras.linalg import SMALLEST_DIVISOR

__all__ = ["AOLConv2D", "AOLDense", "SLLConv2D", "SLLDense"]

Tensor = Any

_SMALLEST = 1e-6  # a channel weaker than this, relative to the largest entry, is not scaled up any further


def _almost_orthogonal(kernel: Tensor, strides: Sequence[int] = ()) -> Tensor:
    """Rescales the channels of a kernel so that its operator norm is at most 1, for every size and zero padding.

    `K diag(t)` with `t_i^2 = s_i / sum_j C_ij s_j`, where `C_ij = sum_d |<K_i, K_j moved by d>|` is the
    absolute autocorrelation of output channels and s any positive vector, here their norms. Since
    `diag(1 / t^2) - K^* K` is diagonally dominant after scaling by s, its symbol is positive semi-definite at every
    frequency. With fewer inputs than outputs the same is done to the input channels. A convolution with orthogonal
    channels keeps their norms at 1.

    Args:
        kernel: floating point tensor `(*window, inputs, outputs)`, of any size: the result does not depend on its
            scale. A channel of zeros stays zero. Gradients are finite at zero too: below 1e-6, the largest entry no
            longer counts in them.
        strides: one per dimension of the window.

    Returns:
        Tensor of the same shape and dtype.

    Example:

    >>> ops.convert_to_numpy(_almost_orthogonal(ops.array([[3.0, 0.0], [0.0, 0.5]]))).round(5).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    Reference:
        Prach and Lampert, ECCV 2022 (arXiv 2208.03160), theorems 1 and 2; Araujo et al., ICLR 2023 (arXiv 2303.03169),
        for the vector s.
    """
    taps = _to_phases(kernel, strides)
    rank = len(strides)
    by_inputs = taps.shape[-2] < taps.shape[-1]
    others = tuple(axis for axis in range(rank + 2) if axis != (rank if by_inputs else rank + 1))
    # With the largest entry at 1, no square that matters underflows; the result is the same for every scale.
    largest = ops.stop_gradient(ops.max(ops.abs(taps)))
    scaled = taps / ops.maximum(largest, _SMALLEST)  # the way of the gradient, which grows as kernels shrink
    taps = ops.stop_gradient(taps / ops.maximum(largest, SMALLEST_DIVISOR)) + (scaled - ops.stop_gradient(scaled))
    norms = ops.sqrt(ops.maximum(ops.sum(ops.square(taps), axis=others, keepdims=True), _SMALLEST**2))
    taps = taps / norms
    s = ops.reshape(norms, (-1,))
    dominant = ops.sum(_correlation(taps, rank, by_inputs) * s, axis=1)
    t = ops.sqrt(s / ops.maximum(dominant, s))
    taps = taps * (ops.expand_dims(t, -1) if by_inputs else t)
    return _from_phases(taps, kernel.shape, strides)


def _correlation(taps: Tensor, rank: int, by_inputs: bool) -> Tensor:
    """`C_ij`, the sum of absolute inner products of channels over all moves."""
    window = range(rank)
    vectors = ops.transpose(taps, (*window, rank + 1, rank)) if by_inputs else taps  # (*window, across, channels)
    if rank == 0:
        return ops.abs(ops.matmul(ops.transpose(vectors), vectors))
    images = ops.transpose(vectors, (rank + 1, *window, rank))
    images = ops.pad(images, [(0, 0), *((k - 1, k - 1) for k in taps.shape[:rank]), (0, 0)])
    products = ops.conv(images, vectors, padding="valid", data_format="channels_last")
    return ops.sum(ops.abs(products), axis=tuple(range(1, rank + 1)))


def _to_phases(kernel: Tensor, strides: Sequence[int]) -> Tensor:
    """The kernel of the equivalent convolution with stride 1 from `prod(strides)` times as many channels."""
    if math.prod(strides) == 1:
        return kernel
    rank, (*window, inputs, outputs) = len(strides), kernel.shape
    padded = ops.pad(kernel, [*((0, -k % s) for k, s in zip(window, strides, strict=True)), (0, 0), (0, 0)])
    split = [size for k, s in zip(window, strides, strict=True) for size in (-(-k // s), s)]
    taps = ops.transpose(
        ops.reshape(padded, (*split, inputs, outputs)),
        (*range(0, 2 * rank, 2), *range(1, 2 * rank, 2), 2 * rank, 2 * rank + 1),
    )
    return ops.reshape(taps, (*split[::2], math.prod(strides) * inputs, outputs))


def _from_phases(taps: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The inverse of `_to_phases`, for a kernel of the given shape."""
    if math.prod(strides) == 1:
        return taps
    rank, (*window, inputs, outputs) = len(strides), shape
    quotients = tuple(taps.shape[:rank])
    taps = ops.reshape(taps, (*quotients, *strides, inputs, outputs))
    turns = [axis for i in range(rank) for axis in (i, rank + i)]
    taps = ops.transpose(taps, (*turns, 2 * rank, 2 * rank + 1))
    padded = ops.reshape(taps, (*(q * s for q, s in zip(quotients, strides, strict=True)), inputs, outputs))
    return padded[tuple(slice(0, k) for k in window)]


class _Rescaled(ComposedKernel):
    """What the almost orthogonal layers share: one weight, `unscaled`, of which `kernel` is made."""

    strides: Any = ()

    def add_weight(self, *args: Any, name: Any = None, regularizer: Any = None, **kwargs: Any) -> Any:
        if name != "kernel":
            return super().add_weight(*args, name=name, regularizer=regularizer, **kwargs)
        self.unscaled = super().add_weight(*args, name="unscaled", **{**kwargs, "autocast": False})
        return self.unscaled

    def compose(self) -> Any:
        return in_one_go(_almost_orthogonal, at_least_float32(self.unscaled), tuple(self.strides))


@weight_geometries.register(_Rescaled)
def _(layer: Any) -> dict[str, Geometry]:
    return {}  # nothing to project


@registered
class AOLDense(_Rescaled, keras.layers.Dense):
    """`keras.layers.Dense` with a kernel that is rescaled to a norm of at most 1 in the forward pass.

    All arguments are those of `keras.layers.Dense`. The weight `unscaled` is free; `kernel` is computed from it with
    `almost_orthogonal`. Training moves the kernel towards an orthogonal one, nothing forces it to be one, so
    gradients may shrink where `LipschitzDense` keeps them. LoRA and `quantize` raise a `ValueError`.

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.AOLDense(4)
    >>> y = layer(np.ones((2, 8), "float32"))
    >>> bool(hkr.lipschitz_bound(layer) < 1 + 1e-6)
    True

    Reference:
        Prach and Lampert, ECCV 2022 (arXiv 2208.03160).
    """

    __signature__ = inspect.signature(keras.layers.Dense)

    def operate(self, inputs: Tensor, kernel: Any) -> Tensor:
        return ops.matmul(inputs, kernel)


@registered
class AOLConv2D(_Rescaled, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with a kernel that is rescaled to an operator norm of at most 1, for any image size.

    All arguments are those of `keras.layers.Conv2D`, with `groups=1`; the rest is as for `AOLDense`.

    Input and output shapes: those of `keras.layers.Conv2D`.

    Raises:
        ValueError: for `groups` other than 1, for LoRA and quantization.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.AOLConv2D(4, 3, padding="same")
    >>> tuple(layer(np.ones((2, 8, 8, 3), "float32")).shape[1:])
    (8, 8, 4)
    >>> bool(hkr.lipschitz_bound(layer) < 1 + 1e-6)
    True

    Reference:
        Prach and Lampert, ECCV 2022 (arXiv 2208.03160).
    """

    __signature__ = inspect.signature(keras.layers.Conv2D)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.groups != 1:
            raise ValueError(f"Expected groups=1 for AOLConv2D. Received: groups={self.groups}")

    def operate(self, inputs: Tensor, kernel: Any) -> Tensor:
        return ops.conv(inputs, kernel, list(self.strides), self.padding, self.data_format, self.dilation_rate)


class _Residual(LipschitzLayer, keras.layers.Layer):
    """`x - 2 W relu(W^T x + b)` with a rescaled W of norm at most 1."""

    strides: tuple[int, ...] = ()

    def __init__(self, kernel_initializer: Any = "orthogonal", bias_initializer: Any = "zeros", **kwargs: Any):
        super().__init__(**kwargs)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.supports_masking = True

    def _add_weights(self, shape: Any, initializer: Any) -> None:
        self.unscaled = self.add_weight(name="unscaled", shape=shape, initializer=initializer, autocast=False)
        self.bias = self.add_weight(name="bias", shape=shape[-1:], initializer=self.bias_initializer)
        self.built = True

    @property
    def kernel(self) -> Any:
        """W, computed from the weight `unscaled` wherever it is read."""
        return in_one_go(_almost_orthogonal, at_least_float32(self.unscaled), tuple(self.strides))

    def stored(self) -> list:
        return [ops.convert_to_numpy(weight) for weight in (self.kernel, self.bias)]

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
        }


class _AtCentre(keras.initializers.Initializer):
    """A kernel `(*window, inputs, outputs)` that is zero but for the centre, which another initializer makes."""

    def __init__(self, initializer: Any):
        self.initializer = initializer

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        *window, inputs, outputs = shape
        centre = ops.reshape(self.initializer((inputs, outputs), dtype=dtype), (*(1 for _ in window), inputs, outputs))
        return ops.pad(centre, [*((k // 2, k // 2) for k in window), (0, 0), (0, 0)])


@registered
class SLLDense(_Residual):
    """A residual block with constant 1: `x - 2 W relu(W^T x + b)`, with W rescaled to a norm of at most 1.

    The Jacobian `I - 2 W D W^T`, D diagonal in [0, 1], has eigenvalues in [-1, 1]. Where the columns of W are
    orthonormal, as at the start when `units` is at most the number of features, it is a product of reflections, so
    that gradients keep their norm through any number of blocks.

    Args:
        units: columns of W, the width of the block. The output has the width of the input.
        kernel_initializer: of the weight that is rescaled to W.
        bias_initializer: of b.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: `(batch, ..., features)`, the same.

    Raises:
        ValueError: for a number of units below 1; for LoRA and quantization.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.SLLDense(16)
    >>> tuple(layer(np.ones((2, 8), "float32")).shape)
    (2, 8)
    >>> bool(hkr.lipschitz_bound(layer) < 1 + 1e-6)
    True

    Reference:
        Araujo et al., ICLR 2023 (arXiv 2303.03169), theorem 3; Meunier et al., ICML 2022 (arXiv 2110.12690).
    """

    def __init__(
        self, units: Any, kernel_initializer: Any = "orthogonal", bias_initializer: Any = "zeros", **kwargs: Any
    ):
        if not isinstance(units, int) or units < 1:
            raise ValueError(f"Expected a positive number of units. Received: units={units}")
        super().__init__(kernel_initializer, bias_initializer, **kwargs)
        self.units = units

    def build(self, input_shape: Any) -> None:
        self._add_weights((input_shape[-1], self.units), self.kernel_initializer)

    def call(self, inputs: Tensor) -> Tensor:
        kernel = ops.cast(self.kernel, self.compute_dtype)
        hidden = ops.relu(ops.matmul(inputs, kernel) + self.bias)
        return inputs - 2 * ops.matmul(hidden, ops.transpose(kernel))

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """Two Dense layers and a sum."""
        (x,), (kernel, bias) = inputs, self.stored()
        hidden = new(keras.layers.Dense, self.units, activation="relu", weights=[kernel, bias])(x)
        back = new(keras.layers.Dense, x.shape[-1], use_bias=False, weights=[-2 * kernel.T])(hidden)
        return new(keras.layers.Add)([x, back])

    def get_config(self) -> dict[str, Any]:
        return {"units": self.units, **super().get_config()}


@registered
class SLLConv2D(_Residual):
    """A convolutional residual block with constant 1: `x - 2 W relu(W^T x + b)`, with zero padding.

    As `SLLDense`, where `W^T` is a convolution with stride 1 and W its adjoint.

    Args:
        filters: channels inside the block. The output has the channels of the input.
        kernel_size: odd height and width of the window, or one integer for both.
        kernel_initializer: of the centre of the window; the rest starts at 0, so that the block starts as reflections.
        bias_initializer: of b.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: `(batch, height, width, channels)`, the same.

    Raises:
        ValueError: for fewer than one filter, or an even window; for LoRA and quantization.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.SLLConv2D(16, 3)
    >>> tuple(layer(np.ones((2, 8, 8, 4), "float32")).shape)
    (2, 8, 8, 4)

    Reference:
        Araujo et al., ICLR 2023 (arXiv 2303.03169), theorem 3; Meunier et al., ICML 2022 (arXiv 2110.12690).
    """

    strides = dilation_rate = (1, 1)

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        kernel_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        **kwargs: Any,
    ):
        if not isinstance(filters, int) or filters < 1:
            raise ValueError(f"Expected a positive number of filters. Received: filters={filters}")
        window = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(window) != 2 or not all(isinstance(k, int) and k > 0 and k % 2 for k in window):
            raise ValueError(f"Expected one or two odd positive integers. Received: kernel_size={kernel_size}")
        super().__init__(kernel_initializer, bias_initializer, **kwargs)
        self.filters = filters
        self.kernel_size = window
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape: Any) -> None:
        self._add_weights((*self.kernel_size, input_shape[-1], self.filters), _AtCentre(self.kernel_initializer))

    def call(self, inputs: Tensor) -> Tensor:
        kernel = ops.cast(self.kernel, self.compute_dtype)
        hidden = ops.relu(ops.conv(inputs, kernel, padding="same", data_format="channels_last") + self.bias)
        return inputs - 2 * ops.conv_transpose(hidden, kernel, strides=1, padding="same", data_format="channels_last")

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """A convolution, its adjoint and a sum."""
        (x,), (kernel, bias) = inputs, self.stored()
        settings = {"kernel_size": self.kernel_size, "padding": "same", "data_format": "channels_last"}
        hidden = new(keras.layers.Conv2D, self.filters, activation="relu", weights=[kernel, bias], **settings)(x)
        adjoint = new(keras.layers.Conv2DTranspose, x.shape[-1], use_bias=False, weights=[-2 * kernel], **settings)
        return new(keras.layers.Add)([x, adjoint(hidden)])

    def get_config(self) -> dict[str, Any]:
        return {"filters": self.filters, "kernel_size": self.kernel_size, **super().get_config()}


@kernel_geometries.register(_Residual)
def _(layer: Any) -> dict[str, Geometry]:
    return {"kernel": Geometry()}


@weight_geometries.register(_Residual)
def _(layer: Any) -> dict[str, Geometry]:
    return {}
