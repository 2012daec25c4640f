"""Mixins that turn kernel layers of Keras into Lipschitz layers."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import keras
from keras import ops

from hkr_keras import constraints
from hkr_keras.geometry import weight_geometries

__all__ = ["ComposedKernel", "LipschitzLayer", "PlainLayers"]

Tensor: TypeAlias = Any
Layer: TypeAlias = keras.layers.Layer


class PlainLayers(Protocol):
    """Makes the plain Keras layers that stand for a layer: the argument `new` of its method `as_keras(new, *inputs)`.

    `as_keras` returns one such layer that is not called yet, or, where it takes several, the output of them on
    symbolic inputs. `hkr_keras.conversion.to_keras` then gives all of them their weights.
    """

    def __call__(self, cls: type, *args: Any, weights: Sequence[Any] = (), **settings: Any) -> Any:
        """A frozen layer `cls(*args, **settings)` in the precision of the layer that it stands for."""

    def alike(self, cls: type, weights: Sequence[Any] = (), **changes: Any) -> Any:
        """A layer with the name of the one it stands for, and those of its settings that `cls` knows."""


def keras_class(layer: Layer) -> type:
    """The class of Keras that a layer of this package adds to.

    Example:

    >>> import hkr_keras as hkr
    >>> keras_class(hkr.layers.LipschitzDense(2)).__name__
    'Dense'
    """
    return next(cls for cls in type(layer).__mro__ if cls.__module__.startswith("keras."))


class LipschitzLayer:
    """Mixin, first base class: binds a constraint to every kernel (or factor of one) that `geometry.py` knows of.

    The Keras layer behind it keeps its constructor, its forward pass and its config.

    Raises:
        ValueError: in `build`, for a constraint of another library; for LoRA and for quantization.

    Example:

    >>> import keras, hkr_keras as hkr
    >>> class MyDense(hkr.layers.LipschitzLayer, keras.layers.Dense):
    ...     pass
    >>> layer = MyDense(4)
    >>> layer.build((None, 8))
    >>> bool(hkr.lipschitz_bound(layer) < 1 + 1e-6)
    True
    """

    name: Any
    quantization_mode: Any

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Adds the weights, those of an activation that is a layer too: Keras would add these in its first call."""
        super().build(input_shape)  # type: ignore[misc]
        activation = getattr(self, "activation", None)
        if isinstance(activation, keras.layers.Layer) and not activation.built:
            activation.build(self.compute_output_shape(input_shape))  # type: ignore[attr-defined]

    def add_weight(
        self, *args: Any, name: Any = None, initializer: Any = None, constraint: Any = None, **kwargs: Any
    ) -> Any:
        geometry = weight_geometries(self).get(name)
        if geometry is not None:
            if self.quantization_mode:
                self._refuse_quantization(self.quantization_mode)
            constraint = constraints.get(constraint).bind(geometry)
            initializer = constraint.initializer(initializer)
        return super().add_weight(  # type: ignore[misc]
            *args, name=name, initializer=initializer, constraint=constraint, **kwargs
        )

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Layer | Tensor:
        """What the layer is in plain Keras layers: see `PlainLayers`."""
        return new.alike(keras_class(self), self.stored())

    def stored(self) -> list[Any]:
        """The weights of the plain layer."""
        return self.get_weights()  # type: ignore[attr-defined]

    def enable_lora(self, rank: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"Expected the kernel of {type(self).__name__} '{self.name}' to change through its constraint only; "
            "LoRA adds to it behind the constraint. Fine-tune the layer itself, or convert the model to plain "
            f"Keras layers first. Received: rank={rank}"
        )

    def quantize(self, mode: Any = None, *args: Any, **kwargs: Any) -> None:
        self._refuse_quantization(mode)

    def _refuse_quantization(self, mode: Any) -> None:
        raise ValueError(
            f"Expected the kernel of {type(self).__name__} '{self.name}' to stay in floating point: quantized "
            f"weights are off the constraint set and no bound here covers them. Received: mode={mode}"
        )


class ComposedKernel(LipschitzLayer, keras.layers.Layer):
    """Mixin before a Keras layer with a kernel: here `kernel` is computed from the weights wherever it is read.

    So it cannot be out of date. The layer behind it keeps its constructor and its `build`, whose kernel `add_weight`
    replaces by weights of another name. The kernel is computed in at least float32, and then cast.
    """

    def compose(self) -> Any:
        """The kernel, from the weights."""
        raise NotImplementedError

    def operate(self, inputs: Any, kernel: Any) -> Any:
        """The linear part of the layer."""
        raise NotImplementedError

    @property
    def kernel(self) -> Any:
        """The kernel that the layer computes with, in float32 (or float64)."""
        if not self.built:
            raise AttributeError(
                "Expected a built layer, which has a kernel. "
                f"Received: {type(self).__name__} '{self.name}', built=False"
            )
        return self.compose()

    @kernel.setter
    def kernel(self, weight: Any) -> Any:
        """Keras stores here what `add_weight` made for it; these weights have attributes of their own."""

    def call(self, inputs: Any) -> Any:
        return self.with_kernel(inputs, self.kernel)

    def with_kernel(self, inputs: Any, kernel: Any) -> Any:
        """The outputs: the linear part, the bias and the activation."""
        if self.kernel_regularizer is not None:
            self.add_loss(self.kernel_regularizer(kernel))
        outputs = self.operate(inputs, ops.cast(kernel, self.compute_dtype))
        if self.use_bias:
            first = getattr(self, "data_format", None) == "channels_first"
            shape = (1, -1, *(1 for _ in outputs.shape[2:])) if first else (-1,)
            outputs = outputs + ops.reshape(self.bias, shape)
        return outputs if self.activation is None else self.activation(outputs)

    def stored(self) -> list[Any]:
        """The composed kernel and the bias."""
        return [ops.convert_to_numpy(weight) for weight in (self.kernel, self.bias) if weight is not None]

    def save_own_variables(self, store: Any) -> None:
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store: Any) -> None:
        keras.layers.Layer.load_own_variables(self, store)


def at_least_float32(weight: Any) -> Any:
    """A weight in the precision in which kernels are computed."""
    return ops.cast(weight, keras.backend.result_type(weight.dtype, "float32"))
