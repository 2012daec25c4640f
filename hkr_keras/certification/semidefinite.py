"""Semidefinite bounds on chains of Dense layers and monotone activations: tighter than the product of norms.

Only NumPy, in float64, from the kernels alone. The result of the search is proven separately, by
eigenvalues with a margin for rounding.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from hkr_keras.certification.floating_point import MACHINE_EPSILON
from hkr_keras.certification.singular_values import matrix_spectrum

__all__ = ["semidefinite_bound"]

_POWERS = (4, 16, 64, 256)  # of the Schatten norms that stand for the largest eigenvalue, from smooth to sharp
_LEAST = 1e-290  # of products: below, the search is not worth what underflows
_MEMORY = 12  # pairs of steps and changes of the gradient


def semidefinite_bound(
    kernels: Sequence[np.ndarray],
    slopes: Sequence[float] | None = None,
    errors: Sequence[float] | None = None,
    steps: int = 60,
) -> float:
    """Upper bound on the Lipschitz constant of `x -> phi(... phi(x K_1 + b_1) K_2 + b_2 ...) K_n`, L2 to L2.

    Every phi acts on each number by itself, with slopes in [0, s]. With differences `d_i` behind the activations and
    s = 1, `<d_i, T_i (d_{i-1} K_i - d_i)> >= 0` for every diagonal `T_i >= 0`. So `rho |d_0|^2 >= |d_{n-1} K_n|^2`
    whenever the block tridiagonal matrix of ::

        rho |d_0|^2 - |d_{n-1} K_n|^2 - 2 sum_i <d_i, T_i (d_{i-1} K_i - d_i)>

    is positive semidefinite, and the root of rho is a bound. For given T the smallest rho is explicit, layer by layer
    from the last: `G_{n-1} = K_n K_n^T`, `G_{i-1} = K_i T_i (2 T_i - G_i)^{-1} T_i K_i^T`, `rho` the largest eigenvalue
    of `G_0`. It starts from multiples of the identity, which give the product of the norms or less, and descends (BFGS
    on Schatten norms of `G_0`). What is found is proven by the eigenvalues of the whole matrix: the negative ones, and
    all that float64 can have rounded, are paid for with `|d_i| <= |K_1| ... |K_i| |d_0|`.

    Args:
        kernels: `(inputs, outputs)` each, as in Keras, float64.
        slopes: the largest slope of each activation in between, one less than kernels; 1 by default.
        errors: bounds on the norms of what is wrong with the kernels, when they are products; 0 by default.
        steps: of the descent, for each of four norms. Each costs a few products of matrices as large as the kernels.

    Returns:
        The bound, never above the product of norms and slopes.

    Raises:
        ValueError: for kernels that do not follow on each other, or slopes that are negative or too many.

    Example:

    >>> first, second = np.array([[1.0, -1.0]]), np.array([[1.0], [1.0]])
    >>> round(semidefinite_bound([first, second]), 2)  # of relu(x) + relu(-x); the product of norms is 2
    1.0

    Reference:
        Fazlyab et al., NeurIPS 2019 (arXiv 1906.04893), LipSDP-Neuron; Xu and Sivaranjani, NeurIPS 2024 (arXiv
        2404.04375), for the recursion; Wang and Manchester, ICML 2023 (arXiv 2301.11526), for free parameters.
    """
    slopes = [1.0] * (len(kernels) - 1) if slopes is None else [float(slope) for slope in slopes]
    follow = all(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] for a, b in itertools.pairwise(kernels))
    if not kernels or not follow or kernels[0].ndim != 2:
        raise ValueError(
            "Expected kernels (inputs, outputs), each with as many inputs as the one before has outputs. "
            f"Received: shapes={[np.shape(kernel) for kernel in kernels]}"
        )
    if len(slopes) != len(kernels) - 1 or not all(0 <= slope < math.inf for slope in slopes):
        raise ValueError(f"Expected {len(kernels) - 1} slopes, each a number from 0 up. Received: slopes={slopes}")
    # slopes in [0, s] are s times slopes in [0, 1]; powers of two scale without rounding
    norms = [matrix_spectrum(np.asarray(kernel, dtype=np.float64)).bound for kernel in kernels]
    up = 1 + 8 * len(kernels) * MACHINE_EPSILON
    # kernels one after another replaced by the true ones: the product of all others with the error of that one
    true = [norm + error for norm, error in zip(norms, errors or [0.0] * len(norms), strict=True)]
    moved = sum(_product([*norms[:i], error, *true[i + 1 :], *slopes]) for i, error in enumerate(errors or []))
    product = _product([*true, *slopes]) * up
    if len(kernels) == 1 or min(product, _product(slopes)) <= _LEAST or product == math.inf:
        return product
    exponents = [math.frexp(norm)[1] for norm in norms]
    scaled = [np.ldexp(kernel, -exponent) for kernel, exponent in zip(kernels, exponents, strict=True)]
    multipliers = _descend(scaled, steps)
    factor = math.ldexp(math.prod(slopes), sum(exponents)) * up
    tiny = np.finfo(np.float64).tiny * sum(kernel.size for kernel in kernels)  # what scaling can have lost
    return float(min(product, (factor * (_proven(scaled, multipliers) + tiny) + moved) * up))


def _product(factors: Sequence[float]) -> float:
    """An upper bound on a product of numbers from 0 up, whose partial products may leave the range of float64."""
    if 0.0 in factors:
        return 0.0
    mantissa, exponent = 1.0, 0
    for factor in factors:
        part, shift = math.frexp(factor)
        mantissa, more = math.frexp(mantissa * part)
        exponent += shift + more
    if exponent > 1024:
        return math.inf
    found = math.ldexp(mantissa, exponent) * (1 + 2 * len(factors) * MACHINE_EPSILON)
    return max(found, float(np.finfo(np.float64).tiny))


def _proven(kernels: list[np.ndarray], multipliers: list[np.ndarray]) -> float:
    """The bound that multipliers prove: `inf` when the recursion breaks down."""
    gram, _ = _recursion(kernels, multipliers)
    if gram is None:
        return math.inf
    rho = float(np.linalg.eigvalsh(gram)[-1]) * (1 + 1e-9)
    sizes = [len(kernel) for kernel in kernels]
    ends = np.cumsum([0, *sizes])
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    whole = np.diag(np.concatenate([np.full(sizes[0], rho), *(2 * t for t in multipliers)]))
    for before, behind, kernel, t in zip(parts, parts[1:], kernels, multipliers, strict=False):
        whole[before, behind] = -kernel * t
        whole[behind, before] = whole[before, behind].T
    absolute = np.abs(whole)
    whole[parts[-1], parts[-1]] -= kernels[-1] @ kernels[-1].T
    absolute[parts[-1], parts[-1]] += np.abs(kernels[-1]) @ np.abs(kernels[-1]).T
    # in units of rho |d_0|^2 + sum 2 <d_i, T_i d_i>, which scales every row and column
    scale = 1 / np.sqrt(np.concatenate([np.full(sizes[0], rho), *(2 * t for t in multipliers)]))
    terms = kernels[-1].shape[1] + 8
    missing = -float(np.linalg.eigvalsh(whole * scale[:, None] * scale)[0])
    size = float(np.linalg.norm(absolute * scale[:, None] * scale))
    missing = max(missing, 0.0) + 16 * MACHINE_EPSILON * (len(whole) + terms) * size
    lengths = np.cumprod([matrix_spectrum(kernel).bound ** 2 for kernel in kernels[:-1]])
    weight = sum(2 * float(t.max()) * length for t, length in zip(multipliers, lengths, strict=True))
    return math.sqrt(rho * (1 + missing) + missing * weight) * (1 + 16 * MACHINE_EPSILON * len(kernels))


def _recursion(kernels: list[np.ndarray], multipliers: list[np.ndarray]) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """`G_0` for given multipliers (`None` where they prove nothing) and the inverses of `2 T_i - G_i`, last first."""
    gram = kernels[-1] @ kernels[-1].T
    inverses: list[np.ndarray] = []
    for kernel, t in zip(kernels[-2::-1], multipliers[::-1], strict=True):
        try:
            factor = np.linalg.inv(np.linalg.cholesky(2 * np.diag(t) - gram))
        except np.linalg.LinAlgError:
            return None, inverses
        half = kernel * t @ factor.T
        gram = half @ half.T
        inverses.append(factor.T @ factor)
    return gram, inverses


def _loss(kernels: list[np.ndarray], logs: np.ndarray, power: int) -> tuple[float, np.ndarray]:
    """The logarithm of a Schatten norm of `G_0`, and its gradient by the logarithms of the multipliers."""
    ends = np.cumsum([kernel.shape[1] for kernel in kernels[:-1]])
    multipliers = np.split(np.exp(logs), ends[:-1])
    gram, inverses = _recursion(kernels, multipliers)
    if gram is None or not np.isfinite(gram).all():
        return math.inf, logs
    values, vectors = np.linalg.eigh(gram)
    largest = float(values[-1])
    weights = np.clip(values / largest, 0, 1) ** (power - 1)
    total = float(weights @ np.clip(values / largest, 0, 1))
    change = (vectors * (weights / (largest * total))) @ vectors.T  # the derivative by G_0
    gradient = []
    for kernel, t, inverse in zip(kernels, multipliers, inverses[::-1], strict=False):
        by_s = kernel.T @ change @ kernel  # S = T inverse T
        turned = inverse * t @ by_s
        change = turned * t @ inverse
        gradient.append((2 * np.diagonal(turned) - 2 * np.diagonal(change)) * t)
    return math.log(largest) + math.log(total) / power, np.concatenate(gradient)


def _descend(kernels: list[np.ndarray], steps: int) -> list[np.ndarray]:
    """Multipliers with a small bound, by limited-memory BFGS on their logarithms."""
    if len(kernels[0]) > kernels[0].shape[1]:
        kernels = [np.asarray(np.linalg.qr(kernels[0], mode="r")), *kernels[1:]]
    multipliers: list[np.ndarray] = []
    gram = kernels[-1] @ kernels[-1].T
    for kernel in kernels[-2::-1]:  # multiples of the identity: no worse than the product of norms
        size = float(np.linalg.eigvalsh(gram)[-1])
        multipliers.insert(0, np.full(len(gram), size))
        gram = kernel * size**2 @ np.linalg.inv(2 * size * np.eye(len(gram)) - gram) @ kernel.T
    logs = np.log(np.concatenate(multipliers))
    for power in _POWERS:
        loss, gradient = _loss(kernels, logs, power)
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for _ in range(steps):
            direction = -_inverse_hessian(pairs, gradient)
            length = min(1.0, 1.0 / float(np.abs(direction).max().clip(1e-30)))
            descent = float(direction @ gradient)
            while length > 1e-6:
                next_loss, next_gradient = _loss(kernels, logs + length * direction, power)
                if next_loss <= loss + 1e-4 * length * descent:
                    break
                length /= 2
            else:
                break
            step, difference = length * direction, next_gradient - gradient
            if step @ difference > 1e-12 * np.linalg.norm(step) * np.linalg.norm(difference):
                pairs = [*pairs[1 - _MEMORY :], (step, difference)]
            logs, loss, gradient = logs + step, next_loss, next_gradient
    return np.split(np.exp(logs), np.cumsum([kernel.shape[1] for kernel in kernels[:-1]])[:-1])


def _inverse_hessian(pairs: list[tuple[np.ndarray, np.ndarray]], gradient: np.ndarray) -> np.ndarray:
    """The two-loop recursion (Nocedal and Wright, algorithm 7.4)."""
    q, factors = gradient.copy(), []
    for step, difference in reversed(pairs):
        factors.append(float(step @ q) / float(step @ difference))
        q = q - factors[-1] * difference
    if pairs:
        step, difference = pairs[-1]
        q = q * float(step @ difference) / float(difference @ difference)
    for (step, difference), factor in zip(pairs, reversed(factors), strict=True):
        q = q + (factor - float(difference @ q) / float(step @ difference)) * step
    return q
