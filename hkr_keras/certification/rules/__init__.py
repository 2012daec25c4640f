"""The tables of rules: one row per layer, with its bound beside its rounding."""

from hkr_keras.certification.rules import (
    activations,
    kernels,
    merging,
    normalization,
    pooling,
    recurrent,
    reshaping,
)

__all__ = ["activations", "kernels", "merging", "normalization", "pooling", "recurrent", "reshaping"]
