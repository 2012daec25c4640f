"""The benchmark scripts, in little: they run, and their figures are of the right kind."""

import inspect
import io
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import bound_cost
import certified_accuracy
import counterfactuals
import curves
import frontier
import gradient_depth
import keras
import layer_cost
import memory
import numpy as np
import peer_recipes
import peers
import price_of_rigour
import projection_cost
import pytest
import step_cost
import timing

import hkr_keras as hkr
from hkr_keras import linalg, margins

pytestmark = pytest.mark.once

OPTIONS = ["--dataset=digits", "--model=mlp", "--epochs=1", "--batch=32", "--rate=1e-2", "--verbose=0"]


def test_certified_accuracy(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["certified_accuracy.py", *OPTIONS, "--json", str(out)])
    certified_accuracy.main()
    assert "certified 0.141" in capsys.readouterr().out
    (result,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0.5 < result["certified_0.141"] < result["clean"] <= 1
    assert result["dataset"] == "digits"


def test_attacked_accuracy_is_above_the_certified_one(tmp_path):
    options = [*OPTIONS, "--attack=8", "--shift=1", "--flip", "--blend=0.5", "--contrast=0.2", "--held-out"]
    result = certified_accuracy.run(certified_accuracy.parsed([*options, f"--save={tmp_path / 'model.keras'}"]))
    for epsilon in ("0.141", "0.25", "0.5", "1"):
        assert 0 <= result[f"attacked_{epsilon}"] <= 1
    model = keras.models.load_model(tmp_path / "model.keras")
    x, y = (getattr(certified_accuracy.held_out(hkr.datasets.load("digits")), name) for name in ("x_test", "y_test"))
    assert hkr.certify(model, x, verbose=0).accuracy(y) == result["clean"]


def test_tables_of_recipes(tmp_path, monkeypatch, capsys):
    shares = {"clean": 0.9, "certified_0.141": 0.8, "certified_0.5": 0.5}
    common = {
        "dataset": "smiles",
        "recipe": "smiles",
        "layers": "F 8",
        "loss": "binary_hkr",
        "alpha": 20.0,
        "margin": 0.5,
    }
    costs = {"mean_radius": 0.5, "epochs": 8, "cpu_seconds": 100.4, "seconds": 60.0, "machine": "2 x x86_64 CPU cores"}
    lines = [{**common, **shares, **costs}, {**common, **shares, **costs, "clean": 0.92, "seed": 1}]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run_main(certified_accuracy, monkeypatch, "--show", path)
    printed = capsys.readouterr().out
    assert "| recipe | network | loss | seeds | clean | at 36/255 | at 0.5 |" in printed
    assert (
        "| smiles | `F 8` | `HKR(20, 0.5)` | 2 | 91.0 (2.0) | 80.0 (0.0) | 50.0 (0.0) | 0.500 (0.000) | 8 | 100 | 60 |"
        in printed
    )


def test_the_page_of_results_holds_the_tables_of_recipes():
    folder = certified_accuracy.HERE
    results = [json.loads(line) for line in (folder / "results" / "recipes.jsonl").read_text().splitlines()]
    page = (folder.parent / "docs" / "results.md").read_text()
    assert all(table in page for table in certified_accuracy.markdown(results).split("\n\n"))


def test_held_out_inputs_are_a_tenth_of_the_training_inputs():
    data = hkr.datasets.load("digits")
    parts = certified_accuracy.held_out(data)
    assert len(parts.x_test) == len(data.x_train) // 10
    together = np.concatenate([parts.x_train, parts.x_test])
    assert np.array_equal(np.sort(together.sum((1, 2, 3))), np.sort(data.x_train.sum((1, 2, 3))))


@pytest.mark.parametrize("name", certified_accuracy.RECIPES)
def test_recipes_build_networks_for_their_data(name):
    options = certified_accuracy.parsed([f"--recipe={name}", "--seed=3"])
    shape = {"cifar10": (32, 32, 3), "smiles": (64, 64, 1)}.get(options.dataset, (28, 28, 1))
    assert options.seed == 3
    assert certified_accuracy.parsed([f"--recipe={name}", "--epochs=2"]).minutes == 0
    if name != "cifar10_gpu":  # large
        outputs = 1 if options.loss == "binary_hkr" else 10
        assert certified_accuracy.network(options, shape, 10).output_shape == (None, outputs)


def test_training_by_the_clock_ends_in_time():
    result = certified_accuracy.run(certified_accuracy.parsed([*OPTIONS, "--minutes=0.02"]))
    assert result["epochs"] >= 1
    assert result["seconds"] < 20


def test_reflectors_and_projections_in_turns():
    options = ["--layers=F 8 R8", "--every=2", "--optimizer=stiefel_muon", "--block=4", "--head=orthonormal"]
    options = certified_accuracy.parsed([*OPTIONS, *options])
    dense, reflector = certified_accuracy.network(options, (8, 8, 1), 10).layers[1::2][:2]
    assert dense.kernel_constraint.every == 2
    assert isinstance(reflector, hkr.layers.ReflectorDense)
    assert certified_accuracy.run(options)["bound"] <= 1 + 1e-5


def test_augmentation_moves_and_mirrors():
    keras.utils.set_random_seed(0)
    x = np.zeros((64, 5, 5, 1), "float32")
    x[:, 2, 1] = 1.0

    def changed(**values):
        options = certified_accuracy.parsed([f"--{name}={value}" for name, value in values.items()])
        options.flip = not values
        model = certified_accuracy.training_model(options, keras.layers.Identity(), x)
        return keras.ops.convert_to_numpy(model(np.arange(64, dtype="int32"), training=True))[..., 0]

    assert set(np.argwhere(changed())[:, 2].tolist()) == {1, 3}
    moved = changed(shift=1)
    assert {tuple(place) for place in np.argwhere(moved)[:, 1:].tolist()} == {
        (i, j) for i in (1, 2, 3) for j in range(3)
    }
    blended = changed(blend=0.5)
    np.testing.assert_allclose(blended.sum((1, 2)), 1, rtol=1e-6)
    assert np.all(blended[:, 2, 1] >= 0.5)
    assert len({tuple(place) for place in np.argwhere(blended)[:, 1:].tolist()}) == 9
    factors = changed(contrast=0.2)[:, 2, 1]
    assert 0.8 <= factors.min() < 0.9 < 1.1 < factors.max() <= 1.2


def test_a_judge_of_counterfactuals(tmp_path, monkeypatch, capsys):
    out = tmp_path / "judge.jsonl"
    arguments = ("--ordinary-epochs", 3, "--count", 20, "--t", 2, "--json", out, "--epochs=3")
    run_main(counterfactuals, monkeypatch, *OPTIONS, *arguments)
    assert "counterfactual, t = 2" in " ".join(capsys.readouterr().out.split())
    beyond, moved, equal = [json.loads(line) for line in out.read_text().splitlines()]
    assert (beyond["kind"], moved["kind"]) == ("ordinary, own boundary", "counterfactual, t = 2")
    assert min(beyond["itself"], moved["itself"]) > 0.5  # some cross the boundary to another class first
    assert 0 < beyond["distance"] < equal["distance"] <= moved["distance"] * 1.001
    assert all(0 <= line["judge"] <= 1 and line["images"] <= 20 for line in (beyond, moved, equal))


def test_robustness_beside_ordinary_and_adversarial_training(tmp_path, monkeypatch):
    out = tmp_path / "robustness.jsonl"
    arguments = ("--robustness", "--ordinary-epochs", 1, "--count", 8, "--steps", 5, "--epsilons", 0.25, "--json", out)
    run_main(counterfactuals, monkeypatch, *OPTIONS, *arguments)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["HKR", "cross-entropy", "adversarial training at 0.5"]
    for line in lines:
        assert line["certified_0.25"] <= min(line["PGD_0.25"], line["C&W_0.25"]) <= line["clean"]


@pytest.mark.parametrize("name", ["cnn", "lenet"])
def test_bound_cost(name):
    result = bound_cost.measure(name, rounds=1)
    assert result["bound"] > 0
    assert 0 < result["seconds"] < np.inf


def test_price_of_rigour():
    ((exact, _), (rigorous, _)), y = price_of_rigour.certificates("digits MLP 256-128-64, HKR", seed=0, epochs=1)
    assert rigorous.accuracy(y, 0.1) <= exact.accuracy(y, 0.1)
    assert np.all(rigorous.radius <= exact.radius)


@pytest.mark.parametrize("head", peers.FACTORS)
def test_claims_of_the_peer_are_those_of_its_head(head):
    logits, labels = np.random.default_rng(0).normal(size=(200, 10)), np.random.default_rng(1).integers(0, 10, 200)
    tensors = keras.ops.convert_to_tensor(labels), keras.ops.convert_to_tensor(logits.astype("float32"))
    radius = keras.ops.convert_to_numpy(margins.certified_radius(*tensors, head=head))
    claims = peers.claimed(logits, labels, head)
    assert claims["clean"] == (radius > 0).mean()
    for epsilon in peers.EPSILONS:
        assert claims[f"certified_{epsilon:.3g}"] == (radius > epsilon).mean()
    assert claims["mean_radius"] == pytest.approx(np.maximum(radius, 0).mean(), rel=1e-5)


def test_claims_of_one_score_are_its_size():
    scores, labels = np.array([[0.3], [-0.1], [0.6]]), np.array([1, 0, 0])
    for head in peers.FACTORS:
        claims = peers.claimed(scores, labels, head, (0.2,))
        assert (claims["clean"], claims["certified_0.2"]) == (2 / 3, 1 / 3)
        assert claims["mean_radius"] == pytest.approx(0.4 / 3)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
@pytest.mark.parametrize("loss", ["crossentropy", "log_sum_exp_hkr", "binary_hkr"])
def test_losses_of_peers_are_those_of_the_recipes(loss, framework):
    torch = pytest.importorskip("torch")  # before TensorFlow
    options = certified_accuracy.parsed([f"--loss={loss}", "--alpha=7", "--margin=0.3", "--temperature=4"])
    rng, outputs = np.random.default_rng(0), 1 if loss == "binary_hkr" else 10
    scores, labels = rng.normal(size=(50, outputs)).astype("float32"), rng.integers(0, max(2, outputs), 50)
    if framework == "tensorflow":
        pytest.importorskip("tensorflow")
        peer = peer_recipes.tensorflow_loss(options, scores, labels)
    else:
        peer = peer_recipes.torch_loss(options, torch.from_numpy(scores), torch.from_numpy(labels))
    own = keras.ops.convert_to_numpy(certified_accuracy.LOSSES[loss](options)(labels, scores))
    assert float(peer) == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_images_of_peers_are_mirrored_and_moved(framework):
    torch = pytest.importorskip("torch")  # before TensorFlow
    x = np.zeros((64, 1, 5, 6), "float32")
    x[:, :, 2, 1] = 1.0
    if framework == "tensorflow":
        tf = pytest.importorskip("tensorflow")
        tf.random.set_seed(0)

        def changed(*settings):
            return np.moveaxis(peer_recipes.tensorflow_augmented(tf.constant(np.moveaxis(x, 1, -1)), *settings), -1, 1)

    else:
        torch.manual_seed(0)

        def changed(*settings):
            return peer_recipes.augmented(torch.from_numpy(x), *settings).numpy()

    assert set(np.argwhere(changed(True, 0))[:, 3]) == {1, 4}
    moved = changed(False, 1)
    assert moved.shape == x.shape
    assert {tuple(place) for place in np.argwhere(moved)[:, 2:]} == set(itertools.product((1, 2, 3), (0, 1, 2)))


def test_networks_of_deel_lip_are_certified_in_keras(tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(8)
    images = {f"x_{part}": rng.integers(0, 256, (8, 4, 4, 3), "uint8") for part in ("train", "test")}
    np.savez(tmp_path / "data.npz", **images, y_train=labels, y_test=labels)
    arguments = ["--recipe=cifar10", "--layers=P F", f"--data={tmp_path / 'data.npz'}"]
    options = SimpleNamespace(**vars(certified_accuracy.parsed(arguments)), peer="deel-lip")
    weights = [rng.normal(size=shape).astype("float32") for shape in ((48, 10), (10,))]
    parts = images["x_test"].reshape(8, 2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 48)
    result = peer_recipes.proven(options, weights, parts / np.float32(255) @ weights[0] + weights[1])
    assert result["proven_bound"] == pytest.approx(np.linalg.norm(weights[0], 2), rel=1e-4)


@pytest.mark.parametrize("peer", ["orthogonium", "deel-torchlip"])
def test_networks_of_peers_are_certified_in_keras(peer, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")

    class Sorted(torch.nn.Module):
        def forward(self, x):
            pairs = x.unflatten(1, (2, -1) if peer == "orthogonium" else (-1, 2))
            axis = 1 if peer == "orthogonium" else 2
            return pairs.sort(axis, descending=peer == "orthogonium").values.flatten(1, 2)

    monkeypatch.setattr(peer_recipes, "torch_layers", lambda *_: (torch.nn.Conv2d, torch.nn.Linear, Sorted))
    rng, labels = np.random.default_rng(0), np.arange(40) % 10
    images = {f"x_{part}": rng.integers(0, 256, (40, 8, 8, 3), "uint8") for part in ("train", "test")}
    np.savez(tmp_path / "data.npz", **images, y_train=labels, y_test=labels)
    arguments = ["--recipe=cifar10", "--layers=P P 8 F 12", "--batch=16", f"--data={tmp_path / 'data.npz'}"]
    settings = {"peer": peer, "projection": "default", "cpu_seconds": 0.05, "out": str(tmp_path / "out.npz")}
    options = SimpleNamespace(**vars(certified_accuracy.parsed(arguments)), **settings)
    threads = torch.get_num_threads()
    try:
        peer_recipes.train_recipe(options)
    finally:
        torch.set_num_threads(threads)
    stored = dict(np.load(options.out))
    weights = [stored[f"arr_{i}"] for i in range(len(stored) - 2)]
    assert json.loads(str(stored["figures"]))["steps"] >= 1
    result = peer_recipes.proven(options, weights, stored["logits"])
    norms = [np.linalg.norm(kernel.reshape(len(kernel), -1), 2) for kernel in weights[::2]]
    assert result["proven_bound"] < 3.001 * np.prod(norms)  # a 3 x 3 kernel sees a pixel at most nine times
    x, scores = images["x_test"].reshape(40, -1) / 255, stored["logits"]
    slopes = np.linalg.norm(scores[1:] - scores[:-1], axis=1) / np.linalg.norm(x[1:] - x[:-1], axis=1)
    assert slopes.max() < result["proven_bound"]
    with pytest.raises(RuntimeError, match="Expected the logits of the peer"):
        peer_recipes.proven(options, weights, stored["logits"] + 0.01)


def test_the_page_of_results_holds_the_tables_of_peers():
    folder = certified_accuracy.HERE
    files = (folder / "results" / name for name in ("peers.jsonl", "recipes.jsonl"))
    results, own = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    page = (folder.parent / "docs" / "results.md").read_text()
    assert peer_recipes.recipe_tables(results, own) in page


def test_the_peer_needs_an_old_python(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path / "peers")
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(SystemExit, match=r"Expected Python 3\.9 to 3\.11"):
        peers.interpreter()
    assert not (tmp_path / "peers").exists()


@pytest.mark.parametrize("network", frontier.SETTINGS)
def test_frontier_of_stored_results(network, tmp_path, capsys):
    results = frontier.read(frontier.RESULTS)
    rows = frontier.summarise(results, (0, 1, 2), network)
    assert {row["library"] for row in rows} == set(frontier.SETTINGS[network])
    for row in rows:
        assert 1 <= len(row["runs"]) <= 3
        for run in row["runs"]:
            figures = [run["clean"], *(run[f"certified_{epsilon:.3g}"] for epsilon in frontier.EPSILONS)]
            assert all(a > b for a, b in itertools.pairwise(figures))
            assert run["machine"]
            assert run["versions"]
    image = tmp_path / "frontier.png"
    frontier.draw(rows, image)
    assert image.stat().st_size > 10_000
    frontier.show(rows)
    assert "deel-lip" in capsys.readouterr().out


@pytest.mark.parametrize("network", frontier.SETTINGS)
def test_the_tables_of_the_documentation_are_those_of_the_results(network):
    rows = frontier.summarise(frontier.read(frontier.RESULTS), (0, 1, 2), network)
    assert frontier.markdown(rows) in (frontier.HERE.parent / "docs" / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="the frontier is trained with TensorFlow")
def test_frontier_runs_what_is_missing(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    setting = {"dataset": "digits", "model": "mlp", "loss": "crossentropy", "temperature": 5.0, "epochs": 1}
    frontier.train("hkr_keras", setting, 3, results)
    (result,) = frontier.read(results)
    assert frontier.matches(result, "hkr_keras", setting, 3)
    assert not frontier.matches(result, "hkr_keras", setting, 4)
    assert not frontier.matches(result, "deel-lip", setting, 3)


def test_the_recipe_of_colour_images_runs(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.random((64, 8, 8, 3), dtype="float32"), rng.integers(0, 10, 64)
    data = hkr.datasets.Dataset(name="cifar10", x_train=x, y_train=y, x_test=x[:32], y_test=y[:32], classes=10)
    monkeypatch.setattr(hkr.datasets, "load", lambda name, seed: data)
    arguments = ["--recipe=cifar10", "--layers=P 8 C8 P F 16", "--epochs=1", "--batch=32", "--verbose=0"]
    result = certified_accuracy.run(certified_accuracy.parsed(arguments))
    assert result["certified_0.141"] <= result["clean"]
    assert result["bound"] < 1.5


def test_curves_of_stored_networks_beside_published_points(tmp_path, monkeypatch):
    data = hkr.datasets.load("digits")
    np.savez(tmp_path / "data.npz", x_train=data.x_train, y_train=data.y_train, x_test=data.x_test, y_test=data.y_test)
    hkr.models.lipschitz_mlp((8, 8, 1), 10, widths=(16,)).save(tmp_path / "mnist.keras")
    image = tmp_path / "curves.png"
    files = ["--data", tmp_path / "data.npz", "--models", tmp_path / "mnist.keras", "--image", image]
    run_main(curves, monkeypatch, "mnist", *files)
    assert image.stat().st_size > 10_000


def test_gradients_of_a_deep_orthogonal_net_do_not_vanish():
    norms = {}
    for name in ("OrthogonalConv2D, circular", "LipschitzConv2D"):
        keras.utils.set_random_seed(0)
        model, blocks = gradient_depth.network(name, 24)
        images = np.random.default_rng(0).random((2, 8, 8, 1), dtype="float32")
        norms[name] = gradient_depth.gradient_norms(model, blocks, images)
    np.testing.assert_allclose(norms["OrthogonalConv2D, circular"], 1, atol=1e-3)  # float32, 24 layers
    assert norms["LipschitzConv2D"][0] < 1e-6


def test_minima_are_interleaved_and_each_clock_keeps_its_own():
    readings = {"a": [3.0, 1.0, 2.0], "b": [5.0, 6.0, 4.0]}
    order = []

    def clock(name):
        return lambda: order.append(name) or readings[name][order.count(name) - 1]

    assert timing.interleaved({name: clock(name) for name in readings}, 3) == {"a": 1.0, "b": 4.0}
    assert order == ["a", "b"] * 3


def test_a_stopwatch_tells_milliseconds_of_one_call(monkeypatch):
    moments = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: sum(moments)))
    clock = timing.stopwatch(moments.append, 2.0**-8, least=2.0**-6)
    assert clock() == 1e3 * 2.0**-8
    assert len(moments) - 1 == 2 + 4  # one to compile, one to see how many fill the time


def test_peak_memory_is_that_of_this_process_and_not_of_its_parent():
    before = timing.peak_memory()
    block = np.ones(2**24)
    assert timing.peak_memory() >= max(before, block.nbytes / 2**20)
    code = f"import resource, sys\n{inspect.getsource(timing.peak_memory)}\nprint(peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(child) < 100 < timing.peak_memory()


def run_main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


@pytest.mark.parametrize("size", [(12, 5), (5, 12), (3, 6, 4)])
def test_projection_cost_times_a_projection_and_its_two_products(size):
    w = projection_cost.polar_direction(*(1, *size)[-3:])
    np.testing.assert_allclose(np.linalg.svd(w, compute_uv=False), 1, atol=5e-3)  # an ordinary step
    products = keras.ops.convert_to_numpy(projection_cost.products(keras.ops.convert_to_tensor(w)))
    np.testing.assert_allclose(products, w @ (w.swapaxes(1, 2) @ w), atol=1e-5)
    projected = timing.compiled(linalg.newton_schulz)(keras.ops.convert_to_tensor(w))
    projected = keras.ops.convert_to_numpy(projected)
    np.testing.assert_allclose(np.linalg.svd(projected, compute_uv=False), 1, atol=5e-5)
    assert projection_cost.gflop(*(1, *size)[-3:]) == 4e-9 * np.prod(size) * min(size[-2:])


def test_projection_cost(tmp_path, monkeypatch, capsys):
    out = tmp_path / "cost.jsonl"
    run_main(
        *(projection_cost, monkeypatch, "--shapes", "16x16", "--peak", 32, "--rounds", 1, "--markdown", "--json", out),
        *("--plot", tmp_path / "cost.png"),
    )
    assert (tmp_path / "cost.png").stat().st_size > 5_000
    assert "| 16x16 | 1.64e-05 |" in capsys.readouterr().out
    shape, limits = [json.loads(line) for line in out.read_text().splitlines()]
    assert min(shape["floor"], shape["projection"], limits["matmul"], limits["call"]) > 0
    assert shape["backend"] == keras.backend.backend()


@pytest.mark.parametrize("name", ["GroupSort(2)", "Householder", "L2NormPooling2D", "InvertibleDownsampling2D"])
def test_forward_and_backward_of_a_layer_are_both_computed(name):
    layer = {**layer_cost.ACTIVATIONS, **layer_cost.POOLINGS}[name]()
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype("float32")
    y = keras.ops.convert_to_numpy(layer(x))
    dy = np.random.default_rng(1).normal(size=y.shape).astype("float32")
    output, gradients = layer_cost.forward_and_backward(layer)(*map(keras.ops.convert_to_tensor, (x, dy)))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(output), y, atol=1e-6)
    leaves = [keras.ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(gradients)]
    assert len(leaves) == 1 + len(layer.trainable_variables)
    (of_x,) = [leaf for leaf in leaves if leaf.shape == x.shape]
    np.testing.assert_allclose(np.linalg.norm(of_x), np.linalg.norm(dy), rtol=1e-5)  # these layers keep norms
    assert all(np.abs(leaf).max() > 0 for leaf in leaves)


def test_layer_cost(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(layer_cost, "ACTIVATIONS", {name: layer_cost.ACTIVATIONS[name] for name in ("ReLU", "MaxMin")})
    out = tmp_path / "cost.jsonl"
    run_main(layer_cost, monkeypatch, "--shapes", "4x8", "--rounds", 1, "--json", out, "--plot", tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 5_000
    assert "MaxMin" in capsys.readouterr().out
    relu, max_min = [json.loads(line) for line in out.read_text().splitlines()]
    assert relu["bytes"] == max_min["bytes"] == 4 * 4 * 32
    assert relu["floor"] == max_min["floor"] > 0 < min(relu["ms"], max_min["ms"])


@pytest.mark.parametrize("name", step_cost.NETWORKS)
def test_networks_of_the_step_cost_have_equal_sizes(name):
    plain, ours, deferred = (step_cost.build(name, *arguments) for arguments in ((False,), (True,), (True, 4, True)))
    assert plain.output_shape == ours.output_shape == deferred.output_shape
    kinds = [type(getattr(kernel, "constraint", None)).__name__ for kernel in deferred.trainable_variables]
    assert ("DeferredOrthonormal" in kinds) == (name not in ("cnn_relu", "all_reflectors"))
    assert "Orthonormal" not in kinds
    if name in ("mlp", "cnn", "cnn_relu"):
        assert plain.count_params() == ours.count_params()
    if name == "cnn_relu":
        assert {type(layer) for layer in ours.layers} - {type(layer) for layer in plain.layers} == {
            hkr.layers.GroupSort
        }


def test_step_cost_with_projections_every_few_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step_cost.NETWORKS, "mlp", little)
    projected = []
    projection = hkr.constraints.projection

    def counted(kernels):
        run = projection(kernels)
        return lambda: projected.append(len(kernels)) or run()

    monkeypatch.setattr(hkr.constraints, "projection", counted)
    out, image = tmp_path / "cost.jsonl", tmp_path / "overhead.png"
    arguments = (
        "--only",
        "mlp",
        "--batch",
        4,
        "--rounds",
        1,
        "--every",
        3,
        "--deferred",
        "--optimizer",
        "stiefel_muon",
        "--samples",
        32,
    )
    run_main(step_cost, monkeypatch, *arguments, "--json", out, "--plot", image)
    assert "optimizer stiefel_muon, jit auto, every 3, deferred True" in " ".join(capsys.readouterr().out.split())
    (line,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (line["every"], line["batch"]) == (3, 4)
    assert min(line["plain"], line["lipschitz"]) > 0
    assert image.stat().st_size > 5_000
    assert projected == [1] * 6  # two epochs of nine steps


def little(lipschitz, constraint=None):
    dense = hkr.layers.LipschitzDense(10, kernel_constraint=constraint) if lipschitz else keras.layers.Dense(10)
    return keras.Sequential([keras.Input((6,)), dense])


def test_memory(monkeypatch, capsys):
    monkeypatch.setitem(step_cost.NETWORKS, "mlp", little)
    found = memory.measure("mlp", 2**14, lipschitz=True)
    data = memory.STEPS * 2**14 * 6 * 4 / 2**20
    assert found["peak"] > found["more"] >= 0
    assert found["peak"] > data
    monkeypatch.setattr(memory, "in_a_process", lambda name, batch, kind, rounds: {"peak": 100.0, "more": 40.0})
    run_main(memory, monkeypatch, "--only", "mlp", "--batch", 8, "--markdown")
    assert "| mlp | 8 | 100 | 100 | 40 | 40 | 1.00 |" in capsys.readouterr().out


@pytest.mark.parametrize(("library", "name"), [("plain Keras", "mlp"), ("hkr_keras", "frontier")])
def test_a_process_answers_every_line_with_the_time_of_a_step(library, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    peers.serve_steps(library, name, batch=8, count=1)
    first, second = map(float, capsys.readouterr().out.split())
    assert min(first, second) > 0


def test_steps_of_a_peer_beside_ours_and_plain_keras(tmp_path, monkeypatch, capsys):
    milliseconds = {"plain Keras": 2.0, "hkr_keras": 3.0, "deel-torchlip": 10.0}
    monkeypatch.setattr(peers, "compare_steps", lambda *arguments: milliseconds)
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    out, image = tmp_path / "steps.jsonl", tmp_path / "steps.png"
    steps = ("--steps", "--peer", "deel-torchlip", "--network", "mlp")
    run_main(peers, monkeypatch, *steps, "--markdown", "--json", out, "--plot", image)
    assert "| mlp | 2.0 (1.00) | 3.0 (1.50) | 10.0 (5.00) |" in capsys.readouterr().out
    assert json.loads(out.read_text())["milliseconds"] == milliseconds
    assert image.stat().st_size > 5_000
