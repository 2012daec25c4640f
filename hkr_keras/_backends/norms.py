"""Norms over windows, with a gradient of their own where that is faster.

Imports a backend, inside its functions: only PyTorch, which runs one operation after the other, gains by it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import keras

__all__ = ["tiled_norm"]

Tensor = Any


def tiled_norm(x: Tensor, window: Sequence[int], squared_floor: float) -> Tensor | None:
    """Norms over windows that tile the axes between the first and the last; `None` where there is nothing to gain.

    Args:
        x: `(batch, *sizes, channels)`.
        window: a divisor of every size.
        squared_floor: least square of a norm.

    Returns:
        Tensor `(batch, *(sizes / window), channels)` of the same dtype.

    Example:

    >>> norms = tiled_norm(keras.ops.array([[[3.0], [4.0]]]), (2,), 1e-24)
    >>> norms is None or keras.ops.convert_to_numpy(norms).tolist() == [[[5.0]]]
    True
    """
    sizes = x.shape[1:-1]
    if keras.backend.backend() != "torch" or isinstance(x, keras.KerasTensor):
        return None
    if any(n % k for n, k in zip(sizes, window, strict=True)):
        return None
    return _torch_function()(x, tuple(window), squared_floor)


@functools.cache
def _torch_function() -> Any:
    import torch

    class TiledNorm(torch.autograd.Function):
        """The root of the sum of squares; its gradient is `x / norm`, in one pass."""

        @staticmethod
        def forward(x: Any, window: tuple[int, ...], squared_floor: float) -> Any:
            squares = torch.square(x)
            for axis, k in enumerate(window, 1):
                front = (slice(None),) * axis
                squares = functools.reduce(torch.add, [squares[(*front, slice(i, None, k))] for i in range(k)])
            return squares.clamp(min=squared_floor).sqrt()

        @staticmethod
        def setup_context(context: Any, inputs: tuple, output: Any) -> None:
            context.save_for_backward(inputs[0], output)
            context.window = inputs[1]

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            x, norms = context.saved_tensors
            tiles, share = [x.shape[0]], gradient / norms
            for axis, k in enumerate(context.window):
                tiles += [norms.shape[axis + 1], k]
                share = share.unsqueeze(2 * axis + 2)
            return (x.reshape(*tiles, x.shape[-1]) * share).reshape(x.shape), None, None

    return TiledNorm.apply
