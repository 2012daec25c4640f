"""Converts models of plain Keras layers to Lipschitz layers."""

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import rich.box
import rich.console
import rich.table

from hkr_keras import constraints, layers
from hkr_keras.certification.bounds import lipschitz_bound, merge_bound
from hkr_keras.certification.checks import check_kernel_layer, check_merge
from hkr_keras.certification.graph import Application, consumers_of, is_model, source_of, walk
from hkr_keras.certification.rules.activations import activation_bound
from hkr_keras.certification.singular_values import as_float64
from hkr_keras.conversion import calibrating
from hkr_keras.conversion.rebuilding import Layer, Rebuilder, StandIns, calls_of, copied, from_config, operations_of
from hkr_keras.geometry import kernel_geometries, overlap
from hkr_keras.layers.base import LipschitzLayer

__all__ = ["COUNTERPARTS", "Replacement", "Row", "convert", "report", "to_lipschitz"]

_k, _a = keras.layers, keras.activations

_SAME_NAME = (
    *("Dense", "Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
    *("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"),
)
#: What a Keras layer is replaced by.
COUNTERPARTS: dict[type, type] = {
    **{getattr(_k, name): getattr(layers, f"Lipschitz{name}") for name in _SAME_NAME},
    _k.AveragePooling1D: layers.ScaledAveragePooling1D,
    _k.AveragePooling2D: layers.ScaledAveragePooling2D,
    _k.AveragePooling3D: layers.ScaledAveragePooling3D,
    _k.GlobalAveragePooling1D: layers.ScaledGlobalAveragePooling1D,
    _k.GlobalAveragePooling2D: layers.ScaledGlobalAveragePooling2D,
    _k.BatchNormalization: layers.BatchCentering,
    _k.Add: layers.LipschitzResidual,
}
_OVERLAPPING = {
    _k.MaxPooling1D: layers.L2NormPooling1D,
    _k.MaxPooling2D: layers.L2NormPooling2D,
    _k.MaxPooling3D: layers.L2NormPooling3D,
}
_RECTIFIERS = (
    *(_a.relu, _a.relu6, _a.leaky_relu, _a.elu, _a.celu, _a.selu, _a.gelu, _a.silu, _a.mish, _a.hard_silu),
    *(_a.softplus, _a.squareplus, _a.sparse_plus),
)
_RECTIFYING = (_k.ReLU, _k.LeakyReLU, _k.PReLU, _k.ELU)
_PROBABILITIES = (_a.softmax, _a.sigmoid, _a.log_softmax, _a.log_sigmoid, _a.hard_sigmoid, _a.sparsemax)
_CALIBRATED = 1024  # inputs
_PASSING = (_k.Dropout, _k.Identity, _k.Flatten, _k.Reshape, _k.ActivityRegularization)

#: A class, a function from the old layer to a new one, or `None` to keep a layer.
Replacement = type | Callable[[Any], Layer] | None
#: Of the table of what was done: the name of a layer, its class, and what it is now.
Row = tuple[str, str, str]


def to_lipschitz(
    model: Any,
    replace: Mapping[type | str, Replacement] | None = None,
    activation: Callable[..., Layer] | None = layers.GroupSort,
    print_fn: Callable[[str], Any] | None = print,
    calibrate: Any = None,
) -> keras.Model:
    """A copy of a Keras model with the same graph, made of layers with a Lipschitz constant of at most 1.

    - Dense, convolutions (transposed, depthwise and separable too): their Lipschitz counterparts. Trained kernels are
      projected to the nearest orthonormal ones; biases, means and the weights of sums are scaled along. The Dense
      layer that makes the output gets `UnitNorm()` as its constraint.
    - ReLU and its smooth relatives, as layers or arguments: `activation`, where the number of channels is even.
    - Average pooling: scaled; overlapping max pooling: `L2NormPooling`. BatchNormalization: `BatchCentering`. Add:
      `LipschitzResidual`, a weighted mean.
    - A final softmax or sigmoid that nothing else reads is dropped, since certificates and losses are about logits.
    - All other layers with a proven bound stay, layers of this package among them: converting twice changes nothing.

    Args:
        model: a built Sequential or functional model, nested or not. It is not changed.
        replace: what to do with layers of a class, or with one name, in place of the above: a class, which is given
            the settings it knows of; a function from the old layer to a new one; or `None` to keep the layer.
            Names go before classes. A new weight takes over the old one of the same name and shape.
        activation: makes the layer that replaces a rectifier; called with `name=`, `dtype=` (and `axis=` where
            `channels_first` plays a part). `None` keeps the rectifiers.
        print_fn: takes a table of what was done, and what is left to do; `None` prints nothing.
        calibrate: some hundred inputs of the model, an array or a list of one for each of its inputs, of which the
            first 1,024 are used. On them kernels, biases, means and weights of sums are fitted, layer by layer, so
            that the new model computes a multiple of what the old one does, as far as it can. The table then says for
            which share of them both models name the same class, and with which margin: fine-tune with a loss of about
            that margin, since one of ten times as much undoes within an epoch what was carried over.

    Returns:
        A model that is not compiled. Compile it, with a loss of this package, before you train it.

    Raises:
        ValueError: with the list of all layers that cannot be converted and what to do; for names in `replace` that no
            layer has; for inputs to calibrate on that do not fit; for a model that is not built or has a forward
            pass of its own.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), _k.Dense(8, "relu"), _k.Dense(3, "softmax")])
    >>> converted = to_lipschitz(model, print_fn=None)
    >>> [type(layer).__name__ for layer in converted.layers]
    ['LipschitzDense', 'GroupSort', 'LipschitzDense']
    >>> bool(lipschitz_bound(converted.layers[0]) < 1 + 1e-5)
    True

    `LipschitzConv2D` keeps trained kernels and wastes some of its constant; orthogonal convolutions start from new
    weights and certify more in the end:

    >>> model = keras.Sequential([keras.Input((8, 8, 1)), _k.Conv2D(4, 3, activation="relu")])
    >>> converted = to_lipschitz(model, replace={_k.Conv2D: layers.OrthogonalConv2D}, print_fn=None)
    >>> [type(layer).__name__ for layer in converted.layers]
    ['OrthogonalConv2D', 'GroupSort']
    """
    new, rows, agreement = convert(model, replace or {}, activation, calibrate)
    if print_fn is not None:
        print_fn(report(new, rows, agreement))
    return new


def convert(
    model: Any, replace: Mapping[type | str, Replacement], activation: Callable[..., Layer] | None, calibrate: Any
) -> tuple[keras.Model, list[Row], calibrating.Agreement | None]:
    """What `to_lipschitz` does, without its table.

    Returns:
        The new model; a row of the table for each layer; with `calibrate`, how both models agree.
    """
    operations = operations_of(model)
    unknown = [key for key in replace if isinstance(key, str) and key not in {o.name for o in operations}]
    if unknown:
        raise ValueError(f"Expected names of layers of model '{model.name}'. Received: replace={unknown}")
    plan = _Plan(replace, activation, *_ends(model))
    refused = [reason for operation in operations if (reason := plan.refusal(operation))]
    if refused:
        raise ValueError(
            "Expected layers that can be converted or have a finite Lipschitz constant; replace={name or class: ...} "
            f"says what to put in their place. Received: model '{model.name}' with\n" + "\n".join(refused)
        )
    data = None if calibrate is None else _checked(model, calibrate)
    new = Rebuilder(lambda layer: plan.stand_ins.get(layer) or copied(layer))(model)  # as those of a Bidirectional
    if data is None:
        _rescale_offsets(new, plan.old_layers)
    else:
        calibrating.calibrate(new, {old: plan.stand_ins[old][0] for old in plan.replaced}, data)
    lipschitz_bound(new)  # refuses what has none
    return new, plan.rows, None if data is None else calibrating.agreement(model, new, data)


def _checked(model: keras.Model, x: Any) -> list[np.ndarray]:
    """The inputs to calibrate on, an array for each input of the model."""
    arrays = [np.asarray(array)[:_CALIBRATED] for array in (x if isinstance(x, (list, tuple)) else [x])]
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    fits = len(arrays) == len(shapes) and all(
        len(array) > 1
        and len(array.shape) == len(shape)
        and all(n in (None, m) for n, m in zip(shape[1:], array.shape[1:], strict=True))
        for array, shape in zip(arrays, shapes, strict=True)
    )
    if not fits or not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            f"Expected at least two finite inputs of shape {shapes} to calibrate on. "
            f"Received: calibrate of shape {[array.shape for array in arrays]}"
        )
    return [array.astype("float32") for array in arrays]


