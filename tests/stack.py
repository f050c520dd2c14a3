"""A real Prometheus with the shipped rules, a real Alertmanager, and a receiver of what it sends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import promtool
import yaml
from serving import eventually, free_port

JOB = "moe-monitor"
_DURATION = re.compile(r"(\[|offset )(\d+)([mh])\b")


def hastened(source: Path, target: Path) -> None:
    """The shipped rules with a second for every minute, and nothing else changed."""

    def seconds(text: str) -> str:
        return f"{int(text[:-1]) * (60 if text[-1] == 'h' else 1)}s"

    data = yaml.safe_load(source.read_text())
    for group in data["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            rule["expr"] = _DURATION.sub(lambda m: m[1] + seconds(m[2] + m[3]), rule["expr"])
            if "for" in rule:
                rule["for"] = seconds(rule["for"])
    target.write_text(yaml.safe_dump(data))


class Receiver(ThreadingHTTPServer):
    """Keeps the alerts that Alertmanager sends it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.alerts: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def by_name(self) -> dict[str, dict[str, Any]]:
        return {a["labels"]["alertname"]: a for a in self.alerts}

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    class Handler(BaseHTTPRequestHandler):
        server: Receiver

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.alerts += [a for a in body["alerts"] if a["status"] == "firing"]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass


class Processes:
    """Started programs, each with a log in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []

    def start(self, name: str, command: list[str], **options: Any) -> None:
        log = (self.folder / f"{name}.log").open("w")
        self.started.append((subprocess.Popen(command, stdout=log, stderr=log, **options), log))

    def stop(self) -> None:
        for process, _ in self.started:
            process.send_signal(signal.SIGTERM)
        for process, log in self.started:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()


def get(url: str) -> bytes:
    # Long: two cores are shared with the server that is under load.
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


def answers(url: str) -> bool:
    try:
        get(url)
    except (OSError, urllib.error.HTTPError):
        return False
    return True


class Prometheus:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def _ask(self, path: str, **parameters: Any) -> list[dict[str, Any]]:
        data = json.loads(get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
        assert data["status"] == "success"
        return list(data["data"]["result"])

    def query(self, expr: str) -> list[dict[str, Any]]:
        return self._ask("query", query=expr)

    def range(self, expr: str, seconds: float, points: int = 240) -> list[dict[str, Any]]:
        end = time.time()
        return self._ask("query_range", query=expr, start=end - seconds, end=end, step=seconds / points)

    def value(self, expr: str) -> float | None:
        found = self.query(expr)
        return float(found[0]["value"][1]) if found else None

    def firing(self) -> set[str]:
        return {s["metric"]["alertname"] for s in self.query('ALERTS{alertstate="firing"}')}


def start(folder: Path, processes: Processes, target: str, receiver: Receiver, *, fast: bool = True) -> Prometheus:
    """Prometheus that scrapes ``target`` with the shipped rules (``fast``: hastened), and an Alertmanager."""
    ports = {name: free_port() for name in ("prometheus", "alertmanager")}
    addresses = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    for path in promtool.RULES:
        if fast:
            hastened(path, folder / path.name)
        else:
            (folder / path.name).write_text(path.read_text())
    config = {
        "global": {"scrape_interval": "1s" if fast else "5s", "evaluation_interval": "1s" if fast else "15s"},
        "rule_files": [path.name for path in promtool.RULES],
        "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": [target]}]}],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [addresses["alertmanager"]]}]}]},
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    hook = {"url": f"http://127.0.0.1:{receiver.server_address[1]}/", "send_resolved": True}
    routes = {
        "route": {"receiver": "hook", "group_by": ["alertname"], "group_wait": "0s", "group_interval": "1s"},
        "receivers": [{"name": "hook", "webhook_configs": [hook]}],
    }
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(routes))
    alertmanager = [promtool.tool("prometheus-alertmanager"), f"--config.file={folder / 'alertmanager.yml'}"]
    alertmanager += [f"--storage.path={folder / 'am'}", f"--web.listen-address={addresses['alertmanager']}"]
    processes.start("alertmanager", [*alertmanager, "--cluster.listen-address="])
    prometheus = [promtool.tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
    prometheus += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={addresses['prometheus']}"]
    processes.start("prometheus", prometheus, cwd=folder)
    for name, address in addresses.items():
        eventually(lambda address=address: answers(f"http://{address}/-/ready"), 30), name
    return Prometheus(ports["prometheus"])
