"""Random models, as code, against their bounds and certificates: what `break_certificates.py --fuzz` and a test run.

A model is a list of statements, so that the smallest one that fails can be printed and pasted. Its constant is
measured on a copy in float64: Jacobians by central differences, and pairs of inputs along their steepest directions,
whose ratio no true bound is below. Rigorous certificates meet the float32 model itself, at the radius and in the worst
directions, and at the floats around the input.
"""

import collections
import contextlib
import dataclasses
import importlib
import math
import warnings
from collections.abc import Callable, Iterator

import keras
import numpy as np

import hkr_keras as hkr

K, L = keras.layers, hkr.layers
BACKEND = keras.backend.backend()
MOST = 160  # numbers in the tensors of a model
#: Relative slack of a measured ratio: differences in float64; kernels that are composed in float32 have more.
ROUNDING, COMPOSED = 1e-7, 2e-5

# ---- kinds of layers: the rank they take, and a function of (random generator, shape without batch) to code ----------

Code = Callable[[np.random.Generator, tuple], str]
KINDS: dict[str, tuple[tuple[int, ...], Code]] = {}


def kind(name: str, *ranks: int):
    """Registers code of a layer, for inputs of these ranks without the batch."""

    def register(code: Code) -> Code:
        KINDS[name] = (ranks or (1, 2, 3, 4), code)
        return code

    return register


def pick(rng, *options):
    return options[rng.integers(len(options))]


def size(rng, low=1, high=4) -> int:
    return int(rng.integers(low, high + 1))


def sizes(rng, rank, low=1, high=3) -> tuple:
    return tuple(size(rng, low, high) for _ in range(rank))


def activation(rng, units: int) -> str:
    """An activation as an argument: mostly none or a name, sometimes a layer or a model."""
    if rng.random() < 0.5:
        return "None"
    return pick(
        rng,
        *[f"'{name}'" for name in ("relu", "tanh", "elu", "sigmoid", "softmax", "gelu", "selu", "silu", "mish")],
        *[f"'{name}'" for name in ("softplus", "hard_silu", "leaky_relu", "softsign", "hard_sigmoid", "sparsemax")],
        *[
            "keras.ops.relu",
            "K.ReLU(negative_slope=1.5)",
            "K.LeakyReLU(-2.0)",
            "K.PReLU()",
            "L.MaxMin()",
            "L.FullSort()",
        ],
        *[
            "L.GroupSort(2)",
            "L.Householder()",
            "K.Softmax()",
            "K.Rescaling(-2.0)",
            "L.Scale(3.0)",
            "K.Activation('tanh')",
        ],
        f"K.Rescaling(np.linspace(-1.0, 2.0, {units}))",
        f"keras.Sequential([keras.Input(({units},)), K.Rescaling(np.linspace(-1.0, 2.0, {units}))])",
        "keras.Sequential([keras.Input((2,)), K.Rescaling(np.ones(2))])",
    )


def data_format(rng) -> str:
    first = BACKEND != "tensorflow" and rng.random() < 0.25
    return ", data_format='channels_first'" if first else ""


def channels(code: str, shape) -> int:
    return shape[0] if "channels_first" in code else shape[-1]


kind("Dense")(lambda r, s: f"K.Dense({(n := size(r))}, activation={activation(r, n)}, use_bias={pick(r, True, False)})")
kind("LipschitzDense")(lambda r, s: f"L.LipschitzDense({(n := size(r))}, activation={activation(r, n)})")
kind("UnitNorm")(lambda r, s: f"L.LipschitzDense({size(r)}, kernel_constraint=hkr.constraints.UnitNorm())")
kind("AOLDense")(lambda r, s: f"L.AOLDense({(n := size(r))}, activation={activation(r, n)})")
kind("SLLDense")(lambda r, s: f"L.SLLDense({size(r)})")
kind("ReflectorDense")(lambda r, s: f"L.ReflectorDense({size(r)})")
kind("Dense, int8 bias")(lambda r, s: f"K.Dense({size(r)}, bias_initializer='ones', kernel_initializer='orthogonal')")


def convolution(name: str, rank: int, transposed=False, depthwise=False):
    def code(rng, shape):
        form = data_format(rng)
        n, c = size(rng), channels(form, shape)
        window = sizes(rng, rank)
        strides, dilation = (1,) * rank, (1,) * rank
        if rng.random() < 0.5:
            strides = sizes(rng, rank) if not depthwise or BACKEND != "tensorflow" else (size(rng),) * rank
        elif rng.random() < 0.4:
            dilation = sizes(rng, rank)
        padding = pick(rng, "valid", "same", *(["causal"] if rank == 1 and not transposed and not depthwise else []))
        groups = math.gcd(n * 2, c) if not transposed and not depthwise and rng.random() < 0.3 else 1
        first = f"{n * groups if groups > 1 else n}, " if not depthwise or "Separable" in name else ""
        more = f", groups={groups}" if groups > 1 else ""
        if depthwise:
            more += f", depth_multiplier={size(rng, 1, 2)}"
        if "Orthogonal" in name:
            padding = pick(rng, "valid", "same", "circular", *(["causal"] if name == "OrthogonalConv1D" else []))
            window = tuple(map(max, window, strides))
            dilated = f", dilation_rate={dilation}" if max(dilation) > 1 else ""
            form = "" if padding == "causal" else form
            return f"L.{name}({n * groups}, {window}, strides={strides}, padding='{padding}'{dilated}{more}{form})"
        if name.startswith("LipschitzConv") and not transposed and rng.random() < 0.3:
            padding = "circular"
        prefix = "L" if name.startswith("Lipschitz") else "K"
        dilated = f", dilation_rate={dilation}" if max(dilation) > 1 else ""
        return (
            f"{prefix}.{name}({first}{window}, strides={strides}, padding='{padding}'{dilated}{more}{form}, "
            f"activation={activation(rng, n) if not groups > 1 else 'None'})"
        )

    return code