def _ends(model: keras.Model) -> tuple[set[Any], set[Any]]:
    """The layers between the last weights and the outputs, and the Dense layers before them."""
    last: set[Any] = set()
    heads: set[Any] = set()

    def visit(tensor: Any) -> None:
        layer, sources, index = source_of(tensor)
        if is_model(layer):
            visit(layer.outputs[index])
        elif type(layer) is _k.Dense:
            if all(used in last for used in consumers_of(layer)):  # other layers may read it
                heads.add(layer)
        elif isinstance(layer, _PASSING) or _makes_probabilities(layer):
            if all(used in last for used in consumers_of(layer)):  # not before weights as well
                last.add(layer)
            for source in sources:
                visit(source)

    for tensor in model.outputs:
        visit(tensor)
    return last, heads


def _makes_probabilities(layer: Any) -> bool:
    return type(layer) is _k.Softmax or (type(layer) is _k.Activation and layer.activation in _PROBABILITIES)


class _Plan:
    """What stands for every layer, and what to tell of it."""

    def __init__(self, replace: Mapping, activation: Any, last: set[Any], heads: set[Any]):
        self.replace, self.activation, self.last, self.heads = replace, activation, last, heads
        self.stand_ins: dict[Any, StandIns] = {}
        self.old_layers: dict[Layer, Layer] = {}  # by the layer that took over their weights
        self.replaced: list[Layer] = []
        self.rows: list[Row] = []

    def refusal(self, operation: Any) -> str | None:
        """Finds what stands for an operation, or tells why nothing can."""
        if isinstance(operation, _k.InputLayer):
            return None
        try:
            if not isinstance(operation, _k.Layer):
                raise ValueError("use a layer in place of an operator or function, such as keras.layers.Add()")
            new = self.layers(operation)
        except (TypeError, ValueError) as error:
            return f"- {operation.name} ({type(operation).__name__}): {error}"
        if new is None:
            self.stand_ins[operation], kind = copied(operation), "kept"
        else:
            self.replaced.append(operation)
            self.stand_ins[operation] = new, functools.partial(_take_over, operation, new, self.old_layers)
            kind = " + ".join(type(layer).__name__ for layer in new) or "dropped: certificates are about logits"
            if operation in self.heads and operation.activation in _PROBABILITIES:
                kind += f", {operation.activation.__name__} dropped"
        self.rows.append((operation.name, type(operation).__name__, kind))
        return None

    def layers(self, layer: Any) -> list[Layer] | None:
        """The new layers that stand for one, or `None` for itself."""
        given = [self.replace[key] for key in (layer.name, *type(layer).__mro__) if key in self.replace]
        if given and given[0] is not None:
            return self.of_class(given[0], layer) if isinstance(given[0], type) else [given[0](layer)]
        if not given and layer in self.last and _makes_probabilities(layer):
            return []
        cls = None if given else _counterpart(layer)
        if cls is not None:
            return self.of_class(cls, layer)
        if not given and (_rectifies(layer) or type(layer) in _RECTIFYING) and not kernel_geometries(layer):
            follower = self.rectifier(layer, layer.name)
            if follower:
                return follower
        _check_kept(layer, asked=bool(given))
        return None

    def of_class(self, cls: type, layer: Any) -> list[Layer]:
        """A layer of another class, and a rectifier that was part of the old one."""
        _check_inputs(layer)
        for variable in layer.weights:
            as_float64(variable)
        if not kernel_geometries(layer):
            return [from_config(cls, layer)]
        check_kernel_layer(layer)
        changes: dict[str, Any] = {}
        follower = self.rectifier(layer, f"{layer.name}_activation") if _rectifies(layer) else []
        if follower or (layer in self.heads and layer.activation in _PROBABILITIES):
            changes["activation"] = None
        else:
            activation_bound(layer.activation)
        if layer in self.heads and issubclass(cls, layers.LipschitzDense):
            changes["kernel_constraint"] = constraints.UnitNorm()
        return [from_config(cls, layer, **changes), *follower]

    def rectifier(self, layer: Any, name: str) -> list[Layer]:
        """The activation that replaces a rectifier, or nothing where it cannot."""
        ((shape, *_), *_) = calls_of(layer)
        shape = layer.compute_output_shape(shape)
        usual = "channels_last" if kernel_geometries(layer) else keras.config.image_data_format()
        first = getattr(layer, "data_format", usual) == "channels_first" and len(shape) > 2
        channels = shape[1 if first else -1]
        if self.activation is None or channels is None or channels % 2:
            return []
        last = not first and keras.config.image_data_format() == "channels_first"  # what the layer would not expect
        axis = {"axis": 1} if first else {"axis": -1} if last else {}
        return [self.activation(name=name, dtype=layer.dtype_policy, **axis)]


