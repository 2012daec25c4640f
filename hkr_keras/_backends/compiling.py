"""One compiled program out of a function of tensors.

Imports backends, inside its function: Keras compiles only what its own training and prediction run.
"""

from collections.abc import Callable

import keras


def compiled(function: Callable) -> Callable:
    """A pure function of tensors, or of lists of them, as one program of TensorFlow or JAX; on PyTorch itself.

    On PyTorch a program would take seconds to make, and the products of matrices that this package runs outside of
    Keras's own loops are as fast without.

    Example:

    >>> double = compiled(lambda tensors: [2 * tensor for tensor in tensors])
    >>> float(double([keras.ops.array(1.5)])[0])
    3.0
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False, reduce_retracing=True)
    if backend == "jax":
        import jax

        return jax.jit(function)
    return function
