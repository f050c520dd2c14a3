"""The stand-alone exporter over real sockets: what is served, in which format, and what happens when it cannot."""

import gzip
import http.client
import re
import shutil
import socket
import subprocess
import threading
import zlib

import pytest
from boards import FakeWorker
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.exporter import Exporter, ExporterError, accepts_gzip, wants_openmetrics
from moe_monitor.export.exposition import OPENMETRICS, TEXT, Exposition

#: What Prometheus 2.x and 3.x send.
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_TEXT_FIRST = "text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1"


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def serve(directory):
    started = []

    def start(host="127.0.0.1", port=0):
        exporter = Exporter(MoeCollector(directory, max_series=None), host, port)
        exporter.start()
        started.append(exporter)
        return exporter

    yield start
    for exporter in started:
        exporter.stop()


def get(exporter, path, method="GET", **headers):
    connection = http.client.HTTPConnection(exporter.server_name, exporter.server_port, timeout=10)
    try:
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def samples(families, name):
    return [s for family in families for s in family.samples if s.name == name]


def test_the_whole_matrix_in_prometheus_text(directory, serve):
    with FakeWorker(directory, layers=tuple(range(40)), experts=64) as worker:  # more than a server's own /metrics has
        answer, body = get(serve(), "/metrics")
        assert (answer.status, answer.headers["Content-Type"]) == (200, TEXT)
        assert answer.headers["Content-Encoding"] is None
        found = samples(parse_text(body.decode()), "moe_expert_tokens_total")
        experts = worker.rows[:, :64]
        assert {(int(s.labels["layer"]), int(s.labels["expert"])): s.value for s in found} == {
            (layer, expert): experts[layer, expert] for layer in range(40) for expert in range(64)
        }


def test_openmetrics_for_prometheus(directory, serve):
    with FakeWorker(directory, tokens=321):
        answer, body = get(serve(), "/metrics?x=1", Accept=PROMETHEUS_2)
        assert answer.headers["Content-Type"] == OPENMETRICS
        assert body.endswith(b"# EOF\n")
        found = samples(parse_openmetrics(body.decode()), "moe_routed_tokens_total")
        assert [s.value for s in found] == [321] * 4


def test_gzip_when_asked_for(directory, serve):
    with FakeWorker(directory):
        exporter = serve()
        answer, body = get(exporter, "/metrics", Accept_Encoding="deflate, gzip;q=0.5")
        assert answer.headers["Content-Encoding"] == "gzip"
        assert int(answer.headers["Content-Length"]) == len(body)
        _, clear = get(exporter, "/metrics", Accept_Encoding="gzip;q=0")
        # Equal but for how long ago the worker published.
        age = re.compile(rb"^(moe_monitor_snapshot_age_seconds\{.*\}) .*$", re.MULTILINE)
        assert age.sub(rb"\1", gzip.decompress(body)) == age.sub(rb"\1", clear)
        assert len(age.findall(clear)) == 1


def test_metrics_that_cannot_be_written_are_an_error_and_no_empty_answer(directory, serve, monkeypatch, caplog):
    with FakeWorker(directory):
        exporter = serve()
        plain = Exposition._plain

        def fail(self, family):
            if family.metric.name == "moe_expert_tokens_total":
                raise ValueError("a number that is none")
            return plain(self, family)

        monkeypatch.setattr(Exposition, "_plain", fail)
        for encoding in ("gzip", "identity"):
            answer, body = get(exporter, "/metrics", Accept_Encoding=encoding)
            assert (answer.status, body) == (500, b"the metrics could not be written, the log says why\n")
        assert "a number that is none" in caplog.text
        monkeypatch.undo()
        _, body = get(exporter, "/metrics")
        assert b"moe_expert_tokens_total{" in body
        assert b"moe_monitor_errors_total{" in body, "the failures are counted"


def test_a_large_answer_is_one_gzip_member(directory, serve):
    """Packed in parts; a client that reads one member must get all of it."""
    with FakeWorker(directory, layers=tuple(range(58)), experts=256):
        exporter = serve()
        _, packed = get(exporter, "/metrics", Accept_Encoding="gzip")
        reader = zlib.decompressobj(16 + zlib.MAX_WBITS)
        clear = reader.decompress(packed)
        assert reader.eof and not reader.unused_data
        assert len(clear) > 1 << 20
        assert samples(parse_text(clear.decode()), "moe_expert_tokens_total")[-1].labels["expert"] == "255"
        curl = [shutil.which("curl"), "--silent", "--compressed", exporter.url + "/metrics"]
        assert curl[0] is None or subprocess.run(curl, capture_output=True, check=True).stdout.count(
            b"\n"
        ) == clear.count(b"\n")


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=x", False),
        ("Application/OpenMetrics-Text; version=1.0.0", True),
        (PROMETHEUS_2, True),
        (PROMETHEUS_TEXT_FIRST, False),
    ],
)
def test_format_by_accept_header(accept, expected):
    assert wants_openmetrics(accept) is expected


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("", False), ("identity", False), ("gzip", True), ("br, GZIP", True), ("gzip;q=0", False), ("*", True)],
)
def test_compression_by_accept_encoding_header(encoding, expected):
    assert accepts_gzip(encoding) is expected


