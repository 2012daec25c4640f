"""A fixed zoo of models, whose weights NumPy makes, so that every backend and every version builds the same numbers."""

import keras
import numpy as np

import hkr_keras as hkr

K, L = keras.layers, hkr.layers
IMAGE, SERIES, VECTOR = (8, 8, 2), (10, 3), (6,)


def _hidden():
    return L.LipschitzDense(8, kernel_constraint=hkr.constraints.SpectralBall()), L.GroupSort(2)


def _head(classes):
    return L.LipschitzDense(classes, kernel_constraint=hkr.constraints.UnitNorm())


def _end():
    return K.Flatten(), L.LipschitzDense(6), L.GroupSort(2), _head(3)


def mlp():
    return keras.Sequential([keras.Input(VECTOR), L.LipschitzDense(8), L.GroupSort(2), *_hidden(), _head(3)])


def score():
    return keras.Sequential([keras.Input(VECTOR), L.LipschitzDense(8), L.MaxMin(), *_hidden(), _head(1)])


def cnn():
    convolutions = [L.LipschitzConv2D(4, 3, padding="same"), L.GroupSort(2), L.LipschitzConv2D(6, 3, strides=2)]
    return keras.Sequential([keras.Input(IMAGE), *convolutions, L.L2NormPooling2D(2, padding="same"), *_end()])


def orthogonal_cnn():
    convolutions = [L.OrthogonalConv2D(4, 3, padding="circular"), L.GroupSort(2), L.InvertibleDownsampling2D(2)]
    strided = L.OrthogonalConv2D(6, 3, strides=2, padding="same")
    return keras.Sequential([keras.Input(IMAGE), *convolutions, strided, L.Householder(), *_end()])


def residual():
    inputs = keras.Input(VECTOR)
    branch = L.LipschitzDense(6)(L.FullSort()(L.LipschitzDense(6)(inputs)))
    x = L.LipschitzResidual()([inputs, branch])
    return keras.Model(inputs, _head(3)(K.Add()([x, L.Scale(-0.5)(branch)])))


def nested():
    inner = keras.Sequential([keras.Input(VECTOR), L.LipschitzDense(6), L.GroupSort(3)])
    inputs = keras.Input(VECTOR)
    outer = keras.Model(inputs, K.Concatenate()([inner(inputs), inputs]))
    return keras.Sequential([keras.Input(VECTOR), outer, L.Scale(2.0), _head(4)])


def shared():
    dense, inputs = L.LipschitzDense(6), keras.Input(VECTOR)
    return keras.Model(inputs, _head(3)(dense(L.GroupSort(2)(dense(inputs)))))


def two_inputs():
    left, right = keras.Input(VECTOR), keras.Input(SERIES)
    series = L.GlobalL2NormPooling1D()(L.OrthogonalConv1D(4, 3, padding="causal")(right))
    return keras.Model([left, right], _head(3)(K.Concatenate()([L.GroupSort(2)(L.LipschitzDense(4)(left)), series])))


def recurrent():
    return keras.Sequential([keras.Input(SERIES), L.LipschitzSimpleRNN(6), _head(3)])


def almost_orthogonal():
    blocks = [L.AOLConv2D(4, 3, padding="same"), L.GroupSort(2), L.SLLConv2D(4, 3), K.Flatten()]
    return keras.Sequential([keras.Input(IMAGE), *blocks, L.AOLDense(8), L.SLLDense(5), _head(3)])


def centering():
    layers = [L.BatchCentering(), L.LipschitzConv2D(4, 3, padding="same"), L.LayerCentering(), L.GroupSort(2)]
    return keras.Sequential([keras.Input(IMAGE), *layers, L.LayerCentering(axis=(1, 2)), *_end()])


def pooling():
    image, series = keras.Input(IMAGE), K.Reshape((16, 2))
    x = L.LipschitzConv2D(4, 3, padding="same")(image)
    parts = [
        K.Flatten()(L.ScaledAveragePooling2D(2)(x)),
        K.Flatten()(L.L2NormPooling2D(3, 2, padding="same")(x)),
        L.ScaledGlobalAveragePooling2D()(x),
        L.GlobalL2NormPooling2D()(x),
        K.Flatten()(L.ScaledAveragePooling1D(4)(series(K.AveragePooling2D((2, 1))(K.MaxPooling2D((1, 2))(image))))),
        K.GlobalAveragePooling2D()(x),
    ]
    return keras.Model(image, _head(3)(K.Concatenate()(parts)))


def plain_cnn():
    layers = [
        *(K.Rescaling(2.0, offset=-1.0), K.Conv2D(6, 3, padding="same", use_bias=False), K.BatchNormalization()),
        *(K.ReLU(), K.MaxPooling2D(2), K.Dropout(0.5), K.Conv2D(4, 3, activation="relu6"), K.AveragePooling2D(2)),
    ]
    return keras.Sequential([keras.Input(IMAGE), *layers, K.Flatten(), K.Dense(8, activation="leaky_relu"), K.Dense(3)])


