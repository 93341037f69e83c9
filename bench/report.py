# SPDX-License-Identifier: MIT
"""What becomes of the rows: a table, a plot, and the comparison with ratios that were stored before."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.measure import COSTS

__all__ = ["guard", "markdown", "measured_on", "plot", "put", "store", "table"]

#: What a ratio may lose, beyond noise, before the guard fails.
MOST_LOST = 0.15
_COLUMNS = ("name", "value", "packets/s", "yardstick", "its value", "ratio", "95%", "target", "spread")
_COLOURS = {True: "#2f7d4f", False: "#b9553f", None: "#7d8794"}
_FIGURES = "figures: written by ./build.sh bench --store"


def _figure(value: float, unit: str) -> str:
    if unit == "s/step":
        return f"{value * 1e3:.2f} ms/step"
    scale, prefix = next(step for step in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= step[0] or step[1] == "k")
    return f"{value / scale:.2f} {prefix}{unit}"


def _reaches(row: dict[str, Any]) -> bool | None:
    return None if row["target"] is None else row["ratio"] >= row["target"]


def _cells(row: dict[str, Any]) -> list[str]:
    met = {True: " met", False: " missed", None: ""}[_reaches(row)]
    low, high = row["interval"]
    return [
        row["name"], _figure(row["value"], row["unit"]), f"{row['packets_per_s'] / 1e6:.2f} M" if row["packets_per_s"] else "",
        row["yardstick"], _figure(row["yardstick_value"], row["unit"]), f"{row['ratio']:.3f}", f"{low:.3f}-{high:.3f}",
        f"{row['target']:.2f}{met}" if row["target"] else "", f"{row['spread']:.2f}",
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows for a terminal."""
    out = Table(title="medians; spread: (longest - shortest) / median")
    for column in _COLUMNS:
        out.add_column(
            column, justify="left" if column in ("name", "yardstick", "target") else "right", no_wrap=column == "name"
        )
    for row in rows:
        out.add_row(*_cells(row))
    return out


def measured_on(machine: dict[str, Any]) -> str:
    """Return the facts of a machine as a line for a document."""
    said = (f"{name.replace('_', ' ')} {value}" for name, value in machine.items())
    return f"Measured on: {', '.join(said)}.\n"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for a document."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows: list[dict[str, Any]]) -> str:
    """Return an SVG: each ratio that has a target as a bar with its interval, the target as a line, on a logarithmic axis."""
    rows = [row for row in rows if row["target"] is not None]
    left, width, step, low, high = 170, 620, 22, 0.05, 2.5

    def x(ratio: float) -> float:
        return left + width * math.log(min(max(ratio, low), high) / low) / math.log(high / low)

    bottom = step * len(rows) + 6
    out = [
        '<style>text { font: 12px system-ui, sans-serif; fill: #444 }</style>',
        f'<rect width="{left + width + 60}" height="{bottom + 42}" fill="#fff"/>',
    ]  # fmt: skip
    for mark in (0.05, 0.1, 0.2, 0.5, 1, 2):
        out.append(f'<path d="M{x(mark):.1f},0V{bottom}" stroke="#ddd"/>')
        out.append(f'<text x="{x(mark):.1f}" y="{bottom + 15}" text-anchor="middle">{mark:g}</text>')
    for number, row in enumerate(rows):
        y, ratio, target = number * step + 4, row["ratio"], row["target"]
        begin, end = (x(value) for value in row["interval"])
        title = html.escape(f"{row['name']}: {ratio:.3f} of {row['yardstick']}, target {target}")
        out += [
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{html.escape(row["name"])}</text>',
            f'<rect x="{left}" y="{y + 2}" width="{x(ratio) - left:.1f}" height="{step - 9}" fill="{_COLOURS[_reaches(row)]}">'
            f"<title>{title}</title></rect>",
            f'<path d="M{begin:.1f},{y + 8}H{end:.1f}" stroke="#222" stroke-width="2"/>',
            f'<path d="M{x(target):.1f},{y - 1}v{step - 3}" stroke="#222" stroke-width="2" stroke-dasharray="3 2"/>',
        ]
    out.append(
        f'<text x="{left}" y="{bottom + 34}">ratio to the yardstick, logarithmic; line: 95%; dashed: target</text>'
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {bottom + 42}" role="img">{"".join(out)}</svg>\n'


def put(page: Path, mark: str, text: str) -> None:
    """Put a text into a page in place of what stands between the comment `mark` and the next `end of` its first word.

    Raises:
        ValueError: the page has no such place.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark.partition(':')[0]} -->"
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page} has no lines {begin!r} and {end!r}")
    page.write_text(f"{before}{begin}\n{text}{end}{after}")


def store(document: dict[str, Any], ratios: Path, page: Path) -> None:
    """Keep ratios for the guard, and put table and plot into the page, which has a place for them; ValueError if not."""
    picture, results = page.with_suffix(".svg"), document["results"]
    rows = markdown(_COLUMNS, map(_cells, results))
    put(page, _FIGURES, f"{measured_on(document['machine'])}\n{rows}\n![Ratios and targets]({picture.name})\n")
    picture.write_text(plot(results))
    kept = {row["name"]: {"ratio": row["ratio"], "interval": row["interval"]} for row in results}
    ratios.write_text(json.dumps({"machine": document["machine"], "ratios": kept}, indent=1) + "\n")


def _noise(row: dict[str, Any]) -> float:
    low, high = row["interval"]
    return (high - low) / 2 / row["ratio"]


def guard(rows: list[dict[str, Any]], stored: dict[str, Any]) -> list[str]:
    """Return a line for each ratio that lost more than MOST_LOST and the noise of both measurements."""
    lost = []
    for row in rows:
        before = stored["ratios"].get(row["name"])
        if before is None:
            continue
        kept = row["ratio"] / before["ratio"]
        loss = kept - 1 if row["name"] in COSTS else 1 - kept
        noise = _noise(row) + _noise(before)
        if loss > MOST_LOST + noise:
            lost.append(
                f"{row['name']}: ratio {row['ratio']:.3f}, stored {before['ratio']:.3f}: {100 * loss:.0f}% worse, "
                f"noise {100 * noise:.0f}%, at most {100 * MOST_LOST:.0f}% beyond it"
            )
    return lost
