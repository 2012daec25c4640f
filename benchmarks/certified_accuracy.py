"""Trains a network, certifies the test set with the real head, attacks a sample, prints and stores the figures.

    KERAS_BACKEND=tensorflow python benchmarks/certified_accuracy.py --dataset fashion_mnist --model cnn_orthogonal \\
        --loss log_sum_exp_hkr --alpha 50 --margin 0.5 --optimizer stiefel_muon --rate 0.02 --json results.jsonl

Settings with names are in `RECIPES`; any option changes them. Choose with `--held-out`, read the test set once:

    KERAS_BACKEND=torch python benchmarks/certified_accuracy.py --recipe mnist --data mnist.npz --held-out
    KERAS_BACKEND=jax python benchmarks/certified_accuracy.py --recipe cifar10_gpu --data cifar10.npz --save out.keras

The second is for one large GPU and ends by the clock (`--minutes`). With JAX, products are in full float32 unless
`JAX_DEFAULT_MATMUL_PRECISION` says otherwise: TF32 would void the certificates.
"""

import argparse
import json
import math
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # TF32 would void the certificates

import keras
import numpy as np
from keras import ops
from rich.console import Console
from rich.table import Table
from timing import machine, versions

import hkr_keras as hkr

HERE = pathlib.Path(__file__).parent
EPSILONS = (36 / 255, 0.25, 0.5, 1.0)
CNN = "16 16 P 32 32 P F 64"
MODELS = {
    "mlp": "F 256 128 64",
    "mlp_wide": "F 1024 256",
    "cnn": "",
    "cnn_orthogonal": CNN,
    "cnn_wide": "32 32 P 64 64 P F 256",
    "resnet": "",
    "shift_net": "P P D64 S64 S64 S64 S64 F 128",
}
LOSSES = {
    "hkr": lambda o: hkr.losses.MulticlassHKR(o.alpha, o.margin),
    "binary_hkr": lambda o: hkr.losses.HKR(o.alpha, o.margin),
    "soft_hkr": lambda o: hkr.losses.SoftHKR(o.alpha, o.margin, o.temperature),
    "log_sum_exp_hkr": lambda o: hkr.losses.LogSumExpHKR(o.alpha, o.margin, o.temperature),
    "crossentropy": lambda o: hkr.losses.MarginCrossentropy(o.temperature, o.margin),
}
NAMES = {
    "hkr": "MulticlassHKR",
    "binary_hkr": "HKR",
    "soft_hkr": "SoftHKR",
    "log_sum_exp_hkr": "LogSumExpHKR",
    "crossentropy": "MarginCrossentropy",
}
NAMES_OF_RADII = {f"certified_{k / 255:.3g}": f"at {k}/255" for k in (36, 72, 108)}
HEADS = {"unit_norm": hkr.constraints.UnitNorm, "orthonormal": hkr.constraints.Orthonormal}
OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "stiefel_muon": hkr.optimizers.StiefelMuon,
}

SHIFT_NET = "P P D64 S64 S64 F 512 256"
CIFAR10 = {
    "dataset": "cifar10",
    "layers": "P P 64 F 1024 256",
    "head": "orthonormal",
    "loss": "crossentropy",
    "temperature": 8.0,
    "margin": 0.4,
    "optimizer": "stiefel_muon",
    "rate": 0.03,
    "batch": 512,
    "flip": True,
    "shift": 2,
    "epsilons": [36 / 255, 72 / 255, 108 / 255],
}
MNIST = {
    "dataset": "mnist",
    "head": "orthonormal",
    "optimizer": "stiefel_muon",
    "rate": 0.03,
    "batch": 512,
    "epsilons": [0.1, 0.3, 1.0, 1.58],
}
FASHION_MNIST = {
    "dataset": "fashion_mnist",
    "layers": "P P D64 S64 S64 F 128",
    "head": "orthonormal",
    "loss": "crossentropy",
    "temperature": 10.0,
    "margin": 0.7,
    "optimizer": "stiefel_muon",
    "rate": 0.03,
    "batch": 256,
    "epochs": 8,
}
RECIPES = {
    "mnist": MNIST
    | {"layers": SHIFT_NET, "loss": "crossentropy", "temperature": 10.0, "margin": 0.8, "shift": 1, "epochs": 24},
    "mnist_far": MNIST
    | {"layers": "F 512 512 512 512", "loss": "log_sum_exp_hkr", "alpha": 100.0, "margin": 1.5, "epochs": 48},
    "fashion_mnist": FASHION_MNIST,
    "fashion_mnist_long": FASHION_MNIST
    | {"layers": SHIFT_NET, "epochs": 140, "batch": 512, "flip": True, "blend": 1.0, "contrast": 0.3},
    "cifar10": CIFAR10 | {"epochs": 96},
    "cifar10_gpu": CIFAR10 | {"layers": "P 128 128 P 256 256 F 1024 256", "minutes": 6.5, "shift": 4},
    "smiles": {
        "dataset": "smiles",
        "layers": "F 512 256",
        "loss": "binary_hkr",
        "alpha": 50.0,
        "margin": 0.7,
        "optimizer": "stiefel_muon",
        "rate": 0.03,
        "batch": 256,
        "epochs": 36,
        "flip": True,
        "shift": 2,
    },
}


