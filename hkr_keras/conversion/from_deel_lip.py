"""Models made of layers of deel-lip, in layers of this package. Classes are known by name; nothing is imported."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from hkr_keras import constraints, layers
from hkr_keras.certification.bounds import lipschitz_bound
from hkr_keras.conversion.rebuilding import Layer, Rebuilder, StandIns, calls_of, copied, from_config, operations_of
from hkr_keras.conversion.to_lipschitz import COUNTERPARTS, Replacement, Row, convert, report

__all__ = ["from_deel_lip"]

_k = keras.layers
_TOLERANCE = 1e-3  # of outputs, of the largest one

_KERNEL_LAYERS: dict[str, type] = {
    "SpectralDense": _k.Dense,
    "FrobeniusDense": _k.Dense,
    "SpectralConv2D": _k.Conv2D,
    "FrobeniusConv2D": _k.Conv2D,
    "SpectralConv2DTranspose": _k.Conv2DTranspose,
}
_POOLINGS: dict[str, type] = {
    "ScaledAveragePooling2D": layers.ScaledAveragePooling2D,
    "ScaledL2NormPooling2D": layers.L2NormPooling2D,
    "ScaledGlobalAveragePooling2D": layers.ScaledGlobalAveragePooling2D,
    "ScaledGlobalL2NormPooling2D": layers.GlobalL2NormPooling2D,
    "InvertibleDownSampling": layers.InvertibleDownsampling2D,
    "InvertibleUpSampling": layers.InvertibleUpsampling2D,
}


def from_deel_lip(model: Any, calibrate: Any = None, print_fn: Callable[[str], Any] | None = print) -> keras.Model:
    """A copy of a Keras 3 model made of layers of deel-lip, or of what its `vanilla_export` makes, in layers from here.

    Trained weights carry over, and the bound is proven anew from them.

    - `SpectralDense`, `SpectralConv2D`, `SpectralConv2DTranspose`: Lipschitz layers, the kernel that is used at
      inference projected to the nearest orthonormal one. Padded convolutions of deel-lip can have a norm above 1; here
      it is at most 1, and all later biases are scaled along.
    - `FrobeniusDense` of one output or with `disjoint_neurons`: `LipschitzDense` with `UnitNorm`; otherwise, and
      `FrobeniusConv2D`: `SpectralBall`.
    - Activations, poolings and invertible layers, as layers or (activations) as arguments: the same function here. The
      side of the reflection of `Householder` is in its angles, and `MaxMin`, which doubles the channels, becomes three
      layers. Each is compared with the old layer on random inputs.
    - `k_coef_lip` other than 1: a `Scale` behind the layer.
    - All other layers: as `to_lipschitz` has it, rectifiers are kept.

    Args:
        model: a built Sequential or functional model, nested or not. It is not changed.
        calibrate: inputs of the model on which kernels and biases are fitted, as in `to_lipschitz`.
        print_fn: takes a table of what was done; `None` prints nothing.

    Returns:
        A model that is not compiled.

    Raises:
        ValueError: for a layer that computes something else than its name says, such as an `InvertibleUpSampling` of
            images that are not square; for layers that `to_lipschitz` refuses.

    Example:

    >>> class GroupSort2(_k.Layer):  # as deel-lip has it
    ...     def call(self, inputs):
    ...         return ops.reshape(ops.sort(ops.reshape(inputs, (-1, 4, 2)), axis=-1), (-1, 8))
    >>> model = keras.Sequential([keras.Input((4,)), _k.Dense(8), GroupSort2(), _k.Dense(1)])
    >>> [type(layer).__name__ for layer in from_deel_lip(model, print_fn=None).layers]
    ['LipschitzDense', 'GroupSort', 'LipschitzDense']
    """
    operations = operations_of(model)
    chains: dict[Layer, list[Layer]] = {}  # by layers of deel-lip
    kernels: dict[Layer, Layer] = {}  # of deel-lip, by the plain layers that stand for them

    def stand_ins(layer: Layer) -> StandIns:
        if _name_of(layer) is None:
            return copied(layer)
        x, expected = _outputs_of(layer)  # which builds an activation with weights, too
        chain, fill = _stand_ins(layer)
        chains[layer] = chain
        if _name_of(layer) in _KERNEL_LAYERS:
            kernels[chain[0]] = layer

        def fill_and_compare() -> None:
            fill()
            _compare(layer, chain, x, expected)

        return chain, fill_and_compare

    plain = Rebuilder(stand_ins)(model)
    results: dict[Layer, Layer] = {}  # of this package, by the plain layers before them

    def lipschitz(layer: Layer) -> Layer:
        constraint = _constraint_of(kernels[layer]) if layer in kernels else None
        results[layer] = from_config(COUNTERPARTS[type(layer)], layer, kernel_constraint=constraint)
        return results[layer]

    by_name: dict[type | str, Replacement] = {layer.name: lipschitz for layer in kernels}
    new, rows, agreement = convert(plain, by_name, None, calibrate)
    if print_fn is not None:
        others = {name: (name, was, kind) for name, was, kind in rows}
        told = [
            _row(operation, chains[operation], results) if operation in chains else others[operation.name]
            for operation in operations
            if operation in chains or operation.name in others
        ]
        print_fn(report(new, told, agreement))
    return new


def _row(layer: Layer, chain: list[Layer], results: dict[Layer, Layer]) -> Row:
    """What is told of a layer of deel-lip; of one with a kernel, how far its norm has moved."""
    kind = " + ".join(type(results.get(each, each)).__name__ for each in chain)
    if chain[0] in results:
        kind += f", kernel of norm {lipschitz_bound(_linear(chain[0])):.4f} -> {lipschitz_bound(results[chain[0]]):.4f}"
    return layer.name, type(layer).__name__, kind


def _name_of(layer: Any) -> str | None:
    """The class name of a layer of deel-lip; `None` for other layers. Some names are those of layers here too."""
    name = type(layer).__name__
    return (
        name
        if name in _STAND_INS and not keras.saving.get_registered_name(type(layer)).startswith("hkr_keras>")
        else None
    )


def _constraint_of(layer: Any) -> constraints.LipschitzConstraint:
    if _name_of(layer) == "FrobeniusDense" and (layer.units == 1 or getattr(layer, "disjoint_neurons", True)):
        return constraints.UnitNorm()
    frobenius = str(_name_of(layer)).startswith("Frobenius")
    return constraints.SpectralBall() if frobenius else constraints.Orthonormal()


def _stand_ins(layer: Any) -> StandIns:
    """Layers that compute the same, and what gives them their weights."""
    return _STAND_INS[str(_name_of(layer))](layer)


def _scaled(layer: Any) -> list[Layer]:
    """`Scale` for a coefficient other than 1."""
    k = float(getattr(layer, "k_coef_lip", 1.0))
    return [] if k == 1 else [layers.Scale(k, name=f"{layer.name}_scale", dtype=layer.dtype_policy)]


def _nothing() -> None:
    """Gives no weights."""


def _kernel_layer(layer: Any) -> StandIns:
    """A plain layer with the kernel that is used at inference, `wbar` where there is one, without its coefficient."""
    scale = _scaled(layer)
    k = scale[0].k if scale else 1.0
    changes: dict[str, Any] = {"kernel_initializer": "glorot_uniform"}
    others = ("kernel_regularizer", "bias_regularizer", "activity_regularizer", "bias_initializer", "bias_constraint")
    changes |= {name: None for name in others if _is_foreign(getattr(layer, name, None))}
    behind, fill_behind = _activation_of(layer, split=bool(scale))
    if behind or scale:
        changes["activation"] = None
    plain: Any = from_config(_KERNEL_LAYERS[str(_name_of(layer))], layer, **changes)

    def fill() -> None:
        kernel = getattr(layer, "wbar", None)
        plain.kernel.assign(ops.convert_to_tensor(layer.kernel if kernel is None else kernel) / k)
        if layer.use_bias:
            plain.bias.assign(ops.convert_to_tensor(layer.bias) / k)
        fill_behind()

    return [plain, *scale, *behind], fill


def _activation_of(layer: Any, split: bool) -> StandIns:
    """The activation of a kernel layer as layers of its own: one of deel-lip, or where something is in between."""
    activation = layer.activation
    name = f"{layer.name}_activation"
    if _name_of(activation) is not None:
        chain, fill = _stand_ins(activation)
        for i, each in enumerate(chain):
            each.name = name if i == 0 else f"{name}_{i}"
        return chain, fill
    if not split or activation in (None, keras.activations.linear):
        return [], _nothing
    return [_k.Activation(activation, name=name, dtype=layer.dtype_policy)], _nothing


def _is_foreign(value: Any) -> bool:
    return value is not None and not type(value).__module__.startswith(("keras.", "hkr_keras."))


def _linear(layer: Any) -> Layer:
    """The layer without its activation."""
    twin: Any = type(layer).from_config({**layer.get_config(), "activation": None})
    twin.build(layer.get_build_config()["input_shape"])
    twin.set_weights([ops.convert_to_numpy(weight) for weight in (layer.kernel, layer.bias) if weight is not None])
    return twin


def _pooling(layer: Any) -> StandIns:
    return [from_config(_POOLINGS[str(_name_of(layer))], layer), *_scaled(layer)], _nothing


def _sort(layer: Any) -> StandIns:
    """Groups of all channels (`n` of `None`, or too large) are `FullSort`."""
    settings = {"name": layer.name, "dtype": layer.dtype_policy, "axis": -1}
    n: Any = 2 if type(layer).__name__ == "GroupSort2" else getattr(layer, "n", None)
    full = n is None or type(layer).__name__ == "FullSort"
    return [layers.FullSort(**settings) if full else layers.GroupSort(n, **settings), *_scaled(layer)], _nothing


def _max_min(layer: Any) -> StandIns:
    """`(max(x, 0), max(-x, 0))`: the channels and as many zeros, their `MaxMin`, and the sign of its second half."""
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise ValueError(f"Expected channels_last. Received: {layer.name}.data_format={layer.data_format}")
    channels = calls_of(layer)[0][0][-1]
    settings = {"dtype": layer.dtype_policy}
    padded = _k.Dense(2 * channels, use_bias=False, trainable=False, name=layer.name, **settings)
    signs = [1.0] * channels + [-1.0] * channels
    chain = [
        padded,
        layers.MaxMin(axis=-1, name=f"{layer.name}_sorted", **settings),
        _k.Rescaling(signs, name=f"{layer.name}_signs", **settings),
    ]
    return [*chain, *_scaled(layer)], lambda: padded.set_weights([np.eye(channels, 2 * channels)])


def _householder(layer: Any) -> StandIns:
    """It reflects the other side of the line, as an angle does that is larger by a turn: its half changes sign."""
    new = layers.Householder(axis=-1, name=layer.name, dtype=layer.dtype_policy)
    return [new], lambda: new.angles.assign(ops.convert_to_tensor(layer.theta) + 2 * math.pi)


_STAND_INS: dict[str, Callable[[Any], StandIns]] = {
    **dict.fromkeys(_KERNEL_LAYERS, _kernel_layer),
    **dict.fromkeys(_POOLINGS, _pooling),
    **dict.fromkeys(("GroupSort", "GroupSort2", "FullSort"), _sort),
    "MaxMin": _max_min,
    "Householder": _householder,
}


def _outputs_of(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Random inputs of a layer, and what it makes of them at inference."""
    calls = calls_of(layer)
    if not calls:
        raise ValueError(f"Expected a built layer. Received: {type(layer).__name__} '{layer.name}', built=False")
    unknown = 4 * max(np.ravel(getattr(layer, "pool_size", 1)))
    shape = [2, *(unknown if size is None else size for size in calls[0][0][1:])]
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    return x, ops.convert_to_numpy(ops.cast(layer(x, training=False), "float32"))


def _compare(layer: Any, chain: list[Layer], x: np.ndarray, expected: np.ndarray) -> None:
    """Refuses a layer that computes something else than the ones that are to stand for it."""
    outputs: Any = x
    for each in chain:
        outputs = each(outputs)
    outputs = ops.convert_to_numpy(ops.cast(outputs, "float32"))
    tolerance = _TOLERANCE if "16" not in layer.compute_dtype else 64 * _TOLERANCE
    if outputs.shape != expected.shape or not abs(outputs - expected).max() <= tolerance * abs(expected).max():
        raise ValueError(
            f"Expected {type(layer).__name__} '{layer.name}' to compute what the layer of that name in deel-lip does, "
            f"so that {' + '.join(type(each).__name__ for each in chain)} can stand for it. "
            f"Received: other outputs for inputs of shape {x.shape}"
        )
