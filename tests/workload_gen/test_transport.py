# SPDX-License-Identifier: MIT
"""Collectives over real frames between network namespaces: the sums of the library's schedule, whatever the cables do."""

import random
import subprocess

import numpy as np
import pytest
import torch
from workload_gen._nic import Nic

from tests import builders, network
from tests.workload_gen.ranks import running, spoiled_cable, together
from workload_gen.fabric import Fabric, adapter_socket
from workload_gen.record import Recording
from workload_gen.ring import Ring
from workload_gen.transport import FabricRing
from workload_gen.wire import connections

pytestmark = network.needs_root

COUNTS = (5, 1, 4096, 70_001)


def rings(rank, host, store, options, timeout=60.0):
    recording = Recording(out=None, **options)
    layout = recording.layout()
    nic = Nic(adapter_socket(host, Fabric.INTERFACE), layout.mtu)
    ends = lambda edge: connections(layout, edge, recording.ip, recording.vlan, recording.start_psn)  # noqa: E731
    fabric = FabricRing(layout, rank, nic, ends, timeout)
    return fabric, Ring(layout, rank, store), nic


def vector(rank, count, dtype):
    generator = torch.Generator().manual_seed(1000 * rank + count)
    return torch.randn(count, generator=generator).to(dtype)


def collectives(rank, host, store, options, dtypes=("float32",), counts=COUNTS):
    """Do the same collectives with and without a network; return (what differs, the adapter's counters)."""
    fabric, plain, nic = rings(rank, host, store, options)
    wrong = []
    for count in counts:
        for dtype in dtypes:
            ours = vector(rank, count, getattr(torch, dtype))
            other = ours.clone()
            fabric.all_reduce(ours)
            plain.all_reduce(other)
            if not torch.equal(ours.view(torch.uint8), other.view(torch.uint8)):
                wrong.append(("all_reduce", count, dtype))
        root = count % fabric.size
        data = vector(root if rank == root else 99, count, torch.float32)
        fabric.broadcast(data, root)
        if not torch.equal(data, vector(root, count, torch.float32)):
            wrong.append(("broadcast", count))
        parts = fabric.all_gather(vector(rank, count, torch.float32))
        if not all(torch.equal(part, vector(r, count, torch.float32)) for r, part in enumerate(parts)):
            wrong.append(("all_gather", count))
    together(store, rank, fabric.size)
    fabric.close()
    return wrong, {
        name: getattr(nic, name) for name in ("sent", "received", "repeated", "out_of_order", "bad_icrc", "refused")
    }


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": 2},
        {"ranks": 3, "protocol": "ll128", "channels": 2, "pin_channels": True, "nccl": "2.22", "mtu": 4096, "ip": 4},
        {"ranks": 4, "protocol": "simple", "mtu": 4096, "start_psn": 2**24 - 20},
        {"ranks": 3, "protocol": "simple", "queue_pairs": 3, "nccl": "2.29", "mtu": 512, "ip": 4},
        {"ranks": 5, "queue_pairs": 2, "nccl": "2.13", "mtu": 256, "vlan": 7},
        {"ranks": 2, "protocol": "ll128", "queue_pairs": 2, "split_queue_pairs": True, "nccl": "2.30"},
    ],
    ids=str,
)
def test_the_sums_are_those_without_a_network(options):
    dtypes = ("float32", "bfloat16", "float64")
    with Fabric(options["ranks"], ()) as fabric, running(collectives, fabric, options, dtypes) as results:
        for wrong, counters in results():
            assert wrong == []
            assert counters["bad_icrc"] == counters["refused"] == 0 and counters["sent"] > 50


def test_what_the_mirror_shows_is_what_the_adapter_sent_and_got():
    with Fabric(3, (1,)) as fabric:
        before = network.received(fabric.monitors[1])
        with running(collectives, fabric, {"ranks": 3, "protocol": "simple", "mtu": 4096}) as results:
            counters = results()[1][1]
        assert network.received(fabric.monitors[1]) - before == counters["sent"] + counters["received"] > 100


