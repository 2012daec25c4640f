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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hkr-keras/hkr_keras/blob/main/notebooks/02_certified_fashion_mnist.ipynb)
#
# # Certified accuracy on Fashion-MNIST
#
# Accuracy and robustness pull in different directions, and the loss decides where between them a network lands. We
# train a small convolutional network, certify all test images, move along that trade-off, and compare with another
# library. Two CPU cores need about eight minutes; without Fashion-MNIST at hand the notebook uses small
# handwritten digits.

# %%
import importlib.util
import os

if importlib.util.find_spec("hkr_keras") is None:
    place = "git+https://github.com/hkr-keras/hkr_keras"
    if os.path.exists("../setup.cfg"):  # in a clone
        place = "file://" + os.path.abspath("..")
    # %pip install --quiet "hkr_keras[plots,sklearn] @ {place}"

# %%
os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # the fastest of the three for convolutions on a CPU

import json
import pathlib

import keras
import matplotlib.pyplot as plt
import numpy as np

import hkr_keras as hkr

plt.rcParams["figure.dpi"] = 150
try:
    data = hkr.datasets.load("fashion_mnist")
except ConnectionError as error:
    print(error)
    data = hkr.datasets.load("digits")
NAMES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
if data.name == "digits":
    NAMES = [str(digit) for digit in range(10)]

fig, axes = plt.subplots(1, 10, figsize=(10, 1.4), layout="constrained")
for ax, label in zip(axes, range(10), strict=True):
    ax.imshow(data.x_train[data.y_train == label][0, ..., 0], cmap="gray_r")
    ax.set_title(NAMES[label], fontsize=9)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Train
#
# The convolutions are orthogonal, and down-sampling moves pixels into channels, so that nothing is lost on the way: a
# gradient arrives at the input as long as it was at the output. `LogSumExpHKR` asks for a certified radius of 0.5 (in
# pixels of [0, 1]) and pushes against the strongest other class. `StiefelMuon` turns the orthonormal kernels along
# their constraint set.


