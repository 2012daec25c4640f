"""Pictures: accuracy against the radius, radii by class, confusion, frontiers, decision fields, images, layers.

Needs matplotlib: `pip install 'hkr_keras[plots]'`. Every function draws on `ax`, or on a new figure of 150 dots
per inch, and returns the axes. Text has the colours of the style in use, so that dark styles work too.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from hkr_keras import margins
from hkr_keras.certification.bounds import lipschitz_bound
from hkr_keras.certification.certificates import Certificate, certify
from hkr_keras.certification.summary import LipschitzSummary, lipschitz_summary

__all__ = [
    "plot_certified_accuracy",
    "plot_certified_confusion",
    "plot_field",
    "plot_frontier",
    "plot_image_rows",
    "plot_radii",
    "plot_robustness",
    "plot_singular_values",
    "plot_summary",
]

_BLUE, _ORANGE = "#2f74c0", "#d9622b"  # both are legible on white and on black
_MOST_ROWS = 30  # classes and layers that a picture has room for
_ROW = 0.75  # height of the highest bar of a row
_DECADES = 20.0  # from this ratio on an axis is logarithmic


def _axes(ax: Any, **kwargs: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'hkr_keras[plots]'") from error
    return plt.subplots(layout="constrained", dpi=150, **kwargs)[1]


def _ink() -> str:
    """The colour of text in the style in use."""
    import matplotlib

    return matplotlib.rcParams["text.color"]


def _write(ax: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **kwargs: Any) -> None:
    """Text beside a point, with a rim that keeps it apart from lines below."""
    from matplotlib.patheffects import withStroke

    rim = withStroke(linewidth=2.5, foreground=ax.get_facecolor(), alpha=0.85)
    kwargs = {"color": _ink(), "fontsize": 9, "path_effects": [rim], **kwargs}
    ax.annotate(text, at, offset, textcoords="offset points", **kwargs)


def _tidy(ax: Any, percent: str = "") -> Any:
    """No frame but the two axes, a light grid, and axes in percent, of which `percent` names those (`"y"`)."""
    from matplotlib.ticker import PercentFormatter

    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    for name in percent:
        getattr(ax, f"{name}axis").set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return ax


def _round_ticks(ax: Any) -> None:
    """At most eight ticks on both axes, at multiples of 1, 2 or 5 times a power of ten."""
    from matplotlib.ticker import MaxNLocator

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))


def _class_names(count: int, names: Sequence[str] | None) -> list[str]:
    if names is None:
        return [str(i) for i in range(count)]
    if len(names) != count:
        raise ValueError(f"Expected one name for each of {count} classes. Received: {len(names)} names")
    return [str(name) for name in names]


def plot_certified_accuracy(
    certificate: Certificate,
    y: Any,
    ax: Any = None,
    label: str | None = None,
    color: str = _BLUE,
    marks: Sequence[float] = (0.1, 0.25, 0.5),
    fill: bool = True,
) -> Any:
    """Certified accuracy against the radius, with a few values written beside the curve.

    Args:
        certificate: what `certify` returned.
        y: labels, as for `Certificate.accuracy`.
        ax: matplotlib axes, or `None` for a new figure.
        label: of the curve, for a legend.
        color: of the curve.
        marks: radii at which to write the value.
        fill: whether to shade what is below the curve; better not where several curves share the axes.

    Returns:
        The axes.

    Example:

    >>> import numpy as np, matplotlib; matplotlib.use("Agg")
    >>> kinds = {"bound": 1.0, "classes": 2, "method": "pairwise"}
    >>> certificate = Certificate(radius=np.array([0.5, 0.1]), prediction=np.array([1, 0]), **kinds)
    >>> plot_certified_accuracy(certificate, [1, 0]).get_xlabel()
    'L2 radius of the perturbation'
    """
    ax = _axes(ax, figsize=(6.4, 4.2))
    correct = np.sort(certificate.radius[certificate.is_correct(y)])
    radius = np.concatenate([[0.0], correct])
    accuracy = np.arange(len(correct), -1, -1) / len(certificate.radius)
    if fill:
        ax.fill_between(radius, accuracy, step="post", color=color, alpha=0.12, linewidth=0)
    ax.step(radius, accuracy, where="post", color=color, linewidth=2, label=label)
    for epsilon in marks:
        value = certificate.accuracy(y, epsilon)
        ax.plot([epsilon], [value], "o", color=color, markersize=5, clip_on=False)
        _write(ax, f"{value:.1%} at {epsilon:g}", (epsilon, value), (7, 4))
    ax.set(xlabel="L2 radius of the perturbation", ylabel="certified accuracy", ylim=(0, 1.02))
    longest = max(1e-6, float(radius[np.isfinite(radius)].max()), *marks)
    ax.set_xlim(0, max(longest * 1.02, ax.get_xlim()[1] if len(ax.lines) > 1 + len(marks) else 0.0))
    return _tidy(ax, "y")


def plot_radii(
    certificate: Certificate, y: Any, ax: Any = None, bins: int = 25, names: Sequence[str] | None = None
) -> Any:
    """Histograms of the certified radii, a row for each class: right predictions upwards, wrong ones downwards.

    A wrong prediction with a large radius is one that no small change puts right. The mark in a row is the median
    radius of the right predictions. All rows have one scale; infinite radii count as the largest finite one.

    Args:
        certificate: what `certify` returned.
        y: labels, as for `Certificate.accuracy`.
        ax: matplotlib axes, or `None` for a new figure.
        bins: of the histograms.
        names: of the classes, one text for each; `None` for their numbers.

    Returns:
        The axes.

    Raises:
        ValueError: for labels or names of another number, and more than 30 classes.

    Example:

    >>> import keras, matplotlib, numpy as np, hkr_keras as hkr; matplotlib.use("Agg")
    >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(2, kernel_initializer="identity")])
    >>> certificate = hkr.certify(model, np.array([[2.0, 1.0], [1.0, 3.0]]), verbose=0)
    >>> [text.get_text() for text in plot_radii(certificate, [0, 1], names=["left", "right"]).get_yticklabels()]
    ['left', 'right']
    """
    count = max(certificate.classes, 2)
    names = _class_names(count, names)
    if count > _MOST_ROWS:
        raise ValueError(f"Expected at most {_MOST_ROWS} classes, a row for each. Received: {count} classes")
    right, labels = certificate.is_correct(y), margins.class_indices(y, certificate.classes)
    finite = certificate.radius[np.isfinite(certificate.radius)]
    edges = np.linspace(0.0, max(1e-6, float(finite.max(initial=0.0))), bins + 1)
    radius = np.minimum(certificate.radius, edges[-1])
    ax = _axes(ax, figsize=(6.4, 1.4 + 0.42 * count))
    counts = np.array(
        [
            [np.histogram(radius[(labels == k) & (right == good)], edges)[0] for good in (True, False)]
            for k in range(count)
        ]
    )
    heights = _ROW * counts / max(1, counts.sum(axis=1).max())
    for k in range(count):
        for good, color, sign in ((0, _BLUE, -1), (1, _ORANGE, 1)):
            label = ("right prediction", "wrong prediction")[good] if k == 0 else None
            ax.stairs(k + sign * heights[k, good], edges, baseline=k, fill=True, color=color, label=label)
        ax.axhline(k, color=_ink(), linewidth=0.6, alpha=0.5)
        if (own := radius[(labels == k) & right]).size:
            ax.plot([np.median(own)] * 2, [k - 0.3, k + 0.06], color=_ink(), linewidth=1.5)
    ax.set(yticks=range(count), yticklabels=names, ylim=(count - 0.45, -1.0), xlim=(0, edges[-1]))
    ax.set(xlabel="certified L2 radius (mark: median of the right ones)", ylabel="class")
    ax.legend(loc="lower right", ncols=2, frameon=False, bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    _tidy(ax).grid(False, axis="y")
    return ax


def plot_certified_confusion(
    certificate: Certificate, y: Any, epsilon: float, ax: Any = None, names: Sequence[str] | None = None
) -> Any:
    """What the inputs of each class are taken for, and how many of them can be turned within epsilon.

    A row for each class, in percent of its inputs. On the diagonal: right, and no change of L2 norm epsilon alters it.
    Beside it: wrong, and proven to stay so. The last column, `may turn`: those whose radius is at most epsilon, so that
    a change within epsilon may give them another class. Into whom stands in orange behind an arrow: the class that is
    nearest, `Certificate.rival`.

    Args:
        certificate: what `certify` returned.
        y: labels, as for `Certificate.accuracy`.
        epsilon: L2 distance in input units, at least 0.
        ax: matplotlib axes, or `None` for a new figure.
        names: of the classes, one text for each; `None` for their numbers.

    Returns:
        The axes.

    Raises:
        ValueError: for labels or names of another number, a negative epsilon, and more than 30 classes.

    Example:

    >>> import keras, matplotlib, numpy as np, hkr_keras as hkr; matplotlib.use("Agg")
    >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(2, kernel_initializer="identity")])
    >>> certificate = hkr.certify(model, np.array([[2.0, 1.0], [1.0, 3.0]]), verbose=0)  # radii 0.71 and 1.41
    >>> plot_certified_confusion(certificate, [0, 1], epsilon=1.0).images[0].get_array().tolist()
    [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    count = max(certificate.classes, 2)
    names = _class_names(count, names)
    if count > _MOST_ROWS:
        raise ValueError(f"Expected at most {_MOST_ROWS} classes, a row for each. Received: {count} classes")
    certificate.accuracy(y, epsilon)  # refuses labels and distances
    labels = margins.class_indices(y, certificate.classes)
    column = np.where(certificate.radius > epsilon, certificate.prediction, count)
    shares = np.zeros((count, count + 1))
    np.add.at(shares, (labels, column), 1.0)
    sizes = np.maximum(1.0, shares.sum(axis=1, keepdims=True))
    shares, turns = shares / sizes, np.zeros((count, count))
    if certificate.rival is not None:
        may_turn = column == count
        np.add.at(turns, (labels[may_turn], certificate.rival[may_turn]), 1.0)
        turns /= sizes

    ax = _axes(ax, figsize=(max(5.0, 1.6 + 0.46 * count), 1.5 + 0.4 * count))
    ax.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        turn = float(turns[i, j]) if j < count else 0.0
        if share > 0:
            place = "bottom" if turn > 0 else "center"
            color = "white" if share > 0.5 else "#222222"
            ax.text(j, i, _percent(share), ha="center", va=place, fontsize=8, color=color)
        if turn > 0:
            place = "top" if share > 0 else "center"
            color = "#ffb066" if share > 0.5 else "#b34700"
            ax.text(j, i, f"→{_percent(turn)}", ha="center", va=place, fontsize=7, color=color)
    ax.axvline(count - 0.5, color="#222222", linewidth=2)
    ax.set(xticks=range(count + 1), yticks=range(count), yticklabels=names)
    ax.set_xticklabels([*names, "may\nturn"], rotation=0 if max(map(len, names)) <= 4 else 45)
    for label in ax.get_xticklabels()[:count]:
        label.set_horizontalalignment("center" if label.get_rotation() == 0 else "right")
        label.set_rotation_mode("anchor")
    ax.get_xticklabels()[count].set_rotation(0)
    turned = "" if certificate.rival is None else ", →: that may turn"
    ax.set(xlabel=f"predicted class, proven within {epsilon:g}{turned} (percent of a row)", ylabel="class")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.01 else "<1"


def plot_robustness(robustness: Any, ax: Any = None, largest: float | None = None) -> Any:
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
    >>> rows = {"is_correct": one > 0, "radius": one, "distance": 2 * one, "adversarial": one[:, None]}
    >>> plot_robustness(Robustness.of(epsilons=one, **rows)).get_ylabel()
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
            (low, _BLUE, (-5, -13) if low > 0.05 else (6, 5), "right" if low > 0.05 else "left"),
        ):
            ax.plot([epsilon], [value], "o", color=color, markersize=5, clip_on=False)
            _write(ax, f"{value:.1%}", (epsilon, value), offset, ha=side, color=color)
    ax.set(xlabel="L2 radius of the perturbation", ylabel="accuracy", ylim=(0, 1.02), xlim=(0, largest))
    ax.legend(loc="best", frameon=False)
    return _tidy(ax, "y")


