"""Metrics against numpy, over batches of any size."""

import math
import re

import keras
import numpy as np
import pytest
from keras import ops

import hkr_keras as hkr
from hkr_keras.metrics import Accuracy, CertifiedAccuracy, CertifiedRadius, KRDistance

N = 13
generator = np.random.default_rng(0)
SCORES, LOGITS = generator.normal(size=N).astype("float32"), generator.normal(size=(N, 3)).astype("float32")
BINARY, CLASSES = np.arange(N) % 2, np.arange(N) % 3
WEIGHTS = generator.uniform(0.5, 2.0, size=N).astype("float32")

BINARY_LABELS = [BINARY, BINARY[:, None], 2 * BINARY - 1, BINARY == 1, BINARY.tolist()]
CLASS_LABELS = [CLASSES, CLASSES[:, None], np.eye(3)[CLASSES], CLASSES.tolist()]


def close(value):
    return pytest.approx(float(value), rel=1e-5, abs=1e-6)


def over_batches(metric, y_true, y_pred, weights, size):
    metric.reset_state()
    for start in range(0, N, size):
        part = slice(start, start + size)
        metric.update_state(y_true[part], y_pred[part], None if weights is None else weights[part])
    return float(metric.result())


def np_kr(weights):
    means = [np.average(SCORES[c == BINARY], weights=weights[c == BINARY]) for c in (0, 1)]
    return means[1] - means[0]


def np_radius(factor, lipschitz):
    true = LOGITS[np.arange(N), CLASSES]
    others = np.where(np.eye(3)[CLASSES] == 1, -np.inf, LOGITS).max(axis=1)
    return (true - others) / (factor * lipschitz)


@pytest.mark.parametrize("size", [1, 4, 7, N])
@pytest.mark.parametrize("weighted", [False, True])
def test_kr_distance_does_not_depend_on_the_batches(size, weighted):
    weights = WEIGHTS if weighted else np.ones(N)
    for labels in BINARY_LABELS:
        for scores in (SCORES, SCORES[:, None]):
            assert over_batches(KRDistance(), labels, scores, weights if weighted else None, size) == close(
                np_kr(weights)
            )


def test_kr_distance_is_minus_the_kr_loss():
    metric = KRDistance()
    metric.update_state(BINARY, SCORES, WEIGHTS)
    assert float(metric.result()) == close(-hkr.losses.KR()(BINARY, SCORES, WEIGHTS))


def test_kr_distance_without_samples_or_with_one_class_is_finite():
    metric = KRDistance()
    assert float(metric.result()) == 0.0
    metric.update_state(np.ones(N), SCORES)
    assert float(metric.result()) == close(SCORES.mean())


@pytest.mark.parametrize("size", [4, N])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize(("head", "factor"), [("unit_norm", 2.0), ("orthonormal", math.sqrt(2))])
def test_certified_metrics_of_logits(head, factor, weights, size):
    radius = np_radius(factor, 1.5)
    accuracy = CertifiedAccuracy(0.2, lipschitz=1.5, head=head)
    mean = CertifiedRadius(lipschitz=1.5, head=head)
    for labels in CLASS_LABELS:
        assert over_batches(accuracy, labels, LOGITS, weights, size) == close(np.average(radius > 0.2, weights=weights))
        assert over_batches(mean, labels, LOGITS, weights, size) == close(
            np.average(np.maximum(radius, 0), weights=weights)
        )


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_certified_metrics_of_scores(weights):
    radius = (2 * BINARY - 1) * SCORES / 1.5
    accuracy, mean = CertifiedAccuracy(0.2, lipschitz=1.5), CertifiedRadius(lipschitz=1.5)
    for labels in BINARY_LABELS:
        for scores in (SCORES, SCORES[:, None]):
            assert over_batches(accuracy, labels, scores, weights, 4) == close(
                np.average(radius > 0.2, weights=weights)
            )
            assert over_batches(mean, labels, scores, weights, 4) == close(
                np.average(np.maximum(radius, 0), weights=weights)
            )


def test_certified_accuracy_at_zero_is_accuracy():
    metric = CertifiedAccuracy()
    metric.update_state(CLASSES, LOGITS)
    assert float(metric.result()) == close(np.mean(LOGITS.argmax(axis=1) == CLASSES))


@pytest.mark.parametrize(
    ("label", "prediction", "epsilon", "certified"),
    [
        (1, [0.5], 0.5, 0.0),
        (1, [0.5], 0.4999, 1.0),
        (0, [-0.5], 0.5, 0.0),
        (1, [0.0], 0.0, 0.0),
        (0, [0.0], 0.0, 0.0),
        (0, [2.0, 1.0], 0.5, 0.0),
        (0, [2.0, 1.0], 0.4999, 1.0),
        (0, [1.0, 1.0], 0.0, 0.0),
        (1, [1.0, 1.0, 0.0], 0.0, 0.0),
    ],
)
def test_only_a_larger_radius_is_certified(label, prediction, epsilon, certified):
    metric = CertifiedAccuracy(epsilon)
    metric.update_state(np.array([label]), np.array([prediction], "float32"))
    assert float(metric.result()) == certified


