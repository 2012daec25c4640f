"""How accurate tanh, sigmoid, elu and softplus are in float32: the table that rigorous certificates rest on.

KERAS_BACKEND=torch python benchmarks/activation_accuracy.py

Every finite float32 number through the layer by itself and through the compiled prediction; and 15,000 in threes,
which vector units leave to scalar code. The reference is NumPy in float64, and series where they are as good as exact.
"""

import argparse
import itertools
import os
import platform
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from hkr_keras._backends.compiling import predictor

_CHUNK = 2**21 + 3
_FLUSHED = 2.0**-125


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


REFERENCES = {
    "tanh": np.tanh,
    "sigmoid": lambda x: np.where(x > 0, 1.0, np.exp(np.minimum(x, 0.0))) / (1.0 + np.exp(-np.abs(x))),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    "softplus": _softplus,
}
# Below 2^-30 in size what follows in the series is at most 2^-60 of the value; above 2^8 what is left out is at most
# exp(-256), beside values of 0 and more.
_TINY = {
    "tanh": lambda x: x,
    "sigmoid": lambda x: 0.5 + 0.25 * x,
    "elu": lambda x: x + np.where(x > 0, 0.0, 0.5 * x * x),
    "softplus": lambda x: np.log(2.0) + 0.5 * x,
}
_HUGE = {
    "tanh": np.sign,
    "sigmoid": lambda x: (x > 0).astype(float),
    "elu": lambda x: np.maximum(x, -1.0),
    "softplus": lambda x: np.maximum(x, 0.0),
}


def reference(x: np.ndarray, name: str) -> np.ndarray:
    """The values, as good as exact, of a chunk of float32 numbers."""
    least, most = np.abs(x).min(), np.abs(x).max()
    functions = _TINY if most < 2.0**-30 else _HUGE if least >= 2.0**8 else REFERENCES
    return functions[name](x.astype(np.float64))


def numbers(step: int):
    """Every `step`-th finite one, in chunks, positive ones first."""
    edges = [int(np.float32(x).view(np.uint32)) for x in (0.0, 2.0**-30, 2.0**8, np.inf)]
    for sign in (0, 2**31):
        for start, stop in itertools.pairwise(edges):
            for first in range(start, stop, _CHUNK * step):
                bits = np.arange(first, min(first + _CHUNK * step, stop), step, dtype=np.uint32)
                yield (bits + np.uint32(sign)).view(np.float32)


def errors(x: np.ndarray, y: np.ndarray, name: str, exact: np.ndarray | None = None) -> tuple[float, float]:
    """Largest error in units of 2^-24: relative to the value where it is positive (tanh: anywhere), absolute elsewhere.

    Of a sigmoid, absolute everywhere.
    """
    exact = reference(x, name) if exact is None else exact
    off = np.maximum(np.abs(y - exact) - _FLUSHED, 0.0) * 2.0**24
    relative = np.full(x.shape, name == "tanh") | ((x > 0) & (name != "sigmoid"))
    a = (off[relative] / np.maximum(np.abs(exact[relative]), 1e-300)).max(initial=0.0)
    return float(a), float(off[~relative].max(initial=0.0))


def measured(name: str, step: int) -> tuple[float, float]:
    """The largest errors of one function on this backend."""
    found = np.zeros(2)
    for size in (_CHUNK, 3):
        model = keras.Sequential([keras.Input((size,)), keras.layers.Activation(name)])
        compiled = predictor(model)
        rng = np.random.default_rng(0)
        few = ((rng.choice([-1, 1], 3) * 2.0 ** rng.uniform(-10, 7, 3)).astype("float32") for _ in range(5000))
        for x in numbers(step) if size > 3 else few:
            padded, exact = np.resize(x, size)[None], reference(x, name)
            for run in (model.layers[-1], compiled):
                y = keras.ops.convert_to_numpy(run(keras.ops.convert_to_tensor(padded)))
                found = np.maximum(found, errors(x, y[0, : len(x)].astype(np.float64), name, exact))
    return float(found[0]), float(found[1])


def main() -> None:
    """Prints the errors, in units of 2^-24."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(REFERENCES), nargs="*", default=list(REFERENCES))
    parser.add_argument("--step", type=int, default=1, help="of all numbers, take every so many")
    arguments = parser.parse_args()
    backend = keras.backend.backend()
    print(f"{backend} {__import__(backend).__version__}, Keras {keras.__version__}, {platform.machine()}")
    for name in arguments.only:
        start = time.process_time()
        relative, absolute = measured(name, arguments.step)
        seconds = time.process_time() - start
        print(f"{name}: relative {relative:.3f}, absolute {absolute:.3f}; {seconds:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