def plot_frontier(clean: Any, certified: Any, ax: Any = None, label: str | None = None, color: str = _BLUE) -> Any:
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
    ax.plot(
        *zip(*means, strict=True),
        "o-",
        color=color,
        linewidth=2,
        label=label,
        markersize=6,
        markerfacecolor=ax.get_facecolor(),
    )
    ax.plot(np.concatenate(clean), np.concatenate(certified), "o", color=color, markersize=3.5, alpha=0.7, mew=0)
    ax.set(xlabel="clean accuracy, %", ylabel="certified accuracy, %")
    _round_ticks(ax)
    return _tidy(ax)


def plot_image_rows(
    rows: Sequence[Any],
    titles: Sequence[Sequence[Any] | None] | None = None,
    names: Sequence[str] | None = None,
    symmetric: bool = False,
) -> np.ndarray:
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
    images = [np.asarray(row) for row in rows]
    images = [row[..., 0] if row.ndim == 4 and row.shape[3] == 1 else row for row in images]
    if not images or {len(row) for row in images} != {len(images[0])} or not all(row.ndim in (3, 4) for row in images):
        raise ValueError(f"Expected image arrays of one length. Received: shapes {[row.shape for row in images]}")
    shape = len(images), len(images[0])
    words: Sequence[Any] = titles or [None] * len(images)
    axes = np.reshape(_axes(None, nrows=shape[0], ncols=shape[1], figsize=(1.1 * shape[1], 1.3 * shape[0])), shape)
    for i, row in enumerate(images):
        extent = max(1e-12, float(np.nanmax(np.abs(row)))) if symmetric else 1.0
        for j, image in enumerate(row):
            color, low = ("RdBu", -extent) if symmetric else ("gray_r", 0.0)
            axes[i, j].imshow(image, cmap=color, vmin=low, vmax=extent)
            axes[i, j].set(xticks=[], yticks=[], title=words[i][j] if words[i] is not None else "")
            axes[i, j].title.set_fontsize(9)
            axes[i, j].spines[:].set_visible(False)
        if names:
            axes[i, 0].set_ylabel(names[i], rotation=0, ha="right", va="center", fontsize=9)
    return axes


