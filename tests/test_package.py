"""The public names, and what importing the package does."""

import ast
import collections
import importlib
import inspect
import os
import pathlib
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
        "LayerCentering BatchCentering LipschitzResidual Scale SpatialShift1D SpatialShift2D ChannelShuffle "
        "LipschitzBatchNormalization "
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
NAMED = [getattr(module, name) for module, names in CONTRACT.items() for name in names.split()]
NAMED += [getattr(hkr.layers, name) for name in hkr.layers.__all__]
CLASSES = list(dict.fromkeys(filter(inspect.isclass, NAMED)))


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


PACKAGE = pathlib.Path(hkr.__file__).parent
SOURCES = {path.relative_to(PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
PUBLIC = [name for name in SOURCES if not any(part.startswith("_") for part in name.parts)]
FOR_SUBCLASSES = {  # Keras has them for classes that derive from its own
    ("optimizers.py", "_get_variable_index"),
    ("optimizers.py", "_trainable_variables"),  # of the model, in the order of the slots
    ("callbacks.py", "_model"),  # `model` would collect the variables of a JAX training loop
}


@pytest.mark.once
@pytest.mark.parametrize("name", PUBLIC, ids=str)
def test_public_modules_say_what_is_public(name):
    module = importlib.import_module(".".join(("hkr_keras", *name.with_suffix("").parts)))
    assert len(module.__all__) == len(set(module.__all__))
    assert [each for each in module.__all__ if each.startswith("_") or not hasattr(module, each)] == []


@pytest.mark.once
def test_a_public_name_has_one_home():
    importlib.import_module("hkr_keras.sklearn")  # which nothing else imports
    modules = [value for name in hkr.__all__ if inspect.ismodule(value := getattr(hkr, name))] + [hkr.sklearn]
    homes = collections.defaultdict(list)
    for module in (hkr, *modules):
        for name in module.__all__:
            homes[id(getattr(module, name))].append(f"{module.__name__}.{name}")
    assert [names for names in homes.values() if len(names) > 1] == []
    assert sum(len(module.__all__) for module in modules) <= 111  # few, so that users find them


@pytest.mark.once
@pytest.mark.parametrize("name", SOURCES, ids=str)
def test_records_of_more_than_three_fields_are_made_by_keyword(name):
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", ())]
        if any("dataclass" in each for each in decorators):
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            fields = [field for field in fields if "ClassVar" not in ast.unparse(field.annotation)]
            assert len(fields) <= 3 or "kw_only=True" in decorators[0], node.name


def private_names_of_keras():
    """Attributes with a leading underscore of the objects that this package is handed."""
    inputs, dense = keras.Input((2,)), keras.layers.Dense(2)
    model = keras.Model(inputs, dense(inputs))
    model.compile("adam", "mse")
    sequential = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    others = [keras.metrics.Mean(), keras.losses.MeanSquaredError(), keras.callbacks.Callback()]
    objects = [inputs, dense, dense.kernel, model, model.optimizer, sequential, *others]
    return {name for each in objects for name in dir(each) if name.startswith("_") and not name.startswith("__")}


def attributes_read(tree):
    """Names of attributes that a file reads, without those that its own classes define."""
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and len(node.args) > 1]
    named = [node.args[1] for node in calls if getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr")]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return (read - own) | {node.value for node in named if isinstance(node, ast.Constant)}


@pytest.mark.once
def test_private_attributes_of_keras_are_read_in_one_file():
    private, found = private_names_of_keras(), set()
    assert {"_inbound_nodes", "_nodes_by_depth", "_functional", "_keras_history"} <= private
    for name, path in SOURCES.items():
        found |= {(name.as_posix(), read) for read in attributes_read(ast.parse(path.read_text())) & private}
    in_graph = {(name, read) for name, read in found if name == "certification/graph.py"}
    assert in_graph
    assert found - in_graph <= FOR_SUBCLASSES


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
