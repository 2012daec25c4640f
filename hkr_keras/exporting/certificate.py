"""The certificate beside an exported file: constants that turn its outputs into certified radii, as JSON."""

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any, ClassVar

import keras
import numpy as np

from hkr_keras import _display, layers
from hkr_keras.certification import bounds
from hkr_keras.certification.certificates import Certificate
from hkr_keras.certification.evaluation import versions
from hkr_keras.certification.graph import walk
from hkr_keras.certification.radii import decide, output_constants, pair_constants
from hkr_keras.conversion.to_keras import to_keras
from hkr_keras.geometry import kernel_geometries

__all__ = ["ExportedCertificate"]

FORMATS = ("tf_saved_model", "onnx", "litert")
_METHODS = ("score", "pairwise", "logits")
_STATEMENT = (
    "For logits f with f_i the largest: no change of the input of L2 norm below the smallest of "
    "(f_i - f_j) / distances[i][j] alters the predicted class. For a single score f: |f| / distances[0][0]. "
    "The network is the one of exact arithmetic; rounding is not covered."
)


def _check(condition: Any, wanted: str) -> None:
    if not condition:
        raise ValueError(f"Expected {wanted} in the certificate of an exported file")


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ExportedCertificate:
    """The constants that turn the outputs of an exported file into certified radii, and what they are valid for.

    Args:
        distances: `(classes, classes)` float64: how far `f_i - f_j` moves at most per unit of L2 distance at the
            input, 0 on the diagonal alone; `(1, 1)` for a single score, how far the score itself moves.
        bound: proven Lipschitz constant of the whole model.
        method: `"score"`, `"pairwise"` or `"logits"`, see `hkr_keras.certify`.
        inputs: name, shape and dtype of every input.
        preprocessing: what was done to the data before they were given to the model, in words. Radii are in the units
            after that.
        format: of the file, one of `tf_saved_model`, `onnx`, `litert`.
        sha256: of the file, or of the files of a folder, or of an ONNX file and the files that it keeps its weights in.
        model_hash: `hash_of_model` of the model that was exported.
        versions: of this package, Keras, NumPy and the backend.

    Raises:
        ValueError: for constants that are not positive and finite, not symmetric, or do not fit the method.

    Example:

    >>> certificate = ExportedCertificate(distances=np.array([[0.0, 2.0], [2.0, 0.0]]), bound=1.5, method="pairwise")
    >>> certificate
    ExportedCertificate(2 classes, pairwise, bound 1.5000, smallest and largest distance 2 and 2)
    >>> certificate.of_outputs(np.array([[3.0, 1.0]])).radius.round(6).tolist()
    [1.0]
    """

    _fields: ClassVar[tuple[str, ...]] = ("bound", "method", "preprocessing", "format", "sha256", "versions")

    distances: np.ndarray
    bound: float
    method: str
    inputs: tuple[dict[str, Any], ...] = ()
    preprocessing: str | None = None
    format: str | None = None
    sha256: str | None = None
    model_hash: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=versions)

    def __post_init__(self) -> None:
        distances = self.distances
        square = isinstance(distances, np.ndarray) and distances.ndim == 2 and len(set(distances.shape)) == 1
        _check(square and distances.dtype.kind == "f" and distances.size, "a square of constants")
        _check(self.method in _METHODS and (self.method == "score") == (len(distances) == 1), "a method that fits them")
        off = ~np.eye(len(distances), dtype=bool) if len(distances) > 1 else np.ones((1, 1), dtype=bool)
        _check((distances[off] > 0).all() and np.isfinite(distances).all(), "positive and finite constants")
        symmetric = np.allclose(distances, distances.T, rtol=1e-6, atol=0.0)
        _check(symmetric and not distances[~off].any(), "symmetric constants")
        is_number = isinstance(self.bound, (int, float)) and not isinstance(self.bound, bool)
        _check(is_number and 0 < self.bound < math.inf, "a positive and finite bound")

    def _pairs(self) -> np.ndarray:
        count = len(self.distances)
        return self.distances[~np.eye(count, dtype=bool)] if count > 1 else self.distances.reshape(-1)

    def __repr__(self) -> str:
        pairs, classes = self._pairs(), len(self.distances)
        kind = "one score" if classes == 1 else f"{classes} classes"
        return (
            f"ExportedCertificate({kind}, {self.method}, bound {self.bound:.4f}, "
            f"smallest and largest distance {pairs.min():.4g} and {pairs.max():.4g})"
        )

    def _repr_html_(self) -> str:
        rows = [(name, getattr(self, name)) for name in ("format", "preprocessing", "sha256", "model_hash")]
        inputs = [("input", f"{each.get('name')} {each['shape']} {each.get('dtype')}") for each in self.inputs]
        return _display.html_table(repr(self), ("", ""), [*inputs, *((name, value or "") for name, value in rows)])

    def of_outputs(self, outputs: Any, input_rounding: Any = 0.0) -> Certificate:
        """Predictions and radii for outputs `(n, classes)` or `(n, 1)` of the file.

        Args:
            outputs: of the file.
            input_rounding: how far each input was moved before it was given to the file, `(n,)`, such as by rounding.

        Raises:
            ValueError: for outputs of another shape, or NaN and infinite ones.
        """
        outputs = np.asarray(outputs, dtype=np.float64)
        classes = len(self.distances)
        if outputs.ndim != 2 or outputs.shape[1] != classes or not np.isfinite(outputs).all():
            raise ValueError(f"Expected finite outputs of shape (n, {classes}). Received: shape={outputs.shape}")
        prediction, radius = decide(outputs, self.distances, input_rounding)
        sizes = [size for each in self.inputs for size in each["shape"][1:]]
        return Certificate(
            radius=radius,
            prediction=prediction,
            bound=self.bound,
            classes=classes,
            method=self.method,
            dimension=math.prod(sizes) if len(self.inputs) == 1 and None not in sizes else None,
            model_hash=self.model_hash,
        )

    def to_json(self) -> str:
        """All fields, and what the radii mean in words."""
        values = {name: getattr(self, name) for name in self._fields}
        values |= {"model": self.model_hash, "inputs": list(self.inputs), "distances": self.distances.tolist()}
        return json.dumps({**values, "statement": _STATEMENT, "norm": "L2"}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "ExportedCertificate":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: for anything else.

        Example:

        >>> certificate = ExportedCertificate(distances=np.array([[2.0]]), bound=2.0, method="score")
        >>> float(ExportedCertificate.from_json(certificate.to_json()).distances[0, 0])
        2.0
        """
        try:
            stored = json.loads(text)
            _check(stored["norm"] == "L2", "radii in the L2 norm")
            rows = stored["distances"]
            _check(all(type(value) in (int, float) for row in rows for value in row), "numbers")
            words = [stored[name] for name in ("preprocessing", "format", "sha256", "model")]
            _check(all(isinstance(word, str | None) for word in words), "words")
            _check(stored["format"] in (None, *FORMATS), "a known format")
            _check(all(isinstance(version, str) for version in stored["versions"].values()), "versions")
            for each in stored["inputs"]:
                _check(isinstance(each["shape"], list), "shapes")
                _check(all(size is None or (type(size) is int and size > 0) for size in each["shape"]), "sizes")
            return cls(
                distances=np.array(rows, dtype=np.float64),
                inputs=tuple(stored["inputs"]),
                model_hash=stored["model"],
                **{name: stored[name] for name in cls._fields},
            )
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"Expected the certificate of an exported file. Received: {str(text)[:80]!r}") from error


def certificate_path(path: Any) -> pathlib.Path:
    """Where the certificate of an exported file lies: beside it, `.certificate.json` appended.

    Example:

    >>> certificate_path("net.onnx").name
    'net.onnx.certificate.json'
    """
    path = pathlib.Path(path)
    return path.with_name(path.name + ".certificate.json")


def constants(model: keras.Model, classes: int) -> tuple[np.ndarray, float]:
    """How far differences of logits, or a score, and the whole output of the *file* of a model move per unit.

    The file holds the kernels of `to_keras(model)`, bit by bit, and so do these bounds. Other numbers, such as the
    factors of scalings and poolings, are rounded to float32 on their way into the file, and its compiler may multiply a
    kernel by the numbers of the layer behind it: the constants are raised by what that can do, layer by layer.

    Args:
        model: a built model with one output `(n, classes)`, or a score.
        classes: number of outputs.

    Returns:
        `(classes, classes)`, or `(1, 1)` for a score, and the constant of the whole model.
    """
    (state,) = bounds.model_states(to_keras(model, kernels_only=True))
    allowance = _allowance(model)
    if classes == 1:
        return output_constants(state).reshape(1, 1) + allowance, state.constant + allowance
    apart, found = ~np.eye(classes, dtype=bool), np.zeros((classes, classes))
    for label in range(classes):
        found[label, apart[label]] = pair_constants(state, label, classes) + 2 * allowance
    found = np.where(apart, np.maximum(np.maximum(found, found.T), np.finfo(np.float64).tiny), 0.0)
    return found, state.constant + allowance


_ROUNDED = 2.0**-23  # twice the unit roundoff
_k = keras.layers
#: Layers that move, choose or add up what they are given.
_WITHOUT_NUMBERS = (
    *(_k.Activation, _k.Add, _k.Concatenate, _k.Dropout, _k.Flatten, _k.Identity, _k.InputLayer, _k.Maximum),
    *(_k.MaxPooling1D, _k.MaxPooling2D, _k.MaxPooling3D, _k.Minimum, _k.Permute, _k.ReLU, _k.Reshape, _k.Subtract),
    *(layers.FullSort, layers.GroupSort, layers.MaxMin),
    *(layers.InvertibleDownsampling2D, layers.InvertibleUpsampling2D),
    *(layers.ChannelShuffle, layers.SpatialShift1D, layers.SpatialShift2D),
)


def _allowance(model: keras.Model) -> float:
    """How far a score of the file may move per unit, beyond what the numbers of the model allow.

    A number has an error of its own, and may be multiplied into any kernel: of a matrix whose entries are off by a
    relative u, the norm is off by at most u times the root of its smaller side. The sum over the layers with numbers of
    their own is relative to the product of the constants of all layers, each by itself.
    """
    errors, width = 0.0, 1

    def apply(place: Any, products: list[float]) -> float:
        nonlocal errors, width
        layer = place.layer
        kernels = [getattr(layer, name) for name in kernel_geometries(layer)]
        width = max([width, *(min(math.prod(kernel.shape[:-1]), kernel.shape[-1]) for kernel in kernels)])
        if isinstance(layer, (layers.SLLDense, layers.SLLConv2D)) or (layer.weights and not kernels):
            errors += 64  # numbers that are computed from several weights
        elif not kernels and (not isinstance(layer, _WITHOUT_NUMBERS) or bounds.constant_of(layer, place.shapes) > 1.5):
            errors += 4
        for value in (getattr(layer, "k", None), getattr(layer, "scale", None)):
            if isinstance(value, (int, float)) and value and not 2.0**-100 <= abs(value) <= 2.0**100:
                raise ValueError(
                    "Expected scalings between 2^-100 and 2^100, which float32 holds to 24 bits. "
                    f"Received: {value} of layer '{layer.name}'"
                )
        return math.hypot(*products) * bounds.constant_of(layer, place.shapes)

    inputs = bounds.model_inputs(model)
    (product,) = walk(model, [1.0] * len(inputs), apply, [tensor.shape for tensor in inputs])
    return product * math.expm1(errors * _ROUNDED * (1 + math.sqrt(width) / 2)) * (1 + 1e-9)


def file_hash(path: Any) -> str:
    """SHA-256 of a file, or of the names and contents of all files of a folder, as hexadecimal digits.

    Of an ONNX file that keeps its weights in other files, these count too.

    Raises:
        ImportError: for an ONNX file without the package `onnx`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _hash_of_all(path, sorted(file for file in path.rglob("*") if file.is_file()))
    external = _external_files(path) if path.suffix == ".onnx" else []
    return _hash_of_all(path.parent, [path, *external]) if external else _hash(path)


def _hash(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_all(folder: pathlib.Path, files: list[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}:{_hash(file)}\n".encode())
    return digest.hexdigest()


def _external_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files beside an ONNX file that hold its weights.

    Raises:
        ValueError: for weights outside of the folder of the file.
    """
    if b"location" not in path.read_bytes():  # the key of each reference to another file
        return []
    try:
        import onnx
    except ImportError as error:
        raise ImportError("ONNX files need the package onnx: pip install 'hkr_keras[export]'") from error
    names: set[str] = set()

    def look(graph: Any) -> None:
        tensors = list(graph.initializer)
        for node in graph.node:
            for attribute in node.attribute:
                tensors.extend([*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])])
                for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                    look(inner)
        names.update(entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location")

    look(onnx.load(str(path), load_external_data=False).graph)
    files = sorted((path.parent / name).resolve() for name in names)
    if not all(file.is_relative_to(path.parent.resolve()) and file.is_file() for file in files):
        raise ValueError(f"Expected the weights of an ONNX file beside it. Received: {path} with weights in {names}")
    return [path.parent / file.relative_to(path.parent.resolve()) for file in files]