def plot_field(
    model: keras.Model,
    x: Any,
    y: Any,
    ax: Any = None,
    circles: int = 25,
    names: Sequence[str] | None = None,
    boundary: bool = True,
) -> Any:
    """The score of a binary model over the plane: level lines, decision boundary, points and certified circles.

    No point inside a circle is classified differently from its centre, which is marked with a dark rim. The score of a
    model whose constant is 1 is a certified distance to the boundary, in the units of the axes.

    Args:
        model: built model with inputs `(n, 2)` and one score.
        x: points `(n, 2)`.
        y: labels `(n,)`.
        ax: matplotlib axes, or `None` for a new figure.
        circles: how many certified circles to draw, around the first points of x.
        names: of the two classes, that of the labels 0 (or -1) first; `None` for `class 0` and `class 1`.
        boundary: whether the sign of the score means a class. `False` for a score of which only differences have a
            meaning, as after training with `KR`: no line at 0, and no circles.

    Returns:
        The axes.

    Raises:
        ValueError: for inputs that are not `(n, 2)`, and other than two names.

    Example:

    >>> import keras, matplotlib, numpy as np, hkr_keras as hkr; matplotlib.use("Agg")
    >>> model = keras.Sequential([keras.Input((2,)), hkr.layers.LipschitzDense(1)])
    >>> ax = plot_field(model, np.array([[2.0, 1.0], [-1.0, 3.0]]), [0, 1], names=["left", "right"])
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['right', 'left', 'centre of a circle']
    """
    x = np.asarray(x)
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"Expected points of shape (n, 2). Received: x.shape={x.shape}")
    names = _class_names(2, ["class 0", "class 1"] if names is None else names)
    ax = _axes(ax, figsize=(7.6, 4.6))
    from matplotlib.ticker import MaxNLocator

    low, high = x.min(axis=0) - 0.5, x.max(axis=0) + 0.5
    first, second = np.meshgrid(np.linspace(low[0], high[0], 160), np.linspace(low[1], high[1], 160))
    grid = np.stack([first.ravel(), second.ravel()], axis=1).astype("float32")
    score = np.asarray(model.predict(grid, batch_size=1024, verbose=0)).reshape(first.shape)
    middle = 0.0 if boundary else float(score.max() + score.min()) / 2
    extent = max(1e-6, float(np.abs(score - middle).max()))
    step = _round_step(extent / 10)
    levels = step * np.arange(math.floor(score.min() / step), math.ceil(score.max() / step) + 1)
    shades = {"cmap": "RdBu", "vmin": middle - 1.3 * extent, "vmax": middle + 1.3 * extent}
    image = ax.contourf(first, second, score, levels=levels, **shades)
    if boundary:
        ax.contour(first, second, score, levels=[0.0], colors=["#222222"], linewidths=2)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, ticks=MaxNLocator(8, steps=[1, 2, 5, 10]))
    is_distance = lipschitz_bound(model) <= 1 + 1e-5
    bar.set_label(
        ("score f(x) = certified distance" if is_distance else "score f(x)")
        if boundary
        else "score f(x), up to a constant"
    )
    labels = np.asarray(y).reshape(-1) > 0
    for member, color, name in ((labels, "#174f8f", names[1]), (~labels, "#b8430f", names[0])):
        ax.plot(*x[member].T, "o", color=color, markersize=3.5, markeredgewidth=0, label=name)
    if circles and boundary:
        for centre, radius in zip(x[:circles], certify(model, x[:circles], verbose=0).radius, strict=True):
            ax.add_patch(_circle(centre, radius))
        ax.plot(*x[:circles].T, "o", mfc="none", mec="#111111", markersize=4, mew=1.0, label="centre of a circle")
    ax.set(aspect="equal", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    _round_ticks(ax)
    ax.spines[:].set_visible(False)
    colors = {"facecolor": "#f4f4f4", "edgecolor": "none", "framealpha": 1.0, "labelcolor": "#222222"}
    ax.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0.0), borderaxespad=2.7, fontsize=9, **colors)
    return ax


