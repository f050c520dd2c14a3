"""The reading end of a board."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from moe_monitor.board.form import (
    HEADER,
    MAGIC,
    MAX_COPIES,
    MAX_JSON,
    MAX_SEGMENT,
    PREAMBLE,
    VERSION,
    BoardError,
    aligned,
    array_spec,
    arrays_in,
    is_whole,
    slot_bytes,
    whole_number,
)


@dataclass(frozen=True)
class Record:
    """One consistent read of a segment. ``written`` is seconds since the epoch, ``sequence`` 0 before the first."""

    arrays: dict[str, NDArray[Any]]
    sequence: int
    written: float
    age: float


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
        head = os.pread(self._fd, PREAMBLE.size, 0)
        if len(head) < PREAMBLE.size:
            raise self._refuse("it is too short")
        magic, version, length, crc = PREAMBLE.unpack(head)
        if magic != MAGIC:
            raise self._refuse("it does not begin as a board does")
        if version != VERSION:
            raise self._refuse(f"it has version {version}, this moe-monitor reads version {VERSION}")
        text = os.pread(self._fd, min(length, MAX_JSON), PREAMBLE.size)
        if length > MAX_JSON or len(text) < length:
            raise self._refuse("its description is cut short")
        if zlib.crc32(text) != crc:
            raise self._refuse("its description is damaged")
        try:
            description = json.loads(text)
            self.identity: dict[str, Any] = dict(description["identity"])
            self._start = aligned(PREAMBLE.size + length)
            self._plan = {
                str(name): (
                    whole_number(part["at"], MAX_SEGMENT),
                    whole_number(part["bytes"], MAX_SEGMENT),
                    {str(k): array_spec(v, part["bytes"]) for k, v in part["arrays"].items()},
                    whole_number(part.get("copies", 0), MAX_COPIES),
                )
                for name, part in description["segments"].items()
            }
            end = max((at + 2 * slot_bytes(size) * max(1, n) for at, size, _, n in self._plan.values()), default=0)
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
        return 2 * slot_bytes(self._plan[segment][1])

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
            at += 2 * slot_bytes(size) * int(number)
        elif segment in self._plan and not self.copies(segment):
            at, size, table, _ = self._plan[segment]
        else:
            raise self._refuse(f"it has no segment {segment!r}")
        alone = -1
        for attempt in range(13):
            if attempt > 1:
                time.sleep(min(0.0001 * 2**attempt, 0.005))
            try:
                both = os.pread(self._fd, 2 * slot_bytes(size), self._start + at)
            except OSError as error:
                raise self._refuse(f"reading failed: {error.strerror}") from error
            if len(both) < 2 * slot_bytes(size):
                raise self._refuse("it is too short")
            whole = [slot for slot in (0, slot_bytes(size)) if is_whole(both, slot, size)]
            if not whole:
                continue
            newest = max(whole, key=lambda slot: HEADER.unpack_from(both, slot))
            sequence, wall, monotonic, _ = HEADER.unpack_from(both, newest)
            if len(whole) == 1 and alone != sequence:
                alone = sequence
                continue
            arrays = arrays_in(bytearray(both), newest, table)  # whoever asked may write to them
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
        both = 2 * slot_bytes(size)
        try:
            data = os.pread(self._fd, n * both, self._start + at + first * both)
        except OSError as error:
            raise self._refuse(f"reading failed: {error.strerror}") from error
        if len(data) < n * both:
            raise self._refuse("it is too short")
        found: list[dict[str, NDArray[Any]] | None] = []
        for begin in range(0, n * both, both):
            slots = sorted((begin, begin + slot_bytes(size)), key=lambda slot: -HEADER.unpack_from(data, slot)[0])
            whole = next((slot for slot in slots if is_whole(data, slot, size)), None)
            found.append(None if whole is None else arrays_in(data, whole, table))
        return found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> BoardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
