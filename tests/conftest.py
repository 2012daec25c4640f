"""Fixtures of all tests: seeds, the backend, and the state that a test may change."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import keras
import pytest

collect_ignore = ["replicas"]  # programs, each for one backend and in processes of its own


@pytest.fixture(autouse=True)
def _clean_state():
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


@pytest.fixture
def backend() -> str:
    """Name of the backend in use."""
    return keras.backend.backend()


def pytest_collection_modifyitems(config, items):
    """JAX compiles every size of every case: of tables marked `many` it runs a fifth, and no docstrings."""
    if keras.backend.backend() != "jax":
        return
    many = [item for item in items if item.get_closest_marker("many")]
    examples = [item for item in items if isinstance(item, pytest.DoctestItem)]
    left_out = {*many, *examples} - set(many[::5])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_report_header() -> str:
    return f"keras {keras.__version__} on {keras.backend.backend()}"
