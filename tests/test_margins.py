"""Label conventions, margins and radii."""

import math

import numpy as np
import pytest
from keras import ops

from hkr_keras import margins


def host(tensor):
    return ops.convert_to_numpy(tensor)


def test_is_binary():
    shapes = {(3,): True, (3, 1): True, (3, 2): False, (3, 10): False}
    assert {shape: margins.is_binary(np.zeros(shape)) for shape in shapes} == shapes


@pytest.mark.parametrize("shape", [(), (2, 3, 1), (2, 3, 4)])
def test_is_binary_refuses_other_ranks(shape):
    with pytest.raises(ValueError, match=r"Received: y_pred\.shape="):
        margins.is_binary(np.zeros(shape))


LABELS = {
    "zero_one": [0, 1, 1, 0],
    "signs": [-1, 1, 1, -1],
    "floats": [0.0, 1.0, 1.0, 0.0],
    "bools": [False, True, True, False],
}


@pytest.mark.parametrize("pred_shape", [(4,), (4, 1)])
@pytest.mark.parametrize("true_shape", [(4,), (4, 1)])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_signed_scores(labels, true_shape, pred_shape):
    y_true = ops.convert_to_tensor(np.reshape(labels, true_shape))
    y_pred = ops.reshape(ops.array([0.5, 2.0, -1.0, 0.0]), pred_shape)
    signs, scores = margins.signed_scores(y_true, y_pred)
    assert host(signs).tolist() == [-1, 1, 1, -1]
    assert host(scores).tolist() == [0.5, 2.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("labels", "shape"),
    [([2, 0], (2,)), ([2, 0], (2, 1)), ([2.0, 0.0], (2,)), ([0, 0, 1, 1, 0, 0], (2, 3))],
    ids=["integers", "column", "floats", "one_hot"],
)
def test_one_hot(labels, shape):
    encoded = margins.one_hot(ops.convert_to_tensor(np.reshape(labels, shape)), ops.zeros((2, 3)))
    assert host(encoded).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert str(ops.dtype(encoded)) == "float32"


@pytest.mark.parametrize(
    ("function", "true_shape", "pred_shape"),
    [
        (margins.signed_scores, (3, 2), (3,)),
        (margins.signed_scores, (3,), (3, 2)),
        (margins.signed_scores, (2,), (3,)),
        (margins.signed_scores, (3, 1, 1), (3, 1)),
        (margins.one_hot, (3, 2), (3, 4)),
        (margins.one_hot, (2,), (3, 4)),
        (margins.one_hot, (3,), (3, 1)),
        (margins.one_hot, (3,), (3,)),
        (margins.one_hot, (3, 1, 1), (3, 4)),
    ],
)
def test_shapes_that_do_not_fit(function, true_shape, pred_shape):
    with pytest.raises(ValueError, match=r"Received: \w+\.shape="):
        function(ops.zeros(true_shape), ops.zeros(pred_shape))


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([0, 1, 1], 1, [0, 1, 1]),
        ([-1, 1, -1], 1, [0, 1, 0]),
        ([[False], [True]], 1, [0, 1]),
        ([0.0, 2.0], 3, [0, 2]),
        ([[2], [1]], 3, [2, 1]),
        ([[0, 0, 1], [1, 0, 0]], 3, [2, 0]),
    ],
)
def test_class_indices(labels, classes, expected):
    indices = margins.class_indices(labels, classes)
    assert indices.tolist() == expected
    assert indices.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 2], 1),
        ([0, 0.5], 1),
        ([[0, 1]], 1),
        ([0, 3], 3),
        ([-1, 0], 3),
        ([[0, 1]], 3),
        ([np.nan], 3),
        (1, 3),
        ([-1, 0], 1),
    ],
)
def test_class_indices_refuses(labels, classes):
    with pytest.raises(ValueError, match=r"Received: y\.shape="):
        margins.class_indices(labels, classes)


def test_sample_weights():
    like = ops.zeros((2,))
    assert host(margins.sample_weights(None, like)).tolist() == [1, 1]
    for weights in ([1, 3], np.array([[1], [3]]), ops.array([1.0, 3.0])):
        assert host(margins.sample_weights(weights, like)).tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"Received: sample_weight\.shape=\(2, 2\)"):
        margins.sample_weights(np.ones((2, 2)), like)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [2.0, 0.5, 0.0, 3.0]])
@pytest.mark.parametrize("member", [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
def test_class_balance_gives_class_means(member, weights):
    values = np.array([3.0, -1.0, 5.0, 0.25])
    balance = host(margins.class_balance(ops.array(member, "float32"), ops.array(weights), None))
    share = np.multiply(member, weights)
    mean = np.sum(share * values) / np.sum(share) if share.sum() else 0.0
    assert np.average(balance * values, weights=weights) == pytest.approx(mean, rel=1e-6)


def test_class_balance_of_no_weight_at_all_is_zero():
    assert host(margins.class_balance(ops.ones((3,)), ops.zeros((3,)), None)).tolist() == [0, 0, 0]


LOGITS = np.array([[2.0, -1.0, 0.5], [0.25, 1.0, 1.0], [-3.0, -2.0, -2.5]], "float32")


@pytest.mark.parametrize(("labels", "expected"), [([0, 1, 1], [1.5, 0.0, 0.5]), ([2, 0, 0], [-1.5, -0.75, -1.0])])
def test_multiclass_margin(labels, expected):
    logits = ops.convert_to_tensor(LOGITS)
    one_hot = margins.one_hot(ops.convert_to_tensor(labels), logits)
    assert host(margins.multiclass_margin(one_hot, logits)) == pytest.approx(np.array(expected))


@pytest.mark.parametrize(("head", "factor"), [("unit_norm", 2.0), ("orthonormal", math.sqrt(2.0))])
def test_certified_radius_of_logits(head, factor):
    radius = margins.certified_radius(ops.array([0, 1, 1]), ops.convert_to_tensor(LOGITS), lipschitz=4.0, head=head)
    assert host(radius) == pytest.approx(np.array([1.5, 0.0, 0.5]) / factor / 4.0)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_certified_radius_of_scores(shape):
    scores = ops.reshape(ops.array([2.0, -1.0, 0.5]), shape)
    radius = margins.certified_radius(ops.array([1, 0, 0]), scores, lipschitz=4.0)
    assert host(radius).tolist() == [0.5, 0.25, -0.125]
