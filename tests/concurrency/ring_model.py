# SPDX-License-Identifier: MIT
"""The packet ring as a model: dump, parser and extractor, their cursors and published states (docs/ring-format.md).

`Rules` says what the code does; each rule can be broken, and a test shows that the explorer then finds what goes wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.concurrency.explorer import Model, Violation, load, read, store, write

__all__ = ["Rules", "model"]

BURST = 2


@dataclass(frozen=True)
class Rules:
    """What keeps the ring right."""

    releases: frozenset = frozenset({"written", "parsed", "extracted"})
    acquires: frozenset = frozenset({"written", "parsed", "extracted"})
    state_before_cursor: bool = True  # it is published first
    into_older_copy: bool = True  # of the two copies of a state
    number_last: bool = True  # of a copy: behind its bytes
    cursor_from_state: bool = True  # a stage that starts sets it
    room_checked: bool = True  # the dump leaves alone what is not extracted
    end_read_first: bool = True  # the parser reads `ended` before `written`
    end_is_last: bool = True  # the dump moves nothing behind it
    holds: bool = True  # a record waits for the one that proves it


def publish(stage, state, rules):
    """fc_publish: a state of two words, of which the second must always agree with the first."""
    numbers = []
    for copy in range(2):
        numbers.append((yield load((stage, copy, "number"))))
    newer = 0 if numbers[0] > numbers[1] else 1
    target = 1 - newer if rules.into_older_copy else newer
    yield store((stage, target, "number"), 0 if rules.number_last else max(numbers) + 1)
    for word, value in enumerate(state):
        yield write((stage, target, word), value)
    if rules.number_last:
        yield store((stage, target, "number"), max(numbers) + 1)


def recover(stage, cursor, rules):
    """fc_recover, and the cursor that follows from the state."""
    numbers = []
    for copy in range(2):
        numbers.append((yield load((stage, copy, "number"))))
    state = (0, 0)
    if any(numbers):
        newer = 0 if numbers[0] > numbers[1] else 1
        state = ((yield read((stage, newer, 0))), (yield read((stage, newer, 1))))
    if state[0] != state[1]:
        raise Violation(f"{stage} recovers a torn state {state}")
    if rules.cursor_from_state:
        yield store(cursor, state[0])
    return state


def move(stage, cursor, state, rules):
    """Publish a state and the cursor that it says."""
    if rules.state_before_cursor:
        yield from publish(stage, state, rules)
    yield store(cursor, state[0], release=cursor in rules.releases)
    if not rules.state_before_cursor:
        yield from publish(stage, state, rules)


def behind(stage, cursor, position, ahead):
    if position > ahead:
        raise Violation(f"{stage}: {cursor} is {ahead}, behind {position}: it went back")
    return ahead - position


def model(rules=Rules(), *, records=3, room=2, kills=0, mortal=("dump", "parser", "extractor"), held=()):
    """Return the model of a ring with `room` records, through which a file of `records` frames goes.

    The records numbered in `held` need the one after them as proof.
    """

    def dump(private):
        if private is None:
            state = yield from recover("dump", "written", rules)
            return (*state, False)
        position, counted, over = private
        if over:
            return private
        if position == records or (not rules.end_is_last and position == records - 1):
            yield store("ended", 1)
            if position == records:
                return (position, counted, True)
        extracted = yield load("extracted", acquire="extracted" in rules.acquires)
        free = room - (position - extracted) if rules.room_checked else BURST
        count = min(BURST, free, records - position)
        if not rules.end_is_last:
            count = min(count, 1)
        for index in range(position, position + count):
            yield write(("frame", index % room), index)
            yield write(("note", index % room), None)
        if count:
            yield from move("dump", "written", (position + count, counted + count), rules)
        return (position + count, counted + count, False)

    def parser(private):
        if private is None:
            state = yield from recover("parser", "parsed", rules)
            return (*state, False)
        position, counted, over = private
        if over:
            return private
        ended = (yield load("ended")) if rules.end_read_first else None
        written = yield load("written", acquire="written" in rules.acquires)
        if behind("parser", "written", position, written) == 0:
            return (position, counted, bool(ended))
        end = min(written, position + BURST)
        for index in range(position, end):
            frame = yield read(("frame", index % room))
            if frame != index:
                raise Violation(f"parser annotates record {index}, but {frame} is there")
            verdict = "placed"
            if index in held and index + 1 >= written:
                if ended is None:
                    ended = yield load("ended")
                if not ended and rules.holds:
                    end = index
                    break
                verdict = "unproved"
            yield write(("note", index % room), (index, verdict))
        if end > position:
            yield from move("parser", "parsed", (end, counted + end - position), rules)
        return (end, counted + end - position, False)

    def extractor(private):
        if private is None:
            state = yield from recover("extractor", "extracted", rules)
            return (*state, False)
        position, counted, over = private
        if over:
            return private
        parsed = yield load("parsed", acquire="parsed" in rules.acquires)
        end = position + min(BURST, behind("extractor", "parsed", position, parsed))
        for index in range(position, end):
            frame = yield read(("frame", index % room))
            note = yield read(("note", index % room))
            if (frame, note) != (index, (index, "placed")):
                raise Violation(f"extractor takes record {index}, but finds frame {frame} and annotation {note}")
        if end > position:
            yield from move("extractor", "extracted", (end, counted + end - position), rules)
            return (end, counted + end - position, False)
        ended = yield load("ended")
        written = yield load("written")
        return (position, counted, bool(ended) and position == written)

    def finished(kept):
        return all(private is not None and private[2] for private in kept.values())

    def final(memory):
        for stage, cursor in (("dump", "written"), ("parser", "parsed"), ("extractor", "extracted")):
            newer = max(range(2), key=lambda copy: memory[stage, copy, "number"])
            if not memory[stage, newer, 0] == memory[stage, newer, 1] == memory[cursor] == records:
                raise Violation(f"at the end {stage} has {memory[cursor]} records of {records}")

    memory = dict.fromkeys(("written", "parsed", "extracted", "ended"), 0)
    for stage in ("dump", "parser", "extractor"):
        for copy in range(2):
            memory |= {(stage, copy, "number"): 0, (stage, copy, 0): 0, (stage, copy, 1): 0}
    memory |= {(what, index): None for what in ("frame", "note") for index in range(room)}
    processes = {"dump": dump, "parser": parser, "extractor": extractor}
    shared = frozenset({"written", "parsed", "extracted", "ended"})
    return Model(memory, processes, shared, finished, final, kills, mortal)
