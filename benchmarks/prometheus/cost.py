"""Series counts and query cost of fleets, measured on a real Prometheus that scrapes simulated servers.

    python benchmarks/prometheus/cost.py [--only olmoe:20] [--minutes 5] [--out benchmarks/results/prometheus_cost.json]

Each server shows what `moe-monitor export` would: whole matrix, baseline, request histograms, timed steps. All servers
of a run show the same numbers under their own addresses, which costs Prometheus as much as different ones. The shipped
rules run as they are. Measured at the end: head series, memory, CPU, duration of each rule group, and each panel query
over 240 points, as a three-hour view has. The rule that compares layer times with their past reads six hours, which no
run here lasts: it is timed on six and a half hours that are written beforehand (`past`). So are the panels that read
the experts of one layer, over three hours (`experts`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml
from fleet import LARGE, OLMOE, ROOT, Server, record_baseline, traffic
from history import Prometheus, Requests, label_text

from moe_monitor.export.exposition import Exposition

sys.path.insert(0, str(ROOT / "tests"))
import queries

SHAPES = {"olmoe": OLMOE, "large": LARGE}
RUNS = (("olmoe", 1), ("olmoe", 20), ("olmoe", 200), ("large", 1), ("large", 20))
INTERVAL = 15
POINTS = 240
SLOW = 0.1  # seconds; half of what a panel's query may take


class Target(ThreadingHTTPServer):
    """All servers of a fleet: the same answer at every path."""

    request_queue_size = 256

    def __init__(self, shape, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        record_baseline(shape, "c4", folder / "normal.json", time.time())
        self.fleet, self.requests, self.exposition = Server("s", shape, 0), Requests(0), Exposition()
        self.identity = (("model_name", shape.name), ("engine", "0"))
        self.now = traffic(shape, "c4", 4000)
        self.step()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def step(self):
        self.fleet.step(self.now, INTERVAL)
        self.requests.step(1.0, *self.fleet.timed.seconds.values())
        self.fleet.status.sampled = self.requests.sampled
        text = self.exposition.render(self.fleet.metrics()).decode()
        traced = [f"{n}{label_text(labels)} {v:.9g}" for n, labels, v in self.requests.samples(self.identity)]
        self.body = (text + "\n".join(traced) + "\n").encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.server.body
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def get(url, **parameters):
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(parameters)}", timeout=120) as answer:
        return answer.read()


def scraped(text, name):
    """Samples of Prometheus' own metric: labels -> value."""
    found = re.findall(rf"^{name}(\{{.*?\}})? (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found}


def measure(url, pid, minutes, targets):
    text = get(url + "/metrics").decode()
    (series,) = scraped(text, "prometheus_tsdb_head_series").values()
    (cpu,) = scraped(text, "process_cpu_seconds_total").values()
    status = Path(f"/proc/{pid}/status").read_text()
    memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024
    durations = scraped(text, "prometheus_rule_group_last_duration_seconds")
    groups = {labels.rsplit(";", 1)[1].rstrip('"}'): round(v * 1000, 1) for labels, v in durations.items()}
    end = int(time.time())
    fill = {"job": "moe-monitor", "model": ".*", "instance": ".*", "engine": ".*", "layer": "7", "server": targets[0]}
    fill["kind"] = "decode"
    costs = []
    for uid, panel in queries.panels():
        for target in panel.get("targets", []):
            expr = target["expr"]
            for name, value in fill.items():
                expr = expr.replace(f"${name}", value)
            best, tries = float("inf"), 0
            while tries < 5 or (best > SLOW and tries < 20):  # the machine may be busy with other work
                began = time.perf_counter()
                if target.get("instant"):
                    get(url + "/api/v1/query", query=expr, time=end)
                else:
                    get(url + "/api/v1/query_range", query=expr, start=end - POINTS, end=end, step=1)
                best, tries = min(best, time.perf_counter() - began), tries + 1
            costs.append((round(best * 1000, 1), uid, panel["title"]))
    costs.sort(reverse=True)
    ours = 'count({__name__=~".+:.+",__name__!~"vllm:.+"})'
    recorded = json.loads(get(url + "/api/v1/query", query=ours))["data"]["result"]
    return {
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "minutes": minutes,
        "load_average": round(os.getloadavg()[1], 1),
        "series_in_head": int(series),
        "series_recorded": int(float(recorded[0]["value"][1])),
        "series_a_server": len([line for line in targets[1].splitlines() if line and line[:1] != b"#"]),
        "bytes_a_scrape": len(targets[1]),
        "memory_mib": memory,
        "cpu_cores": round(cpu / (minutes * 60), 3),
        "rule_groups_ms": groups,
        "panel_queries": len(costs),
        "panel_queries_ms": {"median": costs[len(costs) // 2][0], "slowest": costs[:5]},
    }


def run(name, servers, minutes):
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        target = Target(SHAPES[name], folder)
        # A path of its own and an instance label for every server, all at one port.
        port = target.server_address[1]
        scrape = [
            {
                "job_name": "moe-monitor",
                "static_configs": [
                    {
                        "targets": [f"127.0.0.1:{port}"],
                        "labels": {"__metrics_path__": f"/{i}", "instance": f"s{i}:8000"},
                    }
                    for i in range(servers)
                ],
            }
        ]
        config = {
            "global": {"scrape_interval": f"{INTERVAL}s", "evaluation_interval": f"{INTERVAL}s"},
            "rule_files": [str(ROOT / "grafana" / "rules" / "*.yml")],
            "scrape_configs": scrape,
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        url = "http://127.0.0.1:19095"
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        process = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:19095", "--log.level=error"])
        try:
            end = time.monotonic() + minutes * 60
            while time.monotonic() < end:
                time.sleep(INTERVAL)
                target.step()
            return measure(url, process.pid, minutes, ("s0:8000", target.body))
        finally:
            process.terminate()
            process.wait(60)
            target.shutdown()


CLASSES = (16, 23, 32)  # batch sizes that an engine goes through in six hours


def past(servers):
    """Milliseconds of the rule over six hours: as many engines, two kinds of steps, three sizes of batches."""
    (expr,) = [
        r["expr"] for r in queries.rules() if r.get("record") == "engine_batch:moe_layer_duration_seconds:over_past"
    ]
    end = int(time.time()) // 30 * 30
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        with (folder / "past.om").open("w") as file:
            for server, kind in itertools.product(range(servers), ("decode", "prefill")):
                for i, batch in enumerate(CLASSES):
                    labels = (
                        f'job="vllm",instance="s{server}:8000",model_name="m",engine="0",kind="{kind}",batch="{batch}"'
                    )
                    name = f"engine_batch:moe_layer_duration_seconds:max5m{{{labels}}}"
                    # one size after the other, ten minutes each
                    for at in range(end - 23400, end + 1, 30):
                        if at // 600 % len(CLASSES) == i or at > end - 60:
                            file.write(f"{name} {1e-4 + at % 7 * 1e-6:.6g} {at}\n")
            file.write("# EOF\n")
        command = [
            "promtool",
            "tsdb",
            "create-blocks-from",
            "openmetrics",
            str(folder / "past.om"),
            str(folder / "data"),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (folder / "prometheus.yml").write_text("{}\n")
        with Prometheus(folder, 19096) as server:
            times = []
            for _ in range(5):
                began = time.perf_counter()
                found = json.loads(get(server.url + "/api/v1/query", query=expr, time=end))["data"]["result"]
                times.append(time.perf_counter() - began)
            assert len(found) == servers * 2 * len(CLASSES), len(found)
    return round(1000 * min(times), 1)


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def experts(count):
    """Milliseconds, by panel, of the experts of one layer over three hours, at as many points as the panel has."""
    end = int(time.time()) // INTERVAL * INTERVAL
    span = 10800
    labels = 'job="moe-monitor",instance="s0:8000",model_name="m",engine="0"'
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        with (folder / "experts.om").open("w") as file:
            steps = range(end - span - 300, end + 1, INTERVAL)
            for expert in range(count):
                own = f'{{{labels},layer="7",expert="{expert}"}}'
                recorded = f'{{job="moe-monitor",model_name="m",layer="7",expert="{expert}"}}'
                for i, at in enumerate(steps):
                    file.write(f"moe_expert_tokens_total{own} {(1000 + expert) * i} {at}\n")
                for at in steps[::4]:  # that rule's interval is a minute
                    file.write(f"model_layer_expert:moe_expert_load:ratio5m{recorded} {1 + expert / 1e4} {at}\n")
            for i, at in enumerate(steps):
                file.write(f'moe_experts_per_token_sum{{{labels},layer="7"}} {(1000 + count / 2) * count * i} {at}\n')
            for at in steps:
                file.write(f"moe_model_experts{{{labels}}} {count} {at}\n")
            file.write("# EOF\n")
        command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(folder / "experts.om")]
        subprocess.run([*command, str(folder / "data")], check=True, stdout=subprocess.DEVNULL)
        (folder / "prometheus.yml").write_text("{}\n")
        fill = {"job": "moe-monitor", "model": "m", "instance": ".*", "engine": ".*", "layer": "7", "server": "s0:8000"}
        found = {}
        with Prometheus(folder, 19096) as server:
            for _, panel in queries.panels():
                if not panel["title"].startswith("Experts of layer"):
                    continue
                expr, points = panel["targets"][0]["expr"], panel["maxDataPoints"]
                for name, value in fill.items():
                    expr = expr.replace(f"${name}", value)
                times, before = [], processor_seconds(server.process.pid)
                for _ in range(10):
                    began = time.perf_counter()
                    step = span / points
                    answer = get(server.url + "/api/v1/query_range", query=expr, start=end - span, end=end, step=step)
                    times.append(time.perf_counter() - began)
                rows = json.loads(answer)["data"]["result"]
                assert len(rows) == count and len(rows[0]["values"]) > 0.95 * points, len(rows)
                spent = (processor_seconds(server.process.pid) - before) / len(times)
                found[panel["title"]] = {"best_ms": round(1000 * min(times), 1), "processor_ms": round(1000 * spent, 1)}
    return found


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="SHAPE:SERVERS", help="or `past`, `experts`")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "prometheus_cost.json")
    arguments = parser.parse_args()
    version = subprocess.run(["prometheus", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    result = {
        "command": "python benchmarks/prometheus/cost.py [--minutes M --only SHAPE:SERVERS ...]",
        "machine": f"{cpu[1] if cpu else platform.machine()}, 2 cores shared with other work",
        "prometheus": version,
        "python": platform.python_version(),
        "scrape_interval_s": INTERVAL,
        "past_rule_ms": before.get("past_rule_ms", {}),
        "experts_panels_ms": before.get("experts_panels_ms", {}),
        "runs": before.get("runs", {}),
    }
    if not arguments.only or "past" in arguments.only:
        result["past_rule_ms"] = {str(n): past(n) for n in (1, 20, 200)}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print("past", result["past_rule_ms"], flush=True)
    if not arguments.only or "experts" in arguments.only:
        result["experts_panels_ms"] = {"load_average": round(os.getloadavg()[1], 1)}
        result["experts_panels_ms"] |= {str(n): experts(n) for n in (64, 256)}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print("experts", result["experts_panels_ms"], flush=True)
    for name, servers in RUNS:
        if arguments.only and f"{name}:{servers}" not in arguments.only:
            continue
        result["runs"][f"{name}:{servers}"] = run(name, servers, arguments.minutes)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(name, servers, json.dumps(result["runs"][f"{name}:{servers}"]), flush=True)


if __name__ == "__main__":
    main()
