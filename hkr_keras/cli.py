"""The command line, `hkr_keras demo | summary | certify | export`: arguments first, Keras after.

Keras and its backend take seconds to start. So nothing here imports them before the arguments, the files and the
backend have been checked, and the package itself calls `start` before it imports anything else.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import pathlib
import sys
import tempfile
import zipfile
import zlib
from typing import Any, NoReturn

__all__ = ["demo", "main", "start"]

_PACKAGE = "hkr_keras"
_DEFAULTS = {  # of data sets: epochs, batch size
    "digits": (30, 32),
    "moons": (40, 25),
    "mnist": (4, 128),
    "fashion_mnist": (4, 128),
    "cifar10": (10, 128),
}
_OWN_DATA = (20, 64)
_BINARY_LOSSES = ("hkr", "kr", "hinge")
_LOSSES = ("crossentropy", "hinge", "hkr", "kr", "log_sum_exp_hkr", "soft_hkr")
_EPSILONS = (0.1, 0.25, 0.5, 1.0)
_NORMS = {1.0: "L1", 2.0: "L2", math.inf: "L-infinity"}
_MODELS = (".keras", ".h5", ".hdf5")
_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
_FORMATS = {"tf_saved_model": "", "onnx": ".onnx", "litert": ".tflite"}
_RUNTIMES = {"tf_saved_model": "tensorflow", "onnx": "onnxruntime", "litert": "ai_edge_litert"}  # that run the files
_DEMO_FILES = ("model.keras", "certificate.json", "certified_accuracy.png", "field.png")
_BROKEN = (  # what reading a broken or hostile file raises
    *(
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ),
    *(zipfile.BadZipFile, zlib.error),
)


class _UserError(Exception):
    """What the user can mend, in one sentence."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help)\n")


# ---- before Keras: arguments, files, backend ---------------------------------------------------------------------


def start() -> None:
    """Checks the arguments when this process is `hkr_keras ...` or `python -m hkr_keras ...`; does nothing in others.

    Raises:
        SystemExit: after `--help` and `--version`, and with status 2 for arguments that cannot be meant.
    """
    first = (getattr(sys, "argv", None) or [""])[0]
    if first == "-m":  # while Python looks for the module to run
        given = sys.orig_argv
        is_command = "-m" in given[:-1] and given[given.index("-m") + 1] == _PACKAGE
    else:
        is_command = pathlib.Path(first).stem == _PACKAGE
    if is_command:
        try:
            if not _prepared(sys.argv[1:]).verbose:
                _silence_libraries()
        except (_UserError, OSError) as error:
            _print_error(error)
            raise SystemExit(2) from None


def _silence_libraries() -> None:
    """Sends nowhere what compiled libraries write to the screen; Python's own messages still arrive.

    The first log lines of TensorFlow ask no environment variable.
    """
    screen, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    sys.stderr = os.fdopen(screen, "w", buffering=1, errors="backslashreplace")


def _prepared(arguments: list[str] | None) -> argparse.Namespace:
    """Parsed arguments that were checked, with the backend chosen.

    Raises:
        _UserError: for files that cannot be read or written, and without a backend.
        SystemExit: from the parser.
    """
    options = _parser().parse_args(arguments)
    options.check(options)
    _choose_backend()
    return options


def _print_error(error: BaseException) -> None:
    print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _choose_backend() -> None:
    """Sets `KERAS_BACKEND` to an installed backend when the one that Keras would take is not."""
    backends = ("tensorflow", "jax", "torch")
    chosen = os.environ.get("KERAS_BACKEND")
    configuration = pathlib.Path(os.environ.get("KERAS_HOME") or pathlib.Path.home() / ".keras") / "keras.json"
    try:
        stored = json.loads(configuration.read_text())["backend"]
    except (OSError, KeyError, TypeError, ValueError):  # Keras, too, goes on without
        stored = "tensorflow"
    backend = chosen or stored
    if backend not in backends or _is_installed(backend):
        return  # installed, or for Keras to judge
    if chosen:
        raise _UserError(
            f"KERAS_BACKEND={chosen}, but {chosen} is not installed: pip install {chosen}, or set another backend"
        )
    installed = [name for name in backends if _is_installed(name)]
    if not installed:
        raise _UserError(
            "Keras has no backend to compute with. Install one: pip install jax, pip install torch or "
            "pip install tensorflow"
        )
    os.environ["KERAS_BACKEND"] = installed[0]
    print(f"{backend} is not installed: computing with {installed[0]} (KERAS_BACKEND={installed[0]})", file=sys.stderr)


