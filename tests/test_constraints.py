import keras
import numpy as np
import pytest
from helpers import adam_steps, largest_singular_value, normal, operator_norm, to_numpy

import hkr_keras as hkr
from hkr_keras.constraints import DeferredOrthonormal, Orthonormal, SpectralBall, UnitNorm
from hkr_keras.constraints import get as get_constraint
from hkr_keras.geometry import Geometry

CONSTRAINTS = [Orthonormal, DeferredOrthonormal, SpectralBall, UnitNorm]
STEPWISE = [Orthonormal, SpectralBall, UnitNorm]  # what the optimizer projects onto

UNIT_LAYERS = [
    # layer, input shape, axes of its kernel along which the weights of one output run
    (lambda c: hkr.layers.LipschitzDense(5, kernel_constraint=c), (4,), (0,)),
    (lambda c: hkr.layers.LipschitzConv1D(4, 3, groups=2, kernel_constraint=c), (8, 4), (0, 1)),
    (lambda c: hkr.layers.LipschitzConv2D(5, (2, 3), kernel_constraint=c), (5, 5, 2), (0, 1, 2)),
    (lambda c: hkr.layers.LipschitzConv3D(3, 2, kernel_constraint=c), (3, 3, 3, 2), (0, 1, 2, 3)),
    (lambda c: hkr.layers.LipschitzConv1DTranspose(5, 3, kernel_constraint=c), (6, 2), (0, 2)),
    (lambda c: hkr.layers.LipschitzConv2DTranspose(5, 3, kernel_constraint=c), (4, 4, 2), (0, 1, 3)),
    (lambda c: hkr.layers.LipschitzDepthwiseConv1D(3, depth_multiplier=2, depthwise_constraint=c), (6, 2), (0,)),
    (lambda c: hkr.layers.LipschitzDepthwiseConv2D(3, depth_multiplier=2, depthwise_constraint=c), (5, 5, 2), (0, 1)),
]


@pytest.mark.parametrize("cls", CONSTRAINTS)
def test_bind_returns_a_bound_copy_that_survives_its_config(cls):
    free, geometry = cls(), Geometry(groups=2, gain=3.0)
    bound = free.bind(geometry)
    assert type(bound) is cls
    assert free.geometry is None
    assert bound.geometry == geometry
    stored = keras.saving.serialize_keras_object(bound)
    copy = keras.saving.deserialize_keras_object(stored)
    assert type(copy) is cls
    assert copy.geometry == geometry
    assert stored["registered_name"] == f"hkr_keras>{cls.__name__}"


@pytest.mark.parametrize("cls", STEPWISE)
def test_unbound_constraint_works_on_dense_and_is_refused_on_convolutions(cls):
    dense = keras.layers.Dense(4, kernel_constraint=cls())
    dense.build((None, 6))
    adam_steps(dense, 1.0)
    kernel = to_numpy(dense.kernel)
    norms = np.linalg.norm(kernel, axis=0)
    assert norms.max() <= 1 + 1e-6
    if cls is not UnitNorm:
        assert largest_singular_value(kernel) <= 1 + 1e-6
    with pytest.raises(ValueError, match=r"Received: kernel\.shape=\(3, 3, 2, 4\)"):
        cls()(np.zeros((3, 3, 2, 4), "float32"))


def test_deferred_starts_on_the_set_and_leaves_the_step_alone():
    bound = DeferredOrthonormal().bind(Geometry(gain=3.0))
    kernel = normal((3, 3, 2, 4))
    np.testing.assert_array_equal(to_numpy(bound(kernel)), to_numpy(kernel))
    for function in ("start", "project", "polish"):
        expected = getattr(Orthonormal().bind(Geometry(gain=3.0)), function)(kernel)
        np.testing.assert_array_equal(to_numpy(getattr(bound, function)(kernel)), to_numpy(expected))


