"""Lipschitz constants around given inputs, for chains of Dense layers and ReLU: few neurons change their sign there.

NumPy in float64 on the host, many inputs at once.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from hkr_keras.certification.bounds import lipschitz_bound, model_inputs
from hkr_keras.certification.floating_point import MACHINE_EPSILON, SMALLEST_NORMAL_64
from hkr_keras.certification.graph import Application, walk
from hkr_keras.certification.operators import Matrix
from hkr_keras.certification.rules.registry import check, layer_bound, tail_of
from hkr_keras.certification.singular_values import as_float64, matrix_spectrum
from hkr_keras.geometry import flattened_layers

__all__ = ["local_bound", "local_bounds", "local_radii"]

_BATCH = 64
_UP = 1 + 1e-11  # more than sums and roots in float64 are off by


def local_bound(model: Any, x: Any, epsilon: float | np.ndarray) -> np.ndarray:
    """Upper bounds on the Lipschitz constant of a ReLU network in a ball around each input, L2 to L2.

    Exact arithmetic, as `lipschitz_bound`; in `|z - x| <= epsilon` at most its `method="semidefinite"`, and far less
    where few activations can change.

    Args:
        model: Dense layers with ReLU or leaky ReLU between them (functions or layers), `Dropout` and, at the start,
            `Flatten`.
        x: inputs `(n, ...)`.
        epsilon: radius of the balls in units of the input, a number or `(n,)`.

    Returns:
        Array `(n,)`, float64.

    Raises:
        ValueError: for other layers, by name; inputs of another shape, or that are not finite.

    Example:

    >>> import keras, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, activation="relu"), keras.layers.Dense(1)])
    >>> model.set_weights([np.ones((1, 1)), np.zeros(1), np.ones((1, 1)), np.zeros(1)])
    >>> hkr.local_bound(model, np.array([[-2.0], [2.0]]), epsilon=1.0).round(6)
    array([0., 1.])

    Reference:
        Weng et al., ICML 2018 (arXiv 1804.09699), Fast-Lip; Huang et al., NeurIPS 2021 (arXiv 2111.01395).
    """
    chain, points = _read(model), _flat(model, x)
    if np.shape(epsilon) not in ((), (len(points),)):
        raise ValueError(f"Expected a radius, or one for each of {len(points)} inputs. Received: epsilon={epsilon!r}")
    found = local_bounds(*chain, points, epsilon)
    return np.minimum(found, lipschitz_bound(model, method="semidefinite"))


def local_radii(model: Any, x: Any, steps: int = 10, prediction: np.ndarray | None = None) -> np.ndarray:
    """Certified radii from constants around each input: no smaller change alters the class, in exact arithmetic.

    With `L_ij(e)` the constant of `f_i - f_j` in the ball of radius e, `min(e, min_j (f_i - f_j) / L_ij(e))` is a
    radius for every e; the best e is found by bisection.

    Args:
        model: as in `local_bound`, with at least two outputs.
        x: inputs `(n, ...)`.
        steps: of the bisection, each as expensive as `local_bound`.
        prediction: integers `(n,)`, the classes that shall not change; `None` for those of exact arithmetic.

    Returns:
        Array `(n,)`, float64, in units of the input; 0 for ties and where another class is in front.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, activation="relu"), keras.layers.Dense(2)])
    >>> model.set_weights([np.array([[1.0, -1.0]]), np.zeros(2), np.array([[3.0, 0.0], [0.0, 1.0]]), np.zeros(2)])
    >>> bool(abs(local_radii(model, np.array([[1.0]]))[0] - 1) < 0.01)
    True
    """
    kernels, biases, slopes = _read(model)
    outputs = kernels[-1].shape[1]
    if outputs < 2 or not _ends_in_logits(model):
        raise ValueError(
            "Expected a model that ends in at least two logits, without an activation behind them. "
            f"Received: model '{model.name}' with {outputs} outputs"
        )
    points = _flat(model, x)
    value, error = points, np.zeros_like(points)
    for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        value, error = _applied(value, error, kernel, bias)
        if i < len(slopes):
            value = np.where(value > 0, value, slopes[i] * value)
    rows, columns = np.arange(len(points)), value.argmax(axis=1) if prediction is None else prediction
    margins = value[rows, columns, None] - value
    margins = (margins - error - error[rows, columns, None]) * (1 - 4 * MACHINE_EPSILON)
    margins[rows, columns] = np.inf
    margins = margins.clip(0)

    def reached(epsilon: np.ndarray) -> np.ndarray:
        constants = local_bounds(kernels, biases, slopes, points, epsilon, columns)
        ratios = np.divide(margins, constants, out=np.full_like(margins, np.inf), where=constants > 0)
        ratios = np.where(margins > 0, ratios, 0.0)
        return ratios.min(axis=1) * (1 - 4 * MACHINE_EPSILON)

    high = np.minimum(reached(np.zeros(len(points))), 1e30)
    low, best = np.zeros(len(points)), np.zeros(len(points))
    for _ in range(steps):
        middle = (low + high) / 2
        found = reached(middle)
        best = np.maximum(best, np.minimum(middle, found))
        low, high = np.where(found >= middle, middle, low), np.where(found >= middle, high, middle)
    return best


_Links = tuple[list[np.ndarray], list[np.ndarray], list[float]]


def _ends_in_logits(model: Any) -> bool:
    """Whether no activation follows the last Dense layer, which could make two outputs equal."""
    start: list[_Links] = [([], [], [])]
    *_, (kernels, _, slopes) = walk(model, start, _link, [model.inputs[0].shape])
    return len(slopes) < len(kernels) or slopes[-1] == 1.0


def _read(model: Any) -> _Links:
    """Kernels, biases, and the slopes below 0 of the activations between them."""
    inputs = model_inputs(model)
    start: list[_Links] = [([], [], []) for _ in inputs]
    (*rest, (kernels, biases, slopes)) = walk(model, start, _link, [None if t is None else t.shape for t in inputs])
    if rest or len(inputs) > 1 or not kernels:
        raise ValueError(
            "Expected a model with one input, one output and a Dense layer. "
            f"Received: {len(inputs)} inputs, {len(rest) + 1} outputs, {len(kernels)} Dense layers"
        )
    _check_numbers(model, kernels)
    return kernels, biases, slopes[: len(kernels) - 1]  # a last activation stretches nothing


def _check_numbers(model: Any, kernels: list[np.ndarray]) -> None:
    """Refuses half precision, whose rounding moves inputs and jumps, and numbers near the ends of float64."""
    for layer in flattened_layers(model):
        dtypes = {str(layer.compute_dtype), str(layer.variable_dtype), str(layer.dtype)}  # the last, of inputs
        if not dtypes <= {"float32", "float64"}:
            raise ValueError(
                "Expected layers and inputs of float32 or float64, for bounds around inputs. "
                f"Received: '{layer.name}' of {', '.join(sorted(dtypes))}"
            )
    powers = np.cumsum([math.log10(max(float(np.abs(kernel).max()), 1e-300)) for kernel in kernels if kernel.any()])
    if np.abs(powers).max(initial=0.0) > 100:
        raise ValueError(
            "Expected kernels whose largest entries multiply to between 1e-100 and 1e100, for bounds around inputs. "
            f"Received: model '{model.name}', whose entries multiply to 1e{powers[np.abs(powers).argmax()]:.0f}"
        )


def _link(place: Application, states: list[_Links]) -> _Links:
    layer, (kernels, biases, slopes) = place.layer, states[0]
    if len(states) == 1:
        check(layer, place.shapes[0])
        operator, _ = tail_of(layer, place.shapes[0])
        known = layer_bound.known(type(layer))
        in_order = getattr(layer, "data_format", "channels_last") == "channels_last"
        is_start = known in (keras.layers.Flatten, keras.layers.InputLayer) and in_order and not kernels
        if is_start or isinstance(operator, str):
            return kernels, biases, slopes
        matrix = None
        if isinstance(layer, keras.layers.Dense) and isinstance(operator, Matrix) and not operator.total_error:
            matrix = operator.matrix  # exactly
        slope = _slope_below(layer if matrix is None else layer.activation)
        shape = place.shapes[0]
        if matrix is not None and slope is not None and (shape is None or len(shape) == 2):
            bias = as_float64(layer.bias) if layer.use_bias else np.zeros(matrix.shape[1])
            slopes = [*slopes, *([1.0] if len(slopes) < len(kernels) else [])]
            ended = [] if layer.activation is keras.activations.linear else [slope]
            return [*kernels, matrix], [*biases, bias], [*slopes, *ended]
        if matrix is None and slope is not None and len(slopes) < len(kernels):
            return kernels, biases, [*slopes, slope]
    raise ValueError(
        "Expected Dense layers with ReLU or leaky ReLU between them, for bounds around inputs. "
        f"Received: {type(layer).__name__} '{layer.name}'"
    )


def _slope_below(activation: Any) -> float | None:
    """The slope below 0 of an activation whose slope is 1 above; `None` for any other."""
    known = layer_bound.known(type(activation))
    if known is keras.layers.Activation:
        activation = activation.activation
    if known is keras.layers.LeakyReLU or (
        known is keras.layers.ReLU and activation.max_value is None and not activation.threshold
    ):
        slope = float(np.float32(activation.negative_slope or 0.0))  # as it is deployed
        return slope if 0 <= slope <= 1 else None
    if activation in (None, keras.activations.linear):
        return 1.0
    if activation in (keras.activations.leaky_relu, keras.ops.leaky_relu):
        return float(np.float32(0.2))
    return 0.0 if activation in (keras.activations.relu, keras.ops.relu) else None


def _flat(model: Any, x: Any) -> np.ndarray:
    points = np.asarray(x, dtype=np.float64)
    if np.any(np.asarray(x, dtype=np.longdouble) != points):
        raise ValueError("Expected finite inputs that float64 can hold. Received: x with longer numbers, or NaN")
    shape = tuple(model.input_shape[1:])
    fits = points.ndim == len(shape) + 1 and all(b in (None, a) for a, b in zip(points.shape[1:], shape, strict=True))
    if not fits or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"Expected finite inputs of shape (n, {shape}). Received: x.shape={points.shape}")
    return points.reshape(len(points), -1)


def _applied(
    value: np.ndarray, error: np.ndarray, kernel: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A product and a bias, and what float64 may have rounded away so far."""
    sizes = np.abs(value) @ np.abs(kernel) + np.abs(bias)
    rounding = 4 * (len(kernel) + 2) * MACHINE_EPSILON * sizes + SMALLEST_NORMAL_64
    return value @ kernel + bias, error @ np.abs(kernel) * _UP + rounding


