"""Inputs of a model in batches: from arrays, lists, dictionaries and iterables of batches, with or without labels."""

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from hkr_keras.certification.checks import check_model_shapes

__all__ = ["batches", "check_inputs", "structured", "to_float32", "yields_batches"]

Batch = tuple[list[np.ndarray], np.ndarray | None]


def batches(model: keras.Model, x: Any, batch_size: int) -> tuple[Iterator[Batch], int | None]:
    """The inputs of a model in batches, checked, and the labels that come with them.

    Args:
        model: whose inputs these are.
        x: an array, tensor or list of numbers `(n, ...)`; a list, tuple or dictionary of them for several inputs; or
            anything that yields batches: `tf.data.Dataset`, `keras.utils.PyDataset`, PyTorch `DataLoader`, a
            generator. A batch is `x`, `(x, y)` or `(x, y, weights)`; weights are left out.
        batch_size: inputs per batch of an array; other data come in the batches that they have.

    Returns:
        Pairs of a list of arrays, in the order of the model's inputs, and labels or `None`; and the number of batches,
        `None` when it is not known.

    Raises:
        ValueError: as `check_inputs`; for a batch size below 1, endless data, or labels in some batches only.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> found, count = batches(model, ((np.ones((4, 2)), np.zeros(4)) for _ in range(3)), 128)
    >>> count, [(arrays[0].shape, labels.shape) for arrays, labels in found]
    (None, [((4, 2), (4,)), ((4, 2), (4,)), ((4, 2), (4,))])
    """
    if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"Expected a batch size of at least 1. Received: batch_size={batch_size}")
    if yields_batches(x):
        return _of_stream(model, x), _count(x)
    arrays = check_inputs(model, x)
    starts = range(0, len(arrays[0]), batch_size)
    return (([array[s : s + batch_size] for array in arrays], None) for s in starts), len(starts)


def yields_batches(x: Any) -> bool:
    """Whether data yield batches, and are not arrays, lists or dictionaries of them.

    Example:

    >>> yields_batches([[0.0, 1.0]]), yields_batches(np.ones((2, 3)) for _ in range(4))
    (False, True)
    """
    if isinstance(x, keras.utils.PyDataset):
        return True
    is_array = isinstance(x, (list, tuple, dict, str, bytes)) or hasattr(x, "__array__") or hasattr(x, "shape")
    return not is_array and (hasattr(x, "__iter__") or hasattr(x, "__next__"))


def _count(x: Any) -> int | None:
    """How many batches there are, when the data tell."""
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches
    if not hasattr(x, "__len__"):
        return None
    try:
        return len(x)
    except TypeError:  # a dataset of TensorFlow that does not know, or never ends
        return None


def _elements(x: Any) -> Iterable[Any]:
    if isinstance(x, keras.utils.PyDataset):
        if x.num_batches is None:
            raise ValueError("Expected data that end. Received: a PyDataset with num_batches=None")
        return (x[index] for index in range(x.num_batches))
    cardinality = getattr(x, "cardinality", None)
    if callable(cardinality) and int(cardinality()) == -1:  # tf.data.INFINITE_CARDINALITY
        raise ValueError("Expected data that end: take(n) of them. Received: an endless tf.data.Dataset")
    return x


def _of_stream(model: keras.Model, x: Any) -> Iterator[Batch]:
    labelled, is_loader = None, hasattr(x, "dataset") and hasattr(x, "collate_fn")
    for element in _elements(x):
        inputs, labels = _split(model, element, is_loader)
        arrays = check_inputs(model, inputs)
        if labels is not None:
            labels = _to_numpy(labels)
            if labels.ndim == 0 or len(labels) != len(arrays[0]):
                raise ValueError(f"Expected {len(arrays[0])} labels, one per input. Received: y.shape={labels.shape}")
        if labelled is None:
            labelled = labels is not None
        if labelled != (labels is not None):
            raise ValueError("Expected labels in every batch or in none. Received: labels in some batches")
        yield arrays, labels


def _split(model: keras.Model, element: Any, is_loader: bool) -> tuple[Any, Any]:
    """Inputs and labels of a batch: a tuple is `(x, y, weights)`, a list too where it cannot be a list of inputs."""
    inputs = len(getattr(model, "inputs", None) or [None])
    as_tuple = isinstance(element, tuple) or (isinstance(element, list) and (is_loader or inputs == 1))
    if not as_tuple or not 1 <= len(element) <= 3:
        return element, None
    return element[0], element[1] if len(element) > 1 else None


def _to_numpy(values: Any) -> np.ndarray:
    """Any array or tensor, of this backend or another, that may require a gradient or lie on another device."""
    if np.ma.is_masked(values):
        raise ValueError(
            "Expected arrays whose entries all count, for a network sees no mask: fill it, such as by x.filled(0). "
            f"Received: a masked array with {np.ma.count_masked(values)} masked entries"
        )
    if hasattr(values, "detach"):  # of PyTorch
        values = values.detach().cpu()
        values = values.float() if "bfloat16" in str(values.dtype) else values
        return np.asarray(values)
    return np.asarray(keras.ops.convert_to_numpy(values) if keras.ops.is_tensor(values) else values)


