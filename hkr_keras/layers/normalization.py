"""Subtracting a mean, which has constant 1, and dividing by a deviation that is stored."""

import math
from typing import Any

import keras
from keras import ops

from hkr_keras._backends import replicas
from hkr_keras._registration import registered
from hkr_keras._validation import number
from hkr_keras.layers.base import Layer, PlainLayers, at_least_float32

__all__ = ["BatchCentering", "LayerCentering", "LipschitzBatchNormalization"]

Tensor = Any


@registered
class LayerCentering(keras.layers.Layer):
    """Subtracts the mean over `axis`, then adds a trainable bias: an orthogonal projection.

    `keras.layers.LayerNormalization` without the division, which has no finite Lipschitz constant.

    Args:
        axis: axis or axes of one mean, as in `keras.layers.LayerNormalization`.
        center: whether to add a bias, one number for each entry along `axis`.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: any, the same.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> keras.ops.convert_to_numpy(hkr.layers.LayerCentering()(np.array([[1.0, 3.0]], "float32"))).tolist()
    [[-1.0, 1.0]]
    """

    def __init__(self, axis: Any = -1, center: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.axis = axis if isinstance(axis, int) else tuple(axis)
        self.center = center
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        axes = {axis % len(input_shape) for axis in ((self.axis,) if isinstance(self.axis, int) else self.axis)}
        if 0 in axes:
            raise ValueError(f"Expected axes within one input, not the batch. Received: axis={self.axis}")
        if self.center:
            if any(input_shape[axis] is None for axis in axes):
                raise ValueError(
                    f"Expected the axes of LayerCentering '{self.name}' to be of known size, or center=False. "
                    f"Received: axis={self.axis}, input_shape={tuple(input_shape)}"
                )
            shape = tuple(size if i in axes else 1 for i, size in enumerate(input_shape))[1:]
            self.bias = self.add_weight(name="bias", shape=shape, initializer="zeros")
            self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={a: input_shape[a] for a in axes})
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        outputs = inputs - ops.mean(inputs, axis=self.axis, keepdims=True)
        return outputs + ops.cast(self.bias, outputs.dtype) if self.center else outputs

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """A difference, and an offset."""
        outputs = inputs[0] - ops.mean(inputs[0], axis=self.axis, keepdims=True)
        if not self.center:
            return outputs
        return new(keras.layers.Rescaling, 1.0, offset=ops.convert_to_numpy(self.bias).tolist())(outputs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis, "center": self.center}


def _mean_of_steps(values: Tensor, axes: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """The mean over axes and replicas, of the steps that a mask `values.shape[:-1]` keeps; in at least float32."""
    values = at_least_float32(values)
    if mask is None:
        shape = ops.shape(values)
        sums, count = ops.sum(values, axis=axes), ops.cast(math.prod(shape[axis] for axis in axes), values.dtype)
    elif len(mask.shape) != len(values.shape) - 1:
        raise ValueError(
            "Expected a mask with all axes of the inputs but the last. "
            f"Received: mask.shape={tuple(mask.shape)}, inputs.shape={tuple(values.shape)}"
        )
    else:
        kept = ops.broadcast_to(ops.expand_dims(ops.cast(mask, values.dtype), -1), ops.shape(values))
        sums, count = ops.sum(values * kept, axis=axes), ops.sum(kept, axis=axes)
    sums, counts = ops.unstack(replicas.total(ops.stack([sums, ops.broadcast_to(count, ops.shape(sums))])), 2)
    return sums / ops.maximum(counts, 1.0)


class _BatchLayer(keras.layers.Layer):
    """A layer with moving averages of the moments of batches, one mean for each entry along `axis`."""

    def __init__(self, axis: int = -1, momentum: float = 0.99, center: bool = True, **kwargs: Any):
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected momentum in [0, 1). Received: momentum={momentum}")
        super().__init__(**kwargs)
        self.axis = axis
        self.momentum = momentum
        self.center = center
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        size = input_shape[self.axis]
        if size is None:
            raise ValueError(
                f"Expected {type(self).__name__} '{self.name}' to know the size of its axis. "
                f"Received: axis={self.axis}, input_shape={tuple(input_shape)}"
            )
        # An input of one channel would be broadcast to all of them.
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={self.axis % len(input_shape): size})
        self.moving_mean = self._add_average("moving_mean", size, "zeros")
        self.built = True

    def _add_average(self, name: str, size: int, initializer: str) -> keras.Variable:
        return self.add_weight(  # aggregation: of the replicas of tf.distribute
            name=name, shape=(size,), initializer=initializer, trainable=False, autocast=False, aggregation="mean"
        )

    def _update(self, average: keras.Variable, value: Tensor) -> None:
        average.assign(average * self.momentum + ops.cast(value, average.dtype) * (1 - self.momentum))

    def _mean(self, values: Tensor, mask: Any) -> Tensor:
        """Of a batch, for each entry along the axis."""
        rank = len(values.shape)
        return _mean_of_steps(values, tuple(i for i in range(rank) if i != self.axis % rank), mask)

    def _centre(self, inputs: Tensor, training: Any, mask: Any) -> Tensor:
        """The means to subtract: those of the batch in training, which join the moving ones."""
        if not (training and self.trainable):
            return self.moving_mean
        mean = self._mean(inputs, mask)
        self._update(self.moving_mean, mean)
        return mean

    def _along_axis(self, numbers: Tensor, inputs: Tensor) -> Tensor:
        rank = len(inputs.shape)
        shape = tuple(-1 if i == self.axis % rank else 1 for i in range(rank))
        return ops.reshape(ops.cast(numbers, inputs.dtype), shape)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = {"axis": self.axis, "momentum": self.momentum, "center": self.center}
        return {**super().get_config(), **config}


