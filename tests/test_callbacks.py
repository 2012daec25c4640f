"""Callbacks: what they project and when, and what they write into the logs."""

import copy

import keras
import numpy as np
import pytest
from keras import ops

import hkr_keras as hkr
from hkr_keras.callbacks import CertifiedEvaluation, LipschitzMonitor, Orthonormalize

BACKEND = keras.backend.backend()
EXACT = 4e-6  # polishing ends at 1e-6 in every entry of an 8 x 8 Gram matrix, in float32
N, BATCH = 24, 8
generator = np.random.default_rng(0)
X = generator.normal(size=(N, 6)).astype("float32")
Y = (X.sum(axis=1) > 0).astype("int32")


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


def plain_model(**dense_arguments):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Reshape((6, 1)),
            keras.layers.Conv1D(4, 3, padding="same"),
            keras.layers.DepthwiseConv1D(2, depth_multiplier=2),
            keras.layers.Flatten(),
            keras.layers.Dense(8, **dense_arguments),
            hkr.layers.GroupSort(2),
            keras.layers.Dense(1),
        ]
    )


def our_model(head=1):
    return keras.Sequential(
        [keras.Input((6,)), hkr.layers.LipschitzDense(8), hkr.layers.GroupSort(2), hkr.layers.LipschitzDense(head)]
    )


def compiled(model, optimizer=None, **arguments):
    model.compile(optimizer or keras.optimizers.Adam(3e-2), hkr.losses.HKR(alpha=5, margin=0.3), **arguments)
    return model


def fit(model, *callbacks, epochs=1):
    return model.fit(X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)).history


def host(variable):
    return np.asarray(ops.convert_to_numpy(variable), dtype="float64")


def singular_values(layer):
    """Of the kernel's matrices, times the gain that bounds the operator by them."""
    values = []
    for name, geometry in hkr.geometry.kernel_geometries(layer).items():
        matrices = host(geometry.to_matrices(ops.convert_to_tensor(getattr(layer, name))))
        values.extend(geometry.gain * np.linalg.svd(matrices, compute_uv=False).ravel())
    return values


def deviation(model):
    """How far the kernels of trainable layers are from orthonormal ones."""
    layers = [layer for layer in model._flatten_layers() if layer.trainable]
    return max(abs(value - 1) for layer in layers for value in singular_values(layer))


def largest(model):
    return max(value for layer in model._flatten_layers() for value in singular_values(layer))


