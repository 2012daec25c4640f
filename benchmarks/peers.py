"""The same networks, data and time with deel-lip 1.5.0, and the time of a step beside deel-torchlip 1.0.5 too.

    python benchmarks/peers.py --loss hkr --alpha 50 --margin 0.5 --rate 3e-3 --json results.jsonl
    python benchmarks/peers.py --steps --peer deel-torchlip --network mlp cnn

The first form trains deel-lip on Fashion-MNIST and stores what it claims of itself; `--steps` times a training step of
a peer, of this package and of plain Keras on the same engine, in turn. The first call makes the environment (for
deel-lip Python up to 3.11 and TensorFlow 2.15; about 1 GB each) under `build/`, which Git ignores; nothing of the
package needs it. `peer_recipes.py` trains peers with the recipes of `certified_accuracy.py`.
`--margin` is deel-lip's `min_margin`, twice the margin of this package.

Its certificate is the one its metrics compute: the lead of the first logit over 2, where the neurons of the last layer
have norm 1, or over the root of 2, under the assumption that every layer is 1-Lipschitz. That is wrong for its padded
convolutions, whose padding factor is a mean and not a maximum (norms of 1.02 to 1.2): its radii are claims, no proofs.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

EPSILONS = (36 / 255, 0.25, 0.5, 1.0)
ENVIRONMENTS = pathlib.Path(__file__).parents[1] / "build" / "peers"
REQUIREMENTS = {
    "deel-lip": ("deel-lip==1.5.0", "tensorflow-cpu==2.15.1", "numpy==1.26.4", "setuptools<81"),
    "deel-torchlip": ("deel-torchlip==1.0.5", "torch==2.13.0", "numpy"),
    "orthogonium": ("orthogonium==0.0.4", "torch==2.13.0", "numpy"),
}
BACKENDS = {"deel-lip": "tensorflow", "deel-torchlip": "torch"}
FACTORS = {"unit_norm": 2.0, "orthonormal": math.sqrt(2.0)}
LOSSES = {
    "hkr": lambda losses, o: losses.MulticlassHKR(o.alpha, o.margin),
    "crossentropy": lambda losses, o: losses.TauCategoricalCrossentropy(o.temperature),
    "multi_margin": lambda losses, o: losses.MultiMargin(o.margin),
    "categorical_hinge": lambda losses, o: losses.CategoricalHinge(o.margin),
}


def interpreter(peer: str = "deel-lip") -> pathlib.Path:
    """Python of the environment of a peer, which is made when it is missing.

    Raises:
        SystemExit: on a Python that TensorFlow 2.15 does not support.
    """
    folder = ENVIRONMENTS / peer
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        if peer == "deel-lip" and not (3, 9) <= sys.version_info[:2] <= (3, 11):
            raise SystemExit(
                "Expected Python 3.9 to 3.11, the newest that TensorFlow 2.15 and so deel-lip 1.5.0 support. "
                f"Received: Python {platform.python_version()}"
            )
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[peer]], check=True)
        done.touch()
    return python


def network(pooling: str = "l2_norm", head: str = "unit_norm", model_name: str = "cnn"):
    """16, 16, pool, 32, 32, pool, 64, 10, or 256, 128, 64, 10, on 28 x 28, from the layers of deel-lip."""
    from deel.lip import layers, model
    from tensorflow.keras.layers import Flatten, Input

    pool = {"l2_norm": layers.ScaledL2NormPooling2D, "invertible": layers.InvertibleDownSampling}[pooling]
    dense = {"unit_norm": layers.FrobeniusDense, "orthonormal": layers.SpectralDense}[head]
    parts = [Input((28, 28, 1))]
    for filters in (16, 32) if model_name == "cnn" else ():
        for _ in range(2):
            parts += [layers.SpectralConv2D(filters, 3, padding="same"), layers.GroupSort2()]
        parts.append(pool((2, 2)))
    parts.append(Flatten())
    for width in (64,) if model_name == "cnn" else (256, 128, 64):
        parts += [layers.SpectralDense(width), layers.GroupSort2()]
    return model.Sequential([*parts, dense(10)])


def claimed(
    logits: np.ndarray, labels: np.ndarray, head: str = "unit_norm", epsilons: tuple[float, ...] = EPSILONS
) -> dict[str, float]:
    """Clean and certified accuracy and the mean radius, from the lead of the first logit.

    Args:
        logits: `(n, classes)`, or one score `(n, 1)`, which is its own radius.
        labels: `(n,)` integers.
        head: `"unit_norm"`, each logit 1-Lipschitz: the lead over 2; `"orthonormal"`, the vector of them: over root 2.
        epsilons: radii.

    Returns:
        `clean`, `certified_...` for every epsilon, and `mean_radius`, in which wrong predictions count as 0.

    Example:

    >>> claimed(np.array([[1.0, 0.0], [0.0, 0.2]]), np.array([0, 1]))["certified_0.25"]
    0.5
    """
    if logits.shape[1] == 1:
        logits = logits * np.array([-0.5, 0.5]) * FACTORS[head]
    second, first = np.sort(logits.astype("float64"), axis=1)[:, -2:].T
    radius = np.where(logits.argmax(axis=1) == labels, (first - second) / FACTORS[head], 0.0)
    return {
        "clean": float((logits.argmax(axis=1) == labels).mean()),
        **{f"certified_{epsilon:.3g}": float((radius > epsilon).mean()) for epsilon in epsilons},
        "mean_radius": float(radius.mean()),
    }


def train(options) -> dict:
    """Trains the peer; the figures of one line. Runs in the peer's environment."""
    import tensorflow as tf
    from deel.lip import losses

    tf.keras.utils.set_random_seed(options.seed)
    (x_train, y_train), (x_test, y_test) = tf.keras.datasets.fashion_mnist.load_data()
    x_train, x_test = ((x[..., None] / 255).astype("float32") for x in (x_train, x_test))
    if options.train:
        x_train, y_train = x_train[: options.train], y_train[: options.train]
    used = len(x_train) // options.batch * options.batch
    steps = options.epochs * used // options.batch
    schedule = tf.keras.optimizers.schedules.CosineDecay(
        options.rate / 20, steps, warmup_target=options.rate, warmup_steps=max(1, steps // 20)
    )
    model = network(options.pooling, options.head, options.model)
    model.compile(tf.keras.optimizers.Adam(schedule), loss=LOSSES[options.loss](losses, options))
    batches = tf.data.Dataset.from_tensor_slices((x_train, tf.one_hot(y_train, 10)))
    batches = batches.shuffle(len(x_train), seed=options.seed).batch(options.batch, drop_remainder=True).prefetch(2)
    start, start_cpu = time.perf_counter(), time.process_time()
    model.fit(batches, epochs=options.epochs, verbose=options.verbose)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "library": "deel-lip 1.5.0",
        "dataset": "fashion_mnist",
        **{name: value for name, value in vars(options).items() if name in SETTING},
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "versions": f"TensorFlow {tf.__version__}, Python {platform.python_version()}",
        "parameters": model.count_params(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        **claimed(model.predict(x_test, batch_size=512, verbose=0), y_test, options.head),
    }


SETTING = ("model", "loss", "alpha", "margin", "temperature", "epochs", "batch", "rate", "seed", "pooling", "head")


# ---- the time of a step -------------------------------------------------------------------------------------

NETWORKS = {
    "mlp": "784-512-512-512-10",
    "cnn": "16,16,P,32,32,P,64,10 with L2-norm pooling",
    "frontier": "the same with invertible down-sampling; here orthogonal convolutions and StiefelMuon",
}


def deel_lip_step(name: str):
    """A function of the data that trains on them, with deel-lip."""
    import tensorflow as tf
    from deel.lip import layers, losses, model
    from tensorflow.keras.layers import Input

    if name == "mlp":
        hidden = [layer for _ in range(3) for layer in (layers.SpectralDense(512), layers.GroupSort2())]
        net = model.Sequential([Input((784,)), *hidden, layers.FrobeniusDense(10)])
    else:
        net = network({"cnn": "l2_norm", "frontier": "invertible"}[name])
    net.compile(tf.keras.optimizers.Adam(1e-3), loss=losses.MulticlassHKR(50.0, 1.0))
    return lambda x, y, batch: net.fit(x, np.eye(10, dtype="float32")[y], batch_size=batch, verbose=0, shuffle=False)


def deel_torchlip_step(name: str):
    """A function of the data that trains on them, with deel-torchlip."""
    import torch
    from deel import torchlip

    if name == "mlp":
        sizes = ((784, 512), (512, 512), (512, 512))
        parts = [part for size in sizes for part in (torchlip.SpectralLinear(*size), torchlip.GroupSort2())]
        parts.append(torchlip.FrobeniusLinear(512, 10))
    else:
        parts, channels = [], 1
        for filters in (16, 32):
            for _ in range(2):
                convolution = torchlip.SpectralConv2d(channels, filters, 3, padding="same")
                parts, channels = [*parts, convolution, torchlip.GroupSort2()], filters
            pool = torchlip.ScaledL2NormPool2d(2) if name == "cnn" else torchlip.InvertibleDownSampling(2)
            parts, channels = [*parts, pool], channels * (1 if name == "cnn" else 4)
        parts += [torch.nn.Flatten(), torchlip.SpectralLinear(channels * 49, 64), torchlip.GroupSort2()]
        parts.append(torchlip.FrobeniusLinear(64, 10))
    net = torchlip.Sequential(*parts)
    optimizer, loss = torch.optim.Adam(net.parameters(), 1e-3), torchlip.HKRMulticlassLoss(0.98, 1.0)

    def train(x, y, batch):
        x = torch.from_numpy(x if x.ndim == 2 else np.moveaxis(x, -1, 1).copy())
        y = torch.nn.functional.one_hot(torch.from_numpy(y), 10)
        for i in range(0, len(x), batch):
            optimizer.zero_grad()
            loss(net(x[i : i + batch]), y[i : i + batch]).backward()
            optimizer.step()

    return train


def keras_step(name: str, lipschitz: bool):
    """A function of the data that trains on them, with this package or with plain Keras."""
    import keras
    from step_cost import build

    import hkr_keras as hkr

    frontier = name == "frontier"
    if frontier and lipschitz:
        model = hkr.models.lipschitz_cnn((28, 28, 1), 10, orthogonal=True)
    else:
        model = build("cnn" if frontier else name, lipschitz)
    optimizer = hkr.optimizers.StiefelMuon() if frontier and lipschitz else keras.optimizers.Adam()
    model.compile(optimizer, loss=hkr.losses.MulticlassHKR(50.0, 0.5))
    return lambda x, y, batch: model.fit(x, y, batch_size=batch, verbose=0, shuffle=False)


STEPS = {
    "plain Keras": lambda name: keras_step(name, lipschitz=False),
    "hkr_keras": lambda name: keras_step(name, lipschitz=True),
    "deel-lip": deel_lip_step,
    "deel-torchlip": deel_torchlip_step,
}


def serve_steps(library: str, name: str, batch: int, count: int) -> None:
    """Times `count` training steps whenever a line comes in, and answers with milliseconds per step."""
    rng = np.random.default_rng(0)
    shape = (784,) if name == "mlp" else (28, 28, 1)
    x, y = rng.random((batch * count, *shape), dtype="float32"), rng.integers(0, 10, batch * count)
    train = STEPS[library](name)
    train(x, y, batch)
    for _ in sys.stdin:
        start = time.perf_counter()
        train(x, y, batch)
        print(1e3 * (time.perf_counter() - start) / count, flush=True)


def compare_steps(peer: str, name: str, batch: int, rounds: int, count: int) -> dict[str, float]:
    """Milliseconds per training step of plain Keras, this package and a peer, each in a process: minima of rounds in
    turn."""
    environment = {**os.environ, "KERAS_BACKEND": BACKENDS[peer]}
    command = [__file__, "--network", name, "--batch", str(batch), "--count", str(count), "--serve"]
    children = {
        library: subprocess.Popen(
            [str(interpreter(peer) if library == peer else sys.executable), *command, library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for library in ("plain Keras", "hkr_keras", peer)
    }
    best = dict.fromkeys(children, float("inf"))
    for _ in range(rounds):
        for library, child in children.items():
            print(file=child.stdin, flush=True)
            best[library] = min(best[library], float(child.stdout.readline()))
    for child in children.values():
        child.communicate()
    return best


def show_steps(options) -> None:
    """Prints the table of the times of a step."""
    os.environ["KERAS_BACKEND"] = BACKENDS[options.peer]
    from timing import bars, show, store

    rows, drawn = [], []
    for name in options.network:
        best = compare_steps(options.peer, name, options.batch, options.rounds, options.count)
        plain = best["plain Keras"]
        rows.append((name, *(f"{value:.1f} ({value / plain:.2f})" for value in best.values())))
        drawn.append(best)
        store(options.json, benchmark="peers", peer=options.peer, network=name, batch=options.batch, milliseconds=best)
    title = (
        f"Training step, ms (times plain Keras), batch {options.batch}, {options.peer} beside {BACKENDS[options.peer]}"
    )
    show(title, ("network", *drawn[0]), rows, options.markdown)
    series = {library: [best[library] for best in drawn] for library in drawn[0]}
    bars(options.plot, options.network, series, "milliseconds a step")


def store(path: str | None, result: dict) -> None:
    """Prints the figures, and appends them to a file."""
    print(json.dumps(result))
    if path:
        with open(path, "a") as file:
            print(json.dumps(result), file=file)


def parsed() -> argparse.Namespace:
    """The options of the command line: those of the recipe, unless others are given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("cnn", "mlp"), default="cnn")
    parser.add_argument("--loss", choices=LOSSES, default="hkr")
    parser.add_argument("--alpha", type=float, default=50.0)
    parser.add_argument("--margin", type=float, default=1.0, help="deel-lip's min_margin")
    parser.add_argument("--temperature", type=float, default=10.0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pooling", choices=("l2_norm", "invertible"), default="l2_norm")
    parser.add_argument("--head", choices=FACTORS, default="unit_norm")
    parser.add_argument("--train", type=int, help="use the first training inputs only")
    parser.add_argument("--verbose", type=int, default=2)
    parser.add_argument("--json", help="append the figures to this file, one JSON object per line")
    parser.add_argument("--steps", action="store_true", help="time a training step of both libraries")
    parser.add_argument("--peer", choices=BACKENDS, default="deel-lip", help="whose steps to time")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help=str(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=50, help="steps per round")
    parser.add_argument("--markdown", action="store_true", help="print the table of steps as Markdown")
    parser.add_argument("--plot", help="draw the table of steps into this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=STEPS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Trains the peer once, or times both libraries."""
    options = parsed()
    if options.serve:
        serve_steps(options.serve, options.network[0], options.batch, options.count)
    elif options.steps:
        show_steps(options)
    elif options.child:
        store(options.json, train(options))
    else:
        subprocess.run([str(interpreter()), __file__, "--child", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
