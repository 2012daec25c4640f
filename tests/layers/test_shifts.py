"""Shifts and shuffles against loops over cells, and their explicit operators: permutations, or a part of one."""

import keras
import numpy as np
import pytest
from helpers import check_layer, explicit_operator, normal, to_numpy

import hkr_keras as hkr

L = hkr.layers
MOVES = {1: [(1,), (-1,)], 2: [(1, 0), (-1, 0), (0, 1), (0, -1)]}


def shifted(x, rank, circular):
    """Of channels-last data: every channel group by itself, with `np.roll`."""
    x, share = np.array(x), x.shape[-1] // (2 * rank + 1)
    for way, move in enumerate(MOVES[rank]):
        group = slice(share * way, share * (way + 1))
        x[..., group] = np.roll(x[..., group], move, axis=tuple(range(1, rank + 1)))
        for axis, step in enumerate(move, 1):
            if step and not circular:
                edge = [slice(None)] * x.ndim
                edge[axis], edge[-1] = (slice(0, 1) if step > 0 else slice(-1, None)), group
                x[tuple(edge)] = 0
    return x


@pytest.mark.many
@pytest.mark.parametrize("padding", ["circular", "same"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("shape", [(5, 4), (1, 3), (4, 5, 7), (1, 3, 5)])
def test_shifts(shape, padding, data_format):
    rank, x = len(shape) - 1, normal((3, *shape))
    layer = (L.SpatialShift1D, L.SpatialShift2D)[rank - 1](padding=padding, data_format=data_format)
    arrange = (lambda a: a) if data_format == "channels_last" else (lambda a: np.moveaxis(a, -1, 1))
    x, expected = np.ascontiguousarray(arrange(x)), arrange(shifted(x, rank, padding == "circular"))
    np.testing.assert_array_equal(to_numpy(layer(x), "float32"), expected)
    check_layer(layer, x.shape[1:])
    assert hkr.lipschitz_bound(layer) == 1.0

    matrix = explicit_operator(layer, x.shape[1:])
    assert set(np.unique(matrix)) <= {0.0, 1.0}
    assert (matrix.sum(axis=0) <= 1).all()
    assert (matrix.sum(axis=1) <= 1).all()
    assert (matrix.sum() == matrix.shape[0]) == (padding == "circular")


@pytest.mark.parametrize("padding", ["circular", "same"])
def test_shifts_of_inputs_of_unknown_size(padding):
    layer = L.SpatialShift2D(padding)
    inputs = keras.Input((None, None, 6))
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, None, None, 6)
    for size in ((1, 4), (5, 2)):
        x = normal((2, *size, 6))
        np.testing.assert_array_equal(model.predict(x, verbose=0), shifted(x, 2, padding == "circular"))
        plain = hkr.to_keras(model)
        np.testing.assert_array_equal(to_numpy(plain(x)), to_numpy(model(x)))


@pytest.mark.parametrize(
    ("groups", "axis", "shape"), [(2, -1, (3, 6)), (3, 1, (6, 2, 2)), (1, -1, (4,)), (4, -1, (4,))]
)
def test_channel_shuffle(groups, axis, shape):
    layer, x = L.ChannelShuffle(groups, axis=axis), normal((2, *shape))
    channels = x.shape[axis]
    order = np.arange(channels).reshape(groups, -1).T.ravel()
    np.testing.assert_array_equal(to_numpy(layer(x), "float32"), np.take(x, order, axis=axis))
    check_layer(layer, shape)
    matrix = explicit_operator(layer, shape)
    np.testing.assert_array_equal(matrix @ matrix.T, np.eye(len(matrix)))
    back = L.ChannelShuffle(channels // groups, axis=axis)
    np.testing.assert_array_equal(to_numpy(back(layer(x)), "float32"), x)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (lambda: L.SpatialShift1D("valid"), (3, 3), "padding='valid'"),
        (L.SpatialShift1D, (4, 2), "channels=2"),
        (L.SpatialShift2D, (4, 4, 4), "channels=4"),
        (L.SpatialShift2D, (4, 4, None), "channels=None"),
        (lambda: L.ChannelShuffle(0), (4,), "groups=0"),
        (lambda: L.ChannelShuffle(4), (6,), r"input_shape=\(None, 6\)"),
    ],
)
def test_bad_sizes_are_refused(make, shape, message):
    with pytest.raises(ValueError, match=f"Received: .*{message}"):
        make()(keras.Input(shape))
