# SPDX-License-Identifier: MIT
"""Published states as another process reads them, whatever the stage does meanwhile."""

import threading
import time

import numpy as np

from flowcheck import _atomics
from flowcheck.counters import dump_state
from flowcheck.formats import RING_HEADER
from tests import jobs


def test_a_state_that_is_published_twice_between_two_looks_is_not_taken_for_none(tmp_path):
    ring = jobs.ring_of(tmp_path, jobs.plan(), [bytes(100)] * 4)
    block = int(np.frombuffer(ring.memory, RING_HEADER, 1)["dump_state_offset"][0])
    assert dump_state(ring)["written"] == 4
    # What a reader sees that meets the mark of one publication in the first copy, and that of the next in the second.
    _atomics.store(ring.memory, block, 0)
    reading = []
    reader = threading.Thread(target=lambda: reading.append(int(dump_state(ring)["written"])))
    reader.start()
    time.sleep(0.05)
    assert reading == []
    _atomics.store(ring.memory, block, 3)
    reader.join()
    assert reading == [4]


def test_before_anything_is_published_the_counters_are_zero(tmp_path):
    ring = jobs.ring_of(tmp_path, jobs.plan(), [])
    ring.memory[4096:12288] = bytes(8192)
    assert int(dump_state(ring)["written"]) == 0
