"""Activations that keep the norm of the gradient: they permute or reflect channels, and never shrink."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from hkr_keras._backends.products import products_are_exact
from hkr_keras._registration import registered
from hkr_keras.layers.base import PlainLayers

__all__ = ["ChannelLayer", "FullSort", "GroupSort", "Householder", "MaxMin"]

Tensor = Any

_MATRIX_CHANNELS = 64  # up to here a product with a constant matrix is cheap


def _group_sort(x: Tensor, n: int = 2, axis: int = -1) -> Tensor:
    """Sorts groups of `n` neighbouring channels in ascending order.

    Args:
        x: floating point tensor; the static size of `axis` is a multiple of `n`.
        n: channels in a group.
        axis: the channel axis.

    Returns:
        Tensor of the same shape and dtype.

    Example:

    >>> ops.convert_to_numpy(_group_sort(ops.array([[3.0, 1.0, 2.0, 4.0]]))).tolist()
    [[1.0, 3.0, 2.0, 4.0]]

    Reference:
        Anil et al., ICML 2019 (arXiv 1811.05381), section 4.2.
    """
    axis = axis % len(x.shape)
    channels = x.shape[axis]
    shape = tuple(ops.shape(x))
    if n == 2 and axis == len(x.shape) - 1:
        width = _matrix_width(x, channels)
        if width == channels:
            return _sort_pairs_by_matrix(x, width)
        if width:
            return ops.reshape(_sort_pairs_by_matrix(ops.reshape(x, (-1, width)), width), shape)
    groups = ops.reshape(x, (*shape[:axis], channels // n, n, *shape[axis + 1 :]))
    if n == 2:
        first, second = ops.unstack(groups, axis=axis + 1)
        excess = ops.relu(first - second)
        groups = ops.stack([first - excess, second + excess], axis=axis + 1)
    else:
        groups = ops.sort(groups, axis=axis + 1)
    return ops.reshape(groups, shape)


def _pair_differences(channels: int) -> np.ndarray:
    """The matrix `(channels, channels / 2)` that takes the difference of every pair of neighbours."""
    identity, even = np.eye(channels, dtype="float32"), np.arange(channels) % 2 == 0
    return identity[:, even] - identity[:, ~even]


def _sort_pairs_by_matrix(x: Tensor, channels: int) -> Tensor:
    """`x + relu(x D) S`: D takes the difference of every pair, S hands the excess over.

    The matrices hold 0, 1 and -1, so all that is rounded is one difference and one sum.
    """
    difference = _pair_differences(channels)
    excess = ops.relu(ops.matmul(x, ops.convert_to_tensor(difference, dtype=x.dtype)))
    return x + ops.matmul(excess, ops.convert_to_tensor(-difference.T, dtype=x.dtype))


def _matrix_width(x: Tensor, channels: int) -> int:
    """How many channels at once are sorted by products with matrices, where these are fastest; 0 where they are not.

    On an accelerator, such a product may run at reduced precision (TF32), so that it is no way to copy numbers.
    """
    if not products_are_exact(x):
        return 0
    if channels <= _MATRIX_CHANNELS:
        return channels
    width = math.gcd(channels, 32)
    return width if keras.backend.backend() == "tensorflow" and width >= 8 else 0


def _householder(x: Tensor, angles: Tensor, axis: int = -1) -> Tensor:
    """Reflects the pairs of channels `(i, i + channels / 2)` that lie on one side of a line through 0.

    With `a, b` the pair and `t` its angle: `(a, b)` where `a sin(t/2) > b cos(t/2)`, else
    `(a cos t + b sin t, a sin t - b cos t)`. The function is continuous and keeps norms.

    Args:
        x: floating point tensor with an even static number of channels.
        angles: tensor `(channels / 2,)`, in radians.
        axis: the channel axis.

    Returns:
        Tensor of the same shape and dtype.

    Reference:
        Singla, Singla and Feizi, ICLR 2022 (arXiv 2108.04062), section 4.
    """
    a, b = ops.split(x, 2, axis=axis)
    shape = [1] * len(x.shape)
    shape[axis] = -1
    t = ops.cast(ops.reshape(angles, shape), x.dtype)
    sine, cosine = ops.sin(t / 2), ops.cos(t / 2)
    beyond = 2.0 * ops.relu(b * cosine - a * sine)  # twice the distance from the line, on the far side
    return ops.concatenate([a + beyond * sine, b - beyond * cosine], axis=axis)


class ChannelLayer(keras.layers.Layer):
    """A layer that acts along one axis of known size and keeps the shape."""

    group = 2

    def __init__(self, axis: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        first = keras.config.image_data_format() == "channels_first"
        self.axis = (1 if first else -1) if axis is None else axis  # stored, so that a file means the same anywhere
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        channels = input_shape[self.axis]
        if self.axis % len(input_shape) == 0:
            raise ValueError(f"Expected a channel axis, not the batch. Received: axis={self.axis}")
        if channels is None or channels % self.group:
            raise ValueError(
                f"Expected {type(self).__name__} '{self.name}' to receive a number of channels that is known and "
                f"a multiple of {self.group}. Received: input_shape={tuple(input_shape)}, axis={self.axis}"
            )
        self.input_spec = keras.layers.InputSpec(axes={self.axis: channels})
        self.built = True

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """What stands for the layer along the last axis, to which its axis is moved and back."""
        (x,) = inputs
        axis, rank = self.axis % len(x.shape), len(x.shape)
        if axis == rank - 1:
            return self._as_keras(new, x)
        there = [i for i in range(1, rank) if i != axis] + [axis]
        back = [there.index(i) + 1 for i in range(1, rank)]
        return new(keras.layers.Permute, back)(self._as_keras(new, new(keras.layers.Permute, there)(x)))

    def _as_keras(self, new: PlainLayers, x: Tensor) -> Tensor:
        raise NotImplementedError

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}


def _reflected(new: PlainLayers, x: Tensor, normals: np.ndarray, factor: float) -> Tensor:
    """`x - factor relu(x N) N^T` in Dense layers: reflects what lies beyond a line, for every pair of channels."""
    beyond = new(keras.layers.Dense, normals.shape[1], activation="relu", use_bias=False, weights=[normals])(x)
    back = new(keras.layers.Dense, x.shape[-1], use_bias=False, weights=[-factor * normals.T])(beyond)
    return new(keras.layers.Add)([x, back])


@registered
class GroupSort(ChannelLayer):
    """Sorts groups of `n` neighbouring channels; keeps norms of inputs and gradients.

    `GroupSort(2)` is the usual replacement of ReLU: networks of orthonormal layers and GroupSort can
    approximate every 1-Lipschitz function, those with ReLU cannot.

    Args:
        n: channels in a group, at least 2. The number of channels must be a multiple of it.
        axis: the channel axis; `None` for that of `keras.config.image_data_format()`: 1 or -1.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: any, the same.

    Raises:
        ValueError: for a group below 2 (at once) or a number of channels that does not divide (in `build`).

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> np.asarray(keras.ops.convert_to_numpy(hkr.layers.GroupSort(2)(np.array([[3.0, 1.0, 2.0, 4.0]])))).tolist()
    [[1.0, 3.0, 2.0, 4.0]]

    Reference:
        Anil et al., ICML 2019 (arXiv 1811.05381), section 4.2.
    """

    def __init__(self, n: int = 2, axis: int | None = None, **kwargs: Any):
        if not isinstance(n, int) or n < 2:
            raise ValueError(f"Expected the group size to be an integer of at least 2. Received: n={n}")
        super().__init__(axis=axis, **kwargs)
        self.n = self.group = n

    def call(self, inputs: Tensor) -> Tensor:
        return _group_sort(inputs, self.n, self.axis)

    def _as_keras(self, new: PlainLayers, x: Tensor) -> Tensor:
        *sizes, channels = x.shape[1:]
        if self.n == 2 and channels <= _MATRIX_CHANNELS:
            return _reflected(new, x, _pair_differences(channels), 1.0)
        if None in sizes:
            raise ValueError(f"Expected inputs of known size to convert '{self.name}'. Received: shape={x.shape}")
        groups = new(keras.layers.Reshape, (*sizes, channels // self.n, self.n))(x)
        if self.n == 2:
            ends = [extreme(groups, axis=-1, keepdims=True) for extreme in (ops.min, ops.max)]
            groups = new(keras.layers.Concatenate)(ends)
        else:
            groups = ops.sort(groups, axis=-1)
        return new(keras.layers.Reshape, (*sizes, channels))(groups)

    def get_config(self) -> dict[str, Any]:
        return {"n": self.n, **super().get_config()}


@registered
class MaxMin(ChannelLayer):
    """The larger and the smaller of the channels `i` and `i + channels / 2`, in that order.

    The same function as `GroupSort(2)` up to the order of channels, in the layout of the orthogonal
    convolution papers; often a little faster, since halves are cheap to address.

    Args:
        axis: the channel axis; `None` for that of `keras.config.image_data_format()`: 1 or -1.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: any, the same; an even number of channels.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> keras.ops.convert_to_numpy(hkr.layers.MaxMin()(np.array([[3.0, 1.0, 2.0, 4.0]]))).tolist()
    [[3.0, 4.0, 2.0, 1.0]]

    Reference:
        Singla and Feizi, ICML 2021 (arXiv 2105.11417), section 5.
    """

    def call(self, inputs: Tensor) -> Tensor:
        first, second = ops.split(inputs, 2, axis=self.axis)
        excess = ops.relu(second - first)  # whose gradient costs a tenth of that of a maximum
        return ops.concatenate([first + excess, second - excess], axis=self.axis)

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """The larger and the smaller of the two halves."""
        pair = ops.split(inputs[0], 2, axis=self.axis)
        return new(keras.layers.Concatenate, axis=self.axis)(
            [new(keras.layers.Maximum)(pair), new(keras.layers.Minimum)(pair)]
        )


@registered
class FullSort(ChannelLayer):
    """Sorts all channels in ascending order: `GroupSort` with one group.

    Args:
        axis: the channel axis; `None` for that of `keras.config.image_data_format()`: 1 or -1.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: any, the same.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> keras.ops.convert_to_numpy(hkr.layers.FullSort()(np.array([[3.0, 1.0, 2.0]]))).tolist()
    [[1.0, 2.0, 3.0]]

    Reference:
        Anil et al., ICML 2019 (arXiv 1811.05381), section 4.2.
    """

    group = 1

    def call(self, inputs: Tensor) -> Tensor:
        return ops.sort(inputs, axis=self.axis)

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """The operation of Keras."""
        return ops.sort(inputs[0], axis=self.axis)


@registered
class Householder(ChannelLayer):
    """Trainable reflections of pairs of channels; starts as `MaxMin`.

    Args:
        axis: the channel axis; `None` for that of `keras.config.image_data_format()`: 1 or -1.
        theta_initializer: of the angles, one for each pair of channels; `None` for pi / 2.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: any, the same; an even number of channels.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> keras.ops.convert_to_numpy(hkr.layers.Householder()(np.array([[3.0, 1.0]], "float32"))).round(5).tolist()
    [[3.0, 1.0]]

    Reference:
        Singla, Singla and Feizi, ICLR 2022 (arXiv 2108.04062), section 4.
    """

    def __init__(self, axis: int | None = None, theta_initializer: Any = None, **kwargs: Any):
        super().__init__(axis=axis, **kwargs)
        given = keras.initializers.get(theta_initializer)
        self.theta_initializer = keras.initializers.Constant(math.pi / 2) if given is None else given

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        shape = (input_shape[self.axis] // 2,)
        self.angles = self.add_weight(name="angles", shape=shape, initializer=self.theta_initializer)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "theta_initializer": keras.initializers.serialize(self.theta_initializer)}

    def call(self, inputs: Tensor) -> Tensor:
        return _householder(inputs, self.angles, self.axis)

    def _as_keras(self, new: PlainLayers, x: Tensor) -> Tensor:
        half = ops.convert_to_numpy(self.angles) / 2
        return _reflected(new, x, np.concatenate([np.diag(-np.sin(half)), np.diag(np.cos(half))]), 2.0)
