# SPDX-License-Identifier: MIT
"""What `status` says of a loss that nothing repaired."""

import json

from flowcheck.tables import live_status
from tests.commands import flowcheck
from tests.updater.small import make

LAST = 12


def status(out):
    return json.loads(flowcheck("status", out, "--json"))


def test_nothing_lost_nothing_waits(tmp_path):
    out, _ = make(tmp_path, LAST, ())
    report = status(out)
    assert report["waiting"] is None and report["lost"] == [] and report["last_committed"] == LAST
    said = flowcheck("status", out)
    assert "LOST" not in said and "WAITING" not in said


def test_what_is_lost_and_what_waits_is_said_until_a_base_comes(tmp_path, capsys):
    out, truth = make(tmp_path, LAST, (5, 9))
    report = status(out)
    assert report["last_committed"] == 4 and report["incomplete"] == 2 and report["waiting"] == [6, LAST]
    assert [(row["iteration"], row["reason"], row["missing"]) for row in report["lost"]] == [
        (5, "missing", [[8, 24]]),
        (9, "missing", [[8, 24]]),
    ]
    said = " ".join(flowcheck("status", out).split())
    assert "LOST: iteration 5, reason missing: missing bytes 8-24" in said
    with live_status(0) as (show, _):
        show(report)
    line = f"WAITING 6 to {LAST} for a base since 5 was lost (missing), received 0, lost 0, streams"
    assert line in capsys.readouterr().err
    assert f"WAITING: iterations 6 to {LAST}" in said and "full state of iteration 5 or later: flowcheck rebase" in said

    truth.save(tmp_path / "states", 9)
    flowcheck("rebase", out, tmp_path / "states" / "state-000009.pt")
    report = status(out)
    assert report["waiting"] is None and report["last_committed"] == LAST and len(report["lost"]) == 2


def test_only_the_newest_losses_are_listed(tmp_path):
    out, _ = make(tmp_path, LAST, range(2, 10))
    report = status(out)
    assert [row["iteration"] for row in report["lost"]] == [5, 6, 7, 8, 9] and report["incomplete"] == 8
    assert "3 lost iterations before these" in flowcheck("status", out)