def check_inputs(model: keras.Model, x: Any) -> list[np.ndarray]:
    """The inputs as arrays, in the order and of the ranks of the model's.

    Raises:
        ValueError: for inputs that are empty, not finite, no numbers, or of another shape than the model's.
    """
    inputs = getattr(model, "inputs", None) or []
    if isinstance(x, dict) and inputs:
        by_name = isinstance(_structure(model), dict)
        structure = _structure(model) if by_name else {tensor.name: tensor for tensor in inputs}
        given = {id(tensor): value for tensor, value in _paired(structure, x)}
        x = [given[id(tensor)] for tensor in inputs]
    arrays = _arrays(x, len(inputs))
    if not arrays or any(array.size == 0 or array.ndim == 0 for array in arrays):
        raise ValueError(f"Expected at least one input. Received: x with shapes {[array.shape for array in arrays]}")
    if any(array.dtype.kind not in "fiub" for array in arrays):
        raise ValueError(f"Expected numeric inputs. Received: x of dtypes {[str(array.dtype) for array in arrays]}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("Expected finite inputs. Received: x with NaN or infinite entries")
    _check_batched(model, arrays)
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"Expected inputs of equal length. Received: {[len(array) for array in arrays]}")
    if inputs:
        if len(arrays) != len(inputs):
            raise ValueError(f"Expected {len(inputs)} inputs. Received: {len(arrays)} arrays")
        arrays = [_of_rank(array, len(tensor.shape)) for array, tensor in zip(arrays, inputs, strict=True)]
        check_model_shapes(model, [array.shape for array in arrays])
    return arrays


def _arrays(x: Any, inputs: int) -> list[np.ndarray]:
    """One array per input: a list is a list of them, unless the model has one input and the list is of samples."""
    flat = keras.tree.flatten(x)
    if inputs == 1 and isinstance(x, (list, tuple)) and len(x) > 0 and all(np.ndim(value) == 0 for value in flat):
        return [np.asarray(x)]
    arrays = [_to_numpy(array) for array in flat]
    if inputs == 1 and len(arrays) > 1 and len({array.shape for array in arrays}) == 1:
        return [np.stack(arrays)]
    return arrays


def _check_batched(model: keras.Model, arrays: list[np.ndarray]) -> None:
    """A single input where a batch is wanted."""
    inputs = getattr(model, "inputs", None) or []
    if len(arrays) != len(inputs):
        return
    for array, tensor in zip(arrays, inputs, strict=True):
        own = tuple(tensor.shape)
        is_single = len(own) == array.ndim + 1 and all(
            a in (None, b) for a, b in zip(own[1:], array.shape, strict=True)
        )
        if is_single and not (own[-1] == 1 and array.ndim == 1):  # Keras takes (n,) for (n, 1)
            raise ValueError(
                "Expected a batch of inputs: a single one is x[:1], or x[None] when it is no part of an array. "
                f"Received: x.shape={array.shape}, where the model takes {own}"
            )


def _structure(model: keras.Model) -> Any:
    """The symbolic inputs as they were given when the model was made: one, or lists and dictionaries of them."""
    return getattr(model, "input", None)


def _paired(structure: Any, x: Any, name: str = "x") -> Iterator[tuple[Any, Any]]:
    """Each symbolic input, and the values for it in x, which has the same structure.

    Raises:
        ValueError: for another one.
    """
    if isinstance(structure, dict):
        if not isinstance(x, dict) or set(x) != set(structure):
            received = sorted(x, key=str) if isinstance(x, dict) else type(x).__name__
            raise ValueError(f"Expected the inputs {list(structure)}. Received: {name} with {received}")
        for key, part in structure.items():
            yield from _paired(part, x[key], f"{name}[{key!r}]")
    elif isinstance(structure, (list, tuple)):
        if not isinstance(x, (list, tuple)) or len(x) != len(structure):
            raise ValueError(f"Expected a list of {len(structure)} inputs. Received: {name} of type {type(x).__name__}")
        for index, (part, values) in enumerate(zip(structure, x, strict=True)):
            yield from _paired(part, values, f"{name}[{index}]")
    else:
        yield structure, x


def structured(model: keras.Model, arrays: list[Any]) -> Any:
    """Arrays in the order of the inputs, as the model takes them: one, or lists and dictionaries of them."""
    structure = _structure(model)
    if isinstance(structure, (dict, list, tuple)):
        own = {id(tensor): array for tensor, array in zip(model.inputs, arrays, strict=True)}
        return keras.tree.map_structure(lambda tensor: own[id(tensor)], structure)
    return arrays if len(arrays) > 1 else arrays[0]


def _of_rank(array: np.ndarray, rank: int) -> np.ndarray:
    """As Keras does: images without a channel axis get one."""
    if array.ndim == rank - 1:
        return array[..., None]
    return array[..., 0] if array.ndim == rank + 1 and array.shape[-1] == 1 else array


def to_float32(arrays: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """The arrays in float32, which is all that a model is given here, and how far each input moved by it, `(n,)`.

    Raises:
        ValueError: for numbers beyond the range of float32.

    Example:

    >>> (single,), moved = to_float32([np.array([[0.1]])])
    >>> str(single.dtype), bool(moved[0] > 0)
    ('float32', True)
    """
    singles, squares = [], np.zeros(len(arrays[0]))
    for array in arrays:
        with np.errstate(over="ignore"):
            single = array.astype(np.float32)
        if array.dtype not in (np.float32, np.float16):
            if not np.isfinite(single).all():
                raise ValueError("Expected inputs within the range of float32. Received: x that overflows")
            # In extended precision where there is one: a large integer is not a float64 either.
            difference = (array.astype(np.longdouble) - single).reshape(len(array), -1)
            squares += np.square(np.linalg.norm(np.asarray(difference, dtype=np.float64), axis=1))
        singles.append(single)
    return singles, np.sqrt(squares) * (1 + 1e-9)
