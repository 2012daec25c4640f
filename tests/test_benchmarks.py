"""The benchmark scripts, in little: they run, and their figures are of the right kind."""

import argparse
import json
import sys

import bound_cost
import certified_accuracy
import numpy as np
import price_of_rigour
import pytest

OPTIONS = {
    "dataset": "digits",
    "model": "mlp",
    "loss": "hkr",
    "alpha": 50.0,
    "margin": 0.5,
    "temperature": 10.0,
    "epochs": 1,
    "batch": 32,
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
