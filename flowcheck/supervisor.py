# SPDX-License-Identifier: MIT
"""`flowcheck run`: starts a plan's stages, watches and restarts them, shows what happens, ends them in order.

One run serves the attempts of a job one after another: when another attempt's plan takes the place of the one that is
followed, the streams of the old one end, what they had captured is drained, and new rings and slots begin.

Rings and slots live in a folder of shared memory whose name follows from the checkpoint directory; there the supervisor
also writes what `flowcheck status` reads. A stage that dies is started again over the same files and goes on where it
was. A signal ends the dumps; the stages behind them end by themselves when they have drained what was captured.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flowcheck import interfaces
from flowcheck import plan as plans
from flowcheck.counters import extract_state, packet_counters, parse_counts
from flowcheck.errors import ConfigError, FlowCheckError
from flowcheck.files import write_private
from flowcheck.formats import IDENTITY
from flowcheck.learned import UnlearnedLayout
from flowcheck.plan_watch import PlanWatch
from flowcheck.ring import PacketRing
from flowcheck.run_folder import ACKNOWLEDGEMENT, FULL_STATES
from flowcheck.slots import SlotFile
from flowcheck.stage_process import BACKOFF_S, StageProcess
from flowcheck.verdicts import VERDICTS

__all__ = ["INBOX", "Supervisor", "is_live", "scratch_folder", "status"]

#: A folder in the scratch folder, for `flowcheck rebase`.
INBOX = "bases"
#: The plan that the stages follow, in the scratch folder: the job may replace its own at any time.
_FOLLOWED_PLAN = "plan.json"
_STATUS = "status.json"
_LOOK_S = 0.05
_STATUS_S = 1.0
#: Of the time, at most so much goes into reading how the run stands: a log of many iterations takes long to read.
_STATUS_SHARE = 0.05
_BACKOFF_MOST_S = 5.0
#: A stage that has run for so long was well; its next failure begins anew.
_WELL_S = 1.0
#: Exit statuses that another start does not mend: wrong usage, a bad plan, a corrupt file.
_FINAL = {2, 3, 5}
_DRAIN_S = 120.0
#: The same where another attempt waits for its shadow: what is not drained then has no place any more.
_HANDOVER_S = 30.0
#: Capturing begins so long after a new attempt's plan was seen: what mirrors still held of an earlier one has come by then.
#: Its adapters are gone, or the new attempt could not have the same queue pairs.
_SETTLE_S = 1.0
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
    _children: list[StageProcess] = field(default_factory=list)
    _plan: plans.Plan | None = None
    _plan_file: PlanWatch | None = None
    _stopping: bool = False
    _draining: bool = False
    _complained: set[str] = field(default_factory=set)
    _told: float = 0.0
    _reading_s: float = 0.0
    _alarms: int = 0
    _volatile: bool = False

    def run(self) -> dict[str, Any]:
        """Run until SIGINT or SIGTERM, then until everything captured is drained; return the last status.

        Raises:
            ConfigError: the plan or a stream's source cannot be used, or another run has the directory.
            FlowCheckError: a stage failed in a way that another start does not mend.
        """
        self._plan_file = PlanWatch(self.plan_path, self.say)
        self._plan = self._plan_file.load()
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
            self._discard_others(scratch, self._plan)
            while (following := self._attempt(scratch)) is not None:
                self._clear(scratch)
                self._plan, self._complained = following, set()
            document = self._status(scratch)
            # What was not drained stays for the next run.
            shutil.rmtree(scratch)
            return document
        finally:
            self._kill_stages()
            for number, handler in before.items():
                signal.signal(number, handler)
            self._acknowledgement.unlink(missing_ok=True)
            os.close(lock)

    @property
    def _acknowledgement(self) -> Path:
        return self.plan_path.parent / ACKNOWLEDGEMENT

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
            self._clear(scratch)

    def _clear(self, scratch: Path) -> None:
        """Remove rings, slots and whatever else is of an attempt that is over."""
        if left := _undrained(scratch):
            self.say(f"discarding what was not drained of {left}: no checkpoint has it")
        shutil.rmtree(scratch / INBOX, ignore_errors=True)
        for path in scratch.iterdir():
            path.unlink()

    def _child(self, scratch: Path, name: str, module: str, plan: Path, *words: object) -> StageProcess:
        options = ["--busy"] if self.busy and name != "learn" else []
        # Threads of the optimizer step that spin for work take the cores of the other stages.
        environment = dict(os.environ) if self.busy else {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        command = [sys.executable, "-c", f"from {module} import main; main()", str(plan)]
        errors = scratch / f"{name.replace(' ', '-')}.stderr"
        urgent = name.startswith("dump ")  # a mirror does not wait, all else can
        return StageProcess(
            name, [*command, *map(str, words), *options], errors, environment, urgent, partial(self._fits, name)
        )

    def _fits(self, name: str, pid: int) -> bool:
        """Whether a stage can work under a pid: dumps of two interfaces may not be in one group of packet sockets."""
        interfaces_of = {f"dump {stream.name}": stream.interface for stream in self._plan.shard.streams}
        pids = {child.name: child.process.pid for child in self._children if child.process is not None} | {name: pid}
        groups = {}
        for dump, interface in interfaces_of.items():
            with contextlib.suppress(OSError):  # one that is missing is the dump's to report
                if interface and dump in pids:
                    groups[dump] = interfaces.fanout_group(interface, pids[dump])
        own = groups.pop(name, None)
        return own is None or own not in groups.values()

    def _rings(self, scratch: Path) -> dict[str, Path]:
        return {stream.name: scratch / f"{stream.name}.ring" for stream in self._plan.shard.streams}

    def _dumps(self, scratch: Path) -> list[StageProcess]:
        plan = scratch / _FOLLOWED_PLAN
        return [
            self._child(scratch, f"dump {name}", "packet_dump.cli", plan, "--stream", name, "--ring", ring)
            for name, ring in self._rings(scratch).items()
        ]

    def _learner(self, scratch: Path) -> list[StageProcess]:
        """Return what learns the layout while the plan is incomplete, if it is to be learned."""
        if not isinstance(self._plan.shard.layout, UnlearnedLayout):
            return []
        words = [word for ring in self._rings(scratch).values() for word in ("--ring", ring)]
        return [self._child(scratch, "learn", "packet_parser.learn_cli", self.plan_path, *words)]

    def _kill_stages(self) -> None:
        for child in self._children:
            child.kill()

    def _end_learner(self) -> None:
        """End what learned the layout: the plan has it."""
        for child in self._children:
            if child.name == "learn":
                child.kill()
        self._children = [child for child in self._children if child.name != "learn"]

    def _others(self, scratch: Path) -> list[StageProcess]:
        """Return the stages behind the dumps: for them the plan must be complete."""
        plan, rings, slots = scratch / _FOLLOWED_PLAN, self._rings(scratch), ("--slots", scratch / "slots")
        children = [
            self._child(scratch, f"parse {name}", "packet_parser.cli", plan, "--stream", name, "--ring", ring)
            for name, ring in rings.items()
        ]
        ring_words = [word for ring in rings.values() for word in ("--ring", ring)]
        children.append(self._child(scratch, "extract", "data_extractor.cli", plan, *ring_words, *slots))
        folder = self.plan_path.parent
        states = ("--plan-folder", folder, "--bases", folder / FULL_STATES, "--bases", scratch / INBOX)
        children.append(self._child(scratch, "update", "updater.cli", plan, *slots, "--out", self.out, *states))
        return children

    def _complete(self, scratch: Path, plan: plans.Plan) -> None:
        """Go on with the plan as the job has completed it: the rings are that one's, and the stages behind the dumps start."""
        for path in self._rings(scratch).values():
            with PacketRing.open(path, self._plan.identity()) as ring:
                ring.adopt(plan.identity())
        write_private(scratch / _FOLLOWED_PLAN, plan.canonical())
        self._plan = plan
        self._end_learner()
        others = self._others(scratch)
        for child in others:
            child.start()
        self._children += others

    def _acknowledge(self) -> None:
        """Tell the job that every frame from now on is captured."""
        job = self._plan.job
        acknowledgement = {"run_id": job.run_id, "attempt": job.attempt, "pid": os.getpid()}
        acknowledgement["plan"] = self._plan.digest().hex()
        write_private(self._acknowledgement, json.dumps(acknowledgement).encode())
        self.say("capturing" if self._plan.complete else "capturing; the plan is yet to be completed")

    def _attempt(self, scratch: Path) -> plans.Plan | None:
        """Serve one attempt to its end; return the plan of the one that follows, None if a signal has ended the run."""
        write_private(scratch / _FOLLOWED_PLAN, self._plan.canonical())
        self._children = self._dumps(scratch)
        self._children += self._others(scratch) if self._plan.complete else self._learner(scratch)
        for child in self._children:
            child.start()
        acknowledged, completed = False, None
        while True:
            self._tend_all()
            if self._stopping:
                self.say("stopping: draining what was captured")
                if late := self._drain(scratch, _DRAIN_S):
                    raise FlowCheckError(f"not drained after {_DRAIN_S:g} seconds: {late}; run again to go on")
                return None
            begun_anew = acknowledged and not self._acknowledgement.exists()
            change = self._plan_file.look(self._plan, begun_anew=begun_anew)
            if change is not None and not change.completes:
                return self._hand_over(scratch, change.plan)
            completed = change.plan if change is not None else completed
            if acknowledged and completed is not None:
                self._complete(scratch, completed)
                acknowledged, completed = False, None
            if not acknowledged and all(child.ready for child in self._children):
                acknowledged = True
                self._acknowledge()
            self._tell(scratch)
            time.sleep(_LOOK_S)

    def _hand_over(self, scratch: Path, following: plans.Plan) -> plans.Plan | None:
        """End the attempt that was followed; return the plan to follow next, None if a signal has ended the run."""
        old, settled = self._plan.job, time.monotonic() + _SETTLE_S
        self._acknowledgement.unlink(missing_ok=True)
        self.say(f"attempt {following.job.attempt} of run {old.run_id!r} has begun; ending attempt {old.attempt}")
        try:
            if late := self._drain(scratch, _HANDOVER_S):
                self.say(f"attempt {old.attempt} is not drained after {_HANDOVER_S:g} seconds: {late}")
        except FlowCheckError as error:
            self.say(f"attempt {old.attempt} cannot be drained: {error}")
        self._kill_stages()
        while not self._stopping and time.monotonic() < settled:
            time.sleep(_LOOK_S)
        if self._stopping:
            self._clear(scratch)
            return None
        # The job may have completed its plan meanwhile, or have been started once more.
        change = self._plan_file.look(self._plan, begun_anew=True)
        return following if change is None else change.plan

    def _drain(self, scratch: Path, patience_s: float) -> str:
        """End the dumps and wait for the stages behind them; return which have not ended in so many seconds."""
        end = time.monotonic() + patience_s
        self._draining = True
        try:
            self._end_learner()
            while not all(child.done for child in self._children) and time.monotonic() <= end:
                self._stop_dumps()
                self._tend_all()
                self._tell(scratch)
                time.sleep(_LOOK_S)
        finally:
            self._draining = False
        return ", ".join(child.name for child in self._children if not child.done)

    def _tell(self, scratch: Path) -> None:
        """About once a second, leave the status for others and show it."""
        now = time.monotonic()
        if now - self._told < max(_STATUS_S, self._reading_s / _STATUS_SHARE):
            return
        document = self._status(scratch, now - self._told if self._told else 0.0)
        self._told, self._reading_s = now, time.monotonic() - now
        write_private(scratch / _STATUS, json.dumps(document).encode())
        self.show(document)
        self._complain(document)

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

    def _tend_all(self) -> None:
        for child in self._children:
            self._tend(child)

    def _tend(self, child: StageProcess) -> None:
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
        if status == 0 and (self._draining or self._stopping or child.name.startswith("dump ")):
            # A dump that somebody else has told to end takes the others with it.
            child.done, child.process = True, None
            self._stopping = self._stopping or not self._draining
            return
        words = child.last_words()
        if status in _FINAL or (status == 4 and not child.ready):
            error = ConfigError if status in (2, 3) else FlowCheckError
            failure = error(f"{child.name}: {words or f'ended with status {status}'}")
            failure.exit_code = status
            raise failure
        if child.ready and now - child.started > _WELL_S:
            child.backoff = BACKOFF_S
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
            fresh = read_status(scratch, plans.load(scratch / _FOLLOWED_PLAN, incomplete=True), out)
            del fresh["counts"], fresh["stages"]
            document.update(fresh)
        return document
    document = read_status(scratch, Directory(out).plan, out)
    del document["counts"]
    return document
