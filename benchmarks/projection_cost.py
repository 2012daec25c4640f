"""What one projection costs against its floor, the two matrix products in it, on the backend in use.

    KERAS_BACKEND=jax python benchmarks/projection_cost.py [--shapes 64x64 4096x1024] [--rounds 5] [--json FILE]

A shape is `rows x columns` or `blocks x rows x columns`, as of a grouped or depthwise kernel. Projection and floor are
compiled as in a training step and timed in turn; the kernels are near orthonormal, as after an ordinary step. With n
the larger and p the smaller side the products take `4 n p^2` operations a block. The GFLOP/s are those of the whole
projection for this count. The last lines are what a square matrix product reaches, and what a call that computes
nothing takes: within a step there is no such call, so look at larger shapes only.
"""

import numpy as np
from keras import ops
from timing import bars, compiled, interleaved, options, shape, show, stopwatch, store

from hkr_keras import linalg

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = [*((width, width) for width in WIDTHS), (784, 512), (4096, 1024), (576, 64), (8, 576, 64), (64, 9, 1)]
HEADINGS = ("shape", "GFLOP", "floor, ms", "projection, ms", "ratio", "GFLOP/s")


def products(w):
    """The Gram matrix of the smaller side, and its product with the matrix."""
    transposed = ops.swapaxes(w, -1, -2)
    if w.shape[-2] < w.shape[-1]:
        return ops.matmul(ops.matmul(w, transposed), w)
    return ops.matmul(w, ops.matmul(transposed, w))


def polar_direction(blocks: int, rows: int, columns: int) -> np.ndarray:
    """Parts of reflections, which are dense and cheap to make, and a little noise."""
    rng = np.random.default_rng(0)
    n = max(rows, columns)
    v = rng.normal(size=(blocks, n, 1))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    w = np.eye(n)[:rows, :columns] - 2 * v[:, :rows] * v[:, :columns].swapaxes(1, 2)
    return (w + 1e-3 / np.sqrt(n) * rng.normal(size=w.shape)).astype("float32")


def gflop(blocks: int, rows: int, columns: int) -> float:
    return 4e-9 * blocks * max(rows, columns) * min(rows, columns) ** 2


def measure(size: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Milliseconds of the floor and of the projection of kernels of a shape."""
    blocks, rows, columns = (1, *size)[-3:]
    w = ops.convert_to_tensor(polar_direction(blocks, rows, columns))
    plain = w[0] if blocks == 1 else w
    clocks = {
        "floor": stopwatch(compiled(products), plain),
        "projection": stopwatch(compiled(linalg.newton_schulz), w),
    }
    return interleaved(clocks, rounds)


def limits(width: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a product of square matrices and of a call that returns its argument."""
    w = ops.convert_to_tensor(polar_direction(1, width, width)[0])
    clocks = {"matmul": stopwatch(compiled(ops.matmul), w, w), "call": stopwatch(compiled(lambda w: w), w)}
    return interleaved(clocks, rounds)


def main() -> None:
    """Prints the table."""
    parser = options(__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES)
    parser.add_argument("--peak", type=int, default=2048, help="width of the square matrices of the product alone")
    arguments = parser.parse_args()
    rows, drawn = [], []
    for size in arguments.shapes:
        best, work = measure(size, arguments.rounds), gflop(*(1, *size)[-3:])
        numbers = f"{best['floor']:.3f}", f"{best['projection']:.3f}", f"{best['projection'] / best['floor']:.2f}"
        rows.append(("x".join(map(str, size)), f"{work:.3g}", *numbers, f"{1e3 * work / best['projection']:.1f}"))
        drawn.append((best["floor"], best["projection"]))
        store(arguments.json, benchmark="projection", shape=size, gflop=work, **best)
    best, work = limits(arguments.peak, arguments.rounds), 2e-9 * arguments.peak**3
    product = f"{best['matmul']:.3f}", "", "", f"{1e3 * work / best['matmul']:.1f}"
    rows.append((f"matmul {arguments.peak}", f"{work:.3g}", *product))
    rows.append(("call", "", f"{best['call']:.3f}", "", "", ""))
    store(arguments.json, benchmark="limits", width=arguments.peak, gflop=work, **best)
    show("One projection", HEADINGS, rows, arguments.markdown)
    series = dict(zip(("its two products", "projection"), zip(*drawn, strict=True), strict=True))
    bars(arguments.plot, [row[0] for row in rows[: len(drawn)]], series, "milliseconds", log=True)


if __name__ == "__main__":
    main()
