# SPDX-License-Identifier: MIT
"""A format whose disk fails, or whose process is killed, at any call: the old, the new, or a pair that is refused."""

import os

import pytest

from flowcheck.errors import CheckpointError, ConfigError, FlowCheckError
from tests.updater.states import FOLDERS, READERS, different, state, target, whole
from updater import durable
from updater.diff import diff
from updater.durable import Disk
from updater.export import FORMATS, export

BY_US = [form for form in FORMATS if form != "hdf5"]  # that one is written as snapshots are


class FailingDisk(Disk):
    """Fails at its n-th call: by an OSError that once, by anything else at every call from then on, as after a kill."""

    def __init__(self, calls, error):
        self.left, self.error = calls, error

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name not in vars(Disk) or name.startswith("_") or name == "close":
            return found

        def call(*arguments):
            self.left -= 1
            if self.left == 0 or (self.left < 0 and self.error is not full):
                raise self.error()
            return found(*arguments)

        return call


class Killed(BaseException):
    pass


def full():
    return OSError(28, "No space left on device")


def after_each_failure(error, form, path, monkeypatch):
    """Export state 13, over 12 where it is a file, with a disk that fails at its first, second, .. call until none fails.

    Yields what was raised and what is there then: state 12 or 13, None, or "refused" for a pair of two states.
    """
    for calls in range(1, 300):
        if form not in FOLDERS:
            export(state(12), form, path)
        disk, raised = FailingDisk(calls, error), None
        with monkeypatch.context() as patch:
            patch.setattr(durable, "disk", disk)
            try:
                export(state(13), form, path)
            except (FlowCheckError, Killed) as caught:
                raised = caught
        found = refused(path) if form == "safetensors" else None
        if found is None and path.exists():
            of = READERS[form](path)
            found = of["iteration"]
            assert different(of, whole(state(found))) == []
        yield raised, found
        if raised is None:
            assert found == 13 and calls > 4
            return
        if form in FOLDERS and path.exists():
            path.rename(path.with_name(f"done-{calls}"))
    raise AssertionError("never came to its end")


def refused(path):
    try:
        diff(str(path), str(path))
    except CheckpointError as error:
        assert "is of iteration 13, expected 12" in str(error)
        return "refused"
    return None


@pytest.mark.parametrize("form", BY_US)
def test_a_full_disk_is_named_and_leaves_nothing_half_written(form, tmp_path, monkeypatch):
    path, outcomes = target(tmp_path, form), []
    for raised, found in after_each_failure(full, form, path, monkeypatch):
        if raised:
            assert str(raised).startswith(f"{path}: cannot write: No space left on device; free some space")
            assert "\n" not in str(raised)
        assert list(tmp_path.glob("*.unfinished")) == []
        outcomes.append(found)
    # Only after the last rename, where the folder cannot be synced, is the new one there in spite of the error.
    before = None if form in FOLDERS else 12
    assert outcomes[:3] == [before] * 3 and outcomes[-2:] == [13, 13]
    assert set(outcomes) == {before, 13} | ({"refused"} if form == "safetensors" else set())


@pytest.mark.parametrize("form", BY_US)
def test_killed_at_any_call_leaves_the_old_or_the_new(form, tmp_path, monkeypatch):
    path, outcomes = target(tmp_path, form), []
    for raised, found in after_each_failure(Killed, form, path, monkeypatch):
        assert isinstance(raised, Killed | None)
        outcomes.append(found)
    before = None if form in FOLDERS else 12
    assert set(outcomes) == {before, 13} | ({"refused"} if form == "safetensors" else set())
    assert list(tmp_path.glob("*.unfinished")) == []  # the last, which was not killed, went over what was left


def test_an_interruption_is_none_of_the_disk(tmp_path, monkeypatch):
    for form in BY_US:
        for calls in (2, 3, 4):
            with monkeypatch.context() as patch:
                patch.setattr(durable, "disk", FailingDisk(calls, KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    export(state(), form, target(tmp_path, form))


@pytest.mark.parametrize("form", FORMATS)
def test_what_cannot_be_written_to_is_refused_and_kept(form, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "kept").write_text("kept")
    with pytest.raises(ConfigError, match="is there already" if form in FOLDERS else "is a folder"):
        export(state(), form, there)
    with pytest.raises(ConfigError, match="is no folder; make it first"):
        export(state(), form, tmp_path / "none" / "state")
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "kept"]
    if form in FOLDERS:
        with pytest.raises(ConfigError, match="is there already"):
            export(state(), form, there / "kept")


def test_two_processes_do_not_write_one_folder(tmp_path):
    (tmp_path / "state.unfinished").mkdir()
    lock = durable.lock_directory(tmp_path / "state.unfinished")
    with pytest.raises(ConfigError, match="another process"):
        export(state(), "dcp", tmp_path / "state")
    os.close(lock)
    export(state(), "dcp", tmp_path / "state")
