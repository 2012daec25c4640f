"""The same networks, data and time with deel-lip 1.5.0, deel-torchlip 1.0.5 and orthogonium 0.0.4, each on its own.

    python benchmarks/peers.py --loss hkr --alpha 50 --margin 0.5 --rate 3e-3 --json results.jsonl
    python benchmarks/peers.py --steps --peer deel-torchlip --network mlp cnn
    python benchmarks/peers.py --recipe cifar10 --peer orthogonium --data cifar10.npz --cpu-seconds 1105

The first form trains deel-lip and stores what it claims of itself; `--steps` times a training step of a peer, of this
package and of plain Keras on the same engine, in turn. `--recipe` trains a peer with the layer sizes, loss,
augmentation and batches of a recipe of `certified_accuracy.py`, with Adam and one thread, for so many CPU seconds; its
kernels are loaded into a Keras network, whose bound and certificates stand beside its claims. The first call makes the
environment (for deel-lip Python up to 3.11 and TensorFlow 2.15; about 1 GB each) under `build/`, which Git ignores;
nothing of the package needs it.
`--margin` is deel-lip's `min_margin`, twice the margin of this package.

Its certificate is the one its metrics compute: the lead of the first logit over 2, where the neurons of the last layer
have norm 1, or over the root of 2, under the assumption that every layer is 1-Lipschitz. That is wrong for its padded
convolutions, whose padding factor is a mean and not a maximum (norms of 1.02 to 1.2): its radii are claims, no proofs.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
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


# ---- the recipes of certified_accuracy.py -------------------------------------------------------------------

RECIPE = ("recipe", "held_out", "dataset", "layers", "loss", "alpha", "margin", "temperature", "batch", "rate")
RECIPE = (*RECIPE, "projection", "seed", "flip", "shift")


def torch_layers(peer: str, projection: str):
    """What makes a convolution, a dense layer and an activation of a peer on PyTorch."""
    if peer == "orthogonium":
        from orthogonium import layers, reparametrizers

        kept = {"ortho_params": getattr(reparametrizers, f"{projection.upper()}_ORTHO_PARAMS")}
        convolution = functools.partial(layers.AdaptiveOrthoConv2d, padding_mode="zeros", **kept)
        return convolution, functools.partial(layers.OrthoLinear, **kept), layers.MaxMin
    from deel import torchlip

    eps = {"default": {}, "none": {"eps_bjorck": None}}
    kept = eps[projection] if projection in eps else {"eps_bjorck": float(projection)}
    convolution = functools.partial(torchlip.SpectralConv2d, **kept)
    return convolution, functools.partial(torchlip.SpectralLinear, **kept), torchlip.GroupSort2


def recipe_network(options, shape: tuple[int, int, int], outputs: int):
    """The layers of a recipe behind images `(channels, height, width)`, from the layers of a peer on PyTorch."""
    import torch

    convolution, dense, activation = torch_layers(options.peer, options.projection)
    (channels, height, width), parts, flat = shape, [], False
    for name in options.layers.split():
        if name == "P":
            parts.append(torch.nn.PixelUnshuffle(2))
            channels, height, width = 4 * channels, height // 2, width // 2
        elif name == "F":
            parts.append(torch.nn.Flatten())
            channels, flat = channels * height * width, True
        else:
            size = int(name)
            parts.append(dense(channels, size) if flat else convolution(channels, size, 3, padding="same"))
            parts.append(activation())
            channels = size
    return torch.nn.Sequential(*parts, dense(channels, outputs))


def torch_loss(options, scores, labels):
    """The loss of a recipe, written as in `hkr_keras.losses`."""
    import torch

    if options.loss == "binary_hkr":
        own = (2.0 * labels - 1.0) * scores[:, 0]
        sides = [own[labels == side] for side in (0, 1)]
        transport = sum(side.mean() for side in sides if len(side))
        return options.alpha * torch.relu(options.margin - own).mean() - transport
    member = torch.nn.functional.one_hot(labels, scores.shape[1]).bool()
    if options.loss == "crossentropy":
        logits = options.temperature * (scores - options.margin * member)
        return torch.nn.functional.cross_entropy(logits, labels) / options.temperature
    rival = torch.logsumexp(options.temperature * scores.masked_fill(member, -math.inf), 1) / options.temperature
    half_margin = 0.5 * (scores[member] - rival)
    return (options.alpha * torch.relu(options.margin - half_margin) - half_margin).mean()


def augmented(x, flip: bool, shift: int):
    """Images `(n, channels, height, width)` mirrored and moved by up to `shift` pixels, zeros coming in, by chance."""
    import torch

    n, _, *sizes = x.shape
    if flip:
        x = torch.where(torch.rand(n, 1, 1, 1) < 0.5, x.flip(3), x)
    if shift:
        x = torch.nn.functional.pad(x, (shift,) * 4)
        for axis, size in zip((2, 3), sizes, strict=True):
            rows = torch.arange(size) + torch.randint(2 * shift + 1, (n, 1))
            x = torch.take_along_dim(x, rows.reshape([n, 1, size, 1] if axis == 2 else [n, 1, 1, size]), axis)
    return x


def arrays_of(options) -> tuple[np.ndarray, ...]:
    """Training images and labels, and those to measure on: `(n, channels, height, width)`, bytes as they are."""
    data = np.load(options.data)
    x, y, x_test, y_test = (data[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    if options.held_out:
        order = np.random.default_rng(0).permutation(len(x))
        out, kept = order[: len(order) // 10], order[len(order) // 10 :]
        x, y, x_test, y_test = x[kept], y[kept], x[out], y[out]
    x, x_test = (np.moveaxis(images.reshape(*images.shape[:3], -1), -1, 1).copy() for images in (x, x_test))
    return x, y.reshape(-1).astype("int64"), x_test, y_test.reshape(-1)


class Clock:
    """Rows of the images of each step, and its rate, which warms up and decays, for so many CPU seconds."""

    def __init__(self, options, count: int):
        self.options, self.count, self.steps = options, count, 0
        self.start, self.start_cpu = time.perf_counter(), time.process_time()

    def __iter__(self):
        rng, options = np.random.default_rng(self.options.seed), self.options
        while True:
            order = rng.permutation(self.count)
            for first in range(0, self.count - options.batch + 1, options.batch):
                share = (time.process_time() - self.start_cpu) / options.cpu_seconds
                if share >= 1:
                    return
                warm, decay = share / 0.05, math.cos(math.pi * max(0.0, share - 0.05) / 0.95)
                self.steps += 1
                yield order[first : first + options.batch], options.rate * min(0.05 + 0.95 * warm, 0.5 + 0.5 * decay)
            print(f"{100 * share:.0f} % of the time, step {self.steps}", flush=True)

    def figures(self, versions: str, parameters: int) -> str:
        """What the training took, as JSON."""
        figures = {
            "library": " ".join(REQUIREMENTS[self.options.peer][0].split("==")),
            "optimizer": "adam",
            "versions": f"{versions}, Python {platform.python_version()}",
            "parameters": parameters,
            "steps": self.steps,
            "epochs": round(self.steps * self.options.batch / self.count, 2),
            "seconds": round(time.perf_counter() - self.start, 1),
            "cpu_seconds": round(time.process_time() - self.start_cpu, 1),
            "threads": 1,
        }
        return json.dumps(figures)


def train_recipe(options) -> None:
    """Trains a peer on PyTorch; what it is and says goes into the file `options.out`. Runs in its environment."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    x, y, x_test, _ = map(torch.from_numpy, arrays_of(options))
    factor = 1 / 255 if x.dtype == torch.uint8 else 1.0
    model = recipe_network(options, x.shape[1:], 1 if options.loss == "binary_hkr" else int(y.max()) + 1)
    optimizer, clock = torch.optim.Adam(model.parameters(), options.rate), Clock(options, len(x))
    for rows, rate in clock:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        images = augmented(factor * x[rows], options.flip, options.shift)
        loss = torch_loss(options, model(images), y[rows])
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            break
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    figures = clock.figures(f"torch {torch.__version__}", parameters)
    model.eval()
    with torch.no_grad(), torch.nn.utils.parametrize.cached():
        logits = torch.cat([model(factor * images) for images in x_test.split(512)]).numpy()
        weights = [array.numpy() for part in model if hasattr(part, "weight") for array in (part.weight, part.bias)]
    np.savez(options.out, *weights, figures=figures, logits=logits)


