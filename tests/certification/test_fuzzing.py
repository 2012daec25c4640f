"""A few random models against their bounds and certificates; `benchmarks/break_certificates.py --fuzz` runs many."""

import dataclasses

import fuzzing
import keras
import pytest

import hkr_keras as hkr

COUNT = {"torch": 30, "tensorflow": 6, "jax": 2}[fuzzing.BACKEND]  # the others compile every model


def test_random_models_keep_what_is_claimed():
    totals = fuzzing.run(COUNT, seed=12)
    assert not totals.broken, "\n\n".join(f"{findings}\n{program}" for program, findings in totals.broken)
    assert totals.ran >= COUNT // 2
    assert totals.pairs > 0


@pytest.mark.once
def test_a_wrong_bound_is_found_and_its_model_shrinks(monkeypatch):
    """Half of the bound of every model with a Dense layer: the fuzzer has to notice, and to blame nothing else."""
    right = hkr.lipschitz_bound

    def wrong(model, **settings):
        dense = any(isinstance(layer, keras.layers.Dense) for layer in getattr(model, "layers", []))
        return right(model, **settings) / (2 if dense else 1)

    monkeypatch.setattr(hkr, "lipschitz_bound", wrong)
    program = fuzzing.Program(
        statements=(
            fuzzing.Statement("x1", "keras.Input((3,))"),
            fuzzing.Statement("x2", "K.Identity()(x1)", ("x1",), ("Identity",)),
            fuzzing.Statement("x3", "K.Dense(3)(x2)", ("x2",), ("Dense",)),
            fuzzing.Statement("x4", "K.Flatten()(x3)", ("x3",), ("Flatten",)),
        ),
        inputs=("x1",),
        output="x4",
        seed=0,
        wild=False,
    )
    assert fuzzing.check(program).findings
    small = fuzzing.shrunk(program)
    assert len(small.statements) == 2
    scope = {"K": keras.layers, "keras": keras, "fuzzing": fuzzing}
    exec(str(small), scope)  # what is printed can be run
    assert isinstance(scope["model"], keras.Model)


@pytest.mark.once
@pytest.mark.parametrize("name", ["Dense", "Conv2D", "TimeDistributed", "nested model", "shared layer", "Concatenate"])
def test_programs_hold_every_kind(name):
    assert any(name in kind for program in fuzzing.programs(200, seed=3) for kind in program.kinds)


@pytest.mark.once
def test_programs_hold_sixty_kinds():
    assert len({kind for program in fuzzing.programs(100, seed=3) for kind in program.kinds}) >= 60


@pytest.mark.once
def test_programs_are_made_from_their_seed_alone():
    first, second = next(fuzzing.programs(1, seed=5)), next(fuzzing.programs(1, seed=5))
    assert dataclasses.asdict(first) == dataclasses.asdict(second)
