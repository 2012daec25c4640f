"""Attacks by foolbox and ART, compared with certificates, which no attack may break.

Needs `pip install 'hkr_keras[attacks]'`. foolbox attacks with the gradients of every backend. ART has no classifier for
JAX: there its `Square` attack, which only asks for predictions, works, and `AutoPGD` does not.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from hkr_keras import _display, margins
from hkr_keras._backends.gradients import as_function, first_change
from hkr_keras._validation import number
from hkr_keras.certification.batches import batches
from hkr_keras.certification.certificates import Certificate, certify

__all__ = [
    "BrokenCertificate",
    "as_logits",
    "evaluate_robustness",
]

ROUNDING = 1e-5  # of |x| + radius: how far from its boundary a float32 network may change its prediction
LEAD = 15.0  # largest one of a prediction over its rivals, in the logits that attacks see: beyond, softmax is flat


class BrokenCertificate(RuntimeError):
    """An attack succeeded inside a certified radius. The witness is in its attributes.

    Args:
        attack: name of the attack.
        index: of the input.
        x, adversarial: the input and the float32 array that is classified differently.
        distance, radius: L2 distance of the two, and the radius that was certified.

    Example:

    >>> BrokenCertificate("PGD", 3, np.zeros(2), np.ones(2), 1.4, 1.5).index
    3
    """

    def __init__(self, attack: str, index: int, x: Any, adversarial: Any, distance: float, radius: float) -> None:
        super().__init__(
            f"Expected no attack to succeed inside a certified radius. Received: attack={attack} changed input {index} "
            f"at distance={distance:.9g}, radius={radius:.9g}"
        )
        self.attack, self.index, self.x, self.adversarial = attack, index, x, adversarial
        self.distance, self.radius = distance, radius


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Robustness(_display.Results):
    """What `evaluate_robustness` found: the robust accuracy lies between `certified` and `attacked`.

    Args:
        epsilons: `(k,)` L2 distances in input units.
        clean: share of inputs that are classified correctly.
        certified: `(k,)`, share that is right and has a certified radius above epsilon: a lower bound.
        attacked: `(k,)`, share that is right and that no attack changed within epsilon: an upper bound.
        is_correct: `(n,)` booleans, which predictions are right.
        radius: `(n,)` float64, certified radii.
        distance: `(n,)` float64, smallest L2 distance at which an attack changed the prediction; infinite for none.
        adversarial: `(n, ...)` float32, the changed inputs at these distances; NaN for none.
    """

    _rows: ClassVar[tuple[str, ...]] = ("is_correct", "radius", "distance", "adversarial")

    epsilons: np.ndarray
    clean: float
    certified: np.ndarray
    attacked: np.ndarray
    is_correct: np.ndarray
    radius: np.ndarray
    distance: np.ndarray
    adversarial: np.ndarray

    @classmethod
    def of(
        cls,
        *,
        epsilons: np.ndarray,
        is_correct: np.ndarray,
        radius: np.ndarray,
        distance: np.ndarray,
        adversarial: np.ndarray,
    ) -> "Robustness":
        """The accuracies that follow from radii and distances."""
        return cls(
            epsilons=epsilons,
            clean=float(is_correct.mean()),
            certified=np.array([(is_correct & (radius > epsilon)).mean() for epsilon in epsilons]),
            attacked=np.array([(is_correct & (distance > epsilon)).mean() for epsilon in epsilons]),
            is_correct=is_correct,
            radius=radius,
            distance=distance,
            adversarial=adversarial,
        )

    def __getitem__(self, rows: Any) -> "Robustness":
        part = super().__getitem__(rows)
        return Robustness.of(epsilons=self.epsilons, **{name: getattr(part, name) for name in self._rows})

    def __repr__(self) -> str:
        between = ", ".join(
            f"{low:.1%} to {high:.1%} at {epsilon:g}"
            for epsilon, low, high in zip(self.epsilons, self.certified, self.attacked, strict=True)
        )
        return f"Robustness({len(self)} inputs, clean accuracy {self.clean:.1%}, robust accuracy {between})"

    def _repr_html_(self) -> str:
        rows = list(zip(self.epsilons, self.certified, self.attacked, strict=True))
        title = f"Robustness: {len(self)} inputs, clean accuracy {self.clean:.1%}"
        return _display.html_table(title, ("epsilon", "certified", "attacked"), rows)

    def _columns(self, y: Any = None) -> dict[str, np.ndarray]:
        return {"correct": self.is_correct, "radius": self.radius, "distance": self.distance}


def as_logits(model: Any) -> keras.Model:
    """The model as attack libraries expect one: a single score f becomes the logits `(-f / 2, f / 2)`.

    They differ by f, so predictions and certified radii are those of the model, whose layers are shared. A model
    with logits is returned as it is.

    Args:
        model: built model with one input and outputs `(n,)`, `(n, 1)` or `(n, classes)`.

    Raises:
        ValueError: for a model that is not built, several inputs, or other outputs.

    Example:

    >>> import hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(1, kernel_initializer="ones")])
    >>> logits = as_logits(model)
    >>> x = np.array([[1.0, 1.0]], "float32")
    >>> logits.predict(x, verbose=0).round(4).astype("float64").round(4).tolist()
    [[-0.7071, 0.7071]]
    >>> bool(np.isclose(*(hkr.certify(m, x, verbose=0).radius[0] for m in (model, logits))))
    True
    """
    if not model.built or len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(f"Expected a built model with one input and one output. Received: model '{model.name}'")
    score = model.outputs[0]
    if not margins.is_binary(score):
        return model
    if len(score.shape) == 1:
        score = keras.layers.Reshape((1,))(score)
    halves = keras.layers.Dense(2, use_bias=False, trainable=False, dtype="float32", name="two_logits")
    logits = keras.Model(model.inputs[0], halves(score), name=f"{model.name}_logits")
    halves.set_weights([np.array([[-0.5, 0.5]], dtype="float32")])
    return logits


def foolbox_model(function: Callable, bounds: tuple[float, float]) -> Any:
    """A function of tensors that returns logits, as foolbox's model of the backend in use.

    Args:
        function: from inputs `(n, ...)` to logits `(n, classes)`.
        bounds: the smallest and the largest value of an input.

    Raises:
        ImportError: without foolbox.

    Example:

    >>> foolbox_model(lambda x: 2 * x, (0.0, 1.0)).bounds.upper
    1.0
    """
    foolbox = _imported("foolbox")
    if keras.backend.backend() == "jax":
        return foolbox.JAXModel(function, bounds)
    layer = keras.layers.Lambda(function)
    if keras.backend.backend() == "tensorflow":
        return foolbox.TensorFlowModel(layer, bounds)
    return foolbox.PyTorchModel(layer.eval(), bounds)


def art_classifier(function: Callable, input_shape: Sequence[int], classes: int, bounds: tuple[float, float]) -> Any:
    """A function of tensors that returns logits, as ART's classifier; without a loss, and on JAX without gradients.

    Args:
        function: from inputs `(n, ...)` to logits `(n, classes)`.
        input_shape: of one input, without the batch.
        classes: number of logits.
        bounds: the smallest and the largest value of an input.

    Raises:
        ImportError: without ART.

    Example:

    >>> art_classifier(lambda x: 2 * x, (2,), 2, (0.0, 1.0)).predict(np.ones((3, 2), "float32")).tolist()
    [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    _imported("art")
    from art.estimators import classification

    options = {"clip_values": bounds, "channels_first": False}
    shape, layer = tuple(input_shape), keras.layers.Lambda(function)
    if keras.backend.backend() == "tensorflow":
        return classification.TensorFlowV2Classifier(layer, classes, shape, **options)
    if keras.backend.backend() == "torch":
        return classification.PyTorchClassifier(layer.eval(), None, shape, classes, **options)

    def predict(x: Any) -> Any:
        return _to_numpy(function(ops.convert_to_tensor(x, dtype="float32")))

    return classification.BlackBoxClassifierNeuralNetwork(predict, shape, classes, **options)


def _to_numpy(tensor: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(tensor))


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError("Attacks need foolbox and ART: pip install 'hkr_keras[attacks]'") from error


# ---- attacks by name: each yields changed inputs `(n, ...)`, one for each input -----------------------------------


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Batch:
    """What an attack sees: inputs, their predictions, and the logits as a function.

    `scaled` are the same logits, stretched until the surest prediction leads by `LEAD`: the softmax of attacks then
    follows the strongest rival, where it would mix all classes for small logits, and lose its gradient for large ones.
    """

    function: Callable
    scaled: Callable
    x: np.ndarray
    prediction: np.ndarray
    classes: int
    epsilons: list[float]
    bounds: tuple[float, float]
    steps: int


_Attack = Callable[[_Batch], Iterator[np.ndarray]]


def _of_foolbox(build: Callable) -> _Attack:
    def attack(batch: Any) -> Any:
        attacks = _imported("foolbox").attacks
        chosen = build(attacks, batch.steps)
        smallest = isinstance(chosen, attacks.base.MinimizationAttack)
        labels = ops.cast(batch.prediction, "int32" if keras.backend.backend() == "jax" else "int64")
        for epsilon in [None] if smallest else batch.epsilons:
            model = foolbox_model(batch.scaled, batch.bounds)
            with np.errstate(all="ignore"):
                yield _to_numpy(chosen(model, ops.convert_to_tensor(batch.x), labels, epsilons=epsilon)[1])

    return attack


def _of_art(build: Callable) -> _Attack:
    def attack(batch: Any) -> Any:
        _imported("art")
        from art.attacks import evasion

        classifier = art_classifier(batch.scaled, batch.x.shape[1:], batch.classes, batch.bounds)
        for epsilon in batch.epsilons:
            chosen = build(evasion, classifier, epsilon, batch)
            with np.errstate(all="ignore"):
                yield chosen.generate(batch.x, np.eye(batch.classes)[batch.prediction])

    return attack


def _auto_pgd(evasion: Any, classifier: Any, epsilon: Any, batch: Any) -> Any:
    if keras.backend.backend() == "jax":
        raise ValueError("Expected TensorFlow or PyTorch, whose gradients ART knows. Received: attack=AutoPGD on JAX")
    return evasion.AutoProjectedGradientDescent(
        classifier,
        norm=2,
        eps=epsilon,
        eps_step=epsilon / 4,
        max_iter=batch.steps,
        nb_random_init=1,
        batch_size=len(batch.x),
        loss_type="cross_entropy",
        verbose=False,
    )


def _square(evasion: Any, classifier: Any, epsilon: Any, batch: Any) -> Any:
    if batch.x.ndim != 4 or min(batch.x.shape[1:3]) < 5:
        raise ValueError(f"Expected images of at least 5 x 5 pixels. Received: attack=Square, shape={batch.x.shape}")
    return evasion.SquareAttack(
        classifier,
        norm=2,
        eps=epsilon,
        max_iter=10 * batch.steps,
        p_init=0.3,
        nb_restarts=1,
        batch_size=len(batch.x),
        verbose=False,
    )


ATTACKS: dict[str, _Attack] = {
    "PGD": _of_foolbox(lambda attacks, steps: attacks.L2PGD(steps=steps, rel_stepsize=0.25)),
    "DeepFool": _of_foolbox(lambda attacks, steps: attacks.L2DeepFoolAttack(steps=steps)),
    "DDN": _of_foolbox(lambda attacks, steps: attacks.DDNAttack(steps=steps)),
    "C&W": _of_foolbox(
        lambda attacks, steps: attacks.L2CarliniWagnerAttack(
            binary_search_steps=5, steps=steps, stepsize=0.05, initial_const=1.0
        )
    ),
    "AutoPGD": _of_art(_auto_pgd),
    "Square": _of_art(_square),
}


def evaluate_robustness(
    model: Any,
    x: Any,
    y: Any,
    epsilons: Sequence[float],
    attacks: Sequence = ("DeepFool", "DDN", "PGD"),
    certificate: Certificate | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    steps: int = 40,
    batch_size: int = 128,
    verbose: bool = True,
) -> Robustness:
    """Certifies a model and attacks it: its robust accuracy lies between the certified and the attacked one.

    Every attack aims at the prediction, right or wrong. What it finds is moved back along the way to the input until
    just before the prediction would change back, so distances are as small as the attack allows. Random starts follow
    `keras.utils.set_random_seed`.

    Args:
        model: built model with one input and raw scores `(n,)`, `(n, 1)` or logits `(n, classes)`.
        x: inputs `(n, ...)`, or what yields batches of them with their labels, as for `certify`; one batch of them is
            held at a time.
        y: labels `(n,)`, `(n, 1)` or one-hot; `None` for those that come with the inputs.
        epsilons: L2 distances in input units, above 0, at which to report accuracies; the sizes that `PGD`,
            `AutoPGD` and `Square` try. The others look for the smallest change.
        attacks: names of `ATTACKS`, or attacks of foolbox. `PGD`, `DeepFool`, `DDN` and `C&W` are foolbox's; `AutoPGD`
            (not on JAX) and `Square` (asks for predictions alone; images of at least 5 x 5 pixels) are ART's.
        certificate: of the model at x; `None` to make one.
        bounds: the smallest and the largest value that an input may take, as of the pixels of an image. `None` for
            no limits; attacks then stay within three times the range of a batch, beyond which nothing is close.
        steps: of each attack; ten times as many for `Square`.
        batch_size: inputs attacked at a time.
        verbose: whether to show a progress bar.

    Returns:
        A `Robustness` with clean, certified and attacked accuracy and the smallest distances.

    Raises:
        BrokenCertificate: when an attack succeeds inside a certified radius. If the certificate is not rigorous, by
            more than the rounding of the network, taken as a 1e-5th of `|x| + radius`.
        ValueError: for an unknown attack, no epsilons or such that are not above 0, inputs out of bounds, a
            certificate of another length; as `certify`.
        ImportError: without foolbox or ART.

    Example:

    >>> import hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(1, kernel_initializer="ones")])
    >>> x, y = np.array([[1.0, 1.0], [0.5, 0.0]]), np.array([1, 1])
    >>> found = evaluate_robustness(model, x, y, epsilons=[0.5], attacks=["DeepFool"], bounds=None, verbose=False)
    >>> found.certified.tolist(), found.attacked.tolist(), found.distance.round(3).tolist()
    ([0.5], [0.5], [1.414, 0.354])
    """
    epsilons = [number("epsilon", epsilon, strict=True) for epsilon in epsilons]
    chosen = {_name(attack): _attack(attack) for attack in attacks}
    if not epsilons or not chosen:
        raise ValueError(f"Expected epsilons and attacks. Received: epsilons={epsilons}, attacks={list(attacks)}")
    logits, (stream, count) = as_function(as_logits(model)), batches(model, x, batch_size)
    parts, start = [], 0
    total = None if count is None else count * len(chosen)
    with _imported("tqdm").tqdm(total=total, disable=not verbose, desc="attacks") as bar:
        for (inputs, *_), own in stream:
            rows = slice(start, start + len(inputs))
            part = certify(model, inputs, batch_size, verbose=0) if certificate is None else certificate[rows]
            if len(part) != len(inputs):
                raise ValueError(f"Expected a certificate of {rows.stop} inputs. Received: one of {start + len(part)}")
            is_correct = part.is_correct(own if y is None else np.asarray(y)[rows])
            classes, limits = max(2, part.classes), _bounds(inputs, bounds)
            x32 = inputs.astype(np.float32)
            batch = _Batch(
                function=logits,
                scaled=_scaled(logits, x32),
                x=x32,
                prediction=part.prediction,
                classes=classes,
                epsilons=epsilons,
                bounds=limits,
                steps=steps,
            )
            distance, adversarial = np.full(len(inputs), np.inf), np.full(x32.shape, np.nan, dtype=np.float32)
            for name, attack in chosen.items():
                for found in (x32, *attack(batch)):
                    points = _nearest(batch, found)
                    lengths = np.linalg.norm((points - inputs.astype(np.float64)).reshape(len(points), -1), axis=1)
                    lengths = np.where(_is_changed(batch, points), lengths, np.inf)
                    _check(name, start, part, inputs, points, lengths)
                    better = lengths < distance
                    distance[better], adversarial[better] = lengths[better], points[better]
                bar.update()
            parts.append((is_correct, part.radius, distance, adversarial))
            start = rows.stop
    for name, values in (("labels", y), ("radii", None if certificate is None else certificate.radius)):
        if values is not None and len(values) != start:
            raise ValueError(f"Expected {start} {name}, one per input. Received: {len(values)}")
    is_correct, radius, distance, adversarial = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Robustness.of(
        epsilons=np.array(epsilons), is_correct=is_correct, radius=radius, distance=distance, adversarial=adversarial
    )


def _name(attack: Any) -> str:
    return attack if isinstance(attack, str) else type(attack).__name__


def _attack(attack: Any) -> _Attack:
    if isinstance(attack, str):
        if attack not in ATTACKS:
            raise ValueError(f"Expected an attack of foolbox or one of {', '.join(ATTACKS)}. Received: {attack}")
        return ATTACKS[attack]
    return _of_foolbox(lambda attacks, steps: attack)


def _bounds(x: Any, bounds: Any) -> tuple[float, float]:
    low, high = float(x.min()), float(x.max())
    if bounds is None:
        spread = max(high - low, 1.0)
        return low - spread, high + spread
    if not bounds[0] <= low <= high <= bounds[1]:
        raise ValueError(
            "Expected inputs within the bounds, which bounds=None takes away. "
            f"Received: bounds={bounds}, inputs from {low} to {high}"
        )
    return float(bounds[0]), float(bounds[1])


def _scaled(logits: Callable, x: np.ndarray) -> Callable:
    values = np.sort(_to_numpy(logits(ops.convert_to_tensor(x))).astype(np.float64), axis=1)
    lead = float((values[:, -1] - values[:, -2]).max())
    factor = LEAD / lead if 0 < lead < np.inf else 1.0
    return lambda tensor: logits(tensor) * factor


def _is_changed(batch: _Batch, points: np.ndarray) -> np.ndarray:
    logits = _to_numpy(batch.function(ops.convert_to_tensor(points)))
    return np.isfinite(logits).all(axis=1) & (logits.argmax(axis=1) != batch.prediction)


def _nearest(batch: _Batch, points: Any) -> np.ndarray:
    """Float32 inputs within bounds, moved towards the attacked ones as far as they stay changed."""
    with np.errstate(invalid="ignore"):
        points = np.clip(np.where(np.isfinite(points), points, batch.x), *batch.bounds).astype(np.float32)
    return first_change(lambda moved: _is_changed(batch, moved), batch.x, points)


def _check(name: str, start: int, part: Certificate, x: Any, points: Any, lengths: Any) -> None:
    """Compares what an attack found of a batch, whose first input is number `start`, with its certificate."""
    radius, rounding = part.radius, 0.0 if part.rigorous else ROUNDING
    sizes = np.linalg.norm(x.astype(np.float64).reshape(len(points), -1), axis=1)
    for i in np.flatnonzero(lengths < radius * (1 - rounding) - rounding * sizes):
        raise BrokenCertificate(name, start + int(i), x[i], points[i], float(lengths[i]), float(radius[i]))
