# SPDX-License-Identifier: MIT
"""What a disk may hold after the power went: a disk that notes every operation, and the states that it may be found in.

The model promises what POSIX does, and no more:

- What was written to a file is durable once that file was synced after it (fsync, fdatasync: content and size). A sync
  says nothing of the file's name, nor of any other file.
- What was done to names (create, rename, unlink, make a folder) is durable once the folder that holds them was synced
  after it. A sync says nothing of the folder's own name, nor of what the files hold.
- Of all else, each operation reached the disk or did not, in no order: the later may be there without the earlier.
  A single name operation is there whole or not at all; so a rename shows the old file or the new one, which holds what of
  *its* content reached. A file whose name did not reach is not there, however often it was synced; with a folder, all in it
  goes.
- A write may have reached in part: up to a byte, from a byte on, or as a size alone. What then lies between the old end
  and the new one is zeros, or bytes of anything.
- A sync that failed made nothing durable, and no later one does so for what was written before it: the kernel takes those
  pages for clean.

File systems promise more (ext4 keeps a rename behind the data it publishes, and a sync of a new file keeps its name);
whatever holds here holds there.
"""

import hashlib
import itertools
import os
import threading
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

from updater import durable, snapshot, snapshot_schedule
from updater.durable import Disk

RANDOM_SUBSETS, TORN_WRITES = 20, 2
#: With so few operations under way, each of their subsets is tried.
FEW = 4


@dataclass(frozen=True)
class Write:
    """Bytes into a file from an offset on."""

    node: int
    offset: int
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Truncate:
    """A file gets a size."""

    node: int
    size: int


@dataclass(frozen=True)
class Names:
    """Names in a folder come to stand for other nodes, all at once; None: for none."""

    node: int
    changes: tuple[tuple[str, int | None], ...]
    new_folder: bool = False


