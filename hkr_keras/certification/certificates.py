"""Certificates: for every input a prediction and a radius within which no change of the input alters it."""

import dataclasses
import json
import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import keras
import numpy as np

from hkr_keras import _display, margins
from hkr_keras.certification.evaluation import Evaluation, evaluate, versions
from hkr_keras.certification.radii import ROUNDED_DOWN

__all__ = [
    "Certificate",
    "OutputCertificate",
    "Report",
    "TopKCertificate",
    "Verification",
    "certify",
    "certify_outputs",
    "certify_top_k",
    "compare",
]

_NORMS = (1, 2, math.inf)
_METHODS = ("score", "pairwise", "logits", "local")
_MOST_ROWS = 30

_STATEMENT = (
    "For every input: no change of L2 norm below its radius (in the units of the model's input) alters the "
    "predicted class. "
)
_EXACT = (
    "The network is the one of exact arithmetic with the stored weights, at inference.",
    "The outputs at the inputs themselves were computed in floating point, and their rounding is not covered.",
)
_DEPLOYED = (
    "The network is the one that computes in float32 with the stored weights, at inference.",
    "Changed inputs are float32 numbers.",
    "Arithmetic is IEEE 754 with rounding to nearest; sums run in any order, fused or not, and subnormal numbers may "
    "be flushed to zero.",
    "Products are not computed in TF32 or half precision, nor by Winograd or FFT convolutions; the backend's layers "
    "compute what they are documented to compute.",
    "Sines, cosines, exponentials and reciprocal roots are right to 4 units in the last place.",
)


def _arithmetic(rigorous: bool) -> str:
    return "float32 as deployed" if rigorous else "exact arithmetic"


def _curve(radius: np.ndarray, name: str) -> str:
    """A picture of the share of radii above each distance."""
    if not len(radius):
        return ""
    finite = radius[np.isfinite(radius)]
    distances = np.linspace(0.0, float(np.quantile(finite, 0.99)) if len(finite) else 1.0, 60)
    return _display.curve(distances, np.array([(radius > distance).mean() for distance in distances]), name)


def _labels_of(certificate: Any, y: Any, classes: int) -> np.ndarray:
    """The classes that are given, or those that came with the inputs; both must agree: data may be shuffled."""
    if y is None and certificate.labels is None:
        raise ValueError("Expected labels, since none came with the inputs. Received: y=None")
    labels = margins.class_indices(certificate.labels if y is None else y, classes)
    if len(labels) != len(certificate):
        raise ValueError(f"Expected {len(certificate)} labels, one per input. Received: len(y)={len(labels)}")
    if y is not None and certificate.labels is not None:
        differ = int((labels != margins.class_indices(certificate.labels, classes)).sum())
        if differ:
            raise ValueError(
                "Expected y=None, or the labels that come with the data, in their order. "
                f"Received: y that differs from these for {differ} inputs"
            )
    return labels


