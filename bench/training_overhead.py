# SPDX-License-Identifier: MIT
"""What checkpointing every iteration costs a training step: no checkpoints, FlowCheck live, torch.save, DCP save, DCP async_save.

Each round trains the example job once in every way, in an order that turns, as a new job with the same model and data on one
fabric whose mirror is always on. All stages share the cores of this machine with the ranks; with --apart the ranks of every
way have one core and FlowCheck's stages the others, as if on a node of their own. Writes
build/training_overhead.json and .svg; with --more the rounds are added to those that are there, so that it can be run in
pieces. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import flowcheck
from bench import fabric_job, machine, plots, report
from bench.fabric_job import Rank
from bench.measure import ratio_interval
from bench.updates import torch_save
from flowcheck.run_folder import PLAN
from flowcheck.supervisor import status
from updater.directory import Directory
from workload_gen.fabric import Fabric
from workload_gen.record import Recording
from workload_gen.wire import connections

__all__ = ["STAGES", "WAYS", "Settings", "behind", "memory_bytes", "stages", "summary", "train"]

WAYS = {
    "none": "no checkpoints",
    "flowcheck": "FlowCheck, live",
    "torch_save": "torch.save",
    "dcp_save": "DCP save",
    "dcp_async_save": "DCP async_save",
}
#: Steps at the start of a job that do not count: DDP rebuilds its buckets after the first.
WARM_UP = 4
_PATIENCE_S = 120
_CHECKPOINTS = "checkpoints"
_SAMPLE_S = 0.1
#: Packages of the stages of a live run.
STAGES = ("packet_dump", "packet_parser", "data_extractor", "updater")
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
_COLUMNS = (
    "every iteration",
    "median step",
    "p95",
    "ratio",
    "95%",
    "kept an iteration",
    "lost, mean",
    "lost, most",
    "rank 0's peak",
)


@dataclass(frozen=True)
class Settings:
    """What is trained: steps that count in a job, ranks, parameters, batches of 4 short sequences a step, protocol, apart or not.

    `streams` is how many ports are mirrored, of every other rank: no two show the same edge.
    """

    steps: int = 16
    ranks: int = 4
    parameters: int = 1_000_000
    batches: int = 4
    protocol: str = "simple"
    apart: bool = False
    streams: int = 1

    @property
    def mirrored(self) -> tuple[int, ...]:
        """The ranks whose ports are mirrored."""
        return tuple(range(0, 2 * self.streams, 2))


def _cores(settings: Settings) -> tuple[set[int], set[int]]:
    """Return the cores of the ranks and those of FlowCheck's stages."""
    cores = os.sched_getaffinity(0)
    if not settings.apart:
        return cores, cores
    if len(cores) < 2:
        raise SystemExit("--apart: there is one core")
    return {min(cores)}, cores - {min(cores)}


def memory_bytes(pid: int | str, what: str) -> int:
    """Return the most that a process had resident, mapped shared memory included (`VmHWM`), or what is its own now (`RssAnon`)."""
    return int(Path(f"/proc/{pid}/status").read_text().partition(f"{what}:")[2].split()[0]) << 10


def stages(supervisor: int) -> dict[str, dict[str, float]]:
    """Return peak memory, own memory now, and seconds of CPU so far of a `flowcheck run` and of its stages, by package.

    Of dumps, of which there is one for each stream, together.
    """
    found: dict[str, dict[str, float]] = {}
    for pid in [supervisor, *map(int, Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split())]:
        with contextlib.suppress(OSError, IndexError):  # it has ended, or has only begun
            words = Path(f"/proc/{pid}/cmdline").read_text().split("from ")
            name = "supervisor" if pid == supervisor else words[1].partition(".")[0]
            ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            taken = {
                "peak_bytes": memory_bytes(pid, "VmHWM"), "own_bytes": memory_bytes(pid, "RssAnon"),
                "cpu_s": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
            }  # fmt: skip
            before = found.get(name, {})
            found[name] = {what: value + before.get(what, 0) for what, value in taken.items()}
    return found


