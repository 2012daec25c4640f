"""A recurrent layer with a constant of 1 for sequences of a given length."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from hkr_keras._registration import registered
from hkr_keras.geometry import Geometry, kernel_geometries
from hkr_keras.layers.base import Layer, LipschitzLayer, PlainLayers

__all__ = ["LipschitzSimpleRNN", "LipschitzSimpleRNNCell"]

_EXACT_LENGTH = 512  # up to here the norm of the matrix of powers is computed, beyond it is bounded


def recurrence_bound(length: int, input_norm: float, recurrent_norm: float, sequences: bool) -> float:
    """Upper bound on the constant of `h_t = phi(W x_t + U h_(t-1) + b)` over sequences, L2 norm in, L2 norm out.

    For two inputs that differ by `e_t` and a phi of slope at most 1, the states differ by at most
    `|d_t| <= u |d_(t-1)| + w |e_t|`, so `|d_t| <= w sum_(j <= t) u^(t - j) |e_j|`. By Cauchy-Schwarz the last
    state has constant `w (1 + u^2 + ... + u^(2 T - 2))^(1/2)`, which is `w T^(1/2)` for u = 1. The sequence of all
    states has `w |L|`, L the lower triangular matrix of powers `u^(t - j)`: for u = 1 that is
    `w / (2 sin(pi / (4 T + 2)))`, about `0.64 w T`. For long sequences the larger `1 + u + ... + u^(T - 1)`
    (Schur) is used.

    Args:
        length: T, the number of steps.
        input_norm: w, at least `|W|` times the slope of phi.
        recurrent_norm: u, at least `|U|` times the slope of phi.
        sequences: whether all states are returned, or the last one.

    Returns:
        The bound, a Python float.

    Example:

    >>> round(recurrence_bound(4, 1.0, 1.0, sequences=False), 6)
    2.0
    >>> round(recurrence_bound(4, 1.0, 1.0, sequences=True), 6) == round(1 / (2 * math.sin(math.pi / 18)), 6)
    True
    """
    with np.errstate(over="ignore"):
        powers = np.power(float(recurrent_norm), np.arange(length))
    rounding = 1.0 + 64 * (length + 1) ** 2 * float(np.finfo(np.float64).eps)
    if not sequences:
        return input_norm * math.hypot(*powers) * rounding
    if length > _EXACT_LENGTH or not np.isfinite(powers).all():
        return input_norm * float(powers.sum()) * rounding
    lags = np.subtract.outer(np.arange(length), np.arange(length))
    matrix = np.where(lags >= 0, powers[np.maximum(lags, 0)], 0.0)
    return input_norm * float(np.linalg.norm(matrix, ord=2)) * rounding


class LipschitzSimpleRNNCell(LipschitzLayer, keras.layers.SimpleRNNCell):
    """`keras.layers.SimpleRNNCell` with an orthonormal recurrent kernel and an orthonormal input kernel over `gain`.

    Made by `LipschitzSimpleRNN`, which knows the length of sequences and so the gain.
    """

    gain = 1.0

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)


@kernel_geometries.register
def _(cell: LipschitzSimpleRNNCell) -> dict[str, Geometry]:
    return {"kernel": Geometry(gain=cell.gain), "recurrent_kernel": Geometry()}


@registered
class LipschitzSimpleRNN(keras.layers.RNN):
    """`keras.layers.SimpleRNN` with a constant of 1 for sequences of the length it was built for.

    `h_t = activation(x_t W + h_(t-1) U + b)` from a state of zeros, with U orthonormal and W orthonormal divided by
    `recurrence_bound(length, 1, 1, return_sequences)`: the root of the length for the last state, about 0.64 times the
    length for all states. Any other length is refused when the layer is called. At inference, dropout does nothing;
    states that go in, come out or stay between batches are not supported.

    Args:
        units: number of outputs.
        activation: with a slope of at most 1; `lipschitz_bound` multiplies by what it is, or refuses it.
        use_bias: whether to add a bias.
        return_sequences: whether to return all states, or the last one.
        go_backwards: whether to read sequences from their end.
        unroll: whether to unroll the loop.
        kernel_initializer: of W, followed by a projection onto the constraint set.
        recurrent_initializer: of U, likewise.
        bias_initializer: of the bias.
        kernel_constraint: of W: `Orthonormal()` (the default), `SpectralBall()` or `UnitNorm()`.
        recurrent_constraint: of U, likewise.
        dropout: share of inputs dropped in training.
        recurrent_dropout: share of states dropped in training.
        **kwargs: of `keras.layers.Layer`.

    Input shape: `(batch, steps, features)`, with a known number of steps.
    Output shape: `(batch, units)`, or `(batch, steps, units)`.

    Raises:
        ValueError: in `build` for an unknown length; for constraints of another library; for sequences of another
            length.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> layer = hkr.layers.LipschitzSimpleRNN(4)
    >>> tuple(layer(np.ones((2, 9, 3), "float32")).shape)
    (2, 4)
    >>> bool(0.999 < hkr.lipschitz_bound(layer) < 1 + 1e-5)
    True

    Reference:
        Arjovsky, Shah and Bengio, ICML 2016 (arXiv 1511.06464), for orthogonal recurrence; the bound is derived in
        `recurrence_bound`.
    """

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        use_bias: Any = True,
        return_sequences: Any = False,
        go_backwards: Any = False,
        unroll: Any = False,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        dropout: Any = 0.0,
        recurrent_dropout: Any = 0.0,
        **kwargs: Any,
    ):
        cell = LipschitzSimpleRNNCell(
            units,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            recurrent_initializer=recurrent_initializer,
            bias_initializer=bias_initializer,
            kernel_constraint=kernel_constraint,
            recurrent_constraint=recurrent_constraint,
            dropout=dropout,
            recurrent_dropout=recurrent_dropout,
            dtype=kwargs.get("dtype"),
            trainable=kwargs.get("trainable", True),
            name="cell",
        )
        super().__init__(cell, return_sequences=return_sequences, go_backwards=go_backwards, unroll=unroll, **kwargs)

    def build(self, sequences_shape: Any, initial_state_shape: Any = None) -> None:
        length = sequences_shape[1]
        if length is None or initial_state_shape is not None:
            raise ValueError(
                f"Expected LipschitzSimpleRNN '{self.name}' to receive sequences of known length, and no state, since "
                f"its constant depends on both. Received: input_shape={tuple(sequences_shape)}, "
                f"initial_state_shape={initial_state_shape}"
            )
        self.length = length
        self.cell.gain = recurrence_bound(length, 1.0, 1.0, self.return_sequences)
        super().build(sequences_shape)
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={1: length, 2: sequences_shape[2]})

    def as_keras(self, new: PlainLayers, *inputs: Any) -> Layer:
        """The same layer of Keras."""
        if isinstance(self.cell.activation, keras.layers.Layer):
            raise ValueError(
                "Expected an activation that is a function of Keras, since nothing can be put behind it inside a "
                f"recurrent layer. Received: {self.name}.activation={type(self.cell.activation).__name__}"
            )
        return new.alike(keras.layers.SimpleRNN, self.get_weights())

    def get_config(self) -> dict[str, Any]:
        names = [
            *("units", "activation", "use_bias", "kernel_initializer", "recurrent_initializer", "bias_initializer"),
            *("kernel_constraint", "recurrent_constraint", "dropout", "recurrent_dropout"),
        ]
        cell = self.cell.get_config()
        config = {name: cell[name] for name in names}
        config |= {"return_sequences": self.return_sequences, "go_backwards": self.go_backwards, "unroll": self.unroll}
        return {**keras.layers.Layer.get_config(self), **config}

    @classmethod
    def from_config(cls, config: Any, custom_objects: Any = None) -> Any:
        return cls(**config)
