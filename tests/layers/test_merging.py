"""The residual connection is a convex combination, and `Scale` multiplies by its one number."""

import keras
import numpy as np
import pytest
from helpers import adam_steps, check_layer, largest_ratio, normal, to_numpy

import hkr_keras as hkr

L = hkr.layers
LIPSCHITZ = 1 + 1e-5  # float32 outputs of random pairs


def test_residual_is_a_convex_combination():
    layer = L.LipschitzResidual()
    x, z = normal((4, 3)), normal((4, 3), seed=1)
    np.testing.assert_allclose(to_numpy(layer([x, z])), (x + z) / 2, atol=1e-6)
    adam_steps(layer, 10.0)
    weights = np.exp(to_numpy(layer.mixing_logits))
    weights /= weights.sum()
    np.testing.assert_allclose(to_numpy(layer([x, z])), weights[0] * x + weights[1] * z, atol=1e-5)
    assert largest_ratio(lambda a: layer([a, -a]), x, z) <= LIPSCHITZ
    assert layer.compute_output_shape([x.shape, z.shape]) == x.shape


@pytest.mark.parametrize("shapes", [[(None, 3)], [(None, 3), (None, 1)], [(None, 3), (None, 3), (None, 4)], (None, 3)])
def test_residual_refuses_other_inputs(shapes):
    with pytest.raises(ValueError, match="Received: input_shape="):
        L.LipschitzResidual().build(shapes)


def test_mixed_precision_of_the_residual():
    x = normal((2, 4))
    outputs = L.LipschitzResidual(dtype="mixed_bfloat16")([x, x])
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"


def test_masks_go_on_as_in_the_sum_of_keras():
    x = normal((2, 3, 4))
    x[:, 2] = 0
    masked, other = keras.layers.Masking()(x), keras.layers.Masking()(x[:, ::-1].copy())
    inputs = [keras.ops.convert_to_tensor(masked), keras.ops.convert_to_tensor(other)]
    masks = [np.any(to_numpy(each) != 0, axis=-1) for each in inputs]
    ours, theirs = L.LipschitzResidual(), keras.layers.Add()
    for given in (masks, [masks[0], None], [None, None], None):
        mask, expected = ours.compute_mask(inputs, given), theirs.compute_mask(inputs, given)
        assert (mask is None) == (expected is None)
        if mask is not None:
            assert np.array_equal(keras.ops.convert_to_numpy(mask), keras.ops.convert_to_numpy(expected))


@pytest.mark.parametrize("k", [2.5, -3, 0.125])
def test_scale(k):
    layer = check_layer(L.Scale(k), (4, 3), constant=abs(k))
    x = normal((2, 4, 3))
    np.testing.assert_allclose(to_numpy(layer(x)), k * x, rtol=1e-6)


@pytest.mark.parametrize("k", [0, 0.0, float("inf"), float("nan"), "2", None, 1j])
def test_bad_scale(k):
    with pytest.raises(ValueError, match="Received: k="):
        L.Scale(k)
