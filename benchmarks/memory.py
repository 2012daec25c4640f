"""Peak resident memory of training, plain Keras against hkr_keras, each network in a process of its own.

    KERAS_BACKEND=tensorflow python benchmarks/memory.py [--batch 128 1024] [--only mlp cnn] [--json FILE]

"more" is what training adds to a process that has imported everything and trained one small layer: weights, optimizer,
activations, compiled functions, and the data of eight steps, which both networks share. The memory of an accelerator
is not in it.
"""

import argparse
import json
import subprocess
import sys

import keras
import numpy as np
from step_cost import NETWORKS, build
from timing import bars, options, peak_memory, show, store

import hkr_keras as hkr

STEPS = 8
HEADINGS = ("network", "batch", "plain, MB", "here, MB", "more: plain, MB", "more: here, MB", "ratio of these")


def train(model, batch: int) -> None:
    """Eight steps twice, on noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * batch, *model.input_shape[1:])).astype("float32")
    y = rng.integers(0, model.output_shape[-1], len(x))
    model.compile("adam", loss=hkr.losses.MulticlassHKR(alpha=50, margin=0.5))
    model.fit(x, y, batch_size=batch, epochs=2, verbose=0)


def measure(name: str, batch: int, lipschitz: bool) -> dict[str, float]:
    """Peak memory of this process, and how much of it came with the training, in MB."""
    train(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), 8)
    before = peak_memory()
    train(build(name, lipschitz), batch)
    return {"peak": peak_memory(), "more": peak_memory() - before}


def main() -> None:
    """Prints the table."""
    parser = options(__doc__, rounds=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--child", choices=("plain", "lipschitz"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.only[0], arguments.batch[0], arguments.child == "lipschitz")))
        return
    rows, drawn = [], []
    for name in arguments.only:
        for batch in arguments.batch:
            found = {kind: in_a_process(name, batch, kind, arguments.rounds) for kind in ("plain", "lipschitz")}
            plain, ours = found["plain"], found["lipschitz"]
            megabytes = [f"{value:.0f}" for value in (plain["peak"], ours["peak"], plain["more"], ours["more"])]
            rows.append((name, str(batch), *megabytes, f"{ours['more'] / max(plain['more'], 1e-9):.2f}"))
            drawn.append((plain["more"], ours["more"]))
            store(arguments.json, benchmark="memory", network=name, batch=batch, **found)
    show("Memory of training", HEADINGS, rows, arguments.markdown)
    series = dict(zip(("plain", "here"), zip(*drawn, strict=True), strict=True))
    bars(arguments.plot, [f"{row[0]}, batch {row[1]}" for row in rows], series, "MB that training adds")


def in_a_process(name: str, batch: int, kind: str, rounds: int) -> dict[str, float]:
    """The least of some runs."""
    command = [sys.executable, __file__, "--child", kind, "--only", name, "--batch", str(batch)]
    runs = [subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout for _ in range(rounds)]
    return min((json.loads(run.splitlines()[-1]) for run in runs), key=lambda found: found["peak"])


if __name__ == "__main__":
    main()
