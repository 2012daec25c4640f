"""Exported files in their own runtimes: equal outputs, equal certificates, and what does not fit is noticed."""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
from helpers import BACKEND, normal

import hkr_keras as hkr
from hkr_keras import exporting
from hkr_keras import layers as L

#: What Keras writes with this backend and the packages of the extra.
FORMATS = {"tensorflow": ["tf_saved_model", "onnx", "litert"], "torch": ["onnx"], "jax": ["tf_saved_model"]}[BACKEND]
NAMES = {"tf_saved_model": "net", "onnx": "net.onnx", "litert": "net.tflite"}


@pytest.fixture(scope="module")
def digits():
    return hkr.datasets.load("digits")


@pytest.fixture(scope="module")
def trained(digits):
    keras.utils.set_random_seed(0)
    model = hkr.models.lipschitz_cnn((8, 8, 1), 10, (8, 16), 32, orthogonal=True)
    model.compile(keras.optimizers.Adam(1e-2), hkr.losses.MulticlassHKR(100, 0.45))
    model.fit(digits.x_train, digits.y_train, epochs=3, verbose=0, callbacks=[hkr.callbacks.Orthonormalize()])
    return model


@pytest.fixture
def exported(folder, tmp_path):
    """A fresh copy of a file and its certificate."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path / NAMES[FORMATS[0]]


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    hkr.export(trained, folder / NAMES[FORMATS[0]], FORMATS[0])
    return folder


@pytest.mark.parametrize("format", FORMATS)
def test_no_certified_accuracy_is_lost_on_digits(trained, digits, format, tmp_path):
    path = tmp_path / NAMES[format]
    hkr.export(trained, path, format, preprocessing="pixels / 16")
    file = exporting.load(path)
    before = hkr.certify(trained, digits.x_test, verbose=0)
    after = file.certify(digits.x_test)
    assert before.accuracy(digits.y_test) > 0.7
    for epsilon in (None, 0.1, 0.25):
        assert after.accuracy(digits.y_test, epsilon) == before.accuracy(digits.y_test, epsilon)
    np.testing.assert_allclose(after.radius, before.radius, atol=1e-5)
    assert file.verify(trained, digits.x_test), file.verify(trained, digits.x_test).differences
    stored = json.loads((tmp_path / f"{NAMES[format]}.certificate.json").read_text())
    assert stored["preprocessing"] == "pixels / 16"
    assert stored["inputs"] == [{"name": trained.inputs[0].name, "shape": [None, 8, 8, 1], "dtype": "float32"}]
    assert after.dimension == 64

    other = hkr.models.lipschitz_cnn((8, 8, 1), 10, (8, 16), 32, orthogonal=True)
    differences = " ".join(file.verify(other, digits.x_test).differences)
    assert "model:" in differences
    assert "outputs:" in differences

    file.certificate = dataclasses.replace(file.certificate, method="logits")
    assert "method:" in " ".join(file.verify(trained, digits.x_test[:5]).differences)


def test_a_file_that_was_changed_is_noticed(exported):
    files = [exported] if exported.is_file() else sorted(each for each in exported.rglob("*") if each.is_file())
    file = files[0]
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ValueError, match="Expected the file that the certificate was written for"):
        exporting.load(exported)


def test_constants_of_a_score_and_of_logits_without_a_head():
    score = keras.Sequential([keras.Input((4,)), L.LipschitzDense(8), L.GroupSort(2), L.LipschitzDense(1)])
    logits = keras.Sequential([keras.Input((4,)), L.LipschitzDense(4), L.GroupSort(2)])
    pairwise = hkr.models.lipschitz_mlp((4,), 3, widths=(8,))
    x = normal((32, 4))
    for model, method in ((score, "score"), (logits, "logits"), (pairwise, "pairwise")):
        found = hkr.certify(model, x, verbose=0)
        certificate = exporting.ExportedCertificate(
            exporting.runtimes._distances(model, found.classes), found.bound, method, ({"shape": [None, 4]},)
        )
        again = certificate.of_outputs(model.predict(x, verbose=0))
        np.testing.assert_array_equal(again.prediction, found.prediction)
        np.testing.assert_allclose(again.radius, found.radius, rtol=1e-5, atol=1e-7)
        assert again.method == found.method
        read = exporting.ExportedCertificate.from_json(certificate.to_json())
        np.testing.assert_array_equal(read.distances, certificate.distances)
        assert read.versions == certificate.versions


def test_ties_are_not_certified_and_wrong_outputs_refused():
    certificate = exporting.ExportedCertificate(np.array([[0.0, 1.0], [1.0, 0.0]]), 1.0, "pairwise")
    assert certificate.of_outputs(np.array([[1.0, 1.0]])).radius[0] == 0
    for outputs in (np.ones((2, 3)), np.ones(2), np.array([[np.nan, 0.0]])):
        with pytest.raises(ValueError, match="Expected finite outputs"):
            certificate.of_outputs(outputs)


@pytest.mark.parametrize(
    "change",
    [
        *({"bound": -1.0}, {"bound": float("nan")}, {"norm": "Linf"}),
        *({"distances": [[1.0, 2.0]]}, {"distances": [[0.0, -1.0], [1.0, 0.0]]}, {"distances": 1.0}, {"bound": "1"}),
        *({"inputs": ["x"]}, {"inputs": [{"shape": ["4"]}]}, {"inputs": None}, {"model": 3}, {"method": ["score"]}),
    ],
)
def test_broken_certificates_are_refused(change):
    certificate = exporting.ExportedCertificate(np.array([[0.0, 1.0], [1.0, 0.0]]), 1.0, "pairwise")
    values = {**json.loads(certificate.to_json()), **change}
    with pytest.raises(ValueError, match="Expected the certificate of an exported file"):
        exporting.ExportedCertificate.from_json(json.dumps(values))
    with pytest.raises(ValueError, match="Expected the certificate of an exported file"):
        exporting.ExportedCertificate.from_json("[]")


def test_smaller_constants_than_those_of_the_model_are_noticed(exported, trained, digits):
    path = exporting.certificate_path(exported)
    certificate = exporting.ExportedCertificate.from_json(path.read_text())
    path.write_text(dataclasses.replace(certificate, distances=certificate.distances / 2).to_json())
    differences = " ".join(exporting.load(exported).verify(trained, digits.x_test[:20]).differences)
    assert "constants" in differences
    assert "radii" in differences


def test_nothing_is_exported_that_has_no_certificate(tmp_path):
    binary = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")])
    with pytest.raises(ValueError, match="Expected a raw score"):
        hkr.export(binary, tmp_path / "net.onnx", "onnx")
    with pytest.raises(FileNotFoundError):
        exporting.load(tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
