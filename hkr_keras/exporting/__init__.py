"""Shipping: the plain Keras model as SavedModel, ONNX or LiteRT, and beside it what turns its outputs into radii."""

from hkr_keras.exporting.certificate import FORMATS, ExportedCertificate, certificate_path, file_hash
from hkr_keras.exporting.runtimes import ExportedModel, export, load

__all__ = ["FORMATS", "ExportedCertificate", "ExportedModel", "certificate_path", "export", "file_hash", "load"]
