# SPDX-License-Identifier: MIT
"""Writing a snapshot's file: HDF5 makes its structure in memory, the content is streamed into its places.

What is to be written is a `Request`, which JSON can hold, and content that the caller gives piece by piece: so the
process that writes needs neither torch nor a copy of the state. HDF5 allocates every dataset contiguous and early in a
sparse file in memory; then the file is known, byte for byte, before the first of them reaches the disk. It is written
from front to back through `durable.disk`, synced, and read back: every byte is compared and digested in one pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from updater import durable
from updater.durable import write_all

__all__ = ["PIECE_BYTES", "Content", "Dataset", "Request", "Written", "pieces", "write_file"]

#: The most that is given, written and read back at once; content is handled in pieces of it.
PIECE_BYTES = 1 << 20
#: What is written between two syncs grows fourfold after one shorter than this, and shrinks so after any other, ...
_SYNC_S = 0.02
#: ... within these bounds: what else syncs on that disk has to wait for it.
_LEAST_DIRTY_BYTES, _MOST_DIRTY_BYTES = 4 << 20, 64 << 20
#: Bytes begin on a multiple of it in staging memory: a cache line.
_ALIGNMENT = 64
_NUMPY = {"bfloat16": "uint16"}


@dataclass(frozen=True)
class Dataset:
    """One dataset: its path in the file, torch's name of its dtype, and where its bytes begin in staging memory."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass
class Request:
    """What a file is to hold. `attributes` are by group ("" is the root), `links` from a path to that of a dataset.

    A group that has attributes is made, if only with none of them; those that a dataset's path names are made as well.
    """

    attributes: dict[str, dict[str, str | int | bool]] = field(default_factory=dict)
    datasets: list[Dataset] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    room_bytes: int = 0  # of staging memory, that all datasets take
    path: str = ""  # of the file, where another process is to write it

    def add(self, path: str, dtype: str, shape: Iterable[int], size: int) -> None:
        """Add a dataset of `size` bytes, behind those there are."""
        self.datasets.append(Dataset(path, dtype, tuple(shape), self.room_bytes, size))
        self.room_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    def encode(self) -> bytes:
        """Return the request as JSON."""
        return json.dumps({**vars(self), "datasets": list(map(vars, self.datasets))}, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, document: bytes) -> Request:
        """Return the request that `encode` wrote."""
        made = json.loads(document)
        datasets = [Dataset(**{**entry, "shape": tuple(entry["shape"])}) for entry in made.pop("datasets")]
        return cls(datasets=datasets, **made)


@dataclass(frozen=True)
class Written:
    """A file that is written, synced and compared, under its temporary name: its length and SHA-256, for the manifest."""

    path: Path
    bytes: int
    sha256: str


#: Gives the bytes of a dataset, in order, in pieces of at most PIECE_BYTES; asked twice, to write and to compare.
Content = Callable[[Dataset], Iterable[memoryview]]
#: An offset in the file, and what follows one another there.
_Batch = tuple[int, list[memoryview]]


def pieces(content: memoryview) -> Iterator[memoryview]:
    """Yield flat bytes in pieces of at most PIECE_BYTES."""
    for low in range(0, len(content), PIECE_BYTES):
        yield content[low : low + PIECE_BYTES]


