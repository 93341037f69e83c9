# SPDX-License-Identifier: MIT
"""`flowcheck run` on a job that trains live over a mirrored fabric, against the trainer's own digests."""

import json
import os
import random
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flowcheck.supervisor import scratch_folder
from tests import network
from tests.pipeline.live import LiveJob, digests, states, until
from tests.pipeline.test_live import capabilities
from tests.workload_gen.ranks import spoiled_cable
from updater.directory import Directory
from updater.restore import restore
from workload_gen.truth import digest

pytestmark = [pytest.mark.dpdk, network.needs_root]


def check(job, iterations):
    """Every iteration committed, with the trainer's bits."""
    listed, _ = states(job.out)
    assert listed == dict.fromkeys(range(1, iterations + 1), "committed")
    assert digests(job.out) == {i: row["digest"] for i, row in job.steps().items()}


LL = {"ranks": 2, "options": ("--protocol", "ll", "--ip", "6", "--optimizer", "sgd")}
LL128 = {
    "ranks": 3,
    "mirrored": (0, 1),
    "options": ("--protocol", "ll128", "--channels", "2", "--pin-channels", "--fused"),
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="simple"),
        pytest.param(LL, id="ll", marks=pytest.mark.slow),
        pytest.param(LL128, id="ll128", marks=pytest.mark.slow),
    ],
)
def test_every_iteration_of_a_live_job_has_the_trainers_bits(tmp_path, settings):
    with LiveJob(tmp_path, **settings) as job:
        trainer, shadow = job.train(), job.shadow()
        until(lambda: (job.job / "shadow.json").exists() or trainer.poll() is not None, "the shadow")
        for stage in job.status()["stages"] if (job.out / "manifest.json").exists() else []:
            assert not any(capabilities(stage["pid"])), stage
        assert trainer.wait(120) == 0, trainer.stderr.read()
        until(lambda: job.status()["last_committed"] == job.iterations, "the last iteration")
        report = job.status()
        scratch = scratch_folder(job.out)
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in scratch.rglob("*")}
        said = job.stop(shadow)
        check(job, job.iterations)
    assert f"committed to iteration {job.iterations}, 0 incomplete" in said
    assert set(modes.values()) == {0o600}, modes
    assert not scratch.exists() and not (job.job / "shadow.json").exists()
    assert {stat.S_IMODE(p.stat().st_mode) for p in job.out.rglob("*") if p.is_file()} == {0o600}
    packets = report["packets"]
    assert packets["missed_by_port"] == packets["dropped_ring_full"] == 0
    judged = sum(v for k, v in packets.items() if isinstance(v, int) and k not in ("received", "missed_by_port"))
    assert judged == packets["received"] > 100
    assert report["audited_to"] == 2 and report["alarms"] == []


#: Loaded by every process of a shadow: whoever asks the modelled schedules for anything fails.
NO_MODEL = """
from flowcheck import schedule
def refuse(*_, **__):
    raise AssertionError("the modelled schedule was asked")
for name in ("all_reduce", "broadcast", "all_gather", "last_partial_sums", "threads_and_channels"):
    setattr(schedule, name, refuse)
"""
CASES = [
    (ranks, protocol, more)
    for ranks, more in ((2, ("--qps", "2", "--nccl", "2.24")), (3, ()), (5, ("--channels", "2", "--pin-channels")))
    for protocol in ("ll", "ll128", "simple")
]
BY_DEFAULT = {(3, "simple")}


@pytest.mark.parametrize(
    ("ranks", "protocol", "more"),
    [pytest.param(*c, marks=() if c[:2] in BY_DEFAULT else pytest.mark.slow, id=f"{c[0]}-{c[1]}") for c in CASES],
)
def test_a_layout_that_no_library_has_is_learned_from_the_wire(tmp_path, ranks, protocol, more):
    (tmp_path / "sitecustomize.py").write_text(NO_MODEL)
    options = ("--learn", "--permute", str(ranks), "--protocol", protocol, *more)
    with LiveJob(tmp_path, ranks=ranks, iterations=8, params=30_000, options=options) as job:
        trainer, shadow = job.train(), job.shadow(PYTHONPATH=str(tmp_path))
        assert trainer.wait(150) == 0, trainer.stderr.read()
        until(lambda: job.status()["last_committed"] == job.iterations, "the last iteration")
        report = job.status()
        job.stop(shadow)
        check(job, job.iterations)
        layout = json.loads(job.plan.read_text())["shards"][0]["layout"]
    assert layout["source"] == "learned" and layout["protocol"] == protocol
    assert report["audited_to"] == 2 and report["packets"]["conflict"] == 0


