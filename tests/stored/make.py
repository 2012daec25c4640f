"""Writes the stored model of the present version. Run it once for every release, with the oldest Keras:

make oldest && .venv-oldest/bin/python tests/stored/make.py
"""

import pathlib

import keras
import numpy as np

import hkr_keras as hkr
from hkr_keras import layers as L

HERE = pathlib.Path(__file__).parent


def make_model():
    """A small network with most layers of the package, in a graph."""
    inputs = keras.Input((8, 8, 2))
    x = L.OrthogonalConv2D(4, 3, padding="circular")(inputs)
    x = L.Householder()(L.BatchCentering()(x))
    y = L.GroupSort(2)(L.LipschitzConv2D(4, 3, padding="same")(x))
    y = L.AOLConv2D(4, 3, padding="same")(L.LipschitzDepthwiseConv2D(3, padding="same")(y))
    x = L.LipschitzResidual()([x, y, L.SLLConv2D(4, 3)(x)])
    x = L.InvertibleDownsampling2D(2)(L.LayerCentering()(L.LipschitzBatchNormalization()(x)))
    x = L.ChannelShuffle(4)(L.SpatialShift2D()(x))
    x = L.InvertibleUpsampling2D(2)(L.MaxMin()(L.LipschitzSeparableConv2D(16, 3, padding="same")(x)))
    x = L.L2NormPooling2D(2)(L.ScaledAveragePooling2D(2)(x))
    x = L.LipschitzConv2DTranspose(4, 2, strides=2)(x)
    rows = L.LipschitzSimpleRNN(6, return_sequences=True)(keras.layers.Reshape((16, 4))(x))
    rows = L.FullSort()(L.OrthogonalConv1D(6, 3, padding="causal")(rows))
    x = keras.layers.Concatenate()([L.GlobalL2NormPooling1D()(rows), L.ScaledGlobalAveragePooling2D()(x)])
    x = L.SLLDense(4)(L.AOLDense(8)(L.ReflectorDense(8, rank=2)(x)))
    x = L.LipschitzDense(8, kernel_constraint=hkr.constraints.Orthonormal(every=2))(x)
    x = L.LipschitzDense(4, kernel_constraint=hkr.constraints.SpectralBall())(x)
    model = keras.Model(inputs, L.Scale(2.0)(L.LipschitzDense(3, kernel_constraint=hkr.constraints.UnitNorm())(x)))
    model.compile(
        hkr.optimizers.StiefelMuon(0.01),
        loss=hkr.losses.MulticlassHKR(alpha=20, margin=0.4),
        metrics=[hkr.metrics.CertifiedAccuracy(epsilon=0.1), hkr.metrics.CertifiedRadius()],
    )
    return model


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    model = make_model()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 8, 8, 2)).astype("float32"), np.arange(16) % 3
    model.fit(x, y, epochs=2, verbose=0, callbacks=[hkr.callbacks.Orthonormalize()])
    model.save(HERE / f"{hkr.__version__}.keras")
    np.savez(HERE / f"{hkr.__version__}.npz", x=x, y=model.predict(x, verbose=0), bound=hkr.lipschitz_bound(model))
