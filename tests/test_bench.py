# SPDX-License-Identifier: MIT
"""The benchmarks run, small, and write what they say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from bench import __main__ as command
from bench import cuda_checks, growth, plots, report, training_overhead
from bench.yardsticks import PIECE, Yardsticks
from tests import network
from workload_gen import gpt

ROOT = Path(__file__).parents[1]
USUAL = {
    "validate",
    "dump",
    "parse",
    "parse_icrc",
    "extract_plain",
    "extract_ll",
    "extract_ll128",
    "extract_second",
    "chain_1core",
}
NAMES = USUAL | {f"{name}_1024" for name in USUAL} | {"dump_null", "dump_null_1024"}
NAMES |= {"update_fused", "update_default", "step_default", "update_memory", "log", "snapshot_written", "snapshot"}
NAMES |= {"snapshot_torch_save", "snapshot_dcp_save", "snapshot_dcp_async_save", "parse_against_scapy"}
if os.geteuid() == 0:
    NAMES |= {"step_overhead"}
if len(os.sched_getaffinity(0)) > 1:
    NAMES |= {"chain_2cores", "chain_2cores_1024"}
#: Where the tool is installed; dpkt is not held to be.
MAY_BE = {"parse_against_tshark", "parse_against_dpkt", "dump_against_testpmd"}


def bench(folder, *options, module="bench"):
    """Run a benchmark in a folder."""
    words = [sys.executable, "-m", module, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.dpdk
@pytest.mark.parametrize(
    ("options", "wanted"),
    [(("--only", "dump", "log"), {"dump", "log"}), pytest.param((), NAMES, marks=pytest.mark.slow)],
)
def test_every_stage_has_a_figure_and_a_yardstick(tmp_path, options, wanted):
    done = bench(tmp_path, "--quick", *options)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "build" / "bench.json").read_text())
    found = {row["name"] for row in written["results"]} - MAY_BE
    assert wanted <= found <= NAMES and (options or found == NAMES)
    for row in written["results"]:
        assert {"name", "value", "unit", "yardstick", "yardstick_value", "ratio", "runs", "spread"} <= set(row)
        assert row["value"] > 0 and row["yardstick_value"] > 0 and row["runs"] == 2
        low, high = row["interval"]
        assert 0 < low <= row["ratio"] <= high
        assert row["name"] in done.stdout
    picture = ElementTree.parse(tmp_path / "build" / "bench.svg").getroot()
    shown = {element.text for element in picture.iter() if element.tag.endswith("text")}
    assert {row["name"] for row in written["results"] if row["target"]} <= shown
    assert os.listdir(tmp_path) == ["build"]
    assert sorted(os.listdir(tmp_path / "build")) == ["bench.json", "bench.svg"]


@pytest.mark.dpdk
@pytest.mark.parametrize(
    ("options", "said"), [(("--only", "dmup"), "no row 'dmup'"), (("--quick", "--store"), "--store wants all figures")]
)
def test_what_cannot_be_is_refused(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert said in capsys.readouterr().err and not os.listdir(tmp_path)


def row(name, ratio, noise=0.01, target=None):
    interval = [ratio * (1 - noise), ratio * (1 + noise)]
    return {
        "name": name, "value": 2e9 * ratio, "unit": "bytes/s", "yardstick": "a <yardstick>", "yardstick_value": 2e9, "ratio": ratio,
        "runs": 10, "spread": noise, "interval": interval, "target": target, "packets_per_s": None, "payload": None,
    }  # fmt: skip


def test_the_guard_knows_a_loss_from_noise_and_a_cost_from_a_gain():
    stored = {"ratios": {name: {"ratio": 0.8, "interval": [0.792, 0.808]} for name in ("dump", "log", "step_overhead")}}
    for ratio, noise, lost in ((0.8, 0.01, False), (0.7, 0.01, False), (0.64, 0.01, True), (0.64, 0.1, False)):
        assert bool(report.guard([row("dump", ratio, noise)], stored)) is lost
    assert report.guard([row("log", 0.6), row("dump", 0.5), row("not stored", 0.1)], stored)[1].startswith(
        "dump: ratio 0.500"
    )
    assert report.guard([row("step_overhead", 1.0)], stored) and not report.guard([row("step_overhead", 0.5)], stored)


def test_what_is_stored_is_what_the_guard_takes_and_the_page_shows(tmp_path):
    page, ratios = tmp_path / "performance.md", tmp_path / "ratios.json"
    shutil.copy(ROOT / "docs" / "performance.md", page)
    document = {"machine": {"processor": "a processor", "cores": 2}, "results": [row("dump", 0.5, target=0.85)]}
    for _ in range(2):  # the second time in place of the first
        report.store(document, ratios, page)
        text = page.read_text()
        assert text.count("\n| dump |") == 1 and "0.85 missed" in text and text.count("performance.svg") == 1
    ElementTree.parse(tmp_path / "performance.svg")
    stored = json.loads(ratios.read_text())
    assert not report.guard([row("dump", 0.5)], stored) and report.guard([row("dump", 0.3)], stored)
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no lines"):
        report.store(document, ratios, page)


def test_yardsticks_move_what_they_say(tmp_path):
    loops = Yardsticks(tmp_path)
    source = np.random.default_rng(1).integers(0, 255, 4096, np.uint8)
    pieces = np.array([(64, 64, 256), (512, 1024, 1024)], PIECE)
    for name, line, kept in (("copy", 1, 1), ("copy_half", 16, 8), ("copy_lines", 128, 120)):
        target = np.zeros(4096, np.uint8)
        getattr(loops, name)(pieces, source, target)
        expected = np.zeros(4096, np.uint8)
        for begin, to, length in pieces.tolist():
            data = source[begin : begin + length].reshape(-1, line)[:, :kept].reshape(-1)
            expected[to : to + len(data)] = data
        assert np.array_equal(target, expected), name
    target = np.full(4096, 255, np.uint8)
    loops.copy_frames(pieces, source, target)
    assert np.array_equal(target[1024:2048], source[512:1536]) and target[960:976].tolist() == [0, 4] + 14 * [0]
    assert target[976:1024].tolist() == [1] + 47 * [0]
    assert loops.compare(pieces, source, target) == 0
    target[1500] ^= 1
    assert loops.compare(pieces, source, target) == 1
    words = source.view("<u8")
    assert loops.read_all(pieces, source) == int(np.concatenate((words[8:40], words[64:192])).sum())  # modulo 2^64
    assert loops.touch(pieces, source) == int(words[[8, 16, 64, 72]].sum())


def test_compression_is_measured_on_gradients_that_are_given(tmp_path):
    script = ROOT / "bench" / "log_compression.py"
    np.save(tmp_path / "g.npy", np.random.default_rng(1).normal(0, 0.01, 300_001).astype(np.float32))
    words = [tmp_path / "g.npy", "--disk", tmp_path, "--json", "--turns", "10"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["g.npy"]
    assert found["bytes"] == 1_200_004 and found["disk"] > 0 and len(found["shares"]) == 1
    ours = next(row for row in found["rows"] if row["way"] == "updater.compression")
    assert ours["ratio"] > 1.05 and ours["pack"] > 0 and ours["unpack"] > 0
    assert os.listdir(tmp_path) == ["g.npy"]
    words[-1] = "9"
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2 and "fewer than 10" in done.stderr


@pytest.mark.dpdk
def test_updates_are_measured_with_and_without_a_snapshot_beside_them(tmp_path):
    command = [sys.executable, "-m", "bench.snapshot_beside", "--params", "80000", "--forms", "fused", "--rounds", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["results"]
    assert row["updates_alone"] == 12 and row["updates_beside"] >= 12 and row["snapshots"] >= 2
    assert row["snapshot_bytes"] > 3 * 4 * 80_000  # parameters and two moments
    low, high = row["ratio"]["interval"]
    assert 0 < low <= row["ratio"]["value"] <= high
    assert not os.listdir(tmp_path)


@pytest.mark.dpdk
@pytest.mark.slow
@network.needs_root
def test_every_way_to_save_an_iteration_is_measured_and_more_rounds_are_added(tmp_path):
    words = ["--steps", "3", "--ranks", "2", "--parameters", "20000", "--batches", "1", "--folder", str(tmp_path)]
    for rounds, more in ((1, []), (2, ["--more"])):
        done = bench(tmp_path, "--rounds", "1", *words, *more, module="bench.training_overhead")
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "build" / "training_overhead.json").read_text())
        assert len(found["rounds"]) == rounds
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == ["none", "flowcheck", "torch_save", "dcp_save", "dcp_async_save"]
    state = 3 * 4 * sum(parameter.numel() for parameter in gpt.build(20_000, 1).parameters())
    assert rows["none"]["bytes"] == 0 and state / 3 < rows["flowcheck"]["bytes"] < state < rows["torch_save"]["bytes"]
    for name, row in rows.items():
        assert row["steps"] == 6 and row["median_s"] > 0 and row["lost"] == 0
        low, high = row["interval"]
        assert low <= row["ratio"] <= high
        assert name == "none" or 0 <= row["behind"] <= row["most_behind"] <= 2
    ElementTree.parse(tmp_path / "build" / "training_overhead.svg")
    done = bench(tmp_path, "--rounds", "1", "--steps", "4", "--more", module="bench.training_overhead")
    assert done.returncode == 2 and "other settings" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["build"]


def way(ended, saved=()):
    return {"ended": [at * 10**9 for at in ended], "saved": saved, "bytes": 5, "trainer_bytes": 7}


def test_what_a_crash_loses_is_what_is_finished_and_not_safe():
    ended = [1, 2, 3, 4, 5, 6, 7, 8]
    # Each iteration is safe half a second later, but the third one only with the fourth, which takes a second.
    saved = [[at, at * 10**9 + 5 * 10**8] for at in ended if at != 3 and at != 4] + [[4, 5 * 10**9]]
    found = {
        row["way"]: row for row in training_overhead.summary([{"none": way(ended), "flowcheck": way(ended, saved)}])
    }
    assert found["flowcheck"]["most_behind"] == 2
    assert found["flowcheck"]["behind"] == pytest.approx(
        (6 * 0.5 - 0.5 + 2 + 1) / 7
    )  # of the last one nothing more is seen
    assert found["none"]["most_behind"] == 7 and found["flowcheck"]["ratio"] == 1


@pytest.mark.dpdk
def test_growth_is_measured_in_pieces(tmp_path, monkeypatch, capsys):
    done = bench(tmp_path, "--quick", "--only", "frames", "--runs", "1", module="bench.growth")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "build" / "growth.json").read_text())
    assert {row["value"] for row in found["rows"]} == {"dump_s", "parse_s", "extract_s", "peak_bytes"}
    for row in found["rows"]:
        assert 0 < row["from"] < row["to"] and row["first"] > 0 and row["last"] > 0 and row["judged"]
    ElementTree.parse(tmp_path / "build" / "growth.svg")
    done = bench(tmp_path, "--only", "frames", "--runs", "0", module="bench.growth")
    assert (
        done.returncode == 0 and json.loads((tmp_path / "build" / "growth.json").read_text())["rows"] == found["rows"]
    )
    assert os.listdir(tmp_path / "build") and os.listdir(tmp_path) == ["build"]


@pytest.mark.dpdk
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[network.needs_root] if one.root else []) for name, one in growth.SERIES.items()]
)
def test_every_series_of_growth_runs(tmp_path, name):
    done = bench(tmp_path, "--quick", "--only", name, "--runs", "1", "--folder", str(tmp_path), module="bench.growth")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "build" / "growth.json").read_text())
    assert {row["series"] for row in found["rows"]} == {name}
    # Nothing piles up, even where steps are this short.
    assert all(row["last"] <= 2 for row in found["rows"] if row["value"] == "behind_iterations")
    assert os.listdir(tmp_path) == ["build"]


ON_CPU = ("--device", "cpu", "--backend", "gloo")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "float16-fused"])
def test_the_checks_of_the_hook_on_gpus_hold_without_one(tmp_path, kind):
    words = ["--kinds", kind, "--parameters", "5000", "--folder", "job", "--json", "checks.json"]
    done = bench(tmp_path, *ON_CPU, *words, module="bench.cuda_checks")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "checks.json").read_text())
    assert len(found["results"][kind]) >= 10 and all(found["results"][kind].values()) and found["logged"] is None
    # Some three buckets, which were rebuilt; the step of a resumed job that is thrown away is in its plan.
    noted, free, resumed = found["ranks"][kind][0]["collectives"]
    assert noted == free and [op for op, *_ in noted].count("all_reduce") == 1 + 1 + 11 * (3 + 1)
    assert [op for op, *_ in resumed].count("all_reduce") == 1 + 4 * (3 + 1)


def test_what_the_library_did_is_read_from_its_log():
    line = (
        "host0:7:9 [0] NCCL INFO {}: opCount {:x} sendbuff 0x7f1 recvbuff 0x7f2 acc (nil) count {} datatype {} op 0 root 0 "
        "comm {} [nranks=2] stream 0x5f"
    )
    did = [
        ("AllGather", 1, 4, "0xa1"),
        ("Broadcast", 6, 4, "0xb2"),
        ("AllReduce", 17, 7, "0xa1"),
        ("AllReduce", 9, 9, "0xa1"),
    ]
    log = "\n".join(["x NCCL INFO Bootstrap: Using lo", *(line.format(op, 11, *rest) for op, *rest in did), ""])
    group = [["all_gather", "int64", 1], ["all_reduce", "float32", 17], ["all_reduce", "bfloat16", 9]]
    done = cuda_checks.logged(log)
    assert done == [group, [["broadcast", "int64", 6]]]
    for planned, verdict in ((group, True), (group[:-1], False), ([*group, group[-1]], False)):
        ranks = [{"holds": {"a": True, "b": True}, "collectives": [planned]}, {"holds": {"a": True, "b": False}}]
        result = cuda_checks.judged({"kind": ranks, "other": [{"error": "why"}, {}]}, done)
        assert [result["kind"][key] for key in ("a", "b")] == [True, False]
        assert result["kind"]["the library did the plans' collectives"] is verdict
        assert not any(result["other"].values())


@pytest.mark.slow
def test_the_cost_of_the_hook_on_gpus_is_measured_without_one(tmp_path):
    words = "--jobs float32:5000 float16:5000 --pairs 2 --steps 2 --batches 1 --json cost.json".split()
    done = bench(tmp_path, *ON_CPU, *words, module="bench.cuda_overhead")
    assert done.returncode == 0, done.stderr
    for row in json.loads((tmp_path / "cost.json").read_text())["results"].values():
        low, high = row["interval"]
        assert 0 < low <= row["ratio"] <= high and row["pairs"] == len(row["times"]) == 2 and row["audit_s"] > 0


def test_growth_is_told_from_a_fixed_part_and_from_noise():
    noise = np.random.default_rng(1)

    def of(function, spread=0.02):
        return {x: [function(x) * noise.uniform(1 - spread, 1 + spread) for _ in range(3)] for x in (1, 3, 10, 30, 100)}

    for function, constant, verdict in (
        (lambda x: 40 + 2 * x, False, "linear"), (lambda x: 2 * x, False, "linear"),
        (lambda x: x**1.5, False, "more than linear"), (lambda x: x**0.5, False, "less than linear"),
        (lambda x: 7, True, "constant"), (lambda x: 7 + x, True, "grows"), (lambda x: 1 / x, True, "falls"),
    ):  # fmt: skip
        _, interval = growth.exponent(of(function), constant)
        assert growth.judged(interval, constant) == verdict, (interval, verdict)
    _, interval = growth.exponent(of(lambda x: 2 * x, 0.9), False)
    assert growth.judged(interval, False) == "not told"


def test_plots_hold_what_they_show():
    picture = ElementTree.fromstring(plots.histograms({"a <way>": [0.1, 0.2, 0.2], "another": [0.3]}, "seconds"))
    assert {"a <way>", "another", "seconds"} <= {element.text for element in picture.iter()}
    bars = [element for element in picture.iter() if element.tag.endswith("rect")]
    assert len(bars) == 1 + 2 + 1  # the ground, and a bar for each value that was seen
    lines = {"one": [(1, 2), (1000, 2000)], "other": [(1, 5), (1000, 5)]}
    picture = ElementTree.fromstring(plots.curves([plots.Curves("title", "x", "y", lines)] * 3))
    assert sum(element.tag.endswith("circle") for element in picture.iter()) == 12
