# SPDX-License-Identifier: MIT
"""Recorded jobs, shadowed from their packets and held against the trainer's own states."""

import json

import torch

from flowcheck.replay import replay
from updater.restore import restore
from workload_gen.record import Recording, record


def recorded(folder, **options):
    """Record a job into a folder; return the folder."""
    record(Recording(out=folder, **options))
    return folder


def streams(folder):
    plan = json.loads((folder / "plan.json").read_text())
    return {s["name"]: folder / f"{s['name']}.pcapng" for s in plan["shards"][0]["streams"]}


def shadowed(folder, out, plan=None, only=None):
    """Replay a recording into a checkpoint directory; return the report."""
    captures = {name: path for name, path in streams(folder).items() if only is None or name in only}
    return replay(plan or folder / "plan.json", captures, out)


def tensors(state, path=""):
    """Yield every leaf of a state with its path."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{path}/{key}")
    elif isinstance(state, list | tuple):
        for key, value in enumerate(state):
            yield from tensors(value, f"{path}/{key}")
    else:
        yield path, state


def same(ours, theirs):
    """Compare model and optimizer state bit by bit; return the paths that differ."""
    different = []
    a, b = ({p: v for part in ("model", "optimizer") for p, v in tensors(s[part], part)} for s in (ours, theirs))
    if set(a) != set(b):
        return sorted(set(a) ^ set(b))
    for path, value in a.items():
        other = b[path]
        if isinstance(value, torch.Tensor):
            equal = value.dtype == other.dtype and value.shape == other.shape
            equal = equal and value.contiguous().view(-1).view(torch.uint8).equal(
                other.contiguous().view(-1).view(torch.uint8)
            )
        else:
            equal = value == other
        if not equal:
            different.append(path)
    return different


def check(folder, out, report):
    """Every iteration is committed, and every restored state has the bits of the trainer's."""
    truths = sorted((folder / "truth").glob("*.pt"))
    assert [(row["iteration"], row["state"]) for row in report["iterations"]] == [
        (number, "committed") for number in range(1, len(truths) + 1)
    ]
    for number, path in enumerate(truths, 1):
        assert same(restore(out, number), torch.load(path, weights_only=True)) == [], number
    edges = json.loads((folder / "plan.json").read_text())["shards"][0]["streams"]
    for row in report["iterations"] if len(edges) == 2 else ():
        revision = [revision for revision in report["revisions"] if revision["from_iteration"] <= row["iteration"]][-1]
        single = sum(part["range"][1] - part["range"][0] for part in revision["single_source"])
        assert row["sources"] == [0, single, row["bytes"] - single, 0]
    packets = report["packets"]
    for name in ("foreign", "malformed", "bad_icrc", "unsynchronised", "conflict", "late", "missed_by_port"):
        assert packets[name] == 0, (name, packets)
    return packets
