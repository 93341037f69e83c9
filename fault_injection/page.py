# SPDX-License-Identifier: MIT
"""The campaign's page: one HTML file, plots inside, nothing fetched from anywhere."""

from __future__ import annotations

import html
import math
from typing import Any

__all__ = ["render"]

_COLOURS = {
    "untouched": "#9db8a0", "repaired": "#2f7d4f", "waiting": "#d8c36a", "volatile": "#c98f4a", "incomplete": "#b9553f", "unseen": "#cccccc",
}  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse; width: 100% } td, th { padding: .15em .5em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } .bad { color: #fff; background: #b00020 } .good { color: #2f7d4f }
svg { max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif }
"""


def _parts(fault: dict[str, Any]) -> dict[str, int]:
    return {"untouched": fault["committed"] - fault["repaired"], **{name: fault[name] for name in list(_COLOURS)[1:]}}


def _bars(faults: list[dict[str, Any]]) -> str:
    """Return a bar per kind: what its iterations became."""
    out, left, width, step = [], 160, 760, 18
    for number, fault in enumerate(faults):
        y, x = number * step, float(left)
        out.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{html.escape(fault["name"])}</text>')
        for name, count in _parts(fault).items():
            size = width * count / max(1, fault["iterations"])
            if size:
                title = f"{fault['name']}: {count} {name}"
                out.append(
                    f'<rect x="{x:.1f}" y="{y + 2}" width="{size:.1f}" height="{step - 5}" fill="{_COLOURS[name]}"><title>{title}</title></rect>'
                )
            x += size
    y = len(faults) * step + 8
    for number, (name, colour) in enumerate(_COLOURS.items()):
        x = left + number * 120
        out.append(
            f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/><text x="{x + 17}" y="{y + 11}">{name}</text>'
        )
    return f'<svg viewBox="0 0 {left + width + 10} {y + 20}" role="img">{"".join(out)}</svg>'


def _loss(points: list[dict[str, Any]]) -> str:
    """Return measured shares with their intervals over the loss of a frame, both axes logarithmic, beside the formula's."""
    left, bottom, width, height = 60, 300, 700, 270

    def scale(value: float, low: float, high: float, size: float) -> float:
        return size * math.log(max(value, low) / low) / math.log(high / low)

    x_low, x_high = min(p["loss"] for p in points) / 2, max(p["loss"] for p in points) * 2
    y_low, y_high = max(min(p["low"] for p in points) / 2, 1e-6), min(1.0, max(p["high"] for p in points) * 2)
    out = [f'<path d="M{left},{bottom - height}V{bottom}H{left + width}" fill="none" stroke="#888"/>']
    for point in points:
        x = left + scale(point["loss"], x_low, x_high, width)
        y, low, high, formula = (
            bottom - scale(point[key], y_low, y_high, height) for key in ("rate", "low", "high", "formula")
        )
        label = f"{point['streams']} streams, p = {point['loss']:g}: {100 * point['rate']:.2f} %"
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="#2f7d4f" stroke-width="2"/>'
        )
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2f7d4f"/>')
        out.append(
            f'<line x1="{x - 10:.1f}" x2="{x + 10:.1f}" y1="{formula:.1f}" y2="{formula:.1f}" stroke="#b9553f" stroke-width="2"/>'
        )
        out.append(f'<text x="{x + 13:.1f}" y="{y + 4:.1f}">{label}</text>')
    out.append(
        f'<text x="{left}" y="{bottom + 18}">loss of a mirrored frame, {x_low:.2g} to {x_high:.2g}, logarithmic</text>'
    )
    out.append(
        f'<text x="{left}" y="{bottom - height - 8}">unrepairable iterations, {y_low:.2g} to {y_high:.2g}, logarithmic</text>'
    )
    return f'<svg viewBox="0 0 {left + width + 240} {bottom + 30}" role="img">{"".join(out)}</svg>'


def _table(rows: list[dict[str, Any]], columns: list[str], bad: tuple[str, ...]) -> str:
    head = "".join(f"<th>{column.replace('_', ' ')}</th>" for column in columns)
    body = []
    for row in rows:
        cells = "".join(
            f"<td{' class=bad' if column in bad and row[column] else ''}>{html.escape(_shown(row[column]))}</td>"
            for column in columns
        )
        body.append(f"<tr>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def render(document: dict[str, Any]) -> str:
    """Return the page of a campaign's document."""
    bad = ("wrong", "unrepaired", "untrue_ranges", "unlisted", "unaccounted")
    columns = [
        "name",
        "cases",
        "iterations",
        "committed",
        "repaired",
        "waiting",
        "volatile",
        "incomplete",
        "unseen",
        *bad,
        "seconds",
    ]
    broken = [problem for fault in document["faults"] for problem in fault["problems"]]
    verdict = (
        f'<p class="good">No promise was broken in {document["iterations"]} iterations.</p>'
        if not broken
        else f'<p class="bad">{len(broken)} broken promises</p><ul>{"".join(f"<li>{html.escape(b)}</li>" for b in broken)}</ul>'
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>FlowCheck fault campaign</title>",
        f"<style>{_STYLE}</style><h1>Fault campaign</h1>{verdict}",
        f"<p>Seed {document['seed']}, {document['workers']} workers, {document['seconds']} seconds, {document['recording_seconds']} of "
        "them to record the jobs.</p><h2>What the iterations became</h2>",
        _bars(document["faults"]),
    ]
    if document.get("loss"):
        columns_of_loss = ["streams", "loss", "iterations", "unrepairable", "rate", "low", "high", "formula", "inside"]
        parts += [
            "<h2>Unrepairable iterations</h2><p>Measured share with its 95 % interval (green), the formula's (red).</p>",
            _loss(document["loss"]),
            _table(document["loss"], columns_of_loss, ()),
        ]
    parts += ["<h2>Every kind</h2>", _table(document["faults"], columns, bad), "</html>\n"]
    return "".join(parts)
