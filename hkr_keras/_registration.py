"""One decorator, so that every stored name reads "hkr_keras>Name"."""

import keras

registered = keras.saving.register_keras_serializable(package="hkr_keras")