class Probe(keras.callbacks.Callback):
    """Notes the largest singular value after every batch, and how exact the kernels are after every epoch."""

    def __init__(self):
        super().__init__()
        self.begin, self.batches, self.epochs = None, [], []

    def on_train_begin(self, logs=None):
        self.begin = deviation(self.model)

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(largest(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(deviation(self.model))


@pytest.mark.once
@pytest.mark.many
@pytest.mark.parametrize(
    ("every", "projected_batches", "exact_epochs"),
    [
        ("batch", [True] * 6, True),
        (2, [False, True, False, True, False, True], True),
        (3, [False, False, True, False, False, True], True),
        (4, [False, False, False, True, False, False], True),
        ("epoch", [False] * 6, True),
        ("train_end", [False] * 6, False),
    ],
)
def test_plain_layers_are_projected_when_asked(every, projected_batches, exact_epochs):
    model, probe = compiled(plain_model()), Probe()
    fit(model, Orthonormalize(every), probe, epochs=2)
    assert probe.begin < EXACT
    assert [value <= 1 + 1e-6 for value in probe.batches] == projected_batches
    assert [value < EXACT for value in probe.epochs] == [exact_epochs] * 2
    assert deviation(model) < EXACT
    bounds = [hkr.lipschitz_bound(layer) for layer in model.layers]
    assert max(bounds) <= 1 + 1e-6


@pytest.mark.parametrize("every", ["batch", 5, "epoch", "train_end"])
def test_our_layers_are_always_on_the_set_and_polished_at_the_end(every):
    model, probe = compiled(our_model()), Probe()
    fit(model, Orthonormalize(every), probe, epochs=2)
    assert max(probe.batches) <= 1 + 1e-6
    assert [value < EXACT for value in probe.epochs] == [every != "train_end"] * 2
    assert deviation(model) < EXACT


def test_kernels_off_the_set_are_projected_together_in_one_program():
    values = [generator.normal(size=shape).astype("float32") for shape in ((6, 4), (4, 6))]
    kernels = [keras.Variable(value) for value in values]
    constraint = hkr.constraints.Orthonormal()
    expected = [host(constraint.project(kernel)) for kernel in kernels]
    run = hkr.constraints.projection([(kernel, constraint) for kernel in kernels])
    run()
    for kernel, value in zip(kernels, expected, strict=True):
        np.testing.assert_allclose(host(kernel), value, atol=1e-6)
        kernel.assign(3.0 * kernel)  # the program reads the present values
    run()
    assert max(np.linalg.norm(host(kernel), 2) for kernel in kernels) <= 1 + 4e-7


def test_a_callback_that_has_trained_holds_no_tensors():
    callback = Orthonormalize(2)
    fit(compiled(plain_model()), callback)
    assert copy.deepcopy({key: value for key, value in vars(callback).items() if key != "_model"})["every"] == 2
    assert not callback._waiting


@pytest.mark.once
def test_without_the_callback_plain_layers_leave_the_set():
    model, probe = compiled(plain_model()), Probe()
    fit(model, probe)
    assert max(probe.batches) > 1.01


@pytest.mark.once
def test_training_still_moves_the_weights():
    model = compiled(plain_model())
    before = [host(weight) for weight in model.trainable_weights]
    losses = fit(model, Orthonormalize(), epochs=8)["loss"]
    assert losses[-1] < losses[0]
    assert all(np.abs(old - host(new)).max() > 1e-3 for old, new in zip(before, model.trainable_weights, strict=True))


@pytest.mark.parametrize("every", ["batch", 3])
def test_several_steps_per_execution_are_refused_for_plain_layers(every):
    callback = Orthonormalize(every)
    callback.set_model(compiled(plain_model(), steps_per_execution=4))
    with pytest.raises(ValueError, match=r"steps_per_execution=4, every=.*layers without a constraint or .*: conv1d"):
        callback.on_train_begin()


@pytest.mark.once
@pytest.mark.parametrize(
    ("build", "every"), [(our_model, "batch"), (our_model, 3), (plain_model, "epoch"), (plain_model, "train_end")]
)
def test_several_steps_per_execution_are_fine_otherwise(build, every):
    model = compiled(build(), steps_per_execution=1 if BACKEND == "torch" else 4)
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[Orthonormalize(every)])
    assert deviation(model) < EXACT


@pytest.mark.once
@pytest.mark.parametrize("every", [0, -1, 1.5, True, None, "step", "epochs"])
def test_wrong_every(every):
    with pytest.raises(ValueError, match=f"Received: every={every}"):
        Orthonormalize(every)


@pytest.mark.once
def test_a_constraint_of_another_library_is_refused():
    model = compiled(plain_model(kernel_constraint=keras.constraints.MaxNorm(2)))
    with pytest.raises(ValueError, match=r"Expected the constraint .* Received: constraint=.*MaxNorm"):
        fit(model, Orthonormalize())


@pytest.mark.once
def test_frozen_plain_layers_are_left_alone():
    model = plain_model(trainable=False)
    frozen = model.layers[4]
    before = host(frozen.kernel)
    fit(compiled(model), Orthonormalize())
    assert np.array_equal(host(frozen.kernel), before)
    assert deviation(model) < EXACT


@pytest.mark.once
def test_nested_and_shared_plain_layers():
    body = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6), hkr.layers.GroupSort(2)])
    x = keras.Input((6,))
    model = compiled(keras.Model(x, keras.layers.Dense(1)(body(body(x)))))
    fit(model, Orthonormalize())
    assert deviation(model) < EXACT


@pytest.mark.once
def test_a_bound_constraint_on_a_plain_dense_layer_is_used():
    model = compiled(plain_model(kernel_constraint=hkr.constraints.SpectralBall()))
    dense = model.layers[4]
    dense.kernel.assign(0.25 * dense.kernel)
    fit(model, Orthonormalize())
    assert max(singular_values(dense)) <= 1 + 1e-6
    assert min(singular_values(dense)) < 0.9


@keras.saving.register_keras_serializable(package="tests")
def is_critic(layer):
    return layer.name.startswith("critic")


@pytest.mark.once
def test_config():
    layer = keras.layers.Dense(2, name="critic_1")
    for every, layers in (("batch", None), (3, ["a", layer]), ("epoch", "critic_1"), ("train_end", is_critic)):
        callback = Orthonormalize(every, layers, verbose=1)
        copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(callback))
        assert type(copy) is Orthonormalize
        assert copy.get_config() == callback.get_config()
        assert (copy.every, copy.verbose) == (every, 1)
    assert copy.layers is is_critic
    assert Orthonormalize(layers=["a", layer]).get_config()["layers"] == ["a", "critic_1"]
    assert repr(Orthonormalize("epoch")) == "Orthonormalize(every='epoch', layers=None)"


# ---- which kernels are projected ----------------------------------------------------------------------------


def generator_and_critic(critic=hkr.layers.LipschitzDense):
    """A plain generator, trained together with Lipschitz layers."""
    generator = [keras.layers.Dense(6, name="generator_0"), keras.layers.Dense(6, name="generator_1")]
    body = keras.Sequential([keras.Input((6,)), *generator], name="generator")
    return keras.Sequential(
        [keras.Input((6,)), body, critic(6, name="critic_0"), keras.layers.Dense(1, name="critic_1")]
    )


