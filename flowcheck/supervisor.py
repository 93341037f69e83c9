# SPDX-License-Identifier: MIT
"""`flowcheck run`: starts a plan's stages, watches and restarts them, shows what happens, ends them in order.

Rings and slots live in a folder of shared memory whose name follows from the checkpoint directory; there the supervisor
also writes what `flowcheck status` reads. A stage that dies is started again over the same files and goes on where it
was. A signal ends the dumps; the stages behind them end by themselves when they have drained what was captured.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowcheck import plan as plans
from flowcheck.counters import extract_state, packet_counters, parse_counts
from flowcheck.errors import ConfigError, FlowCheckError
from flowcheck.files import write_private
from flowcheck.formats import IDENTITY
from flowcheck.learned import UnlearnedLayout
from flowcheck.ring import PacketRing
from flowcheck.run_folder import ACKNOWLEDGEMENT, FULL_STATES
from flowcheck.slots import SlotFile
from flowcheck.stage import READY_VARIABLE
from flowcheck.verdicts import VERDICTS

__all__ = ["INBOX", "Supervisor", "is_live", "scratch_folder", "status"]

#: A folder in the scratch folder, for `flowcheck rebase`.
INBOX = "bases"
#: The plan that the dumps follow, in the scratch folder: the job may replace its own at any time.
_DUMPED_PLAN = "plan.json"
_STATUS = "status.json"
_LOOK_S = 0.05
_STATUS_S = 1.0
#: Of the time, at most so much goes into reading how the run stands: a log of many iterations takes long to read.
_STATUS_SHARE = 0.05
_BACKOFF_S, _BACKOFF_MOST_S = 0.1, 5.0
#: A stage that has run for so long was well; its next failure begins anew.
_WELL_S = 1.0
#: Exit statuses that another start does not mend: wrong usage, a bad plan, a corrupt file.
_FINAL = {2, 3, 5}
_DRAIN_S = 120.0
#: Nice value of a dump.
_URGENT = -10
_PR_SET_PDEATHSIG = 1
#: The newest iterations that were lost, in a status.
_LOST_SHOWN = 5


def scratch_folder(out: Path) -> Path:
    """Return where the rings and slots of a checkpoint directory lie while it is written."""
    shared = Path("/dev/shm")
    root = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    name = hashlib.sha256(os.fsencode(os.path.realpath(out))).hexdigest()[:16]
    return root / f"flowcheck-{os.getuid()}-{name}"


def _make_private(folder: Path) -> None:
    """Make a folder for this user alone; ConfigError if something else has its name."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    if not os.path.isdir(folder) or os.path.islink(folder) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder}: is not a folder of this user alone; remove it")


def _undrained(scratch: Path) -> str | None:
    """Return whose rings and slots hold what was captured and not committed, and how much; None if all was."""
    frames = iterations = 0
    identity = b""
    for path in scratch.glob("*.ring"):
        with contextlib.suppress(FlowCheckError), PacketRing.open(path) as ring:
            frames += ring.written - ring.extracted
            identity = ring.identity
    with contextlib.suppress(FlowCheckError, FileNotFoundError), SlotFile.open(scratch / "slots") as slots:
        iterations = slots.settled_next - slots.consumed_next
        identity = slots.identity
    if not frames and not iterations:
        return None
    whose = np.frombuffer(identity, IDENTITY)[0]
    run, attempt = whose["run_id"].decode(errors="replace"), int(whose["attempt"])
    return f"attempt {attempt} of run {run!r}, {frames} frames and {iterations} decided iterations"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _go_first() -> None:
    """Have this process run before others that want its core, if that is allowed: a mirror does not wait, all else can."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _URGENT)
        # Where the kernel shares cores out by session first (sched(7), autogroup), the session has to go first, too.
        Path("/proc/self/autogroup").write_text(str(_URGENT))


@dataclass
class _Child:
    """One stage: its command, and the process that runs it now."""

    name: str
    command: list[str]
    errors: Path
    environment: dict[str, str]
    urgent: bool = False
    process: subprocess.Popen[bytes] | None = None
    ready_pipe: int = -1
    ready: bool = False
    restarts: int = 0
    started: float = 0.0
    backoff: float = _BACKOFF_S
    start_at: float = 0.0
    told: bool = False
    done: bool = False
    rate: float = 0.0
    counted: int = 0

    def start(self) -> None:
        """Start the process; it dies with this one."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)

        def begin() -> None:
            _die_with_parent()
            if self.urgent:
                _go_first()

        with open(self.errors, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as errors:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=(writing,),
                env={**self.environment, READY_VARIABLE: str(writing)}, preexec_fn=begin, start_new_session=True,
            )  # fmt: skip
        os.close(writing)
        if self.ready_pipe >= 0:
            os.close(self.ready_pipe)
        self.ready_pipe, self.ready, self.told, self.started = reading, False, False, time.monotonic()

    def look(self) -> int | None:
        """Note whether the process is ready; return its exit status if it has ended."""
        if not self.ready:
            with contextlib.suppress(BlockingIOError):
                self.ready = os.read(self.ready_pipe, 1) == b"1"
        return self.process.poll()

    def last_words(self) -> str:
        """Return what the process said on stderr, in one line."""
        return " ".join(self.errors.read_text(errors="replace").split())[-500:]