@dataclasses.dataclass(frozen=True)
class Report:
    """A table of certified accuracies: `str(report)`, `print(report)`, or the last line of a notebook cell.

    Args:
        header: names of the columns.
        rows: one for all inputs together, then one for each class.

    Example:

    >>> print(Report(("class", "inputs"), (("all", 3),)))
    class  inputs
    all         3
    """

    header: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def __str__(self) -> str:
        return _display.text_table(self.header, self.rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return _display.html_table("Certified accuracy", self.header, self.rows)

    def to_dict(self) -> list[dict[str, Any]]:
        """One dictionary for each row."""
        return [dict(zip(self.header, row, strict=True)) for row in self.rows]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Certificate(_display.Results):
    """What `certify` proved.

    `len(certificate)` is the number of inputs, `certificate[10:20]` the part about some of them.

    Args:
        radius: `(n,)` float64, L2 distance in input units below which the prediction cannot change. 0 for a tie.
        prediction: `(n,)` integers, the predicted classes; for a single score 1 where it is positive.
        bound: proven Lipschitz constant of the whole model.
        classes: number of outputs of the model; 1 for a binary score.
        method: `"score"`, `"pairwise"`, `"logits"` or `"local"`, see `certify`.
        rigorous: whether the radii cover the rounding of the deployed network.
        dimension: numbers in one input, for radii in other norms than L2; `None` when unknown.
        model_hash: `hash_of_model` of the model; `None` when unknown.
        versions: of this package, Keras, NumPy and the backend, and the precision of the model.
        rival: `(n,)` integers, the class that the radius is about: the one into which an input can be turned first, as
            far as is proven. A hint for readers, no part of the statement; `None` when unknown.
        labels: classes that came with the inputs, `(n,)` integers; `None` without. Where a method wants labels, these
            are taken when it is given none.

    Example:

    >>> radius, prediction = np.array([0.5, 0.1]), np.array([1, 0])
    >>> certificate = Certificate(radius=radius, prediction=prediction, bound=1.0, classes=2, method="pairwise")
    >>> certificate
    Certificate(2 inputs, 2 classes, bound 1.0000, median radius 0.3, exact arithmetic)
    >>> certificate.accuracy([1, 0], epsilon=0.25)
    0.5
    """

    _rows: ClassVar[tuple[str, ...]] = ("radius", "prediction", "rival", "labels")

    radius: np.ndarray
    prediction: np.ndarray
    bound: float
    classes: int
    method: str
    rigorous: bool = False
    dimension: int | None = None
    model_hash: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=versions)
    rival: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __repr__(self) -> str:
        kind = "one score" if self.classes == 1 else f"{self.classes} classes"
        median = f"median radius {np.median(self.radius):.3g}, " if len(self) else ""
        return f"Certificate({len(self)} inputs, {kind}, bound {self.bound:.4f}, {median}{_arithmetic(self.rigorous)})"

    def _repr_html_(self) -> str:
        if self.labels is None:
            return _display.html_table(repr(self), (), (), _curve(self.radius, "unchangeable predictions"))
        return _display.html_table(
            repr(self), (), (), _curve(np.where(self.is_correct(), self.radius, 0.0), "certified accuracy")
        )

    def _columns(self, y: Any = None) -> dict[str, np.ndarray]:
        columns = {"prediction": self.prediction, "radius": self.radius}
        if self.rival is not None:
            columns["rival"] = self.rival
        if y is None and self.labels is None:
            return columns
        return {"label": self._labels(y), **columns, "correct": self.is_correct(y)}

    def _labels(self, y: Any) -> np.ndarray:
        return _labels_of(self, y, self.classes)

    def is_correct(self, y: Any = None) -> np.ndarray:
        """Which predictions match the labels, `(n,)` booleans. Labels `(n,)`, `(n, 1)` or one-hot."""
        return self._labels(y) == self.prediction

    def radius_in(self, norm: float = 2) -> np.ndarray:
        """Radii in the L1, L2 or L-infinity norm, `(n,)`.

        A change of L1 norm r has an L2 norm of at most r, and one of L-infinity norm r of at most `sqrt(d) r` in
        d dimensions. These are the factors of the L2 ball, not of a certificate made for the other norm.

        Args:
            norm: 1, 2 or `math.inf`.

        Raises:
            ValueError: for another norm, or an unknown dimension.

        Example:

        >>> kinds = {"bound": 1.0, "classes": 2, "method": "pairwise", "dimension": 4}
        >>> certificate = Certificate(radius=np.array([0.5]), prediction=np.array([1]), **kinds)
        >>> float(certificate.radius_in(math.inf)[0].round(6))
        0.25
        """
        if norm not in _NORMS:
            raise ValueError(f"Expected the norm to be 1, 2 or math.inf. Received: norm={norm}")
        if norm != math.inf:
            return self.radius
        if self.dimension is None:
            raise ValueError("Expected a certificate that knows the dimension of the inputs. Received: dimension=None")
        return self.radius / math.sqrt(self.dimension) * ROUNDED_DOWN

    def accuracy(
        self, y: Any = None, epsilon: float | Sequence[float] | np.ndarray | None = None, norm: float = 2
    ) -> Any:
        """Share of inputs that are classified correctly and, given an epsilon, whose radius is above it.

        Args:
            y: labels `(n,)`, `(n, 1)` or one-hot; `None` for those that came with the inputs.
            epsilon: distance in input units, at least 0; `None` for clean accuracy; or several distances.
            norm: in which the distance is measured: 1, 2 or `math.inf`.

        Returns:
            A float; for several distances an array of them.

        Raises:
            ValueError: for labels of another shape or length, or a negative epsilon.
        """
        correct = self.is_correct(y)
        if epsilon is None:
            return float(correct.mean())
        epsilons = [_check_epsilon(value) for value in np.ravel(np.asarray(epsilon, dtype=np.float64))]
        radius = self.radius_in(norm)
        shares = np.array([(correct & (radius > value)).mean() for value in epsilons])
        return float(shares[0]) if np.ndim(epsilon) == 0 else shares

    def mean_radius(self, y: Any = None, norm: float = 2) -> float:
        """Mean certified radius; a wrong prediction counts as 0."""
        return float(np.where(self.is_correct(y), self.radius_in(norm), 0.0).mean())

    def curve(self, y: Any, epsilons: Sequence[float] | np.ndarray, norm: float = 2) -> np.ndarray:
        """Certified accuracy at each epsilon, `(len(epsilons),)`."""
        return self.accuracy(y, np.ravel(np.asarray(epsilons, dtype=np.float64)), norm)

    def report(self, y: Any = None, epsilons: Sequence[float] = (0.1, 0.25, 0.5)) -> Report:
        """Clean and certified accuracy and radii, of all inputs together and of each class.

        Args:
            y: labels, as in `accuracy`.
            epsilons: L2 distances in input units.

        Example:

        >>> kinds = {"bound": 1.0, "classes": 2, "method": "pairwise"}
        >>> certificate = Certificate(radius=np.array([0.5, 0.1]), prediction=np.array([1, 0]), **kinds)
        >>> print(certificate.report([1, 0], epsilons=[0.25]))
        class  inputs  clean  at 0.25  mean radius
        all         2      1      0.5          0.3
        0           1      1        0          0.1
        1           1      1        1          0.5
        """
        labels = self._labels(y)
        rows = []
        for name in ("all", *np.unique(labels).tolist()):
            part = self if name == "all" else self[labels == name]
            own = labels if name == "all" else labels[labels == name]
            shares = part.accuracy(own, list(epsilons)).tolist()
            rows.append((str(name), len(part), part.accuracy(own), *shares, part.mean_radius(own)))
        header = ("class", "inputs", "clean", *(f"at {epsilon:g}" for epsilon in epsilons), "mean radius")
        return Report(header, tuple(rows))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the radii rest on, in words."""
        return _DEPLOYED if self.rigorous else _EXACT

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, with versions, and the statement and its assumptions in words."""
        values = {
            "statement": _STATEMENT + " ".join(self.assumptions),
            "assumptions": list(self.assumptions),
            "rigorous": self.rigorous,
            "norm": "L2",
            "bound": self.bound,
            "classes": self.classes,
            "method": self.method,
            "dimension": self.dimension,
            "model_sha256": self.model_hash,
            "versions": self.versions,
            "prediction": self.prediction.tolist(),
            "radius": self.radius.tolist(),
        }
        optional = {"rival": self.rival, "labels": None if self.labels is None else self._labels(None)}
        return values | {name: array.tolist() for name, array in optional.items() if array is not None}

    def to_json(self) -> str:
        """`to_dict` as JSON; an infinite radius (two logits with a constant difference) is null."""
        values = self.to_dict()
        values["radius"] = [radius if math.isfinite(radius) else None for radius in values["radius"]]
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Certificate":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: for anything else.

        Example:

        >>> kinds = {"bound": 1.0, "classes": 2, "method": "pairwise"}
        >>> certificate = Certificate(radius=np.array([0.5]), prediction=np.array([1]), **kinds)
        >>> float(Certificate.from_json(certificate.to_json()).radius[0])
        0.5
        """
        try:
            return cls(**_read(json.loads(text, parse_constant=_refuse)))
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"Expected the JSON text of a certificate. Received: text={str(text)[:80]!r}") from error

    def verify(self, model: keras.Model, x: Any, batch_size: int = 128, verbose: Any = "auto") -> "Verification":
        """Certifies again and compares: the model, the predictions, and that no stored radius is too large.

        A radius may be larger by 0.01 %, and by a millionth of the length of its input and of the distance that its
        outputs are worth, since another backend or batch size rounds the outputs otherwise.

        Args:
            model, x: what the certificate is said to be about; x as for `certify`.
            batch_size, verbose: as in `certify`.

        Returns:
            A `Verification`: true, or false with its `differences` in words.

        Example:

        >>> import keras, numpy as np, hkr_keras as hkr
        >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(3)])
        >>> x = np.ones((4, 2), "float32")
        >>> certificate = hkr.certify(model, x, verbose=0)
        >>> bool(certificate.verify(model, x, verbose=0)), bool(certificate.verify(model, -x, verbose=0))
        (True, False)
        """
        return Verification(tuple(compare(self, model, x, batch_size, verbose)))


def _refuse(constant: str) -> None:
    raise ValueError(f"a finite number instead of {constant}")


def _check(condition: Any, wanted: str) -> None:
    if not condition:
        raise ValueError(wanted)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _read(stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Certificate`, each of its own type and range.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: for whatever is not as `to_json` writes it.
    """
    classes, bound, method, rigorous = (stored[name] for name in ("classes", "bound", "method", "rigorous"))
    dimension, model_hash = stored.get("dimension"), stored.get("model_sha256")
    rival, labels = stored.get("rival"), stored.get("labels")
    _check(stored["norm"] == "L2", "radii in the L2 norm")
    _check(type(classes) is int and classes >= 1, "a number of classes")
    _check(_is_number(bound) and bound > 0, "a positive bound")
    _check(method in _METHODS and (method == "score") == (classes == 1), "a method that fits the number of classes")
    _check(type(rigorous) is bool and not (rigorous and method == "local"), "true or false, and exact around inputs")
    _check(dimension is None or (type(dimension) is int and dimension >= 1), "a positive dimension")
    _check(model_hash is None or (len(model_hash) == 64 and int(model_hash, 16) >= 0), "a hash")
    _check(all(isinstance(version, str) for version in stored["versions"].values()), "versions in words")
    _check(isinstance(stored["prediction"], list) and isinstance(stored["radius"], list), "lists")
    _check(len(stored["prediction"]) == len(stored["radius"]), "one radius for every prediction")
    for values in (stored["prediction"], labels or [], rival or []):
        _check(all(type(label) is int and 0 <= label < max(classes, 2) for label in values), "classes")
    _check(all(radius is None or (_is_number(radius) and radius >= 0) for radius in stored["radius"]), "radii")
    for values in (labels, rival):
        _check(values is None or (isinstance(values, list) and len(values) == len(stored["radius"])), "a class each")
    _check(all(a != b for a, b in zip(rival or [], stored["prediction"], strict=False)), "rivals of the predictions")
    return {
        "radius": np.array([math.inf if radius is None else radius for radius in stored["radius"]], dtype=np.float64),
        "prediction": np.array(stored["prediction"], dtype=np.int64),
        "rival": None if rival is None else np.array(rival, dtype=np.int64),
        "labels": None if labels is None else np.array(labels, dtype=np.int64),
        "bound": float(bound),
        "classes": classes,
        "method": method,
        "rigorous": rigorous,
        "dimension": dimension,
        "model_hash": model_hash,
        "versions": stored["versions"],
    }


