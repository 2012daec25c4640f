"""What activations and poolings cost, forward and backward, against ReLU, Keras's poolings and moving the bytes.

    KERAS_BACKEND=jax python benchmarks/layer_cost.py [--shapes 128x512 128x14x14x32] [--rounds 5] [--json FILE]

A layer has to read its input and write its output, then read the gradient of the one and write that of the other.
"floor" is the time of a compiled function that does just that: it adds 1 to tensors of these sizes. Layers and floor
are timed in turn. In a network a compiler may merge a layer with its neighbours, so these are upper limits.
"""

import math

import keras
import numpy as np
from keras import ops
from timing import bars, compiled, interleaved, options, shape, show, stopwatch, store

import hkr_keras as hkr

SHAPES = [(128, 512), (128, 28, 28, 16), (128, 14, 14, 32), (32, 56, 56, 64)]
HEADINGS = ("shape", "layer", "MB at least", "floor, ms", "layer, ms", "to the floor", "to the reference")
ACTIVATIONS = {
    "ReLU": keras.layers.ReLU,
    "GroupSort(2)": lambda: hkr.layers.GroupSort(2),
    "MaxMin": hkr.layers.MaxMin,
    "FullSort": hkr.layers.FullSort,
    "Householder": hkr.layers.Householder,
}
POOLINGS = {
    "AveragePooling2D": lambda: keras.layers.AveragePooling2D(2),
    "MaxPooling2D": lambda: keras.layers.MaxPooling2D(2),
    "ScaledAveragePooling2D": lambda: hkr.layers.ScaledAveragePooling2D(2),
    "L2NormPooling2D": lambda: hkr.layers.L2NormPooling2D(2),
    "InvertibleDownsampling2D": lambda: hkr.layers.InvertibleDownsampling2D(2),
}


def forward_and_backward(layer):
    """`(x, dy) -> (y, gradients of x and of the weights)`, compiled, for a built layer."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        def both(x, dy):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x)
            return y, tape.gradient(y, [x, *(v.value for v in layer.trainable_variables)], output_gradients=dy)

    elif backend == "jax":
        import jax

        weights = [v.value for v in layer.trainable_variables]

        def both(x, dy):
            y, backward = jax.vjp(lambda w, x: layer.stateless_call(w, [], x)[0], weights, x)
            return y, backward(dy)

    else:
        import torch

        def both(x, dy):
            x = x.detach().requires_grad_()
            y = layer(x)
            return y.detach(), torch.autograd.grad(y, [x, *(v.value for v in layer.trainable_variables)], dy)

    return compiled(both)


def measure(makers: dict, size: tuple[int, ...], rounds: int) -> list[dict]:
    """For every layer the bytes it moves at least, and milliseconds: its own and those of the floor."""
    rng = np.random.default_rng(0)
    x = ops.convert_to_tensor(rng.normal(size=size).astype("float32"))
    clocks, floors, elements = {}, {}, {}
    for name, make in makers.items():
        layer = make()
        output = tuple(layer(x).shape)
        dy = ops.convert_to_tensor(rng.normal(size=output).astype("float32"))
        clocks[name] = stopwatch(forward_and_backward(layer), x, dy)
        floors[name] = f"floor {output}"
        if floors[name] not in clocks:
            clocks[floors[name]] = stopwatch(compiled(lambda x, dy: (x + 1, dy + 1)), x, dy)
        elements[name] = 2 * (math.prod(size) + math.prod(output))
    best = interleaved(clocks, rounds)
    return [{"layer": n, "bytes": 4 * elements[n], "ms": best[n], "floor": best[floors[n]]} for n in makers]


def main() -> None:
    """Prints the table."""
    parser = options(__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES)
    arguments = parser.parse_args()
    rows, drawn = [], []
    for size in arguments.shapes:
        for makers in (ACTIVATIONS, POOLINGS) if len(size) == 4 else (ACTIVATIONS,):
            found = measure(makers, size, arguments.rounds)
            for record in found:
                drawn.append((record["floor"], record["ms"]))
                store(arguments.json, benchmark="layer", shape=size, **record)
                ratios = [f"{record['ms'] / other:.2f}" for other in (record["floor"], found[0]["ms"])]
                times = f"{record['bytes'] / 1e6:.2f}", f"{record['floor']:.3f}", f"{record['ms']:.3f}"
                rows.append(("x".join(map(str, size)), record["layer"], *times, *ratios))
    show("Layers, forward and backward", HEADINGS, rows, arguments.markdown, left=2)
    series = dict(zip(("moving the bytes", "layer"), zip(*drawn, strict=True), strict=True))
    bars(
        arguments.plot, [f"{row[1]}  {row[0]}" for row in rows], series, "milliseconds, forward and backward", log=True
    )


if __name__ == "__main__":
    main()
