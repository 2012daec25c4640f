"""Exact optimal transport on samples: what networks estimate, and the smallest loss that any network can reach.

Needs `pip install 'hkr_keras[transport]'`: POT for distances, SciPy for the linear programme.
"""

from typing import Any

import numpy as np

from hkr_keras import margins
from hkr_keras._validation import number

__all__ = ["hkr_optimum", "wasserstein1"]


def wasserstein1(x: Any, y: Any, x_weights: Any = None, y_weights: Any = None) -> float:
    """The exact Wasserstein-1 distance of two samples, with the L2 distance of points as its cost.

    No 1-Lipschitz function separates the means of the samples by more (Kantorovich and Rubinstein):
    `mean f(x) - mean f(y) <= wasserstein1(x, y)`, with equality for the best one.

    Args:
        x, y: samples `(n, ...)` and `(m, ...)` of the same kind; images are flattened. Memory and time grow with `n m`.
        x_weights, y_weights: weights `(n,)` and `(m,)` of at least 0 and any sum, which is divided out; `None` for
            equal ones.

    Returns:
        The distance, in the units of the points.

    Raises:
        ValueError: for samples of different dimension, empty or not finite, or wrong weights.
        RuntimeError: when the solver stops before the optimum.
        ImportError: without POT.

    Example:

    >>> wasserstein1([[0.0], [1.0]], [[2.0], [3.0]])
    2.0
    >>> wasserstein1([[0.0], [1.0]], [[2.0]], x_weights=[3.0, 1.0])
    1.75

    Reference:
        Villani, Optimal Transport, 2009, theorem 5.10; Bonneel et al., SIGGRAPH Asia 2011, for the solver.
    """
    try:
        import ot
        from scipy.spatial.distance import cdist
    except ImportError as error:
        raise ImportError("Transport needs POT and SciPy: pip install 'hkr_keras[transport]'") from error
    x, y = _points(x, "x"), _points(y, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"Expected points of one dimension. Received: {x.shape[1]} and {y.shape[1]} numbers a point")
    masses = _masses(x_weights, len(x), "x_weights"), _masses(y_weights, len(y), "y_weights")
    distance, log = ot.emd2(*masses, cdist(x, y), numItermax=10**8, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"The solver of POT stopped before the optimum: {log['warning']}")
    return float(distance)


def hkr_optimum(x: Any, y: Any, alpha: float, margin: float) -> float:
    """The exact minimum of the HKR loss over all 1-Lipschitz functions, on a sample: a linear programme.

    With a share p of positive points it is the dual problem, the largest value of

    `sum over pairs of a positive x_i and a negative z_j of (2 m - |x_i - z_j|) plan_ij, minus 2 m`

    over plans whose marginal densities lie in `[1, 1 + alpha p]` on the positive and `[1, 1 + alpha (1 - p)]` on the
    negative points: a transport in which points that the hinge is about may carry more mass. `HKR(alpha, margin)`
    of a network of constant at most 1 is never below it on the same sample. `alpha=0` gives minus `wasserstein1`.

    Args:
        x: points `(n, ...)`; images are flattened. The programme has as many variables as pairs of a positive and a
            negative point: a fraction of a second for 200 points, seconds for 400.
        y: labels {0, 1} or {-1, +1}, `(n,)` or `(n, 1)`, both classes.
        alpha: weight of the hinge, finite and at least 0.
        margin: of the hinge, at least 0.

    Returns:
        The smallest value of the loss.

    Raises:
        ValueError: for points that are empty or not finite, a single class, wrong labels, alpha or margin.
        RuntimeError: when the solver stops before the optimum.
        ImportError: without SciPy.

    Example:

    >>> round(hkr_optimum([[1.0], [-1.0]], [1, 0], alpha=10.0, margin=1.5), 6)  # f = (1, -1), a hinge of 0.5 each
    3.0

    Reference:
        Serrurier et al., CVPR 2021 (arXiv 2006.06520), for the loss and its dual.
    """
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise ImportError("Transport needs POT and SciPy: pip install 'hkr_keras[transport]'") from error
    alpha, margin = number("alpha", alpha), number("margin", margin)
    x, positive = _points(x, "x"), margins.class_indices(y, classes=1).astype(bool)
    if len(positive) != len(x) or positive.all() or not positive.any():
        raise ValueError(
            "Expected one label per point, of both classes. "
            f"Received: {len(positive)} labels with {int(positive.sum())} positive, for {len(x)} points"
        )
    lengths = np.linalg.norm(x[positive][:, None] - x[~positive][None], axis=-1)
    n, m = lengths.shape
    share = n / (n + m)
    rows, columns = np.divmod(np.arange(n * m), m)
    marginals = sparse.csr_array(
        (np.repeat([n, m], n * m).astype(float), (np.concatenate([rows, n + columns]), np.tile(np.arange(n * m), 2)))
    )
    most = np.repeat([1 + share * alpha, 1 + (1 - share) * alpha], [n, m])
    solution = optimize.linprog(
        (lengths - 2 * margin).reshape(-1),
        A_ub=sparse.vstack([marginals, -marginals]),
        b_ub=np.concatenate([most, -np.ones(n + m)]),
        method="highs",
    )
    if solution.status != 0:
        raise RuntimeError(f"The linear programme has not been solved: {solution.message}")
    return float(-(solution.fun + 2 * margin))


def _points(points: Any, name: str) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim < 2 or not points.size or not np.isfinite(points).all():
        raise ValueError(f"Expected finite points of shape (n, ...). Received: {name}.shape={points.shape}")
    return points.reshape(len(points), -1)


def _masses(weights: Any, count: int, name: str) -> np.ndarray:
    masses = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if masses.shape != (count,) or not (masses >= 0).all() or not 0 < masses.sum() < np.inf:
        raise ValueError(
            f"Expected {count} finite weights of at least 0 that are not all 0. Received: {name}={weights}"
        )
    return masses / masses.sum()
