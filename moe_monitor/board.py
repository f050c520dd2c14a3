"""The board: the versioned record through which a worker's numbers reach readers in other processes.

One file per worker rank in the run directory (mode 0700, files 0600)::

    8s magic | u32 version | u32 bytes of JSON | u32 CRC-32 of the JSON | JSON | segments

The JSON says what the writer is and has the table of segments.

A segment may stand for several of the same form (a :class:`Ring`): ``name/0``, ``name/1`` and so on, in this order.

A segment is two slots, each a header (u64 sequence, u64 wall-clock ns of the write, u64 monotonic ns, u32 CRC-32 of
all that plus the payload) followed by named arrays. They are written in turn, as a whole, with one ``pwrite``. A reader
takes the newest slot whose CRC is right, so no reader blocks the writer, no torn record is ever used, and a writer that
is interrupted in the middle of a write, for however long, leaves the one before. The CRC makes that independent of the
processor's memory order.

``pread``/``pwrite`` rather than a memory map: when somebody truncates the file or the disk is full, a mapped access
kills the process with SIGBUS; these calls return an error.

The writer holds an exclusive ``flock`` for as long as it lives. That is how a dead writer is recognised, across
re-used pids and container pid namespaces alike.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import stat
import struct
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MOEBOARD"
VERSION = 3
SUFFIX = ".board"

_PREAMBLE = struct.Struct("<8sIII")
_SEGMENT = struct.Struct("<QQQI4x")
_MAX_JSON = 1 << 20
#: 128 layers of 65,536 experts take 64 MiB.
_MAX_SEGMENT = 1 << 27
_ALIGN = 64
_DTYPE = re.compile(r"[<>|=]?(?:[iu][1248]|f[248]|S[1-9][0-9]{0,6})")

#: Bytes of a checksum without handing over Python's lock.
_CRC_AT_ONCE = 4096

#: Segments that one ring may have.
_MAX_COPIES = 1 << 16

ArraySpec = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Ring:
    """So many segments of the same form. Each write gives all arrays of one."""

    copies: int
    arrays: Mapping[str, ArraySpec]


Segments = Mapping[str, Mapping[str, ArraySpec] | Ring]


class BoardError(Exception):
    """A board cannot be used; the message is one plain sentence."""


@dataclass(frozen=True)
class Record:
    """One consistent read of a segment. ``written`` is seconds since the epoch, ``sequence`` 0 before the first."""

    arrays: dict[str, NDArray[Any]]
    sequence: int
    written: float
    age: float


def open_directory(path: Path, *, create: bool) -> int:
    """Open the run directory and return its descriptor, refusing one that others could have prepared.

    Raises BoardError if it is missing (and not ``create``), a symlink, someone else's, or open to others.
    """
    if create:
        try:
            os.makedirs(path.parent, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
        except OSError as error:
            raise BoardError(f"cannot create the run directory {str(path)!r}: {error.strerror}") from error
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BoardError(f"the run directory {str(path)!r} does not exist") from None
    except OSError as error:
        raise BoardError(f"cannot open the run directory {str(path)!r}: {error.strerror}") from error
    info = os.fstat(fd)
    problem = ""
    if info.st_uid != os.geteuid() and os.geteuid() != 0:
        problem = f"belongs to uid {info.st_uid}, not to uid {os.geteuid()}"
    elif create and info.st_uid != os.geteuid():
        problem = f"belongs to uid {info.st_uid}"
    elif info.st_mode & 0o077:
        problem = f"has mode {stat.S_IMODE(info.st_mode):04o}; it must be 0700"
    if problem:
        os.close(fd)
        raise BoardError(f"the run directory {str(path)!r} {problem}")
    return fd


def _plan(segments: Segments) -> tuple[dict[str, Any], int]:
    """Offsets, relative to the first segment, of every segment and of the arrays within it; and the total size."""
    plan: dict[str, Any] = {}
    at = 0
    for name, spec in segments.items():
        copies, arrays = (spec.copies, spec.arrays) if isinstance(spec, Ring) else (0, spec)
        inside, table = 0, {}
        for array, (dtype, shape) in arrays.items():
            size = int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))
            table[array] = {"at": inside, "dtype": dtype, "shape": list(shape)}
            inside += -(-size // 8) * 8
        plan[name] = {"at": at, "bytes": inside, "arrays": table} | ({"copies": copies} if copies else {})
        at += 2 * _slot(inside) * max(1, copies)
    return plan, at


def _names(segment: str, copies: int) -> list[str]:
    """What its parts are called."""
    return [f"{segment}/{i}" for i in range(copies)] if copies else [segment]


def _slot(size: int) -> int:
    """Bytes from one slot of a segment to the next."""
    return -(-(_SEGMENT.size + size) // _ALIGN) * _ALIGN


class BoardWriter:
    """The writing end. Not thread-safe: one publisher owns it.

    ``identity`` is JSON-able and never changes; ``segments`` maps segment -> array name -> (dtype, shape), or a ring.
    Raises BoardError when the directory or the file cannot be had.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        identity: Mapping[str, Any],
        segments: Segments,
    ) -> None:
        if "/" in name or name.startswith(".") or not name:
            raise BoardError(f"{name!r} is not a board name")
        self.path = directory / f"{name}{SUFFIX}"
        plan, size = _plan(segments)
        text = json.dumps({"identity": dict(identity), "segments": plan}).encode()
        if len(text) > _MAX_JSON:
            raise BoardError(f"the board's description has {len(text)} bytes, more than {_MAX_JSON}")
        self._preamble = preamble = _PREAMBLE.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text
        start = -(-len(preamble) // _ALIGN) * _ALIGN
        self._segments: dict[str, tuple[int, bytearray, dict[str, Any]]] = {}
        for key, part in plan.items():
            buffer = bytearray(_SEGMENT.size + part["bytes"])  # of a ring: one for all
            for i, name_of_it in enumerate(_names(key, part.get("copies", 0))):
                at = start + part["at"] + i * 2 * _slot(part["bytes"])
                self._segments[name_of_it] = (at, buffer, part["arrays"])
        self._rings = {key for key, part in plan.items() if "copies" in part}
        self._sequence = dict.fromkeys(self._segments, 0)
        self._fd = -1
        self._directory = open_directory(directory, create=True)
        temporary = f".{name}.{os.getpid()}.tmp"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self._directory)
            self._fd = os.open(temporary, flags, 0o600, dir_fd=self._directory)
        except OSError as error:
            os.close(self._directory)
            raise BoardError(f"cannot create {str(self.path)!r}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._fd, 0, start + size)  # a full disk shows here, not in the middle of serving
            os.pwrite(self._fd, preamble, 0)
            for key in self._segments:
                self._write(key, {})
            os.rename(temporary, self.path.name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._directory)
            os.close(self._fd)
            os.close(self._directory)
            self._fd = -1
            raise BoardError(f"cannot write {str(self.path)!r}: {error.strerror}") from error
        _writers.add(self)

    def write(self, segment: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace the given arrays of a segment (others keep their last content; a ring's must be given all). Raises
        OSError, ValueError.
        """
        if segment.rpartition("/")[0] in self._rings and arrays.keys() != self._segments[segment][2].keys():
            raise ValueError(f"{segment} is written as a whole, got {sorted(arrays)}")
        self._write(segment, arrays)

    def _write(self, segment: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        offset, buffer, table = self._segments[segment]
        for name, value in arrays.items():
            spec = table[name]
            data = np.ascontiguousarray(value, dtype=spec["dtype"])
            if list(data.shape) != spec["shape"]:
                raise ValueError(f"{segment}.{name} has shape {spec['shape']}, got {list(data.shape)}")
            at = _SEGMENT.size + spec["at"]
            buffer[at : at + data.nbytes] = data.tobytes()
        self._sequence[segment] += 1
        stamp = (self._sequence[segment], time.time_ns(), time.monotonic_ns())
        _SEGMENT.pack_into(buffer, 0, *stamp, 0)
        _SEGMENT.pack_into(buffer, 0, *stamp, zlib.crc32(buffer))
        slot = self._sequence[segment] % 2 * _slot(len(buffer) - _SEGMENT.size)
        if os.pwrite(self._fd, buffer, offset + slot) != len(buffer):
            raise OSError(f"short write to {str(self.path)!r}")

    @property
    def in_place(self) -> bool:
        """Whether readers still find this board as it was made; somebody may have removed or overwritten it."""
        try:
            mine, there = os.fstat(self._fd), os.stat(self.path, follow_symlinks=False)
            if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
                return True  # a successor has the name now: no fighting over it
            return os.pread(self._fd, len(self._preamble), 0) == self._preamble
        except OSError:
            return False

    def abandon(self) -> None:
        """Let go of the file without removing it: a forked child has its parent's, lock and all."""
        if self._fd >= 0:
            os.close(self._fd)
            os.close(self._directory)
            self._fd = -1

    def close(self) -> None:
        """Remove the file and let go of the lock. Safe to call twice."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            mine = os.fstat(self._fd)
            there = os.stat(self.path.name, dir_fd=self._directory, follow_symlinks=False)
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                os.unlink(self.path.name, dir_fd=self._directory)
        self.abandon()


_writers: weakref.WeakSet[BoardWriter] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for writer in list(_writers):
        writer.abandon()


# A child would hold the lock on after its parent's death, and remove the parent's board when it ends.
os.register_at_fork(after_in_child=_leave_to_parent)


class BoardReader:
    """The reading end. Raises BoardError for anything that is not a whole board of this version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise BoardError(f"cannot open the board {str(path)!r}: {error.strerror}") from error
        try:
            self._read_description()
        except BaseException:
            os.close(self._fd)
            raise

    def _refuse(self, why: str) -> BoardError:
        return BoardError(f"{str(self.path)!r} is not a usable board: {why}")

    def _read_description(self) -> None:
        info = os.fstat(self._fd)
        if not stat.S_ISREG(info.st_mode):
            raise self._refuse("it is not a regular file")
        head = os.pread(self._fd, _PREAMBLE.size, 0)
        if len(head) < _PREAMBLE.size:
            raise self._refuse("it is too short")
        magic, version, length, crc = _PREAMBLE.unpack(head)
        if magic != MAGIC:
            raise self._refuse("it does not begin as a board does")
        if version != VERSION:
            raise self._refuse(f"it has version {version}, this moe-monitor reads version {VERSION}")
        text = os.pread(self._fd, min(length, _MAX_JSON), _PREAMBLE.size)
        if length > _MAX_JSON or len(text) < length:
            raise self._refuse("its description is cut short")
        if zlib.crc32(text) != crc:
            raise self._refuse("its description is damaged")
        try:
            description = json.loads(text)
            self.identity: dict[str, Any] = dict(description["identity"])
            self._start = -(-(_PREAMBLE.size + length) // _ALIGN) * _ALIGN
            self._plan = {
                str(name): (
                    _whole(part["at"], _MAX_SEGMENT),
                    _whole(part["bytes"], _MAX_SEGMENT),
                    {str(k): _array_spec(v, part["bytes"]) for k, v in part["arrays"].items()},
                    _whole(part.get("copies", 0), _MAX_COPIES),
                )
                for name, part in description["segments"].items()
            }
            end = max((at + 2 * _slot(size) * max(1, n) for at, size, _, n in self._plan.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._refuse("its description is damaged") from error
        if self._plan and info.st_size < self._start + end:
            raise self._refuse("it is too short")

    @property
    def alive(self) -> bool:
        """Whether the writer still holds its lock."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of segments, a ring's without the number."""
        return tuple(self._plan)

    def copies(self, segment: str) -> int:
        """How many a ring has; 0 for any other segment, also one that is not there."""
        return self._plan[segment][3] if segment in self._plan else 0

    def bytes_of(self, segment: str) -> int:
        """What a segment takes in the file, of a ring one of its segments."""
        return 2 * _slot(self._plan[segment][1])

    def read(self, segment: str) -> Record:
        """One consistent copy of a segment, of a ring ``name/number``. Raises BoardError if there is none, or none came
        within about 50 ms.

        Never older than what any reader of this board was given before. A slot is only believed to be the newest if
        the other one is whole too, or if it is the only whole one twice in a row: a read that is held up between its
        two slots could otherwise find an old slot, and the other one in the middle of the write after next.
        """
        ring, _, number = segment.rpartition("/")
        if number.isdecimal() and len(number) < 10 and int(number) < self.copies(ring):
            at, size, table, _ = self._plan[ring]
            at += 2 * _slot(size) * int(number)
        elif segment in self._plan and not self.copies(segment):
            at, size, table, _ = self._plan[segment]
        else:
            raise self._refuse(f"it has no segment {segment!r}")
        alone = -1
        for attempt in range(13):
            if attempt > 1:
                time.sleep(min(0.0001 * 2**attempt, 0.005))
            try:
                both = os.pread(self._fd, 2 * _slot(size), self._start + at)
            except OSError as error:
                raise self._refuse(f"reading failed: {error.strerror}") from error
            if len(both) < 2 * _slot(size):
                raise self._refuse("it is too short")
            whole = [slot for slot in (0, _slot(size)) if _is_whole(both, slot, size)]
            if not whole:
                continue
            newest = max(whole, key=lambda slot: _SEGMENT.unpack_from(both, slot))
            sequence, wall, monotonic, _ = _SEGMENT.unpack_from(both, newest)
            if len(whole) == 1 and alone != sequence:
                alone = sequence
                continue
            arrays = _arrays(bytearray(both), newest, table)  # whoever asked may write to them
            # The monotonic clock is one for all processes of a boot; the wall clock may jump.
            age = max(0.0, (time.monotonic_ns() - monotonic) / 1e9)
            return Record(arrays, sequence, wall / 1e9, age)
        raise self._refuse("it is damaged")

    def read_ring(self, ring: str, first: int, n: int) -> list[dict[str, NDArray[Any]] | None]:
        """``n`` segments of a ring from number ``first`` on, as they are now, with one look at the file. None: one that
        is not whole, at the moment or at all. Raises BoardError if there are no such segments.

        Unlike :meth:`read` this does not wait, and may give what was there before the last write: for readers who find
        in the segment itself which one it is.
        """
        if first < 0 or n < 0 or first + n > self.copies(ring):
            raise self._refuse(f"it has no segments {first} to {first + n - 1} of {ring!r}")
        at, size, table, _ = self._plan[ring]
        both = 2 * _slot(size)
        try:
            data = os.pread(self._fd, n * both, self._start + at + first * both)
        except OSError as error:
            raise self._refuse(f"reading failed: {error.strerror}") from error
        if len(data) < n * both:
            raise self._refuse("it is too short")
        found: list[dict[str, NDArray[Any]] | None] = []
        for begin in range(0, n * both, both):
            slots = sorted((begin, begin + _slot(size)), key=lambda slot: -_SEGMENT.unpack_from(data, slot)[0])
            whole = next((slot for slot in slots if _is_whole(data, slot, size)), None)
            found.append(None if whole is None else _arrays(data, whole, table))
        return found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> BoardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _arrays(data: bytes | bytearray, slot: int, table: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """What lies in a slot: views of ``data``."""
    return {
        name: np.frombuffer(data, dtype, count, slot + _SEGMENT.size + offset).reshape(shape)
        for name, (offset, dtype, count, shape) in table.items()
    }


def _is_whole(data: bytes, slot: int, size: int) -> bool:
    """Whether the slot that begins there is as it was written. Looked at in small parts: for more than 5 KiB zlib hands
    over Python's lock, and in a busy server it takes milliseconds to get that back.
    """
    sequence, wall, monotonic, crc = _SEGMENT.unpack_from(data, slot)
    found = zlib.crc32(_SEGMENT.pack(sequence, wall, monotonic, 0))
    payload = memoryview(data)[slot + _SEGMENT.size : slot + _SEGMENT.size + size]
    for part in range(0, size, _CRC_AT_ONCE):
        found = zlib.crc32(payload[part : part + _CRC_AT_ONCE], found)
    return bool(found == crc)


def _whole(value: Any, limit: int) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(value)
    return value


def _array_spec(spec: Any, size: int) -> tuple[int, np.dtype[Any], int, tuple[int, ...]]:
    if not _DTYPE.fullmatch(spec["dtype"]) or len(spec["shape"]) > 8:
        raise ValueError("an array that no board has")
    dtype = np.dtype(spec["dtype"])
    shape = tuple(_whole(n, _MAX_SEGMENT) for n in spec["shape"])
    count = math.prod(shape)
    at = _whole(spec["at"], _MAX_SEGMENT)
    # An empty array may still have dimensions that numpy cannot hold.
    if at + count * dtype.itemsize > size or math.prod(n or 1 for n in shape) > _MAX_SEGMENT:
        raise ValueError("array outside its segment")
    return at, dtype, count, shape


def board_paths(directory: Path) -> list[Path]:
    """Paths of all boards in the run directory, dead or alive. Raises BoardError as :func:`open_directory`."""
    fd = open_directory(directory, create=False)
    try:
        return [directory / name for name in sorted(os.listdir(fd)) if name.endswith(SUFFIX) and name[0] != "."]
    finally:
        os.close(fd)


def live_boards(directory: Path) -> Iterator[BoardReader]:
    """Readers of all boards whose writers live; what cannot be read is skipped. The caller closes them."""
    for path in board_paths(directory):
        try:
            reader = BoardReader(path)
        except BoardError:
            continue
        if reader.alive:
            yield reader
        else:
            reader.close()


def remove_dead_boards(directory: Path) -> int:
    """Delete boards whose writers are gone; returns how many. Never touches a board that cannot be told dead."""
    removed = 0
    for path in board_paths(directory):
        with contextlib.suppress(BoardError, OSError), BoardReader(path) as reader:
            if not reader.alive:
                path.unlink()
                removed += 1
    return removed
