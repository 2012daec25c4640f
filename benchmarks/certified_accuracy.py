"""Trains a network, certifies the test set with the real head, attacks a sample, prints and stores the figures.

    KERAS_BACKEND=tensorflow python benchmarks/certified_accuracy.py --dataset fashion_mnist --model cnn_orthogonal \\
        --loss log_sum_exp_hkr --alpha 50 --margin 0.5 --optimizer stiefel_muon --rate 0.02 --json results.jsonl

CIFAR-10 wants a larger network, images mirrored and moved, and an accelerator. The recipe was tried on noise alone:

    KERAS_BACKEND=jax python benchmarks/certified_accuracy.py --dataset cifar10 --model resnet --loss crossentropy \\
        --temperature 10 --margin 0.35 --optimizer stiefel_muon --rate 0.02 --flip --shift 4 --epochs 60 --batch 256
"""

import argparse
import dataclasses
import functools
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

EPSILONS = (36 / 255, 0.25, 0.5, 1.0)
MODELS = {
    "mlp": hkr.models.lipschitz_mlp,
    "mlp_wide": functools.partial(hkr.models.lipschitz_mlp, widths=(1024, 256)),
    "cnn": hkr.models.lipschitz_cnn,
    "cnn_orthogonal": functools.partial(hkr.models.lipschitz_cnn, orthogonal=True),
    "cnn_wide": functools.partial(hkr.models.lipschitz_cnn, filters=(32, 64), width=256, orthogonal=True),
    "resnet": hkr.models.lipschitz_resnet,
}
LOSSES = {
    "hkr": lambda o: hkr.losses.MulticlassHKR(o.alpha, o.margin),
    "soft_hkr": lambda o: hkr.losses.SoftHKR(o.alpha, o.margin),
    "log_sum_exp_hkr": lambda o: hkr.losses.LogSumExpHKR(o.alpha, o.margin),
    "crossentropy": lambda o: hkr.losses.MarginCrossentropy(o.temperature, o.margin),
}
HEADS = {"unit_norm": hkr.constraints.UnitNorm, "orthonormal": hkr.constraints.Orthonormal}
OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "stiefel_muon": hkr.optimizers.StiefelMuon,
}


def flipped(x, rng):
    """Every second image mirrored, by chance."""
    mirror = rng.random(len(x)) < 0.5
    return np.where(mirror[:, None, None, None], x[:, :, ::-1], x)


