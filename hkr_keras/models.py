"""Small 1-Lipschitz architectures, as functions that return a `keras.Sequential`."""

from collections.abc import Sequence

import keras

from hkr_keras import layers
from hkr_keras.constraints import UnitNorm


def lipschitz_mlp(input_shape: Sequence[int], classes: int, widths: Sequence[int] = (256, 128, 64)) -> keras.Sequential:
    """Orthonormal Dense layers with GroupSort(2), and a head whose outputs are 1-Lipschitz one by one.

    Args:
        input_shape: of one input, without the batch; images are flattened.
        classes: number of outputs; 1 for a binary score.
        widths: of the hidden layers, even numbers.

    Returns:
        An uncompiled model with outputs `(batch, classes)`.

    Example:

    >>> lipschitz_mlp((8, 8, 1), 10).output_shape
    (None, 10)
    """
    model = keras.Sequential([keras.Input(tuple(input_shape)), keras.layers.Flatten()])
    for width in widths:
        model.add(layers.LipschitzDense(width))
        model.add(layers.GroupSort(2))
    model.add(layers.LipschitzDense(classes, kernel_constraint=UnitNorm()))
    return model


def lipschitz_cnn(
    input_shape: Sequence[int], classes: int, filters: Sequence[int] = (16, 32), width: int = 64
) -> keras.Sequential:
    """Two 3x3 convolutions and an L2-norm pooling for each entry of `filters`, then a hidden layer and a head.

    Args:
        input_shape: `(height, width, channels)`.
        classes: number of outputs; 1 for a binary score.
        filters: of the convolutions, even numbers.
        width: of the hidden layer, even.

    Returns:
        An uncompiled model with outputs `(batch, classes)`.

    Example:

    >>> lipschitz_cnn((28, 28, 1), 10).output_shape
    (None, 10)
    """
    model = keras.Sequential([keras.Input(tuple(input_shape))])
    for count in filters:
        for _ in range(2):
            model.add(layers.LipschitzConv2D(count, 3, padding="same"))
            model.add(layers.GroupSort(2))
        model.add(layers.L2NormPooling2D(2))
    model.add(keras.layers.Flatten())
    model.add(layers.LipschitzDense(width))
    model.add(layers.GroupSort(2))
    model.add(layers.LipschitzDense(classes, kernel_constraint=UnitNorm()))
    return model
