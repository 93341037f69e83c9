# SPDX-License-Identifier: MIT
"""The learner's passes: their values add up exactly in every dtype, in any order, and never look like another pass's."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from flowcheck import learning
from flowcheck.errors import ConfigError
from flowcheck.learning import Pass

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
}


def tensor(step, rank, ranks):
    return torch.from_numpy(learning.contribution(step, rank, ranks)).view(DTYPES[step.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 3, 7, 300])
def test_sums_are_exact_in_every_order(dtype, ranks):
    elements = 5003 if ranks < 100 else 130
    for step in learning.round_of([(dtype, elements)], ranks, 1):
        order = random.Random(ranks).sample(range(ranks), ranks)
        total = torch.zeros(elements, dtype=DTYPES[dtype])
        for rank in order:
            total += tensor(step, rank, ranks)
            assert total.isfinite().all()
        expected = torch.from_numpy(learning.reduced(step, ranks)).view(DTYPES[dtype])
        assert total.view(torch.uint8).equal(expected.view(torch.uint8)), step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 5, 128, 4000])
def test_one_element_tells_the_sort_of_pass(dtype, ranks):
    elements = 70_001
    steps = learning.round_of([(dtype, elements)], ranks, 0)
    most = {"bfloat16": 256, "float16": 2048}.get(dtype, 2**24)
    digits = np.zeros(elements, np.int64)
    base = None
    for step in steps:
        value = torch.from_numpy(learning.reduced(step, ranks)).view(DTYPES[dtype]).to(torch.float64).numpy()
        if step.sort == "who":
            assert 1 <= value.min() <= value.max() <= min(ranks, most // 2)
        elif step.sort == "where":
            assert min(ranks, most // 2) < value.min()
            base = base or int(2 * most) ** 2  # any base that keeps digits apart
            digits += (
                value.astype(np.int64) * base**step.number
                if dtype in ("bfloat16", "float16")
                else value.astype(np.int64)
            )
        else:
            assert value.max() < 0
    assert len(np.unique(digits)) == elements  # digits together name the element
    ones = sum(len(group) for group in learning.rank_groups(dtype, ranks))
    assert ones == ranks


def test_partial_sums_show_their_place():
    step = Pass("float32", 100, "where")
    some = tensor(step, 1, 3) + tensor(step, 2, 3)
    whole = torch.from_numpy(learning.reduced(step, 3))
    assert (some == whole).sum() == 66 and (some[::3] == 0).all()


def test_check_bits_differ_from_pass_to_pass_and_are_the_same_everywhere():
    one, other = (learning.reduced(Pass("float32", 1000, "check", number), 2) for number in (4, 5))
    assert (one != other).mean() > 0.99
    # Both ends must make the same bits whatever their numpy: these were made once, and stay.
    assert one[:4].view("<u4").tolist() == GOLDEN


GOLDEN = [3073714398, 3332814045, 2955067801, 3099444901]


def test_a_round_holds_each_kind_once():
    steps = learning.round_of([("float32", 5), ("bfloat16", 5), ("float32", 5)], 2, 3)
    sorts = [(step.dtype, step.sort, step.number) for step in steps]
    assert sorts == [
        ("float32", "who", 0), ("float32", "where", 0), ("float32", "check", 6), ("float32", "check", 7),
        ("bfloat16", "who", 0), ("bfloat16", "where", 0), ("bfloat16", "check", 6), ("bfloat16", "check", 7),
    ]  # fmt: skip
    assert [Pass.of(step.document()) for step in steps] == steps


WRONG = [
    {"dtype": "float32"},
    {"dtype": "int8", "elements": 1, "pass": "who"},
    {"dtype": "float32", "elements": 1, "pass": "what"},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_pass_is_refused(wrong):
    with pytest.raises(ConfigError):
        Pass.of(wrong)
    with pytest.raises(ConfigError, match="cannot be learned"):
        learning.passes("int8", 4, 2, 0)


def test_no_torch_is_imported():
    code = "import sys, flowcheck.learning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