for _rank in (1, 2, 3):
    for _prefix in ("", "Lipschitz"):
        kind(f"{_prefix}Conv{_rank}D", _rank + 1)(convolution(f"{_prefix}Conv{_rank}D", _rank))
        kind(f"{_prefix}Conv{_rank}DTranspose", _rank + 1)(convolution(f"{_prefix}Conv{_rank}DTranspose", _rank, True))
        if _rank < 3:
            for _name in ("DepthwiseConv", "SeparableConv"):
                kind(f"{_prefix}{_name}{_rank}D", _rank + 1)(
                    convolution(f"{_prefix}{_name}{_rank}D", _rank, False, True)
                )
    if _rank < 3:
        for _name in ("OrthogonalConv{}D", "OrthogonalConv{}DTranspose"):
            kind(_name.format(_rank), _rank + 1)(convolution(_name.format(_rank), _rank))
    kind(f"MaxPooling{_rank}D", _rank + 1)(
        lambda r, s, n=_rank: (
            f"K.MaxPooling{n}D({sizes(r, n)}, {sizes(r, n)}, '{pick(r, 'valid', 'same')}'{data_format(r)})"
        )
    )
    kind(f"AveragePooling{_rank}D", _rank + 1)(
        lambda r, s, n=_rank: (
            f"K.AveragePooling{n}D({sizes(r, n)}, {sizes(r, n)}, '{pick(r, 'valid', 'same')}'{data_format(r)})"
        )
    )
    kind(f"GlobalAveragePooling{_rank}D", _rank + 1)(
        lambda r, s, n=_rank: f"K.GlobalAveragePooling{n}D(keepdims={pick(r, True, False)}{data_format(r)})"
    )
    kind(f"GlobalMaxPooling{_rank}D", _rank + 1)(
        lambda r, s, n=_rank: f"K.GlobalMaxPooling{n}D(keepdims={pick(r, True, False)}{data_format(r)})"
    )
    kind(f"UpSampling{_rank}D", _rank + 1)(
        lambda r, s, n=_rank: f"K.UpSampling{n}D({sizes(r, n) if n > 1 else size(r, 1, 3)})"
    )
    kind(f"ZeroPadding{_rank}D", _rank + 1)(lambda r, s, n=_rank: f"K.ZeroPadding{n}D({size(r, 1, 2)})")
    kind(f"Cropping{_rank}D", _rank + 1)(lambda r, s, n=_rank: f"K.Cropping{n}D(1)")

for _rank in (1, 2, 3):
    for _name in ("ScaledAveragePooling", "L2NormPooling"):
        kind(f"{_name}{_rank}D", _rank + 1)(
            lambda r, s, n=_rank, name=_name: (
                f"L.{name}{n}D({sizes(r, n)}{data_format(r)}"
                f"{pick(r, '', f', strides={sizes(r, n)}')}, padding='{pick(r, 'valid', 'same')}')"
            )
        )
    if _rank < 3:
        for _name in ("ScaledGlobalAveragePooling", "GlobalL2NormPooling"):
            kind(f"{_name}{_rank}D", _rank + 1)(lambda r, s, n=_rank, name=_name: f"L.{name}{n}D({data_format(r)[2:]})")

