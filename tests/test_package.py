"""The public names, and what importing the package does."""

import inspect
import os
import subprocess
import sys

import keras
import pytest

import hkr_keras as hkr

CONTRACT = {
    hkr: (
        "lipschitz_bound lipschitz_summary certify certify_outputs certify_top_k Certificate layers losses metrics "
        "callbacks constraints datasets attacks explanations oneclass plotting transport"
    ),
    hkr.layers: (
        "LipschitzDense LipschitzConv1D LipschitzConv2D LipschitzConv3D LipschitzConv1DTranspose "
        "LipschitzConv2DTranspose LipschitzConv3DTranspose LipschitzDepthwiseConv1D LipschitzDepthwiseConv2D "
        "LipschitzSeparableConv1D LipschitzSeparableConv2D GroupSort MaxMin FullSort Householder L2NormPooling1D "
        "L2NormPooling2D L2NormPooling3D ScaledAveragePooling1D "
        "ScaledAveragePooling2D ScaledAveragePooling3D GlobalL2NormPooling1D GlobalL2NormPooling2D "
        "ScaledGlobalAveragePooling1D ScaledGlobalAveragePooling2D InvertibleDownsampling2D InvertibleUpsampling2D "
        "LayerCentering BatchCentering LipschitzResidual Scale "
        "OrthogonalConv1D OrthogonalConv2D OrthogonalConv1DTranspose OrthogonalConv2DTranspose "
        "AOLDense AOLConv2D ReflectorDense SLLDense SLLConv2D LipschitzSimpleRNN"
    ),
    hkr.losses: "KR HingeMargin HKR MulticlassKR MulticlassHinge MulticlassHKR SoftHKR LogSumExpHKR MarginCrossentropy",
    hkr.metrics: "KRDistance CertifiedAccuracy CertifiedRadius",
    hkr.callbacks: "Orthonormalize CertifiedEvaluation LipschitzMonitor",
    hkr.constraints: "Orthonormal DeferredOrthonormal SpectralBall UnitNorm",
    hkr.attacks: "evaluate_robustness as_logits BrokenCertificate ATTACKS",
    hkr.explanations: "saliency counterfactual nearest_adversarial",
    hkr.transport: "wasserstein1 hkr_optimum",
}
CLASSES = [
    getattr(module, name)
    for module, names in CONTRACT.items()
    for name in names.split()
    if inspect.isclass(getattr(module, name))
]


@pytest.mark.parametrize("module", CONTRACT, ids=lambda module: module.__name__)
def test_public_names(module):
    missing = [name for name in CONTRACT[module].split() if not hasattr(module, name)]
    assert missing == []


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_public_classes_have_an_example(cls):
    assert ">>>" in inspect.getdoc(cls)
    assert "__doc__" in vars(cls)


@pytest.mark.parametrize(
    "cls",
    [
        cls
        for cls in CLASSES
        if issubclass(cls, (keras.layers.Layer, keras.Loss, keras.Metric, keras.constraints.Constraint))
    ],
    ids=lambda cls: cls.__name__,
)
def test_stored_names(cls):
    assert keras.saving.get_registered_name(cls) == f"hkr_keras>{cls.__name__}"
    assert keras.saving.get_registered_object(f"hkr_keras>{cls.__name__}") is cls


def test_import_needs_neither_extras_nor_other_backends():
    backend = keras.backend.backend()
    others = sorted({"tensorflow", "jax", "torch"} - {backend, *({"torch"} if backend == "jax" else ())})
    unwanted = ["matplotlib", "sklearn", "scipy.optimize", "foolbox", "art", "ot", "tqdm"]
    code = (
        "import sys, keras; before = set(sys.modules); import hkr_keras; "
        f"print([name for name in {unwanted + others!r} if name in set(sys.modules) - before])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert result.stdout.strip().splitlines()[-1] == "[]"
