"""StiefelMuon, an optimizer for orthonormal kernels: its steps rotate them along the constraint set."""

from typing import Any

import keras
import numpy as np
from keras import ops

from hkr_keras import constraints, linalg
from hkr_keras._backends.compiling import branch
from hkr_keras._registration import registered
from hkr_keras.geometry import Geometry

__all__ = ["StiefelMuon"]

Tensor = Any

_ORDERS = 64  # orders of the rows of a kernel, one after the other: each cuts it into other blocks
_PROJECTED = 8  # steps from projection to projection of a kernel that only turns


@registered
class StiefelMuon(keras.optimizers.Optimizer):
    """Muon along the constraint set: each step turns all directions of an orthonormal kernel equally far.

    For kernels with the constraint `Orthonormal()`, the default of this package's layers, or `DeferredOrthonormal()`:
    the gradient is projected onto the tangent space of the orthonormal matrices, accumulated with momentum (Nesterov),
    and replaced by the nearest orthonormal matrix, times the learning rate; the constraint (or the callback that it is
    deferred to) then moves the kernel back. All other weights (biases, heads, kernels of plain layers) follow Adam with
    `adam_ratio` times the learning rate. In few epochs this certifies more than Adam does; a step costs a few more
    products of small matrices.

    Wide kernels, of more than `block` inputs and outputs, are turned in blocks: in each step their rows (or columns,
    where these are more) are cut into blocks by chance, and the rows of each block are turned among themselves. That
    costs a fraction of the operations. A product with orthonormal matrices keeps the kernel on the set, so that it is
    projected in every eighth step only, different kernels in different steps, against what rounding adds up to; the
    norm is at most 1 after every step, up to rounding.

    Args:
        learning_rate: number or schedule; the norm of a step of an orthonormal kernel, whose own norm is 1. It
            should decay to 0 or nearly so.
        adam_ratio: learning rate of the other weights, in units of `learning_rate`.
        momentum: of the orthonormal kernels, in [0, 1).
        block: rows of a wide kernel that are turned among themselves, at least 2, or `None` for all at once.
        beta_1, beta_2, epsilon: of Adam.
        name, kwargs: of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: for a momentum outside [0, 1), and a block below 2.

    Example:

    >>> import keras, numpy as np, hkr_keras as hkr
    >>> model = hkr.models.lipschitz_mlp((4,), 1, widths=(8,))
    >>> model.compile(hkr.optimizers.StiefelMuon(), hkr.losses.HKR())
    >>> history = model.fit(np.ones((8, 4)), np.arange(8) % 2, verbose=0)
    >>> bool(hkr.lipschitz_bound(model) < 1 + 1e-5)
    True

    Reference:
        Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024; the tangent projection: Edelman,
        Arias and Smith, SIAM J. Matrix Anal. Appl. 20 (1998), section 2.4; blocks by chance: arXiv 2505.12378.
    """

    def __init__(
        self,
        learning_rate: Any = 0.02,
        adam_ratio: Any = 0.25,
        momentum: Any = 0.95,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        block: int | None = 128,
        name: Any = "stiefel_muon",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected a momentum in [0, 1). Received: momentum={momentum}")
        if block is not None and (not isinstance(block, int) or isinstance(block, bool) or block < 2):
            raise ValueError(f"Expected a block of at least 2 rows, or None. Received: block={block}")
        self.adam_ratio, self.momentum, self.block = adam_ratio, momentum, block
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        self._sets = [getattr(variable, "constraint", None) for variable in variables]
        self._wide = [self._is_wide(index, variable) for index, variable in enumerate(variables)]
        self.momentums = self.add_optimizer_variables(variables, "momentum")
        self.velocities = [
            None if self._is_orthonormal(index) else self.add_variable_from_reference(variable, name="velocity")
            for index, variable in enumerate(variables)
        ]

    def _is_orthonormal(self, index: int) -> bool:
        return isinstance(self._sets[index], constraints.Orthonormal)

    def _is_wide(self, index: int, variable: Any) -> bool:
        if self.block is None or not self._is_orthonormal(index):
            return False
        geometry = getattr(self._sets[index], "geometry", None) or Geometry()
        return min(geometry.to_matrices(ops.convert_to_tensor(variable)).shape[-2:]) > self.block

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """A step. The constraints of kernels that only turn are left out, since `update_step` sees to them."""
        if trainable_variables is not None and not self.built:
            self.build(list(trainable_variables))
        turning = [index for index, wide in enumerate(self._wide) if wide] if self.built else []
        try:
            for index in turning:
                self._trainable_variables[index].constraint = None
            super().apply(grads, trainable_variables)
        finally:
            for index in turning:
                self._trainable_variables[index].constraint = self._sets[index]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        rate, gradient = ops.cast(learning_rate, variable.dtype), ops.cast(gradient, variable.dtype)
        gradient = ops.reshape(gradient, variable.shape)  # TensorFlow forgets shapes behind inputs of rank 3 and more
        if self._is_orthonormal(index):
            geometry = self._sets[index].geometry or Geometry()
            if self._wide[index]:
                self._turn_blocks(gradient, variable, rate, index, geometry)
            else:
                self._turn(gradient, variable, rate, self.momentums[index], geometry)
        else:
            self._adam(gradient, variable, self.adam_ratio * rate, self.momentums[index], self.velocities[index])

    def _turn(self, gradient: Any, variable: Any, rate: Any, momentum: Any, geometry: Any) -> None:
        """The step in the units of the matrices, which are the kernel times its gain."""
        kernel = geometry.to_matrices(ops.convert_to_tensor(variable)) * geometry.gain
        tangent = linalg.tangent(kernel, geometry.to_matrices(gradient))
        total = self.momentum * geometry.to_matrices(ops.convert_to_tensor(momentum)) + tangent
        self.assign(momentum, geometry.from_matrices(total, variable.shape))
        step = linalg.polar_direction(tangent + self.momentum * total) / geometry.gain
        self.assign_sub(variable, rate * geometry.from_matrices(step, variable.shape))

    def _turn_blocks(self, gradient: Tensor, variable: Any, rate: Tensor, index: int, geometry: Geometry) -> None:
        momentum = self.momentums[index]
        total = self.momentum * ops.convert_to_tensor(momentum) + (1 - self.momentum) * gradient
        self.assign(momentum, total)
        kernel, direction = (
            geometry.to_matrices(tensor)
            for tensor in (ops.convert_to_tensor(variable), self.momentum * total + (1 - self.momentum) * gradient)
        )
        kernel = kernel * geometry.gain
        wide = kernel.shape[-2] < kernel.shape[-1]
        if wide:
            kernel, direction = ops.swapaxes(kernel, -1, -2), ops.swapaxes(direction, -1, -2)
        orders = np.stack([np.random.default_rng(i).permutation(kernel.shape[-2]) for i in range(_ORDERS)])
        order, back = (
            ops.take(ops.convert_to_tensor(table.astype("int32")), ops.cast(self.iterations % _ORDERS, "int32"), axis=0)
            for table in (orders, np.argsort(orders))
        )
        kernel, direction = ops.take(kernel, order, axis=-2), ops.take(direction, order, axis=-2)
        kernel = ops.take(linalg.turned(kernel, direction, rate, int(self.block or 0)), back, axis=-2)
        due = ops.equal((ops.cast(self.iterations, "int32") + index) % _PROJECTED, 0)
        kernel = branch(due, lambda: linalg.newton_schulz(kernel), lambda: kernel)
        kernel = ops.swapaxes(kernel, -1, -2) if wide else kernel
        self.assign(variable, geometry.from_matrices(kernel, variable.shape) / geometry.gain)

    def _adam(self, gradient: Any, variable: Any, rate: Any, momentum: Any, velocity: Any) -> None:
        step = ops.cast(self.iterations + 1, variable.dtype)
        first, second = ops.cast(self.beta_1, variable.dtype), ops.cast(self.beta_2, variable.dtype)
        self.assign_add(momentum, (gradient - momentum) * (1 - first))
        self.assign_add(velocity, (ops.square(gradient) - velocity) * (1 - second))
        rate = rate * ops.sqrt(1 - ops.power(second, step)) / (1 - ops.power(first, step))
        self.assign_sub(variable, rate * momentum / (ops.sqrt(velocity) + self.epsilon))

    def load_own_variables(self, store: Any) -> None:
        """Also those of an optimizer that was stored before it met its weights, as on PyTorch before the first step."""
        stored = sorted(store.keys(), key=int)
        if len(stored) > 2:
            return super().load_own_variables(store)
        for variable, key in zip(self.variables, stored, strict=False):  # iterations and perhaps the learning rate
            variable.assign(store[key])
        return None

    def get_config(self) -> dict[str, Any]:
        names = ("adam_ratio", "momentum", "beta_1", "beta_2", "epsilon", "block")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
