"""Models as functions of their inputs: gradients, and the point of a segment where a prediction changes.

Imports backends, inside its functions: Keras has no public way to differentiate with respect
to an input that works on TensorFlow, JAX and PyTorch.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from hkr_keras._backends.compiling import at_inference, compiled


def as_function(model: Any) -> Callable:
    """The model at inference as a function of one tensor, compiled where that is faster; it reads the present weights.

    Raises:
        ValueError: for a model that is not built, or has several inputs or outputs.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    >>> as_function(model)(ops.ones((5, 2))).shape == (5, 3)
    True
    """
    if not model.built or len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"Expected a built model with one input and one output. Received: model '{model.name}', "
            f"built={model.built}"
            + (f" with {len(model.inputs)} inputs and {len(model.outputs)} outputs" if model.built else "")
        )
    if keras.backend.backend() != "jax":
        return compiled(lambda x: model(x, training=False))
    inference = at_inference(model)
    call = compiled(lambda trainable, others, x: model.stateless_call(trainable, others, x, **inference)[0])

    def function(x: Any) -> Any:  # variables are read here, since JAX takes them for constants inside
        return call([v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables], x)

    return function


def input_gradient(model: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The gradient of a weighted sum of the outputs with respect to the inputs, as a function of both.

    Args:
        model: a built model with one input and one output `(n, outputs)` or `(n,)`.

    Returns:
        A function of `x` `(n, ...)` and `weights` `(n, outputs)`, whose row i is the gradient of
        `sum over j of weights[i, j] f_j(x_i)`, float32 of the shape of x. It may be called again after training.

    Raises:
        ValueError: as `as_function`.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> input_gradient(model)(np.zeros((1, 2)), np.ones((1, 1))).tolist()
    [[1.0, 1.0]]
    """
    function, backend = as_function(model), keras.backend.backend()

    def total(x: Any, weights: Any) -> Any:
        return ops.sum(ops.reshape(function(x), weights.shape) * weights)

    if backend == "jax":
        import jax

        differentiate = jax.grad(total)
    elif backend == "tensorflow":
        import tensorflow as tf

        def differentiate(x: Any, weights: Any) -> Any:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                value = total(x, weights)
            return tape.gradient(value, x)
    else:
        import torch

        def differentiate(x: Any, weights: Any) -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(total(x.requires_grad_(True), weights), x)[0]

    def gradient(x: Any, weights: Any) -> Any:
        x, weights = (ops.convert_to_tensor(np.array(a, dtype=np.float32)) for a in (x, weights))
        return np.asarray(ops.convert_to_numpy(differentiate(x, weights)))

    return gradient


def in_batches(function: Callable, *arrays: Any, batch_size: int) -> np.ndarray:
    """The results of a function of arrays, one batch of rows at a time, joined."""
    starts = range(0, len(arrays[0]), batch_size)
    return np.concatenate([function(*(array[start : start + batch_size] for array in arrays)) for start in starts])


def first_change(changed: Callable[[np.ndarray], np.ndarray], x: Any, z: Any, steps: int = 20) -> np.ndarray:
    """Bisection between x and z: the points nearest to x at which a condition holds that holds at z.

    Args:
        changed: function of float32 inputs `(n, ...)` that returns `(n,)` booleans.
        x, z: `(n, ...)`, the ends of the segments.
        steps: halvings of the segment.

    Returns:
        `(n, ...)` float32, at which `changed` holds if it holds at z.

    Example:

    >>> first_change(lambda points: points[:, 0] > 0.5, np.zeros((1, 1)), np.ones((1, 1))).round(4).tolist()
    [[0.5]]
    """
    x = np.asarray(x, dtype=np.float64)
    move = np.asarray(z, dtype=np.float64) - x
    low, high = np.zeros(len(x)), np.ones(len(x))

    def at(share: Any) -> Any:
        return (x + np.reshape(share, (-1,) + (1,) * (x.ndim - 1)) * move).astype(np.float32)

    for _ in range(steps):
        middle = (low + high) / 2
        there = changed(at(middle))
        low, high = np.where(there, low, middle), np.where(there, middle, high)
    return np.where(np.reshape(high < 1, (-1,) + (1,) * (x.ndim - 1)), at(high), np.asarray(z, np.float32))
