"""Stands in for vLLM's server in tests of the demo: same command line, same routes, up in a moment.

FAKE_VLLM says what it does: "" serves and counts, "port" and "memory" die as vLLM does, "hang" never gets ready,
"blind" serves and counts nothing. It has a child that ignores SIGTERM, and both write their pids to FAKE_VLLM_PIDS.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from boards import FakeWorker

from moe_monitor.export.collector import MoeCollector

BEHAVIOUR = os.environ.get("FAKE_VLLM", "")
DIRECTORY = Path(os.environ["MOE_MONITOR_DIR"])


class Handler(BaseHTTPRequestHandler):
    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.reply(
            MoeCollector(DIRECTORY, server="server-1", max_series=2048).render() if self.path == "/metrics" else b""
        )

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert request["model"] == "tiny-olmoe"
        if BEHAVIOUR != "blind":
            with LOCK:
                WORKER.rows = WORKER.rows + ONE
                WORKER.publish(passes=1)
        time.sleep(0.02)
        self.reply(b"{}")

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("host", "port", "model", "served-model-name", "max-model-len", "max-num-seqs"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--gpu-memory-utilization")
    arguments = parser.parse_args()
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    Path(os.environ["FAKE_VLLM_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    print("(APIServer pid=1) INFO non-default args: {}", flush=True)
    assert (Path(arguments.model) / "config.json").exists()
    if BEHAVIOUR == "port":
        raise OSError(98, "Address already in use")
    if BEHAVIOUR == "memory":
        os.kill(os.getpid(), signal.SIGKILL)
    if BEHAVIOUR == "hang":
        time.sleep(60)
    server = ThreadingHTTPServer((arguments.host, int(arguments.port)), Handler)
    print("(EngineCore pid=2) INFO Initializing a V1 LLM engine", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    LOCK = threading.Lock()
    WORKER = FakeWorker(DIRECTORY, tokens=0 if BEHAVIOUR == "blind" else 100)
    ONE = WORKER.rows.copy()
    main()
