"""Certificates: their formulas, their validity under attack, and what is refused."""

import dataclasses
import json
import math

import keras
import numpy as np
import pytest
import sklearn.metrics
from helpers import normal, to_numpy

import hkr_keras as hkr
from hkr_keras import Certificate, bounds, certify
from hkr_keras.certification import evaluation
from hkr_keras.certification.certificates import TopKCertificate

FEATURES = 6


def random_inputs(n=40, seed=0):
    return np.random.default_rng(seed).normal(size=(n, FEATURES)).astype("float32")


def dense_model(outputs, scale=None, head=None, extra=()):
    keras.utils.set_random_seed(1)
    layers = [hkr.layers.LipschitzDense(16), hkr.layers.GroupSort(2)]
    layers += [hkr.layers.Scale(scale)] if scale else []
    layers += [head or hkr.layers.LipschitzDense(outputs, kernel_constraint=hkr.constraints.UnitNorm()), *extra]
    return keras.Sequential([keras.Input((FEATURES,)), *layers])


def nested_model():
    keras.utils.set_random_seed(2)
    body = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(12), hkr.layers.GroupSort(2)], name="body")
    x = keras.Input((FEATURES,))
    branches = [body(x), body(hkr.layers.Scale(0.5)(x))]
    merged = hkr.layers.LipschitzResidual()(branches)
    tail_input = keras.Input((12,))
    tail = keras.Model(tail_input, keras.layers.Dense(4)(tail_input), name="tail")
    return keras.Model(x, tail(merged))


def conv_model():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Reshape((FEATURES, 1)),
            hkr.layers.LipschitzConv1D(8, 3, padding="same"),
            hkr.layers.MaxMin(),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.once
@pytest.mark.parametrize("outputs", [1, 5])
def test_the_rival_is_the_class_of_the_smallest_radius(outputs):
    model, x = dense_model(outputs), normal((40, FEATURES))
    certificate = hkr.certify(model, x, verbose=0)
    kept = hkr.Certificate.from_json(certificate.to_json())
    assert kept.rival.tolist() == certificate.rival.tolist()
    assert certificate[3:7].rival.tolist() == certificate.rival[3:7].tolist()
    assert (certificate.rival != certificate.prediction).all()
    if outputs == 1:
        return
    kernel, logits = to_numpy(model.layers[-1].kernel), to_numpy(model(x))
    rows = np.arange(len(x))
    difference = logits[rows, certificate.prediction] - logits[rows, certificate.rival]
    stretched = np.linalg.norm(kernel[:, certificate.prediction] - kernel[:, certificate.rival], axis=0)
    assert certificate.radius == pytest.approx(difference / stretched, rel=1e-4)  # the body has constant 1


MODELS = {
    "score": (lambda: dense_model(1), "score"),
    "scaled_score": (lambda: dense_model(1, scale=-3.0), "score"),
    "pairwise": (lambda: dense_model(5), "pairwise"),
    "scaled_pairwise": (lambda: dense_model(5, scale=2.5), "pairwise"),
    "scaled_logits": (lambda: dense_model(5, extra=[hkr.layers.Scale(-0.25)]), "pairwise"),
    "dropout_behind_the_head": (lambda: dense_model(5, extra=[keras.layers.Dropout(0.5)]), "pairwise"),
    "activation_behind_the_head": (lambda: dense_model(5, extra=[hkr.layers.FullSort()]), "logits"),
    "tanh_head": (lambda: dense_model(5, head=keras.layers.Dense(5, activation="tanh")), "logits"),
    "nested": (nested_model, "pairwise"),
    "convolution": (conv_model, "pairwise"),
}
each_model = pytest.mark.parametrize("name", MODELS)


def logits_of(model, x):
    return np.asarray(model.predict(x, batch_size=4096, verbose=0), dtype="float64")


def predict(model, x):
    logits = logits_of(model, x)
    return (logits[:, 0] > 0).astype(int) if logits.shape[1] == 1 else logits.argmax(axis=1)


def logits_rule(model, x):
    logits = np.sort(logits_of(model, x), axis=1)
    return (logits[:, -1] - logits[:, -2]) / (math.sqrt(2) * hkr.lipschitz_bound(model))


