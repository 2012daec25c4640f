"""Callbacks: keep kernels on their constraint sets, and put proven numbers into the logs."""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from hkr_keras import constraints, losses, margins
from hkr_keras._backends.compiling import settle
from hkr_keras._hints import renamed
from hkr_keras._registration import registered
from hkr_keras._validation import number
from hkr_keras.certification.batches import check_inputs, yields_batches
from hkr_keras.certification.bounds import lipschitz_bound
from hkr_keras.certification.certificates import certify
from hkr_keras.certification.singular_values import kernel_spectrum
from hkr_keras.geometry import flattened_layers, kernel_geometries, model_kernels

__all__ = ["CertifiedEvaluation", "LipschitzMonitor", "Orthonormalize"]

__getattr__ = renamed(
    __name__,
    {
        "CondenseCallback": "nothing (the stored kernel is the one that is used)",
        "MonitorCallback": "LipschitzMonitor",
        "LossParamScheduler": "a callback that sets loss.alpha, loss.margin or loss.temperature",
        "LossParamLog": "a callback that reads loss.alpha, loss.margin or loss.temperature",
    },
)

#: What reads all weights of a model while it trains: savers, early stopping, and whatever restores later.
_READERS = ("get_weights", "save", "save_weights", "export")


@registered
class Orthonormalize(keras.callbacks.Callback):
    """Projects kernels onto their constraint sets: after steps, and to full precision before validation and saving.

    Kernels of this package's layers carry a constraint, which the optimizer applies after each step; the callback
    projects them to full precision, and repairs what the constraint does not see (weight averaging, loaded weights).
    Those with `Orthonormal(every=n)` are projected in one step of n while it is there.
    In a model of plain Keras layers it makes the kernels of Dense and convolution layers orthonormal by itself, with
    the same geometry, so that a plain model becomes 1-Lipschitz layer by layer. Kernels with the constraint
    `DeferredOrthonormal()` wait for the callback in the same way. Both are left alone in frozen layers.

    Whatever `every` is, all of them are projected to full precision when training begins and ends, before the model is
    validated, and before its weights are saved or kept while it trains (`save`, `save_weights`, `export`,
    `get_weights`). So validation, `ModelCheckpoint` and `EarlyStopping(restore_best_weights=True)` see a model on the
    constraint set, with the averages of `SwapEMAWeights` too, in whatever order the callbacks are listed.

    A warning is given when training begins with a loss of raw scores and a metric with a threshold other than 0, such
    as Keras's `"accuracy"`, which compares scores with 0.5.

    Args:
        every: when to project the kernels that no optimizer projects: `"batch"` (after each optimizer step), an integer
            n (after every n batches, counted from the start of training), `"epoch"` or `"train_end"`. Between two
            projections such kernels are off the constraint set; `lipschitz_bound` tells by how much.
        layers: whose kernels to project of the layers without a constraint: names of layers, layers, or a function of a
            layer that returns a boolean. A nested model stands for all that is in it. By default all of them in a
            model of plain layers, and none in a model that holds layers of this package with kernels, whose plain
            layers are another part: a generator, a pretrained backbone.
        verbose: 1 to print once, when training begins, which kernels are projected, 0 not to; `"auto"` as in `fit`.

    Raises:
        ValueError: for another value of `every`; when training begins, for layers that the model does not have, for
            kernels that no optimizer projects under `every="batch"` or n with `steps_per_execution > 1` (a callback
            runs once for several steps), and for plain kernels that carry a constraint of another library.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    >>> model.compile("adam", hkr.losses.HKR(), metrics=[hkr.metrics.Accuracy()])
    >>> x, y = np.random.default_rng(0).normal(size=(32, 4)), np.arange(32) % 2
    >>> history = model.fit(x, y, verbose=0, callbacks=[hkr.callbacks.Orthonormalize()])
    >>> bool(hkr.lipschitz_bound(model) < 1 + 1e-5)
    True

    Reference:
        Björck and Bowie 1971; Serrurier et al., CVPR 2021 (arXiv 2006.06520), section 4.
    """

    def __init__(
        self, every: str | int = "batch", layers: constraints.Layers = None, verbose: int | str = "auto"
    ) -> None:
        super().__init__()
        is_number = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        if not is_number and every not in ("batch", "epoch", "train_end"):
            raise ValueError(
                f"Expected 'batch', 'epoch', 'train_end' or an integer of at least 1. Received: every={every}"
            )
        self.every, self.layers, self.verbose = every, layers, verbose
        self._period = every if isinstance(every, int) else {"batch": 1}.get(every)
        self._batches = 0
        self._waiting: list = []  # kernels that no optimizer projects, each with its constraint
        self._project_waiting: Callable | None = None
        self._taking_turns: list[constraints.Orthonormal] = []  # constraints that project in one step of several
        self._is_training = self._has_said = self._has_warned = False

    def get_config(self) -> dict[str, Any]:
        layers: Any = self.layers
        if callable(layers) and not isinstance(layers, keras.layers.Layer):
            layers = keras.saving.serialize_keras_object(layers)
        elif layers is not None:
            listed = [layers] if isinstance(layers, str | keras.layers.Layer) else layers
            layers = [item if isinstance(item, str) else item.name for item in listed]
        return {"every": self.every, "layers": layers, "verbose": self.verbose}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Orthonormalize":
        layers = config.get("layers")
        return cls(**{**config, "layers": keras.saving.deserialize_keras_object(layers)})

    def __repr__(self) -> str:
        return f"Orthonormalize(every={self.every!r}, layers={self.layers!r})"

    def on_train_begin(self, logs: Any = None) -> None:
        kernels = list(constraints.constrained_kernels(self.model, self.layers))
        waiting = [target for target in kernels if constraints.is_deferred(target[1])]
        self._waiting = [(kernel, constraint) for _, kernel, constraint in waiting]
        self._batches, self._project_waiting = 0, None
        self._taking_turns = [c for *_, c in kernels if isinstance(c, constraints.Orthonormal) and c.every > 1]
        for index, constraint in enumerate(self._taking_turns):
            constraint.take_turns(self._optimizer().iterations, index)
        if waiting and self._period and self.model.steps_per_execution > 1:
            raise ValueError(
                "Expected steps_per_execution=1: with more, a callback runs once for several optimizer steps. "
                "Use hkr_keras layers with Orthonormal(), which runs in every step, or every='epoch'. "
                f"Received: steps_per_execution={self.model.steps_per_execution}, every={self.every!r} and layers "
                f"without a constraint or with DeferredOrthonormal(): {', '.join(layer.name for layer, *_ in waiting)}"
            )
        self._say(kernels)
        self._warn()
        self._polish()
        self._is_training = True
        for name in _READERS:
            setattr(self._model, name, _after(self._polish, getattr(type(self._model), name), self._model))

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 0:  # behind what other callbacks assign when an epoch begins
            model = self.model
            optimizer = [] if model.optimizer is None else model.optimizer.variables
            settle([*model.variables, *optimizer, *model.metrics_variables])

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._batches += 1
        if self._batches == 1:  # Keras may make the metrics in the first step only
            self._warn()
        if self._waiting and self._period and self._batches % self._period == 0:
            _ = self.model  # on JAX this brings the values back
            if self._project_waiting is None:
                self._project_waiting = constraints.projection(self._waiting)
            self._project_waiting()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.every != "train_end":
            self._polish()

    def on_test_begin(self, logs: Any = None) -> None:
        if self._is_training or self._uses_averages():
            self._polish()

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 0 and self._uses_averages():  # a SwapEMAWeights that is listed later has put averages in place
            self._polish()

    def on_train_end(self, logs: Any = None) -> None:
        self._polish()
        for constraint in self._taking_turns:
            constraint.take_turns(None)
        # Without tensors it can be copied.
        self._waiting, self._project_waiting, self._taking_turns, self._is_training = [], None, [], False
        for name in _READERS:
            if name in vars(self._model):
                delattr(self._model, name)

    def _optimizer(self) -> Any:
        """That of the model, without a scale of the loss around it."""
        optimizer = getattr(self._model, "optimizer", None)
        return getattr(optimizer, "inner_optimizer", optimizer)

    def _uses_averages(self) -> bool:
        return bool(getattr(self._optimizer(), "use_ema", False))

    def _polish(self) -> None:
        constraints.project(self.model, polish=True, layers=self.layers)

    def _warn(self) -> None:
        """Warns once of metrics that compare raw scores with another number than 0."""
        names = [] if self._has_warned else _misleading_metrics(self.model)
        self._has_warned = self._has_warned or bool(names)
        for name in names:
            warnings.warn(
                f"The loss trains a raw score, which is positive for class 1, and the metric '{name}' compares it with "
                "a threshold other than 0. Use hkr_keras.metrics.Accuracy(), or thresholds=0.",
                stacklevel=2,
            )

    def _say(self, kernels: list) -> None:
        """Prints once what is projected and what is not."""
        if self._has_said:
            return
        self._has_said = True
        verbose = (self.params or {}).get("verbose", 0) if self.verbose == "auto" else self.verbose
        if verbose:
            projected = {id(kernel) for _, kernel, _ in kernels}
            left = [layer.name for layer, kernel, _ in model_kernels(self.model) if id(kernel) not in projected]
            print(f"Orthonormalize projects {_listed([layer.name for layer, *_ in kernels])}", end="")
            print(f", and leaves alone {_listed(left)}." if left else ".")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"{len(names)} kernel{'s' * (len(names) != 1)}" + (f" ({shown})" if names else "")


