"""An optimizer that knows that orthonormal kernels turn rather than grow."""

import keras
from keras import ops

from hkr_keras import constraints, linalg
from hkr_keras._registration import registered
from hkr_keras.geometry import Geometry


@registered
class StiefelMuon(keras.optimizers.Optimizer):
    """Muon along the constraint set: each step turns all directions of an orthonormal kernel equally far.

    For kernels with the constraint `Orthonormal()`, the default of this package's layers, or `DeferredOrthonormal()`:
    the gradient is projected onto the tangent space of the orthonormal matrices, accumulated with momentum (Nesterov),
    and replaced by the nearest orthonormal matrix, times the learning rate; the constraint (or the callback that it is
    deferred to) then moves the kernel back. All other weights (biases, heads, kernels of plain layers) follow Adam with
    `adam_ratio` times the learning rate. In few epochs this certifies more than Adam does; a step costs a few more
    products of small matrices.

    Args:
        learning_rate: number or schedule; the norm of a step of an orthonormal kernel, whose own norm is 1. It
            should decay to 0 or nearly so.
        adam_ratio: learning rate of the other weights, in units of `learning_rate`.
        momentum: of the orthonormal kernels, in [0, 1).
        beta_1, beta_2, epsilon: of Adam.
        name, kwargs: of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: for a momentum outside [0, 1).

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = hkr.models.lipschitz_mlp((4,), 1, widths=(8,))
    >>> model.compile(hkr.optimizers.StiefelMuon(), hkr.losses.HKR())
    >>> history = model.fit(np.ones((8, 4)), np.arange(8) % 2, verbose=0)
    >>> bool(hkr.lipschitz_bound(model) < 1 + 1e-5)
    True

    Reference:
        Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024; the tangent projection: Edelman,
        Arias and Smith, SIAM J. Matrix Anal. Appl. 20 (1998), section 2.4.
    """

    def __init__(
        self,
        learning_rate=0.02,
        adam_ratio=0.25,
        momentum=0.95,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        name="stiefel_muon",
        **kwargs,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected a momentum in [0, 1). Received: momentum={momentum}")
        self.adam_ratio, self.momentum = adam_ratio, momentum
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._sets = [getattr(variable, "constraint", None) for variable in variables]
        self.momentums = self.add_optimizer_variables(variables, "momentum")
        self.velocities = [
            None if self._is_orthonormal(index) else self.add_variable_from_reference(variable, name="velocity")
            for index, variable in enumerate(variables)
        ]

    def _is_orthonormal(self, index: int) -> bool:
        return isinstance(self._sets[index], constraints.Orthonormal)

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        rate, gradient = ops.cast(learning_rate, variable.dtype), ops.cast(gradient, variable.dtype)
        gradient = ops.reshape(gradient, variable.shape)  # TensorFlow forgets shapes behind inputs of rank 3 and more
        if self._is_orthonormal(index):
            geometry = self._sets[index].geometry or Geometry()
            self._turn(gradient, variable, rate, self.momentums[index], geometry)
        else:
            self._adam(gradient, variable, self.adam_ratio * rate, self.momentums[index], self.velocities[index])

    def _turn(self, gradient, variable, rate, momentum, geometry):
        """The step in the units of the matrices, which are the kernel times its gain."""
        kernel = geometry.to_matrices(ops.convert_to_tensor(variable)) * geometry.gain
        tangent = linalg.tangent(kernel, geometry.to_matrices(gradient))
        total = self.momentum * geometry.to_matrices(ops.convert_to_tensor(momentum)) + tangent
        self.assign(momentum, geometry.from_matrices(total, variable.shape))
        step = linalg.polar_direction(tangent + self.momentum * total) / geometry.gain
        self.assign_sub(variable, rate * geometry.from_matrices(step, variable.shape))

    def _adam(self, gradient, variable, rate, momentum, velocity):
        step = ops.cast(self.iterations + 1, variable.dtype)
        first, second = ops.cast(self.beta_1, variable.dtype), ops.cast(self.beta_2, variable.dtype)
        self.assign_add(momentum, (gradient - momentum) * (1 - first))
        self.assign_add(velocity, (ops.square(gradient) - velocity) * (1 - second))
        rate = rate * ops.sqrt(1 - ops.power(second, step)) / (1 - ops.power(first, step))
        self.assign_sub(variable, rate * momentum / (ops.sqrt(velocity) + self.epsilon))

    def get_config(self):
        names = ("adam_ratio", "momentum", "beta_1", "beta_2", "epsilon")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