kind("SLLConv2D", 3)(lambda r, s: f"L.SLLConv2D({size(r)}, ({pick(r, 1, 3, 5)}, {pick(r, 1, 3, 5)}))")
kind("AOLConv2D", 3)(
    lambda r, s: (
        f"L.AOLConv2D({size(r)}, {sizes(r, 2)}, padding='{pick(r, 'valid', 'same')}', "
        f"{pick(r, f'strides={sizes(r, 2)}', f'dilation_rate={sizes(r, 2)}')}{data_format(r)})"
    )
)
kind("InvertibleDownsampling2D", 3)(lambda r, s: "L.InvertibleDownsampling2D(2)")
kind("InvertibleUpsampling2D", 3)(lambda r, s: "L.InvertibleUpsampling2D((1, 2))")
kind("SpatialShift1D", 2)(lambda r, s: f"L.SpatialShift1D('{pick(r, 'circular', 'same')}'{data_format(r)})")
kind("SpatialShift2D", 3)(
    lambda r, s: f"keras.Sequential([keras.Input({s}), K.Dense(5), L.SpatialShift2D('{pick(r, 'circular', 'same')}')])"
)
kind("ChannelShuffle")(lambda r, s: f"L.ChannelShuffle({size(r, 1, 3)}, axis={pick(r, -1, -1, 1)})")
kind("LipschitzSimpleRNN", 2)(
    lambda r, s: (
        f"L.LipschitzSimpleRNN({size(r)}, activation={pick(r, repr('tanh'), repr('relu'), repr('linear'))}, "
        f"return_sequences={pick(r, True, False)}, go_backwards={pick(r, True, False)})"
    )
)
kind("Bidirectional, two layers", 2)(
    lambda r, s: (
        f"K.Bidirectional(L.LipschitzSimpleRNN({size(r)}, activation='linear'), merge_mode='concat', "
        f"backward_layer=L.LipschitzSimpleRNN({size(r)}, activation='relu', go_backwards=True))"
    )
)
kind("Bidirectional", 2)(
    lambda r, s: (
        f"K.Bidirectional(L.LipschitzSimpleRNN({size(r)}, activation={pick(r, repr('tanh'), repr('linear'))}, "
        f"return_sequences={pick(r, True, False)}), merge_mode={pick(r, repr('concat'), repr('sum'), repr('ave'))})"
    )
)
kind("GroupSort")(lambda r, s: f"L.GroupSort({size(r, 2, 3)}, axis={pick(r, -1, -1, 1, -2)})")
kind("MaxMin")(lambda r, s: f"L.MaxMin(axis={pick(r, -1, -1, 1, -2)})")
kind("FullSort")(lambda r, s: f"L.FullSort(axis={pick(r, -1, 1)})")
kind("Householder")(lambda r, s: f"L.Householder(axis={pick(r, -1, -1, 1)})")
kind("LayerCentering")(lambda r, s: f"L.LayerCentering(axis={pick(r, -1, 1)}, center={pick(r, True, False)})")
kind("BatchCentering")(lambda r, s: f"L.BatchCentering(center={pick(r, True, False)})")
kind("LipschitzBatchNormalization")(
    lambda r, s: (
        f"L.LipschitzBatchNormalization(axis={pick(r, -1, -1, 1)}, epsilon={pick(r, 1e-3, 1e-7, 1.0)}, "
        f"center={pick(r, True, False)}, scale={pick(r, True, False)})"
    )
)
kind("Scale")(lambda r, s: f"L.Scale({pick(r, 0.5, -2.0, 1e-3, 1e4, 1e-20, 1 / 3)})")
kind("BatchNormalization")(
    lambda r, s: (
        f"K.BatchNormalization(axis={pick(r, -1, -1, 1)}, epsilon={pick(r, 1e-3, 1e-7, 1.0)}, "
        f"scale={pick(r, True, False)}, center={pick(r, True, False)})"
    )
)
kind("Normalization")(
    lambda r, s: (
        f"K.Normalization(mean=np.linspace(-1.0, 9.0, {s[-1]}), "
        f"variance=np.geomspace({pick(r, 1e-4, 1e-12, 1.0)}, {pick(r, 1e-2, 1e4)}, {s[-1]}), "
        f"invert={pick(r, True, False)})"
    )
)
kind("Normalization, adapted")(
    lambda r, s: (
        f"(lambda n: (n.adapt(np.random.default_rng(0).normal(size=(5, *{s}))), n)[1])"
        f"(K.Normalization(axis={pick(r, -1, 1)}))"
    )
)
kind("Normalization, scalar")(
    lambda r, s: f"K.Normalization(axis=None, mean={pick(r, 0.0, 100.0)}, variance={pick(r, 1e-3, 1.0, 50.0)})"
)
kind("Rescaling")(
    lambda r, s: pick(
        r,
        f"K.Rescaling({pick(r, 1 / 255, 2.0, -0.3)}, offset={pick(r, 0.0, -1.0, 5.0)})",
        f"K.Rescaling(np.linspace(-2.0, 1.5, {s[-1]}), np.linspace(0.0, 1.0, {s[-1]}))",
        f"K.Rescaling([{', '.join(['0.5'] * s[-1])}])",
        "K.Rescaling(np.ones((2, 1)))",
    )
)
for _name in ("relu", "tanh", "gelu", "silu", "mish", "selu", "celu", "elu", "softplus", "hard_silu", "sparsemax"):
    kind(f"Activation {_name}")(lambda r, s, name=_name: f"K.Activation('{name}')")
for _name in (
    "relu6",
    "squareplus",
    "tanh_shrink",
    "soft_shrink",
    "sparse_plus",
    "log_sigmoid",
    "sparse_sigmoid",
    "glu",
):
    kind(f"Activation {_name}")(lambda r, s, name=_name: f"K.Activation('{name}')")