METRICS = {
    Accuracy: ({}, "accuracy"),
    KRDistance: ({}, "kr_distance"),
    CertifiedAccuracy: ({"epsilon": 0.3, "lipschitz": 2.0, "head": "orthonormal"}, "certified_accuracy"),
    CertifiedRadius: ({"lipschitz": 2.0, "head": "orthonormal", "negative": True}, "certified_radius"),
}
each_metric = pytest.mark.parametrize("cls", METRICS, ids=lambda cls: cls.__name__)


@each_metric
def test_names_direction_and_config(cls):
    parameters, name = METRICS[cls]
    assert cls().name == name
    assert keras.saving.get_registered_name(cls) == f"hkr_keras>{cls.__name__}"
    metric = cls(**parameters, name="other")
    assert parameters.items() <= metric.get_config().items()
    for copy in (cls.from_config(metric.get_config()), keras.metrics.deserialize(keras.metrics.serialize(metric))):
        assert type(copy) is cls
        assert copy.get_config() == metric.get_config()


@each_metric
def test_reset_state(cls):
    metric = cls(**METRICS[cls][0])
    metric.update_state(BINARY, SCORES)
    assert float(metric.result()) != 0.0
    metric.reset_state()
    assert float(metric.result()) == 0.0
    assert all(not ops.convert_to_numpy(variable).any() for variable in metric.variables)


BAD = {
    "epsilon": (CertifiedAccuracy, [-0.1, math.nan, math.inf, "1", True, None]),
    "lipschitz": (CertifiedRadius, [0, -1.0, math.nan, math.inf, "1", True, None]),
    "head": (CertifiedRadius, ["sigmoid", None, 2.0]),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments(name):
    cls, values = BAD[name]
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"Received: {name}={value}")):
            cls(**{name: value})


def test_wrong_shapes():
    cases = [
        (KRDistance, BINARY, LOGITS),
        (KRDistance, BINARY[:-1], SCORES),
        (CertifiedAccuracy, CLASSES[:-1], LOGITS),
        (CertifiedRadius, np.ones((N, 2)), LOGITS),
        (CertifiedRadius, CLASSES, LOGITS[:, :, None]),
    ]
    for cls, y_true, y_pred in cases:
        with pytest.raises(ValueError, match=r"Received: y_\w+\.shape="):
            cls().update_state(y_true, y_pred)
    with pytest.raises(ValueError, match=r"Received: sample_weight\.shape="):
        KRDistance().update_state(BINARY, SCORES, WEIGHTS[:-1])


@pytest.mark.parametrize(
    ("outputs", "labels", "metrics"),
    [
        (1, BINARY, lambda: [Accuracy(), KRDistance(), CertifiedAccuracy(0.2), CertifiedRadius(negative=True)]),
        (3, CLASSES, lambda: [Accuracy(), CertifiedAccuracy(0.2), CertifiedRadius(head="orthonormal")]),
    ],
    ids=["binary", "multiclass"],
)
def test_inside_evaluate(outputs, labels, metrics, tmp_path):
    x = np.random.default_rng(1).normal(size=(N, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(outputs)])
    loss = hkr.losses.KR() if outputs == 1 else hkr.losses.MulticlassKR()
    model.compile("sgd", loss, weighted_metrics=metrics())
    found = model.evaluate(x, labels, batch_size=4, sample_weight=WEIGHTS, return_dict=True, verbose=0)
    predictions = model.predict(x, verbose=0)
    for metric in metrics():
        metric.update_state(labels, predictions, WEIGHTS)
        assert found[metric.name] == close(metric.result())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(
        x, labels, batch_size=4, sample_weight=WEIGHTS, return_dict=True, verbose=0
    ) == pytest.approx(found, rel=1e-5)


# ---- accuracy of scores and logits --------------------------------------------------------------------------

SEVERAL = np.random.default_rng(3).integers(0, 2, size=(N, 3))  # several labels for the three outputs


@pytest.mark.parametrize("size", [4, N])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_accuracy_of_one_score_is_that_of_its_sign(weights, size):
    expected = np.average((SCORES > 0) == (BINARY == 1), weights=weights)
    smoothed = [0.9 * BINARY + 0.05, 1.8 * BINARY - 0.9]
    for labels in [*BINARY_LABELS, *smoothed]:
        for scores in (SCORES, SCORES[:, None]):
            assert over_batches(Accuracy(), labels, scores, weights, size) == close(expected)
    half = np.mean((SCORES > 0.5) == (BINARY == 1))
    assert abs(half - np.mean((SCORES > 0) == (BINARY == 1))) > 0.05  # what "accuracy" of Keras would say


