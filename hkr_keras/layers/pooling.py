"""Pooling with a Lipschitz constant of 1, scaled so that the constant is not below 1 either."""

import functools
import math
from typing import Any

import keras
from keras import ops

from hkr_keras._backends.norms import tiled_norm
from hkr_keras._registration import registered
from hkr_keras.geometry import overlap
from hkr_keras.layers.base import PlainLayers

__all__ = [
    "GlobalL2NormPooling1D",
    "GlobalL2NormPooling2D",
    "InvertibleDownsampling2D",
    "InvertibleUpsampling2D",
    "L2NormPooling1D",
    "L2NormPooling2D",
    "L2NormPooling3D",
    "ScaledAveragePooling1D",
    "ScaledAveragePooling2D",
    "ScaledAveragePooling3D",
    "ScaledGlobalAveragePooling1D",
    "ScaledGlobalAveragePooling2D",
]

Tensor = Any

_SQUARED_FLOOR = 1e-24  # keeps the gradient of the root finite at 0


def _l2_norm(mean: Any, inputs: Any, cells: Any) -> Any:
    """The root of `cells * mean(inputs^2)`, in at least float32: half precision cannot hold the squares."""
    dtype = keras.backend.result_type(inputs.dtype, "float32")
    squares = cells * mean(ops.square(ops.cast(inputs, dtype)))
    return ops.cast(ops.sqrt(ops.maximum(squares, _SQUARED_FLOOR)), inputs.dtype)


