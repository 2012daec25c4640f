"""Attacks beside certificates: distances that are known, witnesses of wrong certificates, every library and backend."""

import dataclasses
import weakref

import keras
import numpy as np
import pytest
from helpers import BACKEND, normal, to_numpy

import hkr_keras as hkr
from hkr_keras.attacks import ATTACKS, BrokenCertificate, as_logits, evaluate_robustness

EPSILONS = (0.1, 0.25, 0.5)


def linear(outputs=3, shape=(4,)):
    """Logits or a score of unit norm each; a bias keeps the predictions of small inputs from being ties."""
    model = hkr.models.lipschitz_mlp(shape, outputs, widths=())
    kernel, _ = model.layers[-1].get_weights()
    model.layers[-1].set_weights([kernel, np.linspace(0.05, 0.15, outputs).astype("float32")])
    return model


def images(n=4):
    return np.random.default_rng(0).random((n, 6, 6, 1)).astype("float32")


def predictions(model, x):
    return to_numpy(as_logits(model)(x)).argmax(axis=1)


def check(found, model, x):
    """What holds for every result."""
    assert (found.certified <= found.attacked).all()
    assert (found.attacked <= found.clean).all()
    assert (found.distance >= found.radius * (1 - 1e-5) - 1e-5 * np.linalg.norm(x.reshape(len(x), -1), axis=1)).all()
    reached = np.isfinite(found.distance)
    moves = (found.adversarial - x.astype("float64")).reshape(len(x), -1)[reached]
    np.testing.assert_allclose(np.linalg.norm(moves, axis=1), found.distance[reached], rtol=1e-9)
    assert (predictions(model, found.adversarial[reached]) != predictions(model, x)[reached]).all()
    assert np.isnan(found.adversarial[~reached]).all()


@pytest.mark.many
@pytest.mark.parametrize(("outputs", "attack"), [(1, "DeepFool"), (1, "DDN"), (1, "PGD"), (2, "DeepFool")])
def test_attacks_reach_the_radius_of_a_linear_model(outputs, attack):
    # The certificate of a linear model is exact, so the nearest change is at the radius. DeepFool goes straight to it;
    # PGD starts at random, and DDN changes its length in steps of 5 %.
    model, x = linear(outputs), normal((6, 4), scale=0.3)
    certificate = hkr.certify(model, x, verbose=0)
    epsilons = 1.01 * np.sort(certificate.radius)
    labels = certificate.prediction
    found = evaluate_robustness(model, x, labels, epsilons, [attack], bounds=None, verbose=False)
    check(found, model, x)
    np.testing.assert_allclose(found.distance, certificate.radius, rtol=0.1, atol=1e-5)
    assert found.attacked[-1] == 0.0


@pytest.mark.once
def test_accuracies_count_right_predictions_alone():
    model, x = linear(), normal((8, 4), scale=0.3)
    certificate = hkr.certify(model, x, verbose=0)
    labels = certificate.prediction.copy()
    labels[:2] = (labels[:2] + 1) % 3
    epsilon = float(np.median(certificate.radius))
    found = evaluate_robustness(model, x, labels, [epsilon], ["DeepFool"], certificate, bounds=None, verbose=False)
    assert found.clean == 0.75
    assert found.is_correct.tolist() == [False] * 2 + [True] * 6
    assert found.certified[0] == certificate.accuracy(labels, epsilon)
    assert found.attacked[0] == np.mean((found.distance > epsilon) & found.is_correct)


@pytest.mark.many
@pytest.mark.parametrize("name", [name for name in ATTACKS if not (name == "AutoPGD" and BACKEND == "jax")])
def test_every_attack_by_name(name):
    model, x = linear(shape=(6, 6, 1)), images()
    certificate = hkr.certify(model, x, verbose=0)
    epsilon = 4 * float(certificate.radius.max())
    found = evaluate_robustness(model, x, certificate.prediction, [epsilon], [name], steps=5, verbose=False)
    check(found, model, x)
    assert found.attacked[0] < 1.0
    reached = np.isfinite(found.distance)
    assert 0 <= found.adversarial[reached].min() <= found.adversarial[reached].max() <= 1


def test_attacks_of_foolbox_may_be_given():
    import foolbox

    model, x = linear(), normal((4, 4), scale=0.3)
    y = hkr.certify(model, x, verbose=0).prediction
    attack = foolbox.attacks.L2FastGradientAttack()
    check(evaluate_robustness(model, x, y, [2.0], [attack], bounds=None, verbose=False), model, x)


def test_one_score_as_logits_keeps_predictions_and_certificates():
    model, x = hkr.models.lipschitz_mlp((4,), 1, widths=(8,)), normal((16, 4))
    logits = as_logits(model)
    score, pair = (to_numpy(m.predict(x, verbose=0)) for m in (model, logits))
    np.testing.assert_array_equal(pair[:, 1] - pair[:, 0], score[:, 0])
    one, two = (hkr.certify(m, x, verbose=0) for m in (model, logits))
    np.testing.assert_array_equal(one.prediction, two.prediction)
    np.testing.assert_allclose(one.radius, two.radius, rtol=1e-6)
    flat = keras.Sequential([model, keras.layers.Reshape(())])
    flat.build((None, 4))
    np.testing.assert_array_equal(to_numpy(as_logits(flat).predict(x, verbose=0)), pair)
    several = linear()
    assert as_logits(several) is several


