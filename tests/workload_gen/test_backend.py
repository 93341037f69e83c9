# SPDX-License-Identifier: MIT
"""The ring as a torch.distributed backend: collectives as torch defines them, and a DDP script that knows nothing of us."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from flowcheck.plan import Layout
from workload_gen import backend


def on_ranks(tmp_path, work, ranks, **layout):
    """Run `work(rank)` on so many processes of one group; return what each returned."""
    context = multiprocessing.get_context("forkserver")
    with context.Pool(ranks) as pool:
        tasks = [(work, str(tmp_path / "store"), rank, ranks, layout) for rank in range(ranks)]
        return pool.starmap(one, tasks, chunksize=1)


def one(work, store, rank, ranks, layout):
    torch.set_num_threads(1)
    defaults = {
        "source": "modelled",
        "library": "nccl",
        "version": "2.19",
        "protocol": "ll",
        "ring": (0, 1),
        "mtu": 1024,
    }
    backend.register(Layout(**defaults | layout))
    dist.init_process_group(backend.NAME, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    try:
        return work(rank)
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
