"""Faults in real servers under load: none costs a request, and no token changes.

One server lives through nearly all of them, one after the other; a second one is started beside it, loses its API
server, is started again, and loses its engine. The order of the tests is that of their lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import promtool
import pytest
from live import PROMPTS, Live, Scrapes, matrix, sizes
from oracle import Oracle
from serving import Server, eventually, free_port, only, parse, select

from moe_monitor.board import BoardReader, board_paths
from moe_monitor.capture.vllm.frontend import SCRAPE_SECONDS
from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.exporter import Exporter

pytestmark = pytest.mark.vllm

ARGUMENTS = ["--enforce-eager", "--max-model-len", "512", "--no-enable-prefix-caching", "--max-num-seqs", "16"]


class House:
    """A run directory, a small disk of its own where that is possible, and the servers in it."""

    def __init__(self, tmp: Path, model: Path) -> None:
        self.tmp, self.model, self.oracle = tmp, model, Oracle(model)
        self.disk = tmp / "disk"
        self.disk.mkdir()
        # Root may mount one; elsewhere the test that fills it is skipped.
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", str(self.disk)]
        try:
            self.small = subprocess.run(mount, capture_output=True).returncode == 0
        except OSError:
            self.small = False
        self.run_dir = self.disk / "run"
        self.servers: list[Server] = []
        #: What is started and lost beside the first server.
        self.second: Live | None = None
        #: Sizes of the first server's processes, early in its life.
        self.sizes: dict[int, dict[str, int]] = {}

    def start(self, name: str, *arguments: str) -> Server:
        faults = ",".join(f"{where}:{self.plant(where, name)}" for where in ("record", "publish", "collect"))
        env = {
            "MOE_TEST_FAULT": faults,
            "MOE_TEST_CLOCK": str(self.plant("clock", name)),
            "MOE_TEST_STARTED": str(self.tmp / f"{name}.pids"),
            # The two servers share this machine's cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }
        self.servers.append(Server(self.model, self.tmp / f"{name}.log", self.run_dir, *ARGUMENTS, *arguments, **env))
        return self.servers[-1]

    def plant(self, what: str, name: str) -> Path:
        return self.tmp / f"{name}.{what}"

    def boards(self, pid: int | None = None) -> list[Path]:
        """Boards of workers, of all servers or of the one whose API server has this pid."""
        found = board_paths(self.run_dir) if self.run_dir.exists() else []
        return [p for p in found if ".frontend." not in p.name and (pid is None or p.name.startswith(f"{pid}-"))]

    def worker(self, server: Server) -> int:
        (path,) = self.boards(server.process.pid)
        with BoardReader(path) as reader:
            return int(reader.identity["pid"])

    def close(self) -> None:
        for server in self.servers:
            server.stop()
        if self.small:
            subprocess.run(["umount", "-l", str(self.disk)], check=False)


@pytest.fixture(scope="module")
def house(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("faults"), tiny_model)
    yield made
    made.close()


@pytest.fixture(scope="module")
def first(house: House) -> Live:
    """The server that lives through everything."""
    collector = MoeCollector(house.run_dir)
    server = house.start("first")
    with Scrapes(collector) as scrapes:  # a scrape during attach
        live = Live(server.wait(), house.oracle)
    shown = [only(s, "moe_monitor_active") for s in scrapes.answers if s]
    assert shown and set(shown) <= {0, 1} and shown == sorted(shown)
    assert all(not any(select(s, "moe_routed_tokens_total").values()) for s in scrapes.answers)
    live.learn()
    live.check_exact()
    return live


@contextlib.contextmanager
def planted(path: Path, text: str) -> Iterator[None]:
    path.write_text(text)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def group(leader: int) -> list[int]:
    """Processes of a server that still run. One whose threads all are zombies does not: it has let go of its files."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                group_id = entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[2]
                if int(group_id) == leader and any(runs(task) for task in entry.joinpath("task").iterdir()):
                    found.append(int(entry.name))
    return found


