# SPDX-License-Identifier: MIT
"""ThreadSanitizer over the real stages as threads of one process: it reports nothing, and each order that is broken (docs/concurrency.md)."""

import json

import pytest

from tests.concurrency import sanitized
from tests.concurrency.sanitized import Plant
from tests.pipeline.recordings import check, recorded, streams

pytestmark = [pytest.mark.slow, pytest.mark.dpdk, pytest.mark.timeout(900)]

DUMP, PARSER, EXTRACTOR = "packet_dump/_dump.pyx", "packet_parser/_parser.pyx", "data_extractor/_extractor.pyx"
ATOMICS, UPDATER = "flowcheck/_atomics.pyx", "updater/updater.py"


def relaxed(path, text, times=1):
    """Keep an access atomic, and take its order from it."""
    instead = text.replace("FC_STORE_RELEASE", "RELAXED_STORE").replace("FC_LOAD_ACQUIRE", "RELAXED_LOAD")
    return Plant(path, ((text, instead, times),))


def replaced(path, text, instead):
    return Plant(path, ((text, instead, 1),))


def moved(path, line, instead, before):
    """Take a line away, and have another before a place that it should follow."""
    return Plant(path, ((line, "", 1), (before, instead + before, 1)))


PLANTS = {
    "written without release": relaxed(DUMP, "FC_STORE_RELEASE(&self.header.written, self.state.written)\n\n\n"),
    "written before the frames": moved(
        DUMP,
        "        FC_STORE_RELEASE(&self.header.written, self.state.written)\n\n\n",
        "            FC_STORE_RELEASE(&self.header.written, self.state.written + stored + 1)\n",
        "            record = self.begin(self.state.written + stored, frame.length, frame.ns)\n",
    ),
    "written without acquire": relaxed(PARSER, "        written = FC_LOAD_ACQUIRE(&self.header.written)\n"),
    "parsed without release": relaxed(PARSER, "FC_STORE_RELEASE(&self.header.parsed, end)"),
    "parsed before the annotation": moved(
        PARSER,
        "        FC_STORE_RELEASE(&self.header.parsed, end)\n",
        "        FC_STORE_RELEASE(&self.header.parsed, end)\n",
        "        for index in range(begin, end):\n",
    ),
    "parsed without acquire": relaxed(EXTRACTOR, "uint64_t parsed = FC_LOAD_ACQUIRE(", times=2),
    "extracted without release": relaxed(EXTRACTOR, "FC_STORE_RELEASE(&ring.header.extracted, at)"),
    "extracted before the copy": moved(
        EXTRACTOR,
        "            FC_STORE_RELEASE(&ring.header.extracted, at)\n",
        "        FC_STORE_RELEASE(&ring.header.extracted, end)\n",
        "        while at < end:\n",
    ),
    "extracted without acquire": relaxed(DUMP, "FC_LOAD_ACQUIRE(&self.header.extracted)"),
    "settled without release": relaxed(EXTRACTOR, "FC_STORE_RELEASE(&self.header.settled_next, iteration + 1)"),
    "settled before the slot's state": moved(
        EXTRACTOR,
        "            FC_STORE_RELEASE(&self.header.settled_next, iteration + 1)\n",
        "            if past:\n                FC_STORE_RELEASE(&self.header.settled_next, iteration + 1)\n",
        "            if past and slot.done_units == slot.units",
    ),
    "settled without acquire": relaxed(ATOMICS, "return FC_LOAD_ACQUIRE(_word(memory, offset))"),
    "consumed without release": relaxed(ATOMICS, "FC_STORE_RELEASE(_word(memory, offset), value)"),
    "consumed before the slot is read": replaced(
        UPDATER,
        "        batch = self._batch()\n",
        "        self.slots.consumed_next = self._next + 1\n        batch = self._batch()\n",
    ),
    "consumed without acquire": relaxed(EXTRACTOR, "consumed = FC_LOAD_ACQUIRE(&self.header.consumed_next)"),
    "a slot opened one round early": replaced(
        EXTRACTOR, "iteration >= consumed + self.header.slots", "iteration > consumed + self.header.slots"
    ),
}


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """The packages as they are, compiled with ThreadSanitizer."""
    if reason := sanitized.unavailable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("right")
    sanitized.build(folder)
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return recorded(
        tmp_path_factory.mktemp("job") / "recording", iterations=100, parameters=5_000, bucket_mb=0.01, mtu=256,
        optimizer="adamw", startup=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bare(job, tmp_path_factory):
    """The job by a plan without its model: nothing is stepped, so no torch is loaded."""
    folder = tmp_path_factory.mktemp("bare")
    plan = json.loads((job / "plan.json").read_text())
    for name in ("state", "initial_state", "optimizer", "arithmetic"):
        del plan[name]
    for revision in plan["shards"][0]["revisions"]:
        for bucket in revision["buckets"]:
            del bucket["parameters"]
    (folder / "plan.json").write_text(json.dumps(plan))
    for path in streams(job).values():
        (folder / path.name).hardlink_to(path)
    return folder


def test_the_stages_run_without_a_report_and_to_the_trainers_bits(right, job, tmp_path):
    run = sanitized.run(right, job, tmp_path / "out")
    assert run.status == 0 and not run.reports, run.errors
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    check(job, tmp_path / "out" / "checkpoints", report)
    assert min(report["rounds"]) > 200
    assert len(report["iterations"]) > 20 * report["slots"]


@pytest.mark.parametrize("name", PLANTS)
def test_a_broken_order_is_reported(right, bare, tmp_path, name):
    sanitized.broken(right, tmp_path / "broken", PLANTS[name])
    run = sanitized.run(tmp_path / "broken", bare, tmp_path / "out", first_only=True)
    assert run.reports, run.errors
