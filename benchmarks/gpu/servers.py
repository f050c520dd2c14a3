"""Servers that the benchmarks start and always stop, and what their ``/metrics`` say."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$")
_RAISED = re.compile(r"(^|\] )[\w.]*(Error|Exception)(: |$)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def end_on_sigterm() -> None:
    """Let a SIGTERM run the ``finally`` blocks, so that no server outlives the script."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Server:
    """A vLLM API server in processes of its own. ``arguments`` follow ``--model FOLDER --port PORT``."""

    def __init__(self, folder: Path, port: int, log: Path, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.port, self.log, self.url = port, log, f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--port", str(port), "--served-model-name", "m", *arguments]
        self.started = time.monotonic()
        self.ready_s: float | None = None
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **env},
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - started from the main thread, before any other
            )

    def ask_ready(self) -> bool:
        """Whether /health answers. Raises RuntimeError with the end of the log when the server has ended."""
        if self.ready_s is not None:
            return True
        if self.process.poll() is not None:
            raise RuntimeError(f"the server on port {self.port} ended:\n{self.trouble()}")
        try:
            urllib.request.urlopen(self.url + "/health", timeout=2).close()
        except OSError:
            return False
        self.ready_s = time.monotonic() - self.started
        return True

    def wait_ready(self, seconds: float) -> float:
        """Seconds from the start to /health. Raises RuntimeError when it takes longer than ``seconds`` from now."""
        end = time.monotonic() + seconds
        while not self.ask_ready():
            if time.monotonic() > end:
                raise RuntimeError(f"the server on port {self.port} was not ready in time:\n{self.trouble()}")
            time.sleep(0.1)
        assert self.ready_s is not None
        return self.ready_s

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        """(name, labels, value) of every sample of /metrics."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=20) as answer:
            text = answer.read().decode()
        found = []
        for line in text.splitlines():
            match = _SAMPLE.match(line)
            if match:
                labels = dict(_LABEL.findall(match[2] or ""))
                found.append((match[1], labels, float(match[3])))
        return found

    def post(self, path: str, **body: Any) -> Any:
        """What the server answers."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method="POST")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())

    def notes(self) -> list[str]:
        """The monitor's own lines in the log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line[:240] for line in lines if "moe-monitor" in line]

    def trouble(self) -> str:
        """The end of the log's first traceback, else of the log."""
        text = self.log.read_text(errors="replace")
        lines = [line for line in text.splitlines() if not line.startswith("INFO: ")]
        first = next((i for i, line in enumerate(lines) if "Traceback" in line), len(lines))
        end = next((i for i in range(first, len(lines)) if _RAISED.search(lines[i])), len(lines) - 1)
        return "\n".join(line[-240:] for line in lines[max(0, end - 14) : end + 4])

    def processes(self) -> list[int]:
        """Its process, and what that has started."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[3]) == self.process.pid:  # the session
                    found.append(int(entry.name))
        return found

    def processor_time(self) -> dict[str, float]:
        """Seconds so far of the API server's event loop and its other threads, and of the other processes' threads
        apart from their main ones, which wait for the GPU awake. Threads that have ended are left out.
        """
        used = {"loop": 0.0, "front": 0.0, "engine": 0.0}
        for pid in self.processes():
            tasks: list[Path] = []
            with contextlib.suppress(OSError):
                tasks = list(Path(f"/proc/{pid}/task").iterdir())
            for task in tasks:
                with contextlib.suppress(OSError):
                    seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
                    main, front = int(task.name) == pid, pid == self.process.pid
                    if front or not main:
                        used["loop" if main else "front" if front else "engine"] += seconds
        return used

    def stop(self, patience: float = 8.0) -> None:
        """End the server and everything that it started. Safe to call twice."""
        group = self.process.pid  # it leads a session, so its group bears its id
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)


def stop_all(servers: Sequence[Server]) -> None:
    """Ask all at once, then make sure of each."""
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.process.pid, signal.SIGTERM)
    for server in servers:
        server.stop()


def total(samples: Sequence[tuple[str, dict[str, str], float]], name: str) -> float:
    """Sum over all series of a name; NaN when there is none."""
    values = [value for found, _, value in samples if found == name]
    return sum(values) if values else float("nan")