def test_without_the_mirror_training_goes_on_and_nothing_is_committed(tmp_path):
    with LiveJob(tmp_path, iterations=30) as job:
        trainer, shadow = job.train(), job.shadow()
        until(lambda: len(job.steps()) >= 5, "five steps")
        job.fabric.mirror(0, on=False)
        seen = len(job.steps())
        assert trainer.wait(120) == 0, trainer.stderr.read()
        job.stop(shadow)
        assert len(job.steps()) == 30
        listed, _ = states(job.out)
        committed = [i for i, state in listed.items() if state == "committed"]
        assert committed == list(range(1, len(committed) + 1)) and 4 <= len(committed) <= seen + 2
        found, truth = digests(job.out), job.steps()
        assert all(found[i] == truth[i]["digest"] for i in committed)


def alive(pid):
    """Whether a process runs: one that was killed and not waited for yet takes another signal without a word."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_stages(tmp_path, kills, iterations, seed):
    """Kill a random stage at random moments; the job goes on, and what is committed is the trainer's."""
    chance = random.Random(seed)
    killed = []
    with LiveJob(tmp_path, iterations=iterations, params=100_000) as job:
        trainer, shadow = job.train("--full-state-every", "20"), job.shadow()
        until(lambda: len(job.steps()) >= 3, "three steps")
        while len(killed) < kills and trainer.poll() is None:
            stages = [stage for stage in job.status()["stages"] if stage["pid"]]
            if not stages:
                continue  # all are being started again
            victim = chance.choice(stages)
            if not alive(victim["pid"]):
                continue  # what status says may be a second old
            os.kill(victim["pid"], signal.SIGKILL)
            killed.append(victim["name"])
            done = len(job.steps())
            wait = chance.randrange(1, 20)
            until(lambda: len(job.steps()) >= min(done + wait, iterations) or trainer.poll() is not None, "some steps")  # noqa: B023
        assert trainer.wait(200) == 0, trainer.stderr.read()
        until(lambda: all(stage["pid"] for stage in job.status()["stages"]), "all stages back")
        # The last full state is that of the last iteration: from there the shadow is exact again.
        until(lambda: iterations in Directory(job.out).restorable(), "the last iteration")
        said = job.stop(shadow)
        listed, _ = states(job.out)
        found, truth = digests(job.out), job.steps()
    assert len(killed) == kills and said.count("starting it again") >= kills - 1, said
    committed = [i for i, state in listed.items() if state == "committed"]
    assert len(truth) == iterations and found
    assert {i: found[i] for i in committed} == {i: truth[i]["digest"] for i in committed}
    for iteration, state in listed.items():
        assert state in ("committed", "incomplete", "waiting", "superseded"), (iteration, state)
    final = restore(job.out)
    assert final["iteration"] == iterations and digest(final) == truth[iterations]["digest"]
    return killed, committed


@pytest.mark.slow
def test_stages_killed_at_random_moments_never_make_a_wrong_iteration(tmp_path):
    _, committed = kill_stages(tmp_path, 6, 200, seed=1)
    assert committed


@pytest.mark.nightly
def test_fifty_kills_in_one_run(tmp_path):
    killed, _ = kill_stages(tmp_path, 50, 2500, seed=2)
    assert len(set(killed)) == 4