def slopes(model, x, prediction, step=1e-3):
    """Gradient of the lead of the predicted class over the runner-up, by central differences."""
    n, size = len(x), math.prod(x.shape[1:])
    steps = step * np.concatenate([np.eye(size), -np.eye(size)]).reshape(2 * size, *x.shape[1:])
    logits = logits_of(model, (x[:, None] + steps[None]).reshape(-1, *x.shape[1:]).astype("float32"))
    if logits.shape[1] == 1:
        lead = np.where(prediction, 1, -1)[:, None] * logits.reshape(n, -1)
    else:
        order = np.argsort(logits_of(model, x), axis=1)
        lead = logits.reshape(n, 2 * size, -1)
        rows = np.arange(n)[:, None], np.arange(2 * size)[None]
        lead = lead[*rows, order[:, -1:]] - lead[*rows, order[:, -2:-1]]
    return ((lead[:, :size] - lead[:, size:]) / (2 * step)).reshape(x.shape)


def attacks(model, x, prediction):
    """Directions of length 1: random ones, towards other inputs, and down the lead of the predicted class."""
    directions = [np.random.default_rng(seed).normal(size=x.shape) for seed in range(4)]
    directions += [np.roll(x, shift, axis=0) - x for shift in range(1, 12)]
    directions += [-slopes(model, x, prediction)]
    for direction in directions:
        yield direction / np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-12)


@each_model
def test_no_attack_within_the_radius_changes_the_prediction(name):
    build, method = MODELS[name]
    model, x = build(), random_inputs()
    certificate = certify(model, x, verbose=0)
    assert certificate.method == method
    assert certificate.radius.dtype == np.float64
    assert certificate.radius.shape == certificate.prediction.shape == (len(x),)
    assert certificate.prediction.tolist() == predict(model, x).tolist()
    assert certificate.bound == hkr.lipschitz_bound(model)
    assert certificate.radius.min() >= 0
    assert certificate.radius.max() > 0.05
    for direction in attacks(model, x, certificate.prediction):
        moved = x.astype("float64") + 0.999 * certificate.radius[:, None] * direction
        assert predict(model, moved.astype("float32")).tolist() == certificate.prediction.tolist()


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][1] == "pairwise"])
def test_pairwise_is_never_worse_than_the_rule_for_logits(name):
    model, x = MODELS[name][0](), random_inputs()
    radius, rule = certify(model, x, verbose=0).radius, logits_rule(model, x)
    assert np.all(radius >= rule * (1 - 1e-6))
    assert radius.mean() > 1.01 * rule.mean()


def test_logits_rule():
    model, x = MODELS["tanh_head"][0](), random_inputs(64)  # certify fills batches up to a power of 2
    assert certify(model, x, verbose=0).radius == pytest.approx(logits_rule(model, x), rel=1e-6)


def linear_model(outputs):
    keras.utils.set_random_seed(4)
    return keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(outputs, bias_initializer="normal")])


def test_linear_score_has_the_distance_to_its_boundary():
    model, x = linear_model(1), random_inputs().astype("float64")
    kernel, bias = (np.asarray(weight, dtype="float64") for weight in model.get_weights())
    scores = (x @ kernel + bias)[:, 0]
    certificate = certify(model, x, verbose=0)
    assert certificate.radius == pytest.approx(np.abs(scores) / np.linalg.norm(kernel), rel=1e-5, abs=1e-6)
    worst = -np.sign(scores)[:, None] * kernel[:, 0] / np.linalg.norm(kernel)
    for factor, changes in ((0.999, False), (1.001, True)):
        moved = x + factor * certificate.radius[:, None] * worst
        assert np.all(((moved @ kernel + bias)[:, 0] > 0) != (scores > 0)) == changes


