# SPDX-License-Identifier: MIT
"""The protocols between stages hold in every interleaving, and each rule that makes them so is needed (docs/concurrency.md)."""

import itertools

import pytest

from tests.concurrency import ring_model, slots_model
from tests.concurrency.explorer import Model, Violation, explore, load, read, store, write

#: Goes round, and the dump can fill one half while the other is being emptied.
RING = {"records": 5, "room": 4}
#: Goes round; small enough for kills at every step.
SMALL = {"records": 3, "room": 2}


# -- the explorer itself ----------------------------------------------------------------------------------------------


def flag(release=True, acquire=True):
    """One process writes, then raises a flag; another reads once it sees the flag."""

    def writer(private):
        if private is None:
            yield write("data", 1)
            yield store("flag", 1, release=release)
        return "over"

    def reader(private):
        if private is None and (yield load("flag", acquire=acquire)):
            return (yield read("data"))
        return private

    def finished(kept):
        return kept["writer"] == "over" and kept["reader"] is not None

    return Model({"data": 0, "flag": 0}, {"writer": writer, "reader": reader}, frozenset({"flag"}), finished)


def test_a_flag_with_release_and_acquire_orders_what_is_written_before_it():
    assert explore(flag()).ends == 1


@pytest.mark.parametrize("order", ["release", "acquire"])
def test_a_flag_without_release_or_acquire_is_a_data_race(order):
    with pytest.raises(Violation, match="data race: reader reads data"):
        explore(flag(**{order: False}))


def test_two_that_wait_for_each_other_make_no_progress():
    def waiting(mine, other):
        def process(private):
            if private is None and (yield load(other)):
                yield store(mine, 1)
                return "over"
            return private

        return process

    def finished(kept):
        return set(kept.values()) == {"over"}

    both = Model({"a": 0, "b": 0}, {"a": waiting("a", "b"), "b": waiting("b", "a")}, frozenset("ab"), finished)
    with pytest.raises(Violation, match="no progress"):
        explore(both)


# -- the packet ring --------------------------------------------------------------------------------------------------


def test_the_ring_holds_in_every_interleaving():
    assert explore(ring_model.model(**RING)).states > 1000


def test_the_ring_holds_through_one_kill_of_any_stage_at_any_step():
    assert explore(ring_model.model(**SMALL, kills=1)).states > 5000


@pytest.mark.parametrize("stage", [pytest.param("dump", marks=pytest.mark.slow), "parser", "extractor"])
def test_the_ring_holds_through_two_kills_of_one_stage(stage):
    """The second may come while it recovers from the first."""
    assert explore(ring_model.model(**SMALL, kills=2, mortal=(stage,))).states > 5000


def test_a_held_record_is_proved_by_what_the_dump_brings_last():
    assert explore(ring_model.model(records=3, room=4, held=(0, 1))).ends > 0


CURSORS = ("written", "parsed", "extracted")


@pytest.mark.parametrize("broken", [
    *({"releases": frozenset(CURSORS) - {cursor}} for cursor in CURSORS),
    *({"acquires": frozenset(CURSORS) - {cursor}} for cursor in CURSORS),
    {"room_checked": False},
], ids=str)  # fmt: skip
def test_a_ring_without_an_order_or_room_is_a_data_race(broken):
    with pytest.raises(Violation, match="data race"):
        explore(ring_model.model(ring_model.Rules(**broken), **RING))


#: What a stage that starts from a state of the past does, or finds that others did.
FROM_THE_PAST = "went back|torn|takes record|annotates record|no progress|at the end"


@pytest.mark.parametrize("broken", ["state_before_cursor", "into_older_copy", "number_last", "cursor_from_state"])
def test_a_state_published_or_taken_up_in_another_way_does_not_survive_a_kill(broken):
    rules = ring_model.Rules(**{broken: False})
    explore(ring_model.model(rules, **SMALL))  # without a kill nothing shows
    with pytest.raises(Violation, match=FROM_THE_PAST):
        explore(ring_model.model(rules, **SMALL, kills=1))


@pytest.mark.parametrize("broken", ["end_read_first", "holds"])
def test_a_parser_that_does_not_wait_as_it_must_loses_a_proof(broken):
    """`end_read_first`: it reads the end behind the cursor, before which the proof may have come."""
    with pytest.raises(Violation, match="unproved"):
        explore(ring_model.model(ring_model.Rules(**{broken: False}), records=3, room=4, held=(0, 1)))


