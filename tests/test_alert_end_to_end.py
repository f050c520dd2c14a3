"""A planted fault, from the board to a receiver: real exporter, Prometheus with the shipped rules, Alertmanager.

Only times are shortened: rules are evaluated every second, rates and ``for`` are seconds instead of minutes.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import promtool
import published
import pytest
import queries
import yaml
from boards import FakeWorker
from serving import eventually, free_port

from moe_monitor.cli.main import main

ROOT = Path(__file__).resolve().parent.parent

#: What only traced requests bring; nothing is traced here.
TRACED = re.compile(r"moe_request_|moe_monitor_sampled_requests_total")


def shortened(source: Path, target: Path) -> None:
    """The shipped rules with seconds for minutes."""
    data = yaml.safe_load(source.read_text())
    for group in data["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            rule["expr"] = (
                rule["expr"].replace("[5m]", "[8s]").replace("[10m]", "[30s]").replace("offset 10m", "offset 30s")
            )
            if "for" in rule:
                rule["for"] = "3s"
    target.write_text(yaml.safe_dump(data))


class Receiver(ThreadingHTTPServer):
    """Keeps the alerts that Alertmanager sends it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.alerts: list[dict] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.alerts += [a for a in body["alerts"] if a["status"] == "firing"]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass


class Processes:
    def __init__(self, folder):
        self.folder, self.started = folder, []

    def start(self, name, command, **options):
        log = (self.folder / f"{name}.log").open("w")
        process = subprocess.Popen(command, stdout=log, stderr=log, **options)
        self.started.append((process, log))
        return process

    def stop(self):
        for process, _ in self.started:
            process.send_signal(signal.SIGTERM)
        for process, log in self.started:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


def answers(url):
    try:
        get(url)
    except (OSError, urllib.error.HTTPError):
        return False
    return True


@pytest.fixture
def processes(tmp_path):
    made = Processes(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def receiver():
    made = Receiver()
    yield made
    made.shutdown()
    made.server_close()


class Prometheus:
    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def query(self, expr, at=None):
        parameters = {"query": expr} | ({"time": at} if at else {})
        data = json.loads(get(f"{self.url}/api/v1/query?{urllib.parse.urlencode(parameters)}"))
        assert data["status"] == "success"
        return data["data"]["result"]

    def value(self, expr):
        found = self.query(expr)
        return float(found[0]["value"][1]) if found else None

    def firing(self):
        return {s["metric"]["alertname"] for s in self.query('ALERTS{alertstate="firing"}')}


def configure(folder, exporter, alertmanager, receiver):
    for path in promtool.RULES:
        shortened(path, folder / path.name)
    scrape = {"job_name": "moe-monitor", "static_configs": [{"targets": [exporter]}]}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [path.name for path in promtool.RULES],
        "scrape_configs": [scrape],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    hook = {"url": f"http://127.0.0.1:{receiver.server_address[1]}/", "send_resolved": True}
    routes = {
        "route": {"receiver": "hook", "group_by": ["alertname"], "group_wait": "0s", "group_interval": "1s"},
        "receivers": [{"name": "hook", "webhook_configs": [hook]}],
    }
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(routes))


