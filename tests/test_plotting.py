"""Pictures of robustness and of rows of images: what is drawn is what was found."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from hkr_keras.attacks import Robustness
from hkr_keras.models import lipschitz_mlp
from hkr_keras.plotting import plot_field, plot_image_rows, plot_robustness


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def robustness():
    radius, distance = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.2, 0.2, np.inf, 0.5])
    right = np.array([True, True, True, False])
    epsilons = np.array([0.15, 0.25])
    certified = np.array([0.5, 0.25])
    return Robustness(epsilons, 0.75, certified, np.array([0.75, 0.25]), right, radius, distance, radius[:, None])


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


@pytest.mark.parametrize("circles", [0, 3])
def test_fields_have_as_many_circles_as_asked_for(circles):
    x = np.random.default_rng(0).normal(size=(10, 2))
    ax = plot_field(lipschitz_mlp((2,), 1, widths=(4,)), x, np.arange(10) % 2, circles=circles)
    assert len(ax.patches) == circles


@pytest.mark.parametrize("rows", [[], [np.zeros((2, 8, 8)), np.zeros((3, 8, 8))], [np.zeros((2, 8))]])
def test_rows_of_other_shapes_are_refused(rows):
    with pytest.raises(ValueError, match="Received: shapes"):
        plot_image_rows(rows)
