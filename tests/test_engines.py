# SPDX-License-Identifier: MIT
"""Extractor and updater through DMA engines: the same bytes, counted, also where copies fail."""

import itertools

import numpy as np
import pytest
import torch
from flowcheck._copy import CopyEngine

from data_extractor.extractor import Extractor
from flowcheck.ring import PacketRing
from tests import dma_faults, jobs
from updater.snapshot import State, read_state, write_state

pytestmark = pytest.mark.dpdk
_devices = itertools.count(300)
PLACED, PLAIN = 1, 1


def engine(failing, folder):
    made = CopyEngine([f"dma_skeleton{next(_devices)}", f"dma_skeleton{next(_devices)}"])
    faults = dma_faults.load(folder) if failing else None
    if faults:
        faults.fail_every(3)
    return made, faults


def plain_ring(tmp_path, payloads) -> PacketRing:
    """Return a ring of plain payloads that follow one another in the gradient of iteration 1."""
    ring = jobs.ring_of(tmp_path, jobs.plan(), [bytes(100) + payload for payload in payloads])
    begin = 0
    for number, payload in enumerate(payloads):
        record = ring.record(number)
        record["verdict"], record["encoding"], record["settled_lag"] = PLACED, PLAIN, 2
        record["payload_offset"], record["payload_length"] = 100, len(payload)
        record["iteration"], record["message_bytes"], record["wire_offset"] = 1, jobs.TOTAL, begin
        begin += len(payload)
    jobs.publish(ring, "parsed", len(payloads))
    return ring


@pytest.mark.parametrize("failing", [False, True])
def test_plain_payloads_reach_their_slot(tmp_path, failing):
    gradient = np.random.default_rng(4).bytes(jobs.TOTAL)
    ring = plain_ring(tmp_path, [gradient[i : i + 1024] for i in range(0, jobs.TOTAL, 1024)])
    plan = jobs.plan()
    slots = jobs.slots_of(tmp_path, plan)
    copies, faults = engine(failing, tmp_path)
    extractor = Extractor([ring], plan, slots, copies)
    decided = jobs.drain([extractor], slots)
    counts = extractor.counters()
    copies.close()
    assert decided[1][0] == 2 and decided[1][3] == gradient
    failed = counts["engine_failed"]["extract"]
    assert failed == (faults.failed() if failing else 0) and (failed > 0) == failing
    done = counts["engine_bytes"]["extract"]
    assert done == jobs.TOTAL if not failing else 0 < done < jobs.TOTAL


@pytest.mark.parametrize("failing", [False, True])
def test_a_state_is_staged_for_its_snapshot(tmp_path, failing):
    generator = torch.Generator().manual_seed(1)
    model = {f"w{n}": torch.randn(50 + n, 33, generator=generator) for n in range(9)}
    state = State("run", 1, 5, True, {"torch": "x", "device": "cpu", "capability": "x"}, model, None)
    copies, faults = engine(failing, tmp_path)
    write_state(tmp_path / "state.h5", state, copies)
    copies.close()
    found = read_state(tmp_path / "state.h5")
    assert found.iteration == 5 and all(torch.equal(found.model[key], value) for key, value in model.items())
    size = sum(value.nbytes for value in model.values())
    assert copies.engine_failed == (faults.failed() if failing else 0)
    assert copies.engine_bytes == size if not failing else 0 < copies.engine_bytes < size
