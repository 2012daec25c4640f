"""Command line: `python -m hkr_keras demo | summary | certify | export`."""

import argparse
import math
import pathlib
import sys

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

import hkr_keras as hkr
from hkr_keras import datasets, models
from hkr_keras.exporting import FORMATS, certificate_path

_MULTICLASS_LOSSES = {
    "hkr": lambda: hkr.losses.MulticlassHKR(alpha=100, margin=0.45),
    "soft_hkr": lambda: hkr.losses.SoftHKR(alpha=50, margin=0.5),
    "log_sum_exp_hkr": lambda: hkr.losses.LogSumExpHKR(alpha=50, margin=0.5),
    "crossentropy": lambda: hkr.losses.MarginCrossentropy(temperature=10, margin=0.5),
    "kr": hkr.losses.MulticlassKR,
    "hinge": lambda: hkr.losses.MulticlassHinge(margin=0.5),
}
_BINARY_LOSSES = {
    "hkr": lambda: hkr.losses.HKR(alpha=10, margin=0.3),
    "kr": hkr.losses.KR,
    "hinge": lambda: hkr.losses.HingeMargin(margin=0.3),
}
_DEFAULTS = {  # epochs, batch size
    "digits": (30, 32),
    "moons": (40, 25),
    "mnist": (4, 128),
    "fashion_mnist": (4, 128),
    "cifar10": (10, 128),
}
_EPSILONS = (0.1, 0.25, 0.5, 1.0)
_NORMS = {1: "L1", 2: "L2", math.inf: "L-infinity"}


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, received {value}")
    return value


def demo(dataset: str, epochs: int | None, loss: str, seed: int, output: pathlib.Path, verbose="auto") -> dict:
    """Trains a certified classifier, certifies the test set, prints a table and writes everything to a folder.

    Args:
        dataset: a name of `hkr_keras.datasets`.
        epochs: of training; `None` for a default that fits the data set.
        loss: a name of `--loss`.
        seed: of weights, batches and data split.
        output: folder for the model, the certificate and the pictures; made when missing.
        verbose: as in `keras.Model.fit`.

    Returns:
        The figures of the table.
    """
    keras.utils.set_random_seed(seed)
    data = datasets.load(dataset, seed)
    binary = data.classes == 2
    losses = _BINARY_LOSSES if binary else _MULTICLASS_LOSSES
    if loss not in losses:
        raise ValueError(f"Expected one of {', '.join(losses)} for '{dataset}'. Received: loss={loss}")
    default_epochs, batch_size = _DEFAULTS[dataset]
    epochs = epochs or default_epochs
    shape = data.x_train.shape[1:]
    if dataset in ("digits", "moons"):
        model = models.lipschitz_mlp(shape, 1 if binary else data.classes)
    else:
        model = models.lipschitz_cnn(shape, data.classes)
    steps = epochs * math.ceil(len(data.x_train) / batch_size)
    accuracy = keras.metrics.BinaryAccuracy("accuracy", threshold=0.0) if binary else "accuracy"
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, steps)),
        loss=losses[loss](),
        metrics=[accuracy, hkr.metrics.CertifiedAccuracy(epsilon=0.25)],
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
    backend = keras.backend.backend()
    table = Table(title=f"{dataset}: {len(data.x_test)} test inputs, loss {loss}, {epochs} epochs, {backend}")
    table.add_column("")
    table.add_column("value", justify="right")
    for name, value in result.items():
        table.add_row(name, f"{value:.1%}" if "accuracy" in name else f"{value:.4f}")
    Console().print(table)

    output.mkdir(parents=True, exist_ok=True)
    model.save(output / "model.keras")
    (output / "certificate.json").write_text(certificate.to_json())
    _draw(model, data, certificate, output)
    names = ", ".join(sorted(path.name for path in output.iterdir()))
    print(f"Model, certificate and pictures are in {output.resolve()}: {names}")
    return result


def _draw(model, data, certificate, output: pathlib.Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("No pictures without matplotlib: pip install 'hkr_keras[plots]'")
        return
    matplotlib.use("Agg")
    from hkr_keras import plotting

    ax = plotting.plot_certified_accuracy(certificate, data.y_test)
    ax.set_title(f"{data.name}: accuracy that no attack within the radius can lower", fontsize=11)
    ax.figure.savefig(output / "certified_accuracy.png", dpi=150)
    if data.x_test.shape[1:] == (2,):
        field = plotting.plot_field(model, data.x_test, data.y_test)
        field.figure.savefig(output / "field.png", dpi=150)


def _load_model(path: pathlib.Path):
    """A stored model, in safe mode: a file that holds code is refused.

    Raises:
        ValueError: for a file that is missing, broken or unsafe.
    """
    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"Expected a Keras model file that loads in safe mode. Received: {path} ({reason})") from error


