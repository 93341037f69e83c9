# SPDX-License-Identifier: MIT
"""What fuzzing has reached stays reached: every input of the corpora, and, where clang is, a while of every target."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packet_parser._frames import decode

from flowcheck.capture import validate
from flowcheck.errors import CaptureError
from fuzz import compiled, run, seeds
from fuzz.interpreted import INTERPRETED
from packet_parser.inspect import inspect

ROOT = Path(__file__).parents[2]


def inputs(name):
    return [*run.packed(name).values(), *seeds.of(name)]


@pytest.mark.parametrize("name", INTERPRETED)
def test_no_input_of_the_corpus_finds_anything(name):
    target = importlib.import_module(f"fuzz.targets.{name}")
    for data in inputs(name):
        target.one(data)


def test_frames_of_the_corpus_decode_inside_of_themselves():
    results = set()
    for frame in inputs("decode"):
        found = decode(frame)
        results.add(found["result"])
        if found["result"] == "ok":
            assert len(found["payload"]) <= found["length"] <= len(frame)
            assert decode(frame[: found["length"] - 1])["result"] != "ok"
    assert len(results) > 5


def test_captures_of_the_corpus_are_whole_for_all_readers_or_for_none(tmp_path):
    path, whole = tmp_path / "capture", 0
    for content in inputs("capture"):
        path.write_bytes(content)
        try:
            summary = validate(path)
        except CaptureError:
            with pytest.raises(CaptureError):
                inspect(path)
            continue
        assert inspect(path)["frames"] == summary.frames
        whole += 1
    assert whole


def test_the_corpora_are_small():
    assert sum(path.stat().st_size for path in run.CORPUS.glob("*.zip")) < 500_000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", compiled.COMPILED)
def test_a_while_of_fuzzing_finds_nothing(name):
    if compiled.clang() is None:
        pytest.skip("no clang with libFuzzer here: ./build.sh fuzz installs it")
    command = [sys.executable, "-m", "fuzz.run", "--target", name, "--seconds", "20", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)["targets"]
    assert report["findings"] == [] and report["executions"] > 1000 and report["edges"] > 10, report
