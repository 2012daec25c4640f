"""What the tests measure with, and what they leave behind."""

import keras
import numpy as np
import pytest
from helpers import state_kept

import hkr_keras as hkr

K = keras.layers


class Mine(K.Layer):
    """A layer that nothing is known about."""

    def call(self, inputs):
        return inputs


def register_and_set(layer):
    """All that a test may register and set."""
    hkr.bounds.layer_bound.register(Mine, lambda layer: 1.0)
    assert hkr.lipschitz_bound(layer) == 1.0
    hkr.bounds.merge_bound.register(Mine, lambda layer, constants: constants.sum(axis=0))
    hkr.rounding.layer_rounding.register(K.Dense, lambda layer: hkr.rounding.relative(0.0))
    hkr.bounds.ACTIVATION_BOUNDS[keras.ops.sin] = 1.0
    hkr.geometry.kernel_geometries.register(Mine, lambda layer: {"kernel": hkr.geometry.Geometry()})
    assert hkr.geometry.kernel_geometries(layer)
    hkr.conversion.keras_layers.register(Mine, lambda layer: ([K.Identity()], lambda: None))
    keras.saving.register_keras_serializable("mine")(Mine)
    keras.config.set_floatx("float16")
    keras.config.set_image_data_format("channels_first")


@pytest.mark.once
def test_nothing_that_a_test_registers_or_sets_outlives_it():
    layer, rounding = Mine(), hkr.rounding.layer_rounding.dispatch(K.Dense)
    layer(np.ones((1, 2), "float32"))

    def fails():
        with state_kept():
            register_and_set(layer)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert hkr.geometry.kernel_geometries(layer) == {}
    assert hkr.conversion.keras_layers.dispatch(Mine) is hkr.conversion.keras_layers.dispatch(object)
    assert hkr.rounding.layer_rounding.dispatch(K.Dense) is rounding
    assert keras.ops.sin not in hkr.bounds.ACTIVATION_BOUNDS
    assert keras.saving.get_registered_object("mine>Mine") is None
    assert (keras.config.floatx(), keras.config.image_data_format()) == ("float32", "channels_last")
    with pytest.raises(ValueError, match="Expected a layer with a known Lipschitz bound"):
        hkr.lipschitz_bound(layer)
