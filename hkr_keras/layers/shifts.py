"""Permutations: channels that move to neighbouring cells, or trade places. What they rearrange keeps its norm."""

from typing import Any

import keras
from keras import ops

from hkr_keras._registration import registered
from hkr_keras.layers.activations import ChannelLayer
from hkr_keras.layers.base import PlainLayers

__all__ = ["ChannelShuffle", "SpatialShift1D", "SpatialShift2D"]

Tensor = Any


def _moved(x: Tensor, axis: int, backwards: bool, circular: bool, roll: bool) -> Tensor:
    """Moved by one cell along an axis; what leaves at one end comes in at the other, or zeros do."""
    if circular and roll:  # on TensorFlow a quarter of the time that slices take
        return ops.roll(x, -1 if backwards else 1, axis=axis)

    def cells(start: int | None, stop: int | None) -> Tensor:
        return x[tuple(slice(start, stop) if i == axis else slice(None) for i in range(len(x.shape)))]

    end = cells(None, 1) if backwards else cells(-1, None)
    entering = end if circular else ops.zeros_like(end)
    return ops.concatenate([cells(1, None), entering] if backwards else [entering, cells(None, -1)], axis=axis)


class _SpatialShift(keras.layers.Layer):
    """A share of the channels moves by one cell in each direction of space, the others stay."""

    rank: int

    def __init__(self, padding: str = "circular", data_format: str | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if padding not in ("circular", "same"):
            raise ValueError(f"Expected padding 'circular' or 'same'. Received: padding={padding!r}")
        self.padding = padding
        self.data_format = data_format or keras.config.image_data_format()
        self.input_spec = keras.layers.InputSpec(ndim=self.rank + 2)

    @property
    def _channel_axis(self) -> int:
        return self.rank + 1 if self.data_format == "channels_last" else 1

    def build(self, input_shape: Any) -> None:
        channels, ways = input_shape[self._channel_axis], 2 * self.rank
        if channels is None or channels <= ways:
            raise ValueError(
                f"Expected {type(self).__name__} '{self.name}' to receive a number of channels that is known and above "
                f"{ways}, one for each direction and one that stays. Received: channels={channels}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=self.rank + 2, axes={self._channel_axis: channels})
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        return self._shifted(inputs, roll=True)

    def _shifted(self, inputs: Tensor, roll: bool) -> Tensor:
        axis, ways = self._channel_axis, 2 * self.rank
        first = 1 if self.data_format == "channels_last" else 2
        share = inputs.shape[axis] // (ways + 1)
        *moving, staying = ops.split(inputs, [share * (way + 1) for way in range(ways)], axis=axis)
        circular = self.padding == "circular"
        moved = [_moved(part, first + way // 2, bool(way % 2), circular, roll) for way, part in enumerate(moving)]
        return ops.concatenate([*moved, staying], axis=axis)

    def as_keras(self, new: PlainLayers, *inputs: Tensor) -> Tensor:
        """The operations of Keras, of those that LiteRT has too."""
        return self._shifted(inputs[0], roll=False)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "padding": self.padding, "data_format": self.data_format}


@registered
class SpatialShift1D(_SpatialShift):
    """Moves a third of the channels one step forwards and a third one step backwards: mixes over space by copying.

    Layers that mix channels, such as `LipschitzDense`, see neighbouring steps behind it, as behind a convolution.

    Args:
        padding: `"circular"`, where what leaves at one end comes in at the other, a permutation that keeps norms; or
            `"same"`, where zeros come in, which never enlarges them.
        data_format: `"channels_last"`, `"channels_first"` or `None` for Keras's default.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: `(batch, steps, channels)`, at least 3 channels; the first `channels // 3` move forwards,
    the next as many backwards, and the rest stays.

    Raises:
        ValueError: for another padding; for a number of channels that is unknown or below 3.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> x = np.array([[[1, 1, 1], [2, 2, 2], [3, 3, 3]]], "float32")
    >>> keras.ops.convert_to_numpy(hkr.layers.SpatialShift1D(data_format="channels_last")(x))[0].tolist()
    [[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]]

    Reference:
        Wu et al., CVPR 2018 (arXiv 1711.08141); in Lipschitz networks arXiv 2601.18513.
    """

    rank = 1


@registered
class SpatialShift2D(_SpatialShift):
    """Moves a fifth of the channels by one pixel in each of four directions: mixes over space by copying.

    Layers that mix channels, such as `LipschitzDense`, see neighbouring pixels behind it, as behind a convolution.
    Copies are cheap for an accelerator and not for a processor: use it at low resolution.

    Args:
        padding: `"circular"`, where what leaves at one side comes in at the other, a permutation that keeps norms; or
            `"same"`, where zeros come in, which never enlarges them.
        data_format: `"channels_last"`, `"channels_first"` or `None` for Keras's default.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: `(batch, height, width, channels)`, at least 5 channels; groups of `channels // 5` move
    down, up, right and left, in this order, and the rest stays.

    Raises:
        ValueError: for another padding; for a number of channels that is unknown or below 5.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> x = np.array([[[[1, 1, 1, 1, 1], [2, 2, 2, 2, 2]]]], "float32")
    >>> keras.ops.convert_to_numpy(hkr.layers.SpatialShift2D(data_format="channels_last")(x))[0, 0].tolist()
    [[1.0, 1.0, 2.0, 2.0, 1.0], [2.0, 2.0, 1.0, 1.0, 2.0]]

    Reference:
        Wu et al., CVPR 2018 (arXiv 1711.08141); in Lipschitz networks arXiv 2601.18513.
    """

    rank = 2


@registered
class ChannelShuffle(ChannelLayer):
    """Deals the channels out anew: those of one group go to all groups. A permutation, so it keeps norms.

    Between two convolutions in groups, it lets every output see every input.

    Args:
        groups: how many groups of neighbours the channels are split into; `g * size + i` becomes `i * groups + g`.
        axis: the channel axis; `None` for that of `keras.config.image_data_format()`: 1 or -1.
        **kwargs: of `keras.layers.Layer`.

    Input and output shape: any, the same; a number of channels that is a multiple of `groups`.

    Raises:
        ValueError: for no positive integer; for a number of channels that is no multiple of it.

    Example:

    >>> import numpy as np, hkr_keras as hkr
    >>> keras.ops.convert_to_numpy(hkr.layers.ChannelShuffle(2)(np.array([[1.0, 2, 3, 4, 5, 6]]))).tolist()
    [[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]]

    Reference:
        Zhang et al., CVPR 2018 (arXiv 1707.01083).
    """

    def __init__(self, groups: int, axis: int | None = None, **kwargs: Any):
        if not isinstance(groups, int) or groups < 1:
            raise ValueError(f"Expected a positive integer. Received: groups={groups}")
        super().__init__(axis=axis, **kwargs)
        self.groups = self.group = groups

    def call(self, inputs: Tensor) -> Tensor:
        axis, shape = self.axis % len(inputs.shape), tuple(ops.shape(inputs))
        size = inputs.shape[axis] // self.groups
        split = ops.reshape(inputs, (*shape[:axis], self.groups, size, *shape[axis + 1 :]))
        return ops.reshape(ops.swapaxes(split, axis, axis + 1), shape)

    def _as_keras(self, new: PlainLayers, x: Tensor) -> Tensor:
        *places, channels = x.shape[1:]
        if None in places:
            raise ValueError(f"Expected inputs of known size to convert '{self.name}'. Received: shape={x.shape}")
        rank = len(places)
        split = new(keras.layers.Reshape, (*places, self.groups, channels // self.groups))(x)
        dealt = new(keras.layers.Permute, (*range(1, rank + 1), rank + 2, rank + 1))(split)
        return new(keras.layers.Reshape, (*places, channels))(dealt)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "groups": self.groups}