def runs(task: Path) -> bool:
    """Whether a thread is there and no zombie."""
    try:
        return task.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_wall_clock_jumps(house: House, first: Live) -> None:
    """A day ahead, two days back: counters go on, ages and windows stay what they are."""
    clock = house.plant("clock", "first")
    with first.load() as load, Scrapes(first.server) as scrapes:
        for offset in ("86400", "-86400", "0"):
            clock.write_text(offset)
            load.progress()
            time.sleep(1)
            since = time.monotonic()
            eventually(lambda since=since: any(asked > since for asked in scrapes.asked), 30)
    assert len(scrapes.answers) >= 3
    for samples in scrapes.answers:
        assert only(samples, "moe_monitor_active") == 1
        assert only(samples, "moe_monitor_snapshot_age_seconds") < 10
        assert len(select(samples, "moe_load_imbalance_ratio", window="5m")) == 4
    totals = [only(s, "moe_routed_tokens_total", layer="0") for s in scrapes.answers]
    assert totals == sorted(totals)
    first.check_exact()
    house.sizes = {pid: sizes(pid) for pid in group(first.server.process.pid)}


def cut(path: Path) -> None:
    os.truncate(path, 100)


def overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def other_version(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\x63")


def forbid(path: Path) -> None:
    path.chmod(0o400)
    path.parent.chmod(0o500)


DAMAGE = {
    "removed": Path.unlink,
    "directory removed": lambda path: shutil.rmtree(path.parent.rename(path.parent.with_name("gone"))),  # at once
    "truncated": cut,
    "overwritten": overwrite,
    "other version": other_version,
    "read-only": forbid,
}


def test_damaged_boards_under_load(house: House, first: Live) -> None:
    """Never a wrong number in between: either what was counted, or nothing."""
    message = "was removed or damaged, made anew"
    said = first.server.log.count(message)
    with first.load() as load, Scrapes(first.server) as scrapes:
        for name, damage in DAMAGE.items():
            (path,) = house.boards(first.server.process.pid)
            damage(path)
            load.progress(3)
            eventually(lambda: select(first.server.metrics(), "moe_routed_tokens_total"), 5)
            if name == "read-only":
                path.parent.chmod(0o700)
    shown = [t for s in scrapes.answers for t in select(s, "moe_routed_tokens_total", layer="0").values()]
    assert shown == sorted(shown) and shown[-1] <= first.tokens
    for samples in scrapes.answers:
        there = bool(select(samples, "moe_routed_tokens_total"))
        assert only(samples, "moe_monitor_active") == int(there)
    assert first.server.log.count(message) == said + 5  # read-only is no damage
    first.check_exact()


def fill(path: Path) -> None:
    """Until the disk is full and stays so: removed boards give their room back when the last reader lets go of them."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    size, full_since = -1, time.monotonic()
    while time.monotonic() - full_since < 3:
        with contextlib.suppress(OSError):
            while True:
                os.write(fd, b"\0" * 4096)
        if os.fstat(fd).st_size != size:
            size, full_since = os.fstat(fd).st_size, time.monotonic()
        time.sleep(0.1)
    os.close(fd)


def test_the_disk_is_full_when_a_board_must_be_made_anew(house: House, first: Live) -> None:
    if not house.small:
        pytest.skip("no disk can be mounted here")
    filler, held = house.disk / "filler", house.disk / "held"
    with first.load() as load:
        (path,) = house.boards(first.server.process.pid)
        message = "nothing is shown until it can be made"
        try:
            fill(filler)
            held.hardlink_to(path)  # or the removed board's own room would be free for the new one
            path.unlink()
            eventually(lambda: message in first.server.log, 10)
            load.progress()
            samples = first.server.metrics()
            assert only(samples, "moe_monitor_active") == 0
            assert not select(samples, "moe_routed_tokens_total")
        finally:  # or all that comes after finds a full disk
            filler.unlink(missing_ok=True)
            held.unlink(missing_ok=True)
        eventually(lambda: only(first.server.metrics(), "moe_monitor_active"), 5)
    assert first.server.log.count(message) == 1
    first.check_exact()


def test_a_hang_in_the_publishers_thread_and_in_the_reader(house: House, first: Live) -> None:
    """Serving goes on; after 15 seconds the numbers count as stale; nothing is lost once the hang ends."""
    publish, collect = house.plant("publish", "first"), house.plant("collect", "first")
    with first.load() as load:
        with planted(publish, "hang"):
            began = time.monotonic()
            load.progress()
            with planted(collect, "hang"):
                waits = []
                for _ in range(3):
                    start = time.monotonic()
                    samples = first.server.metrics()
                    waits.append(time.monotonic() - start)
                    assert select(samples, "vllm:num_requests_running")
                    assert not select(samples, "moe_monitor_active")
            assert waits[0] > 4.9  # it waited for ours
            assert max(waits[1:]) < 4  # and knows now that it hangs
            samples = eventually(lambda: says(s := first.server.metrics(), 0) and s, 30)
            assert time.monotonic() - began >= 14  # the last record was up to half a second old
            assert only(samples, "moe_monitor_snapshot_age_seconds") >= 15
            load.progress()
        eventually(lambda: says(first.server.metrics(), 1), 5)
    assert first.server.log.count("missing from answers of /metrics") == 1
    first.check_exact()


def says(samples: Any, active: int) -> bool:
    """Whether the monitor says that it is active, or that it is not."""
    return set(select(samples, "moe_monitor_active").values()) == {active}


def test_200_scrapes_at_once(first: Live) -> None:
    ready = threading.Barrier(200)

    def scrape(_: int) -> tuple[float, Any]:
        ready.wait()
        started = time.monotonic()
        text = first.server.get("/metrics")[0].decode()
        return time.monotonic() - started, text

    with first.load() as load, ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(scrape, range(200)))
        load.progress()
    slowest = max(seconds for seconds, _ in answers)
    print(f"the slowest of 200 scrapes at once took {slowest:.1f} s")
    assert slowest < 30
    # Those that wait share a rendering. What has not come after so long is left out as a whole.
    there = ["moe_monitor_active{" in text for _, text in answers]
    assert all(found for found, (seconds, _) in zip(there, answers, strict=True) if seconds < SCRAPE_SECONDS)
    assert sum(there) >= 100
    assert not any("\nmoe_" in text for found, (_, text) in zip(there, answers, strict=True) if not found)
    whole = [parse(text) for found, (_, text) in zip(there, answers, strict=True) if found][::10]
    assert all(says(s, 1) and len(select(s, "moe_expert_tokens_total")) == 256 for s in whole)
    first.check_exact()


HOSTILE = [
    "plain",
    'quote"and\\backslash',
    "{model_name=\"x\"} 1 # {a='b'}",
    "%s%n%p{0.__class__}$HOME`id`",
    "../../../etc/passwd",
    "日本語のリクエスト",
    "עברית\u202eevil",
    "\U0001f999" * 200,
    "x" * 100_000,
    "a\nmoe_evil 1\rb\0c\x1b[31m\x7f",
]


def test_hostile_ids_and_arguments(house: House, first: Live) -> None:
    """What clients may choose: ids in the body, extra arguments. They end up as text, cut, or not at all."""
    before = {p.relative_to(house.tmp) for p in house.tmp.rglob("*") if ".board" not in p.name}
    arguments: list[Any] = [
        {"moe_trace": 1, "\n# TYPE evil counter\nevil 1\n": "\r\n\t\x00\x1b[31m"},
        {"moe_trace": 1, "k" * 100_000: "v" * 100_000},
        {"moe_trace": "1\nmoe_evil 1"},
        {"moe_trace": "%s%s%s"},
        {"moe_trace": [1.0, 2.0]},
        {"moe_trace": "nan"},
        {"moe_trace": "日本語"},
        {"moe_trace": -1e308},
    ]
    with first.load() as load:
        for name in HOSTILE:
            assert first.ask(1, name, vllm_xargs={"moe_trace": 1}) == first.known[1]
        for extra in arguments:
            assert first.ask(2, vllm_xargs=extra) == first.known[2]
        load.progress(2)
    samples = first.server.metrics()
    assert only(samples, "moe_monitor_sampled_requests_total") >= len(HOSTILE)
    collector = MoeCollector(house.run_dir)
    exporter = Exporter(collector, "127.0.0.1", 0)

    def missing() -> list[str]:
        # The engine adds a prefix and a random suffix of its own; a long id ends in a hash instead.
        starts = [f"cmpl-{name}"[:100].encode("utf-8", "replace").decode() for name in HOSTILE]
        traced = {request["id"] for request in json.loads(exporter.requests("limit=1000"))}
        return [start for start in starts if not any(t.startswith(start) and len(t) <= 200 for t in traced)]

    eventually(lambda: missing() == [], 15)  # workers gather what they hand over
    exporter.stop()
    assert not [key for key in samples if "evil" in str(key)]
    after = {p.relative_to(house.tmp) for p in house.tmp.rglob("*") if ".board" not in p.name}
    assert after == before
    first.check_exact()


def server_name(house: House, live: Live) -> str:
    """What the exporter's label ``server`` says."""
    return house.boards(live.server.process.pid)[0].name.split(".")[0]


#: What the second server calls its model.
ODD_NAME = 'odd "model"\\ {le="1"} %s %n 模型\n# TYPE moe_evil counter\nmoe_evil 1 # ../../x'


class Prometheus:
    """A real one that scrapes the given addresses every second."""

    def __init__(self, folder: Path, *targets: str) -> None:
        folder.mkdir()
        self.port = free_port()
        jobs = [{"job_name": "servers", "scrape_interval": "1s", "static_configs": [{"targets": list(targets)}]}]
        (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": jobs}))
        command = [promtool.tool("prometheus"), f"--config.file={folder}/prometheus.yml"]
        command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{self.port}"]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        url = f"http://127.0.0.1:{self.port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                result = json.load(answer)["data"]["result"]
        except OSError:  # it is starting
            return []
        return [(r["metric"], float(r["value"][1])) for r in result]

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)


def test_two_servers_share_a_machine(house: House, first: Live) -> None:
    """Both under load, both exact; an exporter tells them apart, and scrapes of it during attach are whole."""
    server = house.start("second", "--served-model-name", ODD_NAME, "tiny")
    with first.load(pause=0.3), Scrapes(MoeCollector(house.run_dir), pause=0.1) as scrapes:
        live = Live(server.wait(), house.oracle)
        live.learn()
        assert live.known == first.known
        with live.load() as load:
            load.progress(12)
    house.second = live
    live.check_exact()
    first.check_exact()
    assert len(scrapes.answers) >= 3
    together = parse(MoeCollector(house.run_dir).render().decode())
    for one in (live, first):
        mine = {k: v for k, v in together.items() if ("server", server_name(house, one)) in k[1]}
        assert (matrix(mine, house.oracle) == matrix(one.server.metrics(), house.oracle)).all()
        assert only(mine, "moe_routed_tokens_total", layer="0") == one.tokens
    # vLLM on CPUs spawns its engine and worker whatever is asked for: interpreters of their own, which load the plugin.
    for name, one in (("first", first), ("second", live)):
        assert str(house.worker(one.server)) in (house.tmp / f"{name}.pids").read_text().split()


def test_a_hostile_model_name_in_a_real_prometheus(house: House, first: Live) -> None:
    """From the servers' own /metrics and from the exporter; nothing in the name becomes a series or a label."""
    second = house.second
    assert second is not None
    exporter = Exporter(MoeCollector(house.run_dir), "127.0.0.1", 0)
    exporter.start()
    addresses = [f"127.0.0.1:{port}" for port in (second.server.port, exporter.server_port)]
    try:
        with first.load(), Prometheus(house.tmp / "prometheus", *addresses) as prometheus:
            query = f'moe_routed_tokens_total{{layer="0",model_name={json.dumps(ODD_NAME, ensure_ascii=False)}}}'
            found = eventually(lambda: len(f := prometheus.ask(query)) == 2 and f, 30)
            assert {(labels["instance"], value) for labels, value in found} == {(a, second.tokens) for a in addresses}
            # (a scrape that takes longer than the second between two, on a machine that stands still, leaves a gap)
            eventually(lambda: [value for _, value in prometheus.ask("up")] == [1, 1], 30)
            names = lambda: {labels["model_name"] for labels, _ in prometheus.ask("moe_monitor_active")}  # noqa: E731
            shown = eventually(lambda: len(found := names()) > 1 and found, 30)
            assert shown == {ODD_NAME, "tiny"}
            assert prometheus.ask("moe_evil") == []
    finally:
        exporter.stop()


def test_an_api_server_is_killed_and_started_again(house: House, first: Live) -> None:
    """What is left of the killed one is not shown; the new one begins at zero; the other server notices nothing."""
    second = house.second
    assert second is not None
    collector = MoeCollector(house.run_dir)
    pid, name = second.server.process.pid, server_name(house, second)
    with first.load(pause=0.3):
        os.kill(pid, signal.SIGKILL)
        second.server.process.wait(10)
        # vLLM's own behaviour (0.32): the engine goes on without anybody to talk to. It lives, so it is shown, idle.
        mine = {k: v for k, v in parse(collector.render().decode()).items() if ("server", name) in k[1]}
        assert only(mine, "moe_routed_tokens_total", layer="0") == second.tokens
        # Then the rest of its container is killed too.
        os.killpg(pid, signal.SIGKILL)
        eventually(lambda: not group(pid), 10)
        shown = {dict(k[1])["server"] for k in parse(collector.render().decode())}
        assert shown == {server_name(house, first)}
        again = Live(house.start("again").wait(), house.oracle)
        assert house.boards(pid) == []
        assert set(select(again.server.metrics(), "moe_routed_tokens_total").values()) == {0}
        again.learn()
        assert again.known == first.known
        again.check_exact()
    house.second = again


def test_a_worker_is_killed(house: House, first: Live) -> None:
    """vLLM ends the server. While it does, and afterwards, no stale number is shown and no board is left."""
    second = house.second
    assert second is not None
    pid = second.server.process.pid
    with first.load(), Scrapes(second.server) as scrapes:
        worker = house.worker(second.server)
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: worker not in group(pid), 30)  # a large process takes its time
        gone = time.monotonic()
        second.server.process.wait(60)
    later = [s for s, asked in zip(scrapes.answers, scrapes.asked, strict=True) if asked > gone]
    print(f"{len(scrapes.answers)} scrapes, {len(later)} of them after the worker had gone")
    for samples in later:
        assert only(samples, "moe_monitor_active") == 0
        assert not select(samples, "moe_routed_tokens_total")
    assert house.boards(pid) == []
    eventually(lambda: group(pid) == [], 5)  # helpers end when they see that the leader has
    assert "EngineDeadError" in second.server.log or "died" in second.server.log
    first.check_exact()