def _after(first: Callable[[], None], method: Callable, model: Any) -> Callable:
    """A method of a model that runs `first` before each call."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        first()
        return method(model, *args, **kwargs)

    return call


def _misleading_metrics(model: Any) -> list[str]:
    """Names of Keras's metrics that compare the raw scores of a model with a threshold other than 0."""
    loss = getattr(model, "loss", None)
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    hinges = (keras.losses.Hinge, keras.losses.SquaredHinge, keras.losses.hinge, keras.losses.squared_hinge)
    is_raw = isinstance(loss, losses.KR | losses.HingeMargin | losses.HKR) or loss in hinges[2:]
    is_raw = is_raw or isinstance(loss, hinges[:2])
    if not is_raw and isinstance(loss, keras.losses.BinaryCrossentropy | keras.losses.BinaryFocalCrossentropy):
        is_raw = loss.get_config()["from_logits"]
    if not is_raw:
        return []
    compiled = [metric for group in model.metrics for metric in getattr(group, "metrics", [group])]
    return [metric.name for metric in compiled if not _has_threshold_of_0(metric.get_config())]


def _has_threshold_of_0(config: dict[str, Any]) -> bool:
    """Whether a metric with that configuration compares scores with 0, or with nothing."""
    if "from_logits" in config:  # AUC
        return config["from_logits"]
    given = [config[key] for key in ("threshold", "thresholds") if key in config]
    return all(value is not None and not np.any(value) for value in given)


