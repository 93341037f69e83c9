# SPDX-License-Identifier: MIT
"""How time and memory grow: with parameters (stages alone, replay, live), ranks, streams, and iterations kept.

Every point is measured in processes of its own, so that peaks are its own. What grows linearly is fitted by y = a + b x^k with
a, b >= 0 and least squares of the relative residuals, what should stay constant by a line through the logarithms. Writes
build/growth.json and .svg; points that are measured again replace those that are there, so that it can be run in pieces.
The live series need root.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import growth_jobs, machine, plots, report
from bench.growth_jobs import Values
from bench.training_overhead import PAGE, STAGES

__all__ = ["SERIES", "exponent", "judged"]

_OUT = Path("build/growth.json")
#: An exponent whose whole interval is so near 1 is called linear, so near 0 constant.
_LINEAR, _CONSTANT = 0.15, 0.1
_DRAWS = 400
#: That are tried.
_EXPONENTS = np.arange(0.05, 2.5, 0.01)
#: Of the memory that is free, a point may take so much.
_SHARE = 0.8


@dataclass(frozen=True)
class Series:
    """What is measured at several x: `measure(x, folder, runs)` returns the values of each run.

    Attributes:
        title, x: for people.
        at, quick: where it is measured.
        room: bytes of memory that a point takes for each x, about.
        constant: values, by the end of their names, that should not grow; `untold`: of which nothing is said.
        several: in place of `measure`, what has values of several x from one job.
        root: whether it needs root.
    """

    title: str
    x: str
    at: tuple[int, ...]
    quick: tuple[int, ...]
    measure: Callable[[int, Path, int], list[Values]] | None
    room: float = 0.0
    constant: tuple[str, ...] = ()
    untold: tuple[str, ...] = ()
    several: Callable[[int, Path], dict[int, list[Values]]] | None = None
    root: bool = False


_TO_30M = (1_000_000, 3_000_000, 10_000_000, 30_000_000)
SERIES = {
    "frames": Series(
        "capture file to slot, one iteration", "parameters", (*_TO_30M, 100_000_000, 300_000_000), (20_000, 50_000),
        growth_jobs.frames, room=30,
    ),
    # Smaller states lie in the cache.
    "update": Series(
        "optimizer step, log, snapshot", "parameters", (10_000_000, 30_000_000, 100_000_000, 300_000_000),
        (16_000, 48_000), growth_jobs.update, room=30,
    ),
    "offline": Series(
        "replay of 3 iterations, 2 ranks, 2 streams", "parameters", (*_TO_30M, 100_000_000), (10_000, 20_000),
        lambda x, folder, runs: growth_jobs.offline(folder, runs, parameters=x, iterations=3), room=80, untold=("list_s",),
    ),
    "ranks": Series(
        "replay of 3 iterations of 1 M parameters, 2 streams", "ranks", (2, 4, 8, 16), (2, 3),
        lambda x, folder, runs: growth_jobs.offline(folder, runs, ranks=x, parameters=1_000_000, iterations=3),
        constant=("peak_bytes", "restore_s", "disk_bytes"), untold=("list_s", "replay_s"),
    ),
    "streams": Series(
        "replay of 3 iterations of 4 M parameters, 8 ranks", "streams", (2, 4, 6, 8), (2, 3),
        lambda x, folder, runs: growth_jobs.offline(
            folder, runs, ranks=8, links=tuple(range(x)), parameters=4_000_000, iterations=3
        ),
        constant=("restore_s", "disk_bytes"), untold=("list_s",),
    ),
    "iterations": Series(
        "replay of 20 k parameters, everything kept", "iterations", (100, 300, 1000, 3000), (4, 8),
        lambda x, folder, runs: growth_jobs.offline(folder, runs, parameters=20_000, iterations=x),
        constant=("peak_bytes", "restore_s"),
    ),
    "live": Series(
        "live, 2 ranks, one step", "parameters", _TO_30M, (20_000, 50_000),
        lambda x, folder, runs: growth_jobs.live_job(folder, runs, parameters=x, ranks=2, steps=20), room=150,
        untold=("_iterations",), root=True,
    ),
    "live_ranks": Series(
        "live, 1 M parameters, one step", "ranks", (2, 3, 4, 6), (2, 3),
        lambda x, folder, runs: growth_jobs.live_job(folder, runs, ranks=x, parameters=1_000_000, steps=24),
        untold=("_s", "_bytes", "_iterations"), root=True,
    ),
    "live_streams": Series(
        "live, 8 ranks, 1 M parameters, one step", "streams", (1, 2, 3, 4), (1, 2),
        lambda x, folder, runs: growth_jobs.live_job(folder, runs, streams=x, ranks=8, parameters=1_000_000, steps=24),
        untold=("_s", "_bytes", "_iterations"), root=True,
    ),
    "live_iterations": Series(
        "live, 60 k parameters, own memory", "iterations", (6000,), (30,), None,
        # Not the supervisor's, which has an index of all that is kept.
        constant=tuple(f"{name}_bytes" for name in STAGES), several=growth_jobs.live_iterations, root=True,
    ),
}  # fmt: skip


# -- how it grows ----------------------------------------------------------------------------------------------------


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _power(x: np.ndarray, y: np.ndarray) -> float:
    """Return the k of the best y = a + b x^k: for each k, a and b from the normal equations of the relative residuals."""
    ones = 1 / y
    powers = (x / x.max()) ** _EXPONENTS[:, None] / y
    both, squares, sums = powers @ ones, (powers**2).sum(1), powers.sum(1)
    determinant = (ones**2).sum() * squares - both**2
    a = np.maximum((ones.sum() * squares - sums * both) / determinant, 0)
    b = (sums - a * both) / squares
    misfit = ((a[:, None] * ones + b[:, None] * powers - 1) ** 2).sum(1)
    return float(_EXPONENTS[np.argmin(np.where(b > 0, misfit, np.inf))])


def each(points: dict[float, list[float]]) -> float:
    """Return by how much a value grows for each x: the b of y = a + b x, by least squares of the relative residuals."""
    x, y = np.array(list(points), float), np.array([np.median(runs) for runs in points.values()])
    return float(np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(y)), rcond=None)[0][1])


def exponent(points: dict[float, list[float]], constant: bool) -> tuple[float, list[float]]:
    """Return how a value grows with x, and where 95% of the exponents lie that runs drawn again give.

    Args:
        points: the values of the runs at each x.
        constant: what is expected; else linear growth is, with a fixed part.
    """
    fit, x = (_slope if constant else _power), np.array(sorted(points), float)
    runs = [points[at] for at in sorted(points)]
    generator = np.random.default_rng(1)
    drawn = [
        fit(x, np.array([np.median(generator.choice(values, len(values))) for values in runs]))
        for _ in range(_DRAWS if max(map(len, runs)) > 1 else 1)
    ]
    return fit(x, np.array([np.median(values) for values in runs])), np.percentile(drawn, [2.5, 97.5]).tolist()


def judged(interval: Sequence[float], constant: bool) -> str:
    """Return how something grows, in words."""
    low, high = interval
    expected, width, said = (0, _CONSTANT, "constant") if constant else (1, _LINEAR, "linear")
    if low >= expected - width and high <= expected + width:
        return said
    if constant:
        return "grows" if low > 0 else "falls" if high < 0 else "not told"
    return "more than linear" if low > 1 else "less than linear" if high < 1 else "not told"


def _points(found: list[dict[str, Any]], series: str) -> dict[str, dict[float, list[float]]]:
    """Return by name the values of a series at each x."""
    out: dict[str, dict[float, list[float]]] = defaultdict(dict)
    for point in found:
        if point["series"] == series:
            for name in {name: None for values in point["runs"] for name in values}:
                # Of a short job the clock of the processes says nothing.
                if told := [values[name] for values in point["runs"] if values.get(name)]:
                    out[name][point["x"]] = told
    return out


def rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each value of each series that was measured at two x or more."""
    out = []
    for name, series in SERIES.items():
        for value, points in _points(found, name).items():
            if len(points) < 2:
                continue
            constant, untold = value.endswith(series.constant or " "), value.endswith(series.untold or " ")
            least, most = min(points), max(points)
            row = {
                "series": name, "value": value, "x": series.x, "from": least, "to": most,
                "first": float(np.median(points[least])), "last": float(np.median(points[most])), "each": each(points),
            }  # fmt: skip
            if not untold:
                k, interval = exponent(points, constant)
                row |= {"exponent": k, "interval": interval, "judged": judged(interval, constant)}
            out.append(row)
    return out


