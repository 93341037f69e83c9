# SPDX-License-Identifier: MIT
"""The layouts against the witness: captures that it builds replay to the gradients that it knows, and only then."""

import inspect
import itertools
import json
import random
import struct

import pytest
import torch

from flowcheck import layout, plan, schedule
from flowcheck.replay import replay
from tests.witness.capture import Capture, Wire
from tests.witness.payload import payload
from tests.witness.schedule import Job
from updater.gradient import read_gradient
from workload_gen import wire as recorder

pytestmark = pytest.mark.dpdk

#: A version of each generation; minor numbers at both ends of the long ones.
VERSIONS = ["2.12", "2.19", "2.20", "2.21", "2.22", "2.23", "2.25", "2.26", "2.28", "2.29", "2.30"]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int32": torch.int32,
}


def values(count, dtype, generator):
    if dtype == torch.int32:
        return torch.randint(-(2**30), 2**30, (count,), generator=generator, dtype=dtype)
    return (torch.rand(count, generator=generator, dtype=torch.float64) - 0.5).to(dtype)


class Witnessed:
    """A job of three iterations and two bucket revisions, as captures, plan, and the gradients that it had."""

    def __init__(
        self, folder, job, *, first=(5000,), rest=(3000, 2000), dtype="float32", links=None, wire=None, iterations=3
    ):
        self.first, self.rest = first, rest
        self.job, generator = job, torch.Generator().manual_seed(7)
        links = links or sorted({0, job.ranks - 1})
        kind, total = DTYPES[dtype], sum(first)
        capture = Capture(folder, job, links, wire)
        starting = [c.psn[0] for c in capture.connections]
        capture.all_gather("all_gather count", [struct.pack("<q", 1)] * job.ranks)
        capture.broadcast("broadcast sizes", struct.pack("<qq", total, 1))
        capture.broadcast("broadcast values", bytes(random.Random(1).randbytes(total * kind.itemsize)))
        self.gradients = {}
        for iteration in range(1, iterations + 1):
            if iteration == 2:
                capture.broadcast("broadcast indices", struct.pack("<ii", 0, 1))
            flat = b""
            for number, count in enumerate(first if iteration == 1 else rest):
                vectors = [values(count, kind, generator) for _ in range(job.ranks)]
                total_sum = capture.all_reduce(f"all_reduce {iteration}.{number}", vectors)
                flat += total_sum.view(torch.uint8).numpy().tobytes()
            self.gradients[iteration] = flat
        capture.close()
        self.capture, self.streams = capture, {f"link-{link}": path for link, path in capture.files.items()}
        self.document = {
            "format": "flowcheck-plan",
            "version": 1,
            "job": {"run_id": "witness", "attempt": 1, "world_size": job.ranks},
            "shards": [
                {
                    "name": "model",
                    "startup": [
                        {"op": "all_gather", "dtype": "int64", "elements": 1},
                        {"op": "broadcast", "dtype": "int64", "elements": 2},
                        {"op": "broadcast", "dtype": dtype, "elements": total},
                    ],
                    "revisions": [
                        {"from_iteration": 1, "buckets": [{"dtype": dtype, "elements": n} for n in first]},
                        {
                            "from_iteration": 2,
                            "before": [{"op": "broadcast", "dtype": "int32", "elements": 2}],
                            "buckets": [{"dtype": dtype, "elements": n} for n in rest],
                        },
                    ],
                    "layout": {
                        "source": "modelled", "library": "nccl", "version": job.version, "protocol": job.protocol,
                        "ring": list(range(job.ranks)), "channels": job.channels, "threads": job.threads,
                        "pin_channels": job.pin_channels, "queue_pairs": job.queue_pairs,
                        "split_queue_pairs": job.split, "mtu": job.mtu, "adaptive_routing": job.adaptive_routing,
                    },
                    "connections": [
                        {"edge": c.edge, "channel": c.channel, "source": c.source, "destination": c.destination,
                         "proof": {"kind": "queue_pair", "data": c.data, "credit": c.credit}, "start_psn": psn}
                        for c, psn in zip(capture.connections, starting, strict=True)
                    ],
                    "streams": [{"name": f"link-{link}", "links": [link]} for link in links],
                }
            ],
        }  # fmt: skip

    def json(self):
        return json.dumps(self.document)

    def right(self, folder):
        """Whether a replay has every iteration whole and with the gradients that are known, and nothing unexplained."""
        path = folder / "plan.json"
        path.write_text(self.json())
        report = replay(path, self.streams, folder / "out")
        if [row["state"] for row in report["iterations"]] != ["whole"] * len(self.gradients):
            return False
        if any(report["packets"][name] for name in ("unsynchronised", "foreign", "conflict", "malformed", "bad_icrc")):
            return False
        return all(read_gradient(folder / "out", number).tobytes() == bits for number, bits in self.gradients.items())

    def same_table(self):
        """Whether the compiled tables have the witness's messages: steps, bytes, addresses, queue pairs, packets."""
        programs = layout.compile_programs(plan.parse(self.json()))
        for connection, program in zip(self.capture.connections, programs, strict=True):
            for number in range(self.job.queue_pairs):
                ours, theirs = list(rows_of(program, number, 3)), []
                for message in connection.table:
                    for qp, psn, packets, begin, length in message["pieces"]:
                        if qp == number:
                            theirs.append((message["step"], message["bytes"], psn, packets, begin, length))
                if ours[: len(theirs)] != theirs:
                    return False
        return True


