"""What every certificate starts from: outputs, how they change in exact arithmetic, and what rounding adds."""

import dataclasses
import hashlib
import json
import math
from typing import Any

import keras
import numpy as np

from hkr_keras._version import __version__
from hkr_keras.certification import bounds
from hkr_keras.certification.batches import batches, to_float32
from hkr_keras.certification.floating_point import LARGEST, MACHINE_EPSILON, SMALLEST_NORMAL, Affine, norms
from hkr_keras.certification.local import local_radii
from hkr_keras.certification.prediction import Predictor
from hkr_keras.certification.radii import ROUNDED_DOWN, output_constants, pair_constants, radii, rival_margins
from hkr_keras.certification.rounding import Tracer
from hkr_keras.geometry import flattened_layers

__all__ = ["Evaluation", "evaluate", "hash_of_model", "versions"]


def hash_of_model(model: keras.Model) -> str:
    """SHA-256 of the architecture and the weights of a model, as hexadecimal digits.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> len(hash_of_model(model))
    64
    """
    digest = hashlib.sha256()
    config = keras.saving.serialize_keras_object(model.get_config())
    digest.update(json.dumps(_without_build(config), sort_keys=True, default=str).encode())
    for weight in model.weights:
        array = np.ascontiguousarray(keras.ops.convert_to_numpy(weight.value))
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.data if array.ndim else array.tobytes())
    return digest.hexdigest()


def _without_build(config: Any) -> Any:
    """A config without what depends on how a model came about: shapes it was built with, the compiled training."""
    if isinstance(config, dict):
        left_out = ("build_config", "compile_config", "batch_shape", "module", "build_input_shape")
        return {name: _without_build(value) for name, value in config.items() if name not in left_out}
    return [_without_build(value) for value in config] if isinstance(config, (list, tuple)) else config


def versions(model: keras.Model | None = None) -> dict[str, str]:
    """Of this package, Keras, NumPy and the backend, and the precision of the model."""
    known = {
        "hkr_keras": __version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "backend": keras.backend.backend(),
    }
    return known if model is None else {**known, "dtype": str(model.compute_dtype)}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """Outputs of a model, and what is proven of how they change.

    Args:
        outputs: `(n, ...)`, as predicted.
        centre: `(n, ...)` float64, the exact outputs up to `centre_error`; the outputs themselves when not rigorous.
        centre_error: `(n,)`; 0 when not rigorous.
        state: of the output in exact arithmetic.
        identity: of model and inputs, for the certificate.
        error, error_before_tail, error_after_tail, largest: of `rounding.Trace`; `None` when not rigorous.
        input_rounding: `(n,)`, how far the inputs moved when they were rounded to float32.
        lengths: `(n,)`, Euclidean norms of the inputs.
        labels: that came with the inputs, or `None`.
        local_radii: `(n,)`, from constants around each input, in exact arithmetic; `None` when they were not asked for.
    """

    outputs: np.ndarray
    centre: np.ndarray
    centre_error: np.ndarray
    state: bounds.LipschitzState
    identity: dict[str, Any]
    error: Affine | None = None
    error_before_tail: Affine | None = None
    error_after_tail: Affine | None = None
    largest: Affine | None = None
    input_rounding: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray | None = None
    local_radii: np.ndarray | None = None

    @property
    def is_score(self) -> bool:
        return self.outputs.ndim == 1 or self.outputs.shape[1] == 1

    def of_outputs(self) -> tuple[np.ndarray, Affine | None]:
        """How far each single output moves per unit, `(outputs,)` or `(1,)`, and what rounding adds, `(n, same)`."""
        tail = self.state.tail
        if tail is None or self.outputs.ndim != 2:
            return np.array([self.state.constant]), self._combined(0.0, self.error)
        return output_constants(self.state), self._combined(tail.lengths(), self.error_after_tail)

    def score_radii(self) -> np.ndarray:
        """Radii within which a score keeps its sign, `(n,)`."""
        margin = np.where(self.outputs > 0, 1, -1) * self.centre
        constants, rounding = self.of_outputs()
        return radii(margin.reshape(-1, 1), constants, rounding, self.reach(), self.input_rounding)[:, 0]

    def rival_radii(self, label: int, chosen: np.ndarray) -> np.ndarray:
        """Radii within which a class stays in front of each other one, `(chosen, classes - 1)`."""
        tail = self.state.tail
        if tail is None:
            rounding = self._combined(0.0, self.error, math.sqrt(2))
        else:
            lengths = np.delete(tail.differences_from(label), label)
            rounding = self._combined(lengths, self.error_after_tail, math.sqrt(2))
        return radii(
            rival_margins(self.centre[chosen], label),
            pair_constants(self.state, label, self.outputs.shape[1]),
            None if rounding is None else Affine(rounding.constant[chosen], rounding.slope[chosen]),
            self.reach()[chosen],
            self.input_rounding[chosen],
        )

    def _combined(self, lengths: Any, error_after_tail: Affine | None, factor: float = 1.0) -> Affine | None:
        if error_after_tail is None:
            return None
        columns = Affine(
            (error_after_tail.constant + self.centre_error)[:, None] * factor, error_after_tail.slope[:, None] * factor
        )
        if self.error_before_tail is None:
            return columns
        error_before_tail = Affine(self.error_before_tail.constant[:, None], self.error_before_tail.slope[:, None])
        return error_before_tail.times(lengths) + columns

    @np.errstate(invalid="ignore", over="ignore")
    def reach(self) -> np.ndarray:
        """Distances within which no number can overflow, `(n,)`; infinite in exact arithmetic."""
        if self.largest is None:
            return np.full(len(self.outputs), math.inf)
        reach = (LARGEST - self.largest.constant) / np.maximum(self.largest.slope, 1e-30)
        return np.where(reach > 0, reach, 0.0)