class _Saver:
    """Saves a rank's state in a way, each iteration's beside the others; `saved` is when each was safe, on rank 0."""

    def __init__(self, way: str, job: Rank, folder: Path) -> None:
        self._way, self._job, self._folder, self.saved = way, job, folder, {}
        self._group = dist.new_group(backend="gloo") if way.startswith("dcp") else None
        self._pending: Future[Any] | None = None

    def __call__(self, iteration: int) -> None:
        state = {"model": self._job.model.state_dict(), "optimizer": self._job.optimizer.state_dict()}
        target = self._folder / f"{self._way}-{iteration}"
        if self._way == "torch_save":
            if self._job.rank == 0:
                torch_save(target, state | {"iteration": iteration})
                self.saved[iteration] = time.time_ns()
        elif self._way == "dcp_save":
            dcp.save(state, checkpoint_id=target, process_group=self._group)
            self.saved[iteration] = time.time_ns()
        elif self._way == "dcp_async_save":
            self.wait()  # or copies of the state would pile up
            self._pending = dcp.async_save(state, checkpoint_id=target, process_group=self._group)
            self._pending.add_done_callback(lambda done: self.saved.setdefault(iteration, time.time_ns()))

    def wait(self) -> None:
        """Wait until what was begun is saved."""
        if self._pending is not None:
            self._pending.result()

    def size(self) -> int:
        """Return the bytes of the first save."""
        first = self._folder / f"{self._way}-1"
        paths = first.iterdir() if first.is_dir() else [first] if first.exists() else []
        return sum(path.stat().st_size for path in paths)


def _rank(
    rank: int, settings: Settings, way: str, recording: Recording, hosts: tuple[str, ...], monitors: dict[int, str]
) -> dict[str, Any]:
    os.sched_setaffinity(0, _cores(settings)[0])
    job = Rank(recording, rank, hosts[rank], settings.batches)
    streams = []
    for host in settings.mirrored:
        address = connections(recording.layout(), host, recording.ip, None, 0)[0].forward.source
        links = [host, (host - 1) % settings.ranks]
        streams.append({"name": f"host{host}", "links": links, "host": [address], "interface": monitors[host]})
    wire = job.wire(streams)
    ended, save = [], _Saver(way, job, recording.out)
    with contextlib.ExitStack() as stack:
        if way == "flowcheck":
            hook = flowcheck.attach(
                job.ddp, job.optimizer, plan_url=recording.out, wire=wire, wait_s=_PATIENCE_S, required=True
            )
            stack.enter_context(hook)
        for iteration in range(1, WARM_UP + settings.steps + 1):
            job.step(iteration)
            ended.append(time.time_ns())
            save(iteration)
        save.wait()
    job.close()
    return {
        "ended": ended,
        "saved": sorted(save.saved.items()),
        "bytes": save.size(),
        "trainer_bytes": memory_bytes("self", "VmHWM"),
    }


