"""Exports models as SavedModel, ONNX or LiteRT, with the constants that turn their outputs into certified radii."""

from hkr_keras.exporting.certificate import ExportedCertificate
from hkr_keras.exporting.runtimes import ExportedModel as ExportedModel
from hkr_keras.exporting.runtimes import export as export
from hkr_keras.exporting.runtimes import load

__all__ = ["ExportedCertificate", "load"]
