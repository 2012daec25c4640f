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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hkr-keras/hkr_keras/blob/main/notebooks/06_explanations_and_counterfactuals.ipynb)
#
# # Explanations and counterfactuals
#
# The score of an HKR network is close to a distance, and its gradient points to the other class along the optimal
# transport between the two. So one step along the gradient answers *what would have to change?* with something people
# can look at.

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
from sklearn.neighbors import KNeighborsClassifier

import hkr_keras as hkr
from hkr_keras.explanations import counterfactual, nearest_adversarial, saliency

plt.rcParams["figure.dpi"] = 150
keras.utils.set_random_seed(0)
data = hkr.datasets.load("digits")

# %% [markdown]
# ## Two classes: zeros into eights
#
# With two classes the score `f` is one number, and the counterfactual is `x - t f(x) grad f(x)` where the gradient
# has norm 1. At `t = 1` the image is about on the boundary, at `t = 2` as far beyond it as it was before.

# %%
train, test = (np.isin(y, (0, 8)) for y in (data.y_train, data.y_test))
x_train, y_train = data.x_train[train], (data.y_train[train] == 8).astype(int)
x_test, y_test = data.x_test[test], (data.y_test[test] == 8).astype(int)


def trained(model, loss, x, y, epochs, rate):
    """The model, after some epochs with a learning rate that falls to 0."""
    steps = epochs * -(-len(x) // 32)
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.Adam(schedule), loss=loss)
    model.fit(x, y, epochs=epochs, verbose=0)
    return model


zero_or_eight = trained(
    hkr.models.lipschitz_mlp((8, 8, 1), 1, widths=(128, 64)),
    hkr.losses.HKR(alpha=10, margin=0.5),
    x_train,
    y_train,
    epochs=60,
    rate=1e-2,
)
certificate = hkr.certify(zero_or_eight, x_test, verbose=0)
print(f"accuracy {certificate.accuracy(y_test):.1%}, mean certified radius {certificate.mean_radius(y_test):.2f}")

# %%
shown = np.concatenate([np.flatnonzero(y_test == 0)[:5], np.flatnonzero(y_test == 1)[:5]])
steps = (0.0, 1.0, 2.0, 3.0)
rows = [counterfactual(zero_or_eight, x_test[shown], t=t, clip=(0, 1)) for t in steps]
titles = [[f"f = {score:.2f}" for score in zero_or_eight.predict(row, verbose=0)[:, 0]] for row in rows]
hkr.plotting.plot_image_rows(rows, titles, names=[f"t = {t:g}" for t in steps])
plt.show()

# %% [markdown]
# The gradient itself says which pixels count as an eight (blue) and which as a zero (red): the middle of the image,
# of course. Its norm is close to 1 everywhere, as it is for the best function.

# %%
gradient = saliency(zero_or_eight, x_test[shown], target=1)
norms = np.linalg.norm(gradient.reshape(len(gradient), -1), axis=1)
hkr.plotting.plot_image_rows([gradient], [[f"norm {n:.2f}" for n in norms]], names=["gradient"], symmetric=True)
plt.show()

# %% [markdown]
# Is the size of the score a distance? The nearest change along the gradient is never nearer than the certified
# radius, and not much farther.

# %%
adversarial = nearest_adversarial(zero_or_eight, x_test)
distance = np.linalg.norm((adversarial - x_test).reshape(len(x_test), -1), axis=1)
found = np.isfinite(distance)
print(f"found for {found.mean():.0%}; no distance is below its radius: {(distance >= certificate.radius)[found].all()}")
print(f"radius over distance: median {np.median((certificate.radius / distance)[found]):.2f}")

# %% [markdown]
# ## Ten classes
#
# For logits the step follows `f_target - f_predicted`. Each column takes a digit to the next class.

# %%
ten = trained(
    hkr.models.lipschitz_mlp((8, 8, 1), 10, widths=(256, 128)),
    hkr.losses.MulticlassHKR(alpha=20, margin=0.5),
    data.x_train,
    data.y_train,
    epochs=30,
    rate=1e-2,
)
print(f"accuracy {hkr.certify(ten, data.x_test, verbose=0).accuracy(data.y_test):.1%}")

# %%
prediction = ten.predict(data.x_test, verbose=0).argmax(axis=1)
right = prediction == data.y_test
shown = np.array([np.flatnonzero(right & (data.y_test == digit))[0] for digit in np.unique(data.y_test[right])])
target = (data.y_test[shown] + 1) % 10
steps = (0.0, 1.0, 2.0, 4.0)
rows = [counterfactual(ten, data.x_test[shown], target, t=t, clip=(0, 1)) for t in steps]
titles = [[f"is {c}" for c in ten.predict(row, verbose=0).argmax(axis=1)] for row in rows]
titles[0] = [f"{c} to {other}" for c, other in zip(data.y_test[shown], target, strict=True)]
hkr.plotting.plot_image_rows(rows, titles, names=[f"t = {t:g}" for t in steps])
plt.show()

# %% [markdown]
# ## Beside an ordinary network
#
# A convolutional network with ReLU and cross-entropy, which classifies as well. On 8 x 8 pixels its gradients mean
# something too, so pictures alone decide little, and we count. Who says that a counterfactual shows the target? A
# judge who has seen neither network: the five nearest neighbours among the training images. And how far is the
# nearest change?

# %%
layers = [keras.Input((8, 8, 1))]
layers += [keras.layers.Conv2D(32, 3, padding="same", activation="relu") for _ in range(2)]
layers += [keras.layers.Flatten(), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
ordinary = trained(
    keras.Sequential(layers),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    data.x_train,
    data.y_train,
    epochs=15,
    rate=1e-3,
)
judge = KNeighborsClassifier(5).fit(data.x_train.reshape(-1, 64), data.y_train)
target = (data.y_test + 1) % 10
for name, model in {"HKR": ten, "ordinary": ordinary}.items():
    accuracy = np.mean(model.predict(data.x_test, verbose=0).argmax(axis=1) == data.y_test)
    moves = nearest_adversarial(model, data.x_test, clip=(0, 1)) - data.x_test
    away = np.nanmedian(np.linalg.norm(moves.reshape(len(moves), -1), axis=1))
    print(f"{name}: accuracy {accuracy:.1%}, median distance of the nearest change {away:.2f}")
    for t in (2.0, 3.0, 4.0):
        images = counterfactual(model, data.x_test, target, t=t, clip=(0, 1))
        agreed = np.mean(judge.predict(images.reshape(-1, 64)) == target)
        print(f"    t = {t:g}: the judge sees the target in {agreed:.1%}")

# %%
rows = [counterfactual(model, data.x_test[shown], target[shown], t=3.0, clip=(0, 1)) for model in (ten, ordinary)]
hkr.plotting.plot_image_rows([data.x_test[shown], *rows], names=["input", "HKR,\nt = 3", "ordinary,\nt = 3"])
plt.show()