# deel-lip runs on TensorFlow, with images `(n, height, width, channels)`.


def deel_lip_network(options, shape: tuple[int, int, int], outputs: int):
    """The layers of a recipe, from the layers of deel-lip."""
    from deel.lip import layers, model
    from tensorflow.keras.layers import Flatten, Input

    kept = {"default": {}, "none": {"eps_bjorck": None}}[options.projection]
    parts, flat = [Input(shape)], False
    for name in options.layers.split():
        if name == "P":
            parts.append(layers.InvertibleDownSampling((2, 2)))
        elif name == "F":
            parts.append(Flatten())
            flat = True
        else:
            size = int(name)
            dense = layers.SpectralDense(size, **kept) if flat else None
            parts += [dense or layers.SpectralConv2D(size, 3, padding="same", **kept), layers.GroupSort2()]
    return model.Sequential([*parts, layers.SpectralDense(outputs, **kept)])


def tensorflow_loss(options, scores, labels):
    """The loss of a recipe, written as in `hkr_keras.losses`, on TensorFlow."""
    import tensorflow as tf

    if options.loss == "binary_hkr":
        signs = 2.0 * tf.cast(labels, "float32") - 1.0
        own = signs * scores[:, 0]
        sides = [tf.cast(signs == side, "float32") for side in (-1.0, 1.0)]
        transport = sum(tf.math.divide_no_nan(tf.reduce_sum(own * side), tf.reduce_sum(side)) for side in sides)
        return options.alpha * tf.reduce_mean(tf.nn.relu(options.margin - own)) - transport
    member = tf.one_hot(labels, scores.shape[1])
    if options.loss == "crossentropy":
        logits = options.temperature * (scores - options.margin * member)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.reduce_mean(losses) / options.temperature
    others = options.temperature * scores - 1e9 * member
    half_margin = 0.5 * (tf.reduce_sum(member * scores, 1) - tf.reduce_logsumexp(others, 1) / options.temperature)
    return tf.reduce_mean(options.alpha * tf.nn.relu(options.margin - half_margin) - half_margin)


