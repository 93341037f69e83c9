# SPDX-License-Identifier: MIT
"""The audit: silent over every combination that is called exact, and never late where a bit has changed that no step changed."""

import random
import tempfile
from pathlib import Path

import pytest
import torch

from flowcheck.errors import CheckpointError, RestoreError
from tests.pipeline.recordings import same
from tests.updater.audited import FORMS, OPTIONS, Run, any_bit, give, is_audited, make_plan, notes, states
from updater import arithmetic
from updater.listing import listing
from updater.model_state import ModelState
from updater.restore import restore
from updater.verify import verify

DTYPES = ("float32", "float64", "bfloat16", "float16")


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of a few elements: what threads wait for each other is most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shm():
    """A folder in memory: many directories are laid there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def audited(plan, iterations):
    return [iteration for iteration in range(1, iterations + 1) if is_audited(plan, iteration)]


# -- no false alarm -----------------------------------------------------------------------------------------------------


def exact_plans(ranks):
    """Yield a plan of every class, form, dtype and set of options that is called bit exact; the ranks take turns."""
    number = 0
    for kind, sets in OPTIONS.items():
        for form in FORMS[kind]:
            for options in sets:
                for dtype in DTYPES:
                    plan = make_plan(kind, form, options, dtype, ranks[number % len(ranks)], every=3 + number % 4)
                    if arithmetic.bit_exact(plan):
                        number += 1
                        yield plan


def audit_without_alarm(plan, iterations, folder, at_once):
    """Shadow a job to its end; return the audits that its log has."""
    run = Run(plan, iterations)
    assert not any(run.off.values()), "the ranks themselves differ"
    shadow = run.shadow(folder, settled=iterations if at_once else None)
    shadow.bring(iterations)
    shadow.end()
    expected = audited(plan, iterations)
    assert notes(shadow.out) == [(iteration, "right", []) for iteration in expected]
    report = listing(shadow.out)
    assert report["alarms"] == [] and report["audited_to"] == expected[-1] - 1 and report["bit_exact"]
    assert set(states(shadow.out).values()) == {"committed"}
    assert same(restore(shadow.out, iterations), run.truth[iterations]) == []
    return len(expected)


def test_some_exact_combinations_are_audited_without_alarm(shm):
    plans = list(exact_plans(ranks=(2, 3)))
    chosen = {plan.optimizer.class_name: plan for plan in random.Random(5).sample(plans, len(plans))}
    assert set(chosen) == set(OPTIONS)
    for number, plan in enumerate(chosen.values()):
        assert audit_without_alarm(plan, 14, shm / str(number), at_once=number % 2) >= 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_false_alarm_in_five_thousand_steps(shm):
    iterations, steps, audits, seen = 36, 0, 0, set()
    for number, plan in enumerate(exact_plans(ranks=(2, 3))):
        audits += audit_without_alarm(plan, iterations, shm / str(number), at_once=number % 2)
        steps += iterations
        seen.add((plan.optimizer.class_name, plan.optimizer.form, plan.state[0].dtype))
    print(f"{steps} steps of {number + 1} jobs, {audits} audits, {len(seen)} combinations of class, form and dtype")
    assert steps >= 5000 and audits >= 1500
    assert {kind for kind, _, _ in seen} == set(OPTIONS) and {dtype for _, _, dtype in seen} == set(DTYPES)


# -- one bit on one rank, or on all -------------------------------------------------------------------------------------


def drawn(number, **fixed):
    """Return (plan, iterations, iteration after which a bit flips, rng), by lot."""
    rng = random.Random(number)
    while True:
        kind = rng.choice(sorted(OPTIONS))
        form, options, dtype = rng.choice(FORMS[kind]), rng.choice(OPTIONS[kind]), rng.choice(DTYPES)
        choice = {"ranks": rng.choice([2, 3, 4]), "every": rng.randrange(3, 9), "groups": rng.randrange(1, 6)}
        plan = make_plan(kind, form, options, dtype, **choice | fixed)
        if arithmetic.bit_exact(plan):
            every = plan.shard.step_record.audit.every
            return plan, 3 * every + 2, rng.randrange(1, 2 * every), rng


def flipped(run_of, after, rng, everywhere):
    """Return a run in which a bit flips after an iteration, and (rank, name, ..) of it; rank None: on every rank."""
    plan, iterations = run_of
    where = []

    def meddle(iteration, trainers):
        if iteration == after:
            place, at, bit = any_bit(trainers[0], rng)
            rank = None if everywhere else rng.randrange(len(trainers))
            for trainer in trainers if everywhere else [trainers[rank]]:
                trainer.flip(place, at, bit)
            where.append((rank, *place, at, bit))

    return Run(plan, iterations, meddle, seed=after), where[0]


def next_audit(plan, after):
    """Return the first audited iteration behind a flip, and up to which state the audit before it vouches."""
    first = next(i for i in range(after + 1, 1000) if is_audited(plan, i))
    before = [i for i in audited(plan, first - 1)]
    return first, before[-1] - 1 if before else None


def check_one_rank(number, folder):
    """Flip one bit on one rank; True if the audit had to find it: the steps after it may round it away."""
    plan, iterations, after, rng = drawn(number)
    run, (rank, name, *rest) = flipped((plan, iterations), after, rng, everywhere=False)
    shadow = run.shadow(folder, settled=iterations if number % 2 else None)
    shadow.bring(iterations)
    shadow.end()
    what = (number, plan.optimizer, plan.state[0].dtype, rank, name, rest, after)
    alarms, at = listing(shadow.out)["alarms"], audited(plan, iterations)
    for previous, iteration in zip([None, *at], at, strict=False):
        off = run.off[iteration]
        assert set(off) <= {rank}
        found = [alarm for alarm in alarms if alarm["iteration"] == iteration]
        differing = off.get(rank, set())
        assert {name for name in differing if sum(name in alarm["tensors"] for alarm in found) == 1} == differing, what
        for alarm in found:
            assert alarm["rank"] == rank and not alarm["shadow"] and differing & set(alarm["tensors"]), what
            assert alarm["audited_to"] == (previous and previous - 1), what
    assert len(alarms) == sum(len(ranks) for _, _, ranks in notes(shadow.out))
    first, audited_to = next_audit(plan, after)
    if run.off[first]:
        early = [alarm for alarm in alarms if alarm["iteration"] <= first]
        assert all(alarm["iteration"] == first and alarm["audited_to"] == audited_to for alarm in early), what
        assert any(name in alarm["tensors"] for alarm in early), what
    assert states(shadow.out) == dict.fromkeys(range(1, iterations + 1), "committed"), what
    assert listing(shadow.out)["audited_to"] == at[-1] - 1
    assert same(restore(shadow.out), run.truth[iterations]) == [], what
    return bool(run.off[first])


def check_every_rank(number, folder):
    """Flip one bit on every rank alike, then give a base; True if the audit had to find it."""
    plan, iterations, after, rng = drawn(number)
    run, (_, name, *rest) = flipped((plan, iterations), after, rng, everywhere=True)
    first, audited_to = next_audit(plan, after)
    what = (number, plan.optimizer, plan.state[0].dtype, name, rest, after)
    if not run.off[first]:
        return False
    bases = folder / "states"
    shadow = run.shadow(folder, settled=iterations - 1 if number % 2 else None, bases=[bases])
    shadow.bring(iterations - 1)
    report = listing(shadow.out)
    assert {(a["iteration"], a["audited_to"], a["rank"], a["shadow"]) for a in report["alarms"]} == {
        (first, audited_to, None, True)
    }, what
    assert any(name in alarm["tensors"] for alarm in report["alarms"]), what
    assert report["audited_to"] == audited_to
    expected = {i: "committed" if i < first else "waiting" for i in range(1, iterations)}
    assert states(shadow.out) == expected, what
    if first > 1:
        assert same(restore(shadow.out, first - 1), run.truth[first - 1]) == []
    for refused in (first, iterations - 1):
        with pytest.raises(RestoreError, match=rf"iteration {refused} .*waiting"):
            restore(shadow.out, refused)
    assert restore(shadow.out)["iteration"] == first - 1

    base = rng.randrange(first, iterations)
    give(run.ranks[base], base, bases)
    shadow.until(lambda: shadow.updater.counters()["bases"])
    shadow.bring(iterations)
    shadow.end()
    expected = {i: "committed" for i in range(1, iterations + 1)} | dict.fromkeys(range(first, base + 1), "superseded")
    assert states(shadow.out) == expected, what
    assert same(restore(shadow.out, base), run.ranks[base]) == [], what
    assert same(restore(shadow.out), run.ranks[iterations]) == [], what
    later = [i for i in audited(plan, iterations) if i > base]
    assert [row for row in notes(shadow.out) if row[0] > first] == [(i, "right", []) for i in later], what
    return True


@pytest.mark.parametrize("number", range(12))
def test_a_bit_that_flips_on_one_rank_is_found_at_the_next_audit(shm, number):
    check_one_rank(number, shm)


@pytest.mark.parametrize("number", range(4))
def test_a_bit_that_flips_on_every_rank_ends_what_is_committed(shm, number):
    check_every_rank(number, shm)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("check", [check_one_rank, check_every_rank])
def test_bits_that_flip_by_lot_are_found_at_the_next_audit(shm, check):
    found = sum(check(number, shm / str(number)) for number in range(100, 300))
    print(f"{check.__name__}: 200 flips, {found} there at the next audit and found, the others rounded away by then")
    assert found > 150


def test_what_audits_found_stays_when_their_notes_are_removed(shm):
    plan = make_plan(checkpoints={"snapshot_iterations": 4, "retention": {"last_iterations": 3}})
    run, (rank, *_) = flipped((plan, 30), 5, random.Random(1), everywhere=False)
    shadow = run.shadow(shm)
    for iteration in range(1, 31):
        shadow.bring(iteration)
        shadow.until(lambda: not shadow.updater._snapshots.busy)
    shadow.end()
    report = listing(shadow.out)
    assert report["iterations"][0]["iteration"] > 12 and report["audited_to"] > 20
    assert {alarm["rank"] for alarm in report["alarms"]} == {rank}
    assert [alarm["iteration"] for alarm in report["alarms"]] == sorted({a["iteration"] for a in report["alarms"]})


# -- states that are stepped again --------------------------------------------------------------------------------------


def test_a_restored_state_is_held_against_the_digests_that_it_passes(shm, monkeypatch):
    """What steps a log again may compute otherwise than what stepped it first: here it loses one bit, in iteration 5."""
    run = Run(make_plan(every=4), 14)
    shadow = run.shadow(shm)
    shadow.bring(14)
    shadow.end()
    right, stepped = ModelState.step, []

    def step(model, *of):
        right(model, *of)
        stepped.append(of)
        if len(stepped) == 5:
            model.model["c"].detach().view(torch.int32)[3, 4] ^= 1

    monkeypatch.setattr(ModelState, "step", step)
    for iteration, refused in ((4, False), (8, True), (13, True)):
        stepped.clear()
        if refused:
            with pytest.raises(CheckpointError, match="stepped to iteration 7"):
                restore(shadow.out, iteration)
        else:
            assert same(restore(shadow.out, iteration), run.truth[iteration]) == []
    stepped.clear()
    assert "iteration 7" in verify(shadow.out)["problems"][0]["what"]
    monkeypatch.undo()
    assert same(restore(shadow.out, 13), run.truth[13]) == [] and verify(shadow.out)["problems"] == []
