"""Servers without a Python front end, by stand-ins for the two classes of vLLM's that start them."""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from boards import FakeWorker
from serving import eventually, only, parse, select

from moe_monitor.capture.vllm import beside
from moe_monitor.capture.vllm.plugin import SERVER_VARIABLE

CONFIG = SimpleNamespace(model_config=SimpleNamespace(served_model_name=["tiny-olmoe", "alias"]))


class Vllm:
    """Fresh stand-ins, patched."""

    def __init__(self) -> None:
        class RustFrontendProcessManager:
            def __init__(self, binary_path: str, *, args: Any) -> None:
                if binary_path == "missing":
                    raise FileNotFoundError(binary_path)
                self.started = binary_path, args

        class CoreEngineProcManager:
            def __init__(
                self, local_engine_count: int, start_index: int, vllm_config: Any, local_client: bool, more: int = 0
            ) -> None:
                self.started = local_engine_count, start_index, vllm_config, local_client, more

        class MultiprocExecutor:
            def __init__(self, vllm_config: Any, monitor_workers: bool = True) -> None:
                self.started = vllm_config, monitor_workers

        self.rust, self.engines, self.workers = RustFrontendProcessManager, CoreEngineProcManager, MultiprocExecutor
        for _ in range(2):  # vLLM may load plug-ins more than once
            beside.patch_utils(SimpleNamespace(RustFrontendProcessManager=self.rust))  # type: ignore[arg-type]
            beside.patch_engines(SimpleNamespace(CoreEngineProcManager=self.engines))  # type: ignore[arg-type]
            beside.patch_workers(SimpleNamespace(MultiprocExecutor=self.workers))  # type: ignore[arg-type]


