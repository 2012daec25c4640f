"""Shipping: the plain Keras model as SavedModel, ONNX or LiteRT, and beside it what turns its outputs into radii."""

from hkr_keras.exporting.runtimes import (
    FORMATS,
    ExportedCertificate,
    ExportedModel,
    certificate_path,
    export,
    file_hash,
    load,
)

__all__ = ["FORMATS", "ExportedCertificate", "ExportedModel", "certificate_path", "export", "file_hash", "load"]
