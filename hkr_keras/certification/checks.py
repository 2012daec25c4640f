"""Whether a layer or model computes what its class says: a bound is read from the class and the weights.

A subclass, a hook, a number edited behind Keras's back or an input of another shape can make it compute something
else. All of that is refused here.
"""

import inspect
import math

import keras
import numpy as np

from hkr_keras.geometry import kernel_geometries

#: What a subclass may override: construction and configuration. Bounds are read from the stored weights.
_HARMLESS = {"build", "add_weight", "get_config", "from_config", "enable_lora", "quantize", "loss"}
_ACCESS = {"__call__", "__getattribute__", "__getattr__"}
_GRAPH = {"call", "layers", "inputs", "outputs", "operations", *_ACCESS}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # of PyTorch, whose modules Keras layers are there


def overridden(layer, known: type) -> set[str]:
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


def check_is_itself(layer, registry) -> None:
    """Refuses a layer that does not compute what its registered class does.

    Raises:
        ValueError: for a subclass that overrides a method, hooks, an integer type or a type policy of one's own.
    """
    known = next((cls for cls in type(layer).__mro__ if cls in registry), object)
    changed = overridden(layer, known) if known is not object else set()
    if changed:
        raise ValueError(
            f"Expected a subclass of {known.__name__} that computes the same function; a bound for it must be "
            f"registered with @hkr_keras.bounds.layer_bound.register({type(layer).__name__}) (and its rounding with "
            "hkr_keras.rounding.layer_rounding, for a rigorous certificate). "
            f"Received: {type(layer).__name__} '{layer.name}', which overrides {', '.join(sorted(changed))}"
        )
    check_no_hooks(layer)
    policy = getattr(layer, "dtype_policy", None)
    if policy is not None and not type(policy).__module__.startswith("keras."):
        raise ValueError(f"Expected a dtype policy of Keras. Received: {layer.name}.dtype_policy={policy}")
    if policy is not None and "float" not in str(layer.compute_dtype):
        raise ValueError(
            "Expected a layer that computes in floating point: rounding to integers has no Lipschitz constant. "
            f"Received: {layer.name}.compute_dtype={layer.compute_dtype}"
        )


def check_no_hooks(layer) -> None:
    """Refuses functions that PyTorch runs before or after the forward pass."""
    if any(getattr(layer, name, None) for name in _HOOKS):
        raise ValueError(f"Expected a layer without forward hooks. Received: {type(layer).__name__} '{layer.name}'")


def check_sizes(layer, arrays) -> None:
    """Refuses numbers of other sizes than the input of the layer: broadcasting it would enlarge its norm."""
    input_shape = build_shape(layer) or ()
    for numbers in arrays:
        sizes = np.shape(numbers)
        known = (*(None for _ in sizes), *input_shape)[-len(sizes) :] if sizes else ()
        shared = len(layer._inbound_nodes) > 1 and math.prod(sizes) > 1  # perhaps with inputs of other shapes
        if shared or any(size not in (1, n) for size, n in zip(sizes, known, strict=True)):
            raise ValueError(
                f"Expected the numbers of {type(layer).__name__} '{layer.name}' to have the sizes of its input, "
                f"since broadcasting enlarges norms. Received: shape={sizes}, input_shape={input_shape or None}"
            )


def build_shape(layer) -> tuple | None:
    """The shape of the one input that a layer was built for, when it is known."""
    shape = (layer.get_build_config() or {}).get("input_shape")
    if not isinstance(shape, (tuple, list)) or any(isinstance(size, (tuple, list, dict)) for size in shape):
        return None
    return tuple(shape)


def check_shape(layer, shape) -> None:
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


def check_batch_apart(layer, shape) -> None:
    """Refuses an axis that is, or for an unknown shape may be, the batch."""
    axis = getattr(layer, "axis", None)
    axes = [] if axis is None else [axis] if isinstance(axis, (int, np.integer)) else list(axis)
    known = shape or build_shape(layer)
    if any(a == 0 or (a < -1 and (known is None or a + len(known) <= 0)) for a in axes):
        raise ValueError(
            f"Expected inputs to stay apart in the batch. Received: {layer.name}.axis={axis}, shape={known}"
        )


def check_model_shapes(model, shapes) -> None:
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


def check_numbers(layer, arrays, shape: tuple) -> None:
    """Refuses arrays of another shape than the one the layer made for them."""
    for array in arrays:
        if tuple(array.shape) != shape:
            raise ValueError(
                f"Expected the numbers that {type(layer).__name__} '{layer.name}' adds to have shape {shape}, since "
                f"broadcasting enlarges norms. Received: shape={tuple(array.shape)}"
            )


def check_kernel_layer(layer) -> None:
    """Refuses a kernel layer whose bias or groups are not those of its kernel."""
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            "Expected a kernel that is stored as it is used: merge its LoRA weights first. "
            f"Received: {type(layer).__name__} '{layer.name}' with lora_enabled=True"
        )
    kernels, built = kernel_geometries(layer), build_shape(layer)
    name, geometry = list(kernels.items())[-1]
    shape = getattr(layer, name).shape
    check_numbers(layer, [layer.bias] if layer.use_bias else [], (geometry.outputs(shape),))
    if built is not None and geometry.groups > 1:
        channels = built[-1 if layer.data_format == "channels_last" else 1]
        if channels != geometry.groups * shape[-2]:
            raise ValueError(
                f"Expected as many groups as the kernel of '{layer.name}' was made for. "
                f"Received: groups={geometry.groups}, kernel.shape={tuple(shape)}, {channels} channels"
            )


def check_built(model) -> None:
    """Refuses what has no weights yet."""
    if not model.built:
        raise ValueError(
            "Expected a built model: give it an Input, or call it once. "
            f"Received: {type(model).__name__} '{model.name}', built=False"
        )


def check_merge(layer, shapes: list) -> None:
    """Refuses merges that may broadcast, or mix the inputs of a batch."""
    if any(shape is None for shape in shapes):
        raise ValueError(f"Expected inputs of known shapes. Received: layer={type(layer).__name__} '{layer.name}'")
    if isinstance(layer, keras.layers.Concatenate):
        if layer.axis % len(shapes[0]) == 0:
            raise ValueError(f"Expected inputs to stay apart in the batch. Received: {layer.name}.axis={layer.axis}")
        return
    inner = {tuple(shape[1:]) for shape in shapes}
    if len(inner) != 1 or None in next(iter(inner)):
        raise ValueError(
            f"Expected the inputs of {type(layer).__name__} '{layer.name}' to have equal and known shapes, since "
            f"broadcasting enlarges norms. Received: shapes={shapes}"
        )


def check_is_plain_model(model, cls: type | None) -> None:
    """Refuses a model whose forward pass is its own: its layers do not tell what it computes."""
    changed = set() if cls is None else overridden(model, cls)
    if cls is None or changed & _GRAPH or any(name.startswith("_") for name in changed):
        raise ValueError(
            "Expected a Sequential or functional model, whose graph can be read, or one whose class is registered "
            f"with @hkr_keras.bounds.layer_bound.register({type(model).__name__}). "
            f"Received: model={type(model).__name__} '{model.name}' with a forward pass of its own"
        )
    check_no_hooks(model)


def check_arguments(node, model) -> None:
    """Refuses whatever a layer was called with beside its inputs: masks, constants, the training mode."""
    flat = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
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
