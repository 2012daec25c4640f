"""Whether a layer or model computes what its class says: a bound is read from the class and the weights.

A subclass, a hook, a number edited behind Keras's back or an input of another shape can make it compute something
else. All of that is refused here.
"""

import inspect
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from hkr_keras._backends.hooks import has_hooks
from hkr_keras.certification.singular_values import as_float64
from hkr_keras.geometry import flattened_layers, kernel_geometries

__all__ = [
    "build_shape",
    "check_arguments",
    "check_built",
    "check_elementwise",
    "check_input_dtype",
    "check_is_plain_model",
    "check_kernel_layer",
    "check_layer",
    "check_merge",
    "check_model_shapes",
    "check_no_hooks",
    "check_numbers",
    "check_scalars",
    "overridden",
]

#: What a subclass may override: construction and configuration. Bounds are read from the stored weights.
_HARMLESS = {"build", "add_weight", "get_config", "from_config", "enable_lora", "quantize", "loss", "as_keras"}
_OURS = ("keras.", "hkr_keras.", "torch.", "tensorflow.", "flax.", "builtins")
_ACCESS = {"__call__", "__getattribute__", "__getattr__"}
_GRAPH = {"call", "forward", "layers", "inputs", "outputs", "operations", *_ACCESS}


def overridden(layer: Any, known: type) -> set[str]:
    """Names of methods and properties of a known class that a layer of a subclass resolves to something else."""
    defined = {name for cls in type(layer).__mro__ if cls not in known.__mro__ for name in vars(cls)}
    changed = {
        name
        for name in defined - _HARMLESS
        if name in _ACCESS or (not name.startswith("__") and hasattr(known, name))
        if inspect.getattr_static(type(layer), name) is not inspect.getattr_static(known, name, None)
    }
    replaced = {name for name, value in vars(layer).items() if callable(value) and hasattr(known, name)}
    return changed | (replaced - _HARMLESS)


def check_layer(layer: Any, known: type | None, shape: Any = None) -> None:
    """Every check of a layer with one input: its class is unchanged, and its weights, numbers and input fit each other.

    Args:
        layer: the layer.
        known: the class that a rule is registered for; `None` without one.
        shape: with the batch, that the layer is applied to; `None` when unknown.

    Raises:
        ValueError: where one of them fails.
    """
    check_is_itself(layer, known)
    check_batch_apart(layer, shape)
    if kernel_geometries(layer):
        check_built(layer)
    _check_shape(layer, shape)
    for variable in getattr(layer, "weights", ()):
        as_float64(variable)


def check_is_itself(layer: Any, known: type | None) -> None:
    """Refuses a layer that does not compute what its registered class does.

    Raises:
        ValueError: for a subclass that overrides a method, hooks, an integer type or a type policy of one's own.
    """
    changed = set() if known is None else overridden(layer, known)
    if known is not None and changed:
        raise ValueError(
            f"Expected a subclass of {known.__name__} that computes the same function; a bound for it must be "
            f"registered with @hkr_keras.bounds.layer_bound.register({type(layer).__name__}) (and its rounding with "
            "hkr_keras.rounding.layer_rounding, for a rigorous certificate). "
            f"Received: {type(layer).__name__} '{layer.name}', which overrides {', '.join(sorted(changed))}"
        )
    if known is not None and known.__module__.startswith(("keras.", "hkr_keras.")):
        ours = [cls for cls in known.__mro__ if cls.__module__.startswith(_OURS)]
        methods = [item for cls in ours for item in vars(cls).items() if callable(item[1])]
        patched = [name for name, method in methods if not _is_ours(method)]
        if patched:
            raise ValueError(
                f"Expected {known.__name__} to compute what Keras or this package defines. "
                f"Received: a class whose {patched[0]} was replaced"
            )
    _check_no_mask_of_its_own(layer)
    backend = vars(layer).get("backend")
    if backend is not None and not type(backend).__module__.startswith("keras."):
        raise ValueError(f"Expected a layer that computes with Keras. Received: {layer.name}.backend={backend!r}")
    check_no_hooks(layer)
    policy = getattr(layer, "dtype_policy", None)
    if policy is not None and not type(policy).__module__.startswith("keras."):
        raise ValueError(f"Expected a dtype policy of Keras. Received: {layer.name}.dtype_policy={policy}")
    if policy is not None and "float" not in str(layer.compute_dtype):
        raise ValueError(
            "Expected a layer that computes in floating point: rounding to integers has no Lipschitz constant. "
            f"Received: {layer.name}.compute_dtype={layer.compute_dtype}"
        )


def _check_no_mask_of_its_own(layer: Any) -> None:
    """Refuses a layer that may make a mask out of its input, which the layers behind it would read."""
    makes = "compute_mask" in vars(layer) or not _is_ours(getattr(type(layer), "compute_mask", None))
    if makes or any(not _is_ours(getattr(type(each), "compute_mask", None)) for each in flattened_layers(layer)):
        raise ValueError(
            "Expected layers that make no masks, since a mask jumps and is read by layers far behind. "
            f"Received: {type(layer).__name__} '{layer.name}' with a compute_mask of its own"
        )