def _whole(text: str, lowest: int, highest: float = math.inf) -> int:
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if not lowest <= value <= highest:
        most = f" and at most {highest}" if highest < math.inf else ""
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {lowest}{most}, received {text}")
    return value


def _epsilon(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite distance of at least 0, received {text}")
    return value


def _version() -> str:
    from hkr_keras._version import __version__

    return __version__


def _parser() -> argparse.ArgumentParser:
    shared = _Parser(add_help=False)
    shared.add_argument("--verbose", action="store_true", help="show the log of the backend, and tracebacks of errors")
    path: dict[str, Any] = {"type": pathlib.Path, "metavar": "FILE"}
    parser = _Parser(prog=_PACKAGE, description="1-Lipschitz networks with certificates.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    command = commands.add_parser("demo", parents=[shared], help="train, certify and show a classifier")
    source = command.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=tuple(_DEFAULTS), default="digits")
    source.add_argument("--data", **path, help=".npz file with x_train, y_train, x_test and y_test")
    command.add_argument("--epochs", type=lambda text: _whole(text, 1), help="default: what fits the data set")
    command.add_argument("--loss", choices=_LOSSES, default="hkr")
    command.add_argument("--seed", type=lambda text: _whole(text, 0, 2**32 - 1), default=0)
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("hkr_demo"), help="folder to write to")
    command.set_defaults(
        run=lambda o: demo(o.data or o.dataset, o.epochs, o.loss, o.seed, o.output),
        check=_check_demo,
    )

    command = commands.add_parser("summary", parents=[shared], help="print the proven bound of every layer of a model")
    command.add_argument("model", type=pathlib.Path, help=".keras file")
    command.add_argument("--data", **path, help=".npz file with an array x: where to look for steep places")
    command.add_argument("--json", **path, help="write the summary to this file")
    command.set_defaults(run=_summary, check=_check_summary)

    command = commands.add_parser("certify", parents=[shared], help="certify the inputs of an .npz file")
    command.add_argument("model", type=pathlib.Path, help=".keras file")
    command.add_argument("data", type=pathlib.Path, help=".npz file with an array x, and labels y when known")
    command.add_argument("--epsilon", type=_epsilon, nargs="+", default=list(_EPSILONS), help="radii, in input units")
    command.add_argument("--norm", type=float, choices=tuple(_NORMS), default=2.0, metavar="{1,2,inf}")
    command.add_argument("--rigorous", action="store_true", help="cover the rounding of the float32 network")
    command.add_argument("--json", **path, help="write the certificate to this file")
    command.add_argument("--csv", **path, help="write prediction and radius of every input to this file")
    command.add_argument("--plot", **path, help="write the curve to this picture")
    command.set_defaults(run=_certify, check=_check_certify)

    command = commands.add_parser(
        "export", parents=[shared], help="write a model as ONNX, LiteRT or SavedModel, with the constants to certify it"
    )
    command.add_argument("model", type=pathlib.Path, help=".keras file")
    command.add_argument("output", type=pathlib.Path, help="net.onnx, net.tflite, or a folder for a SavedModel")
    command.add_argument("--format", choices=tuple(_FORMATS), help="default: what the suffix of the output says")
    command.add_argument("--preprocessing", help="what was done to the data before the model, in words")
    command.set_defaults(run=_export, check=_check_export)
    return parser


def _check_read(path: pathlib.Path | None, suffixes: tuple[str, ...]) -> None:
    if path is None:
        return
    if not path.exists():
        raise _UserError(f"no such file: {path}")
    if path.is_dir() or path.suffix not in suffixes:
        raise _UserError(f"expected a file that ends in {' or '.join(suffixes)}: {path}")
    try:
        with path.open("rb") as file:
            size = len(file.read(1))
    except OSError as error:
        raise _UserError(f"cannot be read: {path} ({error.strerror})") from None
    if not _is_of_its_kind(path):
        kind = "an .npz file of plain arrays" if path.suffix == ".npz" else "a Keras model file"
        raise _UserError(f"Expected {kind}. Received: {path}, which is {'of another kind' if size else 'empty'}")


