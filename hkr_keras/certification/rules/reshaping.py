"""Rows of layers that move, repeat or drop numbers, or do nothing at inference."""

import math
from typing import Any

import keras
import numpy as np

from hkr_keras import layers
from hkr_keras.certification.checks import build_shape
from hkr_keras.certification.floating_point import MACHINE_EPSILON, Rounding, RoundingRule, norms, relative
from hkr_keras.certification.rules.registry import SAME, Shape, bound_of, layer_rounding, rule

__all__ = ["RESHAPING"]

_k = keras.layers

#: Layers that keep the numbers and give them another shape: numbers of a diagonal tail go along.
RESHAPING = (_k.Flatten, _k.Reshape)


def _exact(layer: Any, shape: Shape) -> RoundingRule:
    return relative(0.0)


def _repeated(times: float) -> float:
    return math.sqrt(times) * (1 + 2 * MACHINE_EPSILON)


def _upsampling(layer: Any, shape: Shape) -> float:
    if getattr(layer, "interpolation", "nearest") != "nearest":
        raise ValueError(
            f"Expected UpSampling2D to repeat pixels. Received: {layer.name}.interpolation={layer.interpolation}"
        )
    return _repeated(float(np.prod(layer.size)))


def _image_size(layer: Any, shape: Shape) -> tuple:
    """Height and width of a batch of images, which Keras takes a tensor of rank 3 not to be."""
    shape = build_shape(layer) if shape is None else shape
    if shape is None or len(shape) != 4:
        raise ValueError(
            f"Expected {type(layer).__name__} '{layer.name}' to receive batches of images. Received: shape={shape}"
        )
    return tuple(shape[1:3] if layer.data_format == "channels_last" else shape[2:4])


def _cropped(layer: Any, shape: Shape) -> float:
    sizes = _image_size(layer, shape)
    if any(size is None or size < wanted for size, wanted in zip(sizes, (layer.height, layer.width), strict=True)):
        raise ValueError(
            f"Expected {type(layer).__name__} '{layer.name}' to receive images that are known to be as large as what "
            f"it crops, since it resizes smaller ones. Received: height and width {sizes}, "
            f"cropped to {(layer.height, layer.width)}"
        )
    return 1.0


def _same_size(layer: Any, shape: Shape) -> float:
    sizes = _image_size(layer, shape)
    if sizes != (layer.height, layer.width):
        raise ValueError(
            f"Expected {type(layer).__name__} '{layer.name}' to receive images of the size that it makes; certify the "
            f"layers behind it. Received: height and width {sizes}, resized to {(layer.height, layer.width)}"
        )
    return 1.0


def _time_distributed(layer: Any, shape: Shape) -> float:
    shape = build_shape(layer) if shape is None else shape
    return bound_of(layer.layer, None if shape is None else (shape[0], *shape[2:]))


def _time_distributed_rounding(layer: Any, shape: Shape) -> RoundingRule:
    inner = layer_rounding(layer.layer, None if shape is None else (shape[0], *shape[2:]))

    def rounding(x: Any, y: Any) -> Rounding:
        steps = inner(x.reshape(-1, *x.shape[2:]), y.reshape(-1, *y.shape[2:]))
        return Rounding(norms(steps.at_centre.reshape(x.shape[:2])), steps.slope, steps.composed)

    return rounding


rule(
    *(_k.InputLayer, _k.Identity, _k.Dropout, _k.SpatialDropout1D, _k.SpatialDropout2D, _k.SpatialDropout3D),
    *(_k.AlphaDropout, _k.GaussianDropout, _k.GaussianNoise, _k.ActivityRegularization),
    *(  # augmentation: the identity at inference
        getattr(_k, name)
        for name in (
            *("AugMix", "CutMix", "MixUp", "RandAugment", "RandomBrightness", "RandomColorDegeneration"),
            *("RandomColorJitter", "RandomContrast", "RandomElasticTransform", "RandomErasing", "RandomFlip"),
            *("RandomGaussianBlur", "RandomGrayscale", "RandomHue", "RandomInvert", "RandomPerspective"),
            *("RandomPosterization", "RandomRotation", "RandomSaturation", "RandomSharpness", "RandomShear"),
            *("RandomTranslation", "RandomZoom"),
        )
        if hasattr(_k, name)
    ),
    bound=1.0,
    rounding=_exact,
    tail=SAME,
)
rule(
    *(*RESHAPING, _k.Permute, _k.ZeroPadding1D, _k.ZeroPadding2D, _k.ZeroPadding3D),
    *(_k.Cropping1D, _k.Cropping2D, _k.Cropping3D, layers.InvertibleDownsampling2D, layers.InvertibleUpsampling2D),
    *(layers.ChannelShuffle, layers.SpatialShift1D, layers.SpatialShift2D),
    bound=1.0,
    rounding=_exact,
)
rule(_k.UpSampling1D, _k.UpSampling2D, _k.UpSampling3D, bound=_upsampling, rounding=_exact)
rule(_k.RepeatVector, bound=lambda layer, shape: _repeated(layer.n), rounding=_exact)
rule(_k.CenterCrop, bound=_cropped, rounding=_exact)
rule(_k.Resizing, _k.RandomCrop, bound=_same_size)
rule(_k.TimeDistributed, bound=_time_distributed, rounding=_time_distributed_rounding)
rule(  # at inference, the kernel that it stored
    _k.SpectralNormalization,
    bound=lambda layer, shape: bound_of(layer.layer, shape),
    rounding=lambda layer, shape: layer_rounding(layer.layer, shape),
)