def off_the_set(model):
    """Names of the layers with a kernel that is not orthonormal."""
    layers = [layer for layer in model._flatten_layers() if "kernel" in hkr.geometry.kernel_geometries(layer)]
    return {layer.name for layer in layers if max(abs(value - 1) for value in singular_values(layer)) > EXACT}


@pytest.mark.once
@pytest.mark.parametrize("critic", [hkr.layers.LipschitzDense, hkr.layers.AOLDense], ids=lambda cls: cls.__name__)
def test_plain_layers_beside_lipschitz_layers_are_left_alone(critic):
    model = compiled(generator_and_critic(critic))
    before = {layer.name: host(layer.kernel) for layer in model.layers[0].layers}
    hkr.constraints.project(model, polish=True)
    assert all(np.array_equal(host(layer.kernel), before[layer.name]) for layer in model.layers[0].layers)
    fit(model, Orthonormalize())
    assert off_the_set(model) - {"critic_0"} == {"generator_0", "generator_1", "critic_1"}


@pytest.mark.once
@pytest.mark.parametrize(
    ("layers", "left"),
    [
        (lambda model: ["critic_1"], {"generator_0", "generator_1"}),
        (lambda model: "generator", {"critic_1"}),
        (lambda model: [model.layers[0].layers[1], model.layers[2]], {"generator_0"}),
        (lambda model: is_critic, {"generator_0", "generator_1"}),
        (lambda model: [], {"generator_0", "generator_1", "critic_1"}),
    ],
    ids=["name", "nested", "layers", "function", "none"],
)
def test_layers_says_what_is_projected(layers, left):
    model = compiled(generator_and_critic())
    fit(model, Orthonormalize(layers=layers(model)))
    assert off_the_set(model) == left


@pytest.mark.once
def test_layers_restricts_a_plain_model():
    model = compiled(
        keras.Sequential([keras.Input((6,)), keras.layers.Dense(6, name="a"), keras.layers.Dense(1, name="b")])
    )
    fit(model, Orthonormalize(layers=["a"]))
    assert off_the_set(model) == {"b"}


@pytest.mark.once
def test_layers_that_the_model_does_not_have_are_refused():
    for layers in (["critic_7"], keras.layers.Dense(2)):
        with pytest.raises(ValueError, match=r"Received: layers=.* is not in model"):
            fit(compiled(generator_and_critic()), Orthonormalize(layers=layers))


@pytest.mark.once
def test_what_is_projected_is_said_once(capsys):
    model, callback = compiled(generator_and_critic()), Orthonormalize(verbose=1)
    fit(model, callback)
    fit(model, callback)
    line = (
        "Orthonormalize projects 1 kernel (critic_0), and leaves alone 3 kernels (critic_1, generator_0, generator_1)."
    )
    assert capsys.readouterr().out == line + "\n"
    fit(model, Orthonormalize())
    assert capsys.readouterr().out == ""


# ---- metrics that mislead -----------------------------------------------------------------------------------


HALF = "accuracy"  # Keras makes BinaryAccuracy(threshold=0.5) of it


MISLEADING = {
    "HKR, accuracy": lambda: (hkr.losses.HKR(), HALF),
    "KR, BinaryAccuracy": lambda: (hkr.losses.KR(), keras.metrics.BinaryAccuracy(name=HALF)),
    "HingeMargin, Recall": lambda: (hkr.losses.HingeMargin(), keras.metrics.Recall(name=HALF)),
    "HKR, Precision": lambda: (hkr.losses.HKR(), keras.metrics.Precision(thresholds=[0.0, 0.5], name=HALF)),
    "HKR, AUC": lambda: (hkr.losses.HKR(), keras.metrics.AUC(name=HALF)),
    "HKR, F1Score": lambda: (hkr.losses.HKR(), keras.metrics.F1Score(name=HALF)),
    "cross-entropy, accuracy": lambda: (keras.losses.BinaryCrossentropy(from_logits=True), HALF),
    "hinge, accuracy": lambda: ("hinge", HALF),
}


@pytest.mark.once
@pytest.mark.parametrize("name", MISLEADING)
def test_metrics_with_another_threshold_are_warned_of_once(name):
    model, (loss, metric) = our_model(), MISLEADING[name]()
    model.compile("sgd", loss, metrics=[metric])
    model.train_on_batch(X, Y[:, None])  # builds the metrics
    callback = Orthonormalize()
    callback.set_model(model)
    with pytest.warns(UserWarning, match="metric 'accuracy' compares it with a threshold other than 0") as found:
        callback.on_train_begin()
    assert sum(issubclass(warning.category, UserWarning) for warning in found) == 1
    callback.on_train_end()
    callback.on_train_begin()  # warnings are errors here
    callback.on_train_end()