def evaluate(
    model: keras.Model, x: Any, batch_size: int, verbose: Any, rigorous: bool, local: bool = False
) -> Evaluation:
    """Predicts, and proves what can be proven of the outputs, batch by batch.

    Args and errors: those of `hkr_keras.certify`.
    """
    _check_model(model)
    stream, count = batches(model, x, batch_size)
    states = bounds.model_states(model)
    if len(states) != 1:
        raise ValueError(f"Expected a model with one output. Received: {len(states)} outputs")
    if rigorous:
        _check_rigorous(model)
    predict, tracer, parts = Predictor(model, batch_size), Tracer(model) if rigorous else None, []
    verbose = 1 if verbose == "auto" else int(verbose)
    bar = keras.utils.Progbar(count, verbose=verbose, unit_name="batch")
    dimension = 0
    for step, (arrays, labels) in enumerate(stream, start=1):
        dimension = _dimension(arrays, dimension)
        part = _evaluate_batch(arrays, labels, predict, tracer)
        if local:
            around = local_radii(model, arrays[0].astype(np.float32), prediction=part["outputs"].argmax(axis=-1))
            part["local_radii"] = np.maximum(around - part["input_rounding"], 0.0) * (1 - 4 * MACHINE_EPSILON)
        parts.append(part)
        bar.update(step)
    if not parts:
        raise ValueError("Expected at least one input. Received: x without batches")
    found: dict[str, Any] = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    identity = {
        "rigorous": rigorous,
        "dimension": dimension,
        "model_hash": hash_of_model(model),
        "versions": versions(model),
    }
    return Evaluation(state=states[0], identity=identity, **found)


def _dimension(arrays: list[np.ndarray], before: int) -> int:
    dimension = sum(math.prod(array.shape[1:]) for array in arrays)
    if before not in (0, dimension):
        raise ValueError(f"Expected batches of inputs of one size. Received: {before} and {dimension} numbers")
    return dimension


def _evaluate_batch(
    arrays: list[np.ndarray], labels: np.ndarray | None, predict: Predictor, tracer: Tracer | None
) -> dict[str, Any]:
    """The fields of an `Evaluation` that have a row for every input."""
    singles, input_rounding = to_float32(arrays)
    outputs = predict(singles)
    if not np.isfinite(outputs).all():
        raise ValueError("Expected finite outputs. Received: NaN or infinite scores or logits")
    lengths = np.sqrt(sum(np.square(norms(single)) for single in singles))
    found = {"outputs": outputs, "input_rounding": input_rounding, "lengths": lengths, "labels": labels}
    if tracer is None:
        return {**found, "centre": outputs, "centre_error": np.zeros(len(outputs))}
    return {**found, **_traced(tracer, singles, outputs)}


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def _traced(tracer: Tracer, singles: list[np.ndarray], outputs: np.ndarray) -> dict[str, Any]:
    trace, largest = tracer(singles)
    centre = trace.value.astype(np.float64)
    deviation, allowed = norms(centre - outputs), (trace.error.constant + trace.centre_error) / ROUNDED_DOWN
    if (deviation > allowed).any():
        raise ValueError(
            "Expected predictions within float32 rounding of the layers, one by one: is a reduced precision in "
            f"use? Received: predictions that differ by {deviation.max()}, where {allowed.min()} is allowed"
        )
    found = {
        "error": trace.error,
        "error_before_tail": trace.error_before_tail,
        "error_after_tail": trace.error_after_tail,
        "largest": largest,
    }
    full = {name: _full(bound, len(outputs)) for name, bound in found.items()}
    return {"centre": centre, "centre_error": trace.centre_error, **full}


def _full(bound: Affine | None, size: int) -> Affine | None:
    """Constant and slope of every input, `(size,)` each."""
    return bound and Affine(np.broadcast_to(bound.constant, size), np.broadcast_to(bound.slope, size))


def _joined(parts: list[Any]) -> Any:
    if parts[0] is None:
        return None
    if isinstance(parts[0], Affine):
        return Affine(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("constant", "slope")))
    return np.concatenate(parts)


def _check_rigorous(model: keras.Model) -> None:
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
_PRECISE = ("float32", "float64")


def _check_model(model: Any) -> None:
    """Refuses what is no model, predicts in another way than by its layers, or rounds to few digits on the way."""
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
    if keras.config.floatx() not in _PRECISE:
        raise ValueError(
            "Expected inputs in float32: predict casts all that it is given to the global floatx. Call "
            f"keras.config.set_floatx('float32'). Received: keras.config.floatx()={keras.config.floatx()}"
        )
    for layer in flattened_layers(model):
        if isinstance(layer, keras.layers.InputLayer) and str(layer.dtype) not in _PRECISE:  # nested models cast too
            raise ValueError(
                "Expected inputs of float32 or float64: rounding to integers or fewer digits has no Lipschitz "
                f"constant. Received: input '{layer.name}' of dtype {layer.dtype}"
            )
        dtypes = {str(layer.compute_dtype), str(layer.variable_dtype)}
        if not dtypes <= set(_PRECISE):
            raise ValueError(
                "Expected a model that computes in float32: lower precision rounds by more than a certificate "
                "allows. Rebuild it with keras.config.set_dtype_policy('float32') and copy the weights. "
                f"Received: layer '{layer.name}' with dtype policy {layer.dtype_policy.name}"
            )