@contextlib.contextmanager
def _shadow(folder: Path, last: int, cores: set[int]) -> Iterator[dict[str, Any]]:
    """Have the job of a folder shadowed to its iteration `last`; what is yielded then has, in `samples`, what the stages took."""
    found: dict[str, Any] = {"samples": []}
    over = threading.Event()

    def follow() -> None:
        while not (folder / PLAN).exists() and not over.wait(0.01):
            pass
        found["process"] = process = subprocess.Popen(
            [sys.executable, "-m", "flowcheck", "run", str(folder / PLAN), "--out", str(folder / _CHECKPOINTS)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
        while not over.wait(_SAMPLE_S):
            found["samples"].append((time.time_ns(), stages(process.pid)))

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield found
        until = time.monotonic() + _PATIENCE_S
        while status(folder / _CHECKPOINTS)["last_committed"] < last and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        over.set()
        thread.join()
        process = found.pop("process")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=_PATIENCE_S)
        if process.returncode:  # whatever else failed, this is why
            raise RuntimeError(f"flowcheck run failed: {errors[-500:]}")


def train(settings: Settings, way: str, fabric: Fabric, folder: Path) -> dict[str, Any]:
    """Train one job in a way, on a fabric that mirrors what it asks for; return what became of it.

    `ended` is when each step ended and `saved` when iterations were safe, in ns; `bytes` what one iteration took on the
    disk; `trainer_bytes` the most memory that rank 0 had. With FlowCheck, `samples` has what `stages` said and when, and `lost`
    how many iterations were not committed.
    """
    recording = Recording(
        out=folder, ranks=settings.ranks, protocol=settings.protocol, mtu=4096, ip=4,
        parameters=settings.parameters, bucket_mb=1.0,
    )  # fmt: skip
    last = WARM_UP + settings.steps
    shadow = _shadow(folder, last, _cores(settings)[1]) if way == "flowcheck" else contextlib.nullcontext({})
    arguments = (settings, way, recording, fabric.hosts, fabric.monitors)
    with fabric_job.ranks(settings.ranks, _rank, *arguments) as answer, shadow as shadowed:
        found = answer()
    if way == "flowcheck":
        rows = [row for row in Directory(folder / _CHECKPOINTS).iterations if row.state == "committed"]
        found["saved"] = [(row.number, row.entry.header.time_ns) for row in rows]
        found["bytes"] = int(np.median([row.entry.header.record_bytes for row in rows]))
        found["lost"] = last - len(rows)
    return found | shadowed


def behind(ended: list[int], saved: list[tuple[int, int]]) -> tuple[float, int]:
    """Return how many finished iterations are not safe: the mean over time from the first to the last step, and the most."""
    begin, end = ended[0], ended[-1]
    safe = [
        min(end, max(at, min((when for number, when in saved if number >= iteration), default=end)))
        for iteration, at in enumerate(ended, 1)
    ]
    most = max(sum(at <= moment < until for at, until in zip(ended, safe, strict=True)) for moment in ended)
    return (sum(safe) - sum(ended)) / (end - begin), most


def cpu_s_per_step(found: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of CPU that each stage takes for a step, over the steps that count."""
    begin, end = found["ended"][WARM_UP - 1], found["ended"][-1]
    inside = [sample for sample in found["samples"] if begin <= sample[0] <= end]
    if len(inside) < 2:
        return {}  # too short to say
    (first, before), (last, after) = inside[0], inside[-1]
    steps = (len(found["ended"]) - WARM_UP) * (last - first) / (end - begin)
    return {name: (stage["cpu_s"] - before[name]["cpu_s"]) / steps for name, stage in after.items()}


def _stages_cpu_s(rounds: list[dict[str, Any]]) -> dict[str, float]:
    each = [taken for found in rounds if (taken := cpu_s_per_step(found))]
    return {name: float(np.median([taken[name] for taken in each])) for name in (*STAGES, "supervisor") if each}


def summary(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each way: its step times over all rounds beside those without checkpoints, and what a crash costs."""
    steps = {way: [np.diff(found[way]["ended"])[WARM_UP - 1 :] / 1e9 for found in rounds] for way in rounds[0]}
    medians = {way: np.array([np.median(times) for times in some]) for way, some in steps.items()}
    rows = []
    for way, some in steps.items():
        lagged = [behind(found[way]["ended"], found[way]["saved"]) for found in rounds]
        rows.append(
            {
                "way": way, "name": WAYS[way], "rounds": len(rounds), "steps": sum(map(len, some)),
                "median_s": float(np.median(medians[way])), "p95_s": float(np.percentile(np.concatenate(some), 95)),
                "ratio": float(np.median(medians[way]) / np.median(medians["none"])),
                "interval": ratio_interval(medians[way], medians["none"]),
                "bytes": int(np.median([found[way]["bytes"] for found in rounds])),
                "behind": float(np.mean([mean for mean, _ in lagged])), "most_behind": max(most for _, most in lagged),
                "lost": sum(found[way].get("lost", 0) for found in rounds),
                "stages_cpu_s": _stages_cpu_s([found[way] for found in rounds if "samples" in found[way]]),
                "trainer_bytes": max(found[way]["trainer_bytes"] for found in rounds),
                "times_s": [round(float(time), 5) for times in some for time in times],
            }
        )  # fmt: skip
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    facts = [row["name"], f"{row['median_s'] * 1e3:.1f} ms", f"{row['p95_s'] * 1e3:.1f} ms"]
    if row["way"] == "none":
        kept = ["1", "", "", "all", "all"]
    else:
        low, high = row["interval"]
        kept = [f"{row['ratio']:.3f}", f"{low:.3f}-{high:.3f}", f"{row['bytes'] / 1e6:.2f} MB"]
        kept += [f"{row['behind']:.2f}", str(row["most_behind"])]
    return [*facts, *kept, f"{row['trainer_bytes'] / 1e6:.0f} MB"]


def _facts(rows: list[dict[str, Any]], settings: Settings) -> str:
    """Return a line on what the table is of."""
    found = next(row for row in rows if row["way"] == "flowcheck")
    taken = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in found["stages_cpu_s"].items())
    return (
        f"{found['rounds']} rounds of {settings.steps} steps; {found['lost']} iterations not committed; CPU of FlowCheck's stages "
        f"in ms a step: {taken}.\n"
    )


def _round(
    number: int, settings: Settings, fabric: Fabric, folder: Path, done: Callable[[str], None]
) -> dict[str, Any]:
    """Train once in every way, in an order that turns from round to round."""
    names, found = list(WAYS), {}
    for way in names[number % len(names) :] + names[: number % len(names)]:
        done(f"round {number + 1}: {WAYS[way]}")
        out = folder / way
        out.mkdir()
        found[way] = train(settings, way, fabric, out)
        shutil.rmtree(out)
    return {way: found[way] for way in names}


def main() -> None:
    """Train in every way, round by round; leave document and plot, and print the table."""
    usual = Settings()
    parser = argparse.ArgumentParser(prog="python -m bench.training_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("steps", "ranks", "parameters", "batches", "streams"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual, name))
    parser.add_argument("--protocol", choices=["ll", "ll128", "simple"], default=usual.protocol)
    parser.add_argument("--apart", action="store_true", help="The ranks on one core, FlowCheck's stages on the others.")
    parser.add_argument("--folder", type=Path, help="On the disk that counts; a temporary folder if not given.")
    parser.add_argument(
        "--name", default="training_overhead", help="Of the files in build/, and of the place in the page."
    )
    parser.add_argument("--more", action="store_true", help="Add the rounds to those that build/ has.")
    parser.add_argument("--store", action="store_true", help="Put table and plot into docs/performance.md.")
    options = parser.parse_args()
    if not 1 <= options.streams <= options.ranks // 2:
        parser.error(f"--streams: {options.ranks} ranks have 1 to {options.ranks // 2}, each of two edges of its own")
    settings = Settings(**{name: getattr(options, name) for name in asdict(usual)})
    path = Path("build") / f"{options.name}.json"
    document = {"machine": machine.facts(), "settings": asdict(settings), "rounds": []}
    if options.more and path.exists():
        before = json.loads(path.read_text())
        if before["settings"] != document["settings"]:
            parser.error(f"--more: {path} is of other settings: {before['settings']}")
        document["rounds"] = before["rounds"]
        if not options.rounds:
            document["machine"] = before["machine"]
    if options.rounds:
        with (
            tempfile.TemporaryDirectory(prefix="flowcheck-bench-", dir=options.folder) as folder,
            Fabric(settings.ranks, settings.mirrored) as fabric,
        ):
            for _ in range(options.rounds):
                number = len(document["rounds"])
                found = _round(number, settings, fabric, Path(folder), lambda what: print(what, file=sys.stderr))
                document["rounds"].append(found)
    document["rows"] = rows = summary(document["rounds"])
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document) + "\n")
    picture = plots.histograms({row["name"]: row["times_s"] for row in rows}, "seconds a step; line: median")
    path.with_suffix(".svg").write_text(picture)
    table = report.markdown(_COLUMNS, map(_cells, rows))
    print(table)
    if options.store:
        shown = PAGE.with_name(path.with_suffix(".svg").name)
        shown.write_text(picture)
        measured = report.measured_on(document["machine"])
        text = f"{measured}\n{table}\n{_facts(rows, settings)}\n![Step times]({shown.name})\n"
        report.put(PAGE, f"{options.name}: written by python -m bench.training_overhead --store", text)


if __name__ == "__main__":
    main()
