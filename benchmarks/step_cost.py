"""What a training step costs against the same network in plain Keras layers, on the backend in use.

    KERAS_BACKEND=jax python benchmarks/step_cost.py [--batch 128 1024] [--rounds 5] [--only mlp cnn] [--json FILE]
    KERAS_BACKEND=jax python benchmarks/step_cost.py --batch 32 64 128 256 512 1024 2048 --plot overhead.png

Each round trains one epoch of every network in turn (interleaved, so that a change of the machine's speed hits
all of them); the figure is the minimum over rounds. Both nets have the same shapes and loss, and the plain one Adam.
`cnn_relu` has plain convolutions on both sides, and GroupSort(2) in place of ReLU on one.

`--every N` projects in one step of N, by `Orthonormal(every=N)`, or with `--deferred` by `DeferredOrthonormal` and
`Orthonormalize(every=N)`; polishing at the end of an epoch is not in the figure. On an accelerator an epoch of 3,840
inputs is short: `--samples 76800`. JAX compiles again in the second epoch, so that one round tells nothing there.
`--optimizer stiefel_muon` is that of the Lipschitz network.
"""

import time

import keras
import numpy as np
from timing import figure, interleaved, options, show, store

import hkr_keras as hkr

HEADINGS = ("network", "batch", "plain Keras, ms", "hkr_keras, ms", "ratio")
JIT = {"auto": "auto", "on": True, "off": False}
OPTIMIZERS = {"adam": keras.optimizers.Adam, "stiefel_muon": hkr.optimizers.StiefelMuon}


def mlp(lipschitz: bool, constraint=None) -> keras.Model:
    """784-512-512-512-10."""
    if not lipschitz:
        hidden = [keras.layers.Dense(512, activation="relu") for _ in range(3)]
        return keras.Sequential([keras.Input((784,)), *hidden, keras.layers.Dense(10)])
    hidden = [
        layer
        for _ in range(3)
        for layer in (hkr.layers.LipschitzDense(512, kernel_constraint=constraint), hkr.layers.GroupSort(2))
    ]
    head = hkr.layers.LipschitzDense(10, kernel_constraint=hkr.constraints.UnitNorm())
    return keras.Sequential([keras.Input((784,)), *hidden, head])


def reflector(lipschitz: bool, constraint=None) -> keras.Model:
    """The same with reflectors behind the first layer, of rank 128."""
    if not lipschitz:
        return mlp(False)
    first = hkr.layers.LipschitzDense(512, kernel_constraint=constraint)
    return _reflectors(first)


def all_reflectors(lipschitz: bool, constraint=None) -> keras.Model:
    """The same with reflectors alone, of ranks 196, 128 and 128."""
    return _reflectors(hkr.layers.ReflectorDense(512)) if lipschitz else mlp(False)


def _reflectors(first) -> keras.Model:
    layers = [first, *(hkr.layers.ReflectorDense(512) for _ in range(2))]
    hidden = [layer for dense in layers for layer in (dense, hkr.layers.GroupSort(2))]
    head = hkr.layers.LipschitzDense(10, kernel_constraint=hkr.constraints.UnitNorm())
    return keras.Sequential([keras.Input((784,)), *hidden, head])


def cnn(lipschitz: bool, constraint=None, convolution=hkr.layers.LipschitzConv2D) -> keras.Model:
    """16, 16, pool, 32, 32, pool, 64, 10 on 28 x 28."""
    if not lipschitz:
        return cnn_relu(False)
    layers = [keras.Input((28, 28, 1))]
    for filters in (16, 32):
        for _ in range(2):
            convolved = convolution(filters, 3, padding="same", kernel_constraint=constraint)
            layers += [convolved, hkr.layers.GroupSort(2)]
        layers.append(hkr.layers.L2NormPooling2D(2))
    hidden = hkr.layers.LipschitzDense(64, kernel_constraint=constraint)
    head = hkr.layers.LipschitzDense(10, kernel_constraint=hkr.constraints.UnitNorm())
    return keras.Sequential([*layers, keras.layers.Flatten(), hidden, hkr.layers.GroupSort(2), head])


def cnn_orthogonal(lipschitz: bool, constraint=None) -> keras.Model:
    """The same with truly orthogonal convolutions."""
    return cnn(lipschitz, constraint, hkr.layers.OrthogonalConv2D)


