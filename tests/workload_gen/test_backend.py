# SPDX-License-Identifier: MIT
"""The ring as a torch.distributed backend: collectives as torch defines them, and a DDP script that knows nothing of us."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from flowcheck.plan import Layout
from workload_gen import backend

LAYOUT = {
    "source": "modelled",
    "library": "nccl",
    "version": "2.19",
    "protocol": "ll",
    "ring": (0, 1),
    "mtu": 1024,
}


def on_ranks(tmp_path, work, ranks, *arguments, world=backend.NAME, **layout):
    """Run `work(rank, *arguments)` on so many processes, `world` the backend of all; return what each returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workload_gen.record"])
    store = tmp_path / f"store{time.monotonic_ns()}"
    with context.Pool(ranks) as pool:
        tasks = [(work, arguments, str(store), rank, ranks, world, layout) for rank in range(ranks)]
        return pool.starmap(one, tasks, chunksize=1)


def one(work, arguments, store, rank, ranks, world, layout):
    torch.set_num_threads(1)
    backend.register(Layout(**LAYOUT | layout))
    dist.init_process_group(world, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    try:
        return work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def collectives(rank):
    summed = torch.arange(10.0).view(2, 5).t() * (rank + 1)  # not contiguous
    dist.all_reduce(summed)
    sent = torch.full((3,), rank, dtype=torch.int64)
    dist.broadcast(sent, src=1)
    parts = [torch.empty(2) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.tensor([rank, 10.0 * rank]))
    whole = torch.empty(dist.get_world_size())
    dist.all_gather_into_tensor(whole, torch.tensor([float(rank)]))
    dist.barrier()
    try:
        dist.all_reduce(torch.zeros(1), op=dist.ReduceOp.MAX)
    except ValueError as error:
        refused = str(error)
    return summed.tolist(), sent.tolist(), torch.stack(parts).tolist(), whole.tolist(), refused


@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_are_torchs(tmp_path, ranks):
    total = sum(range(1, ranks + 1))
    for summed, sent, parts, whole, refused in on_ranks(tmp_path, collectives, ranks):
        assert summed == (torch.arange(10.0).view(2, 5).t() * total).tolist()
        assert sent == [1, 1, 1]
        assert parts == [[rank, 10.0 * rank] for rank in range(ranks)]
        assert whole == [float(rank) for rank in range(ranks)]
        assert "SUM only" in refused


def out_of_step(rank, folder):
    """Issue while the other rank waits for a sign that this one has."""
    sign, data = Path(folder, "issued"), torch.full((700,), rank + 1.0)
    if rank == 1:
        while not sign.exists():
            time.sleep(0.01)
    first = dist.all_reduce(data, async_op=True)
    second = dist.all_reduce(data, async_op=True)
    future = second.get_future().then(lambda done: done.value()[0].sum().item())
    early = first.is_completed() or second.is_completed()
    sign.touch()
    second.wait()
    return (
        early if rank == 0 else False,
        first.is_completed(),
        first.is_success(),
        future.wait(),
        data.unique().tolist(),
    )


def test_a_collective_is_issued_at_once_and_done_in_order(tmp_path):
    for answer in on_ranks(tmp_path, out_of_step, 2, str(tmp_path)):
        assert answer == (False, True, True, 700 * 6.0, [6.0])


def hooked(ddp, hook):
    """Give a model one of the library's hooks, or one that waits for each bucket's sum within the call."""

    def wait_at_once(group, bucket):
        tensor = bucket.buffer().mul_(1 / group.size())  # as the reducer does it without a hook
        group.allreduce([tensor]).wait()
        future = torch.futures.Future()
        future.set_result(tensor)
        return future

    def compress(group, bucket):  # under its own name torch wants CUDA for bfloat16
        return getattr(default_hooks, hook)(group, bucket)

    if hook is not None:
        ddp.register_comm_hook(ddp.process_group, wait_at_once if hook == "wait" else compress)


def train_in_a_group(rank, hook):
    """Train in a group of the backend beside a world of gloo's; return all gradients and the number of sums."""
    groups = backend.register(Layout(**LAYOUT))
    group = dist.new_group(backend=backend.NAME)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(40, 40) for _ in range(6)])
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01, process_group=group)
    hooked(ddp, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(rank)
    gradients = []
    for _ in range(5):
        optimizer.zero_grad()
        ddp(torch.randn(8, 40, generator=generator)).square().mean().backward()
        record = torch.full((32,), float(rank))
        handle = dist.all_reduce(record, group=group, async_op=True)
        gradients.append([parameter.grad.view(torch.int32).tolist() for parameter in model.parameters()])
        optimizer.step()
        handle.wait()
        assert record.tolist() == [sum(range(group.size()))] * 32
    agreed = torch.tensor([1.0])
    dist.all_reduce(agreed)  # the world's: gloo
    return gradients, [operation.op for operation in groups[0].operations].count("all_reduce"), agreed.item()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_beside_a_world_of_another_backend_overlapped_sums_have_the_bits_of_waited_ones(tmp_path, ranks):
    overlapped, waited = (on_ranks(tmp_path, train_in_a_group, ranks, hook, world="gloo") for hook in (None, "wait"))
    gradients, sums, agreed = overlapped[0]
    assert all(other == overlapped[0] for other in overlapped + waited)
    assert sums > 5 + 5 and agreed == ranks and len({str(step) for step in gradients}) == 5


@pytest.mark.parametrize("hook", ["fp16_compress_hook", "bf16_compress_hook"])
def test_compression_hooks_ride_it(tmp_path, hook):
    results = on_ranks(tmp_path, train_in_a_group, 2, hook, world="gloo")
    plain = on_ranks(tmp_path, train_in_a_group, 2, None, world="gloo")
    assert results[0] == results[1] != plain[0]


JOB = """
import sys, torch, torch.distributed as dist
from tests.workload_gen import test_backend as here
rank, store, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
here.one(getattr(here, what), (store,), store, rank, 3, here.backend.NAME, {})
"""


def processes(tmp_path, what):
    store = tmp_path / "store"
    words = [[sys.executable, "-c", JOB, str(rank), str(store), what] for rank in range(3)]
    started = [subprocess.Popen(w, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for w in words]
    try:
        return [(process.communicate(timeout=60), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


def one_dies(rank, _):
    model = DistributedDataParallel(torch.nn.Linear(300, 300))
    for step in range(10):
        if rank == 1 and step == 3:
            os._exit(9)
        try:
            model(torch.ones(2, 300)).sum().backward()
        except RuntimeError as error:
            print(step, error)
            break
    handle = dist.all_reduce(torch.zeros(3), async_op=True)
    try:
        handle.wait()
    except ConnectionError as error:
        print("then", error)
    print("success" if handle.is_success() else "failed")


def test_a_dead_neighbour_is_an_error_for_all_and_nobody_hangs(tmp_path):
    (zero, one_, two) = processes(tmp_path, "one_dies")
    assert one_[1] == 9
    for (said, errors), code in (zero, two):
        assert code == 0, errors
        assert "3 " in said and "ConnectionError: rank" in said and "has left the ring" in said
        assert "then an earlier collective failed: rank" in said and "failed" in said


def leaves_early(rank, folder):
    data = torch.full((100_000,), rank + 1.0)
    handles = [dist.all_reduce(data, async_op=True) for _ in range(3)]
    if rank == 0:
        return  # the process ends; the others still get its part
    handles[-1].wait()
    print(data.unique().tolist())


def test_what_was_issued_is_done_before_a_process_ends(tmp_path):
    answers = processes(tmp_path, "leaves_early")
    assert [code for _, code in answers] == [0, 0, 0], answers
    assert [said for (said, _), _ in answers] == ["", "[54.0]\n", "[54.0]\n"]


def script(rank):
    """Train with DDP, BatchNorm's statistics and all, as a user would."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 1)
    )
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.0005)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(20):
        inputs = torch.randn(16, 8, generator=generator)
        loss = (ddp(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.tolist() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "layout", [{}, {"protocol": "simple", "version": "2.27", "channels": 2, "pin_channels": True}], ids=str
)
def test_any_ddp_script_rides_it(tmp_path, layout):
    results = on_ranks(tmp_path, script, 4, **layout)
    losses, parameters = results[0]
    assert all(other == parameters for _, other in results)
    assert losses[-1] < losses[0]
