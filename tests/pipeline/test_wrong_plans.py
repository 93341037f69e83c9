# SPDX-License-Identifier: MIT
"""A plan that names a wrong edge or channel is found out: it never gets a gradient committed."""

import contextlib
import json

import pytest
import torch
from scapy.utils import RawPcapNgReader

from flowcheck.errors import ConfigError
from flowcheck.replay import replay
from tests.builders import mended
from tests.pipeline.recordings import recorded, same, shadowed
from tests.witness.capture import Writer
from updater.restore import restore

pytestmark = pytest.mark.dpdk


@pytest.fixture(scope="module", params=["ll", "ll128", "simple"])
def recording(request, tmp_path_factory):
    """Three ranks, two channels of equal sizes, all links: every final chunk is on two edges."""
    return recorded(
        tmp_path_factory.mktemp(request.param) / "r", protocol=request.param, nccl="2.24", ranks=3, channels=2,
        pin_channels=True, links=(0, 1, 2), iterations=3, parameters=30_000,
    )  # fmt: skip


def changed(recording, path, change, whole=False):
    plan = json.loads((recording / "plan.json").read_text())
    change(plan["shards"][0] if whole else plan["shards"][0]["connections"])
    path.write_text(json.dumps(plan))
    return path


def states(report):
    return [row["state"] for row in report["iterations"]]


def swap(connections, first, second, *fields):
    a, b = connections[first], connections[second]
    for field in fields:
        a[field], b[field] = b[field], a[field]


def never_wrong(recording, out, report):
    """Whatever was committed has the trainer's bits."""
    for row in report["iterations"]:
        if row["state"] == "committed":
            truth = torch.load(recording / "truth" / f"iteration-{row['iteration']:06}.pt", weights_only=True)
            assert same(restore(out, row["iteration"]), truth) == []


@pytest.mark.parametrize("credits", [True, False], ids=["credits seen", "no credits"])
def test_channels_swapped_on_one_edge(recording, tmp_path, credits):
    """Where the channels' sizes differ the flows contradict the layout; where they do not, the second copies do."""

    def change(connections):
        swap(connections, 0, 1, "channel")
        for connection in connections if not credits else ():
            del connection["proof"]["credit"]

    report = shadowed(recording, tmp_path / "out", changed(recording, tmp_path / "plan.json", change))
    packets = report["packets"]
    never_wrong(recording, tmp_path / "out", report)
    assert packets["conflict"] > 0 or packets["unsynchronised"] > 0
    if packets["conflict"]:
        assert "committed" not in states(report)
        assert "conflict" in {row["reason"] for row in report["iterations"]}


@pytest.mark.parametrize("credits", [True, False], ids=["credits seen", "no credits"])
def test_edges_swapped(recording, tmp_path, credits):
    def change(shard):
        for channel in range(2):
            swap(shard["connections"], channel, 2 + channel, "edge")
        shard["streams"][0]["links"], shard["streams"][1]["links"] = [1], [0]
        for connection in shard["connections"] if not credits else ():
            del connection["proof"]["credit"]

    path = changed(recording, tmp_path / "plan.json", change, whole=True)
    report = shadowed(recording, tmp_path / "out", path)
    assert "committed" not in states(report)
    if credits:  # each credit names the sender of what it asks for
        assert report["packets"]["unsynchronised"] > 0


def test_a_stream_that_shows_another_link_is_refused(recording, tmp_path):
    path = changed(
        recording, tmp_path / "plan.json", lambda connections: [swap(connections, n, 2 + n, "edge") for n in (0, 1)]
    )
    with pytest.raises(ConfigError, match=r"none of the .* frames of .* belongs to a connection of its link"):
        shadowed(recording, tmp_path / "out", path)


def test_an_edge_that_no_rank_has_is_refused(recording, tmp_path):
    path = changed(recording, tmp_path / "plan.json", lambda connections: connections[0].update(edge=3))
    with pytest.raises(ConfigError, match="edges 0 to 2"):
        shadowed(recording, tmp_path / "out", path)


def test_a_second_copy_that_differs_is_a_conflict(recording, tmp_path):
    """Data words of the last packets altered on one link, their ICRC mended: that iteration is not applied."""
    link = recording / "link-1.pcapng"
    with RawPcapNgReader(str(link)) as reader:
        frames = [bytes(data) for data, _ in reader]
    payload = {6: 90, 7: 74, 8: 74, 9: 78, 10: 90, 11: 94}  # where it begins, by opcode
    for number in [n for n, f in enumerate(frames) if len(f) > 900][-12:]:
        frame, at = frames[number], payload[frames[number][62]]
        frames[number] = mended(frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :])
    altered = tmp_path / "link-1.pcap"
    with contextlib.closing(Writer(altered)) as writer:
        for frame in frames:
            writer.write(frame)
    captures = {f"link-{n}": recording / f"link-{n}.pcapng" for n in (0, 2)} | {"link-1": altered}
    report = replay(recording / "plan.json", captures, tmp_path / "out")
    assert states(report) == ["committed", "committed", "incomplete"]
    assert report["iterations"][2]["reason"] == "conflict"
