"""Attacks on certificates, on the backend in use: how many were tried, how many fell.

    KERAS_BACKEND=jax python benchmarks/break_certificates.py [--points 16] [--effort 20] [--only moons ...]
        [--attacks pgd ...] [--json FILE] [--fuzz N --seed S]

A certificate falls when the float32 network as deployed gives another class to a float32 input whose distance,
in rational arithmetic, is at most the radius: in `model.predict` of a batch, of a single input, or in an eager call.
Attacks of libraries stay within 0.999 of the radius; those that know how floats are spaced go up to it. All work in
units of the radius and of the margin (`x + radius * u`), so that none depends on the scale of a hostile model.

foolbox attacks with the gradients of every backend. ART does so on TensorFlow and PyTorch; on JAX, which it has no
classifier for, it attacks the predictions alone (SquareAttack), and AutoPGD is left out.
"""

import argparse
import dataclasses
import functools
import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import eagerpy as ep
import foolbox
import fuzzing
import keras
import numpy as np
from keras import ops
from rich.console import Console
from rich.table import Table

import hkr_keras as hkr
from hkr_keras._backends.gradients import as_function
from hkr_keras.attacks import art_classifier, foolbox_model
from hkr_keras.margins import two_logits

BACKEND = keras.backend.backend()
WITHIN = 0.999  # of the radius, for attacks that do not care about the last bits
FARTHEST = 1e12  # stands for an infinite radius, in units of 1 + |x|

# ---- what is attacked ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A model and its certified inputs: `x` float32 `(n, ...)`, `radius` and `prediction` `(n,)`."""

    model: keras.Model
    x: np.ndarray
    radius: np.ndarray
    prediction: np.ndarray

    @classmethod
    def of(cls, model, x, certificate) -> "Target":
        """Without the inputs whose radius is 0: nothing is claimed of them."""
        certified = certificate.radius > 0
        return cls(model, x[certified], certificate.radius[certified], certificate.prediction[certified])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows) -> "Target":
        return Target(self.model, self.x[rows], self.radius[rows], self.prediction[rows])

    @functools.cached_property
    def classes(self) -> int:
        return max(2, self.model.output_shape[-1])

    @functools.cached_property
    def reach(self) -> np.ndarray:
        """The radius, or something large where it is infinite; `(n, 1, ...)`."""
        return column(np.minimum(self.radius, FARTHEST * (1 + lengths(self.x))), self.x.ndim)

    @functools.cached_property
    def gap(self) -> np.ndarray:
        """The lead at the certified inputs, `(n, 1)`."""
        return np.maximum(np.abs(self.lead(self.x)), np.finfo("float32").tiny)[:, None]

    def at(self, u) -> np.ndarray:
        """The float32 inputs nearest to `x + reach * u`."""
        with np.errstate(over="ignore", invalid="ignore"):
            points = (self.x + self.reach * to_numpy(u).astype("float64")).astype("float32")
        return np.where(np.isfinite(points), points, self.x)

    def lead(self, points) -> np.ndarray:
        """How far the predicted class is ahead of all others, `(n,)`; negative where it has changed."""
        logits = two_logits(np.asarray(self.model.predict_on_batch(points), "float64"))
        own = np.arange(logits.shape[1]) == self.prediction[:, None]
        with np.errstate(invalid="ignore"):
            lead = np.nan_to_num(logits[own] - np.where(own, -np.inf, logits).max(axis=1))
        return np.where(classes(logits) == self.prediction, np.maximum(lead, 0), np.minimum(lead, -1e-300))

    @functools.cached_property
    def foolbox(self) -> foolbox.Model:
        """The logits at `x + reach * u` in units of the gap, compiled once where that saves time."""
        return foolbox_model(local_model(self), BOUNDS)

    def is_inside(self, points) -> np.ndarray:
        """Whether the points are within the radius but for float64 rounding, `(n,)`."""
        return lengths(points.astype("float64") - self.x) <= self.radius * (1 - 1e-12)


def column(values, rank: int) -> np.ndarray:
    """`(n,)` as `(n, 1, ...)`."""
    return np.reshape(values, (-1,) + (1,) * (rank - 1))


def lengths(points) -> np.ndarray:
    return np.linalg.norm(np.reshape(points, (len(points), -1)).astype("float64"), axis=1)


