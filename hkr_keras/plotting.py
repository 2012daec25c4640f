"""Pictures: accuracy against the radius, frontiers, decision fields, rows of images, singular values.

Needs matplotlib: `pip install 'hkr_keras[plots]'`. Every function draws on `ax`, or on a new figure, and
returns the axes.
"""

import numpy as np

from hkr_keras.certification.certificates import Certificate, certify
from hkr_keras.certification.singular_values import kernel_spectrum
from hkr_keras.geometry import kernel_geometries

_INK, _BLUE, _ORANGE = "#222222", "#1f5fa8", "#d9622b"


def _axes(ax, **kwargs):
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'hkr_keras[plots]'") from error
    return plt.subplots(layout="constrained", **kwargs)[1]


def plot_certified_accuracy(certificate: Certificate, y, ax=None, label=None, color=_BLUE, marks=(0.1, 0.25, 0.5)):
    """Certified accuracy against the radius, with a few values written beside the curve.

    Args:
        certificate: what `certify` returned.
        y: labels, as for `Certificate.accuracy`.
        ax: matplotlib axes, or `None` for a new figure.
        label: of the curve, for a legend.
        color: of the curve.
        marks: radii at which to write the value.

    Returns:
        The axes.

    Example:

    >>> import numpy as np, matplotlib; matplotlib.use("Agg")
    >>> certificate = Certificate(np.array([0.5, 0.1]), np.array([1, 0]), 1.0, 2, "pairwise")
    >>> plot_certified_accuracy(certificate, [1, 0]).get_xlabel()
    'L2 radius of the perturbation'
    """
    ax = _axes(ax, figsize=(6.4, 4.2))
    correct = np.sort(certificate.radius[certificate.is_correct(y)])
    radius = np.concatenate([[0.0], correct])
    accuracy = np.arange(len(correct), -1, -1) / len(certificate.radius)
    ax.fill_between(radius, accuracy, step="post", color=color, alpha=0.12, linewidth=0)
    ax.step(radius, accuracy, where="post", color=color, linewidth=2, label=label)
    for epsilon in marks:
        value = certificate.accuracy(y, epsilon)
        ax.plot([epsilon], [value], "o", color=color, markersize=5)
        ax.annotate(
            f"{value:.1%} at {epsilon:g}", (epsilon, value), (7, 4), textcoords="offset points", color=_INK, fontsize=9
        )
    ax.set(xlabel="L2 radius of the perturbation", ylabel="certified accuracy", ylim=(0, 1.02))
    ax.set_xlim(0, max(1e-6, float(radius.max())) * 1.02)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    return ax


