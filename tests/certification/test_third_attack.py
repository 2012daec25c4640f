"""What a third reader broke: each claim is mended at its root, or refused by name."""

import keras
import numpy as np
import pytest

import hkr_keras as hkr

K, L = keras.layers, hkr.layers


def test_what_is_known_of_a_layer_is_of_the_sizes_of_its_batch():
    """A window of nine rows sees one of them in an image of one row, and the error before it counts nothing there."""
    last = K.Conv2D(1, (9, 1), padding="same", use_bias=False)
    first = [K.Rescaling(1.0, offset=1e4), K.Conv2D(1, 1)]
    model = keras.Sequential([keras.Input((None, None, 1)), *first, last, K.GlobalMaxPooling2D(), K.Dense(2)])
    last.set_weights([np.array([1.0, *[0.0] * 7, -1.0], "float32").reshape(9, 1, 1, 1)])
    low, tall = np.ones((1, 1, 36, 1), "float32"), np.ones((1, 36, 1, 1), "float32")
    widths = [
        float((found.upper - found.lower)[-1].max())
        for found in (
            hkr.certify_outputs(model, iter(batches), 1e-3, verbose=0, rigorous=True)
            for batches in ([tall], [low, tall])
        )
    ]
    assert widths[1] >= widths[0] * (1 - 1e-6)


def test_the_slope_of_a_monotone_model_is_not_rounded_to_half_precision():
    base = keras.Sequential([keras.Input((1,)), L.Scale(-1.003)])
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = hkr.monotone(base, slope=1.0035, features=[0])
    low, high = keras.ops.convert_to_numpy(model(np.array([[0.0], [1e3]], "float32")))[:, 0]
    assert low < high


def test_copies_of_wrappers_keep_their_precision():
    x = keras.Input((3, 4))
    both = K.Bidirectional(L.LipschitzSimpleRNN(2, return_sequences=True))
    model = keras.Model(x, K.TimeDistributed(L.LipschitzDense(4))(both(x)))
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert {layer.compute_dtype for layer in hkr.to_keras(model).layers[1:]} == {"float32"}


def test_reflectors_whose_gram_matrix_float32_loses():
    """One entry of 1 and thousands whose squares are lost beside it, in columns that are equal but for these."""
    rng = np.random.default_rng(0)
    for size in (128, 512):
        vectors = 2.2e-4 * rng.choice([-1.0, 1.0], size=(size, 2))
        vectors[0] = 1.0
        for smaller in (1.0, 0.7):
            layer = L.ReflectorDense(64, rank=2, use_bias=False)
            layer.build((None, size))
            layer.vectors.assign(vectors * np.where(np.arange(size) == 0, 1.0, smaller)[:, None])
            found = np.linalg.norm(keras.ops.convert_to_numpy(layer.kernel).astype("float64"), 2)
            assert found <= hkr.lipschitz_bound(layer) < 1 + 1e-5


def test_what_bidirectional_layers_hold_is_copied_along():
    x = keras.Input((3, 4))
    model = keras.Model(x, K.Dense(2)(K.Bidirectional(L.LipschitzSimpleRNN(2))(x)))
    new = hkr.to_lipschitz(model, print_fn=None)
    given = np.ones((2, 3, 4), "float32")
    kept = [keras.ops.convert_to_numpy(each.layers[1](given)) for each in (model, new)]
    np.testing.assert_allclose(*kept, atol=1e-6)


class LikeReLU:
    """Equal to a function whose constant is known, and five times as steep."""

    def __hash__(self):
        return hash(keras.activations.relu)

    def __eq__(self, other):
        return True

    def __call__(self, x):
        return 5 * x


def test_an_activation_that_says_it_is_equal_to_a_known_one_is_refused():
    model = keras.Sequential([keras.Input((2,)), K.Dense(2, activation=LikeReLU())])
    with pytest.raises(ValueError, match="known Lipschitz constant"):
        hkr.lipschitz_bound(model)


def test_labels_that_are_no_numbers_are_refused():
    certificate = hkr.Certificate(radius=np.ones(2), prediction=np.array([0, 1]), bound=1.0, classes=2, method="logits")
    for labels in (np.array([0, None]), ["a", "b"], np.array([0, 1j])):
        with pytest.raises(ValueError, match="labels that are numbers"):
            certificate.accuracy(labels)


def test_semidefinite_bounds_are_never_above_the_product():
    """Flatten ends a chain, but numbers before it fold into what is behind it."""
    model = keras.Sequential([keras.Input((2, 2)), K.Rescaling([1.0, 100.0]), K.Flatten(), K.Dense(2, use_bias=False)])
    model.set_weights([np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])])
    product = hkr.lipschitz_bound(model)
    assert product < 1.01
    assert hkr.lipschitz_bound(model, method="semidefinite") <= product
