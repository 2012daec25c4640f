"""Plain Keras layers in place of ours: equal outputs, no import of this package, certificates of stored kernels."""

import subprocess
import sys

import cases
import keras
import numpy as np
import pytest
from cases import IMAGE, SEQUENCE
from helpers import BACKEND, normal, to_numpy

import hkr_keras as hkr
from hkr_keras import layers as L

K = keras.layers


def randomize(model, seed=0):
    """Gives biases, means, angles and logits values other than those that they start from."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.name in ("bias", "beta", "moving_mean", "angles", "mixing_logits"):
            weight.assign(rng.normal(size=weight.shape))
        if weight.name in ("gamma", "moving_variance"):
            weight.assign(rng.uniform(1.0, 2.0, size=weight.shape))


@pytest.mark.parametrize(("mode", "sequences"), [("concat", False), ("ave", True)])
def test_two_directions(mode, sequences):
    inner = L.LipschitzSimpleRNN(4, return_sequences=sequences)
    model = keras.Sequential([keras.Input(SEQUENCE), K.Bidirectional(inner, merge_mode=mode)])
    randomize(model)
    plain, x = hkr.to_keras(model), normal((5, *SEQUENCE))
    assert "hkr_keras" not in plain.to_json()
    np.testing.assert_allclose(to_numpy(plain(x)), to_numpy(model(x)), atol=1e-6)
    assert [each.name for each in plain.layers] == [each.name for each in model.layers]


@pytest.mark.many
@pytest.mark.parametrize(("make", "shape"), cases.CONVERTED, ids=cases.name)
def test_equal_outputs_without_a_layer_of_ours(make, shape):
    layer = make()
    model = keras.Sequential([keras.Input(shape), layer])
    randomize(model)
    x = normal((5, *shape))
    expected = to_numpy(model(x))
    plain = hkr.to_keras(model)
    assert "hkr_keras" not in plain.to_json()
    assert [new.name for new in plain.layers] == [layer.name]
    np.testing.assert_allclose(to_numpy(plain(x)), expected, atol=1e-6)
    copy = keras.models.model_from_json(plain.to_json())
    copy.set_weights(plain.get_weights())
    np.testing.assert_array_equal(to_numpy(copy(x)), to_numpy(plain(x)))


def network():
    """One of every kind of merge, a nested model that is shared, and two inputs."""
    branch = keras.Sequential([keras.Input(IMAGE), L.OrthogonalConv2D(4, 3, padding="same"), L.GroupSort(2)])
    left, right = keras.Input(IMAGE, name="left"), keras.Input(IMAGE, name="right")
    x = L.LipschitzResidual()([branch(left), branch(right)])
    x = K.Concatenate()([x, K.Rescaling(0.5)(left)])
    x = L.L2NormPooling2D(2)(L.BatchCentering()(x))
    x = K.TimeDistributed(L.LipschitzDense(6))(K.Reshape((9, 8))(x))
    x = K.Normalization(mean=0.1, variance=2.0)(K.Flatten()(K.Dropout(0.3)(x)))
    return keras.Model([left, right], {"scores": L.LipschitzDense(3)(x)}, name="network")


@pytest.mark.once
def test_a_graph_with_shared_and_nested_layers(tmp_path):
    model = network()
    randomize(model)
    x = [normal((3, *IMAGE)), normal((3, *IMAGE), seed=1)]
    plain = hkr.to_keras(model)
    np.testing.assert_allclose(to_numpy(plain(x)["scores"]), to_numpy(model(x)["scores"]), atol=1e-6)
    plain.save(tmp_path / "plain.keras")
    loaded = keras.models.load_model(tmp_path / "plain.keras")
    np.testing.assert_array_equal(to_numpy(loaded(x)["scores"]), to_numpy(plain(x)["scores"]))
    again = hkr.to_keras(plain)
    np.testing.assert_array_equal(to_numpy(again(x)["scores"]), to_numpy(plain(x)["scores"]))


@pytest.mark.once
def test_the_file_loads_where_this_package_cannot_be_imported(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 1)), *hkr.models.lipschitz_cnn((8, 8, 1), 3, orthogonal=True).layers])
    x = normal((2, 8, 8, 1))
    hkr.to_keras(model).save(tmp_path / "plain.keras")
    np.save(tmp_path / "x.npy", x)
    script = (
        "import sys; sys.modules['hkr_keras'] = None\n"
        + ("import torch\n" if BACKEND == "torch" else "")
        + f"import keras, numpy as np; model = keras.models.load_model(r'{tmp_path}/plain.keras')\n"
        + f"y = model(np.load(r'{tmp_path}/x.npy')); np.save(r'{tmp_path}/y.npy', keras.ops.convert_to_numpy(y))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), to_numpy(model(x)), atol=1e-6)


def test_stored_kernels_have_a_rigorous_certificate():
    model = hkr.models.lipschitz_cnn((8, 8, 1), 3, orthogonal=True)
    x = np.abs(normal((16, 8, 8, 1)))
    stored = hkr.to_keras(model, kernels_only=True)
    kinds = {type(layer).__name__ for layer in stored.layers}
    assert kinds == {"Conv2D", "Dense", "GroupSort", "InvertibleDownsampling2D", "Flatten"}
    rigorous = hkr.certify(stored, x, verbose=0, rigorous=True)
    usual = hkr.certify(model, x, verbose=0)
    np.testing.assert_array_equal(rigorous.prediction, usual.prediction)
    assert (rigorous.radius <= usual.radius).all()
    assert (rigorous.radius > usual.radius - 0.01).all()  # what rounding may add in the worst case
    np.testing.assert_allclose(hkr.lipschitz_bound(stored), hkr.lipschitz_bound(model), rtol=1e-2)


def test_kernels_only_leaves_blocks_circles_and_activations():
    layers = [L.OrthogonalConv2D(4, 3, padding="circular"), L.SLLConv2D(4, 3), L.AOLConv2D(4, 3), L.GroupSort(2)]
    model = keras.Sequential([keras.Input(IMAGE), *layers])
    stored = hkr.to_keras(model, kernels_only=True)
    kinds = [type(layer).__name__ for layer in stored.layers]
    assert kinds == ["OrthogonalConv2D", "SLLConv2D", "Conv2D", "GroupSort"]
    x = normal((2, *IMAGE))
    np.testing.assert_allclose(to_numpy(stored(x)), to_numpy(model(x)), atol=1e-6)


def test_half_precision_layers_keep_their_precision():
    layers = [L.LipschitzConv2D(4, 3), L.GroupSort(2), L.L2NormPooling2D(2), L.ScaledGlobalAveragePooling2D()]
    layers = [type(layer).from_config({**layer.get_config(), "dtype": "mixed_bfloat16"}) for layer in layers]
    model = keras.Sequential([keras.Input(IMAGE), *layers])
    plain = hkr.to_keras(model)
    x = normal((4, *IMAGE))
    assert keras.backend.standardize_dtype(plain(x).dtype) == "bfloat16"
    np.testing.assert_allclose(to_numpy(plain(x)), to_numpy(model(x)), rtol=2**-6)


class Holder(K.Layer):
    """A layer of a user that mentions one of ours in its configuration."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, inputs):
        return self.inner(inputs)

    def get_config(self):
        return {**super().get_config(), "inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("inner")), **config)


def test_refuses_what_would_still_need_this_package():
    model = keras.Sequential([keras.Input((4,)), Holder(L.GroupSort(2), name="holder")])
    with pytest.raises(ValueError, match="Received: holder"):
        hkr.to_keras(model)
    with pytest.raises(ValueError, match="Expected inputs of known size to convert 'squeeze'"):
        hkr.to_keras(keras.Sequential([keras.Input((None, None, 4)), L.InvertibleDownsampling2D(2, name="squeeze")]))


ACTIVATIONS = [lambda: L.GroupSort(2), lambda: L.GroupSort(4), L.MaxMin, L.FullSort, L.Householder, K.PReLU]


@pytest.mark.once
@pytest.mark.many
@pytest.mark.parametrize("make", ACTIVATIONS)
@pytest.mark.parametrize("kernels_only", [False, True])
def test_a_layer_as_activation_becomes_a_layer_behind(make, kernels_only):
    x = keras.Input(IMAGE)
    y = L.OrthogonalConv2D(8, 3, padding="circular", activation=make(), name="circle")(x)
    y = L.LipschitzConv2D(8, 3, activation=make(), name="convolution")(y)
    y = K.TimeDistributed(L.LipschitzDense(8, activation=make()))(K.Reshape((16, 8))(y))
    y = K.Activation(L.MaxMin())(K.Dense(8, activation=L.GroupSort(2))(K.Flatten()(y)))
    model = keras.Model(x, L.AOLDense(4, activation=make())(y))
    for i, weight in enumerate(model.weights):
        if weight.name in ("bias", "angles", "alpha"):
            weight.assign(normal(weight.shape, seed=i))
    plain = hkr.to_keras(model, kernels_only=kernels_only)
    assert kernels_only or "hkr_keras" not in plain.to_json()
    x = normal((3, *IMAGE))
    np.testing.assert_allclose(to_numpy(plain(x)), to_numpy(model(x)), atol=2e-6)
    names = [layer.name for layer in plain.layers]
    assert names[names.index("convolution") + 1] == "convolution_activation"


def test_a_recurrent_layer_with_a_layer_as_activation_is_refused_by_name():
    model = keras.Sequential([keras.Input(SEQUENCE), L.LipschitzSimpleRNN(4, activation=L.GroupSort(2), name="memory")])
    with pytest.raises(ValueError, match=r"Received: memory\.activation=GroupSort"):
        hkr.to_keras(model)


@pytest.mark.once
@pytest.mark.parametrize("nested", [False, True])
def test_what_runs_is_converted_whatever_the_list_of_layers_says(nested):
    """After a private `pop` the model still runs all of its layers, and so must what is shipped."""
    inner = keras.Sequential([keras.Input((4,)), L.LipschitzDense(4), L.Scale(10.0)])
    model = keras.Sequential([keras.Input((5, 4)), K.TimeDistributed(inner)]) if nested else inner
    inner._layers.pop()
    x = normal((3, *model.input_shape[1:]))
    expected = to_numpy(model(x))
    for kernels_only in (False, True):
        np.testing.assert_allclose(to_numpy(hkr.to_keras(model, kernels_only)(x)), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected).max() > 5
    assert hkr.lipschitz_bound(hkr.to_lipschitz(model, print_fn=None)) == pytest.approx(10, rel=1e-4)


@pytest.mark.once
def test_layers_that_do_not_run_are_not_converted():
    model = keras.Sequential([keras.Input((4,)), L.LipschitzDense(4)])
    model._layers.append(L.Scale(10.0))
    x = normal((3, 4))
    np.testing.assert_allclose(to_numpy(hkr.to_keras(model)(x)), to_numpy(model(x)), atol=1e-6)
    functional = keras.Model(model.inputs[0], model.outputs[0])
    functional._operations.pop()
    functional._layers.pop()
    np.testing.assert_allclose(to_numpy(hkr.to_keras(functional)(x)), to_numpy(functional(x)), atol=1e-6)


@pytest.mark.once
def test_a_model_changed_and_not_built_again_is_refused():
    model = keras.Sequential([keras.Input((4,)), L.LipschitzDense(4), L.Scale(10.0)])
    model.pop(rebuild=False)
    with pytest.raises(ValueError, match="Expected a built model"):
        hkr.to_keras(model)
    model.built = True
    with pytest.raises(ValueError, match="Expected a Sequential model with a graph"):
        hkr.to_keras(model)


@pytest.mark.once
def test_layers_shared_by_inputs_of_several_ranks():
    vector, sequence = keras.Input((4,)), keras.Input((3, 4))
    dense = L.LipschitzDense(4)
    model = keras.Model([vector, sequence], [dense(vector), dense(sequence)])
    x = [normal((2, 4)), normal((2, 3, 4))]
    for old, new in zip(model(x), hkr.to_keras(model)(x), strict=True):
        np.testing.assert_allclose(to_numpy(new), to_numpy(old), atol=1e-6)
    sort = L.GroupSort(2, name="sort")
    model = keras.Model([vector, sequence], [sort(vector), sort(sequence)])
    with pytest.raises(ValueError, match="Expected GroupSort 'sort' to be applied to inputs of one rank"):
        hkr.to_keras(model)


class Doubled(L.MaxMin):
    """What a subclass computes is its own."""

    def call(self, inputs):
        return 0.5 * super().call(inputs)


def test_a_subclass_with_a_forward_pass_of_its_own_is_not_taken_for_its_parent():
    model = keras.Sequential([keras.Input((4,)), Doubled(name="own")])
    with pytest.raises(ValueError, match="Received: Doubled 'own', which overrides call"):
        hkr.to_keras(model)


def test_masks_reach_what_reads_them_or_are_refused():
    def model(*layers):
        return keras.Sequential([keras.Input(SEQUENCE), K.Masking(name="masking"), L.LipschitzDense(4), *layers])

    x = normal((3, *SEQUENCE))
    x[:, 4:] = 0
    kept = model(L.BatchCentering(), L.Scale(2.0), K.GlobalAveragePooling1D())
    np.testing.assert_allclose(to_numpy(hkr.to_keras(kept)(x)), to_numpy(kept(x)), atol=1e-6)
    with pytest.raises(ValueError, match=r"Received: masks of masking, and Scaled.* 'pool'"):
        hkr.to_keras(model(L.ScaledGlobalAveragePooling1D(name="pool")))


@pytest.mark.once
@pytest.mark.parametrize("make", [lambda: K.Dense(2), lambda: L.LipschitzDense(2), K.BatchNormalization])
def test_settings_that_were_edited_are_refused(make):
    layer = make()
    model = keras.Sequential([keras.Input((3,)), layer])
    setattr(layer, "scale" if hasattr(layer, "moving_mean") else "use_bias", False)
    with pytest.raises(ValueError, match="weights that their configuration makes"):
        hkr.to_keras(model)