def test_linear_logits_have_the_distance_to_the_nearest_boundary():
    model, x = linear_model(4), random_inputs().astype("float64")
    kernel, bias = (np.asarray(weight, dtype="float64") for weight in model.get_weights())
    logits = x @ kernel + bias
    certificate = certify(model, x, verbose=0)
    for point, row, radius, prediction in zip(x, logits, certificate.radius, certificate.prediction, strict=True):
        others = [j for j in range(4) if j != prediction]
        normals = kernel[:, others] - kernel[:, [prediction]]
        lengths = np.linalg.norm(normals, axis=0)
        distances = (row[prediction] - row[others]) / lengths
        assert radius == pytest.approx(distances.min(), rel=1e-5, abs=1e-6)
        towards = normals[:, distances.argmin()] / lengths[distances.argmin()]
        for factor, same in ((0.999, True), (1.001, False)):
            assert (((point + factor * radius * towards) @ kernel + bias).argmax() == prediction) == same


def test_scale_inside_the_model_changes_nothing_when_it_cancels():
    weights = dense_model(5).get_weights()
    plain, scaled = dense_model(5), dense_model(5, extra=[hkr.layers.Scale(7.0)])
    plain.set_weights(weights)
    scaled.set_weights(weights)
    x = random_inputs()
    assert certify(scaled, x, verbose=0).radius == pytest.approx(certify(plain, x, verbose=0).radius, rel=1e-5)


@pytest.mark.once
def test_input_units():
    model, x = dense_model(5), random_inputs()
    inputs = keras.Input((FEATURES,))
    rescaled = keras.Model(inputs, model(keras.layers.Rescaling(1 / 8)(inputs)))
    radius = certify(model, x, verbose=0).radius
    assert certify(rescaled, 8 * x, verbose=0).radius == pytest.approx(8 * radius, rel=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
def test_several_inputs_count_as_one_vector(outputs):
    keras.utils.set_random_seed(5)
    inputs = [keras.Input((2,), name="a"), keras.Input((FEATURES - 2,), name="b")]
    hidden = hkr.layers.MaxMin()(hkr.layers.LipschitzDense(8)(keras.layers.Concatenate()(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(outputs)(hidden))
    joint_input = keras.Input((FEATURES,))
    joint = keras.Sequential(
        [joint_input, *(type(layer).from_config(layer.get_config()) for layer in model.layers[3:])]
    )
    joint.set_weights(model.get_weights())
    x = random_inputs()
    expected = certify(joint, x, verbose=0)
    for parts in ([x[:, :2], x[:, 2:]], {"a": x[:, :2], "b": x[:, 2:]}):
        certificate = certify(model, parts, verbose=0)
        assert np.all(certificate.radius <= expected.radius * (1 + 1e-6))
        assert np.all(certificate.radius >= expected.radius / math.sqrt(2) * (1 - 1e-6))
        assert certificate.prediction.tolist() == expected.prediction.tolist()


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_a_tie_has_radius_zero_and_is_not_certified(outputs):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(outputs, use_bias=False)])
    certificate = certify(model, np.zeros((1, 2)), verbose=0)
    assert certificate.radius.tolist() == [0.0]
    assert certificate.prediction.tolist() == [0]
    assert certificate.accuracy([0]) == 1.0
    assert certificate.accuracy([0], epsilon=0.0) == 0.0


@pytest.mark.parametrize("name", ["score", "pairwise", "nested"])
def test_batch_size_does_not_matter(name):
    model, x = MODELS[name][0](), random_inputs(22)
    one, seven = (certify(model, x, batch_size=size, verbose=0) for size in (1, 7))
    assert one.prediction.tolist() == seven.prediction.tolist()
    assert one.radius == pytest.approx(seven.radius, rel=1e-5, abs=1e-6)
    assert one.bound == seven.bound


# ---- what is computed from a certificate -------------------------------------------------------------------

RADIUS = np.array([0.5, 0.25, 0.0, 1.0, 0.75])
PREDICTION = np.array([0, 1, 2, 1, 0])
LABELS = np.array([0, 1, 2, 1, 2])


def of_numbers(radius=RADIUS, prediction=PREDICTION, **fields):
    fields = {"bound": 1.0, "classes": 3, "method": "pairwise", **fields}
    return Certificate(radius=np.array(radius), prediction=np.array(prediction), **fields)


@pytest.mark.once
@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None], np.eye(3)[LABELS], LABELS.tolist()])
def test_numbers(labels):
    certificate = of_numbers()
    assert certificate.accuracy(labels) == 4 / 5
    epsilons = [0.0, 0.2499, 0.25, 0.6, 1.0]
    shares = [3 / 5, 3 / 5, 2 / 5, 1 / 5, 0.0]
    assert [certificate.accuracy(labels, epsilon) for epsilon in epsilons] == shares
    assert certificate.curve(labels, np.array(epsilons)).tolist() == shares
    assert certificate.mean_radius(labels) == pytest.approx((0.5 + 0.25 + 0.0 + 1.0) / 5)