def test_an_end_before_the_last_record_leaves_it_behind():
    with pytest.raises(Violation, match=r"no progress|at the end"):
        explore(ring_model.model(ring_model.Rules(end_is_last=False), records=3, room=4))


# -- the slots --------------------------------------------------------------------------------------------------------

#: Both connections show all; iteration 2 comes twice.
STREAM = {"stream": slots_model.in_order(3, 2, repeat=(2,)), "connections": 2}


def test_slots_hold_through_two_kills_of_extractor_or_updater_at_any_step():
    result = explore(slots_model.model(**STREAM, kills=2))
    assert result.states > 3000 and result.ends > 1


@pytest.mark.parametrize(
    "order",
    [
        "settled_release",
        "settled_acquire",
        "consumed_release",
        "consumed_acquire",
        "waits_for_consumed",
        "settled_last",
    ],
)
def test_slots_without_an_order_are_a_data_race(order):
    with pytest.raises(Violation, match="data race"):
        explore(slots_model.model(slots_model.Rules(**{order: False}), **STREAM))


@pytest.mark.parametrize(("broken", "what"), [
    ("done_last", r"whole, with .*None|finds a conflict"),
    ("decision_before_done", "verdicts are"),
    ("claims_fall_back", "incomplete, expected whole"),
    ("recounts", "incomplete, expected whole"),
    ("iteration_last", "finds a conflict|whole, with"),
    ("log_before_consumed", "lost, expected whole"),
    ("log_compared", "logs iteration 3 twice"),
], ids=str)  # fmt: skip
def test_a_slot_filled_in_another_order_does_not_survive_a_kill(broken, what):
    rules = slots_model.Rules(**{broken: False})
    explore(slots_model.model(rules, **STREAM))  # without a kill nothing shows
    with pytest.raises(Violation, match=what):
        explore(slots_model.model(rules, **STREAM, kills=1))


def silent(slots, iterations=7):
    """A second connection shows nothing from iteration 2 on, so all of those lack their step record, which lies there."""
    stream = [record for record in slots_model.in_order(iterations, 2) if record[1] == 0 or record[0] < 2]
    lost = range(2, iterations + 1)
    return {"stream": stream, "connections": 2, "slots": slots, "lacking": lost, "incomplete": lost}


@pytest.mark.parametrize("slots", [3, 4, 5])
def test_an_updater_that_awaits_the_next_iteration_and_a_full_slot_file_do_not_wait_for_each_other(slots):
    assert explore(slots_model.model(**silent(slots), kills=slots == 3)).ends > 0


def test_two_slots_are_too_few_for_that():
    """The plan asks for three."""
    with pytest.raises(Violation, match="no progress"):
        explore(slots_model.model(**silent(2)))


def test_nor_may_a_stalled_stream_be_waited_for_until_every_slot_is_full():
    with pytest.raises(Violation, match="no progress"):
        explore(slots_model.model(slots_model.Rules(stalled_ahead="slots"), **silent(4)))


def orders(iterations):
    """Return every order in which two connections can show their iterations: none is ahead of another by two.

    Of a ring's edges none begins an iteration before all have ended the last but one.
    """
    for choice in itertools.combinations(range(2 * iterations), iterations):
        at, out = [0, 0], []
        for step in range(2 * iterations):
            connection = 0 if step in choice else 1
            at[connection] += 1
            out.append((at[connection], connection, (connection,)))
            if at[connection] - at[1 - connection] > 2:
                break
        else:
            yield out


def test_a_stalled_stream_is_never_declared_past_what_it_still_brings():
    assert sum(explore(slots_model.model(stream=order, connections=2, slots=3)).ends for order in orders(4)) > 50


def test_one_iteration_ahead_would_be_too_few():
    def every():
        for order in orders(4):
            explore(slots_model.model(slots_model.Rules(stalled_ahead=1), stream=order, connections=2, slots=3))

    with pytest.raises(Violation, match="incomplete, expected whole"):
        every()


def test_two_threads_cannot_fill_one_slot_as_the_extractor_does_today():
    """It opens slots, compares copies and settles as who is alone: one thread takes all rings."""
    with pytest.raises(Violation, match=r"data race|conflict"):
        explore(slots_model.model(stream=slots_model.in_order(2), extractors=2))
