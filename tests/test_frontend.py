"""What the API server's /metrics becomes: vLLM's answer with ours behind it, whatever ours does."""

from __future__ import annotations

import asyncio
import gc
import gzip
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from boards import FakeWorker
from stretches import Stretches

from moe_monitor.capture.vllm import frontend
from moe_monitor.export.collector import MoeCollector

OWN = b"# TYPE vllm:x gauge\nvllm:x 1.0\n"


def app(status: int = 200, content_type: bytes = b"text/plain", body: bytes = OWN) -> Any:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        headers += [(b"seen-encoding", v) for k, v in scope["headers"] if k == b"accept-encoding"]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer


def get(inner: Any, collector: Any, path: str = "/metrics", **headers: str) -> tuple[int, dict[bytes, bytes], bytes]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": path.partition("?")[0], "headers": []}
    scope["query_string"] = path.partition("?")[2].encode()
    scope["headers"] = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    asyncio.run(frontend.MetricsMiddleware(inner, collector)(scope, receive, send))
    body = b"".join(m.get("body", b"") for m in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


@pytest.fixture
def collector(tmp_path: Path) -> Callable[[], MoeCollector]:
    FakeWorker(tmp_path / "run", server="s")
    return MoeCollector(tmp_path / "run", server="s")


def test_ours_follows_and_the_length_is_right(collector: MoeCollector) -> None:
    status, headers, body = get(app(), collector)
    assert status == 200
    assert body.startswith(OWN)
    assert b"\nmoe_monitor_active{" in body
    assert int(headers[b"content-length"]) == len(body)


def test_compressed_when_asked_for_and_then_whole(collector: MoeCollector) -> None:
    _, headers, body = get(app(), collector, accept_encoding="gzip")
    assert headers[b"content-encoding"] == b"gzip"
    assert b"seen-encoding" not in headers  # the inner answer must come plain
    assert gzip.decompress(body).startswith(OWN)


def test_openmetrics_ends_once(collector: MoeCollector) -> None:
    inner = app(content_type=b"application/openmetrics-text; version=1.0.0", body=OWN + b"# EOF\n")
    _, _, body = get(inner, collector)
    assert body.count(b"# EOF\n") == 1
    assert body.endswith(b"# EOF\n")


def test_a_selection_of_names_is_kept(collector: MoeCollector) -> None:
    _, _, body = get(app(body=b""), collector, path="/metrics?name[]=moe_monitor_active")
    assert {line.split(b"{")[0] for line in body.splitlines() if not line.startswith(b"#")} == {b"moe_monitor_active"}


def test_other_answers_pass_untouched(collector: MoeCollector) -> None:
    assert get(app(status=503), collector)[2] == OWN
    assert get(app(), collector, path="/v1/models")[2] == OWN


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_our_failure_costs_vllms_metrics_nothing(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(frontend, "SCRAPE_SECONDS", 0.2)

    class Broken:
        def render(self, **_: Any) -> bytes:
            if how == "raises":
                raise OSError("planted")
            time.sleep(1)
            return b""

    with caplog.at_level(logging.WARNING):
        status, headers, body = get(app(), Broken(), accept_encoding="gzip")
    assert (status, body) == (200, OWN)
    assert b"content-encoding" not in headers
    assert int(headers[b"content-length"]) == len(OWN)
    assert "missing from answers of /metrics" in caplog.text


def test_while_one_scrape_hangs_others_do_not_wait_and_then_all_is_well_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "SCRAPE_SECONDS", 0.3)
    released = threading.Event()

    async def scrapes() -> list[tuple[str, float]]:
        worker, took = frontend.Worker("test"), []

        async def scrape(work: Callable[[], bytes]) -> None:
            started = time.monotonic()
            try:
                answer = (await asyncio.wait_for(worker.submit(work), frontend.SCRAPE_SECONDS)).decode()
            except TimeoutError:
                answer = "timeout"
            took.append((answer, time.monotonic() - started))

        await scrape(lambda: b"ours")
        await scrape(lambda: b"%d" % released.wait(30))
        for _ in range(3):
            await scrape(lambda: b"behind it")
        released.set()
        await asyncio.sleep(0.2)
        await scrape(lambda: b"ours")
        return took

    took = asyncio.run(scrapes())
    assert [answer for answer, _ in took] == ["ours", "timeout", "timeout", "timeout", "timeout", "ours"]
    assert took[1][1] >= 0.3
    assert all(seconds < 0.2 for _, seconds in took[2:5])


def test_a_scrape_that_hangs_does_not_keep_the_process_from_ending() -> None:
    script = (
        "import asyncio, time; from moe_monitor.capture.vllm.frontend import Worker\n"
        "async def main():\n"
        "    Worker('w').submit(lambda: time.sleep(600)); await asyncio.sleep(0.2)\n"
        "asyncio.run(main())"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_scrapes_that_wait_together_share_one_rendering(collector: MoeCollector, monkeypatch) -> None:
    """And none gets what was read before it asked."""
    rendered: list[tuple[bool, Any]] = []
    begun, go = threading.Event(), threading.Event()
    real = MoeCollector.render

    def render(self: Any, *, openmetrics: bool = False, names: Any = None) -> bytes:
        rendered.append((openmetrics, names))
        begun.set()
        assert go.wait(10)
        return real(self, openmetrics=openmetrics, names=names)

    monkeypatch.setattr(MoeCollector, "render", render)
    middleware = frontend.MetricsMiddleware(app(), collector)
    waiting = middleware._work._queue

    async def scrape(query: bytes = b"") -> bytes:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/metrics", "headers": [], "query_string": query}
        await middleware(scope, None, send)
        return bytes(sent[1]["body"])

    async def storm() -> list[bytes]:
        first = asyncio.create_task(scrape())
        while not begun.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.01)
        later = [asyncio.create_task(scrape(query)) for query in [b""] * 8 + [b"name[]=moe_monitor_active"]]
        while waiting.qsize() < 9:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        go.set()
        return await asyncio.gather(first, *later)

    bodies = asyncio.run(storm())
    assert rendered == [(False, None), (False, None), (False, ["moe_monitor_active"])]
    assert all(body.startswith(OWN) for body in bodies)
    assert all(b"moe_expert_tokens_total" in body for body in bodies[:9])
    assert b"moe_expert_tokens_total" not in bodies[9]
    assert b"moe_monitor_active" in bodies[9]
    end = time.monotonic() + 5
    while middleware._last and time.monotonic() < end:
        time.sleep(0.01)
    assert middleware._last == {}, "megabytes are kept only while somebody waits"


def test_no_stretch_of_a_large_scrape_keeps_the_event_loop_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """58 layers x 256 experts x 8 engines take 25 ms and more; Python's lock is offered to others much oftener.

    In processor time of the scraping thread, so that a busy machine does not matter.
    """
    stretches = Stretches()
    monkeypatch.setattr("moe_monitor.export.collector.let_others", stretches.pause)
    large: dict[str, Any] = {"layers": tuple(range(58)), "experts": 256, "tokens": 200, "server": "s", "traced": True}
    workers = [FakeWorker(tmp_path / "run", name=f"s.{i}.0", engine=str(i), **large) for i in range(8)]
    collector = MoeCollector(tmp_path / "run", server="s", max_series=2048, gentle=True)
    collector.render()  # makes the text of names and labels
    gc.freeze()  # as vLLM does when it has started: a collection of all that other tests left here takes longer
    try:
        stretches.begin()
        collector.render()
        stretches.end()
    finally:
        gc.unfreeze()
    assert max(stretches.found) < 0.010
    for worker in workers:
        worker.board.close()
