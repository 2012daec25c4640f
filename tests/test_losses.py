"""Losses against numpy references written from their formulas."""

import copy
import math
import pickle
import re

import keras
import numpy as np
import pytest
from keras import ops

import hkr_keras as hkr
from hkr_keras._backends.compiling import compiled
from hkr_keras.losses import (
    HKR,
    KR,
    HingeMargin,
    LogSumExpHKR,
    MarginCrossentropy,
    MulticlassHinge,
    MulticlassHKR,
    MulticlassKR,
    MultiMargin,
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


def np_multi_margin(y, f, w):
    true, others = split_true(y, f)
    return np.average(relu(MARGIN - true[:, None] + others).sum(axis=1) / f.shape[1], weights=w)


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
    MultiMargin: ({"margin": MARGIN}, np_multi_margin),
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


@each_loss
def test_there_is_one_value_per_sample(cls):
    y, f = sample(cls)
    labels = [y, 2 * y - 1, y == 1] if cls in BINARY else [y, np.eye(CLASSES)[y], np.eye(CLASSES)[y] == 1]
    for label in labels:
        values = cls._values(ops.convert_to_tensor(label), ops.convert_to_tensor(f), None, **LOSSES[cls][0])
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


@pytest.mark.many
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


@pytest.mark.many
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
    for twin in (cls.from_config(loss.get_config()), keras.losses.deserialize(keras.losses.serialize(loss))):
        assert type(twin) is cls
        assert twin.get_config() == loss.get_config()
        assert float(twin(y, f)) == float(loss(y, f))
    assert loss.name == "other"
    assert keras.saving.get_registered_name(cls) == f"hkr_keras>{cls.__name__}"
    assert LOSSES[cls][0].items() <= loss.get_config().items()


@pytest.mark.parametrize("cls", WITH_ALPHA, ids=lambda cls: cls.__name__)
def test_infinite_alpha_is_stored(cls):
    twin = keras.losses.deserialize(keras.losses.serialize(make(cls, alpha=math.inf)))
    assert twin.get_config()["alpha"] == math.inf


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


@pytest.mark.many
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX knows every size")
@each_loss
@pytest.mark.parametrize("rank", [3, 4])
def test_inputs_of_rank_3_and_4_of_unknown_sizes(cls, rank):
    """Batches, labels and images whose sizes no compiler knows, and several labels where a loss takes them."""
    outputs = 2 if cls in BINARY and rank == 4 else 1 if cls in BINARY else CLASSES
    pooling = keras.layers.GlobalAveragePooling1D if rank == 3 else keras.layers.GlobalAveragePooling2D
    layers = [hkr.layers.LipschitzDense(4), pooling(), hkr.layers.LipschitzDense(outputs)]
    model = keras.Sequential([keras.Input((*[None] * (rank - 2), 3)), *layers])
    model.compile("sgd", make(cls), metrics=[hkr.metrics.Accuracy(), hkr.metrics.CertifiedRadius()])
    rng = np.random.default_rng(0)

    def batches():
        for count in (3, 4):
            labels = rng.integers(0, 2, (count, outputs)) if cls in BINARY else np.arange(count)
            yield rng.normal(size=(count, *[count + 2] * (rank - 2), 3)).astype("float32"), labels

    logs = model.fit(batches(), shuffle=False, steps_per_epoch=2, verbose=0).history
    assert all(np.isfinite(values).all() for values in logs.values())
    assert {"loss", "accuracy", "certified_radius"} == set(logs)


# ---- labels of all kinds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", BINARY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("values", [(0.05, 0.95), (-0.9, 0.9), (0.3, 0.7), (-0.5, 0.5)], ids=str)
def test_smoothed_binary_labels_split_in_the_middle(cls, values):
    y, f = sample(cls)
    assert float(make(cls)(np.array(values)[y], f)) == close(make(cls)(y, f))
    for label in (0, 1):  # what a label says does not depend on the batch
        assert float(make(cls)(np.full(N, values[label]), f)) == close(make(cls)(np.full(N, label), f))


@pytest.mark.parametrize("cls", MULTICLASS, ids=lambda cls: cls.__name__)
def test_smoothed_one_hot_labels(cls):
    y, f = sample(cls)
    for labels in (0.9 * np.eye(CLASSES)[y] + 0.1 / CLASSES, 2.0 * np.eye(CLASSES)[y] - 1.0):
        assert float(make(cls)(labels, f)) == close(make(cls)(y, f))


def wrong_labels(cls):
    """Labels that stand for no class, one sample of them or all."""
    y, _ = sample(cls)
    if cls in BINARY:
        three = y.astype("float32")
        three[0] = 0.4
        return [three, y + 1, y.astype("float32") * 0.4, np.where(y == 1, np.nan, 0.0), y * 255]
    rows = np.eye(CLASSES, dtype="float32")[y]
    several, none, mixed = rows.copy(), rows.copy(), rows.copy()
    several[0], none[0], mixed[0] = [1, 1, 0, 0], 0, [0.7, 0.3, 0, 0]
    return [several, none, mixed, y + 1, y - 1, y + 0.5]


@each_loss
def test_labels_that_are_no_classes_are_refused_or_nan(cls):
    _, f = sample(cls)
    for labels in wrong_labels(cls):
        with pytest.raises(ValueError, match=r"Received: y_true\.shape=\(12.* with \["):
            make(cls)(labels, f)


@pytest.mark.many
@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="PyTorch computes step by step, where labels can be seen"
)
@each_loss
def test_labels_that_are_no_classes_give_nan_in_compiled_programs(cls):
    _, f = sample(cls)
    for labels in wrong_labels(cls):
        program = compiled(make(cls))
        assert math.isnan(float(program(ops.convert_to_tensor(labels, "float32"), ops.convert_to_tensor(f))))