def network(options, shape, classes: int) -> keras.Sequential:
    """The layers of `--layers` (or of `--model`), and a head.

    Numbers are orthogonal 3 x 3 convolutions (`C64` a circular one), behind `F` dense layers, each with GroupSort(2);
    `P` is invertible down-sampling, `A` a mean over 2 x 2 pixels in an orthonormal basis, `F` flattens; `D64` is a
    dense layer over channels, `S64` one behind a shift, `R64` a reflector.
    """
    head, outputs = HEADS[options.head](), 1 if options.loss == "binary_hkr" else classes
    if not options.layers and options.model in ("cnn", "resnet"):
        build = {"cnn": hkr.models.lipschitz_cnn, "resnet": hkr.models.lipschitz_resnet}[options.model]
        return build(shape, outputs, head_constraint=head)
    model, flat = keras.Sequential([keras.Input(shape)]), False
    for name in (options.layers or MODELS[options.model]).split():
        if name == "P":
            model.add(hkr.layers.InvertibleDownsampling2D(2))
        elif name == "A":
            model.add(hkr.layers.ScaledAveragePooling2D(2))
        elif name == "F":
            model.add(keras.layers.Flatten())
            flat = True
        else:
            size, dense = int(name.lstrip("CDRS")), flat or name[0] in "DS"
            if name[0] == "S":
                model.add(hkr.layers.SpatialShift2D())
            turns = {"kernel_constraint": hkr.constraints.Orthonormal(every=options.every)}
            if name[0] == "R":
                model.add(hkr.layers.ReflectorDense(size))
            elif dense:
                model.add(hkr.layers.LipschitzDense(size, **turns))
            else:
                padding = "circular" if name[0] == "C" else "same"
                model.add(hkr.layers.OrthogonalConv2D(size, 3, padding=padding, **turns))
            model.add(hkr.layers.GroupSort(2))
    model.add(hkr.layers.LipschitzDense(outputs, kernel_constraint=head))
    return model


class Images(keras.layers.Layer):
    """The training images with these numbers; they are kept on the device, as bytes where they are bytes."""

    def __init__(self, images: np.ndarray):
        super().__init__()
        bytes_ = np.rint(255 * images)
        whole = images.min() >= 0 and images.max() <= 1 and np.abs(bytes_ - 255 * images).max() < 1e-3
        self.factor, stored = (1 / 255, bytes_.astype("uint8")) if whole else (1.0, images)
        self.images = self.add_weight(
            shape=stored.shape, dtype=stored.dtype.name, initializer=lambda *a, **k: stored, trainable=False
        )

    def call(self, rows):
        return self.factor * ops.cast(ops.take(self.images, rows, axis=0), "float32")


