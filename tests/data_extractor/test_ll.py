# SPDX-License-Identifier: MIT
"""The LL kernels give the same bytes and the same answer."""

import os

import pytest
from data_extractor._extractor import strip

from tests import builders

KERNELS = ("scalar", "avx2")


def available(kernel):
    try:
        strip(b"", 1, kernel)
    except ValueError:
        return False
    return True


HERE = [kernel for kernel in KERNELS if available(kernel)]


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("lines", [*range(40), 63, 64, 65, 256, 511])
def test_data_words_are_taken_and_flags_left(kernel, lines):
    data = os.urandom(8 * lines)
    assert strip(builders.ll_lines(data, 0xDEADBEEF), 0xDEADBEEF, kernel) == data


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("lines", [1, 3, 4, 8, 9, 17])
def test_a_wrong_flag_is_seen_in_every_word(kernel, lines):
    good = builders.ll_lines(os.urandom(8 * lines), 77)
    for line in range(lines):
        for word in (4, 12):
            for bit in (0, 31):
                bad = bytearray(good)
                bad[16 * line + word + bit // 8] ^= 1 << bit % 8
                assert strip(bytes(bad), 77, kernel) is None


@pytest.mark.parametrize("kernel", HERE)
def test_data_that_looks_like_the_flag_is_data(kernel):
    data = (77).to_bytes(4, "little") * 34
    assert strip(builders.ll_lines(data, 77), 77, kernel) == data
    assert strip(builders.ll_lines(data, 78), 77, kernel) is None


def test_the_scalar_kernel_is_always_there_and_unknown_ones_are_refused():
    assert "scalar" in HERE and available("auto")
    with pytest.raises(ValueError, match="neon"):
        strip(b"", 1, "neon")
