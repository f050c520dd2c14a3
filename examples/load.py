"""A small load generator for an OpenAI-compatible server: bounded in requests and in time, standard library only.

    python examples/load.py --url http://localhost:8000 --requests 200 --concurrency 8 --seconds 60

Prints how many requests succeeded, tokens per second and the latencies; exits with 1 if any request failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

PROMPTS = (
    "The history of the lighthouse begins",
    "def quicksort(items):\n    if len(items) < 2:\n        return items\n",
    "1 1 2 3 5 8 13 21 34",
    "Question: why is the sky blue?\nAnswer:",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "Es war einmal ein Müller, der hatte",
)


class Load:
    """Shared by the threads: what is left to send, and how it went."""

    def __init__(self, arguments: argparse.Namespace, model: str) -> None:
        self.url = arguments.url.rstrip("/")
        self.model = model
        self.max_tokens = arguments.max_tokens
        self.left = arguments.requests
        self.end = time.monotonic() + arguments.seconds
        self.lock = threading.Lock()
        self.latencies: list[float] = []
        self.tokens = 0
        self.errors: list[str] = []

    def work(self, seed: int) -> None:
        rng = random.Random(seed)  # noqa: S311  (a choice of texts, nothing secret)
        while time.monotonic() < self.end:
            with self.lock:
                if self.left <= 0 or len(self.errors) >= 10:
                    return
                self.left -= 1
            prompt = rng.choice(PROMPTS) * rng.randint(1, 6)
            body = {"model": self.model, "prompt": prompt, "max_tokens": rng.randint(1, self.max_tokens)}
            started = time.monotonic()
            try:
                usage = call(f"{self.url}/v1/completions", body)["usage"]
            except (OSError, ValueError, KeyError) as error:
                with self.lock:
                    self.errors.append(str(error))
                continue
            with self.lock:
                self.latencies.append(time.monotonic() - started)
                self.tokens += usage["total_tokens"]


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    """GET, or POST of a JSON body; the parsed answer. Raises OSError or ValueError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000", help="the server (default: %(default)s)")
    parser.add_argument("--model", help="default: the first one that the server names")
    parser.add_argument("--requests", type=int, default=200, help="most requests (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="most seconds (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128, help="most new tokens each (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.url.startswith(("http://", "https://")):
        parser.error("--url begins with http:// or https://")
    try:
        model = arguments.model or call(f"{arguments.url.rstrip('/')}/v1/models")["data"][0]["id"]
    except (OSError, ValueError, LookupError) as error:
        print(f"no server answers at {arguments.url}: {error}", file=sys.stderr)
        return 1
    load = Load(arguments, model)
    started = time.monotonic()
    threads = [threading.Thread(target=load.work, args=(i,), daemon=True) for i in range(arguments.concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic() - started
    print(f"{len(load.latencies)} requests to {model} in {elapsed:.1f} s, {load.tokens / elapsed:,.0f} tokens/s")
    if load.latencies:
        ordered = sorted(load.latencies)
        print(f"latency: median {ordered[len(ordered) // 2]:.2f} s, slowest {ordered[-1]:.2f} s")
    if load.errors:
        print(f"{len(load.errors)} failed, the last one with: {load.errors[-1]}", file=sys.stderr)
    return 1 if load.errors or not load.latencies else 0


if __name__ == "__main__":
    sys.exit(main())