def _is_of_its_kind(path: pathlib.Path) -> bool:
    """Whether the content of a file can be what its suffix says, as far as the first look tells."""
    if path.suffix in (".keras", ".npz"):
        return zipfile.is_zipfile(path)
    import h5py

    return bool(h5py.is_hdf5(path))


def _check_write(path: pathlib.Path | None, suffixes: tuple[str, ...] = ()) -> None:
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise _UserError(f"expected a file name that ends in {', '.join(suffixes)}: {path}")
    if path.is_dir():
        raise _UserError(f"is a folder, not a file: {path}")
    if not path.absolute().parent.is_dir():
        raise _UserError(f"no such folder: {path.parent}")
    if path.exists():
        try:
            path.open("ab").close()
        except OSError as error:
            raise _UserError(f"cannot be written: {path} ({error.strerror})") from None
    else:
        _try_to_write(path.absolute().parent)


def _check_apart(*paths: pathlib.Path | None) -> None:
    """Refuses files that one command would write over each other, or over what it reads."""
    found = [path.resolve() for path in paths if path is not None]
    twice = [path for path in found if found.count(path) > 1]
    if twice:
        raise _UserError(f"expected different files, but this one is named twice: {twice[0]}")


def _check_folder(path: pathlib.Path) -> None:
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise _UserError(f"is a file, not a folder: {there}")
    _try_to_write(there)