def local_bounds(
    kernels: Sequence[np.ndarray],
    biases: Sequence[np.ndarray],
    slopes: Sequence[float],
    x: np.ndarray,
    epsilon: float | np.ndarray,
    columns: np.ndarray | None = None,
) -> np.ndarray:
    """Upper bounds on the Lipschitz constant of a ReLU network in a ball around each input, L2 to L2.

    The network is `relu(... relu(x K_1 + b_1) K_2 + b_2 ...) K_n + b_n`. A neuron moves by at most epsilon times its
    own constant, so one that is further from 0 cannot change its side in the ball. A Jacobian is `K_1 D_1 K_2 ... K_n`,
    D diagonal: its entry is known where the neuron cannot change, and within `m +- h` elsewhere.
    With M the known ones and the middles m, and U the projection on the neurons that can change ::

        |K_1 D_1 ... K_n| <= |K_1 M_1 ... K_n| + sum_i h_i |K_1 D_1 ... K_i U_i| |U_i K_{i+1} M_{i+1} ... K_n|

    and the factor that still holds D is bounded in the same way, from the first layer on.

    Args:
        kernels: `(inputs, outputs)` each, as in Keras, float64.
        biases: `(outputs,)` each.
        slopes: of each activation below 0, from 0 (ReLU) to 1, one less than kernels.
        x: inputs `(n, features)`, float64.
        epsilon: radius of the balls, a number or `(n,)`.
        columns: integers `(n,)`, outputs to compare with, such as the predicted classes: bounds on the difference of
            every output from that one.

    Returns:
        Array `(n,)`, never above the product of the norms of the kernels; with `columns`, `(n, outputs)`.

    Example:

    >>> kernels, biases = [np.eye(1), np.eye(1)], [np.zeros(1), np.zeros(1)]
    >>> local_bounds(kernels, biases, [0.0], np.array([[-2.0], [2.0]]), 1.0).round(6)
    array([0., 1.])
    """
    epsilon = np.broadcast_to(np.asarray(epsilon, dtype=np.float64), (len(x),))
    shapes = [kernel.shape for kernel in kernels]
    if not shapes or any(a[1] != b[0] for a, b in itertools.pairwise(shapes)) or x.shape[1:] != (shapes[0][0],):
        raise ValueError(f"Expected kernels that follow on each other and on x. Received: {shapes}, x.shape={x.shape}")
    if len(slopes) != len(kernels) - 1 or not all(0 <= slope <= 1 for slope in slopes) or not (epsilon >= 0).all():
        raise ValueError(
            "Expected a slope in [0, 1] behind every kernel but the last, and an epsilon that is not negative. "
            f"Received: slopes={list(slopes)}, epsilon={epsilon.min()}"
        )
    found = []
    for start in range(0, len(x), _BATCH):
        part = slice(start, start + _BATCH)
        chosen = None if columns is None else columns[part]
        found.append(_around(kernels, biases, slopes, x[part], epsilon[part], chosen))
    empty = np.zeros((0,) if columns is None else (0, shapes[-1][1]))
    return np.concatenate(found) if found else empty


