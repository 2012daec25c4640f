"""Certified accuracy against the radius: stored networks beside points that others published or reached.

    python benchmarks/curves.py mnist --data mnist.npz --models mnist.keras mnist_far.keras --image mnist.png

A curve is labelled with the name of its file; `certified_accuracy.py --recipe NAME --save NAME.keras` makes one.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Iterator

import keras
import matplotlib

import hkr_keras as hkr

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("#1f5fa8", "#d9622b", "#3a8f5c")
BCOP = [(0, 71.7), (36 / 255, 58.5), (72 / 255, 44.2), (108 / 255, 31.3)]
POINTS = {  # label, marker, radii and percent
    "mnist": [("published", "^", [(0.3, 95.7), (1.58, 62.8), (1.58, 63.4)])],
    "cifar10": [("published, original images: BCOP, 24 hours on a GPU", "^", BCOP)],
}
LONGEST = {"mnist": 3.0, "cifar10": 0.8}
MARKERS = {"deel-lip": "D", "deel-torchlip": "o", "orthogonium": "s"}


def points_of_peers(name: str) -> Iterator[tuple[str, str, list[tuple[float, float]]]]:
    """What `peer_recipes.py` stored of a recipe of this name: label, marker, and what was proven, in percent."""
    for line in (pathlib.Path(__file__).parent / "results" / "peers.jsonl").read_text().splitlines():
        run = json.loads(line)
        if run["recipe"] == name and not run["held_out"]:
            proven = {float(key[7:]): 100 * share for key, share in run.items() if re.fullmatch(r"proven_[\d.]+", key)}
            label = f"{run['library']}, the same images and network, {run['cpu_seconds']:.0f} CPU s"
            yield label, MARKERS[run["library"].split()[0]], [(0.0, 100 * run["clean"]), *proven.items()]


def draw(data: hkr.datasets.Dataset, models: dict[str, keras.Model], name: str, path: pathlib.Path) -> None:
    """The picture of some networks, by label, on the test set."""
    figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for color, (label, model) in zip(COLORS, models.items(), strict=False):
        certificate = hkr.certify(model, data.x_test, batch_size=512, verbose=0)
        hkr.plotting.plot_certified_accuracy(certificate, data.y_test, ax, label, color, marks=(), fill=False)
    for label, marker, points in [*POINTS.get(name, []), *points_of_peers(name)]:
        radii, percent = zip(*points, strict=True)
        shares = [value / 100 for value in percent]
        ax.plot(radii, shares, marker, color="black", markersize=6, label=label, clip_on=False, zorder=3)
    ax.set(xlim=(0, LONGEST.get(name)), ylabel="certified accuracy")
    ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0, symbol=" %"))
    ax.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    """Draws one picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="whose points to draw: mnist, cifar10, or another word for none")
    parser.add_argument("--data", required=True, help="as for certified_accuracy.py")
    parser.add_argument("--models", nargs="+", type=pathlib.Path, required=True, help="files of networks, at most 3")
    parser.add_argument("--image", type=pathlib.Path, required=True, help="draw the picture into this file")
    options = parser.parse_args()
    models = {f"recipe {path.stem}": keras.models.load_model(path) for path in options.models}
    draw(hkr.datasets.load(options.data), models, options.name, options.image)


if __name__ == "__main__":
    main()
