"""Exports models as SavedModel, ONNX or LiteRT, with the constants that turn their outputs into certified radii."""

from hkr_keras.exporting.certificate import ExportedCertificate
from hkr_keras.exporting.runtimes import ExportedModel, export, load

__all__ = ["ExportedCertificate", "ExportedModel", "export", "load"]