def flowcheck(*words):
    done = subprocess.run(
        [sys.executable, "-m", "flowcheck", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_shadow_that_comes_late_goes_on_from_the_trainers_next_full_state(tmp_path):
    last = 1500
    with LiveJob(tmp_path, iterations=last) as job:
        trainer = job.train("--shadow", "0", "--full-state-every", "100")
        until(lambda: len(job.steps()) >= 5, "five steps")
        shadow = job.shadow()
        assert trainer.wait(150) == 0, trainer.stderr.read()
        until(lambda: last in Directory(job.out).restorable(), "the last full state")
        job.stop(shadow)
        found, truth = digests(job.out), job.steps()
        listed, _ = states(job.out)
    assert listed[1] == "incomplete"
    assert all(found[i] == truth[i]["digest"] for i in found)
    final = restore(job.out, last)
    assert digest(final) == truth[last]["digest"]


def test_two_runs_on_one_directory_are_refused(tmp_path):
    with LiveJob(tmp_path) as job:
        job.train("--shadow", "100")
        shadow = job.shadow()
        until(lambda: (job.job / "shadow.json").exists(), "the shadow")
        code, error = flowcheck("run", job.plan, "--out", job.out)
        assert code == 3 and "another `flowcheck run`" in error
        job.stop(shadow)


def test_a_stream_without_a_source_or_with_a_missing_one_is_refused(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "captures" / "ll-1ch-5000f-20iter-bothways-mtu4096.json"
    code, error = flowcheck("run", example, "--out", tmp_path / "out")
    assert code == 3 and "names neither interface nor port" in error
    document = json.loads(example.read_text())
    document["shards"][0]["streams"][0]["interface"] = "fcnone"
    (tmp_path / "plan.json").write_text(json.dumps(document))
    code, error = flowcheck("run", tmp_path / "plan.json", "--out", tmp_path / "out")
    assert code == 4 and "no interface 'fcnone'" in error
    assert not (tmp_path / "shadow.json").exists()


def other_queue_pairs(shard):
    for connection in shard["connections"]:
        connection["proof"]["data"] = [number + 4096 for number in connection["proof"]["data"]]
        connection["proof"]["credit"] = [number + 4096 for number in connection["proof"]["credit"]]


def other_buckets(shard):
    for revision in shard["revisions"]:
        revision["buckets"] = [{"dtype": "float32", "elements": 1000}]
        revision["before"] = []
    shard["startup"] = []


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        pytest.param(other_queue_pairs, "foreign", "another job", id="another job", marks=pytest.mark.slow),
        pytest.param(other_buckets, "unsynchronised", "what contradicts it: ", id="another plan"),
    ],
)
def test_a_plan_that_is_not_the_wires_is_named_and_nothing_is_committed(tmp_path, change, state, words):
    with LiveJob(tmp_path, ranks=2, iterations=20) as job:
        other = tmp_path / "other"
        assert job.train("--iterations", "2", "--shadow", "0", out=other).wait(120) == 0
        document = json.loads((other / "plan.json").read_text())
        for key in ("state", "initial_state", "optimizer", "arithmetic"):
            del document[key]  # only what the wire shows is in question
        for revision in document["shards"][0]["revisions"]:
            for bucket in revision["buckets"]:
                del bucket["parameters"]
        change(document["shards"][0])
        job.plan = other / "plan.json"
        job.plan.write_text(json.dumps(document))
        shadow = job.shadow()
        until((other / "shadow.json").exists, "the shadow")
        trainer = job.train("--shadow", "0")
        assert trainer.wait(120) == 0, trainer.stderr.read()
        until(lambda: job.status()["streams"][0]["state"] == state, state)
        report = job.status()
        said = job.stop(shadow)
        assert words in said, said
        assert set(states(job.out)[0].values()) <= {"incomplete"}
    packets = report["packets"]
    assert packets["placed"] == 0 < packets[state]


@pytest.mark.slow
def test_loss_and_reordering_on_a_training_cable_change_nothing(tmp_path):
    """The mirror shows every repetition too; the trainers' states are those of a job without losses."""
    chance, held = random.Random(3), {}

    def cable(rank):
        def spoil(frame, outward):
            return spoilt(frame, held.setdefault((rank, outward), []))

        return spoiled_cable(job.fabric, rank, spoil)

    def spoilt(frame, waiting):
        throw = chance.random()
        if throw < 0.002:
            return []
        if throw < 0.004:
            waiting.append(frame)
            return []
        return [frame, *([waiting.pop()] if waiting else [])]

    clean = tmp_path / "clean"
    with LiveJob(tmp_path, iterations=15) as job:
        trainer = job.train("--shadow", "0", out=clean)
        assert trainer.wait(120) == 0, trainer.stderr.read()
        with cable(2), cable(0):
            trainer, shadow = job.train(), job.shadow()
            assert trainer.wait(200) == 0, trainer.stderr.read()
            job.stop(shadow)
        check(job, 15)
        rows = map(json.loads, (clean / "steps.jsonl").read_text().splitlines())
        assert {row["iteration"]: row["digest"] for row in rows} == digests(job.out)


@pytest.mark.nightly
def test_five_hundred_iterations_without_one_incomplete(tmp_path):
    """A million parameters; the state after every iteration compared. How fast and how far behind is printed, not asserted."""
    from flowcheck import interfaces

    iterations = 500
    with LiveJob(tmp_path, iterations=iterations, params=1_000_000, options=("--fused", "--bucket-mb", "1")) as job:
        trainer, shadow = job.train(), job.shadow()
        monitor = job.fabric.monitors[0]
        until((job.job / "shadow.json").exists, "the shadow")
        before = interfaces.received_bytes(monitor)
        assert trainer.wait(280) == 0, trainer.stderr.read()
        mirrored = interfaces.received_bytes(monitor) - before
        until(lambda: job.status()["last_committed"] == iterations, "the last iteration")
        report = job.status()
        job.stop(shadow)
        check(job, iterations)
        _, logged = states(job.out)
        steps = job.steps()
    assert report["audited_to"] == 499 and report["alarms"] == []
    assert report["packets"]["missed_by_port"] == report["packets"]["dropped_ring_full"] == 0
    ended = {i: row["ended_ns"] for i, row in steps.items()}
    lags = [sum(logged[j] > ended[i] for j in range(max(1, i - 10), i + 1)) for i in ended]
    seconds = (ended[iterations] - ended[1]) / 1e9
    print(
        f"\n{mirrored * 8 / seconds / 1e9:.2f} Gbit/s mirrored over {seconds:.1f} s, most behind {max(lags)}, "
        f"steps that ended more than one behind: {sum(lag > 1 for lag in lags)}"
    )