# -- what is shown ---------------------------------------------------------------------------------------------------

_COLUMNS = ("series", "value", "from", "to", "each", "exponent", "95%", "judged")
_UNITS = {
    "_bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
    "_iterations": ((1, "iterations"),),
    "_s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")),
}


def _figure(name: str, value: float) -> str:
    units = _UNITS[name[name.rindex("_") :]]
    scale, unit = next((unit for unit in units if abs(value) >= unit[0]), units[-1])
    return f"{value / scale:.3g} {unit}"


def _cells(row: dict[str, Any]) -> list[str]:
    ends = [f"{_figure(row['value'], row[end])} at {row[at]:,}" for end, at in (("first", "from"), ("last", "to"))]
    told = ["", "", ""]
    if "exponent" in row:
        told = [f"{row['exponent']:.2f}", "{:.2f} to {:.2f}".format(*row["interval"]), row["judged"]]
    return [
        f"{row['series']} ({row['x']})",
        row["value"].rpartition("_")[0],
        *ends,
        _figure(row["value"], row["each"]),
        *told,
    ]


def _picture(found: list[dict[str, Any]]) -> str:
    panels = []
    for name, series in SERIES.items():
        for end, what in (("_s", "seconds"), ("_bytes", "bytes")):
            lines = {
                value.removesuffix(end): [(x, float(np.median(runs))) for x, runs in sorted(points.items())]
                for value, points in _points(found, name).items()
                if value.endswith(end) and len(points) > 1
            }
            if lines:
                panels.append(plots.Curves(f"{name}: {series.title}", series.x, what, lines))
    return plots.curves(panels)


