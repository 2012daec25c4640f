"""A classifier and a regressor for scikit-learn, with certificates.

Needs scikit-learn: `pip install 'hkr_keras[sklearn]'`. It is not imported with the package:
`from hkr_keras.sklearn import HKRClassifier, HKRRegressor`.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import numbers
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.metrics import r2_score
    from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "HKRClassifier and HKRRegressor need scikit-learn 1.6 or newer: pip install 'hkr_keras[sklearn]'"
    ) from error

from hkr_keras import layers, losses, metrics, models
from hkr_keras._validation import number
from hkr_keras.callbacks import Orthonormalize
from hkr_keras.certification.certificates import Certificate, OutputCertificate, certify, certify_outputs
from hkr_keras.certification.floating_point import MACHINE_EPSILON

__all__ = ["HKRClassifier", "HKRRegressor"]

_Build = Callable[[Sequence[int], int], keras.Model]
_default_model = functools.partial(models.lipschitz_mlp, widths=(64, 64))


class _Estimator(BaseEstimator):
    """Building, training and running the network, whose parameters are attributes of the classes below."""

    def _train(
        self, X: np.ndarray, y: np.ndarray, outputs: int, loss: Any, measures: Any = None, scale: float | None = None
    ) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"Expected an integer of at least 1. Received: {name}={value}")
        random_state = check_random_state(self.random_state)
        batches = _FullBatches(X, y, min(self.batch_size, len(X)), random_state)
        rate = keras.optimizers.schedules.CosineDecay(self.learning_rate, self.epochs * len(batches))
        with _python_seed(random_state.randint(2**31 - 1)):  # where Keras takes the seeds of layers from
            model = self._build(X.shape[1:], outputs)
            if scale is not None:
                model = keras.Sequential([keras.Input(X.shape[1:]), model, layers.Scale(scale)])
            model.compile(
                keras.optimizers.get({"class_name": self.optimizer, "config": {"learning_rate": rate}}),
                loss=loss,
                metrics=measures,
            )
            callbacks = [*copy.deepcopy(list(self.callbacks or ())), Orthonormalize()]
            history = model.fit(batches, epochs=self.epochs, shuffle=False, callbacks=callbacks, verbose=self.verbose)
        self.model_, self.history_ = model, history.history

    def _build(self, input_shape: Sequence[int], outputs: int) -> keras.Model:
        build = _default_model if self.model is None else self.model
        if isinstance(build, keras.Model) or not callable(build):
            raise ValueError(f"Expected a function (input_shape, outputs) -> keras.Model. Received: model={build!r}")
        model = build(input_shape, outputs)
        if tuple(model.output_shape) != (None, outputs):
            raise ValueError(
                f"Expected a model with outputs of shape (None, {outputs}). "
                f"Received: model.output_shape={model.output_shape}"
            )
        return model

    def _run(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, dtype="float32", reset=False)
        starts = range(0, len(X), self.batch_size)  # no pipeline of data: `Model.predict` makes one in every call
        return np.concatenate([self.model_.predict_on_batch(X[i : i + self.batch_size]) for i in starts])

    def _inputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, X, dtype=("float64", "float32"), reset=False)


class HKRClassifier(ClassifierMixin, _Estimator):
    """A 1-Lipschitz network that is trained with HKR and certifies its predictions, as a scikit-learn estimator.

    Two classes are told apart by the sign of one score and the loss `HKR`, more classes by as many logits and
    `MulticlassHKR`. Radii are L2 distances in the units of the X that the estimator sees: in a pipeline behind a
    `StandardScaler` these are the scaled ones. There is no `predict_proba`: a score is a distance, not a probability.

    Args:
        model: function `(input_shape, outputs) -> keras.Model` whose outputs `(batch, outputs)` are raw scores or
            logits of inputs `(n_features,)`. `None` is `models.lipschitz_mlp` with hidden layers of 64 and 64.
        alpha: weight of the hinge, at least 0; larger is nearer to accuracy.
        margin: in units of X, at least 0; larger is nearer to robustness.
        optimizer: name of a Keras optimizer.
        learning_rate: of the first step; it falls to 0 as a cosine.
        epochs: passes over the data.
        batch_size: inputs per training step, or all when there are fewer, and per batch of predictions.
        callbacks: Keras callbacks, which every `fit` copies. `Orthonormalize` always runs after them.
        random_state: `None`, an integer or a `numpy.random.RandomState`, of the first weights and the batches.
        verbose: as in `keras.Model.fit`.

    Attributes:
        classes_: sorted labels `(classes,)`, of any type.
        model_: the trained Keras model.
        history_: the logs of every epoch, a dictionary of lists: `loss`, `accuracy`, and what callbacks add.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Raises:
        ValueError: in `fit`, for fewer than two classes, parameters out of range, and a model with other outputs.

    Example:

    >>> import numpy as np
    >>> from hkr_keras.sklearn import HKRClassifier
    >>> X, y = np.array([[-2.0], [-1.0], [1.0], [2.0]]), ["left", "left", "right", "right"]
    >>> classifier = HKRClassifier(epochs=5, random_state=0).fit(X, y)
    >>> classifier.predict([[-3.0], [3.0]]).tolist()
    ['left', 'right']
    >>> classifier.certified_score(X, y, epsilon=0.5)
    1.0

    Reference:
        Serrurier et al., CVPR 2021 (arXiv 2006.06520).
    """

    def __init__(
        self,
        model: _Build | None = None,
        *,
        alpha: float = 50.0,
        margin: float = 0.5,
        optimizer: str = "adam",
        learning_rate: float = 1e-2,
        epochs: int = 50,
        batch_size: int = 32,
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: str | int = 0,
    ) -> None:
        self.model = model
        self.alpha = alpha
        self.margin = margin
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.callbacks = callbacks
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> "HKRClassifier":
        """Trains a new model on X `(n, n_features)`, cast to float32, and labels y `(n,)`."""
        X, y = validate_data(self, X, y, dtype="float32")
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        classes = len(self.classes_)
        if classes < 2:
            raise ValueError("Expected labels of at least 2 classes. Received: y with 1 class")
        loss = losses.HKR if classes == 2 else losses.MulticlassHKR
        outputs, measures = 1 if classes == 2 else classes, [metrics.Accuracy()]
        self._train(X, labels, outputs, loss(self.alpha, self.margin), measures)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Float32 scores `(n,)` for two classes, positive for `classes_[1]`; else logits `(n, classes)`."""
        outputs = self._run(X)
        return outputs[:, 0] if len(self.classes_) == 2 else outputs

    def predict(self, X: Any) -> np.ndarray:
        """Labels `(n,)`, entries of `classes_`."""
        outputs = self.decision_function(X)
        return self.classes_[outputs.argmax(axis=1) if outputs.ndim == 2 else (outputs > 0).astype(int)]

    def certify(self, X: Any, rigorous: bool = False) -> Certificate:
        """The certificate of every input, see `hkr_keras.certify`. Its predictions are indices into `classes_`."""
        X = self._inputs(X)
        return certify(self.model_, X, batch_size=self.batch_size, verbose=0, rigorous=rigorous)

    def certified_radius(self, X: Any, rigorous: bool = False) -> np.ndarray:
        """Radii `(n,)`, L2 distances in units of X below which the prediction cannot change."""
        return self.certify(X, rigorous).radius

    def certified_score(self, X: Any, y: Any, epsilon: float, rigorous: bool = False) -> float:
        """Certified accuracy: the share of inputs with the right label and a radius above epsilon.

        `scoring=` of scikit-learn takes a function: `lambda estimator, X, y: estimator.certified_score(X, y, 0.25)`,
        and behind a scaler `lambda pipe, X, y: pipe[-1].certified_score(pipe[:-1].transform(X), y, 0.25)`.

        Args:
            X: inputs `(n, n_features)`.
            y: labels `(n,)`, as in `fit`.
            epsilon: distance in units of X, at least 0.
            rigorous: whether to cover the rounding of the float32 network.

        Raises:
            ValueError: for labels of another length, or a negative epsilon.
        """
        epsilon = number("epsilon", epsilon)
        certificate = self.certify(X, rigorous)
        check_consistent_length(certificate.prediction, y)
        correct = self.classes_[certificate.prediction] == column_or_1d(y)
        return float((correct & (certificate.radius > epsilon)).mean())