class _WindowPooling:
    """What the window layers share. Mixin before a Keras average pooling layer, which owns the constructor."""

    name: str
    pool_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str
    data_format: str

    @property
    def cells(self) -> float:
        """Cells of a window over the largest number of windows that see one cell."""
        return math.prod(self.pool_size) / overlap(self.pool_size, self.strides, (1,) * len(self.pool_size))

    def _mean(self, inputs: Any) -> Any:
        """Means over windows, with zeros outside the input (Keras divides by the cells inside it instead)."""
        if self.padding == "same":
            inputs = ops.pad(inputs, self._border(ops.shape(inputs)))
        return ops.average_pool(inputs, self.pool_size, self.strides, "valid", self.data_format)

    def _border(self, shape: Any) -> list:
        """Cells to add before and after every axis of an input, for outputs of `ceil(size / strides)`."""
        first = 1 if self.data_format == "channels_last" else 2
        widths = [(0, 0) for _ in shape]
        for axis, (k, s) in enumerate(zip(self.pool_size, self.strides, strict=True), first):
            size = shape[axis]  # a number, or a tensor where it is unknown before the call
            missing = (-(-size // s) - 1) * s + k - size
            missing = max(missing, 0) if isinstance(missing, int) else ops.maximum(missing, 0)
            widths[axis] = (missing // 2, missing - missing // 2)
        return widths

    def _mean_as_keras(self, new: PlainLayers, x: Tensor) -> Tensor:
        """As `_mean`: cells outside the input count as zeros."""
        settings = {"strides": self.strides, "padding": self.padding, "data_format": self.data_format}
        rank = len(self.pool_size)
        if self.padding == "valid":
            return new(getattr(keras.layers, f"AveragePooling{rank}D"), self.pool_size, **settings)(x)
        if rank == 3:  # Keras has no depthwise convolution of volumes
            first = 1 if self.data_format == "channels_last" else 2
            if None in x.shape[first : first + rank]:
                raise ValueError(f"Expected inputs of known size to convert '{self.name}'. Received: shape={x.shape}")
            border = tuple(self._border(x.shape)[first : first + rank])
            padded = new(keras.layers.ZeroPadding3D, border, data_format=self.data_format)(x)
            return new(keras.layers.AveragePooling3D, self.pool_size, **{**settings, "padding": "valid"})(padded)
        channels = x.shape[-1 if self.data_format == "channels_last" else 1]
        if channels is None:
            raise ValueError(
                f"Expected inputs of one number of channels to convert '{self.name}'. Received: shape={x.shape}"
            )
        window = ops.convert_to_numpy(ops.full((*self.pool_size, channels, 1), 1 / math.prod(self.pool_size)))
        cls = getattr(keras.layers, f"DepthwiseConv{rank}D")
        return new(cls, self.pool_size, use_bias=False, weights=[window], **settings)(x)


class _ScaledAverage(_WindowPooling):
    def call(self, inputs: Tensor) -> Tensor:
        return self._mean(inputs) * math.sqrt(self.cells)

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """Means of windows, rescaled."""
        return new(keras.layers.Rescaling, math.sqrt(self.cells))(self._mean_as_keras(new, inputs[0]))


class _L2Norm(_WindowPooling):
    def call(self, inputs: Tensor) -> Tensor:
        if self.strides == self.pool_size and self.data_format == "channels_last":
            x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
            norms = tiled_norm(x, self.pool_size, _SQUARED_FLOOR)
            if norms is not None:
                return ops.cast(norms, inputs.dtype)
        return _l2_norm(self._mean, inputs, self.cells)

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """Roots of sums of squares, in float32: half precision cannot hold the squares."""
        wide = functools.partial(new, dtype="float32")
        means = self._mean_as_keras(wide, wide(keras.layers.Multiply)([inputs[0], inputs[0]]))  # type: ignore[arg-type]
        squares = wide(keras.layers.Rescaling, self.cells)(means)
        return new(keras.layers.Identity)(ops.sqrt(ops.maximum(squares, _SQUARED_FLOOR)))


class _GlobalPooling:
    """What the global layers share. Mixin before a Keras global average pooling layer."""

    name: str
    data_format: str
    keepdims: bool

    def spatial_axes(self, inputs: Any) -> tuple[int, ...]:
        rank = len(inputs.shape)
        return tuple(range(1, rank - 1)) if self.data_format == "channels_last" else tuple(range(2, rank))

    def _sum(self, inputs: Any, mask: Any = None) -> Any:
        if mask is not None:
            channel_axis = 2 if self.data_format == "channels_last" else 1
            inputs = inputs * ops.cast(ops.expand_dims(ops.cast(mask, "bool"), channel_axis), inputs.dtype)
        return ops.sum(inputs, axis=self.spatial_axes(inputs), keepdims=self.keepdims)


class _ScaledGlobalAverage(_GlobalPooling):
    def call(self, inputs: Tensor, mask: Any = None) -> Tensor:
        shape = ops.shape(inputs)
        cells = math.prod(shape[axis] for axis in self.spatial_axes(inputs))
        root = ops.sqrt(ops.cast(cells, "float32"))  # half precision cannot hold large counts
        return self._sum(inputs, mask) / ops.cast(root, inputs.dtype)

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """A sum, rescaled."""
        (x,) = inputs
        sizes = [x.shape[axis] for axis in self.spatial_axes(x)]
        if None in sizes:
            raise ValueError(f"Expected inputs of known size to convert '{self.name}'. Received: shape={x.shape}")
        return new(keras.layers.Rescaling, 1 / math.sqrt(math.prod(sizes)))(self._sum(x))


class _GlobalL2Norm(_GlobalPooling):
    def call(self, inputs: Tensor, mask: Any = None) -> Tensor:
        return _l2_norm(lambda squares: self._sum(squares, mask), inputs, 1.0)

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """The root of a sum of squares, in float32: half precision cannot hold the squares."""
        squares = self._sum(new(keras.layers.Multiply, dtype="float32")([inputs[0], inputs[0]]))
        return new(keras.layers.Identity)(ops.sqrt(ops.maximum(squares, _SQUARED_FLOOR)))


@registered
class ScaledAveragePooling1D(_ScaledAverage, keras.layers.AveragePooling1D):
    """`keras.layers.AveragePooling1D` times the root of the window size: norm 1 instead of `1 / sqrt(size)`.

    All arguments are those of the Keras layer. Overlapping windows (strides below the pool size) are divided
    by the root of the overlap. With `padding="same"` cells outside the input count as zeros.

    Input and output shapes: those of `keras.layers.AveragePooling1D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> float(hkr.layers.ScaledAveragePooling1D(4)(np.ones((1, 4, 1), "float32"))[0, 0, 0])
    2.0
    """


@registered
class ScaledAveragePooling2D(_ScaledAverage, keras.layers.AveragePooling2D):
    """`keras.layers.AveragePooling2D` times the root of the window size: norm 1 instead of `1 / sqrt(size)`.

    As `ScaledAveragePooling1D`, in two dimensions.

    Input and output shapes: those of `keras.layers.AveragePooling2D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> float(hkr.layers.ScaledAveragePooling2D(2)(np.ones((1, 2, 2, 1), "float32"))[0, 0, 0, 0])
    2.0
    """


@registered
class ScaledAveragePooling3D(_ScaledAverage, keras.layers.AveragePooling3D):
    """`keras.layers.AveragePooling3D` times the root of the window size: norm 1 instead of `1 / sqrt(size)`.

    As `ScaledAveragePooling1D`, in three dimensions.

    Input and output shapes: those of `keras.layers.AveragePooling3D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> round(float(hkr.layers.ScaledAveragePooling3D(2)(np.ones((1, 2, 2, 2, 1), "float32"))[0, 0, 0, 0, 0]) ** 2, 4)
    8.0
    """


@registered
class L2NormPooling1D(_L2Norm, keras.layers.AveragePooling1D):
    """The Euclidean norm of every window: 1-Lipschitz, and it keeps the norm of the input.

    All arguments are those of `keras.layers.AveragePooling1D`. Overlapping windows are divided by the root
    of the overlap.

    Input and output shapes: those of `keras.layers.AveragePooling1D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> float(hkr.layers.L2NormPooling1D(2)(np.array([[[3.0], [4.0]]], "float32"))[0, 0, 0])
    5.0

    Reference:
        Boureau, Ponce and LeCun, ICML 2010.
    """


@registered
class L2NormPooling2D(_L2Norm, keras.layers.AveragePooling2D):
    """The Euclidean norm of every window: 1-Lipschitz, and it keeps the norm of the input.

    As `L2NormPooling1D`, in two dimensions.

    Input and output shapes: those of `keras.layers.AveragePooling2D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> float(hkr.layers.L2NormPooling2D(2)(np.ones((1, 2, 2, 1), "float32"))[0, 0, 0, 0])
    2.0
    """


@registered
class L2NormPooling3D(_L2Norm, keras.layers.AveragePooling3D):
    """The Euclidean norm of every window: 1-Lipschitz, and it keeps the norm of the input.

    As `L2NormPooling1D`, in three dimensions.

    Input and output shapes: those of `keras.layers.AveragePooling3D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> round(float(hkr.layers.L2NormPooling3D(2)(np.ones((1, 2, 2, 2, 1), "float32"))[0, 0, 0, 0, 0]) ** 2, 4)
    8.0
    """


@registered
class ScaledGlobalAveragePooling1D(_ScaledGlobalAverage, keras.layers.GlobalAveragePooling1D):
    """`keras.layers.GlobalAveragePooling1D` times the root of the length: norm 1.

    All arguments are those of the Keras layer. Masked steps count as zeros.

    Input and output shapes: those of `keras.layers.GlobalAveragePooling1D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> float(hkr.layers.ScaledGlobalAveragePooling1D()(np.ones((1, 4, 1), "float32"))[0, 0])
    2.0
    """


@registered
class ScaledGlobalAveragePooling2D(_ScaledGlobalAverage, keras.layers.GlobalAveragePooling2D):
    """`keras.layers.GlobalAveragePooling2D` times the root of the number of pixels: norm 1.

    All arguments are those of the Keras layer.

    Input and output shapes: those of `keras.layers.GlobalAveragePooling2D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> float(hkr.layers.ScaledGlobalAveragePooling2D()(np.ones((1, 2, 2, 1), "float32"))[0, 0])
    2.0
    """


@registered
class GlobalL2NormPooling1D(_GlobalL2Norm, keras.layers.GlobalAveragePooling1D):
    """The Euclidean norm of every channel over all steps: 1-Lipschitz, and it keeps the norm of the input.

    All arguments are those of `keras.layers.GlobalAveragePooling1D`. Masked steps count as zeros.

    Input and output shapes: those of `keras.layers.GlobalAveragePooling1D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> float(hkr.layers.GlobalL2NormPooling1D()(np.array([[[3.0], [4.0]]], "float32"))[0, 0])
    5.0
    """


@registered
class GlobalL2NormPooling2D(_GlobalL2Norm, keras.layers.GlobalAveragePooling2D):
    """The Euclidean norm of every channel over all pixels: 1-Lipschitz, and it keeps the norm of the input.

    All arguments are those of `keras.layers.GlobalAveragePooling2D`.

    Input and output shapes: those of `keras.layers.GlobalAveragePooling2D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> float(hkr.layers.GlobalL2NormPooling2D()(np.ones((1, 2, 2, 1), "float32"))[0, 0])
    2.0
    """


class _Rearrangement2D(keras.layers.Layer):
    def __init__(self, pool_size: int | tuple[int, int] = 2, data_format: str | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        sizes = (pool_size,) * 2 if isinstance(pool_size, int) else tuple(pool_size)
        if len(sizes) != 2 or not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise ValueError(f"Expected one or two positive integers. Received: pool_size={pool_size}")
        self.pool_size = sizes
        self.data_format = data_format or keras.config.image_data_format()
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape: Any) -> None:
        self.compute_output_shape(input_shape)  # refuses sizes that do not divide
        self.built = True

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "pool_size": self.pool_size, "data_format": self.data_format}

    def compute_output_shape(self, input_shape: Any) -> Any:
        last = self.data_format == "channels_last"
        height, width, channels = input_shape[1:] if last else (*input_shape[2:], input_shape[1])
        height, width, channels = self._output_sizes(height, width, channels)
        return (input_shape[0], height, width, channels) if last else (input_shape[0], channels, height, width)

    def _splits(self, height: Any, width: Any, channels: Any) -> Any:
        """The sizes into which an image is split, and those into which the pieces are joined after a transposition."""
        raise NotImplementedError

    def _rearrange(self, x: Any) -> Any:
        batch, *sizes = ops.shape(x)
        split, joined = self._splits(*sizes)
        return ops.reshape(ops.transpose(ops.reshape(x, (batch, *split)), (0, 1, 3, 2, 4)), (batch, *joined))

    def call(self, inputs: Tensor) -> Tensor:
        if self.data_format == "channels_last":
            return self._rearrange(inputs)
        return ops.transpose(self._rearrange(ops.transpose(inputs, (0, 2, 3, 1))), (0, 3, 1, 2))

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """Two reshapes and a transposition."""
        (x,), last = inputs, self.data_format == "channels_last"
        if None in x.shape[1:]:
            raise ValueError(f"Expected inputs of known size to convert '{self.name}'. Received: shape={x.shape}")
        x = x if last else new(keras.layers.Permute, (2, 3, 1))(x)
        split, joined = self._splits(*x.shape[1:])
        x = new(keras.layers.Permute, (1, 3, 2, 4))(new(keras.layers.Reshape, split)(x))
        x = new(keras.layers.Reshape, joined)(x)
        return x if last else new(keras.layers.Permute, (3, 1, 2))(x)


@registered
class InvertibleDownsampling2D(_Rearrangement2D):
    """Moves every window of pixels into channels (space to depth): keeps all information and all norms.

    Args:
        pool_size: window height and width, or one integer for both. Images must be a multiple of it.
        data_format: `"channels_last"`, `"channels_first"` or `None` for Keras's default.
        **kwargs: of `keras.layers.Layer`.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, height / p, width / q, channels * p * q)`, channel index `(row * q + column) * channels + c`.

    Raises:
        ValueError: for an image size that is known and no multiple of the window.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.InvertibleDownsampling2D(2)(np.ones((1, 4, 6, 3), "float32")).shape[1:])
    (2, 3, 12)

    Reference:
        Shi et al., CVPR 2016 (arXiv 1609.05158), the inverse of its sub-pixel shuffle.
    """

    def _output_sizes(self, height: Any, width: Any, channels: Any) -> Any:
        p, q = self.pool_size
        if (height or 0) % p or (width or 0) % q:
            raise ValueError(
                f"Expected {type(self).__name__} '{self.name}' to receive images whose height and width are "
                f"multiples of {self.pool_size}. Received: height={height}, width={width}"
            )
        return height and height // p, width and width // q, channels * p * q

    def _splits(self, height: Any, width: Any, channels: Any) -> Any:
        p, q = self.pool_size
        return (height // p, p, width // q, q * channels), (height // p, width // q, p * q * channels)


@registered
class InvertibleUpsampling2D(_Rearrangement2D):
    """Moves channels into windows of pixels (depth to space): the inverse of `InvertibleDownsampling2D`.

    Args:
        pool_size: window height and width, or one integer for both. Channels must be a multiple of its area.
        data_format: `"channels_last"`, `"channels_first"` or `None` for Keras's default.
        **kwargs: of `keras.layers.Layer`.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, height * p, width * q, channels / (p * q))`.

    Raises:
        ValueError: for a number of channels that is no multiple of the area of the window.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.InvertibleUpsampling2D(2)(np.ones((1, 2, 3, 12), "float32")).shape[1:])
    (4, 6, 3)

    Reference:
        Shi et al., CVPR 2016 (arXiv 1609.05158).
    """

    def _output_sizes(self, height: Any, width: Any, channels: Any) -> Any:
        p, q = self.pool_size
        if channels is None or channels % (p * q):
            raise ValueError(
                f"Expected {type(self).__name__} '{self.name}' to receive a number of channels that is known and a "
                f"multiple of {p * q}. Received: channels={channels}"
            )
        return height and height * p, width and width * q, channels // (p * q)

    def _splits(self, height: Any, width: Any, channels: Any) -> Any:
        p, q = self.pool_size
        return (height, width, p, channels // p), (height * p, width * q, channels // (p * q))