def cnn_relu(lipschitz: bool, constraint=None) -> keras.Model:
    """The same in plain Keras, or that with GroupSort(2) for ReLU and nothing else."""

    activation, count = (None, 1) if lipschitz else ("relu", 0)
    layers = [keras.Input((28, 28, 1))]
    for filters in (16, 32):
        for _ in range(2):
            layers.append(keras.layers.Conv2D(filters, 3, padding="same", activation=activation))
            layers += [hkr.layers.GroupSort(2) for _ in range(count)]
        layers.append(keras.layers.AveragePooling2D(2))
    layers += [keras.layers.Flatten(), keras.layers.Dense(64, activation=activation)]
    layers += [hkr.layers.GroupSort(2) for _ in range(count)]
    return keras.Sequential([*layers, keras.layers.Dense(10)])


NETWORKS = {function.__name__: function for function in (mlp, reflector, all_reflectors, cnn, cnn_orthogonal, cnn_relu)}


def build(name: str, lipschitz: bool, every: int = 1, deferred: bool = False) -> keras.Model:
    """A network, whose kernels are projected in one step of `every`, or wait for the callback."""
    constraint = hkr.constraints.DeferredOrthonormal() if deferred else hkr.constraints.Orthonormal(every=every)
    return NETWORKS[name](lipschitz, constraint)


class SecondEpoch(keras.callbacks.Callback):
    """Seconds of the second epoch: the first one compiles and fills the pipeline."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        float(logs["loss"])
        self.seconds = time.perf_counter() - self.start


def measure(
    name: str,
    batch: int,
    rounds: int,
    optimizer: str = "adam",
    jit: str = "auto",
    every: int = 1,
    samples: int = 3840,
    deferred: bool = False,
) -> dict[str, float]:
    """Milliseconds per step, the minimum over interleaved rounds."""
    models = {"plain": build(name, False), "lipschitz": build(name, True, every, deferred)}
    steps = -(-max(8, samples // batch) // every) * every  # as many projections in every epoch
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * batch, *models["plain"].input_shape[1:])).astype("float32")
    y = rng.integers(0, 10, steps * batch)
    optimizers = {"plain": OPTIMIZERS["adam"](), "lipschitz": OPTIMIZERS[optimizer]()}

    def clock(kind):
        model, seconds = models[kind], SecondEpoch()
        loss = hkr.losses.MulticlassHKR(alpha=50, margin=0.5)
        model.compile(optimizers[kind], loss=loss, jit_compile=JIT[jit])
        callbacks = [seconds]
        if kind == "lipschitz" and every > 1 and name not in ("cnn_relu", "all_reflectors"):  # whose kernels are free
            callbacks.append(hkr.callbacks.Orthonormalize(every if deferred else 1))

        def read():
            model.fit(x, y, batch_size=batch, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
            return 1e3 * seconds.seconds / steps

        return read

    return interleaved({kind: clock(kind) for kind in models}, rounds)


def draw(ratios: dict[str, dict[int, float]], path: str | None) -> None:
    """The picture: time of a step over that of the plain network, against the batch, a line for each network."""

    def paint(ax):
        for name, line in ratios.items():
            ax.plot(list(line), list(line.values()), "o-", label=name, linewidth=2, markersize=6, markerfacecolor="w")
        ax.axhline(1.0, color="#222222", linewidth=0.8, linestyle=":")
        ax.set_xscale("log", base=2)
        batches = sorted({batch for line in ratios.values() for batch in line})
        ax.set_xticks(batches, [str(batch) for batch in batches])
        ax.set(xlabel="batch", ylabel=f"step, times plain Keras ({keras.backend.backend()})", ylim=(0, None))
        ax.grid(alpha=0.25)
        ax.legend(frameon=False)

    figure(path, 5.2, 3.6, paint)


def main() -> None:
    """Prints the table."""
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--jit", choices=JIT, default="auto", help="jit_compile of both networks")
    parser.add_argument("--every", type=int, default=1, help="steps from projection to projection")
    parser.add_argument("--samples", type=int, default=3840, help="of an epoch, which has at least 8 steps")
    parser.add_argument("--deferred", action="store_true", help="let the callback project")
    arguments = parser.parse_args()
    setting = {name: getattr(arguments, name) for name in ("optimizer", "jit", "every", "deferred")}
    rows, ratios = [], {}
    for name in arguments.only:
        for batch in arguments.batch:
            best = measure(name, batch, arguments.rounds, **setting, samples=arguments.samples)
            ratio = ratios.setdefault(name, {})[batch] = best["lipschitz"] / best["plain"]
            rows.append((name, str(batch), f"{best['plain']:.2f}", f"{best['lipschitz']:.2f}", f"{ratio:.2f}"))
            store(arguments.json, network=name, batch=batch, **setting, **best)
    title = f"Training step ({', '.join(f'{key} {value}' for key, value in setting.items())})"
    show(title, HEADINGS, rows, arguments.markdown)
    draw(ratios, arguments.plot)


if __name__ == "__main__":
    main()