@pytest.mark.once
def test_numbers_of_a_score():
    certificate = of_numbers([0.5, 0.25, 2.0], [1, 0, 1], classes=1, method="score")
    for labels in ([1, 0, 0], [1, -1, -1], [[True], [False], [False]]):
        assert certificate.accuracy(labels) == 2 / 3
        assert certificate.accuracy(labels, 0.25) == 1 / 3
        assert certificate.mean_radius(labels) == pytest.approx(0.25)


@pytest.mark.once
@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 1, 3], [[0, 1]] * 5, np.zeros((5, 1, 1)), [0.5] * 5, 1])
def test_wrong_labels(labels):
    with pytest.raises(ValueError, match=r"Expected .*labels.* Received: "):
        of_numbers().accuracy(labels)


@pytest.mark.once
@pytest.mark.parametrize("epsilon", [-0.1, math.nan, math.inf])
def test_wrong_epsilon(epsilon):
    certificate = of_numbers()
    with pytest.raises(ValueError, match=f"Received: epsilon={epsilon}"):
        certificate.accuracy(LABELS, epsilon)
    with pytest.raises(ValueError, match=f"Received: epsilon={epsilon}"):
        certificate.curve(LABELS, [0.1, epsilon])


@pytest.mark.once
def test_json_round_trip():
    certificate = certify(dense_model(5), random_inputs(), verbose=0)
    copy = Certificate.from_json(certificate.to_json())
    assert copy.radius.tolist() == certificate.radius.tolist()
    assert copy.prediction.tolist() == certificate.prediction.tolist()
    assert (copy.bound, copy.classes, copy.method) == (certificate.bound, 5, "pairwise")
    stored = json.loads(certificate.to_json())
    assert stored["norm"] == "L2"
    assert stored["rigorous"] is False
    assert stored["versions"]["backend"] == keras.backend.backend()


@pytest.mark.once
def test_stored_certificates_say_what_they_are_about():
    model = dense_model(5)
    stored = json.loads(certify(model, random_inputs(), verbose=0).to_json())
    assert stored["dimension"] == FEATURES
    assert stored["model_sha256"] == evaluation.hash_of_model(model)
    assert {"hkr_keras", "keras", "numpy", "backend", "dtype"} <= set(stored["versions"])
    assert stored["versions"]["dtype"] == "float32"
    assert all(sentence.endswith(".") for sentence in stored["assumptions"])
    assert all(sentence in stored["statement"] for sentence in stored["assumptions"])


@pytest.mark.once
def test_a_stored_certificate_keeps_its_origin():
    certificate = certify(dense_model(5), random_inputs(), verbose=0, rigorous=True)
    text = certificate.to_json().replace(f'"keras": "{keras.__version__}"', '"keras": "3.99"')
    again = Certificate.from_json(text)
    assert again.versions["keras"] == "3.99"
    assert (again.rigorous, again.dimension, again.model_hash) == (True, FEATURES, certificate.model_hash)


def test_the_hash_is_of_weights_and_architecture(tmp_path):
    model = nested_model()
    digest = evaluation.hash_of_model(model)
    assert evaluation.hash_of_model(model) == digest
    model.compile("sgd", "mse")
    model.save(tmp_path / "model.keras")
    assert evaluation.hash_of_model(keras.models.load_model(tmp_path / "model.keras")) == digest
    weights = model.get_weights()
    model.set_weights([np.nextafter(weights[0], np.float32(9)), *weights[1:]])
    assert evaluation.hash_of_model(model) != digest
    assert evaluation.hash_of_model(dense_model(5)) != evaluation.hash_of_model(
        dense_model(5, extra=[hkr.layers.Scale(-1.0)])
    )