def compare(stored: Certificate, model: keras.Model, x: Any, batch_size: int = 128, verbose: Any = 0) -> list[str]:
    """Differences between a stored certificate and a new one for the same model and inputs, in words.

    Args: as `Certificate.verify`.
    """
    again, scales = _certified(model, x, batch_size, verbose, stored.rigorous, stored.method == "local")
    slack, differences = 1e-6 * scales, []
    if stored.model_hash is not None and stored.model_hash != again.model_hash:
        differences.append(f"model: expected {stored.model_hash}, found {again.model_hash}")
    if len(again) != len(stored):
        return [*differences, f"inputs: expected {len(stored)}, found {len(again)}"]
    if stored.dimension is not None and stored.dimension != again.dimension:
        differences.append(f"dimension: expected {stored.dimension}, found {again.dimension}")
    if (stored.classes, stored.method) != (again.classes, again.method):
        differences.append(f"method: expected {stored.method}, found {again.method}")
    if not stored.bound >= again.bound * (1 - 1e-9):
        differences.append(f"bound: expected {stored.bound}, found {again.bound}")
    if stored.labels is not None and again.labels is not None and (stored._labels(None) != again._labels(None)).any():
        differences.append("labels: expected those that came with the inputs, found others")
    decided = np.maximum(stored.radius, again.radius) > slack  # a tie may fall either way on another machine
    for index in np.flatnonzero((stored.prediction != again.prediction) & decided)[:3]:
        pair = stored.prediction[index], again.prediction[index]
        differences.append(f"prediction of input {index}: expected {pair[0]}, found {pair[1]}")
    for index in np.flatnonzero(~(stored.radius <= again.radius * 1.0001 + slack))[:3]:
        differences.append(f"radius of input {index}: expected {stored.radius[index]}, found {again.radius[index]}")
    return differences