def unit(directions) -> np.ndarray:
    """Directions `(n, ...)` of length 1; 0 where there is none."""
    directions = np.nan_to_num(np.asarray(directions, "float64"), posinf=0.0, neginf=0.0)
    largest = np.abs(directions).reshape(len(directions), -1).max(axis=1)
    directions = directions / column(np.where(largest > 0, largest, 1.0), directions.ndim)
    return directions / column(np.maximum(lengths(directions), 1e-300), directions.ndim)


def to_numpy(tensor) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(tensor))


def classes(outputs) -> np.ndarray:
    """Predicted classes `(n,)`; -1 for NaN."""
    logits = two_logits(to_numpy(outputs).astype("float64"))
    return np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))


def is_within(x: np.ndarray, z: np.ndarray, radius: float) -> bool:
    """Whether `|z - x| <= radius`, in rational arithmetic."""
    if math.isinf(radius):
        return True
    moves = (Fraction(b) - Fraction(a) for a, b in zip(x.ravel().tolist(), z.ravel().tolist(), strict=True))
    return sum(move**2 for move in moves) <= Fraction(float(radius)) ** 2


def is_broken(target: Target, points: np.ndarray) -> np.ndarray:
    """Which certificates these float32 inputs refute, one input for each; `(n,)` booleans."""
    outputs = (
        target.model.predict(points, batch_size=len(points), verbose=0),
        target.model.predict(points, batch_size=1, verbose=0),
        target.model(points),
    )
    changed = np.any([classes(output) != target.prediction for output in outputs], axis=0)
    rows = zip(changed, target.x, points, target.radius, strict=True)
    return np.array([bool(flip) and is_within(x, z, radius) for flip, x, z, radius in rows])


# ---- attacks of libraries: an attack yields inputs `(n, ...)`, one for each certified input --------------------

Attack = Callable[[Target, int], Iterator[np.ndarray]]
BOUNDS = (-1.5, 1.5)  # of u


def local_model(target: Target):
    """Logits at `x + reach * u` in units of the gap, as a function of tensors u."""
    x, reach, gap = (ops.convert_to_tensor(a.astype("float32")) for a in (target.x, target.reach, target.gap))
    function = as_function(target.model)
    return lambda u: two_logits(function(x + reach * u)) / gap


def foolbox_attack(build) -> Attack:
    def attack(target, effort):
        start = ops.zeros(target.x.shape, "float32")
        labels = ops.cast(target.prediction, "int32" if BACKEND == "jax" else "int64")
        with np.errstate(all="ignore"):
            _, inside, _ = build(effort)(target.foolbox, start, labels, epsilons=WITHIN)
        yield target.at(inside)

    return attack


def auto_pgd(target: Target, effort: int):
    """Of one input: ART follows the samples that still stand, so a batch would lose its order."""
    from art.attacks.evasion import AutoProjectedGradientDescent

    classifier = art_classifier(local_model(target), target.x.shape[1:], target.classes, BOUNDS)
    return AutoProjectedGradientDescent(
        classifier, 2, WITHIN, WITHIN / 4, effort, nb_random_init=1, loss_type="cross_entropy", verbose=False
    )


def square(target: Target, effort: int):
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    def predict(u):
        return two_logits(np.asarray(target.model.predict_on_batch(target.at(u))))

    classifier = BlackBoxClassifierNeuralNetwork(
        predict, target.x.shape[1:], target.classes, channels_first=False, clip_values=BOUNDS
    )
    return SquareAttack(classifier, 2, eps=WITHIN, max_iter=2 * effort, p_init=0.3, nb_restarts=1, verbose=False)


def art_attack(build, applies) -> Attack:
    def attack(target, effort):
        if applies(target):
            points = []
            for i in range(len(target)):
                one = target[i : i + 1]
                with np.errstate(all="ignore"):
                    u = build(one, effort).generate(np.zeros_like(one.x), np.eye(one.classes)[one.prediction])
                points.append(one.at(u))
            yield np.concatenate(points)

    return attack


# ---- attacks of our own ------------------------------------------------------------------------------------