@pytest.mark.parametrize(
    "constraint", ["max_norm", "unit_norm", "non_neg", keras.constraints.MaxNorm(2.0), keras.constraints.UnitNorm()]
)
@pytest.mark.parametrize(
    ("cls", "arguments", "name", "shape"),
    [
        (hkr.layers.LipschitzDense, {"units": 3}, "kernel_constraint", (None, 4)),
        (hkr.layers.LipschitzConv2D, {"filters": 3, "kernel_size": 3}, "kernel_constraint", (None, 5, 5, 2)),
        (hkr.layers.LipschitzDepthwiseConv1D, {"kernel_size": 3}, "depthwise_constraint", (None, 5, 2)),
        (
            hkr.layers.LipschitzSeparableConv1D,
            {"filters": 3, "kernel_size": 3},
            "pointwise_constraint",
            (None, 5, 2),
        ),
    ],
)
def test_foreign_constraints_are_refused(cls, arguments, name, shape, constraint):
    with pytest.raises(ValueError, match="Received: constraint="):
        cls(**arguments, **{name: constraint}).build(shape)


def test_get():
    assert type(get_constraint(None)) is Orthonormal
    ball = SpectralBall()
    assert get_constraint(ball) is ball


def test_a_foreign_bias_constraint_is_kept():
    layer = hkr.layers.LipschitzDense(3, bias_constraint="non_neg")
    layer.build((None, 4))
    assert isinstance(layer.bias.constraint, keras.constraints.NonNeg)


@pytest.mark.parametrize("cls", CONSTRAINTS)
def test_layer_config_keeps_what_the_user_passed(cls):
    layer = hkr.layers.LipschitzConv1D(4, 3, kernel_constraint=cls())
    layer.build((None, 8, 2))
    copy = hkr.layers.LipschitzConv1D.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert type(copy.kernel_constraint) is cls
    assert copy.kernel_constraint.geometry is None
    default = hkr.layers.LipschitzConv1D(4, 3)
    default.build((None, 8, 2))
    assert default.get_config()["kernel_constraint"] is None


def small_model():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            hkr.layers.LipschitzConv2D(4, 3, padding="same", kernel_constraint=SpectralBall()),
            hkr.layers.GroupSort(2),
            hkr.layers.LipschitzDepthwiseConv2D(3),
            keras.layers.Flatten(),
            hkr.layers.LipschitzDense(8),
            hkr.layers.LipschitzDense(3, kernel_constraint=UnitNorm()),
        ]
    )


@pytest.mark.parametrize("how", ["save", "clone"])
def test_models_keep_their_bound_constraints(how, tmp_path):
    model = small_model()
    if how == "save":
        model.save(tmp_path / "model.keras")
        copy = keras.models.load_model(tmp_path / "model.keras")
    else:
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
    x = normal((4, 6, 6, 2))
    np.testing.assert_allclose(to_numpy(copy(x)), to_numpy(model(x)), atol=1e-6)
    for old, new in zip(model.trainable_variables, copy.trainable_variables, strict=True):
        assert type(new.constraint) is type(old.constraint)
        assert getattr(new.constraint, "geometry", None) == getattr(old.constraint, "geometry", None)
    assert sum(variable.constraint is not None for variable in copy.trainable_variables) == 4