@dataclass
class Supervisor:
    """One live run: `run` returns when a signal or a fatal error has ended it.

    Attributes:
        plan_path: the job plan, every stream of which names its interface or port.
        out: the checkpoint directory.
        busy: the stages never wait.
        show: called with the status document about once a second.
        say: called with a line when something happens.
    """

    plan_path: Path
    out: Path
    busy: bool = False
    show: Callable[[dict[str, Any]], None] = lambda document: None
    say: Callable[[str], None] = lambda line: None
    _children: list[_Child] = field(default_factory=list)
    _plan: plans.Plan | None = None
    _stopping: bool = False
    _complained: set[str] = field(default_factory=set)
    _alarms: int = 0
    _volatile: bool = False

    def run(self) -> dict[str, Any]:
        """Run until SIGINT or SIGTERM, then until everything captured is drained; return the last status.

        Raises:
            ConfigError: the plan or a stream's source cannot be used, or another run has the directory.
            FlowCheckError: a stage failed in a way that another start does not mend.
        """
        plan = self._plan = plans.load(self.plan_path, incomplete=True)
        for stream in plan.shard.streams:
            if not (stream.interface or stream.port):
                raise ConfigError(f"{self.plan_path}: stream {stream.name!r} names neither interface nor port")
        scratch = scratch_folder(self.out)
        _make_private(scratch)
        lock = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ConfigError(
                f"{self.out}: another `flowcheck run` writes to it; stop that one, or choose another"
            ) from error
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._discard_others(scratch, plan)
            write_private(scratch / _DUMPED_PLAN, plan.canonical())
            self._children = self._dumps(scratch) + (self._others(scratch) if plan.complete else self._learner(scratch))
            self._watch(scratch)
            document = self._status(scratch)
            # What was not drained stays for the next run.
            shutil.rmtree(scratch)
            return document
        finally:
            for child in self._children:
                if child.process is not None and child.process.poll() is None:
                    child.process.kill()
                    child.process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
            (self.plan_path.parent / ACKNOWLEDGEMENT).unlink(missing_ok=True)
            os.close(lock)

    def _on_signal(self, *_: object) -> None:
        self._stopping = True

    def _discard_others(self, scratch: Path, plan: plans.Plan) -> None:
        """Clear what another job, or a run that was complete, has left; what a killed run left is gone on with."""
        try:
            for path in scratch.glob("*.ring"):
                PacketRing.open(path, plan.identity()).close()
            with contextlib.suppress(FileNotFoundError), SlotFile.open(scratch / "slots", plan.identity()) as slots:
                if slots.ended:
                    raise FlowCheckError("it was complete")
        except FlowCheckError as error:
            self.say(f"not going on with what an earlier run left: {error}")
            if left := _undrained(scratch):
                self.say(f"discarding what was not drained of {left}: no checkpoint has it")
            shutil.rmtree(scratch / INBOX, ignore_errors=True)
            for path in scratch.iterdir():
                path.unlink()

    def _child(self, scratch: Path, name: str, module: str, plan: Path, *words: object) -> _Child:
        options = ["--busy"] if self.busy and name != "learn" else []
        # Threads of the optimizer step that spin for work take the cores of the other stages.
        environment = dict(os.environ) if self.busy else {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        command = [sys.executable, "-c", f"from {module} import main; main()", str(plan)]
        errors = scratch / f"{name.replace(' ', '-')}.stderr"
        urgent = name.startswith("dump ")
        return _Child(name, [*command, *map(str, words), *options], errors, environment, urgent)

    def _rings(self, scratch: Path) -> dict[str, Path]:
        return {stream.name: scratch / f"{stream.name}.ring" for stream in self._plan.shard.streams}

    def _dumps(self, scratch: Path) -> list[_Child]:
        plan = scratch / _DUMPED_PLAN
        return [
            self._child(scratch, f"dump {name}", "packet_dump.cli", plan, "--stream", name, "--ring", ring)
            for name, ring in self._rings(scratch).items()
        ]

    def _learner(self, scratch: Path) -> list[_Child]:
        """Return what learns the layout while the plan is incomplete, if it is to be learned."""
        if not isinstance(self._plan.shard.layout, UnlearnedLayout):
            return []
        words = [word for ring in self._rings(scratch).values() for word in ("--ring", ring)]
        return [self._child(scratch, "learn", "packet_parser.learn_cli", self.plan_path, *words)]

    def _end_learner(self) -> None:
        """End what learned the layout: the plan has it."""
        for child in self._children:
            if child.name == "learn" and child.process is not None:
                child.process.kill()
                child.process.wait()
        self._children = [child for child in self._children if child.name != "learn"]

    def _others(self, scratch: Path) -> list[_Child]:
        """Return the stages behind the dumps: for them the plan must be complete."""
        rings, slots = self._rings(scratch), ("--slots", scratch / "slots")
        children = [
            self._child(scratch, f"parse {name}", "packet_parser.cli", self.plan_path, "--stream", name, "--ring", ring)
            for name, ring in rings.items()
        ]
        ring_words = [word for ring in rings.values() for word in ("--ring", ring)]
        children.append(self._child(scratch, "extract", "data_extractor.cli", self.plan_path, *ring_words, *slots))
        bases = ("--bases", self.plan_path.parent / FULL_STATES, "--bases", scratch / INBOX)
        children.append(
            self._child(scratch, "update", "updater.cli", self.plan_path, *slots, "--out", self.out, *bases)
        )
        return children

    def _complete(self, scratch: Path) -> bool:
        """Whether the job has completed its plan by now; the rings are then that one's."""
        plan = plans.load(self.plan_path, incomplete=True)
        if not plan.complete:
            return False
        if (plan.job, plan.shard.streams) != (self._plan.job, self._plan.shard.streams):
            raise ConfigError(f"{self.plan_path}: has become the plan of another job or network; stop this run first")
        for path in self._rings(scratch).values():
            with PacketRing.open(path, self._plan.identity()) as ring:
                ring.adopt(plan.identity())
        write_private(scratch / _DUMPED_PLAN, plan.canonical())
        self._plan = plan
        return True

    def _watch(self, scratch: Path) -> None:
        acknowledged, told, shown, reading, draining_until = False, False, 0.0, 0.0, None
        for child in self._children:
            child.start()
        while not all(child.done for child in self._children):
            for child in self._children:
                self._tend(child)
            now = time.monotonic()
            if acknowledged and not self._plan.complete and not self._stopping and self._complete(scratch):
                self._end_learner()
                others = self._others(scratch)
                for child in others:
                    child.start()
                self._children += others
                acknowledged = False
            if not acknowledged and all(child.ready for child in self._children):
                acknowledged = True
                job = self._plan.job
                acknowledgement = {"run_id": job.run_id, "attempt": job.attempt, "pid": os.getpid()}
                acknowledgement["plan"] = self._plan.digest().hex()
                write_private(self.plan_path.parent / ACKNOWLEDGEMENT, json.dumps(acknowledgement).encode())
                self.say("capturing" if self._plan.complete else "capturing; the plan is yet to be completed")
            if self._stopping and not told:
                told, draining_until = True, now + _DRAIN_S
                self.say("stopping: draining what was captured")
            if self._stopping:
                self._end_learner()
                self._stop_dumps()
                if now > draining_until:
                    left = ", ".join(child.name for child in self._children if not child.done)
                    raise FlowCheckError(f"not drained after {_DRAIN_S:g} seconds: {left}; run again to go on")
            if now - shown >= max(_STATUS_S, reading / _STATUS_SHARE):
                document = self._status(scratch, now - shown if shown else 0.0)
                shown, reading = now, time.monotonic() - now
                write_private(scratch / _STATUS, json.dumps(document).encode())
                self.show(document)
                self._complain(document)
            time.sleep(_LOOK_S)

    def _complain(self, document: dict[str, Any]) -> None:
        """Say once of each alarm, and of each stream that it shows nothing of the job where the plan says."""
        for alarm in document["alarms"][self._alarms :]:
            who = "every rank" if alarm["rank"] is None else f"rank {alarm['rank']}"
            since = "the start" if alarm["audited_to"] is None else f"iteration {alarm['audited_to']}"
            self.say(
                f"ALARM: between {since} and {alarm['iteration']} {who} came to have other bits than the shadow in "
                f"{', '.join(alarm['tensors'])}"
            )
        self._alarms = len(document["alarms"])
        if bool(document["volatile"]) != self._volatile:
            self._volatile = bool(document["volatile"])
            if self._volatile:
                self.say(
                    f"VOLATILE: {self.out} takes nothing; from iteration {document['volatile'][0]} on states are held in memory alone"
                )
            else:
                self.say("everything is durable again, behind a new snapshot")
        for stream in document["streams"]:
            if stream["state"] not in ("foreign", "unsynchronised") or stream["name"] in self._complained:
                continue
            self._complained.add(stream["name"])
            if stream["state"] == "foreign":
                what = "no packet is of a connection of the plan: another job, or wrong addresses or queue pairs"
            else:
                reasons = ", ".join(f"{name} {count}" for name, count in stream["reasons"].items())
                what = f"no packet is where the plan says; what contradicts it: {reasons} (flowcheck inspect shows the wire)"
            self.say(f"stream {stream['name']}: {what}")

    def _stop_dumps(self) -> None:
        for child in self._children:
            if child.name.startswith("dump ") and child.ready and not child.told and child.process is not None:
                child.told = True
                child.process.send_signal(signal.SIGTERM)

    def _tend(self, child: _Child) -> None:
        """Start a stage again if it has died; FlowCheckError if that would not help."""
        if child.done:
            return
        now = time.monotonic()
        if child.process is None:
            if now >= child.start_at:
                child.start()
            return
        status = child.look()
        if status is None:
            return
        if status == 0 and (self._stopping or child.name.startswith("dump ")):
            # A dump that somebody else has told to end takes the others with it.
            child.done, child.process, self._stopping = True, None, True
            return
        words = child.last_words()
        if status in _FINAL or (status == 4 and not child.ready):
            error = ConfigError if status in (2, 3) else FlowCheckError
            failure = error(f"{child.name}: {words or f'ended with status {status}'}")
            failure.exit_code = status
            raise failure
        if child.ready and now - child.started > _WELL_S:
            child.backoff = _BACKOFF_S
        what = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}: {words}"
        self.say(f"{child.name} {what}; starting it again")
        child.restarts += 1
        child.process, child.start_at = None, now + child.backoff
        child.ready = False
        child.backoff = min(2 * child.backoff, _BACKOFF_MOST_S)

    def _status(self, scratch: Path, elapsed_s: float = 0.0) -> dict[str, Any]:
        """Return the document of `status --json`; rates are over `elapsed_s` since the last one."""
        document = read_status(scratch, self._plan, self.out)
        counts = document.pop("counts")
        for child in self._children:
            count = counts.get(child.name, 0)
            child.rate = max(0.0, (count - child.counted) / elapsed_s) if elapsed_s else child.rate
            child.counted = count
        document["stages"] = [
            {
                "name": child.name,
                "pid": child.process.pid if child.process is not None else None,
                "rate": round(child.rate, 1),
                "restarts": child.restarts,
            }
            for child in self._children
        ]
        return document


