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

from moe_monitor.board.directory import board_paths, live_boards, open_directory, remove_boards_of, remove_dead_boards
from moe_monitor.board.form import ArraySpec, BoardError, Ring
from moe_monitor.board.reader import BoardReader
from moe_monitor.board.writer import BoardWriter

__all__ = [
    "ArraySpec",
    "BoardError",
    "BoardReader",
    "BoardWriter",
    "Ring",
    "board_paths",
    "live_boards",
    "open_directory",
    "remove_boards_of",
    "remove_dead_boards",
]
