"""Models in other layers: `to_lipschitz`, `to_keras`, and constraints for models that are left as they are."""

from hkr_keras.conversion.constraining import constrain
from hkr_keras.conversion.to_keras import keras_layers, to_keras
from hkr_keras.conversion.to_lipschitz import to_lipschitz

__all__ = ["constrain", "keras_layers", "to_keras", "to_lipschitz"]
