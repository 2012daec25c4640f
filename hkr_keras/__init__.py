"""hkr_keras: 1-Lipschitz networks with certificates of robustness, for Keras 3."""

from hkr_keras import cli

cli.start()  # only in `hkr_keras ...` and `python -m hkr_keras ...`: arguments first, Keras after

from hkr_keras import (
    attacks,
    callbacks,
    constraints,
    conversion,
    datasets,
    explanations,
    exporting,
    geometry,
    layers,
    losses,
    metrics,
    models,
    oneclass,
    optimizers,
    plotting,
    transport,
)
from hkr_keras._hints import renamed
from hkr_keras._version import __version__
from hkr_keras.certification import bounds, rounding
from hkr_keras.certification.bounds import lipschitz_bound
from hkr_keras.certification.certificates import Certificate, certify, certify_outputs, certify_top_k
from hkr_keras.certification.local import local_bound
from hkr_keras.certification.summary import lipschitz_summary
from hkr_keras.conversion import constrain, to_keras, to_lipschitz
from hkr_keras.exporting import export
from hkr_keras.models import monotone

__all__ = [
    "Certificate",
    "__version__",
    "attacks",
    "bounds",
    "callbacks",
    "certify",
    "certify_outputs",
    "certify_top_k",
    "constrain",
    "constraints",
    "conversion",
    "datasets",
    "explanations",
    "export",
    "exporting",
    "geometry",
    "layers",
    "lipschitz_bound",
    "lipschitz_summary",
    "local_bound",
    "losses",
    "metrics",
    "models",
    "monotone",
    "oneclass",
    "optimizers",
    "plotting",
    "rounding",
    "to_keras",
    "to_lipschitz",
    "transport",
]

__getattr__ = renamed(
    __name__,
    {
        "Sequential": "keras.Sequential",
        "Model": "keras.Model",
        **dict.fromkeys(("vanillaModel", "vanilla_model", "vanilla_export"), "to_keras"),
        "activations": "layers",
        "initializers": "nothing (a constrained kernel is projected when it is made)",
        "normalizers": "linalg",
        "regularizers": "nothing (kernels are orthogonal in every step)",
        "utils": "lipschitz_summary(model, x).lower, and lipschitz_bound(model),",
        "evaluate_lip_const": "lipschitz_summary(model, x).lower",
        **dict.fromkeys(("compute_layer_sv", "compute_model_sv"), "lipschitz_summary(model)"),
    },
)