@pytest.mark.slow
def test_a_broken_router_reaches_the_receiver(tmp_path, processes, receiver, capsys):
    run, normal = tmp_path / "run", tmp_path / "normal.json"
    ports = {name: free_port() for name in ("exporter", "prometheus", "alertmanager", "cluster")}
    addresses = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    # Two expert-parallel ranks of one engine: the second counts nothing, as ranks that would repeat another's do.
    halves = [{"rank": r, "experts": list(range(r * 32, r * 32 + 32))} for r in range(2)]
    second = FakeWorker(run, "rank-1", model_name="olmoe", layers=(), ep=halves[1])
    with second, published.Traffic(run, "c4", ep=halves[0]) as traffic:
        keep = threading.Event()
        beat = threading.Thread(target=lambda: [second.status(second.now) for _ in iter(lambda: keep.wait(0.5), True)])
        beat.start()
        try:
            record = ["baseline", "record", str(normal), "--dir", str(run), "--window", "0.5", "--duration", "3"]
            assert main(record) == 0
            capsys.readouterr()
            configure(tmp_path, addresses["exporter"], addresses["alertmanager"], receiver)
            clean = {k: v for k, v in os.environ.items() if not k.startswith("MOE_MONITOR_")}
            exporter = [sys.executable, "-m", "moe_monitor.cli.main", "export", "--dir", str(run)]
            exporter += ["--port", str(ports["exporter"])]
            processes.start("exporter", exporter, env=clean | {"MOE_MONITOR_BASELINE": str(normal)}, cwd=ROOT)
            alertmanager = [promtool.tool("prometheus-alertmanager"), f"--config.file={tmp_path / 'alertmanager.yml'}"]
            alertmanager += [f"--storage.path={tmp_path / 'am'}", f"--web.listen-address={addresses['alertmanager']}"]
            processes.start("alertmanager", [*alertmanager, "--cluster.listen-address="])
            prometheus = [promtool.tool("prometheus"), f"--config.file={tmp_path / 'prometheus.yml'}"]
            prometheus += [
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address={addresses['prometheus']}",
            ]
            processes.start("prometheus", prometheus, cwd=tmp_path)
            server = Prometheus(ports["prometheus"])
            for name in ("prometheus", "alertmanager"):
                eventually(lambda name=name: answers(f"http://{addresses[name]}/-/ready"), 30)

            # Healthy: the limits are there, and nothing fires for longer than any `for`.
            eventually(lambda: server.value("engine:moe_routing_drift:excess5m") is not None, 30)
            eventually(lambda: server.value("engine:moe_router_entropy:min5m") is not None, 30)
            end = time.monotonic() + 8
            while time.monotonic() < end:
                assert server.firing() == set()
                time.sleep(1)
            assert server.value("engine:moe_routing_drift:excess5m") < 1

            planted = time.monotonic()
            traffic.p, traffic.entropy, traffic.mass = published.collapsed(traffic.p), 0.05, 0.99
            traffic.worker.now.errors["publish"] = 1
            traffic.worker.now.dropped["request"] = 3

            def received():
                return {a["labels"]["alertname"]: a for a in receiver.alerts}

            eventually(lambda: {"MoeRouterCollapse", "MoeRoutingDrift"} <= set(received()), 60)
            print(f"{time.monotonic() - planted:.1f} s from the fault to the receiver")
            alert = received()["MoeRouterCollapse"]
            assert alert["labels"] | {"model_name": "olmoe", "severity": "critical"} == alert["labels"]
            assert "The router of olmoe engine 0 on 127.0.0.1" in alert["annotations"]["summary"]
            assert re.search(r"In 3 of its layers .* Worst: layer \d+: 0\.\d\d;", alert["annotations"]["description"])
            assert alert["annotations"]["runbook_url"].endswith("MoeRouterCollapse.md")
            assert "MoeExpertSilent" not in received()

            eventually(lambda: server.value("moe_monitor_dropped_total") is not None, 10)
            check_panels(server)
            check_preview(server, tmp_path / "previews")
        finally:
            keep.set()
            beat.join()


def check_panels(server):
    """Every query of every panel and rule has data and takes less than 200 ms."""
    fill = {"job": "moe-monitor", "model": ".*", "instance": ".*", "engine": ".*", "layer": "7"}
    fill["server"] = server.query("moe_monitor_active")[0]["metric"]["instance"]
    expressions = {rule["record"]: rule["expr"] for rule in queries.rules() if "record" in rule}
    for _, panel in queries.panels():
        expressions |= {f"{panel['title']} {t['refId']}": t["expr"] for t in panel.get("targets", [])}
    slow, empty = {}, []
    for title, expr in expressions.items():
        if TRACED.search(expr):
            continue
        for name, value in fill.items():
            expr = expr.replace(f"${name}", value)  # noqa: PLW2901
        began = time.perf_counter()
        # Rates over five minutes have data here too: two samples are enough for them.
        found = server.query(expr)
        took = time.perf_counter() - began
        if took > 0.2:
            slow[title] = took
        if not found:
            empty.append(title)
    print(f"{len(expressions)} queries")
    assert slow == {}
    assert empty == []


def check_preview(server, out):
    """The preview tool draws from these answers."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "grafana" / "preview.py"), "--url", server.url, "--out", str(out)]
    command += ["--dashboard", "moe-monitor-overview", "--dashboard", "moe-monitor-layers", "--hours", "0.02"]
    done = subprocess.run([*command, "--var", "layer=7"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("every panel has data") == 2, done.stdout
    for name in ("overview", "layers"):
        assert (out / f"moe-monitor-{name}.png").read_bytes().startswith(b"\x89PNG")
