"""What is written in a board, byte by byte: what its two ends have in common."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MOEBOARD"
VERSION = 3
SUFFIX = ".board"

PREAMBLE = struct.Struct("<8sIII")
HEADER = struct.Struct("<QQQI4x")
MAX_JSON = 1 << 20
#: 128 layers of 65,536 experts take 64 MiB.
MAX_SEGMENT = 1 << 27
_ALIGN = 64
_DTYPE = re.compile(r"[<>|=]?(?:[iu][1248]|f[248]|S[1-9][0-9]{0,6})")

#: Bytes of a checksum without handing over Python's lock.
_CRC_AT_ONCE = 4096

#: Segments that one ring may have.
MAX_COPIES = 1 << 16

ArraySpec = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Ring:
    """So many segments of the same form. Each write gives all arrays of one."""

    copies: int
    arrays: Mapping[str, ArraySpec]


Segments = Mapping[str, Mapping[str, ArraySpec] | Ring]


class BoardError(Exception):
    """A board cannot be used; the message is one plain sentence."""


def plan_of(segments: Segments) -> tuple[dict[str, Any], int]:
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
        at += 2 * slot_bytes(inside) * max(1, copies)
    return plan, at


def names_of(segment: str, copies: int) -> list[str]:
    """What its parts are called."""
    return [f"{segment}/{i}" for i in range(copies)] if copies else [segment]


def aligned(size: int) -> int:
    """Where what follows so many bytes begins."""
    return -(-size // _ALIGN) * _ALIGN


def slot_bytes(size: int) -> int:
    """Bytes from one slot of a segment to the next."""
    return aligned(HEADER.size + size)


def arrays_in(data: bytes | bytearray, slot: int, table: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """What lies in a slot: views of ``data``."""
    return {
        name: np.frombuffer(data, dtype, count, slot + HEADER.size + offset).reshape(shape)
        for name, (offset, dtype, count, shape) in table.items()
    }


def is_whole(data: bytes, slot: int, size: int) -> bool:
    """Whether the slot that begins there is as it was written. Looked at in small parts: for more than 5 KiB zlib hands
    over Python's lock, and in a busy server it takes milliseconds to get that back.
    """
    sequence, wall, monotonic, crc = HEADER.unpack_from(data, slot)
    found = zlib.crc32(HEADER.pack(sequence, wall, monotonic, 0))
    payload = memoryview(data)[slot + HEADER.size : slot + HEADER.size + size]
    for part in range(0, size, _CRC_AT_ONCE):
        found = zlib.crc32(payload[part : part + _CRC_AT_ONCE], found)
    return bool(found == crc)


def whole_number(value: Any, limit: int) -> int:
    """One of a description, which anybody may have written. Raises ValueError."""
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(value)
    return value


def array_spec(spec: Any, size: int) -> tuple[int, np.dtype[Any], int, tuple[int, ...]]:
    """(offset, type, elements, shape) of an array in a segment of ``size`` bytes, as a description has it. Raises
    ValueError, TypeError, KeyError.
    """
    if not _DTYPE.fullmatch(spec["dtype"]) or len(spec["shape"]) > 8:
        raise ValueError("an array that no board has")
    dtype = np.dtype(spec["dtype"])
    shape = tuple(whole_number(n, MAX_SEGMENT) for n in spec["shape"])
    count = math.prod(shape)
    at = whole_number(spec["at"], MAX_SEGMENT)
    # An empty array may still have dimensions that numpy cannot hold.
    if at + count * dtype.itemsize > size or math.prod(n or 1 for n in shape) > MAX_SEGMENT:
        raise ValueError("array outside its segment")
    return at, dtype, count, shape
