"""Shipping: the plain Keras model as SavedModel, ONNX or LiteRT, and beside it what turns its outputs into radii."""

from hkr_keras.exporting.certificate import ExportedCertificate
from hkr_keras.exporting.runtimes import ExportedModel, export, load

__all__ = ["ExportedCertificate", "ExportedModel", "export", "load"]
