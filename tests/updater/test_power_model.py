# SPDX-License-Identifier: MIT
"""The model of a disk that loses its power: what it may hold after small scripts, all of it written down here by hand."""

import random
from pathlib import Path

import pytest

from tests.updater import power
from tests.updater.power import RecordingDisk, Remains


class EveryOther:
    """A disk that does what it is told, but whose syncs fail while `fails` is set."""

    def __init__(self, disk):
        self._disk, self.fails = disk, False

    def __getattr__(self, name):
        if self.fails and "sync" in name:
            raise OSError(5, "Input/output error")
        return getattr(self._disk, name)


@pytest.fixture
def disk(tmp_path):
    below = EveryOther(power.Disk())
    recording = RecordingDisk(tmp_path, below)
    recording.below, recording.at = below, tmp_path
    return recording


def found(disk, tears=0):
    """Return all that may be found after what was done: sorted, each as {path: content}, folders as None."""
    remains, rng = Remains(disk.trace), random.Random(1)
    for place, operation in enumerate(disk.trace.operations):
        remains.note(place, operation)
    images = []
    for _ in range(tears + 1):
        for what, fates in remains.variants(rng):
            image = {str(path): content for path, content in remains.image(fates).items()}
            if image not in images and (tears or "torn" not in what):
                images.append(image)
    return images


def same(images, expected):
    assert len(images) == len(expected) and all(image in images for image in expected), images


def put(disk, name, content, *, sync=True):
    fd = disk.create(disk.at / name)
    disk.write(fd, [content], 0)
    if sync:
        disk.sync(fd)
    disk.close(fd)


def failing(disk, action):
    disk.below.fails = True
    with pytest.raises(OSError, match="Input/output"):
        action()
    disk.below.fails = False


def test_a_file_whose_folder_was_not_synced_may_be_missing_and_has_its_content_if_not(disk):
    put(disk, "a", b"one")
    same(found(disk), [{}, {"a": b"one"}])
    disk.sync_folder(disk.at)
    same(found(disk), [{"a": b"one"}])


def test_a_name_without_its_files_sync_is_a_file_of_any_content(disk):
    put(disk, "a", b"one", sync=False)
    disk.sync_folder(disk.at)
    same(found(disk), [{"a": b""}, {"a": b"one"}])
    torn = found(disk, tears=200)
    assert {"a": b"on"} in torn and {"a": b"\0\0e"} in torn and {"a": bytes(3)} in torn
    assert any(len(image["a"]) == 3 and image["a"][:1] == b"o" and image["a"] != b"o\0\0" for image in torn)
    assert all(len(image["a"]) <= 3 for image in torn)


def test_a_rename_shows_the_old_file_or_the_new_one_with_what_reached_of_it(disk):
    put(disk, "a", b"old")
    disk.sync_folder(disk.at)
    put(disk, "b", b"new", sync=False)
    disk.rename(disk.at / "b", disk.at / "a")
    same(found(disk), [{"a": b"old"}, {"a": b"old", "b": b""}, {"a": b"old", "b": b"new"}, {"a": b""}, {"a": b"new"}])


def test_later_writes_may_be_there_without_earlier_ones_but_not_without_what_was_synced(disk):
    fd = disk.create(disk.at / "a")
    disk.sync_folder(disk.at)
    disk.write(fd, [b"ab", b"c"], 0)
    disk.datasync(fd)
    disk.write(fd, [b"X"], 1)
    disk.write(fd, [b"de"], 4)
    same(found(disk), [{"a": content} for content in (b"abc", b"aXc", b"abc\0de", b"aXc\0de")])
    disk.truncate(fd, 2)
    assert {"a": b"aX"} in found(disk) and {"a": b"ab"} in found(disk) and {"a": b"abc\0de"} in found(disk)
    disk.datasync(fd)
    same(found(disk), [{"a": b"aX"}])
    disk.write(fd, [b"pq"], 0)
    assert {image["a"] for image in found(disk, tears=100)} == {b"aX", b"pX", b"aq", b"pq"}


def test_a_folder_that_was_not_synced_above_takes_all_in_it_along(disk):
    disk.make_folder(disk.at / "out")
    disk.make_folder(disk.at / "out" / "log")
    put(disk, "out/log/a", b"one")
    disk.sync_folder(disk.at / "out" / "log")
    same(found(disk), [{}, {"out": None}, {"out": None, str(Path("out/log")): None, "out/log/a": b"one"}])
    disk.sync_folder(disk.at)
    disk.sync_folder(disk.at / "out")
    same(found(disk), [{"out": None, "out/log": None, "out/log/a": b"one"}])


def test_creating_over_a_file_empties_that_very_file(disk):
    put(disk, "a", b"old")
    disk.sync_folder(disk.at)
    fd = disk.create(disk.at / "a")
    disk.write(fd, [b"n"], 0)
    same(found(disk), [{"a": content} for content in (b"old", b"", b"n", b"nld")])


def test_a_removed_file_may_come_back(disk):
    put(disk, "a", b"one")
    disk.sync_folder(disk.at)
    disk.unlink(disk.at / "a")
    same(found(disk), [{}, {"a": b"one"}])
    disk.sync_folder(disk.at)
    same(found(disk), [{}])


def test_what_a_sync_refused_no_later_sync_makes_durable(disk):
    fd = disk.create(disk.at / "a")
    disk.sync_folder(disk.at)
    disk.write(fd, [b"abc"], 0)
    failing(disk, lambda: disk.datasync(fd))
    disk.datasync(fd)
    same(found(disk), [{"a": b""}, {"a": b"abc"}])
    disk.write(fd, [b"Z"], 2)
    disk.datasync(fd)
    same(found(disk), [{"a": b"\0\0Z"}, {"a": b"abZ"}])
    disk.write(fd, [b"xyz"], 0)
    disk.datasync(fd)
    same(found(disk), [{"a": b"xyz"}])


def test_what_was_there_at_first_is_there(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a").write_bytes(b"one")
    disk = RecordingDisk(tmp_path)
    disk.at = tmp_path
    same(found(disk), [{"f": None, "f/a": b"one"}])
    fd = disk.open(tmp_path / "f" / "a")
    disk.write(fd, [b"O"], 0)
    same(found(disk), [{"f": None, "f/a": b"one"}, {"f": None, "f/a": b"One"}])


def test_an_image_laid_down_is_that_image(disk, tmp_path):
    image = {Path("out"): None, Path("out/a"): b"one"}
    power.lay(image, tmp_path)
    assert (tmp_path / "out" / "a").read_bytes() == b"one"
    assert power.digest(image) != power.digest({**image, Path("out/a"): b"on"})
