"""Compiles a function of tensors, or a model, to one program, and tells whether a tensor belongs to such a program.

Imports backends, inside its functions: Keras compiles only what its own training and prediction run.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import keras

__all__ = ["at_inference", "branch", "compiled", "in_one_go", "is_traced", "predictor", "settle"]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
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

        # TensorFlow warns of retracing by the code of a function, as if those of several models were one; but a partial
        # function has no code and is counted by itself.
        return tf.function(functools.partial(function), autograph=False, reduce_retracing=True)
    if backend == "jax":
        import jax

        return jax.jit(function)
    return function


def in_one_go(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, on JAX as one program, where each operation by itself costs a third of a millisecond.

    Args:
        function: pure, of a module: it is compiled once for all shapes and settings that it is given.
        *arguments: tensors, `None`, and settings, which are hashable.

    Example:

    >>> float(in_one_go(keras.ops.add, keras.ops.array(1.0), 2))
    3.0
    """
    if keras.backend.backend() != "jax":
        return function(*arguments)
    import jax

    return _program(function, tuple(i for i, each in enumerate(arguments) if not isinstance(each, jax.Array)))(
        *arguments
    )


@functools.cache
def _program(function: Callable[..., Any], settings: tuple[int, ...]) -> Callable[..., Any]:
    import jax

    return jax.jit(function, static_argnums=settings)


def at_inference(model: keras.Model) -> dict[str, bool]:
    """The argument `training=False` for a model whose `call` takes it: `stateless_call` passes every argument on.

    Example:

    >>> at_inference(keras.Sequential([keras.Input((2,))]))
    {'training': False}
    """
    return {"training": False} if "training" in inspect.signature(model.call).parameters else {}


def predictor(model: keras.Model) -> Callable[[Any], Any]:
    """The model at inference as one program, which reads the present weights and does not keep the model alive.

    A program is made once for each shape of the inputs. It is that of the layers and numbers which the model had then:
    whoever keeps a predictor must make another one when these change.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> predict = predictor(model)
    >>> keras.ops.convert_to_numpy(predict(keras.ops.ones((1, 2)))).tolist()
    [[2.0]]
    """
    reference, backend = weakref.ref(model), keras.backend.backend()

    def present() -> keras.Model:
        return reference()

    if backend == "jax":  # variables are read outside, since JAX takes them for constants inside
        inference = at_inference(model)
        call = compiled(lambda own, others, x: present().stateless_call(own, others, x, **inference)[0])

        def predict(x: Any) -> Any:
            variables = present().trainable_variables, present().non_trainable_variables
            return call(*([variable.value for variable in each] for each in variables), x)

        return predict
    if backend == "torch":
        import torch

        def without_gradients(x: Any) -> Any:
            with torch.no_grad():
                return present()(x, training=False)

        return without_gradients
    return compiled(lambda x: present()(x, training=False))


def is_traced(tensor: Any) -> bool:
    """Whether a tensor stands for values that are not known yet, because a program is being traced or compiled.

    Example:

    >>> is_traced(keras.ops.ones(3)), is_traced(keras.Input((3,)))
    (False, True)
    """
    if isinstance(tensor, keras.KerasTensor):
        return True
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.is_symbolic_tensor(tensor)
    if backend == "jax":
        import jax

        return isinstance(tensor, jax.core.Tracer)
    import torch

    return torch.compiler.is_compiling() or getattr(tensor, "is_meta", False)


def branch(condition: Any, if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    """`ops.cond`, which runs one function alone where the value is at hand: JAX would compile both anew in every call.

    Example:

    >>> branch(keras.ops.array(1) > 0, lambda: "positive", lambda: "not")
    'positive'
    """
    if is_traced(condition):
        return keras.ops.cond(condition, if_true, if_false)
    return if_true() if bool(keras.ops.convert_to_numpy(condition)) else if_false()


def settle(variables: list[keras.Variable]) -> None:
    """Ties the values of variables to the device they are on, on JAX without a distribution.

    A step that reads a mutable array (`parameters.Parameter`) returns its values tied to a device. A step that was
    compiled for others, such as those of fresh variables and of metrics after a reset, would be compiled once more.

    Example:

    >>> settle([keras.Variable(1.0)])
    """
    if keras.backend.backend() != "jax" or keras.distribution.distribution() is not None:
        return
    import jax

    if not hasattr(jax, "new_ref"):
        return
    for variable in variables:
        if not variable.value.committed:
            variable.assign(jax.device_put(variable.value, variable.value.device))
