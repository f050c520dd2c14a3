"""A hook that does not come back is interrupted, and nothing else is."""

import logging
import threading
import time

import pytest

from moe_monitor.capture import fuse as module
from moe_monitor.capture.fuse import Fuse


@pytest.fixture
def watched(monkeypatch):
    """A fuse whose hooks hang after 0.2 s, looked at every 10 ms as a publisher would."""
    monkeypatch.setattr(module, "HOOK_SECONDS", 0.2)
    fuse, stop = Fuse(logging.getLogger("test")), threading.Event()

    def look():
        while not stop.wait(0.01):
            fuse.interrupt_hung()

    thread = threading.Thread(target=look)
    thread.start()
    yield fuse
    stop.set()
    thread.join()


def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_an_endless_loop_in_a_hook_ends_and_blows_the_fuse(watched):
    started = time.monotonic()
    with watched.guard("record"):
        spin(60)
    assert time.monotonic() - started < 20
    assert watched.blown
    assert watched.status.errors == {"record": 1}
    assert "HookHung" in watched.status.reason


def test_code_outside_hooks_is_never_interrupted(watched):
    """Hooks that end just when they are found to hang: the exception arrives inside, or not at all."""
    for i in range(12):
        with watched.guard("record"):
            time.sleep(0.19 + 0.002 * i)  # in C: what is raised arrives when it returns
        spin(0.02)
    spin(0.5)


def test_start_up_may_take_its_time(watched):
    with watched.guard("record", serving=False):
        spin(0.5)
    assert not watched.blown