def test_page_lists_engines_and_escapes_their_names(directory, serve):
    with FakeWorker(directory, model_name="<script>alert(1)</script>"):
        answer, body = get(serve(), "/")
    assert answer.headers["Content-Type"].startswith("text/html")
    assert b"&lt;script&gt;alert(1)&lt;/script&gt;, engine 0: active" in body
    assert b"<script>" not in body
    assert b'href="metrics"' in body


def test_other_paths_and_methods(directory, serve):
    exporter = serve()
    answer, body = get(exporter, "/-/healthy")
    assert (answer.status, body) == (200, b"ok\n")
    answer, body = get(exporter, "/metrics/")
    assert answer.status == 404
    assert b"/metrics" in body
    with FakeWorker(directory):
        answer, body = get(exporter, "/metrics", "HEAD")
        assert (answer.status, body) == (200, b"")
        assert int(answer.headers["Content-Length"]) > 1000
    answer, _ = get(exporter, "/metrics", "POST")
    assert answer.status == 501
    assert "Python" not in answer.headers["Server"]


def test_without_servers_it_answers_and_is_empty(directory, serve):
    assert not directory.exists()
    answer, body = get(serve(), "/metrics")
    assert (answer.status, body) == (200, b"")


def test_one_connection_serves_several_scrapes(directory, serve):
    exporter = serve()
    connection = http.client.HTTPConnection(exporter.server_name, exporter.server_port, timeout=10)
    with FakeWorker(directory):
        lengths = []
        for _ in range(3):
            connection.request("GET", "/metrics")
            lengths.append(len(connection.getresponse().read()))
        socket_used = connection.sock
        assert min(lengths) > 1000
        assert socket_used is not None, "the server closed the connection"
    connection.close()


def test_rude_clients_do_not_disturb_others(directory, serve):
    exporter = serve()
    address = (exporter.server_name, exporter.server_port)
    with FakeWorker(directory):
        with socket.create_connection(address) as silent, socket.create_connection(address) as garbage:
            garbage.sendall(b"\x16\x03\x01\x02\x00 not http\r\n\r\n")
            for _ in range(5):
                with socket.create_connection(address) as hasty:
                    hasty.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            answer, body = get(exporter, "/metrics")
            assert silent.fileno() >= 0
        assert answer.status == 200
        assert b"moe_monitor_active" in body


def test_taken_port_is_said_plainly(serve):
    taken = serve().server_port
    with pytest.raises(ExporterError, match=f"cannot listen on 127.0.0.1:{taken}: another program listens there"):
        serve(port=taken)


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("no such host", 0, "not an address of this machine"),
        ("203.0.113.7", 0, "not an address of this machine"),  # TEST-NET-3: nobody has it
        ("127.0.0.1", 70000, "0 to 65535"),
    ],
)
def test_bad_address_is_said_plainly(serve, host, port, words):
    with pytest.raises(ExporterError, match=words):
        serve(host, port)


def test_stop_frees_the_port_and_may_be_repeated(serve):
    exporter = serve()
    port = exporter.server_port
    exporter.stop()
    exporter.stop()
    assert serve(port=port).server_port == port


def test_url_of_an_ipv6_address(serve):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        exporter = serve("::1")
    except ExporterError:
        pytest.skip("no IPv6 loopback here")
    assert exporter.url == f"http://[::1]:{exporter.server_port}"
    assert get(exporter, "/-/healthy")[1] == b"ok\n"


def test_servers_of_one_model_are_told_apart(directory):
    """Several servers of one model on a node are the common case; a series that came twice would be refused."""
    workers = [FakeWorker(directory, name=name, server=name) for name in ("one", "two")]
    samples = [
        (s.name, tuple(sorted(s.labels.items())))
        for family in parse_text(MoeCollector(directory).render().decode())
        for s in family.samples
    ]
    assert len(samples) == len(set(samples))
    assert {dict(labels)["server"] for _, labels in samples} == {"one", "two"}
    only_one = MoeCollector(directory, server="one").render().decode()
    assert "server=" not in only_one  # a server's own /metrics is its own instance to Prometheus
    assert only_one.count("moe_monitor_active{") == 1
    for worker in workers:
        worker.board.close()


@pytest.mark.parametrize("name", ["moe-monitor-windows", "moe-monitor-exporter"])
def test_where_no_thread_can_be_started_it_can_still_be_stopped(directory, monkeypatch, name):
    """As at a limit of processes: a server's process that is to end must not wait for what never ran."""
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    exporter = Exporter(MoeCollector(directory), "127.0.0.1", 0)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        exporter.start()
    monkeypatch.undo()
    stopping = threading.Thread(target=exporter.stop, daemon=True)
    stopping.start()
    stopping.join(10)
    assert not stopping.is_alive()