class LipschitzMonitor(keras.callbacks.Callback):
    """Puts the proven bound and the extreme singular values of all kernels into `logs` after each epoch.

    Keys: `lipschitz_bound` (of the model), `sigma_min` and `sigma_max` (over all kernels), so that every logger
    of Keras sees them. List it before the loggers.

    Raises:
        ValueError: when training begins, for a model with a layer that has no bound.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(1)])
    >>> model.compile("adam", hkr.losses.HKR())
    >>> history = model.fit(np.ones((8, 4)), np.arange(8) % 2, verbose=0, callbacks=[hkr.callbacks.LipschitzMonitor()])
    >>> sorted(history.history)
    ['lipschitz_bound', 'loss', 'sigma_max', 'sigma_min']
    """

    def on_train_begin(self, logs: Any = None) -> None:
        lipschitz_bound(self.model)  # a layer without a bound is refused now, not after an epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is None:
            return
        model = self.model
        logs["lipschitz_bound"] = lipschitz_bound(model)
        spectra = [
            kernel_spectrum(layer, name)
            for layer in (model, *flattened_layers(model))
            for name in kernel_geometries(layer)
        ]
        if spectra:
            logs["sigma_min"] = min(spectrum.smallest for spectrum in spectra)
            logs["sigma_max"] = max(spectrum.largest for spectrum in spectra)