def shifted(x, pixels: int, rng):
    """Images moved by up to some pixels, zeros coming in."""
    padded = np.pad(x, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    moves = rng.integers(0, 2 * pixels + 1, (len(x), 2))
    return np.stack([p[i : i + x.shape[1], j : j + x.shape[2]] for p, (i, j) in zip(padded, moves, strict=True)])


def blended(x, most: float, rng):
    """Images moved by a part of a pixel: mixed with up to `most` of themselves one pixel aside, in eight directions."""
    moves = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
    moved = np.stack(
        [np.roll(image, moves[k], (0, 1)) for image, k in zip(x, rng.integers(8, size=len(x)), strict=True)]
    )
    return x + (most * rng.random((len(x), 1, 1, 1))).astype(x.dtype) * (moved - x)


def contrasted(x, most: float, rng):
    """Images times a random factor between `1 - most` and `1 + most`."""
    return x * rng.uniform(1 - most, 1 + most, (len(x), 1, 1, 1)).astype(x.dtype)


class Augmented(keras.utils.PyDataset):
    """Batches in random order; `changes` are functions of images and a random generator, applied in turn."""

    def __init__(self, x, y, batch_size: int, changes, seed: int):
        super().__init__()
        self.x, self.y, self.batch_size, self.changes = x, y, batch_size, changes
        self.rng = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return len(self.x) // self.batch_size

    def __getitem__(self, index):
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        x = self.x[rows]
        for change in self.changes:
            x = change(x, self.rng)
        return x, self.y[rows]

    def on_epoch_end(self):
        self.order = self.rng.permutation(len(self.x))


def changes(options) -> list:
    """The augmentations that the options ask for."""
    found = [flipped] if options.flip else []
    for change, most in ((shifted, options.shift), (blended, options.blend), (contrasted, options.contrast)):
        if most:
            found.append(lambda x, rng, change=change, most=most: change(x, most, rng))
    return found


def attacked_accuracy(model, certificate, data, count: int, steps: int) -> dict[str, float]:
    """Accuracy under attack, of the first inputs: right, and not broken by any attack within epsilon."""
    from break_certificates import ATTACKS, Target, is_broken

    x, right = data.x_test[:count].astype("float32"), certificate.is_correct(data.y_test)[:count]
    found = {}
    for epsilon in EPSILONS:
        target = Target(model, x, np.full(len(x), epsilon), certificate.prediction[:count])
        broken = np.zeros(len(x), dtype=bool)
        for name in ("PGD", "DeepFool", "DDN"):
            for points in ATTACKS[name](target, steps):
                broken |= is_broken(target, points)
        if (broken & (certificate.radius[:count] >= epsilon)).any():
            raise RuntimeError(f"A certificate was broken at epsilon={epsilon}")
        found[f"{epsilon:.3g}"] = float((right & ~broken).mean())
    return found


def run(options) -> dict:
    """Trains and certifies; the figures of one line."""
    keras.utils.set_random_seed(options.seed)
    data = hkr.datasets.load(options.dataset, 0)
    if options.train:
        data = dataclasses.replace(data, x_train=data.x_train[: options.train], y_train=data.y_train[: options.train])
    model = MODELS[options.model](data.x_train.shape[1:], data.classes, head_constraint=HEADS[options.head]())
    steps = options.epochs * (len(data.x_train) // options.batch)
    schedule = keras.optimizers.schedules.CosineDecay(
        options.rate / 20, steps, warmup_target=options.rate, warmup_steps=max(1, steps // 20)
    )
    model.compile(OPTIMIZERS[options.optimizer](schedule), loss=LOSSES[options.loss](options))
    batches = Augmented(data.x_train, data.y_train, options.batch, changes(options), options.seed)
    start, start_cpu = time.perf_counter(), time.process_time()
    model.fit(batches, epochs=options.epochs, verbose=options.verbose, callbacks=[hkr.callbacks.Orthonormalize()])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    certificate = hkr.certify(model, data.x_test, batch_size=512, verbose=0)
    backend = keras.backend.backend()
    result = {
        "library": f"hkr_keras {hkr.__version__}",
        **{name: value for name, value in vars(options).items() if name not in ("json", "verbose", "attack", "train")},
        "backend": backend,
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "versions": f"Keras {keras.__version__}, {backend} {__import__(backend).__version__}, "
        f"Python {platform.python_version()}",
        "parameters": model.count_params(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "bound": certificate.bound,
        "clean": certificate.accuracy(data.y_test),
        **{f"certified_{e:.3g}": certificate.accuracy(data.y_test, e) for e in EPSILONS},
        "mean_radius": certificate.mean_radius(data.y_test),
    }
    if options.attack:
        found = attacked_accuracy(model, certificate, data, options.attack, steps=20)
        result |= {f"attacked_{epsilon}": value for epsilon, value in found.items()}
    return result


def show(results: list[dict]) -> None:
    """Prints the table of some results."""
    table = Table(
        title=f"Certified accuracy, percent; {os.cpu_count()} x {platform.machine()}, Keras {keras.__version__}"
    )
    columns = ["clean", *(f"certified_{e:.3g}" for e in EPSILONS), *(f"attacked_{e:.3g}" for e in EPSILONS)]
    columns = [name for name in columns if any(name in result for result in results)]
    for name in (
        "data",
        "model",
        "loss",
        "optimizer",
        "epochs",
        "s",
        *(c.replace("_", " ") for c in columns),
        "mean radius",
    ):
        table.add_column(name, justify="right" if name not in ("data", "model", "loss", "optimizer") else "left")
    for r in results:
        weights = f"temperature {r['temperature']:g}" if r["loss"] == "crossentropy" else f"alpha {r['alpha']:g}"
        table.add_row(
            *(r["dataset"], r["model"], f"{r['loss']}, {weights}, margin {r['margin']:g}"),
            *(f"{r['optimizer']} {r['rate']:g}", str(r["epochs"])),
            *(
                f"{r['seconds']:.0f}",
                *(f"{100 * r[c]:.1f}" if c in r else "" for c in columns),
                f"{r['mean_radius']:.3f}",
            ),
        )
    Console(width=200).print(table)


def main() -> None:
    """Runs one recipe, or shows stored results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("digits", "mnist", "fashion_mnist", "cifar10"), default="fashion_mnist")
    parser.add_argument("--model", choices=MODELS, default="cnn_orthogonal")
    parser.add_argument("--head", choices=HEADS, default="unit_norm", help="the constraint of its kernel")
    parser.add_argument("--loss", choices=LOSSES, default="hkr")
    parser.add_argument("--alpha", type=float, default=50.0)
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=10.0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flip", action="store_true", help="mirror images by chance")
    parser.add_argument("--shift", type=int, default=0, help="move images by up to this many pixels")
    parser.add_argument("--blend", type=float, default=0.0, help="move images by up to this part of a pixel")
    parser.add_argument("--contrast", type=float, default=0.0, help="scale images by up to 1 -+ this")
    parser.add_argument("--train", type=int, help="use the first training inputs only")
    parser.add_argument("--attack", type=int, default=0, help="attack this many test inputs with foolbox")
    parser.add_argument("--verbose", default=2, type=int)
    parser.add_argument("--json", help="append the figures to this file, one JSON object per line")
    options = parser.parse_args()
    result = run(options)
    show([result])
    if options.json:
        with open(options.json, "a") as file:
            print(json.dumps(result), file=file)


if __name__ == "__main__":
    main()
