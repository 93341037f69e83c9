# SPDX-License-Identifier: MIT
"""docs/checkpoints.md draws the bytes that a real log has."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from google_crc32c import value as crc32c

from updater.log import LogWriter

TEXT = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()


def documented(section):
    body = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", TEXT, re.S | re.M).group(1)
    rows = [(int(o), int(b), n) for o, b, n in re.findall(r"^\| (\d+) \| (\d+) \| (\w+) ", body, re.M)]
    end = 0
    for offset, size, name in rows:
        assert offset == end, name
        end += size
    return {name: slice(offset, offset + size) for offset, size, name in rows}, end


@pytest.fixture
def log(tmp_path):
    identity = bytes(range(128))
    writer = LogWriter(tmp_path, identity, 0)
    payload = np.arange(100, dtype=np.uint8)
    writer.append(1, 3, 17, 2, [payload[:60], payload[60:]])
    writer.commit()
    writer.close()
    return (tmp_path / "000001.fclog").read_bytes(), identity, payload.tobytes()


def number(data):
    return int.from_bytes(data, "little")


def test_segment_header_is_as_drawn(log):
    data, identity, _ = log
    fields, end = documented("Segment of the log")
    value = {name: data[where] for name, where in fields.items()}
    assert end == 256 == number(value["header_bytes"])
    assert value["magic"] == bytes.fromhex("8946 4347 4C4F 470A") and number(value["version"]) == 2
    assert number(value["number"]) == 1 and number(value["block_bytes"]) == 1 << 20
    assert value["identity"] == identity
    assert number(value["checksum"]) == crc32c(data[:60] + identity)
    assert number(value["committed_end"]) == len(data) and number(value["records"]) == 1
    assert number(value["mark_checksum"]) == crc32c(value["committed_end"] + value["records"])
    assert data[212:232] == data[192:212]  # a closed segment has both marks alike
    assert not any(value["reserved"]) and not any(value["reserved_end"])


def test_record_is_as_drawn(log):
    data, _, payload = log
    fields, end = documented("Record of the log")
    record = data[256:]
    value = {name: record[where] for name, where in fields.items()}
    assert end == 64 and value["magic"] == bytes.fromhex("8946 4349 5445 520A")
    assert [number(value[n]) for n in ("kind", "attempt", "iteration", "revision", "payload_bytes")] == [
        1,
        3,
        17,
        2,
        100,
    ]
    assert number(value["checksum"]) == crc32c(record[:60])
    assert struct.unpack_from("<I", record, 64)[0] == crc32c(payload)
    assert record[128:228] == payload and len(record) == 256
