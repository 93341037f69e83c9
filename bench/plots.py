# SPDX-License-Identifier: MIT
"""Plots as SVG, written by hand: histograms one below another, and lines over a logarithmic axis side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Curves", "curves", "histograms"]

_COLOURS = ("#2f7d4f", "#b9553f", "#3f6fb9", "#8a5fb0", "#b08a2f", "#7d8794")
_STYLE = "<style>text { font: 12px system-ui, sans-serif; fill: #444 }</style>"
_BINS = 60


def _document(width: float, height: float, parts: Iterable[str]) -> str:
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
    return f'{frame}{_STYLE}<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>{"".join(parts)}</svg>\n'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def histograms(series: Mapping[str, Sequence[float]], label: str) -> str:
    """Return a histogram for each series, over one axis that reaches to the 99th percentile of the slowest."""
    left, width, step = 170, 620, 74
    most = max(float(np.percentile(values, 99)) for values in series.values()) * 1.02
    marks = _round_marks(most)
    bottom, out = step * len(series), []
    for mark in marks:
        x = left + width * mark / most
        out += [f'<path d="M{x:.1f},0V{bottom}" stroke="#ddd"/>', _text(x, bottom + 15, f"{mark:g}", "middle")]
    for number, (name, values) in enumerate(series.items()):
        counts, _ = np.histogram(np.minimum(values, most), _BINS, (0, most))
        base, unit = step * (number + 1) - 4, (step - 14) / max(counts)
        for place, count in enumerate(counts):
            if count:
                x, y = left + width * place / _BINS, count * unit
                bar = f'x="{x:.1f}" y="{base - y:.1f}" width="{width / _BINS - 1:.1f}" height="{y:.1f}"'
                out.append(f'<rect {bar} fill="{_COLOURS[number % len(_COLOURS)]}"/>')
        middle = left + width * float(np.median(values)) / most
        out += [f'<path d="M{middle:.1f},{base}V{base - step + 10}" stroke="#222" stroke-width="2"/>']
        out += [_text(left - 8, base - step / 2 + 10, name, "end")]
    out.append(_text(left, bottom + 34, label))
    return _document(left + width + 60, bottom + 42, out)


def _round_marks(most: float) -> list[float]:
    """Return five or so round numbers from 0 to `most`."""
    step = 10 ** math.floor(math.log10(most))
    step = next(step * part for part in (1, 0.5, 0.2, 0.1) if most / (step * part) >= 4)
    return [step * number for number in range(int(most / step) + 1)]


@dataclass(frozen=True)
class Curves:
    """A panel: its title, what its axes are, and by name the points (x, y) of each line."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def curves(panels: Sequence[Curves]) -> str:
    """Return panels of lines in two columns, both axes logarithmic; a line of slope one is what grows linearly."""
    width, height, out = 400, 300, []
    for number, panel in enumerate(panels):
        left, top = number % 2 * width, number // 2 * height
        out.append(f'<g transform="translate({left},{top})">{"".join(_panel(panel, width, height))}</g>')
    return _document(2 * width, -(-len(panels) // 2) * height, out)


def _panel(panel: Curves, width: int, height: int) -> Iterable[str]:
    points = [point for line in panel.lines.values() for point in line]
    left, right, top, bottom = 54, width - 12, 26, height - 40 - 15 * len(panel.lines)
    lows = [math.floor(math.log10(min(values))) for values in zip(*points, strict=True)]
    highs = [math.ceil(math.log10(max(values)) - 1e-9) for values in zip(*points, strict=True)]
    x0, y0 = lows
    x1, y1 = (max(low + 1, high) for low, high in zip(lows, highs, strict=True))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = math.log10(point[0]), math.log10(point[1])
        return left + (right - left) * (x - x0) / (x1 - x0), bottom - (bottom - top) * (y - y0) / (y1 - y0)

    yield _text(left, 16, panel.title)
    for mark in range(x0, x1 + 1):
        x, _ = place((10**mark, 10**y0))
        yield f'<path d="M{x:.1f},{top}V{bottom}" stroke="#ddd"/>{_text(x, bottom + 14, _power(mark), "middle")}'
    for mark in range(y0, y1 + 1):
        _, y = place((10**x0, 10**mark))
        yield f'<path d="M{left},{y:.1f}H{right}" stroke="#ddd"/>{_text(left - 4, y + 4, _power(mark), "end")}'
    yield _text(right, bottom + 29, f"{panel.x}; upwards: {panel.y}", "end")
    for number, (name, line) in enumerate(panel.lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = "L".join(f"{x:.1f},{y:.1f}" for x, y in map(place, line))
        yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for x, y in map(place, line):
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        y = bottom + 43 + 15 * number
        yield f'<path d="M{left},{y - 4}h18" stroke="{colour}" stroke-width="2"/>{_text(left + 24, y, name)}'


def _power(exponent: int) -> str:
    prefixes = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G"}
    third = exponent // 3 * 3
    return f"{10 ** (exponent - third)}{prefixes.get(third, f'e{third}')}"
