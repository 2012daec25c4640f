"""Files of every released version keep loading, with the same outputs and the same bound."""

import pathlib

import keras
import numpy as np
import pytest
from helpers import to_numpy

import hkr_keras as hkr

FILES = sorted((pathlib.Path(__file__).parent / "stored").glob("*.keras"))


def test_there_is_a_file_of_this_version():
    assert hkr.__version__ in [path.stem for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_with_the_same_outputs_and_bound(path):
    model = keras.models.load_model(path)
    stored = np.load(path.with_suffix(".npz"))
    np.testing.assert_allclose(to_numpy(model(stored["x"])), stored["y"], atol=1e-5)
    np.testing.assert_allclose(hkr.lipschitz_bound(model), stored["bound"], rtol=1e-5)
    assert isinstance(model.loss, hkr.losses.MulticlassHKR)
    constraint = model.layers[-2].kernel.constraint
    assert isinstance(constraint, hkr.constraints.UnitNorm)