# ---- verification ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rigorous", [False, True])
def test_verify(rigorous):
    model, x = dense_model(5), random_inputs()
    certificate = certify(model, x, verbose=0, rigorous=rigorous)
    verification = Certificate.from_json(certificate.to_json()).verify(model, x, batch_size=7, verbose=0)
    assert verification
    assert verification.differences == ()


def test_verify_tells_what_differs():
    model, x = dense_model(5), random_inputs()
    certificate = certify(model, x, verbose=0)

    def differences(model=model, x=x, **changes):
        found = dataclasses.replace(certificate, **changes).verify(model, x, verbose=0)
        assert not found
        return " ".join(found.differences)

    assert "radius of input 3" in differences(radius=certificate.radius + 0.01 * (np.arange(len(x)) == 3))
    assert "prediction of input" in differences(prediction=(certificate.prediction + 1) % 5)
    assert "inputs: expected 40, found 39" in differences(x=x[1:])
    assert "bound" in differences(bound=certificate.bound * 0.99)
    assert "method" in differences(method="logits")
    assert "dimension" in differences(dimension=1)
    tiny = linear_model(2)
    tiny.layers[0].bias.assign([0.0, 0.0])
    small = certify(tiny, 1e-6 * x, verbose=0)
    assert not dataclasses.replace(small, radius=small.radius + 1e-6).verify(tiny, 1e-6 * x, verbose=0)
    other = dense_model(5)
    other.set_weights([1.001 * weight for weight in model.get_weights()])
    assert "model: expected" in differences(model=other)


# ---- other norms, top k, outputs ----------------------------------------------------------------------------


def test_other_norms():
    certificate = of_numbers(dimension=16)
    assert certificate.radius_in(1).tolist() == certificate.radius_in(2).tolist() == RADIUS.tolist()
    np.testing.assert_allclose(certificate.radius_in(math.inf), RADIUS / 4)
    assert np.all(certificate.radius_in(math.inf)[RADIUS > 0] < RADIUS[RADIUS > 0] / 4)
    assert certificate.accuracy(LABELS, 0.1, norm=math.inf) == 2 / 5
    assert certificate.curve(LABELS, [0.05, 0.1], norm=math.inf).tolist() == [3 / 5, 2 / 5]
    assert certificate.mean_radius(LABELS, norm=math.inf) == pytest.approx((0.5 + 0.25 + 1.0) / 20)
    for norm in (0, 3, "2"):
        with pytest.raises(ValueError, match=f"Received: norm={norm}"):
            certificate.radius_in(norm)
    with pytest.raises(ValueError, match="dimension=None"):
        of_numbers().radius_in(math.inf)


@pytest.mark.parametrize("norm", [1, math.inf])
def test_no_attack_in_another_norm_changes_the_prediction(norm):
    model, x = dense_model(5), random_inputs()
    certificate = certify(model, x, verbose=0)
    directions = [*attacks(model, x, certificate.prediction), *(np.sign(d) for d in attacks(model, x, None))]
    spikes = [np.eye(FEATURES)[[axis] * len(x)] * sign for axis in range(FEATURES) for sign in (-1, 1)]
    for direction in [*directions, *spikes]:
        length = np.linalg.norm(direction, ord=norm, axis=1, keepdims=True)
        moved = x + 0.999 * certificate.radius_in(norm)[:, None] * direction / np.maximum(length, 1e-12)
        assert predict(model, moved.astype("float32")).tolist() == certificate.prediction.tolist()


