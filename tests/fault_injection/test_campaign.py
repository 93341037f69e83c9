# SPDX-License-Identifier: MIT
"""Cases through the real stages, and a judge who is told lies: each must come out under its name."""

import copy
import json
import os
import random
from dataclasses import asdict

import pytest

from fault_injection.campaign import Plan, _cases, _document, _rows, run_case, run_loss
from fault_injection.case import Case
from fault_injection.chain import Chain, Script
from fault_injection.frames import write_capture
from fault_injection.jobs import OUTAGE_JOBS, record_job
from fault_injection.judge import Verdict, judge
from fault_injection.kinds import Kind, load
from fault_injection.page import render
from tests.commands import in_process

pytestmark = pytest.mark.dpdk


@pytest.mark.parametrize("name", ["drop", "payload-mended", "kill-extractor", "torn-log"])
def test_promises_are_kept(job, name):
    for number in range(2):
        found = run_case(7, name, number, [job.folder])
        assert found["problems"] == []
        assert found["iterations"] == 8


@pytest.fixture(scope="module")
def outage_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    return [record_job(name, folder, 12, 1) for name in OUTAGE_JOBS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "came_of_it"),
    [
        ("long-outage", lambda one: one["committed"] >= 2 and one["waiting"]),
        ("restarted-equal-numbers", lambda one: one["committed"] == 12),
    ],
    ids=["outage", "restart"],
)
def test_promises_are_kept_where_numbers_come_again(outage_folders, name, came_of_it):
    found = [run_case(7, name, number, outage_folders) for number in range(6)]
    assert [one["problems"] for one in found] == [[]] * 6
    assert all(map(came_of_it, found))


def test_a_kind_whose_cases_cost_more_has_a_share_of_them():
    kinds = [Kind("cheap", None, None), Kind("dear", None, None, share=0.1)]
    tasks = _cases(Plan(seed=1), kinds, {"cheap": [], "dear": []}, {"cheap": 60, "dear": 12})
    counts = {kind.name: sum(task[2] == kind.name for task in tasks) for kind in kinds}
    assert 60 * counts["cheap"] + 12 * counts["dear"] >= 200_000
    assert counts["dear"] == pytest.approx(counts["cheap"] / 10, abs=1)
    asked = _cases(Plan(seed=1, cases=3, first=4), kinds, {"cheap": [], "dear": []}, {"cheap": 60, "dear": 12})
    assert [task[2:4] for task in asked] == [(kind.name, number) for number in (4, 5, 6) for kind in kinds]


def ends(code, *_):
    os._exit(code)


@pytest.mark.slow
def test_a_case_that_ends_its_process_is_a_finding_and_the_others_go_on():
    tasks = [(int, str(number)) for number in range(3)] + [(ends, 3, "kind", 5, None)] + [(int, "4")]
    found = list(_rows(tasks, 2))
    assert sorted(row for row in found if isinstance(row, int)) == [0, 1, 2, 4]
    (row,) = (row for row in found if isinstance(row, dict))
    assert row["unrepaired"] == 1
    assert row["problems"][0].startswith("--seed 3 --only kind --case 5: unrepaired: the process ended")


@pytest.mark.parametrize("quick", [True, False])
def test_a_line_of_the_report_names_the_options_that_repeat_its_case(quick):
    verdict = Verdict(problems=["--seed 1 --only drop --case 3 (ll-2): iteration 4 has other bits"])
    row = {"name": "drop", "job": "ll-2", **asdict(verdict), "seconds": 0.0}
    document = _document(Plan(seed=1, quick=quick), ["drop"], [row], 0.0, 0.0)
    (line,) = document["faults"][0]["problems"]
    assert line.startswith("--quick --seed 1 --only drop --case 3 " if quick else "--seed 1 --only drop --case 3 ")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stages_that_are_processes_are_killed(job):
    found = run_case(7, "killed-processes", 0, [job.folder])
    assert found["problems"] == [] and found["committed"] == 8


def test_a_case_of_the_loss_experiment_counts_what_is_incomplete(job):
    found = [run_loss(3, 2, 0.05, number, job.folder) for number in range(2)]
    assert [one["problems"] for one in found] == [[], []]
    # Not the first iteration, and not the last, whose record nobody repeats. Two of three edges: one loss is enough.
    assert [one["trials"] for one in found] == [6, 6]
    assert 0 < sum(one["lost"] for one in found) <= sum(one["incomplete"] for one in found)


