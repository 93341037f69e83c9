# SPDX-License-Identifier: MIT
"""A snapshot holds every bit of a state, in a file that is there whole or not at all, and comes back from it."""

import errno
import hashlib
import json
import os
import time
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from flowcheck._copy import CopyEngine

from flowcheck.errors import CheckpointError, FlowCheckError
from tests.fixtures import snapshot_v1
from tests.updater.test_optimizer import make_plan
from updater import durable, snapshot_file
from updater.durable import Disk
from updater.snapshot import State, layout_of, read_state, write_now, write_state


def bits(tensor):
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def same(found, expected):
    """Whether two states are equal in every bit, and in which keys are tied."""
    ours, theirs = dict(found.tensors()), dict(expected.tensors())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert bits(ours[name]) == bits(tensor), name
    for name in ("run_id", "attempt", "iteration", "bit_exact", "arithmetic", "identity", "layout"):
        assert getattr(found, name) == getattr(expected, name), name
    ties = [{key: {k for k, v in s.model.items() if v is t} for key, t in s.model.items()} for s in (found, expected)]
    assert ties[0] == ties[1]
    if expected.optimizer is None:
        assert found.optimizer is None
        return True
    assert found.optimizer["param_groups"] == expected.optimizer["param_groups"]
    plain = [
        {n: {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)} for n, values in o["state"].items()}
        for o in (found.optimizer, expected.optimizer)
    ]
    assert plain[0] == plain[1]
    return True


def edge_state():
    """The state of the fixture, of a plan."""
    plan = make_plan("AdamW", "default", {"lr": 0.1}, "float32")
    state = snapshot_v1.state()
    state.identity, state.layout = plan.identity(), layout_of(plan.revision(1))
    return state