@pytest.mark.parametrize("name", ["pairwise", "activation_behind_the_head", "nested"])
def test_top_k(name):
    model, x = MODELS[name][0](), random_inputs()
    logits = logits_of(model, x)
    classes = logits.shape[1]
    top = [hkr.certify_top_k(model, x, k, verbose=0) for k in range(1, classes)]
    best = certify(model, x, verbose=0)
    np.testing.assert_allclose(top[0].radius.max(axis=1), best.radius, rtol=1e-12)
    assert np.all(np.diff([t.radius for t in top], axis=0) >= 0)
    ranks = np.argsort(np.argsort(-logits, axis=1), axis=1)
    directions = list(attacks(model, x, best.prediction))
    for k, certificate in enumerate(top, start=1):
        np.testing.assert_array_equal(certificate.radius > 0, ranks < k)
        moved = np.stack([x + 0.999 * r[:, None] * d for d in directions for r in certificate.radius.T])
        order = np.argsort(-logits_of(model, np.concatenate(moved).astype("float32")), axis=1)[:, :k]
        stays = (order.reshape(len(directions), classes, len(x), k) == np.arange(classes)[:, None, None]).any(axis=-1)
        assert np.all(stays[:, certificate.radius.T > 1e-5])
    y = best.prediction
    assert top[1].accuracy(y, 0.1) >= top[0].accuracy(y, 0.1) == best.accuracy(y, 0.1)


@pytest.mark.once
@pytest.mark.parametrize("k", [0, 5, 6])
def test_wrong_k(k):
    with pytest.raises(ValueError, match=f"k={k}"):
        hkr.certify_top_k(dense_model(5), random_inputs(), k, verbose=0)


@pytest.mark.once
def test_top_k_of_a_score_or_with_wrong_labels():
    with pytest.raises(ValueError, match="Expected logits"):
        hkr.certify_top_k(dense_model(1), random_inputs(), 1, verbose=0)
    top = hkr.certify_top_k(dense_model(5), random_inputs(), 2, verbose=0)
    with pytest.raises(ValueError, match="Expected 40 labels"):
        top.accuracy([1, 2])
    with pytest.raises(ValueError, match="epsilon=-1"):
        top.accuracy([1] * 40, epsilon=-1)


def sequence_model():
    keras.utils.set_random_seed(6)
    return keras.Sequential(
        [keras.Input((FEATURES,)), keras.layers.Reshape((3, 2)), keras.layers.Dense(4), hkr.layers.MaxMin()]
    )


@pytest.mark.parametrize("rigorous", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: dense_model(1), lambda: dense_model(3, scale=2.0), nested_model, sequence_model]
)
def test_outputs_stay_in_their_intervals(make, rigorous):
    model, x, epsilon = make(), random_inputs(), 0.3
    found = hkr.certify_outputs(model, x, epsilon, verbose=0, rigorous=rigorous)
    assert found.value.shape == found.lower.shape == found.upper.shape == model.predict(x, verbose=0).shape
    assert found.contain(found.value).all()
    for direction in attacks(model, x, np.ones(len(x))) if found.value.ndim == 2 else [np.roll(x, 1, axis=0) / 9]:
        moved = x + epsilon * direction / np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1)
        assert found.contain(logits_of(model, moved.astype("float32"))).all()


def test_intervals_of_a_linear_model_are_exact():
    model, x = linear_model(3), random_inputs()
    kernel = np.asarray(model.get_weights()[0], dtype="float64")
    found = hkr.certify_outputs(model, x, 0.5, verbose=0)
    expected = np.broadcast_to(np.linalg.norm(kernel, axis=0), found.value.shape)
    np.testing.assert_allclose(found.upper - found.lower, expected, rtol=1e-6)


@pytest.mark.once
def test_certified_auroc():
    model, x = dense_model(1), random_inputs(200)
    y = (logits_of(model, x)[:, 0] + np.random.default_rng(0).normal(size=200) > 0).astype(int)
    areas = [hkr.certify_outputs(model, x, epsilon, verbose=0).auroc(y) for epsilon in (0.0, 0.1, 0.5, 9.0)]
    assert areas[0] == pytest.approx(sklearn.metrics.roc_auc_score(y, logits_of(model, x)[:, 0]))
    assert sorted(areas, reverse=True) == areas
    assert areas[-1] == 0.0
    epsilon = 0.1
    worst = [-np.where(y == 1, 1, -1)[:, None] * d for d in attacks(model, x, np.ones(200))]
    for direction in worst:
        moved = (x + epsilon * direction).astype("float32")
        assert sklearn.metrics.roc_auc_score(y, logits_of(model, moved)[:, 0]) >= areas[1]


