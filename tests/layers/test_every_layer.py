"""What every layer without a kernel can do: sizes known late, half precision, files, training."""

import cases
import keras
import numpy as np
import pytest
from helpers import BACKEND, normal, to_numpy

import hkr_keras as hkr

L = hkr.layers


@pytest.mark.many
@pytest.mark.parametrize("make", cases.IMAGES)
def test_dynamic_sizes(make):
    layer = make()
    model = keras.Sequential([keras.Input((None, None, 4)), layer])
    for size in (4, 8):
        x = normal((2, size, size, 4))
        outputs = model.predict(x, verbose=0)
        np.testing.assert_allclose(outputs, to_numpy(layer(x)), atol=1e-5)
        assert all(known in (None, n) for known, n in zip(model.output_shape, outputs.shape, strict=True))


@pytest.mark.many
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("make", [*cases.IMAGES, lambda: L.L2NormPooling2D(2, padding="same")])
def test_mixed_precision(make, policy):
    layer = make()
    half = type(layer).from_config({**layer.get_config(), "dtype": policy})
    x = normal((2, 4, 4, 4))
    outputs = half(x)
    assert keras.backend.standardize_dtype(outputs.dtype) == policy[6:]
    assert all(keras.backend.standardize_dtype(weight.dtype) == "float32" for weight in half.weights)
    np.testing.assert_allclose(to_numpy(outputs), to_numpy(layer(x)), atol=0.1)


def has_kernel(name):
    return name.startswith(("LipschitzConv", "LipschitzD", "LipschitzS", "Orthogonal", "AOL", "SLL", "Reflector"))


@pytest.mark.once
def test_every_layer_is_a_case():
    assert {*L.__all__} - {"LipschitzLayer", "LipschitzResidual"} == {cases.name(make) for make, _ in cases.CONVERTED}


def test_a_model_with_one_of_each_comes_back_from_its_file(tmp_path):
    chosen = {cases.name(make): (make, shape) for make, shape in cases.CONVERTED if not has_kernel(cases.name(make))}
    inputs = {shape: keras.Input(shape) for _, shape in chosen.values()}
    outputs = [make()(inputs[shape]) for make, shape in chosen.values()]
    outputs.append(L.LipschitzResidual()([inputs[cases.IMAGE], L.Scale(2.0)(inputs[cases.IMAGE])]))
    model = keras.Model(list(inputs.values()), outputs)
    for i, variable in enumerate(model.weights):
        variable.assign(np.abs(normal(variable.shape, seed=i)))
    model.save(tmp_path / "model.keras")
    copy = keras.models.load_model(tmp_path / "model.keras")
    data = [normal((3, *shape)) for shape in inputs]
    for old, new in zip(model(data), copy(data), strict=True):
        assert np.array_equal(to_numpy(old), to_numpy(new))


@pytest.mark.many
@pytest.mark.parametrize("make", cases.IMAGES)
def test_layers_train_inside_fit(make):
    model = keras.Sequential([keras.Input((4, 4, 4)), make(), keras.layers.Flatten(), L.LipschitzDense(1)])
    model.compile("sgd", loss="mse", jit_compile=BACKEND == "jax")
    history = model.fit(normal((8, 4, 4, 4)), np.ones((8, 1), "float32"), verbose=0)
    assert np.isfinite(history.history["loss"]).all()
