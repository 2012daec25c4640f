"""hkr_keras: 1-Lipschitz networks with certificates of robustness, for Keras 3."""

from hkr_keras import (
    bounds,
    callbacks,
    certificates,
    constraints,
    conversion,
    datasets,
    evaluation,
    exporting,
    geometry,
    layers,
    linalg,
    losses,
    margins,
    metrics,
    models,
    plotting,
    rounding,
    spectra,
)
from hkr_keras._version import __version__
from hkr_keras.bounds import lipschitz_bound
from hkr_keras.certificates import Certificate, certify, certify_outputs, certify_top_k
from hkr_keras.conversion import constrain, to_keras, to_lipschitz
from hkr_keras.exporting import export
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
    "constrain",
    "constraints",
    "conversion",
    "datasets",
    "evaluation",
    "export",
    "exporting",
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
    "rounding",
    "spectra",
    "to_keras",
    "to_lipschitz",
]
