"""Summaries of Lipschitz constants: the proven upper bound, and the largest ratio of changes that was found."""

import dataclasses
import inspect
import io
import json
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import rich.box
import rich.console
import rich.table
from keras import ops

from hkr_keras import _display
from hkr_keras.certification import bounds
from hkr_keras.certification.batches import check_inputs
from hkr_keras.certification.bounds import LipschitzState
from hkr_keras.certification.graph import walk
from hkr_keras.certification.rules.registry import is_a
from hkr_keras.certification.singular_values import kernel_spectrum
from hkr_keras.geometry import flattened_layers, kernel_geometries

__all__ = ["LipschitzSummary", "SummaryRow", "lipschitz_summary"]

_POINTS = 4  # inputs at which a Jacobian is taken
_WIDEST = 1024  # dimensions up to which it is taken in full
_DIRECTIONS = 32  # random ones, beyond
_BATCH = 64
_NOISE = 2.0**-18  # what float32 may have added to an output, relative to its largest entry: not counted
_TOLERANCE = 1e-5  # and what it may have added to the change of a layer beyond that


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One layer of a summary; singular values are `None` for layers without a kernel.

    Args:
        layer, kind: name and class.
        sigma_min, sigma_max: smallest and largest singular value of the kernel found, over all image sizes.
        lower: the largest of `sigma_max` and the changes measured at this layer, over what its input changed.
        bound: proven upper bound of the layer, all its inputs taken together.
        product: proven upper bound from the input of the model to the output of the layer.
    """

    layer: str
    kind: str
    sigma_min: float | None
    sigma_max: float | None
    lower: float
    bound: float
    product: float

    @property
    def ratio(self) -> float:
        """Upper bound over lower estimate; infinite when nothing was found."""
        return self.bound / self.lower if self.lower else math.inf


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class LipschitzSummary:
    """What `lipschitz_summary` found: `rows` in the order of computation, `bound` and `lower` of the model.

    `str(summary)` is the table in 80 columns, `summary.table(details=True)` the one with singular values.
    """

    model: str
    bound: float
    lower: float
    rows: tuple[SummaryRow, ...]

    @property
    def ratio(self) -> float:
        """Upper bound over lower estimate of the model: 1 when nothing is wasted."""
        return self.bound / self.lower if self.lower else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The same, as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self, details: bool = False) -> str:
        """The table as text: 80 columns wide, or 110 with the singular values of kernels."""
        table = rich.table.Table(title=f"Lipschitz bounds of {self.model}", box=rich.box.SIMPLE_HEAD)
        for column in ("layer", "kind"):
            table.add_column(column, overflow="fold")
        columns = ("lower", "bound", "ratio", "product")
        for column in ("sigma_min", "sigma_max", *columns) if details else columns:
            table.add_column(column, justify="right", no_wrap=True)
        digits = 6 if details else 5
        for row in self.rows:
            numbers: list[float | None] = [row.lower, row.bound, row.ratio, row.product]
            numbers = [row.sigma_min, row.sigma_max, *numbers] if details else numbers
            table.add_row(row.layer, row.kind, *(_short(number, digits) for number in numbers))
        table.add_section()
        total = (_short(number, digits) for number in (self.lower, self.bound, self.ratio, self.bound))
        table.add_row("model", "", *(["", ""] if details else []), *total)
        text, width = io.StringIO(), 110 if details else 80
        rich.console.Console(file=text, width=width, force_terminal=False, force_jupyter=False).print(table)
        return text.getvalue()

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return (
            f"LipschitzSummary({self.model}: {len(self.rows)} layers, lower {self.lower:.4g}, bound {self.bound:.4g})"
        )

    def _repr_html_(self) -> str:
        header = ("layer", "kind", "lower", "bound", "ratio", "product")
        rows = [tuple(getattr(row, name) for name in header) for row in self.rows]
        total = ("model", "", self.lower, self.bound, self.ratio, self.bound)
        return _display.html_table(f"Lipschitz bounds of {self.model}", header, [*rows, total])


def _short(number: float | None, digits: int) -> str:
    return "" if number is None or math.isinf(number) else f"{number:.{digits}g}"


def _check_sides(name: str, lower: float, bound: float) -> None:
    if lower > bound * (1 + _TOLERANCE):
        raise ValueError(
            f"Expected no change of {name} above its proven bound: correct the bound that you registered, or else "
            f"report this model and use none of its certificates. Received: lower={lower}, bound={bound}"
        )


def lipschitz_summary(
    model: keras.Model,
    x: Any = None,
    print_fn: Callable[[str], Any] | None = print,
    details: bool = False,
) -> LipschitzSummary:
    """Prints upper bounds on the constant of every layer and of the model, beside what was found from below.

    Columns: `lower`, what the layer was seen to stretch its input by; the proven upper `bound`; their ratio, 1 when
    the bound is exact; and the `product`, the bound from the input of the model to the output of the layer. With
    details, the smallest and largest singular value found (of layers with a kernel, over all image sizes). The lower
    estimate of the model is the largest `|f(x) - f(z)| / |x - z|` found from its Jacobians at some inputs (in
    32 random directions for inputs of more than 1024 dimensions). The model is not changed.

    Args:
        model: a built Sequential or functional model.
        x: inputs at which to look, an array (or a list of arrays), of which four are used. Random ones without.
        print_fn: takes the text; `None` prints nothing.
        details: whether to print singular values too, in 110 columns instead of 80.

    Returns:
        A `LipschitzSummary` with `rows`, `bound`, `lower`, `ratio`, `to_dict()` and `to_json()`.

    Raises:
        ValueError: as `lipschitz_bound`.
            Also when a change above a bound is found: a registered bound is too small, or this package is wrong.

    Example:

    >>> import keras, hkr_keras as hkr
    >>> model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(2, name="head")])
    >>> summary = hkr.lipschitz_summary(model, print_fn=None)
    >>> [row.layer for row in summary.rows]
    ['head']
    >>> 0.99 < summary.lower <= summary.bound < 1 + 1e-5
    True
    """
    inputs = bounds.model_inputs(model)
    shapes = [None if tensor is None else tensor.shape for tensor in inputs]
    lower, pairs = _largest_change(model, _points(model, shapes, x))
    rows: list[SummaryRow] = []

    def apply(place: Any, states: list[Any]) -> tuple[LipschitzState, list[Any]]:
        layer, shapes = place.layer, place.shapes
        spectra = [kernel_spectrum(layer, name) for name in kernel_geometries(layer)]
        output = bounds.state_through(place, [state[0] for state in states])
        settings = {"training": False} if "training" in inspect.signature(layer.call).parameters else {}
        results = [layer(arguments if len(arguments) > 1 else arguments[0], **settings) for arguments in _sides(states)]
        found = _ratio(results, [state[1] for state in states])
        sigma_max = math.prod(s.largest for s in spectra) if len(spectra) == 1 else None
        if sigma_max is not None and is_a(layer, keras.layers.Dense) and _is_linear(layer):
            found = max(found, sigma_max)  # that of a convolution is the largest over all sizes of images
        rows.append(
            SummaryRow(
                layer=layer.name,
                kind=type(layer).__name__,
                sigma_min=math.prod(s.smallest for s in spectra) if spectra else None,
                sigma_max=math.prod(s.largest for s in spectra) if spectra else None,
                lower=found,
                bound=bounds.constant_of(layer, shapes),
                product=output.constant,
            )
        )
        return output, results

    states = [(LipschitzState(row), list(sides)) for row, sides in zip(np.eye(len(inputs)), pairs, strict=True)]
    outputs = walk(model, states, apply, shapes)
    bound = bounds.joint_constant([state for state, _ in outputs])
    summary = LipschitzSummary(model=model.name, bound=bound, lower=lower, rows=tuple(rows))
    precise = all(str(layer.compute_dtype) in ("float32", "float64") for layer in flattened_layers(model))
    for row in rows if precise else ():
        _check_sides(f"layer '{row.layer}'", row.lower, row.bound)
    if precise:
        _check_sides(f"model '{model.name}'", lower, bound)
    if print_fn is not None:
        print_fn(summary.table(details))
    return summary


def _is_linear(layer: Any) -> bool:
    return layer.activation is None or layer.activation is keras.activations.linear


def _sides(states: Any) -> list[list]:
    """The inputs of a layer on both sides of the pairs."""
    return [[values[side] for _, values in states] for side in (0, 1)]


def _numpy(tensor: Any) -> np.ndarray:
    array = np.asarray(ops.convert_to_numpy(tensor), dtype=np.float64)
    return array.reshape(len(array), -1)


def _ratio(results: Any, arguments: Any) -> float:
    """The largest change of the result over that of the arguments, less what rounding may have added."""
    first, second = (_numpy(result) for result in results)
    moved = np.sqrt(sum(np.square(_numpy(a) - _numpy(b)).sum(axis=1) for a, b in arguments))
    noise = _NOISE * np.maximum(np.abs(first), np.abs(second)).max(axis=1)
    change = np.linalg.norm(first - second, axis=1) - noise
    return float(np.max(np.divide(change, moved, out=np.zeros_like(moved), where=moved > 0), initial=0.0))


def _points(model: Any, shapes: Any, x: Any) -> list[np.ndarray]:
    if x is not None:
        return [array[:_POINTS].astype("float32") for array in check_inputs(model, x)]
    if None in shapes:
        raise ValueError(
            "Expected inputs x at which to look, since the model does not tell its shapes. Received: x=None"
        )
    rng = np.random.default_rng(0)
    sizes = [tuple(8 if size is None else size for size in shape[1:]) for shape in shapes]
    return [rng.normal(size=(_POINTS, *size)).astype("float32") for size in sizes]


def _largest_change(model: Any, points: list[np.ndarray]) -> tuple[float, list]:
    """The largest ratio found, and the pairs of inputs that were compared, one pair of arrays for each input."""
    sizes = [math.prod(array.shape[1:]) for array in points]
    ends, total = np.cumsum(sizes)[:-1], sum(sizes)
    whole = np.concatenate([array.reshape(len(array), -1) for array in points], axis=1).astype(np.float64)
    step = 1e-2 * max(float(np.sqrt(np.mean(np.square(whole)))), 1e-3)

    def split(x: Any) -> Any:
        parts = np.split(x.astype("float32"), ends, axis=1)
        return [part.reshape(-1, *array.shape[1:]) for part, array in zip(parts, points, strict=True)]

    def function(x: Any) -> Any:
        outputs = []
        for start in range(0, len(x), _BATCH):
            parts = split(x[start : start + _BATCH])
            result = model(parts if len(parts) > 1 else parts[0], training=False)
            outputs.append(np.concatenate([_numpy(y) for y in keras.tree.flatten(result)], axis=1))
        return np.concatenate(outputs)

    if total <= _WIDEST:
        directions, looked_at = np.eye(total), whole
    else:
        random = np.random.default_rng(0).normal(size=(_DIRECTIONS, total))
        directions, looked_at = random / np.linalg.norm(random, axis=1, keepdims=True), whole[:1]
    first, second = [], []
    for point in looked_at:
        jacobian = (function(point + step * directions) - function(point - step * directions)) / (2 * step)
        _, vectors = np.linalg.eigh(jacobian @ jacobian.T)  # the steepest combination of the directions
        steepest = vectors[:, -1] @ directions
        for distance in (step, 10 * step, 100 * step):
            first.append(point + distance * steepest)
            second.append(point - distance * steepest)
    pairs = np.stack(first).astype("float32"), np.stack(second).astype("float32")
    found = _ratio([function(side) for side in pairs], [pairs])
    return found, list(zip(*(split(side) for side in pairs), strict=True))
