"""Bytes per sample, on a disk and on the wire: what a plan for many GPUs is calculated from.

    python benchmarks/prometheus/wire.py [--seconds 150] [--out benchmarks/results/prometheus_wire.json]

A real Prometheus scrapes a real exporter of one engine of 58 layers x 256 experts every second; every counter moves
between two scrapes. It sends all samples on by remote write to a receiver that counts bytes. At the end its head is
written to a block, whose size is divided by the samples in it. Needs the program prometheus.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from boards import FakeWorker
from prometheus_client.parser import text_string_to_metric_families
from serving import free_port

from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.exporter import Exporter


class Receiver(ThreadingHTTPServer):
    """Takes remote writes and counts them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.bytes = self.requests = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.bytes += len(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.requests += 1
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass


def get(url, method="GET"):
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=60) as answer:
        return answer.read()


def own(port):
    text = get(f"http://127.0.0.1:{port}/metrics").decode()
    return {
        s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples if s.name.startswith("prom")
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, port, receiver = Path(scratch), free_port(), Receiver()
        worker = FakeWorker(folder / "run", layers=tuple(range(58)), experts=256, tokens=4000, model_name="large")
        exporter = Exporter(MoeCollector(folder / "run"), "127.0.0.1", 0)
        exporter.start()
        config = {
            "scrape_configs": [
                {
                    "job_name": "moe-monitor",
                    "scrape_interval": "1s",
                    "static_configs": [{"targets": [exporter.url.removeprefix("http://")]}],
                }
            ],
            "remote_write": [{"url": f"http://127.0.0.1:{receiver.server_port}/"}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))
        command = [shutil.which("prometheus"), f"--config.file={folder}/prometheus.yml", "--web.enable-admin-api"]
        command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        rng = np.random.default_rng(1)
        added, passes, end = worker.rows.copy(), 1, time.monotonic() + args.seconds
        try:
            while time.monotonic() < end:
                passes += 20
                # about as many tokens in every step, never quite the same
                worker.rows = worker.rows + (added * rng.uniform(0.5, 1.5, added.shape)).astype(np.int64)
                worker.publish(passes)
                time.sleep(0.45)
            seen = own(port)
            snapshot = json.loads(get(f"http://127.0.0.1:{port}/api/v1/admin/tsdb/snapshot", "POST"))["data"]["name"]
            blocks = list((folder / "data" / "snapshots" / snapshot).glob("*/meta.json"))
            metas = [json.loads(b.read_text()) for b in blocks]
            disk = sum(f.stat().st_size for b in blocks for f in b.parent.rglob("*") if f.is_file())
        finally:
            process.terminate()
            process.wait(30)
            exporter.stop()
            worker.board.close()
        asked = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True)
        version = asked.stdout or asked.stderr
        sent = seen["prometheus_remote_storage_samples_total"] or 1
        samples = sum(m["stats"]["numSamples"] for m in metas)
        result = {
            "when": f"{datetime.now(timezone.utc):%Y-%m-%d}",
            "command": " ".join(["python", "benchmarks/prometheus/wire.py", *sys.argv[1:]]),
            "prometheus": version.split()[2],
            "series": int(seen["prometheus_tsdb_head_series"]),
            "samples_in_block": samples,
            "disk_bytes_a_sample": round(disk / samples, 2),
            "samples_sent": int(sent),
            "remote_write_bytes_a_sample": round(seen["prometheus_remote_storage_bytes_total"] / sent, 2),
            "received_bytes": receiver.bytes,
            "received_requests": receiver.requests,
        }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
