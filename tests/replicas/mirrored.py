"""TensorFlow: `MirroredStrategy` on two logical CPUs, against one device."""

import contextlib

import tensorflow as tf

CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(CPU, [tf.config.LogicalDeviceConfiguration()] * 2)

import common
import keras
import numpy as np

import hkr_keras as hkr

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def value_and_gradient(name, compiled):
    """Of the mean over replicas, against one device: differences of the loss and of its gradient by the predictions."""
    loss, parts, labels, predictions, weights = common.CASES[name]
    loss = loss()

    def step(y, f, w):
        with tf.GradientTape() as tape:
            tape.watch(f)
            value = loss(y, f, w)
        return value, tape.gradient(value, f)

    def part(array):
        if array is None:
            return None
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(array[parts[context.replica_id_in_sync_group]])
        )

    def run(*arguments):
        return strategy.run(step, arguments)

    run = tf.function(run) if compiled else run
    values, gradients = run(part(labels), part(predictions), part(weights))
    value = strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None)
    gradient = np.concatenate(strategy.experimental_local_results(gradients))
    alone = step(*(None if array is None else tf.constant(array) for array in (labels, predictions, weights)))
    return common.difference([value, gradient], list(alone))


def replicas_apart(model):
    """The largest difference between the copies of a variable."""
    copies = [
        [value.numpy() for value in strategy.experimental_local_results(weight.value)] for weight in model.weights
    ]
    assert all(len(values) == 2 for values in copies)
    return max(common.difference(values[0], values[1]) for values in copies)


def train(optimizer, every=1, **arguments):
    with strategy.scope():
        model = common.compiled(common.make_model(every=every), optimizer(), **arguments)
    alone = common.compiled(common.make_model(every=every), optimizer(), **arguments)
    start = common.difference(common.weights(model), common.weights(alone))
    losses, losses_alone = common.fit(model), common.fit(alone)
    evaluated = [each.evaluate(common.X, common.Y, batch_size=common.BATCH, verbose=0) for each in (model, alone)]
    found = {
        "start": start,
        "losses": common.difference(losses, losses_alone),
        "weights": common.difference(common.weights(model), common.weights(alone)),
        "evaluate": common.difference(*evaluated),
        "apart": replicas_apart(model),
        "spectrum": common.spectrum(model),
    }
    return model, alone, found


def uneven_last_batch():
    """Batches of 16 and 5, the latter in parts of 3 and 2: the step of KR is that of one device."""
    models = []
    for scope in (strategy.scope(), contextlib.nullcontext()):
        with scope:
            models.append(common.make_model())
            models[-1].compile(keras.optimizers.SGD(0.1), hkr.losses.KR())
        models[-1].fit(common.X[:21], common.Y[:21], batch_size=common.BATCH, shuffle=False, verbose=0)
    return common.difference(*map(common.weights, models))


def half_precision():
    """Training with `mixed_float16` and its scaled loss: the class of the optimizer, copies, singular values."""
    keras.config.set_dtype_policy("mixed_float16")
    with strategy.scope():
        model = common.compiled(common.make_model(), keras.optimizers.Adam(1e-2))
    common.fit(model, epochs=1)
    keras.config.set_dtype_policy("float32")
    return [type(model.optimizer).__name__, replicas_apart(model), common.spectrum(model)]


values = {name: value_and_gradient(name, compiled=True) for name in common.CASES}
values["eager"] = value_and_gradient("multiclass_kr_weighted", compiled=False)
model, alone, adam = train(lambda: keras.optimizers.Adam(1e-2))
with strategy.scope():
    inside = hkr.certify(model, common.X[:5], batch_size=3, verbose=0)
outside = hkr.certify(model, common.X[:5], batch_size=3, verbose=0)
reference = hkr.certify(alone, common.X[:5], batch_size=3, verbose=0)
certificates = [common.difference(each.radius, reference.radius) for each in (inside, outside)]
_, _, muon = train(lambda: hkr.optimizers.StiefelMuon(0.02, block=4))
_, _, turns = train(lambda: keras.optimizers.Adam(1e-2), every=2)

centred = []  # moments are those of the whole batch: gradients, moving averages and losses as on one device
for scope in (strategy.scope(), contextlib.nullcontext()):
    with scope:
        centred.append(common.compiled(common.make_model(centering=True), keras.optimizers.SGD(0.1)))
    common.fit(centred[-1])
common.report(
    values=values,
    adam=adam,
    muon=muon,
    turns=turns,
    certificates=certificates,
    centred=[replicas_apart(centred[0]), common.difference(*map(common.weights, centred))],
    uneven=uneven_last_batch(),
    half_precision=half_precision(),
)