def read_status(scratch: Path, plan: plans.Plan, out: Path) -> dict[str, Any]:
    """Return what rings, slots and directory say of a run, and under `counts` how far each stage is."""
    from updater.directory import Directory

    with contextlib.ExitStack() as stack:
        rings = []
        for stream in plan.shard.streams:
            with contextlib.suppress(OSError, FlowCheckError):
                rings.append(stack.enter_context(PacketRing.open(scratch / f"{stream.name}.ring", plan.identity())))
        packets = packet_counters(rings)
        streams, counts, highest, volatile = [], {}, 0, None
        for ring in rings:
            state, highest_here = _stream_status(ring, plan.silence_ms)
            highest = max(highest, highest_here)
            streams.append({"name": ring.stream, **state, **packets["per_stream"][ring.stream]})
            counts[f"dump {ring.stream}"], counts[f"parse {ring.stream}"] = ring.written, ring.parsed
            counts["extract"] = counts.get("extract", 0) + ring.extracted
        with contextlib.suppress(OSError, FlowCheckError):
            with SlotFile.open(scratch / "slots", plan.identity()) as slots:
                counts["update"] = slots.consumed_next - plan.first_iteration
                if slots.volatile_from:
                    volatile = [slots.volatile_from, slots.consumed_next - 1]
    last, incomplete, audited_to, alarms, waiting, lost = 0, 0, None, [], None, []
    with contextlib.suppress(FlowCheckError, OSError):  # the updater has not begun it yet
        directory = Directory(out)
        audited_to, alarms = directory.audits
        for row in directory.iterations:
            last = row.number if row.state in ("committed", "whole") else last
            incomplete += row.state == "incomplete"
            if row.state == "waiting":
                waiting = [waiting[0] if waiting else row.number, row.number]
        for row in [row for row in directory.iterations if row.state == "incomplete"][-_LOST_SHOWN:]:
            said = directory.facts(row)
            lost.append({"iteration": row.number, "reason": said["reason"], "missing": said["missing"]})
    return {
        "run_id": plan.job.run_id,
        "last_committed": last,
        # What precedes the attempt's first iteration is no work of its own, whatever the directory has of it.
        "lag": max(0, highest - max(last, plan.first_step - 1)),
        "incomplete": incomplete,
        "waiting": waiting,
        "lost": lost,
        "volatile": volatile,
        "audited_to": audited_to,
        "alarms": alarms,
        "stages": [],
        "streams": streams,
        "packets": packets,
        "counts": counts,
    }


