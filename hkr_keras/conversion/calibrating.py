"""Fits the weights of a converted model to data: kernels, biases, means and the weights of sums.

Layer by layer, in the order of computation: the activations of the new model are to be a multiple of those of the old
one. The multiple is free, since no class depends on it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from hkr_keras import constraints, layers
from hkr_keras.certification.graph import Application, consumers_of, walk
from hkr_keras.conversion.rebuilding import Layer, calls_of, from_config
from hkr_keras.geometry import kernel_geometries

__all__ = ["Agreement", "agreement", "calibrate"]

Array = np.ndarray
Tensor = Any

_k = keras.layers
_STEPS = 40
_NUMBERS = 2e7  # at most so many of the inputs of a layer are used at once
_SMALLEST = 1e-6


def calibrate(model: keras.Model, stand_ins: Mapping[Any, Sequence[Layer]], x: Sequence[Array]) -> None:
    """Fits the new layers of a converted model to the layers they stand for, in place, on inputs of the model.

    Args:
        model: the new model.
        stand_ins: of every old layer that was replaced, what stands for it: a layer, and perhaps its activation.
        x: an array of inputs for each input of the model.
    """
    references: dict[Layer, Callable[..., Tensor]] = {}
    targets: dict[Layer, Callable[..., Tensor]] = {}
    for old, news in stand_ins.items():
        for new, reference in zip(news, _parts(old, len(news)), strict=False):
            references[new] = reference
        if news:
            targets[news[0]] = _target(old)
    done: set[Layer] = set()

    def apply(place: Application, states: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        layer = place.layer
        news, olds = ([state[i] for state in states] for i in (0, 1))
        steps = None
        if type(layer) is _k.TimeDistributed:
            layer, steps = layer.layer, news[0].shape[:2]
            news, olds = ([array.reshape(-1, *array.shape[2:]) for array in arrays] for arrays in (news, olds))
        if layer in targets and layer not in done:
            _fit(layer, news, olds, _array(_called(targets[layer], olds)))
        done.add(layer)
        found = [_array(_called(layer, news)), _array(_called(references.get(layer, layer), olds))]
        if steps is not None:
            found = [array.reshape(*steps, *array.shape[1:]) for array in found]
        return found[0], found[1]

    walk(model, [(array, array) for array in x], apply, [tensor.shape for tensor in model.inputs])


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What the inputs of a calibration say of the old and the new model.

    Args:
        inputs: how many there were.
        share: of them, for which both models, the old one perhaps with probabilities, name the same class.
        margin: the median distance of the first logit of the new model from the second, or of its score from 0.
    """

    inputs: int
    share: float
    margin: float


def agreement(old: keras.Model, new: keras.Model, x: Sequence[Array]) -> Agreement:
    """Compares two models on inputs."""
    given = list(x) if len(x) > 1 else x[0]
    before, after = ([_array(y) for y in keras.tree.flatten(model(given, training=False))] for model in (old, new))
    same = [_classes(a, whole=True) == _classes(b, whole=False) for a, b in zip(before, after, strict=True)]
    margins = [np.median(_margins(outputs)) for outputs in after]
    return Agreement(len(x[0]), float(np.mean([np.mean(each) for each in same])), float(np.mean(margins)))


def _margins(outputs: Array) -> Array:
    if outputs.shape[-1] == 1:
        return np.abs(outputs)
    first_two = np.sort(outputs, axis=-1)[..., -2:]
    return first_two[..., 1] - first_two[..., 0]


def _classes(outputs: Array, whole: bool) -> Array:
    if outputs.shape[-1] > 1:
        return outputs.argmax(axis=-1)
    probabilities = whole and outputs.min() >= 0 and outputs.max() <= 1
    return outputs > (0.5 if probabilities else 0.0)


def _parts(old: Layer, count: int) -> list[Callable[..., Tensor]]:
    """What an old layer computes, in as many parts as there are new layers: the linear part, and the activation."""
    if not kernel_geometries(old) or count != 2:
        return [old] if count == 1 and not kernel_geometries(old) else [_without_activation(old, keep=count == 1)]
    return [_without_activation(old), old.activation]


def _without_activation(old: Layer, keep: bool = False) -> Layer:
    probabilities = old.activation in (keras.activations.softmax, keras.activations.sigmoid)
    if keep and not probabilities:
        return old
    linear = from_config(type(old), old, activation=None)
    ((shape, *_), *_) = calls_of(old)
    linear.build(shape)
    linear.set_weights(old.get_weights())
    return linear


def _target(old: Layer) -> Callable[..., Tensor]:
    """What the linear part of a new layer is to be a multiple of, but for a bias: that of the old one, normalised."""
    if not kernel_geometries(old):
        return old
    linear, readers = _without_activation(old), consumers_of(old)
    normalised = len(readers) == 1 and isinstance(readers[0], _k.BatchNormalization)
    if not normalised or old.activation is not keras.activations.linear:
        return linear
    return lambda x: readers[0](linear(x), training=False)


def _array(tensor: Tensor) -> Array:
    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))


def _called(function: Any, arrays: Sequence[Array]) -> Tensor:
    tensors = [ops.convert_to_tensor(array) for array in arrays]
    return function(tensors if len(tensors) > 1 else tensors[0])