def steepest(target: Target, effort: int) -> np.ndarray:
    """Unit directions u in which the lead is lowest at the radius: gradient steps on the sphere."""
    own = ops.one_hot(target.prediction, target.classes)

    def lead(u):
        logits = target.foolbox(u)
        mine = ep.astensor(own)
        return ((logits * mine).sum(axis=1) - (logits - 1e30 * mine).max(axis=1)).sum()

    def descent(u):
        _, gradient = ep.value_and_grad(lead, ep.astensor(ops.convert_to_tensor(u.astype("float32"))))
        return -unit(to_numpy(gradient.raw))

    best = u = descent(np.zeros_like(target.x))
    lowest = target.lead(target.at(best))
    for _ in range(max(2, effort // 4)):
        u = unit(u + 0.5 * descent(u))
        found = target.lead(target.at(u))
        best = np.where(column(found < lowest, u.ndim), u, best)
        lowest = np.minimum(found, lowest)
    return best


def gradient_steps(target, effort):
    """From the input down the lead of the predicted class, to 0.999 of the radius."""
    yield target.at(WITHIN * steepest(target, effort))


def boundary(target, effort):
    """From inputs of other classes to the boundary by bisection, then along it towards the certified input.

    Forward passes only: the normal of the boundary is estimated from probes, as HopSkipJump does.
    """
    rng, shape = np.random.default_rng(0), target.x.shape
    u = np.zeros(shape)
    starts = [(np.roll(target.x, shift, axis=0) - target.x.astype("float64")) / target.reach for shift in (1, 2, 3)]
    starts += [4.0**k * unit(rng.normal(size=shape)) for k in range(6) for _ in range(3)]
    for start in starts:
        fresh = (target.lead(target.at(start)) < 0) & (lengths(u) == 0)
        u = np.where(column(fresh, u.ndim), start, u)
    u = bisect(target, u)
    probes, step = 24, np.ones(len(target))
    rows = np.repeat(np.arange(len(target)), 2 * probes)
    around = target[rows]
    for i in range(effort):
        moves = rng.normal(size=(len(target), probes, *shape[1:]))
        moves = np.concatenate([moves, -moves], axis=1).reshape(-1, *shape[1:])
        size = (0.02, 0.1, 0.5)[i % 3] * column(lengths(u), u.ndim) / math.sqrt(math.prod(shape[1:]))
        leads = around.lead(around.at(u[rows] + size[rows] * moves))
        normal = -unit((column(leads, moves.ndim) * moves).reshape(len(target), 2 * probes, *shape[1:]).sum(axis=1))
        turned = unit(unit(u) + column(step, u.ndim) * normal) * column(lengths(u), u.ndim)
        changed = target.lead(target.at(turned)) < 0
        u = np.where(column(changed, u.ndim), bisect(target, turned), u)
        step = np.where(changed, step, step / 2)
    yield target.at(u)


def bisect(target, u, steps=24):
    """The points of another class nearest to the certified inputs on the way to u."""
    low, high = np.zeros(len(u)), np.ones(len(u))
    for _ in range(steps):
        middle = (low + high) / 2
        changed = target.lead(target.at(column(middle, u.ndim) * u)) < 0
        low, high = np.where(changed, low, middle), np.where(changed, middle, high)
    return column(high, u.ndim) * u


def affine(model):
    """`(W, b)` of a model that is affine, in rational arithmetic; `None` of another one."""
    exact = np.vectorize(Fraction, otypes=[object])
    weights, bias = None, Fraction(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dense) and layer.activation is keras.activations.linear:
            kernel, shift = (exact(to_numpy(w).astype("float64")) for w in (layer.kernel, layer.bias))
            weights = kernel if weights is None else weights @ kernel
            bias = np.broadcast_to(bias, len(kernel)) @ kernel + shift
        elif not isinstance(layer, keras.layers.Flatten):
            return None
    if weights.shape[1] == 1:
        weights, bias = (values @ exact(np.array([[-0.5, 0.5]])) for values in (weights, bias))
    return weights, bias


def exact_direction(target, effort):
    """Towards, to and just past the closest point of the nearest hyperplane of an affine model."""
    found = affine(target.model)
    if found is None:
        return
    weights, bias = found
    directions, distances = [], []
    for x, prediction in zip(target.x, target.prediction, strict=True):
        logits = np.array([Fraction(value) for value in x.ravel().tolist()]) @ weights + bias
        ways = []
        for rival in set(range(target.classes)) - {int(prediction)}:
            normal = weights[:, rival] - weights[:, prediction]
            if any(normal):
                share = (logits[prediction] - logits[rival]) / sum(normal**2)
                ways.append(np.array([float(share * value) for value in normal]))
        way = min(ways, key=np.linalg.norm, default=np.zeros(x.size))
        directions.append(way.reshape(x.shape))
        distances.append(np.linalg.norm(way))
    u, share = unit(np.stack(directions)), column(np.array(distances), target.x.ndim) / target.reach
    for factor in (WITHIN, 1 - 1e-6, 1.0):
        yield target.at(factor * u)
    for factor in (1.0, 1 + 1e-7, 1 + 1e-6, 1 + 1e-5, 1 + 1e-4):
        yield target.at(factor * share * u)


def rounding(target, effort):
    """Floats around the point at the radius in the steepest direction, moved by some of their last bits.

    Beside them the certified input itself, whose class may change with the size of the batch.
    """
    yield target.x
    rng, copies = np.random.default_rng(0), 16
    u, points, best = steepest(target, effort), target.x, target.lead(target.x)

    def keep(proposals):
        nonlocal points, best
        rows = np.tile(np.arange(len(target)), len(proposals) // len(target))
        lead = np.where(target[rows].is_inside(proposals), target[rows].lead(proposals), np.inf)
        lead = lead.reshape(-1, len(target))
        first = lead.argmin(axis=0)
        chosen = proposals.reshape(-1, *target.x.shape)[first, np.arange(len(target))]
        better = lead.min(axis=0) <= best
        points, best = np.where(column(better, points.ndim), chosen, points), np.where(better, lead.min(axis=0), best)

    keep(np.concatenate([target.at((1 - 2.0**-k) * u) for k in range(10, 26)]))
    for _ in range(effort):
        shape = (copies, *points.shape)
        steps = rng.integers(-(2 ** rng.integers(0, 7)), 2 ** rng.integers(0, 7), shape, endpoint=True)
        steps *= rng.random(shape) < rng.choice([0.1, 0.5, 1.0])
        keep((points + steps * np.spacing(np.abs(points))).astype("float32").reshape(-1, *points.shape[1:]))
    yield points


ATTACKS: dict[str, Attack] = {
    "PGD": foolbox_attack(lambda n: foolbox.attacks.L2PGD(steps=n, rel_stepsize=0.25)),
    "DeepFool": foolbox_attack(lambda n: foolbox.attacks.L2DeepFoolAttack(steps=n, candidates=3)),
    "DDN": foolbox_attack(lambda n: foolbox.attacks.DDNAttack(steps=n)),
    "C&W": foolbox_attack(
        lambda n: foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=3, steps=n, stepsize=0.1, initial_const=3.0, abort_early=False
        )
    ),
    "AutoPGD": art_attack(auto_pgd, lambda target: BACKEND != "jax"),
    "Square": art_attack(square, lambda target: target.x.ndim == 4 and min(target.x.shape[1:3]) > 4),
    "gradient": gradient_steps,
    "boundary": boundary,
    "exact": exact_direction,
    "rounding": rounding,
}


def count(target: Target, name: str, effort: int) -> tuple[int, int]:
    """How many certificates were attacked, and how many fell."""
    keras.utils.set_random_seed(0)
    if not len(target):
        return 0, 0
    found = [is_broken(target, points) for points in ATTACKS[name](target, effort)]
    return (len(target), int(np.any(found, axis=0).sum())) if found else (0, 0)


# ---- models: each a function of the number of inputs, which returns the model and float32 inputs ----------------


def network(*items, shape=None):
    """A Sequential model of layers and of `(kernel, bias)` of Dense layers, set to the bit."""
    layers = [item if isinstance(item, keras.layers.Layer) else keras.layers.Dense(item[0].shape[1]) for item in items]
    model = keras.Sequential([keras.Input(shape or items[0][0].shape[:1]), *layers])
    for layer, item in zip(layers, items, strict=True):
        if layer is not item:
            kernel, bias = item
            bias = np.broadcast_to(np.float32(bias), kernel.shape[1:])
            layer.set_weights([np.asarray(kernel, "float32"), np.array(bias)])
    return model


def normal(*shape, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


def orthonormal(n, seed=0):
    return np.linalg.qr(normal(n, n, seed=seed).astype("float64"))[0].astype("float32")


@functools.cache
def trained(build, data_name: str, epochs: int, *options):
    keras.utils.set_random_seed(0)
    data = hkr.datasets.load(data_name)
    binary = data.classes == 2
    model = build(data.x_train.shape[1:], 1 if binary else data.classes, *options)
    loss = hkr.losses.HKR(alpha=50, margin=0.2) if binary else hkr.losses.MulticlassHKR(alpha=50, margin=0.3)
    model.compile(keras.optimizers.Adam(1e-2), loss=loss)
    model.fit(data.x_train, data.y_train, batch_size=64, epochs=epochs, verbose=0)
    return model, data.x_test


def trained_on(*arguments):
    def build(n):
        model, x = trained(*arguments)
        return model, x[:n]

    return build


def planted_biases(*between):
    """Biases of 2^20 and their exact cancellation: what is left of an input are multiples of 1/8."""

    def build(n):
        one, head = np.eye(8), np.outer(np.ones(8) / 4, [1.0, -1.0])
        return network((one, 2.0**20), *between, (one, -(2.0**20)), (head, 0.0)), normal(n, 8)

    return build


def scaled(k: int, inputs: float):
    """Layers scaled by 2^k and 2^-k."""

    def build(n):
        kernels = orthonormal(8) * 2.0**k, orthonormal(8, 1) * 2.0**-k, orthonormal(8, 2)[:, :3]
        first, second, head = ((kernel, 0.0) for kernel in kernels)
        return network(first, hkr.layers.GroupSort(2), second, head), normal(n, 8, scale=inputs)

    return build


def linear(classes: int, scale=1.0, inputs=1.0):
    def build(n):
        return network((normal(8, classes, seed=1) * np.float64(scale), 0.0)), normal(n, 8, scale=inputs)

    return build


def tied_columns(n):
    """Columns that are equal: only rounding tells the logits apart."""
    return network((np.repeat(normal(64, 1, seed=1), 17, axis=1), 0.0)), normal(n, 64)


def tied_columns_with_biases(n):
    """One logit is always ahead of the other by 1, until they are so large that 1 is lost."""
    return network((np.repeat(normal(8, 1, seed=1), 2, axis=1), [0.0, 1.0])), normal(n, 8)


def far_from_zero(n):
    """Inputs with a large mean, in front of a layer that takes the mean away."""
    contrast = np.outer(np.tile([1.0, -1.0], 4), [0.5, -0.5])
    layers = hkr.layers.LayerCentering(center=False), (contrast, 0.0)
    return network(*layers, shape=(8,)), normal(n, 8) + np.float32(1e6)


def wide_sum(n):
    """4096 terms that cancel but for a little."""
    signs = np.tile([1.0, -1.0], 2048)
    pairs = np.repeat(normal(n, 2048, scale=1e4), 2, axis=1)
    return network((signs[:, None] / 64, 0.0)), pairs + normal(n, 4096, scale=1e-2, seed=1)


def at_the_boundary(n):
    """Inputs whose score is 0 but for rounding."""
    weights, x = normal(512, 1, seed=1).astype("float64"), normal(n, 512).astype("float64")
    x -= (x @ weights / (weights**2).sum()) * weights.T
    return network((weights, 0.0)), x.astype("float32")


def norms(scale: float):
    """Norms of pairs against their mean: near the smallest norm the layer tells apart, or with huge squares."""

    def build(n):
        layers = hkr.layers.L2NormPooling1D(2), keras.layers.Flatten(), (np.full((4, 1), 0.5), -2.5 * scale)
        return network(*layers, shape=(8, 1)), normal(n, 8, 1, scale=scale)

    return build


Build = Callable[[int], tuple[keras.Model, np.ndarray]]
TRAINED: dict[str, Build] = {
    "digits MLP": trained_on(hkr.models.lipschitz_mlp, "digits", 4, (32,)),
    "digits CNN": trained_on(hkr.models.lipschitz_cnn, "digits", 2, (8,), 16),
    "moons": trained_on(hkr.models.lipschitz_mlp, "moons", 15, (32,)),
}
HOSTILE: dict[str, Build] = {
    "linear score": linear(1),
    "linear logits": linear(5),
    "planted biases": planted_biases(),
    "planted biases, GroupSort": planted_biases(hkr.layers.GroupSort(2)),
    "scaled by 2^30": scaled(30, 1.0),
    "scaled by 2^100": scaled(100, 1.0),
    "scaled by 2^-100": scaled(-100, 1.0),
    "scaled by 2^-100, small inputs": scaled(-100, 2.0**-26),
    "weights of 1e-38": linear(3, 1e-38),
    "weights of 1e-38, inputs of 1e6": linear(3, 1e-38, 1e6),
    "weights of 1e-42": linear(3, 1e-42),
    "weights of 1e-42, inputs of 1e6": linear(3, 1e-42, 1e6),
    "equal columns": tied_columns,
    "equal columns, other biases": tied_columns_with_biases,
    "inputs of 1e6": scaled(0, 1e6),
    "inputs of 1e18": scaled(0, 1e18),
    "inputs of 1e30": scaled(0, 1e30),
    "inputs far from 0": far_from_zero,
    "inputs at the boundary": at_the_boundary,
    "wide sum": wide_sum,
    "norms of 1e-12": norms(1e-12),
    "norms of 1e18": norms(1e18),
}
MODELS = TRAINED | HOSTILE


# ---- the command -------------------------------------------------------------------------------------------

CAN_BE_RIGOROUS = "rigorous" in inspect.signature(hkr.certify).parameters


def attacked(model, x, rigorous: bool) -> Target | str:
    """The certificates to attack, or why there are none."""
    try:
        certificate = hkr.certify(model, x, verbose=0, **({"rigorous": True} if rigorous else {}))
    except ValueError as error:
        return str(error)
    return Target.of(model, x, certificate)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=16, help="inputs per model")
    parser.add_argument("--effort", type=int, default=20, help="steps per attack")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), metavar="ATTACK")
    parser.add_argument("--rigorous", nargs="+", choices=("off", "on"), default=["off", "on"][: 1 + CAN_BE_RIGOROUS])
    parser.add_argument("--json", help="append the counts to this file, one JSON object per line")
    parser.add_argument("--fuzz", type=int, help="check this many random models instead, see fuzzing.py")
    parser.add_argument("--seed", type=int, default=0, help="of the random models")
    arguments = parser.parse_args()
    if arguments.fuzz:
        print(fuzzing.run(arguments.fuzz, arguments.seed, report=print))
        return
    logging.getLogger("tensorflow").setLevel("ERROR")  # foolbox and ART trace anew for every input
    version = f"Keras {keras.__version__}, {BACKEND} {__import__(BACKEND).__version__}"
    table = Table(title=f"Certificates broken / attacked, {arguments.points} inputs per model; {version}")
    for name in ("model", "rigorous", *arguments.attacks):
        table.add_column(name, justify="left" if name in ("model", "rigorous") else "right")
    totals = {mode: np.zeros((len(arguments.attacks), 2), int) for mode in arguments.rigorous}
    for model_name in arguments.only:
        model, x = MODELS[model_name](arguments.points)
        for mode in arguments.rigorous:
            target = attacked(model, x, mode == "on")
            refused = isinstance(target, str)
            counts = [(0, 0) if refused else count(target, name, arguments.effort) for name in arguments.attacks]
            totals[mode] += counts
            table.add_row(model_name, mode, *(["refused"] if refused else map(cell, counts)))
            if arguments.json:
                row = {"backend": BACKEND, "model": model_name, "rigorous": mode, "refused": refused}
                row |= {name: {"tried": n, "broken": k} for name, (n, k) in zip(arguments.attacks, counts, strict=True)}
                with open(arguments.json, "a") as file:
                    print(json.dumps(row), file=file)
    table.add_section()
    for mode, counts in totals.items():
        table.add_row("all", mode, *map(cell, counts))
    Console(width=150).print(table)


def cell(counts) -> str:
    tried, broken = counts
    return f"{broken}/{tried}" if tried else "-"


if __name__ == "__main__":
    main()
