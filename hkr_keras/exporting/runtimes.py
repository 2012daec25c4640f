"""Writes models as SavedModel, ONNX or LiteRT, and runs such files in their own runtimes."""

import dataclasses
import importlib.util
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from hkr_keras.certification import bounds
from hkr_keras.certification.batches import check_inputs, to_float32
from hkr_keras.certification.certificates import Certificate, Verification, certify, compare
from hkr_keras.certification.evaluation import hash_of_model, versions
from hkr_keras.certification.prediction import Predictor
from hkr_keras.conversion.to_keras import to_keras
from hkr_keras.exporting.certificate import FORMATS, ExportedCertificate, certificate_path, constants, file_hash

__all__ = ["ExportedModel", "export", "load"]

_SUFFIXES = {".onnx": "onnx", ".tflite": "litert", "": "tf_saved_model"}
_HARMLESS = ("opset_version", "verbose")  # options of `keras.Model.export` that do not touch what is computed
_EXTRA = "pip install 'hkr_keras[export]'"


def export(
    model: keras.Model, path: Any, format: str | None = None, preprocessing: str | None = None, **kwargs: Any
) -> ExportedCertificate:
    """Writes a model as a file that needs neither this package nor Keras, and beside it `<path>.certificate.json`.

    The file holds `to_keras(model)`. With the constants in the certificate, `(f_i - f_j) / distances[i][j]` is all that
    it takes to certify a prediction where the file runs. The file is run before its certificate is written: outputs
    that are not those of the model are refused.

    Args:
        model: a built model with one output, logits or a raw score, and float32 inputs, as for `hkr_keras.certify`.
        path: of the file, which tells the format: `.onnx`, `.tflite` (LiteRT), or no suffix for the folder of a
            TensorFlow SavedModel.
        format: `"tf_saved_model"`, `"onnx"` or `"litert"`, where the path shall not tell it. With the extra `export`,
            Keras writes all three with TensorFlow, ONNX with PyTorch and `tf_saved_model` with JAX; other pairs may
            want packages that it names.
        preprocessing: what was done to the data before they were given to the model, in words, such as
            `"pixels / 255"`.
        **kwargs: `verbose` and `opset_version` of `keras.Model.export`. Others may change the function, as
            quantization does, and are refused.

    Returns:
        The `ExportedCertificate`.

    Raises:
        ValueError: as `certify` and `to_keras`; for a path and a format that do not fit, other options, a SavedModel
            with PyTorch, or a file whose outputs are not those of the model.
        ImportError: without the packages of the extra `export`, or of a pair that wants others.

    Example:

    >>> import tempfile, hkr_keras as hkr
    >>> model = hkr.models.lipschitz_mlp((4,), 3, widths=(8,))
    >>> export(model, "net.onnx", "litert")
    Traceback (most recent call last):
    ValueError: Expected a path that ends in .tflite for litert. Received: path=net.onnx
    """
    path = pathlib.Path(path)
    format = _format(path, format)
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model. Received: model={model!r}")
    if unknown := sorted(set(kwargs) - set(_HARMLESS)):
        raise ValueError(
            "Expected options that leave the function as it is, since the constants are those of the model: "
            f"{', '.join(_HARMLESS)}. Received: {', '.join(unknown)}"
        )
    _check_backend(path, format)
    probes = _probes(model)
    checked = certify(model, probes[0] if len(probes) == 1 else probes, verbose=0)  # refuses what has no certificate
    _check_fed(model)
    distances, bound = constants(model, checked.classes)
    certificate = ExportedCertificate(
        distances=distances,
        bound=bound,
        method=checked.method,
        inputs=_inputs(model),
        preprocessing=preprocessing,
        format=format,
        model_hash=hash_of_model(model),
        versions=versions(model),
    )
    plain = to_keras(model)
    plain(probes if len(probes) > 1 else probes[0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # third parties' own business
            plain.export(str(path), format=format, **{"verbose": False, **kwargs})
    except ImportError as error:
        raise ImportError(
            f"Exports to {format} need more packages: {_EXTRA}. {error}. {_other(path, format)}"
        ) from error
    if difference := _difference(model, ExportedModel(path, certificate), probes, bound):
        raise ValueError(
            "Expected a file whose outputs are those of the model, up to the rounding of float32. Received: outputs "
            f"that {difference}, path={path}"
        )
    certificate = dataclasses.replace(certificate, sha256=file_hash(path))
    certificate_path(path).write_text(certificate.to_json())
    return certificate


_WRITERS = {("jax", "onnx"): "jax2onnx", ("torch", "litert"): "litert_torch"}  # what Keras asks for, beside the extra


def _check_backend(path: pathlib.Path, format: str) -> None:
    """Refuses before work what Keras cannot write with this backend.

    Raises:
        ValueError: for a SavedModel with PyTorch.
        ImportError: without a package that the extra does not have.
    """
    backend = keras.backend.backend()
    if (backend, format) == ("torch", "tf_saved_model"):
        raise ValueError(
            f"Expected TensorFlow or JAX as the backend, since PyTorch writes no SavedModel. {_other(path, format)}. "
            f"Received: KERAS_BACKEND=torch, path={path}"
        )
    needed = _WRITERS.get((backend, format))
    if needed and importlib.util.find_spec(needed) is None:
        raise ImportError(f"Exports to {format} with {backend} need {needed}. {_other(path, format)}")


def _other(path: pathlib.Path, format: str) -> str:
    other = "torch" if format == "onnx" and importlib.util.find_spec("tensorflow") is None else "tensorflow"
    return f"Or another backend, for a saved model: KERAS_BACKEND={other} hkr_keras export model.keras {path}"


def _check_fed(model: keras.Model) -> None:
    """Refuses inputs that a file cannot be given, or does not look at: some formats then have no such input."""
    wrong = [tensor.dtype for tensor in model.inputs if tensor.dtype != "float32"]
    if wrong:
        raise ValueError(f"Expected float32 inputs. Received: model '{model.name}' with inputs of {', '.join(wrong)}")
    if len(model.inputs) > 1 and not isinstance(model.input, (list, tuple)):
        raise ValueError(
            "Expected a model that takes its inputs as a list, in order, as files do: "
            "keras.Model(list(model.inputs), model.output). "
            f"Received: model '{model.name}' with inputs in a {type(model.input).__name__}"
        )
    (state,) = bounds.model_states(model)
    idle = [tensor.name for tensor, constant in zip(model.inputs, state.constants, strict=True) if constant == 0]
    if idle:
        raise ValueError(
            "Expected inputs that all change the output: leave the others out of the model. "
            f"Received: model '{model.name}', whose output does not depend on {', '.join(idle)}"
        )


def _format(path: pathlib.Path, format: str | None) -> str:
    """The format that a path stands for, which the one asked for must be.

    A folder may have any name but those of files of the other formats.
    """
    told = _SUFFIXES.get(path.suffix.lower())
    if format is None:
        if told is None:
            raise ValueError(f"Expected a path ending in .onnx or .tflite, or a folder. Received: path={path}")
        return told
    if format not in FORMATS:
        raise ValueError(f"Expected one of {', '.join(FORMATS)}. Received: format={format}")
    if told != format and not (told is None and format == "tf_saved_model"):
        suffix = next(suffix for suffix, own in _SUFFIXES.items() if own == format)
        wanted = f"a path that ends in {suffix} for {format}" if suffix else f"the path of a folder for {format}"
        raise ValueError(f"Expected {wanted}. Received: path={path}")
    return format


def _probes(model: keras.Model) -> list[np.ndarray]:
    """Inputs at which a file is compared with its model: 0, and noise of four sizes."""
    rng = np.random.default_rng(0)
    scales = np.repeat([0.0, 0.01, 0.3, 1.0, 10.0], [1, 4, 8, 8, 4])
    found = []
    for tensor in bounds.model_inputs(model):
        sizes = [size or 8 for size in tensor.shape[1:]]
        noise = rng.normal(size=(len(scales), *sizes)) * scales.reshape(-1, *[1] * len(sizes))
        noise[1::2] = np.abs(noise[1::2])  # as pixels are
        found.append(noise.astype("float32"))
    return found


def _difference(model: keras.Model, file: "ExportedModel", probes: list[np.ndarray], bound: float) -> str | None:
    """How outputs of the file differ from those of its model, if by more than float32 rounds on the way."""
    probes = [np.concatenate([np.zeros_like(probe[:1]), probe]) for probe in probes]  # f(0), of the size of biases
    mine, theirs = Predictor(model, 128)(probes), file.predict(probes).astype(np.float64)
    theirs = theirs.reshape(mine.shape)
    rows = len(mine)
    lengths = np.sqrt(sum(np.square(probe.reshape(rows, -1)).sum(axis=1) for probe in probes))
    sizes = np.abs(mine).reshape(rows, -1).max(axis=1)
    layers = 1 + len(list(keras.tree.flatten(model.layers)))
    allowed = layers * (2.0**-18 * np.maximum(sizes, sizes[0]) + 2.0**-21 * bound * lengths)
    difference = np.abs(mine - theirs).reshape(rows, -1).max(axis=1)
    if (difference <= allowed).all():
        return None
    worst = int(np.nan_to_num(difference - allowed, nan=np.inf).argmax())
    return f"differ by {difference[worst]:.3g} where {allowed[worst]:.3g} is allowed"


def _inputs(model: keras.Model) -> tuple[dict[str, Any], ...]:
    return tuple({"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in model.inputs)


class ExportedModel:
    """An exported file in its own runtime, with its certificate. Made by `load`.

    Args:
        path: of the file or folder.
        certificate: what `export` wrote beside it.
    """

    def __init__(self, path: Any, certificate: ExportedCertificate):
        self.path = pathlib.Path(path)
        self.certificate = certificate
        try:
            names = [str(each.get("name")) for each in certificate.inputs]
            self._run = _RUNTIMES[str(certificate.format)](self.path, names)
        except ImportError as error:
            raise ImportError(f"Running {certificate.format} files needs more packages: {_EXTRA}. {error}") from error

    def predict(self, x: Any) -> np.ndarray:
        """Outputs of the file for a batch of inputs, float32 arrays (a list of them for several inputs)."""
        return np.asarray(self._run([array.astype(np.float32) for array in self._checked(x)]))

    def _checked(self, x: Any) -> list[np.ndarray]:
        """The inputs as arrays, of the shapes that the constants are about: some runtimes take any other."""
        arrays = [np.asarray(array) for array in (x if isinstance(x, (list, tuple)) else [x])]
        known = [each["shape"] for each in self.certificate.inputs]
        fits = len(arrays) == len(known) and all(
            array.dtype.kind in "fiub"
            and array.ndim == len(shape)
            and all(size in (None, n) for size, n in zip(shape[1:], array.shape[1:], strict=True))
            for array, shape in zip(arrays, known, strict=True)
        )
        if not fits:
            raise ValueError(
                f"Expected arrays of numbers of the shapes {known}. Received: x of shapes {[a.shape for a in arrays]}"
            )
        return arrays

    def certify(self, x: Any) -> Certificate:
        """Predictions and radii, from the outputs of the file and the constants of its certificate.

        An input that float32 does not hold exactly loses the distance by which it is rounded.

        Raises:
            ValueError: for inputs of other shapes, none, or NaN and infinite ones.
        """
        arrays = self._checked(x)
        if not all(len(array) and np.isfinite(array).all() for array in arrays):  # outputs may be finite all the same
            raise ValueError(
                f"Expected finite inputs, at least one. Received: x of shapes {[array.shape for array in arrays]}"
            )
        singles, input_rounding = to_float32(arrays)
        outputs = self.predict(singles)
        return self.certificate.of_outputs(outputs.reshape(len(outputs), -1), input_rounding)

    def verify(self, model: keras.Model, x: Any) -> Verification:
        """Certifies with the model and with the file, and compares, as `Certificate.verify` does.

        What only tells of the making (`preprocessing`, `versions`) is not compared: a model does not know of it.

        Args:
            model: that the file is said to be made of.
            x: inputs on which both are run, arrays as for `certify`.

        Returns:
            A `Verification`: true, or false with its `differences` in words.
        """
        arrays, _ = to_float32(check_inputs(model, x))
        differences = compare(self.certify(arrays), model, arrays if len(arrays) > 1 else arrays[0])
        if list(self.certificate.inputs) != list(_inputs(model)):
            differences.append(f"inputs: expected {self.certificate.inputs}, found {_inputs(model)}")
        distances, bound = constants(model, len(self.certificate.distances))
        mine = self.certificate
        large = mine.distances.shape == distances.shape and (mine.distances >= distances * (1 - 1e-9)).all()
        if not (large and mine.bound >= bound * (1 - 1e-9)):
            differences.append("constants: those of the certificate are smaller than those of the model")
        if difference := _difference(model, self, arrays, bound):
            differences.append(f"outputs: those of the file and the model {difference}")
        return Verification(tuple(differences))


def load(path: Any) -> ExportedModel:
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


_Run = Callable[[list[np.ndarray]], Any]


def _in_order(given: Sequence[str], names: Sequence[str], path: pathlib.Path) -> list[int]:
    """The position among the inputs of the model of every input of a file, which may have an order of its own."""
    if len(given) == len(names) == 1:
        return [0]
    if sorted(given) != sorted(names):
        raise ValueError(
            f"Expected a file whose inputs have the names that the model gives them, {', '.join(names)}. "
            f"Received: {', '.join(given)}, path={path}"
        )
    return [list(names).index(name) for name in given]


def _onnx(path: pathlib.Path, names: Sequence[str]) -> _Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    given = [each.name for each in session.get_inputs()]
    order = _in_order(given, names, path)
    return lambda arrays: session.run(None, {name: arrays[i] for name, i in zip(given, order, strict=True)})[0]


def _litert(path: pathlib.Path, names: Sequence[str]) -> _Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    run = interpreter.get_signature_runner()
    given = list(run.get_input_details())
    order = _in_order(given, names, path)
    (output,) = run.get_output_details()
    return lambda arrays: run(**{name: arrays[i] for name, i in zip(given, order, strict=True)})[output]


def _saved_model(path: pathlib.Path, names: Sequence[str]) -> _Run:
    import tensorflow  # the runtime of such files, whatever the backend

    module = tensorflow.saved_model.load(str(path))
    return lambda arrays: module.serve(arrays if len(arrays) > 1 else arrays[0]).numpy()


_RUNTIMES = {"onnx": _onnx, "litert": _litert, "tf_saved_model": _saved_model}
