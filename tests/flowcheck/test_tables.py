# SPDX-License-Identifier: MIT
"""What the commands print for people says what it was given."""

from flowcheck.tables import print_flows, print_verification


def test_addresses_are_printed_as_they_are(capsys):
    flow = {
        "src": "fd00:a:100:abcd::1", "dst": "fd00:b:1234:ab::2", "dest_qp": 7, "kind": "data", "encoding": "ll", "packets": 1,
        "psn_first": 0, "psn_last": 0, "missing": 0, "duplicates": 0, "messages": 1, "payload_bytes": 16, "mtu": 1024,
    }  # fmt: skip
    counts = {"frames": 1, "roce_frames": 1, "other_frames": 0, "malformed": 0, "icrc": {"ok": 1, "bad": 0}}
    print_flows({"capture": "host[a].pcap", "flows": [flow], **counts})
    printed = capsys.readouterr().out
    assert flow["src"] in printed and flow["dst"] in printed and "host[a].pcap" in printed


def test_a_bad_file_is_named_as_it_is_called(capsys):
    problem = {"file": "snapshots/000001.h5", "what": "/runs/[a]/[/b]/snapshots/000001.h5: is not as it was written"}
    print_verification({"problems": [problem], "ok": False, "offered": None, "files": 1, "bytes": 1, "proved_to": 0})
    assert problem["what"] in capsys.readouterr().out