def _is_ours(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "keras.").startswith(_OURS)


def check_no_hooks(layer: Any) -> None:
    """Refuses functions that PyTorch runs before or after the forward pass of a layer, or of a layer inside it."""
    for each in (layer, *flattened_layers(layer)):
        if has_hooks(each):
            raise ValueError(
                "Expected a layer without forward hooks, its own or global ones. "
                f"Received: {type(each).__name__} '{each.name}'"
            )


def check_elementwise(layer: Any, arrays: Iterable[Any], shape: Any) -> None:
    """Refuses numbers of other sizes than the input they meet: broadcasting it would enlarge its norm.

    Args:
        layer: that adds or multiplies by the numbers.
        arrays: the numbers, as they are broadcast.
        shape: of the input, with the batch; `None` when unknown.
    """
    for array in arrays:
        sizes = tuple(np.shape(array))
        if math.prod(sizes) == 1 and (shape is None or len(sizes) <= len(shape)):
            continue
        known = None if shape is None else (None, *shape[1:])  # the batch has any size
        fits = known is not None and len(sizes) <= len(known)
        if not fits or any(size not in (1, n) for size, n in zip(sizes[::-1], (known or ())[::-1], strict=False)):
            raise ValueError(
                f"Expected the numbers of {type(layer).__name__} '{layer.name}' to have the sizes of its input, "
                f"since broadcasting enlarges norms. Received: shape={sizes}, input_shape={shape}"
            )


def build_shape(layer: Any) -> tuple | None:
    """The shape of the one input that a layer was built for, when it is known."""
    shape = (layer.get_build_config() or {}).get("input_shape")
    if not isinstance(shape, (tuple, list)) or any(isinstance(size, (tuple, list, dict)) for size in shape):
        return None
    return tuple(shape)


def _check_shape(layer: Any, shape: Any) -> None:
    """Refuses an input that the weights of the layer, built for a larger one, would be broadcast over."""
    built = build_shape(layer)
    if shape is None or built is None or not layer.weights or kernel_geometries(layer):
        return
    larger = [b is not None and b != 1 and s in (1, None) for b, s in zip(built[1:], shape[1:], strict=False)]
    if len(built) != len(shape) or any(larger):
        raise ValueError(
            f"Expected {type(layer).__name__} '{layer.name}' to receive inputs of the shape it was built for, since "
            f"broadcasting enlarges norms. Received: shape={tuple(shape)}, built for {built}"
        )


def check_batch_apart(layer: Any, shape: Any) -> None:
    """Refuses the axis of the batch, and any axis that may be it when the shape is unknown."""
    axis = getattr(layer, "axis", None)
    axes = [] if axis is None else [axis] if isinstance(axis, (int, np.integer)) else list(axis)
    known = shape or build_shape(layer)
    if any(a == 0 or (a < 0 and (a < -1 if known is None else a + len(known) <= 0)) for a in axes):
        raise ValueError(
            f"Expected inputs to stay apart in the batch. Received: {layer.name}.axis={axis}, shape={known}"
        )


def check_model_shapes(model: Any, shapes: Sequence[Any]) -> None:
    """Refuses inputs of other sizes than a model was made for: its layers may broadcast them.

    Raises:
        ValueError: for another number of inputs, another rank, or another size where the model knows it.
    """
    expected = [tuple(tensor.shape) for tensor in model.inputs]
    for name, own, given in zip([t.name for t in model.inputs], expected, shapes, strict=True):
        if given is None:
            continue
        same = len(own) == len(given) and all(a is None or a == b for a, b in zip(own[1:], given[1:], strict=True))
        if not same:
            raise ValueError(
                f"Expected inputs of the shape that model '{model.name}' was made for, {own}. "
                f"Received: '{name}' of shape {tuple(given)}"
            )


def check_numbers(layer: Any, arrays: Iterable[Any], shape: tuple) -> None:
    """Refuses arrays of another shape than the one the layer made for them."""
    for array in arrays:
        if tuple(array.shape) != shape:
            raise ValueError(
                f"Expected the numbers that {type(layer).__name__} '{layer.name}' adds to have shape {shape}, since "
                f"broadcasting enlarges norms. Received: shape={tuple(array.shape)}"
            )


def check_scalars(layer: Any, *names: str) -> None:
    """Refuses attributes that are no finite numbers: an array in their place would broadcast."""
    for name in names:
        value = getattr(layer, name)
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise ValueError(f"Expected a finite number. Received: {layer.name}.{name}={value!r}")