def moved(x, moves, most: int):
    """Images `(n, height, width, channels)` moved by `(n, 2)` whole pixels of at most `most`, zeros coming in."""
    for axis in (1, 2):
        padding = [(most, most) if a == axis else (0, 0) for a in range(4)]
        rows = ops.arange(x.shape[axis])[None] + moves[:, axis - 1, None] + most
        rows = ops.expand_dims(rows, (2, 3) if axis == 1 else (1, 3))
        x = ops.take_along_axis(ops.pad(x, padding), ops.broadcast_to(rows, ops.shape(x)), axis=axis)
    return x


class Augmented(keras.layers.Layer):
    """Images moved by up to `shift` pixels, by up to `blend` of a pixel, and times 1 -+ `contrast`, by chance."""

    def __init__(self, shift: int, blend: float, contrast: float, seed: int):
        super().__init__()
        self.shift, self.blend, self.contrast = shift, blend, contrast
        self.seed = keras.random.SeedGenerator(seed)

    def call(self, x):
        n = ops.shape(x)[0]
        if self.shift:
            x = moved(x, keras.random.randint((n, 2), -self.shift, self.shift + 1, seed=self.seed), self.shift)
        if self.blend:
            aside = moved(x, keras.random.randint((n, 2), -1, 2, seed=self.seed), 1)
            x = x + keras.random.uniform((n, 1, 1, 1), 0, self.blend, seed=self.seed) * (aside - x)
        if self.contrast:
            x = x * keras.random.uniform((n, 1, 1, 1), 1 - self.contrast, 1 + self.contrast, seed=self.seed)
        return x


class Batches(keras.utils.PyDataset):
    """Numbers of training inputs, and their labels, in random order."""

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int):
        super().__init__()
        self.labels, self.batch_size, self.rng = labels, batch_size, np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return len(self.labels) // self.batch_size

    def __getitem__(self, index):
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return rows, self.labels[rows]

    def on_epoch_end(self):
        self.order = self.rng.permutation(len(self.labels)).astype("int32")


class Minutes(keras.callbacks.Callback):
    """A cosine decay of the learning rate against the clock, behind an epoch of warm-up; ends the training in time."""

    def __init__(self, minutes: float, rate: float):
        super().__init__()
        self.end, self.rate = time.perf_counter() + 60 * minutes, rate

    def on_epoch_begin(self, epoch, logs=None):
        self.now = time.perf_counter()
        if epoch == 1:  # the first one compiled
            self.start = self.now
        share = (self.now - self.start) / (self.end - self.start) if epoch else 0.0
        rate = self.rate * (0.5 + 0.5 * math.cos(math.pi * share) if epoch else 0.2)
        self.model.optimizer.learning_rate.assign(rate)

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter()
        text = f"epoch {epoch + 1}: {now - self.now:.1f} s, {self.end - now:.0f} s left, loss {float(logs['loss']):.4f}"
        print(text, flush=True)
        self.model.stop_training = bool(now + 1.1 * (now - self.now) > self.end) and (epoch > 0 or now > self.end)


