# SPDX-License-Identifier: MIT
"""How time and memory grow: with parameters (stages alone, replay, live), ranks, streams, and iterations kept.

Every point is measured in processes of its own, so that peaks are its own. What grows linearly is fitted by y = a + b x^k with
a, b >= 0 and least squares of the relative residuals, what should stay constant by a line through the logarithms. Writes
build/growth.json and .svg; points that are measured again replace those that are there, so that it can be run in pieces.
The live series need root.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import machine, plots, report, stages, training_overhead, updates
from bench.measure import seconds
from bench.training_overhead import MIRRORED, PAGE, Settings, memory_bytes
from data_extractor.extractor import Extractor
from flowcheck.eal import Eal
from flowcheck.replay import replay
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile
from packet_dump.dump import FileDump
from packet_parser.parser import Parser
from updater import arithmetic
from updater.listing import listing
from updater.log import LogWriter
from updater.log_format import GRADIENT
from updater.restore import restore_state
from updater.snapshot import State, write_state
from updater.updater import Updater  # noqa: F401  that what is timed need not load it
from workload_gen.fabric import Fabric
from workload_gen.record import Recording, record

__all__ = ["SERIES", "exponent", "judged"]

Values = dict[str, float]
_OUT = Path("build/growth.json")
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
#: Records of the ring that a stage alone has: the capture passes through it.
_RECORDS = 1 << 10
#: An exponent whose whole interval is so near 1 is called linear, so near 0 constant.
_LINEAR, _CONSTANT = 0.15, 0.1
_DRAWS = 400
#: That are tried.
_EXPONENTS = np.arange(0.05, 2.5, 0.01)
#: Of the memory that is free, a point may take so much.
_SHARE = 0.8


@contextlib.contextmanager
def _apart() -> Any:
    """Yield a call that runs a function in a new process, alone on a core, and returns what it returns."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _alone() -> None:
    os.sched_setaffinity(0, {machine.cores()[0]})
    torch.set_num_threads(1)


# -- what is measured ------------------------------------------------------------------------------------------------


class _Timed:
    """A stage, and the seconds that its polls took."""

    def __init__(self, stage: Any) -> None:
        self._stage, self.seconds = stage, 0.0

    @property
    def finished(self) -> bool:
        """Whether the stage is."""
        return self._stage.finished

    def poll(self) -> None:
        """Poll it."""
        self.seconds += seconds(self._stage.poll)


def _chain(path: Path, layout: Any, data_bytes: int, folder: Path) -> Values:
    _alone()
    plan = stages.plan_of(layout, data_bytes, ["a"])
    with (
        PacketRing.for_stream(folder / "ring", plan, "a", _RECORDS) as ring,
        SlotFile.for_plan(folder / "slots", plan) as slots,
        contextlib.closing(FileDump(Eal.start(), path, ring)) as dump,
    ):
        timed = [_Timed(stage) for stage in (dump, Parser(ring, plan, "a"), Extractor([ring], plan, slots))]
        stages.drain(*timed)
        assert slots.settled_next == 2, "the iteration is not whole"
    names = ("dump_s", "parse_s", "extract_s")
    return dict(zip(names, (stage.seconds for stage in timed), strict=True)) | _peak()


def _peak() -> Values:
    return {"peak_bytes": memory_bytes("self", "VmHWM")}


def _frames(parameters: int, _folder: Path, runs: int) -> list[Values]:
    """Take one iteration of two ranks from capture file to slot, both edges in one stream; each stage's polls timed."""
    data_bytes = 4 * parameters * stages.ITERATIONS
    out = []
    with tempfile.TemporaryDirectory(prefix="flowcheck-growth-", dir=_MEMORY) as folder:
        path = Path(folder) / "capture"
        with _apart() as call:
            layout = call(stages.capture, path, "simple", stages.PAYLOADS[0], data_bytes, 1)
        for run in range(runs):
            scratch = Path(folder) / str(run)
            scratch.mkdir()
            with _apart() as call:
                out.append(call(_chain, path, layout, data_bytes, scratch))
            shutil.rmtree(scratch)
    return out


