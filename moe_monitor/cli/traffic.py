"""The demo's requests: text of three kinds, of different lengths, a few at a time; bounded in number and time."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from dataclasses import dataclass

#: Most requests of one run, whatever its duration.
MOST_REQUESTS = 20_000
WORKERS = 3

#: Seconds of each phase of the traffic, and the share of its main kind.
PHASE_SECONDS = 12.0
MAIN_SHARE = 0.85

_WORDS = (  # noqa: SIM905  (a list literal of these would take a page)
    "the a of and to in is that it was for on are with as his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if will each about how up out them then she many some these "
    "would other into has more her two like him see time could no make than first been its who now people my made "
    "over did down only way find use may water long little very after words called just where most know"
).split()
_CODE = (
    "for (int i = 0; i < n; ++i) {",
    "    x[i] += f(y[i], z->w);",
    "}",
    "if (!(a && b) || c != d) { return; }",
    "@property",
    "def f(*args, **kw): -> {};",
    '{"k": [1, {"v": "[]"}], "s": "<=>"}',
    "$(cat ./a/b | grep -v '^#' >> /dev/null)",
    "template <T, U> (T&&, U*) -> {};",
    "#include <x.h> /* ... */",
)

KINDS = ("prose", "code", "numbers")


@dataclass
class Tally:
    """How the requests went. ``error``: the last one's, in words."""

    sent: int = 0
    failed: int = 0
    error: str = ""


def prompt(kind: str, rng: random.Random) -> str:
    """A text of 20 to 240 characters of one of :data:`KINDS`."""
    length = rng.randint(20, 240)
    text = ""
    while len(text) < length:
        if kind == "prose":
            text += rng.choice(_WORDS) + " "
        elif kind == "code":
            text += rng.choice(_CODE) + "\n"
        else:
            text += str(rng.randint(0, 10 ** rng.randint(1, 9))) + rng.choice((" ", " ", "."))
    return text[:length]


class Traffic:
    """Sends completions to a server from a few threads until stopped. ``seconds``: None for no limit but the count."""

    def __init__(self, host: str, port: int, model: str, seconds: float | None, seed: int = 0) -> None:
        self.host, self.port, self.model = host, port, model
        self.tally = Tally()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._end = self._started + seconds if seconds is not None else float("inf")
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(seed + i),), daemon=True)  # noqa: S311  (text, not secrets)
            for i in range(WORKERS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No new requests; returns when those under way have been answered, or after 10 s."""
        self._stop.set()
        deadline = time.monotonic() + 10
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    @property
    def kind(self) -> str:
        """Main kind of the text being sent now."""
        return KINDS[int((time.monotonic() - self._started) / PHASE_SECONDS) % len(KINDS)]

    def _work(self, rng: random.Random) -> None:
        while not self._stop.is_set() and time.monotonic() < self._end:
            with self._lock:
                if self.tally.sent >= MOST_REQUESTS:
                    return
                self.tally.sent += 1
            kind = self.kind if rng.random() < MAIN_SHARE else rng.choice(KINDS)
            error = self._send(prompt(kind, rng), rng.randint(8, 64))
            if error:
                with self._lock:
                    self.tally.failed += 1
                    self.tally.error = error
                self._stop.wait(0.5)  # a server in trouble is not hammered
            self._stop.wait(rng.random() * 0.1)

    def _send(self, text: str, tokens: int) -> str:
        """Send one completion; returns what went wrong, or nothing."""
        body = {"model": self.model, "prompt": text, "max_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            return repr(error)
        finally:
            connection.close()
        return "" if answer.status == 200 else f"HTTP {answer.status}: {content[:200].decode(errors='replace')}"
