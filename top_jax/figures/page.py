"""One page of pictures: layout of sections and panels, colours, and drawing on a photo's cells.

Everything is placed in inches, so that nothing can overlap.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from top_jax.figures.photo import Photo
from top_jax.files import new_file
from top_jax.optional import needs_extras

with needs_extras("drawing"):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

# Okabe and Ito's colours: people with any kind of colour vision can distinguish them.
BLACK: Final = "#000000"
BLUE: Final = "#0072B2"
GREEN: Final = "#009E73"
ORANGE: Final = "#E69F00"
PURPLE: Final = "#CC79A7"
VERMILLION: Final = "#D55E00"
INK: Final = "#222222"
FAINT: Final = "#555555"
GREY: Final = 225
MAP: Final = "cividis"  # perceptually uniform, for any kind of colour vision

DPI = 120
COLUMNS = 4
PANEL = 2.45  # width of a panel, inches
PITCH = 3.2  # from one panel to the next, with room for the numbers of a colour bar
MARGIN = 0.3
BAR = 0.09  # width of a colour bar
LINE = {8: 0.15, 9: 0.165, 11: 0.21, 14: 0.28}  # height of a line of text, by its size in points
CHARACTERS = {8: 17.5, 9: 15.5, 11: 12.5, 14: 9.8}  # characters that fit into an inch, by size in points


class Panel(NamedTuple):
    """One picture on a page.

    Attributes:
        title: the text above it, wrapped to the panel's width.
        draw: draws on axes in pixels of the model's input, y pointing down. Returns what a colour bar explains, or
            None for no colour bar.
        bar: the label of that colour bar.
    """

    title: str
    draw: Callable[[Axes], ScalarMappable | None]
    bar: str = ""


class Section(NamedTuple):
    """A heading, a note on how to read the panels, and rows of panels; rows that are too long are wrapped."""

    heading: str
    note: str
    rows: Sequence[Sequence[Panel]]


def draw_page(file: Path, title: str, subtitle: str, photo: Photo, sections: Sequence[Section]) -> None:
    """Writes a PNG.

    Args:
        file: the PNG, overwritten if it is there.
        title: the image and the model's prediction.
        subtitle: the model.
        photo: its model input gives all panels their aspect ratio.
        sections: in order from the top.

    Raises:
        OSError: the file cannot be written.
    """
    page = _Page(photo, columns=min(COLUMNS, max(len(row) for section in sections for row in section.rows)))
    page.text(title, 14, INK, weight="bold")
    page.text(subtitle, 9, FAINT)
    for section in sections:
        page.height += 0.22
        page.text(section.heading, 11, INK, weight="bold")
        page.text(section.note, 9, FAINT)
        for row in section.rows:
            for first in range(0, len(row), page.columns):
                page.row(row[first : first + page.columns])
    page.save(file)


class _Page:
    """Collects the parts of a page from the top down, because placing them needs the height of the whole figure."""

    def __init__(self, photo: Photo, columns: int):
        self.photo, self.columns = photo, columns
        self.width, self.height = 2 * MARGIN + columns * PITCH, MARGIN
        self._lines: list[tuple[float, float, str, dict[str, Any]]] = []  # left, top, text and font
        self._panels: list[tuple[float, float, Panel]] = []  # left and top

    def text(self, text: str, points: int, colour: str, *, weight: str = "normal") -> None:
        """Adds a paragraph, wrapped to the page's width."""
        lines = _wrapped(text, int((self.width - 2 * MARGIN) * CHARACTERS[points]))
        self._write(lines, MARGIN, self.height, points, colour, weight)
        self.height += len(lines) * LINE[points] + 0.04

    def row(self, panels: Sequence[Panel]) -> None:
        """Adds panels side by side, their titles above them."""
        titles = [_wrapped(panel.title, int(PITCH * 0.95 * CHARACTERS[8])) for panel in panels]
        top = self.height + 0.08 + max(len(title) for title in titles) * LINE[8] + 0.03
        for i, (panel, title) in enumerate(zip(panels, titles, strict=True)):
            left = MARGIN + i * PITCH
            self._write(title, left, top - 0.03 - len(title) * LINE[8], 8, INK, "normal")
            self._panels.append((left, top, panel))
        self.height = top + self._panel_height() + (0.18 if any(panel.bar for panel in panels) else 0.06)

    def save(self, file: Path) -> None:
        """Draws everything and writes the PNG."""
        self.height += MARGIN
        figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor="white")
        for left, top, text, font in self._lines:
            figure.text(left / self.width, 1 - top / self.height, text, parse_math=False, va="top", **font)
        for left, top, panel in self._panels:
            self._draw(figure, panel, left, top)
        with new_file(file) as temporary:
            figure.savefig(temporary, format="png")

    def _write(self, lines: list[str], left: float, top: float, points: int, colour: str, weight: str) -> None:
        for i, line in enumerate(lines):
            line = line.encode(errors="backslashreplace").decode()  # names of files and classes may be any bytes
            self._lines.append(
                (left, top + i * LINE[points], line, {"size": points, "color": colour, "weight": weight})
            )

    def _panel_height(self) -> float:
        rows, columns = self.photo.size
        return PANEL * rows / columns

    def _draw(self, figure: Figure, panel: Panel, left: float, top: float) -> None:
        height = self._panel_height()

        def box(left: float, width: float) -> tuple[float, float, float, float]:
            bottom = self.height - top - height
            return left / self.width, bottom / self.height, width / self.width, height / self.height

        axes = figure.add_axes(box(left, PANEL))
        shown = panel.draw(axes)
        axes.set(xlim=(0, self.photo.size[1]), ylim=(self.photo.size[0], 0), xticks=[], yticks=[], aspect="auto")
        axes.spines[:].set(linewidth=0.5, color=FAINT)
        if shown is None:
            return
        bar = figure.colorbar(shown, cax=figure.add_axes(box(left + PANEL + 0.05, BAR)))
        if isinstance(shown.norm, LogNorm):  # the default labels (6 x 10^-1) would reach the next panel
            ticks = _round_numbers(*shown.get_clim())
            bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
            bar.minorticks_off()
        bar.ax.tick_params(which="both", labelsize=6.5, length=2, pad=1.5)
        bar.outline.set_linewidth(0.4)  # pyright: ignore[reportCallIssue]  wrong type in the stubs
        bar.ax.set_xlabel(panel.bar, size=6.5, labelpad=2, loc="left")


