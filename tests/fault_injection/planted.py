# SPDX-License-Identifier: MIT
"""Bugs to plant into a copy of the pipeline, each of which the campaign must report; run it to plant them one by one.

python -m tests.fault_injection.planted [NAME ...]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = ("flowcheck", "packet_dump", "packet_parser", "data_extractor", "updater", "workload_gen", "fault_injection")
PROMISES = ("wrong", "unrepaired", "untrue_ranges", "unlisted", "unaccounted")


class Bug(NamedTuple):
    """A line of a source file that becomes another one, the modules to compile then, and the faults under which it shows."""

    name: str
    path: str
    old: str
    new: str
    compile: tuple[str, ...]
    kinds: tuple[str, ...]
    shows: tuple[str, ...]
    cases: int = 6


PARSER = ("packet_parser/_parser.pyx",)
EXTRACTOR = ("data_extractor/_extractor.pyx",)
DUMP = ("packet_dump/_dump.pyx",)
BUGS = [
    Bug(
        "icrc-unchecked",
        "packet_parser/_parser.pyx",
        "        if self.check_icrc and not fc_icrc_right(frame, &wire):\n",
        "        if False and not fc_icrc_right(frame, &wire):\n",
        PARSER,
        ("corrupt",),
        ("wrong", "untrue_ranges", "unrepaired"),
    ),
    Bug(
        "second-copies-uncompared",
        "data_extractor/_extractor.pyx",
        "        if other:\n            if held == HAS_NONE:\n",
        "        if other & FC_OTHER_FLAG:\n            if held == HAS_NONE:\n",
        EXTRACTOR,
        ("payload-mended",),
        ("wrong",),
    ),
    Bug(
        "conflict-forgotten",
        "data_extractor/_extractor.pyx",
        "            if past and slot.done_units == slot.units and slot.conflicts == 0:\n",
        "            if past and slot.done_units == slot.units:\n",
        EXTRACTOR,
        ("payload-mended",),
        ("wrong",),
    ),
    Bug(
        "claim-kept-without-bytes",
        "data_extractor/_extractor.pyx",
        "                _remove(claim, where.first, where.units)\n",
        "                _add(<uint64_t *> (<uint8_t *> slot + slot.done_offset), where.first, where.units)\n"
        "                slot.done_units += where.units\n",
        EXTRACTOR,
        ("flag-mended",),
        ("wrong", "untrue_ranges", "unrepaired"),
    ),
    Bug(
        "coverage-one-unit-too-far",
        "data_extractor/_extractor.pyx",
        "    where.units = (where.bytes + 7) // 8\n",
        "    where.units = (where.bytes + 7) // 8\n"
        "    if where.units and (where.first + where.units) % 64:\n"
        "        where.units += 1\n",
        EXTRACTOR,
        ("drop",),
        ("wrong", "untrue_ranges", "unrepaired"),
    ),
    Bug(
        "psn-does-not-wrap",
        "packet_parser/_sync.pxd",
        "    return <int64_t> (<int32_t> ((psn - other) << 8) >> 8)\n",
        "    return <int64_t> psn - <int64_t> other\n",
        PARSER,
        ("duplicate", "double-mirror"),
        ("wrong", "untrue_ranges", "unrepaired"),
    ),
    Bug(
        "address-unchecked",
        "packet_parser/_sync.pxd",
        "        elif wire.va != sync.base + offset:\n",
        "        elif False:\n",
        PARSER,
        ("psn-of-lost",),
        ("wrong",),
    ),
    Bug(
        "late-counted-twice",
        "data_extractor/_extractor.pyx",
        "            ring.state.counters[verdict] += 1\n",
        "            ring.state.counters[verdict] += 2 if verdict == FC_LATE else 1\n",
        EXTRACTOR,
        ("late-duplicate",),
        ("unaccounted",),
    ),
    Bug(
        "cursor-too-early",
        "data_extractor/_extractor.pyx",
        "            FC_STORE_RELEASE(&ring.header.extracted, at)\n",
        "            FC_STORE_RELEASE(&ring.header.extracted, parsed)\n",
        EXTRACTOR,
        ("stall-updater", "delay"),
        ("wrong", "untrue_ranges", "unrepaired", "unlisted", "unaccounted"),
    ),
    Bug(
        "parser-state-unpublished",
        "packet_parser/_parser.pyx",
        "        fc_publish(self.block, self.header.parse_state_bytes, self.state, self.state_bytes)\n"
        "        FC_STORE_RELEASE(&self.header.parsed, end)\n",
        "        if self.state.counts.parsed % 3 == 0:\n"
        "            fc_publish(self.block, self.header.parse_state_bytes, self.state, self.state_bytes)\n"
        "        FC_STORE_RELEASE(&self.header.parsed, end)\n",
        PARSER,
        ("kill-parser",),
        ("wrong", "untrue_ranges", "unrepaired", "unaccounted"),
    ),
    Bug(
        "dump-forgets-what-it-has",
        "packet_dump/_dump.pyx",
        "            for i in range(self.state.written):\n",
        "            for i in range(self.state.written // 2):\n",
        DUMP,
        ("kill-dump",),
        ("unaccounted", "untrue_ranges", "unrepaired"),
    ),
    Bug(
        "repetition-of-another-record",
        "updater/decision.py",
        'record[: form.words] = self.slots.gradient(following)[low:high].view("<f4")',
        'record[: form.words] = self.slots.gradient(following)[begin:low].view("<f4")',
        (),
        ("record-lost",),
        ("unrepaired",),
    ),
    Bug(
        "torn-record-taken",
        "updater/log_reader.py",
        "                self.payload(entry, [np.empty(entry.header.payload_bytes, np.uint8)])\n"
        "            except (ValueError, CheckpointError):\n",
        "            except (ValueError, CheckpointError):\n",
        (),
        ("torn-log",),
        ("wrong", "unrepaired"),
        12,
    ),
    Bug(
        "given-back-before-committed",
        "updater/updater.py",
        "        batch = self._batch()\n        entries = self._commit(batch)\n",
        "        batch = self._batch()\n        if batch:\n            self.slots.consumed_next = batch[-1].iteration + 1\n"
        "        entries = self._commit(batch)\n",
        (),
        ("kill-in-write",),
        ("wrong", "unrepaired", "unlisted"),
        12,
    ),
]  # fmt: skip


def plant(bug, folder):
    """Copy the packages into a folder, put the bug in place, and compile what it is in."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyx"))
    for path in bug.compile:
        shutil.copy2(ROOT / path, folder / path)
    target = folder / bug.path
    text = target.read_text()
    if text.count(bug.old) != 1:
        raise AssertionError(f"{bug.name}: {bug.path} has its line {text.count(bug.old)} times")
    target.write_text(text.replace(bug.old, bug.new))
    if not bug.compile:
        return
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, folder / name)
    for path in bug.compile:
        for built in (folder / path).parent.glob(f"{(folder / path).stem}.*.so"):
            built.unlink()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def report(bug, folder, recordings):
    """Run the faults under which a planted bug must show; return the document, its exit status as `status`."""
    command = [
        sys.executable,
        "-m",
        "flowcheck",
        "faults",
        "--quick",
        "--json",
        "--cases",
        str(bug.cases),
        "--out",
        str(recordings),
    ]
    for kind in bug.kinds:
        command += ["--only", kind]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False
    )
    if not done.stdout:
        raise AssertionError(f"{bug.name}: the campaign did not run: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout), "status": done.returncode}


def counts(document):
    """Return the broken promises of a document, by name."""
    return {name: sum(fault[name] for fault in document["faults"]) for name in PROMISES}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--recordings", type=Path, help="keep the recordings here, for another call")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flowcheck-planted-") as scratch:
        recordings = arguments.recordings or Path(scratch) / "recordings"
        for bug in BUGS:
            if arguments.names and bug.name not in arguments.names:
                continue
            folder = Path(scratch) / bug.name
            plant(bug, folder)
            document = report(bug, folder, recordings)
            found = {name: count for name, count in counts(document).items() if count}
            problems = [problem for fault in document["faults"] for problem in fault["problems"]]
            print(f"{bug.name:30} {'reported' if found else 'NOT SEEN'} {found} {problems[:1]}", flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