@dataclasses.dataclass(frozen=True)
class Verification:
    """The outcome of `Certificate.verify`: true when there are no `differences`."""

    differences: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.differences


def _check_epsilon(epsilon: Any) -> float:
    if not isinstance(epsilon, numbers.Real) or not 0 <= float(epsilon) < math.inf:
        raise ValueError(f"Expected a finite distance of at least 0. Received: epsilon={epsilon}")
    return float(epsilon)


def certify(
    model: keras.Model,
    x: Any,
    batch_size: int = 128,
    verbose: Any = "auto",
    rigorous: bool = False,
    local: bool = False,
) -> Certificate:
    """Proves for every input a radius within which the predicted class cannot change.

    With L the proven constant of the model (`lipschitz_bound`, float64, from the stored weights):

    - one score f, `method="score"`: class 1 where f > 0, radius `|f| / L`;
    - logits from a final Dense layer W, `method="pairwise"`: with L' the constant of everything before it,
      radius `min over j of (f_i - f_j) / (L' |w_i - w_j|)`, always valid and never worse than the next;
    - other logits, `method="logits"`: `(f_i - f_j) / (sqrt(2) L)`;
    - `local=True`, `method="local"`: the larger of that and, with `L_ij(e)` the constant of `f_i - f_j` within a
      distance e of this input, the best `min(e, min over j of (f_i - f_j) / L_ij(e))`. For plain ReLU networks, whose
      constant is far larger in some places than around their inputs.

    These radii are about the network in exact arithmetic. With `rigorous=True` they are about the network as it
    is deployed: no float32 input within the radius is classified differently, whatever is rounded on the way. With
    `E = E0 + E1 epsilon` what rounding can add to `f_i - f_j` within epsilon (`hkr_keras.rounding`), the radius is
    `(f_i - f_j - E0) / (L_ij + E1)`, where `f_i - f_j` is nearer to the exact value than float32 would be.

    Args:
        model: a built Sequential or functional model with one output `(n, 1)` or `(n, classes)`: raw scores or
            logits. Several inputs count as one long vector.
        x: inputs, in the units in which the radii shall hold: an array, tensor or list (a list or dictionary of them
            for several inputs), or what yields batches of them, with or without labels: `tf.data.Dataset`,
            `keras.utils.PyDataset`, PyTorch `DataLoader`, a generator. Labels are kept in the certificate.
        batch_size: inputs per batch of an array; data and activations of one batch at a time are held in memory.
        verbose: 0 for silence, 1 or `"auto"` for a progress bar.
        rigorous: whether to cover the rounding of the float32 network.
        local: whether to look for radii around each input too: chains of Dense layers and (leaky) ReLU that end in at
            least two logits, exact arithmetic, some hundredths of a second for each input.

    Returns:
        A `Certificate` with `radius`, `prediction` and `bound`, that of the whole space.

    Raises:
        ValueError: for an empty or non-finite x, weights or logits that are not finite, inputs or layers of float16
            or bfloat16 (or a global `floatx` of that kind), a constant model, a binary model that ends in a sigmoid
            (its score has no sign), a layer without a known bound; under `rigorous=True` also for subnormal weights,
            layers whose rounding is not known, and a machine that computes products in reduced precision; under
            `local=True` also for other layers than those, by name, and together with `rigorous=True`.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(1, kernel_initializer="ones")])
    >>> certificate = hkr.certify(model, np.array([[1.0, 1.0]]), verbose=0)
    >>> int(certificate.prediction[0]), round(float(certificate.radius[0]), 4)
    (1, 1.4142)

    Reference:
        Serrurier et al., CVPR 2021 (binary); Tsuzuku et al., NeurIPS 2018 (arXiv 1802.04034), section 4; arXiv
        2603.13334 for the rounding.
    """
    if local and rigorous:
        raise ValueError(
            "Expected radii around inputs in exact arithmetic, since what rounding adds is bounded for the whole ball "
            "by the constants of the whole space. Received: local=True, rigorous=True"
        )
    return _certified(model, x, batch_size, verbose, rigorous, local)[0]