def held_out(data: hkr.datasets.Dataset) -> hkr.datasets.Dataset:
    """A tenth of the training inputs in place of the test set, on which settings may be chosen."""
    order = np.random.default_rng(0).permutation(len(data.x_train))
    out, kept = order[: len(order) // 10], order[len(order) // 10 :]
    return hkr.datasets.Dataset(
        name=data.name,
        classes=data.classes,
        x_train=data.x_train[kept],
        y_train=data.y_train[kept],
        x_test=data.x_train[out],
        y_test=data.y_train[out],
    )


def training_model(options, model: keras.Model, images: np.ndarray) -> keras.Model:
    """The network behind its training images and what changes them: it takes their numbers."""
    parts = [keras.Input((), dtype="int32"), Images(images)]
    if options.flip:
        parts.append(keras.layers.RandomFlip("horizontal", seed=options.seed))
    if options.shift or options.blend or options.contrast:
        parts.append(Augmented(options.shift, options.blend, options.contrast, options.seed))
    return keras.Sequential([*parts, model])


def trained(options, data: hkr.datasets.Dataset) -> tuple[keras.Model, dict[str, float]]:
    """The network of the options, and what its training took."""
    keras.utils.set_random_seed(options.seed)
    x_train, y_train = data.x_train[: options.train], data.y_train[: options.train]
    model = network(options, x_train.shape[1:], data.classes)
    trainer = training_model(options, model, x_train)
    batches, rate, callbacks = Batches(y_train, options.batch, options.seed), options.rate, []
    if options.minutes:
        callbacks.append(Minutes(options.minutes, rate))
    else:
        steps = options.epochs * len(batches)
        rate = keras.optimizers.schedules.CosineDecay(
            rate / 20, steps, warmup_target=rate, warmup_steps=max(1, steps // 20)
        )
    settings = {"use_ema": True, "ema_momentum": options.average} if options.average else {}
    if options.optimizer == "stiefel_muon":
        settings["block"] = options.block
    trainer.compile(OPTIMIZERS[options.optimizer](rate, **settings), loss=LOSSES[options.loss](options))
    print(f"{len(y_train)} training inputs, {model.count_params():,} parameters", flush=True)
    start, start_cpu = time.perf_counter(), time.process_time()
    history = trainer.fit(
        batches,
        epochs=10**6 if options.minutes else options.epochs,
        verbose=0 if options.minutes else options.verbose,
        callbacks=[*callbacks, hkr.callbacks.Orthonormalize()],
    )
    spent = {
        "epochs": len(history.epoch),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - start_cpu, 1),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
    }
    return model, spent


def run(options) -> dict:
    """Trains and certifies; the figures of one line."""
    data = hkr.datasets.load(options.data or options.dataset, 0)
    data = held_out(data) if options.held_out else data
    model, spent = trained(options, data)
    if options.save:
        model.save(options.save)
    certificate = hkr.certify(model, data.x_test, batch_size=512, verbose=0)
    unsaid = ("json", "verbose", "attack", "train", "data", "save", "epsilons", "show")
    result = {
        "library": f"hkr_keras {hkr.__version__}",
        **{name: value for name, value in vars(options).items() if name not in unsaid},
        "backend": keras.backend.backend(),
        "machine": machine(),
        "versions": versions(),
        "parameters": model.count_params(),
        **spent,
        "bound": certificate.bound,
        "clean": certificate.accuracy(data.y_test),
        **{f"certified_{e:.3g}": certificate.accuracy(data.y_test, e) for e in options.epsilons},
        "mean_radius": certificate.mean_radius(data.y_test),
    }
    if options.attack:
        few = slice(options.attack)
        found = hkr.attacks.evaluate_robustness(
            model, data.x_test[few], data.y_test[few], options.epsilons, certificate=certificate[few], verbose=False
        )
        result |= {f"attacked_{e:.3g}": float(value) for e, value in zip(options.epsilons, found.attacked, strict=True)}
    return result


def weights_of(result: dict) -> str:
    """The loss of a result, and its numbers."""
    number = "temperature" if result["loss"] == "crossentropy" else "alpha"
    return f"`{NAMES[result['loss']]}({result[number]:g}, {result['margin']:g})`"


def show(result: dict) -> None:
    """Prints the figures as a table of one row."""
    shares = [name for name in result if name == "clean" or name.startswith(("certified_", "attacked_"))]
    row = {
        "data": result["dataset"] + (", held-out images" if result["held_out"] else ""),
        "network": result["layers"] or MODELS[result["model"]] or result["model"],
        "loss": weights_of(result),
        "optimizer": f"{result['optimizer']} {result['rate']:g}",
        "epochs": str(result["epochs"]),
        "CPU s": f"{result['cpu_seconds']:.0f}",
        **{name.replace("_", " "): f"{100 * result[name]:.1f}" for name in shares},
        "mean radius": f"{result['mean_radius']:.3f}",
    }
    table = Table(*row, title=f"Certified accuracy, percent; {result['machine']}, {result['versions']}")
    table.add_row(*row.values())
    Console(width=200).print(table)


def markdown(results: list[dict]) -> str:
    """The tables of stored results, one for each data set: means over seeds, in brackets largest - smallest."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        alike = ("dataset", "recipe", "layers", "model", "loss", "alpha", "temperature", "margin", "threads", "machine")
        length = result.get("minutes") or result["epochs"]
        groups.setdefault((*(result.get(name) for name in alike), length), []).append(result)
    tables: dict[str, list[str]] = {}
    for (dataset, *_), runs in groups.items():
        first = runs[0]
        shares = [name for name in first if name == "clean" or name.startswith("certified_")]
        figures = [(100, 1, name) for name in shares] + [(1, 3, "mean_radius"), (1, 0, "epochs")]
        figures += [(1, 0, "cpu_seconds"), (1, 0, "seconds")]
        cells = [first["recipe"], f"`{first['layers']}`", weights_of(first), str(len(runs))]
        for factor, digits, name in figures:
            values = factor * np.array([run[name] for run in runs])
            spread = f" ({np.ptp(values):.{digits}f})" if len(runs) > 1 and digits else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        if dataset not in tables:
            headings = [NAMES_OF_RADII.get(name, name.replace("certified_", "at ")) for name in shares]
            costs = ["mean radius", "epochs", "CPU seconds", "seconds", "machine"]
            headings = ["recipe", "network", "loss", "seeds", *headings, *costs]
            lines = "|---|---|---|" + "---:|" * (len(headings) - 4) + "---|"
            tables[dataset] = ["| " + " | ".join(headings) + " |", lines]
        tables[dataset].append("| " + " | ".join([*cells, first["machine"]]) + " |")
    return "\n\n".join("\n".join(lines) for lines in tables.values())


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line: those of the recipe, unless others are given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, help="settings, which the options below change")
    parser.add_argument("--data", help="an .npz file of x_train, y_train, x_test, y_test, in place of a download")
    parser.add_argument("--held-out", action="store_true", help="measure on a tenth of the training inputs, kept apart")
    parser.add_argument("--save", help="store the network in this file")
    parser.add_argument(
        "--dataset", default="fashion_mnist", help="digits, mnist, fashion_mnist, cifar10, or a name for --data"
    )
    parser.add_argument("--model", choices=MODELS, default="cnn_orthogonal")
    parser.add_argument("--layers", default="", help="in place of --model, such as 'P 32 32 P F 256'")
    parser.add_argument("--head", choices=HEADS, default="unit_norm", help="the constraint of its kernel")
    parser.add_argument("--loss", choices=LOSSES, default="hkr")
    parser.add_argument("--alpha", type=float, default=50.0)
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=10.0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=0.0, help="train for so long, in place of --epochs")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument(
        "--average", type=float, default=0.0, help="momentum of a moving average of the weights, 0 for none"
    )
    parser.add_argument("--block", type=int, default=128, help="of StiefelMuon")
    parser.add_argument("--every", type=int, default=1, help="steps from projection to projection")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror images by chance")
    parser.add_argument("--shift", type=int, default=0, help="move images by up to this many pixels")
    parser.add_argument("--blend", type=float, default=0.0, help="move images by up to this part of a pixel")
    parser.add_argument("--contrast", type=float, default=0.0, help="scale images by up to 1 -+ this")
    parser.add_argument("--train", type=int, help="use the first training inputs only")
    parser.add_argument("--attack", type=int, default=0, help="attack this many test inputs with foolbox")
    parser.add_argument("--epsilons", type=float, nargs="+", default=list(EPSILONS))
    parser.add_argument("--verbose", default=2, type=int)
    parser.add_argument("--json", help="append the figures to this file, one JSON object per line")
    parser.add_argument("--show", help="print the tables of the results in this file, as Markdown, and train nothing")
    parser.set_defaults(**RECIPES.get(parser.parse_known_args(arguments)[0].recipe, {}))
    options = parser.parse_args(arguments)
    if options.epochs != parser.get_default("epochs") and options.minutes == parser.get_default("minutes"):
        options.minutes = 0.0  # --epochs alone
    return options


def main() -> None:
    """Runs one recipe."""
    options = parsed()
    if options.show:
        print(markdown([json.loads(line) for line in pathlib.Path(options.show).read_text().splitlines()]))
        return
    result = run(options)
    show(result)
    print(json.dumps(result))
    if options.json:
        with open(options.json, "a") as file:
            print(json.dumps(result), file=file)


if __name__ == "__main__":
    main()
