"""What the cost benchmarks share: clocks, interleaved minima, memory, tables with machine and versions."""

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from rich.console import Console
from rich.table import Table


def compiled(function: Callable) -> Callable:
    """A function of tensors as a training step runs it on the backend in use, which returns when it is done."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        on_gpu = bool(tf.config.list_physical_devices("GPU"))  # Keras uses XLA there, and not on a CPU
        inner = tf.function(function, jit_compile=on_gpu)
        wait = tf.test.experimental.sync_devices if on_gpu else lambda: None
    elif backend == "jax":
        import jax

        jitted = jax.jit(function)
        return lambda *tensors: jax.block_until_ready(jitted(*tensors))
    else:
        import torch

        inner = function
        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def run(*tensors):
        result = inner(*tensors)
        wait()
        return result

    return run


def stopwatch(function: Callable, *arguments, least: float = 0.02) -> Callable[[], float]:
    """A clock: calls the function for at least so many seconds, and tells the milliseconds of one call.

    The first call, which compiles, is made here.
    """
    function(*arguments)
    start = time.perf_counter()
    function(*arguments)
    calls = max(1, min(1000, int(least / (time.perf_counter() - start))))

    def clock() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function(*arguments)
        return 1e3 * (time.perf_counter() - start) / calls

    return clock


def interleaved(clocks: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The minimum of every clock over rounds, each of which reads all of them in turn.

    So a change of the machine's speed hits all of them, and what disturbs only one reading is left out.
    """
    best = dict.fromkeys(clocks, float("inf"))
    for _ in range(rounds):
        for name, clock in clocks.items():
            best[name] = min(best[name], clock())
    return best


def peak_memory() -> float:
    """The largest resident memory of this process so far, in MB."""
    try:  # not ru_maxrss, where Linux counts what the parent held before it started this process
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def machine() -> str:
    """The processor, and the accelerators that the backend uses."""
    text = f"{os.cpu_count()} x {platform.machine()} CPU cores"
    if keras.backend.backend() == "torch":
        import torch

        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    elif keras.backend.backend() == "jax":
        import jax

        devices = [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    else:
        devices = [name for name in keras.distribution.list_devices() if not name.startswith("cpu")]
    return ", ".join([text, *devices])


def versions() -> str:
    """Of Keras, the backend and Python."""
    backend = keras.backend.backend()
    return f"Keras {keras.__version__}, {backend} {__import__(backend).__version__}, Python {platform.python_version()}"


def shape(text: str) -> tuple[int, ...]:
    """`128x28x28x16` as a tuple."""
    return tuple(int(size) for size in text.split("x"))


def options(doc: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser of what all of them take."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", help="append the figures to this file, one JSON object per line")
    parser.add_argument("--plot", help="draw the table into this file")
    return parser


def store(path: str | None, **record) -> None:
    """Appends a line of figures with backend, machine and versions; nothing for no path."""
    if path:
        record = {"backend": keras.backend.backend(), **record, "machine": machine(), "versions": versions()}
        with open(path, "a") as file:
            print(json.dumps(record), file=file)


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], markdown=False, left: int = 1) -> None:
    """Prints a table whose title ends in machine and versions; the first columns are words, the others numbers."""
    title = f"{title}, {machine()}; {versions()}"
    if markdown:
        marks = ["---" if i < left else "---:" for i in range(len(headings))]
        print("\n".join([title, "", *("| " + " | ".join(cells) + " |" for cells in (headings, marks, *rows))]))
        return
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def figure(path: str | None, width: float, height: float, paint: Callable) -> None:
    """A picture with the axes that `paint` fills, machine and versions below it; nothing for no path."""
    if not path:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(width, height), layout="constrained")
    paint(ax)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    fig.supxlabel(f"{machine()}; {versions()}", fontsize=7, color="#666666")
    fig.savefig(path, dpi=160)
    plt.close(fig)


def bars(path: str | None, labels: Sequence[str], series: Mapping[str, Sequence[float]], unit: str, log=False) -> None:
    """Draws a row of bars for each label, a colour for each series, with its numbers at the end."""
    size = 0.8 / len(series)

    def paint(ax):
        for i, (name, values) in enumerate(series.items()):
            places = [row + (i - (len(series) - 1) / 2) * size for row in range(len(labels))]
            drawn = ax.barh(places, values, size * 0.92, label=name, color=_COLORS[i % len(_COLORS)])
            ax.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=7)
        ax.set_yticks(range(len(labels)), labels)
        ax.invert_yaxis()
        ax.set_xlabel(unit)
        ax.margins(x=0.12, y=0.01)
        ax.grid(axis="x", alpha=0.25)
        if log:
            ax.set_xscale("log")
        if len(series) > 1:
            ax.legend(frameon=False, fontsize=8)

    figure(path, 6.4, 1.2 + len(labels) * max(0.22 * len(series), 0.3), paint)


_COLORS = ("#9aa5b1", "#2f74c0", "#d9622b", "#3a8f5c")