def plot_robustness(robustness, ax=None, largest: float | None = None):
    """Certified (lower) and attacked (upper) accuracy against the radius: the truth is in the shaded gap.

    The curves hold at every radius: they step where an input loses its certificate, and where an attack changed it.

    Args:
        robustness: what `attacks.evaluate_robustness` returned.
        ax: matplotlib axes, or `None` for a new figure.
        largest: radius up to which to draw; `None` for a little beyond the largest epsilon.

    Returns:
        The axes.

    Example:

    >>> import numpy as np, matplotlib; matplotlib.use("Agg")
    >>> from hkr_keras.attacks import Robustness
    >>> one = np.ones(1)
    >>> plot_robustness(Robustness(one, 1.0, one, one, one > 0, one, 2 * one, one[:, None])).get_ylabel()
    'accuracy'
    """
    ax = _axes(ax, figsize=(6.4, 4.2))
    largest = 1.2 * float(robustness.epsilons.max()) if largest is None else largest
    radius = np.linspace(0.0, largest, 601)
    lower, upper = (
        (robustness.is_correct & (reached > radius[:, None])).mean(axis=1)
        for reached in (robustness.radius, robustness.distance)
    )
    ax.fill_between(radius, lower, upper, step="post", color=_ORANGE, alpha=0.18, linewidth=0, label="not known")
    ax.step(radius, upper, where="post", color=_ORANGE, linewidth=2, label="attacked: no attack found")
    ax.step(radius, lower, where="post", color=_BLUE, linewidth=2, label="certified: no attack exists")
    for epsilon, low, high in zip(robustness.epsilons, robustness.certified, robustness.attacked, strict=True):
        for value, color, offset, side in (
            (high, _ORANGE, (6, 5), "left"),
            (low, _BLUE, (-5, -13 if low > 0.05 else 5), "right"),
        ):
            ax.plot([epsilon], [value], "o", color=color, markersize=5, clip_on=False)
            ax.annotate(
                f"{value:.1%}", (epsilon, value), offset, textcoords="offset points", ha=side, color=color, fontsize=9
            )
    ax.set(xlabel="L2 radius of the perturbation", ylabel="accuracy", ylim=(0, 1.02), xlim=(0, largest))
    ax.legend(loc="best", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    return ax


def plot_frontier(clean, certified, ax=None, label=None, color=_BLUE):
    """Clean against certified accuracy of several settings: seeds as dots, means joined.

    Args:
        clean: accuracies in [0, 1]: a number for every setting, or a sequence with one for each of its seeds.
        certified: certified accuracies at one radius, in the same order.
        ax: matplotlib axes, or `None` for a new figure.
        label: of the line, for a legend.
        color: of the line and the dots.

    Returns:
        The axes, in percent.

    Raises:
        ValueError: when the numbers of settings or of seeds differ.

    Example:

    >>> import matplotlib; matplotlib.use("Agg")
    >>> ax = plot_frontier([[0.9, 0.91], [0.85, 0.86]], [[0.6, 0.61], [0.7, 0.69]])
    >>> ax.lines[0].get_xdata().round(1).tolist()
    [85.5, 90.5]
    """
    clean, certified = (
        [100 * np.atleast_1d(np.asarray(v, "float64")) for v in values] for values in (clean, certified)
    )
    if [len(values) for values in clean] != [len(values) for values in certified]:
        raise ValueError(
            "Expected as many certified as clean accuracies for every setting. "
            f"Received: {[len(values) for values in clean]} clean and {[len(values) for values in certified]} certified"
        )
    ax = _axes(ax, figsize=(5.2, 4.2))
    means = sorted((x.mean(), y.mean()) for x, y in zip(clean, certified, strict=True))
    ax.plot(*zip(*means, strict=True), "o-", color=color, linewidth=2, label=label, markersize=6, markerfacecolor="w")
    ax.plot(np.concatenate(clean), np.concatenate(certified), "o", color=color, markersize=3.5, alpha=0.7, mew=0)
    ax.set(xlabel="clean accuracy, %", ylabel="certified accuracy, %")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    return ax


def plot_image_rows(rows, titles=None, names=None, symmetric: bool = False):
    """A table of images: one row for each array, as inputs above what became of them.

    Args:
        rows: arrays `(n, height, width)` or `(n, height, width, channels)` of 1 or 3 channels, all of one length.
        titles: for every row one text for each image, or `None`.
        names: one text for each row, or `None`.
        symmetric: whether images are signed, as gradients are: red below 0, blue above, each row scaled by itself.
            Others are drawn from white at 0 to black at 1.

    Returns:
        The array of axes, `(rows, n)`.

    Raises:
        ValueError: for arrays of another shape.

    Example:

    >>> import numpy as np, matplotlib; matplotlib.use("Agg")
    >>> plot_image_rows([np.zeros((3, 8, 8)), np.ones((3, 8, 8))], names=["zeros", "ones"]).shape
    (2, 3)
    """
    rows = [np.asarray(row) for row in rows]
    rows = [row[..., 0] if row.ndim == 4 and row.shape[3] == 1 else row for row in rows]
    if not rows or {len(row) for row in rows} != {len(rows[0])} or not all(row.ndim in (3, 4) for row in rows):
        raise ValueError(f"Expected image arrays of one length. Received: shapes {[row.shape for row in rows]}")
    shape = len(rows), len(rows[0])
    axes = np.reshape(_axes(None, nrows=shape[0], ncols=shape[1], figsize=(1.1 * shape[1], 1.3 * shape[0])), shape)
    for i, row in enumerate(rows):
        extent = max(1e-12, float(np.nanmax(np.abs(row)))) if symmetric else 1.0
        for j, image in enumerate(row):
            color, low = ("RdBu", -extent) if symmetric else ("gray_r", 0.0)
            axes[i, j].imshow(image, cmap=color, vmin=low, vmax=extent)
            axes[i, j].set(xticks=[], yticks=[], title=titles[i][j] if titles and titles[i] is not None else "")
            axes[i, j].title.set_fontsize(9)
            axes[i, j].spines[:].set_visible(False)
        if names:
            axes[i, 0].set_ylabel(names[i], rotation=0, ha="right", va="center", fontsize=9)
    return axes


def plot_field(model, x, y, ax=None, circles: int = 25):
    """The score of a binary model over the plane: level lines, decision boundary, points and certified circles.

    No point inside a circle is classified differently from its centre.

    Args:
        model: built model with inputs `(n, 2)` and one score.
        x: points `(n, 2)`.
        y: labels `(n,)`.
        ax: matplotlib axes, or `None` for a new figure.
        circles: how many certified circles to draw, the first ones of x.

    Returns:
        The axes.

    Raises:
        ValueError: for inputs that are not `(n, 2)`.
    """
    x = np.asarray(x)
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"Expected points of shape (n, 2). Received: x.shape={x.shape}")
    ax = _axes(ax, figsize=(7.6, 4.6))
    low, high = x.min(axis=0) - 0.5, x.max(axis=0) + 0.5
    first, second = np.meshgrid(np.linspace(low[0], high[0], 160), np.linspace(low[1], high[1], 160))
    grid = np.stack([first.ravel(), second.ravel()], axis=1).astype("float32")
    score = np.asarray(model.predict(grid, batch_size=1024, verbose=0)).reshape(first.shape)
    extent = max(1e-6, float(np.abs(score).max()))
    image = ax.contourf(first, second, score, levels=np.linspace(-extent, extent, 25), cmap="RdBu", alpha=0.8)
    ax.contour(first, second, score, levels=[0.0], colors=[_INK], linewidths=2)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.75, ticks=[-1, -0.5, 0, 0.5, 1] if 1 < extent < 2 else None)
    bar.set_label("score f(x): no attack bridges a distance of |f(x)|")
    labels = np.asarray(y).reshape(-1) > 0
    for member, color in ((labels, _BLUE), (~labels, _ORANGE)):
        ax.plot(*x[member].T, "o", color=color, markersize=3, markeredgewidth=0)
    radii = certify(model, x[:circles], verbose=0).radius if circles else ()
    for centre, radius in zip(x[:circles], radii, strict=True):
        ax.add_patch(_circle(centre, radius))
    ax.set(aspect="equal", xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    return ax


def _circle(centre, radius):
    from matplotlib.patches import Circle

    return Circle(tuple(centre), radius, fill=False, color=_INK, linewidth=0.8, alpha=0.8)


def plot_singular_values(model, ax=None):
    """The extreme singular values and the proven bound of every kernel of a model.

    Args:
        model: built model.
        ax: matplotlib axes, or `None` for a new figure.

    Returns:
        The axes.
    """
    ax = _axes(ax, figsize=(6.4, 3.6))
    names, spectra = [], []
    for layer in model._flatten_layers():
        for name in kernel_geometries(layer):
            names.append(layer.name)
            spectra.append(kernel_spectrum(layer, name))
    for i, spectrum in enumerate(spectra):
        ax.plot(
            [spectrum.smallest, spectrum.largest], [i, i], color=_BLUE, linewidth=5, alpha=0.5, solid_capstyle="butt"
        )
        ax.plot([spectrum.bound], [i], "|", color=_ORANGE, markersize=14, markeredgewidth=2)
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel="singular values, and the proven bound (mark)")
    ax.invert_yaxis()
    ax.axvline(1.0, color=_INK, linewidth=0.8, linestyle=":")
    ax.spines[["top", "right"]].set_visible(False)
    return ax
