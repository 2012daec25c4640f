"""What names and arguments of deel-lip are called here, for errors that say so."""

import dis
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["check_arguments", "refuse_old_arguments", "renamed"]

_DOCUMENT = "see docs/migration.md"

_PROJECTED = "nothing: kernels are projected after every optimizer step"
_BUILT = "nothing: layers learn it when they are built"
_ARGUMENTS = {
    "min_margin": "margin, which is half of min_margin in HKR and HingeMargin",
    "k_coef_lip": "a layer Scale(k) behind the layer",
    **dict.fromkeys(("niter_spectral", "niter_bjorck", "eps_spectral", "eps_bjorck", "beta_bjorck"), _PROJECTED),
    "negative_robustness": "negative",
    "disjoint_neurons": "kernel_constraint=hkr_keras.constraints.UnitNorm() in layers, head='unit_norm' in metrics",
    "lip_const": "lipschitz",
    "tau": "temperature",
    "multi_gpu": "nothing: class means are those of the whole batch on all devices",
    **dict.fromkeys(("in_features", "in_channels"), _BUILT),
    "out_features": "units",
    "out_channels": "filters",
    "bias": "use_bias",
}


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__`, whose error says what a name of deel-lip is called here.

    Args:
        module: name of the module.
        names: what each old name is called here, or how it is written.

    Example:

    >>> renamed("hkr_keras.layers", {"SpectralDense": "LipschitzDense"})("SpectralDense")
    Traceback (most recent call last):
        ...
    AttributeError: module 'hkr_keras.layers' has no 'SpectralDense': LipschitzDense here, see docs/migration.md
    """

    def __getattr__(name: str) -> Any:
        if name in names:
            hint = f"module '{module}' has no '{name}': {names[name]} here, {_DOCUMENT}"
            raise (ImportError if _is_imported(inspect.currentframe()) else AttributeError)(hint)
        raise AttributeError(f"module '{module}' has no attribute '{name}'")

    return __getattr__


def _is_imported(frame: Any) -> bool:
    """Whether the caller of a frame runs `from module import name`, which would drop the text of an AttributeError."""
    caller = None if frame is None else frame.f_back
    return caller is not None and caller.f_code.co_code[caller.f_lasti] == dis.opmap["IMPORT_FROM"]


def check_arguments(cls: type, names: Iterable[str]) -> None:
    """Says what an argument of deel-lip is called here, if one of the names is one.

    Raises:
        TypeError: for such a name.

    Example:

    >>> check_arguments(dict, ["units"])
    """
    for name in names:
        if name in _ARGUMENTS:
            raise TypeError(f"{cls.__name__} has no argument '{name}': {_ARGUMENTS[name]}, {_DOCUMENT}")


def refuse_old_arguments(cls: type) -> None:
    """Makes the constructor of a class say what an argument of deel-lip is called here; its signature stays.

    Example:

    >>> class Loss:
    ...     def __init__(self, margin=1.0): ...
    >>> refuse_old_arguments(Loss)
    >>> Loss(k_coef_lip=2.0)
    Traceback (most recent call last):
        ...
    TypeError: Loss has no argument 'k_coef_lip': a layer Scale(k) behind the layer, see docs/migration.md
    """
    original = cls.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        check_arguments(type(self), kwargs)
        original(self, *args, **kwargs)

    # Keras reads the arguments of a constructor in two ways, of which one does not look behind a wrapper.
    __init__.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    setattr(cls, "__init__", __init__)  # noqa: B010
