"""Losses against numpy references written from their formulas."""

import math
import re

import keras
import numpy as np
import pytest
from keras import ops

import hkr_keras as hkr
from hkr_keras.losses import (
    HKR,
    KR,
    HingeMargin,
    LogSumExpHKR,
    MarginCrossentropy,
    MulticlassHinge,
    MulticlassHKR,
    MulticlassKR,
    SoftHKR,
)

N, CLASSES = 12, 4
ALPHA, MARGIN, TEMPERATURE = 3.0, 0.7, 2.5

# ---- references in float64: labels as indices, predictions and weights to one number ----------------------


def relu(values):
    return np.maximum(values, 0.0)


def class_mean(scores, member, weights):
    return np.average(scores, weights=weights * member) if np.any(weights * member) else 0.0


def np_kr(y, f, w):
    return class_mean(f, y == 0, w) - class_mean(f, y == 1, w)


def np_hinge(y, f, w):
    return np.average(relu(MARGIN - np.where(y == 1, 1, -1) * f), weights=w)


def np_hkr(y, f, w):
    return ALPHA * np_hinge(y, f, w) + np_kr(y, f, w)


def np_multiclass_kr(y, f, w):
    return sum(np_kr(np.equal(y, c).astype(int), f[:, c], w) for c in range(f.shape[1]))


def split_true(y, f):
    """The true logit `(n,)` and the others `(n, classes - 1)`."""
    others = np.arange(f.shape[1]) != y[:, None]
    return f[~others], f[others].reshape(len(f), -1)


def np_multiclass_hinge(y, f, w):
    true, others = split_true(y, f)
    values = others.shape[1] * relu(MARGIN - true) + relu(MARGIN + others).sum(axis=1)
    return np.average(values, weights=w)


def np_multiclass_hkr(y, f, w):
    return ALPHA * np_multiclass_hinge(y, f, w) + np_multiclass_kr(y, f, w)


def np_soft_hkr(y, f, w, rivals_of=None):
    true, others = split_true(y, f)
    rivals = split_true(y, f if rivals_of is None else rivals_of)[1]
    p = np.exp(TEMPERATURE * rivals) / np.exp(TEMPERATURE * rivals).sum(axis=1, keepdims=True)
    hinges = relu(MARGIN - true) + (p * relu(MARGIN + others)).sum(axis=1)
    return np.average(ALPHA * hinges - (true - (p * others).sum(axis=1)), weights=w)


def np_log_sum_exp_hkr(y, f, w):
    true, others = split_true(y, f)
    half = (true - np.log(np.exp(TEMPERATURE * others).sum(axis=1)) / TEMPERATURE) / 2
    return np.average(ALPHA * relu(MARGIN - half) - half, weights=w)


def np_margin_crossentropy(y, f, w):
    logits = TEMPERATURE * (f - MARGIN * np.eye(f.shape[1])[y])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.average(-np.log(p[np.arange(len(f)), y]) / TEMPERATURE, weights=w)


BINARY = {
    KR: ({}, np_kr),
    HingeMargin: ({"margin": MARGIN}, np_hinge),
    HKR: ({"alpha": ALPHA, "margin": MARGIN}, np_hkr),
}
MULTICLASS = {
    MulticlassKR: ({}, np_multiclass_kr),
    MulticlassHinge: ({"margin": MARGIN}, np_multiclass_hinge),
    MulticlassHKR: ({"alpha": ALPHA, "margin": MARGIN}, np_multiclass_hkr),
    SoftHKR: ({"alpha": ALPHA, "margin": MARGIN, "temperature": TEMPERATURE}, np_soft_hkr),
    LogSumExpHKR: ({"alpha": ALPHA, "margin": MARGIN, "temperature": TEMPERATURE}, np_log_sum_exp_hkr),
    MarginCrossentropy: ({"temperature": TEMPERATURE, "margin": MARGIN}, np_margin_crossentropy),
}
LOSSES = {**BINARY, **MULTICLASS}
WITH_ALPHA = [cls for cls, (parameters, _) in LOSSES.items() if "alpha" in parameters]
each_loss = pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)