def _around(
    kernels: Sequence[np.ndarray],
    biases: Sequence[np.ndarray],
    slopes: Sequence[float],
    x: np.ndarray,
    epsilon: np.ndarray,
    columns: np.ndarray | None,
) -> np.ndarray:
    value, value_error = x, np.zeros_like(x)
    norms = [matrix_spectrum(kernel).bound for kernel in kernels]
    sources: list[_Source] = []  # K_1 M_1 ..., and U_i K_{i+1} M_{i+1} ..., up to the layer at hand
    inputs = np.ones(len(x))  # constant of what the layer is applied to
    for i, (matrix, bias) in enumerate(zip(kernels, biases, strict=True)):
        kernel = matrix if columns is None or i < len(kernels) - 1 else _differences(matrix, columns)
        if i == 0:
            first = np.broadcast_to(kernel, (len(x), *kernel.shape[-2:]))
            size = float(_lengths(kernel[None], (-2, -1)).max())
            sources = [_Source(weight=np.ones(len(x)), matrices=first, size=size)]
        else:
            sources = [source.times(kernel) for source in sources]
        terms = [source.weight[:, None] * (_lengths(source.matrices, -2) + source.error) for source in sources]
        each = (
            np.minimum(np.sum(terms, axis=0), inputs[:, None] * _lengths(kernel, -2)) * _UP
        )  # constants of single neurons
        if i == len(kernels) - 1:
            return np.minimum(_constants(sources), math.prod(norms) * _UP) if columns is None else each
        value, value_error = _applied(value, value_error, matrix, bias)
        free = np.abs(value) <= epsilon[:, None] * each * _UP + value_error
        low = float(slopes[i])
        known = np.where(value > 0, 1.0, low)
        moving = _constants([source.scaled(free) for source in sources])
        above = np.maximum(known, free)  # what the slopes are at most
        inputs = np.minimum(_constants([source.scaled(above) for source in sources]), inputs * norms[i])
        sources = [source.scaled(np.where(free, (1 + low) / 2, known)) for source in sources]
        projection = np.eye(len(bias)) * free[:, None]
        weight = moving * (1 - low) / 2 * _UP
        sources.append(_Source(weight=weight, matrices=projection, size=math.sqrt(len(bias))))
        value = np.where(value > 0, value, low * value)
    raise AssertionError("the last kernel returns")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """A product of matrices for every input, and what its norm is multiplied with.

    Args:
        weight: `(n,)`.
        matrices: `(n, rows, columns)`.
        size: bound on their Frobenius norms.
        error: bound on the Frobenius norm of what rounding made of them.
    """

    weight: np.ndarray
    matrices: np.ndarray
    size: float
    error: float = 0.0

    def times(self, kernel: np.ndarray) -> "_Source":
        """Each times a matrix, or each times one of its own."""
        length = float(_lengths(kernel, (-2, -1)).max())
        rounding = 8 * kernel.shape[-2] * MACHINE_EPSILON * self.size * length + SMALLEST_NORMAL_64 * kernel.size
        error = (self.error * length + rounding) * _UP
        matrices, size = self.matrices @ kernel, self.size * length * _UP
        return dataclasses.replace(self, matrices=matrices, size=size, error=error)

    def scaled(self, numbers: np.ndarray) -> "_Source":
        """The columns times numbers `(n, columns)` in [0, 1]."""
        rounding = 4 * MACHINE_EPSILON * self.size + SMALLEST_NORMAL_64 * numbers.shape[1]
        return dataclasses.replace(self, matrices=self.matrices * numbers[:, None], error=self.error + rounding)