@pytest.mark.once
def test_metrics_of_scores_and_losses_of_probabilities_are_fine():
    kinds = keras.metrics
    cases = [
        (hkr.losses.HKR(), [hkr.metrics.Accuracy(), kinds.BinaryAccuracy(threshold=0.0), kinds.Recall(thresholds=0)]),
        (hkr.losses.HKR(), [kinds.AUC(from_logits=True), hkr.metrics.CertifiedAccuracy(0.1)]),
        ("mse", ["accuracy"]),
        ("binary_crossentropy", [kinds.BinaryAccuracy()]),
    ]
    for loss, metrics in cases:
        model = our_model()
        model.compile("sgd", loss, metrics=metrics)
        callback = Orthonormalize()
        callback.set_model(model)
        callback.on_train_begin()
        assert not hkr.callbacks._misleading_metrics(model)


@pytest.mark.once
def test_fit_warns_too():
    with pytest.warns(UserWarning, match="hkr_keras.metrics.Accuracy"):
        fit(compiled(our_model(), metrics=["accuracy"]), Orthonormalize())


# ---- what is validated, saved and restored ------------------------------------------------------------------


class Validated(keras.callbacks.Callback):
    """Notes how far the kernels are from the set when the first batch of a validation is computed."""

    def __init__(self):
        super().__init__()
        self.found = []

    def on_test_batch_begin(self, batch, logs=None):
        self.found.append(deviation(self.model))


@pytest.mark.once
@pytest.mark.parametrize("every", ["batch", 100, "epoch", "train_end"])
def test_what_is_validated_is_on_the_set(every):
    model, probe = compiled(plain_model(), metrics=[hkr.metrics.CertifiedRadius()]), Validated()
    callbacks = [Orthonormalize(every), probe]
    history = model.fit(X, Y, batch_size=8, epochs=2, verbose=0, validation_data=(X, Y), callbacks=callbacks).history
    assert max(probe.found) < EXACT
    certified = model.evaluate(X, Y, verbose=0, return_dict=True)["certified_radius"]
    assert history["val_certified_radius"][-1] == pytest.approx(certified, abs=1e-5)
    assert certified == pytest.approx(hkr.certify(model, X, verbose=0).mean_radius(Y), rel=1e-4)


@pytest.mark.once
@pytest.mark.many
@pytest.mark.parametrize("every", [100, "epoch", "train_end"])
@pytest.mark.parametrize("first", [False, True], ids=["listed last", "listed first"])
def test_what_is_saved_and_restored_is_on_the_set(every, first, tmp_path):
    model, own = compiled(plain_model()), [Orthonormalize(every)]
    path = {name: str(tmp_path / name) for name in ("{epoch}.keras", "{batch}.keras", "{epoch}.weights.h5")}
    early = keras.callbacks.EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True)
    savers = [
        keras.callbacks.ModelCheckpoint(path["{epoch}.keras"]),
        keras.callbacks.ModelCheckpoint(path["{epoch}.weights.h5"], save_weights_only=True),
        keras.callbacks.ModelCheckpoint(path["{batch}.keras"].replace("{batch}", "in_{batch}"), save_freq=2),
        early,
    ]
    fit(model, *(own + savers if first else savers + own), epochs=3)
    assert early.best_epoch == 0
    assert deviation(model) < EXACT
    copy = plain_model()
    copy.load_weights(tmp_path / "1.weights.h5")
    stored = [keras.models.load_model(file) for file in sorted(tmp_path.glob("*.keras"))]
    assert len(stored) >= 3
    assert max(deviation(each) for each in [copy, *stored]) < EXACT
    before = [host(weight) for weight in model.weights]
    model.layers[4].kernel.assign(3.0 * model.layers[4].kernel)
    off = deviation(model)
    model.save(tmp_path / "after.keras")  # training is over: saving changes nothing
    assert deviation(model) == off > 1
    assert len(before) == len(model.weights)


@pytest.mark.parametrize("order", ["swap first", "swap last"])
@pytest.mark.parametrize("on_epoch", [False, True])
def test_averages_are_validated_and_saved_on_the_set_in_any_order(order, on_epoch, tmp_path):
    model, probe = compiled(our_model(), averaging()), Validated()
    callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch), Orthonormalize()]
    callbacks = callbacks if order == "swap first" else callbacks[::-1]
    callbacks += [keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras")), probe]
    model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0, validation_data=(X, Y), callbacks=callbacks)
    assert max(probe.found) < EXACT
    assert max(deviation(keras.models.load_model(file)) for file in tmp_path.glob("*.keras")) < EXACT
    assert deviation(model) < EXACT


# ---- kernels whose constraint waits for the callback --------------------------------------------------------


def deferred_model(layer=hkr.layers.LipschitzDense, *arguments, **settings):
    keras.utils.set_random_seed(1)
    constraint = hkr.constraints.DeferredOrthonormal()
    layer = layer(*(arguments or (8,)), kernel_constraint=constraint, **settings)
    inputs = (6,) if isinstance(layer, keras.layers.Dense) else (6, 1)
    body = [keras.layers.Reshape(inputs), layer, keras.layers.Flatten(), hkr.layers.GroupSort(2)]
    return keras.Sequential([keras.Input((6,)), *body, hkr.layers.LipschitzDense(1)])