kind("ReLU")(
    lambda r, s: pick(
        r, "K.ReLU()", "K.ReLU(max_value=1.0)", "K.ReLU(negative_slope=2.0)", "K.ReLU(max_value=2.0, threshold=0.5)"
    )
)
kind("LeakyReLU")(lambda r, s: f"K.LeakyReLU({pick(r, 0.1, 3.0)})")
kind("ELU")(lambda r, s: f"K.ELU({pick(r, 0.5, 2.0)})")
kind("PReLU")(lambda r, s: pick(r, "K.PReLU()", "K.PReLU(shared_axes=[1])"))
kind("Softmax")(lambda r, s: f"K.Softmax(axis={pick(r, -1, 1)})")
kind("Flatten")(lambda r, s: "K.Flatten()")
kind("Reshape")(lambda r, s: f"K.Reshape({pick(r, (-1, 2), (-1, 1), (2, -1, 1), (1, *s), s[::-1])})")
kind("Permute", 2, 3)(lambda r, s: f"K.Permute({tuple(int(i) for i in r.permutation(len(s)) + 1)})")
kind("RepeatVector", 1)(lambda r, s: f"K.RepeatVector({size(r, 1, 4)})")
kind("Dropout")(
    lambda r, s: pick(r, "K.Dropout(0.5)", "K.GaussianDropout(0.5)", "K.GaussianNoise(0.5)", "K.AlphaDropout(0.5)")
)
kind("SpatialDropout", 2)(lambda r, s: "K.SpatialDropout1D(0.5)")
kind("Identity")(lambda r, s: pick(r, "K.Identity()", "K.ActivityRegularization(0.1)"))
kind("SpectralNormalization")(lambda r, s: f"K.SpectralNormalization(K.Dense({size(r)}))")
kind("augmentation", 3)(
    lambda r, s: pick(
        r,
        *["K.RandomFlip()", "K.RandomContrast(0.2)", "K.CenterCrop(2, 2)", "K.RandomInvert(1.0)", "K.RandomErasing()"],
        *[f"K.Resizing({s[0]}, {s[1]})", f"K.RandomCrop({s[0]}, {s[1]})", "K.RandomCrop(2, 2)", "K.Resizing(3, 2)"],
    )
)
#: Layers that have no bound: they are to be refused, not to fail.
kind("without a bound")(
    lambda r, s: pick(
        r,
        *["K.LayerNormalization()", "K.UnitNormalization()", "K.RMSNormalization()", "K.Lambda(lambda x: 2 * x)"],
        *["K.GroupNormalization(1)", "K.Masking()", "K.Activation('exponential')", "K.Activation('hard_shrink')"],
        *["K.Dense(2, activation='threshold')", "K.ReLU(threshold=0.5)", "K.LSTM(2)", "K.EinsumDense('ab,bc->ac', 3)"],
        *["K.Bidirectional(K.SimpleRNN(2))", "K.GRU(2)", "K.Embedding(4, 2)", "K.Conv1D(2, 1, dtype='float16')"],
        *["K.Dense(2, dtype='mixed_bfloat16')", "K.Identity(dtype='float64')", "K.Dense(3, dtype='float64')"],
    )
)
MERGES = ("Add", "Subtract", "Average", "Maximum", "Minimum", "Concatenate", "Multiply", "Dot", "LipschitzResidual")


# ---- random models -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Statement:
    """`target = code`, with the names of the tensors it reads; `kinds` of what it makes."""

    target: str
    code: str
    reads: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """Statements, the names of inputs and outputs, and the seed and the scales of the weights."""

    statements: tuple[Statement, ...]
    inputs: tuple[str, ...]
    output: str
    seed: int
    wild: bool

    def __str__(self) -> str:
        lines = [f"{each.target} = {each.code}" for each in self.statements]
        lines.append(f"model = keras.Model([{', '.join(self.inputs)}], {self.output})")
        lines.append(f"fuzzing.fill(model, seed={self.seed}, wild={self.wild})")
        return "\n".join(lines)

    @property
    def kinds(self) -> set[str]:
        return {name for each in self.statements for name in each.kinds}

    @property
    def casts(self) -> bool:
        return any("dtype=" in each.code for each in self.statements)

    def build(self) -> keras.Model:
        scope: dict = {"K": K, "L": L, "np": np, "keras": keras, "hkr": hkr}
        for each in self.statements:
            scope[each.target] = eval(each.code, scope)
        model = keras.Model([scope[name] for name in self.inputs], scope[self.output])
        fill(model, self.seed, self.wild)
        return model

    def without(self, index: int) -> "Program | None":
        """The program with what one statement reads in place of what it makes; `None` where it reads nothing."""
        gone = self.statements[index]
        if not gone.reads:
            return None
        statements = [
            dataclasses.replace(
                each,
                code=_renamed(each.code, gone.target, gone.reads[0]),
                reads=tuple(gone.reads[0] if name == gone.target else name for name in each.reads),
            )
            for i, each in enumerate(self.statements)
            if i != index
        ]
        output = gone.reads[0] if self.output == gone.target else self.output
        needed, kept = {output}, []
        for each in reversed(statements):
            if each.target in needed or each.target in self.inputs:
                needed |= set(each.reads) | set(_names(each.code))
                kept.append(each)
        inputs = tuple(name for name in self.inputs if name in needed)
        kept = [each for each in reversed(kept) if each.target not in self.inputs or each.target in inputs]
        return dataclasses.replace(self, statements=tuple(kept), inputs=inputs, output=output)


def _names(code: str) -> list[str]:
    import re

    return re.findall(r"\b[xs]\d+\b", code)


def _renamed(code: str, old: str, new: str) -> str:
    import re

    return re.sub(rf"\b{old}\b", new, code)