def tensorflow_augmented(x, flip: bool, shift: int):
    """As `augmented`, on TensorFlow, for images `(n, height, width, channels)`."""
    import tensorflow as tf

    height, width = x.shape[1:3]
    if flip:
        x = tf.image.random_flip_left_right(x)
    if shift:
        x = tf.pad(x, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        rows, columns = (
            tf.range(size)[None] + tf.random.uniform((len(x), 1), maxval=2 * shift + 1, dtype="int32")
            for size in (height, width)
        )
        x = tf.gather(tf.gather(x, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
    return x


def train_deel_lip(options) -> None:
    """As `train_recipe`, for deel-lip."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.keras.utils.set_random_seed(options.seed)
    x, y, x_test, _ = arrays_of(options)
    x, x_test = (tf.constant(np.moveaxis(images, 1, -1)) for images in (x, x_test))
    factor = 1 / 255 if x.dtype == tf.uint8 else 1.0
    model = deel_lip_network(options, tuple(x.shape[1:]), 1 if options.loss == "binary_hkr" else int(y.max()) + 1)
    optimizer = tf.keras.optimizers.Adam(options.rate)
    optimizer.build(model.trainable_variables)
    labels = tf.constant(y)

    def images_of(rows):
        return factor * tf.cast(rows, "float32")

    @tf.function(reduce_retracing=True)
    def step(rows):
        images = tf.ensure_shape(images_of(tf.gather(x, rows)), (options.batch, *x.shape[1:]))
        with tf.GradientTape() as tape:
            scores = model(tensorflow_augmented(images, options.flip, options.shift), training=True)
            loss = tensorflow_loss(options, scores, tf.gather(labels, rows))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    clock = Clock(options, len(x))
    for rows, rate in clock:
        optimizer.learning_rate.assign(rate)
        if not np.isfinite(step(tf.constant(rows)).numpy()):
            break
    figures = clock.figures(f"TensorFlow {tf.__version__}", int(sum(np.prod(w.shape) for w in model.trainable_weights)))
    plain = model.vanilla_export()
    logits = np.concatenate([plain(images_of(x_test[i : i + 512])) for i in range(0, len(x_test), 512)])
    np.savez(options.out, *plain.get_weights(), figures=figures, logits=logits)


def keras_network(options, shape: tuple[int, int, int], weights: list[np.ndarray]):
    """A plain Keras network, but for the activation, of the kernels and biases of a peer."""
    import keras
    from keras import layers

    import hkr_keras as hkr

    inputs = x = keras.Input(shape)
    weights, flat, first = iter(weights), False, options.peer != "deel-lip"  # on PyTorch channels come first

    def applied(layer, x):
        kernel, bias = next(weights), next(weights)
        outputs = layer(x)
        if first:
            kernel = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
        layer.set_weights([kernel, bias])
        return outputs

    for name in options.layers.split():
        if name == "P":
            height, width, channels = x.shape[1:]
            x = layers.Reshape((height // 2, 2, width // 2, 2, channels))(x)
            x = layers.Permute((1, 3, 5, 2, 4) if first else (1, 3, 2, 4, 5))(x)
            x = layers.Reshape((height // 2, width // 2, 4 * channels))(x)
        elif name == "F":
            x, flat = layers.Flatten()(layers.Permute((3, 1, 2))(x) if first else x), True
        else:
            x = applied(layers.Dense(int(name)) if flat else layers.Conv2D(int(name), 3, padding="same"), x)
            x = (hkr.layers.MaxMin() if options.peer == "orthogonium" else hkr.layers.GroupSort(2))(x)
    return keras.Model(inputs, applied(layers.Dense(1 if options.loss == "binary_hkr" else 10), x))


def proven(options, weights: list[np.ndarray], logits: np.ndarray) -> dict[str, float]:
    """The bound and the certified accuracy of a peer's kernels in Keras, under names that begin with `proven`.

    Nothing where the training has diverged.

    Raises:
        RuntimeError: if the Keras network does not compute what the peer computed.
    """
    import hkr_keras as hkr

    if not np.isfinite(logits).all():
        return {}
    *_, x, y = arrays_of(options)
    x = np.moveaxis(x, 1, -1) / np.float32(255 if x.dtype == np.uint8 else 1)
    model = keras_network(options, x.shape[1:], weights)
    difference = np.abs(model.predict(x, batch_size=512, verbose=0) - logits).max()
    if not difference < 1e-3:
        raise RuntimeError(f"Expected the logits of the peer. Received: logits that differ by {difference:.3g}")
    certificate = hkr.certify(model, x, batch_size=512, verbose=0)
    return {
        "proven_bound": float(certificate.bound),
        **{f"proven_{epsilon:.3g}": certificate.accuracy(y, epsilon) for epsilon in options.epsilons},
    }


def run_recipe(options) -> dict:
    """Trains a peer with a recipe in its environment; what it claims and what is proven, one line."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    from timing import machine

    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out.npz"
        settings = json.dumps({**vars(options), "out": str(out)})
        subprocess.run([str(interpreter(options.peer)), __file__, "--settings", settings], check=True)
        stored = dict(np.load(out))
    weights = [stored[f"arr_{i}"] for i in range(len(stored) - 2)]
    return {
        **json.loads(str(stored["figures"])),
        **{name: getattr(options, name) for name in RECIPE},
        "machine": machine(),
        **claimed(np.nan_to_num(stored["logits"]), arrays_of(options)[-1], "orthonormal", options.epsilons),
        **proven(options, weights, stored["logits"]),
    }


def recipe_tables(results: list[dict], own: list[dict]) -> str:
    """A table for each recipe, in Markdown: rows of this package beside peers of the same machine and CPU seconds.

    Args:
        results: lines of `--recipe`, those of held-out images among them.
        own: lines of `certified_accuracy.py` with the same recipes.
    """
    from certified_accuracy import NAMES_OF_RADII, weights_of

    tables = []
    for recipe in dict.fromkeys(result["recipe"] for result in results if not result["held_out"]):
        runs = [result for result in results if result["recipe"] == recipe]
        final = [run for run in runs if not run["held_out"]]
        first = final[0]
        names = [name.removeprefix("certified") for name in first if name.startswith("certified_")]
        radii = [NAMES_OF_RADII.get(f"certified{name}", name.replace("_", "at ")) for name in names]
        headings = ["library", "optimizer", "projection", "settings tried", "epochs", "CPU seconds", "clean"]
        headings += [f"{word} {radius}" for word in ("claimed", "proven") for radius in radii] + ["bound"]
        lines = [f"{recipe}: `{first['layers']}`, {weights_of(first)}", "", "| " + " | ".join(headings) + " |"]
        lines.append("|---|---|---|" + "---:|" * (len(headings) - 3))
        same = ("recipe", "layers", "machine", "seed")
        alike = [run for run in own if all(run[name] == first[name] for name in same)]
        alike = [run for run in alike if run["cpu_seconds"] < 1.1 * first["cpu_seconds"]]
        for run in alike + final:
            tried = sum(other["held_out"] and other["library"] == run["library"] for other in runs)
            optimizer = {"adam": "Adam", "stiefel_muon": "StiefelMuon"}[run["optimizer"]]
            cells = [run["library"], f"`{optimizer}({run['rate']:g})`", run.get("projection", ""), str(tried or "")]
            cells += [f"{run['epochs']:.{0 if run['epochs'] >= 10 else 1}f}", f"{run['cpu_seconds']:.0f}"]
            claims, proofs = ([run.get(f"{word}{name}") for name in names] for word in ("certified", "proven"))
            claims, proofs = (claims, proofs) if "proven_bound" in run else ([None] * len(names), claims)
            cells += ["" if share is None else f"{100 * share:.1f}" for share in (run["clean"], *claims, *proofs)]
            lines.append("| " + " | ".join([*cells, f"{run.get('proven_bound', run.get('bound')):.6f}"]) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


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
    parser.add_argument("--peer", choices=REQUIREMENTS, default="deel-lip", help="whose steps to time; whom to train")
    parser.add_argument("--recipe", help="of certified_accuracy.py: train --peer with its settings")
    parser.add_argument("--data", help="an .npz file of x_train, y_train, x_test, y_test, for --recipe")
    parser.add_argument("--cpu-seconds", type=float, default=60.0, help="of a training with --recipe")
    parser.add_argument("--held-out", action="store_true", help="measure on a tenth of the training inputs, kept apart")
    parser.add_argument(
        "--projection",
        default="default",
        help="orthogonium's cholesky_stable, qr or bjorck_pass_through; eps_bjorck of deel-torchlip; none for either",
    )
    parser.add_argument("--show", type=pathlib.Path, help="print the tables of results of --recipe, and train nothing")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help=str(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=50, help="steps per round")
    parser.add_argument("--markdown", action="store_true", help="print the table of steps as Markdown")
    parser.add_argument("--plot", help="draw the table of steps into this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer == "orthogonium" and not (options.recipe or options.show or options.settings):
        parser.error("Expected --recipe with --peer orthogonium.")
    if options.recipe:
        from certified_accuracy import RECIPES

        recipe = {"flip": False, "shift": 0, "epsilons": EPSILONS, **RECIPES[options.recipe]}
        parser.set_defaults(**{name: value for name, value in recipe.items() if name != "rate"})
        options = parser.parse_args()
    return options


def main() -> None:
    """Trains the peer once, or times both libraries."""
    options = parsed()
    if options.show:
        files = (options.show, pathlib.Path(__file__).parent / "results" / "recipes.jsonl")
        print(recipe_tables(*([json.loads(line) for line in file.read_text().splitlines()] for file in files)))
    elif options.settings:
        settings = argparse.Namespace(**options.settings)
        (train_deel_lip if settings.peer == "deel-lip" else train_recipe)(settings)
    elif options.recipe:
        store(options.json, run_recipe(options))
    elif options.serve:
        serve_steps(options.serve, options.network[0], options.batch, options.count)
    elif options.steps:
        show_steps(options)
    elif options.child:
        store(options.json, train(options))
    else:
        subprocess.run([str(interpreter()), __file__, "--child", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
