"""What covering the rounding of float32 costs: certified accuracy lost, and time, by network.

KERAS_BACKEND=tensorflow python benchmarks/price_of_rigour.py [--only digits ...] [--epochs 4]

Where kernels are composed in the forward pass, the third figure is that of the detour: `to_keras(kernels_only=True)`
stores them, and then nothing is composed.
"""

import argparse
import os
import platform
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from rich.console import Console
from rich.table import Table

import hkr_keras as hkr

EPSILONS = (0.0, 36 / 255, 0.25, 0.5)


def _hkr(alpha, margin):
    return lambda: hkr.losses.MulticlassHKR(alpha, margin)


def _crossentropy():
    return hkr.losses.MarginCrossentropy(temperature=10, margin=0.5)


NETWORKS = {  # data set, network, loss, epochs, batch size, learning rate
    "digits MLP 256-128-64, HKR": ("digits", "mlp", _hkr(100, 0.45), 30, 32, 1e-2),
    "Fashion-MNIST CNN, HKR": ("fashion_mnist", "cnn", _hkr(50, 0.5), 4, 128, 3e-3),
    "Fashion-MNIST CNN, cross-entropy": ("fashion_mnist", "cnn", _crossentropy, 4, 128, 3e-3),
    "Fashion-MNIST CNN, OrthogonalConv2D, cross-entropy": ("fashion_mnist", "orthogonal", _crossentropy, 4, 128, 3e-3),
    "Fashion-MNIST MLP 512-512-512, cross-entropy": ("fashion_mnist", "wide", _crossentropy, 4, 128, 3e-3),
}
MODELS = {
    "mlp": hkr.models.lipschitz_mlp,
    "cnn": hkr.models.lipschitz_cnn,
    "orthogonal": lambda shape, classes: hkr.models.lipschitz_cnn(shape, classes, orthogonal=True),
    "wide": lambda shape, classes: hkr.models.lipschitz_mlp(shape, classes, widths=(512, 512, 512)),
}


def certificates(name: str, seed: int, epochs: int | None):
    """Trains a network; its certificates without and with rounding (and of the detour), seconds, and the labels."""
    dataset, architecture, loss, usual, batch_size, rate = NETWORKS[name]
    keras.utils.set_random_seed(seed)
    data = hkr.datasets.load(dataset, seed)
    model = MODELS[architecture](data.x_train.shape[1:], data.classes)
    epochs = epochs or usual
    steps = epochs * -(-len(data.x_train) // batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.Adam(schedule), loss=loss())
    callbacks = [hkr.callbacks.Orthonormalize()]
    model.fit(data.x_train, data.y_train, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=callbacks)
    cases = [(model, False), (model, True)]
    if architecture == "orthogonal":
        cases.append((hkr.to_keras(model, kernels_only=True), True))
    found = []
    for network, rigorous in cases:
        hkr.certify(network, data.x_test[:128], verbose=0, rigorous=rigorous)
        start = time.perf_counter()
        found.append((hkr.certify(network, data.x_test, verbose=0, rigorous=rigorous), time.perf_counter() - start))
    return found, data.y_test


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="networks whose name contains this")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    backend = keras.backend.backend()
    table = Table(
        title=f"Certified accuracy in exact arithmetic -> as deployed in float32, percent; {os.cpu_count()} x "
        f"{platform.machine()}, Keras {keras.__version__}, {backend} {__import__(backend).__version__}"
    )
    table.add_column("network")
    for epsilon in EPSILONS:
        table.add_column(f"at {epsilon:.3g}", justify="right")
    table.add_column("seconds", justify="right")
    for name in NETWORKS:
        if arguments.only and arguments.only not in name:
            continue
        found, y = certificates(name, arguments.seed, arguments.epochs)
        columns = [[f"{100 * certificate.accuracy(y, e):.2f}" for certificate, _ in found] for e in EPSILONS]
        columns.append([f"{seconds:.1f}" for _, seconds in found])
        table.add_row(name, *map(" -> ".join, columns))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
