"""The command line, as a user runs it: arguments, files and backend before Keras; then what every command does."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

import hkr_keras as hkr
from hkr_keras import cli
from hkr_keras.cli import demo, main

pytestmark = pytest.mark.once


@pytest.mark.slow
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


def test_without_a_network_one_sentence(monkeypatch, capsys, tmp_path):
    def unreachable():
        raise OSError("URL fetch failure")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", unreachable)
    assert main(["demo", "--dataset", "mnist", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The data set 'mnist' is not on this machine")
    assert "Traceback" not in error


WITHOUT_KERAS = {**os.environ, "KERAS_BACKEND": "openvino_of_another_kind"}  # with it, importing Keras fails
SCRIPT = "import sys; sys.argv[0] = '/somewhere/bin/hkr_keras'; from hkr_keras.cli import main; sys.exit(main())"


@pytest.mark.parametrize("command", [["-m", "hkr_keras"], ["-c", SCRIPT]], ids=["module", "script"])
@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--version"], 0, hkr.__version__),
        (["--help"], 0, "1-Lipschitz networks with certificates."),
        (["certify", "--help"], 0, "--rigorous"),
        (["train"], 2, "invalid choice: 'train'"),
        (["demo", "--epochs", "0"], 2, "expected a whole number of at least 1, received 0"),
        (["demo", "--seed", "-1"], 2, "expected a whole number of at least 0 and at most 4294967295, received -1"),
        (["certify", "model.keras"], 2, "the following arguments are required: data"),
        (["certify", "missing.keras", "data.npz"], 2, "error: no such file: missing.keras"),
    ],
)
def test_arguments_are_answered_before_keras_is_imported(command, arguments, status, text):
    result = subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, check=False, env=WITHOUT_KERAS
    )
    assert result.returncode == status
    assert text in result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == (status == 2)


def test_other_programs_are_not_taken_for_the_command_line():
    code = "import sys; sys.argv = ['tool', '--help']; import hkr_keras; print(hkr_keras.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == hkr.__version__


def test_an_error_is_one_line(stored):
    """Whatever the backend would log, only the sentence is on the screen."""
    folder, _ = stored
    shutil.copy(folder / "data.npz", folder / "garbage.keras")
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    arguments = ["certify", str(folder / "garbage.keras"), str(folder / "data.npz")]
    result = subprocess.run(
        [sys.executable, "-m", "hkr_keras", *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: Expected a Keras model file that loads in safe mode")
    assert len(result.stderr.splitlines()) == 1


def test_verbose_errors_have_a_traceback(stored):
    folder, _ = stored
    shutil.copy(folder / "data.npz", folder / "garbage.keras")
    with pytest.raises(ValueError, match="Expected a Keras model file"):
        main(["certify", str(folder / "garbage.keras"), str(folder / "data.npz"), "--verbose"])


@pytest.fixture
def unchosen(monkeypatch, tmp_path):
    """No backend in the environment, and no configuration of Keras."""
    monkeypatch.setenv("KERAS_BACKEND", "to be removed, and put back")
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return tmp_path


def test_the_first_installed_backend_is_taken_and_said(unchosen, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_is_installed", lambda module: module == "torch")
    (unchosen / "keras.json").write_text('{"backend": "tensorflow"}')  # Keras itself writes such a file
    cli._choose_backend()
    assert os.environ["KERAS_BACKEND"] == "torch"
    assert capsys.readouterr().err == "tensorflow is not installed: computing with torch (KERAS_BACKEND=torch)\n"


@pytest.mark.parametrize("configuration", [None, "{", "[]", '{"backend": "jax"}', '{"backend": "numpy"}'])
def test_what_is_installed_is_left_to_keras(configuration, unchosen, monkeypatch):
    monkeypatch.setattr(cli, "_is_installed", lambda module: True)
    if configuration is not None:
        (unchosen / "keras.json").write_text(configuration)
    cli._choose_backend()
    assert "KERAS_BACKEND" not in os.environ


def test_without_any_backend_one_line_says_what_to_install(unchosen, monkeypatch, capsys, stored):
    monkeypatch.setattr(cli, "_is_installed", lambda module: False)
    assert main(["summary", str(stored[0] / "model.keras")]) == 2
    assert capsys.readouterr().err.startswith("error: Keras has no backend to compute with. Install one: pip install")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert main(["summary", str(stored[0] / "model.keras")]) == 2
    assert capsys.readouterr().err.startswith("error: KERAS_BACKEND=jax, but jax is not installed: pip install jax")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["certify", "model.keras", "missing.npz"], "no such file: {}/missing.npz"),
        (["certify", "data.npz", "data.npz"], "expected a file that ends in .keras or .h5 or .hdf5: {}/data.npz"),
        (["certify", "model.keras", "data.npz", "--plot", "curve.doc"], "expected a file name that ends in .png,"),
        (["certify", "model.keras", "data.npz", "--json", "nowhere/out.json"], "no such folder: {}/nowhere"),
        (["certify", "model.keras", "data.npz", "--csv", "."], "is a folder, not a file: {}"),
        (["summary", "model.keras", "--json", "nowhere/out.json"], "no such folder: {}/nowhere"),
        (["demo", "--output", "data.npz"], "is a file, not a folder: {}/data.npz"),
        (["demo", "--data", "missing.npz"], "no such file: {}/missing.npz"),
        (["export", "model.keras", "net.onnx", "--format", "litert"], "expected a file name that ends in .tflite"),
        (["export", "model.keras", "net.onnx", "--format", "tf_saved_model"], "expected a folder for --format"),
        (["export", "model.keras", "net", "--format", "onnx"], "expected a file name that ends in .onnx"),
        (["export", "model.keras", "nowhere/net.onnx"], "no such folder: {}/nowhere"),
        (["export", "model.keras", "data.npz"], "expected a file name that ends in .onnx or .tflite, or the name of a"),
        (["export", "model.keras", "out.xyz"], "expected a file name that ends in .onnx or .tflite, or the name of a"),
        (["export", "model.keras", "out.xyz", "--format", "onnx"], "expected a file name that ends in .onnx for"),
        (["export", "model.keras", "."], "expected a new folder, or one with a SavedModel, which is replaced: {}"),
        (["export", "model.keras", "taken"], "is a folder, not a file: {}/taken.certificate.json"),
        (["demo", "--output", "/proc/nowhere"], "cannot be written: /proc ("),
        (["demo", "--output", "full"], "is a folder, not a file: {}/full/model.keras"),
        (["certify", "model.keras", "data.npz", "--csv", "/proc/out.csv"], "cannot be written: /proc ("),
        (
            ["certify", "model.keras", "data.npz", "--json", "data.npz"],
            "expected different files, but this one is named",
        ),
        (["certify", "model.keras", "data.npz", "--json", "a.txt", "--csv", "a.txt"], "expected different files"),
        (
            ["certify", "empty.keras", "data.npz"],
            "Expected a Keras model file. Received: {}/empty.keras, which is empty",
        ),
        (
            ["certify", "model.keras", "empty.npz"],
            "Expected an .npz file of plain arrays. Received: {}/empty.npz, which",
        ),
        (["summary", "empty.h5"], "Expected a Keras model file. Received: {}/empty.h5, which is empty"),
        (["summary", "text.h5"], "Expected a Keras model file. Received: {}/text.h5, which is of another kind"),
        (["summary", "x" * 300 + ".keras"], "[Errno 36] File name too long"),
    ],
)
def test_files_and_folders_are_checked_before_work(arguments, message, stored, monkeypatch, capsys):
    folder, _ = stored
    for name in ("empty.keras", "empty.npz", "empty.h5"):
        (folder / name).touch()
    (folder / "text.h5").write_text("no model")
    (folder / "taken.certificate.json").mkdir()
    (folder / "full" / "model.keras").mkdir(parents=True)
    monkeypatch.setattr(keras.models, "load_model", lambda *a, **k: pytest.fail("work began"))
    paths = [arguments[0], *(a if a.startswith("--") or a in cli._FORMATS else str(folder / a) for a in arguments[1:])]
    monkeypatch.setattr(cli, "_is_installed", lambda module: True)
    assert main(paths) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + message.format(folder))
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("epsilon", ["-1", "nan", "inf", "far"])
def test_radii_out_of_range(epsilon, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["certify", "model.keras", "data.npz", "--epsilon", epsilon])
    assert "argument --epsilon" in capsys.readouterr().err


def test_choices_are_those_of_the_package():
    assert tuple(cli._DEFAULTS) == hkr.datasets.NAMES
    assert tuple(cli._FORMATS) == hkr.exporting.certificate.FORMATS


def test_demo_with_data_of_ones_own(tmp_path, capsys):
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = np.zeros((60, 6, 6), "uint8")
    x[np.arange(60), y, y] = 255
    np.savez(tmp_path / "corners.npz", x_train=x, y_train=y, x_test=x[:12], y_test=rng.integers(3, size=12))
    arguments = ["demo", "--data", str(tmp_path / "corners.npz"), "--epochs", "1", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "corners: 12 test inputs" in capsys.readouterr().out
    assert keras.models.load_model(tmp_path / "out" / "model.keras").input_shape == (None, 6, 6, 1)


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
    files = {name: str(folder / name) for name in ("model.keras", "data.npz", "out.json", "out.csv", "curve.png")}
    options = ["--epsilon", "0.1", "0.25", "--json", files["out.json"], "--plot", files["curve.png"]]
    options += ["--csv", files["out.csv"]]
    assert main(["certify", files["model.keras"], files["data.npz"], *options]) == 0
    assert f"{certificate.accuracy([0, 1, 1, 0], 0.25):.1%}" in capsys.readouterr().out
    again = hkr.Certificate.from_json((folder / "out.json").read_text())
    np.testing.assert_allclose(again.radius, certificate.radius, rtol=1e-6)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["radius"]) for row in rows] == again.radius.tolist()
    assert [int(row["prediction"]) for row in rows] == again.prediction.tolist()
    assert [row["correct"] == "1" for row in rows] == again.is_correct([0, 1, 1, 0]).tolist()


def test_export_a_stored_model(stored, capsys):
    folder, _ = stored
    name = "net" if keras.backend.backend() == "jax" else "net.onnx"  # the suffix says the format
    arguments = ["export", str(folder / "model.keras"), str(folder / name)]
    assert main([*arguments, "--preprocessing", "pixels / 16"]) == 0
    assert "radii from net" in capsys.readouterr().out
    assert (folder / name).is_dir() == (name == "net")
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


@pytest.mark.parametrize("broken", ["garbage.keras", "code.keras"])
def test_a_broken_or_hostile_model_is_an_error(broken, stored, capsys):
    folder, _ = stored
    shutil.copy(folder / "data.npz", folder / "garbage.keras")
    witness = str(folder / "executed")
    unsafe = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: (open(witness, "w").close(), x)[1])])
    unsafe.save(folder / "code.keras")
    pathlib.Path(witness).unlink(missing_ok=True)
    assert main(["certify", str(folder / broken), str(folder / "data.npz")]) == 2
    assert capsys.readouterr().err.startswith("error: Expected a Keras model file")
    assert not pathlib.Path(witness).exists()


def test_labels_of_another_number_are_an_error(stored, monkeypatch, capsys):
    folder, _ = stored
    np.savez(folder / "odd.npz", x=np.ones((3, 2)), y=np.arange(2))
    monkeypatch.setattr(keras.models, "load_model", lambda *a, **k: pytest.fail("work began"))
    assert main(["certify", str(folder / "model.keras"), str(folder / "odd.npz")]) == 2
    assert "Expected a label for each input. Received: x.shape=(3, 2)" in capsys.readouterr().err


@pytest.mark.parametrize("arrays", [None, {"z": np.ones(2)}, {"x": np.array([{}, 1], dtype=object)}])
def test_broken_data_are_an_error(arrays, stored, capsys):
    folder, _ = stored
    if arrays is None:
        (folder / "bad.npz").write_bytes(b"nothing")
    else:
        np.savez(folder / "bad.npz", **arrays)
    assert main(["certify", str(folder / "model.keras"), str(folder / "bad.npz")]) == 2
    assert capsys.readouterr().err.startswith("error: Expected an .npz file")
