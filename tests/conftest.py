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


def pytest_report_header() -> str:
    return f"keras {keras.__version__} on {keras.backend.backend()}"
