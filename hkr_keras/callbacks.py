"""Callbacks: keep kernels orthonormal from outside, and put proven numbers into the logs."""

from collections.abc import Callable, Iterable

import keras

from hkr_keras import constraints
from hkr_keras._registration import registered
from hkr_keras.certification.bounds import lipschitz_bound
from hkr_keras.certification.certificates import certify
from hkr_keras.certification.singular_values import kernel_spectrum
from hkr_keras.geometry import flattened_layers, kernel_geometries


@registered
class Orthonormalize(keras.callbacks.Callback):
    """Re-orthonormalises kernels after each optimizer step, and to full precision at epoch and train end.

    Kernels of this package's layers carry a constraint, which the optimizer applies after each step; the
    callback polishes them, and repairs what runs behind the constraint (weight averaging, loaded weights).
    Kernels of plain Keras Dense and convolution layers carry none: the callback projects them itself, with the
    same geometry, so a plain model becomes 1-Lipschitz layer by layer. Kernels with the constraint
    `DeferredOrthonormal()` wait for the callback in the same way. Both are left alone in frozen layers.

    Args:
        every: when to project the kernels that wait for it: `"batch"` (after each optimizer step), an integer n
            (after every n batches, counted from the start of training), `"epoch"` or `"train_end"`. Between two
            projections such kernels are off the constraint set; `lipschitz_bound` tells by how much.

    Raises:
        ValueError: for another value of `every`; when training begins, for kernels that wait under
            `every="batch"` or n with `steps_per_execution > 1` (a callback runs once for several steps), and for
            plain kernels that carry a constraint of another library.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    >>> model.compile("adam", hkr.losses.HKR())
    >>> x, y = np.random.default_rng(0).normal(size=(32, 4)), np.arange(32) % 2
    >>> history = model.fit(x, y, verbose=0, callbacks=[hkr.callbacks.Orthonormalize()])
    >>> bool(hkr.lipschitz_bound(model) < 1 + 1e-5)
    True

    Reference:
        Björck and Bowie 1971; Serrurier et al., CVPR 2021 (arXiv 2006.06520), section 4.
    """

    def __init__(self, every: str | int = "batch"):
        super().__init__()
        is_number = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        if not is_number and every not in ("batch", "epoch", "train_end"):
            raise ValueError(
                f"Expected 'batch', 'epoch', 'train_end' or an integer of at least 1. Received: every={every}"
            )
        self.every = every
        self._period = every if isinstance(every, int) else {"batch": 1}.get(every)
        self._batches = 0
        self._waiting: list = []  # kernels that no optimizer projects, each with its constraint
        self._project_waiting: Callable | None = None

    def get_config(self) -> dict:
        return {"every": self.every}

    @classmethod
    def from_config(cls, config: dict) -> "Orthonormalize":
        return cls(**config)

    def on_train_begin(self, logs=None):
        waiting = [
            target for target in constraints.constrained_kernels(self.model) if constraints.is_deferred(target[1])
        ]
        self._waiting = [(kernel, constraint) for _, kernel, constraint in waiting]
        self._batches, self._project_waiting = 0, None
        if waiting and self._period and self.model.steps_per_execution > 1:
            raise ValueError(
                "Expected steps_per_execution=1: with more, a callback runs once for several optimizer steps. "
                "Use hkr_keras layers with Orthonormal(), which runs in every step, or every='epoch'. "
                f"Received: steps_per_execution={self.model.steps_per_execution}, every={self.every!r} and layers "
                f"without a constraint or with DeferredOrthonormal(): {', '.join(layer.name for layer, *_ in waiting)}"
            )
        self._polish()

    def on_train_batch_end(self, batch, logs=None):
        self._batches += 1
        if self._waiting and self._period and self._batches % self._period == 0:
            _ = self.model  # on JAX this brings the values back
            if self._project_waiting is None:
                self._project_waiting = constraints.projection(self._waiting)
            self._project_waiting()

    def on_epoch_end(self, epoch, logs=None):
        if self.every != "train_end":
            self._polish()

    def on_test_begin(self, logs=None):
        if self._uses_averages():  # SwapEMAWeights has just put unprojected averages in place
            self._polish()

    def on_train_end(self, logs=None):
        self._polish()
        self._waiting, self._project_waiting = [], None  # a callback without tensors can be copied

    def _uses_averages(self) -> bool:
        optimizer = getattr(self._model, "optimizer", None)
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        return bool(getattr(optimizer, "use_ema", False))

    def _polish(self):
        constraints.project(self.model, polish=True)


class LipschitzMonitor(keras.callbacks.Callback):
    """Puts the proven bound and the extreme singular values of all kernels into `logs` after each epoch.

    Keys: `lipschitz_bound` (of the model), `sigma_min` and `sigma_max` (over all kernels), so that every logger
    of Keras sees them. List it before the loggers.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(1)])
    >>> model.compile("adam", hkr.losses.HKR())
    >>> history = model.fit(np.ones((8, 4)), np.arange(8) % 2, verbose=0, callbacks=[hkr.callbacks.LipschitzMonitor()])
    >>> sorted(history.history)
    ['lipschitz_bound', 'loss', 'sigma_max', 'sigma_min']
    """

    def on_epoch_end(self, epoch, logs=None):
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

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(1)])
    >>> model.compile("adam", hkr.losses.HKR())
    >>> x, y = np.ones((8, 4)), np.arange(8) % 2
    >>> history = model.fit(x, y, verbose=0, callbacks=[hkr.callbacks.CertifiedEvaluation(x, y, [0.25])])
    >>> "certified_accuracy_0.25" in history.history
    True
    """

    def __init__(self, x, y, epsilons: Iterable[float], batch_size: int = 128, rigorous: bool = False):
        super().__init__()
        self.x, self.y, self.epsilons = x, y, tuple(epsilons)
        self.batch_size, self.rigorous = batch_size, rigorous

    def on_epoch_end(self, epoch, logs=None):
        if logs is None:
            return
        certificate = certify(self.model, self.x, self.batch_size, verbose=0, rigorous=self.rigorous)
        logs["clean_accuracy"] = certificate.accuracy(self.y)
        for epsilon in self.epsilons:
            logs[f"certified_accuracy_{epsilon:g}"] = certificate.accuracy(self.y, epsilon)
        logs["mean_certified_radius"] = certificate.mean_radius(self.y)
        logs["lipschitz_bound"] = certificate.bound