def big_state(megabytes, pieces=10):
    generator = torch.Generator().manual_seed(5)
    model = {f"w{n}": torch.randn(megabytes * 250_000 // pieces, generator=generator) for n in range(pieces)}
    return State("run", 1, 5, True, {}, model, None)


def test_every_bit_comes_back(tmp_path):
    state = edge_state()
    written = write_now(tmp_path / "s.h5", state)
    assert (
        written.path.parent == tmp_path and written.path.name != "s.h5" and os.listdir(tmp_path) == [written.path.name]
    )
    content = written.path.read_bytes()
    assert (written.bytes, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert written.path.stat().st_mode & 0o777 == 0o600
    assert same(read_state(written.path), state)


@pytest.mark.parametrize("engine", [None, CopyEngine()], ids=["straight", "staged"])
def test_a_published_state_is_there_under_its_name_alone(tmp_path, engine):
    state = edge_state()
    write_state(tmp_path / "s.h5", state, engine)
    assert os.listdir(tmp_path) == ["s.h5"]
    assert same(read_state(tmp_path / "s.h5"), state)


def test_equal_states_make_equal_files(tmp_path):
    first = write_now(tmp_path / "a.h5", edge_state())
    time.sleep(1.1)  # HDF5 would note seconds
    second = write_now(tmp_path / "b.h5", edge_state())
    assert (first.bytes, first.sha256) == (second.bytes, second.sha256)


def test_any_hdf5_reader_finds_the_tensors(tmp_path):
    state = edge_state()
    with h5py.File(write_now(tmp_path / "s.h5", state).path) as file:
        assert np.array_equal(file["model/embedding.weight"][()], state.model["embedding.weight"].numpy())
        assert file["model/head.weight"] == file["model/embedding.weight"]
        assert file["model/half"].dtype == np.uint16 and file["model/half"].attrs["dtype"] == "bfloat16"
        assert file["model/a%2Fb%252F.c"][()].tolist() == [0, 1, 2, 3, 4]
        assert file["model/scale"][()] == 0.1 and file["model/empty"].shape == (0, 5)
        assert file["model/%2E"][()].tolist() == [True, False, True]
        assert file["optimizer/state/0/exp_avg"].chunks is None
        assert file["identity"][()].tobytes() == state.identity
        assert bytes.fromhex(file.attrs["plan_digest"]) in state.identity
        assert json.loads(file["layout"][()].tobytes()) == state.layout


def test_the_layout_says_where_each_gradient_lies():
    plan = make_plan("AdamW", "default", {"lr": 0.1}, "bfloat16")
    assert layout_of(plan.revision(1)) == [
        {"dtype": "bfloat16", "parameters": [["a", [37, 11], 0]]},
        {"dtype": "bfloat16", "parameters": [["d", [3, 3], 0], ["c", [64, 65], 9]]},
    ]


def test_a_file_of_version_1_is_read():
    found = read_state(snapshot_v1.PATH)
    assert found.identity is None and found.layout is None
    assert same(found, snapshot_v1.state())


@pytest.mark.parametrize("what", ["version", "digest", "dtype"])
def test_a_file_that_contradicts_itself_is_refused(tmp_path, what):
    path = write_now(tmp_path / "s.h5", edge_state()).path
    with h5py.File(path, "r+") as file:
        if what == "version":
            file.attrs["version"] = 3
        elif what == "digest":
            file.attrs["plan_digest"] = "00" * 16
        else:
            file["model/scale"].attrs["dtype"] = "float32"
    message = {
        "version": "version 3; this release reads flowcheck-state 1 and 2",
        "digest": "identity",
        "dtype": "scale",
    }
    with pytest.raises(CheckpointError, match=message[what]):
        read_state(path)


def test_an_optimizer_of_any_number_of_parameters_fits(tmp_path):
    groups = [{"lr": 0.1, "params": list(range(50_000))}]
    state = State("run", 1, 5, True, {}, {"w": torch.ones(3)}, {"state": {}, "param_groups": groups})
    assert read_state(write_now(tmp_path / "s.h5", state).path).optimizer["param_groups"] == groups


def test_an_option_that_json_has_not_is_named(tmp_path):
    optimizer = {"state": {}, "param_groups": [{"lr": torch.tensor(0.1), "params": [0]}]}
    with pytest.raises(FlowCheckError, match=r"an option of the optimizer.*Tensor"):
        write_now(tmp_path / "s.h5", State("run", 1, 5, True, {}, {"w": torch.ones(3)}, optimizer))
    assert not os.listdir(tmp_path)


class Watched(Disk):
    """A disk that notes what is done; at its `fails`-th write or sync it raises, and may flip a bit of a written byte."""

    def __init__(self, fails=None, code=errno.EIO, flips=None, sync_s=0):
        self.calls, self.content, self.fails, self.code, self.flips = [], bytearray(), fails, code, flips
        self.dirty = self.most_dirty = 0
        self.now, self.sync_s = 0, sync_s

    def _note(self, name):
        self.calls.append(name)
        if self.fails is not None and sum(call != "create" for call in self.calls) == self.fails:
            raise OSError(self.code, os.strerror(self.code))

    def create(self, path):
        self._note("create")
        return super().create(path)

    def write(self, fd, pieces, offset):
        self._note("write")
        content = bytearray(b"".join(pieces))
        self.content[offset : offset + len(content)] = content
        self.dirty += len(content)
        self.most_dirty = max(self.most_dirty, self.dirty)
        if self.flips is not None and offset <= self.flips < offset + len(content):
            content[self.flips - offset] ^= 1
        return super().write(fd, [content], offset)

    def datasync(self, fd):
        self._note("datasync")
        super().datasync(fd)
        self.dirty = 0
        self.now += self.sync_s

    def sync(self, fd):
        self._note("sync")
        super().sync(fd)


def test_every_byte_goes_through_the_disk_and_is_synced(tmp_path, monkeypatch):
    disk = Watched()
    monkeypatch.setattr(durable, "disk", disk)
    written = write_now(tmp_path / "s.h5", big_state(20))
    assert written.path.read_bytes() == bytes(disk.content)
    assert disk.calls[0] == "create" and disk.calls[-1] == "sync"


@pytest.mark.parametrize(("sync_s", "megabytes"), [(0.5, 4), (0.001, 64)])
def test_what_syncs_beside_it_waits_for_little(tmp_path, monkeypatch, sync_s, megabytes):
    disk = Watched(sync_s=sync_s)
    monkeypatch.setattr(durable, "disk", disk)
    monkeypatch.setattr(snapshot_file, "time", SimpleNamespace(perf_counter=lambda: disk.now))
    write_now(tmp_path / "s.h5", big_state(96))
    assert megabytes <= disk.most_dirty / 2**20 < megabytes + 3


def test_a_disk_that_refuses_anything_leaves_its_error_and_no_file(tmp_path, monkeypatch):
    state, calls = big_state(9), Watched()
    monkeypatch.setattr(durable, "disk", calls)
    write_now(tmp_path / "s.h5", state).path.unlink()
    for number in range(1, len(calls.calls)):
        for code in (errno.ENOSPC, errno.EIO):
            monkeypatch.setattr(durable, "disk", Watched(number, code))
            with pytest.raises(FlowCheckError, match=rf"s\.h5: cannot write: {os.strerror(code)}") as caught:
                write_now(tmp_path / "s.h5", state)
            assert caught.value.__cause__.errno == code
            assert not os.listdir(tmp_path)


@pytest.mark.parametrize("where", ["structure", "content", "end"])
def test_a_byte_that_comes_back_other_is_noticed(tmp_path, monkeypatch, where):
    state = big_state(9)
    written = write_now(tmp_path / "s.h5", state)
    monkeypatch.setattr(
        durable, "disk", Watched(flips={"structure": 9, "content": 5_000_000, "end": written.bytes - 1}[where])
    )
    with pytest.raises(FlowCheckError, match="gives other bytes"):
        write_now(tmp_path / "t.h5", state)
    assert os.listdir(tmp_path) == [written.path.name]
