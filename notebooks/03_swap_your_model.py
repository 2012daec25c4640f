# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hkr-keras/hkr_keras/blob/main/notebooks/03_swap_your_model.ipynb)
#
# # Swap your model: certified in three lines, shipped in two
#
# You have a Keras model and its weights. `to_lipschitz` swaps its layers for ones with a Lipschitz constant of at most
# 1 and moves the trained kernels to the nearest orthonormal ones. A few epochs later every prediction has a
# certificate, and what you ship is plain Keras again, or ONNX.

# %%
import importlib.util
import os

if importlib.util.find_spec("hkr_keras") is None:
    place = "git+https://github.com/hkr-keras/hkr_keras"
    if os.path.exists("../setup.cfg"):  # in a clone
        place = "file://" + os.path.abspath("..")
    # %pip install --quiet "hkr_keras[plots,sklearn] @ {place}" keras-tuner

# %%
os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", or "torch"

import pathlib
import tempfile

import keras
import matplotlib.pyplot as plt
import numpy as np

import hkr_keras as hkr

plt.rcParams["figure.dpi"] = 150
keras.utils.set_random_seed(0)
data = hkr.datasets.load("digits")
layers = keras.layers

# %% [markdown]
# ## The model you have
#
# An ordinary network: convolutions, batch normalisation, ReLU, a softmax.

# %%
plain = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        *(layers.Conv2D(32, 3, padding="same"), layers.BatchNormalization(), layers.ReLU()),
        *(layers.Conv2D(32, 3, padding="same", activation="relu"), layers.AveragePooling2D(2)),
        *(layers.Conv2D(64, 3, padding="same", activation="relu"), layers.Flatten()),
        *(layers.Dense(128, activation="relu"), layers.Dense(10, activation="softmax")),
    ],
    name="plain",
)
plain.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
plain.fit(data.x_train, data.y_train, epochs=15, verbose=0)
print(f"accuracy {plain.evaluate(data.x_test, data.y_test, verbose=0)[1]:.1%}")
print(f"Lipschitz constant at most {hkr.lipschitz_bound(plain):,.0f}")

# %% [markdown]
# The bound is finite, and useless: with such a constant no certificate is visible.
#
# ## Three lines
#
# The table says what became of every layer. The softmax is dropped, since certificates are about logits; the report
# ends with what is left to do.


# %%
def train(model, epochs):
    """A few epochs with HKR; the callback polishes the kernels at the end."""
    schedule = keras.optimizers.schedules.CosineDecay(0.03, decay_steps=epochs * 43)
    model.compile(hkr.optimizers.StiefelMuon(schedule), loss=hkr.losses.MulticlassHKR(alpha=100, margin=0.45))
    model.fit(data.x_train, data.y_train, epochs=epochs, verbose=0, callbacks=[hkr.callbacks.Orthonormalize()])
    return hkr.certify(model, data.x_test, verbose=0)


robust = hkr.to_lipschitz(plain)
certificate = train(robust, epochs=3)
print(f"accuracy {certificate.accuracy(data.y_test):.1%}, at 0.25 {certificate.accuracy(data.y_test, 0.25):.1%}")

# %% [markdown]
# ## What the old weights are worth
#
# Three more runs to compare with: the conversion alone, with ReLU kept and no training at all (biases, batch means and
# sums are scaled along with the kernels, so that most inputs keep their class); the same network from scratch; and
# orthogonal convolutions, which waste nothing where windows overlap but start from new weights.

# %%
kept = hkr.to_lipschitz(plain, activation=None, print_fn=None)
fresh = keras.models.clone_model(robust)
orthogonal = hkr.to_lipschitz(plain, replace={layers.Conv2D: hkr.layers.OrthogonalConv2D}, print_fn=None)
epochs = 3
curves = {
    "converted, not trained": hkr.certify(kept, data.x_test, verbose=0),
    "from scratch": train(fresh, epochs),
    "converted and trained": certificate,
    "converted to OrthogonalConv2D and trained": train(orthogonal, epochs),
}
colors = ["#999999", "#d9622b", "#2f74c0", "#2a8f5b"]
fig, ax = plt.subplots(figsize=(7, 4.3), layout="constrained")
for (label, found), color in zip(curves.items(), colors, strict=True):
    hkr.plotting.plot_certified_accuracy(found, data.y_test, ax=ax, label=label, color=color, marks=(), fill=False)
    print(
        f"{label:42} clean {found.accuracy(data.y_test):.1%}   at 0.25 {found.accuracy(data.y_test, 0.25):.1%}"
        f"   mean radius {found.mean_radius(data.y_test):.3f}"
    )
ax.legend(frameon=False)
ax.set_title(f"digits: {epochs} epochs, {len(data.x_test)} test images", fontsize=11)
plt.show()

# %% [markdown]
# ## Two lines to ship it
#
# `to_keras` gives back plain Keras layers with the same outputs: the file loads where this package is not installed.
# `hkr.export(model, "net.onnx")` writes ONNX, LiteRT or a SavedModel in the same way, and beside it a
# certificate: the constants that turn outputs into radii wherever the file runs.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
shipped = hkr.to_keras(orthogonal)
shipped.save(folder / "robust.keras")

difference = np.abs(shipped.predict(data.x_test, verbose=0) - orthogonal.predict(data.x_test, verbose=0)).max()
print(f"largest difference of outputs: {difference:.1e}")
print("layers:", ", ".join(dict.fromkeys(type(layer).__name__ for layer in shipped.layers)))

# %% [markdown]
# ## Which layers, which loss? Let a tuner choose
#
# The metric `CertifiedAccuracy` can be the objective of KerasTuner. Only `val_certified_accuracy` matters, so the tuner
# trades accuracy for radius by itself.

# %%
import keras_tuner


def build(choices):
    model = hkr.to_lipschitz(plain, replace={layers.Conv2D: hkr.layers.OrthogonalConv2D}, print_fn=None)
    alpha, margin = choices.Choice("alpha", [10.0, 50.0, 200.0]), choices.Choice("margin", [0.2, 0.5])
    model.compile(
        hkr.optimizers.StiefelMuon(choices.Float("learning_rate", 1e-3, 3e-2, sampling="log")),
        loss=hkr.losses.MulticlassHKR(alpha, margin),
        metrics=[hkr.metrics.CertifiedAccuracy(epsilon=0.25)],
    )
    return model


tuner = keras_tuner.RandomSearch(
    build,
    objective=keras_tuner.Objective("val_certified_accuracy", "max"),
    max_trials=4,
    seed=0,
    directory=folder,
)
tuner.search(
    *(data.x_train[:1000], data.y_train[:1000]),
    validation_data=(data.x_train[1000:], data.y_train[1000:]),
    epochs=3,
    callbacks=[hkr.callbacks.Orthonormalize()],
    verbose=0,
)
for trial in sorted(tuner.oracle.trials.values(), key=lambda trial: -trial.score):
    print(f"{trial.score:.3f}", {name: round(value, 4) for name, value in trial.hyperparameters.values.items()})
