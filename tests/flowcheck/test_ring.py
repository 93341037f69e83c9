# SPDX-License-Identifier: MIT
"""Ring files that something else has written."""

import pytest

from flowcheck.errors import RingFormatError
from flowcheck.ring import PacketRing


def test_a_stream_name_that_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "ring"
    PacketRing.create(path, frame_bytes=256, records=2, identity=bytes(128), stream="port").close()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"port", b"po\xfft", 1))
    with pytest.raises(RingFormatError, match="expected UTF-8"):
        PacketRing.open(path)