def fill(model, seed: int, wild: bool) -> None:  # noqa: PLR0912 one case per kind of weight
    """Random weights, as different from trained ones as legal ones can be where `wild`."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        shape, name = tuple(variable.shape), variable.path.rsplit("/", 1)[-1]
        scale = 10.0 ** rng.uniform(-5, 4) if wild and rng.random() < 0.4 else 1.0
        values = rng.standard_normal(shape)
        if "int" in str(variable.dtype) or name in ("seed_generator_state", "count"):
            continue
        if "variance" in name:
            values = 10.0 ** rng.uniform(*((-7, 6) if wild else (-1, 1)), shape)
        elif name in ("gamma", "alpha", "mixing_logits") and wild:
            values = values * 10.0 ** rng.uniform(-2, 2, shape)
        elif name == "angles" and wild:
            values = values * 10.0 ** rng.uniform(-2, 9)
        elif "kernel" in name or name in ("v", "u", "vector_u", "vectors", "unscaled"):
            draw = rng.random()
            if draw < 0.15:
                values = np.abs(values)
            elif draw < 0.25:
                values = np.ones(shape)
            elif draw < 0.3 and values.ndim > 1:
                values = values * 10.0 ** rng.uniform(-4, 2, shape[-1])
            elif draw < 0.35:
                values = values * (rng.random(shape) < 0.3)
            elif draw < 0.4:  # nearly equal columns
                values = values[..., :1] + 10.0 ** rng.uniform(-7, 0) * values
            elif draw < 0.6:
                continue  # as it was initialized: on the constraint set, where there is one
            values = values * scale
        else:
            values = values * scale
        variable.assign(values.astype("float32"))


class Generator:
    """Makes programs; layers are built while they are written, so that shapes are those of Keras."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.scope: dict = {"K": K, "L": L, "np": np, "keras": keras, "hkr": hkr}
        self.statements: list[Statement] = []
        self.tensors: list[str] = []

    def add(self, code: str, reads=(), kinds=(), prefix="x") -> str | None:
        target = f"{prefix}{len(self.scope)}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = eval(code, self.scope)
        except Exception:
            return None
        if prefix == "x":
            shape = getattr(value, "shape", None)
            if not isinstance(value, keras.KerasTensor) or None in shape[1:] or math.prod(shape[1:]) > MOST:
                return None
            if not 2 <= len(shape) <= 5 or 0 in shape[1:]:
                return None
            self.tensors.append(target)
        self.scope[target] = value
        self.statements.append(Statement(target, code, tuple(reads), tuple(kinds)))
        return target

    def shape(self, name: str) -> tuple:
        return tuple(self.scope[name].shape[1:])

    def layer(self, shape) -> tuple[str, str]:
        """The name of a kind that takes inputs of a shape, and code."""
        names = [name for name, (ranks, _) in KINDS.items() if len(shape) in ranks and name != "without a bound"]
        name = "without a bound" if self.rng.random() < 0.01 else pick(self.rng, *names)
        return name, KINDS[name][1](self.rng, shape)

    def step(self) -> None:
        rng = self.rng
        x = self.tensors[-1] if rng.random() < 0.75 else pick(rng, *self.tensors)
        shape = self.shape(x)
        name, code = self.layer(shape)
        draw = rng.random()
        if draw < 0.55:
            self.add(f"{code}({x})", [x], [name])
        elif draw < 0.65:
            self.nested(x, name, code)
        elif draw < 0.72 and len(shape) > 1:
            inner, code = self.layer(shape[1:])
            self.add(f"K.TimeDistributed({code})({x})", [x], [inner, "TimeDistributed"])
        elif draw < 0.8:
            self.shared(x, name, code)
        else:
            self.merge(x)

    def nested(self, x, name, code) -> None:
        rng, shape = self.rng, self.shape(x)
        inside = tuple(None if rng.random() < 0.3 and i < len(shape) - 1 else n for i, n in enumerate(shape))
        if rng.random() < 0.05:
            inside = tuple(None for _ in shape)
        dtype = pick(rng, "float16", "int32", "float64", "bfloat16") if rng.random() < 0.05 else None
        start = f"keras.Input({inside}{f', dtype={dtype!r}' if dtype else ''})"
        second, code_2 = self.layer(shape) if rng.random() < 0.5 else (name, None)
        inner = f"keras.Sequential([{start}, {code}{f', {code_2}' if code_2 else ''}])"
        if rng.random() < 0.3:
            inner = f"(lambda i: keras.Model(i, K.Concatenate()([{code}(i), i])))({start})"
            second = name
        if rng.random() < 0.2 and len(shape) > 1:
            inner = f"K.TimeDistributed({inner.replace(str(inside), str(inside[1:]))})"
        self.add(f"{inner}({x})", [x], [name, second, "nested model"])

    def shared(self, x, name, code) -> None:
        """One layer, applied to a tensor and to what it made, or to another tensor, perhaps of another shape."""
        layer = self.add(code, (), [name, "shared layer"], prefix="s")
        if layer is None:
            return
        first = self.add(f"{layer}({x})", [x], ["shared layer"])
        if first is not None:
            other = pick(self.rng, first, *self.tensors)
            self.add(f"{layer}({other})", [other], ["shared layer"])

    def merge(self, x) -> None:
        rng = self.rng
        same = [name for name in self.tensors if self.shape(name) == self.shape(x)]
        if rng.random() < 0.1:
            same = [name for name in self.tensors if len(self.shape(name)) == len(self.shape(x))]
        others = [pick(rng, *same) for _ in range(size(rng, 1, 2))]
        kind_ = pick(rng, *MERGES[:6], *MERGES[:6], *MERGES)
        arguments = {"Concatenate": f"axis={pick(rng, -1, -1, 1)}", "Dot": "axes=-1"}.get(kind_, "")
        if kind_ in ("Subtract", "Dot"):
            others = others[:1]
        prefix = "L" if kind_ == "LipschitzResidual" else "K"
        self.add(f"{prefix}.{kind_}({arguments})([{', '.join([x, *others])}])", [x, *others], [kind_])

    def __call__(self) -> Program:
        rng = self.rng
        inputs = []
        for _ in range(1 if rng.random() < 0.75 else 2):
            rank = int(pick(rng, 1, 1, 2, 2, 3, 3, 3, 4))
            shape = {1: (size(rng, 1, 6),), 2: (size(rng, 2, 6), size(rng, 1, 4))}.get(rank)
            shape = shape or ((*sizes(rng, rank - 1, 2, 5 if rank == 3 else 3), size(rng, 1, 3)))
            dtype = ", dtype='float16'" if rng.random() < 0.01 else ""
            inputs.append(self.add(f"keras.Input({shape}{dtype})"))
        for _ in range(size(rng, 1, 6)):
            self.step()
        output = self.tensors[-1]
        if rng.random() < 0.6:
            flat = output if len(self.shape(output)) == 1 else self.add(f"K.Flatten()({output})", [output], ["Flatten"])
            output = self.add(f"K.Dense({size(rng, 1, 3)})({flat})", [flat], ["Dense"]) or output
        used, needed = {output}, []
        for each in reversed(self.statements):
            if each.target in used or (each.target in inputs and len(inputs) == 1):
                used |= set(each.reads) | set(_names(each.code))
                needed.append(each)
        inputs = tuple(name for name in inputs if name in used)
        return Program(tuple(reversed(needed)), inputs, output, self.seed, bool(rng.random() < 0.3))