@pytest.mark.parametrize(
    ("geometry", "shape"),
    [
        (Geometry(), (12, 7)),
        (Geometry(), (7, 12)),
        (Geometry(), (40, 40)),
        (Geometry(gain=3.0), (3, 3, 4, 8)),
        (Geometry(groups=2, gain=3**0.5), (3, 2, 8)),
        (Geometry(depthwise=True, gain=3.0), (3, 3, 5, 2)),
        (Geometry(), (9, 1)),
    ],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_polish_reaches_full_precision(geometry, shape, scale):
    kernel = Orthonormal().bind(geometry).polish(normal(shape, scale=scale))
    blocks = to_numpy(geometry.to_matrices(kernel)) * geometry.gain
    if blocks.shape[1] < blocks.shape[2]:
        blocks = blocks.swapaxes(1, 2)
    gram = blocks.swapaxes(1, 2) @ blocks
    assert np.abs(gram - np.eye(gram.shape[-1])).max() <= 2e-6


@pytest.mark.parametrize(("make", "shape", "axes"), UNIT_LAYERS)
def test_unit_norm_of_every_output_vector(make, shape, axes):
    layer = make(UnitNorm())
    layer.build((None, *shape))
    for learning_rate in (None, 1.0):
        if learning_rate is not None:
            adam_steps(layer, learning_rate)
        norms = np.sqrt(np.square(to_numpy(layer.kernel)).sum(axis=axes))
        np.testing.assert_allclose(norms, 1.0, atol=1e-6)


def test_unit_norm_head_may_have_a_norm_above_one_but_no_output_has():
    head = hkr.layers.LipschitzDense(8, use_bias=False, kernel_constraint=UnitNorm(), kernel_initializer="ones")
    head.build((None, 4))
    assert operator_norm(head, (4,)) == pytest.approx(8**0.5, rel=1e-6)


@pytest.mark.parametrize("cls", CONSTRAINTS)
def test_zero_initializer(cls):
    layer = hkr.layers.LipschitzDense(3, kernel_initializer="zeros", kernel_constraint=cls())
    layer.build((None, 4))
    expected = 1.0 if issubclass(cls, Orthonormal) else 0.0
    assert largest_singular_value(to_numpy(layer.kernel)) == pytest.approx(expected, abs=1e-6)


def plain_model():
    layers = [keras.layers.Dense(6), keras.layers.Dense(6, trainable=False), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((4,)), *layers])


@pytest.mark.parametrize("polish", [False, True])
def test_project_moves_every_kernel_that_trains(polish):
    model = plain_model()
    free, frozen, own = model.layers
    before = to_numpy(frozen.kernel)
    for layer in (free, own):
        layer.kernel.assign(layer.kernel + normal(layer.kernel.shape, scale=0.3))
    hkr.constraints.project(model, polish=polish)
    assert np.array_equal(to_numpy(frozen.kernel), before)
    for layer in (free, own):
        values = np.linalg.svd(to_numpy(layer.kernel), compute_uv=False)
        assert values.max() <= 1 + 4e-7
        assert not polish or values.min() >= 1 - 1e-6


def test_project_refuses_constraints_of_another_library():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_constraint="non_neg")])
    with pytest.raises(ValueError, match="Received: constraint="):
        hkr.constraints.project(model)


@pytest.mark.parametrize(
    "constraint", [Orthonormal(), SpectralBall(), UnitNorm(), hkr.constraints.DeferredOrthonormal()]
)
@pytest.mark.parametrize("inner", ["glorot_uniform", keras.initializers.HeNormal(seed=3), None])
def test_an_initializer_on_the_constraint_set_can_be_saved(constraint, inner, tmp_path):
    bound = constraint.bind(hkr.geometry.Geometry(gain=3.0))
    initializer = bound.initializer(inner)
    config = keras.saving.serialize_keras_object(initializer)
    copy = keras.saving.deserialize_keras_object(config)
    assert keras.saving.serialize_keras_object(copy) == config
    assert copy.constraint.geometry == bound.geometry
    if not isinstance(inner, str) and inner is not None:
        np.testing.assert_array_equal(to_numpy(copy((3, 3, 2, 4))), to_numpy(initializer((3, 3, 2, 4))))
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, kernel_initializer=constraint.initializer(inner))]
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0].kernel_initializer).__name__ == "ConstrainedInitializer"
    assert hkr.lipschitz_bound(model) <= 3**0.5 * (1 + 1e-5)


@pytest.mark.parametrize("cls", STEPWISE)
def test_finite_weights_stay_finite(cls):
    layer = hkr.layers.LipschitzConv2D(2, 3, kernel_constraint=cls())
    layer.build((None, 4, 4, 2))
    projected = to_numpy(layer.kernel.constraint(np.full(layer.kernel.shape, 3.4e38, "float32")))
    assert np.isfinite(projected).all()
