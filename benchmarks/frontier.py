"""Clean against certified accuracy on Fashion-MNIST, here and with deel-lip: runs what is missing, table, picture.

    KERAS_BACKEND=tensorflow python benchmarks/frontier.py [--run] [--network cnn] [--libraries hkr_keras deel-lip]

Results are JSON lines in `benchmarks/results/frontier.jsonl`, one a training run; without `--run` they are only shown.
Both libraries train networks of the same sizes on the same data with the same batch size, epochs and schedule. The
settings are the best found along each frontier: 25 were tried for deel-lip, most for one epoch
(`benchmarks/results/tuning.jsonl`), about seventy here; the optimizers are Adam there and `StiefelMuon` here.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

import hkr_keras as hkr

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "frontier.jsonl"
EPSILONS = (36 / 255, 0.25, 0.5, 1.0)
COLUMNS = ("clean", *(f"certified_{epsilon:.3g}" for epsilon in EPSILONS), "mean_radius")
HEADINGS = (
    *("library", "loss", "seeds", "clean", "certified at 36/255"),
    *("at 0.25", "at 0.5", "at 1", "mean radius", "CPU seconds"),
)
SCRIPTS = {"hkr_keras": ("certified_accuracy.py",), "deel-lip": ("peers.py",)}
NAMES = {"hkr": "MulticlassHKR", "log_sum_exp_hkr": "LogSumExpHKR", "crossentropy": "MarginCrossentropy"}
PEER_NAMES = {
    "hkr": "MulticlassHKR",
    "crossentropy": "TauCategoricalCrossentropy",
    "categorical_hinge": "CategoricalHinge",
}
LINES = (("hkr_keras", "hkr_keras, proven", "#2f74c0"), ("deel-lip", "deel-lip 1.5.0, own claim (unsound)", "#d9622b"))


def ours(model: str, loss: str, **values) -> dict:
    """Options of `certified_accuracy.py`."""
    return {"model": model, "loss": loss, **values, "optimizer": "stiefel_muon", "rate": 0.02}


def theirs(model: str, loss: str, **values) -> dict:
    """Options of `peers.py`."""
    return {"model": model, "loss": loss, **values, "rate": 3e-3}


SETTINGS = {
    "cnn": {
        "hkr_keras": [
            ours("cnn_orthogonal", "crossentropy", temperature=10.0, margin=0.5, head="orthonormal"),
            ours("cnn_orthogonal", "crossentropy", temperature=10.0, margin=0.7, head="orthonormal"),
            ours("cnn_orthogonal", "log_sum_exp_hkr", alpha=50.0, margin=0.5, head="unit_norm"),
            ours("cnn_orthogonal", "log_sum_exp_hkr", alpha=50.0, margin=0.5, head="orthonormal"),
            ours("cnn_orthogonal", "hkr", alpha=50.0, margin=0.55, head="unit_norm"),
        ],
        "deel-lip": [
            theirs("cnn", "categorical_hinge", margin=0.3, pooling="invertible", head="orthonormal"),
            theirs("cnn", "categorical_hinge", margin=0.6, pooling="invertible", head="orthonormal"),
            theirs("cnn", "categorical_hinge", margin=0.85, pooling="invertible", head="orthonormal"),
            theirs("cnn", "hkr", alpha=50.0, margin=1.0, pooling="invertible", head="orthonormal"),
        ],
    },
    "mlp": {
        "hkr_keras": [
            ours("mlp", "crossentropy", temperature=10.0, margin=0.7, head="orthonormal"),
            ours("mlp", "crossentropy", temperature=10.0, margin=1.0, head="orthonormal"),
        ],
        "deel-lip": [
            theirs("mlp", "categorical_hinge", margin=0.6, head="orthonormal"),
            theirs("mlp", "categorical_hinge", margin=0.85, head="orthonormal"),
        ],
    },
}


def library(result: dict) -> str:
    """The library of a result, without its version."""
    return result["library"].split()[0]


def matches(result: dict, name: str, setting: dict, seed: int) -> bool:
    """Whether a result is that of a setting and a seed."""
    return library(result) == name and result["seed"] == seed and setting.items() <= result.items()


def label(setting: dict) -> str:
    """The loss of a setting, under the name that its library gives it."""
    name = NAMES[setting["loss"]] if "optimizer" in setting else PEER_NAMES[setting["loss"]]
    keys = [key for key in ("alpha", "temperature", "margin") if key in setting]
    head = ", orthonormal head" if setting.get("head") == "orthonormal" else ""
    return f"`{name}({', '.join(f'{setting[key]:g}' for key in keys)})`{head}"


def summarise(results: list[dict], seeds, network: str = "cnn") -> list[dict]:
    """For every setting that has results, `{"library", "setting", "runs"}`: a run for each seed."""
    rows = []
    for name, settings in SETTINGS[network].items():
        for setting in settings:
            runs = [next((r for r in results if matches(r, name, setting, seed)), None) for seed in seeds]
            if any(runs):
                rows.append({"library": name, "setting": setting, "runs": [run for run in runs if run]})
    return rows


def figures(row: dict, key: str) -> np.ndarray:
    """One figure of all runs of a row."""
    return np.array([run[key] for run in row["runs"]])


def cells(row: dict) -> list[str]:
    """Number of seeds, the figures (mean, and largest - smallest over seeds) and the mean CPU seconds of a row."""
    found = [str(len(row["runs"]))]
    for column in COLUMNS:
        factor, digits = (1, 3) if column == "mean_radius" else (100, 1)
        values = factor * figures(row, column)
        spread = f" ({np.ptp(values):.{digits}f})" if values.size > 1 else ""
        found.append(f"{values.mean():.{digits}f}{spread}")
    return [*found, f"{figures(row, 'cpu_seconds').mean():.0f}"]


def show(rows: list[dict]) -> None:
    """Prints the table."""
    table = Table(title="Fashion-MNIST, mean over seeds (largest - smallest); percent, radii in pixels of [0, 1]")
    for name in HEADINGS:
        table.add_column(name, justify="left" if name in ("library", "loss") else "right")
    for row in rows:
        table.add_row(row["library"], label(row["setting"]).replace("`", ""), *cells(row))
    Console(width=150).print(table)


def markdown(rows: list[dict]) -> str:
    """The table of the README."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
    lines += [f"| {row['library']} | {label(row['setting'])} | " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """The picture: one panel for each epsilon, seeds as dots, means joined."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(EPSILONS), figsize=(12, 3.5), layout="constrained", sharex=True)
    for ax, epsilon in zip(axes, EPSILONS, strict=True):
        for name, text, color in LINES:
            mine = [row for row in rows if row["library"] == name]
            if mine:
                clean, certified = (
                    [figures(row, key) for row in mine] for key in ("clean", f"certified_{epsilon:.3g}")
                )
                hkr.plotting.plot_frontier(clean, certified, ax, text, color)
        ax.set_title("radius 36/255" if epsilon == 36 / 255 else f"radius {epsilon:g}", fontsize=11)
        ax.set_ylabel("certified accuracy, %" if ax is axes[0] else "")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(LINES), frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    """Runs what is missing, prints the table, draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="train what is missing in the results")
    parser.add_argument("--network", choices=SETTINGS, default="cnn")
    parser.add_argument("--libraries", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="print the table of the README too")
    parser.add_argument("--image", type=pathlib.Path, help="draw the picture into this file")
    options = parser.parse_args()
    results = read(options.results)
    if options.run:
        for seed in options.seeds:
            for name in options.libraries:
                for setting in SETTINGS[options.network][name]:
                    if not any(matches(result, name, setting, seed) for result in results):
                        train(name, setting, seed, options.results)
        results = read(options.results)
    rows = summarise([r for r in results if library(r) in options.libraries], options.seeds, options.network)
    show(rows)
    if options.markdown:
        print(markdown(rows))
    if options.image:
        draw(rows, options.image)


def read(path: pathlib.Path) -> list[dict]:
    """The results in a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(name: str, setting: dict, seed: int, results: pathlib.Path) -> None:
    """One training run in a process of its own, which appends its figures to the results."""
    results.parent.mkdir(parents=True, exist_ok=True)
    arguments = [f"--{key}={value}" for key, value in setting.items()]
    command = [sys.executable, str(HERE / SCRIPTS[name][0]), *arguments, f"--seed={seed}", f"--json={results}"]
    subprocess.run([*command, "--verbose=0"], check=True)


if __name__ == "__main__":
    main()