def _certified(
    model: keras.Model, x: Any, batch_size: int, verbose: Any, rigorous: bool, local: bool
) -> tuple[Certificate, np.ndarray]:
    """The certificate, and how far each input and its outputs are from 0, in units of the input."""
    found = evaluate(model, x, batch_size, verbose, rigorous, local)
    if found.outputs.ndim not in (1, 2):
        raise ValueError(f"Expected outputs of shape (n, 1) or (n, classes). Received: shape={found.outputs.shape}")
    if found.state.constant == 0.0:
        raise ValueError("Expected a model that depends on its input. Received: a model with Lipschitz constant 0")
    if found.is_score and found.state.one_sided:
        raise ValueError(
            "Expected a raw score, whose sign is the class: remove the final activation. "
            f"Received: model '{model.name}', whose single output cannot change its sign"
        )
    prediction, radius, rival, method = _decided(found)
    classes = 1 if found.is_score else found.outputs.shape[1]
    certificate = Certificate(
        radius=radius,
        prediction=prediction,
        bound=found.state.constant,
        classes=classes,
        method=method,
        rival=rival,
        labels=None if found.labels is None else margins.class_indices(found.labels, classes),
        **found.identity,
    )
    outputs = np.abs(found.outputs).reshape(len(radius), -1).max(axis=1)
    return certificate, found.lengths + outputs / found.state.constant