@pytest.mark.once
@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([1] * 40, "of both classes. Received: 40 of 40 positive"),
        ([0] * 40, "of both classes"),
        ([0, 1], "Expected 40 labels, one per input. Received: len"),
        ([0, 1] * 40, "Expected 40 labels, one per input. Received: len"),
    ],
)
def test_wrong_labels_of_an_area(y, message):
    found = hkr.certify_outputs(dense_model(1), random_inputs(), 0.1, verbose=0)
    with pytest.raises(ValueError, match=message):
        found.auroc(y)


@pytest.mark.once
@pytest.mark.parametrize("shape", [(20, 2), (2, 20), (1, 40), (80,), (20,), (40, 1, 1), ()])
def test_targets_of_another_shape_are_refused(shape):
    found = hkr.certify_outputs(dense_model(1), random_inputs(), 0.1, verbose=0)
    assert found.contain(found.value[:, 0]).shape == found.contain(found.value).shape == (40, 1)
    with pytest.raises(ValueError, match="Expected targets of shape"):
        found.contain(np.zeros(shape))
    if shape[:1] != (40,):
        with pytest.raises(ValueError, match="Expected 40 targets, one per input"):
            found._columns(np.zeros(shape))


@pytest.mark.once
def test_targets_of_several_outputs_have_their_shape():
    found = hkr.certify_outputs(dense_model(3), random_inputs(), 0.1, verbose=0)
    for shape in [(3, 40), (120,), (40,), (40, 1)]:
        with pytest.raises(ValueError, match="Expected targets of shape"):
            found.contain(np.zeros(shape))


@pytest.mark.once
def test_the_area_of_several_outputs_is_refused():
    with pytest.raises(ValueError, match="one score per input"):
        hkr.certify_outputs(dense_model(3), random_inputs(), 0.1, verbose=0).auroc([0, 1] * 20)


@pytest.mark.once
@pytest.mark.parametrize(
    "change", [{"dimension": 0}, {"dimension": "a"}, {"dimension": -3}, {"prediction": [0.7]}, {"radius": [[0.5]]}]
)
def test_json_with_other_types(change):
    certificate = of_numbers([0.5], [1], classes=2, dimension=3)
    assert Certificate.from_json(certificate.to_json()).dimension == 3
    with pytest.raises(ValueError, match="Expected the JSON text of a certificate"):
        Certificate.from_json(json.dumps({**json.loads(certificate.to_json()), **change}))


@pytest.mark.once
@pytest.mark.parametrize("text", [None, 5, "[" * 100_000, "", "[]", "{}", '{"radius": [1.0]}', "null"])
def test_wrong_json(text):
    with pytest.raises(ValueError, match="Expected the JSON text of a certificate"):
        Certificate.from_json(text)


# ---- refusals ----------------------------------------------------------------------------------------------


def with_weight(value):
    model = dense_model(3)
    weights = model.get_weights()
    weights[0][0, 0] = value
    model.set_weights(weights)
    return model


def constant_model():
    return keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(3, kernel_initializer="zeros")])


def of_policy(policy):
    return keras.Sequential(
        [keras.Input((FEATURES,)), hkr.layers.LipschitzDense(4, dtype=policy), keras.layers.Dense(2, dtype="float32")]
    )


def sigmoid_model(*layers):
    return keras.Sequential([keras.Input((FEATURES,)), *layers])


def two_outputs():
    x = keras.Input((FEATURES,))
    return keras.Model(x, [keras.layers.Dense(2)(x), keras.layers.Dense(3)(x)])


