"""A real vLLM server as a child process, and vLLM-independent knowledge of what a tiny model routes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

#: How long a server may take to start; set MOE_TEST_START_SECONDS on a machine that has other work.
START_SECONDS = float(os.environ.get("MOE_TEST_START_SECONDS", "240"))
INJECTED = Path(__file__).parent / "injected"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(run_dir: Path, **extra: str) -> dict[str, str]:
    """The environment of a vLLM process under test; pass-through apart from what the test decides."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("MOE_MONITOR_")}
    return {
        **keep,
        "MOE_MONITOR_DIR": str(run_dir),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(INJECTED), os.environ.get("PYTHONPATH", "")])),
        **extra,
    }


#: Two ways to start a server, after the Python interpreter.
API_SERVER = ("-m", "vllm.entrypoints.openai.api_server")
VLLM_SERVE = ("-m", "vllm.entrypoints.cli.main", "serve")


class Server:
    """A vLLM server on a free loopback port, its log in a file."""

    def __init__(
        self, model: Path, log: Path, run_dir: Path, *args: str, entry: tuple[str, ...] = API_SERVER, **env: str
    ) -> None:
        self.port = free_port()
        self.log_path = log
        self.run_dir = run_dir
        command = [sys.executable, *entry]
        command += ["--model", str(model), "--served-model-name", "tiny", "--dtype", "float32"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *args]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment(run_dir, **env), start_new_session=True
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait(self, timeout: float = START_SECONDS) -> Server:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log[-5000:]}")
            with contextlib.suppress(OSError):
                self.get("/health")
                return self
            time.sleep(0.5)
        raise RuntimeError(f"the server was not ready after {timeout} s:\n{self.log[-5000:]}")

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[bytes, dict[str, str]]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers or {})
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read(), {k.lower(): v for k, v in response.headers.items()}

    def complete(
        self,
        prompt: list[int],
        request_id: str,
        headers: dict[str, str] | None = None,
        *,
        id_in_body: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """One completion; options override greedy decoding of 16 tokens that end tokens do not stop.

        id_in_body: send the id there, where it may be any text, instead of in a header.
        """
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True} | options | ({"request_id": request_id} if id_in_body else {})
        named = {} if id_in_body else {"x-request-id": request_id}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", **named, **(headers or {})},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return dict(json.load(response))

    def metrics(self) -> Samples:
        return parse(self.get("/metrics")[0].decode())

    def stop(self) -> None:
        """SIGTERM to the server, as an orchestrator would; whatever is left of its group after that is killed."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@contextlib.contextmanager
def serving(model: Path, tmp: Path, *args: str, entry: tuple[str, ...] = API_SERVER, **env: str) -> Iterator[Server]:
    tmp.mkdir(exist_ok=True)
    server = Server(model, tmp / "server.log", tmp / "run", *args, entry=entry, **env)
    try:
        yield server.wait()
    finally:
        server.stop()


def parse(text: str) -> Samples:
    """Every sample of an exposition by name and labels."""
    return {
        (s.name, frozenset(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }


def select(samples: Samples, name: str, **labels: str) -> dict[frozenset[tuple[str, str]], float]:
    """Samples of one name whose labels include these."""
    want = set(labels.items())
    return {k[1]: v for k, v in samples.items() if k[0] == name and want <= k[1]}


def only(samples: Samples, name: str, **labels: str) -> float:
    (value,) = select(samples, name, **labels).values()
    return value


def eventually(check: Any, seconds: float) -> Any:
    """The first true result of ``check``; fails the test when none came in time."""
    end = time.monotonic() + seconds
    while True:
        result = check()
        if result:
            return result
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
