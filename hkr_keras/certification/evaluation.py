"""What every certificate starts from: outputs, how they change in exact arithmetic, and what rounding adds."""

import dataclasses
import hashlib
import json
import math

import keras
import numpy as np

from hkr_keras._version import __version__
from hkr_keras.certification import bounds
from hkr_keras.certification.checks import check_model_shapes
from hkr_keras.certification.rounding import LARGEST, SMALLEST_NORMAL, Affine, Tracer, norms
from hkr_keras.geometry import flattened_layers

ROUNDED_DOWN = 1 - 1e-9  # covers the float64 rounding of whatever the radius is made of


def model_hash(model) -> str:
    """SHA-256 of the architecture and the weights of a model, as hexadecimal digits.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> len(model_hash(model))
    64
    """
    digest = hashlib.sha256()
    config = keras.saving.serialize_keras_object(model.get_config())
    digest.update(json.dumps(_without_build(config), sort_keys=True, default=str).encode())
    for weight in model.weights:
        array = np.ascontiguousarray(keras.ops.convert_to_numpy(weight.value))
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _without_build(config):
    """A config without what depends on how a model came about: shapes it was built with, the compiled training."""
    if isinstance(config, dict):
        left_out = ("build_config", "compile_config", "batch_shape", "module", "build_input_shape")
        return {name: _without_build(value) for name, value in config.items() if name not in left_out}
    return [_without_build(value) for value in config] if isinstance(config, (list, tuple)) else config


