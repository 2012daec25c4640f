"""What `certify` costs on a model that has not changed, beside `predict`: interleaved minima in milliseconds.

    KERAS_BACKEND=tensorflow python benchmarks/certify_cost.py [--only mlp cnn] [--inputs N] [--rounds N] [--cpu]

The target: at most 1.3 times `predict` plus 20 ms. "parts" are the bound, the hash and the comparison of the model with
what its program was made of.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import hkr_keras as hkr
from hkr_keras.certification.evaluation import hash_of_model
from hkr_keras.certification.prediction import fingerprint

MODELS = {
    "mlp": lambda: hkr.models.lipschitz_mlp((28, 28, 1), 10, widths=(512, 512, 512)),
    "cnn": lambda: hkr.models.lipschitz_cnn((28, 28, 1), 10),
    "digits": lambda: hkr.models.lipschitz_cnn((8, 8, 1), 10, (8, 16), 32),
    "digits, orthogonal": lambda: hkr.models.lipschitz_cnn((8, 8, 1), 10, (8, 16), 32, orthogonal=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=450)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of the process, for busy machines")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    print(f"{keras.backend.backend()}, {options.inputs} inputs, {'CPU time' if options.cpu else 'wall clock'}, ms")
    for name in options.only:
        model = MODELS[name]()
        x = np.random.default_rng(0).random((options.inputs, *model.input_shape[1:])).astype("float32")
        tasks = {
            "predict": lambda model=model, x=x: model.predict(x, batch_size=128, verbose=0),
            "certify": lambda model=model, x=x: hkr.certify(model, x, batch_size=128, verbose=0),
            "bound": lambda model=model: hkr.lipschitz_bound(model),
            "hash": lambda model=model: hash_of_model(model),
            "fingerprint": lambda model=model: fingerprint(model),
        }
        start = clock()
        tasks["certify"]()
        first, found = clock() - start, dict.fromkeys(tasks, float("inf"))
        for _ in range(options.rounds):
            for task, run in tasks.items():
                start = clock()
                run()
                found[task] = min(found[task], clock() - start)
        allowed = 1.3 * found["predict"] + 0.02
        parts = ", ".join(f"{task} {1e3 * seconds:.1f}" for task, seconds in found.items())
        print(f"{name}: first certify {1e3 * first:.0f}; {parts}; allowed {1e3 * allowed:.1f}", flush=True)


if __name__ == "__main__":
    main()
