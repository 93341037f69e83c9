# SPDX-License-Identifier: MIT
"""The hook in real DDP scripts: what it writes and sends is enough to rebuild every state, bit for bit."""

import torch

from tests.workload_gen import hooked


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 33), torch.nn.GELU(), torch.nn.Linear(33, 5), torch.nn.Linear(5, 1))


def batches(rank, count):
    generator = torch.Generator().manual_seed(rank)
    for _ in range(count):
        inputs = torch.randn(16, 8, generator=generator)
        yield inputs, inputs.sum(1, keepdim=True)


def plain(here):
    ddp = here.ddp(model(), bucket_cap_mb=0.0005)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    hook = here.attach(ddp, optimizer)
    for inputs, wanted in batches(here.rank, 12):
        optimizer.zero_grad()
        (ddp(inputs) - wanted).square().mean().backward()
        optimizer.step()
        here.note(ddp, optimizer)
    hook.detach()


def check(folder, truth, count=None):
    report = hooked.replayed(folder)
    listed = [(row["iteration"], row["state"], row["reason"]) for row in report["iterations"]]
    assert listed == [(i, "committed", None) for i in range(1, len(truth) + 1)], report
    found = hooked.shadowed(folder)
    assert {i: d for i, (d, _) in found.items()} == {i: d for i, (d, _) in enumerate(truth, 1)}
    assert report["bit_exact"]
    return report, found


def test_a_plain_script(tmp_path):
    results = hooked.run(plain, tmp_path)
    report, _ = check(tmp_path, results[0][0])
    assert len(hooked.plan_of(tmp_path)["shards"][0]["revisions"]) == 2
    assert report["audited_to"] == 2 and report["alarms"] == []
    assert report["packets"]["step_record"] > 12
    assert report["packets"]["unsynchronised"] == report["packets"]["conflict"] == 0