def test_accuracy_of_small_scores_where_keras_says_otherwise():
    """Scores of up to 0.6 never pass a threshold of 0.5 often, and labels of -1 never equal 0."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    scores = (2 * labels - 1) * rng.normal(0.2, 0.2, size=400)
    right = np.mean(np.sign(scores) == 2 * labels - 1)
    ours, theirs = Accuracy(), keras.metrics.BinaryAccuracy()
    for y in (labels, 2 * labels - 1):
        ours.reset_state()
        ours.update_state(y, scores)
        theirs.reset_state()
        theirs.update_state(y, scores)
        assert float(ours.result()) == close(right)
        assert float(theirs.result()) < right - 0.2


@pytest.mark.parametrize("size", [4, N])
def test_accuracy_of_logits(size):
    expected = np.mean(LOGITS.argmax(axis=1) == CLASSES)
    for labels in [*CLASS_LABELS, 2.0 * np.eye(3)[CLASSES] - 1.0, 0.9 * np.eye(3)[CLASSES] + 0.1 / 3]:
        assert over_batches(Accuracy(), labels, LOGITS, None, size) == close(expected)


@pytest.mark.parametrize("size", [1, 4, N])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_several_labels_are_the_mean_over_columns(weights, size):
    signs = 2 * SEVERAL - 1
    w = np.ones(N) if weights is None else weights
    radius = signs * LOGITS / 2.0
    expected = {
        Accuracy(): np.mean((LOGITS > 0) == (SEVERAL == 1), axis=1),
        CertifiedAccuracy(0.2, lipschitz=2.0): np.mean(radius > 0.2, axis=1),
        CertifiedRadius(lipschitz=2.0): np.mean(np.maximum(radius, 0), axis=1),
        CertifiedRadius(lipschitz=2.0, negative=True): np.mean(radius, axis=1),
    }
    for labels in (SEVERAL, signs, SEVERAL == 1):
        for metric, values in expected.items():
            assert over_batches(metric, labels, LOGITS, weights, size) == close(np.average(values, weights=w))
        distances = []
        for column in range(3):
            parts = [SEVERAL[:, column] == c for c in (0, 1)]
            means = [np.average(LOGITS[part, column], weights=w[part]) for part in parts]
            distances.append(means[1] - means[0])
        assert over_batches(KRDistance(), labels, LOGITS, weights, size) == close(np.mean(distances))


def test_nan_is_never_right():
    metric = Accuracy()
    metric.update_state(np.array([0, 1]), np.array([np.nan, 1.0]))
    metric.update_state(np.array([0, 1]), np.array([[np.nan, 1.0], [0.0, 1.0]]))
    assert float(metric.result()) == 0.5


@pytest.mark.parametrize(
    ("labels", "outputs"),
    [
        ([0, 1, 2], SCORES[:3]),
        ([0, 0.4, 1], SCORES[:3]),
        ([0, 1, 3], LOGITS[:3]),
        ([0, 1, 0.5], LOGITS[:3]),
        ([[0.5, 0.3, 0.2], [1, 0, 0], [0, 0, 1]], LOGITS[:3]),
    ],
    ids=["three", "soft", "range", "fraction", "mixed"],
)
@each_metric
def test_labels_of_no_convention_are_refused(cls, labels, outputs):
    if cls is KRDistance and outputs.ndim == 2 and np.ndim(labels) == 1:
        pytest.skip("integer labels of logits have the wrong shape for KRDistance")
    with pytest.raises(ValueError, match=r"Received: y_true\.shape="):
        cls().update_state(np.array(labels), outputs)


def test_negative_radii_of_wrong_predictions():
    plain, negative = CertifiedRadius(), CertifiedRadius(negative=True)
    for metric in (plain, negative):
        metric.update_state(np.array([0, 1]), np.array([[1.0, 0.0], [0.5, 0.0]]))
    assert (float(plain.result()), float(negative.result())) == (0.25, 0.125)


def test_keras_finds_out_that_larger_is_better():
    """By a private attribute, `_direction`: this fails when Keras looks elsewhere."""
    x = np.random.default_rng(1).normal(size=(N, 4)).astype("float32")
    for cls in METRICS:
        model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(1)])
        model.compile(keras.optimizers.SGD(0.0), hkr.losses.KR(), metrics=[cls()])
        stopping = keras.callbacks.EarlyStopping(cls().name, mode="auto")
        model.fit(x, BINARY, verbose=0, callbacks=[stopping])
        assert stopping.monitor_op is ops.greater


def test_reprs_say_the_arguments():
    assert repr(Accuracy()) == "Accuracy()"
    assert repr(CertifiedAccuracy(0.25)) == "CertifiedAccuracy(epsilon=0.25, lipschitz=1.0, head='unit_norm')"


@pytest.mark.parametrize("shape", [(0,), (0, 1), (0, 3)])
def test_a_batch_without_rows_changes_nothing(shape):
    labels = [np.zeros(shape, "float32")] + [np.zeros(0, "int32")] * (shape != (0, 1))
    for y in labels:
        for metric in (Accuracy(), CertifiedAccuracy(0.1), CertifiedRadius(negative=True)):
            metric.update_state(y, np.zeros(shape, "float32"))
            assert float(metric.result()) == 0.0