@pytest.fixture
def at_exit(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], Any]]]:
    """What this process would do at its end, done at the end of the test, in that order."""
    registered: list[Callable[[], Any]] = []
    monkeypatch.setattr(atexit, "register", lambda what, *args: registered.append(lambda: what(*args)))
    yield registered
    for what in reversed(registered):
        what()


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_exit: list[Any], caplog: pytest.LogCaptureFixture) -> Vllm:
    monkeypatch.setattr(beside, "_done", False)
    monkeypatch.setattr(beside, "_expected", ())
    monkeypatch.setenv("MOE_MONITOR_DIR", str(tmp_path / "run"))
    monkeypatch.setenv(SERVER_VARIABLE, "server-1")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # as long as vLLM has not set up its own
    caplog.set_level(logging.INFO)
    return Vllm()


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address whose port is free, and the one after it."""
    while True:
        with socket.socket() as free, socket.socket() as after:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            try:
                after.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
        address = f"127.0.0.1:{port}"
        monkeypatch.setenv("MOE_MONITOR_LISTEN", address)
        return address


def scrape(address: str) -> Any:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return parse(answer.read().decode())


def refused(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


def test_behind_the_rust_front_end_an_exporter_listens(vllm: Vllm, listen: str, tmp_path: Path, caplog: Any) -> None:
    run = tmp_path / "run"
    with FakeWorker(run, "server-1.0", server="server-1"), FakeWorker(run, "other.0", server="other", engine="9"):
        assert vllm.engines(2, 4, CONFIG, local_client=True, more=7).started == (2, 4, CONFIG, True, 7)
        assert refused(listen), "a front end of Python's would follow"
        assert vllm.rust("vllm-rs", args=1).started == ("vllm-rs", 1)
        samples = scrape(listen)
    assert f"its metrics are at http://{listen}/metrics" in caplog.text
    found = {dict(labels)["engine"]: value for labels, value in select(samples, "moe_monitor_active").items()}
    assert found == {"0": 1, "4": 0, "5": 0}, "one that runs, two without a board yet, not another's"
    vllm.rust("vllm-rs", args=2)
    assert "listens there" not in caplog.text, "one exporter is enough"


def test_on_a_headless_node_an_exporter_listens(vllm: Vllm, listen: str, caplog: Any) -> None:
    vllm.engines(1, 1, CONFIG, local_client=False)
    assert only(scrape(listen), "moe_monitor_active", model_name="tiny-olmoe", engine="1") == 0
    assert "a headless node has no /metrics" in caplog.text


def test_on_a_node_with_workers_alone_an_exporter_listens(vllm: Vllm, listen: str, caplog: Any) -> None:
    assert vllm.workers(CONFIG).started == (CONFIG, True)
    assert refused(listen), "an engine's own workers"
    assert vllm.workers(CONFIG, monitor_workers=False).started == (CONFIG, False)
    scrape(listen)
    assert "a headless node has no /metrics" in caplog.text


def test_servers_of_a_supervisor_listen_one_beside_the_other(
    vllm: Vllm, listen: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _, port = listen.rpartition(":")
    current = multiprocessing.current_process()
    name = current.name
    try:
        for rank in (0, 1):
            current.name = f"APIServer_DPRank_{rank}"
            monkeypatch.setattr(beside, "_done", False)
            vllm.rust("vllm-rs", args=1)
            scrape(f"{host}:{int(port) + rank}")
    finally:
        current.name = name
    assert "cannot listen" not in caplog.text


def test_nothing_outlives_the_process(vllm: Vllm, listen: str, at_exit: list[Any], tmp_path: Path) -> None:
    worker = FakeWorker(tmp_path / "run", "server-1.0", server="server-1")
    vllm.rust("vllm-rs", args=1)
    assert not refused(listen)
    worker.board.abandon()  # killed
    assert len(list((tmp_path / "run").glob("*.board"))) == 1
    while at_exit:
        at_exit.pop()()
    assert refused(listen)
    assert list((tmp_path / "run").glob("*.board")) == []


def test_without_an_address_the_log_says_where_the_metrics_are(vllm: Vllm, tmp_path: Path, caplog: Any) -> None:
    vllm.rust("vllm-rs", args=1)
    vllm.rust("vllm-rs", args=1)
    (record,) = [r for r in caplog.records if r.name == "vllm.moe_monitor"]
    assert record.levelno == logging.WARNING
    for words in (
        "Rust front end answers /metrics",
        "MOE_MONITOR_LISTEN",
        "`moe-monitor export`",
        str(tmp_path / "run"),
    ):
        assert words in record.message


def test_a_server_is_started_whatever_fails_here(
    vllm: Vllm, listen: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(listen.split(":")[1])))
        other.listen()
        assert vllm.rust("vllm-rs", args=1).started
    assert "another program listens there" in caplog.text
    assert "MOE_MONITOR_LISTEN" in caplog.text

    monkeypatch.setattr(beside, "_done", False)
    monkeypatch.setattr("moe_monitor.export.exporter.Exporter.start", lambda _: 1 / 0)
    assert vllm.rust("vllm-rs", args=1).started
    assert "ZeroDivisionError" in caplog.text

    assert vllm.engines(1, 0, None, local_client=False).started  # no configuration
    assert "AttributeError" in caplog.text

    caplog.clear()
    monkeypatch.setattr(beside, "_done", False)
    monkeypatch.setenv("MOE_MONITOR_LISTEN", "nonsense")
    assert vllm.rust("vllm-rs", args=1).started
    assert caplog.text == "", "the worker says so"


def test_a_front_end_that_cannot_start_fails_as_ever(vllm: Vllm, listen: str) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        vllm.rust("missing", args=1)
    assert refused(listen)


def test_versions_of_another_form_are_left_alone() -> None:
    class Other:
        def __init__(self, count: int) -> None: ...

    original = Other.__init__
    with pytest.raises(TypeError, match="CoreEngineProcManager takes self, count"):
        beside.patch_engines(SimpleNamespace(CoreEngineProcManager=Other))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="does not take monitor_workers"):
        beside.patch_workers(SimpleNamespace(MultiprocExecutor=Other))  # type: ignore[arg-type]
    assert Other.__init__ is original


def test_requests_are_told_of_without_latencies(vllm: Vllm, listen: str, tmp_path: Path) -> None:
    from test_requests import Worker, tally

    with Worker(tmp_path / "run") as worker:
        vllm.rust("vllm-rs", args=1)
        worker.writer.write([tally("a"), tally("b")])

        def told() -> Any:
            samples = scrape(listen)
            counts = select(samples, "moe_request_concentration_ratio_count")
            return samples if sum(counts.values()) == 2 else None

        samples = eventually(told, 10)
        with Worker(tmp_path / "run", server="another", name="another.0") as other:
            other.writer.write([tally("secret")])
            with urllib.request.urlopen(f"http://{listen}/requests", timeout=10) as answer:
                assert {request["id"] for request in json.load(answer)} == {"a", "b"}, "this server's"
    assert sum(select(samples, "moe_request_e2e_seconds_count").values()) == 0
