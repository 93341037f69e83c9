# SPDX-License-Identifier: MIT
"""The campaign: jobs are recorded once, cases are drawn from the seed and spread over worker processes, results added up.

A case is its seed, kind and number; from these alone everything about it follows. It runs in one process, whose stages write
into a folder that is gone with it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowcheck.errors import CaptureError, ConfigError, FlowCheckError

if TYPE_CHECKING:
    from fault_injection.case import Case
    from fault_injection.judge import Verdict
    from fault_injection.kinds import Kind

__all__ = ["QUICK", "Plan", "campaign", "run_case"]

#: Jobs of `--quick`, and the iterations of jobs; those of outages need few.
QUICK_JOBS = ("ll-2", "ll128-3", "simple-4-hook")
QUICK_ITERATIONS, FULL_ITERATIONS, OUTAGE_ITERATIONS = 20, 60, 12
LOSS, LOSS_JOB = "loss", "loss-4"
#: Of the recordings: they are the same for every seed of the campaign.
RECORDING_SEED = 1
#: Of `--quick`: cases of each kind.
QUICK = 2
#: Cases of each point of the loss experiment, in `--quick` (where it was asked for) and else.
LOSS_CASES = (4, 60)
#: Of the full campaign: iterations in all, loss experiment included.
FULL_TOTAL = 200_000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        seed: of everything.
        quick: few jobs, few cases.
        workers: processes.
        out: folder of recordings and page; None: a temporary one.
        only: kinds; empty: all.
        cases: of each kind; None: as `quick` says.
        first: number of the first case of each kind, to repeat one.
    """

    seed: int
    quick: bool = False
    workers: int = 2
    out: Path | None = None
    only: tuple[str, ...] = ()
    cases: int | None = None
    first: int = 0


@functools.cache
def _job(folder: Path, streams: int | None = None) -> Any:
    from fault_injection.jobs import Job

    return Job(folder, streams)


