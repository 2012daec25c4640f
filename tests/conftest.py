"""Fixtures of all tests: seeds, the backend, and the state that a test may change."""

import collections
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import keras
import numpy as np
import pytest
from helpers import state_kept

collect_ignore = ["replicas"]  # programs, each for one backend and in processes of its own


@pytest.fixture(autouse=True)
def _clean_state():
    keras.utils.set_random_seed(0)
    with state_kept():
        yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def _draw_with_numpy() -> None:
    """Lets NumPy draw what JAX draws outside of compiled functions: it would compile its generator for every shape."""
    import jax

    def replaced(original, draw):
        def function(key, *args, **kwargs):
            if args or isinstance(key, jax.core.Tracer):
                return original(key, *args, **kwargs)
            drawn = draw(np.random.default_rng(np.asarray(key)), **kwargs)
            return jax.numpy.asarray(drawn.astype(kwargs["dtype"]))

        return function

    def truncated(rng, shape, lower, upper, dtype):
        inside = rng.normal(size=(64, *shape))  # none of 64 lies in [-2, 2] with a chance of 1e-86
        first = ((lower < inside) & (inside < upper)).argmax(axis=0)
        return np.take_along_axis(inside, first[None], axis=0)[0]

    draws = {
        "normal": lambda rng, shape, dtype: rng.normal(size=shape),
        "uniform": lambda rng, shape, minval, maxval, dtype: rng.uniform(minval, maxval, shape),
        "truncated_normal": truncated,
    }
    for name, draw in draws.items():
        setattr(jax.random, name, replaced(getattr(jax.random, name), draw))


if keras.backend.backend() == "jax":
    _draw_with_numpy()


@pytest.fixture(autouse=True)
def _compile_quickly(request):
    """On JAX, what is not about certificates or the arithmetic of layers is compiled without most optimizations."""
    if keras.backend.backend() == "jax":
        import jax

        exact = {"certification", "layers", "test_break_certificates.py", "test_linalg.py", "test_constraints.py"}
        jax.config.update("jax_disable_most_optimizations", not exact & set(request.path.parts))


@pytest.fixture
def backend() -> str:
    """Name of the backend in use."""
    return keras.backend.backend()


def _held(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield value
        if isinstance(value, (list, tuple, dict)):
            yield from _held(value.values() if isinstance(value, dict) else value)


def _shared(items: list[pytest.Item]) -> list[str]:
    """Names of variables of test modules, and of parameters, that hold what one test could change for another."""
    held = {item.location[0]: vars(item.module) for item in items if isinstance(item, pytest.Function)}
    held |= {item.nodeid: item.callspec.params for item in items if hasattr(item, "callspec")}
    changeable = (keras.layers.Layer, keras.Loss, keras.Metric)
    return [
        f"{place}: {name}"
        for place, variables in held.items()
        for name, value in variables.items()
        if not name.startswith("__") and any(isinstance(each, changeable) for each in _held([value]))
    ]


def pytest_addoption(parser):
    parser.addoption("--everywhere", action="store_true", help="on any backend, also what is marked `once`")


def pytest_collection_modifyitems(config, items):
    """PyTorch runs everything; others a part of each table, less of those marked `many`, all of those marked `each`.

    What is slow comes first, so that no worker is left alone with it at the end.
    """
    addresses = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if addresses:
        raise pytest.UsageError(f"Expected names of tests that are the same in every worker. Received: {addresses}")
    if shared := _shared(items):
        raise pytest.UsageError(f"Expected tests that make their layers and models themselves. Received: {shared}")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    backend = keras.backend.backend()
    if backend == "torch" or config.getoption("--everywhere"):
        return
    of_many, of_others = {"tensorflow": (3, 3), "jax": (12, 6)}[backend]  # JAX compiles every size of every case
    rows, left_out = collections.Counter(), []
    for item in items:
        table = item.nodeid.split("[")[0]
        if item.get_closest_marker("once") or isinstance(item, pytest.DoctestItem):
            left_out.append(item)
        else:
            step = of_many if item.get_closest_marker("many") else 1 if item.get_closest_marker("each") else of_others
            if rows[table] % step:
                left_out.append(item)
            rows[table] += 1
    config.hook.pytest_deselected(items=left_out)
    skipped = set(left_out)
    items[:] = [item for item in items if item not in skipped]


def pytest_report_header() -> str:
    return f"keras {keras.__version__} on {keras.backend.backend()}"
