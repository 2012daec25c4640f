"""Means and sums over all replicas of a batch that is split over several devices: an all-reduce.

Imports backends, inside its function: Keras has no public collective operations.
"""

from typing import Any

import keras

Tensor = Any


def mean(tensor: Tensor, predictions: Tensor) -> Tensor:
    """The mean over all replicas of a tensor that every replica has; the tensor itself where there is one replica.

    No gradient flows through it. What counts as a replica:

    - TensorFlow: those of the strategy, inside `strategy.run`, which is where Keras computes its losses;
    - PyTorch: the processes of the default group, when the predictions require a gradient. Evaluation, which one
      process may do alone, exchanges nothing and so cannot wait for the others;
    - JAX: none, since arrays are global under `keras.distribution`, with several processes too.

    Args:
        tensor: of the same shape and dtype on all replicas.
        predictions: the tensor of the same loss that is differentiated.

    Returns:
        A tensor of the shape and dtype of `tensor`, equal on all replicas.

    Example:

    >>> float(mean(keras.ops.array(2.0), keras.ops.ones((3,))))
    2.0
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            return context.all_reduce(tf.distribute.ReduceOp.MEAN, tf.stop_gradient(tensor))
    elif backend == "torch":
        import torch

        group = torch.distributed
        several = group.is_available() and group.is_initialized() and group.get_world_size() > 1
        if several and torch.is_grad_enabled() and getattr(predictions, "requires_grad", False):
            total = tensor.detach().clone()
            group.all_reduce(total)
            return total / group.get_world_size()
    return tensor


def total(tensor: Tensor) -> Tensor:
    """The sum over all replicas of a tensor that every replica has in training; gradients flow through it.

    With the gradient of a sum: each replica gets the sum of what all of them ask for. Replicas are those of `mean`; on
    PyTorch, all processes of the default group have to take part, unless gradients are switched off.

    Args:
        tensor: of the same shape and dtype on all replicas.

    Returns:
        A tensor of that shape and dtype, equal on all replicas; the tensor itself where there is one replica.

    Example:

    >>> float(total(keras.ops.array(2.0)))
    2.0
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tensor)
    elif backend == "torch" and tensor.device.type != "meta":  # where Keras only asks for the shape
        import torch

        group = torch.distributed
        several = group.is_available() and group.is_initialized() and group.get_world_size() > 1
        if several and torch.is_grad_enabled():
            return _sum_over_processes(tensor)
    return tensor


def _sum_over_processes(tensor: Tensor) -> Tensor:
    import torch

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, own: Tensor) -> Tensor:
            summed = own.detach().clone(memory_format=torch.contiguous_format)
            torch.distributed.all_reduce(summed)
            return summed

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return Sum.forward(ctx, gradient)

    return Sum.apply(tensor)