def _scratch() -> str | None:
    """Return where a case's files go: memory, if there is some; the promises of a disk are the fault disks' matter."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _case(seed: int, name: str, number: int) -> str:
    """Return the options that repeat a case; `_document` puts --quick before them, which has jobs of its own."""
    return f"--seed {seed} --only {name} --case {number}"


def _loss_case(seed: int, streams: int, loss: float, number: int) -> str:
    return f"loss of {loss:g} on {streams} streams, seed {seed}, case {number}"


def run_case(seed: int, name: str, number: int, folders: list[Path]) -> dict[str, Any]:
    """Run one case; return its kind, job, what came of it (`Verdict` as a dictionary), and seconds."""
    from fault_injection.case import Case
    from fault_injection.kinds import load

    begun = time.monotonic()
    rng = random.Random(f"{seed}/{name}/{number}")
    kind = load()[name]
    fit = [job for job in map(_job, folders) if kind.fits(job)]
    if not fit:
        raise ConfigError(
            f"fault {name!r}: none of the jobs {[folder.name for folder in folders]} can be judged under it"
        )
    job = fit[number % len(fit)]
    case = Case.of(job, rng)
    kind.spoil(case)
    verdict = _judged(case, rng)
    verdict.name_case(f"{_case(seed, name, number)} ({job.name})")
    return {"name": name, "job": job.name, **asdict(verdict), "seconds": time.monotonic() - begun}


def run_loss(seed: int, streams: int, loss: float, number: int, folder: Path) -> dict[str, Any]:
    """Run one case of the loss experiment; return what `run_case` does, and `trials` and `lost` of this point."""
    from fault_injection import loss as losses
    from fault_injection.case import Case

    begun = time.monotonic()
    rng = losses.rng(seed, streams, loss, number)
    job = _job(folder, streams)
    case = Case.of(job, rng)
    losses.spoil(case, loss)
    verdict = _judged(case, rng, base=False)
    counted = range(2, job.iterations)  # the first one's buckets are others; the last one's record nobody repeats
    lost = len(set(counted) & set(verdict.lost))
    verdict.name_case(_loss_case(seed, streams, loss, number))
    own = {"point": (streams, loss), "trials": len(counted), "lost": lost}
    return {"name": "loss", "job": job.name, **asdict(verdict), **own, "seconds": time.monotonic() - begun}


def _judged(case: Case, rng: random.Random, base: bool | None = None) -> Verdict:
    """Run a case in a scratch folder; return its verdict."""
    from fault_injection.judge import Verdict

    try:
        with tempfile.TemporaryDirectory(prefix="flowcheck-fault-", dir=_scratch()) as scratch:
            return _run(case, Path(scratch), rng, base)
    except Exception as error:  # whatever a case ends with is a finding, never the campaign's end
        if os.environ.get("FLOWCHECK_FAULTS_RAISE"):
            raise
        verdict = Verdict(iterations=case.job.iterations)
        verdict.note("unrepaired", f"{type(error).__name__}: {error}".splitlines()[0], case.job.iterations)
        verdict.lost = list(range(1, case.job.iterations + 1))
        return verdict


def _run(case: Case, scratch: Path, rng: random.Random, base: bool | None) -> Verdict:
    from fault_injection.chain import Chain
    from fault_injection.judge import judge
    from fault_injection.processes import Processes

    captures = _write(case, scratch)
    counts = {name: len(shown) for name, shown in case.streams.items()}

    def chain() -> Chain | Processes:
        common = case.document, case.job.folder, captures, scratch, rng
        if case.kills is not None:
            return Processes(*common, case.job.iterations, case.kills)
        return Chain(*common, case.script, counts, case.live)

    refused = 0
    if case.refused_first is not None:
        case.refused_first(captures)
        with contextlib.suppress(CaptureError), chain():
            raise FlowCheckError(f"a cut capture was not refused: {captures}")
        refused = 1
        for path in scratch.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        captures = _write(case, scratch)
    with contextlib.ExitStack() as stack:
        for surrounding in case.surroundings:
            stack.enter_context(surrounding)
        run = stack.enter_context(chain())
        run.run()
    verdict = judge(case, run.out, run.packets, base=rng.random() < 0.3 if base is None else base)
    verdict.refused = refused
    return verdict


def _write(case: Any, scratch: Path) -> dict[str, Path]:
    from fault_injection.frames import write_capture

    captures = {}
    for name, shown in case.streams.items():
        captures[name] = scratch / f"{name}.pcap"
        write_capture(captures[name], ((one.frame, one.wire or len(one.frame), one.ns) for one in shown))
    return captures


# -- many cases -----------------------------------------------------------------------------------------------------


def _begin_worker() -> None:
    import logging

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # what the faults make the stages say; the verdict is in the counts


def _ended(task: tuple, error: BaseException) -> dict[str, Any]:
    """Return what `run_case` does of a case that has ended its process: every promise of it is broken."""
    from fault_injection.judge import Verdict

    what, *arguments = task
    name, which = (LOSS, _loss_case) if what is run_loss else (arguments[1], _case)
    verdict = Verdict()
    verdict.note("unrepaired", f"the process ended: {error}")
    verdict.name_case(which(*arguments[:-1]))
    own = {"point": tuple(arguments[1:3]), "trials": 0, "lost": 0} if what is run_loss else {}
    return {"name": name, "job": "", **asdict(verdict), **own, "seconds": 0.0}


def _rows(tasks: list[tuple], workers: int) -> Iterator[dict[str, Any]]:
    """Yield what comes of each task, in any order. A process that ends is replaced; what it ran is tried again, alone."""
    context, waiting, again = multiprocessing.get_context("spawn"), list(reversed(tasks)), []
    while waiting:
        running: dict[Future, tuple] = {}
        with ProcessPoolExecutor(workers, context, _begin_worker) as pool, contextlib.suppress(BrokenProcessPool):
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    running[pool.submit(*waiting[-1])] = waiting[-1]
                    waiting.pop()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield future.result()
                    del running[future]
        again += running.values()
    for task in again:
        with ProcessPoolExecutor(1, context, _begin_worker) as pool:
            try:
                yield pool.submit(*task).result()
            except BrokenProcessPool as error:
                yield _ended(task, error)


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="flowcheck-faults-") as folder:
            yield Path(folder)
    else:
        out.mkdir(parents=True, exist_ok=True)
        yield out


def _cases(plan: Plan, kinds: list[Kind], folders: dict[str, list[Path]], iterations: dict[str, int]) -> list[tuple]:
    """Return the tasks, kinds in turn, so that what is done at any moment is a cut through all of them."""
    if plan.cases is not None:
        counts = dict.fromkeys((kind.name for kind in kinds), plan.cases)
    else:
        each = QUICK if plan.quick else FULL_TOTAL / sum(kind.share * iterations[kind.name] for kind in kinds)
        counts = {kind.name: math.ceil(kind.share * each) for kind in kinds}
    return [
        (run_case, plan.seed, kind.name, plan.first + number, folders[kind.name])
        for number in range(max(counts.values()))
        for kind in kinds
        if number < counts[kind.name]
    ]


def _loss_cases(plan: Plan, folder: Path) -> list[tuple]:
    """Return the tasks of the loss experiment: streams and rates at which the formula has so many iterations lost."""
    from fault_injection.loss import POINTS, loss_at
    from flowcheck.sizing import unrepairable

    cases = plan.cases or LOSS_CASES[not plan.quick]
    tasks = []
    for streams, share in POINTS:
        loss = loss_at(_job(folder, streams).plan, share, unrepairable)
        tasks += [
            (run_loss, plan.seed, streams, loss, number, folder) for number in range(plan.first, plan.first + cases)
        ]
    return tasks


def _loss_rows(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the document's `loss` from the cases of the experiment."""
    from fault_injection.loss import row as entry
    from flowcheck.sizing import unrepairable

    out = []
    for streams, loss in sorted({row["point"] for row in rows}):
        own = [row for row in rows if row["point"] == (streams, loss)]
        formula = unrepairable(_job(folder, streams).plan, loss)
        out.append(entry(streams, loss, sum(row["trials"] for row in own), sum(row["lost"] for row in own), formula))
    return out


