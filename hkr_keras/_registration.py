"""One decorator, so that every stored name reads "hkr_keras>Name"."""

import keras

export = keras.saving.register_keras_serializable(package="hkr_keras")
