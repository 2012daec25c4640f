"""Layers with a Lipschitz constant of at most 1."""

from keras.layers import Layer

from hkr_keras._hints import refuse_old_arguments, renamed
from hkr_keras.layers.activations import FullSort, GroupSort, Householder, MaxMin
from hkr_keras.layers.almost_orthogonal import AOLConv2D, AOLDense, SLLConv2D, SLLDense
from hkr_keras.layers.base import LipschitzLayer
from hkr_keras.layers.kernels import (
    LipschitzConv1D,
    LipschitzConv1DTranspose,
    LipschitzConv2D,
    LipschitzConv2DTranspose,
    LipschitzConv3D,
    LipschitzConv3DTranspose,
    LipschitzDense,
    LipschitzDepthwiseConv1D,
    LipschitzDepthwiseConv2D,
    LipschitzSeparableConv1D,
    LipschitzSeparableConv2D,
)
from hkr_keras.layers.merging import LipschitzResidual, Scale
from hkr_keras.layers.normalization import BatchCentering, LayerCentering, LipschitzBatchNormalization
from hkr_keras.layers.orthogonal import (
    OrthogonalConv1D,
    OrthogonalConv1DTranspose,
    OrthogonalConv2D,
    OrthogonalConv2DTranspose,
)
from hkr_keras.layers.pooling import (
    GlobalL2NormPooling1D,
    GlobalL2NormPooling2D,
    InvertibleDownsampling2D,
    InvertibleUpsampling2D,
    L2NormPooling1D,
    L2NormPooling2D,
    L2NormPooling3D,
    ScaledAveragePooling1D,
    ScaledAveragePooling2D,
    ScaledAveragePooling3D,
    ScaledGlobalAveragePooling1D,
    ScaledGlobalAveragePooling2D,
)
from hkr_keras.layers.recurrent import LipschitzSimpleRNN
from hkr_keras.layers.reflectors import ReflectorDense
from hkr_keras.layers.shifts import ChannelShuffle, SpatialShift1D, SpatialShift2D

__all__ = [
    "AOLConv2D",
    "AOLDense",
    "BatchCentering",
    "ChannelShuffle",
    "FullSort",
    "GlobalL2NormPooling1D",
    "GlobalL2NormPooling2D",
    "GroupSort",
    "Householder",
    "InvertibleDownsampling2D",
    "InvertibleUpsampling2D",
    "L2NormPooling1D",
    "L2NormPooling2D",
    "L2NormPooling3D",
    "LayerCentering",
    "LipschitzBatchNormalization",
    "LipschitzConv1D",
    "LipschitzConv1DTranspose",
    "LipschitzConv2D",
    "LipschitzConv2DTranspose",
    "LipschitzConv3D",
    "LipschitzConv3DTranspose",
    "LipschitzDense",
    "LipschitzDepthwiseConv1D",
    "LipschitzDepthwiseConv2D",
    "LipschitzLayer",
    "LipschitzResidual",
    "LipschitzSeparableConv1D",
    "LipschitzSeparableConv2D",
    "LipschitzSimpleRNN",
    "MaxMin",
    "OrthogonalConv1D",
    "OrthogonalConv1DTranspose",
    "OrthogonalConv2D",
    "OrthogonalConv2DTranspose",
    "ReflectorDense",
    "SLLConv2D",
    "SLLDense",
    "Scale",
    "ScaledAveragePooling1D",
    "ScaledAveragePooling2D",
    "ScaledAveragePooling3D",
    "ScaledGlobalAveragePooling1D",
    "ScaledGlobalAveragePooling2D",
    "SpatialShift1D",
    "SpatialShift2D",
]

__getattr__ = renamed(
    __name__,
    {
        "SpectralDense": "LipschitzDense",
        "SpectralLinear": "LipschitzDense",
        "SpectralConv1d": "LipschitzConv1D",
        "SpectralConv2d": "LipschitzConv2D",
        "SpectralConv3d": "LipschitzConv3D",
        "SpectralConvTranspose2d": "LipschitzConv2DTranspose",
        "OrthoConv2D": "OrthogonalConv2D",
        "PadConv2D": "LipschitzConv2D or keras.layers.Conv2D, of which the first has padding='circular'",
        "PadConv2d": "LipschitzConv2D or keras.layers.Conv2D, of which the first has padding='circular'",
        "SpectralConv1D": "LipschitzConv1D",
        "SpectralConv2D": "LipschitzConv2D",
        "SpectralConv2DTranspose": "LipschitzConv2DTranspose",
        "SpectralConv3D": "LipschitzConv3D",
        "SpectralDepthwiseConv2D": "LipschitzDepthwiseConv2D",
        "FrobeniusDense": "LipschitzDense(..., kernel_constraint=UnitNorm())",
        "FrobeniusLinear": "LipschitzDense(..., kernel_constraint=UnitNorm())",
        "FrobeniusConv2D": "LipschitzConv2D(..., kernel_constraint=SpectralBall())",
        "FrobeniusConv2d": "LipschitzConv2D(..., kernel_constraint=SpectralBall())",
        "GroupSort2": "GroupSort(2)",
        "HouseHolder": "Householder",
        "PReLUlip": "keras.layers.PReLU",
        "LPReLU": "keras.layers.PReLU",
        "LeakyReLUlip": "keras.layers.LeakyReLU",
        "ScaledAvgPool2d": "ScaledAveragePooling2D",
        "ScaledAdaptiveAvgPool2d": "ScaledGlobalAveragePooling2D",
        "ScaledL2NormPool2d": "L2NormPooling2D",
        "ScaledAdaptativeL2NormPool2d": "GlobalL2NormPooling2D",
        "ScaledL2NormPooling2D": "L2NormPooling2D",
        "ScaledGlobalL2NormPooling2D": "GlobalL2NormPooling2D",
        "InvertibleDownSampling": "InvertibleDownsampling2D",
        "InvertibleUpSampling": "InvertibleUpsampling2D",
        "LipResidual": "LipschitzResidual",
        "BatchLipNorm": "LipschitzBatchNormalization",
        "Condensable": "nothing (the stored kernel is the one that is used)",
        "unconstrained": "keras.layers",
    },
)

for _cls in map(globals().get, __all__):
    if isinstance(_cls, type) and issubclass(_cls, Layer):  # not the mixin, whose constructor is that of any class
        refuse_old_arguments(_cls)