@pytest.mark.parametrize("protocol", ["ll", "simple"])
def test_loss_duplicates_and_reordering_change_nothing(protocol):
    chance = random.Random(5)
    held = {True: [], False: []}  # what is let go in the other direction would teach the switch a wrong place

    def spoil(frame, outward):
        throw = chance.random()
        if throw < 0.01:
            return []
        if throw < 0.02:
            return [frame, frame]
        if throw < 0.03:
            held[outward].append(frame)
            return []
        late = [held[outward].pop()] if held[outward] else []
        return [frame, *late]

    options = {"ranks": 3, "protocol": protocol, "mtu": 1024}
    with Fabric(3, ()) as fabric, spoiled_cable(fabric, 1, spoil):
        with running(collectives, fabric, options) as results:
            found = results()
    assert [wrong for wrong, _ in found] == [[], [], []]
    assert sum(counters["repeated"] for _, counters in found) > 20
    assert sum(counters["out_of_order"] for _, counters in found) > 20


def flipped(frame, *, mend):
    """Return a frame with one payload bit changed; `mend` computes its ICRC anew, from the definition."""
    spoilt = bytearray(frame)
    at = 14 + 20 + 8 + 12 + 16 + 42  # high in the mantissa of a float in the payload of a packet with a RETH, IPv4
    spoilt[at] ^= 1
    return builders.mended(spoilt) if mend else bytes(spoilt)


def reduce_once(rank, host, store, options):
    fabric, _, nic = rings(rank, host, store, options)
    data = torch.full((4096,), float(rank + 1))
    fabric.all_reduce(data)
    together(store, rank, fabric.size)
    fabric.close()
    return data.numpy(), nic.bad_icrc


@pytest.mark.parametrize("mend", [False, True])
def test_the_icrc_is_all_that_stands_between_a_wrong_bit_and_the_trainers(mend):
    spoilt = []

    def spoil(frame, outward):
        if outward and not spoilt and len(frame) > 900 and frame[42] in (6, 10, 11):
            spoilt.append(frame)
            return [flipped(frame, mend=mend)]
        return [frame]

    options = {"ranks": 2, "protocol": "simple", "mtu": 1024, "ip": 4}
    with Fabric(2, ()) as fabric, spoiled_cable(fabric, 0, spoil), running(reduce_once, fabric, options) as results:
        found = results()
    assert spoilt
    right = [bool(np.array_equal(data, np.full(4096, 3.0, np.float32))) for data, _ in found]
    if mend:
        assert right != [True, True] and sum(bad for _, bad in found) == 0
    else:
        assert right == [True, True] and sum(bad for _, bad in found) == 1


def reduce_or_fail(rank, host, store, options):
    fabric, _, _ = rings(rank, host, store, options, 2.0)
    try:
        fabric.all_reduce(torch.ones(4096))
    except ConnectionError as error:
        return str(error)
    return "done"


def test_dropping_the_roce_port_on_a_cable_stops_the_job():
    roce = "match ip protocol 17 0xff match ip dport 4791 0xffff"
    script = f"""set -e
        ip link add nowhere type veth peer name nothing
        ip link set nowhere up
        tc qdisc add dev port1 clsact
        tc filter add dev port1 ingress protocol ip u32 {roce} action mirred egress redirect dev nowhere"""
    with Fabric(3, ()) as fabric:
        subprocess.run(["ip", "netns", "exec", fabric.switch, "sh", "-c", script], check=True)
        with running(reduce_or_fail, fabric, {"ranks": 3, "protocol": "simple", "ip": 4}) as results:
            assert all("nothing has moved" in answer for answer in results())


def test_a_fabric_leaves_nothing_behind():
    names = lambda: subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout  # noqa: E731
    before = names()
    with Fabric(2, (0, 1)) as fabric:
        assert fabric.switch in names()
        monitors = list(fabric.monitors.values())
    assert names() == before and fabric.switch not in before
    for monitor in monitors:
        assert subprocess.run(["ip", "link", "show", monitor], capture_output=True, check=False).returncode != 0
