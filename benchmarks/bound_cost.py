"""What a proven Lipschitz bound and certificates cost: seconds and memory by network, each in a process of its own.

    KERAS_BACKEND=tensorflow python benchmarks/bound_cost.py [--only mlp cnn] [--plot FILE]

"certify" is for 64 inputs, with the bound at hand: predictions and radii.
"""

import argparse
import json
import os
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from timing import bars, options, peak_memory, show, store

import hkr_keras as hkr
from hkr_keras.certification import singular_values

K = keras.layers
CERTIFIED = 64
HEADINGS = (
    *("network", "parameters", "bound", "bound, s", f"certify {CERTIFIED}, s"),
    *("peak memory, GB", "for the bound, GB"),
)


def mlp():
    """784-512-512-512-10."""
    return hkr.models.lipschitz_mlp((28, 28, 1), 10, widths=(512, 512, 512))


def cnn():
    """16, 16, pool, 32, 32, pool, 64, 10 on 28 x 28."""
    return hkr.models.lipschitz_cnn((28, 28, 1), 10)


def lenet():
    """Plain Keras: 5x5 convolutions of 32 and 64 filters, 1024, 10, on 28 x 28."""
    return keras.Sequential(
        [
            *(keras.Input((28, 28, 1)), K.Conv2D(32, 5, padding="same", activation="relu"), K.MaxPooling2D(2)),
            *(K.Conv2D(64, 5, padding="same", activation="relu"), K.MaxPooling2D(2), K.Flatten()),
            *(K.Dense(1024, activation="relu"), K.Dense(10)),
        ]
    )


def vgg_like():
    """Plain Keras: 3x3 convolutions of 64 to 512 filters on 32 x 32."""
    layers = [keras.Input((32, 32, 3))]
    for filters in (64, 128, 256, 256, 512, 512):
        layers += [K.Conv2D(filters, 3, padding="same", activation="relu")]
        layers += [K.MaxPooling2D(2)] if filters != 256 else []
    return keras.Sequential([*layers, K.GlobalMaxPooling2D(), K.Dense(10)])


def resnet50():
    """keras.applications.ResNet50 with random weights, 224 x 224."""
    return keras.applications.ResNet50(weights=None, classifier_activation=None)


NETWORKS = {function.__name__: function for function in (mlp, cnn, lenet, vgg_like, resnet50)}


def measure(name: str, rounds: int) -> dict:
    """Bound, seconds (the least of some rounds, nothing remembered between them) and peak memory of this process."""
    keras.utils.set_random_seed(0)
    model = NETWORKS[name]()
    hkr.lipschitz_bound(keras.Sequential([keras.Input((4,)), K.Dense(2)]))  # imports and first calls
    before = peak_memory()
    seconds = np.inf
    for _ in range(rounds):
        singular_values._RESULTS.clear()
        start = time.perf_counter()
        bound = hkr.lipschitz_bound(model)
        seconds = min(seconds, time.perf_counter() - start)
    peak, certified = peak_memory(), np.inf
    x = np.random.default_rng(0).random((CERTIFIED, *model.input_shape[1:]), dtype="float32")
    for _ in range(rounds):
        start = time.perf_counter()
        hkr.certify(model, x, verbose=0)
        certified = min(certified, time.perf_counter() - start)
    return {
        "network": name,
        "parameters": model.count_params(),
        "bound": bound,
        "seconds": seconds,
        "certify": certified,
        "peak_gb": peak / 2**10,
        "more_gb": (peak - before) / 2**10,
    }


def main() -> None:
    """Prints the table."""
    parser = options(__doc__, rounds=2)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--child", choices=NETWORKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.rounds)))
        return
    rows, drawn = [], []
    for name in arguments.only:
        command = [sys.executable, __file__, "--child", name, "--rounds", str(arguments.rounds)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        seconds = found["seconds"], found["certify"]
        numbers = [f"{value:.2f}" for value in (*seconds, found["peak_gb"], found["more_gb"])]
        rows.append((name, f"{found['parameters']:,}", f"{found['bound']:.4g}", *numbers))
        drawn.append(seconds)
        store(arguments.json, benchmark="bound", **found)
    show("lipschitz_bound and certify", HEADINGS, rows, arguments.markdown)
    series = dict(zip(("lipschitz_bound", "certify"), zip(*drawn, strict=True), strict=True))
    bars(arguments.plot, arguments.only, series, "seconds", log=True)


if __name__ == "__main__":
    main()