def _stream_status(ring: PacketRing, silence_ms: int) -> tuple[dict[str, Any], int]:
    """Return a stream's state, why packets of it have no place, how full its ring is; and the highest iteration it has shown."""
    from packet_parser.reasons import REASONS

    written, counts = ring.written, parse_counts(ring)
    verdicts = dict(zip(VERDICTS, map(int, counts["verdicts"]), strict=False))
    reasons = {name: int(count) for name, count in zip(REASONS, counts["reasons"], strict=False) if count}
    ours = sum(verdicts[name] for name in ("placed", "partial_sum", "initial_state", "other_collective"))
    if ring.ended:
        state = "ended"
    elif not written:
        state = "waiting"
    elif not verdicts["placed"] and verdicts["unsynchronised"] > ours:  # an empty message fits in many places
        state = "unsynchronised"
    elif not ours and verdicts["foreign"]:
        state = "foreign"
    else:
        newest = int(ring.record(written - 1)["timestamp_ns"][0])
        state = "flowing" if time.time_ns() - newest < silence_ms * 1_000_000 else "silent"
    full = (written - ring.extracted) / ring.records
    highest = int(extract_state(ring)["highest_iteration"])
    return {"state": state, "reasons": reasons, "ring_used": round(full, 4)}, highest


def is_live(out: Path) -> bool:
    """Return whether a run writes to a checkpoint directory now."""
    try:
        lock = os.open(scratch_folder(out), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def status(out: Path) -> dict[str, Any]:
    """Return the document of `status --json` of a checkpoint directory: live if a run writes to it, else as it was left.

    Raises:
        CheckpointError, ConfigError: it is no checkpoint directory, and no run has begun one.
    """
    from updater.directory import Directory

    scratch = scratch_folder(out)
    with contextlib.suppress(OSError, ValueError):
        document = json.loads((scratch / _STATUS).read_text())
        for stage in document["stages"]:
            if stage["pid"] is not None and not os.path.exists(f"/proc/{stage['pid']}"):
                stage["pid"], stage["rate"] = None, 0.0
        with contextlib.suppress(FlowCheckError, OSError):
            fresh = read_status(scratch, Directory(out).plan, out)
            del fresh["counts"], fresh["stages"]
            document.update(fresh)
        return document
    document = read_status(scratch, Directory(out).plan, out)
    del document["counts"]
    return document