def rows_of(program, number, iterations):
    """Unroll a queue pair's program."""
    for segment in program.segments[number]:
        rows = program.rows[number][int(segment["first_row"]) : int(segment["first_row"] + segment["rows"])]
        for repeat in range(int(segment["repeats"]) or iterations):
            for row in rows:
                yield (
                    int(segment["first_step"] + repeat * segment["period_steps"] + row["step"]),
                    int(row["message_wire_bytes"]),
                    int(segment["first_psn"] + repeat * segment["period_psn"] + row["psn"]),
                    int(row["packets"]), int(row["message_wire_offset"]), int(row["wire_bytes"]),
                )  # fmt: skip


@pytest.mark.parametrize("protocol", ["ll", "ll128", "simple"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_generation_and_protocol(tmp_path, version, protocol):
    ranks = 2 + VERSIONS.index(version) % 4
    job = Job(version, protocol, ranks, channels=1 + VERSIONS.index(version) % 3, pin_channels=ranks % 2 == 0)
    case = Witnessed(tmp_path, job, first=(5001,), rest=(2999, 2002))
    assert case.same_table()
    assert case.right(tmp_path)


@pytest.mark.parametrize(
    ("job", "options"),
    [
        (Job("2.18", "ll", 2, queue_pairs=2, split=False, mtu=256), {"wire": Wire(4)}),
        (Job("2.18", "ll128", 3, queue_pairs=4, split=True, mtu=512), {"wire": Wire(6, vlan=100)}),
        (Job("2.24", "simple", 3, 2, pin_channels=True, queue_pairs=8, split=True, mtu=4096), {"wire": Wire(4, 7, 2**24 - 5)}),
        (Job("2.29.3", "simple", 4, queue_pairs=3, split=False), {"wire": Wire(6, None, 2**24 - 9)}),
        (Job("2.30", "ll128", 2, 3, pin_channels=True, queue_pairs=5, split=True, mtu=2048), {}),
        (Job("2.17", "ll", 2, adaptive_routing=True, queue_pairs=2), {"first": (20000,), "rest": (20000,)}),
        (Job("2.26", "simple", 3, adaptive_routing=True), {"first": (60000,), "rest": (60000,)}),
        (Job("2.20", "ll128", 5, adaptive_routing=True), {"dtype": "float64"}),
        (Job("2.21", "simple", 2, 2, pin_channels=True), {"dtype": "float16", "first": (70001,), "rest": (70000, 1)}),
        (Job("2.16", "simple", 3, 2, pin_channels=True), {"dtype": "bfloat16"}),
        (Job("2.22", "ll", 4, 3, pin_channels=True), {"dtype": "bfloat16", "links": [1, 2]}),
        (Job("2.12", "ll128", 3, 2, threads=96, pin_channels=True), {"dtype": "int32", "links": [0, 1, 2]}),
        (Job("2.19", "ll", 3, 2, threads=256, pin_channels=True), {"first": (100_000,), "rest": (99_999, 1)}),
    ],
    ids=str,
)  # fmt: skip
def test_other_forms(tmp_path, job, options):
    case = Witnessed(tmp_path, job, **options)
    assert case.same_table()
    assert case.right(tmp_path)


@pytest.mark.parametrize("protocol", ["ll", "ll128", "simple"])
def test_the_recorder_writes_the_witness_s_payload(protocol):
    rng = random.Random(3)
    for length, step in itertools.product((0, 4, 8, 100, 1920, 1924, 5000), (0, 7, 2**32 - 1, 2**33)):
        data = rng.randbytes(length)
        assert recorder.encode(protocol, data, step, b"\x11" * 8) == payload(protocol, data, step, b"\x11")


def planted(monkeypatch, module, right, wrong):
    """Replace a piece of a module's source for the time of a test."""
    source = inspect.getsource(module)
    assert source.count(right) == 1, right
    saved = dict(vars(module))
    exec(compile(source.replace(right, wrong), module.__file__, "exec"), vars(module))
    for name, value in saved.items():
        monkeypatch.setattr(module, name, vars(module)[name])
        monkeypatch._setattr[-1] = (module, name, value)


BUGS = {
    "chunk order": (schedule, "(edge - 1 - sends) % ranks", "(edge + 1 + sends) % ranks", Job("2.19", "ll", 3)),
    "alignment": (schedule, "threads * (8 // width) if", "threads * (4 // width) if", Job("2.19", "ll", 2)),
    "slice size": (schedule, "16 * -(-elements // 32)", "16 * -(-elements // 16)", Job("2.24", "simple", 2)),
    "queue-pair index": (layout, "offset = queue_pair * piece", "offset = (queue_pair + 1) % count * piece", Job("2.24", "ll", 2, queue_pairs=2)),
    "edge off by one": (
        layout,
        "schedule.all_reduce(layout, connection.edge, connection.channel",
        "schedule.all_reduce(layout, (connection.edge + 1) % len(layout.ring), connection.channel",
        Job("2.19", "ll", 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_makes_it_fail(tmp_path, monkeypatch, bug):
    module, right, wrong, job = BUGS[bug]
    case = Witnessed(tmp_path, job, first=(60_000,), rest=(60_000,))
    (tmp_path / "before").mkdir()
    assert case.right(tmp_path / "before")
    planted(monkeypatch, module, right, wrong)
    (tmp_path / "after").mkdir()
    assert not case.same_table()
    assert not case.right(tmp_path / "after")


def test_a_wrong_ll128_word_makes_the_recorder_s_payload_fail(monkeypatch):
    data = bytes(range(240)) * 8
    planted(monkeypatch, recorder, "elif place == 7 and odd:", "elif place == 6 and odd:")
    assert recorder.encode("ll128", data, 1, bytes(8)) != payload("ll128", data, 1, b"\0")
