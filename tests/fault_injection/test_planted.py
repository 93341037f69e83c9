# SPDX-License-Identifier: MIT
"""The campaign reports bugs that are planted in the pipeline, and none where none is."""

import pytest

from tests.fault_injection.planted import BUGS, ROOT, Bug, counts, plant, report


def test_every_bug_has_a_line_to_be_planted_in():
    assert len(BUGS) >= 10
    for bug in BUGS:
        assert (ROOT / bug.path).read_text().count(bug.old) == 1, bug.name


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return tmp_path_factory.mktemp("recordings")


@pytest.mark.nightly
@pytest.mark.dpdk
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_reported(bug, recordings, tmp_path):
    plant(bug, tmp_path)
    document = report(bug, tmp_path, recordings)
    assert document["status"] == 6
    assert any(counts(document)[name] for name in bug.shows), counts(document)


@pytest.mark.nightly
@pytest.mark.dpdk
@pytest.mark.timeout(900)
def test_the_same_faults_show_nothing_without_a_bug(recordings):
    kinds = tuple(dict.fromkeys(kind for bug in BUGS for kind in bug.kinds))
    none = Bug("none", "README.md", "", "", (), kinds, (), cases=6)
    document = report(none, ROOT, recordings)
    assert document["status"] == 0 and not any(counts(document).values()), counts(document)