def check_kernel_layer(layer: Any, shape: Any = None) -> None:
    """Refuses a kernel layer whose bias, groups or channels are not those of its kernel."""
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            "Expected a kernel that is stored as it is used: merge its LoRA weights first. "
            f"Received: {type(layer).__name__} '{layer.name}' with lora_enabled=True"
        )
    if getattr(layer, "quantization_mode", None):
        raise ValueError(
            "Expected floating point kernels, since the stored weights of a quantized layer are not the ones it "
            f"computes with. Received: {layer.name}.quantization_mode={layer.quantization_mode}"
        )
    kernels = kernel_geometries(layer)
    entry, exit_ = next(iter(kernels.values())), list(kernels.values())[-1]
    sizes, *_, final = 2 * [tuple(getattr(layer, name).shape) for name in kernels]  # read once: they may be composed
    check_numbers(layer, [layer.bias] if layer.use_bias else [], (exit_.outputs(final),))
    shape = build_shape(layer) if shape is None else shape
    if shape is None:
        return
    channels = shape[-1 if getattr(layer, "data_format", "channels_last") == "channels_last" else 1]
    inputs = entry.groups * sizes[-1 if entry.transposed else -2]
    if channels != inputs:  # backends would take a multiple for a convolution in groups
        raise ValueError(
            f"Expected '{layer.name}' to receive as many channels as its kernel was made for, in as many groups. "
            f"Received: {channels} channels, groups={entry.groups}, kernel.shape={sizes}"
        )


def check_built(model: Any) -> None:
    """Refuses what has no weights yet."""
    if not model.built:
        raise ValueError(
            "Expected a built model: give it an Input, or call it once. "
            f"Received: {type(model).__name__} '{model.name}', built=False"
        )


def check_merge(layer: Any, shapes: Sequence[Any]) -> None:
    """Refuses merges that may broadcast, or mix the inputs of a batch."""
    if any(shape is None for shape in shapes):
        raise ValueError(f"Expected inputs of known shapes. Received: layer={type(layer).__name__} '{layer.name}'")
    if isinstance(layer, keras.layers.Concatenate):
        if layer.axis % len(shapes[0]) == 0:
            raise ValueError(f"Expected inputs to stay apart in the batch. Received: {layer.name}.axis={layer.axis}")
        return
    ranks = {len(shape) for shape in shapes}
    inner = {tuple(shape[1:]) for shape in shapes}
    if len(ranks) != 1 or len(inner) != 1 or None in next(iter(inner)):
        raise ValueError(
            f"Expected the inputs of {type(layer).__name__} '{layer.name}' to have equal and known shapes, since "
            f"broadcasting enlarges norms. Received: shapes={shapes}"
        )


def check_is_plain_model(model: Any, cls: type | None) -> None:
    """Refuses a model whose forward pass is its own: its layers do not tell what it computes."""
    changed = set() if cls is None else overridden(model, cls)
    if cls is None or changed & _GRAPH or any(name.startswith("_") for name in changed):
        raise ValueError(
            "Expected a Sequential or functional model, whose graph can be read, or one whose class is registered "
            f"with @hkr_keras.bounds.layer_bound.register({type(model).__name__}). "
            f"Received: model={type(model).__name__} '{model.name}' with a forward pass of its own"
        )
    check_no_hooks(model)


def _default_of_training(layer: Any) -> Any:
    parameter = inspect.signature(layer.call).parameters.get("training")
    return None if parameter is None else parameter.default


def check_arguments(node: Any, model: Any) -> None:
    """Refuses whatever a layer was called with beside its inputs: masks, constants, the training mode."""
    given_names = dict(node.arguments.kwargs)
    if given_names.get("training") is True and _default_of_training(node.operation) is True:
        del given_names["training"]  # which Keras wrote down: augmentation is on unless prediction says otherwise
    flat = keras.tree.flatten((node.arguments.args, given_names))
    other = [value for value in flat if not (isinstance(value, keras.KerasTensor) or value is None or value is False)]
    if other:
        raise ValueError(
            "Expected every layer to be called with tensors of the model alone, in inference mode. "
            f"Received: {node.operation.name}(...) with {other[0]!r} in model '{model.name}'"
        )
    several = isinstance(node.operation, keras.Model) and len(node.input_tensors) > 1
    given = (*node.arguments.args, *node.arguments.kwargs.values())
    if several and any(isinstance(x, dict) for x in (*given, node.operation.input)):
        raise ValueError(
            "Expected a nested model with several inputs to take them as a list, in order. "
            f"Received: a dictionary of inputs of '{node.operation.name}' in model '{model.name}'"
        )


def check_input_dtype(tensor: Any) -> None:
    """Refuses symbolic inputs of an integer type at any depth, since Keras rounds what it is given to that type.

    Raises:
        ValueError: for a type that is not a floating point type.
    """
    if "float" not in tensor.dtype:
        raise ValueError(
            "Expected inputs of a floating point type: rounding to integers has no Lipschitz constant. "
            f"Received: input '{tensor.name}' of dtype {tensor.dtype}"
        )
