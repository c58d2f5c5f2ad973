"""The accuracy of recipes by preset as an SVG: a mark a recipe, with its range over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from ouro_compiler.cli.compare_table import groups
from ouro_compiler.cli.plot import COLOURS, svg_line, svg_text

_HEIGHT, _LEFT, _TOP, _BOTTOM = 420, 70, 40, 50
_PLOT, _LEGEND_LETTER = 480, 7.5  # pixels


def plot_accuracy(result: dict[str, Any]) -> str:
    """Top-1 in % over presets; the dashed line is floating point. Failed rows have no mark."""
    found = [[row for row in group if row["reason"] is None] for group in groups(result["rows"])]
    found = [group for group in found if group]
    reference = 100 * result["floating_point"]["top1"]
    presets = list(dict.fromkeys(row["bits"] for row in result["rows"]))
    recipes = list(dict.fromkeys(row["recipe"] for row in result["rows"]))
    values = [100 * row["top1"] for group in found for row in group] + [reference]
    low, high = _range(values)
    right, bottom = _LEFT + _PLOT, _HEIGHT - _BOTTOM
    width = round(right + 60 + _LEGEND_LETTER * max(map(len, ["floating point", *recipes])))

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" '
        f'width="{width}" height="{_HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{_HEIGHT}" fill="white"/>',
        svg_text(_LEFT, 24, f"top-1 in %: {result['made']['model']}", size=15),
    ]
    for tick in _ticks(low, high):
        parts += [svg_line(_LEFT, y(tick), right, y(tick), "#dddddd")]
        parts += [svg_text(_LEFT - 8, y(tick) + 4, f"{tick:g}", anchor="end")]
    parts += [svg_line(_LEFT, _TOP, _LEFT, bottom, "#444444")]
    parts += [svg_line(_LEFT, bottom, right, bottom, "#444444")]
    dashed = svg_line(_LEFT, y(reference), right, y(reference), "#444444", width=1.5)
    parts += [dashed.replace("/>", ' stroke-dasharray="6 4"/>')]
    step = _PLOT / max(1, len(presets))
    for place, preset in enumerate(presets):
        parts += [
            svg_text(_LEFT + (place + 0.5) * step, bottom + 22, preset.upper(), anchor="middle")
        ]
    for group in found:
        row, tops = group[0], [100 * one["top1"] for one in group]
        number = recipes.index(row["recipe"])
        x = _LEFT + step * (presets.index(row["bits"]) + (number + 1) / (len(recipes) + 1))
        parts += _mark(x, y(mean(tops)), y(min(tops)), y(max(tops)), COLOURS[number % len(COLOURS)])
    parts += _legend(recipes, right + 14, reference)
    return "\n".join([*parts, "</svg>\n"])


def _mark(x: float, middle: float, low: float, high: float, colour: str) -> list[str]:
    dot = f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="5" fill="{colour}"/>'
    return [svg_line(x, low, x, high, colour, width=2), dot]


def _legend(recipes: Sequence[str], x: float, reference: float) -> list[str]:
    lines = [svg_line(x, _TOP + 10, x + 20, _TOP + 10, "#444444", width=1.5)]
    lines += [svg_text(x + 28, _TOP + 14, "floating point")]
    for place, name in enumerate(recipes, 1):
        height, colour = _TOP + 10 + 22 * place, COLOURS[(place - 1) % len(COLOURS)]
        lines += [f'<circle cx="{x + 10:.1f}" cy="{height}" r="5" fill="{colour}"/>']
        lines += [svg_text(x + 28, height + 4, name)]
    return lines


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From a little under the smallest to a little over the largest, at least a point."""
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 0.5)
    return max(0.0, low - margin), high + margin


def _ticks(low: float, high: float) -> list[float]:
    size = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if (high - low) / s <= 8)
    first = int(low / size)
    return [round(size * k, 6) for k in range(first, int(high / size) + 1) if size * k >= low]