class Bounds(keras.callbacks.Callback):
    """Notes the proven bound of the layer with a deferred constraint after every batch."""

    def on_train_begin(self, logs=None):
        self.found = []

    def on_train_batch_end(self, batch, logs=None):
        self.found.append(hkr.lipschitz_bound(self.model.layers[1]))


@pytest.mark.once
@pytest.mark.many
@pytest.mark.parametrize(
    "layer",
    [(hkr.layers.LipschitzDense, 8), (hkr.layers.LipschitzConv1D, 4, 3, 3)],
    ids=lambda layer: layer[0].__name__,
)
@pytest.mark.parametrize("optimizer", [keras.optimizers.Adam, hkr.optimizers.StiefelMuon])
def test_deferred_kernels_are_off_the_set_until_they_are_projected(layer, optimizer):
    model, probe = deferred_model(*layer), Bounds()
    assert hkr.lipschitz_bound(model.layers[1]) <= 1 + 4e-7
    compiled(model, optimizer(1e-2)).fit(X, Y, batch_size=2, verbose=0, callbacks=[Orthonormalize(4), probe])
    for start in range(0, 12, 4):
        *between, projected = probe.found[start : start + 4]
        assert max(between) > 1 + 1e-4
        assert projected <= 1 + 4e-7  # what float32 leaves
    assert deviation(model) < EXACT


@pytest.mark.parametrize("every", [2, 3])
def test_deferred_factors_of_orthogonal_convolutions(every):
    class Factors(keras.callbacks.Callback):
        found: list[float] = []

        def on_train_batch_end(self, batch, logs=None):
            layer = self.model.layers[1]
            matrices = host(hkr.geometry.weight_geometries(layer)["mixing"].to_matrices(1.0 * layer.mixing))
            self.found = [*self.found, abs(np.linalg.svd(matrices, compute_uv=False) - 1).max()]

    model, probe = deferred_model(hkr.layers.OrthogonalConv1D, 4, 3), Factors()
    compiled(model, keras.optimizers.Adam(3e-3)).fit(
        X, Y, batch_size=4, verbose=0, callbacks=[Orthonormalize(every), probe]
    )
    assert [value < 1e-3 for value in probe.found] == [step % every == 0 for step in range(1, 7)]
    assert hkr.lipschitz_bound(model.layers[1]) <= 1 + 4e-7


@pytest.mark.once
def test_a_certificate_between_projections_is_that_of_the_stored_kernel():
    model = compiled(deferred_model())
    fit(model)  # three steps, and nothing projects
    assert hkr.lipschitz_bound(model) > 1 + 1e-4
    plain = keras.models.clone_model(hkr.to_keras(model))
    plain.set_weights(hkr.to_keras(model).get_weights())
    certificate = hkr.certify(model, X, verbose=0)
    assert certificate.bound == pytest.approx(largest(model), rel=1e-5)
    score = np.abs(ops.convert_to_numpy(plain(X)))[:, 0]
    np.testing.assert_allclose(certificate.radius, score / certificate.bound, rtol=1e-4, atol=1e-6)


def test_several_steps_per_execution_are_refused_for_deferred_kernels():
    callback = Orthonormalize(3)
    callback.set_model(compiled(deferred_model(), steps_per_execution=4))
    name = callback._model.layers[1].name
    with pytest.raises(ValueError, match=rf"steps_per_execution=4, every=3 .*DeferredOrthonormal\(\): {name}$"):
        callback.on_train_begin()


@pytest.mark.once
def test_frozen_deferred_kernels_are_left_alone():
    model = deferred_model(trainable=False)
    kernel = model.layers[1].kernel
    kernel.assign(1.5 * kernel)
    before = host(kernel)
    fit(compiled(model), Orthonormalize(2))
    assert np.array_equal(host(kernel), before)


@pytest.mark.once
@pytest.mark.parametrize("how", ["file", "clone", "to_lipschitz", "constrain"])
def test_deferred_constraints_stay(how, tmp_path):
    model = deferred_model()
    if how == "file":
        fit(compiled(model, hkr.optimizers.StiefelMuon()), Orthonormalize(2))
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    elif how == "clone":
        model = keras.models.clone_model(model)
    elif how == "to_lipschitz":
        model = hkr.to_lipschitz(model)
    else:
        model = plain_model()
        hkr.constrain(model, hkr.constraints.DeferredOrthonormal())
        model = keras.models.model_from_json(model.to_json())
    layer = model.layers[1]
    assert type(layer.kernel.constraint) is hkr.constraints.DeferredOrthonormal
    assert type(layer.kernel_constraint) is hkr.constraints.DeferredOrthonormal
    fit(compiled(model), Orthonormalize(2))
    assert deviation(model) < EXACT


@pytest.mark.once
def test_deferred_kernels_are_stripped_as_they_are():
    model = compiled(deferred_model())
    fit(model)
    plain = hkr.to_keras(model)
    assert not any(getattr(weight, "constraint", None) for weight in plain.weights)
    np.testing.assert_allclose(ops.convert_to_numpy(plain(X)), ops.convert_to_numpy(model(X)), atol=1e-6)