def campaign(plan: Plan, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Run the campaign; return the document of `faults --json`.

    Raises:
        ConfigError: a kind that there is not.
        FlowCheckError: a job cannot be recorded.
    """
    from fault_injection.jobs import JOBS, OUTAGE_JOBS, record_job
    from fault_injection.kinds import load
    from fault_injection.page import render

    kinds = load()
    unknown = [name for name in plan.only if name not in [*kinds, LOSS]]
    if unknown:
        raise ConfigError(f"no fault is named {unknown[0]!r}; there are {', '.join([*kinds, LOSS])}")
    chosen = [kind for name, kind in kinds.items() if not plan.only or name in plan.only]
    measured = LOSS in plan.only or not (plan.only or plan.quick)
    common = QUICK_JOBS if plan.quick else tuple(JOBS)
    lengths = dict.fromkeys(JOBS, QUICK_ITERATIONS if plan.quick else FULL_ITERATIONS)
    lengths |= {LOSS_JOB: FULL_ITERATIONS, **dict.fromkeys(OUTAGE_JOBS, OUTAGE_ITERATIONS)}
    begun = time.monotonic()
    with _folder(plan.out) as folder:
        cache = folder / "recordings"
        cache.mkdir(exist_ok=True)
        jobs = {kind.name: kind.jobs or common for kind in chosen}
        wanted = [*(name for some in jobs.values() for name in some), *([LOSS_JOB] if measured else [])]
        recorded = {name: record_job(name, cache, lengths[name], RECORDING_SEED) for name in dict.fromkeys(wanted)}
        recording_s = time.monotonic() - begun
        tasks: list[tuple] = []
        if chosen:
            folders = {kind: [recorded[name] for name in some] for kind, some in jobs.items()}
            tasks += _cases(plan, chosen, folders, {kind: lengths[some[0]] for kind, some in jobs.items()})
        if measured:
            tasks += _loss_cases(plan, recorded[LOSS_JOB])
        rows: list[dict[str, Any]] = []
        for row in _rows(tasks, plan.workers):
            rows.append(row)
            progress(len(rows), len(tasks))
        names = [*jobs, *([LOSS] if measured else [])]
        document = _document(plan, names, rows, recording_s, time.monotonic() - begun)
        document["loss"] = (
            _loss_rows(recorded[LOSS_JOB], [row for row in rows if row["name"] == LOSS]) if measured else []
        )
        if plan.out is not None:
            (plan.out / "faults.json").write_text(json.dumps(document, indent=1) + "\n")
            (plan.out / "faults.html").write_text(render(document))
        return document


_SUMS = (
    "iterations", "committed", "waiting", "volatile", "incomplete", "unseen", "repaired", "wrong", "unrepaired", "untrue_ranges",
    "unlisted", "unaccounted", "refused", "seconds",
)  # fmt: skip


def _document(plan: Plan, kinds: list[str], rows: list[dict], recorded: float, seconds: float) -> dict[str, Any]:
    faults = []
    for name in kinds:
        own = [row for row in rows if row["name"] == name]
        sums = {key: sum(row[key] for row in own) for key in _SUMS}
        sums["seconds"] = round(sums["seconds"], 2)
        problems = [f"{'--quick ' * plan.quick}{problem}" for row in own for problem in row["problems"]]
        faults.append({"name": name, "cases": len(own), **sums, "problems": problems[:20]})
    total = {key: sum(fault[key] for fault in faults) for key in _SUMS if key != "seconds"}
    total["unaccounted_packets"] = total.pop("unaccounted")
    return {
        **total, "faults": faults, "seed": plan.seed, "quick": plan.quick, "workers": plan.workers,
        "recording_seconds": round(recorded, 1), "seconds": round(seconds, 1),
    }  # fmt: skip


def broken(document: dict[str, Any]) -> bool:
    """Whether a campaign's document shows a broken promise."""
    return any(document[key] for key in ("wrong", "unaccounted_packets", "untrue_ranges", "unrepaired", "unlisted"))
