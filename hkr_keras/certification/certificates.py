"""Certificates: for every input a prediction and a radius within which no change of the input alters it."""

import dataclasses
import json
import math

import numpy as np

from hkr_keras import margins
from hkr_keras.certification.evaluation import ROUNDED_DOWN, check_inputs, evaluate, versions
from hkr_keras.certification.rounding import norms

_NORMS = (1, 2, math.inf)

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


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What `certify` proved.

    Args:
        radius: `(n,)` float64, L2 distance in input units below which the prediction cannot change. 0 for a tie.
        prediction: `(n,)` integers, the predicted classes; for a single score 1 where it is positive.
        bound: proven Lipschitz constant of the whole model.
        classes: number of outputs of the model; 1 for a binary score.
        method: `"score"`, `"pairwise"` or `"logits"`, see `certify`.
        rigorous: whether the radii cover the rounding of the deployed network.
        dimension: numbers in one input, for radii in other norms than L2; `None` when unknown.
        model: `model_hash` of the model; `None` when unknown.
        versions: of this package, Keras, NumPy and the backend, and the precision of the model.

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
    rigorous: bool = False
    dimension: int | None = None
    model: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=versions)

    def is_correct(self, y) -> np.ndarray:
        """Which predictions match the labels, `(n,)` booleans. Labels `(n,)`, `(n, 1)` or one-hot."""
        labels = margins.class_indices(y, self.classes)
        if len(labels) != len(self.radius):
            raise ValueError(f"Expected {len(self.radius)} labels, one per input. Received: len(y)={len(labels)}")
        return labels == self.prediction

    def radius_in(self, norm: float = 2) -> np.ndarray:
        """Radii in the L1, L2 or L-infinity norm, `(n,)`.

        A change of L1 norm r has an L2 norm of at most r, and one of L-infinity norm r of at most `sqrt(d) r` in
        d dimensions. These are the factors of the L2 ball, not of a certificate made for the other norm.

        Args:
            norm: 1, 2 or `math.inf`.

        Raises:
            ValueError: for another norm, or an unknown dimension.

        Example:

        >>> certificate = Certificate(np.array([0.5]), np.array([1]), 1.0, 2, "pairwise", dimension=4)
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

    def accuracy(self, y, epsilon: float | None = None, norm: float = 2) -> float:
        """Share of inputs that are classified correctly and, given an epsilon, whose radius is above it.

        Args:
            y: labels `(n,)`, `(n, 1)` or one-hot.
            epsilon: distance in input units, at least 0; `None` for clean accuracy.
            norm: in which the distance is measured: 1, 2 or `math.inf`.

        Raises:
            ValueError: for labels of another shape or length, or a negative epsilon.
        """
        correct = self.is_correct(y)
        if epsilon is None:
            return float(correct.mean())
        _check_epsilon(epsilon)
        return float((correct & (self.radius_in(norm) > epsilon)).mean())

    def mean_radius(self, y, norm: float = 2) -> float:
        """Mean certified radius; a wrong prediction counts as 0."""
        return float(np.where(self.is_correct(y), self.radius_in(norm), 0.0).mean())

    def curve(self, y, epsilons, norm: float = 2) -> np.ndarray:
        """Certified accuracy at each epsilon, `(len(epsilons),)`."""
        return np.array([self.accuracy(y, float(epsilon), norm) for epsilon in epsilons])

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the radii rest on, in words."""
        return _DEPLOYED if self.rigorous else _EXACT

    def to_dict(self) -> dict:
        """Plain Python values, with versions, and the statement and its assumptions in words."""
        return {
            "statement": _STATEMENT + " ".join(self.assumptions),
            "assumptions": list(self.assumptions),
            "rigorous": self.rigorous,
            "norm": "L2",
            "bound": self.bound,
            "classes": self.classes,
            "method": self.method,
            "dimension": self.dimension,
            "model_sha256": self.model,
            "versions": self.versions,
            "prediction": self.prediction.tolist(),
            "radius": self.radius.tolist(),
        }

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

        >>> certificate = Certificate(np.array([0.5]), np.array([1]), 1.0, 2, "pairwise")
        >>> float(Certificate.from_json(certificate.to_json()).radius[0])
        0.5
        """
        try:
            stored = json.loads(text)
            dimension = stored.get("dimension")
            if not all(type(label) is int for label in stored["prediction"]):
                raise ValueError("predictions are integers")
            if dimension is not None and (type(dimension) is not int or dimension < 1):
                raise ValueError("the dimension is a positive integer")
            certificate = cls(
                np.array([math.inf if radius is None else radius for radius in stored["radius"]], dtype=np.float64),
                np.asarray(stored["prediction"], dtype=np.int64),
                float(stored["bound"]),
                int(stored["classes"]),
                str(stored["method"]),
                stored.get("rigorous", False) is True,
                dimension,
                stored.get("model_sha256"),
                {str(name): str(version) for name, version in stored["versions"].items()},
            )
            shapes = {certificate.radius.shape, certificate.prediction.shape}
            if shapes != {(len(certificate.radius),)} or not (certificate.radius >= 0).all():
                raise ValueError("one radius of at least 0 for every prediction")
            return certificate
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"Expected the JSON text of a certificate. Received: text={str(text)[:80]!r}") from error

    def verify(self, model, x, batch_size: int = 128, verbose="auto") -> "Verification":
        """Certifies again and compares: the model, the predictions, and that no stored radius is too large.

        Radii are compared up to 0.1 %, and a millionth of the length of the input and of the largest radius, since
        another backend or batch size rounds the outputs otherwise.

        Args:
            model, x: what the certificate is said to be about.
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
        again, differences = certify(model, x, batch_size, verbose, self.rigorous), []
        if self.model is not None and self.model != again.model:
            differences.append(f"model: expected {self.model}, found {again.model}")
        if len(again.radius) != len(self.radius):
            differences.append(f"inputs: expected {len(self.radius)}, found {len(again.radius)}")
            return Verification(tuple(differences))
        if self.dimension is not None and self.dimension != again.dimension:
            differences.append(f"dimension: expected {self.dimension}, found {again.dimension}")
        if (self.classes, self.method) != (again.classes, again.method):
            differences.append(f"method: expected {self.method}, found {again.method}")
        if not self.bound >= again.bound * (1 - 1e-9):
            differences.append(f"bound: expected {self.bound}, found {again.bound}")
        for index in np.flatnonzero(self.prediction != again.prediction)[:3]:
            pair = self.prediction[index], again.prediction[index]
            differences.append(f"prediction of input {index}: expected {pair[0]}, found {pair[1]}")
        finite = again.radius[np.isfinite(again.radius)]
        lengths = np.sqrt(sum(np.square(norms(array)) for array in check_inputs(model, x)))
        allowed = again.radius * 1.001 + 1e-6 * (lengths + finite.max(initial=0.0))
        for index in np.flatnonzero(self.radius > allowed)[:3]:
            differences.append(f"radius of input {index}: expected {self.radius[index]}, found {again.radius[index]}")
        return Verification(tuple(differences))