def _try_to_write(folder: pathlib.Path) -> None:
    """Makes a file, which is gone at once: permissions do not tell of everything."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _UserError(f"cannot be written: {folder} ({error.strerror})") from None


def _check_demo(options: argparse.Namespace) -> None:
    _check_read(options.data, (".npz",))
    _check_folder(options.output)
    if options.output.is_dir():
        for name in _DEMO_FILES:
            _check_write(options.output / name)
    if options.data is None:
        _check_loss(options.loss, options.dataset, is_binary=options.dataset == "moons")
        if options.dataset in ("digits", "moons") and not _is_installed("sklearn"):
            raise _UserError(f"the data set '{options.dataset}' comes with scikit-learn: pip install scikit-learn")


def _check_loss(loss: str, name: str, *, is_binary: bool) -> None:
    if is_binary and loss not in _BINARY_LOSSES:
        raise _UserError(
            f"Expected one of {', '.join(_BINARY_LOSSES)} for '{name}', which has two classes. Received: loss={loss}"
        )


def _check_summary(options: argparse.Namespace) -> None:
    _check_read(options.model, _MODELS)
    _check_read(options.data, (".npz",))
    _check_write(options.json)
    _check_apart(options.model, options.data, options.json)


def _check_certify(options: argparse.Namespace) -> None:
    _check_read(options.model, _MODELS)
    _check_read(options.data, (".npz",))
    _check_write(options.json)
    _check_write(options.csv)
    _check_write(options.plot, _PICTURES)
    _check_apart(options.model, options.data, options.json, options.csv, options.plot)
    if options.plot and not _is_installed("matplotlib"):
        raise _UserError("pictures need matplotlib: pip install matplotlib")


def _check_export(options: argparse.Namespace) -> None:
    _check_read(options.model, _MODELS)
    output, suffix = options.output, options.output.suffix.lower()
    told = {end: name for name, end in _FORMATS.items()}.get(suffix)
    if told is None and options.format is None:
        raise _UserError(
            f"expected a file name that ends in .onnx or .tflite, or the name of a folder for a SavedModel (with a dot "
            f"in it together with --format tf_saved_model): {output}"
        )
    options.format = options.format or told
    if options.format != told and not (told is None and options.format == "tf_saved_model"):
        expected = f"a file name that ends in {_FORMATS[options.format]}" if _FORMATS[options.format] else "a folder"
        raise _UserError(f"expected {expected} for --format {options.format}: {output}")
    if options.format == "tf_saved_model":
        _check_folder(output)
        if output.is_dir() and any(output.iterdir()) and not (output / "saved_model.pb").exists():
            raise _UserError(f"expected a new folder, or one with a SavedModel, which is replaced: {output.resolve()}")
    else:
        _check_write(output)
    if not output.name:
        raise _UserError(f"expected a folder with a name of its own: {output.resolve()}")
    if output.absolute().parent.is_dir():
        _check_write(output.with_name(f"{output.name}.certificate.json"))
    if not _is_installed(_RUNTIMES[options.format]):
        raise _UserError(
            f"files of the format {options.format} are run before they are certified, which needs "
            f"{_RUNTIMES[options.format]}: pip install 'hkr_keras[export]'"
        )


# ---- with Keras --------------------------------------------------------------------------------------------------


def _print_table(rows: list[tuple[str, str]], columns: tuple[str, str], title: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def demo(
    dataset: str | os.PathLike,
    epochs: int | None = None,
    loss: str = "hkr",
    seed: int = 0,
    output: str | os.PathLike = "hkr_demo",
    verbose: str | int = "auto",
) -> dict[str, float]:
    """Trains a certified classifier, certifies the test set, prints a table and writes everything to a folder.

    Args:
        dataset: a name of `hkr_keras.datasets`, or an `.npz` file as for `hkr_keras.datasets.load`.
        epochs: of training; `None` for a default that fits the data set.
        loss: a name of `--loss`.
        seed: of weights, batches and data split.
        output: folder for the model, the certificate and the pictures; made when missing.
        verbose: as in `keras.Model.fit`.

    Returns:
        The figures of the table.

    Raises:
        ValueError: as `hkr_keras.datasets.load`; for a loss that does not fit two classes.
    """
    import keras

    import hkr_keras as hkr

    keras.utils.set_random_seed(seed)
    data = hkr.datasets.load(dataset, seed)
    is_binary = data.classes == 2
    try:
        _check_loss(loss, data.name, is_binary=is_binary)
    except _UserError as error:
        raise ValueError(str(error)) from None
    default_epochs, batch_size = _DEFAULTS.get(str(dataset), _OWN_DATA)
    epochs = epochs or default_epochs
    shape = data.x_train.shape[1:]
    outputs = 1 if is_binary else data.classes
    is_image = len(shape) == 3 and min(shape[:2]) >= 16
    model = (hkr.models.lipschitz_cnn if is_image else hkr.models.lipschitz_mlp)(shape, outputs)
    steps = epochs * math.ceil(len(data.x_train) / batch_size)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, steps)),
        loss=_loss(loss, is_binary),
        metrics=[hkr.metrics.Accuracy(), hkr.metrics.CertifiedAccuracy(epsilon=0.25)],
    )
    model.fit(
        data.x_train,
        data.y_train,
        batch_size=batch_size,
        epochs=epochs,
        verbose=verbose,
        callbacks=[hkr.callbacks.Orthonormalize()],
    )
    certificate = hkr.certify(model, data.x_test, verbose=0)
    result = {
        "clean accuracy": certificate.accuracy(data.y_test),
        **{f"certified accuracy at {e:g}": certificate.accuracy(data.y_test, e) for e in _EPSILONS},
        "mean certified radius": certificate.mean_radius(data.y_test),
        "proven Lipschitz constant": certificate.bound,
    }
    rows = [(name, f"{value:.1%}" if "accuracy" in name else f"{value:.4f}") for name, value in result.items()]
    backend = keras.backend.backend()
    title = f"{data.name}: {len(data.x_test)} test inputs, loss {loss}, {epochs} epochs, {backend}"
    _print_table(rows, ("", "value"), title)

    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    model.save(output / "model.keras")
    (output / "certificate.json").write_text(certificate.to_json())
    _draw(model, data, certificate, output, boundary=loss != "kr")
    names = ", ".join(sorted(path.name for path in output.iterdir()))
    print(f"Model, certificate and pictures are in {output.resolve()}: {names}")
    return result


def _loss(name: str, is_binary: bool) -> Any:
    from hkr_keras import losses

    if is_binary:
        return {
            "hkr": lambda: losses.HKR(alpha=10, margin=0.3),
            "kr": losses.KR,
            "hinge": lambda: losses.HingeMargin(margin=0.3),
        }[name]()
    return {
        "hkr": lambda: losses.MulticlassHKR(alpha=100, margin=0.45),
        "soft_hkr": lambda: losses.SoftHKR(alpha=50, margin=0.5),
        "log_sum_exp_hkr": lambda: losses.LogSumExpHKR(alpha=50, margin=0.5),
        "crossentropy": lambda: losses.MarginCrossentropy(temperature=10, margin=0.5),
        "kr": losses.MulticlassKR,
        "hinge": lambda: losses.MulticlassHinge(margin=0.5),
    }[name]()


def _plotting() -> Any:
    import matplotlib

    from hkr_keras import plotting

    matplotlib.use("Agg")
    return plotting


def _draw(model: Any, data: Any, certificate: Any, output: pathlib.Path, boundary: bool) -> None:
    if not _is_installed("matplotlib"):
        print("No pictures without matplotlib: pip install 'hkr_keras[plots]'")
        return
    plotting = _plotting()
    ax = plotting.plot_certified_accuracy(certificate, data.y_test)
    ax.set_title(f"{data.name}: accuracy that no attack within the radius can lower", fontsize=11)
    ax.figure.savefig(output / "certified_accuracy.png", dpi=150)
    if data.x_test.shape[1:] == (2,):
        field = plotting.plot_field(model, data.x_test, data.y_test, boundary=boundary)
        field.figure.savefig(output / "field.png", dpi=150)


def _load_model(path: pathlib.Path) -> Any:
    """A stored model, in safe mode: a file that holds code is refused.

    Raises:
        ValueError: for a file that is missing, broken or unsafe.
    """
    import keras

    import hkr_keras  # noqa: F401  (registers the layers of stored models)

    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except _BROKEN as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"Expected a Keras model file that loads in safe mode. Received: {path} ({reason})") from error


def _load_arrays(path: pathlib.Path) -> tuple[Any, Any]:
    """The arrays `x` and, when there, `y` of an `.npz` file.

    Raises:
        ValueError: for a file that is missing, broken or without `x`.
    """
    from hkr_keras import datasets

    arrays = datasets.read_npz(path)
    if "x" not in arrays:
        found = ", ".join(sorted(arrays)) or "none"
        raise ValueError(
            f"Expected an .npz file with an array x, and optionally labels y. Received: {path} with {found}"
        )
    return arrays["x"], arrays.get("y")


def _summary(options: argparse.Namespace) -> None:
    import hkr_keras as hkr

    model = _load_model(options.model)
    summary = hkr.lipschitz_summary(model, x=_load_arrays(options.data)[0] if options.data else None)
    if options.json:
        options.json.write_text(summary.to_json())


def _certify(options: argparse.Namespace) -> None:
    import numpy as np

    import hkr_keras as hkr

    x, y = _load_arrays(options.data)
    if y is not None and len(np.atleast_1d(y)) != len(np.atleast_1d(x)):
        raise ValueError(f"Expected a label for each input. Received: x.shape={x.shape}, y.shape={y.shape}")
    certificate = hkr.certify(_load_model(options.model), x, rigorous=options.rigorous)
    labels = certificate.prediction if y is None else y  # without labels: predictions that cannot change
    kind = "the float32 network" if certificate.rigorous else "exact arithmetic"
    print(f"{options.model}: {len(certificate.radius)} inputs, constant {certificate.bound:.6g}, radii hold in {kind}")
    rows = [] if y is None else [("clean", f"{certificate.accuracy(y):.1%}")]
    for epsilon in options.epsilon:
        rows.append((f"{epsilon:g}", f"{certificate.accuracy(labels, epsilon, options.norm):.1%}"))
    _print_table(rows, (f"epsilon ({_NORMS[options.norm]})", "certified " + ("share" if y is None else "accuracy")))
    if options.json:
        options.json.write_text(certificate.to_json())
    if options.csv:
        _write_csv(options.csv, certificate, y)
    if options.plot:
        ax = _plotting().plot_certified_accuracy(certificate, labels, marks=options.epsilon)
        ax.figure.savefig(options.plot, dpi=150)


def _write_csv(path: pathlib.Path, certificate: Any, y: Any) -> None:
    columns = {
        "input": range(len(certificate.radius)),
        "prediction": certificate.prediction.tolist(),
        "radius": certificate.radius.tolist(),
        **({} if y is None else {"correct": certificate.is_correct(y).astype(int).tolist()}),
    }
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _export(options: argparse.Namespace) -> None:
    import hkr_keras as hkr
    from hkr_keras.exporting.certificate import certificate_path

    certificate = hkr.export(_load_model(options.model), options.output, options.format, options.preprocessing)
    print(f"{options.output}: constant {certificate.bound:.6g}; radii from {certificate_path(options.output).name}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for what the user can mend.

    Args:
        arguments: those behind the name of the command; `None` for those of the process.

    Raises:
        SystemExit: as `start`.
    """
    verbose = False
    try:
        options = _prepared(arguments)
        verbose = options.verbose
        options.run(options)
    except (_UserError, ConnectionError, ImportError, MemoryError, OSError, ValueError) as error:
        if verbose:
            raise
        _print_error(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
