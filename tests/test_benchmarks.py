"""The benchmark scripts, in little: they run, and their figures are of the right kind."""

import argparse
import itertools
import json
import sys

import bound_cost
import certified_accuracy
import frontier
import gradient_depth
import keras
import numpy as np
import peers
import price_of_rigour
import pytest

import hkr_keras as hkr

OPTIONS = {
    "dataset": "digits",
    "model": "mlp",
    "loss": "hkr",
    "alpha": 50.0,
    "margin": 0.5,
    "temperature": 10.0,
    "epochs": 1,
    "batch": 32,
    "optimizer": "adam",
    "rate": 1e-2,
    "seed": 0,
    "flip": False,
    "shift": 0,
    "train": None,
    "attack": 0,
    "verbose": 0,
    "json": None,
}


def test_certified_accuracy(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.jsonl"
    arguments = ["--dataset", "digits", "--model", "mlp", "--epochs", "1", "--batch", "32", "--rate", "1e-2"]
    monkeypatch.setattr(sys, "argv", ["certified_accuracy.py", *arguments, "--verbose", "0", "--json", str(out)])
    certified_accuracy.main()
    assert "certified 0.141" in capsys.readouterr().out
    (result,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0.5 < result["certified_0.141"] < result["clean"] <= 1
    assert result["dataset"] == "digits"


def test_attacked_accuracy_lies_between():
    options = argparse.Namespace(**{**OPTIONS, "attack": 8, "shift": 1, "flip": True})
    result = certified_accuracy.run(options)
    for epsilon in ("0.141", "0.25", "0.5", "1"):
        assert 0 <= result[f"attacked_{epsilon}"] <= 1


def test_augmentation_moves_and_mirrors():
    x = np.zeros((64, 5, 5, 1), "float32")
    x[:, 2, 1] = 1.0
    rng = np.random.default_rng(0)
    mirrored = certified_accuracy.flipped(x, rng)
    assert set(np.argwhere(mirrored[..., 0])[:, 2].tolist()) == {1, 3}
    moved = certified_accuracy.shifted(x, 1, rng)
    assert moved.shape == x.shape
    assert set(np.argwhere(moved[..., 0])[:, 1].tolist()) == {1, 2, 3}


@pytest.mark.parametrize("name", ["cnn", "lenet"])
def test_bound_cost(name):
    result = bound_cost.measure(name, rounds=1)
    assert result["bound"] > 0
    assert 0 < result["seconds"] < np.inf


def test_price_of_rigour():
    ((exact, _), (rigorous, _)), y = price_of_rigour.certificates("digits MLP 256-128-64, HKR", seed=0, epochs=1)
    assert rigorous.accuracy(y, 0.1) <= exact.accuracy(y, 0.1)
    assert np.all(rigorous.radius <= exact.radius)


@pytest.mark.parametrize("head", peers.FACTORS)
def test_claims_of_the_peer_are_those_of_its_head(head):
    logits, labels = np.random.default_rng(0).normal(size=(200, 10)), np.random.default_rng(1).integers(0, 10, 200)
    tensors = keras.ops.convert_to_tensor(labels), keras.ops.convert_to_tensor(logits.astype("float32"))
    radius = keras.ops.convert_to_numpy(hkr.margins.certified_radius(*tensors, head=head))
    claims = peers.claimed(logits, labels, head)
    assert claims["clean"] == (radius > 0).mean()
    for epsilon in peers.EPSILONS:
        assert claims[f"certified_{epsilon:.3g}"] == (radius > epsilon).mean()
    assert claims["mean_radius"] == pytest.approx(np.maximum(radius, 0).mean(), rel=1e-5)


def test_the_peer_needs_an_old_python(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ENVIRONMENT", tmp_path / "peers")
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(SystemExit, match=r"Expected Python 3\.9 to 3\.11"):
        peers.interpreter()
    assert not (tmp_path / "peers").exists()


def test_frontier_of_stored_results(tmp_path, capsys):
    results = frontier.read(frontier.RESULTS)
    rows = frontier.summarise(results, seeds=(0, 1, 2))
    assert {row["library"] for row in rows} == set(frontier.SETTINGS)
    for row in rows:
        assert 1 <= len(row["runs"]) <= 3
        for run in row["runs"]:
            figures = [run["clean"], *(run[f"certified_{epsilon:.3g}"] for epsilon in frontier.EPSILONS)]
            assert all(a > b for a, b in itertools.pairwise(figures))
            assert run["machine"]
            assert run["versions"]
    image = tmp_path / "frontier.png"
    frontier.draw(rows, image)
    assert image.stat().st_size > 10_000
    frontier.show(rows)
    assert "deel-lip" in capsys.readouterr().out


def test_the_table_of_the_readme_is_that_of_the_results():
    rows = frontier.summarise(frontier.read(frontier.RESULTS), seeds=(0, 1, 2))
    assert frontier.markdown(rows) in (frontier.HERE.parent / "README.md").read_text()


def test_frontier_runs_what_is_missing(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    setting = {"dataset": "digits", "model": "mlp", "loss": "crossentropy", "temperature": 5.0, "epochs": 1}
    frontier.train("hkr_keras", setting, 3, results)
    (result,) = frontier.read(results)
    assert frontier.matches(result, "hkr_keras", setting, 3)
    assert not frontier.matches(result, "hkr_keras", setting, 4)
    assert not frontier.matches(result, "deel-lip", setting, 3)


def test_the_recipe_of_colour_images_runs(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.random((64, 8, 8, 3), dtype="float32"), rng.integers(0, 10, 64)
    data = hkr.datasets.Dataset("cifar10", x, y, x[:32], y[:32], 10)
    monkeypatch.setattr(hkr.datasets, "load", lambda name, seed: data)
    recipe = {"dataset": "cifar10", "model": "cnn_orthogonal", "loss": "crossentropy", "margin": 0.35, "rate": 0.02}
    augmentation = {"optimizer": "stiefel_muon", "flip": True, "shift": 2}
    result = certified_accuracy.run(argparse.Namespace(**{**OPTIONS, **recipe, **augmentation}))
    assert result["certified_0.141"] <= result["clean"]
    assert result["bound"] < 1.5


def test_gradients_of_a_deep_orthogonal_net_do_not_vanish():
    norms = {}
    for name in ("OrthogonalConv2D, circular", "LipschitzConv2D"):
        keras.utils.set_random_seed(0)
        model, blocks = gradient_depth.network(name, 24)
        images = np.random.default_rng(0).random((2, 8, 8, 1), dtype="float32")
        norms[name] = gradient_depth.gradient_norms(model, blocks, images)
    np.testing.assert_allclose(norms["OrthogonalConv2D, circular"], 1, atol=1e-3)  # float32, 24 layers
    assert norms["LipschitzConv2D"][0] < 1e-6
