"""The writing end of a board."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_monitor.board.directory import open_directory
from moe_monitor.board.form import (
    HEADER,
    MAGIC,
    MAX_JSON,
    PREAMBLE,
    SUFFIX,
    VERSION,
    BoardError,
    Segments,
    aligned,
    names_of,
    plan_of,
    slot_bytes,
)


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
        plan, size = plan_of(segments)
        text = json.dumps({"identity": dict(identity), "segments": plan}).encode()
        if len(text) > MAX_JSON:
            raise BoardError(f"the board's description has {len(text)} bytes, more than {MAX_JSON}")
        self._preamble = preamble = PREAMBLE.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text
        start = aligned(len(preamble))
        self._segments: dict[str, tuple[int, bytearray, dict[str, Any]]] = {}
        for key, part in plan.items():
            buffer = bytearray(HEADER.size + part["bytes"])  # of a ring: one for all
            for i, name_of_it in enumerate(names_of(key, part.get("copies", 0))):
                at = start + part["at"] + i * 2 * slot_bytes(part["bytes"])
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
            at = HEADER.size + spec["at"]
            buffer[at : at + data.nbytes] = data.tobytes()
        self._sequence[segment] += 1
        stamp = (self._sequence[segment], time.time_ns(), time.monotonic_ns())
        HEADER.pack_into(buffer, 0, *stamp, 0)
        HEADER.pack_into(buffer, 0, *stamp, zlib.crc32(buffer))
        slot = self._sequence[segment] % 2 * slot_bytes(len(buffer) - HEADER.size)
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
