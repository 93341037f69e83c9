# SPDX-License-Identifier: MIT
"""The documents, the numpy dtypes and the C structs draw the same bytes."""

import re
from pathlib import Path

import pytest

from flowcheck import _layout_check, formats

DOCS = Path(__file__).parents[2] / "docs"
TABLES = [
    ("ring-format.md", "Header", "RING_HEADER"),
    ("ring-format.md", "Identity", "IDENTITY"),
    ("ring-format.md", "Record", "RECORD"),
    ("slot-format.md", "Header", "SLOTS_HEADER"),
    ("slot-format.md", "Slot", "SLOT"),
]


def documented(page: str, section: str) -> list[tuple[int, int, str]]:
    text = (DOCS / page).read_text()
    body = re.search(rf"^## {section}.*?$(.*?)(?=^## |\Z)", text, re.S | re.M).group(1)
    return [(int(o), int(b), n) for o, b, n in re.findall(r"^\| (\d+) \| (\d+) \| `?(\w+)`? ", body, re.M)]


@pytest.mark.parametrize(("page", "section", "name"), TABLES)
def test_document_draws_every_byte_of_the_dtype(page, section, name):
    dtype = getattr(formats, name)
    fields = [(dtype.fields[n][1], dtype.fields[n][0].itemsize, n) for n in dtype.names]
    assert documented(page, section) == fields
    assert sum(size for _, size, _ in fields) == dtype.itemsize  # no hidden padding


@pytest.mark.parametrize("name", sorted(_layout_check.layout()))
def test_compiler_and_numpy_agree(name):
    size, offsets = _layout_check.layout()[name]
    dtype = getattr(formats, name)
    assert dtype.itemsize == size
    assert {field: dtype.fields[field][1] for field in offsets} == offsets


def test_a_record_header_is_one_cache_line():
    assert formats.RECORD.itemsize == 64


def test_cursors_have_their_cache_lines_to_themselves():
    for dtype, names in (
        (formats.RING_HEADER, "written parsed extracted ended"),
        (formats.SLOTS_HEADER, "settled_next consumed_next ended"),
    ):
        lines = [dtype.fields[n][1] // 64 for n in names.split()]
        assert all(dtype.fields[n][1] % 64 == 0 for n in names.split())
        assert len(set(lines)) == len(lines)
