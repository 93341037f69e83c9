# SPDX-License-Identifier: MIT
"""Gradient slots as a model: extractor and updater over one slot file (docs/slot-format.md).

A stream is a list of annotated records, each (iteration, connection, units). A slot has two units, each in a word of its
own of the bitmaps. The updater's log and the records' decisions outlive any process, as the files do that they are in.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.concurrency.explorer import Model, Violation, fetch_add, fetch_or, load, peek, read, store, write

__all__ = ["Rules", "in_order", "model"]

UNITS = 2
NOBODY, FILLING, WHOLE, INCOMPLETE = -1, "filling", "whole", "incomplete"
NO_COUNTS = (("placed", 0), ("duplicate", 0), ("late", 0))


@dataclass(frozen=True)
class Rules:
    """What keeps the slots right."""

    settled_release: bool = True
    settled_acquire: bool = True
    consumed_release: bool = True
    consumed_acquire: bool = True
    waits_for_consumed: bool = True  # a slot is opened again only then
    done_last: bool = True  # behind the bytes
    decision_before_done: bool = True
    claims_fall_back: bool = True  # to done, when an extractor starts
    recounts: bool = True  # done_units, then too
    iteration_last: bool = True  # when a slot is opened
    settled_last: bool = True  # behind a slot's state
    log_before_consumed: bool = True
    log_compared: bool = True  # what comes again is held against the log
    stalled_ahead: int | str = 2  # a stream that waits so far ahead is past an iteration; "slots": as many as there are


def in_order(iterations, connections=1, repeat=()):
    """Return a stream: each iteration's units, from each connection a share; those in `repeat` come a second time."""
    records = []
    for iteration in range(1, iterations + 1):
        shares = [(0, 1)] if connections == 1 else [(0,), (1,)]
        for connection, units in enumerate(shares):
            records.append((iteration, connection, units))
            if iteration in repeat:
                records.append((iteration, connection, units))
    return records