# ---- kernels that take turns --------------------------------------------------------------------------------


def model_with_turns(every=3):
    keras.utils.set_random_seed(1)
    dense = hkr.layers.LipschitzDense
    turn = [dense(8, kernel_constraint=hkr.constraints.Orthonormal(every=every)) for _ in range(2)]
    return keras.Sequential([keras.Input((6,)), turn[0], hkr.layers.GroupSort(2), turn[1], dense(1)])


class Turns(keras.callbacks.Callback):
    """Notes after every batch how far both kernels are from orthonormal ones."""

    def on_train_begin(self, logs=None):
        self.found = []

    def on_train_batch_end(self, batch, logs=None):
        layers = self.model.layers[0], self.model.layers[2]
        self.found.append([max(abs(value - 1) for value in singular_values(layer)) for layer in layers])

    @property
    def projected(self):
        return [[value < 5e-4 for value in both] for both in zip(*self.found, strict=True)]


ROUND_ROBIN = [[(step + index) % 3 == 0 for step in range(6)] for index in range(2)]


@pytest.mark.parametrize(("policy", "scaled"), [("float32", True), ("mixed_bfloat16", False)])
def test_kernels_take_turns_in_the_compiled_step(policy, scaled):
    keras.config.set_dtype_policy(policy)
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0) if scaled else optimizer
    model, probe = compiled(model_with_turns(), optimizer), Turns()
    fit(model, Orthonormalize(), probe, epochs=2)
    assert probe.projected == ROUND_ROBIN
    assert deviation(model) < EXACT
    constraint = copy.deepcopy(model.layers[0].kernel.constraint)
    assert repr(constraint) == f"Orthonormal(geometry={constraint.geometry}, every=3)"
    assert repr(hkr.constraints.Orthonormal()) == "Orthonormal()"


def test_without_the_callback_kernels_that_could_take_turns_are_projected_in_every_step():
    model, probe = compiled(model_with_turns(), keras.optimizers.Adam(1e-3)), Turns()
    fit(model, probe, epochs=2)
    assert probe.projected == [[True] * 6] * 2


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch executes one step at a time")
def test_kernels_take_turns_within_several_steps_per_execution():
    model, probe = compiled(model_with_turns(), keras.optimizers.Adam(1e-3), steps_per_execution=4), Turns()
    model.fit(X, Y, batch_size=6, verbose=0, callbacks=[Orthonormalize(), probe])
    assert probe.projected == [[True], [False]]  # after the fourth of four steps, the turn of the first one


@pytest.mark.parametrize("rate", [1e-3, 1e-1, 10.0])
def test_kernels_that_take_turns_end_on_the_set_at_any_rate(rate, tmp_path):
    model, probe = compiled(model_with_turns(2), keras.optimizers.Adam(rate)), Validated()
    callbacks = [Orthonormalize(), keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras")), probe]
    history = model.fit(X, Y, batch_size=BATCH, epochs=3, verbose=0, validation_data=(X, Y), callbacks=callbacks)
    assert np.isfinite(history.history["loss"]).all()
    assert max(probe.found) < EXACT
    for each in (model, *map(keras.models.load_model, tmp_path.glob("*.keras"))):
        assert hkr.lipschitz_bound(each) <= 1 + 1e-6
        assert each.layers[0].kernel.constraint.every == 2


@pytest.mark.parametrize("frequency", [None, 2])
def test_averages_of_kernels_that_take_turns(frequency, tmp_path):
    model, probe = compiled(model_with_turns(), averaging(frequency)), Validated()
    callbacks = [Orthonormalize(), keras.callbacks.SwapEMAWeights(swap_on_epoch=True), probe]
    model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0, validation_data=(X, Y), callbacks=callbacks)
    assert max(probe.found) < EXACT
    assert deviation(model) < EXACT


@pytest.mark.once
@pytest.mark.parametrize("every", [0, 2.0, True, None])
def test_wrong_turns(every):
    with pytest.raises(ValueError, match=f"Received: every={every}"):
        hkr.constraints.Orthonormal(every=every)


# ---- what runs behind the constraint -----------------------------------------------------------------------


def averaging(frequency=None):
    return keras.optimizers.Adam(1e-1, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=frequency)


@pytest.mark.many
@pytest.mark.parametrize("build", [our_model, plain_model])
@pytest.mark.parametrize("frequency", [None, 2])
def test_averaged_weights_are_repaired_at_the_end(build, frequency):
    without = compiled(our_model(), averaging(frequency))
    fit(without)
    assert deviation(without) > 1e-4
    model = compiled(build(), averaging(frequency))
    fit(model, Orthonormalize())
    assert deviation(model) < EXACT


