"""The demo, as a user runs it, and the data sets behind it."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import hkr_keras as hkr
from hkr_keras.__main__ import demo, main


def test_digits_demo_reaches_its_figures(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["demo", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "certified accuracy at 0.25" in text
    assert str(output.resolve()) in text
    assert {path.name for path in output.iterdir()} == {"model.keras", "certificate.json", "certified_accuracy.png"}

    data = hkr.datasets.load("digits")
    model = keras.models.load_model(output / "model.keras")
    certificate = hkr.certify(model, data.x_test, verbose=0)
    assert certificate.accuracy(data.y_test) >= 0.975
    assert certificate.accuracy(data.y_test, epsilon=0.25) >= 0.86
    assert certificate.mean_radius(data.y_test) >= 0.53
    stored = json.loads((output / "certificate.json").read_text())
    np.testing.assert_allclose(stored["radius"], certificate.radius, atol=1e-4)
    assert stored["bound"] == certificate.bound


def test_moons_demo_draws_the_field(tmp_path):
    result = demo("moons", epochs=5, loss="hkr", seed=0, output=tmp_path, verbose=0)
    assert result["clean accuracy"] > 0.8
    assert result["proven Lipschitz constant"] <= 1 + 1e-6
    for name in ("field.png", "certified_accuracy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.many
@pytest.mark.parametrize("loss", ["soft_hkr", "log_sum_exp_hkr", "crossentropy", "kr", "hinge"])
def test_losses_of_the_demo(loss, tmp_path):
    result = demo("digits", epochs=1, loss=loss, seed=1, output=tmp_path, verbose=0)
    assert result["certified accuracy at 0.1"] <= result["clean accuracy"]


def test_seed_repeats_the_demo(tmp_path):
    first, again = (demo("moons", epochs=2, loss="kr", seed=3, output=tmp_path, verbose=0) for _ in range(2))
    assert first == again


def test_loss_that_does_not_fit(tmp_path, capsys):
    assert main(["demo", "--dataset", "moons", "--loss", "soft_hkr", "--output", str(tmp_path)]) == 2
    assert "Received: loss=soft_hkr" in capsys.readouterr().err


def test_epochs_below_one():
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--epochs", "0"])


def test_without_a_network_one_sentence(monkeypatch, capsys, tmp_path):
    def unreachable():
        raise OSError("URL fetch failure")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", unreachable)
    assert main(["demo", "--dataset", "mnist", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The data set 'mnist' is not on this machine")
    assert "Traceback" not in error


def test_stored_images_are_scaled(monkeypatch):
    images = np.arange(2 * 28 * 28, dtype="uint8").reshape(2, 28, 28)
    stored = ((images, np.array([1, 2], "uint8")), (images[:1], np.array([3], "uint8")))
    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", lambda: stored)
    data = hkr.datasets.load("fashion_mnist")
    assert data.x_train.shape == (2, 28, 28, 1)
    assert data.x_train.dtype == np.float32
    assert 0 <= data.x_train.min() <= data.x_train.max() == 1
    assert data.y_test.tolist() == [3]


def test_unknown_data_set():
    with pytest.raises(ValueError, match="Received: name=imagenet"):
        hkr.datasets.load("imagenet")


def test_module_runs_and_tells_its_version():
    command = [sys.executable, "-m", "hkr_keras", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    assert result.stdout.strip() == hkr.__version__


@pytest.fixture
def stored(tmp_path):
    """A stored model, and a file with four inputs and their labels."""
    model = hkr.models.lipschitz_mlp((2,), 1, widths=(4,))
    x = np.array([[0.0, 1.0], [1.0, 0.0], [-3.0, 0.5], [0.1, 0.1]], "float32")
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x, y=np.array([0, 1, 1, 0]))
    return tmp_path, hkr.certify(model, x, verbose=0)


def test_summary_of_a_stored_model(stored, capsys):
    folder, certificate = stored
    assert main(["summary", str(folder / "model.keras")]) == 0
    assert "LipschitzDense" in (text := capsys.readouterr().out)
    assert f"{certificate.bound:.6g}" in text


def test_certify_a_stored_model(stored, capsys):
    folder, certificate = stored
    files = {name: str(folder / name) for name in ("model.keras", "data.npz", "out.json", "curve.png")}
    options = ["--epsilon", "0.1", "0.25", "--json", files["out.json"], "--plot", files["curve.png"]]
    assert main(["certify", files["model.keras"], files["data.npz"], *options]) == 0
    assert f"{certificate.accuracy([0, 1, 1, 0], 0.25):.1%}" in capsys.readouterr().out
    again = hkr.Certificate.from_json((folder / "out.json").read_text())
    np.testing.assert_allclose(again.radius, certificate.radius, rtol=1e-6)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_export_a_stored_model(stored, capsys):
    folder, _ = stored
    name, kind = ("net", "tf_saved_model") if keras.backend.backend() == "jax" else ("net.onnx", "onnx")
    arguments = ["export", str(folder / "model.keras"), str(folder / name), "--format", kind]
    assert main([*arguments, "--preprocessing", "pixels / 16"]) == 0
    assert "radii from net" in capsys.readouterr().out
    certificate = json.loads(next(folder.glob("*.certificate.json")).read_text())
    assert certificate["preprocessing"] == "pixels / 16"


def test_rigorous_and_in_another_norm(stored, capsys):
    folder, _ = stored
    files = str(folder / "model.keras"), str(folder / "data.npz")
    rigorous = str(folder / "rigorous.json")
    assert main(["certify", *files, "--rigorous", "--norm", "inf", "--epsilon", "0.05", "--json", rigorous]) == 0
    text = capsys.readouterr().out
    assert "float32 network" in text
    assert "L-infinity" in text
    certificate = hkr.Certificate.from_json(pathlib.Path(rigorous).read_text())
    assert certificate.rigorous
    assert f"{certificate.accuracy([0, 1, 1, 0], 0.05, norm=np.inf):.1%}" in text


def test_summary_with_data_and_as_json(stored, capsys):
    folder, _ = stored
    out = folder / "summary.json"
    arguments = ["--data", str(folder / "data.npz"), "--json", str(out)]
    assert main(["summary", str(folder / "model.keras"), *arguments]) == 0
    assert "ratio" in capsys.readouterr().out
    summary = json.loads(out.read_text())
    assert 0 < summary["lower"] <= summary["bound"]


@pytest.mark.parametrize("broken", ["missing.keras", "garbage.keras", "code.keras"])
def test_a_broken_or_hostile_model_is_an_error(broken, stored, capsys):
    folder, _ = stored
    (folder / "garbage.keras").write_bytes(b"not a model")
    witness = str(folder / "executed")
    unsafe = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: (open(witness, "w").close(), x)[1])])
    unsafe.save(folder / "code.keras")
    pathlib.Path(witness).unlink(missing_ok=True)
    assert main(["certify", str(folder / broken), str(folder / "data.npz")]) == 2
    assert capsys.readouterr().err.startswith("error: Expected a Keras model file")
    assert not pathlib.Path(witness).exists()


@pytest.mark.parametrize("arrays", [None, {"z": np.ones(2)}, {"x": np.array([{}, 1], dtype=object)}])
def test_broken_data_are_an_error(arrays, stored, capsys):
    folder, _ = stored
    if arrays is None:
        (folder / "bad.npz").write_bytes(b"nothing")
    else:
        np.savez(folder / "bad.npz", **arrays)
    assert main(["certify", str(folder / "model.keras"), str(folder / "bad.npz")]) == 2
    assert capsys.readouterr().err.startswith("error: Expected an .npz file")