def _measure(name: str, x: int, runs: int, folder: Path | None) -> list[dict[str, Any]]:
    """Return the points of a series that are measured together at x; none if there is no room for it."""
    series = SERIES[name]
    free = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) << 10
    if series.room * x > _SHARE * free:
        print(
            f"{name} at {x}: left out, takes about {series.room * x / 1e9:.0f} GB of {free / 1e9:.0f} GB free",
            file=sys.stderr,
        )
        return []
    print(f"{name} at {x}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="flowcheck-growth-", dir=folder) as scratch:
        found = series.several(x, Path(scratch)) if series.several else {x: series.measure(x, Path(scratch), runs)}
    return [{"series": name, "x": at, "runs": values} for at, values in found.items()]


def main() -> None:
    """Measure what is asked for; leave document and plot, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="SERIES", choices=SERIES, default=list(SERIES))
    parser.add_argument("--at", nargs="+", type=int, metavar="X", help="Only here; default: everywhere.")
    parser.add_argument("--runs", type=int, default=3, help="Of each point; 0: show what build/ has.")
    parser.add_argument("--quick", action="store_true", help="So little that the figures mean nothing: does it run?")
    parser.add_argument("--folder", type=Path, help="On the disk that counts; a temporary folder if not given.")
    parser.add_argument("--store", action="store_true", help="Put table and plot into docs/performance.md.")
    options = parser.parse_args()
    found, facts = [], machine.facts()
    if _OUT.exists() and not options.quick:
        before = json.loads(_OUT.read_text())
        found, facts = before["points"], facts if options.runs else before["machine"]
    for name in options.only if options.runs else ():
        if SERIES[name].root and os.geteuid():
            print(f"{name}: not measured, it builds a network: needs root", file=sys.stderr)
            continue
        usual = SERIES[name].quick if options.quick else SERIES[name].at
        for x in [at for at in options.at or usual if at in usual]:
            new = _measure(name, x, options.runs, options.folder)
            again = {(point["series"], point["x"]) for point in new}
            found = [point for point in found if (point["series"], point["x"]) not in again] + new
    document = {"machine": facts, "points": found, "rows": rows(found)}
    _OUT.parent.mkdir(exist_ok=True)
    _OUT.write_text(json.dumps(document) + "\n")
    picture, table = _picture(found), report.markdown(_COLUMNS, map(_cells, document["rows"]))
    _OUT.with_suffix(".svg").write_text(picture)
    print(table)
    if options.store:
        PAGE.with_name("growth.svg").write_text(picture)
        text = f"{report.measured_on(document['machine'])}\n{table}\n![Growth](growth.svg)\n"
        report.put(PAGE, "growth: written by python -m bench.growth --store", text)


if __name__ == "__main__":
    main()
