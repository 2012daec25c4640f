"""`Scale` multiplies by its one number."""

import numpy as np
import pytest
from helpers import check_layer, normal, to_numpy

import hkr_keras as hkr

L = hkr.layers


@pytest.mark.parametrize("k", [2.5, -3, 0.125])
def test_scale(k):
    layer = check_layer(L.Scale(k), (4, 3), constant=abs(k))
    x = normal((2, 4, 3))
    np.testing.assert_allclose(to_numpy(layer(x)), k * x, rtol=1e-6)


@pytest.mark.parametrize("k", [0, 0.0, float("inf"), float("nan"), "2", None, 1j])
def test_bad_scale(k):
    with pytest.raises(ValueError, match="Received: k="):
        L.Scale(k)
