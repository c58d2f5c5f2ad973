"""Curves over iterations as an SVG, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 170, 40, 50
COLOURS = (
    "#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f",
)  # fmt: skip


def plot_curves(rows: Sequence[Sequence[float]], names: Sequence[str], title: str) -> str:
    """rows: a value a name in each iteration. Values that have no logarithm are left out."""
    series = {
        name: [(index + 1, row[place]) for index, row in enumerate(rows) if 0 < row[place] < 1e300]
        for place, name in enumerate(names)
    }
    series = {name: points for name, points in series.items() if points}
    values = [value for points in series.values() for _, value in points] or [1.0]
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.05 * (high - low), 0.02)
    low, high, last = low - margin, high + margin, max(2, len(rows))

    def x(iteration: float) -> float:
        return _LEFT + (iteration - 1) / (last - 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        svg_text(_LEFT, 24, title, size=15),
    ]
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for tick in _decades(low, high):
        parts += [svg_line(_LEFT, y(tick), right, y(tick), "#dddddd")]
        parts += [svg_text(_LEFT - 8, y(tick) + 4, f"{tick:g}", anchor="end")]
    for step in _steps(last):
        parts += [svg_line(x(step), bottom, x(step), bottom + 5, "#444444")]
        parts += [svg_text(x(step), bottom + 20, str(step), anchor="middle")]
    parts += [svg_line(_LEFT, _TOP, _LEFT, bottom, "#444444")]
    parts += [svg_line(_LEFT, bottom, right, bottom, "#444444")]
    parts += [svg_text((_LEFT + right) / 2, _HEIGHT - 10, "iteration", anchor="middle")]
    middle = (_TOP + bottom) / 2
    parts += [
        svg_text(18, middle, "loss", anchor="middle", more=f' transform="rotate(-90 18 {middle})"')
    ]
    for place, (name, points) in enumerate(series.items()):
        colour = COLOURS[place % len(COLOURS)]
        path = " ".join(f"{x(iteration):.1f},{y(value):.1f}" for iteration, value in points)
        parts += [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
        line, end = _TOP + 14 + 22 * place, f"{points[-1][1]:.3g}"
        parts += [svg_line(right + 14, line, right + 38, line, colour, width=3)]
        parts += [svg_text(right + 44, line + 4, f"{name}: {end}")]
    return "\n".join([*parts, "</svg>\n"])


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten in a range of exponents, with 2 and 5 between them if there is room."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _steps(last: int) -> list[int]:
    """At most seven round numbers of iterations, the first one included."""
    size = next(s for e in range(12) for s in (10**e, 2 * 10**e, 5 * 10**e) if last / s <= 6)
    return [1, *range(size if size > 1 else 2, last + 1, size)]


def svg_line(x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1) -> str:
    """A straight line, in pixels from the upper left corner."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def svg_text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, more: str = ""
) -> str:
    """Text, escaped; anchor: start, middle or end."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{more}'
    return f"<text {place}>{escape(text)}</text>"
