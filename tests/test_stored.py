"""Files of every released version keep loading, with the same outputs and no larger bound."""

import functools
import json
import pathlib
import zipfile

import keras
import numpy as np
import pytest
from helpers import largest_ratio, normal

import hkr_keras as hkr

FILES = sorted((pathlib.Path(__file__).parent / "stored").glob("*.keras"))


def release(version):
    return tuple(int(part) for part in version.split(".")[:2])


def test_there_is_a_file_of_this_version():
    assert hkr.__version__ in [path.stem for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_with_the_same_outputs_and_no_larger_bound(path):
    with zipfile.ZipFile(path) as archive:
        stored_by = json.loads(archive.read("metadata.json"))["keras_version"]
    if release(stored_by) > release(keras.__version__):
        pytest.skip(f"Keras reads no files of newer versions: {path.name} was stored by Keras {stored_by}")
    model = keras.models.load_model(path)
    stored = np.load(path.with_suffix(".npz"))
    predict = functools.partial(model.predict, verbose=0)
    np.testing.assert_allclose(predict(stored["x"]), stored["y"], atol=1e-5)
    bound, near = hkr.lipschitz_bound(model), stored["x"] + normal(stored["x"].shape, scale=1e-2)
    assert 0.9 * stored["bound"] <= bound <= stored["bound"] * (1 + 1e-5)  # proofs of later versions are tighter
    assert largest_ratio(predict, stored["x"], near) <= bound * (1 + 1e-4)
    assert isinstance(model.loss, hkr.losses.MulticlassHKR)
    constraint = model.layers[-2].kernel.constraint
    assert isinstance(constraint, hkr.constraints.UnitNorm)
