"""Models in other layers: `to_lipschitz`, `from_deel_lip`, `to_keras`, and constraints for models left as they are."""

from hkr_keras.conversion.constraining import constrain as constrain
from hkr_keras.conversion.from_deel_lip import from_deel_lip
from hkr_keras.conversion.to_keras import keras_layers
from hkr_keras.conversion.to_keras import to_keras as to_keras
from hkr_keras.conversion.to_lipschitz import to_lipschitz as to_lipschitz

__all__ = ["from_deel_lip", "keras_layers"]