def _decided(found: Evaluation) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, str]:
    """Predictions, radii, the rivals that these are about, and the method."""
    if found.is_score:
        positive = found.outputs.reshape(-1) > 0
        return positive.astype(np.int64), found.score_radii(), (~positive).astype(np.int64), "score"
    prediction, radius = found.outputs.argmax(axis=1), np.empty(len(found.outputs))
    rival = np.empty(len(found.outputs), dtype=np.int64)
    for label in np.unique(prediction):
        chosen = prediction == label
        radii = found.rival_radii(label, chosen)
        nearest = radii.argmin(axis=1)
        radius[chosen], rival[chosen] = radii[np.arange(len(radii)), nearest], nearest + (nearest >= label)
    if found.local_radii is not None:  # of whichever rival is nearest in each ball
        return prediction, np.maximum(radius, found.local_radii), None, "local"
    return prediction, radius, rival, "logits" if found.state.tail is None else "pairwise"


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TopKCertificate(_display.Results):
    """What `certify_top_k` proved.

    Args:
        radius: `(n, classes)` float64, L2 distance below which a class stays among the k largest logits.
        k: how many classes count.
        bound: proven Lipschitz constant of the whole model.
        rigorous: whether the radii cover the rounding of the deployed network.
        labels: that came with the inputs, or `None`.
    """

    _rows: ClassVar[tuple[str, ...]] = ("radius", "labels")

    radius: np.ndarray
    k: int
    bound: float
    rigorous: bool
    labels: np.ndarray | None = None

    def __repr__(self) -> str:
        return (
            f"TopKCertificate({len(self)} inputs, {self.radius.shape[1]} classes, k={self.k}, bound {self.bound:.4f}, "
            f"{_arithmetic(self.rigorous)})"
        )

    def _repr_html_(self) -> str:
        if self.labels is None:
            return _display.html_table(repr(self), (), (), _curve(self.radius.max(axis=1), f"one of {self.k} stays"))
        own = self.radius[np.arange(len(self)), self._labels(None)]
        return _display.html_table(repr(self), (), (), _curve(own, f"certified top-{self.k} accuracy"))

    def _columns(self, y: Any = None) -> dict[str, np.ndarray]:
        columns = {f"radius_{label}": radius for label, radius in enumerate(self.radius.T)}
        return columns if y is None and self.labels is None else {"label": self._labels(y), **columns}

    def _labels(self, y: Any) -> np.ndarray:
        return _labels_of(self, y, self.radius.shape[1])

    def accuracy(self, y: Any = None, epsilon: float | Sequence[float] = 0.0) -> Any:
        """Share of inputs whose true class provably stays among the k largest within an L2 distance of epsilon.

        Args:
            y: labels `(n,)`, `(n, 1)` or one-hot; `None` for those that came with the inputs.
            epsilon: distance in input units, at least 0, or several.

        Returns:
            A float; for several distances an array of them.
        """
        labels = self._labels(y)
        own = self.radius[np.arange(len(labels)), labels]
        epsilons = [_check_epsilon(value) for value in np.ravel(np.asarray(epsilon, dtype=np.float64))]
        shares = np.array([(own > value).mean() for value in epsilons])
        return float(shares[0]) if np.ndim(epsilon) == 0 else shares


