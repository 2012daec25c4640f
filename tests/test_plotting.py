"""Pictures: what is drawn is what was found."""

import dataclasses

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest

import hkr_keras as hkr
from hkr_keras import plotting
from hkr_keras.attacks import Robustness
from hkr_keras.models import lipschitz_mlp
from hkr_keras.plotting import plot_field, plot_image_rows, plot_robustness

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def robustness():
    radius, distance = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.2, 0.2, np.inf, 0.5])
    right = np.array([True, True, True, False])
    epsilons = np.array([0.15, 0.25])
    certified = np.array([0.5, 0.25])
    rows = {"is_correct": right, "radius": radius, "distance": distance, "adversarial": radius[:, None]}
    attacked = np.array([0.75, 0.25])
    return Robustness(epsilons=epsilons, clean=0.75, certified=certified, attacked=attacked, **rows)


def test_both_curves_are_those_of_the_result():
    found = robustness()
    ax = plot_robustness(found, largest=0.6)
    upper, lower = (line for line in ax.lines if len(line.get_xdata()) > 1)
    for line, values in ((lower, found.certified), (upper, found.attacked)):
        x, y = line.get_data()
        assert [y[np.searchsorted(x, epsilon)] for epsilon in found.epsilons] == values.tolist()
    assert {text.get_text() for text in ax.texts} == {"50.0%", "25.0%", "75.0%"}
    assert ax.get_xlim() == (0.0, 0.6)
    assert (lower.get_ydata() <= upper.get_ydata()).all()