def shadowed(case, folder):
    """Run a case; return its directory and counters."""
    captures = {}
    for name, shown in case.streams.items():
        captures[name] = folder / f"{name}.pcap"
        write_capture(captures[name], ((one.frame, len(one.frame), one.ns) for one in shown))
    with Chain(case.document, case.job.folder, captures, folder, random.Random(1), Script(), {}) as chain:
        chain.run()
    return chain.out, chain.packets


@pytest.fixture(scope="module")
def unspoilt(job, tmp_path_factory):
    case = Case.of(job, random.Random(1))
    return case, *shadowed(case, tmp_path_factory.mktemp("unspoilt"))


@pytest.fixture(scope="module")
def holed(job, tmp_path_factory):
    """A case in which nobody shows some bytes of iteration 4."""
    case = Case.of(job, random.Random(1))
    for name, shown in case.streams.items():
        brings = [
            at
            for at in case.data(name, 4)
            if case.iteration(shown[at]) == 4 and job.links[shown[at].link].units[shown[at].index] is not None
        ]
        case.streams[name] = [one for at, one in enumerate(shown) if at not in brings[:10]]
    return case, *shadowed(case, tmp_path_factory.mktemp("holed"))


def test_what_is_right_is_called_right(unspoilt, holed):
    for case, out, packets in (unspoilt, holed):
        verdict = judge(case, out, packets)
        assert verdict.bad == 0, verdict.problems
    assert judge(*unspoilt).committed == 8
    assert (judge(*holed).committed, judge(*holed).incomplete, judge(*holed).waiting) == (3, 1, 4)


def test_other_bits_are_wrong(unspoilt):
    case, out, packets = unspoilt
    for attribute, other in (("state_digests", "0" * 64), ("gradient_digests", [b"x" * 32])):
        told = copy.copy(case)
        told.job = copy.copy(case.job)
        setattr(told.job, attribute, getattr(case.job, attribute) | {5: other})
        verdict = judge(told, out, packets)
        assert (verdict.wrong, verdict.bad) == (1, 1), verdict.problems


def test_a_missing_frame_is_unaccounted(unspoilt):
    case, out, packets = unspoilt
    told = copy.deepcopy(packets)
    next(iter(told["per_stream"].values()))["control"] -= 3
    assert judge(case, out, told).unaccounted == 3


def test_what_was_shown_and_is_missing_is_unrepaired_and_untrue(job, holed):
    _, out, packets = holed
    told = Case.of(job, random.Random(1))
    verdict = judge(told, out, packets)
    assert verdict.unrepaired >= 1 and verdict.untrue_ranges >= 1 and verdict.unaccounted > 0


def test_what_nobody_showed_and_is_there_is_untrue(holed, unspoilt):
    told, _, _ = holed
    _, out, packets = unspoilt
    verdict = judge(told, out, packets)
    assert verdict.untrue_ranges >= 1 and verdict.wrong == 0


def test_a_shorter_list_is_unlisted(job, unspoilt, tmp_path):
    case = Case.of(job, random.Random(1))
    for name in case.streams:
        del case.streams[name][case.begin(name, 6) :]
    out, packets = shadowed(case, tmp_path)
    assert judge(unspoilt[0], out, packets).unlisted == 3


def test_an_unknown_kind_is_named():
    status, _, error = in_process("faults", "--quick", "--only", "no-such-fault")
    assert status == 3 and "no-such-fault" in error and "drop-burst" in error


@pytest.mark.slow
def test_the_quick_campaign_keeps_every_promise(tmp_path):
    status, out, error = in_process("faults", "--quick", "--json", "--out", tmp_path / "campaign")
    document = json.loads(out)
    assert status == 0, error
    assert [fault["name"] for fault in document["faults"]] == list(load())
    assert all(fault["cases"] >= 1 for fault in document["faults"])
    for key in ("wrong", "unaccounted_packets", "untrue_ranges", "unrepaired", "unlisted"):
        assert document[key] == 0
    page = (tmp_path / "campaign" / "faults.html").read_text()
    assert page == render(json.loads((tmp_path / "campaign" / "faults.json").read_text()))
    assert "http" not in page and all(name in page for name in load())
