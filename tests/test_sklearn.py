"""The scikit-learn estimators: scikit-learn's own checks, labels, certificates, determinism, selection of models."""

import functools
import pickle
import random
import runpy
import sys

import keras
import numpy as np
import pytest
from helpers import normal, to_numpy
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, make_moons
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_dataframe_column_names_consistency, estimator_checks_generator

import hkr_keras as hkr
from hkr_keras import sklearn as module
from hkr_keras.models import lipschitz_mlp
from hkr_keras.sklearn import HKRClassifier, HKRRegressor

pytestmark = pytest.mark.once


# One layer: scikit-learn fits it ninety times.
TINY = HKRClassifier(
    functools.partial(lipschitz_mlp, widths=()), optimizer="sgd", learning_rate=0.1, epochs=3, batch_size=64
)
TINY_REGRESSOR = HKRRegressor(
    functools.partial(lipschitz_mlp, widths=()), optimizer="sgd", learning_rate=0.1, epochs=5, batch_size=64
)
CHECKS = {
    f"{type(tiny).__name__}-{getattr(check, 'func', check).__name__}-{number}": (estimator, check)
    for tiny in (TINY, TINY_REGRESSOR)
    for number, (estimator, check) in enumerate(estimator_checks_generator(tiny, legacy=True))
    if check.func.__name__ != "check_array_api_input"  # wants an environment variable; arrays are NumPy's here
}


@pytest.mark.parametrize("name", CHECKS)
def test_checks_of_scikit_learn(name):
    estimator, check = CHECKS[name]
    check(estimator)


@pytest.mark.parametrize("tiny", [TINY, TINY_REGRESSOR], ids=lambda tiny: type(tiny).__name__)
def test_feature_names(tiny):
    check_dataframe_column_names_consistency(type(tiny).__name__, tiny)


X_MOONS, Y_MOONS = make_moons(300, noise=0.1, random_state=0)
X_IRIS, Y_IRIS = load_iris(return_X_y=True)
X_IRIS = StandardScaler().fit_transform(X_IRIS)
SPECIES = np.array(["setosa", "versicolor", "virginica"])


@pytest.fixture(scope="module")
def binary():
    return HKRClassifier(random_state=0).fit(X_MOONS, np.where(Y_MOONS == 1, "upper", "lower"))


@pytest.fixture(scope="module")
def multiclass():
    return HKRClassifier(functools.partial(lipschitz_mlp, widths=(8,)), epochs=10, random_state=0).fit(
        X_IRIS, SPECIES[Y_IRIS]
    )


def small(**parameters):
    return clone(TINY).set_params(**{"random_state": 0, **parameters})


@pytest.mark.slow
def test_defaults_learn_what_no_line_divides(binary):
    assert binary.score(X_MOONS, np.where(Y_MOONS == 1, "upper", "lower")) > 0.93
    assert binary.certified_score(X_MOONS, np.where(Y_MOONS == 1, "upper", "lower"), epsilon=0.1) > 0.85


def test_two_classes_are_the_signs_of_one_score(binary):
    scores = binary.decision_function(X_MOONS)
    assert scores.shape == (300,)
    assert binary.classes_.tolist() == ["lower", "upper"]
    assert np.array_equal(binary.predict(X_MOONS), np.where(scores > 0, "upper", "lower"))
    assert isinstance(binary.model_.loss, hkr.losses.HKR)


def test_more_classes_have_a_logit_each(multiclass):
    logits = multiclass.decision_function(X_IRIS)
    assert logits.shape == (150, 3)
    assert np.array_equal(multiclass.predict(X_IRIS), SPECIES[logits.argmax(axis=1)])
    assert multiclass.score(X_IRIS, SPECIES[Y_IRIS]) > 0.8
    assert isinstance(multiclass.model_.loss, hkr.losses.MulticlassHKR)


def test_there_are_no_probabilities(binary):
    assert not hasattr(binary, "predict_proba")


@pytest.mark.parametrize("name", ["binary", "multiclass"])
def test_no_change_within_the_radius_changes_the_prediction(name, request):
    classifier = request.getfixturevalue(name)
    x = (X_MOONS if name == "binary" else X_IRIS)[:100]
    certificate = classifier.certify(x)
    radius, prediction = classifier.certified_radius(x), classifier.predict(x)
    np.testing.assert_array_equal(radius, certificate.radius)
    np.testing.assert_array_equal(prediction, classifier.classes_[certificate.prediction])
    assert np.median(radius) > 0.05
    steps = normal((20, *x.shape))
    steps *= 0.999 * radius[:, None] / np.linalg.norm(steps, axis=2, keepdims=True)
    changed = classifier.predict((x + steps).reshape(-1, x.shape[1]))
    np.testing.assert_array_equal(changed.reshape(20, -1), np.tile(prediction, (20, 1)))


