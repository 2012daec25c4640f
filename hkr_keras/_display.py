"""Results to look at: tables as text, HTML and CSV, and a curve as a small picture inside them."""

import csv
import dataclasses
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

__all__ = ["Results", "curve", "frame", "html_table", "text_table", "write_csv"]


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in plain text: the first column to the left, numbers to the right.

    Example:

    >>> print(text_table(["class", "n"], [["all", 12], ["0", 7]]))
    class   n
    all    12
    0       7
    """
    cells = [[_cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = (
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], picture: str = "") -> str:
    """The same in HTML, under a title, with a picture beside it.

    Example:

    >>> html_table("Radii", ["n"], [[3]]).count("<td")
    1
    """
    style = "text-align:right;padding:2px 8px"
    head = "".join(f'<th style="{style}">{html.escape(str(name))}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{style}">{html.escape(_cell(value))}</td>' for value in row) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
    return f"<div><strong>{html.escape(title)}</strong>{picture}{table}</div>"


def curve(distances: np.ndarray, shares: np.ndarray, name: str, width: int = 280, height: int = 110) -> str:
    """A falling curve of shares in [0, 1] over distances, as an inline SVG that follows the colour of the text.

    Args:
        distances: increasing, `(n,)`, from 0.
        shares: `(n,)`.
        name: of the vertical axis.

    Example:

    >>> curve(np.array([0.0, 1.0]), np.array([1.0, 0.5]), "certified").count("<polyline")
    1
    """
    left, bottom, top, right = 34, 26, 8, 10
    largest = float(distances[-1]) or 1.0
    across = left + (width - left - right) * np.asarray(distances, dtype=np.float64) / largest
    down = top + (height - top - bottom) * (1 - np.asarray(shares, dtype=np.float64))
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    base = height - bottom
    texts = (
        (left - 4, top + 4, "end", "100%"),
        (left - 4, base + 4, "end", "0%"),
        (left, base + 13, "middle", "0"),
        (width - right, base + 13, "end", f"{largest:.3g}"),
        ((left + width - right) / 2, height - 2, "middle", f"{name} by L2 distance"),
    )
    labels = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="10" fill="currentColor">{html.escape(text)}</text>'
        for x, y, anchor, text in texts
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(name)}" style="display:block">'
        f'<path d="M{left},{top}V{base}H{width - right}" fill="none" stroke="currentColor" stroke-opacity=".4"/>'
        f'<polyline points="{points}" fill="none" stroke="#2a78d6" stroke-width="2"/>{labels}</svg>'
    )


def frame(columns: Mapping[str, np.ndarray]) -> Any:
    """A `pandas.DataFrame` of columns of equal length.

    Raises:
        ImportError: without pandas.

    Example:

    >>> frame({"radius": np.array([0.5, 0.25])})["radius"].tolist()
    [0.5, 0.25]
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("A data frame needs pandas (pip install pandas); to_csv needs nothing.") from error
    return pandas.DataFrame(dict(columns))


def write_csv(path: Any, columns: Mapping[str, np.ndarray]) -> None:
    """Writes columns of equal length, under their names.

    Example:

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "radii.csv"
    >>> write_csv(path, {"radius": np.array([0.5])})
    >>> path.read_text().split()
    ['radius', '0.5']
    """
    with pathlib.Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True))


class Results:
    """A frozen dataclass with one row for each input: its length, its parts, and its rows as a table.

    A subclass names the fields that have a row for each input in `_rows`, and tells its `_columns`.
    """

    _rows: ClassVar[tuple[str, ...]] = ()

    def __len__(self) -> int:
        return len(getattr(self, self._rows[0]))

    def __getitem__(self, rows: Any) -> Self:
        """The part about some inputs: a slice, an index, an array of indices or of booleans."""
        if isinstance(rows, (int, np.integer)):
            rows = [range(len(self))[rows]]  # an IndexError where there is none, so that loops end
        chosen = {name: getattr(self, name) for name in self._rows}
        parts = {name: values[rows] for name, values in chosen.items() if values is not None}
        return dataclasses.replace(self, **parts)  # type: ignore[type-var]

    def _repr_html_(self) -> str:
        return html_table(repr(self), (), ())

    def _columns(self, y: Any = None) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def to_frame(self, y: Any = None) -> Any:
        """A `pandas.DataFrame` with a row for each input; with labels y, they and what is right are columns too.

        Raises:
            ImportError: without pandas.
        """
        return frame(self._columns(y))

    def to_csv(self, path: Any, y: Any = None) -> None:
        """Writes the same table as a file of comma-separated values."""
        write_csv(path, self._columns(y))
