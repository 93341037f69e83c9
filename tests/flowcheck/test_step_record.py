# SPDX-License-Identifier: MIT
"""The step record's words, as docs/step-record.md draws them, and what a sum over ranks does to them."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcheck.step_record import FIELDS, RecordError, RecordForm, split_digest

TEXT = (Path(__file__).parents[2] / "docs" / "step-record.md").read_text()
FORM = RecordForm("run", 2, 3, [(0, "lr", 0), (1, "betas", 2)], [("generator", 5)], 4)


def test_the_document_has_the_words_of_the_code():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) ", TEXT, re.M)
    assert {name: (int(word), int(words)) for word, words, name in rows} == FIELDS
    end = 0
    for word, words, name in rows:
        assert int(word) == end, name
        end += int(words)


def words_of(form, iteration, lr=0.1, betas=(0.9, 0.999), extra=b"abcde"):
    """Return one step's words by the document alone."""
    content = [0x4346, 0x5352, 1, 0, *form.run, 2, 0, iteration & 0xFFFF, iteration >> 16, 1, 0, *[0] * 16]
    for number in (lr, *betas):
        content += struct.unpack("<4H", struct.pack("<d", number))
    content += struct.unpack("<3H", extra + b"\0")
    content += [0] * (len(content) % 2)
    plain = sum(content) % 2**32
    placed = sum(word * place for place, word in enumerate(content, 1)) % 2**32
    return [*content, plain & 0xFFFF, plain >> 16, placed & 0xFFFF, placed >> 16]


def test_what_the_document_says_is_decoded():
    words = np.array(words_of(FORM, 70000), np.float32)
    assert len(words) == FORM.words
    step = FORM.decode(words, 70000)
    assert step.hyperparameters == {0: {"lr": 0.1}, 1: {"betas": (0.9, 0.999)}}
    assert step.extra == {"generator": b"abcde"} and step.reductions == 1
    assert (step.skipped, step.scale, step.clip_coefficient, step.clip_value, step.loss) == (
        False,
        None,
        None,
        None,
        None,
    )


@given(st.integers(0, FORM.words - 1), st.sampled_from([1.0, -1.0, 0.5, 65536.0, float("nan"), float("inf")]))
def test_any_wrong_word_is_found(at, change):
    words = np.array(words_of(FORM, 5), np.float32)
    words[at] += change
    with pytest.raises(RecordError):
        FORM.decode(words, 5)


def test_words_of_another_iteration_run_or_attempt_are_refused():
    words = np.array(words_of(FORM, 5), np.float32)
    with pytest.raises(RecordError, match="iteration 5"):
        FORM.decode(words, 6)
    other = RecordForm("other", 2, 3, FORM.hyperparameters, FORM.extra, 4)
    with pytest.raises(RecordError, match="another run"):
        other.decode(words, 5)
    later = RecordForm("run", 3, 3, FORM.hyperparameters, FORM.extra, 4)
    with pytest.raises(RecordError, match="another attempt"):
        later.decode(words, 5)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 64, 1000, 4000])
def test_digests_summed_over_ranks_stay_exact_and_name_the_odd_one(ranks):
    form = RecordForm("run", 1, ranks, [], [], 2)
    right = [0xFFFF_FFFF_FFFF_FFFF, 0x0123_4567_89AB_CDEF]

    def summed(digests_of):
        total = np.zeros(form.elements, np.float32)
        for rank in range(ranks):
            parts = [
                [p, [q * form.weight(rank) for q in p]] for p in (split_digest(d, form.bits) for d in digests_of(rank))
            ]
            total[2 * form.words :] += np.array(parts, np.float32).ravel()
        return total

    assert form.audit(summed(lambda rank: right), right) == []
    for odd in {0, ranks // 2, ranks - 1}:
        for wrong in (right[1] ^ 1, right[1] ^ 1 << 63, 0):
            found = form.audit(summed(lambda rank: [right[0], wrong if rank == odd else right[1]]), right)  # noqa: B023
            assert found == [(1, odd)]
    assert form.audit(summed(lambda rank: [5, right[1]]), right) == [(0, None)]


def test_more_ranks_than_a_sum_is_exact_for_are_refused():
    with pytest.raises(ValueError, match="ranks"):
        RecordForm("run", 1, 6000, [], [], 1)