def _load_arrays(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The arrays `x` and, when there, `y` of an `.npz` file; pickled objects are refused.

    Raises:
        ValueError: for a file that is missing, broken or without `x`.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["x"], arrays.get("y")
    except Exception as error:
        raise ValueError(
            f"Expected an .npz file with an array x, and optionally labels y. Received: {path} ({error})"
        ) from error


def _summary(options) -> None:
    model = _load_model(options.model)
    summary = hkr.lipschitz_summary(model, x=_load_arrays(options.data)[0] if options.data else None)
    if options.json:
        options.json.write_text(summary.to_json())


def _certify(options) -> None:
    model = _load_model(options.model)
    x, y = _load_arrays(options.data)
    certificate = hkr.certify(model, x, rigorous=options.rigorous)
    labels = certificate.prediction if y is None else y  # without labels: predictions that cannot change
    kind = "the float32 network" if certificate.rigorous else "exact arithmetic"
    print(f"{options.model}: {len(certificate.radius)} inputs, constant {certificate.bound:.6g}, radii hold in {kind}")
    table = Table()
    table.add_column(f"epsilon ({_NORMS[options.norm]})", justify="right")
    table.add_column("certified accuracy" if y is not None else "certified share", justify="right")
    if y is not None:
        table.add_row("clean", f"{certificate.accuracy(y):.1%}")
    for epsilon in options.epsilon:
        table.add_row(f"{epsilon:g}", f"{certificate.accuracy(labels, epsilon, options.norm):.1%}")
    Console().print(table)
    if options.json:
        options.json.write_text(certificate.to_json())
    if options.plot:
        import matplotlib

        matplotlib.use("Agg")
        from hkr_keras import plotting

        plotting.plot_certified_accuracy(certificate, labels, marks=options.epsilon).figure.savefig(
            options.plot, dpi=150
        )


def _export(options) -> None:
    certificate = hkr.export(_load_model(options.model), options.output, options.format, options.preprocessing)
    print(f"{options.output}: constant {certificate.bound:.6g}; radii from {certificate_path(options.output).name}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m hkr_keras", description="1-Lipschitz networks with certificates.")
    parser.add_argument("--version", action="version", version=hkr.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("demo", help="train, certify and show a classifier")
    command.add_argument("--dataset", choices=datasets.NAMES, default="digits")
    command.add_argument("--epochs", type=_positive, help="default: what fits the data set")
    command.add_argument("--loss", choices=sorted(_MULTICLASS_LOSSES), default="hkr")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("hkr_demo"), help="folder to write to")
    command.set_defaults(run=lambda o: demo(o.dataset, o.epochs, o.loss, o.seed, o.output))

    command = commands.add_parser("summary", help="print the proven bound of every layer of a stored model")
    command.add_argument("model", type=pathlib.Path, help=".keras file")
    command.add_argument("--data", type=pathlib.Path, help=".npz file with an array x: where to look for steep places")
    command.add_argument("--json", type=pathlib.Path, help="write the summary to this file")
    command.set_defaults(run=_summary)

    command = commands.add_parser("certify", help="certify the inputs of an .npz file")
    command.add_argument("model", type=pathlib.Path, help=".keras file")
    command.add_argument("data", type=pathlib.Path, help=".npz file with an array x, and labels y when known")
    command.add_argument("--epsilon", type=float, nargs="+", default=list(_EPSILONS), help="radii, in input units")
    command.add_argument("--norm", type=float, choices=tuple(_NORMS), default=2, help="of the radii: 1, 2 or inf")
    command.add_argument("--rigorous", action="store_true", help="cover the rounding of the float32 network")
    command.add_argument("--json", type=pathlib.Path, help="write the certificate to this file")
    command.add_argument("--plot", type=pathlib.Path, help="write the curve to this picture")
    command.set_defaults(run=_certify)

    command = commands.add_parser("export", help="write a stored model as SavedModel, ONNX or LiteRT, with constants")
    command.add_argument("model", type=pathlib.Path, help=".keras file")
    command.add_argument("output", type=pathlib.Path, help="file, or folder for a SavedModel")
    command.add_argument("--format", choices=FORMATS, default="tf_saved_model")
    command.add_argument("--preprocessing", help="what was done to the data before the model, in words")
    command.set_defaults(run=_export)

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ConnectionError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
