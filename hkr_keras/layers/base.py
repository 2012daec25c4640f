"""The one seam between this package and Keras's own layers."""

from typing import Any

from hkr_keras import constraints
from hkr_keras.geometry import weight_geometries


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

    def add_weight(self, *args, name=None, initializer=None, constraint=None, **kwargs):
        geometry = weight_geometries(self).get(name)
        if geometry is not None:
            if self.quantization_mode:
                self._refuse_quantization(self.quantization_mode)
            constraint = constraints.get(constraint).bind(geometry)
            initializer = constraint.after(initializer)
        return super().add_weight(  # type: ignore[misc]
            *args, name=name, initializer=initializer, constraint=constraint, **kwargs
        )

    def enable_lora(self, rank, *args, **kwargs):
        raise ValueError(
            f"Expected the kernel of {type(self).__name__} '{self.name}' to change through its constraint only; "
            "LoRA adds to it behind the constraint. Fine-tune the layer itself, or convert the model to plain "
            f"Keras layers first. Received: rank={rank}"
        )

    def quantize(self, mode=None, *args, **kwargs):
        self._refuse_quantization(mode)

    def _refuse_quantization(self, mode):
        raise ValueError(
            f"Expected the kernel of {type(self).__name__} '{self.name}' to stay in floating point: quantized "
            f"weights are off the constraint set and no bound here covers them. Received: mode={mode}"
        )
