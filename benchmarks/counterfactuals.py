"""Do counterfactuals change the class for others too? A judge decides; and the robustness beside ordinary training.

    KERAS_BACKEND=torch python benchmarks/counterfactuals.py --recipe smiles --data smiles.npz [--json FILE]
    KERAS_BACKEND=torch python benchmarks/counterfactuals.py --recipe smiles --data smiles.npz --robustness

The network of a recipe of `certified_accuracy.py` and an ordinary one (a small ReLU network with cross-entropy) train
on one half of the training images, the judge, an ordinary network with another seed, on the other half. Of test images
that all three get right, the network's counterfactuals `x - t g grad g / |grad g|^2` go to its strongest rival class.
Beside them stand adversarial examples of the ordinary network: just beyond its own boundary (along the gradient), and
at the same distance as each counterfactual, to the same class (projected gradient steps, L2). The figure is the
share that the judge takes for the target class. All images are clipped to [0, 1].

`--robustness` trains the recipe's network, an ordinary one, and an ordinary one on PGD examples for as many CPU seconds
as the first one took, all on the whole training set, and attacks them within growing distances.
"""

import argparse
import functools
import json
import time

import certified_accuracy
import keras
import numpy as np
from timing import machine, show, versions

import hkr_keras as hkr
from hkr_keras._backends.gradients import input_gradient

CLIP = (0.0, 1.0)
BATCH = 128


def ordinary(shape, classes: int) -> keras.Sequential:
    """A small ReLU network: convolutions with max pooling for images of at least 16 x 16, dense layers for others."""
    model = keras.Sequential([keras.Input(shape)])
    if shape[0] >= 16:
        model.add(keras.layers.Conv2D(32, 5, 2 if shape[0] >= 48 else 1, padding="same", activation="relu"))
        model.add(keras.layers.MaxPooling2D(2))
        model.add(keras.layers.Conv2D(64, 3, padding="same", activation="relu"))
        model.add(keras.layers.MaxPooling2D(2))
    model.add(keras.layers.Flatten())
    for width in (128,) if shape[0] >= 16 else (256, 128, 64):
        model.add(keras.layers.Dense(width, activation="relu"))
    model.add(keras.layers.Dense(classes))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    return model


def predicted(model: keras.Model, x: np.ndarray) -> np.ndarray:
    """The classes of inputs; a single score is positive for class 1."""
    outputs = model.predict(x, batch_size=BATCH, verbose=0)
    return (outputs[:, 0] > 0).astype("int64") if outputs.shape[1] == 1 else outputs.argmax(axis=1)


def lengths(moves: np.ndarray) -> np.ndarray:
    """`(n,)` L2 norms."""
    return np.linalg.norm(moves.reshape(len(moves), -1), axis=1)


def scaled(moves: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Moves with these norms; zeros stay."""
    return moves * (sizes / np.maximum(lengths(moves), 1e-12)).reshape(-1, *[1] * (moves.ndim - 1))


def towards(model: keras.Model, x: np.ndarray, weights, distance: np.ndarray, steps: int) -> np.ndarray:
    """Projected gradient steps that increase a weighted sum of the logits.

    Args:
        x: `(n, ...)` images in [0, 1].
        weights: function of logits `(n, classes)` that returns the weights, or the weights.
        distance: `(n,)`, how far the results may be.
    """
    gradient = input_gradient(model)
    z = x
    for _ in range(steps):
        chosen = weights(model.predict_on_batch(z)) if callable(weights) else weights
        moved = z + scaled(gradient(z, chosen), 2.5 * distance / steps) - x
        moved = scaled(moved, np.minimum(lengths(moved), distance))
        z = np.clip(x + moved, *CLIP).astype("float32")
    return z


def away_from(own: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The gradient of the cross-entropy with respect to the logits."""
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True) - own


def trained_on_adversarial(data, epsilon: float, cpu_seconds: float, seed: int, steps: int = 5) -> keras.Model:
    """An ordinary network that trains on its own PGD examples until the CPU seconds are over.

    Their distance grows to epsilon in the first half: at once, training ends in one class for all inputs.
    """
    model, rng, start = ordinary(data.x_train.shape[1:], data.classes), np.random.default_rng(seed), time.process_time()
    while (share := (time.process_time() - start) / cpu_seconds) < 1:
        rows = rng.integers(len(data.x_train), size=BATCH)
        x, y = data.x_train[rows], data.y_train[rows]
        weights = functools.partial(away_from, np.eye(data.classes)[y])
        distance = np.full(BATCH, epsilon * min(1.0, 2 * share))
        model.train_on_batch(towards(model, x, weights, distance, steps), y)
    return model