def test_compiled_training_on_rows_of_several_ones_does_not_pass_for_training():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    y = np.eye(4)[np.arange(8) % 4]
    y[3, 0] = y[3, 1] = 1.0
    model = keras.Sequential([keras.Input((3,)), hkr.layers.LipschitzDense(4)])
    model.compile("sgd", MulticlassHKR())
    if keras.backend.backend() == "torch":
        with pytest.raises(ValueError, match="one larger entry in every row"):
            model.fit(x, y, verbose=0)
    else:
        assert math.isnan(model.fit(x, y, verbose=0).history["loss"][0])
        assert np.isnan(ops.convert_to_numpy(model.layers[-1].bias)).all()


# ---- several labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", BINARY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("weighted", [False, True])
def test_several_labels_are_the_mean_of_binary_problems(cls, weighted):
    generator = np.random.default_rng(7)
    y, f = generator.integers(0, 2, size=(N, 3)), generator.normal(size=(N, 3)).astype("float32")
    w = generator.uniform(0.5, 2.0, size=N).astype("float32") if weighted else None
    columns = [float(make(cls)(y[:, k], f[:, k], w)) for k in range(3)]
    for labels in (y, 2 * y - 1, y == 1, 0.9 * y + 0.05):
        assert float(make(cls)(labels, f, w)) == close(np.mean(columns))
    assert tuple(make(cls, reduction="none")(y, f, w).shape) == (N,)
    slopes = gradient(make(cls), y, f, w)
    for k in range(3):
        np.testing.assert_allclose(slopes[:, k], gradient(make(cls), y[:, k], f[:, k], w) / 3, atol=1e-6)
    with pytest.raises(ValueError, match=r"Received: \w+\.shape="):
        make(cls)(y[:, :2], f)


# ---- numbers that change during training --------------------------------------------------------------------


