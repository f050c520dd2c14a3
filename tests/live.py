"""A live server under load: every answer is compared, and every routed token is known beforehand."""

from __future__ import annotations

import itertools
import random
import threading
import time
import urllib.error
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from oracle import Oracle
from serving import Server, eventually, only, parse, select

from moe_monitor.board import BoardError
from moe_monitor.export.collector import MoeCollector

TOKENS = 24
PROMPTS = [[random.Random(i).randrange(3, 300) for _ in range(n)] for i, n in enumerate((5, 60, 17, 130, 33, 8))]


class Live:
    """A server whose prefix cache is off: each answered request computes all of its tokens but the last, once."""

    def __init__(self, server: Server, oracle: Oracle) -> None:
        self.server, self.oracle = server, oracle
        self.answered: Counter[int] = Counter()
        self.known: dict[int, list[int]] = {}
        self._serial = itertools.count()
        self._lock = threading.Lock()

    def ask(self, which: int, name: str | None = None, **options: Any) -> list[int]:
        """One request, by default under a plain name in a header; any other name goes into its body."""
        options["id_in_body"] = name is not None
        name = f"{which}-{next(self._serial)}" if name is None else name
        (choice,) = self.server.complete(PROMPTS[which], name, max_tokens=TOKENS, **options)["choices"]
        with self._lock:
            self.answered[which] += 1
        return list(choice["token_ids"])

    def learn(self) -> None:
        """What the server answers while nothing is wrong."""
        self.known = {which: self.ask(which) for which in range(len(PROMPTS))}

    def load(self, seconds: float | None = None, workers: int = 3, pause: float = 0) -> Load:
        return Load(self, workers, seconds, pause)

    def expected(self) -> np.ndarray:
        """[layers, experts] of everything answered so far, from transformers."""
        counts = np.zeros((self.oracle.layers, self.oracle.experts), dtype=np.int64)
        for which, n in self.answered.items():
            routing = self.oracle.routing(PROMPTS[which] + self.known[which])
            counts += n * self.oracle.counts(routing.ids[:-1])
        return counts

    @property
    def tokens(self) -> int:
        return sum(n * (len(PROMPTS[which]) + TOKENS - 1) for which, n in self.answered.items())

    def check_exact(self, seconds: float = 5) -> None:
        """The server's own /metrics come to show exactly what was computed."""

        def settled() -> Any:
            samples = self.server.metrics()
            return set(select(samples, "moe_routed_tokens_total").values()) == {self.tokens} and samples

        samples = eventually(settled, seconds)
        assert only(samples, "moe_monitor_active") == 1
        difference = np.abs(matrix(samples, self.oracle) - self.expected()).sum()
        assert self.oracle.ties <= 2
        assert difference <= 2 * self.oracle.ties * max(self.answered.values())


def matrix(samples: Any, oracle: Oracle) -> np.ndarray:
    counts = np.zeros((oracle.layers, oracle.experts), dtype=np.int64)
    for labels, value in select(samples, "moe_expert_tokens_total").items():
        found = dict(labels)
        counts[int(found["layer"]), int(found["expert"])] += int(value)
    return counts


def sizes(pid: int) -> dict[str, int]:
    """Resident memory, threads and open files of a process."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
    return {
        "rss_kib": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
        "descriptors": len(list((proc / "fd").iterdir())),
    }


class Load:
    """Requests all the time while the block runs; at its end none has failed and no token is another than before.

    seconds: bounds it whatever happens in the block. pause: between requests, where others need the machine too.
    """

    def __init__(self, live: Live, workers: int, seconds: float | None, pause: float) -> None:
        self.live, self.end, self.pause = live, time.monotonic() + (seconds or 120), pause
        self.stopped = threading.Event()
        self.wrong: list[str] = []
        self.done = 0
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(workers)]

    def _run(self, start: int) -> None:
        for which in itertools.islice(itertools.cycle(range(len(PROMPTS))), start, None):
            if self.stopped.is_set() or time.monotonic() > self.end:
                return
            try:
                tokens = self.live.ask(which)
            except (OSError, ValueError) as error:
                if not self.stopped.is_set():
                    self.wrong.append(f"request failed: {error!r}")
                return
            if tokens != self.live.known[which]:
                self.wrong.append(f"prompt {which}: {tokens}")
            self.done += 1
            self.stopped.wait(self.pause)

    def progress(self, requests: int = 6) -> None:
        """Wait until so many more requests were answered."""
        goal = self.done + requests
        eventually(lambda: self.done >= goal or self.wrong, 60)

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        if kind is None:
            assert self.wrong == []
            assert self.done > 0


class Scrapes:
    """Scrapes one after the other while the block runs; each is parsed. Refused connections are counted apart.

    source: a server's /metrics, or a collector as the stand-alone exporter has it.
    """

    def __init__(self, source: Server | MoeCollector, pause: float = 0.02) -> None:
        self.source, self.pause = source, pause
        self.stopped = threading.Event()
        self.answers: list[Any] = []
        #: When each of them was asked for, on the monotonic clock.
        self.asked: list[float] = []
        self.refused = 0
        self.wrong: list[str] = []
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.stopped.wait(self.pause):
            asked = time.monotonic()
            try:
                if isinstance(self.source, Server):
                    text = self.source.get("/metrics")[0].decode()
                else:
                    text = self.source.render().decode()
                self.answers.append(parse(text))
                self.asked.append(asked)
            except urllib.error.HTTPError as error:
                self.wrong.append(f"{error!r}")
            except OSError:
                self.refused += 1
            except (ValueError, BoardError) as error:
                self.wrong.append(f"{error!r}")

    def __enter__(self) -> Scrapes:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        if kind is None:
            assert self.wrong == []
