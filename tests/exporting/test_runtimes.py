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
    if BACKEND == "jax":  # which compiles every convolution anew
        model = hkr.models.lipschitz_mlp((8, 8, 1), 10, (64, 32))
    else:
        model = hkr.models.lipschitz_cnn((8, 8, 1), 10, (8, 16), 32, orthogonal=True)
    model.compile(keras.optimizers.Adam(1e-2), hkr.losses.MulticlassHKR(100, 0.45))
    model.fit(digits.x_train, digits.y_train, epochs=3, verbose=0, callbacks=[hkr.callbacks.Orthonormalize()])
    return model


def small():
    keras.utils.set_random_seed(0)
    return hkr.models.lipschitz_mlp((8, 8, 1), 10, widths=(8,))


@pytest.fixture
def exported(folder, tmp_path):
    """A fresh copy of the file of `small()` and its certificate."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path / NAMES[FORMATS[0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    hkr.export(small(), folder / NAMES[FORMATS[0]])
    return folder


@pytest.mark.many
@pytest.mark.slow
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

    other = keras.models.clone_model(trained)
    differences = " ".join(file.verify(other, digits.x_test).differences)
    assert "model:" in differences
    assert "outputs:" in differences

    file.certificate = dataclasses.replace(file.certificate, method="logits")
    assert "method:" in " ".join(file.verify(trained, digits.x_test[:5]).differences)


def test_shifts_of_channels_run_where_files_run(tmp_path):
    model, path = hkr.models.lipschitz_shift_net((4, 4, 1), 3), tmp_path / NAMES[FORMATS[-1]]
    hkr.export(model, path)
    assert exporting.load(path).verify(model, normal((5, 4, 4, 1)))


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
        distances, bound = exporting.certificate.constants(model, found.classes)
        assert found.bound <= bound < found.bound * (1 + 1e-5)
        certificate = exporting.ExportedCertificate(
            distances=distances, bound=bound, method=method, inputs=({"shape": [None, 4]},)
        )
        again = certificate.of_outputs(model.predict(x, verbose=0))
        np.testing.assert_array_equal(again.prediction, found.prediction)
        np.testing.assert_allclose(again.radius, found.radius, rtol=1e-5, atol=1e-7)
        assert again.method == found.method
        read = exporting.ExportedCertificate.from_json(certificate.to_json())
        np.testing.assert_array_equal(read.distances, certificate.distances)
        assert read.versions == certificate.versions


def of_two(distance=1.0):
    distances = distance * (1 - np.eye(2))
    return exporting.ExportedCertificate(distances=distances, bound=1.0, method="pairwise")


@pytest.mark.once
@pytest.mark.parametrize("distances", [np.zeros((2, 2)), np.zeros((1, 1)), np.array([[0.0, 0.0], [1.0, 0.0]])])
def test_distances_of_0_are_no_constants(distances):
    method = "score" if len(distances) == 1 else "pairwise"
    with pytest.raises(ValueError, match="positive and finite constants"):
        exporting.ExportedCertificate(distances=distances, bound=1.0, method=method)


def plain_file(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, kernel_initializer="identity")])
    hkr.export(model, tmp_path / NAMES[FORMATS[0]])
    return model, exporting.load(tmp_path / NAMES[FORMATS[0]])


def test_inputs_and_outputs_of_a_file_have_slack_of_their_own(tmp_path, monkeypatch):
    model, file = plain_file(tmp_path)
    far_and_near = np.array([[1e6, 0.0], [1e-3, 0.0]], "float32")
    assert file.verify(model, far_and_near)
    run = file._run
    monkeypatch.setattr(file, "_run", lambda arrays: run(arrays) + 0.1 * (np.abs(arrays[0]).max(axis=1) < 1)[:, None])
    assert "outputs" in " ".join(file.verify(model, far_and_near).differences)  # radii are those of the model

    moved = np.array([[1e8 + 4.5, 1e8]])  # float32 has steps of 8 there
    assert 0 < file.certify(moved).radius[0] <= 4.5 / 2**0.5


@pytest.mark.once
def test_every_file_of_a_folder_is_hashed(tmp_path):
    (tmp_path / "variables").mkdir()
    files = [tmp_path / "saved_model.pb", tmp_path / "variables" / "variables.index", tmp_path / "variables" / "data"]
    for file in files:
        file.write_bytes(b"12345")
    found = {exporting.certificate.file_hash(tmp_path)}
    for file in files:
        file.write_bytes(b"12346")
        found.add(exporting.certificate.file_hash(tmp_path))
    files[-1].rename(tmp_path / "data")
    found.add(exporting.certificate.file_hash(tmp_path))
    assert len(found) == 5


def test_ties_are_not_certified_and_wrong_outputs_refused():
    certificate = of_two()
    assert certificate.of_outputs(np.array([[1.0, 1.0]])).radius[0] == 0
    for outputs in (np.ones((2, 3)), np.ones(2), np.array([[np.nan, 0.0]])):
        with pytest.raises(ValueError, match="Expected finite outputs"):
            certificate.of_outputs(outputs)


@pytest.mark.once
@pytest.mark.parametrize(
    "change",
    [
        *({"bound": -1.0}, {"bound": float("nan")}, {"norm": "Linf"}),
        *({"distances": [[1.0, 2.0]]}, {"distances": [[0.0, -1.0], [1.0, 0.0]]}, {"distances": 1.0}, {"bound": "1"}),
        *(
            {"distances": [[0.0, 0.0], [0.0, 0.0]]},
            {"distances": [[0.0, 1.0], [2.0, 0.0]]},
            {"distances": [[1, 1], [1, 1]]},
        ),
        *({"distances": [[0.0, "1"], ["1", 0.0]]}, {"distances": [[True, 1], [1, True]]}, {"distances": []}),
        *({"method": "score"}, {"method": "guess"}, {"format": "pickle"}, {"bound": True}, {"bound": 1e999}),
        *({"inputs": [{"shape": [None, 2.5]}]}, {"inputs": [{"shape": "12"}]}, {"versions": {"keras": 3}}),
        *({"inputs": ["x"]}, {"inputs": [{"shape": ["4"]}]}, {"inputs": None}, {"model": 3}, {"method": ["score"]}),
    ],
)
def test_broken_certificates_are_refused(change):
    certificate = of_two()
    values = {**json.loads(certificate.to_json()), **change}
    with pytest.raises(ValueError, match="Expected the certificate of an exported file"):
        exporting.ExportedCertificate.from_json(json.dumps(values))
    with pytest.raises(ValueError, match="Expected the certificate of an exported file"):
        exporting.ExportedCertificate.from_json("[]")


def test_smaller_constants_than_those_of_the_model_are_noticed(exported):
    path = exporting.certificate.certificate_path(exported)
    certificate = exporting.ExportedCertificate.from_json(path.read_text())
    path.write_text(dataclasses.replace(certificate, distances=certificate.distances / 2).to_json())
    differences = " ".join(exporting.load(exported).verify(small(), normal((20, 8, 8, 1))).differences)
    assert "constants" in differences
    assert "radius of input" in differences


def test_nothing_is_exported_that_has_no_certificate(tmp_path):
    binary = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")])
    with pytest.raises(ValueError, match="Expected a raw score"):
        hkr.export(binary, tmp_path / NAMES[FORMATS[0]])
    with pytest.raises(FileNotFoundError):
        exporting.load(tmp_path / NAMES[FORMATS[0]])
    assert not list(tmp_path.iterdir())


def test_constants_grow_with_the_number_of_rounded_numbers(tmp_path):
    """Each factor is rounded to float32 in the file, which makes all of them together 1e-5 larger than they were."""
    factor = 1 + 2.0**-24 + 2.0**-40
    model = keras.Sequential([keras.Input((1,)), *(L.Scale(factor) for _ in range(200)), keras.layers.Dense(1)])
    model.layers[-1].set_weights([np.ones((1, 1), "float32"), np.array([-1000.0], "float32")])
    distances, bound = exporting.certificate.constants(model, 1)
    stored = float(np.float32(factor)) ** 200
    assert stored <= distances[0, 0] <= bound < stored * (1 + 1e-3)


@pytest.mark.skipif("onnx" not in FORMATS, reason="Keras writes no ONNX with this backend")
def test_weights_in_a_file_of_their_own_count(tmp_path):
    import onnx

    hkr.export(hkr.models.lipschitz_mlp((64,), 3, widths=(64,)), tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    for path in tmp_path.iterdir():
        path.unlink() if path.name != "net.onnx.certificate.json" else None
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=16)
    before = exporting.certificate.file_hash(tmp_path / "net.onnx")
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert exporting.certificate.file_hash(tmp_path / "net.onnx") != before
    weights.unlink()
    with pytest.raises(ValueError, match="beside it"):
        exporting.certificate.file_hash(tmp_path / "net.onnx")


@pytest.mark.once
@pytest.mark.parametrize(
    ("path", "format", "message"),
    [
        ("net.onnx", "litert", "ends in .tflite"),
        ("net.tflite", "tf_saved_model", "path of a folder"),
        ("net", "onnx", "ends in .onnx"),
        ("net.h5", None, "ending in .onnx or .tflite"),
        ("net.onnx", "keras", "Received: format=keras"),
    ],
)
def test_a_suffix_that_does_not_fit_is_refused(path, format, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        hkr.export(hkr.models.lipschitz_mlp((4,), 3, widths=()), tmp_path / path, format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"optimizations": ["DEFAULT"]}, {"representative_dataset": None}])
def test_options_that_change_the_function_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match=f"Received: {next(iter(options))}"):
        hkr.export(hkr.models.lipschitz_mlp((4,), 3, widths=()), tmp_path / NAMES[FORMATS[0]], **options)


@pytest.mark.once
def test_without_packages_another_backend_is_named(tmp_path, monkeypatch):
    def export(*args, **kwargs):
        raise ImportError("jax2onnx")

    monkeypatch.setattr(keras.Model, "export", export)
    model = hkr.models.lipschitz_mlp((4,), 3, widths=(8,))
    advice = r"KERAS_BACKEND=tensorflow hkr_keras export model.keras .*net"
    with pytest.raises(ImportError, match=rf"jax2onnx.*{advice}.onnx"):
        hkr.export(model, tmp_path / "net.onnx")
    monkeypatch.setattr(keras.Model, "export", lambda *args, **kwargs: pytest.fail("work began"))
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ValueError, match=rf"PyTorch writes no SavedModel.*{advice}"):
        hkr.export(model, tmp_path / "net")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    monkeypatch.setattr(exporting.runtimes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Exports to onnx with jax need jax2onnx.*KERAS_BACKEND=torch"):
        hkr.export(model, tmp_path / "net.onnx")


def test_a_file_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    original = exporting.ExportedModel.predict
    monkeypatch.setattr(exporting.ExportedModel, "predict", lambda file, x: original(file, x) * 1.001)
    path = tmp_path / NAMES[FORMATS[0]]
    with pytest.raises(ValueError, match="outputs are those of the model"):
        hkr.export(hkr.models.lipschitz_mlp((4,), 3, widths=(8,)), path)
    assert not exporting.certificate.certificate_path(path).exists()


def of_inputs(names, used=None, mapping=False):
    inputs = {name: keras.Input((index + 2,), name=name) for index, name in enumerate(names)}
    hidden = keras.layers.Concatenate()([inputs[name] for name in used or names])
    inputs = inputs if mapping else list(inputs.values())
    return keras.Model(inputs, keras.layers.Dense(2)(L.Scale(5.0)(hidden)))


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_are_given_by_name(format, tmp_path):
    """LiteRT has an order of its own; the outputs are compared, so that a file in another order is noticed at once."""
    model = of_inputs(("k", "c", "b", "a"))
    hkr.export(model, tmp_path / NAMES[format])
    file, x = exporting.load(tmp_path / NAMES[format]), [normal((5, size), size) for size in (2, 3, 4, 5)]
    np.testing.assert_allclose(file.predict(x), model.predict(x, verbose=0), atol=1e-5)
    assert file.verify(model, x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: of_inputs(("a", "b", "c"), used=("a", "c")), "does not depend on b"),
        (lambda: of_inputs(("a", "b"), mapping=True), "inputs in a dict"),
    ],
)
def test_inputs_that_no_file_takes_are_refused(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        hkr.export(model(), tmp_path / NAMES[FORMATS[0]])
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_a_file_with_other_names_is_refused():
    with pytest.raises(ValueError, match="Received: a, c, path=net"):
        exporting.runtimes._in_order(["a", "c"], ["a", "b"], "net")


@pytest.mark.parametrize(
    "x",
    [
        *(np.ones((2, 7, 8, 1)), np.ones((2, 8, 8)), np.ones((8, 8, 1)), np.full((2, 8, 8, 1), "a")),
        *([np.ones((2, 8, 8, 1))] * 2, np.ones((2, 8, 8, 1), complex)),
    ],
    ids=lambda x: str(np.shape(x)),
)
def test_a_file_takes_the_shapes_of_its_model(x, exported):
    file = exporting.load(exported)
    for run in (file.predict, file.certify):
        with pytest.raises(ValueError, match="Expected arrays of numbers of the shapes"):
            run(list(x) if isinstance(x, list) else x)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused_whatever_the_outputs(value, monkeypatch):
    """A pooling of the runtime may take the number beside NaN, and relu6 ends at 6."""
    monkeypatch.setitem(exporting.runtimes._RUNTIMES, "onnx", lambda path, names: lambda arrays: np.ones((2, 1)))
    inputs = ({"name": "x", "shape": [None, 3], "dtype": "float32"},)
    certificate = exporting.ExportedCertificate(
        distances=np.ones((1, 1)), bound=1.0, method="score", inputs=inputs, format="onnx"
    )
    x = np.ones((2, 3), "float32")
    file = exporting.ExportedModel("net.onnx", certificate)
    assert file.certify(x).radius.shape == (2,)
    x[0, 0] = value
    for wrong in (x, x.astype("float64"), x[:0]):
        with pytest.raises(ValueError, match="finite inputs"):
            file.certify(wrong)