def _updates(parameters: int, form: str, runs: int, folder: Path) -> list[Values]:
    _alone()
    plan, model, slot = updates.filled(form, parameters)
    revision, gradient = plan.revision(1), slot[: 4 * parameters]
    model.step(slot, revision)
    out: list[Values] = [{f"{form}_s": seconds(lambda: model.step(slot, revision))} for _ in range(runs)]
    if form == "fused":
        writer = LogWriter(folder, plan.identity(), 0)
        state = State("bench", 1, 1, True, arithmetic.current().model_dump(), model.model, model.optimizer.state_dict())

        def log(iteration: int) -> None:
            writer.append(GRADIENT, 1, iteration, 0, [gradient])
            writer.commit()

        for number, values in enumerate(out, 1):
            values["log_s"] = seconds(lambda number=number: log(number))
            values["raw_s"] = seconds(lambda: updates.write_raw(folder / "raw", [gradient] * 3))
            values["snapshot_s"] = seconds(lambda: write_state(folder / "snapshot.h5", state))
        writer.close()
    return [values | {f"{form}_{name}": value for name, value in _peak().items()} for values in out]


def _update(parameters: int, folder: Path, runs: int) -> list[Values]:
    """Step a state from a slot in either form; log the gradient, write a snapshot, and as many bytes as they are."""
    parameters = -(-parameters // 8000) * 8000
    out: list[Values] = [{} for _ in range(runs)]
    for form in ("fused", "default"):
        with _apart() as call:
            for values, more in zip(out, call(_updates, parameters, form, runs, folder), strict=True):
                values |= more
    return out


def _replay(recording: Path, links: Sequence[int], out: Path) -> Values:
    _alone()
    tempfile.tempdir = _MEMORY  # for rings and slots, as in a live run
    captures = {f"link-{link}": recording / f"link-{link}.pcapng" for link in links}
    begin = time.perf_counter()
    report = replay(recording / "plan.json", captures, out, keep_gradients=True)
    taken = time.perf_counter() - begin
    assert all(row["state"] == "committed" for row in report["iterations"])
    values = {"replay_s": taken} | _peak()
    values |= {"list_s": seconds(lambda: listing(out)), "restore_s": seconds(lambda: restore_state(out))}
    return values | {"disk_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file())}


def _offline(folder: Path, runs: int, **job: Any) -> list[Values]:
    """Record a job and replay it, dump to updater in one process."""
    recording = Recording(
        out=folder / "job", protocol="simple", mtu=4096, ip=4, optimizer="adamw", fused=True, truth="none", **job
    )  # fmt: skip
    with _apart() as call:
        call(record, recording)
    links = sorted(recording.links or (0, recording.ranks - 1))
    out = []
    for run in range(runs):
        with _apart() as call:
            out.append(call(_replay, recording.out, links, folder / f"checkpoints-{run}"))
        shutil.rmtree(folder / f"checkpoints-{run}")
    return out


def _live(folder: Path, settings: Settings) -> dict[str, Any]:
    with Fabric(settings.ranks, (MIRRORED,)) as fabric:
        found = training_overhead.train(settings, "flowcheck", fabric, folder)
    if found["lost"]:
        print(f"{found['lost']} iterations were not committed", file=sys.stderr)
    return found


def _live_job(folder: Path, runs: int, **job: Any) -> list[Values]:
    """Train a job with FlowCheck beside it: seconds from commit to commit, CPU of each stage, and their peaks."""
    out = []
    for run in range(runs):
        (folder / str(run)).mkdir()
        settings = Settings(batches=1, **job)
        found = _live(folder / str(run), settings)
        times = [when for iteration, when in found["saved"] if iteration >= training_overhead.WARM_UP]
        values = {"commit_s": statistics.median(np.diff(times)) / 1e9}
        values |= {f"{name}_s": taken for name, taken in training_overhead.cpu_s_per_step(found).items()}
        for name, stage in found["samples"][-1][1].items():
            values[f"{name}_bytes"] = stage["peak_bytes"]
        out.append(values)
        shutil.rmtree(folder / str(run))
    return out


def _live_iterations(iterations: int, folder: Path) -> dict[int, list[Values]]:
    """Train so many iterations with FlowCheck beside them: each stage's own memory after every tenth part."""
    found = _live(folder, Settings(steps=iterations, ranks=2, parameters=60_000, batches=1))
    out: dict[int, list[Values]] = {}
    for part in range(1, 11):
        iteration = iterations * part // 10
        near = min(found["samples"], key=lambda sample: abs(sample[0] - found["ended"][iteration - 1]))
        out[iteration] = [{f"{name}_bytes": stage["own_bytes"] for name, stage in near[1].items()}]
    return out


@dataclass(frozen=True)
class Series:
    """What is measured at several x: `measure(x, folder, runs)` returns the values of each run.

    Attributes:
        title, x: for people.
        at, quick: where it is measured.
        room: bytes of memory that a point takes for each x, about.
        constant: values, by the end of their names, that should not grow; `untold`: of which nothing is said.
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
    root: bool = field(default=False)


_TO_30M = (1_000_000, 3_000_000, 10_000_000, 30_000_000)
SERIES = {
    "frames": Series(
        "capture file to slot, one iteration", "parameters", (*_TO_30M, 100_000_000, 300_000_000), (20_000, 50_000),
        _frames, room=30,
    ),
    # Smaller states lie in the cache.
    "update": Series(
        "optimizer step, log, snapshot", "parameters", (10_000_000, 30_000_000, 100_000_000, 300_000_000),
        (16_000, 48_000), _update, room=30,
    ),
    "offline": Series(
        "replay of 3 iterations, 2 ranks, 2 streams", "parameters", (*_TO_30M, 100_000_000), (10_000, 20_000),
        lambda x, folder, runs: _offline(folder, runs, parameters=x, iterations=3), room=80, untold=("list_s",),
    ),
    "ranks": Series(
        "replay of 3 iterations of 1 M parameters, 2 streams", "ranks", (2, 4, 8, 16), (2, 3),
        lambda x, folder, runs: _offline(folder, runs, ranks=x, parameters=1_000_000, iterations=3),
        constant=("peak_bytes", "restore_s", "disk_bytes"), untold=("list_s", "replay_s"),
    ),
    "streams": Series(
        "replay of 3 iterations of 4 M parameters, 8 ranks", "streams", (2, 4, 6, 8), (2, 3),
        lambda x, folder, runs: _offline(
            folder, runs, ranks=8, links=tuple(range(x)), parameters=4_000_000, iterations=3
        ),
        constant=("restore_s", "disk_bytes"), untold=("list_s",),
    ),
    "iterations": Series(
        "replay of 20 k parameters, everything kept", "iterations", (100, 300, 1000, 3000), (4, 8),
        lambda x, folder, runs: _offline(folder, runs, parameters=20_000, iterations=x),
        constant=("peak_bytes", "restore_s"),
    ),
    "live": Series(
        "live, 2 ranks, one step", "parameters", _TO_30M, (20_000, 50_000),
        lambda x, folder, runs: _live_job(folder, runs, parameters=x, ranks=2, steps=20), room=150,
        untold=("supervisor_s", "supervisor_bytes"), root=True,
    ),
    "live_ranks": Series(
        "live, 1 M parameters, one step", "ranks", (2, 3, 4, 6), (2, 3),
        lambda x, folder, runs: _live_job(folder, runs, ranks=x, parameters=1_000_000, steps=24),
        untold=("_s", "_bytes"), root=True,
    ),
    "live_iterations": Series(
        "live, 60 k parameters, own memory", "iterations", (1500,), (30,), None, constant=("_bytes",),
        untold=("supervisor_bytes",), several=_live_iterations, root=True,
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
                out[name][point["x"]] = [values[name] for values in point["runs"] if name in values]
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
                "first": float(np.median(points[least])), "last": float(np.median(points[most])),
            }  # fmt: skip
            if not untold:
                k, interval = exponent(points, constant)
                row |= {"exponent": k, "interval": interval, "judged": judged(interval, constant)}
            out.append(row)
    return out


# -- what is shown ---------------------------------------------------------------------------------------------------

_COLUMNS = ("series", "value", "from", "to", "exponent", "95%", "judged")


def _figure(name: str, value: float) -> str:
    units = [(1e9, "GB"), (1e6, "MB"), (0, "kB")] if name.endswith("_bytes") else [(1, "s"), (1e-3, "ms"), (0, "µs")]
    least, unit = next(unit for unit in units if value >= unit[0])
    return f"{value / (least or (1e3 if unit == 'kB' else 1e-6)):.3g} {unit}"


def _cells(row: dict[str, Any]) -> list[str]:
    ends = [f"{_figure(row['value'], row[end])} at {row[at]:,}" for end, at in (("first", "from"), ("last", "to"))]
    told = ["", "", ""]
    if "exponent" in row:
        told = [f"{row['exponent']:.2f}", "{:.2f} to {:.2f}".format(*row["interval"]), row["judged"]]
    return [f"{row['series']} ({row['x']})", row["value"].rpartition("_")[0], *ends, *told]


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
