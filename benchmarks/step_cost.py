"""What a training step costs against the same network in plain Keras layers, on the backend in use.

    KERAS_BACKEND=jax python benchmarks/step_cost.py [--batch 128 1024] [--rounds 5] [--only mlp cnn] [--json FILE]

Each round trains one epoch of every network in turn (interleaved, so that a change of the machine's speed hits
all of them); the figure is the minimum over rounds. Both nets have the same shapes, optimizer and loss.
"""

import argparse
import json
import os
import platform
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

import hkr_keras as hkr

SAMPLES = 3840  # per epoch; at least 8 steps


def mlp(lipschitz: bool) -> keras.Model:
    """784-512-512-512-10."""
    if not lipschitz:
        hidden = [keras.layers.Dense(512, activation="relu") for _ in range(3)]
        return keras.Sequential([keras.Input((784,)), *hidden, keras.layers.Dense(10)])
    hidden = [layer for _ in range(3) for layer in (hkr.layers.LipschitzDense(512), hkr.layers.GroupSort(2))]
    head = hkr.layers.LipschitzDense(10, kernel_constraint=hkr.constraints.UnitNorm())
    return keras.Sequential([keras.Input((784,)), *hidden, head])


def cnn(lipschitz: bool, convolution=hkr.layers.LipschitzConv2D) -> keras.Model:
    """16, 16, pool, 32, 32, pool, 64, 10 on 28 x 28."""
    layers = [keras.Input((28, 28, 1))]
    for filters in (16, 32):
        for _ in range(2):
            if lipschitz:
                layers += [convolution(filters, 3, padding="same"), hkr.layers.GroupSort(2)]
            else:
                layers += [keras.layers.Conv2D(filters, 3, padding="same", activation="relu")]
        layers.append(hkr.layers.L2NormPooling2D(2) if lipschitz else keras.layers.AveragePooling2D(2))
    layers.append(keras.layers.Flatten())
    if lipschitz:
        head = hkr.layers.LipschitzDense(10, kernel_constraint=hkr.constraints.UnitNorm())
        layers += [hkr.layers.LipschitzDense(64), hkr.layers.GroupSort(2), head]
    else:
        layers += [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def cnn_orthogonal(lipschitz: bool) -> keras.Model:
    """The same with truly orthogonal convolutions."""
    return cnn(lipschitz, hkr.layers.OrthogonalConv2D)


NETWORKS = {build.__name__: build for build in (mlp, cnn, cnn_orthogonal)}


class SecondEpoch(keras.callbacks.Callback):
    """Seconds of the second epoch: the first one compiles and fills the pipeline."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        float(logs["loss"])
        self.seconds = time.perf_counter() - self.start


def measure(build, batch: int, rounds: int) -> dict[str, float]:
    """Milliseconds per step, the minimum over interleaved rounds."""
    models = {"plain": build(False), "lipschitz": build(True)}
    steps = max(8, SAMPLES // batch)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * batch, *models["plain"].input_shape[1:])).astype("float32")
    y = rng.integers(0, 10, steps * batch)
    best = dict.fromkeys(models, float("inf"))
    for model in models.values():
        model.compile("adam", loss=hkr.losses.MulticlassHKR(alpha=50, margin=0.5))
    for _ in range(rounds):
        for name, model in models.items():
            clock = SecondEpoch()
            model.fit(x, y, batch_size=batch, epochs=2, shuffle=False, verbose=0, callbacks=[clock])
            best[name] = min(best[name], 1e3 * clock.seconds / steps)
    return best


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--json", help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    backend = keras.backend.backend()
    versions = (
        f"Keras {keras.__version__}, {backend} {__import__(backend).__version__}, Python {platform.python_version()}"
    )
    table = Table(title=f"Training step, {os.cpu_count()} x {platform.machine()} CPU cores; {versions}")
    for column in ("network", "batch", "plain Keras, ms", "hkr_keras, ms", "ratio"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name in arguments.only:
        for batch in arguments.batch:
            best = measure(NETWORKS[name], batch, arguments.rounds)
            ratio = best["lipschitz"] / best["plain"]
            table.add_row(name, str(batch), f"{best['plain']:.2f}", f"{best['lipschitz']:.2f}", f"{ratio:.2f}")
            if arguments.json:
                with open(arguments.json, "a") as file:
                    print(json.dumps({"backend": backend, "network": name, "batch": batch, **best}), file=file)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