@dataclasses.dataclass(frozen=True)
class Verification:
    """The outcome of `Certificate.verify`: true when there are no `differences`."""

    differences: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.differences


def _check_epsilon(epsilon) -> None:
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"Expected a finite distance of at least 0. Received: epsilon={epsilon}")


def certify(model, x, batch_size: int = 128, verbose="auto", rigorous: bool = False) -> Certificate:
    """Proves for every input a radius within which the predicted class cannot change.

    With L the proven constant of the model (`lipschitz_bound`, float64, from the stored weights):

    - one score f, `method="score"`: class 1 where f > 0, radius `|f| / L`;
    - logits from a final Dense layer W, `method="pairwise"`: with L' the constant of everything before it,
      radius `min over j of (f_i - f_j) / (L' |w_i - w_j|)`, always valid and never worse than the next;
    - other logits, `method="logits"`: `(f_i - f_j) / (sqrt(2) L)`.

    These radii are about the network in exact arithmetic. With `rigorous=True` they are about the network as it
    is deployed: no float32 input within the radius is classified differently, whatever is rounded on the way. With
    `E = E0 + E1 epsilon` what rounding can add to `f_i - f_j` within epsilon (`hkr_keras.rounding`), the radius is
    `(f_i - f_j - E0) / (L_ij + E1)`, where `f_i - f_j` is nearer to the exact value than float32 would be.

    Args:
        model: a built Sequential or functional model with one output `(n, 1)` or `(n, classes)`: raw scores or
            logits. Several inputs count as one long vector.
        x: input array (or list or dict of arrays), in the units in which the radii shall hold.
        batch_size: inputs per batch; activations of one batch at a time are held in memory.
        verbose: as in `keras.Model.predict`.
        rigorous: whether to cover the rounding of the float32 network.

    Returns:
        A `Certificate` with `radius`, `prediction` and `bound`.

    Raises:
        ValueError: for an empty or non-finite x, weights or logits that are not finite, float16 or bfloat16
            layers, a constant model, a binary model that ends in a sigmoid (its score has no sign), a layer
            without a known bound; under `rigorous=True` also for subnormal weights, layers whose rounding is not
            known, and a machine that computes products in reduced precision.

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
    found = evaluate(model, x, batch_size, verbose, rigorous)
    if found.outputs.ndim not in (1, 2):
        raise ValueError(f"Expected outputs of shape (n, 1) or (n, classes). Received: shape={found.outputs.shape}")
    if found.state.constant == 0.0:
        raise ValueError("Expected a model that depends on its input. Received: a model with Lipschitz constant 0")
    if found.is_score:
        if found.one_sided:
            raise ValueError(
                "Expected a raw score, whose sign is the class: remove the final activation. "
                f"Received: model '{model.name}', whose single output cannot change its sign"
            )
        scores = found.outputs.reshape(-1)
        margin = np.where(scores > 0, 1, -1) * found.centre.reshape(-1)
        radius = found.radii(margin[:, None], *found.of_outputs())[:, 0]
        return _certificate(found, radius, (scores > 0).astype(np.int64), 1, "score")
    radius = np.empty(len(found.outputs))
    prediction = found.outputs.argmax(axis=1)
    for label in np.unique(prediction):
        chosen = prediction == label
        radius[chosen] = found.rival_radii(label, chosen).min(axis=1)
    method = "logits" if found.state.tail is None else "pairwise"
    return _certificate(found, radius, prediction, found.outputs.shape[1], method)


def _certificate(found, radius, prediction, classes: int, method: str) -> Certificate:
    return Certificate(radius, prediction, found.state.constant, classes, method, **found.identity)


@dataclasses.dataclass(frozen=True, eq=False)
class TopKCertificate:
    """What `certify_top_k` proved.

    Args:
        radius: `(n, classes)` float64, L2 distance below which a class stays among the k largest logits.
        k: how many classes count.
        bound: proven Lipschitz constant of the whole model.
        rigorous: whether the radii cover the rounding of the deployed network.
    """

    radius: np.ndarray
    k: int
    bound: float
    rigorous: bool

    def accuracy(self, y, epsilon: float = 0.0) -> float:
        """Share of inputs whose true class provably stays among the k largest within an L2 distance of epsilon."""
        _check_epsilon(epsilon)
        labels = margins.class_indices(y, self.radius.shape[1])
        if len(labels) != len(self.radius):
            raise ValueError(f"Expected {len(self.radius)} labels, one per input. Received: len(y)={len(labels)}")
        return float((self.radius[np.arange(len(labels)), labels] > epsilon).mean())


def certify_top_k(model, x, k: int, batch_size: int = 128, verbose="auto", rigorous: bool = False) -> TopKCertificate:
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
    if found.outputs.ndim != 2 or not 1 <= k < classes:
        raise ValueError(
            "Expected logits of shape (n, classes), and k of at least 1 and below the number of classes. "
            f"Received: k={k}, shape={found.outputs.shape}"
        )
    everyone = np.ones(len(found.outputs), dtype=bool)
    radius = np.stack([np.sort(found.rival_radii(label, everyone), axis=1)[:, k - 1] for label in range(classes)], 1)
    return TopKCertificate(radius, k, found.state.constant, rigorous)


@dataclasses.dataclass(frozen=True, eq=False)
class OutputCertificate:
    """What `certify_outputs` proved: every output stays between `lower` and `upper`.

    Args:
        value: `(n, ...)` float64, the outputs at the inputs.
        lower, upper: `(n, ...)` float64, bounds of the outputs within an L2 distance of epsilon.
        epsilon: L2 distance in input units.
        bound: proven Lipschitz constant of the whole model.
        rigorous: whether the intervals cover the rounding of the deployed network.
    """

    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    epsilon: float
    bound: float
    rigorous: bool

    def contain(self, targets) -> np.ndarray:
        """Which targets, of the shape of the outputs, lie within their interval."""
        targets = np.asarray(targets, dtype=np.float64).reshape(self.value.shape)
        return (self.lower <= targets) & (targets <= self.upper)

    def auroc(self, y) -> float:
        """Certified area under the ROC curve of a score: what is left when every input is moved for the worse.

        The share of pairs of a positive and a negative input whose scores cannot change their order; ties count
        as lost. At `epsilon=0` this is the usual area, but for ties.

        Args:
            y: labels {0, 1} or {-1, +1}, `(n,)` or `(n, 1)`; both classes must occur.

        Raises:
            ValueError: for several outputs, wrong labels, or a single class.
        """
        if self.value.size != len(self.value):
            raise ValueError(f"Expected one score per input. Received: outputs of shape {self.value.shape}")
        positive = margins.class_indices(y, classes=1).astype(bool)
        if len(positive) != len(self.value) or positive.all() or not positive.any():
            raise ValueError(
                "Expected one label per input, of both classes. "
                f"Received: {len(positive)} labels with {int(positive.sum())} positive, for {len(self.value)} inputs"
            )
        worst = np.sort(self.upper.reshape(-1)[~positive])
        return float(np.searchsorted(worst, self.lower.reshape(-1)[positive], side="left").mean() / len(worst))


def certify_outputs(
    model, x, epsilon: float, batch_size: int = 128, verbose="auto", rigorous: bool = False
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
    return OutputCertificate(found.outputs, lower, upper, epsilon, found.state.constant, rigorous)
