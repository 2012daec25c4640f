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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hkr-keras/hkr_keras/blob/main/notebooks/01_quickstart.ipynb)
#
# # Quick start: a classifier with a guarantee
#
# We train a network whose output cannot change by more than its input moved. Every prediction then comes with a
# **certificate**: a radius within which no attack can alter it. It takes about a minute on a laptop.

# %%
import importlib.util
import os

if importlib.util.find_spec("hkr_keras") is None:
    place = "git+https://github.com/hkr-keras/hkr_keras"
    if os.path.exists("../setup.cfg"):  # in a clone
        place = "file://" + os.path.abspath("..")
    # %pip install --quiet "hkr_keras[plots,sklearn] @ {place}"

# %%
os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", or "torch"

import keras
import matplotlib.pyplot as plt
import numpy as np

import hkr_keras as hkr

plt.rcParams["figure.dpi"] = 150
keras.utils.set_random_seed(0)
data = hkr.datasets.load("digits")  # 1,797 handwritten digits, 8 x 8 pixels in [0, 1]

fig, axes = plt.subplots(1, 10, figsize=(10, 1.3), layout="constrained")
for ax, image, label in zip(axes, data.x_test, data.y_test, strict=False):
    ax.imshow(image[..., 0], cmap="gray_r")
    ax.set_title(label, fontsize=10)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Build and train
#
# The layers are Keras's own, with kernels kept orthonormal: the optimizer step is followed by one cheap projection.
# `GroupSort` takes the place of ReLU, since it keeps the norm of gradients. The loss is HKR: a hinge that asks for a
# margin, and a Kantorovich-Rubinstein term that pushes the classes as far apart as a 1-Lipschitz network can.

# %%
model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Flatten(),
        hkr.layers.LipschitzDense(256),
        hkr.layers.GroupSort(2),
        hkr.layers.LipschitzDense(128),
        hkr.layers.GroupSort(2),
        hkr.layers.LipschitzDense(64),
        hkr.layers.GroupSort(2),
        hkr.layers.LipschitzDense(10, kernel_constraint=hkr.constraints.UnitNorm()),
    ]
)
epochs = 30
schedule = keras.optimizers.schedules.CosineDecay(1e-2, decay_steps=epochs * 43)
model.compile(
    keras.optimizers.Adam(schedule),
    loss=hkr.losses.MulticlassHKR(alpha=100, margin=0.45),
    metrics=[hkr.metrics.Accuracy(), hkr.metrics.CertifiedAccuracy(epsilon=0.25)],
)
history = model.fit(data.x_train, data.y_train, epochs=epochs, verbose=0, callbacks=[hkr.callbacks.Orthonormalize()])
print({name: round(values[-1], 3) for name, values in history.history.items()})

# %% [markdown]
# ## Check the guarantee
#
# Nothing is taken on trust: the bound is computed in float64 from the stored weights. The head has norm-1 columns, so
# each logit is 1-Lipschitz by itself while the vector of all ten may have a constant above 1.

# %%
summary = hkr.lipschitz_summary(model)

# %% [markdown]
# ## Certify
#
# `certify` uses the real last layer: the difference of two logits cannot change faster than the distance of their
# weight vectors.

# %%
certificate = hkr.certify(model, data.x_test, verbose=0)
print(f"clean accuracy              {certificate.accuracy(data.y_test):.1%}")
for epsilon in (0.1, 0.25, 0.5):
    print(f"certified accuracy at {epsilon:<5} {certificate.accuracy(data.y_test, epsilon):.1%}")
print(f"mean certified radius       {certificate.mean_radius(data.y_test):.3f}")

hkr.plotting.plot_certified_accuracy(certificate, data.y_test)
plt.show()

# %% [markdown]
# Which digits are safe? A row for each: right predictions above the line, wrong ones below it.

# %%
hkr.plotting.plot_radii(certificate, data.y_test)
plt.show()

# %% [markdown]
# The safest and the most fragile correct predictions, with their radii: doubtful handwriting has a small one.

# %%
correct = np.flatnonzero(certificate.is_correct(data.y_test))
order = correct[np.argsort(certificate.radius[correct])]
fig, axes = plt.subplots(2, 8, figsize=(9, 2.9), layout="constrained")
for row, indices in zip(axes, (order[-8:][::-1], order[:8]), strict=True):
    for ax, i in zip(row, indices, strict=True):
        ax.imshow(data.x_test[i, ..., 0], cmap="gray_r")
        ax.set_title(f"{certificate.prediction[i]}   r = {certificate.radius[i]:.2g}", fontsize=9)
        ax.axis("off")
plt.show()

# %% [markdown]
# ## Two classes in the plane
#
# For two classes one score is enough: its sign is the class, and its size a distance that no attack can bridge. The
# circles are certificates of single points.

# %%
moons = hkr.datasets.load("moons")
binary = hkr.models.lipschitz_mlp((2,), 1)
epochs = 40
binary.compile(
    keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, decay_steps=epochs * 20)),
    loss=hkr.losses.HKR(alpha=10, margin=0.3),
)
binary.fit(moons.x_train, moons.y_train, batch_size=25, epochs=epochs, verbose=0)
hkr.plotting.plot_field(binary, moons.x_test, moons.y_test, names=["upper moon", "lower moon"])
plt.show()

# %% [markdown]
# ## Keep it
#
# A saved model loads with plain Keras once `hkr_keras` is imported, and certifies the same.

# %%
model.save("digits.keras")
again = keras.models.load_model("digits.keras")
print(np.array_equal(hkr.certify(again, data.x_test, verbose=0).radius, certificate.radius))
os.remove("digits.keras")