def _differences(matrix: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The columns less one of them, `(n, inputs, outputs)`."""
    return matrix[None] - matrix.T[columns][:, :, None]


def _constants(sources: list[_Source]) -> np.ndarray:
    """The sum of the weighted norms, rounded up, `(n,)`."""
    return np.sum([source.weight * (_norms(source.matrices) + source.error) for source in sources], axis=0) * _UP


def _lengths(matrices: np.ndarray, axis: int | tuple[int, int]) -> np.ndarray:
    """Norms of columns, or of whole matrices, rounded up; tiny squares do not vanish."""
    scale = max(float(np.abs(matrices).max(initial=0.0)), SMALLEST_NORMAL_64)
    return scale * np.sqrt(np.square(matrices / scale).sum(axis=axis) + SMALLEST_NORMAL_64) * _UP


def _norms(matrices: np.ndarray) -> np.ndarray:
    """Upper bounds on the norms of a stack of matrices, `(n,)`."""
    rows, columns = matrices.shape[-2:]
    scale = np.maximum(np.abs(matrices).max(axis=(-2, -1), keepdims=True), SMALLEST_NORMAL_64)
    scaled = matrices / scale
    transposed = np.swapaxes(scaled, -1, -2)
    grams = scaled @ transposed if rows < columns else transposed @ scaled
    largest = np.linalg.eigvalsh(grams)[:, -1].clip(0)
    slack = 16 * (rows + columns) * MACHINE_EPSILON * np.square(scaled).sum(axis=(-2, -1)) + SMALLEST_NORMAL_64
    return scale[:, 0, 0] * np.sqrt(largest + slack) * _UP
