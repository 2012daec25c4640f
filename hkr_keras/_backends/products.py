"""In which precision products of matrices are computed."""

import sys
from typing import Any

import keras

__all__ = ["products_are_exact"]


def products_are_exact(x: Any) -> bool:
    """Whether a product of a tensor with a matrix of zeros and ones only copies and adds its numbers.

    On accelerators products of float32 may round their factors to TF32; PyTorch may be told to round them to bfloat16
    on a CPU too.

    Example:

    >>> bool(products_are_exact(keras.ops.ones((2, 2)))) == products_are_exact(keras.ops.ones((1, 1)))
    True
    """
    if keras.backend.backend() == "torch":
        device = getattr(x, "device", None)  # symbolic tensors have none
        return str(device or "cpu") in ("cpu", "meta") and (
            sys.modules["torch"].get_float32_matmul_precision() == "highest"
        )
    return all(device.startswith("cpu") for device in keras.distribution.list_devices())