def sequence_outputs():
    return keras.Sequential([keras.Input((2, FEATURES // 2)), keras.layers.Dense(2)])


_Dense, _Activation = keras.layers.Dense, keras.layers.Activation
REFUSED = {
    "nan_weights": (lambda: with_weight(np.nan), "Expected finite weights"),
    "infinite_weights": (lambda: with_weight(np.inf), "Expected finite weights"),
    "constant": (constant_model, "Lipschitz constant 0"),
    "float16": (lambda: of_policy("float16"), "dtype policy float16"),
    "mixed_bfloat16": (lambda: of_policy("mixed_bfloat16"), "dtype policy mixed_bfloat16"),
    "sigmoid": (lambda: sigmoid_model(_Dense(1, activation="sigmoid")), "remove the final activation"),
    "sigmoid_layer": (lambda: sigmoid_model(_Dense(1), _Activation("sigmoid")), "remove the final activation"),
    "sigmoid_flattened": (
        lambda: sigmoid_model(_Dense(1, activation="sigmoid"), keras.layers.Flatten()),
        "remove the final activation",
    ),
    "sigmoid_nested": (
        lambda: sigmoid_model(_Dense(4), keras.Sequential([keras.Input((4,)), _Dense(1, activation="sigmoid")])),
        "remove the final activation",
    ),
    "relu_score": (lambda: sigmoid_model(_Dense(1), keras.layers.ReLU()), "remove the final activation"),
    "two_outputs": (two_outputs, "Received: 2 outputs"),
    "unknown_layer": (lambda: sigmoid_model(keras.layers.UnitNormalization(), _Dense(2)), "UnitNormalization"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        certify(build(), random_inputs(4), verbose=0)


def test_outputs_per_step_are_refused():
    with pytest.raises(ValueError, match=r"Expected outputs of shape"):
        certify(sequence_outputs(), random_inputs(4).reshape(4, 2, FEATURES // 2), verbose=0)


def test_a_model_that_is_not_built_is_refused():
    with pytest.raises(ValueError, match="Expected a built model"):
        certify(keras.Sequential([keras.layers.Dense(2)]), random_inputs(4), verbose=0)


def test_overflowing_logits_are_refused():
    model = dense_model(3)
    model.set_weights([1e30 * weight for weight in model.get_weights()])
    with pytest.raises(ValueError, match="Expected finite outputs"):
        certify(model, random_inputs(4), verbose=0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((0, FEATURES)), "Expected at least one input"),
        ([], "Expected at least one input"),
        (np.full((2, FEATURES), np.nan), "Expected finite inputs"),
        (np.full((2, FEATURES), np.inf), "Expected finite inputs"),
    ],
)
def test_inputs_that_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        certify(dense_model(3), x, verbose=0)


def test_tiny_weights_of_a_float64_head_give_no_infinite_radius():
    scale = 1e-200  # its square is not a float64 any more
    plain, tiny = (
        keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(2, use_bias=False), *rest])
        for rest in ([], [hkr.layers.Scale(scale)])
    )
    for model in (plain, tiny):
        model.layers[0].kernel.assign(np.eye(2))
    distances = bounds.AffineTail(np.eye(2) * scale, np.ones(1)).differences_from(0)
    np.testing.assert_allclose(distances, scale * np.sqrt([0.0, 2.0]))
    x = np.array([[1.0, 0.0]], "float32")
    assert hkr.certify(plain, x, verbose=0).radius[0] == pytest.approx(0.5**0.5)
    assert hkr.certify(tiny, x, verbose=0).radius[0] == 0.0  # float32 logits underflow to a tie


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # JAX says that it has none
def test_a_float64_input_is_rounded_all_the_same():
    ones, bias = "ones", keras.initializers.Constant(-1e8)
    for dtype in ("float32", "float64"):
        layer = keras.layers.Dense(1, kernel_initializer=ones, bias_initializer=bias, dtype="float32")
        model = keras.Sequential([keras.Input((1,), dtype=dtype), layer])
        assert certify(model, np.array([[1e8 + 5.0]]), verbose=0).radius[0] <= 5.0


@pytest.mark.once
def test_labels_that_differ_from_those_of_the_data_are_refused():
    kinds = {"radius": np.ones(3), "bound": 1.0}
    certificate = hkr.Certificate(prediction=np.arange(3), classes=3, method="pairwise", labels=np.arange(3), **kinds)
    assert certificate.accuracy(np.eye(3)) == 1.0
    with pytest.raises(ValueError, match="differs from these for 2 inputs"):
        certificate.accuracy([0, 2, 1])
    kinds["radius"] = np.ones((3, 3))
    top = TopKCertificate(k=1, rigorous=False, labels=np.arange(3), **kinds)
    assert top.accuracy([0, 1, 2]) == 1.0
    with pytest.raises(ValueError, match="differs from these for 3 inputs"):
        top.accuracy([1, 2, 0])