def judged(models: dict, data, times, count: int) -> list[dict]:
    """A line for each kind of changed images: their distance, and what the network itself and the judge see."""
    names = ("network", "ordinary", "judge")
    right = np.all([predicted(models[name], data.x_test) == data.y_test for name in names], axis=0)
    x, y = data.x_test[right][:count], data.y_test[right][:count]
    outputs = hkr.attacks.as_logits(models["network"]).predict(x, batch_size=BATCH, verbose=0)
    own = np.eye(data.classes)[y]
    target = np.where(own > 0, -np.inf, outputs).argmax(axis=1)
    difference = np.eye(data.classes)[target] - own

    def line(kind: str, points: np.ndarray, by: str) -> dict:
        changed = np.isfinite(points).reshape(len(points), -1).all(axis=1)
        points, wanted = points[changed], target[changed]
        return {
            "kind": kind,
            "images": len(points),
            "distance": float(np.median(lengths(points - x[changed]))),
            "itself": float((predicted(models[by], points) == wanted).mean()),
            "judge": float((predicted(models["judge"], points) == wanted).mean()),
        }

    beyond = hkr.explanations.nearest_adversarial(models["ordinary"], x, target, clip=CLIP)
    lines = [line("ordinary, own boundary", beyond, "ordinary")]
    for t in times:
        moved = hkr.explanations.counterfactual(models["network"], x, target, t=t, clip=CLIP)
        lines.append(line(f"counterfactual, t = {t:g}", moved, "network"))
        reach = lengths(moved - x)
        equal = np.concatenate(
            [
                towards(models["ordinary"], x[rows], difference[rows], reach[rows], 20)
                for rows in (slice(i, i + BATCH) for i in range(0, len(x), BATCH))
            ]
        )
        lines.append(line(f"ordinary, as far as t = {t:g}", equal, "ordinary"))
    return lines


def compare_counterfactuals(options, recipe) -> list[dict]:
    """Trains the three networks on halves of the training images and lets the judge decide."""
    data = hkr.datasets.load(recipe.data or recipe.dataset)
    recipe.train = len(data.x_train) // 2
    network, figures = certified_accuracy.trained(recipe, data)
    models = {"network": network}
    for name, half in (("ordinary", slice(recipe.train)), ("judge", slice(recipe.train, None))):
        keras.utils.set_random_seed(options.seed + len(models))
        models[name] = ordinary(data.x_train.shape[1:], data.classes)
        models[name].fit(
            data.x_train[half], data.y_train[half], batch_size=BATCH, epochs=options.ordinary_epochs, verbose=0
        )
    accuracy = {f"{n}_accuracy": float((predicted(m, data.x_test) == data.y_test).mean()) for n, m in models.items()}
    cost = {"network_cpu_seconds": figures["cpu_seconds"]}
    return [line | accuracy | cost for line in judged(models, data, options.t, options.count)]


def compare_robustness(options, recipe) -> list[dict]:
    """Clean accuracy, accuracy under PGD, under C&W, and certified, for three kinds of training."""
    data = hkr.datasets.load(recipe.data or recipe.dataset)
    network, figures = certified_accuracy.trained(recipe, data)
    keras.utils.set_random_seed(options.seed)
    plain = ordinary(data.x_train.shape[1:], data.classes)
    start = time.process_time()
    plain.fit(data.x_train, data.y_train, batch_size=BATCH, epochs=options.ordinary_epochs, verbose=0)
    plain_seconds = round(time.process_time() - start, 1)
    seconds = figures["cpu_seconds"]
    hardened = trained_on_adversarial(data, options.hardened, seconds, options.seed)
    x, y = data.x_test[: options.count], data.y_test[: options.count]
    lines = []
    for kind, model, spent in (
        ("HKR", network, seconds),
        ("cross-entropy", plain, plain_seconds),
        (f"adversarial training at {options.hardened:g}", hardened, seconds),
    ):
        certificate = hkr.certify(model, x, verbose=0)
        line = {"kind": kind, "cpu_seconds": spent, "images": len(x), "clean": certificate.accuracy(y)}
        for name in ("PGD", "C&W"):
            found = hkr.attacks.evaluate_robustness(
                model, x, y, recipe.epsilons, [name], certificate, CLIP, options.steps, verbose=False
            )
            line |= {f"{name}_{e:.3g}": float(share) for e, share in zip(recipe.epsilons, found.attacked, strict=True)}
        line |= {f"certified_{e:.3g}": certificate.accuracy(y, e) for e in recipe.epsilons}
        lines.append(line)
    return lines


def shown(name: str, value) -> str:
    """A figure in a table: shares in percent."""
    if name in ("kind", "images", "cpu_seconds"):
        return str(value)
    return f"{value:.2f}" if name == "distance" else f"{100 * value:.1f}"


def main() -> None:
    """Prints a table, and stores a JSON line for each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--t", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--count", type=int, default=500, help="test images at most")
    parser.add_argument("--ordinary-epochs", type=int, default=5)
    parser.add_argument("--robustness", action="store_true")
    parser.add_argument("--hardened", type=float, default=0.5, help="distance of adversarial training")
    parser.add_argument("--steps", type=int, default=40, help="of each attack")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="append the figures to this file, one JSON object per row")
    options, others = parser.parse_known_args()
    recipe = certified_accuracy.parsed([*others, f"--seed={options.seed}"])
    lines = (compare_robustness if options.robustness else compare_counterfactuals)(options, recipe)
    names = [name for name in lines[0] if not name.endswith(("_accuracy", "network_cpu_seconds"))]
    rows = [[shown(name, line[name]) for name in names] for line in lines]
    print({name: value for name, value in lines[0].items() if name not in names})
    headings = [name.replace("_", " ") for name in names]
    show(f"{recipe.dataset}, percent, distances in L2", headings, rows, options.markdown)
    if options.json:
        facts = {"dataset": recipe.dataset, "layers": recipe.layers or recipe.model, "loss": recipe.loss}
        facts |= {name: getattr(recipe, name) for name in ("alpha", "margin", "temperature", "epochs", "seed")}
        with open(options.json, "a") as file:
            for line in lines:
                stored = {"backend": keras.backend.backend(), **facts, **line}
                print(json.dumps({**stored, "machine": machine(), "versions": versions()}), file=file)


if __name__ == "__main__":
    main()