def certify_top_k(
    model: keras.Model, x: Any, k: int, batch_size: int = 128, verbose: Any = "auto", rigorous: bool = False
) -> TopKCertificate:
    """Proves for every input and class a radius within which the class stays among the k largest logits.

    At most k - 1 rivals can be in front of a class within the k-th smallest of its pairwise radii.

    Args:
        model, x, batch_size, verbose, rigorous: as for `certify`.
        k: at least 1 and below the number of classes. `k=1` is `certify`.

    Raises:
        ValueError: as `certify`; for a single score, or another k.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(4, kernel_initializer="identity")])
    >>> top = certify_top_k(model, np.array([[3.0, 2.0, 1.0, 0.0]]), k=2, verbose=0)
    >>> top.radius[0].round(3).tolist()
    [1.414, 0.707, 0.0, 0.0]
    """
    found = evaluate(model, x, batch_size, verbose, rigorous)
    classes = found.outputs.shape[-1]
    if found.outputs.ndim != 2 or not isinstance(k, (int, np.integer)) or not 1 <= k < classes:
        raise ValueError(
            "Expected logits of shape (n, classes), and k of at least 1 and below the number of classes. "
            f"Received: k={k}, shape={found.outputs.shape}"
        )
    everyone = np.ones(len(found.outputs), dtype=bool)
    radius = np.stack([np.sort(found.rival_radii(label, everyone), axis=1)[:, k - 1] for label in range(classes)], 1)
    return TopKCertificate(radius=radius, k=k, bound=found.state.constant, rigorous=rigorous, labels=found.labels)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class OutputCertificate(_display.Results):
    """What `certify_outputs` proved: every output stays between `lower` and `upper`.

    Args:
        value: `(n, ...)` float64, the outputs at the inputs.
        lower, upper: `(n, ...)` float64, bounds of the outputs within an L2 distance of epsilon.
        epsilon: L2 distance in input units.
        bound: proven Lipschitz constant of the whole model.
        rigorous: whether the intervals cover the rounding of the deployed network.
        labels: targets or labels that came with the inputs, or `None`.
    """

    _rows: ClassVar[tuple[str, ...]] = ("value", "lower", "upper", "labels")

    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    epsilon: float
    bound: float
    rigorous: bool
    labels: np.ndarray | None = None

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.value.shape[1:])) or "1"
        return (
            f"OutputCertificate({len(self)} inputs, {shape} outputs, epsilon {self.epsilon:g}, bound {self.bound:.4f}, "
            f"{_arithmetic(self.rigorous)})"
        )

    def _repr_html_(self) -> str:
        columns = self._columns()
        rows = [(name, column.min(), np.median(column), column.max()) for name, column in columns.items() if len(self)]
        return _display.html_table(repr(self), ("", "smallest", "median", "largest"), rows[:_MOST_ROWS])

    def _columns(self, y: Any = None) -> dict[str, np.ndarray]:
        flat = {name: getattr(self, name).reshape(len(self), -1) for name in ("value", "lower", "upper")}
        targets = self.labels if y is None else np.asarray(y)
        if targets is not None:
            if np.shape(targets)[:1] != (len(self),):
                raise ValueError(f"Expected {len(self)} targets, one per input. Received: y.shape={np.shape(targets)}")
            flat = {"target": targets.reshape(len(self), -1), **flat}
        several = flat["value"].shape[1] > 1
        return {
            f"{name}_{i}" if several and values.shape[1] > 1 else name: column
            for name, values in flat.items()
            for i, column in enumerate(values.T)
        }

    def contain(self, targets: Any = None) -> np.ndarray:
        """Which targets lie within their interval, booleans of the shape of the outputs.

        Args:
            targets: of the shape of the outputs; of a single output `(n,)` or `(n, 1)`. `None` for those of the data.

        Raises:
            ValueError: for targets of another shape, and without any.
        """
        if targets is None and self.labels is None:
            raise ValueError("Expected targets, since none came with the inputs. Received: targets=None")
        found, shape = np.asarray(self.labels if targets is None else targets, dtype=np.float64), self.value.shape
        shapes = [shape] if self.value.size != len(self) else [shape, (len(self),), (len(self), 1)]
        if found.shape not in shapes:
            raise ValueError(f"Expected targets of shape {shape}. Received: targets.shape={found.shape}")
        found = found.reshape(shape)
        return (self.lower <= found) & (found <= self.upper)

    def auroc(self, y: Any = None) -> float:
        """Certified area under the ROC curve of a score: what is left when every input is moved for the worse.

        The share of pairs of a positive and a negative input whose scores cannot change their order; ties count
        as lost. At `epsilon=0` this is the usual area, but for ties.

        Args:
            y: labels {0, 1} or {-1, +1}, `(n,)` or `(n, 1)`; both classes must occur. `None` for those that came with
                the inputs.

        Raises:
            ValueError: for several outputs, wrong labels, others than those that came with the inputs, or a single
                class.
        """
        if self.value.size != len(self.value):
            raise ValueError(f"Expected one score per input. Received: outputs of shape {self.value.shape}")
        positive = _labels_of(self, y, classes=1).astype(bool)
        if positive.all() or not positive.any():
            raise ValueError(
                f"Expected labels of both classes. Received: {int(positive.sum())} of {len(self)} positive"
            )
        worst = np.sort(self.upper.reshape(-1)[~positive])
        return float(np.searchsorted(worst, self.lower.reshape(-1)[positive], side="left").mean() / len(worst))


