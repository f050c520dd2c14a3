"""Scrapes at the same time: one rendering for all that wait, whole or not at all."""

from __future__ import annotations

import threading
import time
import weakref
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


def whole(renderings: Renderings, openmetrics: bool = False, asked: list[bool] | None = None) -> bytes:
    rendering = renderings.ask(openmetrics)
    if asked is not None:
        asked.append(openmetrics)
    return b"".join(part for fresh in rendering for part in fresh)


def soon(check: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not check() and time.monotonic() < end:
        time.sleep(0.005)
    return check()


def test_all_who_wait_share_the_rendering_after_the_one_under_way() -> None:
    slow = Slow()
    renderings = Renderings(slow)
    with ThreadPoolExecutor(20) as pool:
        first = pool.submit(whole, renderings)
        assert soon(lambda: slow.begun == [False])
        asked: list[bool] = []
        later = [pool.submit(whole, renderings, i % 2 == 1, asked) for i in range(18)]
        assert soon(lambda: len(asked) == 18)
        slow.go.set()
        assert first.result(5) == b"number 1 of text"
        got = {answer.result(5) for answer in later}
    first_format = b"OpenMetrics" if asked[0] else b"text"
    assert got == {b"number 2 of " + first_format, b"number 3 of " + (b"text" if asked[0] else b"OpenMetrics")}
    assert sorted(slow.begun) == [False, False, True]
    assert whole(renderings) == b"number 4 of text", "what is asked for anew is read anew"
    renderings.stop()
    assert soon(lambda: not renderings._thread.is_alive())


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


def test_who_waits_behind_one_that_gets_on_waits_longer(monkeypatch) -> None:
    monkeypatch.setattr("moe_monitor.export.renderings.PATIENCE", 0.3)

    def render(openmetrics: bool) -> Iterator[bytes]:
        for i in range(6):
            time.sleep(0.1)
            yield b"%d" % i

    renderings = Renderings(render)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(whole, renderings)
        assert soon(lambda: not renderings._waiting and renderings._thread is not None)
        second = pool.submit(whole, renderings)
        assert first.result(10) == second.result(10) == b"012345"
    renderings.stop()


def test_nothing_is_kept_and_nobody_waits_after_the_end() -> None:
    renderings = Renderings(lambda openmetrics: [b"x"])
    rendering = renderings.ask(False)
    assert list(rendering) == [[b"x"]]
    gone = weakref.ref(rendering)
    del rendering
    assert soon(lambda: gone() is None)
    renderings.stop()
    with pytest.raises(RenderingError, match="stopping"):
        renderings.ask(False)


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