def model(rules=Rules(), *, stream, slots=2, connections=1, kills=0, mortal=("extractor", "updater"), lacking=(),
          incomplete=(), extractors=1):  # fmt: skip
    """Return the model of a slot file of `slots` slots that one stream fills.

    Args:
        rules: what the code does.
        stream: its records.
        slots: how many.
        connections: how many the plan has, whether the stream shows anything of them or not.
        kills: as many.
        mortal: who may be killed.
        lacking: iterations that the updater takes only when the next one is settled, as one whose step record is lost.
        incomplete: iterations that must end so; all others must be whole.
        extractors: 2: a second thread fills the same slots from the same records, as today's code would.
    """
    last = max(iteration for iteration, _, _ in stream)
    ahead = slots if rules.stalled_ahead == "slots" else rules.stalled_ahead

    def opened(iteration):
        """_slot: the number of the iteration's slot, opened; None if it may not be yet."""
        slot = (iteration - 1) % slots
        if (yield peek(("iteration", slot))) == iteration:
            return slot
        if rules.waits_for_consumed:
            consumed = yield load("consumed_next", acquire=rules.consumed_acquire)
            if iteration >= consumed + slots:
                return None
        if not rules.iteration_last:
            yield store(("iteration", slot), iteration)
        for unit in range(UNITS):
            yield write(("claim", slot, unit), 0)
            yield write(("done", slot, unit), 0)
        yield write(("done_units", slot), 0)
        yield write(("state", slot), FILLING)
        yield write(("conflicts", slot), 0)
        if rules.iteration_last:
            yield store(("iteration", slot), iteration)
        return slot

    def place(number, iteration, units):
        """_place: the verdict on a record; None if it must wait for its slot."""
        decision = yield read(("decision", number))
        if iteration < (yield peek("settled_next")):
            return decision or "late"
        slot = yield from opened(iteration)
        if slot is None:
            return None
        fresh = []
        for unit in units:
            if not (yield fetch_or(("claim", slot, unit), 1)):
                fresh.append(unit)
        if not rules.done_last:
            yield write(("decision", number), decision or ("placed" if fresh else "duplicate"))
            for unit in fresh:
                yield fetch_or(("done", slot, unit), 1)
        for unit in units:
            if unit in fresh:
                yield write(("data", slot, unit), (iteration, unit))
            elif (yield read(("data", slot, unit))) != (iteration, unit):
                yield write(("conflicts", slot), 1)
                return "conflict"
        verdict = decision or ("placed" if fresh else "duplicate")
        if rules.decision_before_done:
            yield write(("decision", number), verdict)
        if rules.done_last:
            for unit in fresh:
                yield fetch_or(("done", slot, unit), 1)
        if not rules.decision_before_done:
            yield write(("decision", number), verdict)
        if fresh:
            yield fetch_add(("done_units", slot), len(fresh))
        return verdict

    def settle(settled, highest, stalled_at, over):
        """_settle: decide iterations in order as far as possible."""
        settled = dict(settled)
        while (iteration := (yield peek("settled_next"))) <= highest:
            slot = yield from opened(iteration)
            if slot is None:
                return
            past = all(
                settled.get(connection, 0) > iteration or stalled_at >= iteration + ahead or over
                for connection in range(connections)
            )
            if not past:
                return
            whole = (yield peek(("done_units", slot))) == UNITS and not (yield read(("conflicts", slot)))
            if not rules.settled_last:
                yield store("settled_next", iteration + 1)
            yield write(("state", slot), WHOLE if whole else INCOMPLETE)
            if rules.settled_last:
                yield store("settled_next", iteration + 1, release=rules.settled_release)

    def extractor_of(name):
        def extractor(private):
            if private is None:
                for slot in range(slots):
                    total = 0
                    for unit in range(UNITS):
                        done = yield peek(("done", slot, unit))
                        if rules.claims_fall_back:
                            yield store(("claim", slot, unit), done)
                        total += done
                    if rules.recounts:
                        yield store(("done_units", slot), total)
                return (yield peek((name, "state")))
            position, counts, settled, highest, over = private
            if over:
                return private
            stalled_at = 0
            if position < len(stream):
                iteration, connection, units = stream[position]
                highest = max(highest, iteration)
                settled = tuple({**dict(settled), connection: max(dict(settled).get(connection, 0), iteration)}.items())
                verdict = yield from place(position, iteration, units)
                if verdict is None:
                    stalled_at = iteration
                elif verdict == "conflict":
                    raise Violation(f"{name} finds a conflict in iteration {iteration}, where there is none")
                else:
                    position += 1
                    counts = tuple((what, count + (what == verdict)) for what, count in counts)
                    yield store((name, "state"), (position, counts, settled, highest, False))
            at_end = position == len(stream)
            yield from settle(settled, highest, stalled_at, at_end)
            if at_end and (yield peek("settled_next")) > highest:
                yield store("ended", 1)
                return (position, counts, settled, highest, True)
            return (position, counts, settled, highest, False)

        return extractor

    def updater(private):
        if private is None:
            return ((yield peek("consumed_next")), False)
        number, over = private
        if over:
            return private
        ended = yield load("ended")
        settled = yield load("settled_next", acquire=rules.settled_acquire)
        if number == settled:
            return (number, bool(ended))
        if number in lacking and not ended and number + 1 >= settled:
            return private
        slot = (number - 1) % slots
        if (yield read(("iteration", slot))) != number:
            raise Violation(f"updater wants iteration {number}, its slot holds another's")
        state = yield read(("state", slot))
        data = []
        for unit in range(UNITS):
            data.append((yield read(("data", slot, unit))))
        if state == WHOLE and data != [(number, unit) for unit in range(UNITS)]:
            raise Violation(f"updater finds iteration {number} whole, with {data}")
        if not rules.log_before_consumed:
            yield store("consumed_next", number + 1)
        known = yield read(("log", number))
        if known is not None and rules.log_compared and known != (state, tuple(data)):
            raise Violation(f"updater finds iteration {number} to be {state, data}, logged was {known}")
        if known is not None and not rules.log_compared:
            raise Violation(f"updater logs iteration {number} twice")
        yield write(("log", number), (state, tuple(data)))
        if rules.log_before_consumed:
            yield store("consumed_next", number + 1, release=rules.consumed_release)
        return (number + 1, False)

    def finished(kept):
        return all(private is not None and private[-1] for private in kept.values())

    def final(memory):
        for number in range(1, last + 1):
            state = (memory["log", number] or ("lost",))[0]
            expected = INCOMPLETE if number in incomplete else WHOLE
            if state != expected:
                raise Violation(f"at the end iteration {number} is {state}, expected {expected}")
        counts, seen = dict(memory["extractor", "state"][1]), set()
        fresh = 0
        for iteration, _, units in stream:
            fresh += not {(iteration, unit) for unit in units} <= seen
            seen |= {(iteration, unit) for unit in units}
        if counts["placed"] != fresh or sum(counts.values()) != len(stream):
            raise Violation(f"at the end the verdicts are {counts}, expected {fresh} placed of {len(stream)}")

    names = ["extractor", "extractor b"][:extractors]
    memory = {"settled_next": 1, "consumed_next": 1, "ended": 0}
    for slot in range(slots):
        memory |= {("iteration", slot): NOBODY, ("state", slot): None, ("done_units", slot): 0, ("conflicts", slot): 0}
        for unit in range(UNITS):
            memory |= {(what, slot, unit): 0 for what in ("claim", "done")} | {("data", slot, unit): None}
    memory |= {("decision", number): None for number in range(len(stream))}
    memory |= {("log", number): None for number in range(1, last + 1)}
    memory |= {(name, "state"): (0, NO_COUNTS, (), 0, False) for name in names}
    shared = {"settled_next", "consumed_next", "ended"}
    if extractors == 2:
        shared |= {name for name in memory if name[0] in ("iteration", "claim", "done", "done_units")}
    processes = {name: extractor_of(name) for name in names} | {"updater": updater}
    return Model(memory, processes, frozenset(shared), finished, final, kills, mortal)
