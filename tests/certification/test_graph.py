"""The private attributes of Keras that `certification/graph.py` reads are what it takes them for."""

import keras
import numpy as np
import pytest
from helpers import to_numpy

import hkr_keras as hkr
from hkr_keras.certification import graph

K = keras.layers


def branches():
    x = keras.Input((4,), name="x")
    first, second = K.Dense(4, name="first"), K.Dense(4, name="second")
    return x, first, second, K.Add(name="sum")([first(x), second(first(x))])


def test_nodes_are_in_the_order_of_computation():
    x, *_, y = branches()
    names = [node.operation.name for node in graph.nodes_of(keras.Model(x, y))]
    assert names[0] == "x"
    assert names.count("first") == 2
    assert names.index("first") < names.index("second") < names.index("sum")
    assert names[-1] == "sum"


def test_a_sequential_model_runs_a_functional_one():
    model = keras.Sequential([keras.Input((4,)), K.Dense(3), K.ReLU()])
    runs = graph.model_in_use(model)
    assert [node.operation for node in graph.nodes_of(runs) if not node.is_input] == model.layers
    assert graph.functional_class(runs).__name__ == "Functional"
    assert graph.functional_class(model) is None or issubclass(keras.Sequential, graph.functional_class(model))


def test_a_sequential_model_without_inputs_is_itself():
    model = keras.Sequential([K.Dense(3)])
    assert graph.model_in_use(model) is model


def test_applications_consumers_and_sources():
    x, first, second, y = branches()
    calls = graph.applications_of(first)
    assert len(calls) == 2
    assert all(inputs == [x] and len(outputs) == 1 for inputs, outputs in calls)
    assert graph.consumers_of(second) == [y._keras_history[0]]
    operation, inputs, index = graph.source_of(y)
    assert (operation.name, len(inputs), index) == ("sum", 2, 0)


@pytest.mark.parametrize("model", [keras.Sequential, keras.Model])
def test_models_are_read_layer_by_layer_unless_their_class_has_a_bound(model):
    assert not graph.is_model(K.Dense(2))
    made = model([K.Dense(2)]) if model is keras.Sequential else model(*branches()[::3])
    assert graph.is_model(made)


def test_every_application_has_a_path_of_its_own():
    inner = keras.Sequential([keras.Input((4,)), K.Dense(4, name="shared")])
    x = keras.Input((4,))
    model, paths = keras.Model(x, inner(inner(x))), []

    def apply(place, states):
        paths.append(place.path)
        assert place.shapes == [(None, 4)]
        assert place.output_shape == (None, 4)
        return states[0] + 1

    assert graph.walk(model, [0], apply, [(None, 4)]) == [2]
    assert len(set(paths)) == 2


def test_known_sizes_go_into_nested_models_of_unknown_ones():
    inner = keras.Sequential([keras.Input((None, None, 1)), K.GlobalAveragePooling2D()])
    model = keras.Sequential([keras.Input((4, 4, 1)), inner])
    assert hkr.lipschitz_bound(inner) == pytest.approx(1.0)
    assert hkr.lipschitz_bound(model) == pytest.approx(0.25)
    assert to_numpy(model(np.ones((1, 4, 4, 1), "float32"))).tolist() == [[1.0]]


def test_layers_with_several_outputs_are_refused():
    class Twins(K.Layer):
        def call(self, inputs):
            return inputs, inputs

    hkr.bounds.layer_bound.register(Twins, lambda layer: 1.0)
    x = keras.Input((4,))
    with pytest.raises(ValueError, match="Expected layers with one output"):
        hkr.lipschitz_bound(keras.Model(x, Twins()(x)))