@registered
class BatchCentering(_BatchLayer):
    """Subtracts the mean of the batch in training and its moving average at inference, then adds a bias.

    `keras.layers.BatchNormalization` without the division. At inference it is a translation, constant 1. When a batch
    is in parts on several replicas, the mean is that of the whole batch. Masked steps do not count in means, and
    masks go on, as in the layer of Keras.

    Args:
        axis: the axis that keeps its own means, usually the channels.
        momentum: of the moving average, in [0, 1).
        center: whether to add a trainable bias.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: any, the same.

    Raises:
        ValueError: for a momentum outside [0, 1), or an unknown size of `axis`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.BatchCentering()
    >>> keras.ops.convert_to_numpy(layer(np.array([[1.0], [3.0]], "float32"), training=True)).tolist()
    [[-1.0], [1.0]]
    """

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        if self.center:
            self.bias = self.add_weight(name="bias", shape=self.moving_mean.shape, initializer="zeros")

    def call(self, inputs: Tensor, training: Any = None, mask: Any = None) -> Tensor:
        mean = self._centre(inputs, training, mask)
        return inputs + self._along_axis(self.bias - mean if self.center else -mean, inputs)

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Layer:
        """A batch normalisation with a variance of 1."""
        mean = ops.convert_to_numpy(self.moving_mean)
        weights = [*([ops.convert_to_numpy(self.bias)] if self.center else []), mean, mean * 0 + 1]
        return new.alike(keras.layers.BatchNormalization, weights, epsilon=0.0, scale=False)


@registered
class LipschitzBatchNormalization(_BatchLayer):
    """`keras.layers.BatchNormalization` with one deviation for all channels, and a bound that is read from it.

    `gamma (x - mean) / sqrt(variance + epsilon) + beta`, where `variance` is the mean of the variances of all channels
    and `gamma` a number. A factor for all channels wastes nothing: behind an orthonormal layer its norm is exactly
    `|gamma| / sqrt(variance + epsilon)`, where factors of single channels would count with the largest of them. This is
    its constant, which `lipschitz_bound` reads from the weights: what is trained in units of inputs, such as a margin,
    wants it divided away again, and `Scale(1 / lipschitz_bound(model))` behind the model makes its constant 1.

    In training, means are those of the batch, and the deviation is the moving one, after the batch has joined it and
    without a gradient: inference divides by what training divided by. On several replicas all moments are those of
    the whole batch. Masked steps do not count in moments, and masks go on.

    Args:
        axis: the axis that keeps its own means, usually the channels.
        momentum: of the moving averages, in [0, 1).
        epsilon: added to the variance, above 0.
        center: whether to add `beta`, one number for each entry along `axis`.
        scale: whether to multiply by `gamma`, one number.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: any, the same.

    Raises:
        ValueError: for a momentum outside [0, 1), an epsilon that is not positive, or an unknown size of `axis`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.LipschitzBatchNormalization(momentum=0.0, epsilon=1e-9)
    >>> keras.ops.convert_to_numpy(layer(np.array([[1.0], [5.0]], "float32"), training=True)).tolist()
    [[-1.0], [1.0]]
    >>> round(hkr.lipschitz_bound(layer), 6)
    0.5
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        **kwargs: Any,
    ):
        super().__init__(axis=axis, momentum=momentum, center=center, **kwargs)
        self.epsilon = number("epsilon", epsilon, strict=True)
        self.scale = scale

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.moving_variance = self._add_average("moving_variance", 1, "ones")
        if self.scale:
            self.gamma = self.add_weight(name="gamma", shape=(1,), initializer="ones")
        if self.center:
            self.beta = self.add_weight(name="beta", shape=self.moving_mean.shape, initializer="zeros")

    def call(self, inputs: Tensor, training: Any = None, mask: Any = None) -> Tensor:
        outputs = inputs - self._along_axis(self._centre(inputs, training, mask), inputs)
        if training and self.trainable:
            squares = ops.square(at_least_float32(ops.stop_gradient(outputs)))
            self._update(self.moving_variance, ops.mean(self._mean(squares, mask), keepdims=True))
        factor = 1.0 / ops.sqrt(at_least_float32(self.moving_variance) + self.epsilon)
        factor = factor * at_least_float32(self.gamma) if self.scale else factor
        outputs = outputs * ops.cast(factor, outputs.dtype)
        return outputs + self._along_axis(self.beta, inputs) if self.center else outputs

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Layer:
        """The same layer of Keras, with equal numbers for all channels."""
        mean, variance = (ops.convert_to_numpy(each) for each in (self.moving_mean, self.moving_variance))
        weights = [ops.convert_to_numpy(self.gamma) + 0 * mean] if self.scale else []
        weights += [ops.convert_to_numpy(self.beta)] if self.center else []
        return new.alike(keras.layers.BatchNormalization, [*weights, mean, variance + 0 * mean])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon, "scale": self.scale}
