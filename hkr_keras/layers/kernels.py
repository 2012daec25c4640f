"""Keras's own kernel layers, kept 1-Lipschitz. Constructor, forward pass and config are Keras's."""

import inspect

import keras

from hkr_keras._registration import registered
from hkr_keras.layers.base import LipschitzLayer
from hkr_keras.layers.circular import CircularConv

__all__ = [
    "LipschitzConv1D",
    "LipschitzConv1DTranspose",
    "LipschitzConv2D",
    "LipschitzConv2DTranspose",
    "LipschitzConv3D",
    "LipschitzConv3DTranspose",
    "LipschitzDense",
    "LipschitzDepthwiseConv1D",
    "LipschitzDepthwiseConv2D",
    "LipschitzSeparableConv1D",
    "LipschitzSeparableConv2D",
]


@registered
class LipschitzDense(LipschitzLayer, keras.layers.Dense):
    """`keras.layers.Dense` with a kernel of norm at most 1.

    All arguments are those of `keras.layers.Dense`. `kernel_constraint` takes `Orthonormal()` (the default),
    `DeferredOrthonormal()`, `SpectralBall()` or `UnitNorm()` of `hkr_keras.constraints`; another one, LoRA and
    `quantize` raise a `ValueError`. With `UnitNorm()` each output is 1-Lipschitz, and the whole kernel may have a norm
    up to the root of the number of outputs. A custom `kernel_initializer` is followed by a projection onto the
    constraint set.

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.LipschitzDense(4)
    >>> y = layer(np.ones((2, 8), "float32"))
    >>> bool(hkr.lipschitz_bound(layer) < 1 + 1e-6)
    True

    Reference:
        Anil et al., ICML 2019 (arXiv 1811.05381).
    """


@registered
class LipschitzConv1D(CircularConv, keras.layers.Conv1D):
    """`keras.layers.Conv1D` with an operator norm of at most 1, for any length.

    All arguments are those of `keras.layers.Conv1D`; `kernel_constraint` as for `LipschitzDense`. The kernel,
    as a matrix of `kernel_size * inputs` rows, is orthonormal divided by the root of the largest number of
    windows over one step, `ceil(kernel_size / strides)`. Zero and causal padding, any dilation, groups; and `padding`
    may be `"circular"`, which continues the input periodically.

    Input and output shapes: those of `keras.layers.Conv1D`; circular: `(batch, steps / strides, filters)`.

    Raises:
        ValueError: for a circular input of unknown size, one that the strides do not divide, or one that is shorter
            than half of the window.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.LipschitzConv1D(4, 3, padding="causal")(np.ones((2, 16, 3), "float32")).shape[1:])
    (16, 4)

    Reference:
        Serrurier et al., CVPR 2021 (arXiv 2006.06520), appendix, with the maximum in place of the mean.
    """

    __signature__ = inspect.signature(keras.layers.Conv1D)


@registered
class LipschitzConv2D(CircularConv, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with an operator norm of at most 1, for any image size.

    As `LipschitzConv1D`, in two dimensions.

    Input and output shapes: those of `keras.layers.Conv2D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.LipschitzConv2D(4, 3, padding="same")(np.ones((2, 8, 8, 3), "float32")).shape[1:])
    (8, 8, 4)
    """

    __signature__ = inspect.signature(keras.layers.Conv2D)


@registered
class LipschitzConv3D(CircularConv, keras.layers.Conv3D):
    """`keras.layers.Conv3D` with an operator norm of at most 1, for any volume size.

    As `LipschitzConv1D`, in three dimensions.

    Input and output shapes: those of `keras.layers.Conv3D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.LipschitzConv3D(4, 2)(np.ones((2, 4, 4, 4, 3), "float32")).shape[1:])
    (3, 3, 3, 4)
    """

    __signature__ = inspect.signature(keras.layers.Conv3D)


@registered
class LipschitzConv1DTranspose(LipschitzLayer, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` with an operator norm of at most 1.

    A transposed convolution is the adjoint of a convolution (cropped at the border), so the kernel obeys the
    bound of `LipschitzConv1D`.

    Input and output shapes: those of `keras.layers.Conv1DTranspose`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.LipschitzConv1DTranspose(4, 2, strides=2)(np.ones((2, 8, 3), "float32")).shape[1:])
    (16, 4)
    """


@registered
class LipschitzConv2DTranspose(LipschitzLayer, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` with an operator norm of at most 1.

    As `LipschitzConv1DTranspose`, in two dimensions.

    Input and output shapes: those of `keras.layers.Conv2DTranspose`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.LipschitzConv2DTranspose(4, 2, strides=2)(np.ones((2, 4, 4, 3), "float32")).shape[1:])
    (8, 8, 4)
    """


@registered
class LipschitzConv3DTranspose(LipschitzLayer, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` with an operator norm of at most 1.

    As `LipschitzConv1DTranspose`, in three dimensions.

    Input and output shapes: those of `keras.layers.Conv3DTranspose`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.LipschitzConv3DTranspose(4, 2, strides=2)(np.ones((2, 2, 2, 2, 3), "float32")).shape[1:])
    (4, 4, 4, 4)
    """


@registered
class LipschitzDepthwiseConv1D(LipschitzLayer, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` with an operator norm of at most 1.

    Every channel is a convolution of its own; the norm is the largest of theirs. The constraint is the
    argument `depthwise_constraint`.

    Input and output shapes: those of `keras.layers.DepthwiseConv1D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.LipschitzDepthwiseConv1D(3)(np.ones((2, 8, 3), "float32")).shape[1:])
    (6, 3)
    """


@registered
class LipschitzDepthwiseConv2D(LipschitzLayer, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with an operator norm of at most 1.

    As `LipschitzDepthwiseConv1D`, in two dimensions.

    Input and output shapes: those of `keras.layers.DepthwiseConv2D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.LipschitzDepthwiseConv2D(3)(np.ones((2, 8, 8, 3), "float32")).shape[1:])
    (6, 6, 3)
    """


@registered
class LipschitzSeparableConv1D(LipschitzLayer, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D` with an operator norm of at most 1.

    Both kernels are constrained, through `depthwise_constraint` and `pointwise_constraint`.

    Input and output shapes: those of `keras.layers.SeparableConv1D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.LipschitzSeparableConv1D(4, 3)(np.ones((2, 8, 3), "float32")).shape[1:])
    (6, 4)
    """


@registered
class LipschitzSeparableConv2D(LipschitzLayer, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` with an operator norm of at most 1.

    As `LipschitzSeparableConv1D`, in two dimensions.

    Input and output shapes: those of `keras.layers.SeparableConv2D`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.LipschitzSeparableConv2D(4, 3)(np.ones((2, 8, 8, 3), "float32")).shape[1:])
    (6, 6, 4)
    """