def _round_step(size: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `size`."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= size * (1 - 1e-9))


def _circle(centre: np.ndarray, radius: float) -> Any:
    from matplotlib.patches import Circle

    return Circle(tuple(centre), radius, fill=False, color="#222222", linewidth=0.8, alpha=0.8)


def plot_summary(model: keras.Model | LipschitzSummary, x: Any = None, ax: Any = None) -> Any:
    """Lipschitz constants of all layers: the proven bound as a mark, and a bar up to the largest ratio that was found.

    A gap between the two is slack of the bound, or a place at which nobody looked. The last row is the whole model.

    Args:
        model: built model, or what `lipschitz_summary` returned.
        x: inputs at which to look, as for `lipschitz_summary`.
        ax: matplotlib axes, or `None` for a new figure.

    Returns:
        The axes; the axis of the constants is logarithmic where they differ by more than a factor of 20.

    Raises:
        ValueError: as `lipschitz_summary`.

    Example:

    >>> import keras, matplotlib, hkr_keras as hkr; matplotlib.use("Agg")
    >>> model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(2, name="head")])
    >>> [text.get_text() for text in plot_summary(model).get_yticklabels()]
    ['head', 'model']
    """
    summary = model if isinstance(model, LipschitzSummary) else lipschitz_summary(model, print_fn=None, x=x)
    rows = [(row.layer, row.lower, row.bound) for row in summary.rows] + [("model", summary.lower, summary.bound)]
    names, lower, bound = zip(*rows, strict=True)
    ax = _axes(ax, figsize=(6.4, 1.2 + 0.27 * len(rows)))
    positive = [value for value in (*lower, *bound) if value > 0]
    if max(positive) > _DECADES * min(positive):
        ax.set_xscale("log")
        left = min(0.5, 0.5 * min(positive))
    else:
        left = 0.0
    seen = [max(0.0, value - left) for value in lower]
    ax.barh(range(len(rows)), seen, left=left, height=0.6, color=_BLUE, alpha=0.65, label="largest change seen")
    ax.plot(bound, range(len(rows)), "|", color=_ORANGE, markersize=13, markeredgewidth=2.5, label="proven bound")
    ax.legend(loc="lower right", ncols=2, frameon=False, bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    ax.axvline(1.0, color=_ink(), linewidth=0.8, linestyle=":")
    ax.set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.4, -0.6), xlim=(left, None))
    ax.axhline(len(rows) - 1.5, color=_ink(), linewidth=0.6)
    ax.set_xlabel("Lipschitz constant")
    ax.margins(x=0.08)
    ax.set_xlim(left=left)
    _tidy(ax).grid(False, axis="y")
    return ax


