"""One compiled predictor per model, which is compiled again only when the model has changed.

A compiled program holds the layers, configuration and plain numbers of the moment when it was compiled. A certificate
must not be about outdated ones: everything that a program can have read is compared before it is used again. Weights
are read by the program itself. Where a layer or function is not of Keras or of this package, nothing is known of what
it reads, and the program is compiled each time.
"""

import hashlib
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from hkr_keras._backends.compiling import predictor
from hkr_keras.certification.batches import structured

__all__ = ["Predictor", "fingerprint"]

_KNOWN = ("keras.", "hkr_keras.")  # whose code reads nothing but the attributes of its objects
_BACKENDS = ("jax", "tensorflow", "torch")
#: What no forward pass reads, and what training, saving and calling change.
_SKIPPED = {
    "build",
    "built",
    "compiled",
    "history",
    "jit_compile",
    "losses",
    "optimizer",
    "predict_function",
    "quantize",
    "run_eagerly",
    "stop_evaluating",
    "stop_predicting",
    "stop_training",
    "test_function",
    "train_function",
}
_PREDICTORS: weakref.WeakKeyDictionary[keras.Model, tuple[Any, Callable[[Any], Any]]] = weakref.WeakKeyDictionary()


class _Same:
    """Equal to what holds the same object: `is` in place of `==`."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = object.__hash__


class _UnknownCode(Exception):
    """A function that may read anything."""


def fingerprint(model: keras.Model) -> list[Any] | None:
    """All that a compiled program of the model can have read but the values of weights; `None` if that is not known.

    Example:

    >>> import hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.Scale(2.0)])
    >>> before = fingerprint(model)
    >>> before == fingerprint(model)
    True
    >>> model.layers[-1].k = 3.0
    >>> before == fingerprint(model)
    False
    """
    config = keras.config
    found: list[Any] = [config.floatx(), config.epsilon(), config.image_data_format()]
    found.append(_Same(keras.distribution.distribution()))
    try:
        _look_into(model, found, {id(model)})
    except _UnknownCode:
        return None
    return found


def _name(pair: tuple[str, Any]) -> str:
    return pair[0]


def _is_known(module: Any) -> bool:
    return str(module).startswith(_KNOWN) or module in ("keras", "hkr_keras")


def _look_into(thing: Any, found: list[Any], seen: set[int]) -> None:
    """The attributes of an object of Keras or this package, in a list."""
    cls = type(thing)
    found.append(cls.__name__)
    if isinstance(thing, keras.layers.Layer):
        if not _is_known(cls.__module__):
            raise _UnknownCode
        found.extend((_Same(cls.call), _Same(cls.__call__)))
    for name, value in sorted(vars(thing).items(), key=_name):
        if name.lstrip("_") in _SKIPPED or name.startswith(_VOLATILE):
            continue
        found.append(name)
        _look_at(value, found, seen)


#: Beginnings of names: bookkeeping of Keras, TensorFlow and PyTorch that grows while a model is used.
_VOLATILE = (
    "_inbound_nodes",
    "_outbound_nodes",
    "_self_",
    "_compile",
    "_eval",
    "_loss",
    "loss",
    "_metrics",
    "_optimizer",
    "_tracker",
    "_lock",
    "_call_context",
    "_jax_",
    "_called",
    "_saved",
    "_build_shapes_dict",
    "_obj_reference_counts",
)


def _look_at(value: Any, found: list[Any], seen: set[int]) -> None:  # noqa: PLR0912 one case per type
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        found.append(repr(value))
        return
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
        found.append((str(array.dtype), np.shape(value), hashlib.sha256(array.tobytes()).digest()))
        return
    if isinstance(value, keras.Variable):
        found.extend((_Same(value), tuple(value.shape), str(value.dtype), value.trainable))
        return
    if id(value) in seen:
        found.append("seen")
        return
    seen.add(id(value))
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        found.append((type(value).__name__, len(value)))
        parts: Iterable[Any] = value
        if isinstance(value, dict):
            parts = (part for pair in value.items() for part in pair)
        for part in parts:
            _look_at(part, found, seen)
        return
    found.append(_Same(getattr(value, "__func__", value)))  # a bound method would keep its object alive
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        if not _is_known(value.__module__):
            raise _UnknownCode
    elif isinstance(value, type):
        return
    elif _is_known(type(value).__module__):
        if hasattr(value, "__dict__"):
            _look_into(value, found, seen)
    elif callable(value) and not str(type(value).__module__).startswith(_BACKENDS):
        raise _UnknownCode


class Predictor:
    """Outputs of a model for batches of float32 arrays, by one compiled program that is shared between calls.

    Args:
        model: a built model.
        batch_size: of most batches.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> Predictor(model, 128)([np.ones((3, 2), "float32")]).tolist()
    [[2.0], [2.0], [2.0]]
    """

    def __init__(self, model: keras.Model, batch_size: int):
        distribution = keras.distribution.distribution()
        if (processes := getattr(distribution, "num_processes", 1)) > 1:  # predict would fail and lose the weights
            raise ValueError(
                "Expected a certificate to be computed by one process: call keras.distribution.set_distribution(None) "
                f"and certify a clone of the model with its weights. Received: num_processes={processes}"
            )
        self.model, self._batch_size, self._filled = model, batch_size, 0
        known, function = _PREDICTORS.get(model, (None, None))
        present = None if keras.backend.backend() == "torch" else fingerprint(model)  # nothing is compiled there
        if function is None or present is None or known != present:
            function = predictor(model)
            _PREDICTORS[model] = present, function
        self._function = function

    def __call__(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Outputs `(n, ...)`, float64. Batches are filled up, so that few shapes occur and few programs are made."""
        size = len(arrays[0])
        if keras.backend.backend() != "torch":
            filled = max(self._filled or min(1 << (size - 1).bit_length(), self._batch_size), size)
            self._filled, rows = filled, np.minimum(np.arange(filled), size - 1)
            arrays = arrays if filled == size else [array[rows] for array in arrays]
        tensors = [keras.ops.convert_to_tensor(array) for array in arrays]
        outputs = self._function(structured(self.model, tensors))
        if len(flat := keras.tree.flatten(outputs)) != 1:
            raise ValueError(f"Expected a model with one output. Received: {len(flat)} outputs")
        return np.asarray(keras.ops.convert_to_numpy(flat[0]), dtype=np.float64)[:size]