def make(cls, **changes):
    return cls(**{**LOSSES[cls][0], **changes})


def sample(cls, seed=0, n=N):
    """Labels as indices with every class present, and predictions, both random."""
    generator = np.random.default_rng(seed)
    classes = 2 if cls in BINARY else CLASSES
    y = generator.permutation(np.arange(n) % classes)
    f = generator.normal(size=(n,) if cls in BINARY else (n, classes))
    return y, f.astype("float32")


def close(value):
    return pytest.approx(float(value), rel=1e-5, abs=1e-5)


def gradient(loss, y, f, w=None):
    """Gradient of a loss with respect to the predictions, on the backend in use."""
    f = ops.convert_to_tensor(f)
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return np.asarray(jax.grad(lambda values: loss(y, values, w))(f))
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(f)
            value = loss(y, f, w)
        return tape.gradient(value, f).numpy()
    f.requires_grad_(True)
    loss(y, f, w).backward()
    return ops.convert_to_numpy(f.grad)


def numerical_gradient(function, f, step=1e-5):
    slopes = np.zeros(f.shape)
    for index in np.ndindex(f.shape):
        change = np.zeros(f.shape)
        change[index] = step
        slopes[index] = (function(f + change) - function(f - change)) / (2 * step)
    return slopes


# ---- values ------------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("weighted", [False, True])
def test_value(cls, weighted):
    y, f = sample(cls)
    w = np.random.default_rng(1).uniform(0.1, 3.0, size=N).astype("float32") if weighted else None
    expected = LOSSES[cls][1](y, f.astype("float64"), np.ones(N) if w is None else w)
    assert float(make(cls)(y, f, w)) == close(expected)


BINARY_LABELS = {
    "zero_one": lambda y: y,
    "signs": lambda y: 2 * y - 1,
    "bools": lambda y: y == 1,
    "floats": lambda y: y.astype("float32"),
    "list": lambda y: y.tolist(),
    "column": lambda y: y[:, None],
    "bool_column": lambda y: y[:, None] == 1,
}
MULTICLASS_LABELS = {
    "integers": lambda y: y,
    "bytes": lambda y: y.astype("uint8"),
    "floats": lambda y: y.astype("float32"),
    "list": lambda y: y.tolist(),
    "column": lambda y: y[:, None],
    "one_hot": lambda y: np.eye(CLASSES)[y],
    "bool_one_hot": lambda y: np.eye(CLASSES)[y] == 1,
}


@each_loss
def test_every_form_of_labels_and_predictions_gives_the_same_value(cls):
    y, f = sample(cls)
    expected = LOSSES[cls][1](y, f.astype("float64"), np.ones(N))
    for name, convert in (BINARY_LABELS if cls in BINARY else MULTICLASS_LABELS).items():
        for predictions in [f, f[:, None]] if cls in BINARY else [f]:
            assert float(make(cls)(convert(y), predictions)) == close(expected), (name, predictions.shape)


FUNCTIONS = {
    hkr.losses.kr: KR,
    hkr.losses.hinge: HingeMargin,
    hkr.losses.multiclass_kr: MulticlassKR,
    hkr.losses.multiclass_hinge: MulticlassHinge,
    hkr.losses.soft_hkr: SoftHKR,
    hkr.losses.log_sum_exp_hkr: LogSumExpHKR,
    hkr.losses.margin_crossentropy: MarginCrossentropy,
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_give_one_value_per_sample(function):
    cls = FUNCTIONS[function]
    y, f = sample(cls)
    labels = [y, 2 * y - 1, y == 1] if cls in BINARY else [y, np.eye(CLASSES)[y], np.eye(CLASSES)[y] == 1]
    for label in labels:
        values = function(ops.convert_to_tensor(label), ops.convert_to_tensor(f), **LOSSES[cls][0])
        assert tuple(values.shape) == (N,)
        assert float(ops.mean(values)) == close(LOSSES[cls][1](y, f, np.ones(N)))


@each_loss
def test_gradient(cls):
    y, f = sample(cls, seed=2)
    reference = LOSSES[cls][1]
    frozen = {"rivals_of": f.astype("float64")} if cls is SoftHKR else {}
    w = np.random.default_rng(3).uniform(0.1, 3.0, size=N)
    expected = numerical_gradient(lambda values: reference(y, values, w, **frozen), f.astype("float64"))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient(make(cls), y, f, w.astype("float32")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "label"), [(KR, 0), (KR, 1), (HKR, 0), (HKR, 1), (MulticlassKR, 2), (MulticlassHKR, 0)]
)
def test_one_class_in_the_batch(cls, label):
    _, f = sample(cls)
    y = np.full(N, label)
    assert float(make(cls)(y, f)) == close(LOSSES[cls][1](y, f.astype("float64"), np.ones(N)))
    slopes = gradient(make(cls), y, f)
    assert np.isfinite(slopes).all()
    assert np.abs(slopes).max() > 0


