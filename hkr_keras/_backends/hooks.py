"""Functions that PyTorch runs before or after the forward pass of a module, as every Keras layer is one there."""

import sys
from typing import Any

import keras

__all__ = ["has_hooks"]

# PyTorch has no public way to ask for them.
_OF_A_MODULE = ("_forward_hooks", "_forward_pre_hooks")
_OF_ALL_MODULES = ("_global_forward_hooks", "_global_forward_pre_hooks")


def has_hooks(layer: Any) -> bool:
    """Whether forward hooks are set for a layer, or for all modules.

    Example:

    >>> has_hooks(keras.layers.Dense(2))
    False
    """
    if keras.backend.backend() != "torch":
        return False
    modules = vars(sys.modules["torch.nn.modules.module"])
    return any(modules[name] for name in _OF_ALL_MODULES) or any(getattr(layer, name, None) for name in _OF_A_MODULE)
