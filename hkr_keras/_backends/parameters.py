"""Numbers that compiled steps read anew in every step.

Imports a backend, inside its functions: JAX takes for a constant whatever a compiled function does not receive as an
argument, and a loss of Keras receives labels and predictions only.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from hkr_keras._backends.compiling import is_traced

Tensor = Any


class Parameter(keras.Variable):
    """A scalar Keras variable for which `read` returns the present value in compiled steps too, on every backend.

    TensorFlow and PyTorch read variables when a step runs. JAX reads them when a step is compiled; so mutable arrays
    (`jax.new_ref`) follow the variable there, one on the devices of each distribution under which it is read, or, in
    versions of JAX without them, the step asks the host.

    Args:
        value: the first number.
        check: function that returns a valid number as a float, and raises `ValueError` for any other.
        name: of the variable.
        dtype: of the variable.

    Example:

    >>> parameter = Parameter(0.1, float, "margin")
    >>> _ = parameter.assign(0.2)
    >>> parameter.number
    0.2
    """

    def __init__(self, value: Any, check: Callable[[Any], float], name: str, dtype: str = "float32") -> None:
        value = check(value)
        super().__init__(value, trainable=False, name=name, dtype=dtype)
        self._check, self._number = check, value
        self._references: dict[Any, Any] = {}
        if keras.backend.backend() == "jax":
            self.read()  # a mutable array that a transformation makes may not leave it

    @property
    def number(self) -> float:
        """The present value as a Python number: what was assigned, not what float32 makes of it."""
        if self._number is None:  # assigned inside a compiled program
            self._number = float(str(np.asarray(ops.convert_to_numpy(self.value))[()]))
        return self._number

    def assign(self, value: Any) -> Any:
        """Sets the value, after checking it where it can be seen.

        Raises:
            ValueError: for a number that the parameter cannot have.
        """
        if is_traced(value):
            self._number = None
            return super().assign(value)
        if not isinstance(value, float | int | str):
            value = np.asarray(ops.convert_to_numpy(value)).item()
        self._number = self._check(value)
        result = super().assign(self._number)
        for reference in self._references.values():
            reference[...] = np.asarray(self._number, self.dtype)
        return result

    def read(self) -> Tensor:
        """The present value as a tensor, in a compiled program the one at the time when the program runs."""
        if keras.backend.backend() != "jax":
            return ops.convert_to_tensor(self.value)
        import jax

        if not hasattr(jax, "new_ref"):
            return jax.pure_callback(lambda: np.asarray(self.number, self.dtype), jax.ShapeDtypeStruct((), self.dtype))
        distribution = keras.distribution.distribution()
        if distribution not in self._references:
            with jax.ensure_compile_time_eval():
                value = jax.numpy.asarray(self.number, self.dtype)
                if distribution is not None:
                    layout = keras.distribution.TensorLayout((), distribution.device_mesh)
                    value = keras.distribution.distribute_tensor(value, layout)
                self._references[distribution] = jax.new_ref(value)
        return self._references[distribution][...]