def versions(model=None) -> dict[str, str]:
    """Of this package, Keras, NumPy and the backend, and the precision of the model."""
    known = {
        "hkr_keras": __version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "backend": keras.backend.backend(),
    }
    return known if model is None else {**known, "dtype": str(model.compute_dtype)}


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Outputs of a model, and what is proven of how they change.

    Args:
        outputs: `(n, ...)`, as predicted.
        centre: `(n, ...)` float64, the exact outputs up to `off`; the outputs themselves when not rigorous.
        off: `(n,)`; 0 when not rigorous.
        flow: of the output in exact arithmetic.
        one_sided: whether the output cannot change its sign.
        identity: of model and inputs, for the certificate.
        error, before, since, largest: of `rounding.Trace`; `None` when not rigorous.
        moved: `(n,)`, how far the inputs moved when they were rounded to float32.
    """

    outputs: np.ndarray
    centre: np.ndarray
    centre_error: np.ndarray
    state: bounds.LipschitzState
    one_sided: bool
    identity: dict
    error: Affine | None
    error_before_tail: Affine | None
    error_after_tail: Affine | None
    largest: Affine | None
    input_rounding: np.ndarray

    @property
    def is_score(self) -> bool:
        return self.outputs.ndim == 1 or self.outputs.shape[1] == 1

    def of_outputs(self) -> tuple[np.ndarray, Affine | None]:
        """How far each single output moves per unit, `(outputs,)` or `(1,)`, and what rounding adds, `(n, same)`."""
        tail = self.state.tail
        if tail is None or self.outputs.ndim != 2:
            return np.array([self.state.constant]), self._combined(0.0, self.error)
        constant = bounds.LipschitzState(tail.constants).constant
        lengths = tail.lengths()
        return np.minimum(constant * lengths, self.state.constant), self._combined(lengths, self.error_after_tail)

    def rival_radii(self, label: int, chosen: np.ndarray) -> np.ndarray:
        """Radii within which a class stays in front of each other one, `(chosen, classes - 1)`."""
        others = np.arange(self.outputs.shape[1]) != label
        margin = self.centre[chosen][:, [label]] - self.centre[chosen][:, others]
        tail = self.state.tail
        if tail is None:
            change, error_after_tail = np.full(others.sum(), math.sqrt(2) * self.state.constant), self.error
            lengths = 0.0
        else:
            lengths, error_after_tail = tail.differences_from(label)[others], self.error_after_tail
            change = bounds.LipschitzState(tail.constants).constant * lengths
        return self.radii(margin, change, self._combined(lengths, error_after_tail, math.sqrt(2)), chosen)

    def _combined(self, lengths, error_after_tail: Affine | None, factor: float = 1.0) -> Affine | None:
        if error_after_tail is None:
            return None
        columns = Affine(
            (error_after_tail.constant + self.centre_error)[:, None] * factor, error_after_tail.slope[:, None] * factor
        )
        if self.error_before_tail is None:
            return columns
        error_before_tail = Affine(self.error_before_tail.constant[:, None], self.error_before_tail.slope[:, None])
        return error_before_tail.times(lengths) + columns

    @np.errstate(divide="ignore", invalid="ignore", over="ignore")
    def radii(self, margin, change, rounding: Affine | None, chosen=slice(None)) -> np.ndarray:
        """The distances at which a margin is used up, `(n, margins)`; 0 where it is not positive."""
        if rounding is not None:
            margin = margin - rounding.constant[chosen] / ROUNDED_DOWN
            change = change + rounding.slope[chosen]
        radii = np.where(margin > 0, margin / change * ROUNDED_DOWN, 0.0)
        radii = np.minimum(radii, self.reach()[chosen][:, None]) - self.input_rounding[chosen][:, None]
        return np.where(radii > 0, radii, 0.0)  # NaN included

    @np.errstate(invalid="ignore", over="ignore")
    def reach(self) -> np.ndarray:
        """Distances within which no number can overflow, `(n,)`; infinite in exact arithmetic."""
        if self.largest is None:
            return np.full(len(self.outputs), math.inf)
        reach = (LARGEST - self.largest.constant) / np.maximum(self.largest.slope, 1e-30)
        return np.where(reach > 0, reach, 0.0)


def evaluate(model, x, batch_size: int, verbose, rigorous: bool) -> Evaluation:
    """Predicts, and proves what can be proven of the outputs.

    Args and errors: those of `hkr_keras.certify`.
    """
    _check_model(model)
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"Expected a batch size of at least 1. Received: batch_size={batch_size}")
    arrays = check_inputs(model, x)
    states = bounds.model_states(model)
    if len(states) != 1:
        raise ValueError(f"Expected a model with one output. Received: {len(states)} outputs")
    centre, centre_error = None, np.zeros(len(arrays[0]))
    error, error_before_tail, error_after_tail, largest = None, None, None, None
    input_rounding = distance_moved(arrays)
    if rigorous:
        _check_rigorous(model)
        arrays = [array.astype(np.float32) for array in arrays]
        x = arrays if len(arrays) > 1 else arrays[0]
        if by_name := _by_name(model):
            position = {id(tensor): i for i, tensor in enumerate(model.inputs)}
            x = {name: arrays[position[id(tensor)]] for name, tensor in by_name.items()}
    model.make_predict_function(force=True)  # an old one may hold layers or numbers that have changed since
    outputs = _predict(model, x, len(arrays[0]), batch_size, verbose)
    if not np.isfinite(outputs).all():
        raise ValueError("Expected finite outputs. Received: NaN or infinite scores or logits")
    if rigorous:
        centre, centre_error, (error, error_before_tail, error_after_tail, largest) = _trace(
            model, arrays, outputs, batch_size, verbose
        )
    identity = {
        "rigorous": rigorous,
        "dimension": sum(math.prod(array.shape[1:]) for array in arrays),
        "model": model_hash(model),
        "versions": versions(model),
    }
    sided = states[0].one_sided
    centre = outputs if centre is None else centre
    return Evaluation(
        outputs,
        centre,
        centre_error,
        states[0],
        sided,
        identity,
        error,
        error_before_tail,
        error_after_tail,
        largest,
        input_rounding,
    )


def _predict(model, x, size: int, batch_size: int, verbose) -> np.ndarray:
    """The outputs, float64. Keras under a distribution wants batches that the devices divide: the last is filled up."""
    if (distribution := keras.distribution.distribution()) is not None:
        if (processes := getattr(distribution, "num_processes", 1)) > 1:  # predict would fail and lose the weights
            raise ValueError(
                "Expected a certificate to be computed by one process: call keras.distribution.set_distribution(None) "
                f"and certify a clone of the model with its weights. Received: num_processes={processes}"
            )
        batch_size += -batch_size % distribution.device_mesh.devices.size
        rows = np.minimum(np.arange(size + -size % batch_size), size - 1)
        x = keras.tree.map_structure(lambda array: np.asarray(array)[rows], x)
    return np.asarray(model.predict(x, batch_size=batch_size, verbose=verbose), dtype=np.float64)[:size]


def check_inputs(model, x) -> list[np.ndarray]:
    """The inputs as arrays, in the order and of the ranks of the model's.

    Raises:
        ValueError: for inputs that are empty, not finite, no numbers, or of another shape than the model's.
    """
    inputs = getattr(model, "inputs", None) or []
    if isinstance(x, dict) and inputs:
        names = [tensor.name for tensor in inputs]
        if by_name := _by_name(model):
            names = [next(name for name, own in by_name.items() if own is tensor) for tensor in inputs]
        if set(names) != set(x):
            raise ValueError(f"Expected the inputs {names}. Received: x with {sorted(x)}")
        x = [x[name] for name in names]
    arrays = [np.asarray(array) for array in keras.tree.flatten(x)]
    if not arrays or any(array.size == 0 or array.ndim == 0 for array in arrays):
        raise ValueError(f"Expected at least one input. Received: x with shapes {[array.shape for array in arrays]}")
    if any(array.dtype.kind not in "fiub" for array in arrays):
        raise ValueError(f"Expected numeric inputs. Received: x of dtypes {[str(array.dtype) for array in arrays]}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("Expected finite inputs. Received: x with NaN or infinite entries")
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"Expected inputs of equal length. Received: {[len(array) for array in arrays]}")
    if inputs:
        if len(arrays) != len(inputs):
            raise ValueError(f"Expected {len(inputs)} inputs. Received: {len(arrays)} arrays")
        arrays = [_of_rank(array, len(tensor.shape)) for array, tensor in zip(arrays, inputs, strict=True)]
        check_model_shapes(model, [array.shape for array in arrays])
    return arrays


def _by_name(model) -> dict | None:
    """The symbolic inputs of a model that was made of a dictionary of them."""
    inputs = getattr(model, "input", None)
    return inputs if isinstance(inputs, dict) else None


def _of_rank(array: np.ndarray, rank: int) -> np.ndarray:
    """As Keras does: images without a channel axis get one."""
    if array.ndim == rank - 1:
        return array[..., None]
    return array[..., 0] if array.ndim == rank + 1 and array.shape[-1] == 1 else array


def distance_moved(arrays) -> np.ndarray:
    """How far each input moves, `(n,)`, when it is rounded to float32, as prediction does for every model.

    Example:

    >>> bool(distance_moved([np.array([[0.1]])])[0] > 0)
    True
    """
    squares = np.zeros(len(arrays[0]))
    for array in arrays:
        with np.errstate(over="ignore"):
            single = array.astype(np.float32)
        if not np.isfinite(single).all():
            raise ValueError("Expected inputs within the range of float32. Received: x that overflows")
        # In extended precision where there is one: a large integer is not a float64 either.
        difference = array.astype(np.longdouble) - single
        squares += np.square(norms(difference))
    return np.sqrt(squares) / ROUNDED_DOWN


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def _trace(model, arrays: list[np.ndarray], outputs, batch_size: int, verbose):
    """`centre`, `off`, and the rounding (`error`, `before`, `since`, `largest`) of every input, batch by batch."""
    tracer, centres, offs, parts = Tracer(model), [], [], []
    verbose = 1 if verbose == "auto" else int(verbose)
    bar = keras.utils.Progbar(-(-len(outputs) // batch_size), verbose=verbose, unit_name="batch")
    for step, start in enumerate(range(0, len(outputs), batch_size)):
        rows = slice(start, start + batch_size)
        trace, largest = tracer([array[rows] for array in arrays])
        centre = trace.value.astype(np.float64)
        deviation, allowed = norms(centre - outputs[rows]), (trace.error.constant + trace.centre_error) / ROUNDED_DOWN
        if (deviation > allowed).any():
            raise ValueError(
                "Expected predictions within float32 rounding of the layers, one by one: is a reduced precision in "
                f"use? Received: predictions that differ by {deviation.max()}, where {allowed.min()} is allowed"
            )
        centres.append(centre)
        offs.append(trace.centre_error)
        parts.append(
            [
                _full(bound, len(centre))
                for bound in (trace.error, trace.error_before_tail, trace.error_after_tail, largest)
            ]
        )
        bar.update(step + 1)
    found = [
        None if column[0] is None else Affine(*np.concatenate(column, axis=1)) for column in zip(*parts, strict=True)
    ]
    return np.concatenate(centres), np.concatenate(offs), found


def _full(bound: Affine | None, size: int) -> np.ndarray | None:
    """Constant and slope of every input, `(2, size)`."""
    if bound is None:
        return None
    return np.stack([np.broadcast_to(part, size) for part in (bound.constant, bound.slope)])


def _check_rigorous(model) -> None:
    """Refuses models without a graph, subnormal weights, and machines whose products have fewer than 24 bits."""
    if not getattr(model, "inputs", None):
        raise ValueError(
            "Expected a Sequential or functional model for a rigorous certificate, since rounding is followed layer by "
            f"layer. Received: {type(model).__name__} '{model.name}'"
        )
    for weight in model.weights:
        values = np.abs(np.asarray(keras.ops.convert_to_numpy(weight.value), dtype=np.float64))
        if subnormal := np.count_nonzero((values > 0) & (values < SMALLEST_NORMAL)):
            raise ValueError(
                "Expected no subnormal weights, which some machines take for 0: set those below 2^-126 to 0. "
                f"Received: {weight.path} with {subnormal} subnormal entries"
            )
    numbers = np.full((64, 64), 1 + 2.0**-20, dtype="float32")
    kernel = np.eye(64, dtype="float32")
    products = (
        keras.ops.matmul(numbers, kernel),
        keras.ops.conv(numbers.reshape(1, 8, 8, 64), kernel.reshape(1, 1, 64, 64), data_format="channels_last"),
    )
    if any((np.asarray(keras.ops.convert_to_numpy(product)) != 1 + 2.0**-20).any() for product in products):
        raise ValueError(
            "Expected products in full float32: switch TF32 and bfloat16 products off. "
            f"Received: a {keras.backend.backend()} backend that rounds 1 + 2^-20"
        )


_PREDICTION = ("predict", "predict_step", "make_predict_function", "predict_on_batch", "stateless_call")


def _check_model(model) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model. Received: model={model!r}")
    changed = [
        name
        for name in _PREDICTION
        if name in vars(model) or getattr(type(model), name, None) is not getattr(keras.Model, name, None)
    ]
    if changed:
        raise ValueError(
            "Expected a model that predicts with its layers alone. "
            f"Received: {type(model).__name__} '{model.name}', which overrides {', '.join(changed)}"
        )
    for layer in (model, *flattened_layers(model)):
        is_input = isinstance(layer, keras.layers.InputLayer)  # which casts what it is given
        dtypes = {str(layer.dtype)} if is_input else {str(layer.compute_dtype), str(layer.variable_dtype)}
        if not dtypes <= {"float32", "float64"}:
            raise ValueError(
                "Expected a model that computes in float32: lower precision rounds by more than a certificate "
                "allows. Rebuild it with keras.config.set_dtype_policy('float32') and copy the weights. "
                f"Received: layer '{layer.name}' with dtype policy {layer.dtype_policy.name}"
            )
