# SPDX-License-Identifier: MIT
"""The schedule drawn by lot: a valid ring, unlike the library's, with the sums of the order that it says."""

import itertools

import numpy as np
import pytest
import torch
from workload_gen._nic import Nic

from flowcheck import schedule
from tests import network
from tests.workload_gen.ranks import running
from workload_gen.fabric import Fabric, adapter_socket
from workload_gen.permuted_schedule import PermutedSchedule
from workload_gen.record import Recording
from workload_gen.transport import FabricRing
from workload_gen.wire import connections

#: Data bytes that a slot of the receiver holds: LL 8 of 16, LL128 15 of 16 words, Simple two slots.
ROOM = {"ll": 32768, "ll128": 576_000, "simple": 1 << 20}
CASES = [
    {"ranks": 2},
    {"ranks": 3, "protocol": "ll128", "channels": 3, "mtu": 4096},
    {"ranks": 5, "protocol": "simple", "channels": 2, "mtu": 4096, "ip": 4},
]
COUNTS = (1, 5, 511, 70_001)


def layout_of(options):
    return Recording(out=None, **options).layout()


def passed_round(layout, drawn, count):
    """Pass an all-reduce's messages round the ring, each edge's in order; return whose values each rank's elements hold.

    A final message waits until all are in it, a partial one for what the edge before still has to bring of its elements.
    """
    ranks = len(layout.ring)
    summed = [[{rank} for _ in range(count)] for rank in range(ranks)]
    queues = {
        (edge, channel): drawn.all_reduce(layout, edge, channel, count, 4).tolist()
        for edge, channel in itertools.product(range(ranks), range(layout.channels))
    }

    def may_leave(edge, channel, first, elements, final):
        area = range(first, first + elements)
        if final:
            return all(len(summed[edge][x]) == ranks for x in area)
        coming = queues[(edge - 1) % ranks, channel]
        return not any(not late and set(area) & set(range(at, at + size)) for at, size, late in coming)

    while any(queues.values()):
        moved = False
        for (edge, channel), queue in queues.items():
            while queue and may_leave(edge, channel, *queue[0]):
                first, elements, _ = queue.pop(0)
                for x in range(first, first + elements):
                    summed[(edge + 1) % ranks][x] |= summed[edge][x]
                moved = True
        assert moved, "the ring stands still"
    return summed


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("count", [1, 5, 300])
def test_it_is_a_ring(options, count):
    layout, drawn = layout_of(options), PermutedSchedule(7)
    ranks = len(layout.ring)
    assert passed_round(layout, drawn, count) == [[set(range(ranks))] * count] * ranks


@pytest.mark.parametrize("options", CASES, ids=str)
def test_every_edge_has_each_element_as_often_as_a_ring_needs(options):
    layout, drawn, count, width = layout_of(options), PermutedSchedule(3), 200_000, 4
    ranks = len(layout.ring)
    finals = np.zeros((ranks, count), int)
    partials = np.zeros((ranks, count), int)
    for edge, channel in itertools.product(range(ranks), range(layout.channels)):
        messages = drawn.all_reduce(layout, edge, channel, count, width)
        assert (messages["elements"] * width <= ROOM[layout.protocol]).all() and (messages["first"] % 4 == 0).all()
        for first, elements, final in messages.tolist():
            (finals if final else partials)[edge, first : first + elements] += 1
    assert finals.max() == partials.max() == 1
    assert (finals.sum(0) == ranks - 1).all() and (partials.sum(0) == ranks - 1).all()
    for edge in range(ranks):  # the two links of one host have every final element
        assert ((finals[edge] + finals[edge - 1]) >= 1).all()


def test_it_is_the_seeds_and_nobody_elses():
    layout = layout_of({"ranks": 4, "protocol": "simple", "channels": 3, "mtu": 4096})
    first, again, other = (PermutedSchedule(seed) for seed in (1, 1, 2))
    shares, sizes = [], set()
    for channel in range(3):
        ours = first.all_reduce(layout, 1, channel, 90_000, 4)
        assert np.array_equal(ours, again.all_reduce(layout, 1, channel, 90_000, 4))
        assert not np.array_equal(ours, other.all_reduce(layout, 1, channel, 90_000, 4))
        assert not np.array_equal(ours, schedule.all_reduce(layout, 1, channel, 90_000, 4))
        shares.append(int(ours["elements"].sum()))
        sizes |= set(ours["elements"].tolist())
        assert (np.diff(ours["first"]) < 0).any()
    assert len(set(shares)) == 3 and len(sizes) > 10


def collectives(rank, host, store, options, seed):
    layout = layout_of(options)
    nic = Nic(adapter_socket(host, Fabric.INTERFACE), layout.mtu)
    ends = lambda edge: connections(layout, edge, options.get("ip", 6), None, 0)  # noqa: E731
    ring = FabricRing(layout, rank, nic, ends, messages=PermutedSchedule(seed))
    out = []
    for count in COUNTS:
        whole = torch.arange(count, dtype=torch.float32) % 1000 + rank
        ring.all_reduce(whole)
        uneven = torch.randn(count, generator=torch.Generator().manual_seed(rank))
        ring.all_reduce(uneven)
        sent = torch.arange(count) * (7 if rank == 1 else 0)
        ring.broadcast(sent, 1)
        parts = [part.tolist() for part in ring.all_gather(torch.full((count,), rank, dtype=torch.uint8))]
        out.append((whole.numpy(), uneven.numpy(), sent.numpy(), parts))
    ring.close()
    return out


def in_order(layout, drawn, values):
    """Return the sum in the order in which the messages pass it on: each element begins where nobody brings it."""
    ranks, count = values.shape
    begins = np.zeros(count, int)
    for edge in range(ranks):
        goes, comes = np.zeros(count, bool), np.zeros(count, bool)
        for seen, at in ((goes, edge), (comes, (edge - 1) % ranks)):
            for channel in range(layout.channels):
                for first, elements, final in drawn.all_reduce(layout, at, channel, count, 4).tolist():
                    seen[first : first + elements] |= not final
        begins[goes & ~comes] = edge
    total = values[begins, np.arange(count)]
    for hop in range(1, ranks):
        total = values[(begins + hop) % ranks, np.arange(count)] + total
    return total


@network.needs_root
@pytest.mark.parametrize("options", CASES, ids=str)
def test_over_the_fabric_the_sums_are_those_of_its_order(options):
    ranks, seed = options["ranks"], 11
    layout, drawn = layout_of(options), PermutedSchedule(seed)
    with Fabric(ranks, ()) as fabric, running(collectives, fabric, options, seed) as results:
        found = results()
    for number, count in enumerate(COUNTS):
        values = np.stack(
            [torch.randn(count, generator=torch.Generator().manual_seed(rank)).numpy() for rank in range(ranks)]
        )
        whole = np.arange(count, dtype=np.float32) % 1000 * ranks + sum(range(ranks))
        expected = in_order(layout, drawn, values)
        for rank in range(ranks):
            summed, uneven, sent, parts = found[rank][number]
            assert np.array_equal(summed, whole)
            assert np.array_equal(uneven.view(np.uint32), expected.view(np.uint32))
            assert np.array_equal(sent, np.arange(count) * 7)
            assert parts == [[r] * count for r in range(ranks)]
