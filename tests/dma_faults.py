# SPDX-License-Identifier: MIT
"""Makes DMA devices fail copies: swaps the completion function in DPDK's own table, as a broken device would answer.

The offsets are asked of the compiler from DPDK's headers, so that no layout is assumed here.
"""

import ctypes
import subprocess

SOURCE = r"""
#define ALLOW_EXPERIMENTAL_API 1
#include <string.h>
#include <rte_dmadev.h>
static rte_dma_completed_status_t real;
static int every, seen;
static uint16_t lying(void *dev, uint16_t vchan, const uint16_t count, uint16_t *last, enum rte_dma_status_code *status) {
    uint16_t got = real(dev, vchan, count, last, status);
    for (uint16_t i = 0; i < got; i++)
        if (++seen % every == 0) status[i] = RTE_DMA_STATUS_ERROR_UNKNOWN;
    return got;
}
void fail_every(int n) {
    every = n;
    for (int i = 0; i < RTE_DMADEV_DEFAULT_MAX; i++)
        if (rte_dma_is_valid(i)) {
            real = rte_dma_fp_objs[i].completed_status;
            rte_dma_fp_objs[i].completed_status = lying;
        }
}
int failed(void) { return seen / every; }
"""


def load(folder):
    """Return the compiled library; call `fail_every(n)` once the devices are there."""
    path = folder / "faults.c"
    path.write_text(SOURCE)
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "libdpdk"], check=True, capture_output=True, text=True)
    words = flags.stdout.split()
    library = folder / "faults.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(library), str(path), "-Wno-deprecated-declarations", *words], check=True
    )
    return ctypes.CDLL(str(library))
