"""The run directory, in which boards lie: made and opened safely, looked through, swept."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from moe_monitor.board.form import SUFFIX, BoardError
from moe_monitor.board.reader import BoardReader


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


def remove_boards_of(server: str, directory: Path) -> None:
    """Remove the boards of a server whose processes are being killed, before they could do it themselves. Waits up to
    two seconds for that.
    """
    for _ in range(20):
        try:
            remove_dead_boards(directory)
            if not any(path.name.startswith(f"{server}.") for path in board_paths(directory)):
                return
        except BoardError:
            return
        time.sleep(0.1)


def remove_dead_boards(directory: Path) -> int:
    """Delete boards whose writers are gone; returns how many. Never touches a board that cannot be told dead."""
    removed = 0
    for path in board_paths(directory):
        with contextlib.suppress(BoardError, OSError), BoardReader(path) as reader:
            if not reader.alive:
                path.unlink()
                removed += 1
    return removed