def _rows(array: Array, layer: Any) -> Array:
    """One row for each place, one column for each channel."""
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    axis = layer.axis if isinstance(getattr(layer, "axis", None), int) else 1 if first else -1
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


def _multiple(new: Array, old: Array) -> float:
    """The best s in `new = s old + b`, in the sense of least squares."""
    new, old = new - new.mean(axis=0), old - old.mean(axis=0)
    return max(float(np.vdot(new, old)), 0.0) / max(float(np.vdot(old, old)), 1e-30) or _SMALLEST


def _fit(layer: Any, news: list[Array], olds: list[Array], target: Array) -> None:
    if isinstance(layer, layers.LipschitzResidual):  # weights that make the sum that of the old branches
        scales = [_multiple(_rows(a, layer), _rows(b, layer)) for a, b in zip(news, olds, strict=True)]
        layer.mixing_logits.assign(-np.log(np.maximum(scales, _SMALLEST)))
        return
    goal = _rows(target, layer)
    if isinstance(layer, layers.BatchCentering):
        rows = _rows(news[0], layer)
        layer.moving_mean.assign(rows.mean(axis=0))
        if layer.center:
            layer.bias.assign(_multiple(rows, goal) * goal.mean(axis=0))
    elif kernel_geometries(layer):
        columns = _columns(layer, news[0], len(goal) // len(target))
        if columns is not None:
            _fit_kernel(layer.kernel, columns, goal[: len(columns)])
        if layer.use_bias:
            activation, layer.activation = layer.activation, keras.activations.linear
            layer.bias.assign(np.zeros(layer.bias.shape))
            rows = _rows(_array(_called(layer, news)), layer)
            layer.activation = activation
            layer.bias.assign(_multiple(rows, goal) * goal.mean(axis=0) - rows.mean(axis=0))


def _columns(layer: Any, x: Array, places: int) -> Array | None:
    """What the kernel as a matrix is applied to, `(places, rows of the kernel)`; `None` where it is another one."""
    kernel = getattr(layer, "kernel", None)
    if not isinstance(kernel, keras.Variable) or not isinstance(kernel.constraint, constraints.LipschitzConstraint):
        return None  # composed
    size = math.prod(kernel.shape[:-1])
    x = x[: max(int(_NUMBERS / (places * size)), 1)]
    if isinstance(layer, _k.Dense):
        return x.reshape(-1, size)
    usual = (
        isinstance(layer, (_k.Conv1D, _k.Conv2D, _k.Conv3D)) and layer.groups == 1 and not getattr(layer, "circular", 0)
    )
    if not usual:
        return None
    if layer.data_format == "channels_first":
        x = np.moveaxis(x, 1, -1)
    rank, widths = len(layer.kernel_size), [(0, 0)]
    reaches = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    for n, reach, s in zip(x.shape[1:-1], reaches, layer.strides, strict=True):
        missing = {"valid": 0, "causal": reach - 1}.get(layer.padding, max((-(-n // s) - 1) * s + reach - n, 0))
        widths.append((missing, 0) if layer.padding == "causal" else (missing // 2, missing - missing // 2))
    x = np.pad(x, [*widths, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, reaches, axis=tuple(range(1, rank + 1)))
    places_read = tuple(slice(None, None, s) for s in layer.strides)
    windows = windows[(slice(None), *places_read, slice(None), *(slice(None, None, d) for d in layer.dilation_rate))]
    order = (*range(rank + 1), *range(rank + 2, 2 * rank + 2), rank + 1)
    return windows.transpose(order).reshape(-1, size)


def _fit_kernel(kernel: Any, columns: Array, goal: Array) -> None:
    """Turns a kernel on its constraint set until what it makes of the columns is as parallel to the goal as it gets.

    Projected gradient ascent on `<X W, Y>^2 / |X W|^2`, with X and Y centred, from the projection of the old kernel.
    """
    mean, aim = columns.mean(axis=0), goal.mean(axis=0)
    squares = columns.T.astype("float64") @ columns - len(columns) * np.outer(mean, mean)
    products = columns.T.astype("float64") @ goal - len(columns) * np.outer(mean, aim)

    def parallel(w: Array) -> tuple[float, Array]:
        inner, squared = float(np.vdot(w, products)), max(float(np.vdot(w, squares @ w)), 1e-30)
        return inner * abs(inner) / squared, inner * products / squared - inner**2 / squared**2 * (squares @ w)

    def projected(w: Array) -> Array:  # one iteration, near to the set
        tensor = ops.convert_to_tensor(w.reshape(kernel.shape).astype("float32"))
        return _array(kernel.constraint.project(tensor)).reshape(w.shape).astype("float64")

    best = _array(kernel.constraint.polish(kernel)).reshape(squares.shape[0], -1).astype("float64")
    value, gradient = parallel(best)
    step = 1.0
    for _ in range(_STEPS):
        length = float(np.linalg.norm(gradient))
        if not length > 0 or step < 1e-3:
            break
        tried = projected(best + step * float(np.linalg.norm(best)) / length * gradient)
        found, slope = parallel(tried)
        if found > value:
            best, value, gradient, step = tried, found, slope, step * 1.2
        else:
            step /= 2
    kernel.assign(kernel.constraint.polish(ops.convert_to_tensor(best.reshape(kernel.shape).astype("float32"))))
