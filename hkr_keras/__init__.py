"""hkr_keras: 1-Lipschitz networks with certificates of robustness, for Keras 3."""

from hkr_keras import (
    bounds,
    callbacks,
    certificates,
    constraints,
    datasets,
    evaluation,
    geometry,
    layers,
    linalg,
    losses,
    margins,
    metrics,
    models,
    optimizers,
    plotting,
    rounding,
    spectra,
)
from hkr_keras._version import __version__
from hkr_keras.bounds import lipschitz_bound
from hkr_keras.certificates import Certificate, certify, certify_outputs, certify_top_k
from hkr_keras.summary import lipschitz_summary

__all__ = [
    "Certificate",
    "__version__",
    "bounds",
    "callbacks",
    "certificates",
    "certify",
    "certify_outputs",
    "certify_top_k",
    "constraints",
    "datasets",
    "evaluation",
    "geometry",
    "layers",
    "linalg",
    "lipschitz_bound",
    "lipschitz_summary",
    "losses",
    "margins",
    "metrics",
    "models",
    "optimizers",
    "plotting",
    "rounding",
    "spectra",
]
