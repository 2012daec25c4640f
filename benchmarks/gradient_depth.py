"""Norms of the gradient by depth in nets of 24 layers, before and after training on digits.

    KERAS_BACKEND=tensorflow python benchmarks/gradient_depth.py [--depth 24] [--epochs 3]

The gradient of a random direction of the output, at the input of layers 24, 18, 12, 6 and 1, over its norm at the last
layer; mean over inputs. A layer that keeps norms leaves 1 at every depth.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops
from rich.console import Console
from rich.table import Table

import hkr_keras as hkr

L = hkr.layers
CHANNELS = 16
BLOCKS = {
    "OrthogonalConv2D, circular": lambda: [L.OrthogonalConv2D(CHANNELS, 3, padding="circular"), L.GroupSort(2)],
    "OrthogonalConv2D, zero padding": lambda: [L.OrthogonalConv2D(CHANNELS, 3, padding="same"), L.GroupSort(2)],
    "SLLConv2D": lambda: [L.SLLConv2D(CHANNELS, 3)],
    "AOLConv2D": lambda: [L.AOLConv2D(CHANNELS, 3, padding="same"), L.GroupSort(2)],
    "LipschitzConv2D": lambda: [L.LipschitzConv2D(CHANNELS, 3, padding="same"), L.GroupSort(2)],
    "LipschitzConv2D, ReLU": lambda: [L.LipschitzConv2D(CHANNELS, 3, padding="same", activation="relu")],
}


class Probe(keras.layers.Layer):
    """Adds a weight that is 0: its gradient is that of the activation, for a batch of one."""

    def build(self, input_shape):
        self.offset = self.add_weight(shape=input_shape[1:], initializer="zeros", name="offset")

    def call(self, inputs):
        return inputs + self.offset


def network(name: str, depth: int) -> tuple[keras.Model, list[list[keras.layers.Layer]]]:
    """A model of digits with `depth` blocks between a first convolution and the head, and the blocks."""
    blocks = [BLOCKS[name]() for _ in range(depth)]
    first = L.OrthogonalConv2D(CHANNELS, 3, padding="same")
    head = L.LipschitzDense(10, kernel_constraint=hkr.constraints.UnitNorm())
    layers = [first, *(layer for block in blocks for layer in block), keras.layers.Flatten(), head]
    return keras.Sequential([keras.Input((8, 8, 1)), *layers]), blocks


def gradient_norms(model: keras.Model, blocks, x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Norms of the gradient at the input of every block over that at the last one, `(depth,)`."""
    probes = [Probe() for _ in blocks]
    inputs = keras.Input(x.shape[1:])
    outputs = model.layers[0](inputs)
    for probe, block in zip(probes, blocks, strict=True):
        outputs = probe(outputs)
        for layer in block:
            outputs = layer(outputs)
    for layer in model.layers[-2:]:
        outputs = layer(outputs)
    probed = keras.Model(inputs, outputs)
    model.trainable = False
    probed.compile(keras.optimizers.SGD(1.0), loss=lambda direction, logits: ops.sum(direction * logits, axis=-1))
    norms = []
    for image, direction in zip(x, np.random.default_rng(seed).normal(size=(len(x), 10)), strict=True):
        for probe in probes:
            probe.offset.assign(ops.zeros(probe.offset.shape))
        probed.train_on_batch(image[None], direction[None].astype("float32"))
        norms.append([np.linalg.norm(ops.convert_to_numpy(probe.offset)) for probe in probes])
    model.trainable = True
    norms = np.array(norms)
    return (norms / np.maximum(norms[:, -1:], np.finfo("float32").tiny)).mean(axis=0)  # a dead net has 0 everywhere


def measure(name: str, depth: int, epochs: int, inputs: int = 8, seed: int = 0):
    """`gradient_norms` before and after training, and the test accuracy."""
    keras.utils.set_random_seed(seed)
    data = hkr.datasets.load("digits")
    model, blocks = network(name, depth)
    before = gradient_norms(model, blocks, data.x_test[:inputs])
    model.compile(keras.optimizers.Adam(3e-3), hkr.losses.MarginCrossentropy(10.0, 0.3))
    model.fit(data.x_train, data.y_train, epochs=epochs, verbose=0, callbacks=[hkr.callbacks.Orthonormalize()])
    after = gradient_norms(model, blocks, data.x_test[:inputs])
    return before, after, hkr.certify(model, data.x_test, verbose=0).accuracy(data.y_test)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    options = parser.parse_args()
    shown = sorted({round(share * (options.depth - 1)) for share in (1, 0.75, 0.5, 0.25, 0)}, reverse=True)
    table = Table(title=f"Norm of the gradient by depth over that at layer {options.depth}: at the start -> trained")
    table.add_column("layer")
    for index in shown:
        table.add_column(f"at {index + 1}", justify="right")
    table.add_column("digits, clean %", justify="right")
    for name in options.only:
        before, after, accuracy = measure(name, options.depth, options.epochs)
        cells = [f"{before[index]:.2g} -> {after[index]:.2g}" for index in shown]
        table.add_row(name, *cells, f"{100 * accuracy:.1f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
