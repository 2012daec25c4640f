"""Certificates: for every input a prediction and a radius within which no change of the input alters it."""

import dataclasses
import json
import math

import keras
import numpy as np

from hkr_keras import bounds, margins
from hkr_keras._version import __version__

_ONE_SIDED = {
    getattr(keras.activations, name)
    for name in ("sigmoid", "hard_sigmoid", "sparse_sigmoid", "softmax", "softplus", "relu", "relu6")
}

_ROUNDED_DOWN = 1 - 1e-12  # covers the float64 rounding of the radius itself

_STATEMENT = (
    "For every input: no change of L2 norm below its radius (in the units of the model's input) alters the "
    "predicted class. This holds for the network in exact arithmetic with the stored weights, at inference; "
    "logits were computed in floating point, and their rounding is not covered (rigorous=false)."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What `certify` proved.

    Args:
        radius: `(n,)` float64, L2 distance in input units below which the prediction cannot change. 0 for a tie.
        prediction: `(n,)` integers, the predicted classes; for a single score 1 where it is positive.
        bound: proven Lipschitz constant of the whole model.
        classes: number of outputs of the model; 1 for a binary score.
        method: `"score"`, `"pairwise"` or `"logits"`, see `certify`.

    Example:

    >>> certificate = Certificate(np.array([0.5, 0.1]), np.array([1, 0]), 1.0, 2, "pairwise")
    >>> certificate.accuracy([1, 0], epsilon=0.25)
    0.5
    """

    radius: np.ndarray
    prediction: np.ndarray
    bound: float
    classes: int
    method: str

    def is_correct(self, y) -> np.ndarray:
        """Which predictions match the labels, `(n,)` booleans. Labels `(n,)`, `(n, 1)` or one-hot."""
        labels = margins.class_indices(y, self.classes)
        if len(labels) != len(self.radius):
            raise ValueError(f"Expected {len(self.radius)} labels, one per input. Received: len(y)={len(labels)}")
        return labels == self.prediction

    def accuracy(self, y, epsilon: float | None = None) -> float:
        """Share of inputs that are classified correctly and, given an epsilon, whose radius is above it.

        Args:
            y: labels `(n,)`, `(n, 1)` or one-hot.
            epsilon: L2 distance in input units, at least 0; `None` for clean accuracy.

        Raises:
            ValueError: for labels of another shape or length, or a negative epsilon.
        """
        correct = self.is_correct(y)
        if epsilon is None:
            return float(correct.mean())
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"Expected a finite distance of at least 0. Received: epsilon={epsilon}")
        return float((correct & (self.radius > epsilon)).mean())

    def mean_radius(self, y) -> float:
        """Mean certified radius; a wrong prediction counts as 0."""
        return float(np.where(self.is_correct(y), self.radius, 0.0).mean())

    def curve(self, y, epsilons) -> np.ndarray:
        """Certified accuracy at each epsilon, `(len(epsilons),)`."""
        return np.array([self.accuracy(y, float(epsilon)) for epsilon in epsilons])

    def to_dict(self) -> dict:
        """Plain Python values, with versions and the statement in words."""
        return {
            "statement": _STATEMENT,
            "rigorous": False,
            "norm": "L2",
            "bound": self.bound,
            "classes": self.classes,
            "method": self.method,
            "prediction": self.prediction.tolist(),
            "radius": self.radius.tolist(),
            "versions": {"hkr_keras": __version__, "keras": keras.__version__, "backend": keras.backend.backend()},
        }

    def to_json(self) -> str:
        """`to_dict` as JSON; an infinite radius (two logits with a constant difference) is null."""
        values = self.to_dict()
        values["radius"] = [radius if math.isfinite(radius) else None for radius in values["radius"]]
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Certificate":
        """Reads what `to_json` wrote.

        Example:

        >>> certificate = Certificate(np.array([0.5]), np.array([1]), 1.0, 2, "pairwise")
        >>> float(Certificate.from_json(certificate.to_json()).radius[0])
        0.5
        """
        try:
            stored = json.loads(text)
            return cls(
                np.array([math.inf if radius is None else radius for radius in stored["radius"]], dtype=np.float64),
                np.asarray(stored["prediction"], dtype=np.int64),
                float(stored["bound"]),
                int(stored["classes"]),
                str(stored["method"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Expected the JSON text of a certificate. Received: text={text[:80]!r}") from error


def certify(model, x, batch_size: int = 128, verbose="auto") -> Certificate:
    """Proves for every input a radius within which the predicted class cannot change.

    With L the proven constant of the model (`lipschitz_bound`, float64, from the stored weights):

    - one score f, `method="score"`: class 1 where f > 0, radius `|f| / L`;
    - logits from a final Dense layer W, `method="pairwise"`: with L' the constant of everything before it,
      radius `min over j of (f_i - f_j) / (L' |w_i - w_j|)`, always valid and never worse than the next;
    - other logits, `method="logits"`: `(f_i - f_j) / (sqrt(2) L)`.

    Args:
        model: a built Sequential or functional model with one output `(n, 1)` or `(n, classes)`: raw scores or
            logits. Several inputs count as one long vector.
        x: input array (or list or dict of arrays), in the units in which the radii shall hold.
        batch_size: inputs per batch.
        verbose: as in `keras.Model.predict`.

    Returns:
        A `Certificate` with `radius`, `prediction` and `bound`.

    Raises:
        ValueError: for an empty or non-finite x, weights or logits that are not finite, float16 or bfloat16
            layers, a constant model, a binary model that ends in a sigmoid (its score has no sign), a layer
            without a known bound.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(1, kernel_initializer="ones")])
    >>> certificate = hkr.certify(model, np.array([[1.0, 1.0]]), verbose=0)
    >>> int(certificate.prediction[0]), round(float(certificate.radius[0]), 4)
    (1, 1.4142)

    Reference:
        Serrurier et al., CVPR 2021 (binary); Tsuzuku et al., NeurIPS 2018 (arXiv 1802.04034), section 4.
    """
    _check_model(model)
    arrays = [np.asarray(array) for array in keras.tree.flatten(x)]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError(f"Expected at least one input. Received: x with shapes {[array.shape for array in arrays]}")
    if any(array.dtype.kind not in "fiub" for array in arrays):
        raise ValueError(f"Expected numeric inputs. Received: x of dtypes {[str(array.dtype) for array in arrays]}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("Expected finite inputs. Received: x with NaN or infinite entries")

    one_sided: dict[int, bool] = {}  # which tensors cannot change their sign

    def visit(layer, inputs, output):
        one_sided[id(output)] = _is_one_sided(layer, [one_sided.get(id(flow), False) for flow in inputs])

    flows = bounds.model_flows(model, visit)
    if len(flows) != 1:
        raise ValueError(f"Expected a model with one output. Received: {len(flows)} outputs")
    bound = flows[0].constant
    if bound == 0.0:
        raise ValueError("Expected a model that depends on its input. Received: a model with Lipschitz constant 0")

    model.make_predict_function(force=True)  # an old one may hold layers or numbers that have changed since
    logits = np.asarray(model.predict(x, batch_size=batch_size, verbose=verbose), dtype=np.float64)
    if logits.ndim not in (1, 2):
        raise ValueError(f"Expected outputs of shape (n, 1) or (n, classes). Received: shape={logits.shape}")
    if not np.isfinite(logits).all():
        raise ValueError("Expected finite outputs. Received: NaN or infinite scores or logits")

    if logits.ndim == 1 or logits.shape[1] == 1:
        if one_sided.get(id(flows[0])):
            raise ValueError(
                "Expected a raw score, whose sign is the class: remove the final activation. "
                f"Received: model '{model.name}', whose single output cannot change its sign"
            )
        scores = logits.reshape(-1)
        return Certificate(np.abs(scores) / bound * _ROUNDED_DOWN, (scores > 0).astype(np.int64), bound, 1, "score")

    prediction = logits.argmax(axis=1)
    margin = np.take_along_axis(logits, prediction[:, None], axis=1) - logits
    if flows[0].head is None:
        method, change = "logits", np.full((logits.shape[1],) * 2, math.sqrt(2) * bound)
    else:
        weights, constants = flows[0].head
        before = bounds.Flow(constants).constant
        method, change = "pairwise", before * _distances(weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        radii = np.where(margin > 0, margin / change[prediction] * _ROUNDED_DOWN, 0.0)
    np.put_along_axis(radii, prediction[:, None], np.inf, axis=1)
    return Certificate(radii.min(axis=1), prediction, bound, logits.shape[1], method)


def _distances(weights: np.ndarray) -> np.ndarray:
    """Euclidean distances between the columns, `(columns, columns)`; one column at a time, for wide heads."""
    scale = max(float(np.abs(weights).max()), np.finfo(np.float64).tiny)  # squares of tiny weights would vanish
    columns = (weights / scale).T
    return scale * np.stack([np.linalg.norm(columns - column, axis=1) for column in columns])


def _is_one_sided(layer, inputs: list[bool]) -> bool:
    """Whether the output of a layer cannot change its sign: after a sigmoid, until a layer that shifts."""
    activation = getattr(layer, "activation", layer)
    if activation in _ONE_SIDED or isinstance(activation, (keras.layers.ReLU, keras.layers.Softmax)):
        return True
    if isinstance(activation, keras.layers.Activation):
        return activation.activation in _ONE_SIDED
    shifts = bool(layer.weights) or isinstance(layer, keras.layers.Rescaling) or len(inputs) > 1
    return not shifts and inputs[0]


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
    for layer in model._flatten_layers():
        dtypes = {str(layer.compute_dtype), str(layer.variable_dtype)}
        if not dtypes <= {"float32", "float64"}:
            raise ValueError(
                "Expected a model that computes in float32: lower precision rounds by more than a certificate "
                "allows. Rebuild it with keras.config.set_dtype_policy('float32') and copy the weights. "
                f"Received: layer '{layer.name}' with dtype policy {layer.dtype_policy.name}"
            )