# %%
def train(loss, epochs, rate=0.02, seed=0):
    """A trained network and its certificate of the test set."""
    keras.utils.set_random_seed(seed)
    model = hkr.models.lipschitz_cnn(data.x_train.shape[1:], data.classes, orthogonal=True)
    steps = epochs * -(-len(data.x_train) // 128)
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / 20, steps, warmup_target=rate, warmup_steps=max(1, steps // 20)
    )
    model.compile(hkr.optimizers.StiefelMuon(schedule), loss=loss)
    polish = hkr.callbacks.Orthonormalize()
    model.fit(data.x_train, data.y_train, batch_size=128, epochs=epochs, verbose=0, callbacks=[polish])
    return model, hkr.certify(model, data.x_test, batch_size=512, verbose=0)


SMALL = data.name == "digits"
model, certificate = train(hkr.losses.LogSumExpHKR(alpha=50, margin=0.5), epochs=30 if SMALL else 4)
print(f"proven Lipschitz constant   {certificate.bound:.6f}")
print(f"clean accuracy              {certificate.accuracy(data.y_test):.1%}")
for epsilon in (36 / 255, 0.25, 0.5):
    print(f"certified accuracy at {epsilon:<5.3g} {certificate.accuracy(data.y_test, epsilon):.1%}")
hkr.plotting.plot_certified_accuracy(certificate, data.y_test, marks=(0.25, 0.5, 1.0))
plt.show()

# %% [markdown]
# ## What a certificate says
#
# Behind the curve is a radius for every single image. *No* change of L2 norm up to that radius alters the
# prediction: not noise, not an attack that nobody has invented yet. The safest and the most fragile images that
# are classified correctly:

# %%
correct = np.flatnonzero(certificate.is_correct(data.y_test))
order = correct[np.argsort(certificate.radius[correct])]
fig, axes = plt.subplots(2, 8, figsize=(10, 3.1), layout="constrained")
for row, indices in zip(axes, (order[-8:][::-1], order[:8]), strict=True):
    for ax, i in zip(row, indices, strict=True):
        ax.imshow(data.x_test[i, ..., 0], cmap="gray_r")
        ax.set_title(f"{NAMES[certificate.prediction[i]]}\nr = {certificate.radius[i]:.2g}", fontsize=8)
        ax.axis("off")
plt.show()

# %% [markdown]
# Which classes are taken for which, whatever anybody does to the images within 0.5, and which of them may still turn:

# %%
hkr.plotting.plot_certified_confusion(certificate, data.y_test, epsilon=0.5, names=NAMES)
plt.show()

# %% [markdown]
# A certificate can be refuted by a single counterexample, so let us look for one. For each image we walk towards
# images of other classes and measure, by bisection, how far the prediction holds. A point below the diagonal would
# break the guarantee. (The benchmark `break_certificates.py` does this with the attacks of two libraries.)


# %%
def distance_to_change(x, prediction, others, steps=12):
    """The shortest distance at which the prediction changes on the way from x to each of the other images."""
    low, high = np.zeros((len(others), 1, 1, 1)), np.ones((len(others), 1, 1, 1))
    for _ in range(steps):
        middle = (low + high) / 2
        points = (x + middle * (others - x)).astype("float32")
        changed = model.predict(points, verbose=0, batch_size=256).argmax(axis=1) != prediction
        changed = changed[:, None, None, None]
        low, high = np.where(changed, low, middle), np.where(changed, middle, high)
    return np.linalg.norm((high * (others - x)).reshape(len(others), -1), axis=1).min()


rng = np.random.default_rng(0)
sample = rng.choice(correct, 40, replace=False)
distances = []
for i in sample:
    others = data.x_test[certificate.prediction != certificate.prediction[i]]
    distances.append(distance_to_change(data.x_test[i], certificate.prediction[i], rng.permutation(others)[:64]))
radii = certificate.radius[sample]
assert (np.array(distances) > radii).all()

fig, ax = plt.subplots(figsize=(5.2, 4.2), layout="constrained")
ax.plot(radii, distances, "o", color="#2f74c0", markersize=4)
limit = 1.5 * max(radii)
ax.fill_between([0, limit], [0, limit], color="#d9622b", alpha=0.12, linewidth=0)
ax.text(0.72 * limit, 0.3 * limit, "impossible", color="#d9622b", ha="center")
ax.set(xlabel="certified radius", ylabel="distance at which the prediction changed")
ax.set(xlim=(0, limit), ylim=(0, None))
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## The trade-off
#
# A larger `alpha` is nearer to accuracy, a larger `margin` nearer to robustness. Four short runs draw the frontier at
# two radii:

# %%
settings = [(200, 0.2), (100, 0.4), (50, 0.6), (20, 1.0)]
certificates = [
    train(hkr.losses.LogSumExpHKR(alpha, margin), epochs=30 if SMALL else 1)[1] for alpha, margin in settings
]
clean = [c.accuracy(data.y_test) for c in certificates]
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for ax, epsilon in zip(axes, (36 / 255, 0.5), strict=True):
    certified = [c.accuracy(data.y_test, epsilon) for c in certificates]
    hkr.plotting.plot_frontier(clean, certified, ax)
    for (alpha, margin), x, y in zip(settings, clean, certified, strict=True):
        side, offset = ("left", (7, -3)) if x == max(clean) else ("right", (-7, 4))
        label = f"alpha {alpha}, margin {margin}"
        ax.annotate(label, (100 * x, 100 * y), offset, textcoords="offset points", fontsize=8, ha=side)
    ax.set_title(f"radius {epsilon:.3g}", fontsize=11)
    ax.margins(0.5, 0.2)
plt.show()

# %% [markdown]
# ## Another library
#
# The benchmark `frontier.py` tunes and trains deel-lip 1.5.0 and this package on the same data, with networks of
# the same sizes, four epochs and three seeds for every setting. These are its stored results. One side proves
# its radii from the stored weights; the other claims them, and its padded convolutions have norms above 1 that the
# claim leaves out.

# %%
stored = pathlib.Path(hkr.__file__).parents[1] / "benchmarks" / "results" / "frontier.jsonl"
if not stored.exists():  # installed without the repository
    address = "https://raw.githubusercontent.com/hkr-keras/hkr_keras/main/benchmarks/results/frontier.jsonl"
    stored = pathlib.Path(keras.utils.get_file("hkr_keras_frontier.jsonl", address))
runs = [json.loads(line) for line in stored.read_text().splitlines()]

fig, axes = plt.subplots(1, 4, figsize=(12, 3.5), layout="constrained", sharex=True)
for library, label, color in (
    ("hkr_keras", "hkr_keras, proven", "#2f74c0"),
    ("deel-lip", "deel-lip 1.5.0, own claim (unsound)", "#d9622b"),
):
    groups = {}
    for run in runs:
        if run["library"].startswith(library) and run["model"] != "mlp":
            setting = tuple(run.get(key) for key in ("loss", "alpha", "margin", "temperature", "rate", "head"))
            groups.setdefault(setting, []).append(run)
    for ax, epsilon in zip(axes, ("0.141", "0.25", "0.5", "1"), strict=True):
        clean, certified = (
            [[run[key] for run in group] for group in groups.values()] for key in ("clean", f"certified_{epsilon}")
        )
        hkr.plotting.plot_frontier(clean, certified, ax, label, color)
        ax.set_title(f"radius {epsilon}", fontsize=11)
        ax.set_ylabel("")
axes[0].set_ylabel("certified accuracy, %")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
plt.show()
