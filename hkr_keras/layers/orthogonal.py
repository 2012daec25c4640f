"""Orthogonal convolutions: the kernel is composed of orthonormal factors, without an iteration in the forward pass."""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from hkr_keras import constraints
from hkr_keras._backends.compiling import in_one_go
from hkr_keras._registration import registered
from hkr_keras.geometry import Geometry, weight_geometries
from hkr_keras.layers.base import ComposedKernel, at_least_float32
from hkr_keras.layers.circular import CircularConv, CircularConvolution

__all__ = [
    "OrthogonalConv1D",
    "OrthogonalConv1DTranspose",
    "OrthogonalConv2D",
    "OrthogonalConv2DTranspose",
]

Tensor = Any

GRID = 2.0**11  # numbers are split into a multiple of 1 / GRID and the rest

_SHRINK = 1.0 - 2.0**-18  # float32 leaves up to 2e-6 above 1 in the norm of a kernel composed of wide factors


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The product of matrices of norm 1, of which float32 is off by little more than its last bit.

    Both are split: products of their high parts are multiples of `1 / GRID**2` with sums below 4, which float32 has
    exactly, in whatever order it adds; what it is off by in the rest is as small as the rest. That is subtracted, since
    TensorFlow's graphs may begin additions in a row with any of them, and round twice.

    Example:

    >>> float(_product(ops.array([[0.6, 0.8]]), ops.array([[0.8], [0.6]]))[0, 0])
    0.9600000381469727
    """
    high, right_high = (ops.stop_gradient(ops.round(GRID * each) * (1 / GRID)) for each in (left, right))
    return ops.matmul(high, right_high) - (ops.matmul(high, right_high - right) + ops.matmul(high - left, right))


def _block_convolution(
    kernel: Tensor, projection: Tensor, axis: int, flipped: bool = False, product: Callable[..., Tensor] = ops.matmul
) -> Tensor:
    """A convolution after the two-tap convolution `[P, I - P]`, as one kernel with one more tap.

    For an orthogonal projection P the two-tap convolution is orthogonal: it moves what P leaves out by one
    cell. For any P with eigenvalues p in [0, 1] its norm is at most 1, since `|p + (1 - p) e^iw| <= 1`.

    Args:
        kernel: floating point tensor `(groups, inputs, *window, outputs)`.
        projection: symmetric matrices `(groups, inputs, inputs)`.
        axis: of the kernel, a window axis.
        flipped: whether the taps are `[I - P, P]`.
        product: of matrices.

    Returns:
        Tensor of the shape of the kernel, with one more entry along `axis`.

    Example:

    >>> kernel = _block_convolution(ops.ones((1, 1, 1, 1)), 0.25 * ops.ones((1, 1, 1)), axis=2)
    >>> ops.convert_to_numpy(kernel).ravel().tolist()
    [0.25, 0.75]

    Reference:
        Li et al., NeurIPS 2019 (arXiv 1911.00937), section 3.
    """
    shape = tuple(kernel.shape)
    columns = math.prod(shape[2:])
    kept = ops.reshape(product(projection, ops.reshape(kernel, (*shape[:2], columns))), shape)
    moved = kernel - kept
    if flipped:
        kept, moved = moved, kept
    after, before = ([(0, 0)] * len(shape) for _ in range(2))
    after[axis], before[axis] = (0, 1), (1, 0)
    return ops.pad(kept, after) + ops.pad(moved, before)


def _dilated(kernel: Tensor, rates: Sequence[int]) -> Tensor:
    """A kernel `(*window, ...)` with zeros between its taps: dilation written out.

    Example:

    >>> ops.convert_to_numpy(_dilated(ops.array([1.0, 2.0]), (3,))).tolist()
    [1.0, 0.0, 0.0, 2.0]
    """
    for axis, rate in enumerate(rates):
        if rate > 1:
            shape = tuple(kernel.shape)
            gaps = [(0, 0)] * (len(shape) + 1)
            gaps[axis + 1] = (0, rate - 1)
            kernel = ops.pad(ops.expand_dims(kernel, axis + 1), gaps)
            kernel = ops.reshape(kernel, (*shape[:axis], shape[axis] * rate, *shape[axis + 1 :]))
            kernel = kernel[(*(slice(None),) * axis, slice(shape[axis] * rate - rate + 1))]
    return kernel


def _orthogonal_kernel(
    mixing: Tensor,
    bases: Tensor | None,
    window: Sequence[int],
    inputs: int,
    groups: int = 1,
    training: bool = False,
) -> Tensor:
    """The kernel of an orthogonal convolution, composed of orthonormal factors.

    A convolution with window = strides and orthonormal matrix, after one two-tap convolution `[P, I - P]` for
    each row and column that the window has beyond the strides, with `P = U U^T`. Orthogonal on all of `Z^d` and on
    circles whose length the strides divide; with zero padding or `"valid"` the norm is at most 1. When the
    factors have norm at most 1 and are not orthonormal, the norm is at most 1 still.

    Args:
        mixing: tensor `(*strides, channels, filters)`, for each group an orthonormal matrix.
        bases: tensor `(channels, pairs * groups, rank)`: every `U = bases[:, i]` has orthonormal columns. `None` when
            there are no pairs, or for `channels = 1`, where every P is 0.
        window: the kernel size, at least the strides; `pairs = sum(window) - sum(strides)`.
        inputs: input channels of one group, at most `channels`.
        groups: of the convolution.
        training: whether plain products will do.

    Returns:
        Tensor `(*window, inputs, filters)`.

    Example:

    >>> kernel = _orthogonal_kernel(ops.ones((1, 1, 1)), None, window=(3,), inputs=1)
    >>> ops.convert_to_numpy(kernel).ravel().tolist()
    [0.0, 1.0, 0.0]

    Reference:
        Li et al., NeurIPS 2019 (arXiv 1911.00937); Boissin et al., ICML 2025 (arXiv 2501.07930), for strides.
    """
    *strides, channels, filters = mixing.shape
    rank, outputs = len(strides), filters // groups
    kernel = ops.reshape(mixing, (*strides, channels, groups, outputs))
    kernel = ops.transpose(kernel, (rank + 1, rank, *range(rank), rank + 2))
    steps = two_tap_steps(window, strides)
    product = ops.matmul if training else _product
    if bases is None:
        projections = [ops.zeros((groups, channels, channels), dtype=mixing.dtype)] * len(steps)
    else:
        bases = ops.reshape(ops.transpose(bases, (1, 0, 2)), (len(steps), groups, channels, -1))
        projections = ops.unstack(product(bases, ops.swapaxes(bases, -1, -2)), len(steps))
    for (axis, flipped), projection in zip(steps, projections, strict=True):
        kernel = _block_convolution(kernel, projection, axis + 2, flipped, product)
    kernel = ops.transpose(kernel[:, :inputs], (*range(2, rank + 2), 1, 0, rank + 2))
    return ops.reshape(kernel, (*window, inputs, filters))


def two_tap_steps(window: Sequence[int], strides: Sequence[int]) -> list[tuple[int, bool]]:
    """`(axis, flipped)` of every two-tap convolution: axes in turn, and directions too, to stay in the centre.

    Example:

    >>> two_tap_steps((3, 2), (1, 1))
    [(0, False), (1, False), (0, True)]
    """
    extra = [k - s for k, s in zip(window, strides, strict=True)]
    turns = itertools.product(range(max(extra)), range(len(extra)))
    return [(axis, turn % 2 == 1) for turn, axis in turns if turn < extra[axis]]


class _OrthogonalConvolution(CircularConvolution, ComposedKernel):
    """What the orthogonal layers share. Mixin before a Keras convolution.

    The weights are `mixing` and `bases`, the orthonormal factors of the kernel.
    """

    bases: Any = None
    groups = 1  # transposed layers of Keras have none

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if any(k < s for k, s in zip(self.kernel_size, self.strides, strict=True)):
            raise ValueError(
                "Expected kernel_size to be at least strides, since otherwise some inputs are never seen. "
                f"Received: kernel_size={self.kernel_size}, strides={self.strides}"
            )
        if not isinstance(constraints.get(self.kernel_constraint), constraints.Orthonormal):
            raise ValueError(
                "Expected kernel_constraint=None, Orthonormal() or DeferredOrthonormal(), for the factors of "
                f"{type(self).__name__} are orthonormal. Received: kernel_constraint={self.kernel_constraint}"
            )
        if self.circular and getattr(self, "output_padding", None) is not None:
            raise ValueError(f"Expected no output padding on a circle. Received: output_padding={self.output_padding}")

    def add_weight(
        self, *args: Any, name: Any = None, shape: Any = None, regularizer: Any = None, **kwargs: Any
    ) -> Any:
        if name != "kernel":
            return super().add_weight(*args, name=name, shape=shape, regularizer=regularizer, **kwargs)
        *window, inputs, filters = shape
        area, outputs = math.prod(self.strides), filters // self.groups
        channels = max(inputs, outputs // area)
        pairs = len(two_tap_steps(window, self.strides))
        kwargs["autocast"] = False  # half precision would lose the orthogonality of the factors
        if pairs and channels > 1:
            self.bases = super().add_weight(
                name="bases",
                shape=(channels, pairs * self.groups, channels // 2),
                **{**kwargs, "initializer": _with_other_seed(kwargs["initializer"])},
            )
        self.mixing = super().add_weight(name="mixing", shape=(*self.strides, channels, filters), **kwargs)
        self._inputs = inputs
        return self.mixing

    def compose(self, training: bool = False) -> Any:
        bases = None if self.bases is None else at_least_float32(self.bases)
        mixing = at_least_float32(self.mixing)
        settings = tuple(self.kernel_size), self._inputs, self.groups, training
        return _SHRINK * in_one_go(_orthogonal_kernel, mixing, bases, *settings)

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        return self.with_kernel(inputs, self.compose(bool(training)))


def _with_other_seed(initializer: Any) -> Any:
    """The same initializer with another seed, so that factors of equal shape start different."""
    initializer = keras.initializers.get(initializer)
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    config = initializer.get_config()
    if isinstance(config.get("seed"), int):
        config["seed"] += 1
    return type(initializer).from_config(config)


@weight_geometries.register(_OrthogonalConvolution)
def _(layer: Any) -> dict[str, Geometry]:
    return {"mixing": Geometry(groups=layer.groups), "bases": Geometry(depthwise=True)}


class _OrthogonalConv(CircularConv, _OrthogonalConvolution):
    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        return self.with_kernel(self.continued(inputs), self.compose(bool(training)))

    def operate(self, inputs: Tensor, kernel: Any) -> Tensor:
        padding = self.padding
        if padding == "causal":
            widths = [(0, 0)] * len(inputs.shape)
            widths[self.axes()[0]] = (self.dilation_rate[0] * (self.kernel_size[0] - 1), 0)
            inputs, padding = ops.pad(inputs, widths), "valid"
        return ops.conv(inputs, kernel, list(self.strides), padding, self.data_format, self.dilation_rate)


class _OrthogonalConvTranspose(_OrthogonalConvolution):
    def circle(self, shape: Any) -> tuple[list[int], list[int]]:
        """Cells to add before and after, so that the output holds all that `cut` takes of it."""
        reach, lefts = self._reach()
        before = [(r - left) // s for r, left, s in zip(reach, lefts, self.strides, strict=True)]
        after = [-(-left // s) for left, s in zip(lefts, self.strides, strict=True)]
        self._check_circle(shape, [max(pair) for pair in zip(before, after, strict=True)], [1] * len(reach))
        return before, after

    def _reach(self) -> tuple[list[int], list[int]]:
        """How far one entry reaches in the output, and how much of that is to its left."""
        reach = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation_rate, strict=True)]
        return reach, [(r + 1 - s) // 2 for r, s in zip(reach, self.strides, strict=True)]

    def cut(self, outputs: Tensor, shape: Any) -> Tensor:
        before, _ = self.circle(shape)
        for axis, left, b, s in zip(self.axes(), self._reach()[1], before, self.strides, strict=True):
            start = left + s * b
            outputs = outputs[(*(slice(None),) * axis, slice(start, start + s * shape[axis]))]
        return outputs

    def operate(self, inputs: Tensor, kernel: Any) -> Tensor:
        kernel = _dilated(kernel, self.dilation_rate)  # TensorFlow has no transposed convolution with gaps on most CPUs
        outputs = ops.conv_transpose(
            self.continued(inputs), kernel, list(self.strides), self.padding, self.output_padding, self.data_format
        )
        return self.cut(outputs, inputs.shape) if self.circular else outputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        shape = list(super().compute_output_shape(input_shape))
        if self.circular:
            self.circle(input_shape)
            for axis, s in zip(self.axes(), self.strides, strict=True):
                shape[axis] = input_shape[axis] * s
        return tuple(shape)


@registered
class OrthogonalConv1D(_OrthogonalConv, keras.layers.Conv1D):
    """`keras.layers.Conv1D` whose operator is orthogonal: it keeps norms and gradients, overlap or not.

    All arguments are those of `keras.layers.Conv1D`, and `padding` may be `"circular"`: all singular values are 1
    on a circle. With other paddings something is lost at the border, and the norm is at most 1. On a circle the layer
    keeps the norm of inputs for `filters >= inputs * strides`, that of gradients for `filters <= inputs * strides`.

    The weights are orthonormal factors, `mixing` and `bases`; `kernel` is composed of them in the forward pass, by
    small products. `kernel_constraint` takes `None`, `Orthonormal()` or `DeferredOrthonormal()`;
    `kernel_initializer` draws the factors, which are then made orthonormal; `kernel_regularizer` sees the composed
    kernel.

    Input and output shapes: those of `keras.layers.Conv1D`; circular: `(batch, steps / strides, filters)`.

    Raises:
        ValueError: for a kernel size below the strides, another constraint, LoRA and quantization; for a circular
            input of unknown size or one that the strides do not divide.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> x = np.random.default_rng(0).normal(size=(1, 16, 4)).astype("float32")
    >>> y = hkr.layers.OrthogonalConv1D(4, 3, padding="circular")(x)
    >>> bool(abs(ops.norm(ops.reshape(y, (-1,))) / np.linalg.norm(x) - 1) < 1e-5)
    True

    Reference:
        Li et al., NeurIPS 2019 (arXiv 1911.00937); Boissin et al., ICML 2025 (arXiv 2501.07930).
    """

    __signature__ = inspect.signature(keras.layers.Conv1D)


@registered
class OrthogonalConv2D(_OrthogonalConv, keras.layers.Conv2D):
    """`keras.layers.Conv2D` whose operator is orthogonal: it keeps norms and gradients, overlap or not.

    As `OrthogonalConv1D`, in two dimensions.

    Input and output shapes: those of `keras.layers.Conv2D`; circular: every size divided by the strides.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.OrthogonalConv2D(8, 3, strides=2, padding="same")
    >>> tuple(layer(np.ones((2, 8, 8, 3), "float32")).shape[1:])
    (4, 4, 8)
    >>> bool(0.999 < hkr.lipschitz_bound(layer) < 1 + 1e-6)
    True

    Reference:
        Li et al., NeurIPS 2019 (arXiv 1911.00937); Boissin et al., ICML 2025 (arXiv 2501.07930).
    """

    __signature__ = inspect.signature(keras.layers.Conv2D)


@registered
class OrthogonalConv1DTranspose(_OrthogonalConvTranspose, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` whose operator is orthogonal: the adjoint of an `OrthogonalConv1D`.

    All arguments are those of `keras.layers.Conv1DTranspose`, and `padding` may be `"circular"`; the rest is as for
    `OrthogonalConv1D`. It keeps the norm of inputs for `inputs <= filters * strides`, on a circle and with
    `padding="valid"`, which crops nothing.

    Input and output shapes: those of `keras.layers.Conv1DTranspose`; circular: `(batch, steps * strides, filters)`.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.OrthogonalConv1DTranspose(4, 4, strides=2, padding="same")
    >>> tuple(layer(np.ones((2, 8, 3), "float32")).shape[1:])
    (16, 4)

    Reference:
        Boissin et al., ICML 2025 (arXiv 2501.07930).
    """

    __signature__ = inspect.signature(keras.layers.Conv1DTranspose)


@registered
class OrthogonalConv2DTranspose(_OrthogonalConvTranspose, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` whose operator is orthogonal: the adjoint of an `OrthogonalConv2D`.

    As `OrthogonalConv1DTranspose`, in two dimensions.

    Input and output shapes: those of `keras.layers.Conv2DTranspose`; circular: every size times the strides.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> tuple(hkr.layers.OrthogonalConv2DTranspose(4, 3, strides=2)(np.ones((2, 4, 4, 3), "float32")).shape[1:])
    (9, 9, 4)

    Reference:
        Boissin et al., ICML 2025 (arXiv 2501.07930).
    """

    __signature__ = inspect.signature(keras.layers.Conv2DTranspose)
