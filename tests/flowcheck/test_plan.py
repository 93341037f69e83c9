# SPDX-License-Identifier: MIT
"""A plan is taken whole or refused with the field, the value and what was expected."""

import copy
import json
import re
from pathlib import Path

import pytest

from flowcheck import plan as plans
from flowcheck.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLE = json.loads(re.search(r"```json\n(.*?)```", (ROOT / "docs" / "plan.md").read_text(), re.S).group(1))


def changed(path, value):
    document = copy.deepcopy(EXAMPLE)
    place = document
    for part in path[:-1]:
        place = place[part]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(document)


def test_the_documented_example_is_valid():
    plan = plans.parse(json.dumps(EXAMPLE))
    assert plan.slot_bytes == plan.initial_bytes == 20000
    assert len(plan.identity()) == 128


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.json")), ids=lambda p: p.stem)
def test_every_plan_of_the_project_is_valid(path):
    plans.load(path)


SHARD = ("shards", 0)
REVISION = (*SHARD, "revisions", 0)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), "other", "'format'"),
        (("version",), 2, "'version' is 2"),
        (("colour",), "red", "colour: found 'red'"),
        (("job",), KeyError, "field job"),
        (("job", "world_size"), "2", "job.world_size: found '2'"),
        (("job", "run_id"), "a/b", "job.run_id: found 'a/b'"),
        ((*SHARD, "layout", "mtu"), 1500, "mtu: found 1500"),
        ((*SHARD, "layout", "version"), "2.31", "'2.31'"),
        ((*SHARD, "layout", "ring"), [0, 2], "ring [0, 2]"),
        ((*SHARD, "layout", "ring"), [0, 1, 2], "3 ranks, job.world_size is 2"),
        ((*SHARD, "connections", 0, "proof"), KeyError, "nothing proves that this connection is edge 0, channel 0"),
        ((*SHARD, "connections", 0, "proof", "data"), [1, 2], "data"),
        ((*SHARD, "connections", 0, "edge"), 2, "edges 0 to 1"),
        ((*SHARD, "connections", 0, "channel"), 1, "1 channel(s)"),
        ((*SHARD, "connections", 1, "edge"), 0, "both claim"),
        ((*SHARD, "connections", 0, "source"), "localhost", "no IP address"),
        ((*SHARD, "streams", 0, "links"), [0, 1, 2], "link 2"),
        ((*SHARD, "streams", 0, "links"), [], "links"),
        ((*SHARD, "streams", 0, "direction"), "up", "'up'"),
        ((*REVISION, "from_iteration"), 2, "expected each later"),
        ((*REVISION, "buckets", 0, "elements"), 4999, "4999"),
        ((*REVISION, "buckets", 0, "elements"), -1, "-1"),
        ((*REVISION, "buckets", 0, "dtype"), "float8", "'float8'"),
        ((*REVISION, "buckets", 0, "parameters", 0, "shape"), [2, 2500], "shape [2, 2500]"),
        ((*REVISION, "buckets", 0, "parameters", 0, "name"), "other", "'other' is in a bucket but not in state"),
        ((*REVISION, "buckets", 0, "parameters", 0, "offset"), 1, "end at element 5001"),
        (("state", 0, "shape"), [1, 4999], "[1, 4999]"),
        (("state",), [], "state missing"),
        (("optimizer",), KeyError, "optimizer missing"),
        (("optimizer", "class"), "Lion", "'Lion'"),
        (("optimizer", "groups", 0, "parameters"), ["bias"], "'bias'"),
        (("initial_state", "tensors"), ["bias"], "'bias'"),
        (("initial_state", "source"), "file", "file"),
        (("job", "resumed"), {"attempt": 1, "iteration": 4}, "expected an earlier one"),
        (
            ("job",),
            {"run_id": "r", "world_size": 2, "attempt": 2, "resumed": {"attempt": 1, "iteration": 4}},
            "expected 5",
        ),
        (("ring_bytes",), 4096, "ring_bytes: found 4096"),
        (("checkpoints",), {"retention": {"last_iterations": 0}}, "last_iterations"),
        ((*SHARD, "startup", 2, "elements"), 4000, "20000 bytes, the broadcasts that carry them 16000"),
        ((*SHARD, "startup", 2, "op"), "all_gather", "all_gather"),
        (("slots",), 1, "slots: found 1"),
        (("shards",), [], "shards"),
    ],
)
def test_a_wrong_field_is_named(path, value, words):
    with pytest.raises(ConfigError) as caught:
        plans.parse(changed(path, value), "here.json")
    text = str(caught.value)
    assert text.startswith("here.json: ") and words in text and "\n" not in text
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'"plan"', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ConfigError):
        plans.parse(text)


def test_of_two_fields_of_one_name_the_last_counts():
    text = json.dumps(EXAMPLE).replace('"lr": ', '"lr": "x", "lr": ').replace('"run_id": ', '"run_id": 7, "run_id": ')
    assert plans.parse(text).identity() == plans.parse(json.dumps(EXAMPLE)).identity()


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        plans.load(tmp_path / "none.json")


def test_buckets_begin_on_cache_lines_and_ranges_come_back_flat():
    document = copy.deepcopy(EXAMPLE)
    for key in ("state", "initial_state", "optimizer", "arithmetic"):
        del document[key]
    document["shards"][0]["startup"] = []
    document["shards"][0]["revisions"] = [
        {
            "from_iteration": 1,
            "buckets": [
                {"dtype": "float32", "elements": 5},
                {"dtype": "bfloat16", "elements": 33},
                {"dtype": "int8", "elements": 1},
            ],
        }
    ]
    plan = plans.parse(json.dumps(document))
    assert plan.revision(1).bucket_offsets == [0, 64, 192]
    assert plan.slot_bytes == 193 and plan.revision(1).gradient_bytes == 20 + 66 + 1
    assert plan.flat_ranges(1, [(0, 193)]) == [[0, 87]]
    assert plan.flat_ranges(1, [(64, 72), (16, 24), (192, 200)]) == [[16, 28], [86, 87]]
    assert plan.flat_ranges(1, [(24, 64)]) == []


def test_an_attempt_that_goes_on_takes_no_state_from_the_wire():
    document = copy.deepcopy(EXAMPLE)
    for key in ("state", "initial_state", "optimizer", "arithmetic"):
        del document[key]
    document["job"] |= {"attempt": 2, "resumed": {"attempt": 1, "iteration": 40}}
    for number, revision in enumerate(document["shards"][0]["revisions"]):
        revision["from_iteration"] = 41 + number
    with pytest.raises(ConfigError, match="carries the initial state"):
        plans.parse(json.dumps(document))
    del document["shards"][0]["startup"][-1]["carries"]
    assert plans.parse(json.dumps(document)).first_iteration == 41


def test_identity_tells_runs_apart():
    one = plans.parse(json.dumps(EXAMPLE))
    two = plans.parse(changed(("job", "run_id"), "another"))
    assert one.identity() != two.identity() and one.identity() == plans.parse(json.dumps(EXAMPLE)).identity()
