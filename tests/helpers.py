"""What the tests measure with: explicit operators, random pairs, gradients."""

import contextlib
import gc
import importlib
from collections.abc import Iterator

import keras
import numpy as np

import hkr_keras as hkr
from hkr_keras.certification.rules import registry

BACKEND = keras.backend.backend()

#: What Keras or a backend raises where it refuses to run a model.
REFUSALS: tuple[type[Exception], ...] = (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError)
if BACKEND == "tensorflow":
    import tensorflow

    REFUSALS += (tensorflow.errors.InvalidArgumentError,)


#: Functions that dispatch on classes of layers, each with a `register`, and all tables that may be added to.
DISPATCHING = (hkr.geometry.kernel_geometries, hkr.geometry.weight_geometries, hkr.conversion.keras_layers)
REGISTERS = (
    *(registry.LAYERS, registry.MERGES, hkr.bounds.ACTIVATION_BOUNDS, keras.saving.get_custom_objects()),
    *(gc.get_referents(function.registry)[0] for function in DISPATCHING),
)
SETTINGS = ("floatx", "epsilon", "image_data_format", "dtype_policy")


@contextlib.contextmanager
def state_kept() -> Iterator[None]:
    """A context after which nothing is registered, and no setting of Keras changed, that was not so before."""
    registered = [dict(register) for register in REGISTERS]
    settings = {name: getattr(keras.config, name)() for name in SETTINGS}
    try:
        yield
    finally:
        for name, value in settings.items():
            getattr(keras.config, f"set_{name}")(value)
        for register, before in zip(REGISTERS, registered, strict=True):
            register.clear()
            register.update(before)
        for function in DISPATCHING:
            function._clear_cache()


@contextlib.contextmanager
def double_precision():
    """A context in which float64 is computed when asked for.

    JAX wants to be told; and Keras 3.15 takes operands of float64 for float32 on JAX and PyTorch, whatever the layer
    says, by a table that is not public.
    """
    table = importlib.import_module("keras.src.backend.common.dtypes").BIT64_TO_BIT32_DTYPE
    before = dict(table)
    with contextlib.ExitStack() as stack:
        if BACKEND == "jax":
            import jax

            stack.enter_context(jax.enable_x64(True))
        table["float64"] = "float64"
        try:
            yield
        finally:
            table.update(before)


def to_numpy(tensor, dtype="float64"):
    """A weight or an output on the host."""
    tensor = keras.ops.convert_to_tensor(tensor)
    if keras.backend.standardize_dtype(tensor.dtype) in ("float16", "bfloat16"):
        tensor = keras.ops.cast(tensor, "float32")
    return np.asarray(keras.ops.convert_to_numpy(tensor), dtype=dtype)


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


def flat(array):
    return np.reshape(array, (len(array), -1))


def largest_singular_value(matrices):
    return float(np.linalg.svd(np.asarray(matrices, "float64"), compute_uv=False).max())


def explicit_operator(function, input_shape, batch=512):
    """The matrix `(inputs, outputs)` of an affine function on arrays of `input_shape`, without its bias."""
    size = int(np.prod(input_shape))
    points = np.eye(size + 1, size, dtype="float32").reshape(-1, *input_shape)  # the last one is zero
    outputs = [flat(to_numpy(function(points[i : i + batch]))) for i in range(0, size + 1, batch)]
    *rows, zero = np.concatenate(outputs)
    return np.stack(rows) - zero


def operator_norm(layer, input_shape):
    """The exact norm of the linear part of a float32 layer on inputs of that shape."""
    return largest_singular_value(explicit_operator(layer, input_shape))


def largest_ratio(function, x, z):
    """The largest `|f(x) - f(z)| / |x - z|` over a batch of pairs."""
    difference = flat(to_numpy(function(x)) - to_numpy(function(z)))
    return float(np.max(np.linalg.norm(difference, axis=1) / np.linalg.norm(flat(x.astype("float64") - z), axis=1)))


def check_layer(layer, input_shape, constant=1.0, pairs=32):
    """The layer is Lipschitz on random pairs, far and near, and comes back equal from its config."""
    x = normal((pairs, *input_shape), seed=1)
    outputs = to_numpy(layer(x))
    assert outputs.shape == tuple(layer.compute_output_shape(x.shape))
    for distance, tolerance in ((1.0, 1e-5), (1e-2, 1e-4)):
        assert largest_ratio(layer, x, x + normal(x.shape, seed=2, scale=distance)) <= constant * (1 + tolerance)

    config = layer.get_config()
    copy = type(layer).from_config(config)
    assert copy.get_config() == config
    copy.build(x.shape)
    copy.set_weights(layer.get_weights())
    np.testing.assert_allclose(to_numpy(copy(x)), outputs, atol=1e-6)
    return layer


def gradient(function, x):
    """The gradient of the sum of the outputs with respect to the inputs."""
    if BACKEND == "jax":
        import jax

        return np.asarray(jax.grad(lambda a: keras.ops.sum(function(a)))(x))
    x = keras.ops.convert_to_tensor(x)
    if BACKEND == "torch":
        x = x.clone().requires_grad_(True)
        keras.ops.sum(function(x)).backward()
        return x.grad.cpu().numpy()
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        total = keras.ops.sum(function(x))
    return tape.gradient(total, x).numpy()


def adam_steps(layer, learning_rate, steps=3):
    """Steps of the real optimizer with random gradients: constraints run where Keras runs them."""
    optimizer, variables = keras.optimizers.Adam(learning_rate), layer.trainable_variables
    optimizer.build(variables)
    apply = in_one_program(optimizer, variables) if BACKEND == "jax" else optimizer.apply
    for step in range(steps):
        gradients = [normal(variable.shape, seed=10 * step + i) for i, variable in enumerate(variables)]
        apply([keras.ops.convert_to_tensor(g) for g in gradients], variables)


def in_one_program(optimizer, variables):
    """`optimizer.apply` compiled, as in the training loop of JAX; otherwise each operation is a program of its own."""
    import jax

    own = optimizer.variables
    step = jax.jit(optimizer.stateless_apply)

    def apply(gradients, _):
        found = step([each.value for each in own], gradients, [each.value for each in variables])
        for variable, value in zip([*variables, *own], [*found[0], *found[1]], strict=True):
            variable.assign(value)

    return apply