@pytest.mark.once
@pytest.mark.parametrize("build", [our_model, plain_model])
def test_swapped_averages_are_repaired_before_evaluation(build):
    class AtTest(keras.callbacks.Callback):
        found = None

        def on_test_begin(self, logs=None):
            self.found = deviation(self.model)

    model, probe = compiled(build(), averaging()), AtTest()
    callbacks = [keras.callbacks.SwapEMAWeights(), Orthonormalize(), probe]
    model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0, callbacks=callbacks, validation_data=(X, Y))
    assert probe.found < EXACT
    assert deviation(model) < EXACT


@pytest.mark.once
@pytest.mark.parametrize("build", [our_model, plain_model])
def test_loaded_weights_are_repaired_at_the_start(build, tmp_path):
    model = build()
    for weight in model.trainable_weights:
        weight.assign(1.3 * ops.convert_to_tensor(weight))
    model.save_weights(tmp_path / "off.weights.h5")
    other, probe = build(), Probe()
    other.load_weights(tmp_path / "off.weights.h5")
    assert deviation(other) > 0.1
    fit(compiled(other), Orthonormalize(), probe)
    assert probe.begin < EXACT


def test_evaluating_without_averages_changes_nothing():
    model = compiled(our_model())
    fit(model)
    before = [host(weight) for weight in model.weights]
    model.evaluate(X, Y, verbose=0, callbacks=[Orthonormalize()])
    assert all(np.array_equal(old, host(new)) for old, new in zip(before, model.weights, strict=True))


# ---- logs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [our_model, plain_model])
def test_monitor(build):
    model = compiled(build())
    before = [host(weight) for weight in model.weights]
    LipschitzMonitor().set_model(model)
    assert all(np.array_equal(old, host(new)) for old, new in zip(before, model.weights, strict=True))

    history = fit(model, LipschitzMonitor(), epochs=2)
    assert set(history) == {"loss", "lipschitz_bound", "sigma_min", "sigma_max"}
    assert all(len(values) == 2 for values in history.values())
    rows = [row for row in hkr.lipschitz_summary(model, print_fn=None).rows if row.sigma_max is not None]
    assert history["lipschitz_bound"][-1] == hkr.lipschitz_bound(model)
    assert history["sigma_max"][-1] == pytest.approx(max(row.sigma_max for row in rows), rel=1e-9)
    assert history["sigma_min"][-1] == pytest.approx(min(row.sigma_min for row in rows), rel=1e-9)
    assert history["sigma_min"][0] < history["sigma_max"][0] <= history["lipschitz_bound"][0] * 1.5


def test_monitor_of_a_dense_model_finds_the_singular_values():
    model = compiled(our_model())
    history = fit(model, LipschitzMonitor())
    values = [value for layer in model.layers for value in singular_values(layer)]
    assert history["sigma_max"][-1] == pytest.approx(max(values), rel=1e-6)
    assert history["sigma_min"][-1] == pytest.approx(min(values), rel=1e-6)


@pytest.mark.once
def test_monitor_sees_what_orthonormalize_did():
    history = fit(compiled(plain_model()), Orthonormalize(), LipschitzMonitor())
    assert history["lipschitz_bound"][-1] <= 1 + 1e-5


@pytest.mark.parametrize("outputs", [1, 3])
def test_certified_evaluation(outputs):
    model, labels = our_model(outputs), Y if outputs == 1 else np.arange(N) % 3
    loss = hkr.losses.HKR() if outputs == 1 else hkr.losses.MulticlassHKR()
    model.compile(keras.optimizers.Adam(1e-2), loss)
    callback = CertifiedEvaluation(X, labels, [0.0, 0.25, 1.5], batch_size=7)
    history = model.fit(X, labels, batch_size=BATCH, epochs=2, verbose=0, callbacks=[callback]).history
    certificate = hkr.certify(model, X, verbose=0)
    expected = {
        "clean_accuracy": certificate.accuracy(labels),
        "certified_accuracy_0": certificate.accuracy(labels, 0.0),
        "certified_accuracy_0.25": certificate.accuracy(labels, 0.25),
        "certified_accuracy_1.5": certificate.accuracy(labels, 1.5),
        "mean_certified_radius": certificate.mean_radius(labels),
        "lipschitz_bound": certificate.bound,
    }
    assert set(history) == {"loss", *expected}
    assert {key: values[-1] for key, values in history.items() if key != "loss"} == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["clean_accuracy"] <= 1


@pytest.mark.once
def test_certified_evaluation_covers_rounding_when_asked():
    model = compiled(our_model())
    history = fit(model, CertifiedEvaluation(X, Y, [0.25], rigorous=True))
    exact, rigorous = (hkr.certify(model, X, verbose=0, rigorous=flag).mean_radius(Y) for flag in (False, True))
    assert history["mean_certified_radius"][-1] == pytest.approx(rigorous, rel=1e-6)
    assert rigorous < exact