# ---- measuring --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def double_precision():
    """Models that are made within compute in float64: Keras 3.15 takes it for float32 on JAX and PyTorch otherwise."""
    table = importlib.import_module("keras.src.backend.common.dtypes").BIT64_TO_BIT32_DTYPE
    before = dict(table)
    with contextlib.ExitStack() as stack:
        if BACKEND == "jax":
            import jax

            stack.enter_context(jax.enable_x64(True))
        floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        table["float64"] = "float64"
        try:
            yield
        finally:
            table.update(before)
            keras.config.set_floatx(floatx)
            keras.config.set_dtype_policy(policy)


def flat(model, points: np.ndarray, shapes: list[tuple], dtype) -> np.ndarray:
    """Outputs `(n, outputs)`, float64, at inputs `(n, sum of sizes)`."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    parts = np.split(points.astype(dtype), ends, axis=1)
    arrays = [
        keras.ops.convert_to_tensor(part.reshape(-1, *shape), dtype)  # Keras takes arrays for float32
        for part, shape in zip(parts, shapes, strict=True)
    ]
    result = model(arrays if len(arrays) > 1 else arrays[0], training=False)
    return np.asarray(keras.ops.convert_to_numpy(result), "float64").reshape(len(points), -1)


@dataclasses.dataclass(frozen=True)
class Steepest:
    """The largest ratio of a pair that was found, with noise taken off; where, and along which direction."""

    ratio: float
    point: np.ndarray
    direction: np.ndarray
    jacobian: np.ndarray


def steepest(function, points: np.ndarray, steps: int = 2) -> Steepest:
    """From each point along the direction in which the function is steepest, and again from where it is steepest."""
    best = Steepest(0.0, points[0], np.zeros(points.shape[1]), np.zeros((1, points.shape[1])))
    for point in points:
        at = point
        for _ in range(steps):
            h = 1e-6 * max(1.0, float(np.abs(at).max()))
            moves = h * np.eye(len(at))
            jacobian = (function(at + moves) - function(at - moves)).T / (2 * h)
            if not np.isfinite(jacobian).all():
                break
            direction = np.linalg.svd(jacobian)[2][0] if jacobian.size else np.zeros(len(at))
            distances = np.array([1e-5, 1e-3, 1e-1, 1.0, 10.0, 1e3]) * max(1.0, float(np.linalg.norm(at)))
            ends = at + distances[:, None] * direction, at - distances[:, None] * direction
            values = function(ends[0]), function(ends[1])
            noise = 1e-13 * np.maximum(np.abs(values[0]), np.abs(values[1])).max(axis=1) * math.sqrt(values[0].shape[1])
            moved = np.linalg.norm(ends[0] - ends[1], axis=1)
            ratios = (np.linalg.norm(values[0] - values[1], axis=1) - 4 * noise) / moved
            ratios = np.where(np.isfinite(ratios), ratios, 0.0)
            found = int(ratios.argmax())
            if ratios[found] > best.ratio:
                best = Steepest(float(ratios[found]), at, direction, jacobian)
            at = ends[0][found] if np.isfinite(values[0][found]).all() else at
    return best


# ---- what is claimed ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What became of one model: refusals in words, pairs compared, and what is wrong."""

    refused: str | None = None
    rigorous_refused: str | None = None
    pairs: int = 0
    layers: int = 0
    certificates: int = 0
    findings: list[str] = dataclasses.field(default_factory=list)


