# SPDX-License-Identifier: MIT
"""Runs small models of processes that share memory in every interleaving, with kills at every step.

A process is a generator function `process(private)`: one poll. It yields what it does to shared memory, gets what it
loaded, and returns its memory of its own (hashable) for the next poll. A process that starts, also after a kill, is
called with None.

    load, store, fetch_or, fetch_add    atomic; with acquire and release order unless told otherwise
    read, write                         plain, as any C assignment or memcpy

Whether an order is strong enough is not tried out by executing stale values, but decided as the C memory model does it:
a plain access must be ordered behind the last write (a plain write and an atomic one also behind every plain read since)
by what its process has acquired from releases, else the two are a data race, which is a `Violation`. `known` holds, for
each process and each atomic, the set of accesses that are ordered before it, one bit each. As processes without races
see no difference, the explorer switches only before atomics on shared variables.

A successor is ordered behind all that the killed process did, as the kernel orders the two.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Model", "Result", "Violation", "explore", "fetch_add", "fetch_or", "load", "peek", "read", "store", "write"]

Process = Callable[[Any], Generator[tuple, Any, Hashable]]


class Violation(Exception):
    """A property does not hold; the message ends with the steps that lead there."""


def load(name: Hashable, *, acquire: bool = True) -> tuple:
    """Load an atomic."""
    return ("load", name, acquire)


def store(name: Hashable, value: Hashable, *, release: bool = True) -> tuple:
    """Store an atomic."""
    return ("store", name, value, release)


def fetch_or(name: Hashable, bits: int) -> tuple:
    """Set bits of an atomic, acquire and release; gives what it was."""
    return ("fetch", name, lambda old: old | bits)


def fetch_add(name: Hashable, count: int) -> tuple:
    """Add to an atomic, acquire and release; gives what it was."""
    return ("fetch", name, lambda old: old + count)


def peek(name: Hashable) -> tuple:
    """Load an atomic that this process alone stores."""
    return ("peek", name)


def read(name: Hashable) -> tuple:
    """Read plain memory."""
    return ("read", name)


def write(name: Hashable, value: Hashable) -> tuple:
    """Write plain memory."""
    return ("write", name, value)


@dataclass(frozen=True)
class Model:
    """What is explored.

    Attributes:
        memory: shared memory at the start, by name.
        processes: by name.
        shared: names of the atomics that more than one process uses while they run.
        finished: whether what the processes keep to themselves (by name) is the end of the run.
        final: raises Violation if memory at the end is not what it must be.
        kills: so many kills may happen, to the processes in `mortal`.
        mortal: names of processes.
    """

    memory: dict[Hashable, Hashable]
    processes: dict[str, Process]
    shared: frozenset
    finished: Callable[[dict[str, Any]], bool]
    final: Callable[[dict[Hashable, Any]], None] = lambda memory: None
    kills: int = 0
    mortal: tuple[str, ...] = ()


class Result(NamedTuple):
    """How many states there are, and how many of them are the end of a run."""

    states: int
    ends: int


class _State(NamedTuple):
    memory: tuple
    known: bytes  # accesses that are ordered before what a process does next, one after the other
    carried: bytes  # per shared atomic: what its last store released, to whom acquires it
    running: tuple[tuple[Any, tuple], ...]  # per process: what it keeps to itself, and what this poll has loaded
    kills: int


@dataclass
class _Explorer:
    model: Model
    names: list[Hashable] = field(init=False)
    place: dict[Hashable, int] = field(init=False)
    owner: dict[Hashable, str] = field(default_factory=dict)
    memo: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = list(self.model.memory)
        self.place = {name: index for index, name in enumerate(self.names)}
        self.carrier = {name: index for index, name in enumerate(n for n in self.names if n in self.model.shared)}
        self.processes = list(self.model.processes.items())
        self.width = 1 + len(self.processes)
        self.room = (self.width * len(self.names) + 7) // 8

    # Python's hash of an integer of many bits collides where bits are 61 apart; that of bytes does not.
    def pack(self, sets: list[int]) -> bytes:
        return b"".join(bits.to_bytes(self.room, "little") for bits in sets)

    def unpack(self, packed: bytes) -> list[int]:
        return [int.from_bytes(packed[at : at + self.room], "little") for at in range(0, len(packed), self.room)]

    def begin(self) -> _State:
        everything = (1 << self.width * len(self.names)) - 1
        return _State(
            tuple(self.model.memory.values()),
            self.pack([everything] * len(self.processes)),
            self.pack([everything] * len(self.carrier)),
            ((None, ()),) * len(self.processes),
            self.model.kills,
        )

    def following(self, number: int, private: Any, loaded: tuple) -> tuple[bool, Any]:
        """Return (True, the operation that follows) or (False, what the process keeps at the end of its poll)."""
        key = (number, private, loaded)
        if key not in self.memo:
            poll, answer = self.processes[number][1](private), None
            try:
                operation = next(poll)
                for answer in loaded:
                    operation = poll.send(answer)
                self.memo[key] = (True, operation)
            except StopIteration as end:
                self.memo[key] = (False, end.value)
        return self.memo[key]

    # -- one operation ----------------------------------------------------------------------------------------------

    def do(self, number: int, operation: tuple, memory: list, known: list[int], carried: list[int]) -> Any:
        """Do an operation of a process; returns what it loads, raises Violation if it is a data race."""
        kind, at = operation[0], self.place[operation[1]]
        name = self.processes[number][0]
        written = 1 << self.width * at
        mine = written << 1 + number
        reads = (written << self.width) - (written << 1)
        answer = memory[at]
        if kind in ("read", "write") and not known[number] & written:
            raise Violation(f"data race: {name} {kind}s {operation[1]}, which is not ordered behind its last write")
        if kind in ("write", "store", "fetch") and known[number] & reads != reads:
            raise Violation(f"data race: {name} writes {operation[1]}, which is not ordered behind a read of it")
        if kind == "read":
            self.forget(mine, known, carried)
            known[number] |= mine
        elif kind != "load" and kind != "peek":
            self.forget(written, known, carried)
            known[:] = [bits | reads for bits in known]
            carried[:] = [bits | reads for bits in carried]
            known[number] |= written
        carrier = self.carrier.get(operation[1])
        if carrier is not None and ((kind == "load" and operation[2]) or kind == "fetch"):
            known[number] |= carried[carrier]
        if kind == "write":
            memory[at] = operation[2]
        elif kind == "store":
            memory[at] = operation[2]
            if carrier is not None:
                carried[carrier] = known[number] if operation[3] else 0
        elif kind == "fetch":
            memory[at] = operation[2](answer)
            if carrier is not None:
                carried[carrier] |= known[number]
        if kind not in ("read", "write") and operation[1] not in self.model.shared:
            if self.owner.setdefault(operation[1], name) != name:
                raise AssertionError(f"{operation[1]} is used by {name} and {self.owner[operation[1]]}: shared")
        return answer

    @staticmethod
    def forget(bits: int, known: list[int], carried: list[int]) -> None:
        known[:] = [have & ~bits for have in known]
        carried[:] = [have & ~bits for have in carried]

    # -- one process, until it would touch what others touch -----------------------------------------------------------

    def step(self, state: _State, number: int) -> list[tuple[tuple, _State]]:
        """Return where a process gets by its next operation and all plain ones behind it, and where kills leave it."""
        out = []
        memory, known, carried = list(state.memory), self.unpack(state.known), self.unpack(state.carried)
        private, loaded = state.running[number]
        name, said = self.processes[number][0], []
        mortal = state.kills and name in self.model.mortal

        def reached(private: Any, loaded: tuple, kills: int) -> _State:
            running = (*state.running[:number], (private, loaded), *state.running[number + 1 :])
            return _State(tuple(memory), self.pack(known), self.pack(carried), running, kills)

        if mortal and (private, loaded) != (None, ()):
            out.append(((name, (), True), reached(None, (), state.kills - 1)))
        first = True
        while True:
            try:
                more, operation = self.following(number, private, loaded)
                if not more:
                    private, loaded = operation, ()
                    break
                switch = operation[0] not in ("read", "write", "peek") and operation[1] in self.model.shared
                if switch and not first:
                    break
                answer = self.do(number, operation, memory, known, carried)
            except Violation as problem:
                raise Violation(f"{problem}: {_told(name, said, False)}") from None
            first = False
            loaded = (*loaded, answer)
            said.append((operation, answer))
            if mortal and operation[0] in ("write", "store", "fetch"):
                out.append(((name, tuple(said), True), reached(None, (), state.kills - 1)))
        out.append(((name, tuple(said), False), reached(private, loaded, state.kills)))
        return out


def _told(name: str, said: Iterable[tuple[tuple, Any]], killed: bool) -> str:
    """Return a step in words."""
    words = [
        f"{kind} {where} = {operation[2]}" if kind in ("write", "store") else f"{kind} {where} is {answer}"
        for operation, answer in said
        for kind, where in [operation[:2]]
    ]
    return f"{name}: {', '.join([*words, *['killed'] * killed])}"


def explore(model: Model, most: int = 1_000_000) -> Result:
    """Visit every state; returns how many.

    Raises:
        Violation: a process raised it, or there was a data race, or an end is wrong, or from some state no end can be reached.
    """
    explorer = _Explorer(model)
    begin = explorer.begin()
    came: dict[_State, tuple[_State, tuple] | None] = {begin: None}
    before: dict[_State, list[_State]] = {}
    ends, todo = [], [begin]

    def path(state: _State) -> str:
        steps = []
        while (link := came[state]) is not None:
            state = link[0]
            steps.append(_told(*link[1]))
        return "".join(f"\n  {step}" for step in reversed(steps))

    while todo:
        state = todo.pop()
        kept = {name: private for (name, _), (private, _) in zip(explorer.processes, state.running, strict=True)}
        try:
            if model.finished(kept):
                ends.append(state)
                model.final(dict(zip(explorer.names, state.memory, strict=True)))
                continue
            for number in range(len(explorer.processes)):
                for said, following in explorer.step(state, number):
                    before.setdefault(following, []).append(state)
                    if following not in came:
                        came[following] = (state, said)
                        todo.append(following)
        except Violation as problem:
            raise Violation(f"{problem}{path(state)}") from None
        if len(came) > most:
            raise AssertionError(f"more than {most} states")
    hopeful, todo = set(ends), list(ends)
    while todo:
        for state in before.get(todo.pop(), ()):
            if state not in hopeful:
                hopeful.add(state)
                todo.append(state)
    for state in came:
        if state not in hopeful:
            raise Violation(f"no progress: no end can be reached from here{path(state)}")
    return Result(len(came), len(ends))