class Change(keras.callbacks.Callback):
    """Changes a number of the loss after the first epoch."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.change(self.model.loss)


@pytest.mark.parametrize("key", ["alpha", "margin", "temperature"])
@pytest.mark.parametrize("how", ["assign", "set"])
def test_numbers_change_in_compiled_steps(key, how):
    y, _ = sample(SoftHKR)
    x = np.random.default_rng(5).normal(size=(N, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), hkr.layers.LipschitzDense(CLASSES)])
    loss = make(SoftHKR)
    model.compile(keras.optimizers.SGD(0.0), loss)
    assert isinstance(getattr(loss, key), keras.Variable)
    change = Change(lambda loss: getattr(loss, key).assign(0.3) if how == "assign" else setattr(loss, key, 0.3))
    found = model.fit(x, y, batch_size=N, epochs=2, verbose=0, callbacks=[change]).history["loss"]
    f = model.predict(x, verbose=0)
    assert found == [close(make(SoftHKR)(y, f)), close(make(SoftHKR, **{key: 0.3})(y, f))]
    assert abs(found[0] - found[1]) > 1e-3
    assert loss.get_config()[key] == 0.3


def test_alpha_may_become_infinite_in_a_compiled_step():
    y, _ = sample(HKR)
    x = np.random.default_rng(5).normal(size=(N, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), hkr.layers.LipschitzDense(1)])
    model.compile(keras.optimizers.SGD(0.0), make(HKR))
    change = Change(lambda loss: loss.alpha.assign(math.inf))
    found = model.fit(x, y, batch_size=N, epochs=2, verbose=0, callbacks=[change]).history["loss"]
    assert found[1] == close(make(HingeMargin)(y, model.predict(x, verbose=0)))


@each_loss
def test_numbers_are_checked_when_they_change(cls):
    loss = make(cls)
    for name, value in LOSSES[cls][0].items():
        for wrong in (-1.0, math.nan, "1"):
            with pytest.raises(ValueError, match=f"Received: {name}={wrong}"):
                getattr(loss, name).assign(wrong)
        assert loss.get_config()[name] == value
        for right in (np.float64(0.1), ops.array(0.1), 0.1):
            getattr(loss, name).assign(right)
            assert loss.get_config()[name] == pytest.approx(0.1)
        assert loss.get_config()[name] == 0.1
    assert not hasattr(loss, "temperature") or "temperature" in LOSSES[cls][0]


def test_copies_of_losses_have_numbers_of_their_own():
    loss = HKR(alpha=3.0, margin=0.1)
    for twin in (copy.deepcopy(loss), copy.copy(loss), pickle.loads(pickle.dumps(loss))):
        loss.alpha.assign(7.0)
        assert twin.get_config() == {**loss.get_config(), "alpha": 3.0}
        loss.alpha.assign(3.0)


def test_reprs_say_the_numbers():
    assert repr(HKR()) == "HKR(alpha=50.0, margin=0.5)"
    assert repr(SoftHKR(alpha=math.inf)) == "SoftHKR(alpha=inf, margin=0.5, temperature=10.0)"
    assert repr(KR()) == "KR()"


# ---- what other libraries call it ---------------------------------------------------------------------------


def test_losses_of_other_libraries_in_one_line():
    y, f = sample(MulticlassHKR)
    logits = ops.convert_to_tensor(f)
    hinges = ops.relu(
        MARGIN - hkr.margins.multiclass_margin(hkr.margins.one_hot(ops.convert_to_tensor(y), logits), logits)
    )
    true, others = split_true(y, f)
    np.testing.assert_allclose(ops.convert_to_numpy(hinges), relu(MARGIN - (true - others.max(axis=1))), atol=1e-6)
    y, f = sample(HKR)
    scores = ops.convert_to_tensor(f)
    found = hkr.losses.margin_crossentropy(ops.convert_to_tensor(y), hkr.margins.two_logits(scores), TEMPERATURE, 0.0)
    expected = np.log1p(np.exp(-TEMPERATURE * np.where(y == 1, 1, -1) * f)) / TEMPERATURE
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-5)


def test_old_names_say_the_new_ones():
    for module, old, new in (
        (hkr.losses, "TauCategoricalCrossentropy", "MarginCrossentropy"),
        (hkr.losses, "CategoricalHinge", "multiclass_margin"),
        (hkr.metrics, "CategoricalProvableRobustAccuracy", "CertifiedAccuracy"),
        (hkr.callbacks, "CondenseCallback", "nothing"),
        (hkr.layers, "GroupSort2", "GroupSort"),
        (hkr.constraints, "SpectralConstraint", "Orthonormal"),
        (hkr, "vanillaModel", "to_keras"),
        (hkr, "compute_layer_sv", "lipschitz_summary"),
    ):
        with pytest.raises(AttributeError, match=rf"'{old}': .*{new}.* here, see docs/migration\.md"):
            getattr(module, old)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        hkr.losses.nonsense
    with pytest.raises(TypeError, match=r"HKR has no argument 'min_margin': margin, .*see docs/migration\.md"):
        HKR(alpha=10, min_margin=1.0)
    for layer in (hkr.layers.LipschitzDense, hkr.layers.OrthogonalConv2D, hkr.layers.GroupSort, hkr.layers.Scale):
        with pytest.raises(TypeError, match=rf"{layer.__name__} has no argument 'k_coef_lip': a layer Scale\(k\)"):
            layer(4, k_coef_lip=2.0)
    with pytest.raises(TypeError, match=r"has no argument 'lip_const': lipschitz, see"):
        hkr.metrics.CertifiedAccuracy(0.25, lip_const=1.0)
    with pytest.raises(ImportError, match=r"'utils': lipschitz_summary.* here, see docs/migration\.md"):
        from hkr_keras import utils  # noqa: F401
    with pytest.raises(ImportError, match=r"'SpectralDense': LipschitzDense here, see docs/migration\.md"):
        from hkr_keras.layers import SpectralDense  # noqa: F401
