"""Peers with the recipes of `certified_accuracy.py`: the same layer sizes, loss, augmentation, batches and CPU seconds.

    python benchmarks/peer_recipes.py --recipe cifar10 --peer orthogonium --data cifar10.npz --cpu-seconds 1105
    python benchmarks/peer_recipes.py --show benchmarks/results/peers.jsonl

Trains deel-lip 1.5.0 (TensorFlow), deel-torchlip 1.0.5 or orthogonium 0.0.4 (PyTorch) in an environment of its own
(see `peers.py`), with Adam and one thread, for so many CPU seconds. Its kernels are loaded into a Keras network, whose
bound and certificates stand beside its claims.
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

import numpy as np
from peers import REQUIREMENTS, claimed, interpreter, store

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


def parsed() -> argparse.Namespace:
    """The options of the command line, and the settings of the recipe."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import certified_accuracy

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=certified_accuracy.RECIPES, help="of certified_accuracy.py")
    parser.add_argument("--peer", choices=REQUIREMENTS, default="deel-lip")
    parser.add_argument("--data", help="an .npz file of x_train, y_train, x_test, y_test")
    parser.add_argument("--cpu-seconds", type=float, default=60.0, help="of the training")
    parser.add_argument("--held-out", action="store_true", help="measure on a tenth of the training inputs, kept apart")
    parser.add_argument("--rate", type=float, default=3e-3, help="of Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--projection",
        default="default",
        help="orthogonium's cholesky_stable, qr or bjorck_pass_through; eps_bjorck of deel-torchlip; none for either",
    )
    parser.add_argument("--json", help="append the figures to this file, one JSON object per line")
    parser.add_argument("--show", type=pathlib.Path, help="print the tables of the results in this file, as Markdown")
    options = parser.parse_args()
    if not options.show and not (options.recipe and options.data):
        parser.error("Expected --recipe and --data, or --show.")
    recipe = certified_accuracy.parsed([f"--recipe={options.recipe}"] if options.recipe else [])
    if (
        any(not (name.isdigit() or name in ("P", "F")) for name in recipe.layers.split())
        or recipe.blend
        or recipe.contrast
    ):
        parser.error(
            "Expected a recipe of convolutions and dense layers on mirrored or moved images. "
            f"Received: --recipe {options.recipe}"
        )
    return argparse.Namespace(**{**vars(recipe), **vars(options)})


def main() -> None:
    """Trains a peer once, here in its environment, or shows stored results."""
    if "--settings" in sys.argv:
        settings = argparse.Namespace(**json.loads(sys.argv[-1]))
        (train_deel_lip if settings.peer == "deel-lip" else train_recipe)(settings)
        return
    options = parsed()
    if options.show:
        files = (options.show, pathlib.Path(__file__).parent / "results" / "recipes.jsonl")
        print(recipe_tables(*([json.loads(line) for line in file.read_text().splitlines()] for file in files)))
    else:
        store(options.json, run_recipe(options))


if __name__ == "__main__":
    main()
