# SPDX-License-Identifier: MIT
"""A recorded job of eight ranks, mirrored at any of its edges, each capture cut at both ends anywhere."""

import random

import pytest
import torch

from flowcheck import plan as plans
from tests.commands import flowcheck
from tests.flowcheck.test_sizing import frames_of, restricted
from tests.pipeline.recordings import recorded, same, shadowed
from tests.rings import settled
from updater.listing import listing
from updater.restore import restore
from workload_gen.pcapng import PcapngWriter

RANKS, ITERATIONS = 8, 10

pytestmark = [pytest.mark.dpdk, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", params=["ll", "simple"])
def job(request, tmp_path_factory):
    """A job that begins from a file: its captures need not show how it started."""
    options = {"links": tuple(range(RANKS)), "startup": False, "protocol": request.param}
    return recorded(
        tmp_path_factory.mktemp("job") / "job", ranks=RANKS, iterations=ITERATIONS, parameters=6000, **options
    )


def cut(folder, frames, rng):
    """Write captures anew, each without some frames at both ends; return what is left."""
    left = {}
    for name, every in frames.items():
        first, last = rng.randrange(len(every) // 3), len(every) - rng.randrange(len(every) // 3)
        left[name] = every[first:last]
        (folder / f"{name}.pcapng").unlink()
        writer = PcapngWriter(folder / f"{name}.pcapng")
        for number, frame in enumerate(left[name]):
            writer.write(frame, 10**18 + 1000 * (first + number))
        writer.close()
    return left


@pytest.mark.parametrize("count", range(2, RANKS + 1))
def test_what_is_covered_is_the_trainers(tmp_path, job, count):
    rng = random.Random(count)
    links = sorted(rng.sample(range(RANKS), count))
    folder = restricted(job, links, tmp_path)
    left = cut(folder, frames_of(folder), rng)
    (folder / "initial.pt").write_bytes((job / "initial.pt").read_bytes())
    report, out = shadowed(folder, tmp_path / "out"), tmp_path / "out"

    size = plans.load(folder / "plan.json").shard.revisions[0].gradient_bytes
    alone = {}
    for link in links:
        name = f"link-{link}"
        plan = plans.load(restricted(job, [link], tmp_path) / "plan.json")
        alone[name] = settled(tmp_path / f"alone-{link}", plan, {name: left[name]})
    for row in report["iterations"]:
        covers = [found[row["iteration"]][2].astype(int) for found in alone.values() if row["iteration"] in found]
        counts = sum(covers) if covers else [0] * size
        missing = [byte for begin, end in row["missing"] for byte in range(begin, end)]
        assert missing == [byte for byte, count in enumerate(counts) if not count]
        assert (row["state"] == "incomplete") == bool(missing)
        assert row["sources"] == [sum(min(c, 3) == k for c in counts) for k in range(4)]

    # What waits behind a loss is brought back by the trainer's state there.
    while waiting := [row["iteration"] for row in listing(out)["iterations"] if row["state"] == "waiting"]:
        flowcheck("rebase", out, job / "truth" / f"iteration-{waiting[0] - 1:06}.pt")
    rows = listing(out)["iterations"]
    committed = [row["iteration"] for row in rows if row["state"] == "committed"]
    assert all(row["state"] in ("committed", "incomplete") for row in rows)
    for number in committed:
        truth = torch.load(job / "truth" / f"iteration-{number:06}.pt", weights_only=True)
        assert same(restore(out, number), truth) == [], number