@dataclass(frozen=True)
class Sync:
    """What was done to a file's content, or to a folder's names, is durable; or never will be, if it failed."""

    node: int
    failed: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that the world outside the disk now counts on."""

    what: str
    iterations: frozenset[int]


@dataclass(frozen=True)
class Torn:
    """What reached of a write: the size up to `size` bytes of it, of its bytes those in `kept`, else the filling."""

    size: int
    kept: tuple[int, int]
    filling: bytes = field(repr=False)


@dataclass
class Trace:
    """What was there at the beginning, durably, and what was done since. Node 0 is the folder that all of it lies in."""

    contents: dict[int, bytes] = field(default_factory=dict)
    names: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    operations: list = field(default_factory=list)

    def mark(self, what, iterations):
        self.operations.append(Mark(what, frozenset(iterations)))


class RecordingDisk(Disk):
    """A disk that does everything by another one, and notes what it did below a folder.

    `watch`, if it is set, is called after each operation, before anything else can happen.
    """

    def __init__(self, root, disk=None):
        self.trace, self.watch = Trace(), None
        self._disk = disk or Disk()
        self._root, self._lock = Path(root), threading.RLock()
        self._names = {0: {}}  # as they are now
        self._folders, self._descriptors, self._watching = {self._root: 0}, {}, False
        self._count = itertools.count(1)
        for folder, folders, files in os.walk(self._root):
            here = self._folders[Path(folder)]
            for name in folders:
                self._folders[Path(folder) / name] = self._names[here][name] = node = next(self._count)
                self._names[node] = {}
            for name in files:
                self._names[here][name] = node = next(self._count)
                self.trace.contents[node] = (Path(folder) / name).read_bytes()
        self.trace.names = {node: dict(names) for node, names in self._names.items()}

    def _note(self, *operations):
        self.trace.operations += operations
        for operation in operations:
            if isinstance(operation, Names):
                for name, node in operation.changes:
                    self._names[operation.node].pop(name, None)
                    if node is not None:
                        self._names[operation.node][name] = node
        if self.watch is not None and not self._watching:
            self._watching = True
            try:
                self.watch()
            finally:
                self._watching = False

    def _node(self, path):
        return self._names[self._folders[path.parent]].get(path.name)

    def create(self, path):
        with self._lock:
            fd, node = self._disk.create(path), self._node(path)
            if node is None:
                self._descriptors[fd] = node = next(self._count)
                self._note(Names(self._folders[path.parent], ((path.name, node),)))
            else:
                self._descriptors[fd] = node
                self._note(Truncate(node, 0))
            return fd

    def open(self, path):
        with self._lock:
            fd = self._disk.open(path)
            self._descriptors[fd] = self._node(path)
            return fd

    def write(self, fd, pieces, offset):
        with self._lock:
            written = self._disk.write(fd, pieces, offset)
            content = b"".join(bytes(piece) for piece in pieces)[:written]
            self._note(Write(self._descriptors[fd], offset, content))
            return written

    def truncate(self, fd, size):
        with self._lock:
            self._disk.truncate(fd, size)
            self._note(Truncate(self._descriptors[fd], size))

    def sync(self, fd):
        self._sync(self._descriptors[fd], lambda: self._disk.sync(fd))

    def datasync(self, fd):
        self._sync(self._descriptors[fd], lambda: self._disk.datasync(fd))

    def sync_folder(self, path):
        self._sync(self._folders[path], lambda: self._disk.sync_folder(path))

    def _sync(self, node, call):
        with self._lock:
            try:
                call()
            except OSError:
                self._note(Sync(node, failed=True))
                raise
            self._note(Sync(node))

    def close(self, fd):
        with self._lock:
            self._descriptors.pop(fd)
            self._disk.close(fd)

    def make_folder(self, path):
        with self._lock:
            above = [path, *path.parents]
            new = above[: next(n for n, folder in enumerate(above) if folder in self._folders)]
            self._disk.make_folder(path)
            for folder in reversed(new):
                self._folders[folder] = node = next(self._count)
                self._names[node] = {}
                self._note(Names(self._folders[folder.parent], ((folder.name, node),), new_folder=True))

    def rename(self, source, target):
        assert source.parent == target.parent, "a rename from folder to folder is not modelled"
        with self._lock:
            node = self._node(source)
            assert node is not None, f"{source} was made by something else than the disk"
            self._disk.rename(source, target)
            self._note(Names(self._folders[source.parent], ((source.name, None), (target.name, node))))

    def unlink(self, path):
        with self._lock:
            self._disk.unlink(path)
            self._note(Names(self._folders[path.parent], ((path.name, None),)))

    def remove_folder(self, path):
        with self._lock:
            self._disk.remove_folder(path)
            del self._names[self._folders.pop(path)]
            self._note(Names(self._folders[path.parent], ((path.name, None),)))


class InThisProcess:
    """Stands for the child that writes snapshots: a disk of this process does not see what another one does.

    What it writes is what the child writes; the answer comes with the next look, or with the wait for it.
    """

    def __init__(self):
        self._path = self._state = None

    def start(self, path, state, _engine):
        self._path, self._state = path, replace(state, model=deepcopy(state.model), optimizer=deepcopy(state.optimizer))

    def poll(self):
        path, self._path = self._path, None
        return None if path is None else snapshot.write_now(path, self._state)

    wait = poll

    def close(self):
        self._path = None


@contextmanager
def in_place(disk):
    """Let everything that changes a checkpoint directory go through a disk."""
    before, durable.disk = durable.disk, disk
    writer, snapshot_schedule.SnapshotWriter = snapshot_schedule.SnapshotWriter, InThisProcess
    try:
        yield disk
    finally:
        durable.disk, snapshot_schedule.SnapshotWriter = before, writer


class Remains:
    """What is left if the power goes now: `note` each operation of a trace in turn, then ask for `image`s.

    `pending` are the operations, by their place in the trace, that may or may not have reached the disk.
    """

    def __init__(self, trace):
        self._contents = dict(trace.contents)
        self._names = {node: dict(names) for node, names in trace.names.items()}
        self._since = {}  # node -> what was done to it since all of it was durable, by place
        self.pending, self._doubtful = {}, set()  # the latter: those before a sync that failed

    def note(self, place, operation):
        if isinstance(operation, Sync):
            self._sync(operation)
        elif not isinstance(operation, Mark):
            self._since.setdefault(operation.node, {})[place] = self.pending[place] = operation
            if isinstance(operation, Names) and operation.new_folder:
                self._names |= {node: {} for _, node in operation.changes}

    def _sync(self, sync):
        since = self._since.get(sync.node, {})
        for place in since.keys() & self.pending.keys() - self._doubtful:
            if sync.failed:
                self._doubtful.add(place)
            else:
                del self.pending[place]
        for place in list(since):  # only behind what is in doubt does the order still matter
            if place in self.pending:
                break
            self._apply(self._contents, self._names, since.pop(place))

    @staticmethod
    def _apply(contents, names, operation, torn=None):
        node = operation.node
        if isinstance(operation, Names):
            folder = names[node] = dict(names.get(node, {}))
            for name, target in operation.changes:
                folder.pop(name, None)
                if target is not None:
                    folder[name] = target
            return
        content = bytearray(contents.get(node, b""))
        if isinstance(operation, Truncate):
            contents[node] = bytes(content[: operation.size].ljust(operation.size, b"\0"))
            return
        torn = torn or Torn(len(operation.content), (0, len(operation.content)), b"")
        begin, (low, high) = operation.offset, torn.kept
        if len(content) < begin + torn.size:
            content = content.ljust(begin, b"\0")
            content += torn.filling[len(content) - begin : torn.size]
            content = content.ljust(begin + torn.size, b"\0")
        content[begin + low : begin + high] = operation.content[low:high]
        contents[node] = bytes(content)

    def image(self, fates):
        """Return what is found: path -> content, None for a folder. `fates` of pending operations: None, lost; or Torn."""
        contents, names = dict(self._contents), dict(self._names)
        for since in self._since.values():
            for place, operation in since.items():
                fate = fates.get(place, operation)
                if fate is not None:
                    self._apply(contents, names, operation, fate if isinstance(fate, Torn) else None)
        found = {}

        def walk(folder, path):
            for name, node in names.get(folder, {}).items():
                is_folder = node in self._names
                found[path / name] = None if is_folder else contents.get(node, b"")
                if is_folder:
                    walk(node, path / name)

        walk(0, Path())
        return found

    def variants(self, rng):
        """Yield (what happened, fates): nothing lost, all, each alone, subsets by lot, and writes torn by lot."""
        places = list(self.pending)
        yield "nothing lost", {}
        if not places:
            return
        yield "all lost", dict.fromkeys(places)
        if len(places) <= FEW:
            subsets = [s for n in range(1, len(places)) for s in itertools.combinations(places, n)]
        else:
            subsets = [[place] for place in places]
            subsets += [[place for place in places if rng.random() < 0.5] for _ in range(RANDOM_SUBSETS)]
        for subset in subsets:
            yield f"lost: {[*subset]}", dict.fromkeys(subset)
        writes = [place for place in places if isinstance(self.pending[place], Write)]
        for number in range(TORN_WRITES if writes else 0):
            place = rng.choice(writes)
            others = [other for other in places if other != place and (number or rng.random() < 0.5)]
            torn = tear(self.pending[place], rng)
            yield f"lost: {others}, torn: {place} to {torn.size}, {torn.kept}", {**dict.fromkeys(others), place: torn}


def tear(write, rng):
    """Return one of the ways in which a write may have reached in part."""
    length = len(write.content)
    cut = rng.randrange(length + 1)
    kept = rng.choice([(0, cut), (0, cut), (cut, length), (0, 0)])
    size = rng.choice([kept[1], length]) if kept[1] else length
    return Torn(size, kept, rng.choice([b"", rng.randbytes(length)]))


def lay(image, folder):
    """Make what was found real in an empty folder."""
    for path, content in image.items():
        if content is None:
            (folder / path).mkdir(mode=0o700)
        else:
            (folder / path).write_bytes(content)


def digest(image):
    found = hashlib.blake2b()
    for path, content in sorted(image.items()):
        found.update(f"{path} {None if content is None else len(content)}\n".encode() + (content or b""))
    return found.digest()


def cuts(trace, rng, about=None):
    """Yield (place, operation, what happened, image, marks before) for each way in which the power may go.

    The cut comes after each operation, and an image may come again; or, where `about` says how many are wanted, it comes
    after so many operations in even distances, each time in one way by lot.
    """
    remains, marks = Remains(trace), {}
    distance = len(trace.operations) / about if about else 1
    for place, operation in enumerate(trace.operations):
        remains.note(place, operation)
        if isinstance(operation, Mark):
            marks = {**marks, operation.what: marks.get(operation.what, frozenset()) | operation.iterations}
        if int((place + 1) / distance) > int(place / distance):
            ways = list(remains.variants(rng))
            for what, fates in [rng.choice(ways)] if about else ways:
                yield place, operation, what, remains.image(fates), marks
