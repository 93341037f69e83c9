# SPDX-License-Identifier: MIT
"""Runs a function on every rank of a fabric, a process each, and a cable that a test may spoil."""

import contextlib
import multiprocessing
import select
import socket
import subprocess
import tempfile
import threading
import traceback

import torch
import torch.distributed as dist

from workload_gen.fabric import Fabric, adapter_socket


def _rank(function, rank, fabric_host, rendezvous, size, queue, arguments):
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(rendezvous, size)
        queue.put((rank, None, function(rank, fabric_host, store, *arguments)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))


def together(store, rank, size):
    """Wait until every rank is here: an adapter that is gone can repeat nothing."""
    store.set(f"here-{rank}", "1")
    store.wait([f"here-{other}" for other in range(size)])


@contextlib.contextmanager
def running(function, fabric, *arguments):
    """Start `function(rank, host, store, *arguments)` on every rank; yield a call that returns what each returned."""
    size = len(fabric.hosts)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_rank, args=(function, r, host, f"{folder}/store", size, queue, arguments), daemon=True
            )
            for r, host in enumerate(fabric.hosts)
        ]
        for process in processes:
            process.start()

        def results(timeout=120):
            out = {}
            while len(out) < size:
                rank, error, value = queue.get(timeout=timeout)
                assert error is None, error
                out[rank] = value
            return [out[rank] for rank in range(size)]

        try:
            yield results
        finally:
            for process in processes:
                process.kill()
                process.join()


@contextlib.contextmanager
def spoiled_cable(fabric: Fabric, rank: int, spoil):
    """Cut a rank's cable and go between: `spoil(frame)` returns the frames that go on, for each that comes.

    Called with (frame, True) for what the host sends and (frame, False) for what it is sent.
    """

    def switch(*words):
        subprocess.run(["ip", "netns", "exec", fabric.switch, "ip", "link", *words], check=True)

    switch("set", f"port{rank}", "nomaster")
    switch("add", f"far{rank}", "type", "veth", "peer", "name", f"near{rank}")
    for end in (f"far{rank}", f"near{rank}"):
        switch("set", end, "addrgenmode", "none", "mtu", "9000", "up")
    switch("set", f"far{rank}", "master", "bridge")
    ends = [adapter_socket(fabric.switch, f"port{rank}"), adapter_socket(fabric.switch, f"near{rank}")]
    stopped = threading.Event()

    def forward():
        while not stopped.is_set():
            for source in select.select(ends, [], [], 0.05)[0]:
                target = ends[1 - ends.index(source)]
                with contextlib.suppress(BlockingIOError):
                    while True:
                        frame = source.recv(65536, socket.MSG_DONTWAIT)
                        for out in spoil(frame, source is ends[0]):
                            target.send(out)

    thread = threading.Thread(target=forward)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        for end in ends:
            end.close()
