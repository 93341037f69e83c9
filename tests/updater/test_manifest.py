# SPDX-License-Identifier: MIT
"""A manifest whose digest is right and whose content cannot be: one named error, whatever it holds."""

import hashlib
import json

import pytest

from flowcheck.errors import CheckpointError
from updater.manifest import Manifest


def document():
    attempt = {"attempt": 1, "plan": "plans/000001.json", "identity": "00" * 128, "bit_exact": True, "resumed": None}
    return {
        "format": "flowcheck-manifest", "version": 2, "run_id": "r", "has_model": True, "attempts": [attempt], "closed_to": 0,
        "pinned": [], "numbers": {}, "audited_to": None, "alarms": [],
        "files": {"plans/000001.json": {"bytes": 1, "sha256": "00" * 32}},
    }  # fmt: skip


def stored(folder, content):
    def encoded(value):
        return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"

    whole = {**content, "digest": hashlib.sha256(encoded(content)).hexdigest()}
    (folder / "manifest.json").write_bytes(encoded(whole))
    return folder


def test_one_that_can_be_is_read(tmp_path):
    assert Manifest.load(stored(tmp_path, document())).attempts[0].plan == "plans/000001.json"


@pytest.mark.parametrize(
    "place, value",
    [
        (("closed_to",), float("inf")),
        (("closed_to",), []),
        (("attempts", 0, "resumed"), [1]),
        (("attempts", 0, "resumed"), 7),
        (("attempts", 0, "identity"), "x"),
        (("attempts",), [[]]),
        (("pinned",), [[1]]),
        (("pinned",), 3),
        (("numbers",), []),
        (("files",), {"../x": {"bytes": 1, "sha256": ""}}),
        (("files", "plans/000001.json"), None),
    ],
)
def test_one_that_cannot_be_is_refused_by_name(tmp_path, place, value):
    content = document()
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        Manifest.load(stored(tmp_path, content))