def test_processes_stay_as_large_as_they_were(house: House, first: Live) -> None:
    """The short form of `benchmarks/soak.py`: what was done above is done once more, and nothing has grown.

    Not at the first time: libraries start threads when they first need them (ZeroMQ for large messages, AnyIO for many
    requests at once).
    """
    pids = group(first.server.process.pid)
    before = {pid: sizes(pid) for pid in pids}
    assert set(house.sizes) == set(pids)
    test_damaged_boards_under_load(house, first)
    test_200_scrapes_at_once(first)
    test_hostile_ids_and_arguments(house, first)

    def small(what: str, more: int) -> bool:
        first.server.metrics()  # AnyIO ends its idle threads when it has something to do
        return all(sizes(pid)[what] <= before[pid][what] + more for pid in pids)

    eventually(lambda: small("threads", 0), 30)
    eventually(lambda: small("descriptors", 2), 30)
    for pid in pids:
        now = sizes(pid)
        print(f"process {pid}: {house.sizes[pid]}, then {before[pid]}, now {now}")
        assert now["rss_kib"] <= house.sizes[pid]["rss_kib"] + (64 << 10)
    assert group(first.server.process.pid) == pids


def test_a_hook_on_the_serving_path_hangs(house: House, first: Live) -> None:
    """It holds up the requests of its step for as long as a hook may take, once; then the monitor is off."""
    with planted(house.plant("record", "first"), "hang"), first.load() as load:
        eventually(lambda: says(first.server.metrics(), 0), 30)
        load.progress()
        samples = first.server.metrics()
    assert only(samples, "moe_monitor_errors_total", where="record") == 1
    assert first.server.log.count("moe-monitor switched itself off") == 1
    assert "HookHung" in first.server.log
    assert [first.ask(which) for which in range(len(PROMPTS))] == list(first.known.values())


def test_sigterm_leaves_nothing(house: House, first: Live) -> None:
    """Scraped to the last moment: every answer is whole. Then no process, no thread, no board."""
    pid = first.server.process.pid
    assert house.boards(pid)
    collector = MoeCollector(house.run_dir)
    with Scrapes(first.server) as scrapes, Scrapes(collector) as beside:
        time.sleep(0.5)
        started = time.monotonic()
        first.server.process.terminate()
        first.server.process.wait(30)
        print(f"the server ended {time.monotonic() - started:.1f} s after SIGTERM")
    assert scrapes.answers and beside.answers
    assert eventually(lambda: not group(pid), 5)
    assert house.boards() == []
    assert [p.name for p in house.run_dir.iterdir()] == []
    assert collector.render() == b""