def plot_singular_values(model: keras.Model | LipschitzSummary, ax: Any = None) -> Any:
    """The extreme singular values and the proven bound of every layer with a kernel.

    Args:
        model: built model, or what `lipschitz_summary` returned.
        ax: matplotlib axes, or `None` for a new figure.

    Returns:
        The axes.

    Example:

    >>> import keras, matplotlib, hkr_keras as hkr; matplotlib.use("Agg")
    >>> model = keras.Sequential([keras.Input((4,)), hkr.layers.LipschitzDense(2, name="head")])
    >>> [text.get_text() for text in plot_singular_values(model).get_yticklabels()]
    ['head']
    """
    summary = model if isinstance(model, LipschitzSummary) else lipschitz_summary(model, print_fn=None)
    rows = [row for row in summary.rows if row.sigma_max is not None]
    ax = _axes(ax, figsize=(6.4, 1.2 + 0.3 * len(rows)))
    for i, row in enumerate(rows):
        words = ("from the smallest to the largest singular value", "proven bound") if i == 0 else (None, None)
        extremes = [row.sigma_min, row.sigma_max]
        ax.plot(extremes, [i, i], "o-", color=_BLUE, linewidth=3, markersize=6, label=words[0])
        ax.plot([row.bound], [i], "|", color=_ORANGE, markersize=14, markeredgewidth=2.5, label=words[1])
    ax.set(yticks=range(len(rows)), yticklabels=[row.layer for row in rows], ylim=(len(rows) - 0.4, -0.6))
    if rows:
        ax.legend(loc="lower right", ncols=2, frameon=False, bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    ax.axvline(1.0, color=_ink(), linewidth=0.8, linestyle=":")
    ax.set_xlabel("singular values of the kernel")
    _tidy(ax).grid(False, axis="y")
    return ax
