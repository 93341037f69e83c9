# SPDX-License-Identifier: MIT
"""Comparing safetensors files, and refusing those that are cut or no pair."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from flowcheck.cli import main
from flowcheck.errors import CheckpointError
from tests.updater.states import state
from updater.diff import diff
from updater.export import export


def test_diff_reads_safetensors(tmp_path):
    a, b, t = (str(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "t.pt"))
    export(state(), "safetensors", a)
    export(state(), "torch", t)
    assert diff(a, t) == {"equal": True, "tensors": len(state().model) + 5, "different": []}
    other = state()
    other.optimizer["state"][0]["exp_avg"].view(-1).view(torch.int32)[3] += 5
    export(other, "safetensors", b)
    found = {"name": "optimizer.0.exp_avg", "elements": 1, "first_index": 3, "max_ulp": 5}
    assert diff(a, b)["different"] == [found] == diff(t, b)["different"]
    # Without the second file only the models are held against each other.
    (tmp_path / "b.optimizer.safetensors").unlink()
    assert diff(a, b) == {"equal": True, "tensors": len(state().model), "different": []}
    (tmp_path / "b.safetensors").rename(tmp_path / "plain.name")
    assert diff(a, str(tmp_path / "plain.name"))["equal"]


def test_a_file_that_is_no_torch_file_is_refused_and_nobody_told_to_unpickle_it(tmp_path):
    plain = tmp_path / "plain.pt"
    plain.write_bytes(bytes(range(256)))
    whole = tmp_path / "whole.pt"
    torch.save({"model": {"a": torch.zeros(100)}}, whole)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:-100])
    objects = tmp_path / "objects.pt"
    torch.save({"model": {"a": torch.zeros(1)}, "args": Path()}, objects)
    for path in (plain, cut, objects):
        done = CliRunner().invoke(main, ["diff", str(path), str(whole)], catch_exceptions=False)
        assert done.exit_code == 5 and done.stderr.count("\n") == 1
        assert f"{path.name}: cannot be read as a torch file" in done.stderr and "weights_only" not in done.stderr


def test_diff_refuses_what_is_cut_or_not_a_pair(tmp_path):
    path = tmp_path / "a.safetensors"
    export(state(), "safetensors", path)
    for name in ("a.safetensors", "a.optimizer.safetensors"):
        content = (tmp_path / name).read_bytes()
        for size in [*range(0, 1000, 97), len(content) // 2, len(content) - 1]:
            (tmp_path / name).write_bytes(content[:size])
            with pytest.raises(CheckpointError, match=f"{name}: cannot be read as a safetensors file: ") as caught:
                diff(str(path), str(path))
            assert "\n" not in str(caught.value)
        (tmp_path / name).write_bytes(content)
    export(state(13), "safetensors", tmp_path / "b.safetensors")
    (tmp_path / "b.optimizer.safetensors").rename(tmp_path / "a.optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"is of iteration 13, expected 12 as a\.safetensors says; restore both"):
        diff(str(path), str(path))
    done = CliRunner().invoke(main, ["diff", str(path), str(path)], catch_exceptions=False)
    assert done.exit_code == 5 and done.stderr.count("\n") == 1
