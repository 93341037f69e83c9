# SPDX-License-Identifier: MIT
"""The campaign: jobs are recorded once, cases are drawn from the seed and spread over worker processes, results added up.

A case is its seed, kind and number; from these alone everything about it follows. It runs in one process, whose stages write
into a folder that is gone with it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowcheck.errors import CaptureError, ConfigError, FlowCheckError

__all__ = ["QUICK", "Plan", "campaign", "run_case"]

#: Jobs and their iterations.
QUICK_JOBS = {"ll-2": 20, "ll128-3": 20, "simple-4-hook": 20}
FULL_ITERATIONS = 60
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
    verdict, _ = _judged(case, rng)
    where = f"--seed {seed} --only {name} --case {number} ({job.name})"
    verdict.problems = [f"{where}: {problem}" for problem in verdict.problems]
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
    verdict, states = _judged(case, rng, base=False)
    trials, lost = losses.unrepaired(states, 2, job.iterations)
    where = f"loss of {loss:g} on {streams} streams, seed {seed}, case {number}"
    verdict.problems = [f"{where}: {problem}" for problem in verdict.problems]
    own = {"point": (streams, loss), "trials": trials, "lost": lost}
    return {"name": "loss", "job": job.name, **asdict(verdict), **own, "seconds": time.monotonic() - begun}


def _judged(case: Any, rng: random.Random, base: bool | None = None) -> tuple[Any, dict[int, str]]:
    """Run a case in a scratch folder; return its verdict and the state of every iteration."""
    from fault_injection.judge import Verdict

    try:
        with tempfile.TemporaryDirectory(prefix="flowcheck-fault-", dir=_scratch()) as scratch:
            return _run(case, Path(scratch), rng, base)
    except Exception as error:  # whatever a case ends with is a finding, never the campaign's end
        if os.environ.get("FLOWCHECK_FAULTS_RAISE"):
            raise
        verdict = Verdict(iterations=case.job.iterations)
        verdict.note("unrepaired", f"{type(error).__name__}: {error}".splitlines()[0], case.job.iterations)
        return verdict, {}


def _run(case: Any, scratch: Path, rng: random.Random, base: bool | None) -> tuple[Any, dict[int, str]]:
    from fault_injection.chain import Chain
    from fault_injection.judge import judge
    from updater.listing import listing

    captures = _write(case, scratch)
    counts = {name: len(shown) for name, shown in case.streams.items()}

    def chain() -> Chain:
        return Chain(case.document, case.job.folder, captures, scratch, rng, case.script, counts, case.live)

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
    states = {row["iteration"]: row["state"] for row in listing(run.out)["iterations"]}
    verdict = judge(case, run.out, run.packets, base=rng.random() < 0.3 if base is None else base)
    verdict.refused = refused
    return verdict, states


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


def _task(task: tuple) -> dict[str, Any]:
    what, *arguments = task
    return what(*arguments)


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="flowcheck-faults-") as folder:
            yield Path(folder)
    else:
        out.mkdir(parents=True, exist_ok=True)
        yield out


def _cases(plan: Plan, kinds: Iterable[str], folders: list[Path], iterations: int) -> list[tuple]:
    """Return the tasks, kinds in turn, so that what is done at any moment is a cut through all of them."""
    if plan.cases is not None:
        each = plan.cases
    else:
        each = QUICK if plan.quick else -(-FULL_TOTAL // (iterations * len(list(kinds))))
    return [
        (run_case, plan.seed, name, number, folders)
        for number in range(plan.first, plan.first + each)
        for name in kinds
    ]


def _loss_cases(plan: Plan, folder: Path) -> list[tuple]:
    """Return the tasks of the loss experiment: streams and rates at which the formula has so many iterations lost."""
    from fault_injection.loss import POINTS, loss_at, plan_of
    from flowcheck.sizing import unrepairable

    cases = plan.cases or LOSS_CASES[not plan.quick]
    tasks = []
    for streams, share in POINTS:
        loss = loss_at(plan_of(_job(folder, streams).document), share, unrepairable)
        tasks += [
            (run_loss, plan.seed, streams, loss, number, folder) for number in range(plan.first, plan.first + cases)
        ]
    return tasks


def _loss_rows(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the document's `loss` from the cases of the experiment."""
    from fault_injection.loss import plan_of
    from fault_injection.loss import row as entry
    from flowcheck.sizing import unrepairable

    out = []
    for streams, loss in sorted({row["point"] for row in rows}):
        own = [row for row in rows if row["point"] == (streams, loss)]
        formula = unrepairable(plan_of(_job(folder, streams).document), loss)
        out.append(entry(streams, loss, sum(row["trials"] for row in own), sum(row["lost"] for row in own), formula))
    return out


def campaign(plan: Plan, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Run the campaign; return the document of `faults --json`.

    Raises:
        ConfigError: a kind that there is not.
        FlowCheckError: a job cannot be recorded.
    """
    from fault_injection.jobs import JOBS, record_job
    from fault_injection.kinds import load
    from fault_injection.page import render

    kinds = list(load())
    unknown = [name for name in plan.only if name not in [*kinds, LOSS]]
    if unknown:
        raise ConfigError(f"no fault is named {unknown[0]!r}; there are {', '.join([*kinds, LOSS])}")
    chosen = [name for name in kinds if not plan.only or name in plan.only]
    measured = LOSS in plan.only or not (plan.only or plan.quick)
    jobs = QUICK_JOBS if plan.quick else {name: FULL_ITERATIONS for name in JOBS if name != LOSS_JOB}
    begun = time.monotonic()
    with _folder(plan.out) as folder:
        cache = folder / "recordings"
        cache.mkdir(exist_ok=True)
        wanted = [(name, cache, count, RECORDING_SEED) for name, count in jobs.items() if chosen]
        if measured:
            wanted.append((LOSS_JOB, cache, FULL_ITERATIONS, RECORDING_SEED))
        folders = [record_job(*one) for one in wanted]
        recorded = time.monotonic() - begun
        tasks = _cases(plan, chosen, folders[: len(jobs)], next(iter(jobs.values()))) if chosen else []
        if measured:
            tasks += _loss_cases(plan, folders[-1])
        rows: list[dict[str, Any]] = []
        with multiprocessing.get_context("spawn").Pool(plan.workers, _begin_worker) as pool:
            for row in pool.imap_unordered(_task, tasks):
                rows.append(row)
                progress(len(rows), len(tasks))
        document = _document(plan, [*chosen, *([LOSS] if measured else [])], rows, recorded, time.monotonic() - begun)
        document["loss"] = _loss_rows(folders[-1], [row for row in rows if row["name"] == LOSS]) if measured else []
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
        faults.append(
            {"name": name, "cases": len(own), **sums, "problems": [p for row in own for p in row["problems"]][:20]}
        )
    total = {key: sum(fault[key] for fault in faults) for key in _SUMS if key != "seconds"}
    total["unaccounted_packets"] = total.pop("unaccounted")
    return {
        **total, "faults": faults, "seed": plan.seed, "quick": plan.quick, "workers": plan.workers,
        "recording_seconds": round(recorded, 1), "seconds": round(seconds, 1),
    }  # fmt: skip


def broken(document: dict[str, Any]) -> bool:
    """Whether a campaign's document shows a broken promise."""
    return any(document[key] for key in ("wrong", "unaccounted_packets", "untrue_ranges", "unrepaired", "unlisted"))