@pytest.mark.once
def test_loggers_that_come_later_see_the_numbers(tmp_path):
    logger = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    fit(compiled(our_model()), LipschitzMonitor(), CertifiedEvaluation(X, Y, [0.25]), logger)
    header = (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    assert {"lipschitz_bound", "sigma_min", "certified_accuracy_0.25"} <= set(header)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, Y, [0.1, -0.1]), "Received: epsilon=-0.1"),
        ((X, Y, [float("nan")]), "Received: epsilon=nan"),
        ((X, Y[:-1], [0.1]), r"Received: len\(y\)=23, len\(x\)=24"),
        ((X, Y + 0.5, [0.1]), r"Received: y\.shape="),
        ((X[:, :5], Y, [0.1]), "Received: "),
        ((X[:, :5].tolist(), Y, [0.1]), r"Received: .* of shape \(24, 5\)"),
        ((X.tolist(), Y[:3], [0.1]), r"Received: len\(y\)=3, len\(x\)=24"),
        ((X, None, [0.1]), r"as many labels as inputs\. Received: y=None"),
        ((X, 1, [0.1]), r"as many labels as inputs\. Received: y=1"),
        ((X.astype(str), Y, [0.1]), "Received: x of dtypes"),
        ((X.astype(complex), Y, [0.1]), "Received: x of dtypes"),
        ((np.where(np.arange(N)[:, None] == N - 1, np.nan, X), Y, [0.1], 8), "NaN"),
        (([X, X[:8]], Y, [0.1], 8), "Received: "),
        ((X, Y, ["a"]), "Received: epsilon=a"),
        ((X, Y, [0.1], 0), "Received: batch_size=0"),
    ],
    ids=[
        *("negative", "nan", "length", "labels", "shape", "shape of a list", "length of lists", "no labels"),
        *("one label", "text", "complex", "nan at the end", "two inputs", "text as epsilon", "no batches"),
    ],
)
def test_certified_evaluation_refuses_before_the_first_step(arguments, message):
    model = compiled(our_model())
    before = [host(weight) for weight in model.weights]
    with pytest.raises(ValueError, match=message):
        fit(model, CertifiedEvaluation(*arguments))
    assert all(np.array_equal(old, host(new)) for old, new in zip(before, model.weights, strict=True))


@pytest.mark.once
@pytest.mark.parametrize(
    "make", [LipschitzMonitor, lambda: CertifiedEvaluation(X, Y, [0.1])], ids=["monitor", "evaluation"]
)
def test_layers_without_a_bound_are_refused_before_the_first_step(make):
    x = keras.Input((6,))
    model = compiled(keras.Model(x, keras.layers.Dense(1)(keras.layers.Multiply()([x, x]))))
    before = [host(weight) for weight in model.weights]
    with pytest.raises(ValueError, match="multiply"):
        fit(model, make())
    assert all(np.array_equal(old, host(new)) for old, new in zip(before, model.weights, strict=True))


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        part = slice(BATCH * index, BATCH * (index + 1))
        return X[part], Y[part]


@pytest.mark.once
@pytest.mark.parametrize("data", [lambda: (X, Y), lambda: (Batches(), None)], ids=["arrays", "batches"])
@pytest.mark.parametrize(
    ("last", "rigorous", "message"),
    [
        (lambda: [keras.layers.Dense(1, "sigmoid")], False, "remove the final activation"),
        (lambda: [keras.layers.Dense(1, dtype="mixed_bfloat16")], False, "float32"),
        (lambda: [keras.layers.Dense(4, "gelu"), keras.layers.Dense(1)], True, "rounding in float32"),
        (lambda: [keras.layers.UnitNormalization(), keras.layers.Dense(1)], False, "UnitNormalization"),
    ],
    ids=["sigmoid", "half precision", "rounding", "no bound"],
)
def test_models_without_certificates_are_refused_before_the_first_step(last, rigorous, message, data):
    callback = CertifiedEvaluation(*data(), [0.1], rigorous=rigorous)
    callback.set_model(keras.Sequential([keras.Input((6,)), *last()]))
    with pytest.raises(ValueError, match=message):
        callback.on_train_begin()


@pytest.mark.parametrize("data", [lambda: (X, Y), lambda: (Batches(), None)], ids=["arrays", "batches"])
def test_kernels_that_start_at_zero_may_be_evaluated(data):
    model = compiled(keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, kernel_initializer="zeros")]))
    history = fit(model, CertifiedEvaluation(*data(), [0.1]))
    assert history["lipschitz_bound"][-1] > 0


@pytest.mark.skipif(BACKEND != "jax", reason="JAX tells values that are tied to a device from others")
def test_a_step_is_compiled_once(caplog):
    """A loss of this package reads a mutable array, which ties what a step returns to the device."""
    import jax

    metrics = [hkr.metrics.CertifiedAccuracy(0.1)]
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 / (epoch + 1))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        fit(compiled(our_model(), metrics=metrics), Orthonormalize(), rates, epochs=3)
    assert sum("XLA compilation of jit(train_step)" in record.getMessage() for record in caplog.records) == 1
