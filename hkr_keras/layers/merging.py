"""Residual connections and scaling."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from hkr_keras._registration import registered
from hkr_keras.layers.base import Layer, PlainLayers

__all__ = ["LipschitzResidual", "Scale"]

Tensor = Any


@registered
class LipschitzResidual(keras.layers.Layer):
    """A trainable convex combination of branches: the residual connection that keeps a constant of 1.

    `sum_i w_i x_i` with `w = softmax(weights)`. If every branch is 1-Lipschitz in a common input, so is the
    result, where `keras.layers.Add` would have constant 2. Masks go on as in `keras.layers.Add`.

    Args:
        **kwargs: of `keras.layers.Layer`.

    Input: a list of at least two tensors of equal shape. Output: one tensor of that shape.

    Raises:
        ValueError: for fewer than two inputs, or inputs of different shapes.

    Example:

    >>> import hkr_keras as hkr
    >>> x = keras.Input((8,))
    >>> branch = hkr.layers.GroupSort(2)(hkr.layers.LipschitzDense(8)(x))
    >>> model = keras.Model(x, hkr.layers.LipschitzResidual()([x, branch]))
    >>> bool(hkr.lipschitz_bound(model) < 1 + 1e-6)
    True
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.supports_masking = True

    def compute_mask(self, inputs: Sequence[Tensor], mask: Sequence[Tensor | None] | None = None) -> Tensor | None:
        """As in the merging layers of Keras: what counts in some branch counts, if every branch has a mask."""
        if mask is None or any(each is None for each in mask):
            return None
        return functools.reduce(ops.logical_or, mask)

    def build(self, input_shape: Any) -> None:
        shapes = [tuple(shape) for shape in input_shape if isinstance(shape, (tuple, list))]
        if len(shapes) < 2 or any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise ValueError(
                f"Expected LipschitzResidual '{self.name}' to receive a list of at least two tensors of equal "
                f"shape. Received: input_shape={input_shape}"
            )
        self.mixing_logits = self.add_weight(name="mixing_logits", shape=(len(shapes),), initializer="zeros")
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        weights = ops.cast(ops.softmax(self.mixing_logits), inputs[0].dtype)
        return sum(weights[i] * x for i, x in enumerate(inputs))

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """A sum of scaled branches."""
        weights = ops.convert_to_numpy(ops.softmax(self.mixing_logits)).tolist()
        return new(keras.layers.Add)(
            [new(keras.layers.Rescaling, weight)(x) for weight, x in zip(weights, inputs, strict=True)]
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape[0]


@registered
class Scale(keras.layers.Layer):
    """Multiplies by a constant: the one place where a network gets a Lipschitz constant other than 1.

    Args:
        k: the factor, a finite number other than 0.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: any, the same.

    Raises:
        ValueError: for a factor that is 0 or not finite.

    Example:

    >>> import hkr_keras as hkr
    >>> hkr.lipschitz_bound(hkr.layers.Scale(2.5))
    2.5
    """

    def __init__(self, k: float = 1.0, **kwargs: Any):
        if not isinstance(k, (int, float)) or not math.isfinite(k) or k == 0:
            raise ValueError(f"Expected the factor to be a finite number other than 0. Received: k={k}")
        super().__init__(**kwargs)
        self.k = float(k)
        self.supports_masking = True

    def call(self, inputs: Tensor) -> Tensor:
        return ops.cast(inputs, self.compute_dtype) * ops.cast(self.k, self.compute_dtype)

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Layer:
        """The same layer of Keras."""
        return new.alike(keras.layers.Rescaling, scale=self.k, offset=0.0)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "k": self.k}
