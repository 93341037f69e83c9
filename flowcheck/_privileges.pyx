# SPDX-License-Identifier: MIT
"""Giving up every capability of a process, in all of its threads.

capset(2) speaks for the calling thread alone, and the threads of DPDK and other libraries are there before the devices
are open. So each thread is sent a signal whose handler gives up that thread's.
"""

import os
import time

from libc.errno cimport errno
from libc.string cimport memset
from posix.unistd cimport getpid

from flowcheck.errors import FlowCheckError

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    ctypedef void (*handler_type)(int)
    struct sigaction_type "sigaction":
        handler_type sa_handler
        int sa_flags
        sigset_t sa_mask
    int sigfillset(sigset_t *mask)
    int sigaction(int number, const sigaction_type *action, sigaction_type *before)
    int SIGRTMAX
    int SA_RESTART

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_capset
    long SYS_tgkill
    long syscall(long number, ...)

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)
    int PR_SET_NO_NEW_PRIVS

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <linux/capability.h>
    static void fc_drop_own(int number) {
        struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0, 0, 0}, {0, 0, 0}};
        int before = errno;
        (void)number;
        syscall(SYS_capset, &header, none);
        errno = before;
    }
    """
    void fc_drop_own(int number)

PATIENCE_S = 5.0


def _holding():
    """Return the numbers of the threads of this process that hold a capability."""
    threads = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/status") as file:
                sets = [int(line.split()[1], 16) for line in file if line.startswith(("CapPrm", "CapEff", "CapInh"))]
        except FileNotFoundError:
            continue  # it has ended
        if any(sets):
            threads.append(int(task))
    return threads


def drop():
    """drop(): give up all capabilities of all threads, for good; FlowCheckError if a thread keeps one."""
    cdef sigaction_type action, before
    cdef int number = SIGRTMAX
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    fc_drop_own(0)
    memset(&action, 0, sizeof(action))
    action.sa_handler = fc_drop_own
    action.sa_flags = SA_RESTART
    sigfillset(&action.sa_mask)
    if sigaction(number, &action, &before) < 0:
        raise FlowCheckError(f"cannot set a signal handler: {os.strerror(errno)}")
    try:
        end = time.monotonic() + PATIENCE_S
        while threads := _holding():
            if time.monotonic() > end:
                raise FlowCheckError(f"threads {threads} keep their capabilities after {PATIENCE_S:g} seconds")
            for thread in threads:
                syscall(SYS_tgkill, <long> getpid(), <long> thread, <long> number)
            time.sleep(0.001)
    finally:
        sigaction(number, &before, NULL)
