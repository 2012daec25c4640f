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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hkr-keras/hkr_keras/blob/main/notebooks/07_attack_and_certify.ipynb)
#
# # Attack and certify
#
# A certificate is a lower bound of the robust accuracy: no attack, known or to come, does worse. An attack is an
# upper bound: it shows inputs that are classified differently. The truth is between the two, so **the gap tells how
# good both of them are**. On an ordinary network the gap is everything.

# %%
import importlib.util
import os

if importlib.util.find_spec("hkr_keras") is None:
    place = "git+https://github.com/hkr-keras/hkr_keras"
    if os.path.exists("../setup.cfg"):  # in a clone
        place = "file://" + os.path.abspath("..")
    # %pip install --quiet "hkr_keras[attacks,plots,sklearn] @ {place}"

# %%
os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", or "torch"

import dataclasses

import keras
import matplotlib.pyplot as plt
import numpy as np

import hkr_keras as hkr
from hkr_keras.attacks import BrokenCertificate, evaluate_robustness

plt.rcParams["figure.dpi"] = 150
keras.utils.set_random_seed(0)
data = hkr.datasets.load("digits")
x, y = data.x_test, data.y_test
EPSILONS = (0.1, 0.25, 0.5)
STEPS = 40


def trained(model, loss, epochs, rate):
    """The model, after some epochs with a learning rate that falls to 0."""
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * 43)
    model.compile(keras.optimizers.Adam(schedule), loss=loss)
    model.fit(data.x_train, data.y_train, epochs=epochs, verbose=0)
    return model


model = trained(
    hkr.models.lipschitz_mlp((8, 8, 1), 10),
    hkr.losses.LogSumExpHKR(alpha=100, margin=0.5),
    epochs=20,
    rate=1e-2,
)

# %% [markdown]
# ## One call
#
# DeepFool, DDN and PGD of foolbox attack every test image, with pixels kept in [0, 1]. What they find is moved back
# towards the image as far as it stays changed. If one of them succeeded inside a certified radius, the call would
# raise an error with the witness.

# %%
robustness = evaluate_robustness(model, x, y, EPSILONS, steps=STEPS, verbose=False)
print(f"clean {robustness.clean:.1%}")
for epsilon, low, high in zip(EPSILONS, robustness.certified, robustness.attacked, strict=True):
    print(f"within {epsilon:<5} certified {low:.1%}   attacked {high:.1%}   gap {100 * (high - low):.1f} points")
hkr.plotting.plot_robustness(robustness)
plt.show()

# %% [markdown]
# How far is the smallest change from the certified radius? Every point lies on or above the diagonal.

# %%
found = np.isfinite(robustness.distance)
fig, ax = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
ax.plot(robustness.radius[found], robustness.distance[found], "o", color="#2f74c0", markersize=4, alpha=0.5, mew=0)
longest = 1.05 * float(robustness.distance[found].max(initial=1e-3))
ax.plot([0, longest], [0, longest], color="#222222", linewidth=1)
ax.set(xlabel="certified radius", ylabel="distance of the nearest change found", xlim=(0, longest), ylim=(0, longest))
ax.spines[["top", "right"]].set_visible(False)
plt.show()
print(f"radius over distance: median {np.median((robustness.radius / robustness.distance)[found]):.2f}")

# %% [markdown]
# The changes are large enough to be seen, since smaller ones are ruled out. Below them, where ink was added (blue) and
# where it was taken away (red).

# %%
shown = np.flatnonzero(found & robustness.is_correct)[:10]
changed = robustness.adversarial[shown]
moves = changed - x[shown]
now = model.predict(changed, verbose=0).argmax(axis=1)
titles = [y[shown].tolist(), [f"{label} at {d:.2f}" for label, d in zip(now, robustness.distance[shown], strict=True)]]
hkr.plotting.plot_image_rows([x[shown], changed], titles, ["image", "attacked"])
hkr.plotting.plot_image_rows([moves], names=["change"], symmetric=True)
plt.show()

# %% [markdown]
# ## An ordinary network
#
# The same sizes, ReLU, cross-entropy. Its clean accuracy is as good, but attacks succeed much closer to the image,
# and its proven constant is so large that nothing of use can be certified.

# %%
layers = [keras.Input((8, 8, 1)), keras.layers.Flatten()]
layers += [keras.layers.Dense(width, activation="relu") for width in (256, 128, 64)]
ordinary = trained(
    keras.Sequential([*layers, keras.layers.Dense(10)]),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    epochs=20,
    rate=1e-3,
)
other = evaluate_robustness(ordinary, x, y, EPSILONS, steps=STEPS, verbose=False)
print(f"clean {other.clean:.1%}, proven constant {hkr.lipschitz_bound(ordinary):.0f}")
for epsilon, low, high in zip(EPSILONS, other.certified, other.attacked, strict=True):
    print(f"within {epsilon:<5} certified {low:.1%}   attacked {high:.1%}")
fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
for ax, result, title in zip(axes, (robustness, other), ("HKR", "ordinary"), strict=True):
    hkr.plotting.plot_robustness(result, ax).set_title(title)
plt.show()

# %% [markdown]
# ## Attacks that refute
#
# A wrong certificate does not survive. Here the radii are doubled, as a certifier that forgets half of the constant
# would have it.

# %%
certificate = hkr.certify(model, x, verbose=0)
doubled = dataclasses.replace(certificate, radius=2 * certificate.radius)
try:
    evaluate_robustness(model, x, y, EPSILONS, ["DeepFool"], doubled, steps=40, verbose=False)
except BrokenCertificate as error:
    print(error)
