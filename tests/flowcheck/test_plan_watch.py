# SPDX-License-Identifier: MIT
"""What a plan file that is written anew means to the run that follows it."""

import copy
import json
import os

import pytest

from flowcheck.errors import ConfigError
from flowcheck.plan_watch import PlanWatch
from tests import jobs


def document(*, attempt=1, origin=None, queue_pair=None, complete=True, run_id="run-a"):
    found = copy.deepcopy(jobs.EXAMPLE)
    shard = found["shards"][0]
    for key in ("state", "initial_state", "optimizer", "arithmetic"):
        found.pop(key, None)  # only the packets are in question
    for operation in shard["startup"]:
        operation.pop("carries", None)
    for revision in shard["revisions"]:
        for bucket in revision["buckets"]:
            bucket.pop("parameters", None)
    shard["streams"][0]["interface"] = "mirror0"
    found["job"] |= {"run_id": run_id, "attempt": attempt}
    if origin is not None:
        found["job"]["resumed"] = {"attempt": attempt - 1, "iteration": origin}
        shard["revisions"] = [shard["revisions"][-1] | {"from_iteration": origin + 1}]
    if queue_pair is not None:
        shard["connections"][0]["proof"]["data"] = [queue_pair]
    found["complete"] = complete
    return found


class Watched:
    def __init__(self, folder):
        self.path, self.lines = folder / "plan.json", []
        self.watch = PlanWatch(self.path, self.lines.append)

    def write(self, **changes):
        temporary = self.path.with_name("temporary")
        temporary.write_text(json.dumps(document(**changes)))
        os.replace(temporary, self.path)

    def load(self, **changes):
        self.write(**changes)
        return self.watch.load()


@pytest.fixture
def watched(tmp_path):
    return Watched(tmp_path)


def test_a_file_that_nobody_has_written_anew_says_nothing(watched):
    plan = watched.load()
    assert watched.watch.look(plan, begun_anew=True) is None
    watched.path.unlink()
    assert watched.watch.look(plan, begun_anew=True) is None and not watched.lines


def test_a_plan_is_completed(watched):
    plan = watched.load(complete=False)
    watched.write()
    change = watched.watch.look(plan, begun_anew=False)
    assert change.completes and change.plan.complete
    assert watched.watch.look(plan, begun_anew=False) is None  # it is said once


@pytest.mark.parametrize(
    ("before", "after", "begun_anew"),
    [
        pytest.param({}, {"attempt": 2, "origin": 7}, False, id="the next attempt"),
        pytest.param({}, {"attempt": 4, "origin": 7, "complete": False}, False, id="a later one, incomplete"),
        pytest.param({}, {}, True, id="the same numbers"),
        pytest.param({"complete": False}, {"complete": False, "queue_pair": 77}, False, id="before it was complete"),
        pytest.param({"complete": False}, {}, True, id="complete at once"),
    ],
)
def test_an_attempt_begins(watched, before, after, begun_anew):
    plan = watched.load(**before)
    watched.write(**after)
    change = watched.watch.look(plan, begun_anew=begun_anew)
    assert not change.completes and change.plan.job.attempt == after.get("attempt", 1)
    assert not watched.lines


def test_the_same_plan_written_again_by_somebody_else_begins_nothing(watched):
    plan = watched.load()
    watched.write()
    assert watched.watch.look(plan, begun_anew=False) is None and not watched.lines


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({"run_id": "run-b"}, "is of run 'run-b' now, expected 'run-a'"),
        ({"attempt": 1}, "is of attempt 1 now, expected 2 or a later one"),
        ({"attempt": 2, "origin": 6}, "is another plan of attempt 2 now, of which there are checkpoints"),
        ({"attempt": 3, "origin": -2}, "field job.resumed.iteration: found -2"),
    ],
)
def test_what_cannot_be_followed_is_said_once_and_changes_nothing(watched, after, words):
    plan = watched.load(attempt=2, origin=5)
    watched.write(**after)
    assert watched.watch.look(plan, begun_anew=False) is None
    assert watched.watch.look(plan, begun_anew=False) is None
    (line,) = watched.lines
    assert line.startswith("still following attempt 2 of run 'run-a': ") and words in line


def test_a_stream_without_a_source_cannot_be_followed(watched):
    watched.write()
    found = document()
    del found["shards"][0]["streams"][0]["interface"]
    watched.path.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="names neither interface nor port"):
        watched.watch.load()