def test_the_radius_of_a_score_is_its_size_over_the_bound(binary):
    x = X_MOONS.astype("float32")
    expected = np.abs(binary.decision_function(x)) / hkr.lipschitz_bound(binary.model_)
    np.testing.assert_allclose(binary.certified_radius(x), expected, rtol=1e-5)


def test_radii_are_about_the_inputs_before_they_are_cast(binary):
    x = X_MOONS[:50]
    moved = np.linalg.norm(x - x.astype("float32"), axis=1)
    lost = binary.certified_radius(x.astype("float32")) - binary.certified_radius(x)
    assert moved.max() > 0
    np.testing.assert_allclose(lost, moved, atol=1e-12)


def test_certified_score_counts_right_labels_with_larger_radii(multiclass):
    y = SPECIES[Y_IRIS]
    right, radius = multiclass.predict(X_IRIS) == y, multiclass.certified_radius(X_IRIS)
    epsilon = float(np.median(radius))
    expected = np.mean(right & (radius > epsilon))
    assert multiclass.certified_score(X_IRIS, y, epsilon) == expected
    assert 0 < expected < multiclass.score(X_IRIS, y)
    assert multiclass.certified_score(X_IRIS, np.full(150, "unseen"), epsilon) == 0.0


def test_rigorous_radii_are_smaller(binary):
    x = X_MOONS[:20]
    assert binary.certify(x, rigorous=True).rigorous
    assert np.all(binary.certified_radius(x, rigorous=True) < binary.certified_radius(x))
    labels = binary.predict(x)
    epsilon = float(np.max(binary.certified_radius(x, rigorous=True)))
    assert binary.certified_score(x, labels, epsilon, rigorous=True) == 0.0
    assert binary.certified_score(x, labels, epsilon) > 0.0


def test_nothing_is_certified_before_fit():
    with pytest.raises(NotFittedError):
        HKRClassifier().certify(X_MOONS)


def test_the_seed_decides_weights_and_batches():
    fits = []
    for seed in (3, 3, 4):
        random.random()  # another state of Python's generator
        fits.append(small(random_state=seed, batch_size=16).fit(X_IRIS, Y_IRIS))
    first, again, other = ([to_numpy(weight) for weight in fit.model_.trainable_weights] for fit in fits)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 1e-4


def test_generators_of_others_are_left_alone():
    random.seed(5), np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.random()  # noqa: NPY002
    random.seed(5), np.random.seed(5)  # noqa: NPY002
    small().fit(X_IRIS, Y_IRIS)
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002


def test_every_batch_is_full_and_every_input_in_every_epoch():
    x = np.arange(10.0)[:, None]
    batches = module._FullBatches(x, np.arange(10), 4, np.random.RandomState(0))
    epochs = []
    for _ in range(2):
        inputs, labels = zip(*[batches[i] for i in range(len(batches))], strict=True)
        assert [len(y) for y in labels] == [4, 4, 4]
        np.testing.assert_array_equal(np.concatenate(inputs)[:, 0], np.concatenate(labels))
        epochs.append(np.concatenate(labels))
        assert sorted(epochs[-1][:10]) == list(range(10))
        batches.on_epoch_end()
    assert not np.array_equal(*epochs)


def test_pickle(multiclass):
    loaded = pickle.loads(pickle.dumps(multiclass))
    np.testing.assert_array_equal(loaded.predict(X_IRIS), multiclass.predict(X_IRIS))
    np.testing.assert_allclose(loaded.certified_radius(X_IRIS), multiclass.certified_radius(X_IRIS), atol=1e-6)
    assert loaded.history_ == multiclass.history_


def test_clones_keep_every_parameter():
    classifier = small(
        alpha=7.0, margin=0.2, epochs=2, batch_size=50, callbacks=[hkr.callbacks.LipschitzMonitor()], verbose=0
    )
    before, after = classifier.get_params(), clone(classifier).get_params()
    assert type(after.pop("callbacks")[0]) is type(before.pop("callbacks")[0])
    assert after.pop("model").keywords == before.pop("model").keywords
    assert after == before


