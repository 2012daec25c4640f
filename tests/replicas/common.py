"""What the programs of this folder share: a small network, its data, and what is measured of it."""

import json
import sys

import keras
import numpy as np
from keras import ops

import hkr_keras as hkr

SIZE = 6  # of the images
BATCH = 16
generator = np.random.default_rng(0)
X = generator.normal(size=(2 * BATCH, SIZE, SIZE, 1)).astype("float32")
# Sorted by class within each batch: a replica sees one class only, or 3 of one and 5 of the other.
Y = np.array(([0] * 8 + [1] * 8) + ([0] * 3 + [1] * 13), dtype="int32")

# Six and two samples of three classes, the last class in one part only, with weights.
PARTS = (slice(0, 6), slice(6, 8))
LABELS = np.array([0, 1, 1, 0, 1, 0, 2, 2], dtype="int32")
LOGITS = generator.normal(size=(8, 3)).astype("float32")
WEIGHTS = np.array([1.0, 0.5, 2.0, 1.0, 3.0, 0.25, 1.5, 0.0], dtype="float32")
EVEN = (slice(0, 4), slice(4, 8))

# name: loss, parts, labels, predictions, weights. Hinges are plain means of replicas, so they want equal parts.
CASES = {
    "kr": (hkr.losses.KR, PARTS, LABELS // 2, LOGITS[:, :1], None),
    "kr_weighted": (hkr.losses.KR, PARTS, LABELS // 2, LOGITS[:, :1], WEIGHTS),
    "hkr": (lambda: hkr.losses.HKR(alpha=5, margin=0.5), EVEN, LABELS // 2, LOGITS[:, :1], None),
    "multiclass_kr": (hkr.losses.MulticlassKR, PARTS, LABELS, LOGITS, None),
    "multiclass_kr_weighted": (hkr.losses.MulticlassKR, PARTS, LABELS, LOGITS, WEIGHTS),
    "multiclass_hkr": (lambda: hkr.losses.MulticlassHKR(alpha=5, margin=0.5), EVEN, LABELS, LOGITS, None),
}


def make_model(convolution=True, centering=False, every=1):
    keras.utils.set_random_seed(1)
    layers, turns = hkr.layers, hkr.constraints.Orthonormal(every=every)
    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 1)),
            *([layers.OrthogonalConv2D(4, 2, padding="same", name="conv"), layers.GroupSort(2)] if convolution else []),
            *([layers.BatchCentering(), layers.LipschitzBatchNormalization()] if centering else []),
            keras.layers.Flatten(),
            layers.LipschitzDense(8, kernel_constraint=turns, name="dense"),
            layers.GroupSort(2),
            layers.LipschitzDense(1, kernel_constraint=hkr.constraints.UnitNorm(), name="head"),
        ]
    )


def compiled(model, optimizer, **arguments):
    model.compile(optimizer, hkr.losses.HKR(alpha=5, margin=0.5), metrics=[hkr.metrics.KRDistance()], **arguments)
    return model


def fit(model, epochs=2):
    """Epochs of two steps, without shuffling: the loss of each epoch."""
    callbacks = [hkr.callbacks.Orthonormalize()]
    history = model.fit(X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return history.history["loss"]


def host(value):
    return np.asarray(ops.convert_to_numpy(ops.cast(value, "float32")), dtype="float64")


def weights(model):
    return [host(weight.value) for weight in model.weights]


def difference(first, second):
    """The largest difference between two values, or two lists of them."""
    pairs = zip(keras.tree.flatten(first), keras.tree.flatten(second), strict=True)
    return max(float(np.abs(np.asarray(a, "float64") - np.asarray(b, "float64")).max()) for a, b in pairs)


def spectrum(model):
    """The smallest and the largest singular value of all constrained weights, float64."""
    values = []
    for _, weight, geometry in hkr.geometry.model_kernels(model):
        matrices = geometry.gain * host(geometry.to_matrices(ops.convert_to_tensor(weight.value)))
        values.append(np.linalg.svd(matrices, compute_uv=False).ravel())
    return [float(np.concatenate(values).min()), float(np.concatenate(values).max())]


def report(**found):
    """The last line of the output, which the test reads."""
    sys.stdout.flush()
    print(json.dumps(found), flush=True)
