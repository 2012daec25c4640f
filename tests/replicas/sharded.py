"""JAX: `DataParallel` and `ModelParallel` on four virtual devices, against one device."""

import os

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # they only cost time here

import common
import jax
import keras
import numpy as np

import hkr_keras as hkr

assert len(jax.devices()) == 4


def data_parallel():
    return keras.distribution.DataParallel(auto_shard_dataset=False)


def model_parallel():
    """Two parts of the batch, and the kernels of dense layers and the factors of convolutions in two parts."""
    mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"])
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*dense.*kernel"] = (None, "model")
    layout[".*dense.*bias"] = ("model",)
    layout[".*conv.*mixing"] = (None, None, None, "model")
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def shards_apart(model):
    """The largest difference between shards that hold the same part of a variable."""
    largest = 0.0
    for weight in model.weights:
        parts = {}
        for shard in weight.value.addressable_shards:
            first = parts.setdefault(str(shard.index), np.asarray(shard.data))
            largest = max(largest, common.difference(first, np.asarray(shard.data)))
    return largest


def values_and_gradients(distribution):
    """All losses and their gradients with the batch in parts, against one device: each in one program."""

    def run(arrays):
        found = {}
        for name, (make, *_) in common.CASES.items():
            loss = make()
            labels, predictions, weights = arrays[name]
            found[name] = jax.value_and_grad(lambda f, y=labels, w=weights, loss=loss: loss(y, f, w))(predictions)
        return found

    arrays = {name: tuple(case[2:]) for name, case in common.CASES.items()}
    alone = jax.jit(run)(arrays)
    keras.distribution.set_distribution(distribution)
    parts = jax.tree.map(
        lambda array: jax.device_put(array, distribution.get_data_layout(array.shape).backend_layout), arrays
    )
    found = jax.jit(run)(parts)
    keras.distribution.set_distribution(None)
    return {
        name: common.difference(*(jax.tree.map(np.asarray, each[name]) for each in (found, alone))) for name in alone
    }


def results(certify=False):
    """Of the same training under the present distribution."""
    model = common.compiled(common.make_model(), hkr.optimizers.StiefelMuon(0.02))
    losses = common.fit(model)
    evaluated = model.evaluate(common.X, common.Y, batch_size=common.BATCH, verbose=0)
    radii = hkr.certify(model, common.X[:5], batch_size=3, verbose=0).radius if certify else []
    return model, {"weights": common.weights(model), "losses": losses, "evaluate": evaluated, "radii": radii}


def compared(distribution, alone, certify=False):
    keras.distribution.set_distribution(distribution)
    model, found = results(certify)
    kernel = next(layer for layer in model.layers if layer.name == "dense").kernel.value
    report = {
        "devices": len(kernel.sharding.device_set),
        "part": kernel.addressable_shards[0].data.size / kernel.size,
        "apart": shards_apart(model),
        "spectrum": common.spectrum(model),
        "bound": hkr.lipschitz_bound(model),
    }
    keras.distribution.set_distribution(None)
    compare = ("weights", "losses", "evaluate", "radii")[: 4 if certify else 3]
    return report | {name: common.difference(found[name], alone[name]) for name in compare}


_, alone = results(certify=True)
common.report(
    values=values_and_gradients(data_parallel()),
    data_parallel=compared(data_parallel(), alone),
    model_parallel=compared(model_parallel(), alone, certify=True),
)
