"""Convolutions on a circle: of an input that is continued periodically, without padding."""

import inspect
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from hkr_keras.layers.base import Layer, LipschitzLayer, PlainLayers, keras_class

__all__ = ["CircularConv", "CircularConvolution"]

Tensor = Any


def wrap(x: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Continues an axis periodically: the last `before` entries in front, the first `after` ones behind.

    Args:
        x: tensor with a static size along `axis`, at least `before` and `after`.
        axis: the axis.
        before: entries to add in front.
        after: entries to add behind.

    Returns:
        Tensor of the same dtype.

    Example:

    >>> ops.convert_to_numpy(wrap(ops.array([1, 2, 3]), axis=0, before=2, after=1)).tolist()
    [2, 3, 1, 2, 3, 1]
    """
    size = x.shape[axis]
    front = (slice(None),) * axis
    parts = [x[(*front, slice(size - before, size))]] if before else []
    parts += [x, x[(*front, slice(0, after))]] if after else [x]
    return ops.concatenate(parts, axis=axis) if len(parts) > 1 else x


class CircularConvolution(LipschitzLayer):
    """Mixin before a convolution of Keras: `padding` may be `"circular"`. Transposed ones say more below.

    On a circle whose length the strides divide, the singular values are among those on all of `Z^d`, since periodic
    signals are limits of long ones; so every bound for all sizes holds, and for windows longer than the circle too.
    """

    kernel_size: Any
    strides: Any
    dilation_rate: Any
    data_format: Any
    activation: Any

    def __init__(self, *args: Any, **kwargs: Any):
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        circular = str(given.arguments.get("padding")).lower() == "circular"
        if circular:  # for Keras, a convolution without padding of an input that is continued first
            given.arguments["padding"] = "valid"
        super().__init__(*given.args, **given.kwargs)
        self.circular = circular

    def axes(self) -> range:
        """Axes of the inputs along which the window runs."""
        start = 1 if self.data_format == "channels_last" else 2
        return range(start, start + len(self.kernel_size))

    def circle(self, shape: Any) -> tuple[list[int], list[int]]:
        """Cells to add before and after, so that without padding the output has size `size / strides`."""
        sizes = zip(self.kernel_size, self.strides, self.dilation_rate, strict=True)
        total = [max(d * (k - 1) + 1 - s, 0) for k, s, d in sizes]
        self._check_circle(shape, [t - t // 2 for t in total], self.strides)
        return [t // 2 for t in total], [t - t // 2 for t in total]

    def _check_circle(self, shape: Any, lengths: Sequence[int], multiples: Sequence[int]) -> None:
        for axis, least, multiple in zip(self.axes(), lengths, multiples, strict=True):
            size = shape[axis]
            if size is None or size < least or size % multiple:
                raise ValueError(
                    f"Expected {type(self).__name__} '{self.name}' with padding='circular' to receive inputs of "
                    f"known size, at least {least} and a multiple of {multiple}. Received: shape={tuple(shape)}"
                )

    def continued(self, inputs: Tensor) -> Tensor:
        """The input, on a circle with what a convolution without padding needs at its ends."""
        if not self.circular:
            return inputs
        before, after = self.circle(inputs.shape)
        for axis, left, right in zip(self.axes(), before, after, strict=True):
            inputs = wrap(inputs, axis, left, right)
        return inputs

    def cut(self, outputs: Tensor, shape: Any) -> Tensor:
        """The output of a circular layer out of that convolution, for inputs of a shape."""
        return outputs

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Layer | Tensor:
        """The layer with its kernel stored; on a circle, without padding on an input that is continued first."""
        if not self.circular:
            return super().as_keras(new, *inputs)
        (x,) = inputs
        plain = new.alike(keras_class(self), self.stored(), padding="valid", activation=None)
        return new(keras.layers.Activation, self.activation)(self.cut(plain(self.continued(x)), x.shape))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()  # type: ignore[misc]
        return {**config, "padding": "circular"} if self.circular else config


class CircularConv(CircularConvolution):
    """Mixin before a convolution that is not transposed."""

    def call(self, inputs: Tensor) -> Tensor:
        return super().call(self.continued(inputs))  # type: ignore[misc]

    def continued_shape(self, shape: Any) -> tuple[int | None, ...]:
        """The shape of `continued(inputs)`, from that of the inputs."""
        sizes = list(shape)
        if self.circular:
            for axis, before, after in zip(self.axes(), *self.circle(shape), strict=True):
                sizes[axis] += before + after
        return tuple(sizes)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return super().compute_output_shape(self.continued_shape(input_shape))  # type: ignore[misc]
