"""Shipping: the plain Keras model as SavedModel, ONNX or LiteRT, and beside it what turns its outputs into radii."""

import dataclasses
import hashlib
import json
import math
import pathlib
import warnings
from typing import Any

import keras
import numpy as np

from hkr_keras.certification import bounds
from hkr_keras.certification.certificates import Certificate, Verification, certify
from hkr_keras.certification.evaluation import ROUNDED_DOWN, distance_moved, model_hash, versions
from hkr_keras.conversion.to_keras import to_keras

FORMATS = ("tf_saved_model", "onnx", "litert")
_STORED_CONSTANTS = 1 + 1e-6  # constants of poolings and scalings are rounded to float32 in the file


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedCertificate:
    """What turns the outputs of an exported file into radii: constants, and what the file is about.

    Args:
        distances: `(classes, classes)` float64: how far `f_i - f_j` moves at most per unit of L2 distance at the
            input; `(1, 1)` for a single score, how far the score itself moves.
        bound: proven Lipschitz constant of the whole model.
        method: `"score"`, `"pairwise"` or `"logits"`, see `hkr_keras.certify`.
        inputs: name, shape and dtype of every input.
        preprocessing: what was done to the data before they were given to the model, in words. Radii are in the units
            after that.
        format: of the file, one of `tf_saved_model`, `onnx`, `litert`.
        sha256: of the file, or of the files of a folder.
        model: `model_hash` of the model that was exported.
        versions: of this package, Keras, NumPy and the backend.

    Example:

    >>> certificate = ExportedCertificate(np.array([[0.0, 2.0], [2.0, 0.0]]), 1.5, "pairwise")
    >>> certificate.of_outputs(np.array([[3.0, 1.0]])).radius.round(6).tolist()
    [1.0]
    """

    distances: np.ndarray
    bound: float
    method: str
    inputs: tuple[dict[str, Any], ...] = ()
    preprocessing: str | None = None
    format: str | None = None
    sha256: str | None = None
    model: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=versions)

    def of_outputs(self, outputs) -> Certificate:
        """Predictions and radii for outputs `(n, classes)` or `(n, 1)` of the file.

        Raises:
            ValueError: for outputs of another shape, or NaN and infinite ones.
        """
        outputs = np.asarray(outputs, dtype=np.float64)
        classes = len(self.distances)
        if outputs.ndim != 2 or outputs.shape[1] != classes or not np.isfinite(outputs).all():
            raise ValueError(f"Expected finite outputs of shape (n, {classes}). Received: shape={outputs.shape}")
        if classes == 1:
            prediction = (outputs[:, 0] > 0).astype(np.int64)
            radius = np.abs(outputs[:, 0]) / self.distances[0, 0]
        else:
            prediction = outputs.argmax(axis=1)
            rows = np.arange(len(outputs))
            margins = outputs[rows, prediction][:, None] - outputs
            with np.errstate(divide="ignore", invalid="ignore"):
                radii = np.where(margins > 0, margins / self.distances[prediction], 0.0)
            radii[rows, prediction] = math.inf
            radius = radii.min(axis=1)
        sizes = [size for each in self.inputs for size in each["shape"][1:]]
        dimension = math.prod(sizes) if len(self.inputs) == 1 and None not in sizes else None
        radius = radius * ROUNDED_DOWN
        return Certificate(radius, prediction, self.bound, classes, self.method, False, dimension, self.model)

    def to_json(self) -> str:
        """All fields, and what the radii mean in words."""
        values = dataclasses.asdict(self)
        statement = (
            "For logits f with f_i the largest: no change of the input of L2 norm below the smallest of "
            "(f_i - f_j) / distances[i][j] alters the predicted class. For a single score f: |f| / distances[0][0]. "
            "The network is the one of exact arithmetic; rounding is not covered."
        )
        values |= {"statement": statement, "norm": "L2", "distances": self.distances.tolist()}
        return json.dumps(values, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "ExportedCertificate":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: for anything else.

        Example:

        >>> certificate = ExportedCertificate(np.array([[2.0]]), 2.0, "score")
        >>> float(ExportedCertificate.from_json(certificate.to_json()).distances[0, 0])
        2.0
        """
        try:
            stored = {name: value for name, value in json.loads(text).items() if name != "statement"}
            if stored.pop("norm") != "L2":
                raise ValueError("radii in the L2 norm")
            distances = np.array(stored.pop("distances"), dtype=np.float64)
            positive = distances[~np.eye(len(distances), dtype=bool)] if len(distances) > 1 else distances
            if distances.shape != (len(distances),) * 2 or not (positive >= 0).all() or not stored["bound"] > 0:
                raise ValueError("a square of constants and a positive bound")
            sizes = [size for each in stored["inputs"] for size in each["shape"]]
            words = [stored[name] for name in ("method", "preprocessing", "format", "sha256", "model")]
            right = all(isinstance(s, int | None) for s in sizes) and all(isinstance(w, str | None) for w in words)
            if not right:
                raise ValueError("shapes of integers, a method and hashes")
            return cls(distances, **{**stored, "inputs": tuple(stored["inputs"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # whatever is not as it was written
            raise ValueError(f"Expected the certificate of an exported file. Received: {str(text)[:80]!r}") from error


def certificate_path(path) -> pathlib.Path:
    """Where the certificate of an exported file lies: beside it, `.certificate.json` appended.

    Example:

    >>> certificate_path("net.onnx").name
    'net.onnx.certificate.json'
    """
    path = pathlib.Path(path)
    return path.with_name(path.name + ".certificate.json")


def export(model, path, format: str = "tf_saved_model", preprocessing: str | None = None, **kwargs):
    """Writes a model as a file that needs neither this package nor Keras, and beside it `<path>.certificate.json`.

    The file holds `to_keras(model)`. With the constants in the certificate, `(f_i - f_j) / distances[i][j]` is all that
    it takes to certify a prediction where the file runs.

    Args:
        model: a built model with one output, logits or a raw score, as for `hkr_keras.certify`.
        path: of the file, ending in `.onnx` for ONNX and `.tflite` for LiteRT; for `tf_saved_model` a folder.
        format: `"tf_saved_model"`, `"onnx"` or `"litert"`. With the extra `export`, Keras writes all three with
            TensorFlow, ONNX with PyTorch and `tf_saved_model` with JAX; other pairs may want packages that it names.
        preprocessing: what was done to the data before they were given to the model, in words, such as
            `"pixels / 255"`.
        **kwargs: of `keras.Model.export`.

    Returns:
        The `ExportedCertificate`.

    Raises:
        ValueError: as `certify` and `to_keras`; for another format.
        ImportError: from Keras, which names the package that it wants.

    Example:

    >>> import tempfile, hkr_keras as hkr
    >>> model = hkr.models.lipschitz_mlp((4,), 3, widths=(8,))
    >>> export(model, tempfile.mkdtemp() + "/net", "keras")
    Traceback (most recent call last):
    ValueError: Expected one of tf_saved_model, onnx, litert. Received: format=keras
    """
    if format not in FORMATS:
        raise ValueError(f"Expected one of {', '.join(FORMATS)}. Received: format={format}")
    path = pathlib.Path(path)
    probe = [np.zeros([size or 8 for size in (1, *t.shape[1:])], "float32") for t in bounds.model_inputs(model)]
    checked = certify(model, probe if len(probe) > 1 else probe[0], verbose=0)  # refuses what has no certificate
    plain = to_keras(model)
    plain(probe if len(probe) > 1 else probe[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third parties' own business
        plain.export(str(path), format=format, **{"verbose": False, **kwargs})
    certificate = ExportedCertificate(
        _distances(model, checked.classes),
        checked.bound * _STORED_CONSTANTS,
        checked.method,
        _inputs(model),
        preprocessing,
        format,
        file_hash(path),
        model_hash(model),
        versions(model),
    )
    certificate_path(path).write_text(certificate.to_json())
    return certificate


def _inputs(model) -> tuple[dict[str, Any], ...]:
    return tuple({"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in model.inputs)


def _distances(model, classes: int) -> np.ndarray:
    """How far the difference of two logits, or the score, moves per unit."""
    (state,) = bounds.model_states(model)
    tail = state.tail
    if tail is None:
        distances = (
            np.array([[state.constant]]) if classes == 1 else math.sqrt(2) * state.constant * (1 - np.eye(classes))
        )
    else:
        before = bounds.LipschitzState(tail.constants).constant
        rows = [tail.lengths()] if classes == 1 else [tail.differences_from(label) for label in range(classes)]
        distances = np.minimum(before * np.stack(rows), state.constant if classes == 1 else math.inf)
    return distances * _STORED_CONSTANTS


def file_hash(path) -> str:
    """SHA-256 of a file, or of the names and contents of all files of a folder, as hexadecimal digits."""
    path = pathlib.Path(path)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}:{file_hash(file)}\n".encode())
    return digest.hexdigest()


class ExportedModel:
    """An exported file in its own runtime, with its certificate. Made by `load`.

    Args:
        path: of the file or folder.
        certificate: what `export` wrote beside it.
    """

    def __init__(self, path, certificate: ExportedCertificate):
        self.path = pathlib.Path(path)
        self.certificate = certificate
        self._run = _RUNTIMES[str(certificate.format)](self.path)

    def predict(self, x) -> np.ndarray:
        """Outputs of the file for a batch of inputs, float32 arrays (a list of them for several inputs)."""
        arrays = x if isinstance(x, (list, tuple)) else [x]
        return np.asarray(self._run([np.asarray(array, dtype=np.float32) for array in arrays]))

    def certify(self, x) -> Certificate:
        """Predictions and radii, from the outputs of the file and the constants of its certificate.

        An input that float32 does not hold exactly loses the distance by which it is rounded.
        """
        found = self.certificate.of_outputs(self.predict(x))
        moved = distance_moved([np.asarray(array) for array in (x if isinstance(x, (list, tuple)) else [x])])
        return dataclasses.replace(found, radius=np.maximum(found.radius - moved, 0.0))

    def verify(self, model, x, tolerance: float = 1e-5) -> Verification:
        """Certifies with the model and with the file, and compares.

        What only tells of the making (`preprocessing`, `versions`) is not compared: a model does not know of it.

        Args:
            model: that the file is said to be made of.
            x: inputs on which both are run.
            tolerance: by how much outputs and radii may differ, relative to the largest of them.

        Returns:
            A `Verification`: true, or false with its `differences` in words.
        """
        mine, differences = certify(model, x, verbose=0), []
        if self.certificate.model != model_hash(model):
            differences.append(f"model: expected {self.certificate.model}, found {model_hash(model)}")
        if list(self.certificate.inputs) != list(_inputs(model)):
            differences.append(f"inputs: expected {self.certificate.inputs}, found {_inputs(model)}")
        if self.certificate.method != mine.method:
            differences.append(f"method: expected {self.certificate.method}, found {mine.method}")
        smaller = self.certificate.distances < _distances(model, mine.classes) * (1 - 1e-9)
        if self.certificate.distances.shape != smaller.shape or smaller.any() or self.certificate.bound < mine.bound:
            differences.append("constants: those of the certificate are smaller than those of the model")
        outputs = keras.ops.convert_to_numpy(model.predict(x, verbose=0)).reshape(len(mine.radius), -1)
        off = np.abs(self.predict(x) - outputs).max()
        if not off <= tolerance * max(np.abs(outputs).max(), 1.0):
            differences.append(f"outputs: the file's differ by up to {off:.3g}")
        theirs = self.certify(x)
        changed = np.flatnonzero(theirs.prediction != mine.prediction)
        if (mine.radius[changed] > tolerance).any():
            differences.append(f"predictions: {len(changed)} differ, the first at input {changed[0]}")
        far = np.abs(theirs.radius - mine.radius) > tolerance * max(mine.radius.max(), 1.0)
        if far.any():
            differences.append(f"radii: {far.sum()} differ, the first at input {np.flatnonzero(far)[0]}")
        return Verification(tuple(differences))


def load(path) -> ExportedModel:
    """Opens an exported file in its runtime (onnxruntime, LiteRT or TensorFlow) with its certificate.

    Args:
        path: as given to `export`.

    Raises:
        ValueError: for a file that is not the one that the certificate was written for, or a certificate that cannot
            be read.
        FileNotFoundError: without a certificate beside it.
        ImportError: without the runtime; the extra `export` installs it.
    """
    certificate = ExportedCertificate.from_json(certificate_path(path).read_text())
    if certificate.format not in FORMATS:
        raise ValueError(f"Expected a certificate of one of {', '.join(FORMATS)}. Received: {certificate.format}")
    if file_hash(path) != certificate.sha256:
        raise ValueError(f"Expected the file that the certificate was written for. Received: path={path}")
    return ExportedModel(path, certificate)


def _onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    names = [each.name for each in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]


def _litert(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))

    def run(arrays):
        details = interpreter.get_input_details()
        for detail, array in zip(details, arrays, strict=True):
            interpreter.resize_tensor_input(detail["index"], array.shape)
        interpreter.allocate_tensors()
        for detail, array in zip(details, arrays, strict=True):
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return run


def _saved_model(path):
    import tensorflow  # the runtime of such files, whatever the backend

    module = tensorflow.saved_model.load(str(path))
    return lambda arrays: module.serve(*arrays).numpy()


_RUNTIMES = {"onnx": _onnx, "litert": _litert, "tf_saved_model": _saved_model}