def _round_numbers(low: float, high: float) -> list[float]:
    """Returns tick positions between two positive numbers: 1, 2 and 5 times the powers of ten.

    A range of many powers gets the powers alone; one that holds fewer than two such numbers gets two others.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 1.5 else (1,)
    found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    return found if len(found) > 1 else [low * (high / low) ** share for share in (0.1, 0.9)]


def _wrapped(text: str, width: int) -> list[str]:
    return [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]


def draw_photo(axes: Axes, photo: Photo, *, dropped: np.ndarray | None = None, pale: float = 0.0) -> None:
    """Draws the photo.

    Args:
        axes: in pixels of the model's input.
        photo: the photo.
        dropped: bool or float `[h, w]`, from 0 to 1 for each pixel of the photo: at 1 it loses its colour and almost
            all contrast.
        pale: share of white mixed into the photo, from 0 to 1.
    """
    height, width = photo.size
    place = {"extent": (0, width, height, 0), "interpolation": "nearest"}
    pixels = photo.pixels * (1 - pale) + 255 * pale
    axes.imshow(pixels.astype(np.uint8), **place)
    if dropped is not None:
        grey = np.broadcast_to(photo.pixels.mean(axis=-1, keepdims=True) * 0.12 + GREY * 0.88, pixels.shape)
        axes.imshow(np.concatenate([grey, 255 * dropped[:, :, None]], axis=-1).astype(np.uint8), **place)


def draw_grid(axes: Axes, photo: Photo) -> None:
    """Draws thin borders around all cells."""
    left, right, bottom, top = photo.area
    rows, columns = photo.grid
    across = [[(left, top + r * photo.stride), (right, top + r * photo.stride)] for r in range(rows + 1)]
    down = [[(left + c * photo.stride, top), (left + c * photo.stride, bottom)] for c in range(columns + 1)]
    axes.add_collection(LineCollection(across + down, colors="white", linewidths=0.4, alpha=0.7))


def draw_borders(axes: Axes, photo: Photo, source: np.ndarray, *, colour: str) -> None:
    """Draws a line between any two neighbouring cells that belong to different tokens.

    Args:
        axes: in pixels of the model's input.
        photo: the photo whose cells they are.
        source: int or bool `[M]`; cells with the same value belong together.
        colour: colour of the lines.
    """
    left, _, _, top = photo.area
    cells, step = source.reshape(photo.grid), photo.stride
    lines = [
        [(left + (c + 1) * step, top + r * step), (left + (c + 1) * step, top + (r + 1) * step)]
        for r, c in np.argwhere(cells[:, 1:] != cells[:, :-1])
    ]
    lines += [
        [(left + c * step, top + (r + 1) * step), (left + (c + 1) * step, top + (r + 1) * step)]
        for r, c in np.argwhere(cells[1:] != cells[:-1])
    ]
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=1.1, capstyle="round"))


def draw_map(
    axes: Axes, photo: Photo, values: np.ndarray, low: float, high: float, *, log: bool = False
) -> ScalarMappable:
    """Draws numbers as colours, and hatched grey where there is none.

    Args:
        axes: in pixels of the model's input.
        photo: the photo whose cells are coloured.
        values: float `[M]`, NaN where there is no token.
        low: the value with the darkest colour.
        high: the value with the brightest colour.
        log: use a logarithmic colour scale.

    Returns:
        The coloured cells, for a colour bar.
    """
    draw_hatched(axes, photo, np.isnan(values))
    cells = np.ma.masked_invalid(values.reshape(photo.grid))
    norm = LogNorm(low, high, clip=True) if log else Normalize(low, high)
    return axes.imshow(cells, extent=photo.area, interpolation="nearest", cmap=MAP, norm=norm, zorder=2)


def draw_hatched(axes: Axes, photo: Photo, chosen: np.ndarray) -> None:
    """Draws hatched grey over the cells of `chosen`, bool `[M]`."""
    left, _, _, top = photo.area
    side = photo.stride
    cells = [
        Rectangle((left + column * side, top + row * side), side, side)
        for row, column in np.argwhere(chosen.reshape(photo.grid))
    ]
    axes.add_collection(
        PatchCollection(cells, facecolor="#E6E6E6", edgecolor="#A6A6A6", hatch="/////", linewidth=0, zorder=1.5)
    )
