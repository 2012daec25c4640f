"""hkr_keras: 1-Lipschitz networks with certificates of robustness, for Keras 3."""

from hkr_keras import (
    bounds,
    callbacks,
    constraints,
    datasets,
    geometry,
    layers,
    linalg,
    losses,
    margins,
    metrics,
    models,
    plotting,
)
from hkr_keras._version import __version__
from hkr_keras.bounds import lipschitz_bound, lipschitz_summary
from hkr_keras.certificates import Certificate, certify

__all__ = [
    "Certificate",
    "__version__",
    "bounds",
    "callbacks",
    "certify",
    "constraints",
    "datasets",
    "geometry",
    "layers",
    "linalg",
    "lipschitz_bound",
    "lipschitz_summary",
    "losses",
    "margins",
    "metrics",
    "models",
    "plotting",
]