def test_callbacks_are_copied_and_their_logs_kept():
    callback = hkr.callbacks.LipschitzMonitor()
    classifier = small(callbacks=[callback], alpha=7.0, margin=0.2).fit(X_IRIS, Y_IRIS)
    assert callback._model is None
    assert {name: len(values) for name, values in classifier.history_.items()} == {
        "accuracy": 3,
        "loss": 3,
        "lipschitz_bound": 3,
        "sigma_min": 3,
        "sigma_max": 3,
    }
    assert (classifier.model_.loss.alpha, classifier.model_.loss.margin) == (7.0, 0.2)
    assert classifier.model_.optimizer.iterations == 9  # 150 inputs are three batches of 64


def plain(input_shape, outputs):
    """Layers without constraints: only the callback keeps them orthonormal."""
    return keras.Sequential([keras.Input(input_shape), keras.layers.Dense(4), keras.layers.Dense(outputs)])


def test_models_of_plain_layers_are_one_lipschitz_too():
    classifier = small(model=plain).fit(X_MOONS, Y_MOONS)
    assert hkr.lipschitz_bound(classifier.model_) <= 1 + 1e-5
    for layer in classifier.model_.layers:
        values = np.linalg.svd(to_numpy(layer.kernel), compute_uv=False)
        np.testing.assert_allclose(values, 1.0, atol=2e-6)


def certified(pipeline, X, y):
    return pipeline[-1].certified_score(pipeline[:-1].transform(X), y, epsilon=0.25)


def test_selection_by_certified_accuracy_behind_a_scaler():
    pipeline = make_pipeline(StandardScaler(), small(epochs=10))
    search = GridSearchCV(pipeline, {"hkrclassifier__learning_rate": [1e-6, 0.1]}, scoring=certified, cv=2)
    search.fit(100 * X_IRIS, SPECIES[Y_IRIS])
    assert search.best_params_ == {"hkrclassifier__learning_rate": 0.1}
    best = search.best_estimator_
    scaled = best[:-1].transform(100 * X_IRIS)
    assert search.score(100 * X_IRIS, SPECIES[Y_IRIS]) == best[-1].certified_score(scaled, SPECIES[Y_IRIS], 0.25)
    assert len(best[-1].history_["loss"]) == 10


def test_cross_validation():
    scores = cross_val_score(small(epochs=10), X_IRIS, SPECIES[Y_IRIS], cv=2)
    assert scores.shape == (2,)
    assert scores.min() > 0.7


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"epochs": 0}, "at least 1. Received: epochs=0"),
        ({"epochs": 1.5}, "an integer of at least 1. Received: epochs=1.5"),
        ({"batch_size": -1}, "Received: batch_size=-1"),
        ({"alpha": -1.0}, "Received: alpha=-1"),
        ({"margin": np.nan}, "Received: margin=nan"),
        ({"model": "mlp"}, r"Expected a function \(input_shape, outputs\).* Received: model='mlp'"),
        ({"model": object()}, r"Expected a function \(input_shape, outputs\)"),
        ({"model": lambda shape, outputs: lipschitz_mlp(shape, 5, ())}, r"shape \(None, 3\). Received: .*\(None, 5\)"),
    ],
)
def test_parameters_out_of_range(parameters, message):
    with pytest.raises(ValueError, match=message):
        HKRClassifier(**parameters).fit(X_IRIS, Y_IRIS)


def test_one_class():
    with pytest.raises(ValueError, match="at least 2 classes"):
        HKRClassifier().fit(X_IRIS, np.zeros(150))


def test_errors_of_certified_score(binary):
    with pytest.raises(ValueError, match=r"Received: epsilon=-0\.1"):
        binary.certified_score(X_MOONS, Y_MOONS, epsilon=-0.1)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        binary.certified_score(X_MOONS, Y_MOONS[:5], epsilon=0.1)


X_DIABETES, Y_DIABETES = load_diabetes(return_X_y=True)
X_DIABETES = StandardScaler().fit_transform(X_DIABETES)


@pytest.fixture(scope="module")
def regressor():
    build = functools.partial(lipschitz_mlp, widths=(16,))
    return HKRRegressor(build, lipschitz=1.5, epochs=15, random_state=0).fit(X_DIABETES[:330], Y_DIABETES[:330])