@pytest.mark.parametrize("rigorous", [False, True])
def test_a_wrong_certificate_is_refuted_by_a_witness(rigorous):
    model, x = linear(), normal((6, 4), scale=0.3)
    certificate = hkr.certify(model, x, verbose=0, rigorous=rigorous)
    radius = certificate.radius.copy()
    radius[4] *= 1.2
    wrong = dataclasses.replace(certificate, radius=radius)
    with pytest.raises(BrokenCertificate, match="Received: attack=DeepFool changed input 4 at distance=") as caught:
        evaluate_robustness(
            model, x, certificate.prediction, [0.1], ["DeepFool"], wrong, None, batch_size=3, verbose=False
        )
    error = caught.value
    assert (error.index, error.attack, error.radius) == (4, "DeepFool", radius[4])
    np.testing.assert_array_equal(error.x, x[4])
    assert np.linalg.norm(error.adversarial - x[4].astype("float64")) == pytest.approx(error.distance)
    assert error.distance < error.radius
    assert predictions(model, error.adversarial[None]) != predictions(model, x[4:5])


def test_a_certificate_of_another_model_is_refuted_at_once():
    model, x = linear(), normal((6, 4), scale=0.3)
    certificate = hkr.certify(model, x, verbose=0)
    other = dataclasses.replace(certificate, prediction=(certificate.prediction + 1) % 3)
    with pytest.raises(BrokenCertificate, match="at distance=0,"):
        evaluate_robustness(model, x, certificate.prediction, [0.1], ["DeepFool"], other, None, verbose=False)


@pytest.mark.once
def test_a_trained_network_lies_between_its_curves():
    data = hkr.datasets.load("digits")
    model = hkr.models.lipschitz_mlp((8, 8, 1), 10, widths=(64,))
    model.compile(keras.optimizers.Adam(1e-2), loss=hkr.losses.MulticlassHKR(alpha=100, margin=0.4))
    model.fit(data.x_train, data.y_train, epochs=8, verbose=0)
    x, y = data.x_test[:64], data.y_test[:64]
    found = evaluate_robustness(model, x, y, EPSILONS, ["DDN"], steps=15, verbose=False)
    check(found, model, x)
    assert found.clean > 0.85
    assert found.certified[0] > 0.8
    assert (found.attacked - found.certified)[0] <= 0.1
    assert found.adversarial.shape == x.shape


@pytest.mark.once
def test_the_progress_bar(capsys):
    model, x = linear(), normal((4, 4), scale=0.3)
    y = hkr.certify(model, x, verbose=0).prediction
    evaluate_robustness(model, x, y, [0.1], ["DeepFool"], bounds=None, batch_size=2, steps=2)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ["FGSM"]}, "one of PGD, DeepFool.*Received: FGSM"),
        ({"attacks": []}, r"attacks=\[\]"),
        ({"epsilons": []}, r"epsilons=\[\]"),
        ({"epsilons": [0.0]}, "Received: epsilon=0.0"),
        ({"bounds": (0.0, 1.0)}, r"which bounds=None takes away. Received: bounds=\(0.0, 1.0\)"),
        ({"attacks": ["Square"]}, "at least 5 x 5 pixels"),
        ({"y": [0]}, "Expected 4 labels"),
        *([({"attacks": ["AutoPGD"]}, "attack=AutoPGD on JAX")] if BACKEND == "jax" else []),
    ],
)
def test_errors(options, message):
    model, x = linear(), normal((4, 4), scale=0.3)
    arguments = {"y": [0, 1, 2, 0], "epsilons": [0.1], "attacks": ["DeepFool"], "bounds": None, "verbose": False}
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(model, x, **{**arguments, **options})


@pytest.mark.once
def test_a_stream_is_attacked_batch_by_batch():
    model, x = linear(), normal((7, 4), scale=0.3)
    y = np.arange(7) % 2
    alive = []

    def stream():
        for start in range(0, 7, 3):
            assert sum(reference() is not None for reference in alive) <= 1  # the batch before
            inputs = x[start : start + 3].copy()
            alive.append(weakref.ref(inputs))
            yield inputs, y[start : start + 3]

    options = {"epsilons": [0.2], "attacks": ["DeepFool"], "bounds": None, "verbose": False}
    found, expected = evaluate_robustness(model, stream(), None, **options), evaluate_robustness(model, x, y, **options)
    np.testing.assert_allclose(found.distance, expected.distance, rtol=1e-3)
    assert (found.is_correct == expected.is_correct).all()
    assert found.certified.tolist() == expected.certified.tolist()
    with pytest.raises(ValueError, match="Expected labels"):
        evaluate_robustness(model, (x for _ in range(2)), None, **options)
    with pytest.raises(ValueError, match=r"Expected 7 labels, one per input\. Received: 9"):
        evaluate_robustness(model, x, [0] * 9, **options)


@pytest.mark.once
def test_certificates_of_other_lengths_are_refused():
    model, x = linear(), normal((4, 4), scale=0.3)
    certificate = hkr.certify(model, x[:3], verbose=0)
    with pytest.raises(ValueError, match=r"a certificate of 4 inputs\. Received: one of 3"):
        evaluate_robustness(model, x, [0] * 4, [0.1], certificate=certificate, bounds=None, verbose=False)
