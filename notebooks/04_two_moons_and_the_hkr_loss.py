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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hkr-keras/hkr_keras/blob/main/notebooks/04_two_moons_and_the_hkr_loss.ipynb)
#
# # Two moons and the HKR loss
#
# `HKR(alpha, margin)` is `alpha * mean(relu(margin - y f)) - (mean of f on class 1 - mean of f on class 0)`. The
# second part, Kantorovich-Rubinstein, pushes the classes apart; the hinge asks for every point to be on its side, a
# margin away. Here is what each of them does, and how far training is from the best that any 1-Lipschitz function can
# reach.

# %%
import importlib.util
import os

if importlib.util.find_spec("hkr_keras") is None:
    place = "git+https://github.com/hkr-keras/hkr_keras"
    if os.path.exists("../setup.cfg"):  # in a clone
        place = "file://" + os.path.abspath("..")
    # %pip install --quiet "hkr_keras[plots,sklearn,transport] @ {place}"

# %%
os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", or "torch"

import keras
import matplotlib.pyplot as plt
import numpy as np

import hkr_keras as hkr
from hkr_keras.transport import hkr_optimum

plt.rcParams["figure.dpi"] = 150
data = hkr.datasets.load("moons")
x, y = data.x_train[:200], data.y_train[:200]
MOONS = ["upper moon", "lower moon"]


def trained(loss, epochs=60, rate=2e-2):
    """A network after full-batch training on 200 points, 20 steps an epoch."""
    keras.utils.set_random_seed(0)
    model = hkr.models.lipschitz_mlp((2,), 1, widths=(64, 64, 64, 32))
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, 20 * epochs)), loss=loss)
    polish = hkr.callbacks.Orthonormalize(every="train_end")
    tiled = np.tile(x, (20, 1)), np.tile(y, 20)
    model.fit(*tiled, batch_size=200, epochs=epochs, shuffle=False, verbose=0, callbacks=[polish])
    return model


def figures(model):
    """Accuracy, certified accuracy and mean radius on the test set, in words."""
    certificate = hkr.certify(model, data.x_test, verbose=0)
    values = (
        certificate.accuracy(data.y_test),
        certificate.accuracy(data.y_test, 0.2),
        certificate.mean_radius(data.y_test),
    )
    return "accuracy {:.1%}, certified at 0.2 {:.1%}, mean radius {:.3f}".format(*values)


# %% [markdown]
# ## Kantorovich-Rubinstein alone is no classifier
#
# `KR` measures how far apart the moons are, as the Wasserstein distance, and its level lines follow the transport.
# The loss does not change when a constant is added, so no level is a boundary, and the picture has none. For the
# accuracy one is needed: zero is put midway between the class means. Even so the scores of the classes overlap: what is
# on average far apart need not be separated. HKR keeps most of the distance and puts the boundary between the moons.

# %%
models = {"KR": trained(hkr.losses.KR()), "HKR(10, 0.3)": trained(hkr.losses.HKR(alpha=10, margin=0.3))}
score = models["KR"].predict(x, verbose=0)[:, 0]
bias = models["KR"].layers[-1].bias
bias.assign(bias - (score[y == 0].mean() + score[y == 1].mean()) / 2)
fig, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
for ax, (name, model) in zip(axes, models.items(), strict=True):
    hkr.plotting.plot_field(model, data.x_test, data.y_test, ax, circles=15, names=MOONS, boundary=name != "KR")
    ax.set_title(name)
    print(f"{name}: {figures(model)}")
plt.show()

# %%
bins = np.linspace(-1.5, 1.5, 61)
fig, axes = plt.subplots(1, 2, figsize=(11, 2.8), layout="constrained", sharey=True)
for ax, (name, model) in zip(axes, models.items(), strict=True):
    score = model.predict(data.x_test, verbose=0)[:, 0]
    ax.hist(score[data.y_test == 0], bins, color="#d9622b", alpha=0.7, label=MOONS[0])
    ax.hist(score[data.y_test == 1], bins, color="#2f74c0", alpha=0.7, label=MOONS[1])
    ax.set(title=name, xlabel="score", ylabel="points")
    ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## alpha and margin
#
# A larger `alpha` cares more for points on the wrong side of the margin, a larger `margin` for points that are far:
# with a margin above half the distance of the moons no function can satisfy the hinge, and accuracy pays.

# %%
settings = [(1, 0.1), (1, 0.6), (100, 0.1), (100, 0.6)]
fig, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
grid = {}
for ax, (alpha, margin) in zip(axes.ravel(), settings, strict=False):
    model = grid[alpha, margin] = trained(hkr.losses.HKR(alpha, margin))
    hkr.plotting.plot_field(model, data.x_test, data.y_test, ax, circles=15, names=MOONS)
    ax.set_title(f"alpha = {alpha}, margin = {margin}")
    print(f"alpha {alpha:<4} margin {margin}: {figures(model)}")
plt.show()

# %% [markdown]
# ## How good can it be?
#
# On a finite sample the best loss of *all* 1-Lipschitz functions is the value of a linear programme. No network can
# pass it: a check of the guarantee. And how close it comes is a grade for the architecture and the training.

# %%
for (alpha, margin), model in grid.items():
    loss = float(hkr.losses.HKR(alpha, margin)(y, model.predict(x, verbose=0)))
    best = hkr_optimum(x, y, alpha, margin)
    print(f"alpha {alpha:<4} margin {margin}: loss {loss:8.4f}, optimum {best:8.4f}, above it by {loss - best:.4f}")