def claimed(function, *args, **kwargs):
    """What a function of the package says: a value, or a refusal in words; anything else is a finding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return function(*args, **kwargs), None
        except ValueError as error:
            text = " ".join(str(error).split())
            if "Expected" in text and "Received" in text:
                return None, text
            return None, f"FINDING {type(error).__name__}: {text[:300]}"
        except Exception as error:
            return None, f"FINDING {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check(program: Program, thorough: bool = True) -> Result | None:
    """Builds a model and compares what is claimed of it with what it does; `None` where Keras cannot run it."""
    keras.backend.clear_session(free_memory=False)
    rng, result = np.random.default_rng(program.seed), Result()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = program.build()
            shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
            total = sum(math.prod(shape) for shape in shapes)
            x = (rng.standard_normal((3, total)) * np.array([[1.0], [0.0], [pick(rng, 0.1, 10.0, 300.0)]])).astype(
                "float32"
            )
            single = flat(model, x, shapes, "float32")
    except Exception:
        return None
    bound, result.refused = claimed(hkr.lipschitz_bound, model)
    if result.refused and result.refused.startswith("FINDING"):
        result.findings.append(f"lipschitz_bound: {result.refused}")
    if result.refused:
        return result
    found = None
    if not program.casts:
        with double_precision(), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            double = program.build()
            if [w.shape for w in double.weights] != [w.shape for w in model.weights]:
                return None  # a layer that makes other weights for other types
            double.set_weights([np.asarray(weight, "float64") for weight in model.get_weights()])
            for layer in double._flatten_layers():
                if isinstance(layer, K.Normalization) and layer.weights:
                    layer.finalize_state()
            try:
                flat(double, x.astype("float64"), shapes, "float64")
            except Exception:
                return None  # the backend has an operation in float32 alone, as TensorFlow has for pooling in 3-D
            found = steepest(lambda points: flat(double, points, shapes, "float64"), x.astype("float64"))
            slack = COMPOSED if any(isinstance(each, hkr_composed()) for each in double._flatten_layers()) else ROUNDING
            result.pairs += 6 * len(x) * 2
            if not bound >= found.ratio * (1 - slack):
                result.findings.append(f"bound {bound} below a measured {found.ratio}")
            if thorough:
                _check_layers(model, double, rng, result)
                _check_methods(model, double, x, shapes, bound, found.ratio * (1 - slack), rng, result)
    if np.isfinite(single).all() and thorough:
        _check_rigorous(model, x, shapes, found, rng, result)
    return result


def hkr_composed() -> tuple:
    from hkr_keras.layers.base import ComposedKernel

    return (ComposedKernel, L.SLLDense, L.SLLConv2D, K.SpectralNormalization, K.SeparableConv1D, K.SeparableConv2D)


def _check_layers(model, double, rng, result: Result) -> None:
    """The bound of each layer alone, at the shape that it was built for."""
    for layer, twin in zip(model.layers, double.layers, strict=True):
        try:
            shape, many = layer.input.shape, isinstance(layer.input, (list, tuple, dict))
        except (AttributeError, ValueError):
            continue
        if many or isinstance(layer, K.InputLayer) or None in shape[1:]:
            continue
        bound, refused = claimed(hkr.lipschitz_bound, layer)
        if refused:
            if refused.startswith("FINDING"):
                result.findings.append(f"lipschitz_bound of {type(layer).__name__} alone: {refused}")
            continue
        shape = tuple(shape[1:])
        points = rng.standard_normal((2, math.prod(shape))) * np.array([[1.0], [20.0]])
        seen = steepest(lambda p, t=twin, s=shape: flat(t, p, [s], "float64"), points, steps=1)
        composed = isinstance(layer, (*hkr_composed(), keras.Model, K.TimeDistributed))
        result.layers += 1
        if not bound >= seen.ratio * (1 - (COMPOSED if composed else ROUNDING)):
            result.findings.append(f"bound {bound} of {type(layer).__name__} alone below a measured {seen.ratio}")


def _check_methods(model, double, x, shapes, bound, steep: float, rng, result: Result) -> None:
    """The other ways to a bound: semidefinite, around inputs, of the model in plain layers and of its exported file."""
    found, refused = claimed(hkr.lipschitz_bound, model, method="semidefinite")
    if refused or not steep <= found <= bound * (1 + 1e-9):
        result.findings.append(f"semidefinite bound {found} for {bound} and a measured {steep}: {refused}")
    plain, refused = claimed(hkr.to_keras, model, kernels_only=True)
    stored, refused = (None, refused) if refused else claimed(hkr.lipschitz_bound, plain)
    if refused and refused.startswith("FINDING"):
        result.findings.append(f"to_keras: {refused}")
    if stored is not None and not steep <= stored * (1 + COMPOSED):
        result.findings.append(f"bound {stored} of the stored kernels below a measured {steep}")
    if len(shapes) > 1:
        return
    epsilon = float(10.0 ** rng.uniform(-3, 1))
    around, refused = claimed(hkr.local_bound, model, x.reshape(-1, *shapes[0]), epsilon)
    if refused:
        if refused.startswith("FINDING"):
            result.findings.append(f"local_bound: {refused}")
        return
    for point, constant in zip(x.astype("float64"), around, strict=True):
        ends = point + epsilon * np.stack([_in_ball(rng, x.shape[1]) for _ in range(16)])
        values = flat(double, ends, shapes, "float64")
        moved, apart = np.linalg.norm(ends - ends[::-1], axis=1), np.linalg.norm(values - values[::-1], axis=1)
        result.pairs += len(ends) // 2
        if not (apart <= constant * moved * (1 + ROUNDING) + 1e-12 * np.abs(values).max()).all():
            result.findings.append(f"local bound {constant} below a measured {(apart / moved).max()} at {epsilon}")


def _in_ball(rng, dimension: int) -> np.ndarray:
    direction = rng.standard_normal(dimension)
    return direction / np.linalg.norm(direction) * rng.random()


def _check_rigorous(model, x, shapes, found: Steepest | None, rng, result: Result) -> None:
    """Intervals against neighbouring inputs, and classes at the certified radius in the worst direction."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]

    def arrays(points):
        parts = np.split(points.astype("float32"), ends, axis=1)
        given = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        return given if len(given) > 1 else given[0]

    def predicted(points):
        return np.asarray(model.predict(arrays(points), batch_size=len(points), verbose=0), "float64")

    directions = [rng.standard_normal(x.shape[1]) for _ in range(2)]
    if found is not None and found.ratio > 0:
        directions += list(np.linalg.svd(found.jacobian)[2][:2])
    directions = [sign * d / max(float(np.linalg.norm(d)), 1e-300) for d in directions for sign in (1, -1)]
    epsilon = float(10.0 ** rng.uniform(-7, 1))
    interval, refused = claimed(hkr.certify_outputs, model, arrays(x), epsilon, verbose=0, rigorous=True)
    result.rigorous_refused = refused
    if refused:
        if refused.startswith("FINDING"):
            result.findings.append(f"certify_outputs(rigorous): {refused}")
        return
    for i in range(len(x)):
        points = [x[i]]
        for direction in directions:
            points.append(_inside(x[i], x[i] + epsilon * direction, epsilon))
        for _ in range(4):
            points.append(_inside(x[i], np.nextafter(x[i], np.float32(rng.choice([-np.inf, np.inf]))), epsilon))
        outputs = predicted(np.stack(points))
        low, high = interval.lower[i], interval.upper[i]
        result.certificates += len(points)
        if not ((outputs >= low) & (outputs <= high)).all():
            gap = max(float((low - outputs).max()), float((outputs - high).max()))
            result.findings.append(f"rigorous interval of input {i} left by {gap} at epsilon {epsilon}")
    if interval.value.ndim != 2:
        return
    certificate, refused = claimed(hkr.certify, model, arrays(x), verbose=0, rigorous=True)
    if refused:
        if refused.startswith("FINDING"):
            result.findings.append(f"certify(rigorous): {refused}")
        return
    for i in np.flatnonzero((certificate.radius > 0) & (certificate.radius < 1e12)):
        worst, radius = directions + _against(certificate, i, found), certificate.radius[i]
        outputs = predicted(np.stack([_inside(x[i], x[i] + radius * direction, radius) for direction in worst]))
        classes = (outputs[:, 0] > 0).astype(int) if certificate.classes == 1 else outputs.argmax(axis=1)
        result.certificates += len(worst)
        if (classes != certificate.prediction[i]).any():
            result.findings.append(f"rigorous radius {radius} of input {i} broken")