def test_rows_of_images():
    rows = [np.zeros((3, 8, 8, 1)), np.ones((3, 8, 8)), np.random.default_rng(0).random((3, 8, 8, 3))]
    axes = plot_image_rows(rows, [["a", "b", "c"], None, None], names=["zeros", "ones", "colour"])
    assert axes.shape == (3, 3)
    assert [ax.get_title() for ax in axes[0]] == ["a", "b", "c"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["zeros", "ones", "colour"]
    np.testing.assert_array_equal(axes[1, 2].images[0].get_array(), np.ones((8, 8)))
    assert axes[0, 0].images[0].get_clim() == (0.0, 1.0)
    signed = plot_image_rows([np.full((1, 8, 8), -3.0)], symmetric=True)
    assert signed[0, 0].images[0].get_clim() == (-3.0, 3.0)


@pytest.fixture
def certificate():
    """Of five inputs and three classes: radii 1, 2, 3, 4, 0.5 (times the root of 2), the last one predicted as 1."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Identity()])
    x = np.array([[2, 0, 0], [0, 4, 0], [0, 6, 0], [0, 0, 8], [0, 1, 0]], "float32")
    found = hkr.certify(model, x, verbose=0)
    np.testing.assert_allclose(found.radius, np.array([1, 2, 3, 4, 0.5]) * np.sqrt(2), rtol=1e-5)
    return found


Y = [0, 1, 1, 2, 0]


def test_histograms_count_right_and_wrong_radii_of_every_class(certificate):
    ax = plotting.plot_radii(certificate, Y, bins=8, names=["a", "b", "c"])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b", "c"]
    stairs = [patch.get_data() for patch in ax.patches]  # right and wrong of a, right and wrong of b, ...
    np.testing.assert_allclose(stairs[0].edges, np.linspace(0, certificate.radius.max(), 9))
    counts = [np.abs(data.values - data.baseline).round(9) / plotting._ROW for data in stairs]
    for i, data in enumerate(stairs):
        expected, _ = np.histogram(certificate.radius[np.array(Y) == i // 2], data.edges)
        own = counts[i - i % 2] + counts[i - i % 2 + 1]
        np.testing.assert_allclose(own, expected)
    assert counts[0].sum() == counts[1].sum() == 1
    assert np.argmax(counts[1]) < np.argmax(counts[0])  # 0.5 against 1
    assert counts[3].sum() == counts[5].sum() == 0
    assert (stairs[0].values <= 0).all()  # the axis points downwards: right ones are above the line of their row
    assert (stairs[1].values >= 0).all()


def test_infinite_radii_are_drawn_with_the_largest():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    model.layers[0].kernel.assign([[1.0, 0.0], [0.0, 0.0]])
    found = hkr.certify(model, np.ones((2, 2), "float32"), verbose=0)
    infinite = dataclasses.replace(found, radius=np.array([np.inf, 1.0]))
    ax = plotting.plot_radii(infinite, [0, 0])
    assert ax.get_xlim() == (0.0, 1.0)
    assert ax.patches[0].get_data().values.min() == pytest.approx(-plotting._ROW)


def test_the_confusion_holds_what_is_proven(certificate):
    ax = plotting.plot_certified_confusion(certificate, Y, epsilon=1.0, names=["a", "b", "c"])
    shares = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(shares, [[0.5, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0]])
    assert (np.diag(shares[:, :3]) * [2, 2, 1]).sum() / 5 == certificate.accuracy(Y, 1.0)
    assert {text.get_text() for text in ax.texts} == {"50", "100", "→50"}
    (turn,) = (text for text in ax.texts if text.get_text() == "→50")
    (index,) = np.flatnonzero((certificate.radius <= 1.0) & (np.array(Y) == 0))
    assert turn.get_position() == (certificate.rival[index], 0)
    without = plotting.plot_certified_confusion(dataclasses.replace(certificate, rival=None), Y, epsilon=1.0)
    assert {text.get_text() for text in without.texts} == {"50", "100"}
    stuck = plotting.plot_certified_confusion(certificate, Y, epsilon=0.5).images[0].get_array()
    np.testing.assert_allclose(stuck[0], [0.5, 0.5, 0, 0])  # a wrong prediction that no small change puts right


def confusion(certificate, y, names=None):
    return plotting.plot_certified_confusion(certificate, y, 1.0, names=names)


@pytest.mark.parametrize("plot", [plotting.plot_radii, confusion])
def test_errors_of_pictures_by_class(plot, certificate):
    with pytest.raises(ValueError, match=r"one name for each of 3 classes\. Received: 2 names"):
        plot(certificate, Y, names=["a", "b"])
    with pytest.raises(ValueError, match="Expected 5 labels"):
        plot(certificate, Y[:3])
    many = hkr.certify(lipschitz_mlp((4,), 40, widths=()), np.ones((2, 4), "float32"), verbose=0)
    with pytest.raises(ValueError, match=r"at most 30 classes, a row for each\. Received: 40 classes"):
        plot(many, [0, 1])


def test_a_negative_distance_is_refused(certificate):
    with pytest.raises(ValueError, match="Received: epsilon=-1"):
        plotting.plot_certified_confusion(certificate, Y, epsilon=-1)


def test_curves_share_axes(certificate):
    ax = plotting.plot_certified_accuracy(certificate, Y, label="a", marks=(), fill=False)
    assert not ax.collections
    plotting.plot_certified_accuracy(certificate, Y, ax=ax, label="b", marks=(1.0,))
    assert len(ax.collections) == 1
    assert [text.get_text() for text in ax.texts] == ["80.0% at 1"]
    assert ax.get_xlim()[1] > certificate.radius.max()


def test_the_summary_is_drawn_as_it_is():
    layers = [keras.layers.Dense(4, use_bias=False, name="first"), hkr.layers.LipschitzDense(2, name="second")]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.layers[0].kernel.assign(100 * np.eye(4))
    summary = hkr.lipschitz_summary(model, print_fn=None)
    ax = plotting.plot_summary(summary)
    assert ax.get_xscale() == "log"
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first", "second", "model"]
    marks = next(line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 3)
    np.testing.assert_allclose(marks, [*(row.bound for row in summary.rows), summary.bound])
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(ends, [*(row.lower for row in summary.rows), summary.lower])
    assert plotting.plot_summary(lipschitz_mlp((4,), 2, widths=(4,))).get_xscale() == "linear"


def test_singular_values_are_those_of_the_summary():
    model = lipschitz_mlp((4,), 2, widths=(4,))
    rows = [row for row in hkr.lipschitz_summary(model, print_fn=None).rows if row.sigma_max is not None]
    ax = plotting.plot_singular_values(model)
    assert [text.get_text() for text in ax.get_yticklabels()] == [row.layer for row in rows]
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [rows[0].sigma_min, rows[0].sigma_max])
    assert list(ax.lines[1].get_xdata()) == [rows[0].bound]


POINTS = np.random.default_rng(0).normal(size=(10, 2)).astype("float32")


@pytest.mark.parametrize("circles", [0, 3])
def test_fields_have_as_many_circles_as_asked_for(circles):
    model = lipschitz_mlp((2,), 1, widths=(4,))
    ax = plot_field(model, POINTS, np.arange(10) % 2, circles=circles, names=["in", "out"])
    radii = hkr.certify(model, POINTS[:3], verbose=0).radius
    np.testing.assert_allclose([patch.radius for patch in ax.patches], radii[:circles], rtol=1e-5)
    names = {text.get_text() for text in ax.get_legend().get_texts()}
    assert names == {"in", "out", *(["centre of a circle"] if circles else [])}


def test_labels_of_fields_say_what_the_score_is():
    model = lipschitz_mlp((2,), 1, widths=(4,))
    labels = np.arange(10) % 2

    def label(field):
        return field.figure.axes[-1].get_ylabel()

    assert label(plot_field(model, POINTS, labels)) == "score f(x) = certified distance"
    without = plot_field(model, POINTS, labels, boundary=False)
    assert label(without) == "score f(x), up to a constant"
    assert not without.patches
    model.add(hkr.layers.Scale(2.0))
    assert label(plot_field(model, POINTS, labels)) == "score f(x)"


@pytest.mark.parametrize(("size", "step"), [(0.12, 0.2), (0.2, 0.2), (0.021, 0.05), (3.0, 5.0), (60.0, 100.0)])
def test_steps_are_round(size, step):
    assert plotting._round_step(size) == pytest.approx(step)


def test_text_is_legible_in_dark_styles(certificate):
    with plt.style.context("dark_background"):
        ax = plotting.plot_certified_accuracy(certificate, Y, marks=(1.0,))
        assert ax.texts[0].get_color() == "white"


@pytest.mark.parametrize("rows", [[], [np.zeros((2, 8, 8)), np.zeros((3, 8, 8))], [np.zeros((2, 8))]])
def test_rows_of_other_shapes_are_refused(rows):
    with pytest.raises(ValueError, match="Received: shapes"):
        plot_image_rows(rows)