class HKRRegressor(RegressorMixin, _Estimator):
    """A Lipschitz network for one number, whose predictions come with intervals, as a scikit-learn estimator.

    The network is trained on standardised targets. `certify` tells between which values the prediction stays while an
    input moves by at most epsilon: an L2 distance in the units of the X that the estimator sees, so scale the columns
    of X to comparable units first.

    Args:
        model: function `(input_shape, outputs) -> keras.Model` with outputs `(batch, 1)` for inputs `(n_features,)`.
            `None` is `models.lipschitz_mlp` with hidden layers of 64 and 64, whose constant is 1.
        lipschitz: factor behind the model, above 0. With a model of constant 1 it is the most that a prediction may
            change, in standard deviations of y, per unit of X: larger fits more closely, smaller gives narrower
            intervals.
        loss: name of a Keras loss, or a loss.
        optimizer: name of a Keras optimizer.
        learning_rate: of the first step; it falls to 0 as a cosine.
        epochs: passes over the data.
        batch_size: inputs per training step, or all when there are fewer, and per batch of predictions.
        callbacks: Keras callbacks, which every `fit` copies. `Orthonormalize` always runs after them.
        random_state: `None`, an integer or a `numpy.random.RandomState`, of the first weights and the batches.
        verbose: as in `keras.Model.fit`.

    Attributes:
        model_: the trained Keras model, whose outputs are standardised: `(prediction - mean_) / scale_`.
        mean_, scale_: mean and standard deviation of the y of `fit` (1 where that is 0).
        history_: the logs of every epoch, a dictionary of lists.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Raises:
        ValueError: in `fit`, for parameters out of range, and a model with other outputs.

    Example:

    >>> import numpy as np
    >>> from hkr_keras.sklearn import HKRRegressor
    >>> X = np.linspace(-1, 1, 64)[:, None]
    >>> regressor = HKRRegressor(lipschitz=4.0, epochs=60, random_state=0).fit(X, 10 + 3 * X[:, 0])
    >>> interval = regressor.certify([[0.0], [0.5]], epsilon=0.1)
    >>> bool((interval.lower < interval.value).all()), bool(regressor.score(X, 10 + 3 * X[:, 0]) > 0.9)
    (True, True)

    Reference:
        Anil et al., ICML 2019 (arXiv 1811.05381), for the layers.
    """

    def __init__(
        self,
        model: _Build | None = None,
        *,
        lipschitz: float = 1.0,
        loss: str | keras.Loss = "mean_squared_error",
        optimizer: str = "adam",
        learning_rate: float = 1e-2,
        epochs: int = 50,
        batch_size: int = 32,
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: str | int = 0,
    ) -> None:
        self.model = model
        self.lipschitz = lipschitz
        self.loss = loss
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.callbacks = callbacks
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> "HKRRegressor":
        """Trains a new model on X `(n, n_features)`, cast to float32, and numbers y `(n,)`."""
        X, y = validate_data(self, X, y, dtype="float32", y_numeric=True)
        lipschitz = number("lipschitz", self.lipschitz, strict=True)
        y = y.astype("float64")
        with np.errstate(over="ignore", invalid="ignore"):
            self.mean_, self.scale_ = float(y.mean()), float(y.std()) or 1.0
        if not math.isfinite(self.mean_) or not math.isfinite(self.scale_):
            raise ValueError(
                "Expected numbers whose mean and deviation float64 can hold. "
                f"Received: y with mean {self.mean_} and deviation {self.scale_}"
            )
        targets = ((y - self.mean_) / self.scale_).astype("float32")[:, None]
        self._train(X, targets, 1, copy.deepcopy(self.loss), scale=lipschitz)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Float64 predictions `(n,)`, in units of y."""
        outputs = self._run(X)[:, 0].astype("float64")
        return self.mean_ + self.scale_ * outputs

    def certify(self, X: Any, epsilon: float, rigorous: bool = False) -> OutputCertificate:
        """Intervals that no prediction leaves while its input moves by at most epsilon.

        They are those of `hkr_keras.certify_outputs`, in units of y.

        Args:
            X: inputs `(n, n_features)`.
            epsilon: L2 distance in units of X, at least 0.
            rigorous: whether to cover the rounding of the float32 network.

        Returns:
            An `OutputCertificate` whose `value`, `lower` and `upper` are `(n,)`, and its `bound`, in units of y.

        Raises:
            ValueError: for a negative epsilon.
        """
        X, epsilon = self._inputs(X), number("epsilon", epsilon)
        found = certify_outputs(self.model_, X, epsilon, self.batch_size, verbose=0, rigorous=rigorous)
        value, lower, upper = (
            self.mean_ + self.scale_ * part.reshape(-1) for part in (found.value, found.lower, found.upper)
        )
        rounding = 4 * MACHINE_EPSILON * (abs(self.mean_) + np.abs(lower) + np.abs(upper))
        bound = found.bound * self.scale_ * (1 + 4 * MACHINE_EPSILON)
        return dataclasses.replace(found, value=value, lower=lower - rounding, upper=upper + rounding, bound=bound)

    def certified_score(self, X: Any, y: Any, epsilon: float, rigorous: bool = False) -> float:
        """Certified R2: the coefficient of determination with each prediction at the worse end of its interval.

        No change of the inputs by at most epsilon each makes `score` lower.

        Args:
            X: inputs `(n, n_features)`.
            y: numbers `(n,)`.
            epsilon: L2 distance in units of X, at least 0.
            rigorous: whether to cover the rounding of the float32 network.

        Raises:
            ValueError: for a y of another length, or a negative epsilon.
        """
        interval = self.certify(X, epsilon, rigorous)
        check_consistent_length(interval.value, y)
        y = column_or_1d(y)
        worse = np.where(y - interval.lower > interval.upper - y, interval.lower, interval.upper)
        return float(r2_score(y, worse)) if np.isfinite(worse).all() else -math.inf


class _FullBatches(keras.utils.PyDataset):
    """Batches in a new order every epoch. The last one is filled up with the first inputs of that order.

    Class means over the two or three inputs that happen to be left would be noise, and one shape is one compilation.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, batch_size: int, random_state: np.random.RandomState) -> None:
        super().__init__()
        self._x, self._y, self._batch_size, self._random_state = x, y, batch_size, random_state
        self.on_epoch_end()

    def __len__(self) -> int:
        return math.ceil(len(self._x) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self._order[index]
        return self._x[rows], self._y[rows]

    def on_epoch_end(self) -> None:
        order = self._random_state.permutation(len(self._x))
        self._order = np.resize(order, (len(self), self._batch_size))


@contextlib.contextmanager
def _python_seed(seed: int) -> Iterator[None]:
    """Seeds Python's generator for a while, and puts it back as it was."""
    state = random.getstate()
    random.seed(int(seed))
    try:
        yield
    finally:
        random.setstate(state)
