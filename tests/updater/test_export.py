# SPDX-License-Identifier: MIT
"""A state written for the user's stack: each format gives its own reader every bit back, whole or not at all."""

import json
import os
import re
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from flowcheck.cli import main
from flowcheck.errors import FlowCheckError
from tests.pipeline.recordings import recorded, same, shadowed
from tests.updater.states import FOLDERS, READERS, different, read_torch, state, target, whole
from updater import export as exports
from updater.diff import diff
from updater.export import FORMATS, export
from updater.restore import restore_state

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.mark.parametrize("form", FORMATS)
def test_every_bit_comes_back(form, tmp_path):
    export(state(), form, target(tmp_path, form))
    assert different(READERS[form](target(tmp_path, form)), whole(state())) == []


@pytest.mark.parametrize("form", FORMATS)
def test_the_comparison_above_sees_a_bit_and_a_type(form, tmp_path):
    other = state()
    other.model["bfloat16"].view(torch.int16)[2] ^= 1
    other.optimizer["param_groups"][1]["lr"] = 1.0
    export(other, form, target(tmp_path, form))
    assert different(READERS[form](target(tmp_path, form)), whole(state())) == ["model/bfloat16", "groups"]


@pytest.mark.parametrize("form", FORMATS)
def test_files_are_private_and_nothing_else_is_left(form, tmp_path):
    before = os.umask(0)
    try:
        export(state(), form, target(tmp_path, form))
    finally:
        os.umask(before)
    found = list(tmp_path.rglob("*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_dir()} <= {0o700}
    assert not [path for path in found if path.suffix == ".unfinished"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_state_without_optimizer_and_extra(form, tmp_path):
    bare = state()
    bare.optimizer, bare.extra = None, {}
    if form not in FOLDERS:
        export(state(11), form, target(tmp_path, form))  # of which nothing may stay
    export(bare, form, target(tmp_path, form))
    if form == "safetensors":
        assert diff(str(tmp_path / "state.safetensors"), str(tmp_path / "state.safetensors"))["equal"]
        model = load_file(tmp_path / "state.safetensors")
    elif form == "huggingface":
        assert {path.name for path in (tmp_path / "state").iterdir()} == {"model.safetensors", "trainer_state.json"}
        return
    elif form == "dcp":
        dcp_to_torch_save(tmp_path / "state", tmp_path / "x.pt")
        model = read_torch(tmp_path / "x.pt")["model"]
    else:
        found = READERS[form](target(tmp_path, form))
        assert found["optimizer"] is None and found["extra"] == {}
        model = found["model"]
    assert set(model) == set(bare.model)


def test_safetensors_holds_every_key_of_a_tied_model(tmp_path):
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    of = state()
    of.model = model.state_dict()
    export(of, "safetensors", tmp_path / "state.safetensors")
    found = load_file(tmp_path / "state.safetensors")
    assert set(found) == {"embedding.weight", "head.weight"}
    assert torch.equal(found["head.weight"], model["embedding"].weight)
    model.load_state_dict(found)
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        whose = {"format": "pt", "run_id": "run-7", "attempt": "2", "iteration": "12", "bit_exact": "false"}
        assert file.metadata() == whose


@pytest.mark.parametrize(("form", "path"), [("safetensors", "x.safetensors"), ("huggingface", "x")])
def test_what_safetensors_cannot_hold_is_named(form, path, tmp_path):
    for model in ({"__metadata__": torch.zeros(1)}, {"z": torch.zeros(1, dtype=torch.complex128)}):
        of = state()
        of.model = model
        with pytest.raises(FlowCheckError, match="cannot hold it; use --format torch"):
            export(of, form, tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def test_dcp_loads_into_model_and_optimizer(tmp_path):
    """As torch's own loader fills the tensors of an optimizer that has stepped."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    of = state()
    of.model, of.optimizer = model.state_dict(), optimizer.state_dict()
    of.optimizer["param_groups"][0]["lr"] = 0.125
    export(of, "dcp", tmp_path / "state")
    export(of, "torch", tmp_path / "x.pt")
    wanted = torch.load(tmp_path / "x.pt", weights_only=True)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    found = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": 0}
    assert same(found, wanted) != []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is ")
        dcp.load(found, checkpoint_id=tmp_path / "state", no_dist=True)
    assert same(found, wanted) == [] and found["iteration"] == 12


def test_a_large_model_is_sharded_as_transformers_does(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "SHARD_BYTES", 200)
    export(state(), "huggingface", tmp_path / "state")
    index = json.loads((tmp_path / "state" / "model.safetensors.index.json").read_text())
    expected = state().model
    expected.pop("head.weight")
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    shards = sorted((tmp_path / "state").glob("model-*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)
    ]
    found = {}
    for path in shards:
        part = load_file(path)
        assert {index["weight_map"][key] for key in part} == {path.name}
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 200
        found |= part
    assert len(shards) > 2 and same({"model": found, "optimizer": {}}, {"model": expected, "optimizer": {}}) == []


def code_after(words):
    """Return the first block of Python after some words of the document."""
    text = DOCUMENT.read_text()
    return re.search(r"```python\n(.*?)```", text[text.index(words) :], re.S)[1]


@pytest.mark.parametrize("form", ["safetensors", "dcp"])
def test_the_documented_script_loads_model_and_optimizer(form, tmp_path, monkeypatch):
    def trained(steps):
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9))
        for _ in range(steps):
            model(torch.ones(3)).sum().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = trained(3)
    of = state(3)
    of.model, of.optimizer = model.state_dict(), optimizer.state_dict()
    export(of, form, tmp_path / {"safetensors": "step-3.safetensors", "dcp": "step-3"}[form])
    fresh, empty = trained(0)
    monkeypatch.chdir(tmp_path)
    names = {"model": fresh, "optimizer": empty}
    exec(code_after(f"**{form}.**"), names)
    ours = {"model": fresh.state_dict(), "optimizer": empty.state_dict()}
    assert same(ours, {"model": of.model, "optimizer": of.optimizer}) == []
    assert repr(empty.param_groups[0]["betas"]) == "(0.8, 0.9)" and names["iteration"] == 3


MEASURED = """
import json, sys, torch
from updater.export import export
from updater.snapshot import State
def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
weight = torch.ones(12 << 20)
moments = {"exp_avg": torch.ones(6, 1 << 20).t(), "step": torch.tensor(1.0)}
state = State("r", 1, 1, True, {}, {"a": weight, "tied": weight}, {"state": {0: moments}, "param_groups": []})
small = State("r", 1, 1, True, {}, {"x": torch.ones(4)}, None)
grown = {}
for form in sys.argv[2:]:
    export(small, form, f"{sys.argv[1]}/{form}-small")  # what the format imports
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    before = resident("VmRSS")
    export(state, form, f"{sys.argv[1]}/{form}")
    grown[form] = resident("VmHWM") - before
print(json.dumps(grown))
"""


@pytest.mark.slow
def test_writing_copies_no_more_than_one_tensor(tmp_path):
    """48 MiB that lie contiguous are not copied; of 24 MiB that do not one copy may be."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), "torch", "safetensors", "dcp", "huggingface"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert len(grown) == 4 and max(grown.values()) < 36 << 10, grown


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = recorded(tmp_path_factory.mktemp("export") / "recording", iterations=4, optimizer="adamw")
    shadowed(folder, folder.parent / "checkpoints")
    return folder, folder.parent / "checkpoints"


@pytest.mark.dpdk
@pytest.mark.parametrize("form", FORMATS)
def test_the_command_restores_the_trainers_state(form, directory, tmp_path):
    folder, checkpoints = directory
    for iteration in (2, 4):
        out = target(tmp_path, form)
        command = ["restore", checkpoints, "--iteration", iteration, "--format", form, "--out", out]
        assert CliRunner().invoke(main, list(map(str, command)), catch_exceptions=False).exit_code == 0
        reader = READERS[form]
        if form == "huggingface":
            found = {"model": load_file(out / "model.safetensors"), "optimizer": read_torch(out / "optimizer.pt")}
        else:
            found = reader(out)
        truth = torch.load(folder / "truth" / f"iteration-{iteration:06}.pt", weights_only=True)
        tied = set(truth["model"]) - set(found["model"])
        assert not tied or form == "huggingface"
        assert same(found, truth | {"model": {k: v for k, v in truth["model"].items() if k not in tied}}) == []
        if form == "safetensors":
            done = CliRunner().invoke(main, ["diff", f"{checkpoints}@{iteration}", str(out), "--json"])
            assert done.exit_code == 0 and json.loads(done.stdout)["equal"]
            assert CliRunner().invoke(main, ["diff", f"{checkpoints}@1", str(out)]).exit_code == 6
        if form in FOLDERS:
            again = CliRunner().invoke(main, list(map(str, command)))
            assert again.exit_code == 3 and "is there already" in again.stderr
            out.rename(tmp_path / f"state-{iteration}")


@pytest.mark.dpdk
def test_a_restored_model_has_the_models_order(directory):
    """Of tied keys the first names the tensor, so a snapshot's order, HDF5's alphabet, would not do."""
    folder, checkpoints = directory
    keys = list(torch.load(folder / "truth" / "iteration-000001.pt", weights_only=True)["model"])
    assert keys != sorted(keys)
    for iteration in (0, 1, 4):
        assert list(restore_state(checkpoints, iteration).model) == keys
