"""Data of every kind: the certificate is that of the arrays, labels are kept, and one batch is held at a time."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers import BACKEND

import hkr_keras as hkr
from hkr_keras.certification import prediction
from hkr_keras.certification.batches import batches, to_float32

X = np.random.default_rng(0).normal(size=(22, 4)).astype("float32")
Y = np.arange(22) % 3


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((4,)), hkr.layers.LipschitzDense(8), hkr.layers.GroupSort(2), keras.layers.Dense(3)]
    )


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return X[6 * index : 6 * index + 6], Y[6 * index : 6 * index + 6]


def parts():
    return ((X[start : start + 6], Y[start : start + 6]) for start in range(0, 22, 6))


def tensorflow_data(with_labels=True):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((X, Y) if with_labels else X).batch(6)


def torch_data():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(X, requires_grad=True), torch.tensor(Y))
    return torch.utils.data.DataLoader(data, batch_size=6)


LABELLED = {
    "PyDataset": Sequence,
    "generator": parts,
    "list_of_one_hot": lambda: iter([(x, np.eye(3)[y]) for x, y in parts()]),
    "with_weights": lambda: ((x, y, np.ones(len(x))) for x, y in parts()),
    "tf.data": tensorflow_data,
    "DataLoader": torch_data,
}


@pytest.mark.once
@pytest.mark.parametrize("name", LABELLED)
def test_labels_stay_with_the_certificate(model, name):
    expected = hkr.certify(model, X, verbose=0)
    found = hkr.certify(model, LABELLED[name](), verbose=0)
    np.testing.assert_allclose(found.radius, expected.radius, rtol=1e-4, atol=1e-6)
    assert found.prediction.tolist() == expected.prediction.tolist()
    assert found.labels.tolist() == Y.tolist()
    assert found.accuracy() == expected.accuracy(Y)
    assert found.accuracy(epsilon=0.1) == expected.accuracy(Y, 0.1)
    assert found[3:9].labels.tolist() == Y[3:9].tolist()
    again = hkr.Certificate.from_json(found.to_json())
    assert again.accuracy() == expected.accuracy(Y)
    assert again.verify(model, LABELLED[name](), verbose=0)
    wrong = ((x, (y + 1) % 3) for x, y in parts())
    assert "labels" in " ".join(again.verify(model, wrong, verbose=0).differences)
    assert hkr.certify_top_k(model, LABELLED[name](), 2, verbose=0).accuracy(epsilon=0.1) <= 1


@pytest.mark.once
@pytest.mark.parametrize("x", [X.tolist(), [X], list(X), (row for row in (X[:10], X[10:])), X.astype("float64")])
def test_without_labels(model, x):
    found = hkr.certify(model, x, verbose=0)
    np.testing.assert_allclose(found.radius, hkr.certify(model, X, verbose=0).radius, rtol=1e-4, atol=1e-6)
    assert found.labels is None
    with pytest.raises(ValueError, match="none came with the inputs"):
        found.accuracy()


@pytest.mark.skipif(BACKEND != "torch", reason="tensors of PyTorch")
def test_tensors_that_require_gradients(model):
    import torch

    assert len(hkr.certify(model, torch.tensor(X, requires_grad=True), verbose=0)) == 22


def test_one_batch_is_held_at_a_time(model):
    alive = []

    def watched():
        import weakref

        for _ in range(5):
            x = np.array(X)
            alive.append(weakref.ref(x))
            yield x
            del x

    hkr.certify(model, watched(), verbose=0)
    stream, _ = batches(model, watched(), 128)
    for _ in stream:
        assert sum(each() is not None for each in alive) <= 2


@pytest.mark.once
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0], r"x\[:1\]"),
        (iter([]), "at least one input"),
        (iter([(X, Y[:3])]), "Expected 22 labels"),
        (iter([(X, Y), X]), "every batch or in none"),
        (iter([X[:, :2]]), "was made for"),
        (iter([X[0]]), r"x\[:1\]"),
        ("abc", "Expected"),
        (np.ma.masked_greater(X, 1.0), "sees no mask"),
        ((X, np.ma.masked_equal(Y, 0)), "sees no mask"),
    ],
)
def test_data_that_are_refused(model, x, message):
    with pytest.raises(ValueError, match=message):
        hkr.certify(model, x, verbose=0)


@pytest.mark.once
def test_endless_data_are_refused(model):
    class Endless(Sequence):
        @property
        def num_batches(self):
            return None

    with pytest.raises(ValueError, match="data that end"):
        hkr.certify(model, Endless(), verbose=0)


def test_rounding_to_float32_is_measured():
    for array in (np.array([[0.1, 3.0]]), np.array([[2**24 + 1, 0]]), np.array([[True, False]])):
        (single,), moved = to_float32([array])
        exact = np.linalg.norm((array.astype(np.longdouble) - single).astype("float64"))
        assert exact <= moved[0] <= exact * (1 + 1e-8)
        assert str(single.dtype) == "float32"


# ---- types on the way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8", "int32", "bool"])
def test_inputs_of_few_digits_are_refused(dtype):
    inputs = keras.Input((1,), dtype=dtype)
    outputs = keras.layers.Dense(1, dtype="float32")(keras.layers.Rescaling(1.0, dtype="float32")(inputs))
    with pytest.raises(ValueError, match="Expected inputs"):
        hkr.certify(keras.Model(inputs, outputs), np.ones((1, 1)), verbose=0)


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.parametrize("rigorous", [False, True])
def test_nested_inputs_of_few_digits_are_refused(dtype, rigorous):
    net = keras.Sequential(
        [keras.Input((4,), dtype=dtype), keras.layers.Rescaling(1 / 255.0, dtype="float32"), keras.layers.Dense(2)]
    )
    x = keras.Input((4,))
    with pytest.raises(ValueError, match="Expected"):
        hkr.certify(keras.Model(x, net(x)), np.ones((1, 4)), verbose=0, rigorous=rigorous)


@pytest.mark.parametrize("floatx", ["float16", "bfloat16"])
def test_a_global_floatx_of_few_digits_is_refused(model, floatx):
    keras.config.set_floatx(floatx)
    with pytest.raises(ValueError, match="floatx"):
        hkr.certify(model, X, verbose=0)


# ---- one predictor per model ----------------------------------------------------------------------------------

compiles = pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled on PyTorch")


def known(model):
    return prediction._PREDICTORS[model][1]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow counts how often a function is traced")
def test_many_models_are_not_one_that_is_traced_anew(caplog):
    import tensorflow

    logger = tensorflow.get_logger()
    logger.addHandler(caplog.handler)
    try:
        for units in range(2, 9):
            hkr.certify(keras.Sequential([keras.Input((4,)), keras.layers.Dense(units)]), X, verbose=0)
    finally:
        logger.removeHandler(caplog.handler)
    assert "retracing" not in caplog.text


@compiles
def test_a_predictor_lives_through_training(model):
    hkr.certify(model, X, verbose=0)
    before = known(model)
    model.compile("sgd", hkr.losses.MulticlassHKR(10, 0.5))
    model.fit(X, Y, verbose=0)
    model.predict(X, verbose=0)
    certificate = hkr.certify(model, X, verbose=0)
    assert known(model) is before
    np.testing.assert_array_equal(certificate.prediction, model.predict(X, verbose=0).argmax(axis=1))


def test_numbers_that_change_are_noticed():
    model = keras.Sequential([keras.Input((4,)), hkr.layers.Scale(1.0), keras.layers.Dense(3)])
    first = hkr.certify(model, X, verbose=0)
    model.layers[0].k = 2.0
    second = hkr.certify(model, X, verbose=0)
    other = keras.Sequential([keras.Input((4,)), hkr.layers.Scale(2.0), keras.layers.Dense(3)])
    other.set_weights(model.get_weights())
    np.testing.assert_allclose(second.radius, hkr.certify(other, X, verbose=0).radius, rtol=1e-6)
    assert first.bound == pytest.approx(second.bound / 2)


@compiles
def test_a_predictor_is_made_anew_when_something_changed():
    model = keras.Sequential([keras.Input((4,)), hkr.layers.Scale(1.0), keras.layers.Dense(3), keras.layers.ReLU()])

    def changed(change):
        hkr.certify(model, X, verbose=0)
        before = known(model)
        change()
        hkr.certify(model, X, verbose=0)
        return known(model) is not before

    assert not changed(lambda: None)
    assert changed(lambda: setattr(model.layers[0], "k", 2.0))
    assert changed(lambda: setattr(model.layers[1], "activation", keras.activations.tanh))
    assert changed(lambda: setattr(model.layers[2], "negative_slope", 0.5))
    assert changed(lambda: setattr(model.layers[1], "trainable", False))
    assert changed(model.pop)


@pytest.mark.once
def test_nothing_is_known_of_code_of_ones_own():
    class Mine(keras.layers.Layer):
        def call(self, inputs):
            return inputs

    assert prediction.fingerprint(keras.Sequential([keras.Input((2,)), Mine()])) is None
    own = keras.layers.Activation(lambda x: x)
    assert prediction.fingerprint(keras.Sequential([keras.Input((2,)), own])) is None


# ---- files that were changed ----------------------------------------------------------------------------------


def test_the_slack_of_an_input_is_its_own(model):
    x = np.concatenate([X, np.full((1, 4), 1e6, "float32")])
    certificate = hkr.certify(model, x, verbose=0)
    assert certificate.verify(model, x, verbose=0)
    radius = certificate.radius.copy()
    radius[3] += 1e-3
    forged = dataclasses.replace(certificate, radius=radius)
    assert "radius of input 3" in " ".join(forged.verify(model, x, verbose=0).differences)


@pytest.mark.once
@pytest.mark.parametrize(
    "change",
    [
        {"norm": "Linf"},
        *({"bound": value} for value in (float("nan"), 0, -1, True, "1", float("inf"))),
        *({"classes": value} for value in (2.5, 0, -1, "3", True, 1)),
        *({"prediction": value} for value in ([-1], [3], [0.5], ["0"], [True], "0", [0, 1])),
        *({"radius": value} for value in ("1", ["0.5"], [-1.0], [float("nan")], [True], [float("inf")], 0.5, [])),
        *({"method": "guess"}, {"method": "score"}, {"rigorous": "yes"}, {"rigorous": 1}),
        *({"model_sha256": "abc"}, {"model_sha256": 3}, {"versions": {"keras": 3}}, {"versions": []}),
        *({"labels": [5]}, {"labels": "0"}, {"labels": [0, 1]}, {"dimension": True}),
        *({"rival": [5]}, {"rival": "0"}, {"rival": [0, 2]}, {"rival": [1]}, {"rival": 0}, {"rival": [None]}),
    ],
)
def test_what_no_certificate_holds_is_refused(change):
    import json

    certificate = hkr.Certificate(
        radius=np.array([0.5]), prediction=np.array([1]), bound=1.0, classes=3, method="pairwise"
    )
    values = json.loads(certificate.to_json())
    assert hkr.Certificate.from_json(json.dumps(values)).radius.tolist() == [0.5]
    with pytest.raises(ValueError, match="Expected the JSON text of a certificate"):
        hkr.Certificate.from_json(json.dumps({**values, **change}))


# ---- results to look at ---------------------------------------------------------------------------------------


@pytest.mark.once
def test_results_are_shown_and_tabled(model, tmp_path):
    pytest.importorskip("pandas")
    certificate = hkr.certify(model, X, verbose=0)
    assert repr(certificate).startswith("Certificate(22 inputs, 3 classes, bound ")
    assert len(repr(certificate)) < 120
    assert "<svg" in certificate._repr_html_()
    frame = certificate.to_frame(Y)
    assert list(frame.columns) == ["label", "prediction", "radius", "rival", "correct"]
    assert frame["radius"].tolist() == certificate.radius.tolist()
    certificate.to_csv(tmp_path / "radii.csv")
    rows = (tmp_path / "radii.csv").read_text().splitlines()
    assert rows[0] == "prediction,radius,rival"
    assert len(rows) == 23
    shares = certificate.accuracy(Y, [0.1, 0.2])
    assert shares.tolist() == [certificate.accuracy(Y, 0.1), certificate.accuracy(Y, 0.2)]
    report = certificate.report(Y, [0.1])
    assert [row[0] for row in report.rows] == ["all", "0", "1", "2"]
    assert report.rows[0][1:4] == (22, certificate.accuracy(Y), certificate.accuracy(Y, 0.1))
    assert sum(row[1] for row in report.rows[1:]) == 22
    assert "<table" in report._repr_html_()
    assert len(certificate[2]) == 1
    assert len(certificate[certificate.is_correct(Y)]) == certificate.is_correct(Y).sum()
    top = hkr.certify_top_k(model, X, 2, verbose=0)
    outputs = hkr.certify_outputs(model, X, 0.1, verbose=0)
    for result in (top, outputs):
        assert len(result[:5]) == 5
        assert len(result.to_frame()) == 22
        assert "Certificate(22 inputs" in result._repr_html_()
        result.to_csv(tmp_path / "rows.csv")
        assert len((tmp_path / "rows.csv").read_text().splitlines()) == 23
        assert len(repr(result)) < 120


@pytest.mark.once
def test_inputs_are_as_nested_as_those_of_the_model():
    keras.utils.set_random_seed(0)
    first, second, third = (keras.Input((1,), name=name) for name in ("a1", "a2", "b"))
    joined = keras.layers.Concatenate()([first, second, third])
    model = keras.Model({"a": [first, second], "b": third}, keras.layers.Dense(3)(joined))
    x = [X[:, i : i + 1] for i in range(3)]
    expected = hkr.certify(keras.Model([first, second, third], model.output), x, verbose=0)
    for given in ({"b": x[2], "a": x[:2]}, x):
        found = hkr.certify(model, given, verbose=0)
        np.testing.assert_allclose(found.radius, expected.radius)
    for wrong in ({"a": x[:2]}, {"a": x[0], "b": x[2]}, {"a": x, "b": x[2]}):
        with pytest.raises(ValueError, match="Expected"):
            hkr.certify(model, wrong, verbose=0)
