"""Constraint sets for kernels: projections of matrices (`linalg`) applied to the matrices in a kernel (`geometry`)."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from hkr_keras import linalg
from hkr_keras._backends.compiling import branch, compiled, in_one_go
from hkr_keras._hints import renamed
from hkr_keras._registration import registered
from hkr_keras.geometry import Geometry, flattened_layers, model_kernels

Tensor = Any

__all__ = [
    "DeferredOrthonormal",
    "LipschitzConstraint",
    "Orthonormal",
    "SpectralBall",
    "UnitNorm",
    "project",
]

__getattr__ = renamed(
    __name__,
    {
        "SpectralConstraint": "Orthonormal",
        "FrobeniusConstraint": "UnitNorm",
        **dict.fromkeys(
            ("WeightClipConstraint", "AutoWeightClipConstraint"), "nothing (clipping proves no useful bound)"
        ),
    },
)

_MAX_POLISHING_STEPS = 60
_POLISHED = 1e-6  # largest entry of |W^T W - I| at which float32 has little left to gain


class LipschitzConstraint(keras.constraints.Constraint):
    """Base of the constraints that keep a layer 1-Lipschitz.

    A layer of this package binds the constraint it is given to the geometry of its kernel. On a plain Keras
    layer, an unbound constraint works for `Dense` (whose kernel is a matrix as it stands) and is refused for
    any other kernel.

    Args:
        geometry: `Geometry` of the kernel, or its config. Users leave it out.
    """

    def __init__(self, geometry: Geometry | dict | None = None):
        self.geometry = Geometry(**geometry) if isinstance(geometry, dict) else geometry

    def bind(self, geometry: Geometry) -> "LipschitzConstraint":
        """The same constraint for a kernel of that geometry."""
        return type(self).from_config({**self.get_config(), "geometry": geometry})

    def get_config(self) -> dict:
        return {"geometry": None if self.geometry is None else dataclasses.asdict(self.geometry)}

    def __repr__(self) -> str:
        known = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        given = (f"{name}={value!r}" for name, value in known.items() if value not in (None, 1))  # 1: of `every`
        return f"{type(self).__name__}({', '.join(given)})"

    def __call__(self, w: Tensor) -> Tensor:
        return self.project(w)

    def project(self, kernel: Tensor) -> Tensor:
        """One cheap projection, as after every optimizer step."""
        return in_one_go(_on_matrices, ops.convert_to_tensor(kernel), self._geometry_of(kernel), self._projection)

    def polish(self, kernel: Tensor) -> Tensor:
        """The projection to full precision. For eager use: it iterates on the host until nothing changes."""
        return self.project(kernel)

    def start(self, kernel: Tensor) -> Tensor:
        """A point of the constraint set made from freshly initialised weights."""
        return self.project(kernel)

    def initializer(
        self, initializer: str | dict | keras.initializers.Initializer | None = None
    ) -> "ConstrainedInitializer":
        """An initializer that starts on the constraint set, from another one, by default `"glorot_uniform"`."""
        return ConstrainedInitializer(initializer, self)

    @staticmethod
    def _projection(matrices: Tensor) -> Tensor:
        raise NotImplementedError

    def _geometry_of(self, kernel: Tensor) -> Geometry:
        if self.geometry is None and len(kernel.shape) != 2:
            raise ValueError(
                f"Expected {type(self).__name__} on a Lipschitz layer, which tells it the geometry of the "
                "kernel, or on the kernel of a Dense layer. On other layers use their Lipschitz counterpart "
                f"or the Orthonormalize callback. Received: kernel.shape={tuple(kernel.shape)}"
            )
        return self.geometry or Geometry()


def _matrices_of(kernel: Tensor, geometry: Geometry) -> Tensor:
    """The matrices of a kernel, times the gain; finite weights stay finite."""
    matrices = geometry.to_matrices(kernel)
    if geometry.gain == 1.0:
        return matrices
    largest = (6e4 if keras.backend.standardize_dtype(matrices.dtype) == "float16" else 3e38) / geometry.gain
    return ops.clip(matrices, -largest, largest) * geometry.gain


def _kernel_of(matrices: Tensor, geometry: Geometry, shape: tuple[int, ...]) -> Tensor:
    kernel = geometry.from_matrices(matrices, shape)
    return kernel if geometry.gain == 1.0 else kernel / geometry.gain


def _on_matrices(kernel: Tensor, geometry: Geometry, projection: Callable[[Tensor], Tensor]) -> Tensor:
    return _kernel_of(projection(_matrices_of(kernel, geometry)), geometry, tuple(kernel.shape))


@registered
class ConstrainedInitializer(keras.initializers.Initializer):
    """The weights of another initializer, moved onto a constraint set.

    Args:
        initializer: of the weights that are moved; `None` for `"glorot_uniform"`.
        constraint: whose `start` moves them; `None` for `Orthonormal()`.

    Returns:
        When called with a shape and a dtype: a tensor of these.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> kernel = hkr.constraints.Orthonormal().initializer("he_normal")((4, 2))
    >>> kernel = keras.ops.convert_to_numpy(kernel)
    >>> bool(np.allclose(kernel.T @ kernel, np.eye(2), atol=1e-5))
    True
    """

    def __init__(
        self,
        initializer: str | dict | keras.initializers.Initializer | None = None,
        constraint: LipschitzConstraint | dict | None = None,
    ):
        if isinstance(constraint, dict):
            constraint = keras.saving.deserialize_keras_object(constraint)
        self.initializer = keras.initializers.get(initializer or "glorot_uniform")
        self.constraint = get(constraint)

    def __call__(self, shape: Sequence[int], dtype: str | None = None) -> Tensor:
        return self.constraint.start(ops.convert_to_tensor(self.initializer(shape, dtype=dtype)))

    def get_config(self) -> dict[str, Any]:
        return {
            "initializer": keras.initializers.serialize(self.initializer),
            "constraint": keras.saving.serialize_keras_object(self.constraint),
        }


@registered
class Orthonormal(LipschitzConstraint):
    """All singular values of every block are 1: the layer keeps norms and gradients. The default.

    After each optimizer step one guarded Newton-Schulz iteration moves the kernel back; the norm is at most 1
    after every step, whatever its size.

    With `every=n` and the callback `Orthonormalize()`, that happens in one step of n, for steps that cost less: the
    kernels of a model take turns, so that no step waits for all of them. In between a kernel is off the set and its
    norm may be above 1; `lipschitz_bound` and `certify` read the stored kernel, so what they say is true at any time,
    and the callback brings all kernels onto the set before they are validated or saved, and at the end. Without the
    callback every step projects.

    Args:
        geometry: `Geometry` of the kernel, or its config. Users leave it out.
        every: steps from projection to projection.

    Raises:
        ValueError: for `every` that is no integer of at least 1.

    Example:

    >>> import hkr_keras as hkr
    >>> layer = hkr.layers.LipschitzDense(4, kernel_constraint=hkr.constraints.Orthonormal(every=4))

    Reference:
        Björck and Bowie 1971; Anil et al., ICML 2019 (arXiv 1811.05381).
    """

    def __init__(self, geometry: Geometry | dict | None = None, every: int = 1) -> None:
        super().__init__(geometry)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"Expected an integer of at least 1. Received: every={every}")
        self.every = every
        self._turn: tuple[Any, int] | None = None

    def take_turns(self, steps: Any = None, index: int = 0) -> None:
        """Projects where `(steps + index) % every` is 0, from the next compilation of a step on; always for `None`.

        Args:
            steps: integer variable that counts the steps of the optimizer, its `iterations`.
            index: of the kernel among those that take turns.
        """
        self._turn = None if steps is None or self.every == 1 else (steps, index)

    def get_config(self) -> dict:
        return {**super().get_config(), "every": self.every}

    def __call__(self, w: Tensor) -> Tensor:
        if self._turn is None:
            return self.project(w)
        steps, index = self._turn
        kernel, is_due = ops.convert_to_tensor(w), ops.equal((ops.cast(steps, "int32") + index) % self.every, 0)
        return branch(is_due, lambda: self.project(kernel), lambda: kernel)

    _projection = staticmethod(linalg.newton_schulz)

    def start(self, kernel: Any) -> Any:
        return self._on_the_host(linalg.orthonormal_basis, kernel)

    def polish(self, kernel: Any) -> Any:
        return self._on_the_host(_newton_schulz_to_precision, kernel)

    def _on_the_host(self, projection: Callable[[Tensor], Tensor], kernel: Any) -> Any:
        """As `project`, by a projection that looks at values."""
        geometry, kernel = self._geometry_of(kernel), ops.convert_to_tensor(kernel)
        matrices = projection(in_one_go(_matrices_of, kernel, geometry))
        return in_one_go(_kernel_of, matrices, geometry, tuple(kernel.shape))


@registered
class DeferredOrthonormal(Orthonormal):
    """The set of `Orthonormal`, to which the callback `Orthonormalize(every=n)` moves the kernel, not the optimizer.

    For steps that cost less: one projection every n steps. In between the kernel is off the set and its norm may be
    above 1; `lipschitz_bound` and `certify` read the stored kernel, so what they say is true at any time. Without the
    callback nothing moves the kernel back.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.LipschitzDense(4, kernel_constraint=hkr.constraints.DeferredOrthonormal())
    >>> model = keras.Sequential([keras.Input((8,)), layer])
    >>> model.compile("adam", hkr.losses.MulticlassHKR())
    >>> x, y = np.random.default_rng(0).normal(size=(64, 8)), np.arange(64) % 4
    >>> history = model.fit(x, y, batch_size=8, verbose=0, callbacks=[hkr.callbacks.Orthonormalize(every=4)])
    >>> bool(hkr.lipschitz_bound(model) < 1 + 1e-6)
    True
    """

    def __init__(self, geometry: Geometry | dict | None = None) -> None:
        super().__init__(geometry)

    def get_config(self) -> dict:
        return LipschitzConstraint.get_config(self)

    def __call__(self, w: Any) -> Any:
        return w


@registered
class SpectralBall(LipschitzConstraint):
    """All singular values are at most 1, and none is pulled up.

    Example:

    >>> import hkr_keras as hkr
    >>> layer = hkr.layers.LipschitzDense(4, kernel_constraint=hkr.constraints.SpectralBall())

    Reference:
        Gouk et al., Machine Learning 110 (2021).
    """

    _projection = staticmethod(linalg.spectral_ball)


@registered
class UnitNorm(LipschitzConstraint):
    """Every output vector has norm 1: each output is 1-Lipschitz by itself. The usual choice for a head.

    The whole map may have a norm up to the root of the number of outputs, so on a hidden layer use
    `Orthonormal` instead.

    Example:

    >>> import hkr_keras as hkr
    >>> head = hkr.layers.LipschitzDense(10, kernel_constraint=hkr.constraints.UnitNorm())

    Reference:
        Serrurier et al., CVPR 2021 (arXiv 2006.06520), section 4.
    """

    def project(self, kernel: Any) -> Any:
        axes = self._geometry_of(kernel).output_vector_axes(len(kernel.shape))
        return in_one_go(linalg.unit_norm, ops.convert_to_tensor(kernel), axes)


def _deviation(matrices: Tensor) -> Tensor:
    """The largest entry of `|G - I|`, where `G` is the smaller one of `W^T W` and `W W^T`."""
    rows, columns = matrices.shape[-2:]
    left = matrices if rows < columns else ops.swapaxes(matrices, -1, -2)
    gram = ops.matmul(left, ops.swapaxes(left, -1, -2))
    return ops.max(ops.abs(ops.cast(gram, "float32") - ops.eye(min(rows, columns))))


def _newton_schulz_to_precision(matrices: Tensor) -> Tensor:
    rows, columns = matrices.shape[-2:]
    w = matrices
    for _ in range(_MAX_POLISHING_STEPS if min(rows, columns) > 1 else 1):
        w = in_one_go(linalg.newton_schulz, w)
        if not ops.convert_to_numpy(in_one_go(_deviation, w)) > _POLISHED:
            return in_one_go(linalg.newton_schulz, w)  # a small entry everywhere may still add up to a larger norm
    return w


def get(constraint: Any) -> LipschitzConstraint:
    """The constraint of a kernel: `Orthonormal()` for `None`, otherwise one of this package's own.

    Raises:
        ValueError: for a constraint that would break the guarantee.

    Example:

    >>> type(get(None)).__name__
    'Orthonormal'
    """
    if constraint is None:
        return Orthonormal()
    if not isinstance(constraint, LipschitzConstraint):
        raise ValueError(
            "Expected the constraint of a Lipschitz layer's kernel to be hkr_keras.constraints.Orthonormal(), "
            "DeferredOrthonormal(), SpectralBall() or UnitNorm(), since another one would break the guarantee. "
            f"Received: constraint={constraint}"
        )
    return constraint


def is_deferred(kernel: Any) -> bool:
    """Whether no optimizer of Keras projects the kernel: it has no constraint, or `DeferredOrthonormal`.

    Example:

    >>> layer = keras.layers.Dense(2)
    >>> layer.build((None, 4)), is_deferred(layer.kernel)
    (None, True)
    """
    return kernel.constraint is None or isinstance(kernel.constraint, DeferredOrthonormal)


#: Which layers to project whose kernels have no constraint: names, layers, a function of a layer, or the rule (`None`).
Layers = Sequence[str | keras.layers.Layer] | Callable[[keras.layers.Layer], bool] | None


def constrained_kernels(
    model: keras.layers.Layer, layers: Layers = None
) -> Iterator[tuple[keras.layers.Layer, Any, LipschitzConstraint]]:
    """Every `(layer, variable, constraint)` of a model to be projected.

    - Kernels with a constraint of this package, in trainable and in frozen layers; those with `DeferredOrthonormal`,
      which the optimizer leaves alone, in trainable layers only.
    - Kernels of plain trainable layers, which have no constraint and get `Orthonormal`: those that `layers` names;
      without it all of them in a model that consists of plain layers, and none in a model that holds kernels with
      constraints of this package, or layers that compose their kernel, such as `AOLDense`. There the plain layers
      belong to a part that is not meant to be Lipschitz, such as a generator or a pretrained backbone.

    Weights whose geometry is unknown (of `EinsumDense`, attention, recurrent layers) are left out; `lipschitz_bound`
    refuses such layers by name.

    Args:
        model: a built model.
        layers: names of layers or layers of the model (a nested model stands for all that is in it), or a function of
            a layer that says whether to project its kernels.

    Raises:
        ValueError: for a kernel with a constraint of another library, and for layers that the model does not have.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> [type(constraint).__name__ for layer, kernel, constraint in constrained_kernels(model)]
    ['Orthonormal']
    """
    kernels = list(model_kernels(model))
    chosen = _chosen(model, layers)
    for layer, kernel, geometry in kernels:
        if kernel.constraint is not None:
            if layer.trainable or not is_deferred(kernel):
                yield layer, kernel, get(kernel.constraint)
        elif layer.trainable and chosen(layer):
            yield layer, kernel, Orthonormal().bind(geometry)


def _chosen(model: keras.layers.Layer, layers: Layers) -> Callable[[keras.layers.Layer], bool]:
    """Whether to project the kernels of a layer that have no constraint."""
    if layers is None:
        is_plain = not any(_is_kept(layer) for layer in [model, *flattened_layers(model)])
        return lambda layer: is_plain
    if callable(layers) and not isinstance(layers, keras.layers.Layer):
        return layers
    listed = [layers] if isinstance(layers, str | keras.layers.Layer) else list(layers)
    every = [model, *flattened_layers(model)]
    found: list[Any] = []
    for item in listed:
        named = [layer for layer in every if layer is item or (isinstance(item, str) and layer.name == item)]
        if not named:
            raise ValueError(
                "Expected names of layers, or layers, of the model, or a function of a layer. "
                f"Received: layers={layers}, and {item!r} is not in model '{model.name}'"
            )
        found.extend(inner for layer in named for inner in (layer, *flattened_layers(layer)))
    return lambda layer: any(layer is other for other in found)


def _is_kept(layer: keras.layers.Layer) -> bool:
    """Whether a layer keeps its own kernels Lipschitz: by constraints of this package, or by how it composes them."""
    inner = {id(weight) for other in flattened_layers(layer) for weight in other.weights}
    weights = [weight for weight in layer.weights if id(weight) not in inner]
    if any(isinstance(getattr(weight, "constraint", None), LipschitzConstraint) for weight in weights):
        return True
    is_ours = keras.saving.get_registered_name(type(layer)).startswith("hkr_keras>")
    return is_ours and any(len(weight.shape) > 1 for weight in weights)


def project(model: keras.layers.Layer, polish: bool = False, layers: Layers = None) -> None:
    """Moves the kernels of a model onto their constraint sets, in place.

    For training loops of one's own whose optimizer is not one of Keras, which would do so itself: call it after each
    step, and with `polish=True` at the end. Several processes that train equal weights each do it by themselves.

    Args:
        model: a built model. `constrained_kernels` says which of its kernels are projected: those with constraints of
            this package, and in a model of plain Keras layers the kernels of Dense and convolution layers, which
            become orthonormal, unless frozen. All other weights stay as they are.
        polish: whether to project to full precision, as `callbacks.Orthonormalize` does after each epoch; otherwise one
            cheap projection, as after each step of a Keras optimizer.
        layers: which plain layers to project, as in `constrained_kernels`.

    Raises:
        ValueError: for a kernel with a constraint of another library, and for layers that the model does not have.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    >>> hkr.constraints.project(model, polish=True)
    >>> bool(hkr.lipschitz_bound(model) < 1 + 1e-5)
    True
    """
    for _, kernel, constraint in constrained_kernels(model, layers):
        value = ops.stop_gradient(ops.convert_to_tensor(kernel))
        kernel.assign(constraint.polish(value) if polish else constraint.project(value))


def projection(kernels: Sequence[tuple[Any, LipschitzConstraint]]) -> Callable[[], None]:
    """A function that moves variables onto their constraint sets by one cheap projection each, in place.

    It runs as one program where the backend compiles, so that many small kernels cost little more than one.

    Example:

    >>> layer = keras.layers.Dense(2)
    >>> layer.build((None, 4))
    >>> projection([(layer.kernel, Orthonormal())])()
    """
    project_all = compiled(
        lambda values: [constraint.project(value) for (_, constraint), value in zip(kernels, values, strict=True)]
    )

    def run() -> Any:
        values = project_all([ops.stop_gradient(ops.convert_to_tensor(kernel)) for kernel, _ in kernels])
        for (kernel, _), value in zip(kernels, values, strict=True):
            kernel.assign(value)

    return run