def _against(certificate, i: int, found: Steepest | None) -> list[np.ndarray]:
    """Unit directions in which the logits of a class lose most against each other one."""
    if found is None or found.ratio == 0:
        return []
    own = found.jacobian[certificate.prediction[i] if certificate.classes > 1 else 0]
    ways = found.jacobian - own if certificate.classes > 1 else np.stack([own, -own])
    return [way / np.linalg.norm(way) for way in ways if np.linalg.norm(way) > 0]


def _inside(x, z, epsilon: float) -> np.ndarray:
    """The float32 point nearest to z, pulled towards x until it is within epsilon."""
    z, x = np.asarray(z, "float32"), np.asarray(x, "float32")
    for _ in range(60):
        if np.linalg.norm(z.astype("float64") - x.astype("float64")) <= epsilon * (1 - 1e-12):
            return z
        z = (x.astype("float64") + 0.98 * (z.astype("float64") - x.astype("float64"))).astype("float32")
    return x


# ---- runs ---------------------------------------------------------------------------------------------------------


def programs(count: int, seed: int) -> Iterator[Program]:
    """Programs that Keras can build, each from a seed of its own."""
    for i in range(count):
        keras.backend.clear_session(free_memory=False)
        yield Generator(1_000_003 * seed + i)()


def shrunk(program: Program) -> Program:
    """The smallest program found, by leaving out statements, that still has a finding."""
    smaller = True
    while smaller:
        smaller = False
        for index in reversed(range(len(program.statements))):
            shorter = program.without(index)
            result = None if shorter is None else check(shorter)
            if result is not None and result.findings:
                program, smaller = shorter, True
                break
    return program


@dataclasses.dataclass
class Totals:
    """Counts of a run, and by kind of layer: models, refusals."""

    programs: int = 0
    ran: int = 0
    refused: int = 0
    rigorous_refused: int = 0
    pairs: int = 0
    layers: int = 0
    certificates: int = 0
    broken: list = dataclasses.field(default_factory=list)
    by_kind: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(lambda: [0, 0]))
    reasons: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def __str__(self) -> str:
        lines = [
            f"{name:32} {seen:6} models {refused:6} refused" for name, (seen, refused) in sorted(self.by_kind.items())
        ]
        lines += [f"{count:6} refused: {reason}" for reason, count in self.reasons.most_common(40)]
        lines.append(
            f"{len(self.by_kind)} kinds; {self.programs} models, {self.ran} ran, {self.refused} refused, "
            f"{self.rigorous_refused} refused with rigorous=True; {self.pairs} pairs, {self.layers} layers alone, "
            f"{self.certificates} points against rigorous certificates; broken {len(self.broken)}"
        )
        return "\n".join(lines)


def run(count: int, seed: int, report: Callable[[str], None] | None = None) -> Totals:
    """Checks models, and reports the smallest form of each that has a finding, as code."""
    totals = Totals()
    for program in programs(count, seed):
        totals.programs += 1
        result = check(program)
        if result is None:
            continue
        totals.ran += 1
        totals.refused += result.refused is not None
        totals.rigorous_refused += result.rigorous_refused is not None
        totals.pairs += result.pairs
        totals.layers += result.layers
        totals.certificates += result.certificates
        if result.refused:
            totals.reasons[result.refused.split("Received")[0][:100]] += 1
        for name in program.kinds:
            totals.by_kind[name][0] += 1
            totals.by_kind[name][1] += result.refused is not None
        if result.findings:
            small = shrunk(program)
            again = check(small)
            totals.broken.append((small, again.findings if again else result.findings))
            if report is not None:
                report("\n".join(["", *(again.findings if again else result.findings), str(small)]))
    return totals
