# SPDX-License-Identifier: MIT
"""DPDK's environment: started once a process, then given devices by name."""

import os

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc
from libc.string cimport strdup, strerror

from flowcheck.errors import DeviceError

cdef extern from "rte_eal.h" nogil:
    int rte_eal_init(int argc, char **argv)

cdef extern from "rte_errno.h" nogil:
    int rte_errno
    const char *rte_strerror(int code)

cdef extern from "rte_version.h" nogil:
    const char *rte_version()

cdef extern from "rte_dev.h" nogil:
    int rte_dev_probe(const char *devargs)

cdef extern from "rte_bus.h" nogil:
    int rte_eal_hotplug_remove(const char *bus, const char *name)

cdef extern from "rte_memory.h" nogil:
    int rte_extmem_register(void *address, size_t length, uint64_t *iova, unsigned int pages, size_t page_bytes)
    int rte_extmem_unregister(void *address, size_t length)

cdef extern from "rte_vfio.h" nogil:
    enum:
        RTE_VFIO_DEFAULT_CONTAINER_FD
    int rte_vfio_is_enabled(const char *module)
    int rte_vfio_container_dma_map(int container, uint64_t va, uint64_t iova, uint64_t length)
    int rte_vfio_container_dma_unmap(int container, uint64_t va, uint64_t iova, uint64_t length)

PAGE_BYTES = 4096
_started = False


def version() -> str:
    """version() -> DPDK's own version text."""
    return rte_version().decode()


def start(arguments) -> None:
    """start(arguments): start DPDK with command-line arguments; DeviceError if it will not. Once a process."""
    global _started
    if _started:
        return
    words = ["flowcheck", *arguments]
    # DPDK keeps pointers into these words for the life of the process: they are not freed.
    cdef char **argv = <char **> calloc(len(words) + 1, sizeof(char *))
    for i, word in enumerate(words):
        argv[i] = strdup(word.encode())
    cores = os.sched_getaffinity(0)
    cdef int status = rte_eal_init(<int> len(words), argv)
    cdef int code = rte_errno
    # DPDK pins the calling thread to one core, which the threads of other libraries would inherit.
    os.sched_setaffinity(0, cores)
    if status < 0:
        raise DeviceError(f"DPDK does not start with {' '.join(words[1:])}: {rte_strerror(code).decode()}", code)
    _started = True


def probe(str devargs) -> None:
    """probe(devargs): bring a device to life by its device arguments; DeviceError if no driver takes it."""
    cdef int status = rte_dev_probe(devargs.encode())
    if status < 0:
        raise DeviceError(f"DPDK device {devargs!r}: {strerror(-status).decode()}; is its driver installed?", -status)


def unplug(str name) -> None:
    """unplug(name): take a virtual device away again; one that is gone already is no error."""
    rte_eal_hotplug_remove(b"vdev", name.encode())


def register(unsigned char[::1] memory) -> None:
    """register(memory): make mapped memory known to DPDK and, where an IOMMU stands between, to its DMA engines.

    The memory must begin on a page and stay mapped until `unregister`. Addresses on the bus are virtual ones (EAL runs
    in VA mode). DeviceError if the memory cannot be pinned, as that of a plain file cannot.
    """
    cdef uint64_t address = <uint64_t> &memory[0]
    cdef uint64_t length = (memory.shape[0] + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
    if rte_extmem_register(<void *> address, length, NULL, 0, PAGE_BYTES) < 0:
        raise DeviceError(f"cannot register {length} bytes with DPDK: {rte_strerror(rte_errno).decode()}", rte_errno)
    # Without VFIO no device of this process is behind an IOMMU (virtual ones never are).
    if rte_vfio_is_enabled(b"vfio") and rte_vfio_container_dma_map(
            RTE_VFIO_DEFAULT_CONTAINER_FD, address, address, length) < 0:
        code = rte_errno
        rte_extmem_unregister(<void *> address, length)
        raise DeviceError(f"cannot map {length} bytes for DMA: {rte_strerror(code).decode()}; "
                          "is the file on hugetlbfs or tmpfs?", code)


def unregister(unsigned char[::1] memory) -> None:
    """unregister(memory): take memory back from DPDK."""
    cdef uint64_t address = <uint64_t> &memory[0]
    cdef uint64_t length = (memory.shape[0] + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
    if rte_vfio_is_enabled(b"vfio"):
        rte_vfio_container_dma_unmap(RTE_VFIO_DEFAULT_CONTAINER_FD, address, address, length)
    rte_extmem_unregister(<void *> address, length)