def test_regression_learns(regressor):
    assert regressor.score(X_DIABETES[330:], Y_DIABETES[330:]) > 0.4
    assert (regressor.mean_, regressor.scale_) == pytest.approx((Y_DIABETES[:330].mean(), Y_DIABETES[:330].std()))
    assert hkr.lipschitz_bound(regressor.model_) <= 1.5 * (1 + 1e-5)


@pytest.mark.parametrize("rigorous", [False, True])
def test_no_change_within_epsilon_leaves_the_interval(regressor, rigorous):
    x, epsilon = X_DIABETES[330:380].astype("float32"), 0.3
    interval = regressor.certify(x, epsilon, rigorous)
    assert interval.rigorous == rigorous
    np.testing.assert_allclose(interval.value, regressor.predict(x), rtol=1e-5)
    assert (interval.lower < interval.value).all()
    assert (interval.value < interval.upper).all()
    widest = 2 * epsilon * 1.5 * regressor.scale_
    assert (interval.upper - interval.lower <= widest * (1 + 1e-3)).all()
    steps = normal((50, *x.shape))
    steps *= 0.999 * epsilon / np.linalg.norm(steps, axis=2, keepdims=True)
    moved = regressor.predict((x + steps).reshape(-1, 10)).reshape(50, -1)
    assert (interval.lower <= moved).all()
    assert (moved <= interval.upper).all()


def test_intervals_of_a_line_are_reached():
    """The network is `2 x / scale`: its intervals are as wide as the function that it computes demands."""
    x = np.array([[-1.0], [1.0]])
    line = HKRRegressor(plain_line, lipschitz=2.0, epochs=1, learning_rate=1e-9).fit(x, [0.0, 10.0])
    interval = line.certify(x, epsilon=0.25)
    ends = [line.predict(x + sign * 0.25) for sign in (-1, 1)]
    np.testing.assert_allclose(np.sort(ends, axis=0), [interval.lower, interval.upper], rtol=1e-5)
    assert interval.bound == pytest.approx(2.0 * line.scale_, rel=1e-5)


def plain_line(input_shape, outputs):
    return keras.Sequential([keras.Input(input_shape), hkr.layers.LipschitzDense(outputs)])


def test_the_certified_score_is_that_of_the_worst_change(regressor):
    x, y = X_DIABETES[330:], Y_DIABETES[330:]
    score = regressor.score(x, y)
    assert regressor.certified_score(x, y, 0.0) == pytest.approx(score, abs=1e-4)
    certified = regressor.certified_score(x, y, 0.2)
    assert certified < score - 0.05
    interval = regressor.certify(x, 0.2)
    worst = np.maximum(np.abs(interval.lower - y), np.abs(interval.upper - y))
    assert certified == pytest.approx(1 - np.square(worst).sum() / np.square(y - y.mean()).sum())


def test_regressors_survive_pickling_and_cloning(regressor):
    loaded = pickle.loads(pickle.dumps(regressor))
    np.testing.assert_array_equal(loaded.predict(X_DIABETES), regressor.predict(X_DIABETES))
    assert clone(regressor).get_params()["lipschitz"] == 1.5


def test_targets_without_spread_are_predicted():
    constant = clone(TINY_REGRESSOR).fit(X_MOONS, np.full(300, 7.0))
    assert constant.scale_ == 1.0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lipschitz": 0.0}, "Received: lipschitz=0"),
        ({"lipschitz": np.nan}, "Received: lipschitz=nan"),
        ({"epochs": 0}, "at least 1. Received: epochs=0"),
        ({"model": lambda shape, outputs: lipschitz_mlp(shape, 5, ())}, r"shape \(None, 1\). Received: .*\(None, 5\)"),
    ],
)
def test_parameters_of_regressors_out_of_range(parameters, message):
    with pytest.raises(ValueError, match=message):
        HKRRegressor(**parameters).fit(X_DIABETES, Y_DIABETES)


def test_numbers_whose_deviation_overflows_are_refused():
    with pytest.raises(ValueError, match="float64 can hold"):
        HKRRegressor(epochs=1).fit(np.eye(4), [1e200, -1e200, 0.0, 0.0])


def test_intervals_of_negative_distances_are_refused(regressor):
    with pytest.raises(ValueError, match=r"Received: epsilon=-0\.1"):
        regressor.certify(X_DIABETES, epsilon=-0.1)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(ImportError, match=r"pip install 'hkr_keras\[sklearn\]'"):
        runpy.run_path(module.__file__)