def _rectifies(layer: Any) -> bool:
    return getattr(layer, "activation", None) in _RECTIFIERS


def _counterpart(layer: Any) -> type | None:
    overlapping = _OVERLAPPING.get(type(layer))
    if overlapping and overlap(layer.pool_size, layer.strides, (1,) * len(layer.pool_size)) > 1:
        return overlapping
    return COUNTERPARTS.get(type(layer))


def _check_inputs(layer: Any) -> None:
    for shapes in calls_of(layer):
        if len(shapes) > 1:
            check_merge(layer, shapes)


def _check_kept(layer: Any, asked: bool) -> None:
    """Refuses to keep a layer without a proven bound, or an unconstrained kernel unless that was asked for."""
    _check_inputs(layer)
    several = max(map(len, calls_of(layer)), default=1)
    if several > 1:
        merge_bound(layer, np.eye(several))
    else:
        lipschitz_bound(layer)
    if kernel_geometries(layer) and not (asked or isinstance(layer, LipschitzLayer)):
        raise ValueError("it has a kernel that nothing would constrain")


def _take_over(old: Any, new: list[Layer], old_layers: dict[Layer, Layer]) -> None:
    """Gives the first new layer the weights of the old one that have the same name and shape, on their constraint set.

    A layer without a place for all kernels of the old one starts anew.
    """
    known = {(weight.name, tuple(weight.shape)): weight for weight in old.weights}
    for layer in new[:1]:
        pairs = [
            (weight, known[key]) for weight in layer.weights if (key := (weight.name, tuple(weight.shape))) in known
        ]
        if kernel_geometries(old).keys() - {weight.name for weight, _ in pairs}:
            return
        old_layers[layer] = old
        for weight, before in pairs:
            weight.assign(before)
            if isinstance(weight.constraint, constraints.LipschitzConstraint):
                weight.assign(weight.constraint.polish(weight))


