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

PROGRAMS = Path(__file__).parent / "replicas"
ROUNDING = 2e-6  # sums of float32 in another order; losses and gradients are below 10
TRAINED = 2e-5  # the same after four steps
NORM = 1 + 4e-7  # what float32 leaves of a norm of 1
EVENLY = 1 - 1e-6  # the smallest singular value of a polished kernel


def backend_is(name):
    return pytest.mark.skipif(keras.backend.backend() != name, reason=f"replicas of {name}")


def run(program, processes=1, timeout=120):
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
            process.wait()
    return reports


def assert_orthonormal(spectrum):
    assert EVENLY <= spectrum[0] <= spectrum[1] <= NORM


def assert_below(found, limit):
    assert max(found.values()) <= limit, found


@pytest.fixture(scope="module")
def mirrored():
    return run("mirrored.py")[0]


@backend_is("tensorflow")
def test_mirrored_losses_and_gradients(mirrored):
    assert_below(mirrored["values"], ROUNDING)


@backend_is("tensorflow")
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_mirrored_training(mirrored, optimizer):
    found = mirrored[optimizer]
    assert found["start"] == found["apart"] == 0
    assert found["losses"] <= ROUNDING
    assert found["evaluate"] <= TRAINED  # the loss and KRDistance, whose state is summed over replicas
    assert found["weights"] <= TRAINED
    assert_orthonormal(found["spectrum"])


@backend_is("tensorflow")
def test_mirrored_parts_of_unequal_size(mirrored):
    assert mirrored["uneven"] <= TRAINED


@backend_is("tensorflow")
def test_mirrored_copies_of_moving_means_stay_equal(mirrored):
    assert mirrored["centred"] == 0


@backend_is("tensorflow")
def test_mirrored_half_precision(mirrored):
    optimizer, apart, spectrum = mirrored["half_precision"]
    assert optimizer == "LossScaleOptimizer"
    assert apart == 0
    assert_orthonormal(spectrum)


@backend_is("tensorflow")
def test_mirrored_models_certify_inside_and_outside_the_scope(mirrored):
    assert max(mirrored["certificates"]) <= TRAINED


@pytest.fixture(scope="module")
def sharded():
    return run("sharded.py")[0]


@backend_is("jax")
def test_sharded_losses_and_gradients(sharded):
    assert_below(sharded["values"], ROUNDING)


@backend_is("jax")
@pytest.mark.parametrize(("name", "part"), [("data_parallel", 1), ("model_parallel", 0.5)])
def test_sharded_training(sharded, name, part):
    found = sharded[name]
    assert (found["devices"], found["part"], found["apart"]) == (4, part, 0)
    assert max(found["losses"], found["evaluate"], found["weights"]) <= TRAINED
    assert_orthonormal(found["spectrum"])
    assert found["bound"] <= 1 + 1e-5


@backend_is("jax")
def test_sharded_models_certify_batches_that_the_devices_do_not_divide(sharded):
    assert sharded["model_parallel"]["radii"] <= TRAINED


@backend_is("jax")
def test_two_processes_of_jax():
    first, second = run("processes.py", processes=2)
    assert first["digest"] == second["digest"]
    for found in (first, second):
        assert found["devices"] == 4
        assert max(found["losses"], found["weights"], found["radii"]) <= TRAINED
        assert_orthonormal(found["spectrum"])
        assert "Received: num_processes=2" in found["refused"]


@pytest.fixture(scope="module")
def ddp():
    return run("ddp.py", processes=2)


@backend_is("torch")
def test_ddp_losses_and_gradients(ddp):
    for report in ddp:
        assert_below(report["values"], ROUNDING)


@backend_is("torch")
@pytest.mark.parametrize("step", ["step_of_keras", "step_of_torch"])
def test_ddp_training(ddp, step):
    for report in ddp:
        found = report["training"][step]
        assert found["apart"] == 0
        assert max(found["losses"], found["weights"]) <= TRAINED
        assert_orthonormal(found["spectrum"])


@backend_is("torch")
def test_ddp_evaluation_by_one_process(ddp):
    assert np.isfinite(ddp[0]["evaluated"]).all()
    assert ddp[1]["evaluated"] is None