def certify_outputs(
    model: keras.Model, x: Any, epsilon: float, batch_size: int = 128, verbose: Any = "auto", rigorous: bool = False
) -> OutputCertificate:
    """Proves how far every output can move when the input moves by at most epsilon: regression, scores, AUROC.

    Each output by itself: with a final Dense layer, the norm of its own weights times the constant of everything
    before it; otherwise the constant of the model.

    Args:
        model, x, batch_size, verbose, rigorous: as for `certify`; outputs of any shape.
        epsilon: L2 distance in input units, at least 0.

    Returns:
        `OutputCertificate` with `value`, `lower` and `upper`, and `auroc(y)` for a single score.

    Raises:
        ValueError: as `certify`; for a negative epsilon.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((1,)), hkr.layers.Scale(2.0)])
    >>> interval = certify_outputs(model, np.array([[1.0]]), epsilon=0.25, verbose=0)
    >>> interval.lower.round(6).tolist(), interval.upper.round(6).tolist()
    ([[1.5]], [[2.5]])
    """
    _check_epsilon(epsilon)
    found = evaluate(model, x, batch_size, verbose, rigorous)
    change, rounding = found.of_outputs()
    farthest = epsilon + found.input_rounding[:, None]
    width = farthest * change
    if rounding is not None:
        width = width + rounding(farthest)
        width = np.where(found.reach()[:, None] > farthest, width, math.inf)
    sizes = len(found.outputs), math.prod(found.outputs.shape[1:])
    width = np.broadcast_to(width / ROUNDED_DOWN, sizes).reshape(found.outputs.shape)
    lower, upper = found.centre - width, found.centre + width
    return OutputCertificate(
        value=found.outputs,
        lower=lower,
        upper=upper,
        epsilon=epsilon,
        bound=found.state.constant,
        rigorous=rigorous,
        labels=found.labels,
    )