def _rescale_offsets(model: Any, old_layers: dict[Layer, Layer]) -> None:
    """Makes biases and means as much smaller as the activations have become.

    Most of these networks are positively homogeneous: when a projection divides a kernel by 5 and all later biases
    are divided by 5 too, the same inputs go to the same classes. The factor is followed through the graph; that of a
    kernel is `<new, old> / <old, old>`, its best one in the sense of least squares.
    """
    done: set[Any] = set()

    def apply(place: Application, scales: list[float]) -> float:
        layer = place.layer.layer if type(place.layer) is _k.TimeDistributed else place.layer
        old, first = old_layers.get(layer), layer not in done
        done.add(layer)
        if isinstance(layer, layers.LipschitzResidual) and isinstance(old, _k.Add):
            if first:  # weights that make the sum that of the old branches
                layer.mixing_logits.assign(-np.log(scales))
            return 1 / sum(1 / scale for scale in scales)
        scale = math.exp(np.mean(np.log(scales)))
        if old is None:
            return 1.0 if kernel_geometries(layer) else scale
        if isinstance(layer, layers.BatchCentering) and isinstance(old, _k.BatchNormalization):
            gamma = as_float64(old.gamma) if old.scale else 1.0
            factor = abs(
                np.mean(np.sqrt(as_float64(old.moving_variance) + old.epsilon) / np.where(gamma == 0, 1, gamma))
            )
            if first:
                layer.moving_mean.assign(old.moving_mean * scale)
            if first and layer.center:
                layer.bias.assign(old.beta * (scale * factor))
            return scale * factor
        names = list(kernel_geometries(old))
        for name in names:
            kernel, before = as_float64(getattr(layer, name)), as_float64(getattr(old, name))
            scale *= max(float(np.vdot(kernel, before)), 1e-12) / max(float(np.vdot(before, before)), 1e-12)
        if names and layer.use_bias and first:
            layer.bias.assign(old.bias * scale)
        return scale * math.sqrt(layer.cells) if hasattr(layer, "cells") and "Average" in type(old).__name__ else scale

    walk(model, [1.0] * len(model.inputs), apply, [tensor.shape for tensor in model.inputs])


def report(model: keras.Model, rows: Sequence[Row], agreement: calibrating.Agreement | None) -> str:
    """The table of what was done, for the new model, and what is left to do."""
    bound = lipschitz_bound(model)
    table = rich.table.Table("layer", "was", "is now", title=f"{model.name}: Lipschitz constant at most {bound:.4g}")
    table.box = rich.box.SIMPLE_HEAD
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    rich.console.Console(file=text, width=100, force_terminal=False, force_jupyter=False).print(table)
    said, margin = [text.getvalue().rstrip()], 0.5
    if agreement is not None:
        margin = float(f"{agreement.margin:.2g}") or margin
        said.append(
            f"Of {agreement.inputs:,} inputs, {agreement.share:.1%} are of the same class before and after, with a "
            f"median margin of {margin:g}:\nto train for a larger one trades accuracy for radii."
        )
    loss = "HKR" if model.outputs[0].shape[-1] == 1 else "MulticlassHKR"
    said.append(
        "Compile the new model before you train it: "
        f"model.compile('adam', loss=hkr_keras.losses.{loss}(alpha=50, margin={margin:g}))"
    )
    return "\n\n".join(said)
