"""Sets constraints on the kernels of a model without replacing its layers."""

from collections.abc import Mapping

import keras

from hkr_keras import constraints
from hkr_keras.geometry import model_kernels, weight_geometries

__all__ = ["constrain"]


def constrain(
    model: keras.Model,
    constraint: constraints.LipschitzConstraint | None = None,
    replace: Mapping[type | str, constraints.LipschitzConstraint | None] | None = None,
) -> keras.Model:
    """Sets constraints on the kernels of a model, in place, and moves these kernels onto the constraint set.

    The layers stay what they are; training keeps their kernels there, since the optimizer applies constraints after
    each step. Kernels that carry a constraint of this package keep it. Activations, poolings, normalisations and
    additions are not touched: `lipschitz_bound` tells what the constant of the whole is.

    Args:
        model: a built model of Dense and convolution layers, compiled or not.
        constraint: of all kernels; `None` for `Orthonormal()`.
        replace: other constraints for layers of a class or name, `None` to leave their kernels alone. Names go first.

    Returns:
        The same model.

    Raises:
        ValueError: for a constraint of another library; for names that no layer has; for a model without kernels.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)])
    >>> import hkr_keras as hkr
    >>> bool(hkr.lipschitz_bound(constrain(model)) < 1 + 1e-5)
    True
    """
    replace = replace or {}
    kernels = list(model_kernels(model))
    unknown = [key for key in replace if isinstance(key, str) and key not in {layer.name for layer, *_ in kernels}]
    if unknown or not kernels:
        names = [layer.name for layer, *_ in kernels]
        raise ValueError(f"Expected layers with kernels, which are {names}. Received: replace={unknown}")
    for layer, kernel, geometry in kernels:
        given = [replace[key] for key in (layer.name, *type(layer).__mro__) if key in replace]
        if (given and given[0] is None) or (
            not given and isinstance(kernel.constraint, constraints.LipschitzConstraint)
        ):
            continue
        bound = constraints.get(given[0] if given else constraint).bind(geometry)
        name = next(name for name in weight_geometries(layer) if getattr(layer, name) is kernel)
        settings = (f"{name.removesuffix('_kernel')}_constraint", "kernel_constraint", "depthwise_constraint")
        setattr(layer, next(setting for setting in settings if hasattr(layer, setting)), bound)  # for its config
        kernel.constraint = bound
        kernel.assign(bound.polish(kernel))
    model.train_function = None  # a compiled one holds the constraints of before
    return model
