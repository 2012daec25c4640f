"""One batch on several replicas: the same losses, the same training, the same kernels as on one device.

Devices are set before a backend starts, so the programs of `replicas/` run in processes of their own and report what
they measured. All differences are between float32 values of order 1.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

PROGRAMS = Path(__file__).parents[1] / "replicas"
ROUNDING = 2e-6  # sums of float32 in another order; losses and gradients are below 10
TRAINED = 2e-5  # the same after four steps
NORM = 1 + 4e-7  # what float32 leaves of a norm of 1
EVENLY = 1 - 1e-6  # the smallest singular value of a polished kernel


def backend_is(name):
    return pytest.mark.skipif(keras.backend.backend() != name, reason=f"replicas of {name}")


def run(program, processes=1, timeout=300):
    """What each process reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(PROGRAMS.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAMS / program), str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(processes)
    ]
    reports = []
    try:
        for process in started:
            output, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors[-4000:]
            reports.append(json.loads(output.strip().splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return reports


def assert_orthonormal(spectrum):
    assert EVENLY <= spectrum[0] <= spectrum[1] <= NORM


def assert_below(found, limit):
    assert max(found.values()) <= limit, found


# One test for each program: workers of pytest share no fixtures, and starting replicas is what takes the time.


@pytest.mark.slow
@backend_is("tensorflow")
def test_mirrored():
    (found,) = run("mirrored.py")
    assert_below(found["values"], ROUNDING)
    for optimizer in ("adam", "muon", "turns"):
        trained = found[optimizer]
        assert trained["start"] == trained["apart"] == 0
        assert trained["losses"] <= ROUNDING
        assert trained["evaluate"] <= TRAINED  # the loss and KRDistance, whose state is summed over replicas
        assert trained["weights"] <= TRAINED
        assert_orthonormal(trained["spectrum"])
    assert found["uneven"] <= TRAINED  # the last batch in parts of 3 and 2
    assert found["centred"][0] == 0  # copies of moving averages stay equal
    assert found["centred"][1] <= TRAINED
    optimizer, apart, spectrum = found["half_precision"]
    assert optimizer == "LossScaleOptimizer"
    assert apart == 0
    assert_orthonormal(spectrum)
    assert max(found["certificates"]) <= TRAINED  # inside and outside the scope


@pytest.mark.slow
@backend_is("jax")
def test_sharded():
    (found,) = run("sharded.py")
    assert_below(found["values"], ROUNDING)
    for name, part in {"data_parallel": 1, "model_parallel": 0.5}.items():
        trained = found[name]
        assert (trained["devices"], trained["part"], trained["apart"]) == (4, part, 0)
        assert max(trained["losses"], trained["evaluate"], trained["weights"]) <= TRAINED
        assert_orthonormal(trained["spectrum"])
        assert trained["bound"] <= 1 + 1e-5
    assert found["model_parallel"]["radii"] <= TRAINED  # of 5 inputs, which no axis of the mesh divides


@pytest.mark.slow
@backend_is("jax")
def test_two_processes_of_jax():
    first, second = run("processes.py", processes=2)
    assert first["digest"] == second["digest"]
    assert max(first["losses"], first["weights"], first["radii"]) <= TRAINED  # against one device
    assert first["certified"][1:] == pytest.approx(second["certified"][:-1], abs=TRAINED)  # of inputs that both certify
    for found in (first, second):
        assert found["devices"] == 4
        assert_orthonormal(found["spectrum"])
        assert "Received: num_processes=2" in found["refused"]


@pytest.mark.slow
@backend_is("torch")
def test_ddp():
    reports = run("ddp.py", processes=2)
    for found in reports:
        assert_below(found["values"], ROUNDING)
        for step in ("step_of_keras", "step_of_torch", "centred"):
            trained = found["training"][step]
            assert trained["apart"] == 0
            assert max(trained["losses"], trained["weights"]) <= TRAINED
            assert_orthonormal(trained["spectrum"])
    evaluated = [found["evaluated"] for found in reports]  # by one process, which must not wait for the other
    assert np.isfinite(evaluated[0]).all()
    assert evaluated[1] is None
