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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hkr-keras/hkr_keras/blob/main/notebooks/05_wasserstein_distance.ipynb)
#
# # The Wasserstein distance, from below
#
# How far are two samples apart? The Wasserstein-1 distance is the least work that moves one onto the other. By the
# duality of Kantorovich and Rubinstein it is also the largest difference of means that a 1-Lipschitz function can
# make. So the mean difference of *any* network, divided by its proven constant, is a lower bound, and training makes
# it tight.

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

import functools

import keras
import matplotlib.pyplot as plt
import numpy as np

import hkr_keras as hkr
from hkr_keras.transport import wasserstein1

plt.rcParams["figure.dpi"] = 150

# %% [markdown]
# ## Two distributions in the plane

# %%
rng = np.random.default_rng(0)
x = rng.normal(size=(300, 2)).astype("float32")
y = (rng.normal(size=(300, 2)) * [0.5, 1.5] + [3.0, 1.0]).astype("float32")
print(f"exact distance: {wasserstein1(x, y):.4f}")


def estimates(x, y, widths, epochs, rate, optimizer=keras.optimizers.Adam):
    """The estimates while a network trains on all points at once, and the network."""
    keras.utils.set_random_seed(0)
    points, labels = np.concatenate([x, y]), np.repeat([1, 0], [len(x), len(y)])
    model = hkr.models.lipschitz_mlp(x.shape[1:], 1, widths)
    model.compile(optimizer(keras.optimizers.schedules.CosineDecay(rate, epochs * 20)), hkr.losses.KR())
    tiled, found = np.tile(points, (20,) + (1,) * (points.ndim - 1)), []
    for _ in range(epochs):
        model.fit(tiled, np.tile(labels, 20), batch_size=len(points), shuffle=False, verbose=0)
        means = [model.predict(sample, verbose=0, batch_size=512).astype("float64").mean() for sample in (x, y)]
        found.append((means[0] - means[1]) / hkr.lipschitz_bound(model))
    return np.array(found), model


def show(found, exact):
    """The estimates beside the exact distance."""
    _, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    ax.axhline(exact, color="#222222", linewidth=1, label="exact")
    ax.plot(20 * np.arange(1, len(found) + 1), found, color="#2f74c0", linewidth=2, label="network / proven constant")
    ax.set(xlabel="training step", ylabel="Wasserstein-1 distance", ylim=(0.9 * found.min(), 1.02 * exact))
    ax.legend(loc="lower right", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    plt.show()
    print(f"{found[-1]:.4f} of {exact:.4f}: {found[-1] / exact:.2%}, and never above: {(found <= exact).all()}")


# %%
found, model = estimates(x, y, (64, 64, 32), epochs=40, rate=2e-2)
show(found, wasserstein1(x, y))

# %% [markdown]
# The network is a potential: its level lines cross the way of the transport at right angles. Only differences of scores
# have a meaning here, since the loss does not change when a constant is added.

# %%
labels = np.repeat([1, 0], [len(x), len(y)])
hkr.plotting.plot_field(model, np.concatenate([x, y]), labels, circles=0, names=["y", "x"], boundary=False)
plt.show()

# %% [markdown]
# ## Zeros and eights
#
# In 64 dimensions a sample is thin: hardly any two images are close, and the best function has to fit every single
# one. With Adam a network takes long to come close. `StiefelMuon`, which turns kernels along the orthonormal matrices,
# comes close in a few hundred steps: here it turns all rows of a kernel at once, by `block=None`.

# %%
data = hkr.datasets.load("digits")
zeros, eights = (data.x_train[data.y_train == digit] for digit in (0, 8))
exact = wasserstein1(zeros, eights)
for name, optimizer, rate in (
    ("Adam", keras.optimizers.Adam, 5e-3),
    ("StiefelMuon", functools.partial(hkr.optimizers.StiefelMuon, block=None), 2e-2),
):
    widths, epochs = (256,) * 6, 20
    found, _ = estimates(zeros, eights, widths, epochs, rate, optimizer)
    print(f"{name}, widths {widths}:")
    show(found, exact)
