"""What a prediction costs: the network as trained, stripped with `to_keras`, and plain networks; in ONNX too.

    KERAS_BACKEND=tensorflow python benchmarks/inference_cost.py [--batch 128] [--rounds 30] [--no-onnx]

"plain, the same shapes" is a network that was never anything else: the layers of the stripped one, built anew from
their JSON. "plain, ReLU" has ReLU and average pooling in place of sorting and rearranging. The figure is the minimum
over interleaved rounds.
"""

import tempfile
import warnings

import keras
import numpy as np
from step_cost import cnn
from timing import bars, interleaved, options, show, stopwatch, store

import hkr_keras as hkr


def onnx_session(model, path: str):
    """The model in onnxruntime, as a function of a batch."""
    import onnxruntime

    model(np.zeros((1, *model.input_shape[1:]), "float32"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def compare(functions: dict, x, rounds: int) -> dict[str, float]:
    """Milliseconds of one call, the minimum over interleaved rounds."""
    return interleaved({name: stopwatch(function, x, least=0.0) for name, function in functions.items()}, rounds)


def main() -> None:
    """Prints the table."""
    parser = options(__doc__, rounds=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--no-onnx", action="store_true")
    arguments = parser.parse_args()
    x = np.random.default_rng(0).random((arguments.batch, 28, 28, 1)).astype("float32")
    trained = hkr.models.lipschitz_cnn((28, 28, 1), 10, orthogonal=True)
    stripped = hkr.to_keras(trained)
    models = {
        "hkr_keras, as trained": trained,
        "hkr_keras, after to_keras": stripped,
        "plain, the same shapes": keras.models.model_from_json(stripped.to_json()),
        "plain, ReLU": cnn(lipschitz=False),
    }
    keras_times = compare({name: model.predict_on_batch for name, model in models.items()}, x, arguments.rounds)
    onnx_times = {}
    if not arguments.no_onnx:
        with tempfile.TemporaryDirectory() as folder:
            sessions = {
                name: onnx_session(model, f"{folder}/{i}.onnx") for i, (name, model) in enumerate(models.items())
            }
            onnx_times = compare(sessions, x, arguments.rounds)
    rows, reference = [], "plain, the same shapes"
    for name in models:
        cells = []
        for times in (keras_times, onnx_times):
            cells += [f"{times[name]:.2f}", f"{times[name] / times[reference]:.2f}"] if times else ["", ""]
        rows.append((name, *cells))
        store(arguments.json, network=name, batch=arguments.batch, keras=keras_times[name], onnx=onnx_times.get(name))
    headings = ("network", "Keras, ms", "ratio", "ONNX, ms", "ratio")
    show(f"Prediction of {arguments.batch} images", headings, rows, arguments.markdown)
    series = {"Keras": keras_times, **({"ONNX": onnx_times} if onnx_times else {})}
    drawn = {title: [times[name] for name in models] for title, times in series.items()}
    bars(arguments.plot, list(models), drawn, f"milliseconds for {arguments.batch} images")


if __name__ == "__main__":
    main()
