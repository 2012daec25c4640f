"""JAX: one of two processes (`process`, `port`) that form one mesh over gloo; two devices each."""

import os
import sys

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # they only cost time here

import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")

import common
import keras
import numpy as np

import hkr_keras as hkr

PROCESS, PORT = map(int, sys.argv[1:3])
keras.distribution.initialize(f"127.0.0.1:{PORT}", num_processes=2, process_id=PROCESS)
assert (jax.device_count(), jax.local_device_count()) == (4, 2)


def results(rows, batch_size):
    model = common.compiled(common.make_model(convolution=False), hkr.optimizers.StiefelMuon(0.02))
    callbacks = [hkr.callbacks.Orthonormalize()]
    arguments = {"batch_size": batch_size, "epochs": 2, "shuffle": False, "verbose": 0, "callbacks": callbacks}
    losses = model.fit(common.X[rows], common.Y[rows], **arguments).history["loss"]
    return model, losses, common.weights(model)


# On one device, in the first process only: both must end with the same numbers.
alone = results(slice(None), common.BATCH) if PROCESS == 0 else None
keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
half = common.BATCH // 2  # of every batch: what this process feeds
rows = np.concatenate([np.arange(half) + start + PROCESS * half for start in range(0, len(common.X), common.BATCH)])
model, losses, weights = results(rows, half)
spectrum, devices = common.spectrum(model), len(model.weights[0].value.sharding.device_set)
try:
    hkr.certify(model, common.X[:4], verbose=0)
    refused = ""
except ValueError as error:
    refused = str(error)
# The weights are whole in every process: a copy of its own certifies its share of the inputs.
keras.distribution.set_distribution(None)
local = keras.models.clone_model(model)
local.set_weights(model.get_weights())
share = common.X[PROCESS : PROCESS + 3]
found = hkr.certify(local, share, verbose=0).radius
compared = {}
if alone:
    reference, *expected = alone
    compared = {"losses": common.difference(losses, expected[0]), "weights": common.difference(weights, expected[1])}
    compared["radii"] = common.difference(found, hkr.certify(reference, share, verbose=0).radius)
common.report(
    devices=devices,
    digest=[*losses, *(float(np.abs(weight).sum()) for weight in weights)],
    spectrum=spectrum,
    certified=found.tolist(),
    refused=refused,
    **compared,
)
