# SPDX-License-Identifier: MIT
"""What a message looks like in its slot: a second account, word by word (prims_ll.h, prims_ll128.h). Imports no FlowCheck."""

STRIDE = {"ll": 65536, "ll128": 614400, "simple": 524288}


def payload(protocol, data, step, stale):
    """Return a message's wire bytes; `stale` gives the byte that fills what is undefined."""
    if protocol == "simple":
        return data
    if protocol == "ll":
        flag = ((step + 1) % 2**32).to_bytes(4, "little")
        data += stale * (-len(data) % 8)
        lines = [data[i : i + 4] + flag + data[i + 4 : i + 8] + flag for i in range(0, len(data), 8)]
        if step & 0x7FFFFFF8 == 0x7FFFFFF8:
            lines += [bytes(4) + flag + bytes(4) + flag] * (65536 // 16 - len(lines))
        return b"".join(lines)
    data += stale * (-len(data) % 1920)
    flag = ((step + 1) % 2**64).to_bytes(8, "little")
    out = b""
    for begin in range(0, len(data), 1920):
        words = [None] * 256
        for line in range(16):
            words[line * 16 + 15] = flag
        for d in range(240):
            h, i, b = d // 120, (d % 120) // 2, d % 2
            if i < 32:
                line, k = i // 8, i % 8
                where = (line, 2 * k + b) if k < 7 else (line, 14) if b == 0 else (4 + line, 14)
            else:
                line, k = (i - 32) // 7, (i - 32) % 7
                where = (4 + line, 2 * k + b)
            words[(8 * h + where[0]) * 16 + where[1]] = data[begin + 8 * d : begin + 8 * d + 8]
        out += b"".join(words)
    return out
