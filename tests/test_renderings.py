"""Scrapes at the same time: one rendering for all that wait, whole or not at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_monitor.export.renderings import RenderingError, Renderings


class Slow:
    """Renders slowly enough for others to come meanwhile; says how often, and in which formats."""

    def __init__(self) -> None:
        self.begun: list[bool] = []
        self.go = threading.Event()

    def __call__(self, openmetrics: bool) -> Iterator[bytes]:
        self.begun.append(openmetrics)
        yield b"number %d of " % len(self.begun)
        self.go.wait(10)
        yield b"OpenMetrics" if openmetrics else b"text"


def whole(renderings: Renderings, openmetrics: bool = False) -> bytes:
    return b"".join(part for fresh in renderings.ask(openmetrics) for part in fresh)


def within_a_second(check: Callable[[], bool]) -> bool:
    end = time.monotonic() + 1
    while not check() and time.monotonic() < end:
        time.sleep(0.005)
    return check()


def test_all_who_wait_share_the_rendering_after_the_one_under_way() -> None:
    slow = Slow()
    renderings = Renderings(slow)
    with ThreadPoolExecutor(20) as pool:
        first = pool.submit(whole, renderings)
        assert within_a_second(lambda: slow.begun == [False])
        later = [pool.submit(whole, renderings, i % 2 == 1) for i in range(18)]
        assert within_a_second(lambda: len(renderings._waiting) == 2)
        time.sleep(0.1)  # all 18 have asked
        slow.go.set()
        assert first.result(5) == b"number 1 of text"
        got = {answer.result(5) for answer in later}
    assert got == {b"number 2 of text", b"number 3 of OpenMetrics"}
    assert slow.begun == [False, False, True]
    assert whole(renderings) == b"number 4 of text", "what is asked for anew is read anew"
    renderings.stop()
    assert within_a_second(lambda: not renderings._thread.is_alive())


def test_what_is_there_can_be_read_before_the_rest() -> None:
    slow = Slow()
    renderings = Renderings(slow)
    pieces = iter(renderings.ask(False))
    assert next(pieces) == [b"number 1 of "]
    slow.go.set()
    assert list(pieces) == [[b"text"]]
    renderings.stop()


def test_a_reader_does_not_wait_without_end(monkeypatch) -> None:
    monkeypatch.setattr("moe_monitor.export.renderings.PATIENCE", 0.1)
    slow = Slow()
    renderings = Renderings(slow)
    with pytest.raises(RenderingError, match=r"nothing came for 0\.1 s"):
        whole(renderings)
    slow.go.set()
    renderings.stop()


def test_a_failure_reaches_all_readers_and_the_next_rendering_is_whole() -> None:
    broken = True

    def render(openmetrics: bool) -> Iterator[bytes]:
        yield b"begin "
        if broken:
            raise ValueError("no such number")
        yield b"end"

    renderings = Renderings(render)
    rendering = renderings.ask(False)
    for _ in range(2):
        with pytest.raises(RenderingError) as failed:
            list(rendering)
        assert str(failed.value.__cause__) == "no such number"
    broken = False
    assert whole(renderings) == b"begin end"
    renderings.stop()
