"""Centring: subtracting a mean has constant 1, while dividing by a standard deviation has no finite constant."""

from typing import Any

import keras
from keras import ops

from hkr_keras._registration import registered
from hkr_keras.layers.base import Layer, PlainLayers

__all__ = ["BatchCentering", "LayerCentering"]

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


def _mean_of_steps(inputs: Tensor, axes: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """The mean over axes, of the steps that a mask `inputs.shape[:-1]` keeps."""
    if mask is None:
        return ops.mean(inputs, axis=axes)
    if len(mask.shape) != len(inputs.shape) - 1:
        raise ValueError(
            "Expected a mask with all axes of the inputs but the last. "
            f"Received: mask.shape={tuple(mask.shape)}, inputs.shape={tuple(inputs.shape)}"
        )
    kept = ops.broadcast_to(ops.expand_dims(ops.cast(mask, inputs.dtype), -1), ops.shape(inputs))
    return ops.sum(inputs * kept, axis=axes) / ops.maximum(ops.sum(kept, axis=axes), 1.0)


@registered
class BatchCentering(keras.layers.Layer):
    """Subtracts the mean of the batch in training and its moving average at inference, then adds a bias.

    `keras.layers.BatchNormalization` without the division. At inference it is a translation, constant 1. When a batch
    is in parts on several replicas, each subtracts the mean of its own part. Masked steps do not count in means, and
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
                f"Expected BatchCentering '{self.name}' to know the size of its axis. "
                f"Received: axis={self.axis}, input_shape={tuple(input_shape)}"
            )
        # An input of one channel would be broadcast to all of them.
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={self.axis % len(input_shape): size})
        self.moving_mean = self.add_weight(  # aggregation: of the replicas of tf.distribute
            name="moving_mean", shape=(size,), initializer="zeros", trainable=False, aggregation="mean"
        )
        if self.center:
            self.bias = self.add_weight(name="bias", shape=(size,), initializer="zeros")
        self.built = True

    def call(self, inputs: Tensor, training: Any = None, mask: Any = None) -> Tensor:
        rank = len(inputs.shape)
        axis = self.axis % rank
        shape = tuple(-1 if i == axis else 1 for i in range(rank))
        mean = ops.cast(self.moving_mean, inputs.dtype)
        if training and self.trainable:
            mean = _mean_of_steps(inputs, tuple(i for i in range(rank) if i != axis), mask)
            moving = self.moving_mean * self.momentum + ops.cast(mean, self.moving_mean.dtype) * (1 - self.momentum)
            self.moving_mean.assign(moving)
        shift = ops.cast(self.bias, inputs.dtype) - mean if self.center else -mean
        return inputs + ops.reshape(shift, shape)

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Layer:
        """A batch normalisation with a variance of 1."""
        mean = ops.convert_to_numpy(self.moving_mean)
        weights = [*([ops.convert_to_numpy(self.bias)] if self.center else []), mean, mean * 0 + 1]
        return new.alike(keras.layers.BatchNormalization, weights, epsilon=0.0, scale=False)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = {"axis": self.axis, "momentum": self.momentum, "center": self.center}
        return {**super().get_config(), **config}
