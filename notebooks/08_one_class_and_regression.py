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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hkr-keras/hkr_keras/blob/main/notebooks/08_one_class_and_regression.ipynb)
#
# # One class, and regression
#
# Two uses of a constant of 1 beyond classification: a score that is a signed distance to the data, for outliers, and
# predictions with an interval that no small change of the input leaves.

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
from sklearn.datasets import load_diabetes

import hkr_keras as hkr

plt.rcParams["figure.dpi"] = 150


def one_class(x, widths, margin, epochs, box=None, batch_size=64):
    """A score trained on one class against uniform outliers."""
    keras.utils.set_random_seed(0)
    model = hkr.models.lipschitz_mlp(x.shape[1:], 1, widths)
    steps = epochs * -(-2 * len(x) // batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, steps)
    model.compile(keras.optimizers.Adam(schedule), loss=hkr.losses.HKR(alpha=100, margin=margin))
    hkr.oneclass.fit(model, x, epochs, box=box, batch_size=batch_size)
    return model


# %% [markdown]
# ## Outliers in the plane
#
# The moons are one class now. Outliers are drawn anew in every epoch, uniformly in a box around the data.

# %%
moons = hkr.datasets.load("moons")
model = one_class(moons.x_train, (64, 64, 32), margin=0.05, epochs=60)
low, high = hkr.oneclass.surrounding_box(moons.x_train)
outliers = np.random.default_rng(1).uniform(low, high, (500, 2)).astype("float32")
points = np.concatenate([moons.x_test, outliers])
labels = np.repeat([1, 0], [len(moons.x_test), len(outliers)])
hkr.plotting.plot_field(model, points, labels, circles=0, names=["outlier", "data"])
plt.show()

# %% [markdown]
# The area under the ROC curve says how well the score ranks data before outliers. The *certified* area is what is
# left when an adversary moves every single point by epsilon, all for the worse.

# %%
for epsilon in (0.0, 0.02, 0.05, 0.1):
    area = hkr.certify_outputs(model, points, epsilon, verbose=0).auroc(labels)
    print(f"epsilon {epsilon:<5} certified AUROC {area:.3f}")

# %% [markdown]
# ## Outliers among digits
#
# Trained on zeros alone, against uniform noise. How well does the score tell zeros from all other digits, which it
# has never seen?

# %%
digits = hkr.datasets.load("digits")
box = np.zeros((8, 8, 1)), np.ones((8, 8, 1))
zeros = digits.x_train[digits.y_train == 0]
zero = one_class(zeros, (128, 128, 64), margin=0.3, epochs=40, box=box, batch_size=32)
is_zero = (digits.y_test == 0).astype(int)
for epsilon in (0.0, 0.1, 0.25):
    area = hkr.certify_outputs(zero, digits.x_test, epsilon, verbose=0).auroc(is_zero)
    print(f"epsilon {epsilon:<5} certified AUROC {area:.3f}")

score = zero.predict(digits.x_test, verbose=0)[:, 0]
order = np.argsort(score)
shown = np.concatenate([order[::-1][:5], order[:5]])
titles = [[f"f = {value:.2f}" for value in score[shown]]]
hkr.plotting.plot_image_rows([digits.x_test[shown]], titles, names=["most and\nleast zero"])
plt.show()

# %% [markdown]
# Uniform noise is far from every digit, so it says little about the shape of the class: for an easy class that is
# enough, for others less.

# %%
for digit in (1, 8):
    other = one_class(digits.x_train[digits.y_train == digit], (128, 128, 64), 0.3, epochs=40, box=box, batch_size=32)
    interval = hkr.certify_outputs(other, digits.x_test, 0.0, verbose=0)
    print(f"digit {digit}: AUROC {interval.auroc((digits.y_test == digit).astype(int)):.3f}")

# %% [markdown]
# ## Regression with intervals
#
# The progress of diabetes from ten measurements (each of standard deviation 1 here; the target too). A 1-Lipschitz
# network, scaled to a constant of 2, cannot follow noise, and `certify_outputs` gives the interval in which the
# prediction stays when the measurements are off by up to epsilon.

# %%
patients = load_diabetes()
x = ((patients.data - patients.data.mean(0)) / patients.data.std(0)).astype("float32")
y = ((patients.target - patients.target.mean()) / patients.target.std()).astype("float32")
x_train, y_train, x_test, y_test = x[:330], y[:330], x[330:], y[330:]
keras.utils.set_random_seed(0)
regression = hkr.models.lipschitz_mlp((10,), 1, (64, 32))
regression.add(hkr.layers.Scale(2.0))
regression.compile(keras.optimizers.Adam(3e-3), loss="mse")
regression.fit(x_train, y_train, epochs=40, verbose=0)
interval = hkr.certify_outputs(regression, x_test, epsilon=0.1, verbose=0)
explained = 1 - np.mean((interval.value[:, 0] - y_test) ** 2) / np.var(y_test)
print(f"explained variance {explained:.2f}, proven constant {interval.bound:.3f}")
print(f"half width at epsilon = 0.1: {np.mean(interval.upper - interval.lower) / 2:.3f} standard deviations")

# %%
order = np.argsort(interval.value[:, 0])
fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.fill_between(
    np.arange(len(order)),
    interval.lower[order, 0],
    interval.upper[order, 0],
    color="#2f74c0",
    alpha=0.3,
    linewidth=0,
    label="prediction, inputs off by up to 0.1",
)
ax.plot(interval.value[order, 0], color="#2f74c0", linewidth=1.5, label="prediction")
ax.plot(y_test[order], "o", color="#d9622b", markersize=3, label="truth")
ax.set(xlabel="patients, in the order of their prediction", ylabel="progress (standardised)")
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
plt.show()