class CertifiedEvaluation(keras.callbacks.Callback):
    """Certifies a data set after each epoch, with the real last layer, and puts the numbers into `logs`.

    Keys: `clean_accuracy`, `certified_accuracy_0.25` (one per epsilon), `mean_certified_radius` and
    `lipschitz_bound`. Unlike the metrics these are proven, not promised.

    Args:
        x: inputs as for `certify`, or data that yield them with their labels at each epoch anew.
        y: labels as for `Certificate.accuracy`; `None` for those that come with the inputs.
        epsilons: L2 distances in input units.
        batch_size: inputs per batch.
        rigorous: whether the numbers cover the rounding of the float32 network, as in `certify`.

    Raises:
        ValueError: when training begins, for what `certify` refuses (a layer without a bound, a score of one sign,
            inputs of another shape or type than the model's, or NaN), labels that do not fit, and a negative epsilon.
            Of data that yield batches, shapes and labels are seen when they are read, after the first epoch.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(1)])
    >>> model.compile("adam", hkr.losses.HKR())
    >>> x, y = np.ones((8, 4)), np.arange(8) % 2
    >>> history = model.fit(x, y, verbose=0, callbacks=[hkr.callbacks.CertifiedEvaluation(x, y, [0.25])])
    >>> "certified_accuracy_0.25" in history.history
    True
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        epsilons: Iterable[float] = (),
        batch_size: int = 128,
        rigorous: bool = False,
    ) -> None:
        super().__init__()
        if hasattr(x, "__next__"):
            raise ValueError(
                "Expected data that can be read at each epoch: arrays, a dataset or a loader. "
                f"Received: x of type {type(x).__name__}, which ends after one"
            )
        self.x, self.y, self.epsilons = x, y, tuple(epsilons)
        self.batch_size, self.rigorous = batch_size, rigorous

    def __repr__(self) -> str:
        return f"CertifiedEvaluation(epsilons={self.epsilons}, rigorous={self.rigorous})"

    def on_train_begin(self, logs: Any = None) -> None:
        for epsilon in self.epsilons:
            number("epsilon", epsilon)
        model, streamed = self.model, yields_batches(self.x)
        inputs = getattr(model, "inputs", None) or []
        if not streamed:
            arrays = check_inputs(model, self.x)
            given = None if self.y is None else np.shape(self.y)
            if not given or given[0] != len(arrays[0]):
                received = f"len(y)={given[0]}" if given else f"y={self.y}"
                raise ValueError(f"Expected as many labels as inputs. Received: {received}, len(x)={len(arrays[0])}")
        elif any(None in tensor.shape[1:] for tensor in inputs):
            arrays = []
        else:  # data that may be read once only: an input of zeros tells what is refused whatever they are
            arrays = [np.zeros((1, *tensor.shape[1:])) for tensor in inputs]
        if not lipschitz_bound(model) or not arrays:
            return  # a bound of 0 is that of kernels that start at zero, and do not stay there
        first = [array[: self.batch_size] for array in arrays]
        certificate = certify(
            model, first if len(first) > 1 else first[0], self.batch_size, verbose=0, rigorous=self.rigorous
        )
        if not streamed:
            margins.class_indices(self.y, certificate.classes)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is None:
            return
        certificate = certify(self.model, self.x, self.batch_size, verbose=0, rigorous=self.rigorous)
        logs["clean_accuracy"] = certificate.accuracy(self.y)
        for epsilon in self.epsilons:
            logs[f"certified_accuracy_{epsilon:g}"] = certificate.accuracy(self.y, epsilon)
        logs["mean_certified_radius"] = certificate.mean_radius(self.y)
        logs["lipschitz_bound"] = certificate.bound