def plain_convolutions():
    layers = [
        *(K.SeparableConv2D(4, 3, padding="same"), K.LeakyReLU(negative_slope=0.3), K.DepthwiseConv2D(3, strides=2)),
        *(K.Conv2DTranspose(6, 3, strides=2), K.Conv2D(4, 3, groups=2, dilation_rate=2), K.PReLU()),
    ]
    return keras.Sequential([keras.Input(IMAGE), *layers, K.GlobalAveragePooling2D(), K.Dense(3)])


def other_convolutions():
    layers = [
        *(L.LipschitzDepthwiseConv2D(3, padding="same", depth_multiplier=2), L.GroupSort(2)),
        *(L.LipschitzSeparableConv2D(4, 3), L.LipschitzConv2DTranspose(4, 3, strides=2), L.MaxMin()),
        *(L.InvertibleUpsampling2D(2), L.LipschitzConv2D(4, 3, dilation_rate=2)),
    ]
    return keras.Sequential([keras.Input((6, 6, 2)), *layers, L.LipschitzConv2D(2, 3, 2), K.Flatten(), _head(3)])


def series_and_volumes():
    volume = keras.Input((4, 4, 4, 1))
    x = L.GroupSort(2)(L.LipschitzConv3D(4, 2, padding="same")(volume))
    x = L.LipschitzConv3DTranspose(2, 2, strides=2)(K.AveragePooling3D(2)(x))
    x = L.LipschitzConv1D(4, 3, padding="causal", groups=2)(K.Reshape((16, 8))(x))
    x = L.OrthogonalConv1DTranspose(4, 2, strides=2)(L.LipschitzDepthwiseConv1D(3)(x))
    return keras.Model(volume, _head(3)(K.Flatten()(L.L2NormPooling1D(2)(L.LipschitzConv1DTranspose(2, 3)(x)))))


MODELS = (
    *(mlp, score, cnn, orthogonal_cnn, residual, nested, shared, two_inputs, recurrent, almost_orthogonal),
    *(centering, pooling, plain_cnn, plain_convolutions, other_convolutions, series_and_volumes),
)


def build(make, seed=0):
    """The model with its fixed weights, and 16 fixed inputs."""
    model = make()
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(_values(weight, np.random.default_rng([seed, *weight.name.encode(), *weight.shape])))
    x = [rng.normal(size=(16, *inputs.shape[1:])).astype("float32") for inputs in model.inputs]
    return model, x if len(x) > 1 else x[0]


def _values(weight, rng):
    values = rng.normal(size=weight.shape)
    if weight.name == "moving_variance":
        return 0.5 + np.abs(values)
    if weight.name == "gamma":
        return 1 + 0.2 * values
    if weight.name == "bases":  # every bases[:, i] has orthonormal columns
        return np.stack([_orthonormal(matrix) for matrix in values.swapaxes(0, 1)], axis=1)
    if weight.name == "mixing":  # one group
        return _orthonormal(values.reshape(-1, weight.shape[-1])).reshape(weight.shape)
    if "kernel" in weight.name:  # singular values of 0.6 to 1, and smaller ones where windows overlap
        matrix = _orthonormal(values.reshape(-1, weight.shape[-1]))
        spread = np.linspace(0.6, 1.0, matrix.shape[1]) / np.prod(weight.shape[:-2]) ** 0.25
        return (matrix * spread).reshape(weight.shape)
    return values if weight.name == "unscaled" else 0.3 * values


def _orthonormal(matrix):
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


def figures(model, x):
    """What is proven of a model, and its outputs and those of its plain Keras copy."""
    plain, kernels = hkr.to_keras(model), hkr.to_keras(model, kernels_only=True)
    found = {
        "bound": hkr.lipschitz_bound(model),
        "bound of the stored kernels": hkr.lipschitz_bound(kernels),
        **_proven(model, x, rigorous=False),
        "prediction": hkr.certify(model, x, verbose=0).prediction,
        "outputs": model.predict(x, verbose=0),
        "outputs of the plain copy": plain.predict(x, verbose=0),
    }
    try:
        return found | _proven(kernels, x, rigorous=True)
    except ValueError:  # composed kernels, recurrent layers: refused
        return found


def _proven(model, x, rigorous):
    kind = "rigorous " if rigorous else ""
    intervals = hkr.certify_outputs(model, x, 0.1, verbose=0, rigorous=rigorous)
    found = {f"{kind}radius": hkr.certify(model, x, verbose=0, rigorous=rigorous).radius}
    if model.output_shape[-1] > 2:
        found[f"{kind}top 2"] = hkr.certify_top_k(model, x, 2, verbose=0, rigorous=rigorous).radius
    return found | {f"{kind}width": intervals.upper - intervals.lower}
