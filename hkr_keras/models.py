"""Small 1-Lipschitz architectures, as functions that return a `keras.Sequential`.

Their heads have `UnitNorm`: outputs are 1-Lipschitz one by one. With `head_constraint=Orthonormal()` they are so
together, and any two classes are equally far apart, which certifies more with losses of margins (`docs/results.md`).
"""

import numbers
from collections.abc import Iterable, Sequence

import keras
import numpy as np

from hkr_keras import layers
from hkr_keras.certification.bounds import lipschitz_bound, model_states
from hkr_keras.constraints import LipschitzConstraint, UnitNorm

__all__ = ["lipschitz_cnn", "lipschitz_mlp", "lipschitz_resnet", "lipschitz_shift_net"]


def lipschitz_mlp(
    input_shape: Sequence[int],
    classes: int,
    widths: Sequence[int] = (256, 128, 64),
    head_constraint: LipschitzConstraint | None = None,
) -> keras.Sequential:
    """Orthonormal Dense layers with GroupSort(2), and a head whose outputs are 1-Lipschitz one by one.

    Args:
        input_shape: of one input, without the batch; images are flattened.
        classes: number of outputs; 1 for a binary score.
        widths: of the hidden layers, even numbers.
        head_constraint: of the last kernel, by default `UnitNorm()`.

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
    model.add(layers.LipschitzDense(classes, kernel_constraint=head_constraint or UnitNorm()))
    return model


def lipschitz_cnn(
    input_shape: Sequence[int],
    classes: int,
    filters: Sequence[int] = (16, 32),
    width: int = 64,
    orthogonal: bool = False,
    head_constraint: LipschitzConstraint | None = None,
) -> keras.Sequential:
    """A LeNet-sized net: for each entry of `filters` two 3x3 convolutions and a pooling, a hidden layer and a head.

    Args:
        input_shape: `(height, width, channels)`.
        classes: number of outputs; 1 for a binary score.
        filters: of the convolutions, even numbers.
        width: of the hidden layer, even.
        orthogonal: `OrthogonalConv2D` and invertible down-sampling, which certify more and want sizes that 2
            divides for every entry of `filters`, in place of reshaped kernels and L2-norm pooling.
        head_constraint: of the last kernel, by default `UnitNorm()`.

    Returns:
        An uncompiled model with outputs `(batch, classes)`.

    Example:

    >>> lipschitz_cnn((28, 28, 1), 10).output_shape
    (None, 10)
    """
    convolution = layers.OrthogonalConv2D if orthogonal else layers.LipschitzConv2D
    model = keras.Sequential([keras.Input(tuple(input_shape))])
    for count in filters:
        for _ in range(2):
            model.add(convolution(count, 3, padding="same"))
            model.add(layers.GroupSort(2))
        model.add(layers.InvertibleDownsampling2D(2) if orthogonal else layers.L2NormPooling2D(2))
    model.add(keras.layers.Flatten())
    model.add(layers.LipschitzDense(width))
    model.add(layers.GroupSort(2))
    model.add(layers.LipschitzDense(classes, kernel_constraint=head_constraint or UnitNorm()))
    return model


def lipschitz_resnet(
    input_shape: Sequence[int],
    classes: int,
    channels: int = 32,
    blocks: Sequence[int] = (2, 3, 3),
    width: int = 64,
    head_constraint: LipschitzConstraint | None = None,
) -> keras.Sequential:
    """A residual net of about a million parameters: SLL blocks, and invertible down-sampling between stages.

    Every stage mixes its channels with an orthogonal convolution and then applies `blocks` residual blocks
    `x - 2 W relu(W^T x + b)`. Stages after the first have twice the channels, at half the size.

    Args:
        input_shape: `(height, width, channels)`, sizes that `2^(stages - 1)` divides.
        classes: number of outputs; 1 for a binary score.
        channels: of the first stage, even.
        blocks: residual blocks of every stage.
        width: of the hidden layer, even.
        head_constraint: of the last kernel, by default `UnitNorm()`.

    Returns:
        An uncompiled model with outputs `(batch, classes)`.

    Example:

    >>> lipschitz_resnet((32, 32, 3), 10).output_shape
    (None, 10)

    Reference:
        Araujo et al., ICLR 2023 (arXiv 2303.03169).
    """
    model = keras.Sequential([keras.Input(tuple(input_shape))])
    for stage, count in enumerate(blocks):
        if stage:
            model.add(layers.InvertibleDownsampling2D(2))
        model.add(layers.OrthogonalConv2D(channels * 2**stage, 3, padding="same"))
        for _ in range(count):
            model.add(layers.SLLConv2D(channels * 2**stage, 3))
    model.add(keras.layers.Flatten())
    model.add(layers.LipschitzDense(width))
    model.add(layers.GroupSort(2))
    model.add(layers.LipschitzDense(classes, kernel_constraint=head_constraint or UnitNorm()))
    return model


def lipschitz_shift_net(
    input_shape: Sequence[int | None],
    classes: int,
    channels: int = 64,
    depth: int = 4,
    patch: int = 4,
    width: int = 128,
    head_constraint: LipschitzConstraint | None = None,
) -> keras.Sequential:
    """A net without convolutions: channels move to neighbouring pixels, and orthonormal Dense layers mix channels.

    Patches of pixels become channels first, since copies at full resolution cost more than what they move. Then follow
    `depth` times a `SpatialShift2D`, a Dense layer over channels and GroupSort(2), and a hidden layer and a head.

    Args:
        input_shape: `(height, width, channels)`, sizes that `patch` divides; `(channels, height, width)` where
            `keras.config.image_data_format()` says so. Of unknown sizes, the hidden layer sees means over all pixels.
        classes: number of outputs; 1 for a binary score.
        channels: of the Dense layers, an even number above 4.
        depth: how often channels move: a pixel sees others so many patches away.
        patch: height and width of the patches.
        width: of the hidden layer, even.
        head_constraint: of the last kernel, by default `UnitNorm()`.

    Returns:
        An uncompiled model with outputs `(batch, classes)`.

    Example:

    >>> lipschitz_shift_net((28, 28, 1), 10).output_shape
    (None, 10)

    Reference:
        LipNeXt, arXiv 2601.18513.
    """
    model = keras.Sequential([keras.Input(tuple(input_shape))])
    if keras.config.image_data_format() == "channels_first":
        model.add(keras.layers.Permute((2, 3, 1)))
    last = {"data_format": "channels_last"}
    model.add(layers.InvertibleDownsampling2D(patch, **last))
    for shift in range(depth + 1):
        if shift:
            model.add(layers.SpatialShift2D(**last))
        model.add(layers.LipschitzDense(channels))
        model.add(layers.GroupSort(2, axis=-1))
    known = None not in model.output_shape[1:]
    model.add(keras.layers.Flatten() if known else layers.ScaledGlobalAveragePooling2D(**last))
    model.add(layers.LipschitzDense(width))
    model.add(layers.GroupSort(2, axis=-1))
    model.add(layers.LipschitzDense(classes, kernel_constraint=head_constraint or UnitNorm()))
    return model


def monotone(model: keras.Model, slope: float, features: Sequence[int]) -> keras.Model:
    """`f(x) + slope * sum of the chosen features`: monotone in each of them, and Lipschitz still.

    No output of f changes faster than by its Lipschitz constant, so a slope at least as large makes every output
    increase (a negative one decrease) with each chosen feature, whatever the others are. The slope, as float32 stores
    it, is compared with the proven bound of single outputs at the weights of now. Training goes on with the same
    layers: call it again afterwards for the weights as they are then. Monotone functions behind the model, such as a
    sigmoid, change nothing. All of this is about exact arithmetic: two nearby predictions may be rounded apart.

    Args:
        model: f, a built model with inputs `(n, d)` and outputs `(n, k)`; its layers are shared, not copied.
        slope: in units of the outputs per unit of a feature; for a 1-Lipschitz network 1.001, a little above 1.
        features: indices from 0 to d - 1, without repetition.

    Returns:
        An uncompiled model with the same inputs and outputs; its constant is at most that of f and
        `|slope| sqrt(k * len(features))` together.

    Raises:
        ValueError: if the bound of an output is larger than the slope, for features that do not exist, and as
            `lipschitz_bound`.

    Example:

    >>> base = lipschitz_mlp((4,), 1, widths=(16, 16))
    >>> model = monotone(base, slope=1.001, features=[0, 2])
    >>> low, high = model.predict(np.array([[0.0, 1, 0, 2], [0.1, 1, 0, 2]]), verbose=0)[:, 0]
    >>> bool(low < high)
    True

    Reference:
        Kitouni, Nolte and Williams, Machine Learning: Science and Technology 4 (2023; arXiv 2112.00038).
    """
    shape, outputs = model.input_shape, model.output_shape
    if isinstance(shape, list) or isinstance(outputs, list) or len(shape) != 2 or len(outputs) != 2:
        raise ValueError(
            "Expected a model with one input (n, features) and one output (n, k). "
            f"Received: input_shape={shape}, output_shape={outputs}"
        )
    chosen = list(features) if isinstance(features, Iterable) else []
    integers = all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in chosen)
    if not chosen or not integers or len(set(chosen)) < len(chosen) or not all(0 <= i < shape[1] for i in chosen):
        raise ValueError(f"Expected different features from 0 to {shape[1] - 1}. Received: features={features}")
    if not isinstance(slope, numbers.Real):
        raise ValueError(f"Expected a number. Received: slope={slope!r}")
    (state,) = model_states(model)
    bound = lipschitz_bound(model)
    if state.tail is not None:  # every output by itself
        bound = min(bound, float(state.tail.lengths().max() * state.tail.constants[0]) * (1 + 1e-12))
    if not bound <= abs(float(np.float32(slope))) < np.inf:
        raise ValueError(
            f"Expected a slope of at least {bound}, the proven Lipschitz bound of an output. Received: slope={slope}"
        )
    kernel = np.zeros((shape[1], outputs[1]))
    kernel[chosen] = slope
    inputs = keras.Input(shape[1:])
    exact = {"dtype": "float32"}  # half precision would round the slope below the bound
    linear = keras.layers.Dense(outputs[1], use_bias=False, trainable=False, name="monotone", **exact)
    result = keras.layers.Add(**exact)([model(inputs), linear(inputs)])
    linear.kernel.assign(kernel)
    return keras.Model(inputs, result)