@each_loss
def test_one_sample(cls):
    y, f = (part[:1] for part in sample(cls))
    assert float(make(cls)(y, f)) == close(LOSSES[cls][1](y, f.astype("float64"), np.ones(1)))
    assert np.isfinite(gradient(make(cls), y, f)).all()


@pytest.mark.parametrize("cls", MULTICLASS, ids=lambda cls: cls.__name__)
def test_missing_classes(cls):
    _, f = sample(cls)
    y = np.arange(N) % 2 + 1  # classes 0 and 3 do not occur
    assert float(make(cls)(y, f)) == close(LOSSES[cls][1](y, f.astype("float64"), np.ones(N)))
    assert np.isfinite(gradient(make(cls), y, f)).all()


@pytest.mark.parametrize("cls", MULTICLASS, ids=lambda cls: cls.__name__)
def test_two_logits(cls):
    y, f = np.arange(N) % 2, sample(cls)[1][:, :2]
    assert float(make(cls)(y, f)) == close(LOSSES[cls][1](y, f.astype("float64"), np.ones(N)))


# ---- sample weights ----------------------------------------------------------------------------------------


@each_loss
def test_sample_weights_count_samples(cls):
    y, f = sample(cls)
    loss = make(cls)
    counts = np.array([0, 1, 2, 3] * (N // 4))
    repeated = np.repeat(np.arange(N), counts)
    expected = float(loss(y[repeated], f[repeated]))
    for weights in (counts, counts[:, None], counts.astype("float32") * 0.5, counts.tolist()):
        assert float(loss(y, f, weights)) == close(expected)
    assert float(loss(y, f, np.ones(N))) == close(loss(y, f))
    assert abs(expected - float(loss(y, f))) > 1e-3


@each_loss
def test_zero_weights_everywhere(cls):
    y, f = sample(cls)
    assert float(make(cls)(y, f, np.zeros(N))) == 0.0
    assert np.abs(gradient(make(cls), y, f, np.zeros(N, "float32"))).max() == 0.0


@each_loss
def test_wrong_sample_weights(cls):
    y, f = sample(cls)
    for weights in (np.ones((N, 2)), np.ones(N - 1)):
        with pytest.raises(ValueError, match=r"sample_weight\.shape="):
            make(cls)(y, f, weights)


@each_loss
def test_reductions(cls):
    y, f = sample(cls)
    w = np.linspace(0.5, 2.0, N).astype("float32")
    values = ops.convert_to_numpy(make(cls, reduction="none")(y, f, w))
    assert values.shape == (N,)
    assert values.sum() / w.sum() == close(make(cls)(y, f, w))
    assert float(make(cls, reduction="sum")(y, f, w)) == close(values.sum())
    assert float(make(cls, reduction="sum_over_batch_size")(y, f, w)) == close(values.mean())


# ---- parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", WITH_ALPHA, ids=lambda cls: cls.__name__)
def test_extremes_of_alpha(cls):
    y, f = sample(cls)
    kr, hinge_and_kr, hinge = (float(make(cls, alpha=alpha)(y, f)) for alpha in (0.0, 1.0, math.inf))
    assert math.isfinite(hinge)
    assert hinge_and_kr == close(kr + hinge)
    assert np.isfinite(gradient(make(cls, alpha=math.inf), y, f)).all()


@pytest.mark.parametrize(
    ("combined", "hinge", "kr"), [(HKR, HingeMargin, KR), (MulticlassHKR, MulticlassHinge, MulticlassKR)]
)
def test_extremes_of_alpha_are_losses_of_their_own(combined, hinge, kr):
    y, f = sample(combined)
    assert float(make(combined, alpha=0)(y, f)) == close(make(kr)(y, f))
    assert float(make(combined, alpha=math.inf)(y, f)) == close(make(hinge)(y, f))


BAD = {
    "alpha": [-1.0, math.nan, -math.inf, True, "50", None, [1.0]],
    "margin": [-0.1, math.nan, math.inf, False, "1", None],
    "temperature": [0.0, -1.0, math.nan, math.inf, True, "10"],
}


@each_loss
def test_bad_parameters(cls):
    for name in LOSSES[cls][0]:
        for value in BAD[name]:
            with pytest.raises(ValueError, match=re.escape(f"Received: {name}={value}")):
                make(cls, **{name: value})


@each_loss
def test_numpy_numbers_are_numbers(cls):
    y, f = sample(cls)
    parameters = {name: np.float32(value) for name, value in LOSSES[cls][0].items()}
    loss = cls(**parameters)
    assert float(loss(y, f)) == close(make(cls)(y, f))
    assert all(type(loss.get_config()[name]) is float for name in parameters)


@each_loss
def test_wrong_shapes(cls):
    y, f = sample(cls)
    shapes = [(y[:-1], f), (np.ones((N, 3)), f), (np.ones((N, 1, 1)), f)]
    shapes += [(y, np.ones((N, 2))), (y, np.ones((N, 1, 1)))] if cls in BINARY else [(y, f[:, 0]), (y, f[:, :1])]
    shapes += [(y, np.ones((N, 2, CLASSES)))]
    for labels, predictions in shapes:
        with pytest.raises(ValueError, match=r"Received: \w+\.shape="):
            make(cls)(labels, predictions)


# ---- storing -----------------------------------------------------------------------------------------------


@each_loss
def test_config_round_trip(cls):
    y, f = sample(cls)
    loss = make(cls, reduction="sum", name="other")
    for copy in (cls.from_config(loss.get_config()), keras.losses.deserialize(keras.losses.serialize(loss))):
        assert type(copy) is cls
        assert copy.get_config() == loss.get_config()
        assert float(copy(y, f)) == float(loss(y, f))
    assert loss.name == "other"
    assert keras.saving.get_registered_name(cls) == f"hkr_keras>{cls.__name__}"
    assert LOSSES[cls][0].items() <= loss.get_config().items()


@pytest.mark.parametrize("cls", WITH_ALPHA, ids=lambda cls: cls.__name__)
def test_infinite_alpha_is_stored(cls):
    copy = keras.losses.deserialize(keras.losses.serialize(make(cls, alpha=math.inf)))
    assert copy.get_config()["alpha"] == math.inf


@pytest.mark.parametrize("alpha", [2.0, math.inf])
def test_compiled_loss_in_a_saved_model(alpha, tmp_path):
    y, _ = sample(HKR)
    x = np.random.default_rng(4).normal(size=(N, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), hkr.layers.LipschitzDense(1)])
    model.compile("sgd", HKR(alpha=alpha, margin=0.4))
    expected = model.evaluate(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.loss.get_config() == model.loss.get_config()
    assert loaded.evaluate(x, y, verbose=0) == close(expected)


@each_loss
def test_fit_compiled(cls):
    y, _ = sample(cls)
    x = np.random.default_rng(5).normal(size=(N, 3)).astype("float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), hkr.layers.LipschitzDense(1 if cls in BINARY else CLASSES)])
    jit = keras.backend.backend() != "torch"
    model.compile("sgd", make(cls), jit_compile=jit)
    expected = LOSSES[cls][1](y, np.squeeze(model.predict(x, verbose=0).astype("float64")), np.arange(N) + 1.0)
    history = model.fit(x, y, sample_weight=np.arange(N) + 1.0, batch_size=N, epochs=4, shuffle=False, verbose=0)
    assert history.history["loss"][0] == close(expected)
    assert history.history["loss"][-1] < history.history["loss"][0]