def write_file(path: Path, request: Request, content: Content, share: float = 1.0) -> Written:
    """Write, sync, read back and compare a file; it is new, in place of any of that name, and private (0600).

    Nothing is renamed, nor the folder synced: that is publishing. `share` is what of its time it works at most; it sleeps
    the rest, a piece at a time.

    Raises:
        OSError: the disk refused, HDF5 did, or what was read back differs; no file of that path is there then.
    """
    parts = _structure(request)
    fd = durable.disk.create(path)
    try:
        try:
            _write(fd, _unhurried(_batches(parts, content), share))
            # Clean pages go, so that the comparison reads what the disk has.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            size, digest = _read_back(fd, _unhurried(_batches(parts, content), share))
        finally:
            durable.disk.close(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            durable.disk.unlink(path)
        raise
    return Written(path, size, digest)


def _structure(request: Request) -> list[bytes | Dataset]:
    """Return the file from front to back: HDF5's own bytes, and between them the datasets that lie there."""
    with open(os.memfd_create("snapshot"), "w+b", buffering=0) as file:
        try:
            with h5py.File(file, "w") as hdf:
                for name, attributes in request.attributes.items():
                    group = hdf.require_group(name or "/")
                    for key, value in attributes.items():
                        group.attrs[key] = value
                places = [(_allocate(hdf, dataset), dataset) for dataset in request.datasets]
                for name, target in request.links.items():
                    hdf[name] = hdf[target]
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise OSError(f"HDF5 refuses it: {str(error).splitlines()[0]}") from error
        parts: list[bytes | Dataset] = []
        at = 0
        for offset, dataset in sorted(((o, d) for o, d in places if d.bytes), key=lambda place: place[0]):
            parts += [os.pread(file.fileno(), offset - at, at), dataset]
            at = offset + dataset.bytes
        parts.append(os.pread(file.fileno(), os.fstat(file.fileno()).st_size - at, at))
        return parts


def _allocate(hdf: h5py.File, dataset: Dataset) -> int:
    """Make a dataset without content; returns where in the file its bytes belong, 0 if it has none."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)  # equal states make equal files
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    kind = h5py.h5t.py_create(np.dtype(_NUMPY.get(dataset.dtype, dataset.dtype)), logical=True)
    space = h5py.h5s.create_simple(dataset.shape) if dataset.shape else h5py.h5s.create(h5py.h5s.SCALAR)
    made = h5py.Dataset(h5py.h5d.create(hdf.id, dataset.path.encode(), kind, space, creation, links))
    made.attrs["dtype"] = dataset.dtype
    if made.id.get_storage_size() != dataset.bytes:
        raise ValueError(f"{dataset.path} takes {made.id.get_storage_size()} bytes, not {dataset.bytes}")
    return made.id.get_offset() or 0


def _batches(parts: list[bytes | Dataset], content: Content) -> Iterator[_Batch]:
    """Yield the file from front to back, in batches of less than twice PIECE_BYTES."""
    at = gathered = 0
    batch: list[memoryview] = []
    for part in parts:
        for piece in content(part) if isinstance(part, Dataset) else pieces(memoryview(part)):
            batch.append(piece)
            gathered += len(piece)
            if gathered >= PIECE_BYTES:
                yield at, batch
                at, gathered, batch = at + gathered, 0, []
    if batch:
        yield at, batch


def _unhurried(batches: Iterator[_Batch], share: float) -> Iterator[_Batch]:
    """Yield batches; after each, sleep so that what is done with them takes at most that share of the time."""
    for batch in batches:
        begin = time.perf_counter()
        yield batch
        if share < 1:  # a sleep of no time gives the core up all the same
            time.sleep((time.perf_counter() - begin) * (1 / share - 1))


def _write(fd: int, batches: Iterator[_Batch]) -> None:
    """Write a file so that it is on the disk, and so that what else syncs there waits little longer than _SYNC_S."""
    dirty, room = 0, _LEAST_DIRTY_BYTES
    for at, batch in batches:
        if dirty >= room:
            begin = time.perf_counter()
            durable.disk.datasync(fd)
            room = room * 4 if time.perf_counter() - begin < _SYNC_S else room // 4
            dirty, room = 0, min(max(room, _LEAST_DIRTY_BYTES), _MOST_DIRTY_BYTES)
        size = write_all(fd, batch, at)
        dirty += size
        # Dirty pages cannot go, but the disk begins with them at once; a sync alone would begin when it is called.
        os.posix_fadvise(fd, at, size, os.POSIX_FADV_DONTNEED)
    durable.disk.sync(fd)


def _read_back(fd: int, batches: Iterator[_Batch]) -> tuple[int, str]:
    """Hold a file against what it was to be; returns its length and its SHA-256 in hexadecimal."""
    digest, end = hashlib.sha256(), 0
    buffer = np.empty(2 * PIECE_BYTES, np.uint8)
    for at, batch in batches:
        size = sum(map(len, batch))
        end = at + size
        found = buffer[:size]
        if os.preadv(fd, [found], at) != size:
            raise OSError(f"reading byte {at} and what follows back gives less than {size} bytes")
        digest.update(found)
        for piece in batch:
            if not np.array_equal(found[: len(piece)], np.frombuffer(piece, np.uint8)):
                raise OSError(f"reading byte {end - len(found)} and what follows back gives other bytes")
            found = found[len(piece) :]
    if os.fstat(fd).st_size != end:
        raise OSError(f"is {os.fstat(fd).st_size} bytes long after it was written, expected {end}")
    return end, digest.hexdigest()
